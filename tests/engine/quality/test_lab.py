"""The quality lab: searched block scales, low-rank branches, recipe files, sensitivities, the search, its file."""

import copy
import json
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.utils import get_model_size_in_bytes

from engine import catalog
from engine.columns import recipe_named
from engine.errors import LoadError, OutputError, RequestError, UnsupportedError
from engine.formats import FORMATS
from engine.machine import Machine
from engine.quality import lab, prompts, sensitivity, tune
from engine.quantization import capability, gptq, nvfp4, recipe_files, recipes, remedies
from engine.quantization.inspection import inspect
from engine.quantization.recipe_files import TunedRecipe, Tuning
from engine.runtime.pipeline import Made
from engine.weights import loading
from tests.support import tiny

CPU = Machine(name="Some CPU", kind="cpu")
B200 = Machine(name="NVIDIA B200", kind="cuda", capability=(10, 0))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with torch.inference_mode():
        yield


def support(name, machine=CPU):
    return capability.support(name, machine)


def tuning(**changes):
    return MappingProxyType({"nvfp4": Tuning(source="some.json", **changes)})


def layers():
    torch.manual_seed(0)
    sizes = {"a": (64, 32), "b": (32, 64), "c": (64, 64), "embed": (32, 32)}
    return nn.ModuleDict({name: nn.Linear(i, o) for name, (i, o) in sizes.items()}).to(torch.bfloat16)


# Block scales


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("heavy", [False, True])
def test_searched_scales_are_never_worse_in_any_block_and_better_in_many(size, heavy):
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * (torch.exp(1.5 * torch.randn(64, 256)) if heavy else 1)
    weight = (size * weight).to(torch.bfloat16)

    def errors(searched):
        stored = nvfp4.dequantize(*nvfp4.quantize(weight, searched))
        return (stored - weight.float()).view(64, -1, nvfp4.BLOCK).square().sum(-1)

    usual, best = errors(False), errors(True)
    # A tie in exact arithmetic may be rounded to either side.
    assert (best <= usual * (1 + 1e-5)).all() and (best < usual).float().mean() > 0.3
    assert best.sum() < 0.9 * usual.sum()


def test_a_weight_of_zeros_stays_zero():
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    assert nvfp4.dequantize(*nvfp4.quantize(weight, searched=True)).abs().max() == 0


