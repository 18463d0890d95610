"""What is said of other systems without one of them: which packages they get, and what Python has not there."""

import ast
import platform
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from engine.quantization import capability
from tests.support.running import ROOT
from tests.test_imports import WITHOUT

LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
SYSTEMS = {
    "Linux on x86-64": LINUX | {"platform_machine": "x86_64"},
    "Linux on aarch64": LINUX | {"platform_machine": "aarch64"},
    "macOS on Apple silicon": {
        "sys_platform": "darwin",
        "platform_system": "Darwin",
        "platform_machine": "arm64",
        "os_name": "posix",
    },
    "Windows": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
}
UNIX = {
    "os": {"nice", "getuid", "geteuid", "getgid", "fork", "kill", "killpg", "setsid", "sysconf", "getloadavg", "uname"}
    | {"chown", "fchmod", "mkfifo", "statvfs", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "WNOHANG"},
    "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "alarm", "setitimer", "pthread_kill", "sigwait"},
}
"""Of modules that every system has, what Windows has not (Python's documentation, "Availability: Unix")."""
UNIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
CODE = [*(ROOT / "engine").glob("**/*.py"), *(ROOT / "ui").glob("**/*.py"), ROOT / "app.py"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_gets_all_packages_but_mslk_which_is_for_one(system):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    left = {need.name for need in wanted if need.marker and not need.marker.evaluate(SYSTEMS[system])}
    assert left == (set() if system == "Linux on x86-64" else {"mslk-cuda"})


def test_what_windows_has_not_is_used_only_where_it_is():
    found = set()
    for file in CODE:
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            asked = {
                (node.args[0].id, node.args[1].value)
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
                if isinstance(node.args[0], ast.Name) and isinstance(node.args[1], ast.Constant)
            }
            found |= {
                (file.name, node.attr)
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                if node.attr in UNIX.get(node.value.id, ()) and (node.value.id, node.attr) not in asked
            }
    assert found == {("telemetry.py", "sysconf")}, "which comes after /proc, where Windows gives up"


def test_everything_without_torch_works_without_what_is_for_unix_alone(tmp_path):
    program = f"""
import importlib, os, sys
import asyncio, getpass, logging, multiprocessing, pathlib, platform, shutil, signal, subprocess, tempfile
import PIL, av, httpx, huggingface_hub, numpy, psutil
for name in {UNIX_MODULES!r}:
    sys.modules[name] = None
for module, names in {UNIX!r}.items():
    for name in names:
        if name != "kill" and hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
sys.platform, known = "win32", sys.platform
import engine.files
sys.platform = known  # the standard library would look for itself there
for name in {sorted(WITHOUT)!r}:
    importlib.import_module(name)
from engine import files
from pathlib import Path
sys.platform, os.environ["USERNAME"] = "win32", "somebody"
assert files.claim(Path({str(tmp_path)!r})) is None
assert files.own_temporary().is_dir() and files.cache_folder()
getpass.getuser = lambda: (_ for _ in ()).throw(ImportError())
files.provide_user()
assert os.environ["LOGNAME"] == "user"
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("script", "named"), [("echo Apple M3 Pro", "Apple M3 Pro"), (None, "arm")])
def test_a_macs_processor_has_its_name(monkeypatch, tmp_path, script, named):
    monkeypatch.setattr(capability.Path, "exists", lambda self: False)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "sysctl").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "sysctl").chmod(0o755)
    assert capability._cpu_name() == named
