"""LoRAs that somebody names: a file or a repository on the hub, found and looked at by the names of its tensors alone.

Only the one file is fetched. Knows no torch; engine/weights/fusing.py reads the values and fuses them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from engine import catalog
from engine.catalog import Lora
from engine.errors import LoadError, RequestError, shown
from engine.weights import checkpoint, hub

COPY_AGAIN = "copy it again"
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+\.safetensors))?", re.ASCII)
_USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and peft call a LoRA's file, which says nothing of what is in it."""
_LORA = re.compile(r"(^|[._])lora(_|\.|$)")
_OTHER_KINDS = (
    ("lokr_", "LoKr"),
    ("hada_", "LoHa"),
    ("oft_", "OFT"),
    ("dora_scale", "DoRA"),
    ("lora_magnitude", "DoRA"),
)
_LARGEST = 100.0


def given(texts: Iterable[str], model: str, offline: bool = False) -> str:
    """Have a further model, which is this one with these LoRAs; returns its id.

    Args:
        texts: each `FILE_OR_REPO[:SCALE]`, a repository as `owner/name[@revision][/file]`.

    Raises:
        RequestError: no such model, or what is written names no LoRA.
        LoadError: one cannot be had, or is none.
    """
    found: list[Lora] = []
    for text in texts:
        found.append(_find(text, {lora.name for lora in found}, offline))
    spec = catalog.model(model).with_loras(tuple(found))
    catalog.give(spec)
    return spec.id


def _find(text: str, taken: set[str], offline: bool) -> Lora:
    where, scale = _split(text)
    repository = revision = ""
    path = Path(where)
    if path.exists():
        file = _in_folder(path) if path.is_dir() else path
        inside = file.name
    elif (named := _REPOSITORY.fullmatch(where)) and (named[3] or not where.endswith(".safetensors")):
        repository = named[1]
        file, revision, inside = hub.lora(repository, named[2], named[3], _USUAL, offline)
    else:
        raise LoadError(f"There is no LoRA {shown(where)}: give a file, or a repository on the hub as owner/name.")
    _require_lora(file)
    return Lora(
        name=_name(file, repository, taken),
        scale=scale,
        file=file.resolve(),
        path=inside,
        repository=repository,
        revision=revision,
        digest=_digest(file),
    )


def _split(text: str) -> tuple[str, float]:
    where, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in scale or "\\" in scale:
        return text, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not (0 < abs(number) <= _LARGEST):
        raise RequestError(f"--lora {text} has the scale {shown(scale)}: write a number, as in FILE:0.8.")
    return where, number


def _in_folder(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    usual = [file for file in files if file.name in _USUAL]
    if len(usual or files) != 1:
        said = f"holds {len(files)} of them" if files else "holds none"
        raise LoadError(f"{folder} {said}: name a LoRA's file, FILE.safetensors.")
    return (usual or files)[0]


def _require_lora(file: Path) -> None:
    if file.suffix != ".safetensors":
        raise LoadError(
            f"{file} is no safetensors file: give the LoRA in safetensors, as other files may run code when they are "
            "read."
        )
    names = checkpoint.header(file, COPY_AGAIN).keys()
    for part, kind in _OTHER_KINDS:
        if any(part in name for name in names):
            raise LoadError(f"{file} is a {kind} adapter, which is not fused here: give a LoRA, or fused weights.")
    if not any(_LORA.search(name) for name in names):
        raise LoadError(f"{file} holds no LoRA, none of its tensors is called so: give a LoRA's file.")


def _name(file: Path, repository: str, taken: set[str]) -> str:
    told = file.stem if file.name not in _USUAL else repository.partition("/")[2] or file.resolve().parent.name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", told).strip("-_")[:40] or "lora"
    return next(name for n in range(1, len(taken) + 2) if (name := plain if n == 1 else f"{plain}-{n}") not in taken)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
