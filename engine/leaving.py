"""The one way out of the command line and of app.py: an exit status, and at most one sentence on stderr.

A mistake of the user exits 2, and its sentence says what to do. A fault of ours exits 1, and its sentence says where
the log file is that holds the traceback. Knows nothing of what was done.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from engine import files, logs
from engine.errors import FaultError, TwinframeError, fault

log = logging.getLogger(__name__)

MISTAKE, FAULT, INTERRUPTED = 2, 1, 130
HUNG, RANKS_HUNG = 75, 76
"""Exit statuses of the device's process where it had to end itself (`abandon`): over a product, over other ranks."""


def leave(work: Callable[[], int | None], log: Callable[[], None]) -> None:
    """Do the whole work of a process; where the status that it returns, or its failure gives, is not 0, end with that.

    Sees to what every process needs first: a user, quiet libraries, streams that take any character, and the log.

    Args:
        log: sets up what is written to stderr; the log file comes besides.
    """
    # A pipe on Windows, or PYTHONIOENCODING, may have an encoding that lacks what a prompt is written in.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logs.quiet_libraries()
    log()
    kept = logs.Kept()
    logging.getLogger().addHandler(kept)
    try:
        status = _status(work)
    finally:
        logging.getLogger().removeHandler(kept)
    if status:
        sys.exit(status)


def abandon(sentence: str, status: int = HUNG) -> NoReturn:
    """End this process at once, from whichever thread: another one hangs in a driver, where no exception reaches it.

    The device's process leaves it to its parent to say so, by its status.
    """
    log.error(sentence)
    if multiprocessing.parent_process() is not None:
        os._exit(status)
    _say(sentence)
    os._exit(FAULT)


def _status(work: Callable[[], int | None]) -> int:
    try:
        files.provide_user()
        status = work() or 0
        sys.stdout.flush()
        return status
    except FaultError as error:
        return _fault(error, error.trace)
    except TwinframeError as error:
        _say(str(error))
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # as in `... | head`; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except Exception as error:  # noqa: BLE001 - the log has all of it
        return _fault(fault(error), traceback.format_exc())


def _fault(error: FaultError, trace: str) -> int:
    """Say it, with where the log is. Without a trace it is there already."""
    log = logs.keep(trace) if trace else logs.file()
    _say(f"{error} The log is {log}." if log else f"{error} The log could not be written.")
    return FAULT


def _say(sentence: str) -> None:
    print(" ".join(sentence.split("\n")), file=sys.stderr)
