"""A step of each transformer as a B200 would run it: what every layer multiplies, and how."""

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.quantization import recipes
from engine.quantization.capability import support
from engine.results import LayerCounts
from tests.support.blackwell import (
    B200,
    NATIVE,
    PAIRS,
    QUANTIZE_NVFP4,
    SCALED_MM,
    SYSTEMS,
    Recorder,
    aten,
    products,
    quantized,
    step,
)

pytestmark = [pytest.mark.blackwell, pytest.mark.usefixtures("on_blackwell")]


FEW = {("qwen-image", "mxfp8"): 2, ("ltx-2", "mxfp8"): 2}
"""How many blocks of each class take part; all where it is not said. The layers of a model are chosen by name, for both
formats alike, and MXFP8's quantizer takes a hundred operations a layer."""


@dataclass(frozen=True)
class Rehearsal:
    model: str
    precision: str
    plan: recipes.Plan
    held: LayerCounts
    shapes: list[tuple[int, ...]]
    recorder: Recorder


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def rehearsal(on_blackwell, request):
    """One step of a transformer at batch 1."""
    model, precision = request.param
    with FakeTensorMode():
        transformer, plan = quantized(model, precision, FEW.get(request.param))
        held = recipes.verify(transformer, plan)
        return Rehearsal(model, precision, plan, held, *step(transformer, SYSTEMS[model].inputs(1)))


@pytest.mark.parametrize("precision", NATIVE)
def test_a_b200_runs_the_block_scaled_precisions_natively(precision):
    supported = support(precision, B200)
    assert supported.execution == "native"
    assert supported.fused_quantizer == (precision == "nvfp4")


def test_every_planned_layer_reaches_the_scaled_matmul_once(rehearsal):
    system, recorder = SYSTEMS[rehearsal.model], rehearsal.recorder
    if (rehearsal.model, rehearsal.precision) not in FEW:
        skipped = system.linears - system.quantized
        assert rehearsal.plan.counts == LayerCounts(quantized=system.quantized, skipped=skipped, left=0)
    assert rehearsal.held == rehearsal.plan.counts
    native = [QUANTIZE_NVFP4, SCALED_MM] if rehearsal.precision == "nvfp4" else [SCALED_MM]
    assert recorder.operators.keys() == {layer.name for layer in rehearsal.plan.layers}
    for name, operators in recorder.operators.items():
        assert operators == (native if name in rehearsal.plan.names else [aten.addmm.default]), name
    assert set(recorder.outside) == {aten.bmm.default}  # attention, which stays bf16


def test_outputs_have_the_right_shape(rehearsal):
    assert rehearsal.shapes == SYSTEMS[rehearsal.model].outputs(1)


def test_operands_have_the_shapes_of_the_plan_and_the_types_of_the_format(rehearsal):
    types = {
        "mxfp8": (torch.float8_e4m3fn, torch.float8_e8m0fnu),
        "nvfp4": (torch.float4_e2m1fn_x2, torch.float8_e4m3fn),
    }
    found = rehearsal.recorder.products
    assert {(p.operands, p.scales) for p in found.values()} == {types[rehearsal.precision]}
    planned = {p.name: (p.in_features, p.out_features) for p in rehearsal.plan.layers if p.quantized}
    assert {name: (p.k, p.n) for name, p in found.items()} == planned


def test_rows_of_the_strict_recipe_are_those_that_a_step_multiplies(rehearsal):
    rows = recipes.recipe(rehearsal.model, "strict").rows
    for name, p in rehearsal.recorder.products.items():
        assert p.m == next((stated for pattern, stated in rows if pattern in name), p.m), name


def test_one_block_of_each_class_stands_for_all(rehearsal):
    of_one = products(rehearsal.model, rehearsal.precision, 1)[1]
    assert set(rehearsal.recorder.products.values()) == of_one