def test_searched_scales_fill_torchaos_own_layout():
    """What a Blackwell GPU would multiply holds the same numbers as the emulation, in the layout torchao makes."""
    weight = torch.randn(160, 96).to(torch.bfloat16)
    layer = nn.Linear(96, 160, bias=False).to(torch.bfloat16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    packed = nvfp4.quantize(weight, searched=True)
    capability.quantize_linear_modules(nn.ModuleDict({"x": layer}), {"x"}, support("nvfp4", B200), packed)
    made, usual = layer.weight.data, NVFP4Tensor.to_nvfp4(weight, is_swizzled_scales=True)
    assert isinstance(made, NVFP4Tensor) and made.is_swizzled_scales and made.act_quant_kwargs.is_swizzled_scales
    for name in ("qdata", "scale"):
        a, b = getattr(made, name), getattr(usual, name)
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    assert torch.equal(made.dequantize(torch.float32), nvfp4.dequantize(*packed))


# Calibrated weights


def correlated(rows, features):
    """Activations of which a few directions hold most, as in a transformer."""
    torch.manual_seed(0)
    return torch.randn(rows, 8) @ torch.randn(8, features) + 0.1 * torch.randn(rows, features)


@pytest.mark.parametrize("dead", [False, True])
def test_calibrated_rounding_loses_less_of_the_product_on_inputs_it_has_not_seen(dead):
    x, weight = correlated(4000, 128), torch.randn(64, 128).to(torch.bfloat16)
    if dead:  # a feature that is always 0 says nothing of its column
        x[:, 5] = 0
    seen, fresh = x[:2000], x[2000:]

    def lost(packed):
        return (fresh @ (nvfp4.dequantize(*packed) - weight.float()).t()).norm()

    packed = gptq.quantize(weight, seen.t() @ seen)
    usual = nvfp4.quantize(weight, searched=True)
    assert lost(packed) < 0.6 * lost(usual)
    for made, other in zip(packed, usual, strict=True):
        assert (made.shape, made.dtype, made.is_contiguous()) == (other.shape, other.dtype, True)
    scales = packed[1].float()
    assert scales.isfinite().all() and (scales >= nvfp4.E4M3_LEAST_NORMAL).all()


def test_an_input_without_preference_is_rounded_to_nearest():
    weight = torch.randn(32, 64).to(torch.bfloat16)
    made, usual = gptq.quantize(weight, torch.eye(64)), nvfp4.quantize(weight, searched=True)
    assert torch.equal(nvfp4.dequantize(*made), nvfp4.dequantize(*usual))


def test_second_moments_are_those_of_all_inputs_and_come_in_portions(monkeypatch):
    held, x = layers(), torch.randn(2, 3, 64).to(torch.bfloat16)
    with gptq.second_moments({"a": held["a"]}) as moments:
        held["a"](x)
        held["a"](2 * x)
    rows = x.reshape(-1, 64).float()
    torch.testing.assert_close(moments["a"], 5 * rows.t() @ rows)
    held["a"](x)
    torch.testing.assert_close(moments["a"], 5 * rows.t() @ rows)  # nothing listens any more
    monkeypatch.setattr(gptq, "MOMENT_BYTES", 4 * (64**2 + 32**2))
    assert [list(portion) for portion in gptq.portions(dict(held))] == [["a", "b"], ["c", "embed"]]


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """Three of the layers, in a file each."""
    monkeypatch.setattr(gptq, "FILE_BYTES", 1000)
    packed = {name: gptq.quantize(layer.weight, torch.eye(layer.in_features)) for name, layer in layers().items()}
    del packed["embed"]
    return SimpleNamespace(packed=packed, files=gptq.write(tmp_path, "some", packed))


def test_calibrated_weights_come_back_as_they_were_written(calibrated):
    assert len(calibrated.files) == 3 and gptq.names(calibrated.files) == {"a", "b", "c"}
    for name, packed in calibrated.packed.items():
        found = gptq.read(calibrated.files, name, layers()[name].weight)
        assert all(torch.equal(one, other) for one, other in zip(found, packed, strict=True))


def test_a_calibrated_plan_places_the_stored_weights(calibrated):
    held = layers()
    recipe = recipes.Recipe(id="t", summary="", tunings=tuning(searched=True, calibrated=calibrated.files))
    plan = recipes.plan(held, recipe, "nvfp4")
    assert {layer.name: layer.parts for layer in plan.layers} == {
        "a": ["calibrated weights"], "b": ["calibrated weights"], "c": ["calibrated weights"],
        "embed": ["searched block scales"],
    }  # fmt: skip
    recipes.verify(recipes.apply(held, plan, support("nvfp4")), plan)
    assert torch.equal(held["b"].weight.codes, calibrated.packed["b"][0])


def test_calibrated_weights_of_something_else_are_refused(calibrated):
    with pytest.raises(LoadError, match=r"was calibrated for another weight of a: choose another recipe"):
        gptq.read(calibrated.files, "a", torch.randn(32, 64).to(torch.bfloat16))
    with pytest.raises(LoadError, match="another weight of a"):
        gptq.read(calibrated.files, "a", torch.randn(32, 32).to(torch.bfloat16))
    calibrated.files[0].write_bytes(b"nothing")
    with pytest.raises(LoadError, match="missing or damaged"):
        gptq.read(calibrated.files, "a", layers()["a"].weight)


@pytest.mark.parametrize("bits", [None, 0xFF, 0xB0], ids=["tensor scale", "nan with a sign", "negative"])
def test_calibrated_weights_with_scales_that_cannot_be_are_refused(calibrated, tmp_path, bits):
    codes, scales, tensor_scale = (tensor.clone() for tensor in calibrated.packed["a"])
    if bits is None:
        tensor_scale.fill_(torch.nan)
    else:
        scales.view(torch.uint8)[0, 0] = bits
    files = gptq.write(tmp_path, "spoilt", {"a": (codes, scales, tensor_scale)})
    with pytest.raises(LoadError, match="calibrated for another weight of a"):
        gptq.read(files, "a", layers()["a"].weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_moment_that_is_no_number_is_refused_instead_of_damped_for_ever(bad):
    moment = torch.eye(32)
    moment[3, 3] = bad
    with pytest.raises(UnsupportedError, match="inputs are not numbers"):
        gptq.quantize(torch.randn(16, 32).to(torch.bfloat16), moment)


# Low rank


@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
def test_a_low_rank_branch_takes_the_best_share_of_the_error(shape):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(torch.bfloat16).requires_grad_(False)
    error = torch.randn(shape)
    plain, x = copy.deepcopy(layer), torch.randn(8, shape[1]).to(torch.bfloat16)
    for rank, before in ((4, 0.0), (16, 0.3)):
        branched = remedies.add_low_rank(copy.deepcopy(layer), error, rank)
        kept = branched.up.float() @ branched.down.float()
        best = torch.linalg.svdvals(error)[:rank].square().sum()
        left = (error - kept).square().sum()
        assert left == pytest.approx((error.square().sum() - best).item(), rel=0.01)
        assert 1 - left / error.square().sum() > before
        assert torch.allclose(branched(x).float(), (plain(x).float() + x.float() @ kept.t()), atol=0.2, rtol=0.05)
    with pytest.raises(ValueError, match="rank 33"):
        remedies.add_low_rank(layer, error, 33)


# Recipe files and plans


def test_a_tuned_plan_is_applied_verified_and_weighed():
    module, exact = layers(), layers()
    recipe = recipes.Recipe(
        id="t", summary="", skip_containing=("embed",),
        tunings=tuning(layers={"b": "fp8", "embed": "mxfp8", "c": "nvfp4"}, low_rank={"c": 4}, searched=True),
    )  # fmt: skip
    plan = recipes.plan(module, recipe, "nvfp4")
    stored = {layer.name: (layer.precision, layer.rank, layer.searched) for layer in plan.layers}
    assert stored == {
        "a": ("nvfp4", 0, True), "b": ("fp8", 0, False), "c": ("nvfp4", 4, True), "embed": ("mxfp8", 0, False)
    }  # fmt: skip
    assert {layer["name"]: layer["parts"] for layer in plan.to_json()["layers"]}["c"] == [
        "searched block scales", "low-rank branch 4"
    ]  # fmt: skip
    recipes.apply(module, plan, support("nvfp4"))
    assert recipes.verify(module, plan) == plan.counts and plan.counts.quantized == 4
    padding = 512  # MX scales of a layer of 32 x 32 fill a tile of 128 x 4
    assert plan.quantized_bytes <= get_model_size_in_bytes(module) <= plan.quantized_bytes + padding
    x = torch.randn(5, 64).to(torch.bfloat16)
    for name in ("a", "c"):
        wrong = (module[name](x) - exact[name](x)).float().norm() / exact[name](x).float().norm()
        assert 0 < wrong < 0.2
    # In any other precision the rules alone hold.
    assert {layer.precision for layer in recipes.plan(layers(), recipe, "fp8").layers} == {"fp8", "bf16"}


def test_verify_sees_a_missing_branch():
    module = layers()
    with_branch, without = (
        recipes.plan(module, recipes.Recipe(id="t", summary="", tunings=tuning(low_rank=ranks)), "nvfp4")
        for ranks in ({"c": 4}, {})
    )
    recipes.apply(module, without, support("nvfp4"))
    with pytest.raises(recipes.PlanMismatchError, match=r"1 of 4 layers .* c for one"):
        recipes.verify(module, with_branch)


def test_a_layer_the_transformer_lacks_is_named():
    recipe = recipes.Recipe(id="t", summary="", tunings=tuning(layers={"d": "fp8"}))
    with pytest.raises(LoadError, match=r"^The recipe file some.json names a layer d, which ModuleDict has not"):
        recipes.plan(layers(), recipe, "nvfp4")


GOOD = {"id": "tuned", "base": "post", "summary": "S.", "tunings": {"nvfp4": {"layers": {"a": "fp8"}}}}


def test_a_recipe_file_is_read_as_it_was_written(tmp_path):
    made = TunedRecipe(
        id="tuned", base="post", summary="S.",
        tunings={"nvfp4": Tuning(layers={"a": "fp8"}, low_rank={"b": 8}, searched=True, weight_only_steps=(2, 1),
                                 calibrated=(tmp_path / "f-1.safetensors",))},
    )  # fmt: skip
    (tmp_path / "f.json").write_bytes(recipe_files.write(tmp_path / "f.json", made, {"by": "hand"}))
    (read,) = recipe_files.read("f", tmp_path)
    assert read == replace(made, tunings={"nvfp4": replace(made.tunings["nvfp4"], source="f.json")})
    assert recipe_files.read("another", tmp_path) == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("{", "it is not valid JSON"),
        ([], "it is not an object"),
        ({"summary": ""}, "summary is not text"),
        ({"tunings": {}}, "tunings is not an object"),
        ({"tunings": {"int4": {}}}, "there is no quantized precision 'int4'"),
        ({"tunings": {"nvfp4": {"rank": 3}}}, "other things"),
        ({"tunings": {"nvfp4": {"weight_only_steps": 2}}}, "not two whole numbers"),
        ({"tunings": {"nvfp4": {"weight_only_steps": [2, -1]}}}, "not two whole numbers"),
        ({"tunings": {"fp8": {"weight_only_steps": [2, 0]}}}, "and not in nvfp4"),
        ({"tunings": {"nvfp4": {"calibrated": ["../x.safetensors"]}}}, "names of .safetensors files"),
        ({"tunings": {"nvfp4": {"layers": {"a": "fp9"}}}}, "a is to be stored in 'fp9'"),
        ({"tunings": {"nvfp4": {"low_rank": {"a": 0}}}}, "the rank of a is 0"),
        ({"tunings": {"nvfp4": {"low_rank": {"a": 4}, "layers": {"a": "fp8"}}}}, "not in nvfp4"),
    ],
)
def test_a_bad_recipe_file_gets_one_sentence(change, said, tmp_path):
    content = change if isinstance(change, str) else json.dumps(GOOD | change if isinstance(change, dict) else change)
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(LoadError) as error:
        recipe_files.read("f", tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value) and "f.json" in str(error.value)


