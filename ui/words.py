"""Every English string of the page, and the sentences that are put together from numbers.

Knows results, not HTML: nothing here is escaped, ui/cards.py does that. Speed is only ever spoken of where the
engine calls the latency comparable, and memory at the peak only where the precision ran natively.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from engine.request import REFERENCE, CompareRequest
from engine.results import Comparison, Generation, Latency, Ruler

TITLE = "Twinframe"
TAGLINE = "See what quantization costs"
PROMPT_LABEL = "Prompt"
PROMPT_HINT = "Describe a picture"
EXAMPLES_LABEL = "Try"
GENERATE, STOP = "Generate", "Stop"
MODEL_LABEL = "Model"
PRECISIONS_LABEL = "Precisions (bf16 always takes part)"
SEED_LABEL, DICE = "Seed", "Pick a random seed"
MORE = "More settings"
STEPS_LABEL = "Steps"
GUIDANCE_LABEL = "Guidance"
SIZE_LABEL = "Size"
BATCH_LABEL = "Pictures per precision"
RECIPE_LABEL = "Which layers are quantized"
RECIPES = {"seed": "Selective (seed recipe)", "full": "Every layer"}
VIEW_LABEL = "View"
SIDE, SLIDER, TABLE = "Side by side", "Slider", "Table"
OTHER_LABEL = "bf16 against"
PICTURE_LABEL = "Picture"
SLIDER_HINT = "Drag across the picture, or use the arrow keys."
SLIDER_EMPTY = "The slider needs two finished pictures."
TABLE_EMPTY = "The table fills in as pictures are finished."
RAN = "What really ran"
REFERENCE_NOTE = "The reference: every other picture is measured against this one."
NOT_COMPARABLE = "emulated, not comparable"
EMULATED_NOTE = "An emulation's speed and peak are not the format's."
NO_RULER = "its scale has not been measured yet"
THEME_TOGGLE = "Switch between light and dark"
WELCOME = "Type a prompt and press Generate."
WELCOME_MORE = (
    "Each precision starts from the same noise and the same prompt embeddings, so whatever differs between the "
    "pictures is the cost of quantization."
)
WAITING_IN_LINE = "Waiting for the machine"
STARTING = "Starting"
MEASURING = "Measuring the scale for LPIPS"
STOPPED = "Stopped."
STOPPED_BEFORE = "Stopped before this picture was finished"
STOPPED_KEPT = "Stopped. What was finished stays below."
FAILED_KEPT = "Not finished. What there is stays below."
BUSY = "A comparison is already running: wait for it, or press Stop."
BROKEN = "The comparison could not be run: try again in a moment, and see the server's log if it happens again."
API_BROKEN = "The comparison ended without a result: try again."

NAMES = {"bf16": "bf16", "fp8": "FP8", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}

CLOSENESS = (
    (0.10, "hard to tell from bf16", "The pictures are hard to tell apart."),
    (0.45, "different only up close", "You would need to look closely to see the difference."),
    (0.85, "visibly different", "The pictures differ visibly."),
    (float("inf"), "another picture", "It is as good as another picture."),
)
"""How a score is put into words: up to which part of the way from the floor to the ceiling, briefly, in full."""
WITHIN_NOISE = ("within bf16's own noise", "The difference is no larger than bf16's own noise.")


def machine(name: str, support: dict) -> str:
    """The device, and what it does natively and emulates: "NVIDIA H100 · FP8 native · MXFP8, NVFP4 emulated"."""
    parts = [name]
    for execution in ("native", "emulated", "unavailable"):
        of_kind = [NAMES[p] for p, s in support.items() if p != REFERENCE and s.execution == execution]
        if of_kind:
            parts.append(f"{', '.join(of_kind)} {execution}")
    return " · ".join(parts)


def chip(precision: str, execution: str) -> str:
    return NAMES[precision] + (" · emulated" if execution == "emulated" else "")


def unavailable(precision: str, reason: str) -> str:
    return f"{NAMES[precision]} is unavailable here: {reason}"


def seconds(value: float) -> str:
    """A duration with three useful digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def stages(latency: Latency) -> str:
    """A latency by stage: "text 0.02 · denoise 1.94 · decode 0.14 s"."""
    parts = (("text", latency.text), ("denoise", latency.denoise), ("decode", latency.decode))
    return " · ".join(f"{name} {seconds(value)}" for name, value in parts) + " s"


def size(gigabytes: float) -> tuple[str, str]:
    """Number and unit; 1 GB is 1e9 bytes, less than one is shown in MB."""
    if gigabytes >= 1:
        return f"{gigabytes:.1f}" if gigabytes < 100 else f"{gigabytes:.0f}", "GB"
    return f"{gigabytes * 1000:.0f}", "MB"


def change(saving: float) -> str:
    """A saving as a signed change: 0.44 -> "−44%"."""
    percent = round(saving * 100)
    return "±0%" if percent == 0 else f"{'−' if percent > 0 else '+'}{abs(percent)}%"


def factor(speedup: float) -> str:
    return f"{speedup:.2f}×"


def score(lpips: float) -> str:
    if 0 < lpips < 0.0001:
        return "<0.0001"
    return f"{lpips:.3f}" if lpips >= 0.01 else f"{lpips:.4f}"


def psnr(decibels: float) -> str:
    return "identical" if decibels == float("inf") else f"{decibels:.1f}"


def way(lpips: float, ruler: Ruler) -> float:
    """How far a score lies from the floor (0) to the ceiling (1)."""
    span = ruler.ceiling - ruler.floor
    return max(0.0, (lpips - ruler.floor) / span) if span > 0 else 0.0


