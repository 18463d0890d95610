"""Real comparisons on the bundled miniature: fair, repeatable, honestly weighed, and with a ruler that is kept."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import av
import pytest
import torch
from PIL import Image
from torch import nn
from torchao.utils import get_model_size_in_bytes

from engine import __main__ as cli
from engine import catalog, environment, events
from engine.columns import EXACT, Column
from engine.compiler import compilation
from engine.metrics import distances
from engine.metrics.ruler import RulerShelf
from engine.outputs import blind, media
from engine.quantization import recipes
from engine.quantization.capability import stored_precision
from engine.request import CompareRequest
from engine.results import Comparison, Ruler
from engine.runtime import what_ran
from engine.runtime.pipeline import Made, finished
from engine.runtime.studio import Studio
from engine.weights import loading
from tests.support import tiny
from ui import view as views
from ui import words
from ui.html import cards

SPEC = catalog.MINI_FLUX
PRECISIONS = ("bf16", "mxfp8", "nvfp4")
KEPT_OUT = ("precisions", "previews")
"""Of a request: what a picture's recipe leaves out, as its bytes do not depend on it."""


@pytest.fixture(scope="module")
def run(worker, ask, tmp_path_factory):
    """Carry out a request on the real miniature."""

    def carry_out(**fields):
        out = tmp_path_factory.mktemp("out")
        stream = list(worker.submit(ask(**fields), out).events())
        assert isinstance(stream[-1], events.Completed), stream[-1]
        return SimpleNamespace(out=out, stream=stream, comparison=stream[-1].comparison)

    return carry_out


@pytest.fixture(scope="module")
def first(run):
    return run()


@pytest.fixture(scope="module")
def second(first, run, worker):
    """The same request once more, and what each precision's denoiser was given at its first step."""
    inputs, hooks = {}, []
    for name in PRECISIONS:

        def look(module, args, kwargs, name=name):
            inputs.setdefault(name, {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)})

        transformer = held(worker, name).pipeline.transformer
        hooks.append(transformer.register_forward_pre_hook(look, with_kwargs=True))
    again = run()
    for hook in hooks:
        hook.remove()
    again.inputs = inputs
    return again


def held(worker, precision):
    return worker.device.studio.rendition(SPEC, Column.of(precision, "post"), lambda _: None)


def results(made):
    return {g.precision: g for g in made.comparison.results}


def pictures(generation):
    return [Path(f).read_bytes() for f in generation.files]


def tensor(file):
    with Image.open(file) as image:
        levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return levels.reshape(image.height, image.width, 3).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_events_come_in_order_and_end_once(first):
    stream = first.stream
    assert sum(isinstance(e, events.TERMINAL) for e in stream) == 1
    assert stream[0] == events.Queued(0)
    told = [e for e in stream if isinstance(e, events.Step | events.Finished | events.Compared)]
    expected = []
    for name in PRECISIONS:
        expected += [("Step", name, i) for i in range(1, 5)] + [("Finished", name, None)]
        expected += [("Compared", name, None)] if name != "bf16" else []
    assert [(type(e).__name__, e.column, getattr(e, "index", None)) for e in told] == expected
    assert isinstance(stream[-2], events.RulerReady)
    assert stream[-2].ruler == first.comparison.ruler


def test_time_left_is_told_from_the_second_step_on(first):
    for step in (e for e in first.stream if isinstance(e, events.Step)):
        assert step.total == 4
        assert (step.seconds_left is None) == (step.index == 1)
        assert step.index != 4 or step.seconds_left == 0


def test_what_was_told_is_what_was_returned(first):
    finished = {e.column: e.generation for e in first.stream if isinstance(e, events.Finished)}
    compared = {e.column: e.metrics for e in first.stream if isinstance(e, events.Compared)}
    for name, generation in results(first).items():
        assert generation.files == finished[name].files
        assert generation.metrics == compared.get(name)


def test_quantization_errors_are_ordered(first):
    made = results(first)
    mxfp8, nvfp4 = made["mxfp8"].metrics, made["nvfp4"].metrics
    assert 0 < mxfp8.lpips[0] < nvfp4.lpips[0]
    assert mxfp8.psnr_db[0] > nvfp4.psnr_db[0] > 10
    assert made["bf16"].metrics is None


