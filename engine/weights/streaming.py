"""Weights that do not fit on the device, there a block at a time while they are used.

A streamed model's weights wait in pinned host memory (engine/weights/host_memory.py). Each block, an element of the
model's outermost lists such as a transformer block, is brought as it is called and let go when it has run. Meanwhile
the next one of its list is on its way in a stream of its own, so that two blocks are there at most. Everything outside
of blocks stays on the device: embeddings, norms, projections and buffers, which pipelines read without a call.

The numbers are those of weights that stay: the same bits go through the same kernels. A call that streams waits for
the bus, so its time says nothing of the precision. What its run allocates besides weights is told apart from what
streams (`Traffic`). Knows nothing of models, or of who has to be streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import NoRoomError
from engine.weights.host_memory import Pool, Stored, blocks

Call = Callable[..., Any]
Around = Callable[[nn.Module, Call], Call]
Place = Callable[[str, nn.Module], None]
"""As in engine/weights/loading.py."""

NO_HOST_MEMORY = (
    "The host could not give the page-locked memory from which weights would be streamed: close other programs, or "
    "choose a smaller model or a machine with more memory."
)


class Traffic:
    """What of one device is taken by blocks that are streamed, and what else is allocated meanwhile.

    Attributes:
        here: bytes of blocks that are on the device.
    """

    def __init__(self, device: torch.device):
        self.here = 0
        self._device = device
        self._beside = self._most = 0

    def weigh(self, run: Callable[[], object]) -> tuple[int, int]:
        """The most that `run` allocates on a CUDA device beyond what was there when it began, blocks left out, and the
        most that was allocated at once, with everything, in bytes.

        The allocator counts in the order of the host's calls, and so does `here`: their difference is exact
        to what the allocator rounds up.
        """
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device) - self.here
        torch.cuda.reset_peak_memory_stats(self._device)
        self._beside = self._most = 0
        run()
        torch.cuda.synchronize(self._device)
        self.add(0)
        return self._beside - before, self._most

    def add(self, count: int) -> None:
        """So many bytes of blocks more are going to be there; fewer, where negative."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self._most = max(self._most, peak)
            self._beside = max(self._beside, peak - self.here)
            torch.cuda.reset_peak_memory_stats(self._device)
        self.here += count


class Arriving:
    """Has the blocks of what is loaded leave for host memory one after the other, so that the device never holds more
    of them than one. A context: if it ends without `stored`, the host memory is given back."""

    def __init__(self, pool: Pool):
        self._stored = Stored(pool)
        self._complete = False
        self._of: dict[nn.Module, nn.Module] = {}
        """Every part of a block -> the block."""
        self._current: nn.Module | None = None

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._complete:
            self._stored.discard()

    def place(self, then: Place | None = None) -> Place:
        """What the loader calls with every part of a module, the module itself first, once its weights are there.

        Args:
            then: is called before the part can leave.

        Raises:
            NoRoomError: the host lacks the memory; when a part is placed.
        """

        def placed(name: str, part: nn.Module) -> None:
            if not name:
                self._of = {inner: block for block in blocks(part).values() for inner in block.modules()}
            block = self._of.get(part)
            if block is not self._current:
                self._finish()
            self._current = block
            if then is not None:
                then(name, part)

        return placed

    def stored(self, modules: Sequence[nn.Module]) -> Stored:
        """All weights of the modules in host memory; what is outside of the blocks is on the device besides.

        Raises:
            NoRoomError: the host lacks the memory.
        """
        self._finish()
        if not self._stored.take(modules):
            raise NoRoomError(NO_HOST_MEMORY)
        self._complete = True
        return self._stored

    def _finish(self) -> None:
        """The current block is complete."""
        if self._current is not None and not self._stored.take_block(self._current):
            raise NoRoomError(NO_HOST_MEMORY)
        self._current = None


class Stream:
    """Modules whose blocks come and go, from here on until `end`.

    Args:
        stored: where all of their weights are; what is stored besides is put on the device.
        modules: whose blocks are streamed.
        install: is given what wraps the calls of these blocks, and None in the end; without it they are wrapped here.
    """

    def __init__(
        self,
        stored: Stored,
        modules: Sequence[nn.Module],
        device: torch.device,
        traffic: Traffic,
        install: Callable[[Around | None], None] | None = None,
    ):
        self._stored, self._device, self._traffic = stored, device, traffic
        self._following = _following(modules, stored)
        self._there: dict[nn.Module, tuple[Tensor, torch.cuda.Event | None]] = {}
        """Blocks on the device or on their way, each with its bytes and what happens when they are filled."""
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        stored.keep(device, self._following)
        self._install = install or self._wrap
        self._install(self.around)

    @property
    def kept(self) -> int:
        """Bytes that stay on the device meanwhile."""
        return self._stored.outside(self._following)

    def end(self) -> None:
        """Let go of everything on the device."""
        self._clear()
        self._stored.empty()
        self._install(None)

    def _wrap(self, around: Around | None) -> None:
        """Where `nn.Module.compile` keeps it, so that a block's own hooks run inside."""
        for block in self._following:
            block._compiled_call_impl = around and around(block, block._call_impl)

    def around(self, block: nn.Module, call: Call) -> Call:
        """`call` of a block, with its weights brought before and let go afterwards."""
        if block not in self._following:
            return call

        def called(*args: object, **kwargs: object) -> object:
            try:
                self._arrive(block)
                if (then := self._following[block]) is not None:
                    self._bring(then)
                return call(*args, **kwargs)
            except BaseException:
                self._clear()
                raise
            finally:
                self._leave(block)

        return called

    def _bring(self, block: nn.Module) -> None:
        """Have a block on its way, once all that was asked of the device so far is done: its place may have been that
        of a block whose work is not done yet."""
        if block in self._there:
            return
        self._traffic.add(self._stored.size(block))
        try:
            whole = self._stored.bring(block, self._device)
        except RuntimeError:  # out of memory
            self._traffic.add(-self._stored.size(block))
            raise
        if self._copies is None:
            self._stored.copy(block, whole)
            self._there[block] = (whole, None)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._stored.copy(block, whole)
            self._there[block] = (whole, self._copies.record_event())

    def _arrive(self, block: nn.Module) -> None:
        self._bring(block)
        if (filled := self._there[block][1]) is not None:
            torch.cuda.current_stream(self._device).wait_event(filled)

    def _leave(self, block: nn.Module) -> None:
        if block in self._there:
            self._arrive(block)  # its place may be given to others only when it is filled
            del self._there[block]
            self._stored.leave(block)
            self._traffic.add(-self._stored.size(block))

    def _clear(self) -> None:
        for block in list(self._there):
            self._leave(block)


def _following(modules: Sequence[nn.Module], stored: Stored) -> dict[nn.Module, nn.Module | None]:
    """Every block of the modules -> the one after it in its list, if there is one."""
    lists: dict[tuple[int, str], list[nn.Module]] = {}
    for index, module in enumerate(modules):
        for name, block in ((name, block) for name, block in blocks(module).items() if block in stored):
            lists.setdefault((index, name.rpartition(".")[0]), []).append(block)
    found: dict[nn.Module, nn.Module | None] = {}
    for one in lists.values():
        found |= zip(one, [*one[1:], None], strict=True)
    return found
