"""The second search for NVFP4 recipes: what learns from what, what is gone on with, and the table of it."""

import argparse
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from assets.figures import frontier
from engine import catalog
from engine.formats import FORMATS, INT8, NVFP4, QUANTIZED
from engine.machine import Machine
from engine.quality import tune
from engine.quantization import capability, gptq, nvfp4, recipe_files, recipes
from engine.request import CompareRequest
from engine.weights import loading

MODEL = "mini-flux"
WIDTH = 256


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.x_embedder = nn.Linear(WIDTH, WIDTH)
        self.transformer_blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.proj_out = nn.Linear(WIDTH, WIDTH)
        self.bfloat16().requires_grad_(False)

    def forward(self, x):
        x = self.x_embedder(x)
        for block in self.transformer_blocks:
            x = x + block(torch.tanh(x))
        return (self.proj_out(x),)


class StandIn:
    """A bench whose pictures are what the denoiser says of noise."""

    def __init__(self, spec, device, source, say):
        self.spec, self.source, self.say, self.device = spec, source, say, capability.device_named(device)
        self.machine, self.exact = Machine(name="a cpu", kind="cpu"), Denoiser()
        self.support = {name: capability.support(name, self.machine) for name in QUANTIZED}

    def request(self, prompt):
        return CompareRequest.create(prompt, model=self.spec.id, precisions=QUANTIZED)

    def quantized(self, recipe, precision):
        plan, made = recipes.plan(self.exact, recipe, precision), Denoiser()
        recipes.apply(made, plan, self.support[precision])
        recipes.verify(made, plan)
        return made, plan

    def make_all(self, denoiser, prompts, steps=(0, 0), seed=7):
        return [denoiser(noise(prompt, seed))[0] for prompt in prompts]


def noise(prompt, seed):
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(seed + sum(map(ord, prompt)))).bfloat16()


def calls(bench, prompts, seeds):
    asked = [noise(prompt, seed) for seed in seeds for prompt in prompts]
    return [((x,), {}, bench.exact(x)) for x in asked]


NAMES = ("x_embedder", *(f"transformer_blocks.{index}" for index in range(6)), "proj_out")
ROWS = dict.fromkeys(NAMES, 32)


@pytest.fixture
def search(monkeypatch, tmp_path):
    known = json.loads((catalog.ASSETS / "quality" / f"{MODEL}.json").read_text())
    cells = [
        {"role": "r", "depth": "0", "names": [name], "drift": 0.01 * (1 + number)} for number, name in enumerate(NAMES)
    ]
    (tmp_path / "quality").mkdir()
    (tmp_path / "quality" / f"{MODEL}.json").write_text(json.dumps(known | {"sensitivity": {"cells": cells}}))
    weights = {name: nvfp4.quantize(Denoiser().get_submodule(name).weight.data) for name in NAMES[1:3]}
    files = gptq.write(tmp_path, "calibrated", weights)
    tuned = SimpleNamespace(id="tuned", tunings={NVFP4.id: recipe_files.Tuning(calibrated=files)})
    monkeypatch.setattr(frontier.recipe_files, "read", lambda family: (tuned,))
    monkeypatch.setattr(frontier.catalog, "ASSETS", tmp_path)
    monkeypatch.setattr(frontier, "Bench", StandIn)
    monkeypatch.setattr(frontier, "Probe", lambda bench, prompts, steps: SimpleNamespace(rows=ROWS))
    monkeypatch.setattr(frontier.distill, "calls", calls)
    monkeypatch.setattr(frontier, "distances_of", lambda bench, made, exact: [
        float((a.float() - b.float()).square().mean()) for a, b in zip(made, exact, strict=True)
    ])  # fmt: skip
    monkeypatch.setattr(frontier.loading, "fingerprint", lambda spec, source: "f")
    args = argparse.Namespace(
        device="cpu", seconds=600.0, most=3, rate=0.01, learn_from=70, rounds=2, limit=3, at_once=2
    )
    return lambda **more: frontier.Frontier(MODEL, tmp_path / "out", argparse.Namespace(**{**vars(args), **more}))


