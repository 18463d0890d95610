"""Every English string of the page, and the sentences that are put together from numbers.

Knows results, not HTML: nothing here is escaped, ui/cards.py does that. Speed is only ever spoken of where the
engine calls the latency comparable, and memory at the peak only where the precision ran natively.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median

from engine import catalog
from engine.blind import Given
from engine.catalog import MODELS, ModelSpec
from engine.request import REFERENCE, CompareRequest, shown
from engine.results import Comparison, Generation, Latency, Ruler

TITLE = "Twinframe"
TAGLINE = "See what quantization costs"
PROMPT_LABEL = "Prompt"
COMPARE, BENCHMARKS, GALLERY = "Compare", "Benchmarks", "Gallery"
RECIPE, QUALITY, HOW = "Recipe", "Quality", "How it works"
EXAMPLES_LABEL = "Try"
GENERATE, STOP = "Generate", "Stop"
MODEL_LABEL = "Model"
PRECISIONS_LABEL = "Precisions (bf16 always takes part)"
WHY = {
    "verdict": "Speed is the wall clock of the whole call, memory the peak, or the weights where the peak is not the "
    "format's; closeness is the place of LPIPS between bf16's own noise and another seed. What is emulated is never "
    "called fast or slow. Each number stands below, with how it was measured.",
    "latency": "Wall clock of one real pipeline call: text, denoising, decoding. After a warm-up of the same shape; "
    "loading, compiling and file writing are not in it. × is bf16's time over this one's.",
    "peak": "All weights of the pipeline as stored, plus the most that its run allocates beyond them. GB are 1e9 "
    "bytes; the percentage is against bf16.",
    "weights": "Bytes of all weights as stored, text encoders and VAE included, counted and not estimated; the "
    "percentage is against bf16.",
    "previews": "The previews that you asked for were decoded between the steps of this very run, so its time says "
    "nothing. Switch them off to time it.",
    "emulated": "This machine has no tensor cores for the format: the same arithmetic runs on others, so picture, "
    "LPIPS and weight bytes are the format's, speed and peak memory are not.",
    "stages": "The latency by stage, in seconds: encoding the prompt, all denoising steps, and the VAE's decoding.",
    "lpips": "How different a picture looks from bf16's, by AlexNet at full resolution, on the tensors: 0 is equal. "
    "The scale runs from bf16's own noise to bf16 with another seed.",
    "psnr": "Peak signal-to-noise ratio against bf16, in dB: higher is closer. It counts levels, not what eyes see.",
    "speedup": "bf16's latency over this one's; only where both ran natively.",
    "median": "Median of the repeats: wall clock of one real pipeline call after a warm-up of the same shape.",
    "spread": "The tenth and the ninetieth percentile of the repeats.",
    "step": "One denoising step: the denoising time over the number of steps.",
    "saving": "Peak memory against bf16's in the same file.",
    "first call": "The first call of this row, which compiles and warms up; no other number holds any of it.",
    "bf16 bytes": "Two bytes a weight; MB are 1e6 bytes.",
    "stored": "The weights as they lie in memory, with their scales and whatever else the recipe keeps beside them; MB "
    "are 1e6 bytes.",
    "rule": "The first rule of the recipe that decides about the layer.",
    "shape": "Input × output features of the layer.",
    "mean_lpips": "How different the pictures look from bf16's, by AlexNet at full resolution, on the tensors: the "
    "mean over the prompts. 0 is equal.",
    "interval": "Where the mean lies with 95% confidence: a percentile bootstrap over the prompts.",
    "gemms": "Derived, not measured: time of the denoiser's matrix products by FLOPs, where bf16 takes 1, FP8 and "
    "MXFP8 half, NVFP4 a quarter.",
    "denoiser": "Bytes of all weights of the denoiser as stored; MB are 1e6 bytes.",
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
    "tuned": "Tuned",
    "seed-corrected": "Selective, names corrected",
    "strict": "Selective, strict",
    "full": "Every layer",
}
VIEW_LABEL = "View"
SIDE, SLIDER, FLICKER, DIFFERENCE, TABLE = "Side by side", "Slider", "Flicker", "Difference", "Table"
MAP_LABEL = "Map"
MAPS = {"pixels": "|a − b|", "lpips": "LPIPS"}
MAP_ENDS = {"pixels": "64 levels of 255, or more", "lpips": "LPIPS 0.5, or more"}
"""Of the colour scales; the numbers are those of ui/viewer.js."""
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
NOT_TIMED, NOT_TIMED_SHORT = "not timed: previews were drawn", "not timed"
NOT_TIMED_NOTE = "Previews were drawn between the steps."
PREVIEWS_LABEL, PREVIEWS_HINT = "Live previews", "Shows what is being made after each step; such a run is not timed."
PREVIEWED = "This run showed previews, so nothing in it was timed."
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

NO_RECORDINGS = "Nothing has been recorded yet. A comparison is recorded, on any machine, by"
RECORD_COMMAND = 'python -m engine record --prompt "a rocket on a blue background" --out assets/recorded'
STAGE, STAGE_HINT = "Stage", "Only the prompt, the verdict and the pictures, with a key for everything (P)"
KEYS = "Keys"
STAGE_KEYS = {
    "g": "Generate",
    "x": "Stop",
    "n": "Next example",
    "e": "Edit the prompt",
    "r": "Back to a recorded run",
    "b": "Side by side",
    "s": "Slider; arrow keys move it",
    "f": "Flicker; again to flip",
    "d": "Difference",
    "o": "bf16 against another precision",
    "p": "Leave the stage",
    "?": "This list",
}
"""What ui/stage.js does at a key."""
RECORDED_ON = "Recorded on"
HISTORY = "Made in this browser"
HISTORY_NOTE = "Kept in this browser alone; each opens with its settings."
HISTORY_CLEAR = "Forget them"

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
QUOTED_HERE = "With these settings the post measured"
QUOTED_BADGE = "quoted: NVIDIA B200, PyTorch post, not measured here"
QUOTED_LPIPS = "Mean LPIPS over DrawBench (AlexNet)"
QUOTED_SELECTIVE = "Every layer against selective, FLUX.1-dev"
MEMORY_PLOT = "Peak memory"

BLIND = "Blind test"
BLIND_TITLE = "Which one is bf16?"
BLIND_NOTE = (
    "Two from the same noise, one in bf16 and one quantized, in an order that only the server knows until you answer. "
    "In ABX a third, X, is one of the two again: here the question is whether any difference can be seen at all. "
    "Recorded pairs are shown nowhere else on this page; fresh ones nobody has seen before. Clips are silent."
)
BLIND_KEYS = "Keys: A and B answer, N shows the next pair, Z or a click zooms all pictures."
BLIND_PRECISION, BLIND_MODE, BLIND_SOURCE = "bf16 against", "Question", "Pairs"
BLIND_MODES = {"which": "Which one is bf16?", "abx": "ABX"}
BLIND_SOURCES = {"recorded": "Recorded", "fresh": "Fresh, made now"}
BLIND_PROMPT = "Prompt of the fresh pair; empty takes an example"
BLIND_NEXT, BLIND_SKIP = "Next pair", "Skip"
BLIND_ASKED = {"which": "Which one is bf16?", "abx": "X is one of the two again: which?"}
BLIND_ANSWERS = {"which": ("A is bf16", "B is bf16"), "abx": ("X is A", "X is B")}
BLIND_MAKING, BLIND_MEASURING = "Making a fresh pair", "Measuring the fresh pair"
BLIND_GONE = "The server has forgotten this question: press Next pair."
BLIND_SCORE = "Your score"
BLIND_HEADS = ("bf16 against", "Question", "Right", "Share, 95% interval", "p", "What it is worth")
BLIND_STATISTICS = (
    "p: how often a tossed coin gets at least as many right, by the exact binomial test; the interval is Wilson's. "
    "Decide beforehand how many pairs to answer: to stop as soon as p looks good makes it worthless."
)
BLIND_FEWEST = 5
"""With fewer answers, even all right, a coin gets as many too often to say anything: 1/2^4 is more than 5%."""

NAMES = {"bf16": "bf16", "fp8": "FP8", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}

CLOSENESS = (
    (0.10, "near", "hard to tell from bf16"),
    (0.45, "close", "different only up close"),
    (0.85, "far", "visibly different"),
    (float("inf"), "other", "another {thing}"),
)
"""How a score is put into words: up to which part of the way from the floor to the ceiling, its tone, a phrase."""
WITHIN_NOISE = ("same", "within bf16's own noise")


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
    return {
        "slider": f"Drag across the {made}, or use the arrow keys.",
        "flicker": f"{click}, to see the other one in the same place.",
    }


def map_hints(asked: CompareRequest) -> dict[str, str]:
    """What each map of a difference shows."""
    moving = thing(asked) == "clip"
    of_files = ", of the frame that is shown, after video compression" if moving else ""
    of_tensors = ", of the frame that is shown, before video compression" if moving else ""
    box = "The box marks the worst spot."
    return {
        "pixels": f"|a − b| of each pixel, averaged over its three colours{of_files}. {box}",
        "lpips": f"Where LPIPS comes from{of_tensors}: its mean over the whole is the score. {box}",
    }


def no_latency(generation: Generation) -> str:
    """Why a precision has no latency, in a few words."""
    return NOT_COMPARABLE if generation.execution == "emulated" else NOT_TIMED


def preview_alt(precision: str, note: str) -> str:
    return f"{NAMES[precision]} so far, {note}, a rough preview"


def pair_empty(asked: CompareRequest | None) -> str:
    return f"This view needs two finished {thing(asked)}s." if asked else "This view needs a comparison."


def worst(asked: CompareRequest, name: str) -> dict[str, str]:
    """What is said of the worst spot of each map; ui/viewer.js fills in the numbers."""
    whole = f"over the whole {'picture' if asked.num_frames == 1 else 'frame'}."
    spot = "The worst spot, {size} pixels:"
    return {
        "pixels": f"{spot} {name} is {{worst}} of 255 levels away from bf16 there, {{mean}} {whole}",
        "lpips": f"{spot} the LPIPS of {name} is {{worst}} there, {{mean}} {whole}",
    }


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
        return WITHIN_NOISE[1]
    return f"{way(lpips, ruler):.0%} of the way to another seed: {closeness(lpips, ruler, made)[1]}"


def closeness(lpips: float, ruler: Ruler, made: str) -> tuple[str, str]:
    """How near something made, a "picture" or "clip", is to bf16's: its tone, for the look, and a phrase."""
    if lpips <= ruler.floor:
        return WITHIN_NOISE
    part = way(lpips, ruler)
    tone, phrase = next(said for limit, *said in CLOSENESS if part < limit)
    return tone, phrase.format(thing=made)


