"""Where the page's files lie while a browser may fetch them: one folder a comparison, swept after a day.

Everything is kept below Gradio's own temporary folder, the one place it serves files from, so that no path of the
repository or the machine has to be opened to the web.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from gradio.utils import get_upload_folder

KEPT_SECONDS = 24 * 3600


class Shelf:
    """Folders for comparisons, each with a name that cannot be guessed."""

    def __init__(self) -> None:
        below = Path(get_upload_folder())
        below.mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix="twinframe-", dir=below))
        self._pinned: set[Path] = set()

    def new(self) -> Path:
        """An empty folder; sweeps what nobody can be looking at any more."""
        # Systems clean their temporary folders by themselves, which must not end a long-running app.
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep(time.time() - KEPT_SECONDS)
        return Path(tempfile.mkdtemp(dir=self.root))

    def pin(self, folder: Path) -> Path:
        """A copy of `folder` that is never swept."""
        copy = self.root / f"pinned-{folder.name}"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        self._pinned.add(copy)
        return copy

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _sweep(self, before: float) -> None:
        for folder in self.root.iterdir():
            if folder not in self._pinned and folder.stat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)
