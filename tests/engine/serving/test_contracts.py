"""Contracts between rooms: whatever stands where one is asked for keeps to it, the tests' stand-ins too."""

import inspect
import re
from pathlib import Path

import pytest

from engine.runtime.device import Device
from engine.serving import contracts, lent, worker
from engine.serving.lent import Lent
from engine.serving.process import Process
from tests.support import fake_engine

ROOT = Path(__file__).resolve().parents[3]


def asked_for(contract: type) -> list[str]:
    return sorted(name for name in dir(contract) if not name.startswith("_"))


def positions(function: object) -> int:
    """How many arguments may be given by their place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = [parameter for parameter in inspect.signature(function).parameters.values() if parameter.kind in kinds]
    return len([parameter for parameter in given if parameter.name != "self"])


@pytest.mark.parametrize(
    ("contract", "kind"),
    [
        (contracts.Device, Device),
        (contracts.Device, Process),
        (contracts.Device, Lent),
        (lent.Placing, Device),
        (contracts.Worker, worker.Worker),
        (contracts.Worker, fake_engine.FakeWorker),
        (contracts.Job, worker.Job),
        (contracts.Job, fake_engine.FakeJob),
    ],
)
def test_what_is_asked_for_is_there(contract, kind):
    made = fake_engine.FakeWorker() if kind is fake_engine.FakeWorker else None
    names = asked_for(contract)
    assert len(names) > 1
    for name in names:
        assert hasattr(kind, name) or hasattr(made, name), name
        wanted, found = getattr(contract, name), getattr(kind, name, None)
        if inspect.isfunction(wanted):
            assert positions(found) >= positions(wanted), name


def test_nothing_is_asked_for_that_no_contract_promises():
    of_the_device = re.findall(r"self\.device\.(\w+)", inspect.getsource(worker))
    of_the_worker = [
        name for file in (ROOT / "ui").glob("**/*.py") for name in re.findall(r"\b_?worker\.(\w+)", file.read_text())
    ]
    of_a_job = [
        name for file in (ROOT / "ui").glob("**/*.py") for name in re.findall(r"\bjob\.(\w+)", file.read_text())
    ]
    for names, contract in (
        (of_the_device, contracts.Device),
        (of_the_worker, contracts.Worker),
        (of_a_job, contracts.Job),
    ):
        assert names and set(names) <= set(asked_for(contract))
