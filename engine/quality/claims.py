"""Which of several processes makes what: work in a folder that all of them see, each piece of it taken by one.

Processes may be on one machine or on many that share the folder, come and go at any time, and end in any way. None of
them leads, none listens, and nobody waits for somebody who is gone. What a process takes is a file that only one can
create, `claims/PIECE.N`, by `open` with O_CREAT and O_EXCL, which NFS keeps to since its version 3 (RFC 1813, section
3.3.8). Its content is the name of whoever took it. A piece whose owner is gone is taken by creating `PIECE.N+1`. No
claim is ever changed or removed before all is done, so there is no moment at which two could follow one another.

An owner is there as long as its file in `processes/` is and either changes or is locked. On one machine the kernel says
so: it gives a lock back at once, however a process ends. Between machines the count in the file says so, which its
owner raises every BEAT_SECONDS: whoever sees it unchanged for LEASE_SECONDS, by a clock of their own, takes its pieces
back. Nobody's clock is compared with another's, and files are written in place and opened anew to be read, so that NFS
shows what its close-to-open consistency promises.

**A claim saves work and decides nothing else.** A process that was only asleep goes on with pieces that another has
taken since; whatever is made must come out the same twice and be written whole. Knows nothing of what pieces are.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import OutputError
from engine.files import lock

BEAT_SECONDS = 5.0
"""Between two signs of life."""
LEASE_SECONDS = 60.0
"""Without one, after which what a process on another machine had is taken by others."""
LOOK_SECONDS = 1.0
"""Between two looks of somebody who has nothing to do but what others have taken."""
LOCKED = "locked"
"""Said in the file of a process whose lock on it tells that it is there."""
TRIES = 10
"""Of entering a folder that another process, which is done, removes meanwhile."""


class Claims:
    """This process, among those at work in a folder, from `with` on.

    Args:
        folder: theirs alone; it is made, and removed by whoever calls `end`.

    Raises:
        OutputError: from `with`, the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.name = secrets.token_hex(8)
        self._folder, self._claims, self._processes = folder, folder / "claims", folder / "processes"
        self._file = self._processes / self.name
        self._attempts: dict[str, int] = {}
        """Piece -> the newest claim of it that was seen."""
        self._owners: dict[tuple[str, int], str] = {}
        self._signs: dict[str, tuple[bytes, float]] = {}
        """Process -> what its file said, and since when it has, on our monotonic clock."""
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._own = self._enter()
        except OSError as error:
            raise OutputError(
                f"Cannot write into {self._folder}: {error.strerror or error}. Choose another folder."
            ) from error
        self._said = f"{_machine()} {LOCKED if lock(self._own) else 'unlocked'}"
        self._write(0)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beating.join()
        with contextlib.suppress(OSError):
            self._file.unlink()
        os.close(self._own)
        for folder in (self._processes, self._claims, self._folder):  # where nothing is left in them
            with contextlib.suppress(OSError):
                folder.rmdir()

    def look(self) -> None:
        """See what has been taken by now."""
        with contextlib.suppress(OSError):
            for claim in self._claims.iterdir():
                piece, _, attempt = claim.name.rpartition(".")
                if piece and attempt.isdecimal():  # an NFS client may have files of its own here
                    self._attempts[piece] = max(int(attempt), self._attempts.get(piece, 0))

    def is_taken(self, piece: str) -> bool:
        """Whether anybody had taken it at the last `look`, whatever became of them."""
        return piece in self._attempts

    def take(self, piece: str) -> bool:
        """Whether it is this process's from now on, or was already; else somebody has it who is at work."""
        latest = self._attempts.get(piece, 0)
        if latest:
            if (owner := self._owner(piece, latest)) == self.name:
                return True
            if self._is_there(owner):
                return False
        return self._create(piece, latest + 1)

    def holds(self, piece: str) -> bool:
        """Whether a piece that was taken has been left to this process: nobody thought it gone."""
        return not (self._claims / f"{piece}.{self._attempts.get(piece, 0) + 1}").exists()

    def others(self) -> int:
        """How many processes are at work besides this one."""
        return sum(map(self._is_there, self._listed()))

    def beside(self) -> bool:
        """Whether another process is at work on this very machine."""
        return any(self._read(name).startswith(_machine().encode()) and self._is_there(name) for name in self._listed())

    @property
    def over(self) -> bool:
        """Somebody has called `end`: all is done."""
        return not self._file.exists()

    def end(self) -> None:
        """All is done: whoever still waits hears so, and nothing is left of the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _enter(self) -> int:
        for _ in range(TRIES):
            for folder in (self._claims, self._processes):
                folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                return os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        return os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            with contextlib.suppress(OSError):  # a disk that is full now may not be later
                self._write(beats)

    def _write(self, beats: int) -> None:
        os.lseek(self._own, 0, os.SEEK_SET)
        os.write(self._own, f"{self._said}\n{beats:012}\n".encode())
        os.fsync(self._own)

    def _listed(self) -> list[str]:
        with contextlib.suppress(OSError):
            return [file.name for file in self._processes.iterdir() if file.name != self.name]
        return []

    def _create(self, piece: str, attempt: int) -> bool:
        try:
            made = os.open(self._claims / f"{piece}.{attempt}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self._attempts[piece] = attempt
            return False
        except FileNotFoundError:  # all is done
            return False
        try:
            os.write(made, self.name.encode())
        finally:
            os.close(made)
        self._attempts[piece], self._owners[piece, attempt] = attempt, self.name
        return True

    def _owner(self, piece: str, attempt: int) -> str:
        """Who made a claim; a name of the claim's own while it is not said, so that it lapses like any other."""
        if (piece, attempt) not in self._owners:
            try:
                name = (self._claims / f"{piece}.{attempt}").read_text()
            except OSError:
                name = ""
            if not name:
                return f"{piece}.{attempt}"
            self._owners[piece, attempt] = name
        return self._owners[piece, attempt]

    def _read(self, name: str) -> bytes:
        with contextlib.suppress(OSError):
            return (self._processes / name).read_bytes()
        return b""

    def _is_there(self, name: str) -> bool:
        """Whether a process is at work, as far as can be known from here."""
        file, said = self._processes / name, b""
        if "." not in name:
            try:
                held = os.open(file, os.O_RDWR)
            except FileNotFoundError:
                return False
            except OSError:  # such as another user's: there are still its beats, or their lack
                said = self._read(name)
            else:
                try:
                    said = os.read(held, 200)
                    if said.startswith(f"{_machine()} {LOCKED}\n".encode()) and lock(held):
                        return False
                finally:
                    os.close(held)
        before, since = self._signs.get(name, (None, 0.0))
        if said != before:
            since = time.monotonic()
            self._signs[name] = (said, since)
        return time.monotonic() - since < LEASE_SECONDS


def at_work(folder: Path) -> bool:
    """Whether a process may be at work in a folder of claims."""
    return any((folder / "processes").glob("*"))


def _machine() -> str:
    """What tells machines apart whose kernels share no locks: the boot's id on Linux, else the network name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()