def on_the_ruler(lpips: float, ruler: Ruler | None) -> str:
    """Where a score lies, in words: for under the ruler."""
    if ruler is None:
        return NO_RULER
    if lpips <= ruler.floor:
        return WITHIN_NOISE[0]
    return f"{way(lpips, ruler):.0%} of the way to another seed: {closeness(lpips, ruler)[0]}"


def closeness(lpips: float, ruler: Ruler) -> tuple[str, str]:
    """How near a picture is to bf16's: in a phrase, and in a sentence."""
    if lpips <= ruler.floor:
        return WITHIN_NOISE
    part = way(lpips, ruler)
    return next((phrase, sentence) for limit, phrase, sentence in CLOSENESS if part < limit)


def mean_lpips(generation: Generation) -> float | None:
    return generation.metrics.mean_lpips if generation.metrics else None


def weights_saving(comparison: Comparison, generation: Generation) -> float:
    """Fraction of bf16's weight bytes that this precision does without."""
    return 1 - generation.memory.weights / comparison.reference.memory.weights


def verdict(comparison: Comparison) -> str:
    """What the comparison says, in one to three sentences, from comparable numbers only."""
    others = [g for g in comparison.results if g.precision != REFERENCE and g.metrics]
    if not others:
        return f"{NAMES[REFERENCE]} alone: choose another precision to compare it with."
    emulated = [g for g in others if g.execution == "emulated"]
    said = _verdict_on_one(comparison, others[0]) if len(others) == 1 else _verdict_on_many(comparison, others)
    return said + (f" {_emulated(emulated, len(others))}" if emulated else "")


def _verdict_on_one(comparison: Comparison, generation: Generation) -> str:
    name = NAMES[generation.precision]
    native = generation.execution == "native"
    saving = comparison.memory_saving(generation) if native else weights_saving(comparison, generation)
    memory = "memory" if native else "memory for its weights"
    percent = round(saving * 100)
    if percent == 0:
        needs = f"needs as much {memory}"
    else:
        needs = f"needs {abs(percent)}% {'less' if percent > 0 else 'more'} {memory}"
    speedup = comparison.speedup(generation)
    first = f"{name} {needs}." if speedup is None else f"{name} is {_speed(speedup)} and {needs}."
    if comparison.ruler is None:
        return first
    return f"{first} {closeness(mean_lpips(generation), comparison.ruler)[1]}"


def _verdict_on_many(comparison: Comparison, others: Sequence[Generation]) -> str:
    said = []
    for generation in others:
        native = generation.execution == "native"
        speedup = comparison.speedup(generation)
        saving = comparison.memory_saving(generation) if native else weights_saving(comparison, generation)
        percent = round(saving * 100)
        parts = [] if speedup is None else [_speed(speedup)]
        if native:
            sign = "less" if percent > 0 else "more"
            parts.append("as much memory" if percent == 0 else f"{abs(percent)}% {sign} memory")
        else:
            sign = "smaller" if percent > 0 else "larger"
            parts.append("weights as large" if percent == 0 else f"{abs(percent)}% {sign} weights")
        if comparison.ruler is not None:
            parts.append(closeness(mean_lpips(generation), comparison.ruler)[0])
        said.append(f"{NAMES[generation.precision]}: {', '.join(parts)}.")
    return " ".join(said)


def _speed(speedup: float) -> str:
    if 0.98 < speedup < 1.02:
        return "as fast"
    return f"{factor(speedup)} faster" if speedup > 1 else f"{factor(1 / speedup)} slower"


def _emulated(emulated: Sequence[Generation], compared: int) -> str:
    names = [NAMES[g.precision] for g in emulated]
    if compared == 1:
        return "It is emulated, so its speed is not compared."
    if len(names) == compared:
        return f"{'Both' if compared == 2 else 'All'} are emulated, so their speed is not compared."
    if len(names) == 1:
        return f"{names[0]} is emulated, so its speed is not compared."
    return f"{', '.join(names[:-1])} and {names[-1]} are emulated, so their speed is not compared."


def making(precision: str, index: int, count: int) -> str:
    return f"Making the {NAMES[precision]} picture, {index} of {count}"


def step(done: int, total: int, left: float | None) -> str:
    if done == total:
        return "decoding"
    said = f"step {done} of {total}"
    if left is None:
        return said
    return f"{said} · {left:.0f} s left" if left >= 1 else f"{said} · under 1 s left"


def measuring(index: int, total: int) -> str:
    return f"run {index} of {total}, once per model and size"


def settings(asked: CompareRequest, model_name: str) -> str:
    """How the pictures were asked for, after the prompt."""
    parts = [
        model_name,
        f"{asked.width} × {asked.height}",
        f"{asked.num_inference_steps} steps",
        f"guidance {asked.guidance_scale:g}",
        f"seed {asked.seed}",
    ]
    if asked.batch_size > 1:
        parts.append(f"{asked.batch_size} pictures")
    if asked.recipe != "seed":
        parts.append(f"recipe {asked.recipe}")
    return " · ".join(parts)


def when(created: str) -> str:
    """An ISO time as a date: "22 Nov 2026"; as it stands if it is none."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    moment = moment.astimezone(UTC) if moment.tzinfo else moment
    return f"{moment.day} {moment:%b %Y}"


def alt(precision: str, asked: CompareRequest, index: int) -> str:
    which = f", picture {index + 1} of {asked.batch_size}" if asked.batch_size > 1 else ""
    return f"{NAMES[precision]}: {asked.prompt}, seed {asked.seed}{which}"