def mean_lpips(generation: Generation) -> float | None:
    return generation.metrics.mean_lpips if generation.metrics else None


def weights_saving(comparison: Comparison, generation: Generation) -> float:
    """Fraction of bf16's weight bytes that this precision does without."""
    return 1 - generation.memory.weights / comparison.reference.memory.weights


def verdict(comparison: Comparison) -> str:
    """What the comparison says, from comparable numbers only."""
    return " ".join(said for _, said in verdicts(comparison))


def verdicts(comparison: Comparison) -> list[tuple[str, str]]:
    """The same sentence by sentence, each with the tone of the precision it speaks of; empty where there is none."""
    others = [g for g in comparison.results if g.precision != REFERENCE and g.metrics]
    if not others:
        return [("", f"{NAMES[REFERENCE]} alone: choose another precision to compare it with.")]
    emulated = [g for g in others if g.execution == "emulated"]
    say = _verdict_on_one if len(others) == 1 else _verdict_on_many
    said = [(_tone(comparison, generation), say(comparison, generation)) for generation in others]
    further = [("", _emulated(emulated, len(others)))] if emulated else []
    return said + further + ([("", PREVIEWED)] if comparison.request.previews else [])


def _tone(comparison: Comparison, generation: Generation) -> str:
    if comparison.ruler is None:
        return ""
    return closeness(mean_lpips(generation), comparison.ruler, thing(comparison.request))[0]


