"""The Benchmarks tab: what was measured, and what is quoted from the post."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.benchmark.overview import POSTS_DEVICE, Figure
from engine.catalog import KINDS
from engine.formats import REFERENCE
from ui.words.common import NAMES, factor, listed

ANSWERS = "What it brings"
ANSWERS_NOTE = (
    "Measured: one denoising step, each ratio from one run, the newest that has both. The post's compile is its faster "
    "mode. Quoted: whole calls on another device by the post's authors, never measured here. A ratio counts at its own "
    "device alone."
)
CHART = "Speedup over bf16"
CHART_NOTE = (
    "Whole calls, bf16 of the same run or table = 1. Filled: measured by this project. Hollow: quoted from the post."
)
FIGURES = "All figures"
FIGURES_NOTE = "The newest of each; a column's head sorts. Runs differ in their steps: compare seconds of equal steps."
NONE_LEFT = "No figure has all of these: choose All somewhere."
NO_SPEEDUP = "None of these has bf16 beside it, so there is no speedup to draw."
FILTERS = {"model": "Model", "device": "Device", "precision": "Precision", "batch": "Batch size"}
EVERY = {"model": "All models", "device": "All devices", "precision": "All precisions", "batch": "All batch sizes"}
DEVICE, SIZE, BATCH, STEPS, EACH, PEAK, SOURCE = "Device", "Size", "Batch", "Steps", "Each", "Peak", "Source"
OVER_BF16, STEP_OVER_BF16, OVER_POST, SAVING = "vs bf16", "Step vs bf16", "vs the post's", "Peak vs bf16"
POSTS = "The post's"
MEASURED = "Measured by this project"
MEASURED_NOTE = (
    "Latency is the median of the repeats, after a warm-up of the same shape; its ratio is to bf16 in the same file; "
    "bars divide a batch's latency by its size. Peak is what was allocated at most, all weights included; GB are 1e9 "
    "bytes."
)
WEIGHTS = {"random": "random weights of the real architecture", "checkpoint": "trained weights"}
METHODS = {"engine": "Twinframe", "post": "the post's", "post-default": "default mode", "bare": "bare pipeline"}
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
QUOTED_LPIPS = "Mean LPIPS over DrawBench (AlexNet)"
QUOTED_SELECTIVE = "Every layer against selective, FLUX.1-dev"
MEMORY_PLOT = "Peak memory"


def method(recipe_id: str, repeats: Sequence[int]) -> str:
    """With the recipe, and how often rows were measured, ascending."""
    low, high = repeats[0], repeats[-1]
    many = f"{low} to {high}" if low < high else f"{high}"
    return f"recipe {recipe_id} · median of {many}" if high > 1 else f"recipe {recipe_id} · measured once"


def latency_plot(model_id: str) -> str:
    """What the bars show: a batch's latency, divided by its size."""
    made = KINDS[model_id].makes if model_id in KINDS else "pictures"
    return f"Latency per {made.removesuffix('s')}"


def run(number: int, batches: Collection[int], model: str) -> str:
    """The title of one of a model's runs, the newest being the first."""
    return f"Run {number}: {model}, batch {', '.join(map(str, sorted(batches)))}"


def older(count: int, model: str) -> str:
    return f"{count} older run{'s' if count > 1 else ''} of {model}"


def device(name: str) -> str:
    return name.removeprefix("NVIDIA ")


def size(width: int, height: int) -> str:
    return f"{width}×{height}"


def group(model: str, width: int, height: int, batch: int) -> str:
    return f"{model}, {size(width, height)}, batch {batch}"


def answer(model: str, found: Sequence[Figure]) -> str:
    """What figures of one batch size of one model come to; empty if nothing of them is faster than something.

    "LTX-2, FP8, H200: 1.14× the post's compile, 1.48× bf16; on a B200 the post reports NVFP4 1.56× bf16."
    """
    parts = []
    for figure in found:
        ratios = [f"{factor(figure.over_post)} the post's compile"] if figure.over_post else []
        ratios += [f"{factor(figure.step_speedup)} bf16"] if figure.step_speedup else []
        if ratios and figure.precision != REFERENCE:
            parts.append(f"{NAMES[figure.precision]}, {device(figure.device)}: {', '.join(ratios)}")
    posts = [f"{NAMES[f.precision]} {factor(f.speedup)}" for f in found if f.quoted and f.speedup]
    if posts:
        said = f"on a {device(POSTS_DEVICE)} the post reports {listed(posts)} bf16"
        parts.append(said if parts else f"{said}; nothing of it was measured here")
    return f"{model}, {'; '.join(parts)}." if parts else ""


def unreadable(name: str) -> str:
    return f"{name} is not a benchmark that python -m engine bench wrote, so it is not shown."
