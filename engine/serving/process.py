"""A device in a child process, so that nothing that happens to it ends the app.

A CUDA context that was spoilt cannot be healed by the process that holds it, a segmentation fault or the kernel's
out-of-memory killer ends one without asking, and a thread that hangs in a driver cannot be ended at all. So the page,
the API, the queue and its door live here, without torch, and the device lives in a child that is replaced: what ran
fails in one sentence, what waits runs in the next child. Nor does the page's work share an interpreter with what is
timed.

Knows the interface `engine.contracts.Device`, not what it does. `Call`, `Halt` and `Leave` go down the pipe, `Told`,
`Returned` and `Raised` come up.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import itertools
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine import catalog, events, logs, quantized
from engine.environment import leave_cores_to_others
from engine.errors import CancelledRun, FaultError, TwinframeError
from engine.events import Stop, Tell
from engine.leaving import HUNG, RANKS_HUNG
from engine.machine import Finding, Machine, Support
from engine.request import CompareRequest
from engine.results import Comparison
from engine.safety import NO_FILTER, Filter
from engine.serving import command_line
from engine.serving.contracts import Device
from engine.serving.telemetry import resident_bytes
from engine.weights.source import BUNDLED_OR_HUB, Source

log = logging.getLogger(__name__)

Gone = Callable[["_Child"], None]
RUNS = ("compare", "prepare", "prove")
"""What takes the device, one at a time; everything else is answered beside it."""
POLL_SECONDS = 0.02
"""How often it is looked whether what runs is still wanted."""
HUNG_SECONDS = 300.0
"""Once it is not, how long it may go on: loading and compiling ask nobody, and take minutes."""
ANSWER_SECONDS = 60.0
"""How long a question may take: none does, unless the child hangs."""
AGAIN_SECONDS = (1.0, 60.0)
"""Between children that do not even start: the first wait, doubled up to the last."""

NICE = 5
"""Where the device is the CPU that the page is served from: how much it stands back, so that the page answers first."""
LEAVING_SECONDS = 5.0
"""How long a child that was told to leave may take."""
HELLO = 0
"""The number under which a child says that its device is there, or why it is not."""


@dataclass(frozen=True)
class Call:
    number: int
    name: str
    """A method of the device."""
    args: tuple[object, ...]


@dataclass(frozen=True)
class Halt:
    number: int
    """Of a run that nobody wants any more."""


@dataclass(frozen=True)
class Leave:
    """End at once."""


@dataclass(frozen=True)
class Told:
    number: int
    event: events.Event


@dataclass(frozen=True)
class Returned:
    number: int
    value: Any


@dataclass(frozen=True)
class Raised:
    number: int
    error: Exception


Message = Told | Returned | Raised


# ---------------------------------------------------------------------------------------------------------------------
# In the parent


class Process:
    """A device in a child process, with the interface of `engine.runtime.device.Device`.

    The first child starts at once; whoever asks for anything waits until it is there.

    Args:
        name, source, filtered: as of `Device`.
        make: what the child makes its device with, of these.
    """

    def __init__(
        self,
        name: str | None = None,
        source: Source = BUNDLED_OR_HUB,
        filtered: Filter = NO_FILTER,
        make: Callable[[str | None, Source, Filter], Device] | None = None,
    ):
        self._make = (make or _device, name, source, filtered)
        self._closing = threading.Event()
        self._lost: Callable[[str], None] = lambda why: None
        self._failures = 0
        """Children in a row that did not even start."""
        self._answers: dict[tuple[object, ...], Any] = {}
        """What seldom changes, once it was asked for."""
        self._stale: set[tuple[object, ...]] = set()
        """Which of them may have changed."""
        self._child = _Child(*self._make, self._gone)
        atexit.register(self.close)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Process:
        """As app.py's arguments and the environment want it.

        Raises:
            LoadError, RequestError: they want what cannot be.
        """
        source = Source.create(args.weights, args.random_weights, args.offline, args.models, args.quantized)
        return cls(
            args.device or None, source, filtered=Filter.from_environment(os.environ, command_line.is_public(args))
        )

    @property
    def ready(self) -> bool:
        """Requests can be carried out at once."""
        return self._child.ready

    @property
    def machine(self) -> Machine:
        """Raises UnsupportedError: there is no such device."""
        return self._always("machine")

    @property
    def support(self) -> Mapping[str, Support]:
        """Raises UnsupportedError: there is no such device."""
        return self._always("support")

    def compare(self, request: CompareRequest, out: Path, tell: Tell, stop: Stop) -> Comparison:
        return self._run("compare", (request, out), tell, stop)

    def prepare(self, model_id: str, tell: Tell, stop: Stop) -> None:
        self._run("prepare", (model_id,), tell, stop)

    def prove(self, tell: Tell, stop: Stop) -> None:
        self._run("prove", (), tell, stop)

    def examine(self) -> tuple[Finding, ...]:
        return self._always("examine")

    def about_weights(self, model_id: str) -> str:
        return self._ask("about_weights", model_id)

    def recipes(self, model_id: str) -> Mapping[str, str]:
        return self._always("recipes", model_id)

    def plan(self, model_id: str, precision: str, recipe: str) -> dict[str, Any]:
        return self._always("plan", model_id, precision, recipe)

    def code(self, request: CompareRequest, column: str, execution: str) -> str:
        return self._ask("code", request, column, execution)

    def gauges(self) -> dict[str, float]:
        """The child's memory; nothing while there is no child."""
        child = self._child
        if not child.ready:
            return {}
        found: dict[str, float] = dict(self._ask("gauges"))
        if child.pid is not None and (resident := resident_bytes(child.pid)) is not None:
            found["twinframe_engine_resident_memory_bytes"] = resident
        return found

    def watch(self, lost: Callable[[str], None]) -> None:
        """Have `lost` called, with the reason in a word, each time a child was lost and the next one is starting."""
        self._lost = lost

    def renew(self) -> None:
        """End the child; the next one starts by itself."""
        self._child.kill("renewed")

    def close(self) -> None:
        """End the child for good."""
        atexit.unregister(self.close)
        self._closing.set()
        self._child.leave()

    def _run(self, name: str, args: tuple[object, ...], tell: Tell, stop: Stop) -> Any:
        """Have something done on the device; `stop` ends it at the next step. Gives what that method of it gives."""
        child = self._child
        if not child.ready:
            tell(events.Loading("the engine"))
        while not child.arrived.wait(POLL_SECONDS):
            if stop():
                raise CancelledRun
        number, inbox = child.call(name, args)
        hung = threading.Timer(HUNG_SECONDS, child.kill, ["hung"])
        hung.daemon, wanted = True, True
        ended: Returned | Raised | None = None
        while ended is None:
            if wanted and stop():
                wanted = False
                child.send(Halt(number))
                hung.start()
            with contextlib.suppress(queue.Empty):
                message = inbox.get(timeout=POLL_SECONDS)
                if isinstance(message, Told):
                    if isinstance(message.event, events.Proved):
                        self._forget_machine()
                    tell(message.event)
                else:
                    ended = message
        hung.cancel()
        if (lost := _lost(ended)) is not None:
            child.kill(lost.kind)
            child.replaced.wait()  # whoever comes next meets the next child
        return _outcome(ended)

    def _ask(self, name: str, *args: object) -> Any:
        """Something that is answered beside what runs; asked again of the next child if one was lost over it."""
        answer = self._answer(name, args)
        return _outcome(answer if _lost(answer) is None else self._answer(name, args))

    def _answer(self, name: str, args: tuple[object, ...]) -> Message:
        child = self._child
        child.arrived.wait()
        _, inbox = child.call(name, args)
        try:
            return inbox.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            sentence = "The engine does not answer: please retry in a few minutes."
            raise FaultError(sentence, kind="ProcessHangs") from None

    def _always(self, name: str, *args: object) -> Any:
        """Something that is asked once; anew where it may have changed, as soon as there is a child to ask."""
        key = (name, *args)
        if key not in self._answers or (key in self._stale and self.ready):
            self._stale.discard(key)
            try:
                self._answers[key] = self._ask(name, *args)
            except FaultError:
                if key not in self._answers:
                    raise
                self._stale.add(key)  # what was so before is said until somebody knows better
        return self._answers[key]

    def _forget_machine(self) -> None:
        """How it runs its formats may be another than before."""
        self._stale |= {("machine",), ("support",), ("examine",)}

    def _gone(self, child: _Child) -> None:
        """A child has ended: start the next one. On the thread that listened to it."""
        self._forget_machine()
        if child.greeted:
            self._failures = 0
        else:
            child.bury()
            first, last = AGAIN_SECONDS
            self._closing.wait(min(last, first * 2**self._failures))
            self._failures += 1
        if self._closing.is_set():
            child.bury()
            return
        log.error("the engine's process was lost", extra={"why": child.why, "pid": child.pid})
        self._child = _Child(*self._make, self._gone)
        child.bury()
        self._lost(child.why)


