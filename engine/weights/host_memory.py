"""Weights to host memory and back, bit for bit, whatever tensors they are made of.

Quantized weights are tensor subclasses, not all of which can be pinned or copied asynchronously. So none of them is
asked to: each is taken apart into its plain tensors (`__tensor_flatten__`), whose bytes go into pinned chunks one
after the other, and put together again from them. Meanwhile a module's tensors are on the meta device, where using
one fails instead of computing nonsense. Compiled code goes on working; a recorded CUDA graph refers to addresses, and
PyTorch records it again when they have changed.

Chunks have a size that PyTorch's pinned allocator does not round up, as it would a tensor's (to a power of two), and
are used again, since pinning memory takes longer than filling it. Knows nothing of models or of who must leave.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

log = logging.getLogger(__name__)

CHUNK = 2**28
"""Bytes of a chunk."""


class Pool:
    """Host memory for weights that wait.

    Args:
        pinned: page-locked, for a CUDA device, which then copies at the full rate of its bus.
        chunk: bytes that are taken at a time.
    """

    def __init__(self, pinned: bool, chunk: int = CHUNK):
        self.chunk = chunk
        self._pinned = pinned
        self._spare: list[Tensor] = []
        self._taken = 0

    @property
    def bytes(self) -> int:
        """Host memory that was taken so far, in use or spare."""
        return self._taken * self.chunk

    def store(self, modules: Sequence[nn.Module]) -> Stored | None:
        """Move all parameters and buffers of the modules into host memory.

        Returns:
            What brings them back; None if the host lacks the memory, and then nothing has moved.
        """
        size = sum(_span(leaf) * leaf.itemsize for tensor in _tensors(modules) for leaf in _leaves(tensor))
        chunks = self._take(math.ceil(size / self.chunk))
        if chunks is None:
            return None
        stored = Stored(self, modules, chunks)
        stored.fill()
        return stored

    def give_back(self, chunks: list[Tensor]) -> None:
        """For `Stored` alone."""
        self._spare += chunks

    def _take(self, count: int) -> list[Tensor] | None:
        try:
            while len(self._spare) < count:
                self._spare.append(torch.empty(self.chunk, dtype=torch.uint8, pin_memory=self._pinned))
                self._taken += 1
        except RuntimeError as error:  # what was taken stays in the pool
            log.warning("no host memory for weights that wait: %s", str(error).splitlines()[0])
            return None
        taken, self._spare = self._spare[:count], self._spare[count:]
        return taken


class Stored:
    """Weights that wait; made by `Pool.store`."""

    def __init__(self, pool: Pool, modules: Sequence[nn.Module], chunks: list[Tensor]):
        self._pool, self._modules, self._chunks = pool, tuple(modules), chunks
        self._at = 0

    def fill(self) -> None:
        """For `Pool.store` alone: copy everything, and let go of it on the device."""
        self._replace(self._write)

    def restore(self, device: torch.device) -> None:
        """Put everything back into its modules, on `device`, and free the host memory."""
        self._at = 0
        self._replace(lambda leaf: self._read(leaf, device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the chunks are written anew only when they have been read
        self.discard()

    def discard(self) -> None:
        """Free the host memory; what was not restored is lost."""
        self._pool.give_back(self._chunks)
        self._chunks = []

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        made: dict[int, Tensor] = {}
        for tensor in _tensors(self._modules):
            fresh = _mapped(tensor, change)
            if isinstance(tensor, nn.Parameter):
                fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fresh
        for module in self._modules:
            for child in module.modules():
                for held in (child._parameters, child._buffers):
                    held.update({name: made[id(tensor)] for name, tensor in held.items() if tensor is not None})

    def _write(self, leaf: Tensor) -> Tensor:
        for chunk, piece in self._pieces(_flat(leaf)):
            chunk.copy_(piece, non_blocking=True)
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")

    def _read(self, leaf: Tensor, device: torch.device) -> Tensor:
        fresh = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
        for chunk, piece in self._pieces(_flat(fresh)):
            piece.copy_(chunk, non_blocking=True)
        return fresh

    def _pieces(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The next bytes of the chunks and the bytes of a tensor that belong there, chunk by chunk."""
        done = 0
        while done < len(flat):
            index, begin = divmod(self._at, self._pool.chunk)
            count = min(len(flat) - done, self._pool.chunk - begin)
            yield self._chunks[index][begin : begin + count], flat[done : done + count]
            done += count
            self._at += count


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Every parameter and buffer once."""
    seen = set()
    for module in modules:
        for child in module.modules():
            for tensor in (*child._parameters.values(), *child._buffers.values()):
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def _mapped(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same tensor, or tensor subclass, with its plain tensors changed."""
    if not is_traceable_wrapper_subclass(tensor):
        return change(tensor.detach())
    names, context = tensor.__tensor_flatten__()
    inner = {name: _mapped(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _leaves(getattr(tensor, name))


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory, gaps of its strides included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _flat(tensor: Tensor) -> Tensor:
    """Those elements as bytes, sharing memory."""
    return tensor.as_strided((_span(tensor),), (1,)).view(torch.uint8)
