"""One CUDA graph of a whole denoising step: the host launches once instead of some thousand times.

A recorded step reads its inputs where they lay when it was recorded, so every call copies its own there, and hands out
copies of what it made, which the next replay overwrites. Weights are read where they lie: forget the recordings when
they move. Knows nothing of what the call computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

KEPT = 16
"""Recordings of one denoiser, one a shape: all sizes that a model offers, twice where it has a negative prompt. The one
used longest ago gives way."""
PLAIN_CALLS = 2
"""Calls of a shape that run as they are before one is recorded: they compile, tune and fill the libraries' caches,
which cannot be done while recording."""


class StepGraph:
    """`call`, recorded once for each shape of its arguments and replayed from then on.

    Tensors may change between calls of one shape, everything else in the arguments is part of the shape. Arguments with
    a tensor outside the GPU are never recorded.

    Args:
        call: takes and gives tensors in any nesting of tuples, lists and dictionaries; it neither waits for the GPU nor
            draws random numbers.

    Attributes:
        dropped: recordings that gave way to others so far.
        plain: calls so far that ran as they are, on the way to a recording.
        recorded: recordings made so far.
        replayed: calls so far that were replays.
        variant: hashable; set it when `call` computes something else for the same arguments. Part of the shape.
    """

    def __init__(self, call: Callable[..., Any]):
        self.dropped = self.plain = self.recorded = self.replayed = 0
        self.variant: object = None
        self._call = call
        self._plain: dict[tuple[Any, ...], int] = {}
        self._recorded: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._pool: tuple[Any, ...] | None = None
        """The memory pool of all recordings, which never run at once. It is freed with the last of them."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        leaves, nesting = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not _recordable(tensors):
            return self._call(*args, **kwargs)
        key = (self.variant, str(nesting), *map(_shape, leaves))
        if key not in self._recorded:
            if self._plain.get(key, 0) < PLAIN_CALLS:
                self._plain[key] = self._plain.get(key, 0) + 1
                self.plain += 1
                return self._call(*args, **kwargs)
            self._record(key, args, kwargs)
        self._recorded.move_to_end(key)
        self.replayed += 1
        return self._recorded[key].replay(tensors)

    def forget(self) -> None:
        """Drop all recordings; the next calls run plainly and record anew."""
        self._plain.clear()
        self._recorded.clear()
        self._pool = None

    def _record(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        while len(self._recorded) >= KEPT:
            self._plain.pop(self._recorded.popitem(last=False)[0], None)
            self.dropped += 1
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self._recorded[key] = _Recording(self._call, args, kwargs, self._pool)
        self.recorded += 1


class _Recording:
    """One recorded call, its inputs and its outputs."""

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], pool: tuple[Any, ...]):
        self._inputs: list[Tensor] = []

        def own(tensor: Tensor) -> Tensor:
            self._inputs.append(tensor.clone())
            return self._inputs[-1]

        args, kwargs = tree_map_only(Tensor, own, (args, kwargs))
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may ask the driver things that may not be asked while this one records.
        stream = _stream(self._inputs[0].device)
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = call(*args, **kwargs)

    def replay(self, tensors: list[Tensor]) -> object:
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tree_map_only(Tensor, torch.clone, self._outputs)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where a device's steps are recorded. PyTorch's own choice is one stream, of the device that records first, and
    nothing that another one does is recorded there."""
    return torch.cuda.Stream(device)


def _recordable(tensors: list[Tensor]) -> bool:
    return bool(tensors) and all(tensor.is_cuda for tensor in tensors)


def _shape(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return leaf
