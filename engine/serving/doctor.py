"""What this machine is and what it runs, a finding a line, with what to do about it.

The device's part comes from its process, so that this one needs no torch and a library that ends its process is a
finding too. Knows the disk, the hub, the encoder of clips and the port by itself."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import catalog, files
from engine.environment import versions
from engine.errors import FaultError, RequestError
from engine.formats import FORMATS
from engine.machine import FAULT, FINE, LIMIT, Finding
from engine.serving.command_line import PORT, check_address
from engine.serving.contracts import Device
from engine.weights import hub

HUB_SECONDS = 5.0
"""For the hub to answer."""
CODECS = ("libx264", "aac")
"""Of clips (engine/outputs/media.py)."""
RENEWALS = 2 * len(FORMATS)
"""Processes that may end over a proof before the doctor gives up: each leaves a format emulated, or will at its
second time."""


def examine(device: Device, offline: bool) -> dict[str, Any]:
    """The command's JSON object. Compares native products first, where that was not done before.

    Raises:
        UnsupportedError: there is no such device.
    """
    lost: list[Finding] = []
    for _ in range(RENEWALS):
        try:
            device.prove(lambda event: None, lambda: False)
        except FaultError as error:
            lost = [Finding(topic="Engine", severity=FAULT, said=str(error), do="Run the command once more.")]
            if error.lost:
                continue
        else:
            lost = []
        break
    try:
        of_device, name = device.examine(), device.machine.name
        formats = {
            key: {"execution": support.execution, "proof": proof and vars(proof)}
            for key, support in device.support.items()
            for proof in [support.machine.proof(key) if support.machine else None]
        }
    except FaultError as error:
        lost = [Finding(topic="Engine", severity=FAULT, said=str(error), do="See why in the log file.")]
        of_device, name, formats = (), "", {}
    found = [*lost, *of_device, *surroundings(offline)]
    return {
        "status": status(found),
        "device": name,
        "versions": versions(),
        "formats": formats,
        "findings": [vars(finding) for finding in found],
    }


def status(findings: Sequence[Finding]) -> int:
    """The command's: 1 where something does not work that should, 0 otherwise."""
    return int(any(finding.severity == FAULT for finding in findings))


def lines(findings: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """For a terminal, a line each."""
    width = max(len(finding["topic"]) for finding in findings)
    for finding in findings:
        do = f" {finding['do']}" if finding["do"] else ""
        yield f"{finding['severity']:5}  {finding['topic']:{width}}  {finding['said']}{do}"


def surroundings(offline: bool) -> Iterator[Finding]:
    """What of the machine is not its device.

    Args:
        offline: the hub is not to be asked.
    """
    yield _cache()
    yield _disk()
    yield from _hub(offline)
    yield _encoder()
    yield _port()


def _cache() -> Finding:
    folder = files.cache_folder()
    if files.can_be_written(folder):
        return Finding(topic="Cache", severity=FINE, said="Proofs, rulers, compiled code and the log can be kept.")
    said = f"{folder} cannot be written, so proofs, rulers and compiled code are made anew at every start."
    return Finding(topic="Cache", severity=FAULT, said=said, do="Set TWINFRAME_CACHE to a folder that can.")


def _disk() -> Finding:
    """Room for what would be downloaded."""
    folder = Path(hub.constants.HF_HUB_CACHE)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e9
    large = {spec.name: spec.memory_gb.download for spec in catalog.MODELS.values() if spec.memory_gb is not None}
    short = [f"{name} ({gigabytes:.0f} GB)" for name, gigabytes in large.items() if gigabytes > free]
    said = f"{free:.0f} GB are free for downloads from the hub"
    if not short:
        return Finding(topic="Disk", severity=FINE, said=f"{said}, which is enough for any model.")
    do = "Make room, or set HF_HOME to a folder on a larger disk."
    return Finding(topic="Disk", severity=LIMIT, said=f"{said}, too few for {', '.join(short)}.", do=do)


def _hub(offline: bool) -> Iterator[Finding]:
    if offline or hub.constants.HF_HUB_OFFLINE:
        said = "Nothing is fetched from the hub, as --offline or HF_HUB_OFFLINE says; the miniatures need nothing."
        yield Finding(topic="Hub", severity=LIMIT, said=said)
        return
    if _reachable(hub.constants.ENDPOINT):
        yield Finding(topic="Hub", severity=FINE, said="The Hugging Face hub answers.")
    else:
        said = "The Hugging Face hub does not answer; the miniatures do without it."
        do = "Check the connection, or give a checkpoint with --weights DIR."
        yield Finding(topic="Hub", severity=LIMIT, said=said, do=do)
    if hub.has_token():
        yield Finding(topic="Token", severity=FINE, said="There is a token for gated models.")
        return
    gated = [spec.name for spec in catalog.MODELS.values() if spec.gated]
    said = f"There is no token for the hub, which {', '.join(gated)} needs."
    do = f"Accept its licence on its page, make a token at {hub.TOKENS} and set HF_TOKEN to it."
    yield Finding(topic="Token", severity=LIMIT, said=said, do=do)


def _reachable(address: str, fetch: Callable[..., Any] = urllib.request.urlopen) -> bool:
    try:
        with fetch(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
            return True
    except urllib.error.HTTPError:  # an answer
        return True
    except (OSError, ValueError):
        return False


def _encoder() -> Finding:
    mend = {"topic": "Clips", "severity": FAULT, "do": "Run pip install --force-reinstall av."}
    try:
        import av
    except (ImportError, OSError) as error:
        return Finding(said=f"Clips cannot be written, as PyAV does not load ({error}).", **mend)
    for name in CODECS:
        try:
            av.codec.Codec(name, "w")
        except (ValueError, av.error.FFmpegError):
            return Finding(said=f"Clips cannot be written, as PyAV's FFmpeg has no {name}.", **mend)
    return Finding(topic="Clips", severity=FINE, said=f"PyAV {av.__version__} writes H.264 and AAC.")


def _port() -> Finding:
    with suppress(RequestError):
        check_address("127.0.0.1", PORT)
        return Finding(topic="Port", severity=FINE, said=f"Port {PORT} is free for app.py.")
    said = f"Port {PORT} is taken, so app.py takes the next free one."
    return Finding(topic="Port", severity=LIMIT, said=said, do="Choose one with --port.")