def require_one_kind(names: Sequence[str], devices: Sequence[Device]) -> None:
    """Wait until all devices of one service are there, whose names these are.

    Raises:
        UnsupportedError: one is not there, or of another kind than the first.
    """
    for name, device in zip(names[1:], devices[1:], strict=True):
        devices[0].machine.require_like(names[0], device.machine, name, "any of them may get a comparison")


class _Child:
    """One child process, as seen from its parent."""

    def __init__(self, make: Callable[..., Device], name: str | None, source: Source, filtered: Filter, gone: Gone):
        context = multiprocessing.get_context("spawn")  # a fork would take a GPU's context and held locks along
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, name, source, filtered), name="engine")
        self._gone = gone
        self._numbers = itertools.count(HELLO + 1)
        self._inboxes: dict[int, queue.SimpleQueue[Message]] = {}
        self._lock = threading.Lock()
        self._end: Exception | None = None
        """What whoever still waits, or comes too late, is told."""
        self._refusal: Exception | None = None
        """Why it has no device."""
        self._killed_for = ""
        self.greeted = False
        """It has said hello."""
        self.arrived = threading.Event()
        """It has said hello, or never will."""
        self.replaced = threading.Event()
        """It has ended, and the next one, if there is one, has begun."""
        self._process.start()
        theirs.close()
        threading.Thread(target=self._listen, name="engine-events", daemon=True).start()

    @property
    def ready(self) -> bool:
        return self.greeted and self._process.exitcode is None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def why(self) -> str:
        """Why it ended, in a word."""
        code = self._process.exitcode
        return self._killed_for or (signal.Signals(-code).name if code and code < 0 else f"exit {code}")

    def call(self, name: str, args: tuple[object, ...]) -> tuple[int, queue.SimpleQueue[Message]]:
        """Ask for something; gives its number, and where events and, last, the outcome arrive."""
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        with self._lock:
            number = next(self._numbers)
            if self._end is not None:
                inbox.put(Raised(number, self._end))
                return number, inbox
            self._inboxes[number] = inbox
        self.send(Call(number, name, args))
        return number, inbox

    def send(self, message: Call | Halt | Leave) -> None:
        with self._lock, contextlib.suppress(OSError):  # where it has ended, the listening thread tells everybody
            self._connection.send(message)

    def kill(self, why: str) -> None:
        """End it now, whatever it is doing."""
        self._killed_for = self._killed_for or why
        self._process.kill()

    def leave(self) -> None:
        """Ask it to end, and make sure."""
        self.send(Leave())
        self._process.join(LEAVING_SECONDS)
        self._process.kill()
        self.replaced.wait(LEAVING_SECONDS)

    def bury(self) -> None:
        """Tell whoever waits, and whoever comes too late, that it has ended."""
        with self._lock:
            end = self._end = self._end or self._refusal or _death(self)
            waiting, self._inboxes = self._inboxes, {}
        self.arrived.set()
        for number, inbox in waiting.items():
            inbox.put(Raised(number, end))

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._sort(self._connection.recv())
        self._process.join()
        self._connection.close()
        self._gone(self)
        self.replaced.set()

    def _sort(self, message: Message) -> None:
        if message.number == HELLO:
            if isinstance(message, Raised):
                self._refusal = message.error
                return
            self.greeted = True
            self.arrived.set()
            return
        with self._lock:
            inbox = self._inboxes[message.number]
            if not isinstance(message, Told):
                del self._inboxes[message.number]
        inbox.put(message)


