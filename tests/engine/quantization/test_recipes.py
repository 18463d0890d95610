"""Recipes against the real architectures (on the meta device, so without weights) and against quantized modules."""

import copy
import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, LTX2VideoTransformer3DModel, QwenImageTransformer2DModel
from torch import nn
from torchao.utils import get_model_size_in_bytes

from engine import catalog
from engine.errors import RequestError
from engine.formats import FORMATS
from engine.quantization import recipe_files, recipes
from engine.quantization.capability import Machine, support
from engine.quantization.recipes import RECIPES, PlanMismatchError, Recipe, plan, recipe, verify
from engine.results import LayerCounts
from engine.weights import loading

CPU = Machine(name="Some CPU", kind="cpu")
QUANTIZED = ("fp8", "mxfp8", "nvfp4")


def tiny_flux():
    """The miniature's widths, one block of each kind."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=5,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=(8, 28, 28),
    )


@pytest.fixture
def mini():
    torch.manual_seed(0)
    return tiny_flux().eval().to(torch.bfloat16).requires_grad_(False)


@pytest.fixture
def odd():
    """One layer for every shape limit."""
    layers = {"a": (32, 32), "b": (48, 32), "c": (32, 48), "d": (40, 32), "embed": (32, 32)}
    return nn.ModuleDict({name: nn.Linear(i, o) for name, (i, o) in layers.items()}).to(torch.bfloat16)


# The counts and sizes of the published recipes; sizes in GB of 1e9 bytes.
PUBLISHED = {
    "flux.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 504, 494, 23.80, 12.34, 6.79),
    "qwen-image": (QwenImageTransformer2DModel, {}, 846, 360, 40.86, 34.28, 31.09),
    "ltx-2": (LTX2VideoTransformer3DModel, {}, 1370, 1356, 37.75, 19.52, 10.70),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_seed_recipes_on_the_real_architectures(model):
    cls, config, linears, quantized, bf16, mxfp8, nvfp4 = PUBLISHED[model]
    with torch.device("meta"):
        transformer = cls(**config)
    for precision, gigabytes in (("mxfp8", mxfp8), ("nvfp4", nvfp4)):
        planned = plan(transformer, recipe(model, "post"), precision)
        assert len(planned.layers) == linears
        assert planned.counts == LayerCounts(quantized=quantized, skipped=linears - quantized, left=0)
        assert planned.bf16_bytes / 1e9 == pytest.approx(bf16, abs=0.006)
        assert planned.quantized_bytes / 1e9 == pytest.approx(gigabytes, abs=0.006)


def test_ltx2_rules_that_match_nothing_are_reported():
    with torch.device("meta"):
        transformer = LTX2VideoTransformer3DModel(num_layers=1)
    unmatched = plan(transformer, recipe("ltx-2", "post"), "nvfp4").unmatched
    names = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    assert "adaln_single" in unmatched and "proj_in" not in unmatched
    assert unmatched == tuple(p for p in recipe("ltx-2", "post").skip_containing if not any(p in n for n in names))


STRICT = {"flux.1-dev": 304, "flux.1-schnell": 304, "qwen-image": 360, "ltx-2": 768}


@pytest.mark.parametrize("model", STRICT)
def test_strict_counts_rows_too(model):
    spec = catalog.MODELS[model]
    empty = loading.empty_transformer(spec)
    seed, strict = (plan(empty, recipe(spec.family, name), "nvfp4") for name in ("post", "strict"))
    assert strict.counts.quantized == STRICT[model] and strict.names <= seed.names
    assert not set(strict.unmatched) - set(seed.unmatched), "a pattern of the row counts matches nothing"
    few = [layer for layer in strict.layers if "rows" in layer.reason]
    assert {layer.name for layer in few} == seed.names - strict.names


@pytest.mark.parametrize(
    ("model", "layer", "rows"),
    [
        ("flux.1-dev", "single_transformer_blocks.0.norm.linear", 1),
        ("flux.1-dev", "transformer_blocks.0.norm1_context.linear", 1),
        ("flux.1-dev", "transformer_blocks.0.ff_context.net.2", 512),
        ("flux.1-dev", "transformer_blocks.0.attn.to_add_out", 512),
        ("ltx-2", "audio_time_embed.linear", 2),
        ("ltx-2", "transformer_blocks.0.audio_ff.net.2", 252),
        ("ltx-2", "transformer_blocks.0.audio_to_video_attn.to_k", 252),
        ("ltx-2", "transformer_blocks.0.video_to_audio_attn.to_q", 252),
    ],
)
def test_strict_says_how_many_rows_a_layer_sees(model, layer, rows):
    spec = catalog.MODELS[model]
    layers = plan(loading.empty_transformer(spec), recipe(model, "strict"), "nvfp4").layers
    reason = next(each.reason for each in layers if each.name == layer)
    assert reason == f"It multiplies {rows} rows at the post's settings, fewer than 1024."


def test_the_corrected_ltx2_recipe_keeps_adaptive_norms_and_matches_with_every_pattern():
    empty = loading.empty_transformer(catalog.MODELS["ltx-2"])
    seed, corrected = (plan(empty, recipe("ltx-2", name), "nvfp4") for name in ("post", "post-corrected"))
    assert corrected.unmatched == () and len(seed.unmatched) == 7
    added = seed.names - corrected.names
    assert len(added) == 12 and all("time_embed" in name or name.startswith("av_cross_attn_") for name in added)
    assert corrected.names < seed.names


@pytest.mark.parametrize("model", ["flux.1-dev", "flux.1-schnell", "qwen-image", "ltx-2"])
def test_full_takes_every_layer_of_the_large_models(model):
    spec = catalog.MODELS[model]
    planned = plan(loading.empty_transformer(spec), recipe(spec.family, "full"), "nvfp4")
    assert planned.counts == LayerCounts(quantized=len(planned.layers), skipped=0, left=0)


def test_quantizer_changes_planned_layers_alone(mini):
    planned = plan(mini, recipe("mini-flux", "post"), "nvfp4")
    place = recipes.quantizer(planned, support("nvfp4", CPU))
    for name, module in list(mini.named_modules()):
        place(name, module)
    assert verify(mini, planned) == planned.counts
    with pytest.raises(ValueError, match="fp8"):
        recipes.quantizer(planned, support("fp8", CPU))


def test_seed_recipe_on_the_miniature_skips_by_rule_and_by_width(mini):
    layers = {layer.name: layer for layer in plan(mini, recipe("mini-flux", "post"), "nvfp4").layers}
    skipped = {name: layer.reason for name, layer in layers.items() if not layer.quantized}
    assert skipped["proj_out"] == "The recipe names proj_out."
    assert skipped["norm_out.linear"] == "The recipe names norm_out.linear."
    assert "contains embed" in skipped["context_embedder"]
    assert all("embed" in name for name in skipped.keys() - {"proj_out", "norm_out.linear"})
    assert layers["single_transformer_blocks.0.proj_out"].quantized  # exactly proj_out, not ending in it
    assert not any(layer.left for layer in layers.values())


def test_width_rule():
    rule = Recipe(id="r", summary="", min_features=256)
    assert rule.skip("x", 255, 4096) == rule.skip("x", 4096, 255) == "It is narrower than 256 features."
    assert rule.skip("x", 256, 256) is None


@pytest.mark.parametrize("precision", QUANTIZED)
def test_full_recipe_takes_every_layer_of_the_miniature(mini, precision):
    planned = plan(mini, recipe("mini-flux", "full"), precision)
    assert planned.counts == LayerCounts(quantized=len(planned.layers), skipped=0, left=0)
    assert planned.unmatched == ()


@pytest.mark.parametrize(
    ("precision", "left"), [("fp8", {"d"}), ("mxfp8", {"b", "c", "d"}), ("nvfp4", {"b", "d"}), ("bf16", set())]
)
def test_layers_of_odd_shape_are_left_with_the_reason(odd, precision, left):
    rules = Recipe(id="r", summary="", skip_containing=("embed", "nothing"), skip_exact=("b.c",))
    planned = plan(odd, rules, precision)
    assert {layer.name for layer in planned.layers if layer.left} == left
    assert all("multiples of" in layer.reason for layer in planned.layers if layer.left)
    assert planned.unmatched == ("nothing", "b.c")
    if precision == "bf16":
        assert planned.counts == LayerCounts(quantized=0, skipped=5, left=0)
        assert planned.quantized_bytes == planned.bf16_bytes
    else:
        assert planned.counts == LayerCounts(quantized=4 - len(left), skipped=1, left=len(left))
        recipes.apply(odd, planned, support(precision, CPU))
        assert verify(odd, planned) == planned.counts


@pytest.mark.parametrize("recipe_id", ["post", "full"])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_applied_plans_hold_what_they_say(mini, precision, recipe_id):
    planned = plan(mini, recipe("mini-flux", recipe_id), precision)
    assert get_model_size_in_bytes(mini) == planned.bf16_bytes
    assert recipes.apply(mini, planned, support(precision, CPU)) is mini
    assert verify(mini, planned) == planned.counts
    assert get_model_size_in_bytes(mini) == planned.quantized_bytes


@pytest.mark.parametrize("shape", [(32, 32), (320, 1280), (96, 160), (128, 128), (1024, 4096)])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_format_counts_the_bytes_that_are_stored(precision, shape):
    """torchao pads MXFP8's scales to whole tiles."""
    held = nn.ModuleDict({"a": nn.Linear(*shape, bias=False)}).to(torch.bfloat16)
    recipes.apply(held, plan(held, recipe("mini-flux", "full"), precision), support(precision, CPU))
    assert get_model_size_in_bytes(held) == FORMATS[precision].size(*shape)


