"""Weights to host memory and back, bit for bit, whatever tensors they are made of.

Quantized weights are tensor subclasses, not all of which can be pinned or copied asynchronously. So none of them is
asked to: each is taken apart into its plain tensors (`__tensor_flatten__`), whose bytes go into pinned chunks one
after the other, and put together again from them. Meanwhile a module's tensors are on the meta device, where using
one fails instead of computing nonsense. Compiled code goes on working; a recorded CUDA graph refers to addresses, and
PyTorch records it again when they have changed.

What belongs to one block of a model lies together, so that it can also come alone (engine/weights/streaming.py).
Chunks have a size that PyTorch's pinned allocator does not round up, as it would a tensor's (to a power of two), and
are used again, since pinning memory takes longer than filling it. Knows nothing of models or of who must leave.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

log = logging.getLogger(__name__)

CHUNK = 2**28
"""Bytes of a chunk."""
ALIGNED = 256
"""Bytes to a multiple of which every plain tensor begins in its unit, as PyTorch's CUDA allocator has it at least."""


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The elements of a module's outermost lists, by name: what its `forward` calls one after the other. Those without
    weights, and those that share some with the rest, are left out."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(f"{name}.".startswith(f"{outer}.") for outer in found):
            found |= {f"{name}.{index}" if name else index: block for index, block in child.named_children()}
    times = Counter(id(tensor) for tensor, places in _tensors([module]) for _ in places)
    owned = {name: [(id(tensor), len(places)) for tensor, places in _tensors([block])] for name, block in found.items()}
    return {
        name: block for name, block in found.items() if owned[name] and all(times[of] == n for of, n in owned[name])
    }


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
        stored = Stored(self)
        if not stored.take(modules):
            return None
        stored.empty()
        return stored

    def take(self, count: int) -> list[Tensor] | None:
        """For `Stored` alone: so many chunks."""
        try:
            while len(self._spare) < count:
                self._spare.append(torch.empty(self.chunk, dtype=torch.uint8, pin_memory=self._pinned))
                self._taken += 1
        except RuntimeError as error:  # what was taken stays in the pool
            log.warning("no host memory for weights that wait: %s", str(error).splitlines()[0])
            return None
        taken, self._spare = self._spare[:count], self._spare[count:]
        return taken

    def give_back(self, chunks: list[Tensor]) -> None:
        """For `Stored` alone."""
        self._spare += chunks


Places = list[tuple[dict[str, Tensor | None], str]]
"""Where modules hold a tensor: in which of their dictionaries, and by which name."""


@dataclass
class _Held:
    """A tensor that waits."""

    places: Places
    empty: Tensor
    """The same with its plain tensors on the meta device."""
    starts: list[int]
    """Where each of these begins, in bytes from the unit's beginning."""

    def put(self, tensor: Tensor) -> None:
        for holder, name in self.places:
            holder[name] = tensor


class _Unit:
    """Tensors that lie together: those of a block, or those outside of all blocks.

    Args:
        begin: byte of the chunks at which they begin.
    """

    def __init__(self, begin: int, tensors: Sequence[tuple[Tensor, Places]]):
        self.begin, self.size, self.held = begin, 0, []
        for tensor, places in tensors:
            starts = []
            for leaf in _leaves(tensor):
                starts.append(_aligned(self.size))
                self.size = starts[-1] + _span(leaf) * leaf.itemsize
            self.held.append(_Held(places, _like(tensor, _mapped(tensor, _emptied)), starts))


