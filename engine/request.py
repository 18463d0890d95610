"""One comparison as asked for: `CompareRequest`, the only way into the engine.

Validates every field against the model's spec, so that whatever holds a `CompareRequest` may trust it. Knows
nothing of devices; whether this machine can run a precision is decided by engine/quantization/capability.py.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine import catalog, columns
from engine.catalog import ModelSpec
from engine.columns import Column
from engine.errors import RequestError, shown
from engine.formats import DEFAULTS, PRECISIONS, REFERENCE


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """A validated request; build it with `CompareRequest.create`.

    `height` and `width` are pixels, `num_frames` is 1 for pictures, `seed` seeds a CPU generator, `batch_size` counts
    pictures or clips per precision. With `previews`, what is being made is shown between the steps, and not timed.
    `precisions` are columns (engine/columns.py), each once and in one order, the reference first; `recipe` is that of
    those that name none, so that no other column names it.
    """

    model: str
    precisions: tuple[str, ...]
    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int
    batch_size: int
    recipe: str
    previews: bool = False

    @classmethod
    def create(
        cls,
        prompt: object,
        *,
        model: object = None,
        precisions: object = None,
        seed: object = None,
        num_inference_steps: object = None,
        guidance_scale: object = None,
        height: object = None,
        width: object = None,
        num_frames: object = None,
        batch_size: object = None,
        recipe: object = None,
        previews: object = None,
    ) -> CompareRequest:
        """Validate raw values from a page, an API call or a command line; None means the model's default.

        Raises:
            RequestError: the first field that is wrong, in one sentence that says what is allowed.
        """
        spec = catalog.model(catalog.DEFAULT if model is None else model)
        defaults, limits = spec.defaults, spec.limits
        size = (_whole("height", height, defaults.height), _whole("width", width, defaults.width))
        _check_size(spec, *size)
        recipe = spec.recipes[0] if recipe is None else columns.recipe_of(spec, recipe)
        return cls(
            model=spec.id,
            precisions=_precisions(precisions, spec, recipe),
            prompt=_prompt(prompt, limits.prompt_characters),
            seed=_ranged("seed", seed, defaults.seed, limits.seed),
            num_inference_steps=_ranged(
                "num_inference_steps", num_inference_steps, defaults.num_inference_steps, limits.num_inference_steps
            ),
            guidance_scale=_guidance(guidance_scale, defaults.guidance_scale, limits.guidance_scale),
            height=size[0],
            width=size[1],
            num_frames=_frames(spec, num_frames),
            batch_size=_ranged("batch_size", batch_size, defaults.batch_size, limits.batch_size),
            recipe=recipe,
            previews=_switch("previews", previews),
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """What `precisions` stand for."""
        return tuple(map(self.column, self.precisions))

    def column(self, written: str) -> Column:
        """What one of `precisions` stands for."""
        return Column.of(written, self.recipe)

    def covers(self, asked: CompareRequest) -> bool:
        """Whether what was made for this request shows all that `asked` asks for: the same in everything that decides
        a pixel, and each of its columns, however written."""
        same = replace(self, precisions=asked.precisions, recipe=asked.recipe, previews=asked.previews) == asked
        return same and set(asked.columns) <= set(self.columns)

    def to_json(self) -> dict[str, Any]:
        """The request as plain JSON values; `from_json` gives it back equal."""
        return asdict(self) | {"precisions": list(self.precisions)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CompareRequest:
        """Validate a saved request again.

        Raises:
            RequestError: a field is unknown, missing or out of range.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            fields = ", ".join(cls.__dataclass_fields__)
            named = ", ".join(sorted(u if str(u).isidentifier() else shown(u) for u in unknown))
            raise RequestError(f"A request has no field {named[:80]}: its fields are {fields}.")
        return cls.create(values.get("prompt"), **{k: v for k, v in values.items() if k != "prompt"})


