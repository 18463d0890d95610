"""The one queue before the device, or before several of a kind: jobs in, events out.

Inductor's settings, gradient mode and CUDA graphs belong to a thread, and two runs at once would spoil each other's
timings, so everything that takes a device is asked of it from one thread here, one job at a time. Of several devices
each has a thread and a job of its own; the next job goes to one that has its model, else to the first that is free.
Callers only read events. The queue's door is here too, so that nobody gets past it. Does without torch: devices are in
this process (engine/runtime/device.py) or in children (engine/serving/process.py).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from engine import catalog, events, files, logs
from engine.errors import (
    UNWRITABLE,
    CancelledRun,
    FaultError,
    OutputError,
    RefusedError,
    TwinframeError,
    UnsupportedError,
    fault,
)
from engine.events import Event
from engine.machine import Finding, Machine, Support
from engine.request import CompareRequest
from engine.results import SAME_DEVICE, Comparison
from engine.serving.admission import Door, Visitor
from engine.serving.contracts import Device
from engine.serving.telemetry import Health, Preload, Telemetry, resident_bytes

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""How often a waiting job says again how long it will wait; whoever went away is noticed then."""
RECENT = 8
"""Jobs whose mean duration tells the expected wait."""
LOOK_SECONDS = 0.5
"""How often a device that was being started again is asked whether it is there, where there are several."""
SHARED = 1000
"""Requests whose results may be shared; the oldest give way."""
FAULTS_IN_A_ROW = 3
"""Failures of our own after which the app is degraded and the device is started again: one may have been that
request's."""


class Job:
    """One comparison on its way through the worker.

    Args:
        work: what to do; it raises what went wrong.
        background: gives way when somebody asks for something, and goes on when nobody does.
        request: what was asked for, for the log.
        visitor: who asked.
        deadline: seconds it may run.
        place: its place in the queue now; None once it has begun.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        work: Callable[[Job], None],
        background: bool = False,
        *,
        request: CompareRequest | None = None,
        visitor: Visitor | None = None,
        deadline: float | None = None,
        place: Callable[[Job], events.Queued | None] = lambda _: None,
    ):
        self.number = next(self._numbers)
        self.background = background
        self.request = request
        self.visitor = visitor
        self.fault = ""
        """What failed, in a word, if it was no mistake of the visitor's."""
        self.asked_at = time.monotonic()
        self.began_at: float | None = None
        """On the monotonic clock, seconds."""
        self.ending: Event | None = None
        self.overran = False
        """It was ended by its deadline."""
        self.beside = False
        """Another device of this host was at work meanwhile."""
        self.cancelled_at: float | None = None
        self._deadline = deadline
        self._place = place
        self._work = work
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._turn = threading.Lock()
        """Held where a job begins, ends, or is cancelled before it began."""
        self._begun = False

    def events(self) -> Iterator[Event]:
        """Events as they happen, up to and including the one that ends the job. To be read once."""
        while True:
            event: Event | None
            try:
                event = self._events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                event = self._place(self)
            if event is None:
                continue
            yield event
            if isinstance(event, events.TERMINAL):
                return

    def cancel(self) -> None:
        """Stop at once while it waits, within one denoising step while it runs; harmless once it has ended."""
        with self._turn:
            self.cancelled_at = self.cancelled_at or time.monotonic()
            self._cancelled.set()
            if not self._begun and not self._ended.is_set():
                self.tell(events.Cancelled())

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def late(self) -> bool:
        """It has run longer than it may."""
        if self._deadline is None or self.began_at is None:
            return False
        return time.monotonic() - self.began_at > self._deadline

    @property
    def stopping(self) -> bool:
        """It is to end at the next step."""
        return self.cancelled or self.late

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has ended; False if it has not within `timeout` seconds."""
        return self._ended.wait(timeout)

    def tell(self, event: Event) -> None:
        """For the worker alone; what comes after the end is dropped."""
        if self._ended.is_set():
            return
        ends = isinstance(event, events.TERMINAL)
        if ends:
            self.ending = event  # first: whoever reads of the end may ask for the next comparison at once
        self._events.put(event)
        if ends:
            self._ended.set()

    def run(self) -> bool:
        """For the worker alone: do the work and tell how it ended; False if it gave way and must begin again."""
        with self._turn:
            if self._ended.is_set():
                return True
            self._begun = True
            self.began_at = time.monotonic()
        try:
            self._work(self)
        except CancelledRun:
            with self._turn:
                if self.background and not self.cancelled:
                    self._begun = False
                    return False
            if self.cancelled:
                self.tell(events.Cancelled())
            else:
                self.overran = True
                allowed = f"the {self._deadline:g} s that a comparison may take here"
                self.tell(events.Failed(f"It took longer than {allowed}: choose fewer steps, precisions or frames."))
        except FaultError as error:
            self.fault = error.kind
            log.error("job failed", extra=self.described() | {"traceback": self._without_prompt(error.trace)})
            self.tell(events.Failed(str(error)))
        except TwinframeError as error:
            self.tell(events.Failed(str(error)))
        except Exception as error:
            self.fault = type(error).__name__
            log.exception("job failed", extra=self.described())
            self.tell(events.Failed(str(fault(error))))
        return True

    @property
    def outcome(self) -> str:
        """How it ended, in a word."""
        if self.overran:
            return "late"
        return "fault" if self.fault else type(self.ending).__name__.lower()

    def described(self) -> dict[str, object]:
        """What the log says of it; the prompt only where that was asked for."""
        said: dict[str, object] = {"job": self.number}
        if self.request is not None:
            said |= self.request.to_json()
            if not logs.prompts_wanted():
                del said["prompt"]
        return said

    def _without_prompt(self, trace: str) -> str:
        """An exception's message may repeat what it could not read."""
        if self.request is None or logs.prompts_wanted():
            return trace
        return trace.replace(self.request.prompt, "(the prompt)")


