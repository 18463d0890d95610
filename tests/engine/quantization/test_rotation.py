"""Rotations and four over six: against exact arithmetic, in layers, and in recipe files."""

import copy
import shutil
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from engine.compiler import fusion
from engine.compiler.nodes import aten
from engine.errors import LoadError, UnsupportedError
from engine.machine import Machine
from engine.quantization import capability, int8, nvfp4, recipe_files, recipes, remedies, rotation
from engine.quantization.emulation import nvfp4_activation
from engine.quantization.recipe_files import TunedRecipe, Tuning
from tests.engine.quantization.test_emulation import E2M1, E4M3, SCALINGS, nearest
from tests.support.graphs import count, rewritten, traced

CPU = Machine(name="Some CPU", kind="cpu")
B200 = Machine(name="NVIDIA B200", kind="cuda", capability=(10, 0), mslk=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layers():
    """Widths that are 64, 160 and 96: blocks of 64, 32 and 32."""
    made = nn.ModuleDict({"a": nn.Linear(64, 96), "b": nn.Linear(160, 32), "c": nn.Linear(96, 64, bias=False)})
    return made.to(torch.bfloat16).requires_grad_(False)


def applied(precision, module=None, **tuning):
    """The layers quantized by a recipe with these remedies, verified."""
    module = copy.deepcopy(module) if module is not None else layers()
    recipe = recipes.Recipe(id="t", summary="", tunings=MappingProxyType({precision: Tuning(**tuning)}))
    plan = recipes.plan(module, recipe, precision)
    recipes.verify(recipes.apply(module, plan, capability.support(precision, CPU)), plan)
    return module, plan


# --- rotations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "most", "size"), [(320, 1024, 64), (320, 32, 32), (4096, 1024, 1024), (96, 2, 2), (7, 64, 1)]
)
def test_a_block_is_the_largest_power_of_two_that_divides_the_width(width, most, size):
    assert rotation.block(width, most) == size


@pytest.mark.parametrize("size", [2, 4, 8, 64, 128, 1024])
def test_a_rotation_changes_nothing_in_exact_arithmetic(size):
    """With whole numbers so small that nothing is rounded, whatever power of two the size is."""
    x = torch.randint(-1, 2, (5, 2, size)).to(torch.bfloat16)
    x = torch.where(torch.rand(x.shape) < 8 / size, x, 0)
    weight = torch.randint(-1, 2, (3, size)).to(torch.bfloat16)
    weight = torch.where(torch.rand(weight.shape) < 8 / size, weight, 0)
    turned = rotation.rotate(x, size).double() @ rotation.rotated(weight, size).double().t()
    assert torch.equal(turned, x.double() @ weight.double().t())


def test_a_rotation_is_of_each_block_alone_and_spreads_what_is_large():
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    x[1, 70] = 64
    turned = rotation.rotate(x, 64)
    assert torch.equal(turned[1, 64:].abs(), torch.full((64,), 8.0, dtype=torch.bfloat16))
    assert not turned[1, :64].any() and not turned[0].any()
    assert rotation.rotate(x[:, :64].view(1, 3, 64), 64).shape == (1, 3, 64)


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.7), ("nvfp4", 1.3)])
def test_rotated_int8_loses_less_where_inputs_have_outliers(precision, most):
    """One scale a row suffers from them. NVFP4's blocks of 16 keep them to themselves, and gain nothing."""
    exact = layers()
    x = torch.randn(64, 160)
    x[:, ::41] *= 40
    x = x.to(torch.bfloat16)
    expected = exact["b"](x).float()
    made = [applied(precision, exact, rotation=size)[0]["b"](x).float() for size in (0, 1024)]
    plain, rotated = ((one - expected).norm() for one in made)
    assert rotated < most * plain


def test_a_rotated_plan_names_its_blocks_and_takes_no_more_bytes():
    module, plan = applied("int8", rotation=64)
    assert {layer.name: layer.rotation for layer in plan.layers} == {"a": 64, "b": 32, "c": 32}
    assert plan.layers[0].parts == ["inputs rotated by 64"]
    assert plan.quantized_bytes == applied("int8")[1].quantized_bytes
    assert type(module["a"]) is rotation.RotatedLinear
    module["a"].rotation = 32
    with pytest.raises(recipes.PlanMismatchError, match="1 of 3 layers"):
        recipes.verify(module, plan)


