"""Files that appear whole or not at all, and where the user's cache lies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from engine.errors import OutputError


def cache_folder() -> Path:
    """What may be lost: $TWINFRAME_CACHE, or `twinframe` below the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("TWINFRAME_CACHE", home / "twinframe"))


def write_whole(file: Path, content: bytes) -> None:
    """Write `content` into `file`, so that no reader ever sees half of it.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    with whole(file) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """What to write to instead of `file`, beside it; it takes its place when all went well, and is removed otherwise.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"Cannot write {file}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what was being written into `folder` when its process was ended from outside."""
    for file in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            file.unlink()
