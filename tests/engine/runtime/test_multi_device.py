"""Several devices at work at once: on a CPU named twice, and on two GPUs where there are two."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import app
from engine import __main__ as cli
from engine import events
from engine.errors import CancelledRun, FaultError, UnsupportedError
from engine.quantization import capability
from engine.request import CompareRequest
from engine.results import Comparison
from engine.runtime import multi_device, pipeline
from engine.runtime.device import Device
from engine.runtime.studio import Studio
from engine.serving import command_line
from engine.serving.process import Process
from ui import view, words
from ui.html import cards

STEPS = 6
TOGETHER = {"cpu,cpu": [{"bf16", "mxfp8"}, {"nvfp4"}], "cpu,cpu,cpu": [{"bf16", "mxfp8", "nvfp4"}]}
"""Devices -> what is made at once, round by round."""
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def on(spec):
    """The device or devices of a name, each loaded once."""
    made = {}
    return lambda name: made.setdefault(name, Device(name))


@pytest.fixture(scope="module")
def run(on, spec, tmp_path_factory):
    """Carry out a comparison on devices."""

    def carry_out(devices, stop=lambda: False, steps=STEPS, **asked):
        told, out = [], tmp_path_factory.mktemp("out")
        request = CompareRequest.create("a cat", model=spec.id, num_inference_steps=steps, **asked)
        comparison = on(devices).compare(request, out, told.append, stop)
        return SimpleNamespace(comparison=comparison, told=told, out=out)

    return carry_out


@pytest.fixture(scope="module")
def one(run):
    return run("cpu")


@pytest.fixture(scope="module", params=list(TOGETHER))
def several_run(request, run):
    return SimpleNamespace(devices=request.param, **vars(run(request.param)))


def files(made):
    return {file.name: file.read_bytes() for file in made.out.glob("*.png")}


def order(made):
    """Of all that is told of results, without what stands inside."""
    kinds = events.Finished | events.Compared | events.RulerReady
    return [(type(e).__name__, getattr(e, "column", "")) for e in made.told if isinstance(e, kinds)]


# ---------------------------------------------------------------------------------------------------------------------
# A comparison


def test_several_devices_make_what_one_makes_and_tell_it_in_the_same_order(one, several_run):
    assert files(several_run) == files(one) and len(files(one)) == 5
    assert order(several_run) == order(one)
    for mine, other in zip(several_run.comparison.results, one.comparison.results, strict=True):
        assert (mine.metrics, mine.memory, mine.layers) == (other.metrics, other.memory, other.layers)
    for name in ("bf16", "mxfp8", "nvfp4"):
        steps = [e.index for e in several_run.told if isinstance(e, events.Step) and e.column == name]
        assert steps == list(range(1, STEPS + 1))


def test_results_say_where_each_ran_and_what_beside_it(several_run):
    rounds = TOGETHER[several_run.devices]
    assert Comparison.load(several_run.out) == several_run.comparison
    for generation in several_run.comparison.results:
        beside = next(r for r in rounds if generation.precision in r) - {generation.precision}
        assert set(generation.at_once) == beside
        assert generation.ran["Device"].endswith(", cpu")
        said = generation.ran["At once"]
        assert all(f"{name} on cpu" in said for name in beside) and ("one host" in said) == bool(beside)


def test_what_shares_its_very_device_is_not_timed(several_run):
    for generation in several_run.comparison.results:
        assert not generation.latency_comparable or not generation.at_once
        assert generation.ran["Timing"].startswith("not timed") == bool(generation.at_once)
        assert several_run.comparison.speedup(generation) is None


def test_one_device_says_nothing_of_it(one, on):
    assert type(on("cpu").studio) is Studio
    for values in json.loads((one.out / "comparison.json").read_text())["results"]:
        assert "at_once" not in values and "At once" not in values["ran"] and "cpu" not in values["ran"]["Device"]
    assert one.comparison.reference.latency_comparable


def test_the_verdict_says_so_and_only_like_is_compared_with_like(one, tmp_path):
    bf16, mxfp8, nvfp4 = (replace(g, execution="native", latency_comparable=True) for g in one.comparison.results)
    bf16, mxfp8 = replace(bf16, at_once=("mxfp8",)), replace(mxfp8, at_once=("bf16",))
    both, three = (replace(one.comparison, results=results) for results in ((bf16, mxfp8), (bf16, mxfp8, nvfp4)))
    said = "bf16 and MXFP8 ran at the same time on one host, which may slow them down."
    assert words.verdict.verdict(both).endswith(said)
    assert words.verdict.verdict(three).endswith(f"{said} NVFP4 ran alone, so no speedup is given.")
    assert three.speedup(mxfp8) == bf16.latency.total / mxfp8.latency.total and three.speedup(nvfp4) is None
    assert said not in words.verdict.verdict(one.comparison)
    assert [line.split(",")[4] for line in three.to_csv().split()[:1]] == ["at_once"]
    assert "at_once" not in one.comparison.to_csv()


def test_the_page_tells_what_is_made_at_once_and_why_it_is_not_timed(several_run):
    shown = view.begin(several_run.comparison.request, "device")
    for event in several_run.told:
        shown = view.advance(shown, event)
        if isinstance(event, events.Step) and sum(card.progress is not None for card in shown.cards) == 2:
            assert shown.headline == "Making the bf16 and MXFP8 pictures at once" or several_run.devices != "cpu,cpu"
            break
    else:
        pytest.fail("nothing was made at once")
    finished = view.of(several_run.comparison, several_run.out, recorded=False)
    assert words.compare.SHARED_DEVICE_NOTE in cards.stage(finished) and words.SHARED_DEVICE in cards.table(finished)
    assert "with bf16 on cpu" in cards.ran(finished)


@pytest.fixture
def watched(monkeypatch):
    """What the pipeline is called for, and what was going on then; timed calls wait for those beside them."""
    seen, going, lock, original = [], [], threading.Lock(), pipeline.call
    watch = SimpleNamespace(seen=seen, gates={})

    @contextmanager
    def noted(kind):
        with lock:
            seen.append((kind, tuple(going)))
            going.append(kind)
        yield
        with lock:
            going.remove(kind)

    def call(pipeline, spec, request, seed, progress=None, *further):
        timed = progress is not None and request.num_inference_steps == STEPS
        with noted("timed" if timed else "warm"):
            if timed and (gate := watch.gates.get(progress._name)):
                gate.wait(timeout=30)  # breaks, and the run fails, if the others do not come
            return original(pipeline, spec, request, seed, progress, *further)

    monkeypatch.setattr("engine.runtime.studio.call", call)
    return watch


def test_timed_calls_overlap_and_nothing_is_warmed_beside_any(run, one, watched):
    gate = threading.Barrier(3)
    watched.gates |= dict.fromkeys(("bf16", "mxfp8", "nvfp4"), gate)
    run("cpu,cpu,cpu", seed=1, batch_size=2)
    assert [kind for kind, _ in watched.seen[:6]] == ["warm"] * 3 + ["timed"] * 3
    assert [going for _, going in watched.seen[:6]] == [()] * 3 + [("timed",) * n for n in range(3)]


@pytest.mark.parametrize("failing", ["bf16", "mxfp8"])
def test_if_one_fails_the_others_end_and_the_device_goes_on(run, one, monkeypatch, failing):
    original, steps, both = pipeline.Progress.__call__, [], threading.Barrier(2)

    def step(self, pipeline, index, timestep, kwargs):
        if pipeline.num_timesteps == 50 and index == 1:
            both.wait(30)
            if self._name == failing:
                raise ZeroDivisionError
        steps.append(self._name)
        return original(self, pipeline, index, timestep, kwargs)

    monkeypatch.setattr(pipeline.Progress, "__call__", step)
    with pytest.raises(FaultError, match="ZeroDivisionError") as raised:
        run("cpu,cpu", steps=50)
    assert not raised.value.lost
    assert steps.count(failing) == 1 and 1 < len(steps) < 26, "neither went to its end"
    assert files(run("cpu,cpu")) == files(one)


def test_stopping_ends_all_of_them(run):
    stopped, told = threading.Event(), []

    def stop():
        told.append(threading.current_thread())
        if len(set(told)) == 2:  # both are at it
            stopped.set()
        return stopped.is_set()

    with pytest.raises(CancelledRun):
        run("cpu,cpu", stop=stop, steps=50)
    assert len(told) < 50


def test_a_preload_and_every_comparison_have_each_precision_in_one_place(on, run, spec):
    run("cpu,cpu")
    told = []
    on("cpu,cpu").prepare(spec.id, told.append, lambda: False)
    run("cpu,cpu", precisions=["nvfp4"])
    first, second = multi_device.studios_of(on("cpu,cpu").studio)
    assert [key[1] for key in first._renditions] == ["bf16"]
    assert sorted(key[1] for key in second._renditions) == ["mxfp8", "nvfp4"]
    assert not any(isinstance(event, events.Loading) for event in told)


def test_whoever_is_alone_has_nobody_beside():
    room, inside, seen = multi_device._Room(), [], []

    def stay(alone):
        inside.append(alone)
        seen.append(tuple(inside))
        time.sleep(0.002)
        inside.remove(alone)

    def visit(number):
        if number % 4 == 0:
            with room.alone():
                stay(True)
            return
        with room.with_others():
            stay(False)
            if number % 4 == 1:
                with room.alone(), room.alone():
                    stay(True)
                stay(False)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(visit, range(48)))
    assert len(seen) == 72 and max(map(len, seen)) > 1
    assert all(len(there) == 1 for there in seen if True in there)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_devices_of_several_kinds_are_refused(monkeypatch):
    kinds = iter(("One GPU", "Another GPU"))
    detect = capability.detect
    monkeypatch.setattr(capability, "detect", lambda device: replace(detect(device), name=next(kinds)))
    with pytest.raises(UnsupportedError, match="cpu is the One GPU, cpu the Another GPU: choose devices of one kind"):
        Device("cpu,cpu")


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("cuda,cuda:0", "cuda:0 is named twice: name each GPU once. See"),
        ("cpu,cuda:63", "There is no cuda:63 here"),
        ("cpu,banana", "There is no device 'banana': choose cpu or cuda."),
    ],
)
def test_devices_that_cannot_be_had_are_refused_in_a_sentence(monkeypatch, capsys, tmp_path, devices, words):
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["engine", "compare", "--prompt", "a cat", "--devices", devices, "--out", out])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_what_runs_on_one_device_says_so(monkeypatch, capsys, tmp_path, command):
    further = {"bench": [], "tune": ["--prompts", "drawbench", "--recipe", str(tmp_path / "r.json")]}[command]
    line = ["engine", command, "--device", "cpu,cpu", "--out", str(tmp_path / "out.json"), *further]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == f"{command} runs on one device, not on cpu,cpu: name one with --device.\n"


def test_the_app_takes_them_from_its_arguments_or_the_environment(monkeypatch):
    seen = []
    monkeypatch.setattr(Process, "__init__", lambda self, name, source, filtered: seen.append(name))
    monkeypatch.delenv("TWINFRAME_DEVICES", raising=False)
    Process.from_arguments(app.arguments([]))
    for apart in command_line.apart(app.arguments(["--devices", "cuda:0, cuda:1"])):
        Process.from_arguments(apart)
    monkeypatch.setenv("TWINFRAME_DEVICES", "cpu,cpu")
    Process.from_arguments(app.arguments([]))
    assert seen == [None, "cuda:0", "cuda:1", "cpu,cpu"]
    assert command_line.devices("") is None


# ---------------------------------------------------------------------------------------------------------------------
# Two GPUs


@pytest.mark.gpu
@two_gpus
def test_gpu_two_make_the_pictures_of_one_and_both_are_timed(run, on):
    alone, both = run("cuda:0", precisions=["fp8"]), run("cuda:0,cuda:1", precisions=["fp8"])
    assert files(both) == files(alone)
    bf16, fp8 = both.comparison.results
    assert (bf16.at_once, fp8.at_once) == (("fp8",), ("bf16",)) and bf16.latency_comparable
    assert bf16.ran["Device"].endswith(", cuda:0") and fp8.ran["Device"].endswith(", cuda:1")
    held = [studio._renditions for studio in multi_device.studios_of(on("cuda:0,cuda:1").studio)]
    for index, renditions in enumerate(held):
        weights = (p for r in renditions.values() for p in r.pipeline.transformer.parameters())
        assert {p.device for p in weights} == {torch.device("cuda", index)}