def test_lpips_is_that_of_the_pictures_shown(first):
    """Measured on tensors before they are rounded to 8 bits; the files may differ from that by the rounding."""
    made = results(first)
    reference = tensor(made["bf16"].files[0])
    for name in ("mxfp8", "nvfp4"):
        on_files = distances.lpips_distance(tensor(made[name].files[0]), reference).item()
        assert made[name].metrics.lpips[0] == pytest.approx(on_files, rel=0.1, abs=2e-3)


def test_a_map_lies_beside_each_picture_and_averages_to_its_lpips(first):
    assert results(first)["bf16"].lpips_maps == ()
    for name in ("mxfp8", "nvfp4"):
        made = results(first)[name]
        (found,) = made.lpips_maps
        with Image.open(found.file) as levels:
            assert levels.size == (64, 64)
            mean = sum(levels.getdata()) / 64**2 / 255 * found.top
        assert mean == pytest.approx(made.metrics.lpips[0], rel=0.05)


def test_the_same_seed_gives_the_same_bytes(first, second):
    for name in PRECISIONS:
        assert pictures(results(first)[name]) == pictures(results(second)[name])
    assert [g.metrics for g in first.comparison.results] == [g.metrics for g in second.comparison.results]


def test_another_seed_gives_other_pictures(first, run):
    other = results(run(seed=8))
    for name in PRECISIONS:
        assert tensor(other[name].files[0]).sub(tensor(results(first)[name].files[0])).abs().mean() > 0.01


def test_a_pictures_bytes_do_not_depend_on_what_else_was_asked_for(first, run):
    alone = results(run(precisions=["mxfp8"]))
    assert set(alone) == {"bf16", "mxfp8"}
    for name, generation in alone.items():
        assert pictures(generation) == pictures(results(first)[name])


