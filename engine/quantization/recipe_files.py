"""Recipes as data: what a file in assets/recipes/ changes in a family's rules, layer by layer.

A family's files are `<family>.json`, which `python -m engine tune` writes, and `<family>-<recipe>.json`. They may be
written by hand, and is read here with distrust. Knows nothing
of transformers: whether a layer exists is seen when a plan is made (engine/quantization/recipes.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from engine.catalog import ASSETS
from engine.columns import recipe_named
from engine.errors import LoadError
from engine.formats import INT8, NVFP4, PRECISIONS, QUANTIZED

FOLDER = ASSETS / "recipes"
LARGEST_ROTATION = 1024
"""Values of a block that is rotated."""
ROTATED = (NVFP4.id, INT8.id)
"""What a rotation is for: the others have a scale with an exponent of its own for few values, or e4m3 values."""
_TUNING = {
    "layers": {},
    "low_rank": {},
    "searched": False,
    "weight_only_steps": [0, 0],
    "calibrated": [],
    "rotation": 0,
    "four_over_six": False,
    "weights_alone": [],
}
"""What a file may say of a precision, and what holds where it does not."""
_FILE = re.compile(r"[\w.-]+\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What changes in one precision."""

    layers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Fully qualified layer name -> the precision it is stored in, whatever the rules say."""
    low_rank: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Name of a layer in NVFP4 -> rank of the bf16 branch beside it."""
    searched: bool = False
    """Block scales of NVFP4 weights are searched for the least squared error."""
    weight_only_steps: tuple[int, int] = (0, 0)
    """First and last steps of a picture in which activations stay bf16 (engine/quantization/remedies.py)."""
    calibrated: tuple[Path, ...] = ()
    """Files with NVFP4 weights that were calibrated (engine/quantization/gptq.py); a layer in them is not rounded
    anew."""
    rotation: int = 0
    """Largest block of inputs that is rotated before it is quantized, a power of two; 0 for no rotation
    (engine/quantization/rotation.py)."""
    four_over_six: bool = False
    """A block of an NVFP4 weight or activation takes the better of two scales."""
    weights_alone: tuple[str, ...] = ()
    """Layers in NVFP4 whose activations stay bf16 in every step, for which the weight is unpacked."""
    source: str = ""
    """The file, for messages."""


@dataclass(frozen=True, kw_only=True)
class TunedRecipe:
    """One recipe file."""

    id: str
    base: str
    """Id of the family's recipe whose rules it changes."""
    summary: str
    tunings: Mapping[str, Tuning]
    """Precision that is asked for -> what changes; in any other the base's rules alone hold."""


def in_words(weight_only_steps: tuple[int, int]) -> str:
    """First and last steps, "the first 2 and the last 1 steps"; empty if there are none."""
    ends = [f"the {end} {count}" for end, count in zip(("first", "last"), weight_only_steps, strict=True) if count]
    return f"{' and '.join(ends)} steps" if ends else ""


def read(family: str, folder: Path = FOLDER) -> tuple[TunedRecipe, ...]:
    """The family's recipe files; none is no mistake.

    Raises:
        LoadError: one is damaged or says what cannot be; the sentence names it.
    """
    first = folder / f"{family}.json"
    return tuple(_parse(file) for file in (first, *sorted(folder.glob(f"{family}-*.json"))) if file.is_file())


def write(file: Path, recipe: TunedRecipe, chosen: Mapping[str, object]) -> bytes:
    """The bytes of a recipe file; `chosen` says how it was found.

    Raises:
        LoadError: `read` would refuse it.
    """
    content = {
        "id": recipe.id,
        "base": recipe.base,
        "summary": recipe.summary,
        "tunings": {
            precision: {
                "searched": t.searched,
                "weight_only_steps": list(t.weight_only_steps),
                "calibrated": [path.name for path in t.calibrated],
                "rotation": t.rotation,
                "four_over_six": t.four_over_six,
                "weights_alone": list(t.weights_alone),
                "layers": dict(t.layers),
                "low_rank": dict(t.low_rank),
            }
            for precision, t in recipe.tunings.items()
        },
        "chosen": dict(chosen),
    }
    _recipe(file, content)
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _parse(file: Path) -> TunedRecipe:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _refused(file, "it is not valid JSON") from error
    return _recipe(file, content)