def test_a_recipe_rotates_only_what_it_stores_in_a_format_that_is_rotated():
    _, plan = applied("nvfp4", rotation=32, layers={"a": "fp8", "b": "int8", "c": "bf16"})
    assert {layer.name: layer.rotation for layer in plan.layers} == {"a": 0, "b": 32, "c": 0}


def test_remedies_go_together():
    exact, x = layers(), torch.randn(32, 96).to(torch.bfloat16)
    module, plan = applied("nvfp4", exact, rotation=32, low_rank={"c": 8}, searched=True, four_over_six=True)
    layer = module["c"]
    assert type(layer) is remedies.RotatedLowRankLinear and layer.weight.four_over_six
    assert plan.layers[2].parts == [
        "searched block scales", "four over six", "inputs rotated by 32", "low-rank branch 8"
    ]  # fmt: skip
    expected = exact["c"](x).float()
    assert (layer(x).float() - expected).norm() / expected.norm() < 0.15
    with remedies.WeightOnlySteps(module, (1, 0), 2):
        plain = layer(x).float()
    assert (plain - expected).norm() < (layer(x).float() - expected).norm()


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("precision", ["int8", "nvfp4"])
def test_a_rotated_layer_is_compiled_in_one_graph(precision):
    module, _ = applied(precision, rotation=32, low_rank={"a": 4} if precision == "nvfp4" else {})
    x = torch.randn(2, 9, 64).to(torch.bfloat16)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        made, expected = torch.compile(module["a"], fullgraph=True)(x), module["a"](x)
    torch.testing.assert_close(made, expected, rtol=0.02, atol=0.01)


def test_one_activation_is_rotated_once_for_all_its_layers():
    x, *weights = (torch.randn(*shape).to(torch.bfloat16) for shape in ((2, 5, 32), (16, 32), (48, 32)))
    weights = [int8.quantize_rows(weight) for weight in weights]
    graph = traced(lambda x, ws: [int8.linear(rotation.rotate(x, 32), *w, None) for w in ws], x, weights)
    before = graph(x, weights)
    rewritten(graph, fusion.Rewrites())
    assert count(graph, torch.ops.twinframe.rotate.default) == count(graph, aten.amax.default) == 1
    assert all(torch.equal(a, b) for a, b in zip(graph(x, weights), before, strict=True))


# --- four over six ---------------------------------------------------------------------------------------------------


