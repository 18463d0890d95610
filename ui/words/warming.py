"""How far the preload is."""

from __future__ import annotations

from collections.abc import Sequence

from engine import events
from engine.catalog import MODELS
from engine.columns import POST, Column
from engine.serving.telemetry import Preload
from ui.words.common import STARTING, of_column
from ui.words.run import gigabytes_of

HINT = "Generate works already, and then goes first."
CLOSE = "Hide this"
WAITS = "goes on after the comparisons that were asked for"
RESTARTS = ("The engine is being started again", "its device was lost; what was loaded is loaded again")
DEGRADED = ("The engine has trouble", "the last comparisons failed by no fault of their visitors")
SIZES, ENDS = "its other sizes are being warmed up", "its text encoders and VAE are being compiled"
FAILED = "Generate tries again, and says what is wrong"


def said(status: str, preloads: Sequence[Preload]) -> tuple[str, str]:
    """What is not ready yet, and how far it is; both empty if all is well.

    Args:
        status: of the app's health.
    """
    if status == "restarting":
        return RESTARTS
    if status == "degraded":
        return DEGRADED
    going_on = [preload for preload in preloads if preload.status != "failed"]
    running = [preload for preload in going_on if preload.status == "running"]
    preload = next(iter((*running, *going_on, *preloads)), None)
    if preload is None:
        return "", ""
    name = MODELS[preload.model].name
    if preload.status == "failed":
        return f"{name} could not be {'warmed up further' if preload.ready else 'loaded'}", FAILED
    if preload.ready:
        further = ENDS if isinstance(preload.doing, events.CompilingEnds) else SIZES
        return f"{name} is ready, {further}", _detail(preload)
    return f"Warming up {name}", _detail(preload)


def _detail(preload: Preload) -> str:
    if preload.part is None:
        return STARTING.lower()
    if preload.status == "waiting":
        return WAITS
    match preload.doing:
        case events.Downloading(_, done, total):
            return f"downloading, {gigabytes_of(done, total)}"
        case events.Measuring(index, total):
            return f"measuring its scale for LPIPS, run {index + 1} of {total}"
        case events.CompilingEnds(index, total):
            return f"piece {index} of {total}"
    part = preload.part
    doing = _step(preload.doing) if isinstance(preload.doing, events.Warming) else "loading"
    size = f" at {part.size[1]} × {part.size[0]}" if part.size else ""
    return f"{doing} {of_column(Column.of(part.column, POST))}{size}, {part.index} of {part.total}"


def _step(event: events.Warming) -> str:
    return "compiling" if event.compiling else "first steps in"
