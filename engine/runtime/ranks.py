"""Ranks: processes beside the device's own, each with a device and denoisers of its own, that compute steps with it.

The device's process is rank 0. It has the pipeline, the text encoders and the VAE, and tells the others through pipes
what to load and what to call; tensors go from device to device (engine/compiler/sequence.py). Each of the others has
one thread that does what it is told in turn, and answers when its device has done it.

A rank that dies, fails or does not answer leaves the others waiting in a collective, on a GPU without an end. So a
thread watches: it ends all ranks, and the collectives with them, and whoever waits is told why in one sentence. The
next one to want ranks starts fresh ones.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from engine import logs, quantized
from engine.catalog import ModelSpec
from engine.columns import Column
from engine.compiler.compilation import Blocks
from engine.compiler.sequence import Part
from engine.errors import FaultError, TwinframeError, fault
from engine.leaving import RANKS_HUNG, abandon
from engine.machine import Support
from engine.quantization import recipes, stored
from engine.quantization.remedies import WeightOnlySteps
from engine.runtime import timing
from engine.weights import cpu_products, host_memory, loading
from engine.weights.residency import Key
from engine.weights.source import Source

log = logging.getLogger(__name__)

HUNG_SECONDS = 300.0
"""How long a rank may work on one thing: loading and compiling take minutes."""
NOTICE_SECONDS = 60.0
"""How long this process may go on in a driver once the ranks that it waits for have been ended."""
_POLL_SECONDS = 0.2
_START = 0
"""The number under which a rank says that it is there."""


@dataclass(frozen=True)
class _Asked:
    number: int
    name: str
    """A method of `_Rank`."""
    args: tuple[Any, ...]


@dataclass(frozen=True)
class _Answered:
    number: int
    error: Exception | None = None


@dataclass(frozen=True)
class _Like:
    """A tensor that comes from rank 0."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Peer:
    """Another rank, as rank 0 sees it."""

    name: str
    """Of its device."""
    process: BaseProcess
    connection: Connection
    asked: deque[int] = field(default_factory=deque)
    """What it has not answered."""
    since: float = 0.0
    """When it began with the first of these."""

    @property
    def end(self) -> str:
        """How its process ended, in a word."""
        self.process.join(1)
        code = self.process.exitcode
        return signal.Signals(-code).name if code and code < 0 else f"exit {code}"