def test_every_precision_gets_the_same_noise_and_embeddings(second):
    bf16 = second.inputs["bf16"]
    assert {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"} <= bf16.keys()
    assert bf16["hidden_states"].float().std() == pytest.approx(1, abs=0.05)
    for name in ("mxfp8", "nvfp4"):
        assert second.inputs[name].keys() == bf16.keys()
        assert all(torch.equal(second.inputs[name][key], bf16[key]) for key in bf16), name


def test_text_encoders_and_vae_are_one_and_the_same_object(first, worker):
    bf16 = held(worker, "bf16").pipeline
    for name in ("mxfp8", "nvfp4"):
        other = held(worker, name).pipeline
        assert other.transformer is not bf16.transformer and other.scheduler is not bf16.scheduler
        for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
            assert getattr(other, part) is getattr(bf16, part)


def test_memory_is_what_torchao_counts_and_what_the_plan_foresaw(first, worker):
    made = results(first)
    for name, generation in made.items():
        pipeline = held(worker, name).pipeline
        modules = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
        assert generation.memory.transformer * 1e9 == pytest.approx(get_model_size_in_bytes(pipeline.transformer))
        twice = pipeline.text_encoder_2.shared.weight.nbytes  # T5's tied embedding, which torchao counts twice
        counted = sum(get_model_size_in_bytes(m) for m in modules)
        assert generation.memory.weights * 1e9 == pytest.approx(counted - twice)
        plan = recipes.plan(loading.empty_transformer(SPEC), recipes.recipe(SPEC.id, "post"), name)
        slack = 0.01 if name == "mxfp8" else 1e-9  # torchao pads MXFP8's scales
        assert generation.memory.transformer * 1e9 == pytest.approx(plan.quantized_bytes, rel=slack)
        assert generation.memory.peak > generation.memory.weights
    assert made["nvfp4"].memory.weights < made["mxfp8"].memory.weights < made["bf16"].memory.weights
    shared = {round((g.memory.weights - g.memory.transformer) * 1e9) for g in made.values()}
    assert len(shared) == 1


def test_layers_are_counted_on_the_module_and_match_the_plan(first, worker):
    for name, generation in results(first).items():
        linears = {n: m for n, m in held(worker, name).pipeline.transformer.named_modules() if isinstance(m, nn.Linear)}
        quantized = {n for n, m in linears.items() if stored_precision(m.weight) != "bf16"}
        plan = recipes.plan(loading.empty_transformer(SPEC), recipes.recipe(SPEC.id, "post"), name)
        assert quantized == plan.names
        assert generation.layers == plan.counts
        assert generation.layers.quantized == len(quantized)
        assert f"{len(quantized)} of {len(linears)} quantized" in generation.ran["Linear layers"]


def test_emulated_latencies_are_never_compared(first):
    for name, generation in results(first).items():
        emulated = name != "bf16"  # a CPU has neither format
        assert generation.execution == ("emulated" if emulated else "native")
        assert generation.latency_comparable is not emulated
        assert (first.comparison.speedup(generation) is None) == emulated
        assert generation.ran["Execution"].startswith(generation.execution)


def test_stages_add_up(first):
    for generation in first.comparison.results:
        latency = generation.latency
        assert min(latency.text, latency.denoise, latency.decode) > 0
        assert latency.text + latency.denoise + latency.decode == pytest.approx(latency.total)


def test_what_ran_is_told_alike_for_every_precision(first):
    ran = [g.ran for g in first.comparison.results]
    assert ran[0].keys() == ran[1].keys() == ran[2].keys()
    assert all(word.strip() for panel in ran for word in panel.values())
    for label in ("Device", "Attention", "Compile", "Scheduler", "Noise", "Timing"):
        assert ran[0][label] == ran[1][label] == ran[2][label]
    assert "seed 7" in ran[0]["Noise"] and "4 steps" in ran[0]["Scheduler"]


def test_why_nothing_is_compiled_or_recorded_is_told(first, worker, monkeypatch):
    studio, rendition = worker.device.studio, held(worker, "bf16")
    warm, done = compilation.WarmUp(seconds=1.0, graphs=2, added=0), compilation.Done(replayed=4)

    def told(mode, **support):
        monkeypatch.setattr(rendition.blocks, "mode", mode)
        changed = replace(rendition, support=replace(rendition.support, **support))
        how = {"weights": "", "residency": "", "streamed": (), "ends": (), "warm": warm, "done": done, "not_numbers": 0}
        asked = first.comparison.request
        return what_ran.described(changed, SPEC, asked, machine=studio.machine, **how)["Compile"]

    assert told(compilation.EAGER) == "off (eager), for every precision"
    assert "4 of its steps replayed from a CUDA graph" in told(compilation.GRAPHS)
    assert "no CUDA graph (it hangs)" in told(compilation.DEFAULT, no_graph="it hangs")
    monkeypatch.setattr(studio, "machine", replace(studio.machine, no_compile="Triton is missing: install it"))
    assert told(compilation.EAGER) == "off, for every precision: Triton is missing: install it"


def test_files_and_json_are_all_there_is(first):
    names = {f"{p}.png" for p in PRECISIONS} | {"mxfp8-lpips.png", "nvfp4-lpips.png"}
    assert {f.name for f in first.out.iterdir()} == names | {"comparison.json"}
    assert Comparison.load(first.out) == first.comparison
    assert json.loads((first.out / "comparison.json").read_text())["results"][2]["files"] == ["nvfp4.png"]
    with Image.open(first.out / "nvfp4.png") as image:
        assert image.size == (SPEC.defaults.width, SPEC.defaults.height) and image.format == "PNG"


def test_each_picture_holds_the_recipe_that_made_it(first):
    recipe = media.read_recipe(first.out / "nvfp4.png")
    assert recipe["precision"] == "nvfp4" and recipe["execution"] == "emulated"
    assert recipe["versions"]["torch"] == torch.__version__.split("+")[0]
    assert recipe["request"] == {k: v for k, v in first.comparison.request.to_json().items() if k not in KEPT_OUT}


def test_a_batch_is_seeded_picture_by_picture(first, run):
    """Picture i has the noise of seed + i, so it is that seed's single picture up to bf16's rounding: a GEMM of twice
    the rows may add in another order."""
    batch = results(run(precisions=["bf16"], batch_size=2))["bf16"]
    assert [Path(f).name for f in batch.files] == ["bf16-1.png", "bf16-2.png"]
    assert [media.read_recipe(Path(f))["seed"] for f in batch.files] == [7, 8]
    alone = [results(first)["bf16"], results(run(precisions=["bf16"], seed=8))["bf16"]]
    made, wanted = (torch.cat([tensor(f) for f in files]) for files in (batch.files, [g.files[0] for g in alone]))
    near = distances.lpips_distance(made, wanted)
    far = distances.lpips_distance(made, wanted.flip(0))
    assert (near < 0.02 * far).all()


# ---------------------------------------------------------------------------------------------------------------------
# The ruler


def test_the_ruler_is_measured_once_and_then_kept(first, second):
    measured = [(e.index, e.total) for e in first.stream if isinstance(e, events.Measuring)]
    assert measured == [] or measured == [(0, 3), (1, 3), (2, 3)]  # empty if another test measured it before
    assert not any(isinstance(e, events.Measuring | events.Warming | events.Loading) for e in second.stream)
    assert second.comparison.ruler == first.comparison.ruler


def test_the_ruler_spans_a_range(first):
    ruler = first.comparison.ruler
    assert 0 <= ruler.floor < 0.2 * ruler.ceiling
    assert "seed 7 against seed 8" in ruler.note


def test_a_kept_ruler_serves_another_studio_without_loading_anything(first, ask):
    told = []
    ruler = Studio("cpu").ruler(SPEC, ask(prompt="something else", seed=99), told.append, lambda: False)
    assert ruler == first.comparison.ruler
    assert told == [events.RulerReady(ruler)]


@pytest.mark.parametrize("change", [{"num_inference_steps": 3}, {"guidance_scale": 2.0}])
def test_a_kept_ruler_does_not_serve_other_settings(first, ask, monkeypatch, change):
    measured = Ruler(floor=0.0, ceiling=1.0, note="new")
    studio = Studio("cpu")
    monkeypatch.setattr(studio, "_measure_ruler", lambda *_: measured)
    monkeypatch.setattr(studio._rulers, "put", lambda *_: None)
    assert studio.ruler(SPEC, ask(**change), lambda _: None, lambda: False) == measured


def test_a_kept_ruler_does_not_serve_other_weights(first, ask, monkeypatch):
    measured = Ruler(floor=0.0, ceiling=1.0, note="new")
    studio = Studio("cpu")
    monkeypatch.setattr(studio, "_measure_ruler", lambda *_: measured)
    monkeypatch.setattr(studio._rulers, "put", lambda *_: None)
    monkeypatch.setattr("engine.runtime.studio.loading.fingerprint", lambda *_: "other")
    assert studio.ruler(SPEC, ask(), lambda _: None, lambda: False) == measured


RULER = Ruler(floor=0.25, ceiling=0.5, note="How.")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"key": 3}', '{"key": {"floor": 1}}', "\x00\x01"])
def test_a_corrupt_shelf_is_survived_and_mended(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path))
    (tmp_path / "rulers.json").write_text(content)
    shelf = RulerShelf()
    assert shelf.get("key") is None
    shelf.put("key", RULER)
    assert shelf.get("key") == RulerShelf().get("key") == RULER


