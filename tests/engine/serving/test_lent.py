"""A card that is lent for one call: in a fork, as ZeroGPU does it, and in this process where it lends none."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from engine import events
from engine.environment import lends_cards
from engine.errors import CancelledRun, FaultError, LoadError, RefusedError
from engine.request import CompareRequest
from engine.serving.lent import SECONDS, Lent
from tests.support.running import ROOT, running
from tests.support.stand_in import StandIn

FOLDER = Path(__file__).parents[2] / "support" / "zero_gpu"


class Placing(StandIn):
    """Counts what is placed and learnt, and is in the process that asks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.placed, self.recalled = [], 0

    def place(self, model_id):
        if model_id == "missing":
            raise LoadError("The weights of missing are missing.")
        self.placed.append(model_id)

    def recall(self):
        self.recalled += 1

    def prove(self, tell, stop):
        tell(events.Proved())

    def compare(self, request, out, tell, stop):
        (out / "process").write_text(str(os.getpid()))
        return super().compare(request, out, tell, stop)


@pytest.fixture
def spaces(monkeypatch):
    """The stand-in, as `import spaces` finds it."""
    found = importlib.util.spec_from_file_location("spaces", FOLDER / "spaces.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "spaces", module)
    return module


@pytest.fixture(params=["fork", "plain"])
def lent(request, spaces, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "true" if request.param == "fork" else "")
    return Lent(["mini-flux"], make=Placing)


@pytest.fixture
def forking(spaces, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    return Lent(make=Placing)


def asked(prompt="a cat", steps=4):
    return CompareRequest.create(prompt, num_inference_steps=steps)


def test_what_a_run_tells_and_gives_comes_across(lent, spaces, tmp_path, request):
    told = []
    made = lent.compare(asked(), tmp_path, told.append, lambda: False)
    assert made.request == asked() and [event.index for event in told] == [1, 2, 3, 4]
    here = int((tmp_path / "process").read_text()) == os.getpid()
    assert here == ("plain" in request.node.name)
    assert spaces.asked == [SECONDS] and lent.ready


def test_models_are_placed_in_this_process_before_anything_runs(lent, tmp_path):
    assert lent._device.placed == ["mini-flux"]
    lent.compare(asked(), tmp_path, lambda event: None, lambda: False)
    lent.prepare("mini-qwen", told := [].append, lambda: False)
    lent.prepare("mini-qwen", told, lambda: False)
    assert lent._device.placed == ["mini-flux", "mini-qwen"]


def test_a_model_that_cannot_be_placed_fails_its_own_comparison_alone(spaces, tmp_path):
    lent = Lent(["missing", "mini-flux"], make=Placing)
    assert lent._device.placed == ["mini-flux"]
    with pytest.raises(LoadError, match="of missing are missing"):
        lent.prepare("missing", lambda event: None, lambda: False)


def test_what_nobody_wants_ends_within_two_steps(lent, tmp_path):
    told = []
    with pytest.raises(CancelledRun):
        lent.compare(asked(steps=50), tmp_path, told.append, lambda: bool(told))
    assert len(told) <= 2 and not (tmp_path / "bf16.png").exists()
    lent.compare(asked(), tmp_path, lambda event: None, lambda: False)


@pytest.mark.parametrize(
    ("prompt", "kind", "said"),
    [
        ("mistake", LoadError, "The file x is missing."),
        ("fault", FaultError, "Out of memory."),
        ("bug", FaultError, "The engine failed (ZeroDivisionError): its log says more; please retry."),
    ],
)
def test_a_failure_comes_across_in_its_own_words(lent, tmp_path, prompt, kind, said):
    with pytest.raises(kind) as raised:
        lent.compare(asked(prompt), tmp_path, lambda event: None, lambda: False)
    assert str(raised.value) == said
    assert ("nobody foresaw" in raised.value.trace) == (prompt == "bug") if kind is FaultError else True


def test_a_fork_that_is_killed_fails_one_run(forking, tmp_path):
    with pytest.raises(RefusedError, match=r"could not be used \(GPU task aborted\): please retry later\."):
        forking.compare(asked("killed"), tmp_path, lambda event: None, lambda: False)
    assert forking.compare(asked(), tmp_path, lambda event: None, lambda: False)


def test_where_no_card_is_lent_the_packages_words_are_told(forking, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_CARD", "1")
    with pytest.raises(RefusedError, match=r"used \(ZeroGPU quota exceeded\. Try again in 1:00:00\): please"):
        forking.compare(asked(), tmp_path, lambda event: None, lambda: False)


def test_what_a_fork_found_out_of_the_machine_is_learnt_here(lent):
    lent.prove(lambda event: None, lambda: False)
    assert lent._device.recalled == 1


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", None)
    with pytest.raises(LoadError, match=r"package spaces is missing: add it to requirements\.txt\."):
        Lent(make=Placing)


@pytest.mark.parametrize(("said", "lends"), [("true", True), ("1", True), ("", False), ("false", False)])
def test_the_environment_decides(said, lends):
    assert lends_cards({"SPACES_ZERO_GPU": said}) == lends and not lends_cards({})


def test_questions_are_answered_in_this_process(lent):
    assert lent.machine.name == f"stand-in {os.getpid()}" and lent.examine()[0].topic == "Device"
    assert lent.about_weights("mini-flux") == str(os.getpid()) and lent.gauges() == {}


def test_the_whole_app_serves_page_and_comparison_from_forks(tmp_path):
    """With the real miniature on the CPU, as no card is lent here. One thread: OpenMP's do not outlive a fork."""
    path = f"{FOLDER}{os.pathsep}{ROOT}"
    with running(tmp_path, SPACES_ZERO_GPU="true", PYTHONPATH=path, OMP_NUM_THREADS="1", SPACE_ID="") as app:
        assert app.client.get("/").status_code == 200
        kind, (answer, *_) = app.compare()
        assert kind == "complete" and answer["results"][0]["execution"] == "native"
        assert [line for line in app.said() if line["level"] == "error"] == []
