"""SIGTERM to the real app with the real miniature: what runs ends or is cancelled in time, nothing half is left."""

import io
import json
import signal
import time

import httpx
import pytest
from PIL import Image

from tests.support.fake_engine import until
from tests.support.running import REQUEST, running

STEPS = 6
"""Enough for what is asked meanwhile to find the run under way."""


def at_step(stream, step):
    for _, data in stream:
        if data and f"step {step} of" in str(data):
            return
    pytest.fail("it ended before that step")


def test_after_sigterm_what_runs_ends_nothing_new_begins_and_the_log_is_json_without_prompts(tmp_path, cache):
    with running(tmp_path, TWINFRAME_METRICS="1", TWINFRAME_GRACE="300") as app:
        process, url = app.process, app.url
        stream = app.call(num_inference_steps=STEPS)
        at_step(stream, 1)
        assert httpx.get(f"{url}/health").json() == {"status": "busy", "queue": 0}
        assert "twinframe_running 1" in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert until(lambda: httpx.get(f"{url}/health").json()["status"] == "stopping")
        assert httpx.get(f"{url}/health").status_code == 503
        assert any("shutting down" in str(data) for _, data in app.call(num_inference_steps=STEPS))
        kind, (answer,) = list(stream)[-1]
        assert kind == "complete" and [r["precision"] for r in answer["results"]] == ["bf16"]
        picture = httpx.get(answer["results"][0]["files"][0]["url"]).content
        assert Image.open(io.BytesIO(picture)).convert("RGB").size == (256, 256)
        assert process.wait(300) == 0
        said = app.said()
    (ended,) = [line for line in said if line.get("outcome") == "completed"]
    assert ended["seconds"] > 0 and ended["num_inference_steps"] == STEPS
    assert REQUEST["prompt"] not in json.dumps(said)
    assert list((tmp_path / "served").rglob("twinframe-*")) == []


def test_what_does_not_end_in_time_is_cancelled_and_leaves_nothing(tmp_path, cache):
    with running(tmp_path, TWINFRAME_GRACE="0.5") as app:
        process = app.process
        stream = app.call(num_inference_steps=50)
        at_step(stream, 2)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.monotonic() - began < 20
        assert [line["outcome"] for line in app.said() if "outcome" in line] == ["cancelled"]
    assert [file for file in (tmp_path / "served").rglob("*") if file.suffix in (".part", ".png")] == []
