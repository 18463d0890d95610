"""Files that appear whole or not at all, and where the user's cache lies."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine.errors import OutputError


def cache_folder() -> Path:
    """What may be lost: $TWINFRAME_CACHE, or `twinframe` below the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("TWINFRAME_CACHE", home / "twinframe"))


def write_whole(file: Path, content: bytes) -> None:
    """Write beside `file` first and then rename, so that no reader ever sees half of it.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f"Cannot write {file}: {error.strerror or error}.") from error