def test_a_shelf_keeps_what_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path / "made" / "here"))
    RulerShelf().put("a", RULER)
    shelf = RulerShelf()
    assert shelf.get("a") == RULER and shelf.get("b") is None
    assert [f.name for f in (tmp_path / "made" / "here").iterdir()] == ["rulers.json"]


def test_two_shelves_do_not_forget_each_others_rulers(tmp_path, monkeypatch):
    """Two processes on one machine: the page and the command line."""
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path))
    page, command = RulerShelf(), RulerShelf()
    page.put("a", RULER)
    command.put("b", RULER)
    assert RulerShelf().get("a") == RulerShelf().get("b") == RULER


def test_a_shelf_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("TWINFRAME_CACHE", str(folder))
        shelf = RulerShelf()
        shelf.put("a", RULER)
        assert shelf.get("a") == RULER


def test_versions_name_this_engine_and_every_installed_package():
    found = environment.versions()
    assert found.pop("twinframe") == environment.ENGINE
    assert {"torch", "torchao", "diffusers", "transformers", "lpips"} <= found.keys() <= set(environment.PACKAGES)


@pytest.mark.parametrize("what", ["engine", "torch"])
def test_a_ruler_of_another_version_is_measured_again(tmp_path, monkeypatch, ask, what):
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path))
    studio, measured = Studio("cpu"), []
    monkeypatch.setattr(studio, "_measure_ruler", lambda *_: measured.append(1) or RULER)
    for _ in range(2):
        Studio.ruler(studio, SPEC, ask(), lambda _: None, lambda: False)
    assert len(measured) == 1
    if what == "engine":
        monkeypatch.setattr(environment, "ENGINE", "another")
    else:
        monkeypatch.setattr(environment, "version", lambda package: "0.1")
    studio.ruler(SPEC, ask(), lambda _: None, lambda: False)
    assert len(measured) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and seeds


