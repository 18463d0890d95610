"""Mean LPIPS of every precision over 64 fixed prompts, and the other-seed ceiling, for `mini-flux` at its defaults.

python -m assets.figures.mini_flux_prompts > assets/figures/mini-flux-prompts.json
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from statistics import fmean, stdev

import torch

from engine import catalog
from engine.columns import Column
from engine.environment import versions
from engine.metrics import distances
from engine.request import CompareRequest
from engine.runtime.studio import Studio

THINGS = (
    *("rocket", "cat", "dog", "octopus", "pizza", "snowman", "cactus", "bicycle", "turtle", "strawberry", "guitar"),
    *("airplane", "banana", "tiger", "robot", "violin", "sailboat", "mushroom", "penguin", "castle", "hamburger"),
    *("butterfly", "trumpet", "tomato", "whale", "locomotive", "grinning face", "rainbow", "pineapple", "laptop"),
    *("bus", "frog"),
)
COLOURS = ("red", "blue", "green", "white", "navy", "pink", "orange", "teal", "yellow", "purple", "black", "grey")
PRECISIONS = ("fp8", "mxfp8", "nvfp4", "int8")


def prompts() -> list[str]:
    """Every thing on two colours."""
    draw = random.Random(0)
    return [f"a {thing} on a {colour} background" for thing in THINGS for colour in draw.sample(COLOURS, 2)]


def measure() -> dict:
    studio, spec = Studio("cpu"), catalog.MINI_FLUX
    scores: dict[str, list[float]] = {name: [] for name in (*PRECISIONS, "another seed")}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for prompt in prompts():
            made = {}
            for label, name, seed in (
                ("bf16", "bf16", spec.defaults.seed),
                ("another seed", "bf16", spec.defaults.seed + 1),
                *((name, name, spec.defaults.seed) for name in PRECISIONS),
            ):
                request = CompareRequest.create(prompt, model=spec.id, precisions=PRECISIONS, seed=seed)
                rendition = studio.rendition(spec, Column.of(name, request.recipe), lambda _: None)
                _, output = studio.generate(rendition, spec, request, Path(folder), lambda _: None, lambda: False)
                made[label] = output.pixels * 2 - 1
            for label, values in scores.items():
                values.append(distances.lpips_distance(made["bf16"], made[label]).item())
    return {
        "device": studio.machine.name,
        "versions": versions(),
        "request": {k: v for k, v in request.to_json().items() if k not in ("prompt", "precisions", "seed")},
        "seed": spec.defaults.seed,
        "prompts": prompts(),
        "mean_lpips": {label: fmean(values) for label, values in scores.items()},
        "stdev_lpips": {label: stdev(values) for label, values in scores.items()},
        "lpips": scores,
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
