"""The Quality tab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from engine.catalog import DEFAULT
from engine.columns import POST
from engine.formats import DEFAULTS, QUANTIZED, REFERENCE
from engine.results import NO_SCORE
from ui.words.common import NAMES, change, of_recipe, score

NO_QUALITY = "Nothing has been measured yet. Recipes are compared over many prompts, and drawn here, by"
EVALUATE_COMMAND = (
    f"python -m engine evaluate --model {DEFAULT} --precision {' '.join(p for p in DEFAULTS if p != REFERENCE)} "
    "--recipe full post --prompts drawbench --out assets/quality/my-run"
)
ANSWERS = "What quantization loses"
TRANSFER = (
    "Miniatures need not transfer: a full-size model can lose more or less, and a recipe that helps here can do little "
    "there."
)
CHART = "Mean LPIPS from bf16"
CHART_NOTE = (
    "Shorter is closer to bf16. Filled: measured by this project, with the 95% interval; bars of a model can come from "
    "several machines, whose sums differ, and a table below is of one. Hollow: quoted from the post, FLUX.1-dev and "
    "Qwen-Image at full size over the 200 prompts of DrawBench."
)
SHORT = {POST: "selective", "tuned": "tuned", "rebalanced": "rebalanced", "full": "every layer"}
FRONTIER = "Closeness against size"
FRONTIER_NOTE = (
    "Each point is a recipe, with the 95% interval of its mean LPIPS: lower is closer to bf16, left is smaller."
)
BY_BYTES = "LPIPS against the denoiser's weights, MB"
BY_SPEED = "LPIPS against the time of the matrix products, bf16 = 1: derived from FLOPs, not measured"
OFFERED_KEY = "Filled and named: offered in Compare"
FLOOR, FLOOR_KEY = "bf16's own noise", "Dashed: bf16's own noise"
SENSITIVITY_ELSEWHERE = "How sensitive each group of layers is stands in the Recipe tab."
ABLATION, ABLATION_NOTE = "Every layer against selective", "The post's question, measured here."
REMEDIES = "Remedies, each alone"
REMEDIES_NOTE = "What each adds to the selective recipe, and what it costs."
FORMATS = "Every format, and remedies that cost no byte"
FORMATS_NOTE = (
    "By the selective recipe, over prompts that nothing was chosen on. A remedy stands with its own format; where "
    "intervals overlap, so many prompts do not decide."
)
PLAIN = "none"
DISTRIBUTIONS = "Prompt by prompt"
DISTRIBUTIONS_NOTE = "A dot a prompt; the stroke is the mean."
DISTRIBUTIONS_ENDS = "Dashed: bf16's own noise, and another seed where that fits."
WORST = "Worst pairs"
WORST_NOTE = "The prompts that suffer most; a link opens the pair in Compare, where Generate makes it."
OPEN_PAIR = "Open in Compare"
SCORES = "Scores"
RECIPE_COLUMN, REMEDY, WHAT, PROMPTS, BASIS = "Recipe", "Remedy", "What it does", "Prompts", "Basis"
HALVES = {"search": "searched on", "report": "held out"}
WEIGHTS_OF, OVER_SEED, GEMMS, FLICKER = "Denoiser", "vs selective", "GEMM time", "Flicker"
MORE_BYTES, MORE_WORK = "Bytes", "FLOPs"


def answer(model: str, found: Mapping[tuple[str, str], tuple[float, int]]) -> str:
    """What was measured of a model, in a sentence.

    Args:
        found: (precision, recipe) -> mean LPIPS and bytes of the denoiser.
    """
    said = []
    worst = {name: max((mean for of, (mean, _) in found.items() if of[0] == name), default=0.0) for name in QUANTIZED}
    for precision in sorted(QUANTIZED, key=lambda name: worst[name], reverse=True):
        own = {recipe: value for (name, recipe), value in found.items() if name == precision}
        if POST in own:
            every = f" (every layer: {score(own['full'][0])})" if "full" in own else ""
            said.append(f"{NAMES[precision]} by the post's recipe is at LPIPS {score(own[POST][0])}{every}")
        elif "full" in own:
            said.append(f"{NAMES[precision]} in every layer is at LPIPS {score(own['full'][0])}")
        if "tuned" in own:
            said.append(_tuned(own))
        if POST in own and "rebalanced" in own:
            mean, size = own["rebalanced"]
            said.append(f"Rebalanced is at {score(mean)}, with {change(1 - size / own[POST][1])} bytes")
    return f"{model}: {'; '.join(said)}."


def _tuned(own: Mapping[str, tuple[float, int]]) -> str:
    mean, size = own["tuned"]
    if POST not in own:
        return f"Tuned is at {score(mean)}"
    before, bytes_before = own[POST]
    return (
        f"Tuned brings it to {score(mean)}, {change(1 - mean / before)}, with {change(1 - size / bytes_before)} bytes"
    )


def small(model: str) -> str:
    return f"{model}, by recipe"


def real(model: str) -> str:
    return f"{model}, full size"


def evaluated(model: str, prompts: int) -> str:
    return f"{model}, {prompts} prompts evaluated"


def no_measurements(name: str) -> str:
    return f"{name} does not hold what the Quality tab shows, so it is left out."


def prompts(found: Mapping[str, Sequence[object]]) -> str:
    """Over how many prompts something was found and reported."""
    parts = [f"{len(found[half])} prompts {HALVES[half]}" for half in HALVES if found.get(half)]
    return " · ".join(parts) if len(parts) > 1 else f"{len(next(filter(None, found.values()), ()))} prompts"


def unscored(precision: str, recipe: str, count: int) -> str:
    """How many prompts a recipe has no score for."""
    which = f"{NAMES[precision]}, {of_recipe(recipe)}"
    return f"{which}: {NO_SCORE}. This holds for {count} of its prompts, which no mean counts."


def over(score: Mapping[str, float], half: str) -> str:
    """How many prompts a mean is over, and of which half."""
    return f"{score['n']} {HALVES[half]}"


def every_point(count: int) -> str:
    return f"All {count} recipes as a table"


def ends(found: Mapping[str, float]) -> str:
    return "–" if found["low"] is None else f"{score(found['low'])}–{score(found['high'])}"


def interval(found: Mapping[str, float]) -> str:
    return score(found["mean"]) + ("" if found["low"] is None else f", 95% {ends(found)}")


def spread(values: Sequence[float]) -> str:
    """A distribution in words: the median and the ends."""
    return f"median {score(median(values))}, {score(min(values))} to {score(max(values))}"
