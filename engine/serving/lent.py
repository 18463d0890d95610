"""The device of a ZeroGPU Space: a card that is lent for one call at a time.

`spaces.GPU` takes a function of this process, forks when it is called, lends the fork a card and runs it there. What is
to be on the card by then has to be placed by this process, on "cuda", which the `spaces` package imitates. So unlike
engine/serving/process.py the device is made here, with torch: the references of the models are placed at the start, and
whatever runs, runs in a fork. Quantized columns are made there, so that native products are compared on the card
itself; they last as long as the fork, which serves later calls while it is idle. Nothing is compiled
(`engine.quantization.capability.LENT`).

Where the `spaces` package is there without its environment, its decorator gives back the function it was given, and all
runs in this process. Knows the interface `engine.serving.contracts.Device`, not what it does. `Told`, `Returned` and
`Raised` come out of the call.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import queue
import re
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from engine import events
from engine.errors import CancelledRun, FaultError, LoadError, RefusedError, TwinframeError, fault
from engine.events import Stop, Tell
from engine.machine import Finding, Machine, Support
from engine.request import CompareRequest
from engine.results import Comparison
from engine.safety import NO_FILTER, Filter
from engine.serving import command_line, contracts
from engine.serving.process import Message, Raised, Returned, Told
from engine.weights.source import BUNDLED_OR_HUB, Source

log = logging.getLogger(__name__)

SECONDS = 120
"""For which a card is asked: what a comparison may take. A visitor with less left of a day's share is refused."""
_NUMBER = 1
"""Of a message: a call has its own generator, so that one will do."""
Call = Callable[[str, tuple[object, ...]], Generator[Message, None, None]]


class Placing(contracts.Device, Protocol):
    """What is asked of the device besides."""

    def place(self, model_id: str, /) -> None:
        """Load a model's reference and what all columns share, and run nothing."""

    def recall(self) -> None:
        """Learn what another process has found out of the machine."""


