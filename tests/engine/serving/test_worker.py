"""The worker's queue: one job at a time, cancelling, failures, preloading; with the real miniature where it matters."""

import json
import threading
import time
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import httpx
import pytest
import torch

from engine import catalog, events, files
from engine.columns import Column
from engine.errors import CancelledRun, LoadError, OutputError, RefusedError, RequestError, UnsupportedError
from engine.logs import OneLine
from engine.runtime.device import Device
from engine.serving.admission import Door, Limits, Visitor
from engine.serving.worker import Worker
from tests.support.fake_engine import served


def read(job):
    return list(job.events())


def kinds(stream):
    return [type(event).__name__ for event in stream]


@pytest.fixture
def stub(cache, monkeypatch):
    """A worker whose studio does nothing but wait at a gate, so that the queue can be looked at."""
    worker = Worker(("mini-flux",), Device("cpu"))
    gate, began = threading.Semaphore(0), []

    def compare(request, out, tell, stop):
        began.append(request.seed)
        while not gate.acquire(timeout=0.005):
            if stop():
                raise CancelledRun
        return SimpleNamespace(seed=request.seed, request=request, results=())

    monkeypatch.setattr(worker.device.studio, "compare", compare)
    yield SimpleNamespace(worker=worker, gate=gate, began=began, studio=worker.device.studio)
    worker.close()


def test_queued_positions_count_down(stub, ask, tmp_path, until):
    jobs = [stub.worker.submit(ask(seed=0), tmp_path)]
    until(lambda: stub.began == [0])
    jobs += [stub.worker.submit(ask(seed=i), tmp_path) for i in (1, 2)]
    stub.gate.release(3)
    streams = [read(job) for job in jobs]
    positions = [[e.position for e in stream if isinstance(e, events.Queued)] for stream in streams]
    assert positions[0][0] == 0
    assert positions[1][0] == 1 and positions[1][-1] == 0
    assert positions[2][0] == 2 and positions[2][-1] == 0
    assert all(p == sorted(p, reverse=True) for p in positions)
    assert stub.began == [0, 1, 2]
    assert [stream[-1].comparison.seed for stream in streams] == [0, 1, 2]


def test_each_stream_ends_with_exactly_one_terminal_event(stub, ask, tmp_path):
    stub.gate.release()
    done, cancelled = stub.worker.submit(ask(seed=0), tmp_path), stub.worker.submit(ask(seed=1), tmp_path)
    cancelled.cancel()
    for job, kind in ((done, events.Completed), (cancelled, events.Cancelled)):
        stream = read(job)
        assert isinstance(stream[-1], kind)
        assert sum(isinstance(e, events.TERMINAL) for e in stream) == 1
        assert job.wait(5)
        job.cancel()  # harmless by now
        assert job._events.empty()


def test_a_job_cancelled_while_queued_never_runs(stub, ask, tmp_path, until):
    first = stub.worker.submit(ask(seed=0), tmp_path)
    until(lambda: stub.began == [0])
    second, third = (stub.worker.submit(ask(seed=i), tmp_path) for i in (1, 2))
    second.cancel()
    stub.gate.release(2)
    assert kinds(read(second))[-1] == "Cancelled"
    assert kinds(read(first))[-1] == kinds(read(third))[-1] == "Completed"
    assert stub.began == [0, 2]


def test_a_job_cancelled_while_queued_hears_so_at_once(stub, ask, tmp_path, until):
    first = stub.worker.submit(ask(seed=0), tmp_path)
    until(lambda: stub.began == [0])
    second = stub.worker.submit(ask(seed=1), tmp_path)
    second.cancel()
    heard = second.wait(5)
    assert not first.wait(0)
    assert heard, "it waited for the job before it"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LoadError("The file x is missing."), "The file x is missing."),
        (OutputError("Cannot write y."), "Cannot write y."),
        (ZeroDivisionError("inner detail"), "ZeroDivisionError"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "memory"),
    ],
)
def test_a_job_that_raises_fails_in_one_sentence_and_the_next_one_runs(
    stub, ask, tmp_path, monkeypatch, error, sentence
):
    with monkeypatch.context() as patch:

        def fail(*_):
            raise error

        patch.setattr(stub.studio, "compare", fail)
        stream = read(stub.worker.submit(ask(), tmp_path))
    assert kinds(stream) == ["Queued", "Failed"]
    assert sentence in stream[-1].reason and "inner detail" not in stream[-1].reason
    assert len(stream[-1].reason.splitlines()) == 1 and stream[-1].reason.endswith(".")
    stub.gate.release()
    assert kinds(read(stub.worker.submit(ask(), tmp_path)))[-1] == "Completed"


