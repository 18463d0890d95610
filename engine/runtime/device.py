"""One device, or several of a kind as one (engine/runtime/multi_device.py), and all that is asked of it: comparisons,
preloads, and what can be told of models without running them.

The same interface whether the device is in this process, as here, or in a child (engine/serving/process.py). Every
failure leaves as one sentence with what the log needs, and with whether the device can still be used. Knows no queue
and no page."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine import catalog, events
from engine.columns import EXACT
from engine.compiler import compilation
from engine.errors import CancelledRun, FaultError, LoadError, TwinframeError, UnsupportedError, fault
from engine.events import Stop, Tell
from engine.machine import Finding, Machine, Support
from engine.outputs import program
from engine.quantization import capability, inspection, recipes
from engine.request import CompareRequest
from engine.results import Comparison
from engine.runtime import examination, timing
from engine.runtime.multi_device import driving, studio_on, studios_of
from engine.safety import NO_FILTER, Filter
from engine.weights import loading
from engine.weights.source import BUNDLED_OR_HUB, Source

Result = TypeVar("Result")

_BROKEN_LIBRARIES = ("CUBLAS_STATUS_", "CUDNN_STATUS_", "cuDNN error")
"""What PyTorch says when cuBLAS or cuDNN fails, after which their handles are of no use."""


class Device:
    """A device of this process.

    Args:
        name: a torch device name, or several with commas between; None takes CUDA where there is one, else the CPU.
        source: where weights come from.
        filtered: what prompts and outputs have to pass; where it applies there are no previews, which nothing checks.

    Raises:
        UnsupportedError: there is no such device, or they are not of one kind.
    """

    ready = True
    """Requests can be carried out at once."""

    def __init__(self, name: str | None = None, source: Source = BUNDLED_OR_HUB, filtered: Filter = NO_FILTER):
        self._filter = filtered
        self.studio = studio_on(name or capability.default_device(), source, filtered)

    @property
    def machine(self) -> Machine:
        return self.studio.machine

    @property
    def support(self) -> Mapping[str, Support]:
        """How this machine runs each precision."""
        return self.studio.support

    def compare(self, request: CompareRequest, out: Path, tell: Tell, stop: Stop) -> Comparison:
        """`Studio.compare`.

        Raises:
            TwinframeError: in one sentence; a `FaultError` if it was no mistake of the user's.
            CancelledRun: `stop` said so.
        """
        if self._filter.applies(catalog.model(request.model)):
            request = replace(request, previews=False)
        return self._carry_out(self.studio.compare, request, out, _ending_downloads(tell, stop), stop)

    def prepare(self, model_id: str, tell: Tell, stop: Stop) -> None:
        """Load a model in its default columns, warm its default shape and measure its ruler; then warm the other
        sizes that it offers, and compile its text encoders and VAE.

        Raises:
            TwinframeError, CancelledRun: as `compare`.
        """
        self._carry_out(self._prepare, model_id, _ending_downloads(tell, stop), stop)

    def place(self, model_id: str) -> None:
        """Load a model's reference and what all columns share, and run nothing.

        Raises:
            TwinframeError: as `compare`.
        """
        self._carry_out(self.studio.rendition, catalog.model(model_id), EXACT, lambda event: None)

    def recall(self) -> None:
        """Learn what another process has found out of this machine's formats."""
        for studio in studios_of(self.studio):
            studio.recall()

    def _prepare(self, model_id: str, tell: Tell, stop: Stop) -> None:
        spec, request = catalog.model(model_id), CompareRequest.create("warm-up", model=model_id)
        for index, column in enumerate(request.columns, 1):
            tell(events.Preparing(column.written(request.recipe), index, len(request.columns)))
            self.studio.ready(spec, column, request, tell, stop)
        self.studio.ruler(spec, request, tell, stop)
        self._warm_sizes(spec, request, tell, stop)
        self._warm_ends(spec, request, tell, stop)

    def _warm_ends(self, spec: catalog.ModelSpec, request: CompareRequest, tell: Tell, stop: Stop) -> None:
        """Compile text encoders and VAE for every size that is offered, the default one first."""
        default = (request.height, request.width)
        for height, width in dict.fromkeys((default, *spec.limits.sizes)):
            asked = replace(request, height=height, width=width)
            with suppress(UnsupportedError):
                if self.studio.warm_ends(spec, asked, tell, stop) and (height, width) == default:
                    self.studio.ruler(spec, request, tell, stop)

    def _warm_sizes(self, spec: catalog.ModelSpec, request: CompareRequest, tell: Tell, stop: Stop) -> None:
        """Compile for every other size that is offered, so that nobody waits for it; sizes without room are left."""
        sizes = [size for size in spec.limits.sizes if size != (request.height, request.width)]
        wanted = list(product(request.columns, sizes))
        for index, (column, (height, width)) in enumerate(wanted, 1):
            asked = replace(request, height=height, width=width)
            if self.studio.mode(column, spec, asked) == compilation.EAGER:
                continue
            tell(events.Preparing(column.written(request.recipe), index, len(wanted), (height, width)))
            with suppress(UnsupportedError):
                self.studio.ready(spec, column, asked, tell, stop)

    def prove(self, tell: Tell, stop: Stop) -> None:
        """Compare the native products of all that there is memory for with the emulation, where that was not done
        before.

        Raises:
            TwinframeError, CancelledRun: as `compare`.
        """
        self._carry_out(self._prove, tell, stop)

    def _prove(self, tell: Tell, stop: Stop) -> None:
        for plan in examination.provable(self.studio):
            if stop():
                raise CancelledRun
            self.studio.prove(plan, tell)

    def examine(self) -> tuple[Finding, ...]:
        """`engine.runtime.examination.examine`."""
        return examination.examine(self.studio)

    def about_weights(self, model_id: str) -> str:
        """What to know before a model is used, in a sentence or two: that its weights are not here, damaged or random,
        and whether a safety filter is on; empty if there is nothing to know."""
        spec = catalog.model(model_id)
        return " ".join(filter(None, (self._weights(spec), self._filter.about(spec))))

    def _weights(self, spec: catalog.ModelSpec) -> str:
        if self.studio.source.random:
            return "The weights are random: speed and memory are those of the real model, what it makes is noise."
        try:
            loading.check(spec, self.studio.source)
            stored = loading.stored_as(spec, self.studio.source)
        except LoadError as error:
            return str(error)
        return f"The bf16 reference is made of weights that are stored in {stored}." if "fp8" in stored else ""

    def recipes(self, model_id: str) -> Mapping[str, str]:
        """The recipes of a model and what each of them quantizes, in words; the default first."""
        spec = catalog.model(model_id)
        return {name: recipes.recipe(spec.family, name).summary for name in spec.recipes}

    def plan(self, model_id: str, precision: str, recipe: str) -> dict[str, Any]:
        """`engine.quantization.inspection.inspect`."""
        return inspection.inspect(model_id, precision, recipe)

    def code(self, request: CompareRequest, column: str, execution: str) -> str:
        """`engine.outputs.program.code`."""
        return program.code(request, column, execution)

    def gauges(self) -> dict[str, float]:
        """Memory on all GPUs right now, for the metrics: name -> bytes."""
        devices = [studio.device for studio in studios_of(self.studio)]
        if self.studio.device.type != "cuda":
            return {}
        return {
            "twinframe_device_memory_allocated_bytes": sum(map(torch.cuda.memory_allocated, devices)),
            "twinframe_device_memory_reserved_bytes": sum(map(torch.cuda.memory_reserved, devices)),
        }

    def watch(self, lost: Callable[[str], None]) -> None:
        """In this process a device that is lost stays lost: there is nothing to tell."""

    def renew(self) -> None:
        """Nor can it be replaced."""

    def close(self) -> None:
        """What is in this process ends with it."""
        self.studio.close()

    def _carry_out(self, work: Callable[..., Result], *args: object) -> Result:
        failed = None
        try:
            with driving(self.studio.device):
                return work(*args)
        except (TwinframeError, CancelledRun):
            raise
        except Exception as error:  # noqa: BLE001 - raised below, once the frames that hold its tensors are gone
            failed = self._fault(error)
        timing.free(self.studio.device)
        raise failed

    def _fault(self, error: Exception) -> FaultError:
        trace = "".join(traceback.format_exception(error)).rstrip()
        return fault(error, trace, lost=self._lost(error))

    def _lost(self, error: Exception) -> bool:
        """Whether the CUDA context went with the error: all that comes after would fail as well."""
        if isinstance(error, torch.AcceleratorError) or any(said in str(error) for said in _BROKEN_LIBRARIES):
            return True
        if self.studio.device.type != "cuda":
            return False
        try:
            for studio in studios_of(self.studio):
                torch.ones(8, device=studio.device).sum().item()
        except RuntimeError:
            return True
        return False


def _ending_downloads(tell: Tell, stop: Stop) -> Tell:
    """Tells on; raises out of a download, which takes longest and asks nobody, when `stop` says so."""

    def told(event: events.Event) -> None:
        if isinstance(event, events.Downloading) and stop():
            raise CancelledRun
        tell(event)

    return told
