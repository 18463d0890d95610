"""What the web may do: headers, framing, closed routes, paths, auth, health, metrics, limits; around a fake worker."""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import httpx
import pytest
from gradio.state_holder import StateHolder
from gradio_client import Client
from gradio_client.exceptions import AppError

from engine.errors import RefusedError, RequestError
from engine.results import Comparison
from engine.serving.admission import HOUR, Door, Limits, Visitor
from engine.serving.telemetry import Telemetry
from tests.support.fake_engine import FakeWorker, record, served
from ui.web.middleware import LARGEST_BODY, Doors
from ui.web.served_files import PREFIX, Shelf

PROMPT = "a rocket on a blue background"
ANN, BOB = Visitor(session="ann", address="10.0.0.1"), Visitor(session="bob", address="10.0.0.2")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    worker = FakeWorker()
    with served(worker, folder) as url:
        yield url, worker


@pytest.fixture(scope="module")
def guarded():
    with served(FakeWorker(), doors=Doors(auth=("ann", "s3cret"), metrics=True, space=True)) as url:
        yield url


# Headers


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/health", "/nowhere", "/gradio_api/upload"])
def test_every_answer_has_the_security_headers(app, path):
    headers = httpx.get(app[0] + path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert "camera=()" in headers["permissions-policy"]
    policy = headers["content-security-policy"]
    assert "http" not in policy and "*" not in policy, "no other host"
    assert policy.endswith("frame-ancestors 'self'") and headers["x-frame-options"] == "SAMEORIGIN"


def test_only_a_space_may_be_framed_and_only_by_the_hub(guarded):
    headers = httpx.get(f"{guarded}/health").headers
    assert headers["content-security-policy"].endswith(
        "frame-ancestors 'self' https://huggingface.co https://*.hf.space"
    )
    assert "x-frame-options" not in headers


@pytest.mark.browser
def test_a_comparison_runs_without_breaking_the_policy(chromium, app):
    page, said = chromium.new_page(), []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(app[0])
    page.wait_for_selector("#tf-stage img")
    page.fill("#tf-prompt textarea", "a teapot on a red background")
    page.click("#tf-go")
    page.wait_for_selector("a[href$='comparison.json']")
    page.wait_for_selector("#tf-headline:not(:has(.tf-recorded)):not(:has(.tf-pulse))")
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'blocked')") == "blocked"
    page.close()
    broken = [text for text in said if "Content Security Policy" in text or "Content-Security-Policy" in text]
    assert broken and all("127.0.0.1:9/" in text for text in broken), "only the request that the test made"


@pytest.mark.browser
def test_another_page_cannot_show_it_in_a_frame(chromium, app):
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(f'<iframe src="{app[0]}/" width="900" height="600"></iframe>'.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page, said = chromium.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"http://localhost:{server.server_port}/")
    page.wait_for_timeout(1000)
    assert any("frame" in text.lower() for text in said)
    assert page.frames[1].url != f"{app[0]}/" or not page.frames[1].query_selector("#tf-go")
    page.close()
    server.shutdown()
    server.server_close()


# Routes


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/gradio_api/call/nope", {"data": []}),
        ("POST", "/gradio_api/run/nope", {"data": []}),
        ("POST", "/gradio_api/api/run", {"data": []}),
        ("POST", "/gradio_api/call/v2/nope", {}),
        ("POST", "/gradio_api/queue/join", {"data": [], "fn_index": 999, "session_hash": "x"}),
        ("POST", "/gradio_api/upload", {}),
        ("POST", "/gradio_api/component_server", {"session_hash": "a", "component_id": 1, "fn_name": "x"}),
        ("POST", "/gradio_api/vibe-edit/", {"prompt": "x"}),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/", None),
        ("GET", "/monitoring", None),
        ("GET", "/metrics", None),
    ],
)
def test_what_does_not_exist_is_a_clean_404(app, method, path, body):
    response = httpx.request(method, app[0] + path, json=body)
    assert response.status_code == 404
    assert set(response.json()) == {"detail"} and "Traceback" not in response.text