def test_plan_on_the_meta_device_equals_plan_on_weights(mini):
    with torch.device("meta"):
        empty = tiny_flux()
    assert plan(empty, recipe("mini-flux", "post"), "nvfp4") == plan(mini, recipe("mini-flux", "post"), "nvfp4")


def test_verify_catches_a_layer_that_stayed_bf16(mini):
    planned = plan(mini, recipe("mini-flux", "post"), "nvfp4")
    with pytest.raises(PlanMismatchError, match="20 of 28"):
        verify(mini, planned)
    linear = copy.deepcopy(mini.transformer_blocks[0].attn.to_q)
    recipes.apply(mini, planned, support("nvfp4", CPU))
    mini.transformer_blocks[0].attn.to_q = linear
    with pytest.raises(PlanMismatchError, match=r"1 of 28.*attn\.to_q"):
        verify(mini, planned)


def test_verify_catches_another_precision_and_another_recipe(mini):
    seed, full = (plan(mini, recipe("mini-flux", r), "nvfp4") for r in ("post", "full"))
    fp8 = plan(mini, recipe("mini-flux", "post"), "fp8")
    recipes.apply(mini, seed, support("nvfp4", CPU))
    for wrong in (full, fp8, plan(mini, recipe("mini-flux", "post"), "bf16")):
        with pytest.raises(PlanMismatchError):
            verify(mini, wrong)