def _verdict_on_one(comparison: Comparison, generation: Generation) -> str:
    """One precision, in a whole sentence: speed, memory, and how far it is from bf16."""
    native = generation.execution == "native"
    percent = round(100 * _saving(comparison, generation))
    memory = "memory" if native else "memory for its weights"
    sign = "less" if percent > 0 else "more"
    needs = f"needs as much {memory}" if percent == 0 else f"needs {abs(percent)}% {sign} {memory}"
    speedup, lpips = comparison.speedup(generation), mean_lpips(generation)
    parts = [needs] if speedup is None else [f"is {_speed(speedup)}", needs]
    if comparison.ruler is not None:
        parts.append(f"is {closeness(lpips, comparison.ruler, thing(comparison.request))[1]}")
    said = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    said = f"{NAMES[generation.precision]} {said}"
    if comparison.ruler is None or lpips <= comparison.ruler.floor:
        return f"{said}."
    return f"{said}: {way(lpips, comparison.ruler):.0%} of the way from bf16's own noise to another seed."


def _verdict_on_many(comparison: Comparison, generation: Generation) -> str:
    """One precision of several, in a few words."""
    native = generation.execution == "native"
    percent = round(100 * _saving(comparison, generation))
    speedup = comparison.speedup(generation)
    parts = [] if speedup is None else [_speed(speedup)]
    if native:
        sign = "less" if percent > 0 else "more"
        parts.append("as much memory" if percent == 0 else f"{abs(percent)}% {sign} memory")
    else:
        sign = "smaller" if percent > 0 else "larger"
        parts.append("weights as large" if percent == 0 else f"{abs(percent)}% {sign} weights")
    if comparison.ruler is not None:
        parts.append(closeness(mean_lpips(generation), comparison.ruler, thing(comparison.request))[1])
    return f"{NAMES[generation.precision]}: {', '.join(parts)}."