def test_a_recipe_file_that_changes_no_known_rules_is_refused():
    with pytest.raises(LoadError, match="'sead'"):
        recipes.tuned_recipe("mini-flux", TunedRecipe(id="t", base="sead", summary="", tunings={}))


def offered():
    return [spec for spec in catalog.MODELS.values() if "tuned" in spec.recipes]


@pytest.mark.parametrize(("recipe_id", "ending", "most"), [("tuned", "", 1.08), ("rebalanced", "-rebalanced", 1.0)])
def test_every_recipe_file_is_offered_and_keeps_to_its_bytes(recipe_id, ending, most):
    specs = [spec for spec in catalog.MODELS.values() if recipe_id in spec.recipes]
    files = {file.stem for file in recipe_files.FOLDER.glob("*.json")}
    assert {stem for stem in files if stem.endswith("-rebalanced") == bool(ending)} == {
        spec.family + ending for spec in specs
    }
    for spec in specs:
        empty = loading.empty_transformer(spec)
        post, better = (recipes.plan(empty, recipes.recipe(spec.family, name), "nvfp4") for name in ("post", recipe_id))
        assert better.quantized_bytes <= most * post.quantized_bytes
        assert better.counts.left == 0


# Sensitivity and search


@pytest.mark.parametrize("model", ["mini-flux", "flux.1-dev", "qwen-image", "ltx-2"])
def test_groups_cover_every_layer_once_and_know_its_role(model):
    empty = loading.empty_transformer(catalog.model(model))
    names = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear)]
    found = sensitivity.groups(names)
    assert sorted(name for group in found for name in group.names) == sorted(names)
    if model != "ltx-2":
        assert not [group for group in found if group.role == "other"]