class Stored:
    """Weights in host memory, and, while they are used, on the device besides."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._chunks: list[Tensor] = []
        self._size = 0
        self._blocks: dict[nn.Module, _Unit] = {}
        self._rest: list[_Unit] = []
        """What is outside of blocks."""

    def take(self, modules: Sequence[nn.Module]) -> bool:
        """Copy all tensors of the modules that are not here yet; they also stay where they are.

        Returns:
            False if the host lacks the memory, and then nothing more is here than was before.
        """
        units, size, within = {}, self._size, set()
        times = {id(tensor): len(places) for tensor, places in _tensors(modules)}
        for block in (block for module in modules for block in blocks(module).values()):
            tensors = _tensors([block])
            if any(times[id(tensor)] != len(places) for tensor, places in tensors):
                continue  # another of the modules has a part of it
            within |= {id(tensor) for tensor, _ in tensors}
            if block not in self._blocks:
                units[block] = (_Unit(_aligned(size), tensors), tensors)
                size = units[block][0].begin + units[block][0].size
        others = [held for held in _tensors(modules) if id(held[0]) not in within]
        rest = _Unit(_aligned(size), others)
        if not self._grow(rest.begin + rest.size):
            return False
        for unit, tensors in (*units.values(), (rest, others)):
            self._write(unit, tensors)
        self._blocks |= {block: unit for block, (unit, _) in units.items()}
        self._rest.append(rest)
        return True

    def take_block(self, block: nn.Module) -> bool:
        """Move a block's tensors here; False if the host lacks the memory, and then they have not moved."""
        tensors = _tensors([block])
        unit = _Unit(_aligned(self._size), tensors)
        if not self._grow(unit.begin + unit.size):
            return False
        self._write(unit, tensors)
        self._blocks[block] = unit
        self.leave(block)
        return True

    def __contains__(self, block: nn.Module) -> bool:
        """Whether it is here as a block, which can come alone."""
        return block in self._blocks

    def size(self, block: nn.Module) -> int:
        """Bytes of a block on the device."""
        return self._blocks[block].size

    def bring(self, block: nn.Module, device: torch.device) -> Tensor:
        """Give a block tensors on the device, which have to be filled yet.

        Returns:
            The bytes in which all of them lie.
        """
        unit = self._blocks[block]
        whole = torch.empty(unit.size, dtype=torch.uint8, device=device)
        for held in unit.held:
            starts = iter(held.starts)

            def cut(empty: Tensor, starts: Iterator[int] = starts) -> Tensor:
                start = next(starts)
                span = whole[start : start + _span(empty) * empty.itemsize].view(empty.dtype)
                return span.as_strided(empty.shape, empty.stride())

            held.put(_like(held.empty, _mapped(held.empty, cut)))
        return whole

    def copy(self, block: nn.Module, whole: Tensor) -> None:
        """Fill what `bring` gave, asynchronously, by the current stream."""
        for chunk, piece in self._pieces(self._blocks[block].begin, whole):
            piece.copy_(chunk, non_blocking=True)

    def leave(self, block: nn.Module) -> None:
        """Let go of a block on the device."""
        for held in self._blocks[block].held:
            held.put(held.empty)

    def empty(self) -> None:
        """Let go of everything on the device."""
        for held in (held for unit in self._units(()) for held in unit.held):
            held.put(held.empty)

    def outside(self, away: Collection[nn.Module]) -> int:
        """Bytes of everything but these blocks."""
        return sum(unit.size for unit in self._units(away))

    def keep(self, device: torch.device, away: Collection[nn.Module]) -> None:
        """Put everything on the device besides, except for these blocks."""
        for unit in self._units(away):
            self._read(unit, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the chunks are written anew only when they have been read

    def restore(self, device: torch.device) -> None:
        """Put everything back into its modules, on `device`, and free the host memory."""
        self.keep(device, ())
        self.discard()

    def discard(self) -> None:
        """Free the host memory; what is not on the device is lost."""
        self._pool.give_back(self._chunks)
        self._chunks = []

    def _units(self, away: Collection[nn.Module]) -> Iterator[_Unit]:
        yield from self._rest
        yield from (unit for block, unit in self._blocks.items() if block not in away)

    def _grow(self, size: int) -> bool:
        """Have room for so many bytes."""
        chunks = self._pool.take(max(0, math.ceil(size / self._pool.chunk) - len(self._chunks)))
        if chunks is None:
            return False
        self._chunks += chunks
        self._size = size
        return True

    def _write(self, unit: _Unit, tensors: Sequence[tuple[Tensor, Places]]) -> None:
        for held, (tensor, _) in zip(unit.held, tensors, strict=True):
            for start, leaf in zip(held.starts, _leaves(tensor), strict=True):
                for chunk, piece in self._pieces(unit.begin + start, _flat(leaf)):
                    chunk.copy_(piece, non_blocking=True)

    def _read(self, unit: _Unit, device: torch.device) -> None:
        for held in unit.held:
            starts = iter(held.starts)

            def read(empty: Tensor, starts: Iterator[int] = starts) -> Tensor:
                fresh = torch.empty_strided(empty.shape, empty.stride(), dtype=empty.dtype, device=device)
                for chunk, piece in self._pieces(unit.begin + next(starts), _flat(fresh)):
                    piece.copy_(chunk, non_blocking=True)
                return fresh

            held.put(_like(held.empty, _mapped(held.empty, read)))

    def _pieces(self, at: int, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The bytes of the chunks from `at` on and the bytes of a tensor that belong there, chunk by chunk."""
        done = 0
        while done < len(flat):
            index, begin = divmod(at + done, self._pool.chunk)
            count = min(len(flat) - done, self._pool.chunk - begin)
            yield self._chunks[index][begin : begin + count], flat[done : done + count]
            done += count


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNED) * ALIGNED


def _tensors(modules: Sequence[nn.Module]) -> list[tuple[Tensor, Places]]:
    """Every parameter and buffer once, with all places that hold it."""
    found: dict[int, tuple[Tensor, Places]] = {}
    for child in dict.fromkeys(child for module in modules for child in module.modules()):
        for holder in (child._parameters, child._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (tensor, []))[1].append((holder, name))
    return list(found.values())


def _like(tensor: Tensor, fresh: Tensor) -> Tensor:
    """A parameter if `tensor` is one."""
    return nn.Parameter(fresh, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh


def _emptied(leaf: Tensor) -> Tensor:
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


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