def _saving(comparison: Comparison, generation: Generation) -> float:
    """Of peak memory where that is the format's own, otherwise of the weights."""
    native = generation.execution == "native"
    return comparison.memory_saving(generation) if native else weights_saving(comparison, generation)


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


def quoted(precision: str, speedup: float, saving: float) -> str:
    """What the post measured of something that is emulated here."""
    return f"{NAMES[precision]} {_speed(speedup)}, {round(100 * saving)}% less memory"


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


def tile(comparison: Comparison) -> str:
    """What sets a comparison apart from others, below its prompt."""
    asked = comparison.request
    others = [g for g in comparison.results if g.metrics]
    scores = ", ".join(f"{NAMES[g.precision]}\N{NO-BREAK SPACE}{score(g.metrics.mean_lpips)}" for g in others)
    parts = [f"LPIPS {scores}"] if scores else []
    if asked.num_frames > 1:
        spec = catalog.model(asked.model)
        parts.append(f"{asked.num_frames / spec.defaults.frame_rate:.1f} s{' with sound' if spec.sound else ''}")
    if asked.batch_size > 1:
        parts.append(f"{asked.batch_size} {thing(asked)}s")
    if asked.recipe != "seed":
        parts.append(RECIPES.get(asked.recipe, asked.recipe).lower())
    return " · ".join(parts)


def recorded_on(comparison: Comparison) -> str:
    return f"{comparison.device}, {when(comparison.created)}"


def not_offered_here(asked: CompareRequest) -> str:
    name = catalog.model(asked.model).name
    return f"{name} is not offered here, so this recording can be looked at, and the settings stay as they are."


def fell_back(reason: str, asked: CompareRequest, recorded: CompareRequest) -> str:
    """What is said where a recording stands in for a run that failed."""
    if asked == recorded:
        return f"The live run failed: {reason} This is a recorded run of the same request."
    return (
        f"The live run failed: {reason} This is the nearest recorded run, of “{recorded.prompt}”, seed {recorded.seed}."
    )


def no_recording(name: str) -> str:
    return f"There is no recording {shown(name)} here: choose one in the gallery."


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


def measured(name: str, rows: Sequence[Mapping]) -> str:
    """The name of a table of measurements, for those who do not see where it stands."""
    batches = sorted({row["batch_size"] for row in rows})
    return f"{MEASURED}: {name}, batch {', '.join(map(str, batches))}"


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


# The Recipe tab