def test_verify_catches_missing_and_unplanned_layers(mini):
    planned = plan(mini, recipe("mini-flux", "post"), "bf16")
    mini.extra = nn.Linear(16, 16, dtype=torch.bfloat16)
    with pytest.raises(PlanMismatchError, match="extra"):
        verify(mini, planned)
    del mini.extra, mini.proj_out
    with pytest.raises(PlanMismatchError, match="proj_out"):
        verify(mini, planned)


def test_apply_refuses_another_precision(mini):
    with pytest.raises(ValueError, match="fp8"):
        recipes.apply(mini, plan(mini, recipe("mini-flux", "post"), "nvfp4"), support("fp8", CPU))


def test_inspect_json(mini):
    planned = plan(mini, recipe("mini-flux", "post"), "nvfp4")
    values = json.loads(json.dumps(planned.to_json()))
    assert values["linears"] == len(values["layers"]) == values["quantized"] + values["skipped"] + values["left"] == 28
    assert values["quantized"] == 20
    assert values["bytes"] == {"bf16": planned.bf16_bytes, "quantized": planned.quantized_bytes}
    assert values["bytes"]["quantized"] < 0.5 * values["bytes"]["bf16"]
    first = values["layers"][0]
    assert first.keys() == {"name", "in", "out", "quantized", "precision", "bytes", "parts", "reason"}
    assert mini.get_submodule(first["name"]).in_features == first["in"]


def test_catalog_offers_exactly_the_recipes_that_exist():
    for spec in catalog.MODELS.values():
        files = {found.id for found in recipe_files.read(spec.family)}
        assert set(spec.recipes) == {r for f, r in RECIPES if f == spec.family} | files
        for recipe_id in spec.recipes:
            assert recipe(spec.family, recipe_id).id == recipe_id


def test_unknown_recipe_lists_what_there_is():
    with pytest.raises(RequestError, match="choose post or full"):
        recipe("mini-flux", "half")
    with pytest.raises(RequestError, match="it has none"):
        recipe("no-model", "post")
