"""The device in a child process: what happens to it happens to one request, and the next one is served."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import events
from engine.errors import FaultError, UnsupportedError
from engine.request import CompareRequest
from engine.serving import process
from engine.serving.process import Process
from engine.serving.worker import Worker
from tests.support import stand_in

ROOT = Path(__file__).resolve().parents[3]


def ask(prompt="a cat", steps=4):
    return CompareRequest.create(prompt, num_inference_steps=steps)


def ending(job):
    *_, last = job.events()
    return last


@pytest.fixture
def device():
    device = Process("cpu", make=stand_in.make)
    yield device
    device.close()


@pytest.fixture
def worker(device):
    worker = Worker(("mini-flux",), device)
    yield worker
    worker.close()


def test_events_and_result_come_through_from_another_process(worker, tmp_path):
    *told, last = worker.submit(ask(), tmp_path).events()
    assert [event.index for event in told if isinstance(event, events.Step)] == [1, 2, 3, 4]
    assert last.comparison.request == ask() and last.comparison.device != f"stand-in {os.getpid()}"
    assert (tmp_path / "bf16.png").read_bytes() == b"whole"


def test_the_parent_does_without_torch():
    code = (
        "import sys, app, ui.page; from engine.serving import process, worker; from engine.weights import source;"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "set()\n"


@pytest.mark.parametrize(
    ("prompt", "sentence", "kind"),
    [
        ("killed", "(SIGKILL) and is being started again: please retry in a minute.", "ProcessLost"),
        ("segfault", "(SIGSEGV) and is being started again", "ProcessLost"),
        ("bug", "(exit 1) and is being started again", "ProcessLost"),
        ("spoilt", "The device failed (AcceleratorError).", "AcceleratorError"),
    ],
)
def test_what_ends_the_child_fails_one_request_and_the_next_runs_in_another(
    worker, tmp_path, until, prompt, sentence, kind
):
    preload = worker.preload("mini-flux")
    assert ending(preload) == events.Prepared("mini-flux")
    first = ending(worker.submit(ask(), tmp_path / "a")).comparison
    failed = ending(worker.submit(ask(prompt), tmp_path / "b"))
    assert sentence in failed.reason and len(failed.reason.splitlines()) == 1
    assert list((tmp_path / "b").iterdir()) == [], "nothing half written"
    until(lambda: worker.health().status == "ready")
    second = ending(worker.submit(ask(), tmp_path / "c")).comparison
    assert second.device != first.device
    assert second.created == "['mini-flux']", "loaded again"
    assert f'twinframe_faults_total{{type="{kind}"}} 1' in worker.metrics()
    assert "twinframe_engine_restarts 1" in worker.metrics()


def test_what_waits_runs_in_the_next_child(worker, tmp_path):
    jobs = [worker.submit(ask(prompt), tmp_path / prompt) for prompt in ("killed", "a cat", "a dog")]
    assert [type(ending(job)) for job in jobs] == [events.Failed, events.Completed, events.Completed]


def test_a_child_that_dies_while_nothing_runs_is_replaced(worker, device, tmp_path, until):
    first = device._child.pid
    assert worker.machine
    os.kill(first, signal.SIGKILL)
    until(lambda: device._child.pid != first)
    assert worker.health().status in ("restarting", "ready")
    assert isinstance(ending(worker.submit(ask(), tmp_path)), events.Completed)


@pytest.mark.parametrize("prompt", ["fault", "mistake"])
def test_what_leaves_the_device_usable_leaves_the_child(worker, device, tmp_path, prompt):
    child = device._child
    assert isinstance(ending(worker.submit(ask(prompt), tmp_path)), events.Failed)
    assert isinstance(ending(worker.submit(ask(), tmp_path)), events.Completed)
    assert device._child is child


def test_three_faults_in_a_row_start_it_again(worker, device, tmp_path, until):
    child = device._child
    for _ in range(3):
        assert isinstance(ending(worker.submit(ask("fault"), tmp_path)), events.Failed)
    until(lambda: device._child is not child)
    assert isinstance(ending(worker.submit(ask(), tmp_path)), events.Completed)
    until(lambda: worker.health().status == "ready")


def test_cancelling_ends_within_a_step(worker, tmp_path):
    job, steps = worker.submit(ask(steps=50), tmp_path), []
    for event in job.events():
        if isinstance(event, events.Step):
            steps.append(event.index)
            if event.index == 3:
                job.cancel()
    assert isinstance(job.ending, events.Cancelled)
    assert steps[-1] <= 3 + 1 + process.POLL_SECONDS / stand_in.STEP_SECONDS


def test_a_child_that_hangs_is_ended_some_time_after_nobody_wants_it(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "HUNG_SECONDS", 0.2)
    job = worker.submit(ask("hang"), tmp_path)
    for event in job.events():
        if isinstance(event, events.Step) and event.index == 2:
            job.cancel()
    assert "hung" in job.ending.reason
    assert isinstance(ending(worker.submit(ask(), tmp_path)), events.Completed)


def test_questions_are_answered_beside_what_runs_and_kept_where_they_never_change(worker, tmp_path):
    job = worker.submit(ask(steps=50), tmp_path)
    began = time.monotonic()
    answers = {str(worker.recipes("mini-flux")) for _ in range(50)}
    assert len(answers) == 1 and time.monotonic() - began < 0.5
    assert not job.wait(0)
    assert "twinframe_device_memory_allocated_bytes 17" in worker.metrics()
    job.cancel()


def test_a_question_that_ends_the_child_fails_in_one_sentence(device):
    with pytest.raises(FaultError, match=r"\(exit 4\)"):
        device.about_weights("die")
    assert device.about_weights("mini-flux")


def test_no_such_device():
    device = Process("banana", make=stand_in.make)
    with pytest.raises(UnsupportedError, match="no device 'banana'"):
        assert device.machine
    device.close()


def test_a_child_that_does_not_start_is_said_so_and_tried_again(tmp_path, monkeypatch, until):
    monkeypatch.setattr(process, "AGAIN_SECONDS", (0.05, 0.1))
    repaired = tmp_path / "repaired"
    device = Process(str(repaired), make=stand_in.born_once)
    worker = Worker(("mini-flux",), device)
    assert isinstance(ending(worker.submit(ask(), tmp_path)), events.Completed)
    failed = ending(worker.submit(ask("killed"), tmp_path))
    assert "(SIGKILL)" in failed.reason
    assert "does not start (exit 5)" in ending(worker.submit(ask(), tmp_path)).reason
    assert worker.health().status == "restarting"
    repaired.touch()
    until(lambda: worker.health().status == "ready")
    assert isinstance(ending(worker.submit(ask(), tmp_path)), events.Completed)
    worker.close()


@pytest.mark.gpu
def test_a_context_that_is_really_spoilt(tmp_path):
    if not Path("/dev/nvidia0").exists():
        pytest.skip("needs a CUDA device")
    worker = Worker(("mini-flux",), Process("cuda", make=stand_in.spoilt))
    assert ending(worker.submit(ask(), tmp_path)).comparison.created == "1.0"
    failed = ending(worker.submit(ask("spoil it"), tmp_path))
    assert "is being started again" in failed.reason and len(failed.reason.splitlines()) == 1
    assert ending(worker.submit(ask(), tmp_path)).comparison.created == "1.0"
    assert "twinframe_engine_restarts 1" in worker.metrics()
    worker.close()


def test_closing_ends_the_child_at_once_even_one_that_hangs(tmp_path, until):
    device = Process("cpu", make=stand_in.make)
    worker = Worker(("mini-flux",), device)
    job = worker.submit(ask("hang"), tmp_path)
    steps = (event for event in job.events() if isinstance(event, events.Step) and event.index == 2)
    next(steps)
    closing = threading.Thread(target=device.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive() and device._child._process.exitcode is not None
    worker.close()


def test_the_child_ends_with_its_parent(tmp_path, until):
    code = (
        "import time; from engine.serving.process import Process; from tests.support import stand_in\n"
        "if __name__ == '__main__':\n"
        "    device = Process('cpu', make=stand_in.make)\n"
        "    print(device._child.pid, device.machine, flush=True)\n"
        "    time.sleep(60)"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        child = int(parent.stdout.readline().split()[0])
        parent.kill()
    until(lambda: not _runs(child), 10)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
