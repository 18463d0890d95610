"""Where measured rulers, noise floor and other-seed ceiling of LPIPS, are kept. engine/runtime/studio.py measures
them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict

from engine.files import cache_folder, write_whole
from engine.results import Ruler


class RulerShelf:
    """Rulers measured on this machine, in one JSON file below the user's cache folder ($TWINFRAME_CACHE).

    Losing the file costs a few seconds, so one that cannot be read or written is done without.
    """

    def __init__(self) -> None:
        self._file = cache_folder() / "rulers.json"
        self._kept: dict[str, Ruler] = {}

    def get(self, key: str) -> Ruler | None:
        """The ruler kept under this key; None if there is none."""
        if key not in self._kept:
            self._kept |= self._read()
        return self._kept.get(key)

    def put(self, key: str, ruler: Ruler) -> None:
        """Keep it, on disk too where that can be written."""
        self._kept |= self._read() | {key: ruler}  # another process may have added some since
        kept = {name: asdict(value) for name, value in self._kept.items()}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(kept, indent=1).encode())

    def _read(self) -> dict[str, Ruler]:
        try:
            return {key: Ruler(**values) for key, values in json.loads(self._file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
