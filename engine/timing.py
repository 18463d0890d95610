"""Clocks and scales: wall time by stage between device synchronisations, and the memory a run adds.

Knows pipelines only by the two methods every one of ours has, `encode_prompt` and `vae.decode`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch.profiler import ProfilerActivity, profile
from torchao.utils import get_model_size_in_bytes

from engine.results import Latency

GB = 1e9


class StageClock:
    """Stage times of one pipeline call, filled in by `stages`."""

    text = decode = total = 0.0

    @property
    def latency(self) -> Latency:
        """Denoising is what is left of the call: the scheduler's steps, latents and guidance belong to it."""
        return Latency(
            text=self.text, denoise=self.total - self.text - self.decode, decode=self.decode, total=self.total
        )


@contextmanager
def stages(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[StageClock]:
    """Time whatever runs inside: the whole, and within it text encoding and decoding.

    The two methods are wrapped for the duration, on the objects and not on their classes.
    """
    clock = StageClock()

    def timed(call: Callable, stage: str) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            began = _now(device)
            result = call(*args, **kwargs)
            setattr(clock, stage, getattr(clock, stage) + _now(device) - began)
            return result

        return run

    pipeline.encode_prompt = timed(pipeline.encode_prompt, "text")
    pipeline.vae.decode = timed(pipeline.vae.decode, "decode")
    began = _now(device)
    try:
        yield clock
        clock.total = _now(device) - began
    finally:
        del pipeline.encode_prompt, pipeline.vae.decode


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes as stored; `numel * element_size` would over-report packed tensors."""
    return sum(get_model_size_in_bytes(module) for module in modules)


def prepare(device: torch.device) -> None:
    """Start the CPU's profiler once, from the thread that imports torch: started first on another it complains."""
    if device.type == "cpu":
        added_bytes(lambda: None, device)


def added_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that `run` allocates through PyTorch's allocator beyond what was there when it began.

    On a CUDA device that is the allocator's own peak. A CPU keeps none, so the profiler's allocation events are
    added up instead, which slows the run: never time it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
