"""Evaluations by several processes that are killed at random: what is lost, what is made twice, and whether the tables
are those of one process.

python -m tests.support.rank_kills [--times 20] [--out assets/figures/rank-kills.json]

A random FLUX of a few hundred kilobytes is evaluated by 4 processes of the CPU, half of them by other means than locks
of the kernel, as if on another machine. One of them, any of them, is killed after a random number of rows, and another
begins in its place, `KILLS` times in each round. Processes are forks of this one, so that none has to import anything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType

from engine import catalog
from engine.environment import versions
from engine.logs import quiet_libraries

quiet_libraries()  # before anything imports torch and diffusers

from engine.quality import claims, evaluate, prompts  # noqa: E402
from engine.runtime import timing  # noqa: E402
from engine.weights.source import Source  # noqa: E402
from tests.support import tiny  # noqa: E402

RANKS, KILLS = 4, 5
SETTINGS = evaluate.Settings(precisions=("nvfp4",), recipes=("full",), steps=1)
NAMES = ("bf16", "floor", "ceiling", "nvfp4-full")
PROMPTS = prompts.PromptSet(
    name="twelve.txt",
    counted="line",
    prompts=tuple(
        prompts.Prompt(id=number, category="", text=f"a {thing}, {colour}")
        for number, (thing, colour) in enumerate(
            ((thing, colour) for thing in ("cat", "dog", "rocket", "apple") for colour in ("red", "blue", "green")),
            start=1,
        )
    ),
    repeated=0,
)
ROWS = len(PROMPTS.prompts) * len(NAMES)
PATIENCE = 120.0
"""Seconds without a new row after which something hangs."""
_FORK = multiprocessing.get_context("fork")


def _evaluate(model: Path, out: Path, machine: str) -> None:
    """What one process does."""
    import torch

    os.environ["TWINFRAME_CACHE"] = str(model.parent / "cache")
    torch.set_num_threads(1)
    spec = tiny.spec("flux.1-dev", model)
    catalog.MODELS = MappingProxyType({**catalog.MODELS, spec.id: spec})
    timing.added_bytes = lambda run, device: (run(), 1000)[1]  # the CPU's profiler takes seconds
    evaluate.RESAMPLES = 100
    claims.BEAT_SECONDS, claims.LEASE_SECONDS, claims.LOOK_SECONDS = 0.1, 3.0, 0.1
    if machine:
        claims._machine = lambda: machine
    evaluate.run(spec, SETTINGS, PROMPTS, "cpu", Source(), out)


def _rows(out: Path) -> dict[Path, int]:
    """Rows that are there, and when they were written."""
    return {file: file.stat().st_mtime_ns for file in out.glob("pictures/*/[!.]*.json")}


def _run(work: object, *args: object) -> BaseProcess:
    process = _FORK.Process(target=work, args=args)
    process.start()
    return process


def _done(process: BaseProcess) -> None:
    process.join(PATIENCE)
    if process.exitcode != 0:
        raise RuntimeError(f"a process ended with {process.exitcode}")


def one_round(model: Path, one: Path, out: Path, draw: random.Random) -> dict:
    """Evaluate with processes that are killed, and compare with what one has made in `one`."""
    ranks = [_run(_evaluate, model, out, "" if index % 2 else f"machine {index}") for index in range(RANKS)]
    seen, kills, began = {}, 0, time.monotonic()
    try:
        while kills < KILLS:
            before = len(seen)
            wanted = min(ROWS - 1, before + draw.randrange(0, ROWS // KILLS + 1))
            while len(now := _rows(out)) < wanted and time.monotonic() - began < PATIENCE:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            seen |= {row: when for row, when in now.items() if row not in seen}
            index = draw.randrange(RANKS)
            if ranks[index].exitcode is None:
                os.kill(ranks[index].pid, signal.SIGKILL)
            ranks[index].join()
            kills += ranks[index].exitcode == -signal.SIGKILL
            if (out / "summary.json").exists():
                break
            ranks[index] = _run(_evaluate, model, out, "" if index % 2 else f"machine {index} {kills}")
        for rank in ranks:
            rank.join(PATIENCE)
    finally:
        hung = [rank for rank in ranks if rank.exitcode is None]
        for rank in hung:
            rank.kill()
    if not (out / "summary.json").exists():  # the last of all was killed
        _done(_run(_evaluate, model, out, ""))
    last = _rows(out)
    return {
        "kills": kills,
        "hung": len(hung),
        "failed": sum(rank.exitcode not in (0, -signal.SIGKILL) for rank in ranks),
        "rows": len(last),
        "rows_made_twice": sum(last[row] != when for row, when in seen.items()),
        "tables_equal": all(
            (out / name).read_bytes() == (one / name).read_bytes() for name in ("scores.csv", "rulers.csv")
        ),
        "left_behind": [str(f.relative_to(out)) for f in out.rglob("*") if f.suffix in (".part", ".safetensors")]
        + [".claims"] * (out / ".claims").exists(),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        model, one = Path(folder) / "model", Path(folder) / "one"
        _done(_run(tiny.checkpoint, "flux.1-dev", model))
        _done(_run(_evaluate, model, one, ""))
        for number in range(args.times):
            draw = random.Random(args.seed + number)
            rounds.append(one_round(model, one, Path(folder) / f"round-{number}", draw))
            print(json.dumps(rounds[-1]), flush=True)
    if args.out:
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "processes": RANKS,
            "seed": args.seed,
            "rounds": rounds,
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
