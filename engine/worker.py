"""The one thread that owns the device: jobs in, events out.

Inductor's settings, gradient mode and CUDA graphs belong to a thread, and two runs at once would spoil each other's
timings, so everything that touches the device happens here, one job at a time. Callers only read events.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from engine import catalog, events, loading, recipes
from engine.compare import CancelledRun, Studio
from engine.errors import LoadError, OutputError, TwinframeError, UnsupportedError
from engine.precision import Machine, Support
from engine.request import CompareRequest

log = logging.getLogger(__name__)


class Job:
    """One comparison on its way through the worker."""

    def __init__(self, work: Callable[[Job], None], background: bool = False):
        self.background = background
        """A background job gives way when somebody asks for something, and goes on when nobody does."""
        self._work = work
        self._events: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._turn = threading.Lock()
        """Held where a job begins, ends, or is cancelled before it began."""
        self._begun = False

    def events(self) -> Iterator[events.Event]:
        """Events as they happen, up to and including the one that ends the job. To be read once."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, events.TERMINAL):
                return

    def cancel(self) -> None:
        """Stop at once while it waits, within one denoising step while it runs; harmless once it has ended."""
        with self._turn:
            self._cancelled.set()
            if not self._begun and not self._ended.is_set():
                self.tell(events.Cancelled())

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has ended; False if it has not within `timeout` seconds."""
        return self._ended.wait(timeout)

    def tell(self, event: events.Event) -> None:
        """For the worker alone; what comes after the end is dropped."""
        if self._ended.is_set():
            return
        self._events.put(event)
        if isinstance(event, events.TERMINAL):
            self._ended.set()

    def run(self) -> bool:
        """For the worker alone: do the work and tell how it ended; False if it gave way and must begin again."""
        with self._turn:
            if self._ended.is_set():
                return True
            self._begun = True
        try:
            self._work(self)
        except CancelledRun:
            with self._turn:
                if self.background and not self.cancelled:
                    self._begun = False
                    return False
            self.tell(events.Cancelled())
        except TwinframeError as error:
            self.tell(events.Failed(str(error)))
        except torch.cuda.OutOfMemoryError:
            log.exception("out of device memory")
            self.tell(events.Failed("The device ran out of memory: choose a smaller batch or size and retry."))
        except Exception as error:
            log.exception("job failed")
            self.tell(events.Failed(f"The engine failed ({type(error).__name__}): its log says more; please retry."))
        return True


class Worker:
    """Owns one device and runs one job at a time, first come first served; background jobs only when idle.

    Args:
        models: ids of the models that may be asked for.
        device: a torch device name; None takes CUDA where there is one, else the CPU.
        source: where weights come from.

    Raises:
        RequestError: an unknown model.
        UnsupportedError: there is no such device.
    """

    def __init__(
        self,
        models: Sequence[str] = ("mini-flux",),
        device: str | None = None,
        source: loading.Source = loading.BUNDLED_OR_HUB,
    ):
        self.models = tuple(catalog.model(name).id for name in models)
        self._studio = Studio(device or ("cuda" if torch.cuda.is_available() else "cpu"), source)
        self._jobs: deque[Job] = deque()
        self._idle: deque[Job] = deque()
        self._running: Job | None = None
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def machine(self) -> Machine:
        return self._studio.machine

    @property
    def support(self) -> Mapping[str, Support]:
        """How this machine runs each precision."""
        return self._studio.support

    def about_weights(self, model_id: str) -> str:
        """What to know of a model's weights before they are used, in one sentence: that they are not here, damaged or
        random; empty if they are as they should be."""
        if self._studio.source.random:
            return "The weights are random: speed and memory are those of the real model, what it makes is noise."
        try:
            loading.check(catalog.model(model_id), self._studio.source)
        except LoadError as error:
            return str(error)
        return ""

    def recipes(self, model_id: str) -> Mapping[str, str]:
        """The recipes of a model and what each of them quantizes, in words; the default first."""
        spec = catalog.model(model_id)
        return {name: recipes.recipe(spec.family, name).summary for name in spec.recipes}

    def submit(self, request: CompareRequest, out: Path) -> Job:
        """Queue a comparison whose files go into `out`, which is made if missing.

        Raises:
            UnsupportedError: the model is not offered here, or the machine cannot run one of the precisions.
            OutputError: `out` cannot be written.
        """
        if request.model not in self.models:
            raise UnsupportedError(f"{request.model} is not offered here: choose one of {', '.join(self.models)}.")
        for name in request.precisions:
            if self.support[name].execution == "unavailable":
                raise UnsupportedError(self.support[name].reason)
        writable(out)
        return self._add(Job(lambda job: self._compare(job, request, out)))

    def preload(self, model_id: str) -> Job:
        """Load a model in its default precisions, warm its default shape and measure its ruler, while idle."""
        request = CompareRequest.create("warm-up", model=model_id)
        return self._add(Job(lambda job: self._prepare(job, request), background=True))

    def close(self) -> None:
        """Cancel what runs and waits, and end the thread."""
        with self._change:
            self._closing = True
            for job in (*self._jobs, *self._idle, *((self._running,) if self._running else ())):
                job.cancel()
            self._change.notify_all()
        self._thread.join(timeout=60)

    def _compare(self, job: Job, request: CompareRequest, out: Path) -> None:
        tell = _ending_downloads(job, lambda: job.cancelled)
        comparison = self._studio.compare(request, out, tell, lambda: job.cancelled)
        job.tell(events.Completed(comparison))

    def _prepare(self, job: Job, request: CompareRequest) -> None:
        spec, studio = catalog.model(request.model), self._studio

        def gives_way() -> bool:
            return job.cancelled or bool(self._jobs)

        tell = _ending_downloads(job, gives_way)
        for name in request.precisions:
            rendition = studio.rendition(spec, name, request.recipe, tell)
            studio.warm(rendition, spec, request, tell, gives_way)
        studio.ruler(spec, request, tell, gives_way)
        job.tell(events.Prepared(spec.id))

    def _add(self, job: Job) -> Job:
        with self._change:
            if self._closing:
                raise UnsupportedError("Twinframe is shutting down: try again when it is back.")
            line = self._idle if job.background else self._jobs
            line.append(job)
            if not job.background:
                job.tell(events.Queued(len(line) - 1 + (self._running is not None and not self._running.background)))
            self._change.notify_all()
        return job

    def _loop(self) -> None:
        with torch.inference_mode():
            while (job := self._next()) is not None:
                self._run(job)

    def _run(self, job: Job) -> None:
        finished = job.run()
        with self._change:
            self._running = None
            if not finished:
                self._idle.appendleft(job)
            for position, waiting in enumerate(self._jobs):
                waiting.tell(events.Queued(position))

    def _next(self) -> Job | None:
        with self._change:
            self._change.wait_for(lambda: self._jobs or self._idle or self._closing)
            if self._jobs:
                self._running = self._jobs.popleft()
            elif self._idle and not self._closing:
                self._running = self._idle.popleft()
            else:
                return None
            return self._running


def _ending_downloads(job: Job, stop: Callable[[], bool]) -> Callable[[events.Event], None]:
    """Tells the job; raises out of a download, which takes longest and asks nobody, when `stop` says so."""

    def tell(event: events.Event) -> None:
        if isinstance(event, events.Downloading) and stop():
            raise CancelledRun
        job.tell(event)

    return tell


def writable(folder: Path) -> None:
    """Make `folder` if it is missing, and check that files can be written into it.

    Raises:
        OutputError: it cannot be made or written.
    """
    probe = folder / ".twinframe-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"Cannot write into {folder}: {error.strerror or error}. Choose another folder.") from error
