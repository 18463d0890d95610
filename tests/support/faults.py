"""Faults at random points of the real app's engine: does one request fail in one sentence, and the next succeed?"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
from PIL import Image

from tests.support.running import App, running

COMMAND = ("-m", "tests.support.faulty_app", "--models", "tiny-flux.1-dev,tiny-ltx-2,far")
STEPS = 6
FLUX = {
    "model": "tiny-flux.1-dev",
    "num_inference_steps": STEPS,
    "guidance_scale": 3.5,
    "precisions": ["bf16", "mxfp8"],
}
CLIP = {"model": "tiny-ltx-2", "num_inference_steps": 2, "guidance_scale": 4.0, "precisions": ["bf16"]}
KILLED, UNREACHABLE, APP_KILLED = "the engine's process killed", "the hub out of reach", "the app itself killed"
FURTHEST = {
    "out of memory while loading": 20,
    "out of memory while compiling": 2,
    "out of memory while denoising": 2 * STEPS,
    "out of memory while decoding": 2,
    "a poisoned CUDA context": 2 * STEPS,
    "a segmentation fault": 2 * STEPS,
    "a checkpoint that changes while it is read": 1,
    "a full disk": 3,
    "a failing video encoder": 1,
    KILLED: 1,
    UNREACHABLE: 1,
}
"""The last passage of its point at which a fault may strike."""


COUNTS = ("times", "one_sentence", "next_succeeded", "broken_files")


def run(folder: Path, times: int, kinds: tuple[str, ...] = (*FURTHEST, APP_KILLED), seed: int = 0) -> dict:
    """Strike each kind so many times, in a mixed order, and count what came of it.

    Args:
        folder: for checkpoints, outputs and log; empty.
        times: of each kind.
        kinds: of FURTHEST, and APP_KILLED, which takes two starts of the app each time.
        seed: decides order and points.

    Returns:
        `kinds`: kind -> counts; `said`: what the client of the first of each kind was told; `engine_restarts`.
    """
    prepare(folder)
    chance = random.Random(seed)
    counts = {kind: dict.fromkeys(COUNTS, 0) for kind in kinds}
    order = [kind for kind in kinds if kind != APP_KILLED] * times
    chance.shuffle(order)
    said: dict[str, str] = {}
    with running(folder, COMMAND, **environment(folder)) as app:
        for kind in order:
            sentence = suffer(app, folder, kind, chance)
            said.setdefault(kind, sentence)
            _count(counts[kind], app, sentence)
        restarts = sum(line["message"] == "the engine's process was lost" for line in app.said())
    for _ in range(times if APP_KILLED in kinds else 0):
        with running(folder, COMMAND, **environment(folder)) as app:
            stream = app.call(**FLUX)
            next(stream)
            time.sleep(chance.uniform(0, 2))
            app.process.kill()
        with running(folder, COMMAND, **environment(folder)) as app:
            _count(counts[APP_KILLED], app, "Its client sees the connection end.")
    return {"kinds": counts, "said": said, "engine_restarts": restarts}


def prepare(folder: Path) -> None:
    """Tiny checkpoints, and a second copy of the one that is damaged."""
    from tests.support import tiny  # brings torch

    for model in ("flux.1-dev", "ltx-2"):
        tiny.checkpoint(model, folder / f"tiny-{model}")
    shutil.copytree(folder / "tiny-flux.1-dev", folder / "whole")


def environment(folder: Path) -> dict[str, str]:
    return {
        "TWINFRAME_FAULTS": str(folder),
        "TWINFRAME_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }


def suffer(app: App, folder: Path, kind: str, chance: random.Random) -> str:
    """Have one request struck; gives what its client is told."""
    asked = CLIP if kind == "a failing video encoder" else FLUX
    if kind == UNREACHABLE:
        asked = FLUX | {"model": "far"}
    elif kind == KILLED:
        threading.Timer(chance.uniform(0, 1), os.kill, (app.engine(), signal.SIGKILL)).start()
        asked = FLUX | {"num_inference_steps": 50}
    else:
        (folder / "armed").write_text(f"{kind} {chance.randint(1, FURTHEST[kind])}")
    outcome, said = app.compare(**asked)
    (folder / "armed").unlink(missing_ok=True)
    shutil.copytree(folder / "whole", folder / "tiny-flux.1-dev", dirs_exist_ok=True)
    return str(said["error"]) if outcome == "error" and isinstance(said, dict) else f"({outcome}) {said}"


def _count(counts: dict[str, int], app: App, sentence: str) -> None:
    counts["times"] += 1
    counts["one_sentence"] += sentence.endswith(".") and len(sentence.splitlines()) == 1 and "Traceback" not in sentence
    with suppress(httpx.TransportError):
        counts["next_succeeded"] += app.compare(**FLUX)[0] == "complete"
    counts["broken_files"] += sum(map(_broken, app.files.rglob("twinframe-*/*/*")))


def _broken(file: Path) -> bool:
    """Whether a file is half written; what is being written at this moment is not looked at."""
    if file.suffix == ".png":
        try:
            with Image.open(file) as picture:
                picture.load()
        except OSError:
            return True
    return file.suffix == ".part" or not file.stat().st_size