def test_an_unavailable_precision_is_refused_with_its_reason(stub, ask, tmp_path, monkeypatch):
    gone = replace(stub.studio.support["nvfp4"], execution="unavailable", reason="No tensor cores here.", gemm="")
    monkeypatch.setitem(stub.studio.support, "nvfp4", gone)
    with pytest.raises(UnsupportedError, match=r"^No tensor cores here\.$"):
        stub.worker.submit(ask(precisions=["mxfp8", "nvfp4"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stub.gate.release()
    assert kinds(read(stub.worker.submit(ask(precisions=["mxfp8"]), tmp_path / "out")))[-1] == "Completed"


def test_a_model_that_is_not_offered_here(cache, ask, tmp_path):
    worker = Worker((), Device("cpu"))
    with pytest.raises(UnsupportedError, match="mini-flux is not offered here"):
        worker.submit(ask(), tmp_path)
    worker.close()
    with pytest.raises(RequestError, match="no model 'maxi-flux'"):
        Worker(("maxi-flux",), Device("cpu"))


@pytest.mark.parametrize("device", ["cuda:99", "meta", "mps", "banana"])
def test_a_device_that_is_not_there(cache, device):
    with pytest.raises(UnsupportedError) as caught:
        Device(device)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_cannot_be_written(stub, ask, tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match=r"Cannot write into ") as caught:
            stub.worker.submit(ask(), folder)
        assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"
    assert stub.began == []


def test_a_missing_folder_is_made_and_left_empty(tmp_path):
    files.writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Preloading


@pytest.fixture
def warming(stub, monkeypatch):
    """Preloading that waits at each precision until it is let go or must give way."""
    go, log = threading.Event(), []

    def warm(rendition, spec, request, tell, stop):
        log.append(f"warm {rendition}")
        while not go.wait(0.005):
            if stop():
                raise CancelledRun

    monkeypatch.setattr(stub.studio, "rendition", lambda spec, column, tell: column.format)
    monkeypatch.setattr(stub.studio, "warm", warm)
    monkeypatch.setattr(stub.studio, "ruler", lambda *_: log.append("ruler"))
    return SimpleNamespace(go=go, log=log)


def test_preloading_gives_way_and_then_goes_on(stub, warming, ask, tmp_path, until):
    preload = stub.worker.preload("mini-flux")
    until(lambda: warming.log == ["warm bf16"])
    stub.gate.release()
    stream = read(stub.worker.submit(ask(seed=5), tmp_path))
    assert isinstance(stream[-1], events.Completed)
    assert set(stream[:-1]) == {events.Queued(0)}  # what runs in the background is nobody's place in the queue
    assert not preload.wait(0)
    warming.go.set()
    assert read(preload)[-1] == events.Prepared("mini-flux")
    assert warming.log == ["warm bf16", "warm bf16", "warm mxfp8", "warm nvfp4", "ruler"]


def test_preloading_waits_until_nobody_wants_anything(stub, warming, ask, tmp_path, until):
    warming.go.set()
    jobs = [stub.worker.submit(ask(seed=0), tmp_path)]
    until(lambda: stub.began == [0])
    preload = stub.worker.preload("mini-flux")
    jobs.append(stub.worker.submit(ask(seed=1), tmp_path))
    stub.gate.release()
    until(lambda: stub.began == [0, 1])
    assert warming.log == []
    stub.gate.release()
    assert all(kinds(read(job))[-1] == "Completed" for job in jobs)
    assert kinds(read(preload))[-1] == "Prepared"


def test_a_preload_can_be_cancelled(stub, warming, until):
    preload = stub.worker.preload("mini-flux")
    until(lambda: warming.log)
    preload.cancel()
    assert kinds(read(preload))[-1] == "Cancelled"


def test_preloading_an_unknown_model(stub):
    with pytest.raises(RequestError, match="no model 'maxi-flux'"):
        stub.worker.preload("maxi-flux")


# ---------------------------------------------------------------------------------------------------------------------
# The door, the wait, the health and the log


ANN, BOB = Visitor(session="ann", address="10.0.0.1"), Visitor(session="bob", address="10.0.0.2")


def limited(stub, **limits):
    stub.worker._door = Door(Limits(**limits))


def test_a_visitor_has_one_comparison_at_a_time(stub, ask, tmp_path, until):
    first = stub.worker.submit(ask(seed=0), tmp_path, ANN)
    until(lambda: stub.began == [0])
    with pytest.raises(RefusedError, match="already have a comparison"):
        stub.worker.submit(ask(seed=1), tmp_path, ANN)
    waiting = stub.worker.submit(ask(seed=2), tmp_path, BOB)
    with pytest.raises(RefusedError, match="already have a comparison"):
        stub.worker.submit(ask(seed=3), tmp_path, BOB)
    waiting.cancel()
    stub.worker.submit(ask(seed=4), tmp_path, BOB)
    stub.gate.release(2)
    assert kinds(read(first))[-1] == "Completed"
    stub.worker.submit(ask(seed=5), tmp_path, ANN)


def test_the_queue_is_bounded_and_a_cancelled_job_gives_its_place_back(stub, ask, tmp_path, until):
    limited(stub, waiting=2)
    stub.worker.submit(ask(seed=0), tmp_path)
    until(lambda: stub.began == [0])
    jobs = [stub.worker.submit(ask(seed=i), tmp_path) for i in (1, 2)]
    with pytest.raises(RefusedError, match="queue is full"):
        stub.worker.submit(ask(seed=3), tmp_path)
    assert not stub.worker.health().accepting
    jobs[0].cancel()
    stub.worker.submit(ask(seed=4), tmp_path)
    assert 'twinframe_jobs_total{outcome="refused"} 1' in stub.worker.metrics()
    assert "twinframe_queue_length 2" in stub.worker.metrics()


def test_who_waits_hears_how_long_and_again_every_second(stub, ask, tmp_path, until, monkeypatch):
    monkeypatch.setattr("engine.serving.worker.TICK_SECONDS", 0.05)
    stub.worker._durations.extend((10.0, 20.0))
    running = stub.worker.submit(ask(seed=0), tmp_path)
    until(lambda: stub.began == [0])
    stream = stub.worker.submit(ask(seed=1), tmp_path).events()
    waits = [next(stream) for _ in range(3)]
    assert [w.position for w in waits] == [1, 1, 1]
    assert 15 >= waits[0].seconds > waits[1].seconds > waits[2].seconds > 10
    running.cancel()
    until(lambda: stub.began == [0, 1])


def test_a_job_beyond_its_deadline_ends_in_one_sentence_and_the_next_one_runs(stub, ask, tmp_path):
    limited(stub, deadline=0.1)
    (*_, ending) = read(stub.worker.submit(ask(), tmp_path))
    assert ending.reason == (
        "It took longer than the 0.1 s that a comparison may take here: choose fewer steps, precisions or frames."
    )
    assert 'twinframe_jobs_total{outcome="late"} 1' in stub.worker.metrics()
    limited(stub)
    stub.gate.release()
    assert kinds(read(stub.worker.submit(ask(), tmp_path)))[-1] == "Completed"


def test_health_tells_ready_busy_warming_degraded_and_stopping(stub, warming, ask, tmp_path, until, monkeypatch):
    def status():
        return stub.worker.health().status

    assert status() == "ready"
    stub.worker.preload("mini-flux")
    until(lambda: warming.log)
    assert (status(), stub.worker.health().accepting) == ("warming", False)
    job = stub.worker.submit(ask(seed=0), tmp_path)
    until(lambda: stub.began == [0])
    assert status() == "busy"
    warming.go.set()
    stub.gate.release()
    read(job)
    until(lambda: status() == "ready")
    with monkeypatch.context() as patch:
        patch.setattr(stub.studio, "compare", lambda *_: 1 / 0)
        for _ in range(3):
            assert status() == "ready", "one fault may have been that request's"
            read(stub.worker.submit(ask(), tmp_path))
            until(lambda: stub.worker._cards[0].running is None)
    assert (status(), stub.worker.health().accepting) == ("degraded", False)
    assert 'twinframe_faults_total{type="ZeroDivisionError"} 3' in stub.worker.metrics()
    stub.gate.release()
    read(stub.worker.submit(ask(), tmp_path))
    until(lambda: status() == "ready")
    stub.worker.close()
    assert status() == "stopping"


@pytest.mark.parametrize("wanted", [False, True])
def test_the_log_names_the_job_and_its_prompt_only_if_wanted(
    stub, ask, tmp_path, caplog, logged, monkeypatch, until, wanted
):
    monkeypatch.setenv("TWINFRAME_LOG_PROMPTS", str(int(wanted)))
    caplog.set_level("INFO", logger="engine")
    monkeypatch.setattr(stub.studio, "compare", lambda *_: 1 / 0)
    read(stub.worker.submit(ask(prompt="a secret"), tmp_path))
    until(lambda: len(logged()) == 2)
    failed, ended = (json.loads(OneLine().format(record)) for record in logged())
    assert "ZeroDivisionError" in failed["traceback"] and failed["job"] == ended["job"]
    assert (ended["outcome"], ended["model"]) == ("fault", "mini-flux")
    assert (ended.get("prompt") == failed.get("prompt") == "a secret") is wanted
    assert ("a secret" in json.dumps([failed, ended])) is wanted


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(stub, ask, tmp_path, until):
    running = stub.worker.submit(ask(seed=0), tmp_path)
    until(lambda: stub.began == [0])
    with served(stub.worker) as url:
        data = ["a cat", None, None, 1, *[None] * 8]
        event = httpx.post(f"{url}/gradio_api/call/compare", json={"data": data}).json()["event_id"]
        with httpx.stream("GET", f"{url}/gradio_api/call/compare/{event}") as stream:
            assert any("1 ahead" in line for line in stream.iter_lines())
            assert httpx.get(f"{url}/health").json() == {"status": "busy", "queue": 1}
        until(lambda: stub.worker.health().queue == 0, 10)
        assert not running.wait(0)
        running.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Closing


def test_closing_cancels_what_runs_and_waits_and_ends_the_thread(stub, ask, tmp_path, until):
    jobs = [stub.worker.submit(ask(seed=i), tmp_path) for i in range(3)]
    until(lambda: stub.began == [0])
    stub.worker.close()
    assert not stub.worker._cards[0].thread.is_alive()
    assert all(kinds(read(job))[-1] == "Cancelled" for job in jobs)
    assert stub.began == [0]
    with pytest.raises(RefusedError, match="shutting down"):
        stub.worker.submit(ask(), tmp_path)
    stub.worker.close()  # a second time is harmless


def test_closing_with_grace_lets_the_running_job_end(stub, ask, tmp_path, until):
    running, waiting = (stub.worker.submit(ask(seed=i), tmp_path) for i in range(2))
    until(lambda: stub.began == [0])
    closing = threading.Thread(target=stub.worker.close, args=(30,))
    closing.start()
    assert kinds(read(waiting))[-1] == "Cancelled"
    with pytest.raises(RefusedError, match="shutting down"):
        stub.worker.submit(ask(), tmp_path)
    stub.gate.release()
    assert kinds(read(running))[-1] == "Completed"
    closing.join(5)
    assert not closing.is_alive() and stub.began == [0]


def test_closing_ends_a_running_preload(stub, warming, until):
    preload = stub.worker.preload("mini-flux")
    until(lambda: warming.log)
    stub.worker.close()
    assert kinds(read(preload))[-1] == "Cancelled"


def test_closing_ends_a_waiting_preload(stub, ask, tmp_path, until):
    stub.worker.submit(ask(seed=0), tmp_path)
    until(lambda: stub.began == [0])
    preload = stub.worker.preload("mini-flux")
    stub.worker.close()
    assert preload.wait(5), "whoever reads its events waits for ever"
    assert kinds(read(preload))[-1] == "Cancelled"


def test_closing_an_idle_worker_takes_no_time(cache):
    worker = Worker(("mini-flux",), Device("cpu"))
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 10 and not worker._cards[0].thread.is_alive()


# ---------------------------------------------------------------------------------------------------------------------
# The real miniature


def test_cancelling_in_mid_run_stops_within_a_step_and_the_next_job_runs(worker, ask, tmp_path):
    job, stream = worker.submit(ask(precisions=["bf16"], num_inference_steps=50), tmp_path / "a"), []
    for event in job.events():
        stream.append(event)
        if isinstance(event, events.Step) and event.index == 2:
            job.cancel()
    assert isinstance(stream[-1], events.Cancelled)
    assert max(e.index for e in stream if isinstance(e, events.Step)) <= 4
    assert list((tmp_path / "a").iterdir()) == []
    pipeline = worker.device.studio.rendition(catalog.MINI_FLUX, Column.of("bf16", "post"), lambda _: None).pipeline
    assert "encode_prompt" not in vars(pipeline) and "decode" not in vars(pipeline.vae)  # no clock left behind
    stream = read(worker.submit(ask(precisions=["bf16"]), tmp_path / "b"))
    assert isinstance(stream[-1], events.Completed)


def test_after_a_preload_nothing_is_left_to_load(worker, ask, tmp_path, monkeypatch):
    quick = replace(catalog.MINI_FLUX.defaults, num_inference_steps=4, guidance_scale=1.0)
    spec = replace(catalog.MINI_FLUX, defaults=quick)
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({spec.id: spec}))
    assert read(worker.preload("mini-flux"))[-1] == events.Prepared("mini-flux")
    stream = read(worker.submit(ask(seed=3), tmp_path))
    assert isinstance(stream[-1], events.Completed)
    assert not any(isinstance(e, events.Loading | events.Warming | events.Measuring) for e in stream)
