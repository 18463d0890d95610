"""Recorded runs and rehearsals: bundles out and in, the nearest one, lists, the table. Around a fake worker."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import RequestError, TwinframeError
from engine.events import Completed
from engine.outputs import recordings
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving import rehearse
from tests.support.fake_engine import NO_FP8, FakeWorker

ROOT = Path(__file__).resolve().parents[3]
ROCKET = CompareRequest.create("a rocket on a blue background")
CAT = CompareRequest.create("a cat on a red background", seed=3, precisions=["nvfp4"])


def compare(request: CompareRequest, out: Path) -> Comparison:
    *_, done = FakeWorker().submit(request, out).events()
    assert isinstance(done, Completed)
    return done.comparison


@pytest.fixture
def bundles(tmp_path):
    return list(recordings.record({"rocket": ROCKET, "cat": CAT}, tmp_path, compare))


# Bundles


def test_a_bundle_is_read_back_as_it_was_recorded(tmp_path, bundles):
    found = recordings.read(tmp_path)
    assert {b.name: b.comparison for b in found} == {b.name: b.comparison for b in bundles}
    assert {b.name: b.comparison.request for b in found} == {"rocket": ROCKET, "cat": CAT}
    files = {f.name for f in (tmp_path / "cat").iterdir()}
    assert {"comparison.json", "bf16.png", "nvfp4.png"} <= files
    assert recordings.size(found[0]) == sum(f.stat().st_size for f in found[0].folder.iterdir())


def test_recording_again_replaces_the_bundle(tmp_path, bundles):
    again = CompareRequest.create("a cat on a red background", precisions=["mxfp8"])
    list(recordings.record({"cat": again}, tmp_path, compare))
    assert {b.name: b.comparison.request for b in recordings.read(tmp_path)} == {"rocket": ROCKET, "cat": again}
    assert not (tmp_path / "cat" / "nvfp4.png").exists()
    assert {f.name for f in tmp_path.iterdir()} == {"rocket", "cat"}


def test_a_failed_recording_leaves_what_was_there(tmp_path, bundles):
    def fail(request: CompareRequest, out: Path) -> Comparison:
        (out / "bf16.png").write_bytes(b"half a picture")
        raise TwinframeError("The GPU has gone.")

    with pytest.raises(TwinframeError, match="has gone"):
        list(recordings.record({"cat": ROCKET}, tmp_path, fail))
    assert {b.name: b.comparison.request for b in recordings.read(tmp_path)} == {"rocket": ROCKET, "cat": CAT}
    assert {f.name for f in tmp_path.iterdir()} == {"rocket", "cat"}


@pytest.mark.parametrize("damage", ["text", "picture", "model", "gone"])
def test_a_damaged_bundle_is_left_out(tmp_path, bundles, caplog, damage):
    file = tmp_path / "cat" / "comparison.json"
    match damage:
        case "text":
            file.write_text(file.read_text()[:100])
        case "picture":
            (tmp_path / "cat" / "nvfp4.png").unlink()
        case "model":
            file.write_text(file.read_text().replace("mini-flux", "maxi-flux"))
        case "gone":
            file.unlink()
    assert [b.name for b in recordings.read(tmp_path)] == ["rocket"]
    assert ("cannot be shown" in caplog.text) == (damage != "gone")


def test_what_comes_with_the_project_can_be_read_and_is_small():
    found = recordings.read(recordings.FOLDER)
    assert found
    assert len(found) == len(list(recordings.FOLDER.glob("*/comparison.json")))
    assert sum(recordings.size(bundle) for bundle in found) < 12e6
    assert {b.name for b in found} <= set(recordings.read_list(recordings.LIST))


@pytest.mark.parametrize("folder", [recordings.FOLDER, recordings.FOLDER.parent / "blind"])
def test_recordings_from_before_there_were_columns_are_read_as_they_are(folder):
    """Those that come with the project name precisions and the recipe `seed`."""
    saved = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/comparison.json")}
    old = {name: s for name, s in saved.items() if s["request"]["recipe"] == "seed"}
    assert len(old) > 10
    for bundle in recordings.read(folder):
        if bundle.name in old:
            made, was = bundle.comparison, old[bundle.name]
            assert made.request.recipe == "post" and list(made.request.precisions) == was["request"]["precisions"]
            assert [g.column for g in made.results] == [g["precision"] for g in was["results"]]
            assert all(made.column(g).recipe == "post" for g in made.results[1:])


# The nearest


@pytest.mark.parametrize(
    ("prompt", "fields", "name"),
    [
        ("a rocket on a blue background", {}, "rocket"),
        ("a cat on a red background", {"seed": 99}, "cat"),
        ("a red cat", {}, "cat"),
        ("A ROCKET", {"precisions": ["nvfp4"]}, "rocket"),
        ("waves", {"model": "ltx-2"}, "rocket"),
    ],
)
def test_the_nearest_recording_stands_in(bundles, prompt, fields, name):
    assert recordings.nearest(CompareRequest.create(prompt, **fields), bundles).name == name


def test_where_nothing_is_recorded_nothing_is_near():
    assert recordings.nearest(ROCKET, []) is None


# Lists


def test_a_list_is_read_in_its_order(tmp_path):
    file = tmp_path / "list.json"
    file.write_text('{"rocket": {"prompt": "a rocket on a blue background"}, "cat-2": {"prompt": "a cat", "seed": 2}}')
    assert recordings.read_list(file) == {"rocket": ROCKET, "cat-2": CompareRequest.create("a cat", seed=2)}
    assert list(recordings.read_list(file)) == ["rocket", "cat-2"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is not JSON"),
        ("[]", "must be an object of requests"),
        ("{}", "must be an object of requests"),
        ('{"a": "a cat"}', "must be an object of requests"),
        ('{"../a": {"prompt": "a cat"}}', "'../a' is no name for a recording"),
        ('{"a": {"prompt": ""}}', "a: The prompt is empty"),
        ('{"a": {"prompt": "a cat", "steps": 2}}', "a: A request has no field steps"),
        (None, "Cannot read"),
    ],
)
def test_a_bad_list_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "list.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError, match=re.escape(sentence)):
        recordings.read_list(file)


@pytest.mark.parametrize(("prompt", "name"), [("A cat, red!", "a-cat-red"), ("猫", "recording"), ("x" * 99, "x" * 48)])
def test_a_single_recording_is_named_after_its_prompt(prompt, name):
    assert recordings.name_for(prompt) == name
    recordings.check_name(name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--list", "LIST", "--only", "dog"], "has no dog: it has cat."),
        (["--prompt", "a cat", "--name", "a/b"], "'a/b' is no name for a recording"),
        (["--prompt", "a cat", "--list", "LIST"], "not allowed with"),
        ([], "One of the arguments --list --prompt is required"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, sentence):
    from engine import __main__ as main

    file = tmp_path / "list.json"
    file.write_text('{"cat": {"prompt": "a cat"}}')
    arguments = [str(file) if a == "LIST" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["engine", "record", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err


# Rehearsals


def test_a_rehearsal_warms_each_shape_and_runs_the_list_once(bundles):
    worker, said = FakeWorker(), []
    again = CompareRequest.create("a fish", seed=5)
    wanted = {"rocket": ROCKET, "fish": again, "cat": CAT}
    acts = rehearse.rehearse(worker, wanted, bundles, said.append)
    assert [job.request for job in worker.jobs] == [ROCKET, CAT, ROCKET, again, CAT]
    assert all(act.go for act in acts)
    assert rehearse.table(acts).splitlines()[-1] == "GO: 3 of 3 ran, 2 have a recording of the same request."
    assert len(said) == 5


def test_a_rehearsal_says_what_cannot_run(bundles):
    worker = FakeWorker(support=NO_FP8, fail_at="nvfp4", failure="The disk is full.")
    wanted = {"rocket": ROCKET, "fp8": CompareRequest.create("a cat", precisions=["fp8"])}
    acts = rehearse.rehearse(worker, wanted, [], lambda _: None)
    assert [act.go for act in acts] == [False, False]
    said = rehearse.table(acts)
    assert "The disk is full." in said
    assert "This machine cannot run fp8" in said
    assert said.splitlines()[-1].startswith("NO GO: 0 of 2 ran")


def test_one_failure_is_enough_for_no_go(bundles):
    worker = FakeWorker(support=NO_FP8)
    wanted = {"rocket": ROCKET, "fp8": CompareRequest.create("a cat", precisions=["fp8"])}
    said = rehearse.table(rehearse.rehearse(worker, wanted, bundles, lambda _: None)).splitlines()
    assert said[-1] == "NO GO: 1 of 2 ran, 1 have a recording of the same request."
    assert [line.split()[0] for line in said[1:3]] == ["go", "NO"]


@pytest.mark.parametrize(("listed", "status"), [("mini-flux", 0), ("nothing", 2), ("fp8", 1)])
def test_the_command_rehearses_and_its_exit_status_is_the_verdict(tmp_path, listed, status):
    file = tmp_path / "list.json"
    entry = {"prompt": "a cat", "precisions": ["fp8" if listed == "fp8" else "nvfp4"]}
    file.write_text("{}" if listed == "nothing" else json.dumps({"cat": entry}))
    code = (  # fakes in the place of the worker and of the child process that needs torch
        "import sys, types; from tests.support import fake_engine as f;"
        "fake = sys.modules['engine.serving.worker'] = types.ModuleType('engine.serving.worker');"
        "fake.Worker = lambda *_, **options: f.FakeWorker(support=f.NO_FP8);"
        "fake.Process = lambda *_, **__: None; sys.modules['engine.serving.process'] = fake; import app; app.main()"
    )
    command = [sys.executable, "-c", code, "--rehearse", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    if status == 2:
        assert "must be an object of requests" in done.stderr
    else:
        assert re.search(rf"^{'NO GO' if status else 'go'} +cat +mini-flux", done.stdout, re.M)
        assert done.stdout.splitlines()[-1].startswith("NO GO: 0 of 1" if status else "GO: 1 of 1")
