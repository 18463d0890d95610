"""A few hundred malformed and hostile requests; `python -m tests.support.load hostile` sends thousands to the real
app."""

import json

import httpx
import pytest

from tests.support.fake_engine import FakeWorker, served
from tests.support.hostile import SECRET, Findings, Hostile, routes, send
from ui.web import bodies


@pytest.fixture(scope="module")
def app():
    with served(FakeWorker()) as url:
        yield url


def test_hostile_requests_end_in_clean_refusals(app, tmp_path, logged):
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    findings = send(app, Hostile(canary), range(400))
    assert findings.failures == []
    assert findings.calls > 350 and findings.answers["4xx"] > 200
    assert [record.getMessage() for record in logged() if record.levelname == "ERROR"] == []
    assert httpx.get(f"{app}/health").status_code == 200


def test_the_routes_are_gradios_own_and_ours():
    found = {path for _, path in routes()}
    assert {
        "/health",
        "/gradio_api/call/compare",
        "/gradio_api/queue/join",
        "/gradio_api/file={path_or_url:path}",
    } < found
    assert len(found) > 50


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe", "must be JSON"),
        (b"{", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b'{"data": [NaN]}', "finite"),
        (b'{"data": [1e999]}', "finite"),
        (b'"text"', "must be a JSON object"),
        (b'{"data": "text"}', "data must be a list"),
        (b'{"fn_index": "1"}', "fn_index must be a whole number"),
        (b'{"fn_index": true}', "fn_index must be a whole number"),
        (b'{"session_hash": {}}', "session_hash must be text"),
        (b'{"data": ["\\ud800"]}', "characters that are not text"),
        (json.dumps({"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}).encode(), "no files"),
        (json.dumps({"data": [[{"url": "http://127.0.0.1/"}]]}).encode(), "no files"),
        (b'{"data": ' + b"[" * 50 + b"]" * 50 + b"}", "nested"),
    ],
)
def test_a_body_that_gradio_would_trip_over_is_refused(app, content, sentence):
    assert sentence in bodies.wrong(content)
    for route in ("call/compare", "queue/join", "run/predict", "cancel"):
        answer = httpx.post(f"{app}/gradio_api/{route}", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 422 and sentence in answer.json()["detail"]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"data": ["a cat", null, ["bf16"], 7, 1.5]}', b'{"data": {"prompt": ""}}']
)
def test_what_the_page_and_its_clients_send_passes(content):
    assert bodies.wrong(content) is None


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("call/v2/compare", {"nonsense": 1}, 422),
        ("run/predict", {"data": [], "fn_index": 999}, 404),
        ("queue/join", {"data": [], "fn_index": -1, "session_hash": "x"}, 404),
        ("call/" + "x" * 300, {"data": []}, 404),
    ],
)
def test_what_gradio_would_answer_with_500(app, path, body, status):
    answer = httpx.post(f"{app}/gradio_api/{path}", json=body)
    assert (answer.status_code, set(answer.json())) == (status, {"detail"})


def test_a_component_that_is_sent_nonsense_is_the_senders_mistake(app, logged):
    config = httpx.get(f"{app}/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    quick = [d for d in config["dependencies"] if d["queue"] is False and "dataset" in map(kinds.get, d["inputs"])]
    body = {"data": ["nonsense"], "fn_index": quick[0]["id"], "session_hash": "x"}
    assert httpx.post(f"{app}/gradio_api/run/predict", json=body).status_code == 422
    assert [record.levelname for record in logged() if record.name == "ui.web.middleware"] == []


def test_health_may_say_that_the_queue_is_full_and_nothing_else_may_answer_503():
    findings = Findings()
    findings.note("GET", "/health", 503, '{"status": "busy", "queue": 20}')
    assert findings.failures == []
    findings.note("GET", "/gradio_api/info", 503, '{"status": "busy", "queue": 20}')
    findings.note("GET", "/health", 503, "Service Unavailable")
    assert findings.failures == ["GET /gradio_api/info: answered 503", "GET /health: answered 503"]
