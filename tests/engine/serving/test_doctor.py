"""What the doctor finds, that each finding is one sentence with what to do, and which of them are faults."""

import json
import socket
import sys
import urllib.error
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engine import __main__ as cli
from engine.errors import FaultError
from engine.formats import PRECISIONS
from engine.machine import FAULT, FINE, LIMIT, Finding, Machine, Proof, Support
from engine.serving import doctor, process
from engine.weights import hub

HERE = Finding(topic="Device", severity=FINE, said="It is a card.")
WRONG = Finding(topic="NVFP4", severity=FAULT, said="It is wrong.", do="Mend it.")


class Card:
    """A device whose process is lost so many times while products are compared."""

    def __init__(self, findings=(HERE,), lost=0, says_why=True, alive=True):
        self.findings, self.lost, self.alive, self.asked = findings, lost, alive, 0
        self.machine = Machine(name="A card", kind="cuda", proofs=(Proof(precision="fp8", products=8, distance=0.25),))
        self.support = {
            name: Support(precision=name, execution="native", reason="", gemm="", machine=self.machine)
            for name in PRECISIONS
        }

    def prove(self, tell, stop):
        self.asked += 1
        if self.asked <= self.lost:
            raise FaultError("A product did not return.", kind="ProcessLost", lost=True)

    def examine(self):
        if not self.alive:
            raise FaultError("The engine's process does not start.", kind="ProcessLost", lost=True)
        return self.findings

    def close(self):
        self.closed = True


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def is_told(finding):
    for text in filter(None, (finding.said, finding.do)):
        assert text.endswith(".") and "\n" not in text, text
    assert finding.severity in (FINE, LIMIT, FAULT) and (finding.severity != FAULT or finding.do)
    return finding


@pytest.fixture
def around(monkeypatch, tmp_path):
    """A machine with all that is wanted, whatever this one has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(doctor, "PORT", probe.getsockname()[1])
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(doctor, "_reachable", lambda address: True)
    monkeypatch.setattr(hub, "has_token", lambda: True)
    return monkeypatch


def test_where_all_is_well_everything_is_fine(around):
    found = list(doctor.surroundings(offline=False))
    assert [finding.topic for finding in found] == ["Cache", "Disk", "Hub", "Token", "Clips", "Port"]
    assert {is_told(finding).severity for finding in found} == {FINE}


def full_disk(patch):
    patch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=40 * 10**9))


def no_encoder(patch):
    patch.setitem(sys.modules, "av", None)


def other_encoder(patch):
    patch.setattr(doctor, "CODECS", ("libx264", "no-such-codec"))


def taken_port(patch):
    held = socket.create_server(("127.0.0.1", 0))
    patch.setattr(doctor, "PORT", held.getsockname()[1])
    patch.setattr(doctor, "held", held, raising=False)


@pytest.mark.parametrize(
    ("break_it", "topic", "severity", "said"),
    [
        (full_disk, "Disk", LIMIT, "too few for Qwen-Image (58 GB)"),
        (no_encoder, "Clips", FAULT, "PyAV does not load"),
        (other_encoder, "Clips", FAULT, "no no-such-codec"),
        (taken_port, "Port", LIMIT, "is taken"),
        (lambda patch: patch.setattr(doctor, "_reachable", lambda _: False), "Hub", LIMIT, "does not answer"),
        (lambda patch: patch.setattr(hub.constants, "HF_HUB_OFFLINE", True), "Hub", LIMIT, "Nothing is fetched"),
        (lambda patch: patch.setattr(hub, "has_token", lambda: False), "Token", LIMIT, "FLUX.1-dev needs"),
        (lambda patch: patch.setattr(doctor.files, "can_be_written", lambda _: False), "Cache", FAULT, "anew"),
    ],
)
def test_what_is_amiss_is_found(around, break_it, topic, severity, said):
    break_it(around)
    found = by_topic(doctor.surroundings(offline=False))
    assert is_told(found[topic]).severity == severity and said in found[topic].said
    assert {f.severity for name, f in found.items() if name != topic} == {FINE}


@pytest.mark.parametrize(
    ("answer", "reached"),
    [
        (None, True),
        (urllib.error.HTTPError("", 503, "busy", None, None), True),
        (urllib.error.URLError("no route"), False),
        (TimeoutError(), False),
        (ValueError("unknown url type"), False),
    ],
)
def test_the_hub_is_reached_if_it_answers_anything(answer, reached):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def fetch(request, timeout):
        assert request.method == "HEAD" and timeout == doctor.HUB_SECONDS
        if answer is not None:
            raise answer
        return Answer()

    assert doctor._reachable("https://hub.example", fetch) == reached


@pytest.mark.parametrize(("severity", "status"), [(FINE, 0), (LIMIT, 0), (FAULT, 1)])
def test_a_fault_alone_decides_the_status(severity, status):
    assert doctor.status([HERE, replace(WRONG, severity=severity)]) == status


def test_a_device_whose_process_is_lost_is_asked_again_until_it_emulates(around):
    card = Card(lost=3)
    found = doctor.examine(card, offline=True)
    assert card.asked == 4 and found["status"] == 0
    assert found["formats"]["fp8"] == {
        "execution": "native",
        "proof": {"precision": "fp8", "fault": "", "products": 8, "distance": 0.25},
    }
    assert found["formats"]["nvfp4"] == {"execution": "native", "proof": None}


def test_a_device_that_is_lost_whatever_is_done_is_a_fault(around):
    found = doctor.examine(Card(lost=1000), offline=True)
    assert found["status"] == 1 and found["findings"][0]["topic"] == "Engine"


def test_a_device_that_does_not_start_is_a_fault_beside_all_others(around):
    found = doctor.examine(Card(alive=False), offline=True)
    assert found["status"] == 1 and found["device"] == ""
    topics = [finding["topic"] for finding in found["findings"]]
    assert topics == ["Engine", "Cache", "Disk", "Hub", "Clips", "Port"]


@pytest.mark.parametrize("findings", [(HERE,), (HERE, WRONG)])
def test_the_command_prints_lines_or_json_and_leaves_by_the_worst(around, capsys, findings):
    around.setattr(process, "Process", lambda device: Card(findings))
    told = {}
    for more in ((), ("--json",)):
        around.setattr(sys, "argv", ["engine", "doctor", "--offline", *more])
        try:
            cli.main()
            status = 0
        except SystemExit as left:
            status = left.code
        assert status == int(WRONG in findings)
        told[more] = capsys.readouterr().out
    lines, values = told[()].splitlines(), json.loads(told[("--json",)])
    assert list(values) == ["status", "device", "versions", "formats", "findings"] and values["device"] == "A card"
    assert len(lines) == len(values["findings"]) and all(len(finding) == 4 for finding in values["findings"])
    if WRONG in findings:
        assert "fault  NVFP4   It is wrong. Mend it." in lines
