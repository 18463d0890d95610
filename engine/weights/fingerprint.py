"""What tells one checkpoint or recipe from another: a digest of all that shapes a picture.

A number that was kept for one must not serve another, and an evaluation must not go on with another. A checkpoint's
fingerprint has a part for each of its components, so that a refusal can name the one that changed. Knows nothing of
models, and loads nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.quantized import Quantized

if TYPE_CHECKING:
    from engine.quantization.recipes import Recipe

READ_WHOLE = 16_000_000
"""Bytes up to which a file's content counts. Of a larger one, which holds weights and takes minutes to read, its name,
size and time do."""
NAMES = ("id", "summary", "source")
"""Fields of a recipe that say what it is called, and change nothing."""


def of_folder(folder: Path) -> str:
    """Of a checkpoint as diffusers saves it: all files that a pipeline may read, component by component.

    These are model_index.json and whatever lies in the folders that it names: configurations, the scheduler's and the
    tokenizers' too, and weights. Notes and pictures beside them do not count.

    Returns:
        "model_index.json 0a1b2c3d, scheduler 4e5f6a7b, ...", in the order of their names.
    """
    index = folder / "model_index.json"
    parts = {index.name: [index]}
    for name in sorted(_named(index)):
        parts[name] = sorted(file for file in (folder / name).rglob("*") if file.is_file())
    return ", ".join(f"{name} {_digest(_contents(files, folder))}" for name, files in parts.items())


def of_recipe(recipe: Recipe) -> str:
    """Of a recipe: its rules, what its file says, and the calibrated weights beside that, or a checkpoint's files; not
    what it is called."""
    return _digest([json.dumps(recipe, default=_plain, sort_keys=True).encode()])


def changed(held: str, now: str) -> str:
    """Which parts of a checkpoint differ between two fingerprints of `of_folder`, in words."""
    one, other = (dict(part.rpartition(" ")[::2] for part in side.split(", ")) for side in (held, now))
    names = [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]
    return ", ".join(name for name in names if name) or f"{held}, not {now}"


def _plain(value: object) -> object:
    """What JSON does not know, in what it knows."""
    if isinstance(value, Path):
        return _digest(_contents([value], value.parent))
    if isinstance(value, Quantized):
        return _digest(_contents(value.files, value.folder))
    if isinstance(value, Mapping):
        return dict(value)
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is no part of a recipe")
    return {field.name: getattr(value, field.name) for field in fields(value) if field.name not in NAMES}


def _named(index: Path) -> list[str]:
    try:
        return [name for name, kind in json.loads(index.read_bytes()).items() if isinstance(kind, list)]
    except (OSError, ValueError, AttributeError):  # loading says what is wrong with it
        return []


def _contents(files: Iterable[Path], folder: Path) -> Iterable[bytes]:
    for file in files:
        if not file.is_file():
            continue
        state = file.stat()
        yield str(file.relative_to(folder)).encode()
        if state.st_size <= READ_WHOLE:
            yield file.read_bytes()
        else:
            yield f"{state.st_size} {state.st_mtime_ns}".encode()


def _digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:8]