class Lent:
    """A device whose runs are carried out in a fork that was lent a card.

    Args:
        models: to be placed at the start; what cannot be is said in the log, and by its first comparison.
        name, source, filtered: as of `engine.runtime.device.Device`.
        make: what makes the device, of these.

    Raises:
        LoadError: the package that lends cards is not installed.
        UnsupportedError: there is no such device.
    """

    def __init__(
        self,
        models: Sequence[str] = (),
        name: str | None = None,
        source: Source = BUNDLED_OR_HUB,
        filtered: Filter = NO_FILTER,
        make: Callable[[str | None, Source, Filter], Placing] | None = None,
    ):
        self._lend: Call = _decorator()(self._carried)  # before torch is imported, which it patches
        self._device = (make or _device)(name, source, filtered)
        self._placed: set[str] = set()
        for model in models:
            try:
                self._place(model)
            except TwinframeError as error:
                log.error("a model was not placed", extra={"model": model, "why": str(error)})

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Lent:
        """As app.py's arguments and the environment want it: with all that is offered placed, unless nothing is to be
        preloaded.

        Raises:
            LoadError, RequestError: they want what cannot be.
        """
        source = Source.create(args.weights, args.random_weights, args.offline, args.models, args.quantized)
        filtered = Filter.from_environment(os.environ, command_line.is_public(args))
        return cls(args.models if args.preload else (), args.device, source, filtered)

    ready = True
    """Requests can be carried out, as soon as a card is lent."""

    @property
    def machine(self) -> Machine:
        return self._device.machine

    @property
    def support(self) -> Mapping[str, Support]:
        return self._device.support

    def compare(self, request: CompareRequest, out: Path, tell: Tell, stop: Stop) -> Comparison:
        """As the contract says; a `RefusedError` where no card is lent."""
        self._place(request.model)
        return cast(Comparison, self._run("compare", (request, out), tell, stop))

    def prepare(self, model_id: str, tell: Tell, stop: Stop) -> None:
        """Place it. Nothing is warmed: what is warm would end with the call, and nobody asked for the card."""
        if model_id not in self._placed:
            tell(events.Loading(model_id))
        self._place(model_id)

    def prove(self, tell: Tell, stop: Stop) -> None:
        self._run("prove", (), tell, stop)

    def examine(self) -> tuple[Finding, ...]:
        return self._device.examine()

    def about_weights(self, model_id: str) -> str:
        return self._device.about_weights(model_id)

    def recipes(self, model_id: str) -> Mapping[str, str]:
        return self._device.recipes(model_id)

    def plan(self, model_id: str, precision: str, recipe: str) -> dict[str, Any]:
        return self._device.plan(model_id, precision, recipe)

    def code(self, request: CompareRequest, column: str, execution: str) -> str:
        return self._device.code(request, column, execution)

    def gauges(self) -> Mapping[str, float]:
        """None: the card's memory is another process's."""
        return {}

    def watch(self, lost: Callable[[str], None]) -> None:
        """A fork that is lost is replaced by the next call: there is nothing to tell."""

    def renew(self) -> None:
        """Each call may have a fork of its own."""

    def close(self) -> None:
        """Forks end with this process."""

    def _place(self, model_id: str) -> None:
        if model_id not in self._placed:
            self._device.place(model_id)
            self._placed.add(model_id)

    def _run(self, name: str, args: tuple[object, ...], tell: Tell, stop: Stop) -> Any:
        """Have a method carried out on a lent card; gives what it gives."""
        call = self._lend(name, args)
        try:
            for message in call:
                match message:
                    case Told(_, event):
                        if isinstance(event, events.Proved):
                            self._device.recall()
                        tell(event)
                    case Raised(_, error):
                        raise error
                    case Returned(_, value):
                        return value
                if stop():
                    raise CancelledRun
        except (TwinframeError, CancelledRun):
            raise
        except Exception as error:  # the package's
            raise _refused(error) from error
        finally:
            call.close()
        raise FaultError("The card was taken away before the comparison was finished: please retry.", kind="Lent")

    def _carried(self, name: str, args: tuple[object, ...]) -> Generator[Message, None, None]:
        """In the fork: what a method tells, and what comes of it. Closing it ends the work at its next step."""
        unwanted = threading.Event()
        said: queue.SimpleQueue[Message] = queue.SimpleQueue()

        def work() -> None:
            try:
                found = getattr(self._device, name)(
                    *args, lambda event: said.put(Told(_NUMBER, event)), unwanted.is_set
                )
                said.put(Returned(_NUMBER, found))
            except (TwinframeError, CancelledRun) as error:
                said.put(Raised(_NUMBER, error))
            except Exception as error:  # noqa: BLE001 - it has to get across, with what the log needs
                said.put(Raised(_NUMBER, fault(error, traceback.format_exc())))

        worker = threading.Thread(target=work, name="lent", daemon=True)
        worker.start()
        try:
            while True:
                message = said.get()
                yield message
                if not isinstance(message, Told):
                    return
        finally:
            unwanted.set()
            worker.join()


def _decorator() -> Callable[[Call], Call]:
    """`spaces.GPU`, for as long as a comparison may take."""
    try:
        spaces = importlib.import_module("spaces")
    except ImportError as error:
        raise LoadError(
            "This Space runs on ZeroGPU, whose package spaces is missing: add it to requirements.txt."
        ) from error
    return cast(Callable[[Call], Call], spaces.GPU(duration=SECONDS))


def _refused(error: Exception) -> TwinframeError:
    """What the package said, which is for people: no share left, no card free, or a fork that ended."""
    said = re.sub(r"<[^>]*>", "", str(getattr(error, "message", "") or error)).strip().rstrip(".")
    return RefusedError(f"The shared card could not be used ({said or type(error).__name__}): please retry later.")


def _device(name: str | None, source: Source, filtered: Filter) -> Placing:
    from engine.runtime import device as here

    return here.Device(name, source, filtered)
