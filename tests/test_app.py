"""`python app.py`: its arguments, its port and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine import catalog
from tests.support.fake_engine import until

ROOT = Path(__file__).resolve().parents[1]


def start(*arguments, code="import app; app.main()", **options):
    """`python app.py`, with fakes in the place of the worker and of the child process that needs torch."""
    code = (
        "import sys, types; from tests.support import fake_engine; fake = types.ModuleType('engine.serving.worker');"
        "fake.Worker = lambda *_, **options: fake_engine.FakeWorker(); sys.modules['engine.serving.worker'] = fake;"
        "fake.Process = types.SimpleNamespace(from_arguments=lambda _: None);"
        "sys.modules['engine.serving.process'] = fake;" + code
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, **pipes, **options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "flux.9"], f"There is no model 'flux.9': choose one of {', '.join(catalog.MODELS)}."),
        (["--models", ","], f"--models names no model: choose from {', '.join(catalog.MODELS)}."),
        (["--preload", "other"], "--preload other is not among --models mini-flux,mini-qwen,mini-ltx2."),
        (["--port", "abc"], "Argument --port: invalid int value: 'abc'. See app.py --help."),
        (["--port", "70000"], "Port 70000 does not exist: choose one from 1 to 65535."),
    ],
)
def test_a_wrong_argument_exits_2_with_one_line(arguments, sentence):
    process = start(*arguments)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (2, sentence + "\n")


def test_what_a_space_offers_is_said_by_a_variable():
    environment = os.environ | {"TWINFRAME_MODELS": "mini-qwen,flux.9"}
    _, stderr = start(env=environment).communicate(timeout=30)
    assert stderr.startswith("There is no model 'flux.9'")


def test_a_port_in_use_exits_2_with_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert stderr == (f"Cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another with --port.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_app_cleanly(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("--port", str(port))
    try:

        def answers():
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        assert until(answers, 120)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in stderr