def reference(x):
    """The better of two block scales by numpy: block-scaled values in float64, and the tensor scale."""
    blocks = x.float().numpy().reshape(-1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    tensor_scale = amax.max() * (np.float32(1) / np.float32(256 * 6))
    reciprocal = np.float32(1) / tensor_scale
    made = []
    for top in (6, 4):
        scale = nearest(E4M3, (amax / np.float32(top) * reciprocal).astype(np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = nearest(E2M1, (blocks * (reciprocal / scale.astype(np.float32))).astype(np.float64))
        made.append(np.where(scale == 0, 0, codes * scale))
    exact = (blocks * reciprocal).astype(np.float64)
    errors = [np.square(values - exact).sum(-1, keepdims=True) for values in made]
    return np.where(errors[1] < errors[0], made[1], made[0]).reshape(x.shape), errors, tensor_scale


@pytest.mark.parametrize("scaling", SCALINGS)
def test_activations_take_the_better_of_two_scales(scaling):
    x = SCALINGS[scaling](torch.randn(96, 640)).to(torch.bfloat16)
    values, scale = nvfp4_activation(x, four_over_six=True)
    expected, (six, four), expected_scale = reference(x)
    assert scale.item() == expected_scale
    assert 0.1 < (four < six).mean() < 0.9, "each wins often"
    differ = (values.double().numpy() != expected).reshape(-1, 16).any(-1)
    # fp32 and float64 sums may disagree about two scales that are as good as equal.
    tied = np.abs(four - six).squeeze(-1) <= 1e-4 * (six + four).squeeze(-1)
    assert not (differ & ~tied).any() and differ.mean() < 1e-3


def test_the_largest_value_can_take_the_larger_scale():
    """Else the block that sets the tensor's scale would be clipped: 4 x 384 is as much as 6 x 256."""
    x = torch.tensor([4.0, 3.0, 3.0, 3.0] * 4).to(torch.bfloat16).view(1, 16)
    values, scale = nvfp4_activation(x, four_over_six=True)
    assert torch.allclose(values.float() * scale, x.float(), rtol=1e-6)
    codes, block_scales, tensor_scale = nvfp4.quantize(x.expand(16, 16).contiguous(), four_over_six=True)
    assert (block_scales.float() == 384).all()
    assert torch.allclose(nvfp4.dequantize(codes, block_scales, tensor_scale), x.float(), rtol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_weights_lose_less_than_by_either_scale_alone(scaling):
    weight = SCALINGS[scaling](torch.randn(64, 320)).to(torch.bfloat16)

    def error(*packed):
        return (nvfp4.dequantize(*packed) - weight.float()).square().sum().item()

    both, searched = nvfp4.quantize(weight, four_over_six=True), nvfp4.quantize(weight, True, True)
    assert error(*searched) <= error(*both) < error(*nvfp4.quantize(weight))


def test_zeros_stay_zeros_and_what_is_no_number_is_not_hidden():
    module, _ = applied("nvfp4", four_over_six=True)
    x = torch.randn(4, 64).to(torch.bfloat16)
    x[1] = 0
    assert torch.equal(module["a"](x)[1], module["a"].bias) and module["a"](x).isfinite().all()
    assert torch.equal(module["a"](x * 0), module["a"].bias.expand(4, -1))
    x[2, 3] = torch.nan
    assert module["a"](x).isnan().all()
    zero = layers()
    zero["a"].weight.zero_()
    module, _ = applied("nvfp4", zero, four_over_six=True, rotation=64)
    assert torch.equal(module["a"](torch.randn(4, 64).to(torch.bfloat16)), zero["a"].bias.expand(4, -1))


def test_where_nvfp4_is_native_four_over_six_is_refused():
    module = layers()
    recipe = recipes.Recipe(id="t", summary="", tunings=MappingProxyType({"nvfp4": Tuning(four_over_six=True)}))
    plan = recipes.plan(module, recipe, "nvfp4")
    with pytest.raises(UnsupportedError, match="no kernel for activations where NVFP4 is native: choose a recipe"):
        recipes.apply(module, plan, capability.support("nvfp4", B200))


# --- recipe files ----------------------------------------------------------------------------------------------------


def test_both_are_read_as_they_were_written(tmp_path):
    tunings = {"nvfp4": Tuning(rotation=64, four_over_six=True), "int8": Tuning(rotation=1024)}
    made = TunedRecipe(id="tuned", base="full", summary="S.", tunings=tunings)
    (tmp_path / "f.json").write_bytes(recipe_files.write(tmp_path / "f.json", made, {"by": "hand"}))
    (read,) = recipe_files.read("f", tmp_path)
    assert read.tunings == {name: replace(tuning, source="f.json") for name, tuning in tunings.items()}


@pytest.mark.parametrize(
    ("precision", "said", "sentence"),
    [
        ("nvfp4", {"rotation": 48}, "its rotation is 48, not 0 for none or a power of two from 2 to 1024"),
        ("int8", {"rotation": 1}, "its rotation is 1, not 0"),
        ("int8", {"rotation": 2048}, "its rotation is 2048, not 0"),
        ("int8", {"rotation": -2}, "its rotation is -2, not 0"),
        ("int8", {"rotation": True}, "its rotation is True, not 0"),
        ("int8", {"rotation": "64"}, "its rotation is '64', not 0"),
        ("fp8", {"rotation": 64}, "it has a rotation in fp8, and not in nvfp4 or int8"),
        ("nvfp4", {"four_over_six": 1}, "searched and four_over_six are not true or false"),
        ("int8", {"four_over_six": True}, "it has four over six in int8, and not in nvfp4"),
        ("int8", {"weight_only_steps": [2, 0]}, "in int8, and not in nvfp4"),
        ("int8", {"low_rank": {"a": 4}}, "a has a low-rank branch but is not in nvfp4"),
    ],
)
def test_what_cannot_be_gets_one_sentence(precision, said, sentence, tmp_path):
    content = {"id": "t", "base": "full", "summary": "S.", "tunings": {precision: said}}
    with pytest.raises(LoadError) as error:
        recipe_files._recipe(tmp_path / "f.json", content)
    assert sentence in str(error.value) and "\n" not in str(error.value)
