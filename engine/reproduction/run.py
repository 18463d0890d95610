"""The post's tables measured on this machine, one command after the other, each in a process of its own.

A part that fails, or ends its process, leaves the others alone, and the same command again goes on with what is not
done. After every part the JSON and the report are written anew. Knows nothing of how anything is measured: that is
`python -m engine bench` and `evaluate`, and `doctor` looks at the machine first. Imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import FaultError, OutputError, TwinframeError
from engine.files import writable, write_whole
from engine.leaving import MISTAKE
from engine.machine import FINE
from engine.reproduction import cells, plausibility, report, tables
from engine.reproduction.tables import Machine, Part, Scale

FORMAT = 1
"""Of the JSON; it changes when one version could not read another's."""
JSON, PAGE = "reproduction.json", "report.html"
ENDED = ".part.json"
"""In a part's folder: its command and how that ended. Hidden, as an evaluation wants its folder to itself."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    """On stdout."""
    said: str
    """The last line on stderr."""


Execute = Callable[[Sequence[str], bool, Callable[[str], None]], Ended]
"""Runs `python -m engine` with arguments, without TWINFRAME_WEIGHTS if so told, and says what it says on stderr."""
Say = Callable[[str], None]


def end_at_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does, so that the command that runs ends with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def execute(arguments: Sequence[str], bundled: bool, say: Say) -> Ended:
    """In a process of its own, which ends with whatever interrupts this one."""
    environment = dict(os.environ)
    if bundled:
        environment.pop("TWINFRAME_WEIGHTS", None)
    last = ""
    with tempfile.TemporaryFile() as kept:  # not a pipe, which nobody would read before the end
        program = subprocess.Popen(
            [sys.executable, "-m", "engine", *arguments],
            stdout=kept,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            errors="replace",
        )
        try:
            for line in program.stderr or ():
                if line.strip():
                    last = line.strip()
                    say(last)
        finally:  # also where this process is interrupted
            with program:
                if program.poll() is None and sys.exc_info()[0] is not None:
                    program.terminate()
        kept.seek(0)
        out = kept.read().decode("utf-8", "replace")
    if program.returncode < 0:
        last = f"Its process was ended by signal {-program.returncode}."
    return Ended(status=program.returncode, out=out, said=last)


class Reproduction:
    """One run, or going on with the one that a folder holds.

    Args:
        names: tables, in any order; None for all.
        asked: how much is measured.
        more: arguments for every command that loads weights.
        device: arguments of the doctor, such as a device.
        out: the folder.
        command: how a command is run.

    Raises:
        RequestError: there is no such table, or not at this scale.
        TwinframeError: there is no such device.
        FaultError: the doctor did not get to see it.
        OutputError: the folder holds something else.
    """

    def __init__(
        self,
        names: Sequence[str] | None,
        asked: Scale,
        more: Sequence[str],
        device: Sequence[str],
        out: Path,
        say: Say,
        command: Execute = execute,
    ):
        self.tables, self.asked, self.out = tables.chosen(names, asked), asked, out
        self._say, self._command = say, command
        self._began = time.monotonic()
        self.seen = self._doctor(device)
        self.machine = Machine.of(self.seen)
        self._held()
        self.check = tables.check(self.tables, self.machine, device)
        self.parts = tables.plan(self.tables, asked, self.machine, more)

    def _doctor(self, device: Sequence[str]) -> dict[str, Any]:
        ended = self._command(("doctor", "--json", *device), False, lambda line: None)
        try:
            found: dict[str, Any] = json.loads(ended.out)
        except ValueError:
            found = {}
        if ended.status == MISTAKE:
            raise TwinframeError(ended.said)
        if not found.get("device"):
            raise FaultError(ended.said or "The doctor said nothing: see python -m engine doctor.", kind="doctor")
        return found

    def _held(self) -> None:
        """See that the folder is empty or holds this very reproduction, with other tables perhaps."""
        if not self.out.exists():
            return
        file = self.out / JSON
        if not file.exists():
            others = sorted(entry.name for entry in self.out.iterdir() if not entry.name.startswith("."))
            if others:
                raise OutputError(f"{self.out} holds {others[0]} but no reproduction: choose an empty folder.")
            return
        try:
            held = json.loads(file.read_bytes())
            before = {name: held[name] for name in ("device", "versions", "rehearsal", "weights")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{file} is damaged: restore it, or choose another folder.") from error
        for name, value in before.items():
            if value != (now := self._about()[name]):
                raise OutputError(
                    f"{self.out} holds a reproduction with {name} {_short(value)}, not {_short(now)}: choose another "
                    "folder."
                )

    def _about(self) -> dict[str, Any]:
        return {
            "device": self.seen["device"],
            "versions": self.seen["versions"],
            "rehearsal": self.asked.rehearsal,
            "weights": "random" if self.asked.random else "bundled" if self.asked.models else "checkpoint",
        }

    # The plan

    def plan(self) -> list[str]:
        """For a terminal: what runs, in its order, what is done already, and how long the rest may take."""
        done = [part for part in self._all if self._done(part)]
        said = [self.heading]
        for part in self._all:
            state = "done" if part in done else tables.spoken(part.seconds)
            said.append(f"  {part.name:28} {state:>12}   {part.shown}")
        left = sum(part.seconds for part in self._all if part not in done)
        said.append(
            f"About {tables.spoken(left)} are left, by the post's latencies and guesses." if left else "All is done."
        )
        return said

    @property
    def heading(self) -> str:
        """The device and what is measured on it."""
        rehearsal = f", a rehearsal with {self.asked.rehearsal}" if self.asked.rehearsal else ""
        stands = ""
        if self.machine.stands_in:
            stands = "; FP8 in the place of MXFP8 and NVFP4, which need a Blackwell GPU"
        elif not self.machine.native:
            stands = "; MXFP8 and NVFP4 are emulated here, so that nothing of theirs is timed"
        return f"{self.machine.device}{rehearsal}{stands}"

    @property
    def _all(self) -> list[Part]:
        return [self.check, *self.parts]

    # The run

    def run(self, time_limit: float | None = None) -> dict[str, Any]:
        """Make what is not done; gives the JSON that the folder then holds.

        Args:
            time_limit: seconds after which no further part is begun, counted from the doctor on.

        Raises:
            FaultError: the self-check failed, so that nothing else was begun.
            OutputError: the folder cannot be written.
        """
        writable(self.out)
        self._write("")
        if not self._done(self.check):
            self._make(self.check, "")
        self._checked()
        stopped = ""
        for part in self.parts:
            if self._done(part):
                continue
            if time_limit is not None and time.monotonic() - self._began > time_limit:
                stopped = "The time limit was reached: the same command again goes on."
                self._say(stopped)
                break
            self._make(part, f"; about {tables.spoken(self._left())} left")
            self._write(stopped)
        return self._write(stopped)

    def _make(self, part: Part, left: str) -> None:
        folder = self.out / part.name
        writable(folder)
        self._say(f"{part.name}{left}")
        began = time.monotonic()
        (folder / ENDED).unlink(missing_ok=True)
        ended = self._command(part.command(self.out), part.bundled, lambda line: self._say(f"  {part.name}: {line}"))
        about = {
            "arguments": list(part.arguments),
            "status": ended.status,
            "said": ended.said if ended.status else "",
            "seconds": time.monotonic() - began,
            "predicted_s": part.seconds,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_whole(folder / ENDED, _json(about))

    def _state(self, part: Part) -> dict[str, Any] | None:
        """How a part ended the last time; None if it never did, or as another command."""
        try:
            about: dict[str, Any] = json.loads((self.out / part.name / ENDED).read_bytes())
        except (OSError, ValueError):
            return None
        return about if about.get("arguments") == list(part.arguments) else None

    def _done(self, part: Part) -> bool:
        about = self._state(part)
        return about is not None and about["status"] == 0 and self._result(part) is not None

    def _result(self, part: Part) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.out / part.name / part.file).read_bytes())
        except (OSError, ValueError):
            return None
        return found

    def _left(self) -> float:
        """Seconds, by what was predicted of the parts that are not done and how far off that was before."""
        states = [about for part in self.parts if (about := self._state(part)) and about["status"] == 0]
        took, predicted = (sum(about[name] for about in states) for name in ("seconds", "predicted_s"))
        return sum(part.seconds for part in self.parts if not self._done(part)) * (took / predicted if predicted else 1)

    def _checked(self) -> None:
        """The self-check's verdict.

        Raises:
            FaultError: pictures cannot be made, or are not what they should be.
        """
        found, about = self._result(self.check), self._state(self.check)
        if about is None or about["status"] or found is None:
            why = about["said"] if about else ""
            raise FaultError(f"The self-check failed, so nothing else was begun. {why}".rstrip(), kind="self-check")
        if wrong := [f"{check.subject}: {fault}" for check in plausibility.of_quality(found) for fault in check.faults]:
            raise FaultError(
                f"The self-check failed, so nothing else was begun. {wrong[0]} See {self.out / self.check.name}.",
                kind="self-check",
            )

    # What comes out

    def _write(self, stopped: str) -> dict[str, Any]:
        done = {part.name: found for part in self.parts if self._done(part) and (found := self._result(part))}
        benches = [done[part.name] for part in self.parts if part.to_file and part.name in done]
        quality = [done[part.name] for part in self.parts if not part.to_file and part.name in done]
        checks = [check for found in benches for check in plausibility.of_benchmark(found)]
        if not self.asked.random:  # whose pictures are noise
            checks += [check for found in quality for check in plausibility.of_quality(found)]
        result = {
            "reproduction": FORMAT,
            **self._about(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "heading": self.heading,
            "stands_in": self.machine.stands_in,
            "executions": dict(self.machine.executions),
            "stopped": stopped,
            "findings": [finding for finding in self.seen["findings"] if finding["severity"] != FINE],
            "tables": [line.to_json() for line in cells.lines(self.tables, self.asked, self.machine, done)],
            "plausibility": [vars(check) | {"faults": list(check.faults)} for check in checks],
            "parts": list(self._told()),
            "results": benches,
            "quality": [_without_pictures(found) for found in quality],
        }
        write_whole(self.out / JSON, _json(result))
        write_whole(self.out / PAGE, report.page(result).encode())
        return result

    def _told(self) -> Iterator[dict[str, Any]]:
        for part in self._all:
            about = {"status": None, "said": "", "seconds": None, "ended": None} | (self._state(part) or {})
            kept = {name: about[name] for name in ("status", "said", "seconds", "ended")}
            yield {"name": part.name, "tables": list(part.tables), "command": part.shown, **kept}


def status(result: Mapping[str, Any]) -> int:
    """The command's: 1 where a part failed or a figure cannot be, 0 otherwise."""
    failed = any(part["status"] for part in result["parts"])
    return int(failed or any(check["faults"] for check in result["plausibility"]))


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """For a terminal: a line for each row that was measured, what failed and what cannot be."""
    for line in result["tables"]:
        figures = [
            f"{name} {value['engine']:.4g}" + (f" (post {value['post']:.4g})" if value["post"] is not None else "")
            for name, value in line["values"].items()
            if value["engine"] is not None
        ]
        if figures:
            what = f"{line['precision']} {line['recipe']}".rstrip()
            where = f"{line['table']}, {what}, batch {line['batch_size']}"
            yield "  ".join([f"{where:48}", *figures, line["note"]]).rstrip()
    yield from (f"{part['name']} failed: {part['said']}" for part in result["parts"] if part["status"])
    for check in result["plausibility"]:
        yield from (f"{check['subject']} cannot be: {fault}" for fault in check["faults"])


def _without_pictures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary without the pairs that it shows, whose files are not beside it."""
    rows = [{name: value for name, value in row.items() if name not in ("worst", "best")} for row in summary["results"]]
    return {**summary, "results": rows}


def _short(value: object) -> str:
    return ", ".join(f"{name} {version}" for name, version in value.items()) if isinstance(value, dict) else str(value)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
