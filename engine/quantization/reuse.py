"""What the emulation on a CPU computes once instead of in each product: weights unpacked, and an activation quantized
that several layers take, such as those of queries, keys and values.

Bits do not depend on it. What is kept belongs to the emulation and not to the format, so no weight's bytes count it.
Knows no format: a weight unpacks itself, and whoever quantizes says how."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

SHARE = 1 / 8
"""Of the host's free memory that the unpacked weights of a denoiser may fill: the rest is for what is loaded later."""

Result = TypeVar("Result")


class Packed(Protocol):
    """A weight (N, K) that is unpacked for a product."""

    unpacked: Tensor | None

    def unpack(self) -> Tensor:
        """bf16 (N, K)."""
        ...


def keep(denoiser: nn.Module, weights: tuple[type[Any], ...], free: float) -> bool:
    """Unpack the weights of a denoiser's Linear layers that lie on the CPU and keep them so beside what is packed: all,
    or none if there is too little memory. Says which.

    Args:
        weights: the classes of those that are unpacked in every product. They must not change from now on.
        free: bytes of host memory.
    """
    layers = (layer for layer in denoiser.modules() if isinstance(layer, nn.Linear))
    found = [w for w in (layer.weight for layer in layers) if isinstance(w, weights) and w.device.type == "cpu"]
    kept = 2 * sum(weight.numel() for weight in found) <= SHARE * free
    for weight in found if kept else ():
        weight.unpacked = weight.unpack()
    return kept


def operand(weight: Packed) -> Tensor:
    """`weight.unpack()`, or what of it was kept."""
    return weight.unpack() if weight.unpacked is None else weight.unpacked


def allowed(x: Tensor) -> bool:
    """Whether a product of these activations may reuse anything: on a CPU, and neither compiled nor traced."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)


def once(quantize: Callable[..., Result], x: Tensor, *how: object) -> Result:
    """`quantize` of activations as rows; what it made of the last ones if these are the same.

    Args:
        x: bf16 (..., K).
        how: further arguments of `quantize`.
    """
    if not allowed(x):
        return quantize(x.reshape(-1, x.shape[-1]), *how)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    asked, last = (quantize, how), _thread.last
    # The same object and the same bits: whatever was written into it since then is seen.
    if last is not None and last.x() is x and last.asked == asked and torch.equal(_words(rows), last.words):
        same: Result = last.made
        return same
    made = quantize(rows, *how)
    _thread.last = _Last(weakref.ref(x), asked, _words(rows).clone(), made)
    weakref.finalize(x, _thread.last.forget)
    return made


class _Last:
    """Activations and what was made of them."""

    def __init__(self, x: Callable[[], Tensor | None], asked: tuple[object, ...], words: Tensor, made: Any):
        self.x, self.asked, self.words, self.made = x, asked, words, made

    def forget(self) -> None:
        """Hold no memory for activations that are gone."""
        self.words = self.made = None


class _Thread(threading.local):
    """Each device has a thread of its own."""

    last: _Last | None = None


_thread = _Thread()


def _words(rows: Tensor) -> Tensor:
    """The bits of bf16 values in words, where they fill them: compared faster, and NaN equals itself."""
    whole = rows.shape[1] % 4 == 0 and rows.storage_offset() % 4 == 0
    return rows.view(torch.int64 if whole else torch.int16)
