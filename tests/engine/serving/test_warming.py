"""How far the preload is: what the worker tells, the sentence that is made of it, and the line on the page."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest

from engine import catalog, events
from engine.errors import CancelledRun, LoadError, UnsupportedError
from engine.machine import Machine
from engine.runtime.device import Device
from engine.serving.telemetry import Health, Preload
from engine.serving.worker import Worker
from tests.support.fake_engine import FakeWorker, record, served
from ui import words

SECOND = events.Preparing("mxfp8", 2, 3)


class Kitchen:
    """A device whose preload goes as far as it is let."""

    ready = True

    def __init__(self):
        self.machine = Machine(name="a kitchen", kind="cpu")
        self.support = {name: SimpleNamespace(execution="native", reason="") for name in ("bf16", "mxfp8", "nvfp4")}
        self.go, self.fails = threading.Event(), False

    def watch(self, lost):
        self.lose = lost

    def prepare(self, model_id, tell, stop):
        tell(SECOND)
        tell(events.Warming("mxfp8"))
        while not self.go.wait(0.005):
            if stop():
                raise CancelledRun
        if self.fails:
            raise LoadError("A shard is cut short.")

    def compare(self, request, out, tell, stop):
        return SimpleNamespace(request=request, results=())

    def close(self):
        pass


@pytest.fixture
def kitchen():
    device = Kitchen()
    worker = Worker(("mini-flux", "mini-qwen"), device)
    yield SimpleNamespace(worker=worker, device=device)
    device.go.set()
    worker.close()


def statuses(worker):
    return [(preload.model, preload.status) for preload in worker.preloads()]


def test_a_preload_is_told_while_it_waits_and_runs_and_not_any_more_once_it_is_ready(kitchen, until):
    jobs = [kitchen.worker.preload(name) for name in ("mini-flux", "mini-qwen")]
    until(lambda: kitchen.worker.preloads()[0].doing)
    running, waiting = kitchen.worker.preloads()
    assert (running.status, running.part, running.doing) == ("running", SECOND, events.Warming("mxfp8"))
    assert waiting == Preload(model="mini-qwen")
    kitchen.device.go.set()
    assert all(job.wait(5) for job in jobs)
    until(lambda: statuses(kitchen.worker) == [])
    assert kitchen.worker.health().status == "ready"


def test_one_that_gave_way_waits_again(kitchen, ask, tmp_path, until):
    kitchen.worker.preload("mini-flux")
    until(lambda: statuses(kitchen.worker) == [("mini-flux", "running")])
    gate = threading.Event()
    kitchen.device.compare = lambda request, *_: gate.wait(5) and SimpleNamespace(request=request, results=())
    job = kitchen.worker.submit(ask(), tmp_path)
    until(lambda: statuses(kitchen.worker) == [("mini-flux", "waiting")])
    gate.set()
    assert job.wait(5)
    until(lambda: statuses(kitchen.worker) == [("mini-flux", "running")])


def test_one_that_failed_is_told_until_its_model_was_used_after_all(kitchen, ask, tmp_path, until):
    kitchen.device.fails = True
    kitchen.device.go.set()
    for name in ("mini-flux", "mini-qwen"):
        kitchen.worker.preload(name)
    until(lambda: statuses(kitchen.worker) == [("mini-flux", "failed"), ("mini-qwen", "failed")])
    assert kitchen.worker.health().status == "ready"
    kitchen.worker.submit(ask(), tmp_path).wait(5)
    until(lambda: statuses(kitchen.worker) == [("mini-qwen", "failed")])


def test_a_lost_device_begins_it_again(kitchen, until):
    first = kitchen.worker.preload("mini-flux")
    until(lambda: kitchen.worker.preloads()[0].doing)
    kitchen.device.lose("SIGKILL")
    assert first.wait(5)
    until(lambda: statuses(kitchen.worker) == [("mini-flux", "running")])
    kitchen.device.go.set()
    until(lambda: statuses(kitchen.worker) == [])


def test_with_the_default_size_warm_it_is_ready_and_stays_so(kitchen, until):
    kitchen.device.prepare = lambda model_id, tell, stop: [
        tell(events.Preparing("bf16", 1, 15, (512, 512))),
        tell(SECOND),  # as when it gave way and begins again
        kitchen.device.go.wait(5),
    ]
    kitchen.worker.preload("mini-flux")
    until(lambda: kitchen.worker.preloads()[0].part == SECOND)
    assert kitchen.worker.preloads()[0].ready
    assert kitchen.worker.health().status == "ready"


@pytest.mark.parametrize(("mode", "further"), [("default", 15), ("eager", 0)])
def test_other_offered_sizes_are_warmed_where_each_is_compiled(cache, monkeypatch, mode, further):
    studio, warmed, told = (device := Device("cpu")).studio, [], []

    def warm(rendition, spec, asked, tell, stop):
        warmed.append((rendition, asked.height, asked.width))
        if asked.height == 512:
            raise UnsupportedError("There is no room for that size.")

    monkeypatch.setattr(studio, "rendition", lambda spec, column, tell: column.format)
    monkeypatch.setattr(studio, "mode", lambda *_: mode)
    monkeypatch.setattr(studio, "warm", lambda *args: warm(*args) if len(warmed) >= 3 else warmed.append(args[0]))
    monkeypatch.setattr(studio, "ruler", lambda *_: told.append("ruler"))
    device.prepare("flux.1-dev", told.append, lambda: False)
    assert warmed[:3] == ["bf16", "mxfp8", "nvfp4"] and len(warmed) == 3 + further
    assert all(event.size for event in told[told.index("ruler") + 1 :])
    offered = [(name, *size) for name in warmed[:3] for size in catalog.MODELS["flux.1-dev"].limits.sizes[1:]]
    assert warmed[3:] == offered[:further]


def running(model="flux.1-dev", part=SECOND, doing=None):
    return Preload(model=model, status="running", part=part, doing=doing)


OTHER_SIZE = replace(
    running(part=events.Preparing("nvfp4", 11, 15, (768, 1360)), doing=events.Warming("nvfp4", True)), ready=True
)


@pytest.mark.parametrize(
    ("status", "preloads", "said"),
    [
        ("ready", (), ("", "")),
        ("warming", (running(part=None),), ("Warming up FLUX.1-dev", "starting")),
        ("warming", (running(doing=events.Loading("x")),), ("Warming up FLUX.1-dev", "loading MXFP8, 2 of 3")),
        ("warming", (running(doing=events.Warming("mxfp8")),), (..., "first steps in MXFP8, 2 of 3")),
        ("warming", (running(doing=events.Downloading("x", 2_100_000_000, 33_740_000_000)),), (..., "2.1 of 33.7 GB")),
        ("warming", (running(doing=events.Measuring(0, 3)),), (..., "run 1 of 3")),
        ("warming", (running(doing=events.Warming("mxfp8", True)),), (..., "compiling MXFP8, 2 of 3")),
        ("ready", (OTHER_SIZE,), ("FLUX.1-dev is ready", "compiling NVFP4 at 1360 × 768, 11 of 15")),
        ("warming", (Preload(model="ltx-2"),), ("Warming up LTX-2", "starting")),
        ("busy", (Preload(model="ltx-2", part=SECOND),), ("Warming up LTX-2", "after the comparisons")),
        ("warming", (Preload(model="ltx-2"), running()), ("Warming up FLUX.1-dev", ...)),
        ("ready", (Preload(model="ltx-2", status="failed"),), ("LTX-2 could not be loaded", "tries again")),
        ("warming", (Preload(model="ltx-2", status="failed"), running()), ("Warming up FLUX.1-dev", ...)),
        ("restarting", (running(),), ("The engine is being started again", ...)),
        ("degraded", (), ("The engine has trouble", ...)),
    ],
)
def test_what_is_said_of_it(status, preloads, said):
    for part, wanted in zip(words.warming.said(status, preloads), said, strict=True):
        assert wanted is ... or (wanted in part if wanted else part == "")


def test_the_page_shows_it_until_it_is_over_and_then_asks_no_more(visit, tmp_path):
    worker, asked = FakeWorker(), []
    record(tmp_path / "rocket")
    worker.under_way = (running("mini-flux"),)
    with served(worker, tmp_path) as url:
        page = visit(f"{url}?stage=1", width=390)
        page.on(
            "request",
            lambda request: asked.append(request.url) if request.method == "GET" and "warming" in request.url else None,
        )
        page.get_by_text("Warming up FLUX miniature").wait_for()
        assert "loading MXFP8, 2 of 3" in page.inner_text(".tf-warming")
        worker.under_way = (running("mini-flux", doing=events.Measuring(4, 9)),)
        page.get_by_text("run 5 of 9").wait_for()  # by itself
        page.get_by_role("button", name=words.warming.CLOSE).click()
        assert not page.is_visible(".tf-warming")
        worker.under_way = (Preload(model="mini-flux", status="failed"),)
        page.get_by_text("FLUX miniature could not be loaded").wait_for()  # whatever was hidden before
        before = len(asked)
        page.wait_for_timeout(2500)
        assert len(asked) == before, "nothing is under way, and still it asks"
        worker.under_way = ()
        page.evaluate("document.querySelector('.tf-verdict').append(' A run has ended.')")
        page.locator(".tf-warming").wait_for(state="hidden")


def test_how_far_it_is_can_be_asked_without_a_password_and_names_no_reason():
    worker = FakeWorker()
    worker.health = lambda: Health(status="warming", queue=0, accepting=False)
    worker.under_way = (running(),)
    with served(worker) as url:
        answer = httpx.get(f"{url}/warming")
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    said = {"said": "Warming up FLUX.1-dev", "detail": "loading MXFP8, 2 of 3", "again": True}
    assert answer.json() == said
