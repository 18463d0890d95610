"""What is written to stderr: of libraries their errors, not their chatter; of our own one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import warnings
from datetime import UTC, datetime

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


def structured() -> None:
    """Write our own records from INFO on, and everybody's warnings, to stderr as JSON lines, for the served app.

    Rotating them is the business of whatever collects stderr.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("engine", "ui"):
        logging.getLogger(package).setLevel(logging.INFO)


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
