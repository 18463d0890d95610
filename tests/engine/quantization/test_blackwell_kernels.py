"""The kernels of a B200: every product at batch 1, 4 and 8 is one that they take, and mslk's quantizer compiles."""

import re
from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import catalog
from engine.benchmark import profile
from engine.quantization import recipes
from engine.quantization.capability import quantize_linear_modules, support
from engine.weights import loading
from tests.support.blackwell import (
    B200,
    BATCHES,
    MINIATURES,
    NATIVE,
    PAIRS,
    SCALED_MM,
    SYSTEMS,
    Everything,
    bf16,
    compile_quantizer,
    fp4_quantize,
    is_taken,
    products,
    triton,
)

pytestmark = [pytest.mark.blackwell, pytest.mark.usefixtures("on_blackwell")]


@pytest.mark.parametrize(("precision", "batch", "bias"), list(product(NATIVE, (1, 4), (False, True))))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rows_that_are_cut_from_a_longer_sequence_are_taken(precision, batch, bias, mode):
    with FakeTensorMode():
        linear = nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16, device="cuda:0").requires_grad_(False)
        layer = quantize_linear_modules(nn.Sequential(linear), {"0"}, support(precision, B200))
        with mode():
            assert layer(bf16(batch, 8, 64)[:, :5]).shape == (batch, 5, 96)


@pytest.mark.parametrize("name", NATIVE)
def test_the_floor_times_the_product_alone(name):
    with FakeTensorMode():
        layer = nn.Sequential(nn.Linear(3072, 3072, dtype=torch.bfloat16, device="cuda:0")).requires_grad_(False)
        quantize_linear_modules(layer, {"0"}, support(name, B200))
        alone = profile._alone(layer[0], 512, torch.device("cuda:0"))
        with Everything() as ran:
            alone()
    assert ran.operators == [SCALED_MM]


@pytest.fixture(scope="module")
def every_product(on_blackwell):
    """By model, precision and batch size."""
    return {(*pair, batch): found for pair in PAIRS for batch, found in products(*pair, *BATCHES).items()}


@pytest.mark.parametrize(("model", "precision", "batch"), [(*pair, batch) for pair, batch in product(PAIRS, BATCHES)])
def test_every_product_is_one_that_the_kernels_take(every_product, model, precision, batch):
    assert every_product[model, precision, batch]
    for p in every_product[model, precision, batch]:
        assert is_taken(p)


@pytest.mark.parametrize(("precision", "features"), list(product(NATIVE, (32, 48))))
def test_layers_whose_input_is_no_multiple_of_32_are_refused(precision, features):
    """NVFP4's blocks are 16 long, but `_scaled_mm` wants 16 bytes of two numbers each."""
    with FakeTensorMode():
        layer = nn.Sequential(nn.Linear(features, 64, dtype=torch.bfloat16, device="cuda:0")).requires_grad_(False)

        def run():
            return quantize_linear_modules(layer, {"0"}, support(precision, B200))(bf16(1, features))

        if features == 32:
            assert run().shape == (1, 64)
        else:
            with pytest.raises((AssertionError, RuntimeError), match="divisible by"):
                run()


@pytest.mark.parametrize("model", [*SYSTEMS, *MINIATURES])
def test_no_recipe_plans_a_layer_that_a_b200_would_refuse(model):
    kind = catalog.KINDS[model]
    empty = loading.empty_transformer(kind)
    for recipe_id, precision in product(kind.recipes, NATIVE):
        for layer in recipes.plan(empty, recipes.recipe(kind.family, recipe_id), precision).layers:
            assert not layer.quantized or (layer.in_features % 32 == 0 and layer.out_features % 16 == 0), layer


@pytest.fixture(scope="module")
def launches(every_product):
    """The kernel's variants that mslk asks for, over all activations of all models and batch sizes."""
    kernel, seen = fp4_quantize.triton_quantize_nvfp4_kernel, set()

    class Launcher:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                given = dict(zip(kernel.arg_names, args, strict=False))
                assert grid[0] * 64 >= given["N"] and grid[1] * constants["M_PER_BLOCK"] >= given["M"]
                ones = {name: 1 for name, value in given.items() if isinstance(value, int) and value == 1}
                seen.add(tuple(sorted((constants | ones).items())))  # Triton builds a 1 into the code

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp4_quantize, "triton_quantize_nvfp4_kernel", Launcher())
        for (_, precision, _), found in every_product.items():
            for p in found if precision == "nvfp4" else ():
                activations = torch.empty(p.m, p.k, dtype=torch.bfloat16, device="meta")
                fp4_quantize.triton_quantize_nvfp4(activations, torch.empty((), device="meta"))
    return [dict(constants) for constants in sorted(seen)]


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_mslk_needs_variants_for_few_rows_and_for_rows_that_do_not_fill_a_tile(launches):
    assert {c["M_PER_BLOCK"] for c in launches} == {1, 2, 4, 8, 16, 128}
    assert {c["USE_MASK"] for c in launches} == {False, True}
    assert not any(c["USE_INT64_INDEXING"] for c in launches)


@pytest.mark.parametrize("capability", [100, 103, 120])
def test_mslks_quantizer_compiles_for_blackwells(launches, capability, no_cache):
    """Each variant for a B200; for its successors, whose assembler is the same, one for few rows and one for many."""
    by_rows = sorted(launches, key=lambda constants: constants["M_PER_BLOCK"])
    for constants in by_rows if capability == 100 else (by_rows[0], by_rows[-1]):
        asm = compile_quantizer(constants, capability).asm
        assert asm["cubin"]
        assert re.search(rf"\.target sm_{capability}a\b", asm["ptx"])
        assert "cvt.rn.satfinite.e2m1x2" in asm["ptx"]  # the instruction that makes two FP4 numbers


def test_ptxas_refuses_mslks_quantizer_on_hopper(launches, no_cache, capfd):
    with pytest.raises(triton.runtime.errors.PTXASError, match=r"e2m1x2.*not supported"):
        compile_quantizer(launches[0], 90)
