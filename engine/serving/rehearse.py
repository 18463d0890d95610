"""A rehearsal before going on stage: everything on a list is warmed, run once, and judged: go, or no go.

It asks the worker as the page does, so that what it meets is what the audience would: models that are not offered,
precisions this machine lacks, limits. Knows no page.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from engine import catalog, events
from engine.errors import TwinframeError
from engine.outputs import recordings
from engine.outputs.recordings import Bundle
from engine.request import CompareRequest
from engine.serving.admission import Door, Limits
from engine.serving.contracts import Worker


@dataclass(frozen=True, kw_only=True)
class Act:
    """How one request on the list went."""

    name: str
    request: CompareRequest
    seconds: float
    """From asking to the last result, everything warm: what the audience waits."""
    problem: str
    """Why it failed, in one sentence; empty if it did not."""
    net: Bundle | None
    """The recording that the stage falls back to."""

    @property
    def go(self) -> bool:
        """Whether the talk can begin."""
        return not self.problem


def rehearse(
    worker: Worker, wanted: Mapping[str, CompareRequest], bundles: Sequence[Bundle], say: Callable[[str], None]
) -> list[Act]:
    """Warm each model, size and selection of precisions, then run the list once, in its order.

    Args:
        worker: what is asked.
        wanted: name -> request.
        bundles: the recordings there are.
        say: told what is going on.
    """
    acts = []
    with tempfile.TemporaryDirectory(prefix="twinframe-rehearsal-") as folder:
        for number, request in enumerate(_shapes(wanted.values())):
            say(f"warming {request.model}, {request.width}x{request.height}, {', '.join(request.precisions)}")
            _run(worker, request, Path(folder) / f"warm-{number}")
        for name, request in wanted.items():
            say(f"running {name}")
            began = time.monotonic()
            problem = _run(worker, request, Path(folder) / name)
            seconds, net = time.monotonic() - began, recordings.nearest(request, bundles)
            acts.append(Act(name=name, request=request, seconds=seconds, problem=problem, net=net))
    return acts


def _shapes(requests: Iterable[CompareRequest]) -> list[CompareRequest]:
    """One request for each of what has to be loaded, compiled or measured apart from the others."""
    found: dict[CompareRequest, CompareRequest] = {}
    for request in requests:
        same = replace(request, seed=0)
        if catalog.model(request.model).text_padded:  # else the prompt's length is part of the shape
            same = replace(same, prompt="")
        found.setdefault(same, request)
    return list(found.values())


def _run(worker: Worker, request: CompareRequest, out: Path) -> str:
    """Carry out a request; gives the sentence with which it failed, or none."""
    try:
        for event in worker.submit(request, out).events():
            match event:
                case events.Completed():
                    return ""
                case events.Failed(reason):
                    return reason
    except TwinframeError as error:
        return str(error)
    return "The run was ended before it was finished."


def table(acts: Sequence[Act]) -> str:
    """What is printed: a line for each request, and the verdict."""
    wide = max([20, *(len(act.name) for act in acts)])
    lines = [f"{'':5}  {'name':{wide}}  {'model':14}  {'size':11}  {'seconds':>7}  recording to fall back to"]
    for act in acts:
        asked = act.request
        size = f"{asked.width}x{asked.height}" + (f"x{asked.num_frames}" if asked.num_frames > 1 else "")
        took = f"{act.seconds:7.1f}" if act.go else f"{'-':>7}"
        word = "go" if act.go else "NO GO"
        lines.append(f"{word:5}  {act.name:{wide}}  {asked.model:14}  {size:11}  {took}  {_net(act)}")
        if act.problem:
            lines.append(f"{'':7}{act.problem}")
    went, same = sum(act.go for act in acts), sum(_same(act) for act in acts)
    said = f"{went} of {len(acts)} ran, {same} have a recording of the same request."
    return "\n".join([*lines, f"{'GO' if went == len(acts) else 'NO GO'}: {said}"])


def _same(act: Act) -> bool:
    return act.net is not None and act.net.comparison.request == act.request


def _net(act: Act) -> str:
    if act.net is None:
        return "none"
    return f"{act.net.name}, the same request" if _same(act) else f"{act.net.name}, the nearest"


def run(args: argparse.Namespace) -> int:
    """`python app.py --rehearse`: the table on stdout, progress on stderr; gives the exit status.

    Raises:
        RequestError: the list cannot be read.
        LoadError: the weights cannot be where the arguments say.
    """
    from engine.weights.source import Source

    source = Source.create(args.weights, args.random_weights, args.offline, args.models, args.quantized)
    wanted = recordings.read_list(args.rehearse)
    logging.getLogger("engine").setLevel(logging.WARNING)  # what goes well is in the table
    from engine.serving import worker as queue
    from engine.serving.process import Process

    first = (args.device or "").split(",")[0]  # of several the one that somebody alone gets
    device, door = Process(first or None, source), Door(Limits.from_environment(os.environ))
    with closing(queue.Worker(args.models, device, door)) as worker:
        acts = rehearse(
            worker, wanted, recordings.read(recordings.FOLDER), lambda text: print(text, file=sys.stderr, flush=True)
        )
    print(table(acts), flush=True)
    return 0 if all(act.go for act in acts) else 1