class Ranks:
    """The other ranks of a device; none runs before `start`.

    Args:
        devices: torch device names, this process's own first.
        source: where weights come from.
        limit: seconds that a rank may work on one thing.
    """

    def __init__(self, devices: Sequence[str], source: Source, limit: float = HUNG_SECONDS):
        self.devices, self._source, self._limit = tuple(devices), source, limit
        self._device = torch.device(devices[0])
        self._peers: list[_Peer] = []
        self._change = threading.Condition()
        self._ending = threading.Lock()
        """Held while they are ended: fresh ones are not to end with them."""
        self._why: FaultError | None = None
        self._numbers = 0
        self._noticed = threading.Event()
        atexit.register(self.close)

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def alive(self) -> bool:
        """They were started, and none was lost since."""
        return bool(self._peers) and self._why is None

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Of the other ranks' processes."""
        return tuple(peer.process.pid for peer in self._peers)

    def start(self) -> None:
        """Start fresh ones, and join them.

        Raises:
            FaultError: one does not start.
        """
        self.close()
        self._why, self._numbers = None, _START
        self._noticed.clear()
        folder = Path(tempfile.mkdtemp(prefix="twinframe-ranks-"))
        context = multiprocessing.get_context("spawn")  # a fork would take a GPU's context along
        try:
            for rank, name in enumerate(self.devices[1:], 1):
                ours, theirs = context.Pipe()
                args = (theirs, self.devices, rank, folder / "store", self._source, self._limit)
                process = context.Process(target=serve, args=args, name=f"rank {rank}", daemon=True)
                process.start()
                theirs.close()
                self._peers.append(_Peer(name, process, ours, deque([_START]), time.monotonic()))
            threading.Thread(target=self._watch, args=(self._peers,), name="ranks", daemon=True).start()
            self.settle()  # they have imported what they need, which takes longest
            self.tell("join")
            with self.working():
                join(self.devices, 0, folder / "store", self._limit)
            self.settle()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def tell(self, name: str, *args: object) -> None:
        """Have every other rank do something, after all that it was told before. Lost ranks are told nothing: whoever
        waits for them learns of it."""
        with self._change:
            if not self.alive:
                return
            self._numbers += 1
            for peer in self._peers:
                if not peer.asked:
                    peer.since = time.monotonic()
                peer.asked.append(self._numbers)
        for peer in self._peers:
            with suppress(OSError):  # it has ended: the thread that watches says so
                peer.connection.send(_Asked(self._numbers, name, args))

    def settle(self) -> None:
        """Wait until all has been done.

        Raises:
            FaultError: a rank was lost; what was made since is not to be used.
        """
        with self._change:
            self._change.wait_for(lambda: self._why is not None or not any(peer.asked for peer in self._peers))
        self._check()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around this rank's own part of what the others were told. If it fails, so have they.

        Raises:
            FaultError: a rank was lost.
        """
        self._check()
        try:
            yield
        except Exception as error:
            with self._change:  # a collective may fail before it is known which rank was lost
                lost = self._change.wait_for(lambda: self._why is not None, timeout=3 * _POLL_SECONDS)
            if not lost:
                self._break(self._peers, fault(error), stuck=False)  # the others wait for this one
                raise
            self._check()

    def close(self) -> None:
        """End them."""
        with self._ending:
            peers, self._peers = self._peers, []
            for peer in peers:
                peer.process.kill()
                peer.process.join()
                peer.connection.close()
            if not dist.is_initialized():
                return
            if self._device.type == "cuda":
                dist.distributed_c10d._abort_process_group()  # the orderly end waits for the others
            else:
                dist.destroy_process_group()

    def _check(self) -> None:
        if self._why is not None:
            self._noticed.set()
            raise FaultError(str(self._why), kind=self._why.kind, trace=self._why.trace)

    def _watch(self, peers: list[_Peer]) -> None:
        """Until one is lost."""
        beside = f"which works on one picture with {self.devices[0]}"
        again = "it is started again with the next request: please retry."
        while self._peers is peers and self._why is None:
            with suppress(OSError):
                wait([peer.connection for peer in peers], timeout=_POLL_SECONDS)
            for peer in peers:
                try:
                    while peer.connection.poll():
                        self._answer(peers, peer, peer.connection.recv())
                except (EOFError, OSError):
                    if self._peers is peers:
                        ended = f"{peer.name}, {beside}, ended ({peer.end}); {again}"
                        self._break(peers, FaultError(ended, kind="RankLost"))
                    return
                if peer.asked and time.monotonic() - peer.since > self._limit:
                    sentence = f"{peer.name}, {beside}, did not answer for {self._limit:g} s; {again}"
                    self._break(peers, FaultError(sentence, kind="RankHangs"))

    def _answer(self, peers: list[_Peer], peer: _Peer, answer: _Answered) -> None:
        said = f"{peer.name}: {answer.error}"
        if isinstance(answer.error, FaultError):
            self._break(peers, FaultError(said, kind=answer.error.kind, trace=answer.error.trace))
        elif answer.error is not None:
            self._break(peers, FaultError(said, kind=type(answer.error).__name__))
        with self._change:
            peer.asked.remove(answer.number)
            peer.since = time.monotonic()
            self._change.notify_all()

    def _break(self, peers: list[_Peer], why: FaultError, stuck: bool = True) -> None:
        """End ranks, unless others have been started since, and what waits for them.

        Args:
            stuck: this process may wait for them in a driver.
        """
        with self._ending:
            with self._change:
                if self._why is not None or self._peers is not peers:
                    return
                self._why = why
                working = any(peer.asked for peer in peers)
                self._change.notify_all()
            log.error("ranks were lost", extra={"why": str(why)})
            for peer in peers:
                peer.process.kill()
            if self._device.type != "cuda":
                return
            with suppress(RuntimeError, ValueError):  # it may be on its way out already
                dist.distributed_c10d._abort_process_group()  # kernels of NCCL that wait for others end with this
        if stuck and working and not self._noticed.wait(NOTICE_SECONDS):
            abandon(str(why), RANKS_HUNG)


class Lead:
    """How rank 0 has a denoiser's steps computed by all ranks (`sequence.Shared`).

    Args:
        key: the denoiser's, which all ranks hold.
    """

    def __init__(self, ranks: Ranks, key: Key, denoiser: nn.Module):
        self._ranks, self._key = ranks, key
        self._part = Part(denoiser, len(ranks), 0)

    def part(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return self._part.part(call)

    def lead(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def led(*args: object, **kwargs: object) -> object:
            args, kwargs = tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
            with self._ranks.working():
                like = tree_map_only(Tensor, lambda given: _Like(tuple(given.shape), given.dtype), (args, kwargs))
                self.tell("call", self._part.backend, *like)
                return call(*args, **kwargs)

        return led

    def tell(self, name: str, *args: object) -> None:
        self._ranks.tell(name, self._key, *args)

    def settle(self) -> None:
        self._ranks.settle()


# ---------------------------------------------------------------------------------------------------------------------
# In the other ranks


class _Follow:
    """How another rank computes its part: as it is told, without telling anybody."""

    def __init__(self, part: Part):
        self.part = part.part

    def lead(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return call

    def tell(self, name: str, *args: object) -> None:
        pass

    def settle(self) -> None:
        pass


@dataclass
class _Held:
    """A denoiser in another rank."""

    denoiser: nn.Module
    part: Part
    blocks: Blocks
    switch: WeightOnlySteps
    waiting: host_memory.Stored | None = None


class _Rank:
    """What another rank is told to do."""

    def __init__(self, devices: Sequence[str], rank: int, store: Path, source: Source, limit: float):
        self._devices, self._rank, self._store, self._source, self._limit = devices, rank, store, source, limit
        self.device = torch.device(devices[rank])
        self._held: dict[Key, _Held] = {}
        self._pool = host_memory.Pool(pinned=self.device.type == "cuda")

    def join(self) -> None:
        join(self._devices, self._rank, self._store, self._limit)

    def load(
        self, key: Key, spec: ModelSpec, column: Column, support: Support, checkpoints: Sequence[quantized.Quantized]
    ) -> None:
        """Hold a denoiser, quantized as rank 0's is."""
        self.drop(key)
        for checkpoint in checkpoints:
            quantized.give(checkpoint)
        plan = recipes.plan_of(loading.blueprint(spec), spec, column)
        denoiser = stored.denoiser(column.weights(spec), plan, support, self.device, self._source)
        part = Part(denoiser, len(self._devices), self._rank)
        blocks = Blocks(denoiser, shared=_Follow(part))
        self._held[key] = _Held(denoiser, part, blocks, WeightOnlySteps(denoiser, (0, 0), 0, blocks.vary))

    def drop(self, key: Key) -> None:
        held = self._held.pop(key, None)
        if held is not None and held.waiting is not None:
            held.waiting.discard()
        del held
        timing.free(self.device)

    def store(self, key: Key) -> None:
        """Have the weights wait in host memory, or, where that is short, on the device."""
        held = self._held[key]
        held.blocks.forget()
        held.waiting = self._pool.store([held.denoiser])
        timing.free(self.device)

    def restore(self, key: Key) -> None:
        held = self._held[key]
        if held.waiting is not None:
            held.waiting.restore(self.device)
            held.waiting = None

    def use(self, key: Key, mode: str) -> None:
        self._held[key].blocks.use(mode)

    def vary(self, key: Key, weight_only: bool) -> None:
        self._held[key].switch.use(weight_only)

    def forget(self, key: Key) -> None:
        if key in self._held:
            self._held[key].blocks.forget()

    def call(self, key: Key, backend: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held = self._held[key]
        held.part.backend = backend
        args, kwargs = tree_map_only(
            _Like, lambda like: torch.empty(like.shape, dtype=like.dtype, device=self.device), (args, kwargs)
        )
        held.denoiser(*args, **kwargs)


def join(devices: Sequence[str], rank: int, store: Path, limit: float) -> None:
    """Make the default process group of all ranks, in each of them."""
    device, cuda = torch.device(devices[rank]), devices[rank].startswith("cuda")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(str(store), len(devices)),
        rank=rank,
        world_size=len(devices),
        timeout=timedelta(seconds=4 * limit),  # who watches acts first
        device_id=device if cuda else None,
    )


