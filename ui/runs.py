"""Runs of the page that outlive a lost connection: a thread follows the engine's events, and pages follow the run.

A page that is gone leaves its run to itself for a while. One that comes back by the run's name, which is in its
address, follows it again; if nobody does, the run ends. Knows nothing of Gradio or HTML.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine import events
from engine.request import CompareRequest
from engine.serving.contracts import Job
from ui import view as views
from ui.view import View

log = logging.getLogger(__name__)

GRACE_SECONDS = 60.0
"""How long a run goes on without a page: a connection that is lost comes back within this, or not at all."""
LEFT_SECONDS = 5.0
"""The same where the page itself said that it goes and was not asked for anew: its tab was closed."""
KEPT = 64
"""Runs that are found by their names, at most; the oldest go first."""
Step = tuple[events.Event | None, View]
"""What happened, None for the end of the stream, and what the page shows after it."""


class Run:
    """A job in flight, and what the page shows of it.

    Args:
        name: of its folder on the shelf, which cannot be guessed.
        asked: what it makes.
        view: what is shown of it before its first event.
        before: what was shown before it, to go back to.
    """

    def __init__(self, name: str, job: Job, asked: CompareRequest, view: View, before: View):
        self.name, self.job, self.asked, self.view, self.before = name, job, asked, view, before
        self.ended = False
        self._lock = threading.Lock()
        self._pages: list[queue.SimpleQueue[Step]] = []
        self._ending: Step | None = None
        self._grace = GRACE_SECONDS
        self._awaited = False
        """A page was asked for that is going to follow this: it is on its way, however slow the machine it is for."""
        self._timer: threading.Timer | None = None
        threading.Thread(target=self._pump, name=f"run {name}", daemon=True).start()

    def _pump(self) -> None:
        last: Step = (None, self.view)
        try:
            for event in self.job.events():
                if isinstance(event, events.TERMINAL):
                    last = (event, self.view)
                    break
                with self._lock:
                    self.view = views.advance(self.view, event)
                    self._tell((event, self.view))
            else:
                last = (None, self.view)
        except Exception:
            log.exception("a run's events broke off")
            last = (None, self.view)
        with self._lock:
            self.ended, self._ending = True, last
            self._tell(last)
            self._stop_timer()

    def _tell(self, step: Step) -> None:
        for page in self._pages:
            page.put(step)

    @contextmanager
    def followed(self) -> Iterator[queue.SimpleQueue[Step]]:
        """What happens from now on, for one page; a run that has ended says so at once."""
        page: queue.SimpleQueue[Step] = queue.SimpleQueue()
        with self._lock:
            self._stop_timer()
            self._grace, self._awaited = GRACE_SECONDS, False
            self._pages.append(page)
            if self._ending:
                page.put(self._ending)
        try:
            yield page
        finally:
            with self._lock:
                self._pages.remove(page)
                self._wait_for_a_page()

    def awaited(self) -> None:
        """A page that names the run was asked for. Of a reload this is heard before `gone`."""
        with self._lock:
            self._awaited = True
            self._wait_for_a_page()

    def gone(self) -> None:
        """The page says that it goes."""
        with self._lock:
            self._grace = LEFT_SECONDS
            self._wait_for_a_page()

    def _wait_for_a_page(self) -> None:
        """If none follows: for as long as it may take one that is on its way, or else may come back."""
        if self._pages or self.ended:
            return
        self._stop_timer()
        self._timer = threading.Timer(GRACE_SECONDS if self._awaited else self._grace, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        with self._lock:
            alone = not self._pages
        if alone:
            self.job.cancel()


class Runs:
    """The runs that can be found by their names."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._named: dict[str, Run] = {}

    def add(self, run: Run) -> Run:
        with self._lock:
            self._named[run.name] = run
            while len(self._named) > KEPT:
                self._named.pop(next(iter(self._named)))
        return run

    def named(self, name: str) -> Run | None:
        return self._named.get(name)

    def awaited(self, name: str) -> None:
        """A page that is to show a run was asked for; nothing where there is no such run."""
        if run := self.named(name):
            run.awaited()

    def gone(self, name: str) -> None:
        """The page that shows a run says that it goes; nothing where there is no such run."""
        if run := self.named(name):
            run.gone()
