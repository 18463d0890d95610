"""A rehearsal from the doctor to the report with tiny models, and what becomes of it when something goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import MappingProxyType

import pytest

from engine import __main__ as cli
from engine import catalog
from engine.benchmark import methods
from engine.environment import versions
from engine.errors import FaultError, OutputError, TwinframeError
from engine.reproduction import report, run, tables
from engine.reproduction.run import Ended, Reproduction
from tests.support import tiny
from tests.support.running import ROOT

FORMATS = {name: {"execution": "emulated", "proof": None} for name in ("fp8", "mxfp8", "nvfp4", "int8")}
FORMATS["bf16"] = {"execution": "native", "proof": None}
CPU = {"status": 0, "device": "AMD EPYC", "versions": versions(), "formats": FORMATS, "findings": []}
CHECK = "self-check-mxfp8-nvfp4"
PARTS = 5
"""Of a rehearsal."""


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """Tiny models in the place of the bundled ones, with the recipes of the real ones."""
    made = {}
    for posts, name in tables.MINIATURES.models.items():
        folder = tiny.checkpoint(posts, tmp_path_factory.mktemp(name))
        made[name] = replace(tiny.spec(posts, folder), id=name, recipes=("post", "full"))
    return made


class Here:
    """Runs commands in this process, and counts them; `broken` are names of parts whose command fails."""

    def __init__(self, doctor=CPU):
        self.doctor, self.ran, self.broken, self.bundled = doctor, Counter(), set(), set()

    def __call__(self, arguments, bundled, say):
        if arguments[0] == "doctor":
            return Ended(status=self.doctor["status"], out=json.dumps(self.doctor), said="")
        part = next(name for name in re.findall(r"[\w-]+", arguments[-1])[::-1] if name not in ("bench", "json"))
        self.ran[part] += 1
        self.bundled.add(bundled)
        if part in self.broken:
            return Ended(status=1, out="", said="The device ran out of memory.")
        args = cli._parser().parse_args(list(arguments))
        args.run(args)
        return Ended(status=0, out="", said="")


def reproduction(out, here, names=None, asked=tables.MINIATURES):
    return Reproduction(names, asked, ["--device=cpu"], ["--device=cpu"], out, lambda text: None, here)


@pytest.fixture(scope="module")
def rehearsed(miniatures, tmp_path_factory):
    """A whole rehearsal: its folder, what it gave back and what ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, **miniatures}))
        out, here = tmp_path_factory.mktemp("rehearsal") / "out", Here()
        result = reproduction(out, here).run()
    return out, result, here


def test_a_rehearsal_fills_every_table_of_the_post(rehearsed):
    out, result, here = rehearsed
    assert run.status(result) == 0
    assert sum(here.ran.values()) == PARTS + 1 and set(here.ran.values()) == {1} and here.bundled == {True}
    assert {line["table"] for line in result["tables"]} == set(tables.TABLES)
    for line in result["tables"]:
        if line["precision"] == "bf16":
            assert line["execution"] == "native" and line["values"]["latency_s"]["engine"] > 0
        else:
            assert line["execution"] == "emulated"
            assert all((v["engine"] is None) == (name != "lpips") for name, v in line["values"].items())
        assert all(value["post"] is not None for value in line["values"].values())
    assert json.loads((out / "reproduction.json").read_bytes()) == result


def test_the_report_has_every_figure_and_says_that_it_is_a_rehearsal(rehearsed):
    out, result, _ = rehearsed
    html = (out / "report.html").read_text()
    assert "This was a rehearsal" in html and "<script" not in html and "http" not in html
    assert len(re.findall("<h2>(FLUX|Qwen|LTX)", html)) == len(tables.TABLES)
    for line in result["tables"]:
        for name, value in line["values"].items():
            assert f'<td class="post">{value["post"]:.{report.HEADS[name][1]}f}</td>' in html
    for part in result["parts"]:
        assert part["status"] == 0 and part["command"].startswith("python -m engine ")
    assert str(out) not in html and str(out) not in (out / "reproduction.json").read_text()


