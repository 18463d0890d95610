"""SIGTERM to the real app with the real miniature: what runs ends or is cancelled in time, nothing half is left."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a private word on a red background"


@contextmanager
def running(tmp_path, cache, **environment):
    """`python app.py` on a free port: its process, its address, and the file of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "served").mkdir()
    environment = {"GRADIO_TEMP_DIR": str(tmp_path / "served"), "CUDA_VISIBLE_DEVICES": ""} | environment
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port), "--preload", "none"],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process, url, log
    finally:
        process.kill()
        process.wait()


def call(url, steps):
    """Start a comparison; gives the kind and the data of each of its events."""
    data = [PROMPT, None, ["bf16"], 7, steps, 1.0, None, None, None, None, None]
    event = httpx.post(f"{url}/gradio_api/call/compare", json={"data": data}).json()["event_id"]
    kind = ""
    with httpx.stream("GET", f"{url}/gradio_api/call/compare/{event}", timeout=60) as stream:
        for line in stream.iter_lines():
            name, _, said = line.partition(": ")
            if name == "event":
                kind = said
            elif name == "data":
                yield kind, json.loads(said)


def at_step(stream, step):
    for _, data in stream:
        if data and f"step {step} of" in str(data):
            return
    pytest.fail("it ended before that step")


def test_after_sigterm_what_runs_ends_nothing_new_begins_and_the_log_is_json_without_prompts(tmp_path, cache):
    with running(tmp_path, cache, TWINFRAME_METRICS="1", TWINFRAME_GRACE="60") as (process, url, log):
        stream = call(url, 3)
        at_step(stream, 1)
        assert httpx.get(f"{url}/health").json() == {"status": "busy", "queue": 0}
        assert "twinframe_running 1" in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopping")
        assert any("shutting down" in str(data) for _, data in call(url, 3))
        kind, (answer,) = list(stream)[-1]
        assert kind == "complete" and [r["precision"] for r in answer["results"]] == ["bf16"]
        picture = httpx.get(answer["results"][0]["files"][0]["url"]).content
        assert Image.open(io.BytesIO(picture)).convert("RGB").size == (256, 256)
        assert process.wait(60) == 0
        said = [json.loads(line) for line in log.read_text().splitlines()]
    (ended,) = [line for line in said if line.get("outcome") == "completed"]
    assert ended["seconds"] > 0 and ended["num_inference_steps"] == 3
    assert PROMPT not in json.dumps(said)
    assert list((tmp_path / "served").rglob("twinframe-*")) == []


def test_what_does_not_end_in_time_is_cancelled_and_leaves_nothing(tmp_path, cache):
    with running(tmp_path, cache, TWINFRAME_GRACE="0.5") as (process, url, log):
        stream = call(url, 50)
        at_step(stream, 2)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.monotonic() - began < 20
        assert [json.loads(line)["outcome"] for line in log.read_text().splitlines() if "outcome" in line] == [
            "cancelled"
        ]
    assert [file for file in (tmp_path / "served").rglob("*") if file.suffix in (".part", ".png")] == []
