"""Clocks and scales: wall time by stage between device synchronisations, and the memory a run adds.

Knows pipelines only by the methods that encode text and decode latents.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.autograd.profiler import profile

from engine.results import Latency

GB = 1e9
_STAGES = (
    ("", "encode_prompt", "text"),
    ("connectors", "forward", "text"),
    ("vae", "decode", "decode"),
    ("audio_vae", "decode", "decode"),
    ("vocoder", "forward", "decode"),
)
"""Component ("" is the pipeline itself), method and the stage it belongs to; none of them calls another."""


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

    The methods are wrapped for the duration, on the objects and not on their classes.
    """
    clock = StageClock()

    def timed(call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*args: object, **kwargs: object) -> object:
            began = now(device)
            result = call(*args, **kwargs)
            setattr(clock, stage, getattr(clock, stage) + now(device) - began)
            return result

        return run

    wrapped = []
    try:
        for component, method, stage in _STAGES:
            owner = getattr(pipeline, component, None) if component else pipeline
            if owner is not None:
                setattr(owner, method, timed(getattr(owner, method), stage))
                wrapped.append((owner, method))
        began = now(device)
        yield clock
        clock.total = now(device) - began
    finally:
        for owner, method in wrapped:
            delattr(owner, method)


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers as stored: packed tensors packed, tied ones once."""
    held = {id(t): t for module in modules for t in chain(module.parameters(), module.buffers())}
    return sum(_stored(tensor) for tensor in held.values())


def _stored(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, which of a quantized one are those of the tensors inside it."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def free(device: torch.device) -> None:
    """Give back to the device what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prepare(device: torch.device) -> None:
    """Once a process has imported what it needs, and before it loads a model.

    The CPU's profiler is started, from the thread that imports torch: started first on another it complains.
    """
    _keep_imports()
    if device.type == "cpu":
        added_bytes(lambda: None, device)


@cache
def _keep_imports() -> None:
    """What is imported stays: a million objects that are not looked through whenever a denoiser goes (`free`)."""
    gc.freeze()


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
    # Not torch.profiler's: it reads all events anew in Python, which takes longer than the run itself.
    with profile(profile_memory=True) as record:
        run()
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def now(device: torch.device) -> float:
    """Seconds of a steady clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
