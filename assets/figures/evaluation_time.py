"""How long an evaluation of FLUX.1-dev takes on some number of cards: arithmetic from measured seconds.

python -m assets.figures.evaluation_time

Prints the table of engine/README.md. Seconds a picture and of first calls are of assets/benchmarks/flux.1-dev-h200.json
(1024x1024, 28 steps, the engine's own rows), seconds of imports of assets/figures/cold-start.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1]
PROMPTS, COLUMNS, CARDS = 5000, 6, (1, 8, 64)
REFERENCES = 3
"""bf16, floor and ceiling, each counted as a picture in bf16."""


def table() -> str:
    """Cards -> the longest share of prompts, and hours, in Markdown."""
    benchmark = json.loads((ASSETS / "benchmarks" / "flux.1-dev-h200.json").read_text())
    rows = {row["precision"]: row for row in benchmark["rows"] if row["method"] == "engine" and row["batch_size"] == 1}
    imports = json.loads((ASSETS / "figures" / "cold-start.json").read_text())["nothing compiled yet"]
    picture = {name: row["latency_s"]["median"] for name, row in rows.items()}
    prompt = REFERENCES * picture["bf16"] + COLUMNS * picture["fp8"]
    start = (
        imports["seconds_from_start"]["imports"] + rows["bf16"]["first_call_s"] + COLUMNS * rows["fp8"]["first_call_s"]
    )
    lines = [
        "| Cards | Start, s | A prompt, s | Prompts a card | In all, hours |",
        "|---|---|---|---|---|",
    ]
    for cards in CARDS:
        share = math.ceil(PROMPTS / cards)
        lines.append(f"| {cards} | {start:.0f} | {prompt:.1f} | {share} | {(start + share * prompt) / 3600:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
