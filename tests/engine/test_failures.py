"""One way out for failures: one sentence, the right exit status, nothing half written, and a log that says more."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine import files, leaving, logs
from engine.errors import FaultError, LoadError, OutputError, RequestError
from engine.runtime.studio import Studio
from engine.weights import loading
from engine.weights.source import Source
from tests.support import commands
from tests.support.running import ROOT
from ui.web.served_files import Shelf


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache folder for the test alone; gives where its log is."""
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / logs.NAME


@pytest.fixture
def refused(own_cache, monkeypatch, capsys, tmp_path):
    return lambda name, *more: commands.refused(monkeypatch, capsys, tmp_path / "new" / "out", name, *more)


@pytest.fixture
def run(own_cache, monkeypatch, capsys):
    return lambda *args: commands.run(monkeypatch, capsys, *args)


# ---------------------------------------------------------------------------------------------------------------------
# Commands and what they are given

PROMPTS = {
    "more fields": ("p.csv", "prompt,category\na cat, sitting,A\na dog,B\n", "Line 2"),
    "JSON in a text file": ("p.txt", 'a cat\n{"prompt": "a dog"}\n', "Line 2"),
    "bad JSON lines": ("p.jsonl", '{"prompt": "a cat"}\n{"prompt"\n', "Line 2"),
    "not text": ("p.csv", b"prompt\n\xff\n", "not UTF-8"),
    "no heading": ("p.tsv", "a cat\tA\n", "no column named prompt"),
    "empty": ("p.txt", "", "no prompts"),
    "a control character": ("p.json", '["a\\u0007cat", "a dog"]', "control characters"),
    "half a character": ("p.json", '["a \\ud800 cat", "a dog"]', "control characters"),
    "missing": (None, None, "no file"),
    "a folder": ("p", None, "Cannot read"),
}


@pytest.mark.parametrize("name", commands.READERS)
@pytest.mark.parametrize("case", PROMPTS)
def test_a_broken_prompt_file_is_one_sentence_in_every_command(refused, tmp_path, name, case):
    given, content, says = PROMPTS[case]
    file = tmp_path / (given or "missing.txt")
    if given and content is None:
        file.mkdir()
    elif given:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refused(name, "--prompts", file)


MISTAKES = {
    "no such folder": (("--weights", "/nowhere"), {}, ["/nowhere", "--weights"]),
    "no such folder in the environment": ((), {"TWINFRAME_WEIGHTS": "/nowhere"}, ["/nowhere", "TWINFRAME_WEIGHTS"]),
    "no checkpoint in the environment": ((), {"TWINFRAME_WEIGHTS": str(ROOT / "tests")}, ["give TWINFRAME_WEIGHTS"]),
    "two sources": (("--weights", str(ROOT), "--random-weights"), {}, ["--weights and --random-weights"]),
    "two sources, one of them in the environment": (
        ("--random-weights",),
        {"TWINFRAME_WEIGHTS": str(ROOT)},
        ["TWINFRAME_WEIGHTS and --random-weights"],
    ),
}


@pytest.mark.parametrize("name", commands.COMMANDS)
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_in_every_command(refused, monkeypatch, name, case):
    args, environment, words = MISTAKES[case]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    said = refused(name, *args)
    assert all(word in said for word in words), said


@pytest.fixture
def unloadable(monkeypatch):
    """Weights of which nothing but loading them tells that they are broken."""

    def fail(*_, **__):
        raise LoadError("The file x is damaged: copy it again.")

    monkeypatch.setattr(loading, "load_shared", fail)


@pytest.fixture
def broken(monkeypatch):
    """An engine with a mistake of ours in it."""

    def fail(*_, **__):
        raise KeyError("weight_map")

    monkeypatch.setattr(loading, "load_shared", fail)


@pytest.mark.parametrize("name", commands.MAKERS)
def test_weights_that_fail_while_they_are_loaded_leave_nothing_behind(refused, unloadable, name):
    assert refused(name) == "The file x is damaged: copy it again."


@pytest.mark.parametrize("name", commands.MAKERS)
def test_a_fault_exits_1_with_one_sentence_and_a_log_that_has_the_traceback(run, broken, own_cache, tmp_path, name):
    out = tmp_path / "new" / "out"
    status, said, err = run(*commands.arguments(name, out))
    assert (status, said) == (1, "")
    assert err == f"The engine failed (KeyError): its log says more; please retry. The log is {own_cache}.\n"
    log = own_cache.read_text()
    assert "Traceback (most recent call last)" in log and "KeyError: 'weight_map'" in log
    assert not out.exists()


def test_a_fault_before_anything_was_asked_of_the_engine(run, monkeypatch, own_cache):
    from engine.quantization import inspection

    monkeypatch.setattr(inspection, "inspect", lambda *_: [][0])
    status, said, err = run("inspect", "--model", "mini-flux", "--precision", "nvfp4")
    assert (status, said) == (1, "") and err.endswith(f"The log is {own_cache}.\n")
    assert "IndexError" in own_cache.read_text()


