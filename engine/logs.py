"""What libraries may write to stderr: their errors, not their chatter."""

from __future__ import annotations

import os
import warnings


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
