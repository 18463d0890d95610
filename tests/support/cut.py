"""A wire that can be cut: a TCP proxy before an app, whose connections end at once and which lets no new one in."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class Wire:
    """Carries bytes both ways between a port of its own and an app, until it is cut."""

    def __init__(self, port: int):
        self._port, self._open, self._lock = port, True, threading.Lock()
        self._held: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listening.accept()
                with self._lock:
                    if not self._open:
                        near.close()
                        continue
                    far = socket.create_connection(("127.0.0.1", self._port))
                    self._held |= {near, far}
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while some := one.recv(65536):
                other.sendall(some)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._held -= {one, other}

    def cut(self) -> None:
        with self._lock:
            self._open = False
            held, self._held = self._held, set()
        for end in held:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        self.cut()
        self._listening.close()


@contextlib.contextmanager
def wire(url: str) -> Iterator[Wire]:
    """A wire to the app at an address."""
    one = Wire(urlsplit(url).port)
    try:
        yield one
    finally:
        one.close()
