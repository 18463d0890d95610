"""Every English string of the page, and the sentences that are put together from numbers.

Knows results, not HTML: nothing here is escaped, ui/cards.py does that. Speed is only ever spoken of where the
engine calls the latency comparable, and memory at the peak only where the precision ran natively.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from engine import catalog
from engine.catalog import MODELS, ModelSpec
from engine.request import REFERENCE, CompareRequest
from engine.results import Comparison, Generation, Latency, Ruler

TITLE = "Twinframe"
TAGLINE = "See what quantization costs"
PROMPT_LABEL = "Prompt"
COMPARE, BENCHMARKS = "Compare", "Benchmarks"
EXAMPLES_LABEL = "Try"
GENERATE, STOP = "Generate", "Stop"
MODEL_LABEL = "Model"
PRECISIONS_LABEL = "Precisions (bf16 always takes part)"
WHY = {
    "latency": "Wall clock of one real pipeline call: text, denoising, decoding. After a warm-up of the same shape; "
    "loading, compiling and file writing are not in it. × is bf16's time over this one's.",
    "peak": "All weights of the pipeline as stored, plus the most that its run allocates beyond them. GB are 1e9 "
    "bytes; the percentage is against bf16.",
    "weights": "Bytes of all weights as stored, text encoders and VAE included, counted and not estimated; the "
    "percentage is against bf16.",
    "emulated": "This machine has no tensor cores for the format: the same arithmetic runs on others, so picture, "
    "LPIPS and weight bytes are the format's, speed and peak memory are not.",
    "stages": "The latency by stage, in seconds: encoding the prompt, all denoising steps, and the VAE's decoding.",
    "lpips": "How different a picture looks from bf16's, by AlexNet at full resolution, on the tensors: 0 is equal. "
    "The scale runs from bf16's own noise to bf16 with another seed.",
    "psnr": "Peak signal-to-noise ratio against bf16, in dB: higher is closer. It counts levels, not what eyes see.",
    "speedup": "bf16's latency over this one's; only where both ran natively.",
}
"""What a number means and how it was measured."""
SEED_LABEL, DICE = "Seed", "Pick a random seed"
MORE = "More settings"
STEPS_LABEL = "Steps"
GUIDANCE_LABEL = "Guidance"
SIZE_LABEL = "Size"
RECIPE_LABEL = "Which layers are quantized"
RECIPES = {
    "seed": "Selective (seed recipe)",
    "seed-corrected": "Selective, names corrected",
    "strict": "Selective, strict",
    "full": "Every layer",
}
VIEW_LABEL = "View"
SIDE, SLIDER, FLICKER, DIFFERENCE, TABLE = "Side by side", "Slider", "Flicker", "Difference", "Table"
ZOOM = "Zoom of all pictures"
ZOOM_OUT, ZOOM_RESET, ZOOM_IN = "Zoom out (−)", "Whole picture (0)", "Zoom in (+)"
TO_WORST, TO_WORST_HINT = "Worst spot", "Zoom to where the pictures differ most, averaged over an eighth of each side"
FLIP, FLIP_HINT = "Flip", "Show the other one in the same place (F)"
ZOOM_HINT = (
    "Zoom: plus, minus and 0, a pinch, Ctrl and the wheel, or a double click. Move: drag, or the arrow keys. All "
    "pictures move together."
)
LINK, LINK_HINT = "Copy link", "Copy an address that opens this page with these settings"
CODE, CODE_SUMMARY, CODE_COPY = "Copy code", "Code", "Copy"
CODE_NOTE = "The diffusers and torchao calls of this comparison, as programs that run without Twinframe."
COPIED, NOT_COPIED = "Copied", "Press Ctrl+C"
OTHER_LABEL = "bf16 against"
SOUND_LABEL, SILENCE = "Sound", "Off"
PLAY, SEEK, PLAYER = "Play", "Frame", "Clips, played together"
PLAYER_HINT = "Space plays, the arrow keys go frame by frame."
CURVE = "LPIPS of each frame"
RAN = "What really ran"
NOT_COMPARABLE = "emulated, not comparable"
EMULATED_NOTE = "An emulation's speed and peak are not the format's."
NO_RULER = "its scale has not been measured yet"
THEME_TOGGLE = "Switch between light and dark"
WELCOME = "Type a prompt and press Generate."
WELCOME_MORE = (
    "Each precision starts from the same noise and the same prompt embeddings, so whatever differs is the cost of "
    "quantization."
)
WAITING_IN_LINE = "Waiting for the machine"
STARTING = "Starting"
LOADING, DOWNLOADING = "Loading", "Downloading"
MEASURING = "Measuring the scale for LPIPS"
STOPPED = "Stopped."
STOPPED_BEFORE = "Stopped before this one was finished"
STOPPED_KEPT = "Stopped. What was finished stays below."
FAILED_KEPT = "Not finished. What there is stays below."
BUSY = "A comparison is already running: wait for it, or press Stop."
BROKEN = "The comparison could not be run: try again in a moment, and see the server's log if it happens again."
API_BROKEN = "The comparison ended without a result: try again."

MEASURED = "Measured by this project"
MEASURED_NOTE = (
    "Latency is the median of the repeats, after a warm-up of the same shape; its ratio is to bf16 in the same file; "
    "bars divide a batch's latency by its size. Peak is what was allocated at most, all weights included; GB are 1e9 "
    "bytes."
)
MEASURED_BADGE = "measured by this project"
WEIGHTS = {"random": "random weights of the real architecture", "checkpoint": "trained weights"}
METHODS = {"engine": "Twinframe", "seed": "the post's", "bare": "bare pipeline"}
NO_BENCHMARKS = "Nothing has been measured yet. A GPU is measured, without downloading any weights, by"
BENCH_COMMAND = (
    "python -m engine bench --model flux.1-dev --precision bf16 fp8 --batch-size 1 4 8 --random-weights "
    "--out assets/benchmarks/my-gpu.json"
)
PEAK_BESIDE = "Peak memory of bf16, beside the post's"
NOT_MEASURED = "not measured"
QUOTED = "Quoted from the post"
QUOTED_NOTE = (
    "“Faster Diffusion on Blackwell: MXFP8 and NVFP4 with Diffusers and TorchAO”, PyTorch blog, 2026: measured by its "
    "authors on one NVIDIA B200 with selective quantization and regional compilation; CUDA graphs at batch 1 of "
    "FLUX.1-dev and Qwen-Image. Bars divide a batch's latency by its size. Peak is allocated memory; GB are 1e9 bytes."
)
QUOTED_BADGE = "quoted: NVIDIA B200, PyTorch post, not measured here"
QUOTED_LPIPS = "Mean LPIPS over DrawBench (AlexNet)"
QUOTED_SELECTIVE = "Every layer against selective, FLUX.1-dev"
MEMORY_PLOT = "Peak memory"

NAMES = {"bf16": "bf16", "fp8": "FP8", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}

CLOSENESS = (
    (0.10, "hard to tell from bf16", "The {things} are hard to tell apart."),
    (0.45, "different only up close", "You would need to look closely to see the difference."),
    (0.85, "visibly different", "The {things} differ visibly."),
    (float("inf"), "another {thing}", "It is as good as another {thing}."),
)
"""How a score is put into words: up to which part of the way from the floor to the ceiling, briefly, in full."""
WITHIN_NOISE = ("within bf16's own noise", "The difference is no larger than bf16's own noise.")


def thing(asked: CompareRequest) -> str:
    """What a model makes: "picture" or "clip"."""
    return catalog.model(asked.model).makes.removesuffix("s")


def prompt_hint(spec: ModelSpec) -> str:
    return f"Describe a {spec.makes.removesuffix('s')} in up to {spec.limits.prompt_characters} characters"


def batch_label(spec: ModelSpec) -> str:
    return f"{spec.makes.capitalize()} per precision"


def frames_label(spec: ModelSpec) -> str:
    return f"Frames, {spec.defaults.frame_rate:g} a second"


def recipe(recipe_id: str, summary: str) -> str:
    return f"{RECIPES.get(recipe_id, recipe_id)}: {summary}"


def pair_hints(asked: CompareRequest) -> dict[str, str]:
    """How to use each view of two pictures or clips."""
    made = thing(asked)
    click = "Click the picture, or press F" if made == "picture" else "Press F"
    of_files = "" if made == "picture" else ", of the frame that is shown, after video compression"
    return {
        "slider": f"Drag across the {made}, or use the arrow keys.",
        "flicker": f"{click}, to see the other one in the same place.",
        "difference": f"|a − b| of each pixel, averaged over its three colours{of_files}. The box marks the "
        "worst spot.",
    }


def pair_empty(asked: CompareRequest | None) -> str:
    return f"This view needs two finished {thing(asked)}s." if asked else "This view needs a comparison."


def worst(asked: CompareRequest, name: str) -> str:
    """What is said of the worst spot; ui/viewer.js fills in the numbers."""
    return (
        f"The worst spot, {{size}} pixels: {name} is {{worst}} of 255 levels away from bf16 there, {{mean}} over the "
        f"whole {'picture' if asked.num_frames == 1 else 'frame'}."
    )


def frame_label(precision: str) -> str:
    return f"{NAMES[precision]}, with zoom"


def link_wrong(reason: str) -> str:
    return f"This link cannot be used, so everything keeps its default: {reason}"


def table_empty(asked: CompareRequest | None) -> str:
    return f"The table fills in as {thing(asked)}s are finished." if asked else "The table needs a comparison."


def reference_note(asked: CompareRequest) -> str:
    return f"The reference: every other {thing(asked)} is measured against this one."


def licence(spec: ModelSpec) -> str:
    """What a licence forbids, where that has to be seen before anything is made; empty otherwise."""
    if "non-commercial" not in spec.licence.lower():
        return ""
    return f"{spec.name} is licensed for non-commercial use only."


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


def gigabytes(value: float) -> str:
    """For a column of one unit, with as many digits as the post has."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def change(saving: float, digits: int = 0) -> str:
    """A saving as a signed change: 0.44 -> "−44%"."""
    percent = round(saving * 100, digits)
    return "±0%" if percent == 0 else f"{'−' if percent > 0 else '+'}{abs(percent):.{digits}f}%"


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


