"""Columns whose denoiser attends in FP8: asked for by name alone, said wherever they are named, never timed."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from PIL import Image

from engine import catalog
from engine.benchmark import bench
from engine.columns import EXACT, Column, label
from engine.compiler import compilation
from engine.errors import RequestError, UnsupportedError
from engine.machine import Machine
from engine.outputs import blind, export, media
from engine.outputs.program import code
from engine.quality import evaluate
from engine.quantization import attention, capability
from engine.request import CompareRequest
from engine.results import Comparison
from engine.runtime import timing
from engine.runtime.joint import JointStudio
from engine.runtime.multi_device import driving
from engine.runtime.pipeline import call
from engine.runtime.studio import Studio
from engine.weights.source import Source
from tests.support import own_catalog, tiny
from tests.support.fake_engine import FakeWorker
from ui import link, words
from ui.handlers import chips

COLUMNS = ("bf16", "bf16+fp8-attention", "fp8", "fp8+fp8-attention")
LOSSY = Column("bf16", "+fp8-attention")


@pytest.fixture(autouse=True, scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        own_catalog.begin(patch)
        patch.setattr(timing, "added_bytes", lambda run, device: (run(), 1000)[1])
        yield


@pytest.fixture(scope="module")
def spec(patched, tmp_path_factory):
    folder = tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux")
    catalog.give(replace(tiny.spec("flux.1-dev", folder), recipes=("full", "post")))
    return catalog.model("tiny-flux.1-dev")


@pytest.fixture(scope="module")
def made(spec, cache, tmp_path_factory):
    request = CompareRequest.create("a cat", model=spec.id, precisions=COLUMNS, num_inference_steps=1)
    studio, out = Studio("cpu"), tmp_path_factory.mktemp("made")
    with driving(studio.device):
        return SimpleNamespace(comparison=studio.compare(request, out, lambda _: None, lambda: False), studio=studio)


def test_each_is_a_column_of_its_own_and_its_attention_is_said(made):
    comparison = made.comparison
    assert comparison.request.precisions == tuple(g.column for g in comparison.results) == COLUMNS
    bf16, lossy, fp8, both = comparison.results
    assert all(g.metrics.mean_lpips > 0 for g in (lossy, fp8, both))
    assert len({g.metrics.mean_lpips for g in (lossy, fp8, both)}) == 3
    assert lossy.memory.weights == bf16.memory.weights and both.layers == fp8.layers and both.layers.quantized
    assert [g.ran["Attention"] == attention.WORDS for g in comparison.results] == [False, True] * 2
    assert (bf16.execution, lossy.execution) == ("native", "emulated") and not lossy.latency_comparable
    assert lossy.ran["Execution"].endswith(attention.EMULATED) and attention.EMULATED not in fp8.ran["Execution"]
    assert comparison.speedup(lossy) is None and not lossy.is_unquantized
    inside = [media.read_recipe(Path(g.files[0])) for g in comparison.results]
    assert [each["execution"] for each in inside] == ["native", *["emulated"] * 3]
    assert [each.get("attention") for each in inside] == [None, attention.WORDS] * 2


def test_saved_tables_links_and_blind_pairs_hold_it(made, tmp_path):
    comparison = made.comparison
    comparison.save(tmp_path)
    assert Comparison.load(tmp_path).request == comparison.request
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert [(row["column"], row["recipe"]) for row in rows] == [(column, "full") for column in COLUMNS]
    assert [bool(row["latency_total_s"]) for row in rows] == [True, False, False, False]
    values = dict(parse_qsl(link.query(comparison.request)[1:]))
    assert link.read(values, [comparison.request.model]) == comparison.request
    pairs = list(blind.pairs(comparison, fresh=True))
    assert [pair.recipe for pair in pairs] == ["+fp8-attention", "full", "full+fp8-attention"]


def test_its_name_says_so_everywhere(made):
    comparison, asked = made.comparison, made.comparison.request
    for column in COLUMNS[1::2]:
        by = asked.column(column)
        assert label(column).endswith(" with FP8 attention") and words.name(asked, column) == label(column)
        assert words.compare.chip(by, "native").endswith("with FP8 attention · emulated")
        assert "FP8 attention" in words.explain.column(by) and words.of_recipe(by.recipe).endswith("FP8 attention")
        assert f"{label(column)}:" in words.verdict.verdict(comparison)
    assert label("nvfp4@tuned+no-lora+fp8-attention") == "NVFP4 tuned without LoRA with FP8 attention"
    assert words.verdict.COSTS_THE_SAME not in words.verdict.verdict(comparison)


def test_the_page_offers_it_only_to_whom_asked_for_it():
    worker, asked = FakeWorker(), ["nvfp4@tuned+fp8-attention", "bf16+fp8-attention", "nvfp4@gone+fp8-attention"]
    for chosen, wanted in ((["bf16", "fp8"], ["fp8"]), (asked, asked[:2])):
        shown, further = chips(catalog.MINI_FLUX, worker, chosen)
        assert shown["value"] == wanted
        lossy = [(said, column) for said, column in shown["choices"] + further["choices"] if "attention" in column]
        assert [column for _, column in lossy] == [column for column in wanted if "attention" in column]
        assert all("with FP8 attention" in said for said, _ in lossy)


@pytest.mark.parametrize("column", COLUMNS[1::2])
def test_its_program_says_it_too_and_in_bf16_makes_the_pixels(made, spec, tmp_path, monkeypatch, column):
    program = code(made.comparison.request, column, "emulated").replace(f"assets/{spec.source}", spec.source)
    assert "# Its FP8 attention is emulated" in program and "compile_repeated_blocks" not in program
    assert max(map(len, program.splitlines())) <= 120
    if column.startswith("bf16"):
        monkeypatch.chdir(tmp_path)
        exec(program, {})
        with Image.open(f"{column}.png") as theirs, Image.open(made.comparison.results[1].files[0]) as ours:
            assert np.array_equal(np.asarray(theirs), np.asarray(ours))


def test_text_encoders_vae_and_other_columns_keep_theirs(made, spec, monkeypatch):
    """With attention that makes nothing in place of the option's: only its own column changes."""
    request, calls = made.comparison.request, []
    monkeypatch.setattr(attention, "attend", lambda query, **_: (calls.append(1), torch.zeros_like(query))[1])
    for column, counted in ((EXACT, 0), (LOSSY, 4)):
        with driving(made.studio.device):
            rendition = made.studio.rendition(spec, column, lambda _: None)
            call(rendition.pipeline, spec, request, request.seed)
        assert len(calls) == counted  # two joint blocks and two single ones, one step