PRECISION_LABEL = "Precision"
PLAN_NOTE = "Decided from names and shapes alone, without weights; on the command line"
REASONS, ROLES, OUTSIDE, LAYERS, ALL_LAYERS = "Why", "By role and depth", "Outside the blocks", "Layers", "All"
LAYER, IN, OUT, STORED, REASON = "Layer", "In", "Out", "Stored", "Why"
ROLE, DEPTH, SHAPE = "Role", "Depth", "Shape"
SHOW_ROLE = "Show these layers in the list below"
FILTER, FILTER_HINT, SHOWN = "Filter layers", "Filter, such as attn.to_q or transformer_blocks.*.ff*", "Which layers"
EVERY_LAYER, QUANTIZED, KEPT = "All layers", "Quantized", "Kept in bf16"
FILTERED = "{shown} of {all} layers · {bf16} → {stored} MB"
"""ui/recipe.js fills in the numbers."""
FILTERED_NONE = "No layer is called that."
SENSITIVITY = "Which layers are sensitive"
MEASURES = {
    "drift": "Drift: relative error of the denoiser's outputs, summed over the steps, %",
    "denoiser_error": "Relative error of one output of the denoiser, %",
    "lpips": "LPIPS",
}


def planned(plan: Mapping, name: str) -> str:
    """What a recipe comes to, in one sentence."""
    before, after = plan["bytes"]["bf16"], plan["bytes"]["quantized"]
    sizes = f"{' '.join(size(before / 1e9))} to {' '.join(size(after / 1e9))}"
    taken = f"{plan['quantized']:,} of the {plan['linears']:,} Linear layers of {name} are quantized"
    return f"{taken}: its denoiser goes from {sizes}, {change(1 - after / before)}."


def unmatched(patterns: Sequence[str]) -> str:
    return f"Rules that match no Linear layer of diffusers' class: {', '.join(patterns)}."


def stack(name: str, blocks: int) -> str:
    return f"{name}, {blocks} blocks"


def held(precision: str, blocks: int) -> str:
    return f"{NAMES.get(precision, precision)} in {blocks} block{'s' if blocks > 1 else ''}"


def run(role: str, first: int, last: int, precision: str) -> str:
    where = f"block {first}" if first == last else f"blocks {first} to {last}"
    return f"{role}, {where}: {NAMES.get(precision, precision)}"


def megabytes(count: float) -> str:
    """Bytes as MB of 1e6, with three useful digits, for a column."""
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else seconds(value)


def sensitivity(precision: str, measure: str) -> str:
    """What a map of sensitivities shows; `measure` is the engine's sentence, with or without its full stop."""
    said = measure[:1].upper() + measure[1:].rstrip(".")
    return f"One group of layers at a time in {precision}, everything else in bf16. {said}. Colours are logarithmic."


def damage(measure: str, value: float) -> str:
    """One value of a map: a score as everywhere, a relative error in percent."""
    return score(value) if measure == "lpips" else seconds(100 * value)


def warm(layers: int, saved: int) -> str:
    return f"{layers} layer{'s' if layers > 1 else ''}, {megabytes(saved)} MB less"


# The Quality tab

NO_QUALITY = "Nothing has been measured yet. Recipes are compared over many prompts, and drawn here, by"
EVALUATE_COMMAND = (
    "python -m engine evaluate --model mini-flux --precision mxfp8 nvfp4 --recipe full seed --prompts drawbench "
    "--out assets/quality/my-run"
)
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
DISTRIBUTIONS = "Prompt by prompt"
DISTRIBUTIONS_NOTE = "A dot a prompt; the stroke is the mean."
DISTRIBUTIONS_ENDS = "Dashed: bf16's own noise, and another seed where that fits."
WORST = "Worst pairs"
WORST_NOTE = "The prompts that suffer most; a link opens the pair in Compare, where Generate makes it."
OPEN_PAIR = "Open in Compare"
SCORES = "Scores"
RECIPE_COLUMN, REMEDY, WHAT, PROMPTS, BASIS = "Recipe", "Remedy", "What it does", "Prompts", "Basis"
HALVES = {"search": "searched on", "report": "held out"}
WEIGHTS_OF, OVER_SEED, GEMMS = "Denoiser", "vs selective", "GEMM time"
MORE_BYTES, MORE_WORK = "Bytes", "FLOPs"


def no_measurements(name: str) -> str:
    return f"{name} does not hold what the Quality tab shows, so it is left out."