def test_bf16_is_warm_whatever_recipe_the_others_have(first, run):
    again = run(precisions=["mxfp8"], recipe="full")
    assert {e.column for e in again.stream if isinstance(e, events.Warming)} == {"mxfp8"}
    made, before = (tensor(results(r)["bf16"].files[0]) for r in (again, first))
    assert torch.equal(made, before)


@pytest.fixture
def compiling(monkeypatch, ask):
    """A studio that believes its blocks are compiled, and makes nothing; what it tells when it warms a rendition."""
    studio = Studio("cpu")
    blocks = SimpleNamespace(use=lambda mode: None, settle=lambda: None, dropped=0)
    tokenizer = SimpleNamespace(
        prompt_template_encode="{}", tokenizer=lambda text, **_: SimpleNamespace(input_ids=text)
    )
    rendition = SimpleNamespace(
        column=EXACT,
        support=studio.support["bf16"],
        blocks=blocks,
        warm_up_steps=lambda mode: 2,
        weight_only=lambda *_, **__: None,
        pipeline=tokenizer,
    )
    monkeypatch.setattr(studio, "mode", lambda *_: "default")
    monkeypatch.setattr("engine.runtime.studio.call", lambda *_: None)

    def warm(model="flux.1-dev", **fields):
        told, spec = [], catalog.MODELS[model]
        request = CompareRequest.create(**({"prompt": "a cat", "model": model} | fields))
        studio.warm(rendition, spec, request, told.append, lambda: False)
        return told

    return SimpleNamespace(warm=warm, blocks=blocks)


def test_only_a_new_size_compiles_and_says_so_with_what_it_took_before(compiling):
    (first,) = compiling.warm()
    assert (first.compiling, first.seconds) == (True, None)
    assert compiling.warm(prompt="another prompt altogether", seed=8, num_inference_steps=3) == []
    (second,) = compiling.warm(height=512, width=512)
    assert second.compiling and second.seconds > 0
    (batch,) = compiling.warm(batch_size=2)
    assert batch.compiling
    (guided,) = compiling.warm(model="qwen-image")
    assert guided.compiling
    (longer,) = compiling.warm(model="qwen-image", prompt="a longer prompt")
    assert not longer.compiling, "one graph serves every prompt"
    assert compiling.warm(model="qwen-image", prompt="a LONGER prompt") == []


def test_what_was_recorded_and_dropped_is_warmed_again(compiling):
    compiling.warm()
    compiling.blocks.dropped += 1
    (again,) = compiling.warm()
    assert not again.compiling
    assert compiling.warm() == []


def test_a_batch_that_passes_the_largest_seed_begins_again_at_0(run):
    batch = results(run(precisions=["bf16"], batch_size=2, seed=2**32 - 1, num_inference_steps=2))["bf16"]
    assert [media.read_recipe(Path(f))["seed"] for f in batch.files] == [2**32 - 1, 0]
    alone = results(run(precisions=["bf16"], seed=0, num_inference_steps=2))["bf16"]
    made = torch.cat([tensor(f) for f in batch.files])
    far, near = distances.lpips_distance(made, tensor(alone.files[0]).expand_as(made)).tolist()
    assert near < 0.02 * far


def test_values_that_are_not_numbers_are_shown_as_0_and_counted():
    pixels = torch.full((3, 3, 2, 2), 0.5)
    pixels[0, 1] = torch.nan
    pixels[2, 0, 0] = torch.tensor([torch.inf, -torch.inf])
    made = finished(None, SPEC, SimpleNamespace(images=pixels))
    assert made.not_numbers == (4, 0, 2)
    assert [made.is_damaged(i) for i in range(3)] == [True, False, True]
    assert made.pixels[0, 0].unique().tolist() == [0.5] and made.pixels[0, 1].unique().tolist() == [0]
    assert made.pixels[2, 0].unique().tolist() == [0, 0.5] and made.pixels[1].unique().tolist() == [0.5]


def test_a_clips_sound_that_is_not_numbers_damages_the_clip():
    sound = torch.zeros(2, 2, 8)
    sound[1, 0, 3] = torch.nan
    vocoder = SimpleNamespace(config=SimpleNamespace(output_sampling_rate=16_000))
    output = SimpleNamespace(frames=torch.zeros(2, 3, 3, 4, 4), audio=sound)
    made = finished(SimpleNamespace(vocoder=vocoder), catalog.MINI_LTX2, output)
    assert made.not_numbers == (0, 1) and made.audio.isfinite().all()