def test_an_event_that_does_not_exist_is_an_error_and_ends(app):
    response = httpx.get(f"{app[0]}/gradio_api/call/compare/nope")
    assert "404" in response.text and "Traceback" not in response.text


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/file=app.py",
        "/gradio_api/file=./engine/serving/admission.py",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=/proc/self/environ",
        "/gradio_api/file=%00",
        "/gradio_api/file={shelf}/../../../../etc/passwd",
        "/gradio_api/file={shelf}/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file//etc/passwd",
        "/static/%2e%2e/%2e%2e/routes.py",
        "/assets/..%2f..%2f..%2froutes.py",
        "/svelte/..%2f..%2froutes.py",
        "/theme.css/../../app.py",
    ],
)
def test_no_file_outside_is_served(app, path):
    url, _ = app
    shelf = Client(url, verbose=False, download_files=False).predict(
        prompt=PROMPT, precisions=["bf16"], num_inference_steps=1, api_name="/compare"
    )["results"][0]["files"][0]["path"]
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:  # httpx would tidy the path up
        line = path.replace("{shelf}", shelf.rsplit("/", 1)[0])
        raw.sendall(f"GET {line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(partial(raw.recv, 65536), b""))
    status = int(answer.split()[1])
    assert 300 <= status < 500 and b"root:" not in answer and b"import " not in answer


def test_a_body_that_is_too_large_is_refused(app):
    data = {"data": ["x" * (LARGEST_BODY + 1)]}
    assert httpx.post(f"{app[0]}/gradio_api/call/compare", json=data).status_code == 413


def test_the_oldest_files_go_when_all_take_too_much_but_never_fresh_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("ui.web.served_files.SWEEP_SECONDS", 0)
    shelf = Shelf.from_environment({"TWINFRAME_OUTPUTS_GB": "0.00000015", "TWINFRAME_OUTPUTS_HOURS": "2"})
    ages = {"fresh": 0, "another": 60, "old": 3600, "older": 3601, "empty": 601}
    folders = {name: shelf.new() for name in ages}
    for name, age in ages.items():
        if name != "empty":
            (folders[name] / "a.png").write_bytes(b"x" * 100)
        os.utime(folders[name], (time.time() - age,) * 2)
    shelf.new()
    assert [name for name, folder in folders.items() if folder.exists()] == ["fresh", "another"]
    os.utime(folders["fresh"], (time.time() - 7201,) * 2)
    shelf.new()
    assert not folders["fresh"].exists(), "too old"
    shelf.close()


def test_files_are_looked_through_once_a_minute_at_most(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    shelf = Shelf.from_environment({"TWINFRAME_OUTPUTS_HOURS": "1"})
    old = shelf.new()
    os.utime(old, (0, 0))
    shelf.new()
    assert old.exists(), "it was looked through a moment ago"
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    shelf.new()
    assert not old.exists()
    shelf.close()


def test_a_folder_that_is_refused_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    shelf = Shelf()
    with shelf.offer() as kept:
        (kept / "a.png").write_bytes(b"x")
    with pytest.raises(RequestError), shelf.offer() as refused:
        (refused / "a.png").write_bytes(b"x")
        raise RequestError("No.")
    assert kept.exists() and not refused.exists()
    shelf.close()


CLAIMING = """
import pathlib, sys, time
from engine import files
files.claim(pathlib.Path(sys.argv[1]))
print(flush=True)
time.sleep(60)
"""


def test_a_killed_apps_files_go_when_the_next_one_starts_and_a_living_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    alive, others = Shelf(), tmp_path / "somebody-elses"
    theirs = tmp_path / f"{PREFIX}killed"
    for folder in (others, theirs):
        (folder / "comparison").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", CLAIMING, theirs], stdout=subprocess.PIPE) as app:
        app.stdout.readline()
        Shelf().close()
        assert theirs.exists(), "it belongs to a process that lives"
        app.kill()
        app.wait()
    Shelf().close()
    assert sorted(tmp_path.iterdir()) == sorted([others, alive.root])
    alive.close()


def test_a_folder_that_the_system_cleaned_away_is_made_and_claimed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    shelf = Shelf()
    shelf.root.rmdir()
    folder = shelf.new()
    Shelf().close()
    assert folder.is_dir()
    shelf.close()
    assert list(tmp_path.iterdir()) == []


# Auth, health, metrics


def test_without_the_password_nothing_but_the_health_is_seen(guarded):
    assert httpx.get(f"{guarded}/health").status_code == 200
    assert httpx.get(f"{guarded}/config").status_code == 401
    assert httpx.get(f"{guarded}/metrics").status_code == 401
    assert httpx.post(f"{guarded}/gradio_api/call/compare", json={"data": [PROMPT]}).status_code == 401
    assert httpx.get(f"{guarded}/metrics", auth=("ann", "wrong")).status_code == 401
    assert httpx.get(f"{guarded}/metrics", auth=("ann", "s3cret")).status_code == 200
    answer = Client(guarded, verbose=False, auth=("ann", "s3cret")).predict(prompt=PROMPT, api_name="/compare")
    assert len(answer["results"]) == 3


@pytest.mark.parametrize("said", ["ann", ":s3cret", "s3cret:", ":"])
def test_a_half_written_auth_is_a_mistake_that_is_not_repeated(said):
    with pytest.raises(RequestError, match="user:password") as error:
        Doors.from_environment({"TWINFRAME_AUTH": said})
    assert "s3cret" not in str(error.value)


def test_doors_from_the_environment():
    assert Doors.from_environment({}) == Doors()
    said = {"TWINFRAME_AUTH": "ann:a:b", "SPACE_ID": "x/y", "TWINFRAME_METRICS": "1"}
    assert Doors.from_environment(said) == Doors(auth=("ann", "a:b"), space=True, metrics=True)


def test_health_is_json_for_a_load_balancer(app):
    response = httpx.get(f"{app[0]}/health")
    assert (response.status_code, response.json()) == (200, {"status": "ready", "queue": 0})


def test_metrics_are_in_prometheus_format_and_time_nothing_that_was_emulated(tmp_path):
    comparison: Comparison = record(tmp_path, precisions=["mxfp8"])
    telemetry = Telemetry()
    telemetry.completed(comparison)
    telemetry.outcome("completed", 2.0)
    telemetry.outcome("refused")
    telemetry.fault("OutOfMemoryError")
    lines = telemetry.exposition({"twinframe_queue_length": 3}).splitlines()
    assert 'twinframe_jobs_total{outcome="completed"} 1' in lines
    assert 'twinframe_jobs_total{outcome="refused"} 1' in lines
    assert 'twinframe_faults_total{type="OutOfMemoryError"} 1' in lines
    assert "twinframe_queue_length 3" in lines
    assert 'twinframe_job_seconds_bucket{le="1.0"} 0' in lines
    assert 'twinframe_job_seconds_bucket{le="3.0"} 1' in lines
    assert any('precision="bf16",stage="denoise"' in line for line in lines)
    assert not any("mxfp8" in line for line in lines), "an emulation's time is not a speed"
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    assert all(line.startswith(("# HELP", "# TYPE", "twinframe_")) for line in lines)


# The engine's door


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_a_full_queue_refuses(clock):
    door = Door(Limits(waiting=2), clock)
    door.admit(ANN, waiting=1, has_one=False)
    with pytest.raises(RefusedError, match="queue is full"):
        door.admit(BOB, waiting=2, has_one=False)


def test_one_comparison_at_a_time(clock):
    with pytest.raises(RefusedError, match="already have a comparison"):
        Door(clock=clock).admit(ANN, waiting=0, has_one=True)


def test_a_budget_is_an_addresss_and_comes_back_by_the_hour(clock):
    door = Door(Limits(jobs_per_visitor_hour=2), clock)
    door.admit(ANN, 0, False)
    clock.now = 600
    door.admit(Visitor(session="another tab", address=ANN.address), 0, False)
    with pytest.raises(RefusedError, match=r"Your budget of 2 comparisons an hour is spent: try again in 50 minutes\."):
        door.admit(ANN, 0, False)
    door.admit(BOB, 0, False)
    clock.now = HOUR
    door.admit(ANN, 0, False)
    with pytest.raises(RefusedError, match="in 10 minutes"):
        door.admit(ANN, 0, False)


def test_the_common_budget_holds_for_everybody(clock):
    door = Door(Limits(jobs_per_hour=2), clock)
    door.admit(ANN, 0, False)
    door.admit(BOB, 0, False)
    for visitor in (ANN, BOB, None):
        with pytest.raises(RefusedError, match="This app's budget of 2 comparisons an hour is spent"):
            door.admit(visitor, 0, False)


def test_what_is_refused_costs_nothing(clock):
    door = Door(Limits(waiting=1, jobs_per_visitor_hour=1), clock)
    for _ in range(3):
        with pytest.raises(RefusedError, match="queue is full"):
            door.admit(ANN, 1, False)
    door.admit(ANN, 0, False)


def test_limits_from_the_environment():
    assert Limits.from_environment({}) == Limits(waiting=20, deadline=HOUR)
    said = {
        "TWINFRAME_QUEUE": "3",
        "TWINFRAME_JOBS_PER_VISITOR_HOUR": "10",
        "TWINFRAME_JOBS_PER_HOUR": "100",
        "TWINFRAME_DEADLINE": "7.5",
    }
    assert Limits.from_environment(said) == Limits(waiting=3, jobs_per_visitor_hour=10, jobs_per_hour=100, deadline=7.5)


@pytest.mark.parametrize("said", ["0", "-1", "many", "nan", "inf", "1e999"])
def test_a_limit_that_is_no_number(said):
    with pytest.raises(RequestError, match="TWINFRAME_QUEUE must be a positive number"):
        Limits.from_environment({"TWINFRAME_QUEUE": said})


def test_a_refusal_reaches_the_client_as_the_doors_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    class Shut(FakeWorker):
        def submit(self, request, out, visitor=None):
            Door(Limits(waiting=0)).admit(visitor, 0, False)

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with served(Shut()) as url:
        before = set(tmp_path.glob(f"{PREFIX}*/*"))
        with pytest.raises(AppError, match=r"^The queue is full \(0 are waiting\): try again"):
            Client(url, verbose=False).predict(prompt=PROMPT, api_name="/compare")
        assert set(tmp_path.glob(f"{PREFIX}*/*")) == before, "its folder was taken back"


def test_a_disk_that_takes_nothing_is_said_in_one_sentence_without_the_path(monkeypatch):
    with served(FakeWorker()) as url:
        monkeypatch.setattr(
            "ui.web.served_files.tempfile.mkdtemp", Mock(side_effect=OSError(errno.ENOSPC, "No space left", "/tmp/x"))
        )
        with pytest.raises(
            AppError, match=r"^What is made cannot be kept here, as the disk is full or broken: please tell"
        ):
            Client(url, verbose=False).predict(prompt=PROMPT, api_name="/compare")


def test_what_gradio_keeps_of_each_call_is_bounded(monkeypatch):
    monkeypatch.setattr("ui.page.SESSIONS", 5)
    with served(FakeWorker()) as url:
        for _ in range(12):
            event = httpx.post(f"{url}/gradio_api/call/compare", json={"data": ["a cat"]}).json()["event_id"]
            httpx.get(f"{url}/gradio_api/call/compare/{event}", timeout=30)
        held = [o for o in gc.get_objects() if isinstance(o, StateHolder)]
        # An app that is closed may have had the same port.
        ours = [o for o in held if o.blocks.is_running and f":{o.blocks.server_port}" in url]
        assert max(len(one.session_data) for one in ours) == 5
        assert {len(one.blocks._queue.event_analytics) for one in ours} == {1}, "no statistics of calls"
