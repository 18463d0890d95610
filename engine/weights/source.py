"""Where weights come from. Apart from loading them, so that whoever only passes it on does without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import catalog
from engine.errors import LoadError
from engine.quantized import Quantized
from engine.weights import checkpoint, torchao_layout


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where weights come from; by default a bundled model's own folder, and the hub for every other."""

    folder: Path | None = None
    """A checkpoint's folder, or one that holds a checkpoint's folder for each model, named by its id."""
    random: bool = False
    """Random weights of the real architecture: speed and memory do not depend on the values, the pictures do."""
    offline: bool = False
    """Fetch nothing."""
    asked: tuple[str, ...] = ()
    """Ids of the models that are asked for: a checkpoint that is one of them is not meant for the others."""

    quantized: tuple[Quantized, ...] = ()
    """Denoisers that columns may name, for a process that has to be told (engine/serving/process.py)."""
    models: tuple[catalog.ModelSpec, ...] = ()
    """Models beyond the catalog's, for such a process too."""

    @property
    def remedy(self) -> str:
        """What to do about a bad file of the folder."""
        return f"copy it into {self.folder} again"

    @classmethod
    def create(
        cls,
        folder: str | Path | None = None,
        random: bool = False,
        offline: bool = False,
        asked: Sequence[str] = (),
        stored: Sequence[tuple[str, str | Path]] = (),
    ) -> Source:
        """From a command line; without a folder $TWINFRAME_WEIGHTS decides.

        Args:
            asked: ids of the models that are asked for.
            stored: names of quantized checkpoints, which columns may name from now on, and their folders, or
                repositories as owner/name[@revision].

        Raises:
            LoadError: a quantized checkpoint cannot be had, or is none as far as its JSON files and the headers of its
                weights tell; or the folder is not there, is neither a checkpoint nor a folder of some, or holds none of
                the models that are asked for.
            RequestError: no such model, or a checkpoint may not have its name.
        """
        given = tuple(torchao_layout.give(place, name, offline) for name, place in stored)
        said = "--weights" if folder else "TWINFRAME_WEIGHTS"
        folder = folder or os.environ.get("TWINFRAME_WEIGHTS") or None
        if random and folder:
            raise LoadError(f"Weights come from {folder} or at random: choose one of {said} and --random-weights.")
        if folder is None:
            return cls(random=random, offline=offline, quantized=given, models=catalog.given())
        folder = Path(folder)
        if not folder.is_dir():
            raise LoadError(f"There is no folder {folder}: give {said} a checkpoint's folder.")
        if not any(folder.glob("model_index.json")) and not any(folder.glob("*/model_index.json")):
            checkpoint.require_no_cache(folder, "--weights")
            raise LoadError(
                f"{folder} is not a checkpoint: it has no model_index.json, nor has any folder in it; give {said} a "
                "folder as diffusers saves it."
            )
        source = cls(folder=folder, offline=offline, asked=tuple(asked), quantized=given, models=catalog.given())
        source._require_any(folder)
        return source

    def _require_any(self, folder: Path) -> None:
        """Refuse a folder that holds none of the models asked for, or whose files are bad on the face of it."""
        specs = [catalog.model(name) for name in self.asked]
        if not specs:
            return
        if not (folder / "model_index.json").is_file():
            if not any((folder / spec.stored_as).is_dir() for spec in specs):
                inside = ", ".join(sorted(file.parent.name for file in folder.glob("*/model_index.json")))
                wanted = " or ".join(spec.stored_as for spec in specs)
                raise LoadError(f"{folder} has no folder named {wanted}, only {inside}: name it by the model's id.")
            return
        checkpoint.require_fit(folder, self.remedy, *specs)
        own = next(spec for spec in specs if not checkpoint.misfit(spec, folder, self.remedy))
        for part, (library, kind) in checkpoint.parts(own.folder).items():
            if checkpoint.is_module(kind):
                checkpoint.component(folder / part, library, self.remedy)


BUNDLED_OR_HUB = Source()
"""A bundled model's own weights, the hub's for every other."""