def on_the_ruler(lpips: float, ruler: Ruler | None, made: str) -> str:
    """Where a score lies, in words: for under the ruler."""
    if ruler is None:
        return NO_RULER
    if lpips <= ruler.floor:
        return WITHIN_NOISE[0]
    return f"{way(lpips, ruler):.0%} of the way to another seed: {closeness(lpips, ruler, made)[0]}"


def closeness(lpips: float, ruler: Ruler, made: str) -> tuple[str, str]:
    """How near something made, a "picture" or "clip", is to bf16's: in a phrase, and in a sentence."""
    if lpips <= ruler.floor:
        return WITHIN_NOISE
    part = way(lpips, ruler)
    phrase, sentence = next(said for limit, *said in CLOSENESS if part < limit)
    return phrase.format(thing=made), sentence.format(thing=made, things=f"{made}s")


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
    return f"{first} {closeness(mean_lpips(generation), comparison.ruler, thing(comparison.request))[1]}"


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
            parts.append(closeness(mean_lpips(generation), comparison.ruler, thing(comparison.request))[0])
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


def making(precision: str, made: str, index: int, count: int) -> str:
    return f"Making the {NAMES[precision]} {made}, {index} of {count}"


def step(done: int, total: int, left: float | None) -> str:
    if done == total:
        return "decoding"
    said = f"step {done} of {total}"
    if left is None:
        return said
    return f"{said} · {left:.0f} s left" if left >= 1 else f"{said} · under 1 s left"


