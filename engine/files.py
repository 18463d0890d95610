"""Files that appear whole or not at all, folders that belong to one process, and where the user's cache lies."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


def claim(folder: Path) -> int | None:
    """Hold a folder as this process's own for as long as it lives, however it ends; None if that cannot be.

    By a lock on the folder itself, which the kernel gives back with the process, and which systemd-tmpfiles respects
    too. Returns its descriptor: closing that gives the folder back. None if another process holds it, if it is gone,
    or if the system has no such locks (Windows).
    """
    if fcntl is None:
        return None
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), folder.stat()):  # else it was removed just before
            return held
    os.close(held)
    return None


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove those that a process claimed which has ended since; nothing that anybody holds."""
    for folder in folders:
        if (held := claim(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def remove_partial(folder: Path) -> None:
    """Remove what was being written into `folder` when its process was ended from outside."""
    for file in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            file.unlink()
