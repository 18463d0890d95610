"""What several tabs say: names, why a number is what it is, and numbers with their units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from engine import catalog
from engine.columns import POST, Column, in_words, recipe_named
from engine.formats import FORMATS, LABELS, QUANTIZED, REFERENCE
from engine.request import CompareRequest
from engine.results import Generation


def listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _rates() -> str:
    """How long a matrix product takes in each format where the reference's takes 1: "FP8 and MXFP8 half"."""
    shares = {1 / 2: "half", 1 / 4: "a quarter"}
    times = sorted({FORMATS[name].time for name in QUANTIZED}, reverse=True)
    of = {time: listed(LABELS[name] for name in QUANTIZED if FORMATS[name].time == time) for time in times}
    return ", ".join(f"{names} {shares.get(time, f'{time:g}')}" for time, names in of.items())


TITLE = "Twinframe"
TAGLINE = "See what quantization costs"
COMPARE, BLIND, GALLERY = "Compare", "Blind test", "Gallery"
QUALITY, RECIPE, BENCHMARKS, HOW = "Quality", "Recipe", "Benchmarks", "How it works"
NAMES = LABELS
GENERATE, STOP = "Generate", "Stop"
MODEL_LABEL, PRECISION_LABEL = "Model", "Precision"
WHY = {
    "verdict": "Speed is the wall clock of the whole call, memory the peak, or the weights where the peak is not the "
    "format's; the part of the way is the place of LPIPS between bf16's own noise and another seed. What is emulated "
    "is never called fast or slow. Each number stands below, with how it was measured.",
    "latency": "Wall clock of one real pipeline call: text, denoising, decoding. After a warm-up of the same shape; "
    "loading, compiling and file writing are not in it. × is bf16's time over this one's.",
    "peak": "All weights of the pipeline as stored, plus the most that its run allocates beyond them. GB are 1e9 "
    "bytes; the percentage is against bf16.",
    "weights": "Bytes of all weights as stored, text encoders and VAE included, counted and not estimated; the "
    "percentage is against bf16.",
    "previews": "The previews that you asked for were decoded between the steps of this very run, so its time says "
    "nothing. Switch them off to time it.",
    "streamed": "This device has not the memory for it: each of its blocks came from host memory when it was used and "
    "left again, so its time is the bus's. Picture, LPIPS and memory are those of weights that stay.",
    "shared": "Another precision ran on the same device at the same time, so its time says nothing. Give each its own "
    "device, or all of them one, to time it.",
    "compiled": "Something was compiled or recorded during this very run, so its time says nothing. Generate again to "
    "time it.",
    "emulated": "This machine has no tensor cores or CPU instructions for the format: the same arithmetic runs on "
    "others, so picture, LPIPS and weight bytes are the format's, speed and peak memory are not.",
    "disproved": "This machine has the format, but its own products of it are not right, so the same arithmetic runs "
    "on others: picture, LPIPS and weight bytes are the format's, speed and peak memory are not.",
    "fp8 attention": "FP8 attention is emulated on every machine: picture, LPIPS and weight bytes are its own, speed "
    "and peak memory are not.",
    "stages": "The latency by stage, in seconds: encoding the prompt, all denoising steps, and the VAE's decoding.",
    "lpips": "How far a picture is from bf16's, by AlexNet at full resolution, on the tensors: 0 is equal. "
    "The scale runs from bf16's own noise to bf16 with another seed.",
    "words_read": "Of the characters that the prompt asks to be written, the share that optical character recognition "
    "reads back. It knows the prompt, not bf16: bf16 itself can miss some.",
    "psnr": "Peak signal-to-noise ratio against bf16, in dB: higher is closer. It counts levels, and knows no shapes.",
    "speedup": "bf16's latency over this one's; only where both ran natively, and both alone or both beside others.",
    "step speedup": "The time of a denoising step in bf16 over this one's, in one run.",
    "each": "Latency of the whole call, divided by the batch size: of runs with equal steps, these can be compared.",
    "median": "Median of the repeats: wall clock of one real pipeline call after a warm-up of the same shape.",
    "spread": "The tenth and the ninetieth percentile of the repeats.",
    "step": "One denoising step: the denoising time over the number of steps.",
    "over the post": "The time of a step by the post's method over this one's, at the same precision, in one run: at "
    "batch 1 of FLUX.1-dev and Qwen-Image each block is replayed from a CUDA graph, elsewhere only compiled.",
    "over the default mode": "The time of a step with the post's blocks only compiled, with torch.compile's default "
    "mode, over this one's, at the same precision, in one run.",
    "saving": "Peak memory against bf16's in the same file.",
    "first call": "The first call of this row, which compiles and warms up; no other number holds any of it.",
    "bf16 bytes": "Two bytes a weight; MB are 1e6 bytes.",
    "stored": "The weights as they lie in memory, with their scales and whatever else the recipe keeps beside them; MB "
    "are 1e6 bytes.",
    "rule": "The first rule of the recipe that decides about the layer.",
    "shape": "Input × output features of the layer.",
    "mean_lpips": "How far the pictures are from bf16's, by AlexNet at full resolution, on the tensors: the "
    "mean over the prompts. 0 is equal.",
    "interval": "Where the mean lies with 95% confidence: a percentile bootstrap over the prompts.",
    "flicker": "LPIPS of the differences between neighbouring frames, against those of bf16's clip: what moves "
    "otherwise, or flickers, counts here.",
    "gemms": "Derived, not measured: time of the denoiser's matrix products by FLOPs, where "
    f"{LABELS[REFERENCE]} takes 1, {_rates()}.",
    "denoiser": "Bytes of all weights of the denoiser as stored; MB are 1e6 bytes.",
}
"""What a number means and how it was measured."""
RECIPE_LABEL = "Which layers are quantized"
RECIPES = {
    POST: "Selective (the post's recipe)",
    "tuned": "Tuned",
    "rebalanced": "Rebalanced",
    "post-corrected": "Selective, names corrected",
    "strict": "Selective, strict",
    "full": "Every layer",
}
SHORT = {
    POST: "Selective",
    "tuned": "Tuned",
    "rebalanced": "Rebalanced",
    "post-corrected": "Corrected",
    "strict": "Strict",
    "full": "Full",
}
"""Of recipes, beside a format's name."""
PLAY, SEEK, PLAYER = "Play", "Frame", "Clips, played together"
PLAYER_HINT = "Space plays, the arrow keys go frame by frame."
NOT_COMPARABLE = "emulated, not comparable"
NOT_TIMED, NOT_TIMED_SHORT = "not timed: previews were drawn", "not timed"
SHARED_DEVICE = "not timed: it shared its device"
STREAMED = "not timed: it was streamed"
SHARED_CARD = "shared card, not to quote"
COMPILED = "not timed: something was compiled meanwhile"
STARTING = "Starting"
BUSY = "A comparison is already running: wait for it, or press Stop."
BROKEN = "The comparison could not be run: try again in a moment, and see the server's log if it happens again."
MEASURED_BADGE = "measured by this project"
SOURCES = {"measured": "measured", "quoted": "quoted"}
QUOTED_BADGE = "quoted: NVIDIA B200, PyTorch post, not measured here"