def _death(child: _Child) -> FaultError:
    """What to say of a child that has ended."""
    if child.why == f"exit {HUNG}":
        what = (
            "A product of this device did not return, so the engine is being started again, and emulates that format "
            "from now on: please retry in a minute."
        )
    elif child.why == f"exit {RANKS_HUNG}":
        what = "A card did not answer the others, so the engine is being started again: please retry in a minute."
    elif child.greeted:
        what = f"The engine's process ended ({child.why}) and is being started again: please retry in a minute."
    else:
        what = f"The engine's process does not start ({child.why}): its log says more; please retry in some minutes."
    return FaultError(what, kind="ProcessLost", trace=child.why, lost=True)


def _lost(message: Message) -> FaultError | None:
    """The failure by which a child was lost, if this is one."""
    error = message.error if isinstance(message, Raised) else None
    return error if isinstance(error, FaultError) and error.lost else None


def _outcome(message: Message) -> Any:
    match message:
        case Raised(_, error):
            raise error
        case Returned(_, value):
            return value
    raise TypeError(f"{message} ends nothing")


# ---------------------------------------------------------------------------------------------------------------------
# In the child


def serve(connection: Connection, make: Callable[..., Device], *args: object) -> None:
    """The child's life: make the device, say hello, and do what is asked for until told to leave or left alone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the app, which ends this process when it is done
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.set_start_method(None, force=True)  # libraries are to find what they find in any process
    logs.quiet_libraries()
    logs.structured()
    logging.getLogger().addHandler(logs.Kept())
    sending, unwanted = threading.Lock(), set[int]()
    runs: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def send(message: Message) -> None:
        with sending:
            connection.send(message)

    def carry_out(call: Call, *further: object) -> None:
        try:
            found = getattr(device, call.name)
            send(Returned(call.number, found(*call.args, *further) if callable(found) else found))
        except (TwinframeError, CancelledRun) as error:
            send(Raised(call.number, error))

    def listen() -> None:
        with ThreadPoolExecutor(1, "questions") as questions:
            while True:
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    message = Leave()
                match message:
                    case Leave():
                        os._exit(0)  # nothing here is worth waiting for, least of all a hung device
                    case Halt(number):
                        unwanted.add(number)
                    case Call(_, asked, _) if asked in RUNS:
                        runs.put(message)
                    case _:
                        questions.submit(carry_out, message)

    threading.Thread(target=listen, name="listener", daemon=True).start()
    try:
        device = make(*args)
    except TwinframeError as error:
        send(Raised(HELLO, error))
        return
    except Exception:
        log.exception("the engine's process does not start")
        sys.exit(1)
    send(Returned(HELLO, None))
    while True:  # on the main thread: what the libraries set up while they were imported belongs to it
        call = runs.get()
        carry_out(
            call, lambda event, call=call: send(Told(call.number, event)), lambda call=call: call.number in unwanted
        )
        unwanted.discard(call.number)


def _device(name: str | None, source: Source, filtered: Filter) -> Device:
    leave_cores_to_others(os.environ)
    from engine.runtime import device as here

    for spec in source.models:
        catalog.give(spec)
    for checkpoint in source.quantized:  # columns name them here too
        quantized.give(checkpoint)
    device = here.Device(name, source, filtered)
    if device.machine.kind == "cpu" and hasattr(os, "nice"):  # Windows has other priorities
        os.nice(NICE)
    return device
