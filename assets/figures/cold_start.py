"""How long until a model can be used: a process that finds no compiled code, and a second that finds the first one's.

python -m assets.figures.cold_start OUT [--model flux.1-dev] [--precision fp8]

Seconds from the start of the process to the end of the warm-up, after which a picture takes only its own time, with
random weights, so without reading any from a disk. Both processes share a cache folder that is empty at first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def ready(model: str, precision: str) -> dict:
    """In a process of its own: load a model in one precision, warm its default shape, and say what that took."""
    began = psutil.Process().create_time()
    import torch

    from engine import catalog
    from engine.columns import Column
    from engine.compiler import compilation
    from engine.environment import versions
    from engine.request import CompareRequest
    from engine.runtime.studio import Studio
    from engine.weights.source import Source

    seconds = {"imports": time.time() - began}
    with torch.inference_mode():
        studio = Studio("cuda" if torch.cuda.is_available() else "cpu", Source(random=not catalog.model(model).bundled))
        spec = catalog.model(model)
        request = CompareRequest.create(spec.examples[0], model=model, precisions=[precision])
        rendition = studio.rendition(spec, Column.of(precision, request.recipe), lambda _: None)
        seconds["loaded"] = time.time() - began
        warm = studio.warm(rendition, spec, request, lambda _: None, lambda: False)
        seconds["ready"] = time.time() - began
        mode = studio.mode(rendition.column, spec, request)
    return {
        "device": studio.machine.name,
        "versions": versions(),
        "model": model,
        "precision": precision,
        "mode": mode,
        "warm_up_steps": compilation.WARM_UP_STEPS[mode],
        "warm_up_s": warm.seconds,
        "graphs": warm.graphs,
        "seconds_from_start": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--model", default="flux.1-dev")
    parser.add_argument("--precision", default="fp8")
    args = parser.parse_args()
    if args.out is None:
        print(json.dumps(ready(args.model, args.precision)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        here = {**os.environ, "TWINFRAME_CACHE": cache}
        line = [sys.executable, "-m", "assets.figures.cold_start", "--model", args.model, "--precision", args.precision]
        for which in ("nothing compiled yet", "second process"):
            said = subprocess.run(line, env=here, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[which] = json.loads(said.splitlines()[-1])
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(which, found[which]["seconds_from_start"], flush=True)


if __name__ == "__main__":
    main()
