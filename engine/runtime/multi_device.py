"""Several devices of one kind at work at once, each with a studio and a thread of its own.

A comparison makes bf16 on the first device and the other columns on the others, in rounds: what takes part in
one is loaded and warmed one after the other, and only then are its timed calls made, all at once. They still share the
host and Python's interpreter, which may slow them down: every result says what ran beside it. All is compared on the
first device.

Inductor's settings, gradient mode, the current CUDA device and recorded graphs belong to a thread, so a studio keeps to
one: the first to its caller's, each other to its own. Much else belongs to the process: the default dtype while weights
are loaded, what Dynamo compiles, which attention kernels may be used. So one alone loads, moves, compiles or records
while all others wait. Knows no queue and no page.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from engine import quantized
from engine.catalog import ModelSpec
from engine.columns import EXACT, Column
from engine.compiler.compilation import EAGER, WarmUp
from engine.errors import CancelledRun
from engine.events import Stop, Tell
from engine.formats import PRECISIONS, REFERENCE
from engine.quantization import proof
from engine.request import CompareRequest
from engine.results import SAME_DEVICE, Generation
from engine.runtime.pipeline import Made
from engine.runtime.residents import Rendition
from engine.runtime.studio import Studio, Take
from engine.safety import NO_FILTER, Filter
from engine.weights.residency import Move
from engine.weights.source import BUNDLED_OR_HUB, Source

Result = TypeVar("Result")


def studio_on(name: str, source: Source = BUNDLED_OR_HUB, filtered: Filter = NO_FILTER) -> Studio:
    """The studio of a device; of several names with commas between that of the first with the others beside it; of
    several with + between that of all of them, which work on one picture.

    Raises:
        UnsupportedError: there is no such device, or they are not of one kind.
    """
    if "+" in name:
        from engine.runtime.joint import JointStudio  # late, as few ask for it

        return JointStudio(name.split("+"), source, filtered)
    first, *others = name.split(",")
    return Studios(first, others, source, filtered) if others else Studio(first, source, filtered)


def studios_of(studio: Studio) -> tuple[Studio, ...]:
    """The studio of every device, the first one's first."""
    return studio.studios if isinstance(studio, Studios) else (studio,)


@contextmanager
def driving(device: torch.device) -> Iterator[None]:
    """What a thread needs to use a device: no gradients, and kernels that are launched there."""
    with torch.inference_mode():
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


