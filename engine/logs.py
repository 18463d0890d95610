"""What is written to stderr and kept in the log file: of libraries their errors, not their chatter.

The served app writes one JSON object a line to stderr, the command line what it warns of. Tracebacks are in the log
file, `twinframe.log` in the cache folder, and the app's on stderr too.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from datetime import UTC, datetime
from pathlib import Path

from engine.files import cache_folder, can_be_written, own_temporary

NAME = "twinframe.log"
CAP = 1_000_000
"""Bytes at which the log file is put aside, in the place of the one put aside before, and another is begun."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""The attributes that every log record has; the others were given as `extra`."""


class OneLine(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, everything in `extra`, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


class Told(logging.Formatter):
    """A record as text to read, with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        more = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        trace = more.pop("traceback", "") or (self.formatException(record.exc_info) if record.exc_info else "")
        said = f"{when} {record.levelname} {record.name}: {record.getMessage()}"
        return "\n".join(filter(None, (f"{said} {json.dumps(more, default=str)}" if more else said, trace)))


class Kept(logging.Handler):
    """Appends records to the log file, which is open for one record only: several processes share it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(Told())

    def emit(self, record: logging.LogRecord) -> None:
        keep(self.format(record))


def file() -> Path | None:
    """The log file; None if there is no folder that it could lie in."""
    try:
        folder = cache_folder()
        return (folder if can_be_written(folder) else own_temporary()) / NAME
    except OSError:
        return None


def keep(text: str) -> Path | None:
    """Append to the log file; gives where that is, or None if it cannot be written."""
    where = file()
    if where is None:
        return None
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        if where.exists() and where.stat().st_size > CAP:
            where.replace(where.with_suffix(".log.1"))
        with where.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{text}\n")
    except OSError:
        return None
    return where


def structured() -> None:
    """Write our own records from INFO on, and everybody's warnings, to stderr as JSON lines, for the served app.

    Rotating them is the business of whatever collects stderr. What went wrong is in the log file too.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler, Kept()], force=True)
    for package in ("engine", "ui"):
        logging.getLogger(package).setLevel(logging.INFO)


def plain() -> None:
    """Write everybody's warnings to stderr, a line each, for the command line. Errors are in the log file alone: of
    them engine/leaving.py says one sentence."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(levelname)s %(name)s: %(message)s")


def prompts_wanted() -> bool:
    """Whether the log may hold what people wrote: only with TWINFRAME_LOG_PROMPTS=1."""
    return os.environ.get("TWINFRAME_LOG_PROMPTS") == "1"


def quiet_libraries() -> None:
    """Silence notices that a user can do nothing about; call it before torch and diffusers are imported."""
    warnings.filterwarnings("ignore")
    for name, value in {
        "DIFFUSERS_VERBOSITY": "error",  # torchao tensor classes, experimental attention backends, fp32 modules
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "KINETO_LOG_LEVEL": "99",  # the profiler asks for a GPU and says so when there is none
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