@pytest.mark.parametrize("side", ["made", "reference"])
def test_what_is_not_numbers_has_no_score_and_the_rest_of_its_batch_keeps_its_own(side):
    pictures, other = (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    studio = Studio("cpu")
    usual, _ = studio.distance(Made(pixels=pictures), Made(pixels=other))
    spoilt = {"made": Made(pixels=pictures), "reference": Made(pixels=other)}
    spoilt[side] = replace(spoilt[side], not_numbers=(0, 7, 0))
    found, maps = studio.distance(*spoilt.values())
    assert found.lpips == (usual.lpips[0], None, usual.lpips[2]) and maps[1] is None and maps[0] is not None
    assert found.psnr_db == (usual.psnr_db[0], None, usual.psnr_db[2])
    assert found.mean_lpips == pytest.approx((usual.lpips[0] + usual.lpips[2]) / 2)


def test_two_black_clips_that_are_not_numbers_are_not_called_equal():
    black = Made(pixels=torch.zeros(2, 3, 3, 64, 64), not_numbers=(3 * 3 * 64 * 64, 0))
    found, maps = Studio("cpu").distance(black, black)
    assert found.lpips == (None, 0.0) and found.psnr_db == (None, math.inf)
    assert found.lpips_frames == (None, (0.0, 0.0, 0.0)) and maps[0] is None


def test_bf16_that_is_not_numbers_has_no_ruler_and_none_is_kept(monkeypatch, ask, tmp_path):
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path))
    studio, told = Studio("cpu"), []
    monkeypatch.setattr(studio, "rendition", lambda *_: None)
    black = Made(pixels=torch.zeros(1, 3, 64, 64), not_numbers=(12,))
    monkeypatch.setattr(studio, "retake", lambda *_, **__: black)
    assert studio.ruler(SPEC, ask(), told.append, lambda: False) is None
    assert not (tmp_path / "rulers.json").exists()
    assert not any(isinstance(event, events.RulerReady) for event in told)


@pytest.fixture
def damaging(monkeypatch):
    """Makes pictures of the batch that are not numbers, as a model would that overflows."""
    spoilt = {}

    def spoil(pipeline, spec, output, usual=finished):
        for index in spoilt.get("pictures", ()):
            output.images[index : index + 1] = torch.nan
        return usual(pipeline, spec, output)

    monkeypatch.setattr("engine.runtime.studio.finished", spoil)
    return spoilt


def test_a_damaged_picture_is_said_in_json_csv_and_on_the_page(run, damaging, capsys):
    damaging["pictures"] = (1,)
    one_lost = run(precisions=["nvfp4"], batch_size=3, num_inference_steps=1)
    damaging["pictures"] = (0, 1, 2)
    all_lost = run(precisions=["nvfp4"], batch_size=3, num_inference_steps=1)
    for ran, lost, said in (
        (one_lost, 1, "1 of 3 has no score: values are not numbers"),
        (all_lost, 3, "no score: values are not numbers"),
    ):
        made, result = ran.comparison, results(ran)["nvfp4"]
        values = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert values["unscored"] == lost and values["lpips_each"].count(None) == lost
        assert (values["lpips"] is None) is (lost == 3) and "not numbers" in values["ran"]["Damage"]
        _, row = csv.DictReader(io.StringIO(made.to_csv()))
        assert (row["lpips"] == "") is (row["psnr_db"] == "") is (lost == 3) and row["unscored"] == str(lost)
        view = views.of(made, ran.out, recorded=False)
        assert said in words.verdict.verdict(made)
        for drawn in (cards.stage(view), cards.pairs(view), cards.table(view)):
            assert said in drawn.lower()
        assert said in words.gallery.tile(made)
        cli._print(made)
        assert said in capsys.readouterr().out
        scored = list(blind.pairs(made, fresh=True))
        assert len(scored) == 3 - lost and all(pair.lpips is not None for pair in scored)
        assert Comparison.load(ran.out) == made
        assert [m is None for m in result.lpips_maps] == [v is None for v in result.metrics.lpips]
    assert "of the way" not in words.verdict.verdict(all_lost.comparison)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("spec", "prompts"), [(SPEC, 3), (catalog.FLUX_DEV, 1)])
