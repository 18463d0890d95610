"""Where the page's files lie while a browser may fetch them: one folder a comparison, swept when old or too much.
What an app that was killed left behind is removed when the next one starts.

Everything is kept below Gradio's own temporary folder, the one place it serves files from, so that no path of the
repository or the machine has to be opened to the web.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from gradio.utils import get_upload_folder

from engine.environment import positive
from engine.errors import UNWRITABLE, OutputError
from engine.files import claim, remove_abandoned

log = logging.getLogger(__name__)

PREFIX = "twinframe-app_"
"""Of the folder of one running app."""
KEPT_HOURS = 24.0
KEPT_GB = 5.0
"""1e9 bytes."""
SWEEP_SECONDS = 60
"""No more often, as each time looks at every file."""
FRESH_SECONDS = 600
"""Younger folders are never swept: somebody is looking at them, or they are being written."""


class Shelf:
    """Folders for comparisons, each with a name that cannot be guessed.

    Args:
        kept_hours: how long a comparison is kept.
        kept_gb: how much all of them together may take; the oldest go first.

    Raises:
        OutputError: Gradio's temporary folder cannot be written.
    """

    def __init__(self, kept_hours: float = KEPT_HOURS, kept_gb: float = KEPT_GB) -> None:
        self._kept_seconds, self._kept_bytes = kept_hours * 3600, kept_gb * 1e9
        self._making, self._swept = threading.Lock(), 0.0
        below = Path(get_upload_folder())
        try:
            below.mkdir(parents=True, exist_ok=True)
            remove_abandoned(below.glob(f"{PREFIX}*"))  # of apps that were killed
            self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=below))
        except OSError as error:  # such as another user's, who has run Gradio on this machine before
            why = error.strerror or error
            raise OutputError(
                f"Cannot write into {below}: {why}. Set GRADIO_TEMP_DIR to a folder of your own."
            ) from error
        self._held = claim(self.root)
        self._pinned: set[Path] = set()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Shelf:
        """TWINFRAME_OUTPUTS_HOURS and TWINFRAME_OUTPUTS_GB.

        Raises:
            RequestError: one of them is not a positive number.
        """
        hours = positive(environment, "TWINFRAME_OUTPUTS_HOURS", KEPT_HOURS)
        return cls(hours, positive(environment, "TWINFRAME_OUTPUTS_GB", KEPT_GB))

    def new(self) -> Path:
        """An empty folder; now and then sweeps what nobody can be looking at any more.

        Raises:
            OutputError: none can be made.
        """
        now = time.time()
        try:
            with self._making:
                # Systems clean their temporary folders by themselves, which must not end a long-running app.
                if not self.root.is_dir():
                    self._give_back()
                    self.root.mkdir(parents=True)
                    self._held = claim(self.root)
                if due := now - self._swept >= SWEEP_SECONDS:
                    self._swept = now
            if due:
                self._sweep(now)
            return Path(tempfile.mkdtemp(dir=self.root))
        except OSError as error:
            log.error("no folder for a comparison: %s", error)
            raise OutputError(UNWRITABLE) from error

    @contextlib.contextmanager
    def offer(self) -> Iterator[Path]:
        """`new`, taken back if it is refused by raising."""
        folder = self.new()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def kept(self, name: str) -> Path | None:
        """The comparison's folder of that name; None if there is none, any more or at all."""
        folder = self.root / name
        held = re.fullmatch(r"\w+", name) and (folder / "comparison.json").is_file()
        return folder if held else None

    def pin(self, folder: Path) -> Path:
        """A copy of `folder` that is never swept."""
        copy = self.root / f"pinned-{folder.name}"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        self._pinned.add(copy)
        return copy

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._give_back()

    def _give_back(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _sweep(self, now: float) -> None:
        """Remove what is too old, what stayed empty, and from the newest back, what goes beyond the space allowed."""
        ages = {}
        for folder in self.root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # taken back at this very moment
                ages[folder] = now - folder.stat().st_mtime
        total = 0
        for folder, age in sorted(ages.items(), key=lambda pair: pair[1]):
            if folder in self._pinned:
                continue
            size = _size(folder)
            total += size
            unwanted = not size or total > self._kept_bytes
            if age > self._kept_seconds or (unwanted and age > FRESH_SECONDS):
                shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    """Bytes; of what is removed or renamed at this very moment, none."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += file.stat().st_size
    return total