def _prompt(value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise RequestError(f"The prompt must be text, not {_kind(value)}.")
    prompt = value.strip()
    if not prompt:
        raise RequestError("The prompt is empty: describe the picture in a few words.")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in prompt):  # control, half a pair
        raise RequestError("The prompt has characters that are not text: remove control characters and retry.")
    if len(prompt) > limit:
        raise RequestError(f"The prompt has {len(prompt)} characters: this model takes at most {limit}.")
    return prompt


def _precisions(value: object, spec: ModelSpec, recipe: str) -> tuple[str, ...]:
    if value is None:
        return DEFAULTS
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, Iterable) or isinstance(value, (bytes, dict)):
        raise RequestError(f"precisions must be a list of names from {', '.join(PRECISIONS)}, not {_kind(value)}.")
    asked = list(value)
    if not asked:
        raise RequestError(f"No precision was chosen: choose from {', '.join(PRECISIONS)}.")
    found = [Column.parse(text, spec, recipe) for text in (REFERENCE, *asked)]
    return tuple(column.written(recipe) for column in columns.ordered(found, spec))


def _switch(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {_kind(value)}.")
    return bool(value)


def _whole(name: str, value: object, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        raise RequestError(f"{name} must be a whole number, not {_kind(value)}.")
    if value != int(value):
        raise RequestError(f"{name} must be a whole number, not {shown(value)}.")
    return int(value)


def _ranged(name: str, value: object, default: int, bounds: tuple[int, int]) -> int:
    number = _whole(name, value, default)
    if not bounds[0] <= number <= bounds[1]:
        raise RequestError(f"{name} is {shown(number)}: it must lie between {bounds[0]} and {bounds[1]}.")
    return number


def _check_size(spec: ModelSpec, height: int, width: int) -> None:
    limits = spec.limits
    if (height, width) in limits.sizes:
        return
    if limits.size_multiple is None:
        wanted = "choose " + ", ".join(f"{w}x{h}" for h, w in limits.sizes)
    elif not all(limits.side[0] <= side <= limits.side[1] for side in (height, width)):
        wanted = f"each side must lie between {limits.side[0]} and {limits.side[1]} pixels"
    elif height % limits.size_multiple or width % limits.size_multiple:
        near = "x".join(str(side - side % limits.size_multiple) for side in (width, height))
        wanted = f"both sides must be multiples of {limits.size_multiple}, such as {near}"
    elif height * width > limits.max_pixels:
        wanted = f"at most {limits.max_pixels:,} pixels are allowed, and that is {height * width:,}"
    else:
        return
    raise RequestError(f"{spec.name} does not make {shown(width)}x{shown(height)} {spec.makes}: {wanted}.")


def _frames(spec: ModelSpec, value: object) -> int:
    bounds, step = spec.limits.num_frames, spec.limits.frames_step
    frames = _whole("num_frames", value, spec.defaults.num_frames)
    if spec.modality == "image" and frames != 1:
        raise RequestError(f"num_frames is {shown(frames)}: {spec.name} makes pictures, so leave it out.")
    _ranged("num_frames", frames, frames, bounds)
    if (frames - 1) % step:
        below = frames - 1 - (frames - 1) % step + 1
        near = " or ".join(str(n) for n in (below, below + step) if bounds[0] <= n <= bounds[1])
        raise RequestError(f"num_frames is {frames}: it must be one more than a multiple of {step}, such as {near}.")
    return frames


def _guidance(value: object, default: float, bounds: tuple[float, float]) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        raise RequestError(f"guidance_scale must be a number, not {_kind(value)}.")
    if bounds[0] == bounds[1] != value:
        raise RequestError(f"guidance_scale is {shown(value)}: this model has no guidance, so leave it out.")
    if not bounds[0] <= value <= bounds[1]:
        raise RequestError(f"guidance_scale is {shown(value)}: it must lie between {bounds[0]:g} and {bounds[1]:g}.")
    return float(value)


def _finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # isfinite() cannot take the largest integers


def _kind(value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {shown(value)}"
    return {"str": "text", "NoneType": "nothing", "bool": "true or false", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )
