"""What the engine's parts ask of each other: a device, the worker before it, a job, and what a run is given.

The page and the rehearsal ask a worker, the worker a device. They take whatever keeps to these, in this process or
another one, real or a stand-in. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from engine.events import Event, Stop, Tell
from engine.machine import Finding, Machine, Support
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving.admission import Visitor
from engine.serving.telemetry import Health, Preload


class Informed(Protocol):
    """What can be told of a machine and its models without running them; asking waits for no run."""

    @property
    def machine(self) -> Machine: ...

    @property
    def support(self) -> Mapping[str, Support]:
        """How this machine runs each precision."""

    def examine(self) -> tuple[Finding, ...]:
        """What the device is, what it runs and what it has the memory for, a finding each."""

    def about_weights(self, model_id: str, /) -> str:
        """What to know of a model's weights before they are used, in a sentence or two; empty if all is well."""

    def recipes(self, model_id: str, /) -> Mapping[str, str]:
        """The recipes of a model and what each of them quantizes, in words; the default first."""

    def plan(self, model_id: str, precision: str, recipe: str, /) -> dict[str, Any]:
        """As `engine.quantization.inspection.inspect` gives it."""

    def code(self, request: CompareRequest, column: str, execution: str, /) -> str:
        """As `engine.outputs.program.code` gives it."""


class Device(Informed, Protocol):
    """What makes pictures: `engine.runtime.device.Device`, or a child process with one,
    `engine.serving.process.Process`."""

    @property
    def ready(self) -> bool:
        """Requests can be carried out at once."""

    def compare(self, request: CompareRequest, out: Path, tell: Tell, stop: Stop, /) -> Comparison:
        """Carry out a comparison, whose files go into `out`.

        Raises:
            TwinframeError: in one sentence; a `FaultError` if it was no mistake of the user's.
            CancelledRun: `stop` said so.
        """

    def prepare(self, model_id: str, tell: Tell, stop: Stop, /) -> None:
        """Load and warm a model for its default request. Raises what `compare` raises."""

    def prove(self, tell: Tell, stop: Stop, /) -> None:
        """Compare native products with the emulation, where that was not done before. Raises what `compare` raises."""

    def gauges(self) -> Mapping[str, float]:
        """Numbers for the metrics, by name."""

    def watch(self, lost: Callable[[str], None], /) -> None:
        """Have `lost` called, with the reason in a word, each time the device was lost and another one is starting."""

    def renew(self) -> None:
        """Replace the device, where that can be done."""

    def close(self) -> None:
        """End it for good."""


class Job(Protocol):
    """A comparison that was asked for."""

    def events(self) -> Iterator[Event]:
        """Events as they happen, up to and including the one that ends the job. To be read once."""

    def cancel(self) -> None:
        """End it within one denoising step; harmless once it has ended."""


class Worker(Informed, Protocol):
    """The queue before a device, as the page and the rehearsal see it: `engine.serving.worker.Worker`."""

    def submit(self, request: CompareRequest, out: Path, visitor: Visitor | None = None, /) -> Job:
        """Queue a comparison whose files go into `out`; `visitor` is None for the owner of the machine.

        Raises:
            TwinframeError: it is not taken, in one sentence.
        """

    def earlier(self, request: CompareRequest, /) -> tuple[Comparison, Path] | None:
        """What was made for the same request before, and its folder, where results are shared."""

    def preloads(self) -> tuple[Preload, ...]:
        """How far each preload is that has not ended well."""

    def health(self) -> Health: ...

    def metrics(self) -> str:
        """Everything counted since the start, in Prometheus' text format."""