def test_a_rehearsal_is_not_taken_for_a_benchmark(rehearsed):
    with pytest.raises(ValueError, match="rehearsal"):
        methods.read_all(rehearsed[0] / "reproduction.json")


def test_what_was_measured_is_drawn_with_the_other_benchmarks(rehearsed, tmp_path):
    whole = json.loads((rehearsed[0] / "reproduction.json").read_bytes()) | {"rehearsal": ""}
    (tmp_path / "b200.json").write_text(json.dumps(whole))
    found = methods.read_all(tmp_path / "b200.json")
    assert [result["model"] for result in found] == ["mini-flux", "mini-qwen", "mini-ltx2"]


def test_the_same_again_makes_nothing_anew(rehearsed, monkeypatch, miniatures):
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, **miniatures}))
    out, result, _ = rehearsed
    here = Here()
    again = reproduction(out, here)
    assert again.plan()[-1] == "All is done."
    assert again.run()["tables"] == result["tables"] and not here.ran


# A stand-in for the commands, which writes what they would


class Written(Here):
    """Writes results instead of measuring them."""

    def __call__(self, arguments, bundled, say):
        if arguments[0] != "doctor":
            part = arguments[-1].removesuffix("/bench.json").rpartition("/")[2]
            if part not in self.broken:
                self._write(arguments)
                self.ran[part] += 1
                return Ended(status=0, out="", said="")
        return super().__call__(arguments, bundled, say)

    def _write(self, arguments):
        if arguments[0] == "bench":
            content, file = {"model": "flux.1-dev", "device": self.doctor["device"], "rows": []}, arguments[-1]
        else:
            row = {"precision": "nvfp4", "recipe": "post", "lpips": {"mean": 0.1}, "execution": "native"}
            row |= {"not_numbers": 0, "memory_gb": {"weights": 1.0, "peak": 2.0}, "latency_s": None}
            ceiling = {"ceiling": {"lpips": {"mean": 0.3}}}
            content = {"model": "flux.1-dev", "ruler": ceiling, "reference": row, "results": [row]}
            file = f"{arguments[-1]}/summary.json"
        with open(file, "w") as target:  # noqa: PTH123
            json.dump(content, target)


def test_a_part_that_fails_leaves_the_others_and_is_made_again(tmp_path):
    here = Written()
    here.broken = {"qwen-performance-batch-1"}
    result = reproduction(tmp_path / "out", here).run()
    assert run.status(result) == 1 and sum(here.ran.values()) == PARTS + 1
    assert "The device ran out of memory." in (tmp_path / "out" / "report.html").read_text()
    assert any("qwen-performance-batch-1 failed" in line for line in run.summary(result))
    here.broken, here.ran = set(), Counter()
    assert run.status(reproduction(tmp_path / "out", here).run()) == 0
    assert here.ran == {"qwen-performance-batch-1": 1}


def test_a_self_check_that_fails_ends_it_before_anything_long(tmp_path):
    here = Written()
    here.broken = {CHECK}
    with pytest.raises(FaultError, match=r"self-check failed, so nothing else was begun\. The device ran out"):
        reproduction(tmp_path / "out", here).run()
    assert here.ran == {CHECK: 1}


def test_pictures_that_cannot_be_end_it_too(tmp_path, monkeypatch):
    here = Written()
    monkeypatch.setattr(run.plausibility, "of_quality", lambda found: [plausible("Its pictures are black.")])
    with pytest.raises(FaultError, match="Its pictures are black"):
        reproduction(tmp_path / "out", here).run()


def plausible(*faults):
    return run.plausibility.Check(subject="mini-flux NVFP4", faults=faults)