class _Room:
    """Where several threads may be at work, or one alone, for which the others wait where they may. Whoever wants to be
    alone is let in before those who come later."""

    def __init__(self) -> None:
        self._door = threading.RLock()
        self._change = threading.Condition()
        self._inside: set[int] = set()
        """Threads, by their numbers."""

    @contextmanager
    def with_others(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """From inside or outside."""
        inside = threading.get_ident() in self._inside
        if inside:
            self._leave()
        try:
            with self._door:
                with self._change:
                    self._change.wait_for(lambda: not self._inside)
                yield
        finally:
            if inside:
                self._enter()

    def _enter(self) -> None:
        with self._door, self._change:
            self._inside.add(threading.get_ident())

    def _leave(self) -> None:
        with self._change:
            self._inside.remove(threading.get_ident())
            self._change.notify_all()


_ROOM = _Room()


class _Orderly(Studio):
    """A studio beside others: alone with whatever belongs to the whole process."""

    def _load(self, spec: ModelSpec, column: Column, tell: Tell) -> Rendition:
        with _ROOM.alone():
            return super()._load(spec, column, tell)

    def _move(self, move: Move) -> None:
        with _ROOM.alone():
            super()._move(move)

    def _warm_up(self, rendition: Rendition, spec: ModelSpec, few: CompareRequest, stop: Stop) -> WarmUp:
        with _ROOM.alone():
            return super()._warm_up(rendition, spec, few, stop)

    def _retake(
        self, rendition: Rendition, spec: ModelSpec, request: CompareRequest, stop: Stop, second_path: bool
    ) -> Made:
        # The unfused attention of eager blocks is switched on and off for the whole process.
        eager = self.mode(EXACT, spec, request) == EAGER
        with _ROOM.alone() if eager else nullcontext():
            return super()._retake(rendition, spec, request, stop, second_path)


class _Partner(_Orderly):
    """A studio that is driven by a thread of its own."""

    def __init__(self, device: str, source: Source):
        super().__init__(device, source)
        self._thread = ThreadPoolExecutor(1, f"engine-{device}")

    def begin(self, work: Callable[..., Result], *args: object) -> Future[Result]:
        def driven() -> Result:
            with driving(self.device):
                return work(*args)

        return self._thread.submit(driven)


class Studios(_Orderly):
    """The studio of the first device, with those of the others beside it.

    Raises:
        UnsupportedError: there is no such device, or they are not of one kind.
    """

    def __init__(self, device: str, others: Sequence[str], source: Source, filtered: Filter):
        super().__init__(device, source, filtered)
        self._others = tuple(_Partner(other, source) for other in others)
        for other in self._others:
            why = "results of different ones cannot be compared"
            self.machine.require_like(str(self.device), other.machine, str(other.device), why)

    @property
    def studios(self) -> tuple[Studio, ...]:
        return (self, *self._others)

    def ready(self, spec: ModelSpec, column: Column, request: CompareRequest, tell: Tell, stop: Stop) -> Take:
        studio = self._place(spec, column)
        if not isinstance(studio, _Partner):
            return super().ready(spec, column, request, tell, stop)
        take = studio.begin(studio.ready, spec, column, request, tell, stop).result()
        self._learn(proof.known(self.machine))
        return take

    def takes(
        self, spec: ModelSpec, request: CompareRequest, tell: Tell, stop: Stop
    ) -> Iterator[tuple[Generation, Made]]:
        for columns in self._rounds(spec, request.columns):
            calls = [(self._place(spec, column), self.ready(spec, column, request, tell, stop)) for column in columns]
            places = {column.written(request.recipe): self._place(spec, column).device for column in columns}
            made = _at_once([(studio, partial(take, tell)) for studio, take in calls], stop)
            del calls  # the next round may need their room
            for generation, found in made:
                if spec.modality == "image":  # clips have left the device
                    found = replace(found, pixels=found.pixels.to(self.device))
                yield self._labelled(generation, places), found

    def warm_ends(self, spec: ModelSpec, request: CompareRequest, tell: Tell, stop: Stop) -> bool:
        """Nothing: columns are made by several devices, whose text encoders and VAE stay alike, all eager."""
        return False

    def _place(self, spec: ModelSpec, column: Column) -> Studio:
        """Where a column is made: always at the same place, so that it is loaded once; a format's recipes at different
        ones."""
        if column.format == REFERENCE:
            return self
        stored = (checkpoint.name for checkpoint in quantized.of_model(spec.id))
        place = PRECISIONS.index(column.format) - 1 + (*spec.recipes, *stored).index(column.rules)
        return self._others[place % len(self._others)]

    def _rounds(self, spec: ModelSpec, columns: Sequence[Column]) -> list[list[Column]]:
        """What is made at once, in the order given: a device has one place in a round."""
        rounds: list[list[Column]] = [[]]
        for column in columns:
            if self._place(spec, column) in [self._place(spec, other) for other in rounds[-1]]:
                rounds.append([])
            rounds[-1].append(column)
        return rounds

    def _labelled(self, generation: Generation, together: Mapping[str, torch.device]) -> Generation:
        """With the device's name and with what ran beside it; what shares its very device with that is not timed.

        Args:
            together: column -> device, of all that ran at once.
        """
        device = together[generation.column]
        beside = tuple(name for name in together if name != generation.column)
        where = [f"{name} on {together[name]}" for name in beside]
        said = f"with {' and '.join(where)}, in one process of one host, which may slow them" if beside else "no, alone"
        ran = {**generation.ran, "Device": f"{self.machine.name}, {device}", "At once": said}
        shared = any(together[name] == device for name in beside)
        if shared:
            ran["Timing"] = SAME_DEVICE
        comparable = generation.latency_comparable and not shared
        return replace(generation, at_once=beside, latency_comparable=comparable, ran=ran)


def _at_once(works: Sequence[tuple[Studio, Callable[[Stop], Result]]], stop: Stop) -> list[Result]:
    """What each work gives, in its studio's thread; the first studio's, which is this one's, at most once.

    If one fails, the others end at their next step; the failure is raised once all have ended.
    """
    failed = threading.Event()

    def run(work: Callable[[Stop], Result]) -> Result:
        try:
            with _ROOM.with_others():
                return work(lambda: failed.is_set() or stop())
        except BaseException:
            failed.set()
            raise

    elsewhere = [studio.begin(run, work) for studio, work in works if isinstance(studio, _Partner)]
    here = [_done(run, work) for studio, work in works if not isinstance(studio, _Partner)]
    ended = here + elsewhere
    wait(ended)
    errors = [error for future in ended if (error := future.exception()) is not None]
    try:
        if errors:
            raise next((error for error in errors if not isinstance(error, CancelledRun)), errors[0])
        return [future.result() for future in ended]
    finally:
        del here, elsewhere, ended, errors  # an error that refers to itself keeps the tensors of its frames


def _done(work: Callable[..., Result], *args: object) -> Future[Result]:
    """Of work that is done in this thread, at once."""
    future: Future[Result] = Future()
    try:
        future.set_result(work(*args))
    except Exception as error:  # noqa: BLE001 - raised by whoever asks for the result
        future.set_exception(error)
    return future