def waiting(position: int, seconds: float | None) -> str:
    """Where a comparison stands in the queue; a wait of unknown length is not guessed."""
    if not position:
        return "next in line"
    ahead = f"{position} ahead"
    if seconds is None:
        return ahead
    return f"{ahead} · about {seconds:.0f} s" if seconds < 90 else f"{ahead} · about {seconds / 60:.0f} min"


def downloading(what: str, done: int, total: int) -> str:
    return f"{what}, {done / 1e9:.1f} of {total / 1e9:.1f} GB"


def measuring(index: int, total: int) -> str:
    return f"run {index} of {total}, once per model and size"


def settings(asked: CompareRequest, model_name: str) -> str:
    """How the pictures were asked for, after the prompt."""
    parts = [
        model_name,
        f"{asked.width} × {asked.height}",
        *([f"{asked.num_frames} frames"] if asked.num_frames > 1 else []),
        f"{asked.num_inference_steps} steps",
        *([f"guidance {asked.guidance_scale:g}"] if asked.guidance_scale else []),
        f"seed {asked.seed}",
    ]
    if asked.batch_size > 1:
        parts.append(f"{asked.batch_size} {thing(asked)}s")
    if asked.recipe != "seed":
        parts.append(f"recipe {asked.recipe}")
    return " · ".join(parts)


def bench_settings(asked: Mapping[str, object]) -> str:
    """The settings of a benchmark, as its file names them."""
    size = f"{asked['width']} × {asked['height']}"
    frames = asked.get("num_frames", 1)
    guidance = asked.get("true_cfg_scale", asked.get("guidance_scale"))
    parts = [size, f"{frames} frames" if frames > 1 else "", f"{asked['num_inference_steps']} steps"]
    return " · ".join([part for part in parts if part] + ([f"guidance {guidance:g}"] if guidance else []))


def bench_method(recipe_id: str, repeats: int) -> str:
    return f"recipe {recipe_id} · median of {repeats}" if repeats > 1 else f"recipe {recipe_id} · measured once"


def latency_plot(model_id: str) -> str:
    """What the bars show: a batch's latency, divided by its size."""
    made = MODELS[model_id].makes if model_id in MODELS else "pictures"
    return f"Latency per {made.removesuffix('s')}"


def unreadable(name: str) -> str:
    return f"{name} is not a benchmark that python -m engine bench wrote, so it is not shown."


def when(created: str) -> str:
    """An ISO time as a date: "22 Nov 2026"; as it stands if it is none."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    moment = moment.astimezone(UTC) if moment.tzinfo else moment
    return f"{moment.day} {moment:%b %Y}"


def alt(precision: str, asked: CompareRequest, index: int) -> str:
    which = f", {thing(asked)} {index + 1} of {asked.batch_size}" if asked.batch_size > 1 else ""
    return f"{NAMES[precision]}: {asked.prompt}, seed {asked.seed}{which}"