@pytest.mark.parametrize(
    ("name", "role", "depth"),
    [
        ("transformer_blocks.1.attn.to_out.0", "out", "1"),
        ("transformer_blocks.2.attn.add_v_proj", "text_v", "2"),
        ("transformer_blocks.0.ff_context.net.2", "text_mlp_out", "0"),
        ("transformer_blocks.0.norm1_context.linear", "text_modulation", "0"),
        ("single_transformer_blocks.0.norm.linear", "modulation", "3"),
        ("single_transformer_blocks.5.proj_out", "mlp_out", "8"),
        ("x_embedder", "picture_in", "outside"),
        ("time_text_embed.timestep_embedder.linear_1", "time", "outside"),
        ("proj_out", "last", "outside"),
    ],
)
def test_role_and_depth_of_a_layer(name, role, depth):
    empty = loading.empty_transformer(catalog.MINI_FLUX)
    names = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear)]
    (group,) = (group for group in sensitivity.groups(names) if name in group.names)
    assert (group.role, group.depth) == (role, depth)


def shapes(**features):
    return {name: SimpleNamespace(name=name, in_features=size, out_features=size) for name, size in features.items()}


def test_choice_spends_bytes_where_drift_is_largest_and_keeps_to_its_budget():
    held = shapes(a=64, b=64, c=64)
    cells = [{"names": [n], "drift": d} for n, d in (("a", 0.1), ("b", 0.5), ("c", 0.01))]
    shares = {"bf16": 0.0, "fp8": 0.1}
    small, middle, large = (FORMATS[name].size(64, 64) for name in ("nvfp4", "fp8", "bf16"))
    work = dict.fromkeys(held, 1.0)
    at = lambda budget, time=9.0: tune.choose(cells, held, shares, work, budget, time)  # noqa: E731
    assert at(3 * small) == {"a": "nvfp4", "b": "nvfp4", "c": "nvfp4"}
    assert at(2 * small + middle) == {"a": "nvfp4", "b": "fp8", "c": "nvfp4"}
    assert at(3 * large) == {"a": "bf16", "b": "bf16", "c": "bf16"}
    with pytest.raises(RequestError, match="--budget"):
        at(3 * small - 1)
    for budget in range(3 * small, 3 * large, 997):
        stored = at(budget)
        assert sum(FORMATS[stored[name]].size(64, 64) for name in held) <= budget
        assert stored["b"] != "nvfp4" or budget < 2 * small + middle
    # NVFP4 takes a quarter of bf16's time and FP8 half of it.
    assert at(3 * large, 0.75) == {"a": "nvfp4", "b": "nvfp4", "c": "nvfp4"}
    assert at(3 * large, 1.0) == {"a": "nvfp4", "b": "fp8", "c": "nvfp4"}
    assert at(3 * large, 0.1) == {"a": "nvfp4", "b": "nvfp4", "c": "nvfp4"}, "nothing is faster"
    for time in (0.8, 1.3, 1.9, 2.5):
        assert sum(FORMATS[name].time for name in at(3 * large, time).values()) <= time


