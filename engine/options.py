"""argparse as both command lines use it: a user's mistake is one sentence, like every other."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import NoReturn

from engine.errors import RequestError


class Parser(argparse.ArgumentParser):
    """Raises its complaint, on one line, instead of printing usage and leaving.

    Raises:
        RequestError: from `parse_args`, when the arguments are wrong.
    """

    def error(self, message: str) -> NoReturn:
        said = " ".join(message.split())
        raise RequestError(f"{said[:1].upper()}{said[1:]}. See {self.prog} --help.")


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments of `loading.Source.create`: where weights come from."""
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="a checkpoint's folder, or one with a folder for each model, named by its id (default: TWINFRAME_WEIGHTS, "
        "else the hub for what is not bundled)",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights of the real architecture: right for speed and memory, not for what is made",
    )
    parser.add_argument("--offline", action="store_true", help="never fetch anything from the Hugging Face hub")


def check_address(host: str, port: int) -> None:
    """See whether a server could listen there.

    Raises:
        RequestError: it could not.
    """
    if not 1 <= port <= 65535:
        raise RequestError(f"Port {port} does not exist: choose one from 1 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where, why = f"{host} port {port}", error.strerror or error
        raise RequestError(f"Cannot listen on {where}: {why}. Choose another with --port.") from error
