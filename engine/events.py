"""What the worker tells while it works: one stream of frozen events that page, API, command line and bench read.

A stream ends with exactly one of `Completed`, `Prepared`, `Failed`, `Cancelled`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.results import Comparison, Generation, Metrics, Ruler


@dataclass(frozen=True)
class Queued:
    """The job waits for others before it."""

    position: int
    """Jobs ahead of this one; 0 when it is next."""
    seconds: float | None = None
    """Until its turn, expected from how long the last jobs took; None until one has ended."""


@dataclass(frozen=True)
class Loading:
    """Something is brought to the device, which takes a moment."""

    what: str
    """What is being loaded or quantized, in words."""


@dataclass(frozen=True)
class Proved:
    """Native products were compared with the emulation: how the machine runs its formats may be another than before."""


@dataclass(frozen=True)
class Downloading:
    """A model comes from the hub, in bytes."""

    what: str
    """The model's name."""
    done: int
    total: int
    """Bytes."""


@dataclass(frozen=True)
class Preparing:
    """A preload turns to one column: what is loaded and warmed next is for it."""

    column: str
    index: int
    """1 to `total`."""
    total: int
    size: tuple[int, int] | None = None
    """Height and width, of an offered size besides the default one: by then the model is ready."""


@dataclass(frozen=True)
class CompilingEnds:
    """A preload turns to one piece of the text encoders and the VAE: by then the model is ready."""

    index: int
    """1 to `total`."""
    total: int
    """Of one size."""


@dataclass(frozen=True)
class Warming:
    """Untimed steps of the same shape, so that the timed run finds everything in place."""

    column: str
    compiling: bool = False
    """The blocks are compiled for this size, which happens once."""
    seconds: float | None = None
    """What the slowest compile took so far, with its steps; None if this is the first."""


@dataclass(frozen=True)
class Step:
    """A denoising step of a column has ended."""

    column: str
    index: int
    """Steps done, 1 to `total`."""
    total: int
    seconds_left: float | None
    """For this column's denoising; None until it can be told."""
    preview: bytes | None = None
    """A JPEG of what is expected in the end, where previews were asked for and there is a new one."""


@dataclass(frozen=True)
class Finished:
    """A column's output is there, with its files and figures but without scores."""

    column: str
    generation: Generation


@dataclass(frozen=True)
class Compared:
    """The scores of a column against the reference."""

    column: str
    metrics: Metrics


@dataclass(frozen=True)
class Measuring:
    """The ruler is being measured: how far apart other noise is."""

    index: int
    total: int
    """Runs of the ruler done, of how many."""


@dataclass(frozen=True)
class RulerReady:
    """The ruler has been measured, or was kept from before."""

    ruler: Ruler


@dataclass(frozen=True)
class Completed:
    """The last event of a comparison that succeeded."""

    comparison: Comparison


@dataclass(frozen=True)
class Prepared:
    """Ends a preload: nothing was compared, but the model is loaded, warm and has its ruler."""

    model: str


@dataclass(frozen=True)
class Failed:
    """The last event of a comparison that failed."""

    reason: str
    """One sentence for the user."""


@dataclass(frozen=True)
class Cancelled:
    """The last event of a comparison that was stopped."""


Event = (
    Queued
    | Loading
    | Proved
    | Downloading
    | Preparing
    | CompilingEnds
    | Warming
    | Step
    | Finished
    | Compared
    | Measuring
    | RulerReady
    | Completed
    | Prepared
    | Failed
    | Cancelled
)
TERMINAL = (Completed, Prepared, Failed, Cancelled)

Tell = Callable[[Event], None]
"""Is given the events of a run as they happen."""
Stop = Callable[[], bool]
"""Says whether a run is to end; it is asked after each denoising step, and ends with `CancelledRun`."""