def test_the_ruler_of_a_large_model_takes_one_prompt(monkeypatch, ask, spec, prompts, compiled):
    """And its floor is the path that this device has beside the usual one: eager blocks, or unfused attention."""
    used, calls = [], []
    rendition = SimpleNamespace(
        pipeline=SimpleNamespace(transformer=SimpleNamespace(set_attention_backend=lambda name: used.append(name))),
        blocks=SimpleNamespace(use=lambda mode: used.append(mode), settle=lambda: None),
    )
    studio = Studio("cpu")
    monkeypatch.setattr(studio, "rendition", lambda *_: rendition)
    monkeypatch.setattr(studio, "mode", lambda *_: "default" if compiled else "eager")
    monkeypatch.setattr(studio, "warm", lambda *_: used.append("warm"))

    def call(pipeline, spec, request, seed, progress):
        calls.append((request.prompt, seed, next(u for u in reversed(used) if u != "native" or not compiled)))
        return seed

    def finished(pipeline, spec, seed):
        noise = torch.Generator().manual_seed(seed)
        return Made(pixels=torch.rand(1, 3, 64, 64, generator=noise))

    monkeypatch.setattr("engine.runtime.studio.call", call)
    monkeypatch.setattr("engine.runtime.studio.finished", finished)
    monkeypatch.setattr("engine.runtime.studio.RULER_PROMPTS", 3)
    told = []
    used.append("native")
    ruler = studio._measure_ruler(spec, ask(), told.append, lambda: False)
    usual, other = ("warm", "eager") if compiled else ("native", "_native_math")
    wanted = [(p, s, path) for p in spec.examples[:prompts] for s, path in ((7, usual), (7, other), (8, usual))]
    assert calls == wanted
    assert [(e.index, e.total) for e in told] == [(i, 3 * prompts) for i in range(3 * prompts)]
    assert ruler.floor == 0 < ruler.ceiling
    assert f"{prompts} prompt{'s' if prompts > 1 else ''} " in ruler.note
    assert ("eager" in ruler.note) == compiled


# ---------------------------------------------------------------------------------------------------------------------
# Qwen-Image and LTX-2, tiny and random


@pytest.fixture(scope="module", params=["qwen-image", "ltx-2"])
def tiny_run(request, cache, tmp_path_factory):
    """Two of each, in bf16, MXFP8 and NVFP4, and every input of every denoiser."""
    folder = tmp_path_factory.mktemp("tiny")
    spec = tiny.spec(request.param, tiny.checkpoint(request.param, folder / "weights"))
    inputs = {name: [] for name in PRECISIONS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, spec.id: spec}))
        patch.setattr("engine.runtime.studio.RULER_PROMPTS", 1)
        studio = Studio("cpu")
        asked = CompareRequest.create("a cat sits", model=spec.id, batch_size=2)
        with torch.inference_mode():
            for name in PRECISIONS:
                rendition = studio.rendition(spec, Column.of(name, "full"), lambda _: None)
                studio.warm(rendition, spec, asked, lambda _: None, lambda: False)

                def look(module, args, kwargs, name=name):
                    inputs[name].append({k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)})

                rendition.pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
            comparison = studio.compare(asked, folder, lambda _: None, lambda: False)
        yield SimpleNamespace(spec=spec, comparison=comparison, out=folder, inputs=inputs, studio=studio)


def test_every_precision_of_every_architecture_gets_the_same_noise_and_embeddings(tiny_run):
    bf16 = tiny_run.inputs["bf16"][0]
    assert {"hidden_states", "encoder_hidden_states", "timestep"} <= bf16.keys()
    for name in ("mxfp8", "nvfp4"):
        other = tiny_run.inputs[name][0]
        assert other.keys() == bf16.keys()
        assert all(torch.equal(other[key], bf16[key]) for key in bf16), name


def test_classifier_free_guidance_takes_both_prompts(tiny_run):
    """Qwen-Image runs them one after the other, LTX-2 as one batch of twice the size."""
    inputs = tiny_run.inputs["nvfp4"]
    if tiny_run.spec.modality == "image":
        assert len(inputs) == 2 * 3
        asked, negative = (inputs[i]["encoder_hidden_states"] for i in (0, 1))
        assert asked.shape[0] == negative.shape[0] == 2 and asked.shape[1] > negative.shape[1] > 0
    else:
        assert len(inputs) == 3
        negative, asked = inputs[0]["encoder_hidden_states"].chunk(2)
        assert asked.shape == negative.shape == (2, 32, asked.shape[-1]) and not torch.equal(asked, negative)


