"""Identical requests: what was made before comes back as a recording, is never counted as measured, and can be run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio_client import Client

from engine.errors import RequestError
from engine.machine import Machine
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving import command_line
from engine.serving.worker import Worker
from tests.support.fake_engine import LAPTOP, FakeWorker, served
from ui import words

PROMPT = "a rocket on a blue background"


class Device:
    """Makes comparisons by the fake worker."""

    ready = True

    def __init__(self):
        self.machine, self.support, self.runs = Machine(name="a device", kind="cpu"), LAPTOP, 0

    def watch(self, lost):
        pass

    def compare(self, request, out, tell, stop):
        self.runs += 1
        *_, done = FakeWorker().submit(request, out).events()
        return done.comparison

    def gauges(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def make(tmp_path):
    """A worker, what it made of a cheap request, and that request."""
    workers = []

    def made(share=True, **fields):
        workers.append(worker := Worker(("mini-flux",), Device(), share=share))
        request = CompareRequest.create(PROMPT, precisions=["bf16"], **fields)
        assert worker.submit(request, tmp_path / "out").wait(20)
        return worker, request

    yield made
    for worker in workers:
        worker.close()


def test_the_very_same_request_gets_what_was_made_for_it_and_nothing_counts_it_as_measured(make, tmp_path):
    worker, request = make()
    found, folder = worker.earlier(request)
    assert folder == tmp_path / "out" and found == Comparison.load(folder)
    metrics = worker.metrics()
    assert 'twinframe_jobs_total{outcome="completed"} 1' in metrics
    assert 'twinframe_jobs_total{outcome="shared"} 1' in metrics
    assert "twinframe_job_seconds_count 1" in metrics
    assert 'twinframe_latency_seconds_count{model="mini-flux",precision="bf16",stage="total"} 1' in metrics
    assert worker.earlier(CompareRequest.create(PROMPT, precisions=["bf16"], seed=8)) is None


@pytest.mark.parametrize("share", [True, False])
def test_nothing_is_shared_unless_asked_for_nor_where_previews_are_wanted(make, share):
    worker, request = make(share=share, previews=share)
    assert worker.earlier(request) is None


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / "comparison.json").write_text("{")])
def test_what_is_gone_or_damaged_is_run_again(make, tmp_path, damage):
    worker, request = make()
    damage(tmp_path / "out")
    assert worker.earlier(request) is None and worker.earlier(request) is None


@pytest.mark.parametrize(
    ("said", "host", "shares"),
    [("", "127.0.0.1", False), ("", "0.0.0.0", True), ("on", "127.0.0.1", True), ("off", "0.0.0.0", False)],
)
def test_it_is_on_where_the_app_is_public_unless_said_otherwise(monkeypatch, said, host, shares):
    monkeypatch.delenv("SPACE_ID", raising=False)
    args = SimpleNamespace(share=False, host=host)
    assert command_line.shares_results(args, {"TWINFRAME_SHARE_RESULTS": said}) is shares
    with pytest.raises(RequestError, match="must be on or off, not 'yes'"):
        command_line.shares_results(args, {"TWINFRAME_SHARE_RESULTS": "yes"})


def test_the_api_says_that_it_is_recorded_and_runs_it_on_request():
    worker = FakeWorker(share=True)
    with served(worker) as url:
        client = Client(url, verbose=False)
        asked = {"prompt": PROMPT, "precisions": ["bf16"], "num_inference_steps": 2, "api_name": "/compare"}
        first, second = (client.predict(**asked) for _ in range(2))
        third = client.predict(**asked, fresh=True)
    assert "recorded" not in first and second["recorded"] and "recorded" not in third
    assert first["created"] == second["created"] < third["created"] and len(worker.jobs) == 2
    assert Path(second["results"][0]["files"][0]).read_bytes()


def test_the_page_shows_it_with_its_badge_and_generate_runs_it_anew(visit):
    worker = FakeWorker(share=True)
    with served(worker) as url:
        page = visit(url)
        page.get_by_text("MXFP8 · emulated").click()  # bf16 alone with NVFP4, which is quicker
        done = page.locator("#tf-headline .tf-links a[download]").first
        for runs, shared in ((1, False), (1, True), (2, False)):
            page.click("#tf-go")
            page.wait_for_function(
                "(shared) => !document.querySelector('.tf-pulse:not(.tf-warming *)')"
                " && !!document.querySelector('#tf-headline .tf-recorded') === shared",
                arg=shared,
            )
            done.wait_for()
            page.wait_for_selector("#tf-go:not([disabled])")
            assert len(worker.jobs) == runs
            assert (words.run.SHARED in page.inner_text(".tf-verdict")) is shared
        page.wait_for_function("[...document.images].every((image) => image.complete)")
