"""The app as seen from outside: its health now, and counts and latencies since the start, as Prometheus reads them.

The text format is Prometheus' exposition format 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/).
Only native latencies are kept: an emulation's time is not a speed. Knows no prompts and no visitors.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine import catalog, events
from engine.results import Comparison

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds of the latency histograms, seconds."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, kw_only=True)
class Health:
    """How the app is, for a load balancer."""

    status: str
    """ready: idle. busy: something runs. warming: the preload has not ended and nothing else runs. restarting: the
    device's process was lost and another is starting. degraded: the last comparisons all failed by no fault of their
    visitors, or the engine's thread has died. stopping: it takes no more comparisons."""
    queue: int
    """Comparisons that wait."""
    accepting: bool
    """Send more."""


@dataclass(frozen=True, kw_only=True)
class Preload:
    """How far the preload of one model is, for whoever opens the page meanwhile."""

    model: str
    status: str = "waiting"
    """waiting: for its turn, or because comparisons go first. running. failed: the next comparison of the model loads
    it, or says why not."""
    part: events.Preparing | None = None
    """The column it is at."""
    doing: events.Event | None = None
    """What it told last besides."""
    ready: bool = False
    """The default size is warm; further sizes are being warmed, then text encoders and VAE compiled."""

    def after(self, event: events.Event) -> Preload:
        """The same, once it has told `event`."""
        ready = self.ready or isinstance(event, events.CompilingEnds)
        running = replace(self, status="running", ready=ready)
        if not isinstance(event, events.Preparing):
            return replace(running, doing=event)
        return replace(running, part=event, doing=None, ready=self.ready or event.size is not None)


class Histogram:
    """Counts by upper bound, as Prometheus wants them: each bucket holds the smaller ones too."""

    def __init__(self) -> None:
        self.buckets = [0] * len(BUCKETS)
        self.count, self.sum = 0, 0.0

    def observe(self, seconds: float) -> None:
        """Count one more duration, in seconds."""
        for i, bound in enumerate(BUCKETS):
            self.buckets[i] += seconds <= bound
        self.count += 1
        self.sum += seconds

    def lines(self, name: str, labels: Mapping[str, str]) -> Iterator[str]:
        """As Prometheus writes a histogram."""
        for bound, count in zip((*BUCKETS, "+Inf"), (*self.buckets, self.count), strict=True):
            yield sample(f"{name}_bucket", {**labels, "le": str(bound)}, count)
        yield sample(f"{name}_sum", labels, self.sum)
        yield sample(f"{name}_count", labels, self.count)


class Telemetry:
    """Everything counted. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._job = Histogram()
        self._stages: defaultdict[tuple[str, str, str], Histogram] = defaultdict(Histogram)
        """By model, column and stage."""

    def outcome(self, outcome: str, seconds: float | None = None) -> None:
        """A comparison ended, or was refused; `seconds` it ran, if it did."""
        with self._lock:
            self._outcomes[outcome] += 1
            if seconds is not None:
                self._job.observe(seconds)

    def fault(self, kind: str) -> None:
        """Something of ours failed: the exception's name."""
        with self._lock:
            self._faults[kind] += 1

    def completed(self, comparison: Comparison) -> None:
        """Keep the native latencies of a comparison, by stage."""
        spec = catalog.model(comparison.request.model)
        with self._lock:
            for made in comparison.results:
                if made.latency_comparable:
                    column = comparison.column(made).written(spec.recipes[0])
                    for stage in ("text", "denoise", "decode", "total"):
                        key = (spec.id, column, stage)
                        self._stages[key].observe(getattr(made.latency, stage))

    def exposition(self, gauges: Mapping[str, float], cards: Sequence[Mapping[str, float]] = ()) -> str:
        """Everything in Prometheus' text format; `gauges` are what is so right now, name -> value, and `cards` the same
        of each device, told apart by a label where there are several."""
        lines: list[str] = []

        def metric(name: str, kind: str, about: str, samples: Iterable[str]) -> None:
            lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples))

        with self._lock:
            name = "twinframe_jobs_total"
            outcomes = [sample(name, {"outcome": o}, n) for o, n in sorted(self._outcomes.items())]
            metric(name, "counter", "Comparisons by how they ended, or refused.", outcomes)
            name = "twinframe_faults_total"
            faults = [sample(name, {"type": kind}, n) for kind, n in sorted(self._faults.items())]
            metric(name, "counter", "Failures that were not the visitor's, by exception.", faults)
            name = "twinframe_job_seconds"
            metric(name, "histogram", "Time a comparison ran, from its turn on.", self._job.lines(name, {}))
            name = "twinframe_latency_seconds"
            stages = [
                line
                for (model, column, stage), histogram in sorted(self._stages.items())
                for line in histogram.lines(name, {"model": model, "precision": column, "stage": stage})
            ]
            metric(name, "histogram", "Native latency of one pipeline call, by stage.", stages)
        labels = [{"card": str(number)} if len(cards) > 1 else {} for number in range(len(cards))]
        held = [({}, gauges), *zip(labels, cards, strict=True)]
        for name in dict.fromkeys(name for _, values in held for name in values):
            about = name.removeprefix("twinframe_").replace("_", " ").capitalize()
            samples = [sample(name, of, values[name]) for of, values in held if name in values]
            metric(name, "gauge", f"{about}.", samples)
        return "\n".join(lines) + "\n"


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """One line; label values are ids and class names of our own, which need no escaping."""
    inside = ",".join(f'{key}="{text}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def resident_bytes(pid: int | str = "self") -> int | None:
    """Memory of a process (Linux); None elsewhere, and where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
