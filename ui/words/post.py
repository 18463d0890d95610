"""One file to post: what stands on it, and what files are called."""

from __future__ import annotations

import re

from engine.request import CompareRequest
from engine.results import Comparison, Generation
from ui.words.common import factor, name, score, seconds, size
from ui.words.verdict import mean_lpips

POST = "To post"
POST_HINT = "One file with the pictures, their names and numbers, the verdict and the link"
MAKING, FAILED = "Making the file", "The file could not be made here"
DESCRIPTION = (
    "bf16 and quantized pictures of the same prompt, from the same noise, side by side: with latency, memory and LPIPS."
)
LONGEST = 48
"""Characters of a prompt in a file's name."""


def file_name(asked: CompareRequest, *further: str) -> str:
    """What a download is called, without its ending: `twinframe_a-rocket-on-a-blue-background_seed-7_nvfp4`."""
    prompt = re.sub(r"[^a-z0-9]+", "-", asked.prompt.lower()).strip("-")[:LONGEST].strip("-") or "picture"
    parts = [re.sub(r"[^a-z0-9.-]+", "-", part.lower()).strip("-") for part in further]
    return "_".join(["twinframe", prompt, f"seed-{asked.seed}", *parts])


def numbers(comparison: Comparison, made: Generation) -> str:
    """A column's numbers in one line: latency where it is comparable, weights, LPIPS."""
    speedup = comparison.speedup(made) if made is not comparison.reference else None
    parts = []
    if made.latency_comparable:
        parts.append(f"{seconds(made.latency.total)} s{f' ({factor(speedup)})' if speedup else ''}")
    elif made.execution == "emulated":
        parts.append("emulated")
    parts.append(f"{' '.join(size(made.memory.weights))} weights")
    lpips = mean_lpips(made)
    if lpips is not None:
        parts.append(f"LPIPS {score(lpips)}")
    return " · ".join(parts)


def columns(comparison: Comparison) -> list[dict[str, str]]:
    """Every column's name and numbers, in their order."""
    asked = comparison.request
    return [{"name": name(asked, g.column), "numbers": numbers(comparison, g)} for g in comparison.results]