# The commands, on a tiny model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux")
    made = tiny.spec("flux.1-dev", folder)
    return replace(made, family="mini-flux", recipes=("full",), defaults=replace(made.defaults, num_inference_steps=2))


@pytest.fixture
def known(small, monkeypatch):
    monkeypatch.setattr(catalog, "MODELS", {**catalog.MODELS, small.id: small})
    return small


CHOSEN = prompts.PromptSet(
    name="four", counted="line", repeated=0,
    prompts=tuple(prompts.Prompt(id=i, category="", text=t) for i, t in enumerate(("a", "b", "c", "d"), start=1)),
)  # fmt: skip


def bench(spec, said):
    return lab.Bench(spec, "cpu", loading.BUNDLED_OR_HUB, said.append)


def test_tune_writes_recipe_and_rows_and_goes_on_where_it_was_killed(known, tmp_path):
    said, file, recipe = [], tmp_path / "q.json", tmp_path / "tiny.json"
    made = bench(known, said)
    found = tune.run(made, lab.Quality(file, made, CHOSEN), 8.0, recipe, probes=1, steps=2)
    assert json.loads(file.read_text()) == found
    cells = found["sensitivity"]["cells"]
    assert {name for cell in cells for name in cell["names"]} <= {n for n, _ in made.exact.named_modules()}
    assert all(cell["drift"] > 0 and cell["denoiser_error"] > 0 and cell["bytes_saved"] > 0 for cell in cells)
    (best,) = (row for row in found["frontier"] if row["id"] == "tuned")
    assert best["lpips"]["report"]["n"] == best["lpips"]["search"]["n"] == 2 and best["offered"]
    assert best["bytes_over_seed_percent"] <= 8
    tried = [row for row in found["frontier"] if row["id"] != "post" and row["lpips"]["search"]]
    least = min(row["lpips"]["search"]["mean"] for row in tried)
    assert best["lpips"]["search"]["mean"] == least
    assert {row["name"] for row in found["remedies"]} == {
        "Searched scales", "Calibrated rounding", "Mixed precision", "Low-rank branch", "Weight-only steps"
    }  # fmt: skip
    assert {(row["precision"], row["recipe"]) for row in found["ablation"]} >= {("mxfp8", "full"), ("nvfp4", "full")}
    # The recipe that was written is the one that was measured.
    (written,) = recipe_files.read("tiny", tmp_path)
    plan = recipes.plan(made.exact, replace(recipes.RECIPES["mini-flux", "full"], tunings=written.tunings), "nvfp4")
    assert plan.quantized_bytes == best["weight_bytes"]
    # A killed run lacks some scores: they are made again, and nothing else is.
    cut = json.loads(file.read_text())
    lost = next(iter(cut["scores"]))
    removed = cut["scores"][lost].popitem()
    file.write_text(json.dumps(cut | {"frontier": None, "remedies": None}))
    said.clear()
    again = bench(known, said)
    repeated = tune.run(again, lab.Quality(file, again, CHOSEN), 8.0, recipe, probes=1, steps=2)
    assert repeated["scores"][lost][removed[0]] == removed[1]
    assert {k: v for k, v in repeated.items() if k != "date"} == {k: v for k, v in found.items() if k != "date"}
    assert len([text for text in said if "LPIPS" in text and " of " in text and text.startswith(lost)]) == 1


