"""Does a model run on cards too small for its bf16? The peak on the device against budgets, with random weights.

python -m assets.figures.small_cards --out assets/figures/small-cards.json

Every budget is a comparison of bf16, FP8 and NVFP4 in few steps, as `compare` makes it, with $TWINFRAME_GPU_MEMORY set
to it; PyTorch may take 2 GB more, as of a card of that size, and fails beyond. First comes one without a budget, whose
pictures the others are compared with, byte for byte. The file is written anew after each budget. Nothing is timed.

On a CPU it is a rehearsal: of a miniature, without a budget.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from engine import catalog
from engine.columns import label
from engine.environment import versions
from engine.errors import TwinframeError
from engine.events import Event, Finished
from engine.files import write_whole
from engine.request import CompareRequest
from engine.results import Comparison
from engine.runtime.multi_device import driving
from engine.runtime.studio import Studio
from engine.weights import residency
from engine.weights.source import Source

CUDA = torch.cuda.is_available()


class Peak:
    """The most bytes that were allocated, and reserved, since the beginning, whoever begins to count anew meanwhile."""

    allocated = reserved = 0

    def note(self) -> None:
        if CUDA:
            self.allocated = max(self.allocated, torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())


@contextmanager
def watched() -> Iterator[Peak]:
    peak, reset = Peak(), torch.cuda.reset_peak_memory_stats

    def noted(*args: Any) -> None:
        peak.note()
        reset(*args)

    if CUDA:
        reset()
    torch.cuda.reset_peak_memory_stats = noted
    try:
        yield peak
        peak.note()
    finally:
        torch.cuda.reset_peak_memory_stats = reset


def compared(args: argparse.Namespace, budget: float | None, folder: Path) -> dict[str, Any]:
    """One comparison, as JSON, with the digest of every column's pixels."""
    os.environ.pop(residency.LIMIT_VARIABLE, None)
    if budget is not None:
        os.environ[residency.LIMIT_VARIABLE] = str(budget)
    if CUDA:
        total = torch.cuda.mem_get_info()[1]
        card = total if budget is None else (budget + residency.RESERVE) * residency.GB
        torch.cuda.set_per_process_memory_fraction(min(1.0, card / total))
    request = CompareRequest.create(
        catalog.model(args.model).examples[0],
        model=args.model,
        precisions=args.precision,
        num_inference_steps=args.steps,
        height=args.size,
        width=args.size,
    )
    there = torch.cuda.memory_allocated() / residency.GB if CUDA else 0.0
    row: dict[str, Any] = {"budget_gb": budget, "allocated_before_gb": there}
    told: list[Event] = []
    folder.mkdir()
    with watched() as peak:
        try:
            studio = Studio("cuda" if CUDA else "cpu", Source(random=not catalog.model(args.model).bundled))
            with driving(studio.device):
                row |= results(studio.compare(request, folder, told.append, lambda: False))
        except (TwinframeError, RuntimeError) as error:  # out of memory: what the script is there to find
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            row["made_before"] = [event.column for event in told if isinstance(event, Finished)]
    row["peak_allocated_gb"], row["peak_reserved_gb"] = peak.allocated / 1e9, peak.reserved / 1e9
    return row


def results(found: Comparison) -> dict[str, Any]:
    kept = ("column", "execution", "streamed", "latency_comparable", "memory_gb", "lpips")
    rows = []
    for result in found.results:
        said = result.to_json()
        rows.append({name: said[name] for name in kept if name in said} | {"pixels": _digest(result.files[0])})
    return {"results": rows, "ruler": found.ruler and [found.ruler.floor, found.ruler.ceiling]}


def _digest(file: str) -> str | None:
    """None for a clip, whose pixels a codec has changed."""
    if not file.endswith(".png"):
        return None
    with Image.open(file) as picture:
        return sha256(picture.tobytes()).hexdigest()[:16]


def table(measured: dict[str, Any]) -> str:
    """The measurements as the table of engine/README.md: a budget a row, and what was streamed in it."""
    columns = [one["column"] for one in measured["budgets"][0]["results"]]
    said = [f"{label(column)} streams" for column in columns]
    rows = [["Budget, GB", "Most allocated, GB", *said, "Pictures of all columns"]]
    for row in sorted(measured["budgets"], key=lambda row: row["budget_gb"] or 0):
        streamed = [" and ".join(one.get("streamed", [])) or "–" for one in row["results"]]
        same = "those without a budget" if all(row["as_without_a_budget"].values()) else "others"
        budget = "none" if row["budget_gb"] is None else f"{row['budget_gb']:.0f}"
        rows.append([budget, f"{row['peak_allocated_gb']:.1f}", *streamed, same])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def measure(args: argparse.Namespace) -> None:
    began = time.monotonic()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
        "versions": versions(),
        "model": args.model,
        "weights": "random" if not catalog.model(args.model).bundled else "checkpoint",
        "size": args.size,
        "steps": args.steps,
        "budgets": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for budget in (None, *(args.budget if CUDA else ())):
            if time.monotonic() - began > args.time_limit:
                print(f"stopped before {budget} GB: the time limit was reached", file=sys.stderr)
                break
            row = compared(args, budget, Path(folder) / str(budget))
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
            result["budgets"].append(row)
            whole = {one["column"]: one["pixels"] for one in result["budgets"][0].get("results", ())}
            row["as_without_a_budget"] = {
                one["column"]: one["pixels"] == whole.get(one["column"]) for one in row.get("results", ())
            }
            write_whole(args.out, (json.dumps(result, indent=1) + "\n").encode())
            print(f"{time.monotonic() - began:5.0f} s  {json.dumps(row)}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="flux.1-dev" if CUDA else "mini-flux")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8", "nvfp4"], metavar="COLUMN")
    parser.add_argument("--budget", nargs="+", type=float, default=[16.0, 12.0, 24.0, 32.0], metavar="GB")
    parser.add_argument("--size", type=int, default=512 if CUDA else 256, metavar="PIXELS")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=190.0, metavar="SECONDS", help="to begin a budget after")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    measure(parser.parse_args())