def prompts(found: Mapping[str, Sequence]) -> str:
    """Over how many prompts something was found and reported."""
    parts = [f"{len(found[half])} prompts {HALVES[half]}" for half in HALVES if found.get(half)]
    return " · ".join(parts) if len(parts) > 1 else f"{len(next(filter(None, found.values()), ()))} prompts"


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


def percent(value: float) -> str:
    return "±0%" if round(value, 1) == 0 else f"{value:+.1f}%".replace("-", "−")


def blind_nothing(precision: str) -> str:
    return f"There is no recorded pair of {NAMES[precision]} for this model: choose fresh ones."


def blind_frame(letter: str) -> str:
    return f"{letter}, click to zoom"


def blind_truth(given: Given) -> str:
    """What is said of an answer."""
    verdict = "Right" if given.right else "Wrong"
    if given.mode == "abx":
        return f"{verdict}: X is {given.asked}."
    return f"{verdict}: {given.bf16} is bf16."


def blind_told(given: Given) -> str:
    """What a question did not say."""
    other = f"{NAMES[given.precision]} {given.execution}, LPIPS {score(given.lpips)}"
    return f"{given.source} · seed {given.seed} · {other}"


def blind_skipped(count: int) -> str:
    return f"{count} pair{'s were' if count > 1 else ' was'} left unanswered, which can make a score look better."


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def blind_worth(p: float, asked: int) -> str:
    """A p-value in words."""
    if asked < BLIND_FEWEST:
        return "too few to say"
    return "you can tell" if p < 0.05 else "no better than a coin so far"


# How it works

HOW_FORMATS = "Fewer bits, shared scales"
HOW_FORMATS_SAID = (
    "A weight in bf16 takes 16 bits. A microscaling format gives each value 8 or 4, and every short block of "
    "neighbours one scale of its own, so that one large weight spoils the precision of its block and of nothing else. "
    "Below, 32 neighbouring weights in each format: a box is a value, a dark one a scale, and its area is its bits."
)
FORMATS = {
    "bf16": "16 bits each, no scale",
    "fp8": "8 bits each (e4m3), one fp32 scale for a row",
    "mxfp8": "8 bits each (e4m3), one power of two (e8m0) for 32",
    "nvfp4": "4 bits each (e2m1), one e4m3 scale for 16, one fp32 for all",
}
E2M1 = "All that 4 bits can say: 15 values. The scale stretches them over a block; what lies between is rounded."
HOW_SELECTIVE = "Not every layer"
HOW_SELECTIVE_SAID = (
    "A recipe keeps in bf16 what gains little or would hurt much: usually the layers that take in the prompt and the "
    "noise, the last ones before the picture, and those too small for a faster product to matter. What is quantized "
    "here, and what stays:"
)
HOW_LPIPS = "How different is different"
HOW_LPIPS_SAID = (
    "LPIPS runs both pictures through a network that was trained to recognise things (AlexNet), and compares what it "
    "sees, layer by layer; 0 is the same. A score alone says little, so it stands on a ruler: on the left the noise of "
    "bf16 itself, computed in another, equally valid order; on the right bf16 with another seed, another picture."
)
HOW_NO_RULER = "The scores of a comparison appear here once it is finished."
NOISE, OTHER_SEED = "bf16's own noise", "another seed"


def bits(count: int, weights: int) -> str:
    return f"{8 * count / weights:.2f} bits a weight, {megabytes(count)} MB"


def largest(layer: str, inputs: int, outputs: int, name: str) -> str:
    return f"The figures are those of the largest layer of {name} that is quantized: {layer}, {inputs:,} × {outputs:,}."


def signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def selected(plan: Mapping, name: str, count: int, reason: str) -> str:
    """A recipe's outcome, with the reason that keeps the most layers."""
    kept = plan["linears"] - plan["quantized"]
    said = f"{plan['quantized']:,} of {plan['linears']:,} Linear layers of {name}; {kept:,} stay bf16"
    return f"{said}, {count:,} of them because: {reason} The Recipe tab lists each." if reason else f"{said}."


def told(precision: str, lpips: float, ruler: Ruler, made: str) -> str:
    return f"{NAMES[precision]}: {score(lpips)}, {on_the_ruler(lpips, ruler, made)}."