@pytest.mark.parametrize("model", [name for name in tiny.KINDS if name not in ("flux.1-dev", "qwen-image-2512")])
def test_every_attention_of_every_kind_goes_through_it(model, tmp_path, cache, monkeypatch):
    spec = tiny.spec(model, tiny.checkpoint(model, tmp_path / "tiny"))
    catalog.give(spec)
    calls, masked, attend = [], [], attention.attend

    def counted(query, key, value, attn_mask=None, **further):
        calls.append(1)
        masked.append(attn_mask is not None)
        return attend(query, key, value, attn_mask, **further)

    monkeypatch.setattr(attention, "attend", counted)
    studio, entered = Studio("cpu"), []
    with driving(studio.device):
        rendition = studio.rendition(spec, LOSSY, lambda _: None)
        for module in rendition.pipeline.transformer.modules():
            if hasattr(module, "processor"):
                module.register_forward_hook(lambda *_: entered.append(1))
        request = CompareRequest.create("a cat", model=spec.id, num_inference_steps=spec.limits.num_inference_steps[0])
        call(rendition.pipeline, spec, request, request.seed)
    left_out = model == "ltx-2.3"  # whose guidance leaves attention out in one pass
    assert len(calls) == len(entered) > 0 or (left_out and 0 < len(calls) < len(entered))
    assert any(masked) == model.startswith("ltx-2")


def test_on_a_gpu_its_blocks_run_eager_and_its_layers_natively(monkeypatch):
    hopper = Machine(name="NVIDIA H100", kind="cuda", capability=(9, 0))
    layers = capability.support("fp8", hopper)
    said = attention.supported(layers)
    assert (layers.execution, said.execution, said.gemm) == ("native", "emulated", layers.gemm)
    studio = SimpleNamespace(support=capability.supports(hopper), device=torch.device("cuda"))
    asked = CompareRequest.create("a cat", precisions=["fp8", "fp8+fp8-attention"])
    modes = [Studio.mode(studio, column, catalog.MINI_FLUX, asked) for column in asked.columns]
    assert modes[1:] == [compilation.GRAPHS, compilation.EAGER]


def test_evaluations_score_it_beside_its_own(spec):
    settings = evaluate.Settings(precisions=("fp8+fp8-attention", "bf16+fp8-attention", "fp8"))
    lanes = evaluate._lanes(spec, settings)
    assert [evaluate._stem(lane) for lane in lanes] == ["bf16-+fp8-attention", "fp8-full", "fp8-full+fp8-attention"]
    assert [evaluate._said(lane)["recipe"] for lane in lanes] == ["+fp8-attention", "full", "full+fp8-attention"]
    assert [lane.by for lane in lanes] == ["with FP8 attention", "full", "full with FP8 attention"]


def test_what_would_time_or_store_it_or_share_it_out_refuses_in_one_sentence(made, spec, tmp_path):
    settings = bench.Settings(precisions=("bf16+fp8-attention",), batch_sizes=(1,), methods=("engine",))
    lossy = Column("fp8", "full+fp8-attention")
    with pytest.raises(RequestError, match=r"its time says nothing: leave out \+fp8-attention; evaluate") as timed:
        bench._Bench(spec, settings, made.studio, print)
    with pytest.raises(RequestError, match=r"stores weights, .*: leave out \+fp8-attention") as stored:
        export.write(spec, lossy, torch.device("cpu"), Source(), tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"have no FP8 attention: leave out \+fp8-attention, or name") as shared:
        JointStudio.rendition(made.studio, spec, lossy, print)
    assert all(str(each.value).count(". ") == 0 for each in (timed, stored, shared))
