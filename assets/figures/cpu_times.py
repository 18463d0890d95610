"""What everybody waits for on a CPU: a picture in each format, alone and beside another process, `engine compare`, the
app until it is ready, `/compare`.

python -m assets.figures.cpu_times OUT [--against CHECKOUT] [--times 3] [--only formats beside compare app]

With --against, another checkout of the project is measured in turns with this one, so that both meet the same machine.
Each has a cache folder of its own, in which its rulers are measured first, and not timed. Seconds are by the clock, and
besides, since other programs stop that one not, of CPU; of the app's until it is ready. `pictures` are digests: the
same in both checkouts where the same pixels were made.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import psutil

ROOT = Path(__file__).parents[2]
PROMPT = "a red apple"
MODEL = "mini-flux"


def _picture(format: str) -> None:
    import torch

    from engine import catalog
    from engine.request import CompareRequest
    from engine.runtime.pipeline import Progress, call, finished
    from engine.runtime.studio import Studio

    spec = catalog.model(MODEL)
    request = CompareRequest.create(PROMPT, model=MODEL, precisions=[format])
    with torch.inference_mode():
        studio = Studio("cpu")
        rendition = studio.rendition(spec, request.columns[-1], lambda _: None)
        studio.warm(rendition, spec, request, lambda _: None, lambda: False)
        progress = Progress(format, lambda _: None, lambda: False)
        began, spent = time.perf_counter(), time.process_time()
        output = call(rendition.pipeline, spec, request, request.seed, progress)
        seconds = {"s": time.perf_counter() - began, "cpu_s": time.process_time() - spent}
        pixels = finished(rendition.pipeline, spec, output).pixels
    digest = hashlib.sha256(b"".join(one.float().cpu().numpy().tobytes() for one in pixels)).hexdigest()[:16]
    print(json.dumps(seconds | {"pictures": digest}))


def _run(line: list[str], where: Path, cache: str) -> tuple[str, dict[str, float]]:
    """A process in a checkout: what it prints, and its seconds."""
    environment = os.environ | {"TWINFRAME_CACHE": cache, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(where)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    told = subprocess.run(line, cwd=where, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return told, {"s": time.perf_counter() - began, "cpu_s": spent}


def _program(format: str) -> list[str]:
    """The command that makes a picture in one format."""
    # By this function's text, as another checkout may lack it, with threads as that one has them.
    source = f"""import hashlib, json, os, time
import engine.environment as environment
getattr(environment, "leave_cores_to_others", lambda _: None)(os.environ)
PROMPT, MODEL = {PROMPT!r}, {MODEL!r}
{inspect.getsource(_picture)}"""
    return [sys.executable, "-c", f"{source}\n_picture({format!r})"]


def formats(where: Path, cache: str) -> dict[str, dict[str, float]]:
    """A picture in each format."""
    from engine.formats import FORMATS

    return {name: json.loads(_run(_program(name), where, cache)[0].splitlines()[-1]) for name in FORMATS}


def beside(where: Path, cache: str) -> dict[str, dict[str, float]]:
    """A bf16 picture while another such process makes the same."""
    with ThreadPoolExecutor(2) as both:
        told = list(both.map(lambda _: _run(_program("bf16"), where, cache)[0], range(2)))
    return {f"process {number}": json.loads(one.splitlines()[-1]) for number, one in enumerate(told, 1)}


def compare(where: Path, cache: str) -> dict[str, dict[str, float]]:
    """`engine compare` as a process: two columns, and the default ones."""
    found = {}
    for columns in (["bf16", "nvfp4"], ["bf16", "mxfp8", "nvfp4"]):
        with tempfile.TemporaryDirectory() as out:
            line = [sys.executable, "-m", "engine", "compare", "--model", MODEL, "--prompt", PROMPT, "--out", out]
            found[" ".join(columns)] = _run([*line, "--precision", *columns], where, cache)[1]
    return found


def app(where: Path, cache: str) -> dict[str, dict[str, float]]:
    """The app: until it answers, until it is ready, and `/compare` of what it offers by default, warm."""
    from gradio_client import Client

    began = time.perf_counter()
    with _app(where, cache) as (url, process):
        _wait(lambda: urlopen(url))
        answers = time.perf_counter() - began
        _wait(lambda: json.load(urlopen(f"{url}warming"))["again"])  # it answers a moment before it begins to load
        _wait(lambda: not json.load(urlopen(f"{url}warming"))["again"])
        ready = {"s": time.perf_counter() - began, "cpu_s": _spent(process)}
        client = Client(url, verbose=False)
        taken = []
        for _ in range(2):
            asked = time.perf_counter()
            client.predict(prompt=PROMPT, api_name="/compare")
            taken.append(time.perf_counter() - asked)
    return {"answers": {"s": answers}, "ready": ready, "/compare": {"s": taken[-1]}}


@contextmanager
def _app(where: Path, cache: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TWINFRAME_CACHE": cache, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port), "--offline"],
        cwd=where,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _wait(there: Callable[[], object]) -> None:
    while True:
        try:
            if there():
                return
        except OSError:
            pass
        time.sleep(0.1)


def _spent(process: psutil.Process) -> float:
    """CPU seconds of a process and its children."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


MEASURED = {"formats": formats, "beside": beside, "compare": compare, "app": app}


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, object]]:
    """Medians by the clock and of CPU, and the digest."""
    found: dict[str, dict[str, object]] = {}
    for name in runs[0]:
        of = [run[name] for run in runs]
        found[name] = {key: round(median(one[key] for one in of), 3) for key in ("s", "cpu_s") if key in of[0]}
        digests = {one["pictures"] for one in of if "pictures" in one}
        found[name] |= {"pictures": " ".join(map(str, sorted(digests)))} if digests else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    args = parser.parse_args()

    from engine.environment import versions
    from engine.quantization.capability import detect

    sides = {"this": ROOT, **({"against": args.against.resolve()} if args.against else {})}
    result: dict[str, Any] = {
        "device": f"{detect('cpu').name}, {os.cpu_count()} cores",
        "versions": versions(),
        "model": MODEL,
        "times": args.times,
        "threads": os.environ.get("OMP_NUM_THREADS", "one a core"),
        "load": [os.getloadavg()[0]],
    }
    with tempfile.TemporaryDirectory() as folder:
        caches = {side: str(Path(folder) / side) for side in sides}
        if set(args.only) & {"compare", "app"}:
            for side, where in sides.items():
                compare(where, caches[side])  # its ruler
        for what in args.only:
            runs: dict[str, list[dict[str, dict[str, float]]]] = {side: [] for side in sides}
            for _ in range(args.times):
                for side, where in sides.items():
                    runs[side].append(MEASURED[what](where, caches[side]))
                    print(what, side, runs[side][-1], flush=True)
            result[what] = {side: summary(of) for side, of in runs.items()}
            result["load"].append(os.getloadavg()[0])
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
