"""What FP8 attention costs: LPIPS from bf16 of columns with it and without it, on the same prompts and noise.

python -m engine evaluate --model MODEL --precision bf16+fp8-attention fp8 fp8+fp8-attention --prompts FILE --out DIR
python -m assets.figures.fp8_attention DIR [DIR ...] OUT
python -m assets.figures.fp8_attention --table OUT

OUT holds every score of the evaluations. A column with FP8 attention is compared with the same one without, prompt by
prompt: the mean difference with its interval; `bf16+fp8-attention` is its own difference from bf16.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.columns import FP8_ATTENTION, label
from engine.files import write_whole
from engine.metrics.statistics import estimate


def read(folder: Path) -> dict:
    """An evaluation's conditions, and its scores by column, in the order of the prompts."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as table:
        lines = list(csv.DictReader(table))
    each = {row["column"]: [float(line["lpips"]) for line in lines if _is_of(line, row)] for row in summary["results"]}
    return {
        **{name: summary[name] for name in ("model", "name", "device", "created", "versions", "settings", "threads")},
        "prompts": list(dict.fromkeys(line["prompt"] for line in lines)),
        "ruler": {end: summary["ruler"][end]["lpips"]["mean"] for end in ("floor", "ceiling")},
        "each": each,
    }


def _is_of(line: Mapping[str, str], row: Mapping[str, str]) -> bool:
    return (line["precision"], line["recipe"]) == (row["precision"], row["recipe"])


def table(found: Mapping) -> str:
    """Markdown: a row a column, with what FP8 attention adds to it."""
    lines = [
        f"| {found['name']} | LPIPS, {len(found['prompts'])} prompts | Median | More by FP8 attention |",
        "|---|---|---|---|",
    ]
    for column, each in found["each"].items():
        score, more = estimate(each), ""
        if column.endswith(FP8_ATTENTION):
            without = found["each"].get(column.removesuffix(FP8_ATTENTION), [0.0] * len(each))
            added = estimate([a - b for a, b in zip(each, without, strict=True)])
            more = f"{added['mean']:+.4f} ({added['low']:+.4f} to {added['high']:+.4f})"
        interval = f"{score['mean']:.4f} ({score['low']:.4f} to {score['high']:.4f})"
        lines.append(f"| {label(column)} | {interval} | {score['median']:.4f} | {more} |")
    ruler = found["ruler"]
    return "\n".join([*lines, f"| bf16, another seed | {ruler['ceiling']:.4f} | | |"])


def main(arguments: Sequence[str]) -> None:
    *folders, out = arguments
    if folders != ["--table"]:
        every = {found["model"]: found for found in map(read, map(Path, folders))}
        write_whole(Path(out), (json.dumps(every, indent=1, ensure_ascii=False) + "\n").encode())
    for found in json.loads(Path(out).read_text()).values():
        print(table(found), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