def test_layers_are_bf16_again_after_a_group_was_quantized(known):
    made = bench(known, [])
    plan = recipes.plan(made.exact, sensitivity.everything(searched=True), "nvfp4")
    name = sorted(plan.names)[0]
    before = made.exact.get_submodule(name).weight
    probe = sensitivity.Probe(made, ["a"], 1)
    assert probe.damage() == (0.0, 0.0)
    with lab.quantized_layers(made.exact, [name], recipes.quantizer(plan, support("nvfp4"))):
        assert capability.stored_precision(made.exact.get_submodule(name).weight) == "nvfp4"
        assert probe.damage()[0] > 0
    assert made.exact.get_submodule(name).weight is before and probe.damage() == (0.0, 0.0)


@pytest.mark.parametrize(("steps", "plain"), [((4, 0), [0, 1, 2, 3]), ((1, 0), [0]), ((1, 2), [0, 2, 3]), ((0, 0), [])])
def test_activations_stay_bf16_in_the_weight_only_steps_and_in_no_other(known, steps, plain):
    made = bench(known, [])
    transformer, plan = made.quantized(recipes.recipe("mini-flux", "full"), "nvfp4")
    name = sorted(plan.names)[0]
    layer, seen, told = transformer.get_submodule(name), [], []
    x = torch.randn(16, layer.in_features).to(torch.bfloat16)
    usual = layer(x)
    unpacked = torch.nn.functional.linear(x, nvfp4.dequantize(
        layer.weight.codes, layer.weight.block_scales, layer.weight.tensor_scale).to(torch.bfloat16), layer.bias
    )  # fmt: skip
    assert not torch.equal(usual, unpacked)
    with remedies.WeightOnlySteps(transformer, steps, 4, told.append) as switch:
        for done in range(4):
            seen.append(layer(x))
            switch.ended(done + 1)
    assert [step for step, output in enumerate(seen) if torch.equal(output, unpacked)] == plain
    assert all(torch.equal(seen[step], usual) for step in range(4) if step not in plain)
    assert [step for step, weight_only in enumerate(told[:4]) if weight_only] == plain and told[-1] is False
    assert torch.equal(layer(x), usual)
    recipes.verify(transformer, plan)