def test_after_its_time_nothing_is_begun_and_the_next_run_goes_on(tmp_path):
    here = Written()
    result = reproduction(tmp_path / "out", here).run(time_limit=1e-9)
    assert here.ran == {CHECK: 1} and "time limit" in result["stopped"]
    assert "Not measured." in (tmp_path / "out" / "report.html").read_text()
    assert reproduction(tmp_path / "out", here).run()["stopped"] == ""
    assert sum(here.ran.values()) == PARTS + 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "NVIDIA B200"}, "device AMD EPYC, not NVIDIA B200"),
        ({"versions": versions() | {"torch": "3.0"}}, "with versions .* torch 3.0"),
    ],
)
def test_a_folder_of_another_machine_is_left_alone(tmp_path, changed, said):
    reproduction(tmp_path / "out", Written()).run()
    before = (tmp_path / "out" / "reproduction.json").read_bytes()
    with pytest.raises(OutputError, match=said):
        reproduction(tmp_path / "out", Written(CPU | changed))
    assert (tmp_path / "out" / "reproduction.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(OutputError, match=r"holds mine\.txt but no reproduction"):
        reproduction(tmp_path, Written())


def test_planning_writes_nothing(tmp_path):
    said = reproduction(tmp_path / "out", Written(), ["flux-performance"]).plan()
    assert "a rehearsal with miniatures; MXFP8 and NVFP4 are emulated here" in said[0]
    assert [line.split()[0] for line in said[1:-1]] == [CHECK, "flux-performance-batch-1"]
    assert said[-1].startswith("About ") and not (tmp_path / "out").exists()


def test_on_a_hopper_the_report_says_what_stands_in(tmp_path):
    formats = FORMATS | {"fp8": {"execution": "native", "proof": None}}
    here = Written(CPU | {"device": "NVIDIA H100 80GB HBM3", "formats": formats})
    result = reproduction(tmp_path / "out", here, ["flux-performance"], tables.RANDOM).run()
    html = (tmp_path / "out" / "report.html").read_text()
    assert "FP8 in the place of MXFP8 and NVFP4, which need a Blackwell GPU" in html
    assert "FP8 in the place of NVFP4, which needs a Blackwell GPU." in html
    assert '<th scope="row">FP8<small>, for NVFP4</small></th>' in html
    assert result["stands_in"] == "fp8" and result["weights"] == "random"


@pytest.mark.parametrize(("status", "error"), [(2, TwinframeError), (1, FaultError)])
def test_a_device_that_is_not_there_is_told_in_the_doctors_words(tmp_path, status, error):
    def command(arguments, bundled, say):
        return Ended(status=status, out="", said="There is no device cuda:9.")

    with pytest.raises(error, match="no device cuda:9"):
        reproduction(tmp_path / "out", command)


# The process of a command


def test_a_command_runs_in_a_process_of_its_own():
    lines = []
    ended = run.execute(("reproduce", "--table", "speed", "--out", "out"), True, lines.append)
    assert ended.status == 2 and ended.out == "" and ended.said == lines[-1] and "no table speed" in ended.said


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts a shell's program in the place of Python."""

    def write(lines):
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{lines}\n")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return write


@pytest.mark.parametrize(("bundled", "weights"), [(True, "none"), (False, "/weights")])
def test_weights_that_are_meant_for_a_large_model_are_not_taken_for_a_bundled_one(
    program, monkeypatch, bundled, weights
):
    monkeypatch.setenv("TWINFRAME_WEIGHTS", "/weights")
    program("echo ${TWINFRAME_WEIGHTS:-none}")
    assert run.execute(("bench",), bundled, lambda line: None).out == f"{weights}\n"


def test_what_ends_a_reproduction_ends_its_command(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho $$ >&2\nexec sleep 600\n")
    program.chmod(0o755)
    code = (
        "import sys; from engine.reproduction import run; run.end_at_sigterm(); sys.executable = sys.argv[1];"
        "run.execute(('bench',), False, lambda line: print(line, flush=True))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(program)], cwd=ROOT, **pipes) as reproduction:
        command = int(reproduction.stdout.readline())
        reproduction.send_signal(signal.SIGTERM)
        reproduction.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(command, 0)


def test_a_process_that_is_killed_is_a_part_that_failed(program):
    program("echo working >&2\nkill -SEGV $$")
    ended = run.execute(("bench",), False, lambda line: None)
    said = f"Its process was ended by signal {signal.SIGSEGV.value}."
    assert ended == Ended(status=-signal.SIGSEGV, out="", said=said)
