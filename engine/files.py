"""Files that appear whole or not at all, folders that belong to one process, and where the user's cache lies."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine.errors import OutputError

if sys.platform != "win32":
    import fcntl


def cache_folder() -> Path:
    """What may be lost: $TWINFRAME_CACHE, or `twinframe` below the user's cache folder, or else, as for a user without
    a home or with one that cannot be written, the user's own temporary folder."""
    if named := os.environ.get("TWINFRAME_CACHE"):
        return Path(named)
    try:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinframe"
    except RuntimeError:  # the system knows of no home
        return own_temporary()
    return usual if can_be_written(usual) else own_temporary()


def can_be_written(folder: Path) -> bool:
    """Whether files can be written into a folder, or the folder can be made."""
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return nearest is not None and nearest.is_dir() and os.access(nearest, os.W_OK)


def check_target(file: Path) -> None:
    """See whether a result could be written there, before anything is measured.

    Raises:
        OutputError: it could not.
    """
    if file.is_dir():
        raise OutputError(f"{file} is a folder: name a file in it.")
    if not can_be_written(file.parent):
        raise OutputError(f"Cannot write into {file.parent}: choose another folder.")


def writable(folder: Path) -> None:
    """Make `folder` if it is missing, and check that files can be written into it.

    Raises:
        OutputError: it cannot be made or written.
    """
    probe = folder / ".twinframe-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # others may look at the same time
    except OSError as error:
        raise OutputError(f"Cannot write into {folder}: {error.strerror or error}. Choose another folder.") from error


def own_temporary() -> Path:
    """A folder below the system's temporary one that belongs to this user, so that what is in it can be trusted.

    Raises:
        OSError: the system has no temporary folder.
    """
    return _own_below(tempfile.gettempdir())


@functools.cache
def _own_below(place: str) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(place) / f"twinframe-{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not hasattr(os, "getuid") or folder.lstat().st_uid == user:
            return folder
    return Path(tempfile.mkdtemp(prefix="twinframe-", dir=place))  # somebody else has taken that name


def provide_user() -> None:
    """Give this process a user's name and a home where the system knows of none, as in a container that runs under any
    user id: torch, Triton and the hub's library ask for them and raise. Call it before they are imported."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}" if hasattr(os, "getuid") else "user"
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    # Docker gives such a user the root folder as home.
    if home is None or (home == Path(home.anchor) and not os.access(home, os.W_OK)):
        os.environ["HOME"] = str(own_temporary())


@contextlib.contextmanager
def tentative(folder: Path, *parts: str, worth_keeping: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Should what is done fail, take back the folders that it made on the way to `folder` and left empty.

    Args:
        parts: names in `folder` of what it may write there, and what is then of no use; what was there before stays.
        worth_keeping: whether the parts are of use all the same.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    new = [folder / part for part in parts if not (folder / part).exists()]
    try:
        yield
    except BaseException:
        if not worth_keeping():
            for part in new:
                with contextlib.suppress(OSError):
                    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


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
    partial = _beside(file)
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"Cannot write {file}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into instead of `folder`, beside it; it takes its place when all went well, and is removed
    otherwise.

    Raises:
        OutputError: there is something of that name already, or it cannot be written; nothing is left behind.
    """
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} is there already: name a folder that is not, or remove it.")
    if not can_be_written(folder.parent):
        raise OutputError(f"Cannot write into {folder.parent}: choose another folder.")
    partial = _beside(folder)
    with tentative(folder.parent):
        try:
            partial.mkdir(parents=True)
            yield partial
            partial.rename(folder)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"Cannot write {folder}: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _beside(target: Path) -> Path:
    """A name for what is not whole yet, which no other process has, on whichever machine that shares the folder."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


def lock(file: int) -> bool:
    """Lock an open file or folder for as long as it is open, however its process ends; False if another has it, or if
    the system has no such locks (Windows)."""
    if sys.platform == "win32":
        return False
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def claim(folder: Path) -> int | None:
    """Hold a folder as this process's own for as long as it lives, however it ends; None if that cannot be.

    By a lock on the folder itself, which the kernel gives back with the process, and which systemd-tmpfiles respects
    too. Returns its descriptor: closing that gives the folder back. None if another process holds it, if it is gone,
    or if the system has no such locks (Windows).
    """
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if lock(held) and os.path.samestat(os.fstat(held), folder.stat()):  # else it was removed just before
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
