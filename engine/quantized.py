"""Quantized checkpoints that this process was given, by the short names under which columns name them (`nvfp4@NAME`).

Whoever starts the process gives folders, or repositories on the hub: the command line by what follows an @, app.py by
`--quantized NAME=DIR`. A repository's own name ends in its commit, so that every column that names it is pinned. Page
and API know names alone, so that no visitor can have a path looked at. Reads no file: engine/weights/torchao_layout.py
does. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine import catalog
from engine.errors import RequestError, shown

OLD_RECIPES = ("seed", "seed-corrected")
"""Names that recipes had; no checkpoint may take one."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,39}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A denoiser that is stored quantized, as its files' headers say."""

    name: str
    folder: Path
    """With the denoiser's own config.json."""
    models: tuple[str, ...]
    """Ids of the catalog's models whose denoiser it is."""
    format: str
    """In which most of its quantized weights are."""
    layers: Mapping[str, str]
    """Fully qualified names of its quantized layers -> formats."""
    tuning: Mapping[str, object]
    """What else its recipe did, as a recipe file says it (engine/quantization/recipe_files.py); empty for one that
    Twinframe did not write."""
    summary: str
    """What it is, in a sentence."""
    source: str = ""
    """Fingerprint of the bf16 weights that it was made of; empty where nobody said."""
    repository: str = ""
    """On the hub, as owner/name; empty for a folder."""
    revision: str = ""
    """The repository's commit."""

    @property
    def provenance(self) -> dict[str, str]:
        """Where it is from, for what is made of it."""
        hub = {"repository": self.repository, "revision": self.revision} if self.repository else {}
        return {"name": self.name, **hub}

    @property
    def files(self) -> tuple[Path, ...]:
        """What decides its weights."""
        return tuple(sorted((*self.folder.glob("*.json"), *self.folder.glob("*.safetensors"))))


_given: dict[str, Quantized] = {}


def give(checkpoint: Quantized) -> None:
    """Have columns name a checkpoint from now on; one of the same name gives way."""
    _given[checkpoint.name] = checkpoint


def given() -> tuple[Quantized, ...]:
    """All of them."""
    return tuple(_given.values())


def named(name: str) -> Quantized | None:
    """The one of this name."""
    return _given.get(name)


def of_model(model: str) -> tuple[Quantized, ...]:
    """Those of a model, by its id."""
    return tuple(found for found in _given.values() if model in found.models)


def check_name(name: str) -> str:
    """The name, if a checkpoint may have it.

    Raises:
        RequestError: it is no plain name, or that of a recipe.
    """
    recipes = {*OLD_RECIPES, *(recipe for spec in catalog.MODELS.values() for recipe in spec.recipes)}
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"A quantized checkpoint cannot be called {shown(name)}: take up to 40 letters, digits, dots, dashes and "
            "underscores, as in --quantized mine=DIR."
        )
    if name in recipes:
        raise RequestError(f"A quantized checkpoint cannot be called {name}, which is a recipe: choose another name.")
    return name


def name_of(repository: str, revision: str) -> str:
    """A repository's name: after its own, and the first digits of its commit."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", repository.rpartition("/")[2]).strip("-._")[:32] or "checkpoint"
    return f"{plain}-{revision[:7]}"


def name_for(folder: Path) -> str:
    """A free name for a folder, after its own."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-._")[:32] or "checkpoint"
    taken = {found.name for found in _given.values() if found.folder not in (folder, folder / "transformer")}
    for number in range(1, len(taken) + 3):
        name = plain if number == 1 else f"{plain}-{number}"
        try:
            if check_name(name) not in taken:
                return name
        except RequestError:  # it is a recipe's
            continue
    return f"{plain}-{len(taken) + 3}"