def of_column(column: Column, first: str = POST) -> str:
    """A column for people: "NVFP4", or with its recipe where that is not the first of its model, "NVFP4 Tuned"."""
    return f"{NAMES[column.format]}{_options(column)}" if column.rules in ("", first) else of_pair(column)


def of_pair(column: Column) -> str:
    """A column with its recipe, the post's too: "NVFP4 Selective"."""
    return f"{NAMES[column.format]} {SHORT.get(column.rules, column.rules)}".rstrip() + _options(column)


def of_recipe(recipe: str) -> str:
    """What a column's recipe is called where it can be chosen, with the column's options."""
    by = Column(REFERENCE, recipe)
    return " ".join(filter(None, (RECIPES.get(recipe_named(by.rules), by.rules), in_words(by.options))))


def _options(column: Column) -> str:
    return f" {in_words(column.options)}" if column.options else ""


def name(asked: CompareRequest, column: str) -> str:
    """One of a request's columns for people."""
    return of_column(asked.column(column), catalog.model(asked.model).recipes[0])


def thing(asked: CompareRequest) -> str:
    """What a model makes: "picture" or "clip"."""
    return catalog.model(asked.model).makes.removesuffix("s")


def no_latency(generation: Generation, asked: CompareRequest) -> str:
    """Why a precision has no latency, in a few words."""
    if generation.execution == "emulated":
        return NOT_COMPARABLE
    if generation.is_streamed:
        return STREAMED
    if asked.previews:
        return NOT_TIMED
    return SHARED_DEVICE if generation.at_once else COMPILED


def seconds(value: float) -> str:
    """A duration with three useful digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def stages(generation: Generation) -> str:
    """A latency by stage, and what to know of it: "text 0.02 · denoise 1.94 · decode 0.14 s"."""
    latency = generation.latency
    parts = (("text", latency.text), ("denoise", latency.denoise), ("decode", latency.decode))
    said = " · ".join(f"{name} {seconds(value)}" for name, value in parts) + " s"
    return f"{said} · {SHARED_CARD}" if generation.shared_card else said


def size(gigabytes: float) -> tuple[str, str]:
    """Number and unit; 1 GB is 1e9 bytes, less than one is shown in MB."""
    if gigabytes >= 1:
        return f"{gigabytes:.1f}" if gigabytes < 100 else f"{gigabytes:.0f}", "GB"
    return f"{gigabytes * 1000:.0f}", "MB"


def model(model_id: str) -> str:
    """A known model's name; the id of another, whose figures somebody else measured."""
    return catalog.KINDS[model_id].name if model_id in catalog.KINDS else model_id


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


def share(score: float) -> str:
    """A score from 0 to 1, in percent."""
    return f"{100 * score:.0f}"


def psnr(decibels: float | None) -> str:
    if decibels is None:
        return "–"
    return "identical" if decibels == float("inf") else f"{decibels:.1f}"


def bench_settings(asked: Mapping[str, Any]) -> str:
    """The settings of a benchmark, as its file names them."""
    size = f"{asked['width']} × {asked['height']}"
    frames = asked.get("num_frames", 1)
    guidance = asked.get("true_cfg_scale", asked.get("guidance_scale"))
    parts = [size, f"{frames} frames" if frames > 1 else "", f"{asked['num_inference_steps']} steps"]
    return " · ".join([part for part in parts if part] + ([f"guidance {guidance:g}"] if guidance else []))


def when(created: str) -> str:
    """An ISO time as a date: "22 Nov 2026"; as it stands if it is none."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    moment = moment.astimezone(UTC) if moment.tzinfo else moment
    return f"{moment.day} {moment:%b %Y}"


def megabytes(count: float) -> str:
    """Bytes as MB of 1e6, with three useful digits, for a column."""
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else seconds(value)


def percent(value: float) -> str:
    return "±0%" if round(value, 1) == 0 else f"{value:+.1f}%".replace("-", "−")
