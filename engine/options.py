"""argparse as both command lines use it: a user's mistake is one sentence, like every other."""

from __future__ import annotations

import argparse
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