def test_architectures_without_tensor_cores_for_it_are_emulated_layer_by_layer(tiny_run):
    linears = sum(isinstance(m, nn.Linear) for m in loading.empty_transformer(tiny_run.spec).modules())
    bf16, mxfp8, nvfp4 = tiny_run.comparison.results
    assert bf16.layers.quantized == 0
    for generation in (mxfp8, nvfp4):  # a few layers of these tiny models are too narrow
        assert generation.layers.quantized + generation.layers.left == linears
        assert generation.layers.quantized > 0.9 * linears
    assert bf16.memory.transformer > mxfp8.memory.transformer > nvfp4.memory.transformer
    assert [g.execution for g in tiny_run.comparison.results] == ["native", "emulated", "emulated"]


def test_random_models_show_the_order_of_the_formats_too(tiny_run):
    _, mxfp8, nvfp4 = tiny_run.comparison.results
    for i in range(2):
        assert 0 < mxfp8.metrics.lpips[i] < nvfp4.metrics.lpips[i]
        assert mxfp8.metrics.psnr_db[i] > nvfp4.metrics.psnr_db[i]
    assert tiny_run.comparison.ruler.floor < tiny_run.comparison.ruler.ceiling


def test_stages_of_every_architecture_add_up(tiny_run):
    for latency in (g.latency for g in tiny_run.comparison.results):
        assert min(latency.text, latency.denoise, latency.decode) > 0
        assert latency.text + latency.denoise + latency.decode == pytest.approx(latency.total)


def test_clips_are_compared_frame_by_frame_and_pictures_as_one(tiny_run):
    bf16, *others = tiny_run.comparison.results
    assert bf16.metrics is None
    for found in (g.metrics for g in others):
        if tiny_run.spec.modality == "image":
            assert found.lpips_frames is None
        else:
            assert [len(frames) for frames in found.lpips_frames] == [9, 9]
            means = [sum(frames) / 9 for frames in found.lpips_frames]
            assert found.lpips == pytest.approx(means, rel=1e-5)


def test_every_item_has_a_file_with_its_recipe_and_seed(tiny_run):
    suffix = "png" if tiny_run.spec.modality == "image" else "mp4"
    for generation in tiny_run.comparison.results:
        files = [Path(f) for f in generation.files]
        assert [f.name for f in files] == [f"{generation.precision}-{i}.{suffix}" for i in (1, 2)]
        recipes_inside = [media.read_recipe(f) for f in files]
        assert [r["seed"] for r in recipes_inside] == [7, 8]
        assert {r["precision"] for r in recipes_inside} == {generation.precision}
        assert recipes_inside[0]["request"]["num_frames"] == tiny_run.spec.defaults.num_frames
    assert Comparison.load(tiny_run.out) == tiny_run.comparison


@pytest.mark.parametrize("tiny_run", ["ltx-2"], indirect=True)
def test_a_clip_has_its_frames_its_rate_and_its_sound(tiny_run):
    rate = tiny_run.studio.rendition(tiny_run.spec, Column.of("bf16", "full"), lambda _: None).pipeline.vocoder.config
    with av.open(tiny_run.comparison.results[0].files[0]) as clip:
        video, audio = clip.streams.video[0], clip.streams.audio[0]
        assert (video.frames, video.average_rate, video.width, video.height) == (9, 24, 96, 64)
        assert audio.rate == rate.output_sampling_rate and audio.channels == 2
        # The model makes sound in pieces of 40 ms, the first of them shorter.
        assert float(audio.duration * audio.time_base) == pytest.approx(9 / 24, abs=0.05)


def test_what_is_read_of_a_prompt_is_counted_without_the_template(tiny_run):
    words = tiny_run.comparison.results[0].ran["Prompt"]
    tokens = int(words.split()[0])
    negative_or_padding = tiny_run.inputs["bf16"][0]["encoder_hidden_states"].shape[1]
    assert words == f"{tokens} tokens, of at most 32"
    assert tokens == negative_or_padding if tiny_run.spec.modality == "image" else 0 < tokens < negative_or_padding


def test_the_same_request_gives_the_same_clips_again(tiny_run, tmp_path):
    with torch.inference_mode():
        again = tiny_run.studio.compare(tiny_run.comparison.request, tmp_path, lambda _: None, lambda: False)
    for one, other in zip(tiny_run.comparison.results, again.results, strict=True):
        assert one.metrics == other.metrics
        if tiny_run.spec.modality == "image":  # x264's bytes vary now and then for frames as small as these clips'
            assert pictures(one) == pictures(other)