@pytest.mark.parametrize("content", ["3", "[]", "{}", '{"rows": [{}]}', "[" * 100_000, "\xff"])
def test_what_is_no_benchmark_is_one_sentence(run, tmp_path, content):
    file = tmp_path / "result.json"
    file.write_bytes(content.encode("latin-1"))
    status, said, err = run("bench", "--table", file)
    assert (status, said, err) == (2, "", f"{file} is no result of a benchmark: give what bench --out wrote.\n")


@pytest.mark.parametrize("content", ["3", "[]", "{}", '{"a": {}}', "[" * 100_000, "\xff"])
def test_what_is_no_list_to_record_is_one_sentence(run, tmp_path, content):
    (tmp_path / "list.json").write_bytes(content.encode("latin-1"))
    status, said, err = run("record", "--list", tmp_path / "list.json", "--out", tmp_path / "out")
    assert (status, said) == (2, "") and len(err.splitlines()) == 1 and "list.json" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "where"),
    [("bench", "--out"), ("bench", "--plots"), ("sensitivity", "--out"), ("tune", "--out"), ("tune", "--recipe")],
)
def test_a_result_that_could_not_be_written_is_told_before_anything_is_loaded(run, broken, tmp_path, name, where):
    (tmp_path / "file").write_text("kept")
    status, said, err = run(*commands.arguments(name, tmp_path / "out", where, tmp_path / "file" / "result.json"))
    assert (status, said) == (2, "") and "Cannot write into" in err
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "out").exists()


def test_a_benchmark_that_fails_spares_the_older_result(run, unloadable, tmp_path):
    file = tmp_path / "out" / "bench.json"
    file.parent.mkdir()
    file.write_text("older")
    assert run(*commands.arguments("bench", tmp_path / "out"))[0] == 2
    assert file.read_text() == "older" and list(file.parent.iterdir()) == [file]


def test_an_evaluation_that_fails_at_its_first_picture_leaves_nothing(refused, monkeypatch):
    def fail(studio, rendition, spec, request, out, *_, stem, **__):
        (out / f"{stem}.png").write_bytes(b"half of it")
        raise OutputError("Cannot write it: No space left on device.")

    monkeypatch.setattr(Studio, "generate", fail)
    assert "No space left" in refused("evaluate")


def test_an_evaluation_that_fails_later_keeps_what_it_has(run, monkeypatch, tmp_path):
    made, whole = [], Studio.generate

    def second(studio, *args, **named):
        made.append(named)
        if len(made) > 1:
            raise OutputError("Cannot write it: No space left on device.")
        return whole(studio, *args, **named)

    monkeypatch.setattr(Studio, "generate", second)
    assert run(*commands.arguments("evaluate", tmp_path / "out"))[0] == 2
    assert (tmp_path / "out" / "manifest.json").is_file() and any(tmp_path.glob("out/pictures/*/*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# The way out


@pytest.fixture
def left(own_cache, capsys):
    """How a piece of work is left: exit status, stdout and stderr."""

    def leave(work):
        status = 0
        try:
            leaving.leave(work, lambda: None)
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return leave


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RequestError("One line\nand another."), 2, "One line and another.\n"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 1, "The device ran out of memory: choose a smaller batch or size and retry. The log is {}.\n"),
        (OSError(28, "No space"), 1, "The engine failed (OSError): its log says more; please retry. The log is {}.\n"),
        (FaultError("It failed.", trace="Traceback: x"), 1, "It failed. The log is {}.\n"),
        (FaultError("It failed, and the log has it."), 1, "It failed, and the log has it. The log is {}.\n"),
    ],
)
def test_an_error_is_left_by(left, own_cache, error, status, said):
    assert left(raising(error)) == (status, "", said.format(own_cache))
    if said.count("{}") and getattr(error, "trace", "x"):
        assert "Traceback" in own_cache.read_text()


def test_the_status_of_work_that_went_well_is_its_own(left):
    assert [left(lambda status=status: status)[0] for status in (None, 0, 1)] == [0, 0, 1]


def test_records_of_errors_are_in_the_log_with_what_was_given_and_their_traceback(left, own_cache):
    def work():
        logging.getLogger("engine.x").error("job failed", extra={"job": 3, "traceback": "Traceback:\n  a line"})
        logging.getLogger("engine.x").info("chatter")

    before = list(logging.getLogger().handlers)
    left(work)
    assert re.fullmatch(r'\S+ ERROR engine\.x: job failed \{"job": 3\}\nTraceback:\n  a line\n', own_cache.read_text())
    assert logging.getLogger().handlers == before


def test_the_log_is_capped(own_cache, monkeypatch):
    monkeypatch.setattr(logs, "CAP", 1000)
    for number in range(50):
        assert logs.keep(f"{number} " + 97 * "x") == own_cache
    kept = sorted(own_cache.parent.iterdir())
    assert [file.name for file in kept] == ["twinframe.log", "twinframe.log.1"]
    assert all(file.stat().st_size <= 1100 for file in kept) and "49 " in own_cache.read_text()


