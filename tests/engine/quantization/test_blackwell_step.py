"""A step of each transformer as a B200 would run it: what every layer multiplies, and how."""

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from engine import catalog
from engine.quantization import recipes
from engine.quantization.capability import support
from engine.results import LayerCounts
from engine.weights import loading
from tests.support.blackwell import (
    B200,
    MINIATURES,
    NATIVE,
    OTHERS,
    PAIRS,
    QUANTIZE_NVFP4,
    SCALED_MM,
    SYSTEMS,
    Recorder,
    aten,
    is_taken,
    products,
    quantized,
    step,
)

pytestmark = [pytest.mark.blackwell, pytest.mark.usefixtures("on_blackwell")]


FEW = {**dict.fromkeys(PAIRS, 2), **dict.fromkeys(OTHERS, 1), ("flux.1-dev", "nvfp4"): None}
"""How many blocks of each class take part, all where it is None: layers are chosen by name, and the blocks of a class
are alike."""
ALIKE = {"flux.1-schnell": ("flux.1-dev", {"guidance_embeds"}), "qwen-image-2512": ("qwen-image", set())}
"""Kinds for which another's step stands -> that one, and where their configurations differ."""


@dataclass(frozen=True)
class Rehearsal:
    model: str
    precision: str
    plan: recipes.Plan
    held: LayerCounts
    shapes: list[tuple[int, ...]]
    recorder: Recorder


@pytest.fixture(scope="module", params=[*PAIRS, *OTHERS], ids="-".join)
def rehearsal(on_blackwell, request):
    """One step of a transformer at batch 1."""
    model, precision = request.param
    with FakeTensorMode():
        transformer, plan = quantized(model, precision, FEW[request.param])
        held = recipes.verify(transformer, plan)
        return Rehearsal(model, precision, plan, held, *step(transformer, SYSTEMS[model].inputs(1)))


@pytest.mark.parametrize("precision", NATIVE)
def test_a_b200_runs_the_block_scaled_precisions_natively(precision):
    supported = support(precision, B200)
    assert supported.execution == "native"
    assert supported.fused_quantizer == (precision == "nvfp4")


def test_every_planned_layer_reaches_the_scaled_matmul_once(rehearsal):
    recorder = rehearsal.recorder
    assert rehearsal.held == rehearsal.plan.counts
    native = [QUANTIZE_NVFP4, SCALED_MM] if rehearsal.precision == "nvfp4" else [SCALED_MM]
    assert recorder.operators.keys() == {layer.name for layer in rehearsal.plan.layers}
    for name, operators in recorder.operators.items():
        if name in rehearsal.plan.names:
            assert operators == native, name
        else:
            assert operators in ([aten.addmm.default], [aten.mm.default]), name
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


def test_every_product_is_one_that_the_kernels_take(rehearsal):
    assert all(map(is_taken, rehearsal.recorder.products.values()))


def test_rows_of_the_strict_recipe_are_those_that_a_step_multiplies(rehearsal):
    rows = recipes.recipe(catalog.KINDS[rehearsal.model].family, "strict").rows
    for name, p in rehearsal.recorder.products.items():
        assert p.m == next((stated for pattern, stated in rows if pattern in name), p.m), name


@pytest.mark.parametrize("rehearsal", PAIRS, ids="-".join, indirect=True)
def test_one_block_of_each_class_stands_for_all(rehearsal):
    of_one = products(rehearsal.model, rehearsal.precision, 1)[1]
    assert set(rehearsal.recorder.products.values()) == of_one


def test_every_kind_is_rehearsed_or_is_one_that_is():
    assert catalog.KINDS.keys() == {*SYSTEMS, *MINIATURES, *ALIKE}
    for model, (other, differs) in ALIKE.items():
        kinds = [catalog.KINDS[name] for name in (model, other)]
        assert kinds[0].family == kinds[1].family
        new, old = (loading.empty_transformer(kind) for kind in kinds)
        assert (
            type(new) is type(old) and {name for name in new.config if new.config[name] != old.config[name]} == differs
        )


def test_further_passes_of_guidance_leave_layers_out_and_change_no_other():
    """LTX-2.3's, for one prompt and half as many rows; the pass for both is rehearsed above."""
    alone = tuple(f".{attention}.{layer}" for attention in ("attn1", "audio_attn1") for layer in ("to_q", "to_k"))
    passes = {
        alone: {"spatio_temporal_guidance_blocks": (0,)},
        (".audio_to_video_attn.", ".video_to_audio_attn."): {"isolate_modalities": True},
    }
    with FakeTensorMode():
        transformer, plan = quantized("ltx-2.3", "nvfp4", 1)
        for block in transformer.transformer_blocks:
            block.register_forward_pre_hook(_decided, with_kwargs=True)
        one = tree_map_only(torch.Tensor, lambda tensor: tensor[:1], SYSTEMS["ltx-2.3"].inputs(1))
        for left_out, guidance in passes.items():
            made, recorder = step(transformer, one | guidance)
            assert made == [(1, *shape[1:]) for shape in SYSTEMS["ltx-2.3"].outputs(1)]
            for name in plan.names:
                ran = [] if any(part in name for part in left_out) else [QUANTIZE_NVFP4, SCALED_MM]
                assert recorder.operators[name] == ran, name
            assert all(map(is_taken, recorder.products.values()))


def _decided(_, args, given):
    """That all attention is left out is a tensor in host memory, which has a value there and has none here."""
    if isinstance(given["all_perturbed"], torch.Tensor):
        given = given | {"all_perturbed": True, "perturbation_mask": None}
    return args, given
