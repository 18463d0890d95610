"""The table of formats and remedies: what is compared with what, kept and gone on with."""

import json
from types import SimpleNamespace

import pytest

from assets.figures import remedies
from engine import catalog
from engine.formats import LABELS, QUANTIZED
from engine.machine import Machine
from engine.quantization import capability
from engine.request import CompareRequest


class StandIn:
    """A bench without pictures: a score for each lane, and a count of what was made."""

    made: list

    def __init__(self, spec, device, source, say):
        self.spec, self.source, self.say, self.device = spec, source, say, capability.device_named(device)
        self.machine, self.exact = Machine(name=f"a {device}", kind="cpu"), None
        self.support = {name: capability.support(name, self.machine) for name in QUANTIZED}

    def request(self, prompt):
        return CompareRequest.create(prompt, model=self.spec.id, precisions=QUANTIZED)

    def quantized(self, recipe, precision):
        return (recipe, precision), None

    def lpips(self, lane, prompt, steps):
        self.made.append((prompt, lane[0].id))
        tuning = lane[0].tunings[lane[1]]
        return 0.1 - 0.05 * tuning.four_over_six - 0.01 * any(steps) + 0.001 * (len(prompt) % 3)


@pytest.fixture
def bench(monkeypatch):
    StandIn.made = []
    monkeypatch.setattr(remedies, "Bench", StandIn)
    monkeypatch.setattr(remedies, "other_seed", lambda bench, prompt: 0.3)
    monkeypatch.setattr(remedies.loading, "fingerprint", lambda spec, source: "f")
    return StandIn


@pytest.mark.parametrize("model", ["mini-flux", "mini-qwen", "mini-ltx2"])
def test_every_format_is_there_and_every_remedy_has_a_name_of_its_own(model):
    names = [lane.name for lane in remedies.lanes(catalog.model(model).family)]
    assert names[: len(QUANTIZED)] == [LABELS[name] for name in QUANTIZED]
    assert len(set(names)) == len(names)


def test_a_run_is_gone_on_with_on_the_same_machine_alone(bench, tmp_path):
    out = tmp_path / "out.json"
    remedies.measure("mini-flux", out, "cpu", 2)
    first = len(bench.made)
    assert first == 2 * len(remedies.lanes("mini-flux"))
    assert len({prompt for prompt, _ in bench.made}) == 2
    found = remedies.measure("mini-flux", out, "cpu", 3)
    assert len(bench.made) == first * 3 // 2 and json.loads(out.read_text()) == found
    remedies.measure("mini-flux", out, "meta", 1)
    assert len(bench.made) == first * 3 // 2 + first // 2


def test_a_remedy_is_compared_with_its_own_format(bench, tmp_path):
    lines = remedies.table(remedies.measure("mini-flux", tmp_path / "out.json", "cpu", 4)).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert "LPIPS, 4 prompts" in lines[0] and rows["bf16, another seed"][0] == "0.3000 (0.3000 to 0.3000)"
    assert rows["NVFP4"][-1].strip(" |") == rows["FP8"][-1].strip(" |") == ""
    assert rows["NVFP4, four over six"][-1].startswith("+50%") and rows["INT8, rotated by 16"][-1].startswith("+0%")
    assert rows["NVFP4, calibrated, first steps"][-1].startswith("+10%")


def test_the_other_seed_is_bf16s_own(monkeypatch):
    asked = []

    def make(transformer, prompt, seed=None):
        asked.append(seed)
        return "made"

    bench = SimpleNamespace(
        make=make, exact=None, reference=lambda prompt: "reference", device="cpu",
        request=lambda prompt: SimpleNamespace(seed=7),
    )  # fmt: skip
    value = SimpleNamespace(mean=lambda: SimpleNamespace(item=lambda: 0.25))
    monkeypatch.setattr(remedies.distances, "clip_distance", lambda made, reference, device: [value])
    assert remedies.other_seed(bench, "a cat") == 0.25 and asked == [8]
