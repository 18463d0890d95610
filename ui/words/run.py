"""A comparison while it is made: the queue, loading, steps, and how it can end."""

from __future__ import annotations

from collections.abc import Sequence

from engine import events
from ui.words.common import listed

WAITING_IN_LINE = "Waiting for the machine"
LOADING, DOWNLOADING = "Loading", "Downloading"
MEASURING = "Measuring the scale for LPIPS"
SHARED = "Made here before, for the same request: Generate runs it anew."
STOPPED = "Stopped."
STOPPED_BEFORE = "Stopped before this one was finished"
STOPPED_KEPT = "Stopped. What was finished stays below."
FAILED_KEPT = "Not finished. What there is stays below."
API_BROKEN = "The comparison ended without a result: try again."


def making_at_once(names: Sequence[str], made: str) -> str:
    return f"Making the {listed(names)} {made}s at once"


def making(name: str, made: str, index: int, count: int) -> str:
    return f"Making the {name} {made}, {index} of {count}"


def step(done: int, total: int, left: float | None) -> str:
    if done == total:
        return "decoding"
    said = f"step {done} of {total}"
    if left is None:
        return said
    return f"{said} · {left:.0f} s left" if left >= 1 else f"{said} · under 1 s left"


def waiting(position: int, seconds: float | None) -> str:
    """Where a comparison stands in the queue; a wait of unknown length is not guessed."""
    if not position:
        return "next in line"
    ahead = f"{position} ahead"
    if seconds is None:
        return ahead
    if seconds < 1:
        return f"{ahead} · under 1 s"
    return f"{ahead} · about {seconds:.0f} s" if seconds < 90 else f"{ahead} · about {seconds / 60:.0f} min"


def warming_up(event: events.Warming) -> str:
    """What a run waits for before it is timed."""
    if not event.compiling:
        return "warming up"
    return "compiling for this size, once" + ("" if event.seconds is None else f" · about {event.seconds:.0f} s")


def downloading(what: str, done: int, total: int) -> str:
    return f"{what}, {gigabytes_of(done, total)}"


def gigabytes_of(done: int, total: int) -> str:
    return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"


def measuring(index: int, total: int) -> str:
    return f"run {index} of {total}, once per model and size"