def test_a_weight_only_step_is_torchaos_own_on_a_blackwell_gpu():
    """Both kinds of weight are switched by the same attribute, and then multiply the same numbers."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32).to(torch.bfloat16), torch.randn(8, 64).to(torch.bfloat16)
    layers = nn.ModuleDict({"native": copy.deepcopy(linear), "emulated": copy.deepcopy(linear)})
    native = replace(support("nvfp4", B200), fused_quantizer=False)
    packed = nvfp4.quantize(linear.weight, searched=True)
    capability.quantize_linear_modules(layers, {"native"}, native, packed)
    capability.quantize_linear_modules(layers, {"emulated"}, support("nvfp4"), packed)
    with remedies.WeightOnlySteps(layers, (1, 0), 2):
        assert torch.equal(layers["native"](x), layers["emulated"](x))
    assert layers["native"].weight.act_quant_kwargs is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: "{", "damaged"),
        (lambda c: json.dumps(c | {"weights": "other"}), "other weights"),
        (lambda c: json.dumps(c | {"prompts": {}}), "other prompts"),
        (
            lambda c: json.dumps(c | {"weights": c["weights"].replace(", scheduler ", ", scheduler 1")}),
            r"other weights \(scheduler\)",
        ),
        (
            lambda c: json.dumps(c | {"versions": c["versions"] | {"twinframe": "0", "torch": "1"}}),
            r"other versions \(twinframe, torch\)",
        ),
        (lambda c: json.dumps(c | {"recipes": c["recipes"] | {"full": "0"}}), r"other recipes \(full\)"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "recipes"}), "other recipes"),  # an older version's
    ],
)
def test_a_file_of_something_else_is_left_alone(known, tmp_path, change, said):
    made, file = bench(known, []), tmp_path / "q.json"
    lab.Quality(file, made, CHOSEN).put()
    content = change(json.loads(file.read_text()))
    file.write_text(content)
    with pytest.raises(OutputError, match=said):
        lab.Quality(file, made, CHOSEN)
    assert file.read_text() == content


@pytest.mark.parametrize("where", ["in every weight", "in the picture alone"])
@pytest.mark.parametrize("command", ["sensitivity", "tune"])
def test_a_search_by_what_is_not_numbers_is_refused_in_one_sentence(known, tmp_path, monkeypatch, command, where):
    made = bench(known, [])
    if where == "in every weight":
        made.exact.proj_out.weight.data.fill_(torch.nan)
    else:  # as by a VAE that overflows
        black = Made(pixels=torch.zeros(1, 3, 64, 64), not_numbers=(9,))
        monkeypatch.setattr(lab, "finished", lambda *_: black)
        monkeypatch.setattr(sensitivity.Probe, "damage", lambda self: (0.5, 0.5))
    quality = lab.Quality(tmp_path / "q.json", made, CHOSEN)
    with pytest.raises(UnsupportedError, match=f"^{known.name} makes values that are not numbers of 'a', so there is"):
        if command == "tune":
            tune.run(made, quality, 8.0, tmp_path / "tiny.json", probes=1, steps=1)
        else:
            sensitivity.run(made, quality, probes=1, steps=1, lpips_prompts=1)
    assert not (tmp_path / "tiny.json").exists() and "NaN" not in json.dumps(quality.content)


def test_a_denoiser_whose_output_is_no_number_has_no_drift(known):
    made = bench(known, [])
    probe = sensitivity.Probe(made, ["a"], 1)
    made.exact.proj_out.weight.data.fill_(torch.nan)
    with pytest.raises(UnsupportedError, match="not numbers"):
        probe.damage()


def test_one_prompt_cannot_both_choose_and_report():
    with pytest.raises(RequestError, match="take more"):
        lab.halves(replace(CHOSEN, prompts=CHOSEN.prompts[:1]))


# What was found


@pytest.mark.parametrize("model", ["mini-flux", "mini-qwen", "mini-ltx2"])
def test_the_recipes_readme_has_the_table_of_what_was_found(model):
    found = json.loads((catalog.ASSETS / "quality" / f"{model}.json").read_text())
    assert f"<!-- {model} -->\n{tune.table(found)}\n" in (catalog.ASSETS / "recipes" / "README.md").read_text()


@pytest.mark.parametrize("model", ["mini-flux", "mini-qwen", "mini-ltx2"])
def test_the_bytes_of_what_was_found_are_those_that_inspect_gives(model):
    found = json.loads((catalog.ASSETS / "quality" / f"{model}.json").read_text())
    rows = [(recipe_named(row["id"]), row) for row in (*found["frontier"], *found["ablation"])]
    rows = [(recipe, row) for recipe, row in rows if recipe in ("post", "full", "tuned")]
    assert {(recipe, row["precision"]) for recipe, row in rows} >= {
        (i, p) for i in ("post", "full") for p in ("mxfp8", "nvfp4")
    }
    post = {recipe_named(recipe): stored for recipe, stored in found["bytes"].items()}["post"]
    for recipe, row in rows:
        stored = inspect(model, row["precision"], recipe)["bytes"]["quantized"]
        assert row["weight_bytes"] == stored, row["label"]
        assert row["bytes_over_seed_percent"] == pytest.approx(100 * (stored / post - 1))


def test_the_recipes_readme_has_what_drift_says_of_lpips():
    said = (catalog.ASSETS / "recipes" / "README.md").read_text()
    parts = [
        json.loads((catalog.ASSETS / "quality" / f"{model}.json").read_text())["sensitivity"]
        for model in ("mini-flux", "mini-qwen")
    ]
    assert [len(part["cells"]) for part in parts] == [84, 117] and [part["lpips_prompts"] for part in parts] == [4, 2]
    for measure in ("drift", "denoiser_error"):
        assert " and ".join(f"{sensitivity.agreement(part)[measure]:.2f}" for part in parts) in said
    clips = json.loads((catalog.ASSETS / "quality" / "mini-ltx2.json").read_text())["sensitivity"]
    assert (len(clips["cells"]), clips["lpips_prompts"]) == (40, 2)
    assert f"its rank correlation with LPIPS is {sensitivity.agreement(clips)['drift']:.2f}" in " ".join(said.split())


def test_agreement_is_of_ranks_and_needs_three_groups_with_lpips():
    cells = [{"drift": d, "denoiser_error": -d, "lpips": x} for d, x in ((1, 0.1), (2, 0.2), (9, 0.3), (3, None))]
    assert sensitivity.agreement({"cells": cells}) == pytest.approx({"drift": 1.0, "denoiser_error": -1.0})
    assert sensitivity.agreement({"cells": cells[1:]}) == {}


@pytest.mark.parametrize(("model", "prompts"), [("mini-flux", 64), ("mini-qwen", 64), ("mini-ltx2", 32)])
def test_the_recipe_that_is_shipped_is_the_one_that_was_reported(model, prompts):
    found = json.loads((catalog.ASSETS / "quality" / f"{model}.json").read_text())
    (row,) = (row for row in found["frontier"] if row["id"] == "tuned")
    spec = catalog.MODELS[model]
    plan = recipes.plan(loading.empty_transformer(spec), recipes.recipe(spec.family, "tuned"), "nvfp4")
    assert plan.quantized_bytes == row["weight_bytes"]
    assert row["lpips"]["report"]["n"] == len(found["prompts"]["report"]) == prompts
    assert not set(found["prompts"]["report"]) & set(found["prompts"]["search"])
    files = plan.recipe.tunings["nvfp4"].calibrated
    assert [tune._digest(file) for file in files] == found["calibration"]["digests"]
