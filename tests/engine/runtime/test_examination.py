"""What is said of machines that are not here, and that the table of them in engine/README.md says the same."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import catalog
from engine.catalog import FLUX_DEV
from engine.formats import LABELS, QUANTIZED, REFERENCE
from engine.machine import FAULT, FINE, LIMIT, Machine, Proof, unusable_gpu
from engine.quantization import capability, proof
from engine.results import DENOISER
from engine.runtime import examination
from engine.weights import residency
from tests.support import products

README = Path(__file__).resolve().parents[3] / "engine" / "README.md"
OLD = unusable_gpu("13.0", "535.104.05", {})
NO_TRITON = "Triton is missing: pip install triton-windows, in the version that belongs to this PyTorch"


def card(name, *capability, mslk=True, **more):
    return Machine(name=name, kind="cuda", capability=capability, mslk=mslk, **more)


MACHINES = {
    "NVIDIA B200, 180 GB": (card("NVIDIA B200", 10, 0), 180),
    "RTX PRO 6000 Blackwell, 96 GB": (card("NVIDIA RTX PRO 6000 Blackwell", 12, 0), 96),
    "RTX 5090, 32 GB": (card("NVIDIA GeForce RTX 5090", 12, 0), 32),
    "RTX 5090 on Windows, no Triton, no mslk": (
        replace(
            card("NVIDIA GeForce RTX 5090", 12, 0, mslk=False),
            no_compile=NO_TRITON,
            note=f"Nothing is compiled: {NO_TRITON}.",
        ),
        32,
    ),
    "H100, 80 GB": (card("NVIDIA H100 80GB HBM3", 9, 0), 80),
    "RTX 4090, 24 GB": (card("NVIDIA GeForce RTX 4090", 8, 9), 24),
    "RTX 3090, 24 GB": (card("NVIDIA GeForce RTX 3090", 8, 6), 24),
    "A100, 80 GB": (card("NVIDIA A100-SXM4-80GB", 8, 0), 80),
    "T4, 16 GB": (card("Tesla T4", 7, 5), 16),
    "B200 with a driver too old": (
        Machine(name="Some CPU", kind="cpu", note=f"This runs on the CPU, not on a GPU. {OLD}"),
        64,
    ),
    "Mac with Apple silicon, 32 GB": (Machine(name="Apple M3", kind="cpu"), 32),
}
SHAPE = frozenset({(64, 128, True)})


@pytest.fixture
def held(monkeypatch, tmp_path):
    """What `examine` looks at, of a machine with so much memory whose native products were compared or not."""
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "_scaled_mm", products.multiply)
    monkeypatch.setattr(examination, "nvidia_driver", lambda: None)

    def make(machine, gigabytes, proven=True):
        on = torch.device("cpu" if machine.kind == "cpu" else "cuda")
        room = residency.Room(what="host memory" if on.type == "cpu" else "GPU memory", free=gigabytes, total=gigabytes)
        host = residency.Room(what="host memory", free=256, total=256)
        monkeypatch.setattr(residency, "rooms", lambda device: (room, room if on.type == "cpu" else host))
        if proven:
            # mslk's quantizer is a kernel for a GPU; torchao's is compared in its place.
            bare = replace(machine, mslk=False)
            compared = proof.prove(bare, torch.device("cpu"), dict.fromkeys(QUANTIZED, SHAPE))
            machine = replace(machine, proofs=compared.proofs)
        return SimpleNamespace(machine=machine, support=capability.supports(machine), device=on)

    return make


def row(title, found):
    machine, cells = found.machine, [title]
    said = {"native": "native, once proven", "emulated": "emulated", "unavailable": "refused"}
    cells += [said[found.support[name].execution] for name in QUANTIZED]
    fit = examination.fitting(FLUX_DEV, found.device)
    can = [name for name in fit if name == REFERENCE or found.support[name].execution != "unavailable"]
    streamed = [LABELS[name] for name in can if DENOISER in fit[name]]
    if REFERENCE not in fit:
        cells.append("without bf16" if can else "refused")
    elif streamed:
        cells.append(f"{', '.join(streamed)} streamed")
    else:
        cells.append("runs, text encoders streamed" if fit[REFERENCE] else "runs")
    why = machine.note or next(
        (found.support[name].reason for name in QUANTIZED if found.support[name].execution != "native"), ""
    )
    return f"| {' | '.join([*cells, why])} |"


def test_the_table_of_machines_is_what_the_engine_says_of_them(held):
    columns = ["Machine", *(LABELS[name] for name in QUANTIZED), "FLUX.1-dev", "Why"]
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    table = "\n".join([*head, *(row(title, held(*of)) for title, of in MACHINES.items())])
    said = re.search(r"<!-- machines -->\n(.*?)\n<!-- /machines -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert said and said[1] == table, f"\n{table}"


@pytest.mark.parametrize("title", MACHINES)
@pytest.mark.parametrize("proven", [True, False])
def test_every_finding_is_told_and_nothing_is_native_that_was_not_compared(held, title, proven):
    found = examination.examine(held(*MACHINES[title], proven))
    by_topic = {finding.topic: finding for finding in found}
    assert len(by_topic) == len(found)
    assert {LABELS[name] for name in QUANTIZED} | {spec.name for spec in catalog.MODELS.values()} < by_topic.keys()
    for finding in found:
        assert finding.said.endswith(".") and "\n" not in finding.said and ".." not in finding.said, finding
        assert finding.severity != FAULT or finding.do
    for name in QUANTIZED:
        fine = by_topic[LABELS[name]].severity == FINE
        native = capability.support(name, MACHINES[title][0]).execution == "native"
        assert fine == (native and proven)
    if "B200 with" in title:
        assert by_topic["GPU"].severity == FAULT and "Update the driver" in by_topic["GPU"].do
    if "no Triton" in title:
        assert by_topic["Triton"].severity == FAULT and by_topic["mslk"].severity == LIMIT


def test_a_wrong_product_is_a_fault_with_what_to_do(held):
    machine, gigabytes = MACHINES["RTX 5090, 32 GB"]
    wrong = replace(machine, proofs=(Proof(precision="nvfp4", fault="a native product is wrong"),))
    found = examination.examine(held(wrong, gigabytes, proven=False))
    (nvfp4,) = [finding for finding in found if finding.topic == "NVFP4"]
    assert nvfp4.severity == FAULT and "proofs.json" in nvfp4.do
    assert nvfp4.said.endswith(" has tensor cores for NVFP4, but a native product is wrong, so NVFP4 is emulated.")


def test_what_can_be_proven_is_what_is_native_and_fits(held):
    b200, small = held(*MACHINES["NVIDIA B200, 180 GB"]), (MACHINES["RTX 3090, 24 GB"])
    plans = examination.provable(b200)
    assert {plan.precision for plan in plans} == set(QUANTIZED)
    assert (3072, 12288, False) in {shape for plan in plans for shapes in plan.shapes.values() for shape in shapes}
    assert {plan.precision for plan in examination.provable(held(*small))} == {"int8"}
    assert examination.provable(held(*MACHINES["T4, 16 GB"])) == []
