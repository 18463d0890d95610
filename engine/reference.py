"""What the post published: every table of it, its settings, and what to know beside its figures. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.catalog import ASSETS
from engine.columns import POST, Column
from engine.formats import REFERENCE
from engine.request import CompareRequest

TABLES = ASSETS / "reference" / "b200.json"


def read() -> dict[str, Any]:
    """The post's tables; `latency_note` and `lpips_note` say how its latencies and its LPIPS differ from others."""
    return json.loads(TABLES.read_text(encoding="utf-8"))


def quote(asked: CompareRequest, column: Column) -> Mapping[str, Any] | None:
    """What the post measured of the same call, with `saving`, the part of bf16's peak memory; None if it did not."""
    post = read()
    theirs = post["settings"].get(asked.model, {})
    ours = {
        "height": asked.height,
        "width": asked.width,
        "num_inference_steps": asked.num_inference_steps,
        "num_frames": asked.num_frames,
        "guidance_scale": asked.guidance_scale,
        "true_cfg_scale": asked.guidance_scale,
    }
    found = {
        row["precision"]: row
        for row in post["performance"]
        if (row["model"], row["batch_size"]) == (asked.model, asked.batch_size)
    }
    same = all(theirs[name] == value for name, value in ours.items() if name in theirs)
    if column.format not in found or column.recipe not in ("", POST) or not same:
        return None
    row = found[column.format]
    return row | {"saving": 1 - row["peak_memory_gb"] / found[REFERENCE]["peak_memory_gb"]}
