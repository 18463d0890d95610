"""A reproduction as one HTML page that needs nothing else: each figure beside the post's, and whether it can be true.

Fills reproduction.html with what engine/reproduction/run.py keeps. There is no script, and nothing is loaded from
anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from engine import catalog, reference
from engine.benchmark.overview import POSTS_DEVICE
from engine.formats import LABELS
from engine.quality.report import templates
from engine.reproduction.cells import LATENCY, MEMORY, SCORE, SPEEDUP
from engine.reproduction.tables import FULL, LPIPS, PERFORMANCE

HEADS: Mapping[str, tuple[str, int]] = {
    SCORE: ("LPIPS", 4),
    LATENCY: ("Latency, s", 2),
    SPEEDUP: ("Speedup", 2),
    MEMORY: ("Peak, GB", 1),
}
"""Quantity -> head of its columns, and decimal places."""


def page(result: Mapping[str, Any]) -> str:
    """The report on what `reproduction.json` holds."""
    grouped = groupby(result["tables"], key=lambda line: line["table"])
    return (
        templates(Path(__file__).parent)
        .get_template("reproduction.html")
        .render(
            result,
            tables=[_table(name, list(lines)) for name, lines in grouped],
            heads=HEADS,
            labels=LABELS,
            number=lambda value, digits: "–" if value is None else f"{value:.{digits}f}",
            share=lambda value: "–" if value is None else f"{value:.0%}",
            posts_device=POSTS_DEVICE,
            post=reference.read(),
            failed=[part for part in result["parts"] if part["status"]],
            faults=[(check["subject"], fault) for check in result["plausibility"] for fault in check["faults"]],
            minutes=lambda seconds: f"{seconds / 60:.1f}",
        )
    )


def _table(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    quantities = [quantity for quantity in HEADS if any(quantity in line["values"] for line in lines)]
    method = any(value["method"] is not None for line in lines for value in line["values"].values())
    return {
        "title": _title(name),
        "lines": lines,
        "quantities": quantities,
        "method": method,
        "batches": name in PERFORMANCE,
        "recipes": name == FULL,
    }


def _title(name: str) -> str:
    if name in PERFORMANCE:
        return f"{catalog.MODELS[PERFORMANCE[name]].name}: latency, speedup and memory"
    if name in LPIPS:
        return f"{catalog.MODELS[LPIPS[name]].name}: mean LPIPS over DrawBench"
    return f"{catalog.MODELS[LPIPS['flux-lpips']].name}: every layer against the post's selection"
