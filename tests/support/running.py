"""The real app in a process of its own, as tests of faults, load and shutdown see it: address, log, resources."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600
REQUEST = {
    "prompt": "a private word on a red background",
    "model": None,
    "precisions": ["bf16"],
    "seed": 7,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "height": None,
    "width": None,
    "num_frames": None,
    "batch_size": None,
    "recipe": None,
    "fresh": True,
}
"""The fields of `/compare`, in its order."""


@dataclass(frozen=True)
class App:
    """A served app."""

    process: subprocess.Popen
    url: str
    log: Path
    files: Path
    """Where it keeps what it makes."""
    client: httpx.Client
    """For all requests to it: making a client takes longer than most of them."""

    def health(self) -> str:
        return self.client.get("/health").json()["status"]

    def call(self, timeout: float = 120, **fields: object) -> Iterator[tuple[str, object]]:
        """Start a comparison; gives the kind and the data of each of its events. Closing it is going away."""
        data = list((REQUEST | fields).values())
        said = self.client.post("/gradio_api/call/compare", json={"data": data}).json()
        if "event_id" not in said:
            yield "error", said
            return
        event, kind = said["event_id"], ""
        with self.client.stream("GET", f"/gradio_api/call/compare/{event}", timeout=timeout) as stream:
            for line in stream.iter_lines():
                name, _, said = line.partition(": ")
                if name == "event":
                    kind = said
                elif name == "data":
                    yield kind, json.loads(said)

    def compare(self, **fields: object) -> tuple[str, object]:
        """The last event of a comparison: ("complete", [answer]) or ("error", {"error": sentence})."""
        *_, last = self.call(**fields)
        return last

    def engine(self) -> int | None:
        """The child process that has the device: the largest child."""
        return max(_children(self.process.pid), key=_resident, default=None)

    def said(self) -> list[dict]:
        """The log's lines; whatever is not JSON counts as an error."""
        lines = self.log.read_text().splitlines()
        return [
            json.loads(line) if line.startswith("{") else {"level": "error", "message": line}
            for line in lines
            if line.strip()
        ]

    def resources(self) -> dict[str, float]:
        """Memory and disk in MB (1e6 bytes), threads and open files, of the app and its children."""
        family = [self.process.pid, *_children(self.process.pid)]
        disk = 0
        for folder, _, names in os.walk(self.files):  # unlike Path.rglob it bears folders that are being swept
            for name in names:
                with suppress(FileNotFoundError):
                    disk += Path(folder, name).stat().st_size
        return {
            "app_mb": _resident(self.process.pid) / 1e6,
            "engine_mb": sum(map(_resident, family[1:])) / 1e6,
            "threads": sum(_entries(pid, "task") for pid in family),
            "files": sum(_entries(pid, "fd") for pid in family),
            "disk_mb": disk / 1e6,
        }


@contextmanager
def running(folder: Path, command: tuple[str, ...] = ("app.py",), **environment: str) -> Iterator[App]:
    """`python app.py` on a free port, on the CPU, with its files below `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files, log = folder / "served", folder / "log"
    files.mkdir(exist_ok=True)
    environment = {"GRADIO_TEMP_DIR": str(files), "CUDA_VISIBLE_DEVICES": ""} | environment
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--preload", "none"],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    url = f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=url, timeout=30, limits=httpx.Limits(max_connections=None))
    app = App(process, url, log, files, client)
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(app):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield app
    finally:
        process.kill()
        process.wait()
        client.close()


def _answers(app: App) -> bool:
    try:
        return app.health() == "ready"
    except httpx.TransportError:
        return False


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _entries(pid: int, kind: str) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/{kind}").iterdir()))
    except FileNotFoundError:
        return 0
