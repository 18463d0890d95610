"""A script in a process of its own, without the engine, whose CPU multiplies bf16 as the engine's does."""

import subprocess
import sys
from pathlib import Path

from engine.weights import cpu_products

# The module needs nothing of the engine. On a CPU with bf16 instructions it changes nothing.
_RUN = f"""
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("cpu_products", {cpu_products.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.multiply_in_fp32_where_bf16_is_slow()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: Path, *args: str) -> None:
    """In the script's folder; an error of the script is one of the test."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _RUN, script.name, *args], cwd=script.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