def test_without_a_cache_folder_the_log_is_in_the_temporary_one(monkeypatch, tmp_path, left):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, _, err = left(raising(KeyError("x")))
    log = tmp_path / f"twinframe-{os.getuid()}" / logs.NAME
    assert err.endswith(f"The log is {log}.\n") and "KeyError" in log.read_text()
    assert log.parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_another_user_made_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"twinframe-{os.getuid()}").mkdir()
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result((0o40777, 0, 0, 2, os.getuid() + 1, 0, 0, 0, 0, 0)))
    found = files.own_temporary()
    assert found.parent == tmp_path and found.name != f"twinframe-{os.getuid()}" and found == files.own_temporary()


# ---------------------------------------------------------------------------------------------------------------------
# Users, pipes and folders


def child(code, *, environment=(), without=(), **options):
    """Python code in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in without} | dict(environment)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, timeout=120, check=False, **options
    )


NOBODY = """
import os, pwd, sys
def unknown(_):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = unknown
"""
"""As the system answers in a container that runs under a user id without an entry in passwd."""


def test_a_user_whom_the_system_does_not_know_can_work(tmp_path):
    code = f"""{NOBODY}
sys.argv = ["engine", "inspect", "--model", "mini-flux", "--precision", "nvfp4", "--json"]
from engine.__main__ import main
try:
    main()
finally:
    from engine import files
    from engine.compiler import compilation
    from engine.metrics import ruler
    compilation.configure()
    ruler.RulerShelf()
    print(os.environ["HOME"], files.cache_folder(), os.environ["TORCHINDUCTOR_CACHE_DIR"], file=sys.stderr)
"""
    unset = (
        "HOME",
        "USER",
        "LOGNAME",
        "LNAME",
        "USERNAME",
        "XDG_CACHE_HOME",
        "TWINFRAME_CACHE",
        "TORCHINDUCTOR_CACHE_DIR",
    )
    done = child(code, environment={"TMPDIR": str(tmp_path)}, without=unset)
    assert done.returncode == 0, done.stderr
    own = tmp_path / f"twinframe-{os.getuid()}"
    assert done.stderr.decode().split() == [
        str(own),
        str(own / ".cache/twinframe"),
        str(own / ".cache/twinframe/inductor"),
    ]


def test_a_home_that_cannot_be_written_has_its_cache_elsewhere(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for name in ("XDG_CACHE_HOME", "TWINFRAME_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert files.cache_folder() == tmp_path / f"twinframe-{os.getuid()}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "home/.cache/twinframe"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_lacks_a_character_gets_another(stream):
    code = f"""
import sys
from engine import leaving, logs
leaving.leave(lambda: print("赤い猫 caf\\u00e9", file=sys.{stream}), logs.plain)
"""
    done = child(code, environment={"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert getattr(done, stream).strip() == "??? café".encode("cp1252")


def test_gradios_folder_of_another_user_is_told_with_what_to_set(monkeypatch, tmp_path):
    def theirs(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("ui.web.served_files.tempfile.mkdtemp", theirs)
    with pytest.raises(OutputError, match=f"Cannot write into {tmp_path}: Permission denied. Set GRADIO_TEMP_DIR"):
        Shelf()


# ---------------------------------------------------------------------------------------------------------------------
# app.py

APP = """
import sys, types
from tests.support import fake_engine
fake = types.ModuleType("engine.serving.worker")
fake.Worker = lambda *_, **__: {worker}
sys.modules["engine.serving.worker"] = fake
process = types.ModuleType("engine.serving.process")
process.Process = types.SimpleNamespace(from_arguments=lambda _: None)
sys.modules["engine.serving.process"] = process
import app
app.main()
"""


def app(worker, tmp_path, **environment):
    done = child(APP.format(worker=worker), environment={"TWINFRAME_CACHE": str(tmp_path)} | environment)
    return done.returncode, done.stderr.decode()


def test_a_fault_of_the_app_exits_1_with_one_sentence_and_a_log(tmp_path):
    status, err = app("{}['x']", tmp_path)
    log = tmp_path / logs.NAME
    assert (status, err) == (1, f"The engine failed (KeyError): its log says more; please retry. The log is {log}.\n")
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"GRADIO_TEMP_DIR": "/dev/null/below"}, "Set GRADIO_TEMP_DIR to a folder of your own."),
        ({"GRADIO_SERVER_PORT": "x"}, "GRADIO_SERVER_PORT is 'x'"),
        ({"GRADIO_SERVER_NAME": "no.such.host.invalid"}, "Choose another with --host."),
        ({"TWINFRAME_AUTH": "nobody"}, "TWINFRAME_AUTH"),
    ],
)
def test_a_mistake_in_the_apps_environment_exits_2_with_one_sentence(tmp_path, environment, says):
    status, err = app("fake_engine.FakeWorker()", tmp_path, **environment)
    assert status == 2 and says in err and len(err.splitlines()) == 1, err


def test_the_environments_weights_are_named(monkeypatch):
    monkeypatch.setenv("TWINFRAME_WEIGHTS", "/somewhere")
    with pytest.raises(LoadError, match="/somewhere or at random: choose one of TWINFRAME_WEIGHTS and"):
        Source.create(random=True)
