"""The miniatures in every recipe, and mixtures of formats, as a B200 would run them."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from engine import catalog
from engine.quantization import recipes
from engine.quantization.recipe_files import Tuning
from engine.quantization.remedies import WeightOnlySteps
from engine.weights import loading
from tests.support.blackwell import (
    DEQUANTIZE,
    INT8_MM,
    MINIATURES,
    NATIVE,
    PLAIN_MM,
    QUANTIZE_NVFP4,
    SCALED_MM,
    SYSTEMS,
    aten,
    is_taken,
    on_card,
    one_step,
    quantized,
    step,
)

pytestmark = [pytest.mark.blackwell, pytest.mark.usefixtures("on_blackwell")]

SMALL = [
    (model, precision, recipe_id)
    for model, precision in product(MINIATURES, NATIVE)
    for recipe_id in catalog.model(model).recipes
    if precision in (recipes.recipe(model, recipe_id).tunings or NATIVE)
]
"""A recipe file that changes another format alone leaves the rules of its base, which are walked as such."""


def small(model, recipe_id):
    """A recipe without calibrated weights, which are for real ones alone: others of the same format stand for them."""
    recipe = recipes.recipe(model, recipe_id)
    tunings = {precision: replace(tuning, calibrated=()) for precision, tuning in recipe.tunings.items()}
    return replace(recipe, tunings=tunings)


@pytest.mark.parametrize(("model", "precision", "recipe_id"), SMALL)
def test_every_recipe_of_a_miniature_runs_natively(model, precision, recipe_id, monkeypatch):
    """Two pictures, and three with guidance, so that there is an odd number of rows where one is a picture's.

    What a recipe changes is in the layers, whatever their rows: those beside the post's are given the odd ones alone.
    """
    even, odd = one_step(model, 2, 1.0), one_step(model, 3, 3.0)
    calls = even + odd if recipe_id == "post" else odd[:1]
    with FakeTensorMode():
        transformer, plan = quantized(model, precision, recipe=small(model, recipe_id))
        stored = {layer.name: layer.precision for layer in plan.layers}
        alone = {layer.name for layer in plan.layers if layer.weights_alone}
        if alone:  # their weights are unpacked for bf16 activations, which is then all that is looked for
            monkeypatch.setattr(NVFP4Tensor, "dequantize", DEQUANTIZE)
        assert recipes.verify(transformer, plan).quantized > len(stored) / 3
        for given in calls:
            _, recorder = step(transformer, on_card(given))
            for name, operators in recorder.operators.items():
                expected = {
                    "bf16": PLAIN_MM,
                    "int8": {INT8_MM},
                    "fp8": {SCALED_MM},
                    "mxfp8": {SCALED_MM},
                    "nvfp4": {SCALED_MM, QUANTIZE_NVFP4},
                }["bf16" if name in alone else stored[name]]
                assert operators and set(operators) <= expected, name
            assert all(map(is_taken, recorder.products.values()))
            assert recorder.products.keys() == {name for name in plan.names - alone if stored[name] != "int8"}


@pytest.mark.parametrize(("model", "precision"), list(product(MINIATURES, NATIVE)))
def test_a_miniatures_layers_that_a_b200_would_refuse_are_left_with_the_reason(model, precision):
    """Of a width that no format takes; of those the bundled ones have none."""
    plan = recipes.plan(loading.empty_transformer(catalog.model(model)), small(model, "full"), precision)
    assert plan.counts.left == 0
    odd = recipes.plan(nn.ModuleDict({"odd": nn.Linear(48, 20)}), small(model, "full"), precision)
    assert odd.counts.left == 1 and "needs multiples of 32" in odd.layers[0].reason


@pytest.mark.parametrize("model", MINIATURES)
def test_a_miniatures_blocks_compile_without_a_graph_break(model):
    """In NVFP4; that MXFP8's quantizer breaks no graph is seen of the large model of the same classes."""
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph)
    (given, *_) = one_step(model, 1, 1.0)
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        transformer, _ = quantized(model, "nvfp4", blocks=2)
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
        transformer(**on_card(given))
    torch._dynamo.reset()
    assert len(graphs) == {"mini-flux": 3, "mini-qwen": 1, "mini-ltx2": 1}[model]
    assert all(any(n.target is SCALED_MM for n in graph.graph.nodes) for graph in graphs)


MIXED, BRANCHED = "transformer_blocks.{}.attn.to_q", "transformer_blocks.{}.ff.net.2"


def mixture(blocks):
    stored = {MIXED.format(i): "fp8" for i in range(blocks)}
    ranks = {BRANCHED.format(i): 32 for i in range(blocks)}
    tuning = Tuning(layers=stored, low_rank=ranks, searched=True)
    return replace(recipes.recipe("flux.1-dev", "post"), id="mixture", tunings={"nvfp4": tuning})


def test_a_mixed_recipe_reaches_the_scaled_matmul_in_each_format():
    with FakeTensorMode():
        transformer, plan = quantized("flux.1-dev", "nvfp4", 1, mixture(1))
        assert recipes.verify(transformer, plan).left == 0
        shapes, recorder = step(transformer, SYSTEMS["flux.1-dev"].inputs(1))
    assert shapes == SYSTEMS["flux.1-dev"].outputs(1)
    branch = [aten.mm.default, aten.mm.default]
    ran = recorder.operators
    assert ran[MIXED.format(0)] == [SCALED_MM] and ran[BRANCHED.format(0)] == [QUANTIZE_NVFP4, SCALED_MM, *branch]
    rest = plan.names - {MIXED.format(0), BRANCHED.format(0)}
    assert all(ran[name] == [QUANTIZE_NVFP4, SCALED_MM] for name in rest)


def test_blocks_of_a_mixed_recipe_compile_without_a_graph_break():
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph)
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        transformer, _ = quantized("flux.1-dev", "nvfp4", 2, mixture(2))
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
        outputs = transformer(**SYSTEMS["flux.1-dev"].inputs(1), return_dict=False)
    torch._dynamo.reset()
    assert [tuple(output.shape) for output in outputs] == SYSTEMS["flux.1-dev"].outputs(1)
    assert len(graphs) == 3


def test_a_weight_only_step_quantizes_nothing_and_compiles_beside_the_usual_one(monkeypatch):
    monkeypatch.setattr(NVFP4Tensor, "dequantize", DEQUANTIZE)
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph)
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        transformer, plan = quantized("flux.1-dev", "nvfp4", 1)
        with WeightOnlySteps(transformer, (1, 0), 2):
            shapes, recorder = step(transformer, SYSTEMS["flux.1-dev"].inputs(1))
        assert shapes == SYSTEMS["flux.1-dev"].outputs(1)
        assert all({QUANTIZE_NVFP4, SCALED_MM}.isdisjoint(recorder.operators[name]) for name in plan.names)
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
        with WeightOnlySteps(transformer, (2, 0), 4) as switch:
            for done in range(4):
                transformer(**SYSTEMS["flux.1-dev"].inputs(1), return_dict=False)
                switch.ended(done + 1)
    torch._dynamo.reset()
    assert len(graphs) == 4, "a double and a single block, each with and without quantized activations, once"
    calls = [Counter(n.target for n in graph.graph.nodes if n.op == "call_function") for graph in graphs]
    assert [bool(graph[SCALED_MM]) for graph in calls] == [False, False, True, True]
