"""What the environment decides before anything is imported."""

import subprocess
import sys

import pytest

from engine.environment import SPINS, leave_cores_to_others


@pytest.mark.parametrize(
    ("said", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": str(SPINS)}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
    ids=["unset", "spins", "policy"],
)
def test_threads_sleep_soon_unless_the_user_has_said_how(said, then):
    leave_cores_to_others(said)
    assert said == then


@pytest.mark.parametrize(
    "run",
    [
        "from engine.serving import process; "
        "process._device('no such device', process.BUNDLED_OR_HUB, process.NO_FILTER)",
        "import engine.__main__ as command; command._parser = lambda: sys.exit(1); command._run()",
    ],
    ids=["the app's device", "the command line"],
)
def test_threads_are_told_before_torch_is_imported(run):
    program = f"""
import os, sys
class First:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, First())
os.environ.pop("GOMP_SPINCOUNT", None), os.environ.pop("OMP_WAIT_POLICY", None)
try:
    {run}
finally:
    print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert told.stdout.split() == [str(SPINS)]