def test_a_search_keeps_to_its_budgets_is_gone_on_with_and_has_a_table(search, monkeypatch):
    made = search()
    assert set(made.prompts()).isdisjoint(made.known["prompts"]["report"]) and len(made.prompts()) == 70
    found = made.run()
    rows = found["formats"]
    plain, more = rows[0], rows[-1]
    (rebalanced,) = (row for row in rows if row["recipe"] == "rebalanced")
    for row in (rebalanced, *(row for row in rows if row["label"].endswith("exchanged, learnt"))):
        assert row["weight_bytes"] <= plain["weight_bytes"]
        assert row["gemm_time_of_bf16"] <= plain["gemm_time_of_bf16"]
    assert more["weight_bytes"] <= 1.08 * plain["weight_bytes"]
    assert {len(row["each"]["report"]) for row in rows} == {3}
    file = made.out / f"{MODEL}-rebalanced.json"
    assert file.is_file() == bool(found["chosen"]["layers"])
    made.recipe_file(frontier.Lane("", made.tuning({"x_embedder": INT8.id})))
    read = json.loads(file.read_text())
    assert read["id"] == "rebalanced" and read["tunings"][NVFP4.id]["layers"] == {"x_embedder": INT8.id}
    again = search()
    monkeypatch.setattr(again, "learn", lambda *args, **how: pytest.fail("what was learnt is learnt again"))
    monkeypatch.setattr(again, "denoiser", lambda *args: pytest.fail("what was scored is scored again"))
    assert again.run()["formats"] == rows
    lines = frontier.table(found).splitlines()
    assert "LPIPS, 3 prompts" in lines[0] and lines[2].endswith("|  |") and "(+0.0%)" in lines[2]
    assert all(line.count("|") == 7 for line in lines)


def test_weights_alone_are_a_choice_that_takes_time_and_no_bytes():
    layers = {
        name: recipes.LayerPlan(name=name, in_features=64, out_features=64, precision="nvfp4", reason="")
        for name in "ab"
    }
    groups = [{"names": [name], "drift": drift} for name, drift in zip("ab", (0.1, 0.2), strict=True)]
    shares = {"bf16": 0.0, tune.WEIGHTS_ALONE: 0.1}
    size = sum(layer.bytes for layer in layers.values())
    work = {"a": 100.0, "b": 1.0}
    assert tune.choose(groups, layers, shares, work, size, 26.0) == {"a": "nvfp4", "b": tune.WEIGHTS_ALONE}


@pytest.mark.parametrize("model", ["mini-flux", "mini-qwen", "mini-ltx2"])
def test_the_recipes_readme_has_the_table_of_what_was_found(model):
    found = json.loads((catalog.ASSETS / "quality" / f"{model}-frontier.json").read_text())
    said = (catalog.ASSETS / "recipes" / "README.md").read_text()
    assert f"<!-- frontier {model} -->\n{frontier.table(found)}\n<!-- /frontier -->" in said


@pytest.mark.parametrize("model", ["mini-flux", "mini-qwen", "mini-ltx2"])
def test_the_rebalanced_recipe_is_the_one_that_was_scored(model):
    spec = catalog.model(model)
    found = json.loads((catalog.ASSETS / "quality" / f"{model}-frontier.json").read_text())
    (row,) = (row for row in found["formats"] if row["recipe"] == "rebalanced")
    plan = recipes.plan(loading.empty_transformer(spec), recipes.recipe(spec.family, "rebalanced"), NVFP4.id)
    kinds = Counter(layer.precision for layer in plan.layers)
    assert row["layers"] == {name: kinds[name] for name in FORMATS if kinds[name]}
    assert row["weight_bytes"] == plan.quantized_bytes <= found["formats"][0]["weight_bytes"]
    assert row["gemm_time_of_bf16"] <= found["formats"][0]["gemm_time_of_bf16"]