def _recipe(file: Path, content: object) -> TunedRecipe:
    if not isinstance(content, dict):
        raise _refused(file, "it is not an object")
    for name in ("id", "base", "summary"):
        if not isinstance(content.get(name), str) or not content[name]:
            raise _refused(file, f"{name} is not text")
    tunings = content.get("tunings")
    if not isinstance(tunings, dict) or not tunings:
        raise _refused(file, "tunings is not an object with a precision or more")
    return TunedRecipe(
        id=content["id"],
        base=recipe_named(content["base"]),
        summary=content["summary"],
        tunings=MappingProxyType({name: read_tuning(file, name, tuning) for name, tuning in tunings.items()}),
    )


def functional(tuning: Tuning) -> dict[str, object]:
    """What of a tuning still matters once weights are stored as it made them, as a file says it."""
    return {
        "weight_only_steps": list(tuning.weight_only_steps),
        "low_rank": dict(tuning.low_rank),
        "rotation": tuning.rotation,
        "four_over_six": tuning.four_over_six,
        "weights_alone": list(tuning.weights_alone),
    }


def read_tuning(file: Path, precision: str, content: object) -> Tuning:
    """What a file says of a precision.

    Raises:
        LoadError: it says what cannot be.
    """
    if precision not in QUANTIZED:
        raise _refused(file, f"there is no quantized precision {precision!r}")
    if not isinstance(content, dict) or content.keys() - _TUNING.keys():
        raise _refused(file, f"its tuning for {precision} holds other things than {', '.join(_TUNING)}")
    layers, ranks, searched, steps, calibrated, rotation, four, alone = (content.get(k, d) for k, d in _TUNING.items())
    if not isinstance(layers, dict) or not isinstance(ranks, dict):
        raise _refused(file, "layers and low_rank are not objects")
    if not isinstance(searched, bool) or not isinstance(four, bool):
        raise _refused(file, "searched and four_over_six are not true or false")
    if type(rotation) is not int or not _is_block(rotation):
        raise _refused(
            file, f"its rotation is {rotation!r}, not 0 for none or a power of two from 2 to {LARGEST_ROTATION}"
        )
    if rotation and precision not in ROTATED:
        raise _refused(file, f"it has a rotation in {precision}, and not in {' or '.join(ROTATED)}")
    if four and precision != NVFP4.id:
        raise _refused(file, f"it has four over six in {precision}, and not in {NVFP4.id}")
    if not isinstance(steps, list) or [type(count) for count in steps] != [int, int] or min(steps) < 0:
        raise _refused(file, "weight_only_steps is not two whole numbers from 0, of first and last steps")
    if not isinstance(calibrated, list) or not all(isinstance(one, str) and _FILE.match(one) for one in calibrated):
        raise _refused(file, "calibrated is not a list of names of .safetensors files beside it")
    if (any(steps) or calibrated) and precision != NVFP4.id:
        raise _refused(file, f"it has weight-only steps or calibrated weights in {precision}, and not in nvfp4")
    if not isinstance(alone, list) or not all(isinstance(name, str) for name in alone):
        raise _refused(file, "weights_alone is not a list of layers")
    for name in alone:
        if layers.get(name, precision) != NVFP4.id:
            raise _refused(file, f"{name} has its weights alone quantized but is not in nvfp4")
    for name, stored in layers.items():
        if stored not in PRECISIONS:
            raise _refused(file, f"{name} is to be stored in {stored!r}, which is no precision")
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise _refused(file, f"the rank of {name} is {rank!r}, not a whole number from 1")
        if layers.get(name, precision) != NVFP4.id:
            raise _refused(file, f"{name} has a low-rank branch but is not in nvfp4")
    return Tuning(
        layers=MappingProxyType(layers),
        low_rank=MappingProxyType(ranks),
        searched=searched,
        weight_only_steps=tuple(steps),
        calibrated=tuple(file.parent / name for name in calibrated),
        rotation=rotation,
        four_over_six=four,
        weights_alone=tuple(alone),
        source=file.name,
    )


def _is_block(rotation: int) -> bool:
    return rotation == 0 or (2 <= rotation <= LARGEST_ROTATION and not rotation & (rotation - 1))


def _refused(file: Path, what: str) -> LoadError:
    restore = ", or restore it with git checkout" if file.is_relative_to(FOLDER) else ""
    return LoadError(f"The recipe file {file} cannot be used, as {what}: correct it{restore}.")
