"""The table of formats and remedies: what is compared with what, kept and gone on with."""

import json

import pytest

from assets.figures import remedies
from engine import catalog
from engine.formats import LABELS, QUANTIZED
from engine.machine import Machine
from engine.quantization import capability
from engine.request import CompareRequest

MODELS = ["mini-flux", "mini-qwen", "mini-ltx2"]


class StandIn:
    """A bench without pictures: what a lane makes of a prompt is its distance from bf16."""

    made: list

    def __init__(self, spec, device, source, say):
        self.spec, self.source, self.say, self.device = spec, source, say, capability.device_named(device)
        self.machine, self.exact = Machine(name=f"a {device}", kind="cpu"), None
        self.support = {name: capability.support(name, self.machine) for name in QUANTIZED}

    def request(self, prompt):
        return CompareRequest.create(prompt, model=self.spec.id, precisions=QUANTIZED)

    def quantized(self, recipe, precision):
        return (recipe, precision), None

    def make_all(self, lane, prompts, steps=(0, 0), seed=None):
        if lane is None:
            return [0.3 * (seed is not None and seed != self.request("a").seed) for _ in prompts]
        self.made += [(prompt, lane[0].id) for prompt in prompts]
        tuning = lane[0].tunings[lane[1]]
        gain = 0.05 * tuning.four_over_six + 0.01 * any(steps)
        return [0.1 - gain + 0.001 * (len(prompt) % 3) for prompt in prompts]


@pytest.fixture
def bench(monkeypatch):
    StandIn.made = []
    monkeypatch.setattr(remedies, "Bench", StandIn)
    monkeypatch.setattr(remedies, "distances_of", lambda bench, made, exact: made)
    monkeypatch.setattr(remedies.loading, "fingerprint", lambda spec, source: "f")
    return StandIn


@pytest.mark.parametrize("model", MODELS)
def test_every_format_is_there_and_every_remedy_has_a_name_of_its_own(model):
    names = [lane.name for lane in remedies.lanes(catalog.model(model).family)]
    assert names[: len(QUANTIZED)] == [LABELS[name] for name in QUANTIZED]
    assert len(set(names)) == len(names)


def test_a_run_is_gone_on_with_on_the_same_machine_alone(bench, tmp_path):
    out = tmp_path / "out.json"
    remedies.measure("mini-flux", out, "cpu", 2, 1)
    first = len(bench.made)
    assert first == 2 * len(remedies.lanes("mini-flux"))
    assert len({prompt for prompt, _ in bench.made}) == 2
    found = remedies.measure("mini-flux", out, "cpu", 3, 1)
    assert len(bench.made) == first * 3 // 2 and json.loads(out.read_text()) == found
    remedies.measure("mini-flux", out, "meta", 1, 1)
    assert len(bench.made) == first * 3 // 2 + first // 2


def test_several_prompts_at_once_are_all_scored(bench, tmp_path):
    found = remedies.measure("mini-flux", tmp_path / "out.json", "cpu", 5, 2)
    assert len(found["prompts"]["report"]) == 5
    assert {len(row["each"]["report"]) for row in found["formats"]} == {5}


def test_a_remedy_is_compared_with_its_own_format(bench, tmp_path):
    lines = remedies.table(remedies.measure("mini-flux", tmp_path / "out.json", "cpu", 4, 4)).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert "LPIPS, 4 prompts" in lines[0] and rows["bf16, another seed"][0] == "0.3000 (0.3000 to 0.3000)"
    assert rows["NVFP4"][-1].strip(" |") == rows["FP8"][-1].strip(" |") == ""
    assert rows["NVFP4, four over six"][-1].startswith("+50%") and rows["INT8, rotated by 16"][-1].startswith("+0%")
    assert rows["NVFP4, calibrated, first steps"][-1].startswith("+10%")


@pytest.mark.parametrize("model", MODELS)
def test_the_recipes_readme_has_the_table_of_what_was_measured(model):
    found = json.loads((catalog.ASSETS / "quality" / f"{model}-remedies.json").read_text())
    said = (catalog.ASSETS / "recipes" / "README.md").read_text()
    assert f"<!-- remedies {model} -->\n{remedies.table(found)}\n<!-- /remedies -->" in said
