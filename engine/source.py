"""Where weights come from. Apart from loading them, so that whoever only passes it on does without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.errors import LoadError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where weights come from; by default a bundled model's own folder, and the hub for every other."""

    folder: Path | None = None
    """A checkpoint's folder, or one that holds a checkpoint's folder for each model, named by its id."""
    random: bool = False
    """Random weights of the real architecture: speed and memory do not depend on the values, the pictures do."""
    offline: bool = False
    """Fetch nothing."""

    @classmethod
    def create(cls, folder: str | Path | None = None, random: bool = False, offline: bool = False) -> Source:
        """From a command line; without a folder $TWINFRAME_WEIGHTS decides.

        Raises:
            LoadError: the folder is not there, or neither a checkpoint nor a folder of some.
        """
        said = "--weights" if folder else "TWINFRAME_WEIGHTS"
        folder = folder or os.environ.get("TWINFRAME_WEIGHTS") or None
        if random and folder:
            raise LoadError(f"Weights come from {folder} or at random: choose one of {said} and --random-weights.")
        if folder is None:
            return cls(random=random, offline=offline)
        folder = Path(folder)
        if not folder.is_dir():
            raise LoadError(f"There is no folder {folder}: give {said} a checkpoint's folder.")
        if not any(folder.glob("model_index.json")) and not any(folder.glob("*/model_index.json")):
            raise LoadError(
                f"{folder} is not a checkpoint: it has no model_index.json, nor has any folder in it; give {said} a "
                "folder as diffusers saves it."
            )
        return cls(folder=folder, offline=offline)


BUNDLED_OR_HUB = Source()
"""A bundled model's own weights, the hub's for every other."""
