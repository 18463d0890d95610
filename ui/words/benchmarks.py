"""The Benchmarks tab: what was measured, and what is quoted from the post."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.catalog import MODELS

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
    made = MODELS[model_id].makes if model_id in MODELS else "pictures"
    return f"Latency per {made.removesuffix('s')}"


def run(number: int, batches: Collection[int]) -> str:
    """The title of one of a model's runs."""
    return f"Run {number}: batch {', '.join(map(str, sorted(batches)))}"


def unreadable(name: str) -> str:
    return f"{name} is not a benchmark that python -m engine bench wrote, so it is not shown."