def serve(connection: Connection, devices: Sequence[str], rank: int, *args: Any) -> None:
    """A rank's life: do what it is told until rank 0 is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for rank 0, with which this ends
    multiprocessing.set_start_method(None, force=True)
    logs.quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    done: SimpleQueue[tuple[int, torch.cuda.Event | None]] = SimpleQueue()
    sending = threading.Lock()

    def send(answer: _Answered) -> None:
        with sending, suppress(OSError):
            connection.send(answer)

    def answer() -> None:
        while True:
            number, event = done.get()
            if event is not None:
                event.synchronize()
            send(_Answered(number))

    threading.Thread(target=answer, name="answers", daemon=True).start()
    mine = _Rank(devices, rank, *args)
    cuda = mine.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(mine.device)
    else:
        cpu_products.multiply_in_fp32_where_bf16_is_slow()  # as in rank 0, since it loaded text encoders
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    with torch.inference_mode():
        done.put((_START, None))
        while True:
            try:
                asked = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            try:
                getattr(mine, asked.name)(*asked.args)
                done.put((asked.number, _recorded() if cuda else None))
            except TwinframeError as error:
                send(_Answered(asked.number, error))
            except Exception as error:  # noqa: BLE001 - rank 0 says it
                send(_Answered(asked.number, fault(error, traceback.format_exc())))


def _end_with_parent() -> None:
    """Whatever this process does: it may hang in a driver when rank 0 is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event
