"""What measurements and the post say of each model, as one list: a figure is a model, size, device,
format and batch size.

Ratios only stand between rows of one run, or of one table of the post. Knows nothing of how anything is shown, and
imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.benchmark.methods import ENGINE, POSTS
from engine.benchmark.plots import Row, other, timed
from engine.formats import PRECISIONS, REFERENCE

POSTS_DEVICE = "NVIDIA B200"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of a benchmark, or of the post's tables."""

    model: str
    device: str
    precision: str
    batch_size: int
    quoted: bool
    """From the post; otherwise measured by this project."""
    date: str
    """ISO; empty where it is quoted."""
    steps: int
    width: int
    height: int
    """Pixels."""
    seconds: float
    """Latency of the whole call, divided by the batch size."""
    peak_gb: float | None
    """1e9 bytes."""
    speedup: float | None = None
    """bf16's latency over this one's, of the whole call; None for bf16, and where that was not measured."""
    step_speedup: float | None = None
    """The same of one denoising step; None where it is quoted, as the post gives whole calls alone."""
    over_post: float | None = None
    """A step by the post's compile over this one, at the same format: by the faster of its two modes that were run."""
    saving: float | None = None
    """Part of bf16's peak memory that this one does without."""


def figures(results: Sequence[Mapping[str, Any]], post: Mapping[str, Any]) -> list[Figure]:
    """The newest figure of each model, size, device, format and batch size, and each of the post's; by model, batch
    size, largest size, measured before quoted, format and device.

    A ratio is that of the newest run that has both of its rows, which may be an older one than the rest comes from.

    Args:
        results: of benchmarks, as engine/benchmark/methods.py reads them.
        post: engine/reference.py's.
    """
    found: dict[tuple[Any, ...], Figure] = {}
    for result in sorted(results, key=lambda result: str(result["date"]), reverse=True):
        rows = timed(result)
        for row in rows:
            if row["method"] == ENGINE:
                figure = _measured(result, row, rows)
                key = (figure.model, figure.width, figure.height, figure.device, figure.precision, figure.batch_size)
                found[key] = _filled(found[key], figure) if key in found else figure
    quoted = [_quoted(row, post) for row in post["performance"]]
    return sorted(
        [*found.values(), *quoted],
        key=_place,
    )


def _place(f: Figure) -> tuple[Any, ...]:
    return f.model, f.batch_size, -f.width * f.height, f.quoted, PRECISIONS.index(f.precision), f.device


def _measured(result: Mapping[str, Any], row: Row, rows: Sequence[Row]) -> Figure:
    own = row["precision"] != REFERENCE
    bf16 = other(row, rows, REFERENCE, ENGINE) if own else None
    posts = [found for method in POSTS if (found := other(row, rows, row["precision"], method)) and found["step_ms"]]
    peak, whole = row["memory_gb"]["peak_allocated"], bf16 and bf16["memory_gb"]["peak_allocated"]
    return Figure(
        model=result["model"],
        device=result["device"],
        precision=row["precision"],
        batch_size=row["batch_size"],
        quoted=False,
        date=str(result["date"]),
        steps=result["settings"]["num_inference_steps"],
        width=result["settings"]["width"],
        height=result["settings"]["height"],
        seconds=row["latency_s"]["median"] / row["batch_size"],
        peak_gb=peak,
        speedup=bf16["latency_s"]["median"] / row["latency_s"]["median"] if bf16 else None,
        step_speedup=_steps(bf16, row),
        over_post=_steps(min(posts, key=lambda found: found["step_ms"], default=None), row),
        saving=1 - peak / whole if peak and whole else None,
    )


def _steps(slower: Row | None, row: Row) -> float | None:
    return slower["step_ms"] / row["step_ms"] if slower and slower["step_ms"] and row["step_ms"] else None


def _filled(newer: Figure, older: Figure) -> Figure:
    """The newer figure, with those ratios of the older that it has not."""
    names = ("speedup", "step_speedup", "over_post", "saving")
    absent = {name: getattr(older, name) for name in names if getattr(newer, name) is None}
    return Figure(**(vars(newer) | absent))


def _quoted(row: Row, post: Mapping[str, Any]) -> Figure:
    same = (r for r in post["performance"] if (r["model"], r["batch_size"]) == (row["model"], row["batch_size"]))
    bf16 = next(r for r in same if r["precision"] == REFERENCE)
    own, settings = row["precision"] != REFERENCE, post["settings"][row["model"]]
    return Figure(
        model=row["model"],
        device=POSTS_DEVICE,
        precision=row["precision"],
        batch_size=row["batch_size"],
        quoted=True,
        date="",
        steps=settings["num_inference_steps"],
        width=settings["width"],
        height=settings["height"],
        seconds=row["latency_s"] / row["batch_size"],
        peak_gb=row["peak_memory_gb"],
        speedup=row["speedup"] if own else None,
        saving=1 - row["peak_memory_gb"] / bf16["peak_memory_gb"] if own else None,
    )