class _Card:
    """One of the worker's devices, and what it is doing."""

    def __init__(self, device: Device):
        self.device = device
        self.running: Job | None = None
        self.idle: deque[Job] = deque()
        """What it does when nobody wants anything."""
        self.model = ""
        """Of the last comparison here, which is loaded."""
        self.faults_in_a_row = 0
        self.thread = threading.Thread(name="engine", daemon=True)

    @property
    def comparing(self) -> Job | None:
        """What runs here that somebody has asked for."""
        return None if self.running is None or self.running.background else self.running


class Worker:
    """Has its devices to itself and runs one job at a time on each, first come first served; background jobs only on
    those that are idle.

    Args:
        models: ids of the models that may be asked for.
        device: what runs them; the worker closes it. What is told of devices is told of this one.
        door: who may ask for how much; by default anybody for anything.
        share: `earlier` gives what was made for the same request before.
        others: further devices of the same kind, which the worker closes too.

    Raises:
        RequestError: an unknown model.
    """

    def __init__(
        self,
        models: Sequence[str],
        device: Device,
        door: Door | None = None,
        share: bool = False,
        others: Sequence[Device] = (),
    ):
        self.models = tuple(catalog.model(name).id for name in models)
        self.device = device
        self._jobs: deque[Job] = deque()
        self._cards = tuple(map(_Card, (device, *others)))
        self._change = threading.Condition()
        self._closing = False
        self._door = door or Door()
        self._telemetry = Telemetry()
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._preloads: dict[Job, Preload] = {}
        """Those that have not ended, and those that failed, until their model was used after all."""
        self._preloaded: list[str] = []
        """Models to load again should the device be lost."""
        self._made: OrderedDict[CompareRequest, Path] | None = OrderedDict() if share else None
        """Where the last finished comparison of each request lies, as long as its files are kept."""
        self._restarts = 0
        for card in self._cards:
            card.device.watch(partial(self._lost, card))
            card.thread = threading.Thread(target=self._loop, args=(card,), name="engine", daemon=True)
        for card in self._cards:
            card.thread.start()

    @property
    def machine(self) -> Machine:
        return self.device.machine

    @property
    def support(self) -> Mapping[str, Support]:
        """How this machine runs each precision."""
        return self.device.support

    def examine(self) -> tuple[Finding, ...]:
        """What the device is, what it runs and what it has the memory for, a finding each."""
        return self.device.examine()

    def about_weights(self, model_id: str) -> str:
        """What to know of a model's weights before they are used, in one sentence; empty if all is well."""
        return self.device.about_weights(model_id)

    def recipes(self, model_id: str) -> Mapping[str, str]:
        """The recipes of a model and what each of them quantizes, in words; the default first."""
        return self.device.recipes(model_id)

    def plan(self, model_id: str, precision: str, recipe: str) -> dict[str, Any]:
        """`engine.quantization.inspection.inspect`, for the page, which does without torch; waits for no job."""
        return self.device.plan(model_id, precision, recipe)

    def code(self, request: CompareRequest, column: str, execution: str) -> str:
        """`engine.outputs.program.code`, for the page, which does without torch."""
        return self.device.code(request, column, execution)

    def submit(self, request: CompareRequest, out: Path, visitor: Visitor | None = None) -> Job:
        """Queue a comparison whose files go into `out`, which is made if missing.

        Args:
            visitor: who asks; None for the owner of the machine, who has no budget of their own.

        Raises:
            UnsupportedError: the model is not offered here, or the machine cannot run one of the precisions.
            OutputError: `out` cannot be written.
            RefusedError: the door lets nothing more in, or the app is shutting down.
        """
        if request.model not in self.models:
            raise UnsupportedError(f"{request.model} is not offered here: choose one of {', '.join(self.models)}.")
        for name in (column.format for column in request.columns):
            if self.support[name].execution == "unavailable":
                raise UnsupportedError(self.support[name].reason)
        with _visitors(visitor):
            files.writable(out)
        return self._add(
            Job(
                lambda job: self._compare(job, request, out),
                request=request,
                visitor=visitor,
                deadline=self._door.limits.deadline,
                place=self._place,
            )
        )

    def earlier(self, request: CompareRequest) -> tuple[Comparison, Path] | None:
        """What this app made for the very same request before, and its folder, if results are shared and it is still
        there: recorded, nothing in it was measured now. None where previews are wanted, which it cannot show."""
        if (made := self._made) is None or request.previews:
            return None
        with self._change:
            out = made.get(request)
        if out is None:
            return None
        try:
            os.utime(out)  # which keeps it from expiring under whoever looks at it
            found = Comparison.load(out)
        except (OSError, ValueError):
            with self._change:
                made.pop(request, None)
            return None
        self._telemetry.outcome("shared")
        return found, out

    def preload(self, model_id: str) -> Job:
        """Load a model in its default precisions, warm its default shape and measure its ruler, then warm the other
        sizes that it offers, on every device while it is idle; again on one that was lost. Gives the first's job."""
        model_id = catalog.model(model_id).id
        if model_id not in self._preloaded:
            self._preloaded.append(model_id)
        with self._change:
            self._drop_preloads(model_id, "waiting", "running", "failed")
        first, *_ = [self._preload(card, model_id) for card in self._cards]
        return first

    def _preload(self, card: _Card, model_id: str) -> Job:
        job = Job(lambda job: self._prepare(card, job, model_id), background=True)
        with self._change:
            self._preloads[job] = Preload(model=model_id)
        return self._add(job, card)

    def preloads(self) -> tuple[Preload, ...]:
        """How far each preload is that has not ended well on any device, in their order."""
        with self._change:
            found = list(self._preloads.values())
        every = [[one for one in found if one.model == model] for model in dict.fromkeys(one.model for one in found)]
        furthest = ("failed", "waiting", "running")
        return tuple(
            max(of_one, key=lambda one: (one.ready, furthest.index(one.status)))
            for of_one in every
            if len(of_one) >= len(self._cards)
        )

    def close(self, grace: float = 0) -> None:
        """Take no more jobs, cancel what waits, give what runs `grace` seconds to end, and end the threads."""
        with self._change:
            self._closing = True
            running = [card.running for card in self._cards if card.running is not None]
            for job in (*self._jobs, *(job for card in self._cards for job in card.idle)):
                job.cancel()
            self._change.notify_all()
        end = time.monotonic() + grace
        for job in running:
            if not job.background:
                job.wait(max(0.0, end - time.monotonic()))
        for job in running:
            job.cancel()
        for card in self._cards:
            card.thread.join(timeout=60)
        for card in self._cards:
            card.device.close()

    def health(self) -> Health:
        """How the app is right now."""
        with self._change:
            waiting = len(self._waiting())
            working = any(card.comparing for card in self._cards)
            if self._closing:
                status = "stopping"
            elif not any(card.device.ready for card in self._cards):
                status = "restarting"
            elif all(card.faults_in_a_row >= FAULTS_IN_A_ROW or not card.thread.is_alive() for card in self._cards):
                status = "degraded"
            elif working or waiting:
                status = "busy"
            else:
                warming = any(preload.status != "failed" and not preload.ready for preload in self.preloads())
                status = "warming" if warming else "ready"
            room = self._door.limits.waiting is None or waiting < self._door.limits.waiting
            return Health(status=status, queue=waiting, accepting=status in ("ready", "busy") and room)

    def metrics(self) -> str:
        """Everything counted since the start, in Prometheus' text format."""
        with self._change:
            gauges: dict[str, float] = {
                "twinframe_queue_length": len(self._waiting()),
                "twinframe_running": sum(card.comparing is not None for card in self._cards),
                "twinframe_engine_restarts": self._restarts,
            }
        if (resident := resident_bytes()) is not None:
            gauges["twinframe_resident_memory_bytes"] = resident
        return self._telemetry.exposition(gauges, [card.device.gauges() for card in self._cards])

    def _compare(self, job: Job, request: CompareRequest, out: Path) -> None:
        with self._change:
            (card,) = [card for card in self._cards if card.running is job]
        try:
            with _visitors(job.visitor):
                comparison = card.device.compare(request, out, job.tell, lambda: job.stopping)
                if job.beside:
                    comparison = _labelled(comparison, shared=self.machine.kind == "cpu")
                    comparison.save(out)
        except FaultError:
            files.remove_partial(out)
            raise
        if self._made is not None:
            with self._change:
                self._made[request] = out
                self._made.move_to_end(request)
                while len(self._made) > SHARED:
                    self._made.popitem(last=False)
        job.tell(events.Completed(comparison))

    def _prepare(self, card: _Card, job: Job, model_id: str) -> None:
        def told(event: events.Event) -> None:
            job.tell(event)
            with self._change:
                if job in self._preloads:  # else another has taken its place
                    self._preloads[job] = self._preloads[job].after(event)

        card.device.prepare(model_id, told, lambda: job.cancelled or bool(self._jobs))
        job.tell(events.Prepared(model_id))

    def _drop_preloads(self, model_id: str, *statuses: str) -> None:
        """With the lock held."""
        for job, preload in list(self._preloads.items()):
            if preload.model == model_id and preload.status in statuses:
                del self._preloads[job]

    def _lost(self, card: _Card, why: str) -> None:
        """A device was lost, whatever it was doing, and another is starting: what was loaded is loaded again."""
        with self._change:
            self._restarts += 1
            again = [] if self._closing or card.faults_in_a_row > FAULTS_IN_A_ROW else list(self._preloaded)
            gone = [*card.idle, *([card.running] if card.running and card.running.background else [])]
            for job in gone:
                job.cancel()
                self._preloads.pop(job, None)
        for model_id in again:
            self._preload(card, model_id)

    def _add(self, job: Job, card: _Card | None = None) -> Job:
        """Queue a comparison, or something that a device does when it is idle."""
        with self._change:
            if self._closing:
                raise RefusedError("Twinframe is shutting down: try again when it is back.")
            if card is not None:
                card.idle.append(job)
            else:
                self._admit(job)
                self._jobs.append(job)
                self._tell_place(job)
            self._change.notify_all()
        return job

    def _admit(self, job: Job) -> None:
        waiting = self._waiting()
        ahead = [*waiting, *(card.running for card in self._cards if card.running)]
        sessions = {job.visitor.session for job in ahead if job.visitor and not job.cancelled and job.ending is None}
        has_one = job.visitor is not None and job.visitor.session in sessions
        try:
            self._door.admit(job.visitor, len(waiting), has_one)
        except RefusedError:
            self._telemetry.outcome("refused")
            raise

    def _waiting(self) -> list[Job]:
        """The jobs in the queue that nobody has cancelled; with the lock held."""
        return [job for job in self._jobs if not job.cancelled]

    def _place(self, job: Job) -> events.Queued | None:
        """How many comparisons have to end before a job begins, and about when that is: each takes what the last ones
        took in the mean, and goes to the device that is free first."""
        with self._change:
            waiting = self._waiting()
            if job not in waiting:
                return None
            running = [card.comparing for card in self._cards if card.comparing is not None]
            index = waiting.index(job)
            ahead = max(0, index + len(running) - (len(self._cards) - 1))
            if not ahead or not self._durations:
                return events.Queued(ahead)
            mean, now = fmean(self._durations), time.monotonic()
            free = [mean - min(now - one.began_at if one.began_at else 0.0, mean) for one in running]
            free += [0.0] * (len(self._cards) - len(running))
            heapq.heapify(free)
            for _ in range(index):
                heapq.heapreplace(free, free[0] + mean)
            return events.Queued(ahead, free[0])

    def _loop(self, card: _Card) -> None:
        while (job := self._next(card)) is not None:
            self._run(card, job)

    def _run(self, card: _Card, job: Job) -> None:
        finished = job.run()
        with self._change:
            card.running = None
            if finished:
                self._note(card, job)
            else:
                card.idle.appendleft(job)
                if job in self._preloads:
                    self._preloads[job] = replace(self._preloads[job], status="waiting")
            for waiting in self._waiting():
                self._tell_place(waiting)
            self._change.notify_all()

    def _tell_place(self, job: Job) -> None:
        if (place := self._place(job)) is not None:
            job.tell(place)

    def _note(self, card: _Card, job: Job) -> None:
        """Remember how a job ended: for the expected wait, the health, the metrics and the log."""
        if (preload := self._preloads.pop(job, None)) and isinstance(job.ending, events.Failed):
            self._preloads[job] = replace(preload, status="failed")
        if job.fault:
            card.faults_in_a_row += 1
            self._telemetry.fault(job.fault)
            if card.faults_in_a_row == FAULTS_IN_A_ROW:
                card.device.renew()
        elif isinstance(job.ending, events.Completed | events.Prepared):
            card.faults_in_a_row = 0
        if job.background:
            return
        took: dict[str, object] = {}
        seconds = None
        if job.began_at is not None:
            seconds = time.monotonic() - job.began_at
            took = {"seconds": round(seconds, 3), "waited": round(job.began_at - job.asked_at, 3)}
            if isinstance(job.ending, events.Cancelled) and job.cancelled_at is not None:
                took["freed"] = round(time.monotonic() - job.cancelled_at, 3)
        if isinstance(job.ending, events.Completed):
            self._drop_preloads(job.ending.comparison.request.model, "failed")
            self._durations.append(seconds or 0.0)
            self._telemetry.completed(job.ending.comparison)
        self._telemetry.outcome(job.outcome, seconds)
        log.info("comparison %s", job.outcome, extra=job.described() | {"outcome": job.outcome} | took)

    def _next(self, card: _Card) -> Job | None:
        with self._change:
            look = LOOK_SECONDS if len(self._cards) > 1 else None
            while not self._closing and not self._is_next(card) and (self._jobs or not card.idle):
                self._change.wait(look)
            if self._closing and not self._jobs:
                return None
            if self._is_next(card) or self._closing:
                card.running = self._jobs.popleft()
                if (request := card.running.request) is not None:
                    card.model = request.model
                self._change.notify_all()  # what comes next may be another device's
            else:
                card.running = card.idle.popleft()
            others = [one.running for one in self._cards if one is not card and one.running is not None]
            for job in (card.running, *others) if others else ():
                job.beside = True
            return card.running

    def _is_next(self, card: _Card) -> bool:
        """Whether the first in the queue is this device's to run: of the free ones it has the model, or is the first.
        One that is being started again leaves it to others, if there are any."""
        if not self._jobs:
            return False
        ready = [one for one in self._cards if one.device.ready] or list(self._cards)
        free = [one for one in ready if one.running is None]
        request = self._jobs[0].request
        return bool(free) and card is min(free, key=lambda one: request is None or one.model != request.model)


def _labelled(comparison: Comparison, shared: bool) -> Comparison:
    """What was made while other devices of this host were at work, with that said; what shared its very device with
    them, as CPUs do, is not timed."""
    said = {"Beside": "other devices of this host, each in a process of its own, which may slow them"}
    if shared:
        said["Timing"] = SAME_DEVICE
    results = tuple(
        replace(made, ran={**made.ran, **said}, latency_comparable=made.latency_comparable and not shared)
        for made in comparison.results
    )
    return replace(comparison, results=results)


@contextmanager
def _visitors(visitor: Visitor | None) -> Iterator[None]:
    """That nothing can be written is no mistake of a visitor's."""
    try:
        yield
    except OutputError as error:
        if visitor is None:
            raise
        raise FaultError(UNWRITABLE, kind="OutputError", trace=str(error)) from error
