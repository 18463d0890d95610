"""The program that "Copy code" gives: it runs without the project, and chooses the layers that the engine chooses."""

import ast
import copy
import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchao.quantization import quantize_

from engine import catalog, events
from engine.formats import FORMATS, PRECISIONS, QUANTIZED
from engine.outputs.program import chooser, code
from engine.quantization import recipes
from engine.quantization.emulation import EmulatedNVFP4Tensor, EmulationConfig
from engine.quantization.int8 import Int8Config
from engine.quantization.recipe_files import Tuning
from engine.request import CompareRequest
from engine.weights import loading
from tests.support import plain


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_program_makes_the_same_pixels_outside_the_project(worker, ask, tmp_path, precision):
    """On the CPU, in what runs there without the engine, the second picture of a batch among them."""
    request = ask(
        prompt="a \"cat\" on a 'red' background \\ {x}", precisions=[precision], num_inference_steps=2, batch_size=2
    )
    *_, done = worker.submit(request, tmp_path / "engine").events()
    assert isinstance(done, events.Completed)
    outside = tmp_path / "outside"
    (outside / "assets").mkdir(parents=True)
    (outside / "assets" / "models").symlink_to(catalog.ASSETS / "models")
    (outside / "program.py").write_text(worker.code(request, precision, "native"))
    plain.run(outside / "program.py")
    made = next(generation for generation in done.comparison.results if generation.precision == precision)
    for file in made.files:
        name = file.rsplit("/", 1)[-1]
        with Image.open(file) as ours, Image.open(outside / name) as theirs:
            assert np.array_equal(np.asarray(theirs), np.asarray(ours)), name


@functools.cache
def empty(model):
    return loading.empty_transformer(catalog.MODELS[model])


CHOICES = [
    (spec.id, recipe, precision)
    for spec in catalog.MODELS.values()
    for recipe in spec.recipes
    for precision in QUANTIZED
]


@pytest.mark.parametrize(("model", "recipe", "precision"), CHOICES)
def test_the_program_quantizes_the_layers_that_the_engine_quantizes(model, recipe, precision):
    transformer, rules = empty(model), recipes.recipe(catalog.MODELS[model].family, recipe)
    program = {"torch": torch}
    exec(chooser(rules, precision), program)
    chosen = {name for name, module in transformer.named_modules() if program["quantized"](module, name)}
    stored = dict.fromkeys(chosen, precision)
    stored |= {name: kept for name, kept in program.get("OTHERWISE", {}).items() if kept not in (precision, "bf16")}
    plan = recipes.plan(transformer, rules, precision)
    assert stored == {layer.name: layer.precision for layer in plan.layers if layer.quantized}


def test_the_program_leaves_activations_in_bf16_in_the_weight_only_steps(monkeypatch):
    """Its functions are taken out and run upon a layer whose weight is switched as torchao's is."""
    steps = Tuning(weight_only_steps=(2, 1))
    rules = replace(recipes.recipe("mini-flux", "post"), tunings={"nvfp4": steps})
    monkeypatch.setattr(recipes, "recipe", lambda *_: rules)
    program = code(CompareRequest.create("a cat", precisions=["nvfp4"], num_inference_steps=6), "nvfp4", "native")
    assert "callback_on_step_end=ended" in program
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    quantize_(linear, EmulationConfig(EmulatedNVFP4Tensor))
    scope = {"torch": torch, "NVFP4Tensor": EmulatedNVFP4Tensor, "pipe": SimpleNamespace(transformer=linear)}
    exec(program[program.index("linears = [") : program.index("seed = ")], scope)
    plain = []
    for index in range(6):
        plain.append(linear.weight.act_quant_kwargs is None)
        scope["ended"](None, index, None, {})
    assert plain == [True, True, False, False, False, True]


@pytest.mark.parametrize("model", catalog.MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_program_is_python_that_names_its_request(model, precision):
    asked = CompareRequest.create("a cat", model=model, precisions=[precision], seed=11)
    program = code(asked, precision, "native")
    called = next(
        node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"
    )
    given = {argument.arg: ast.unparse(argument.value) for argument in called.keywords}
    spec = catalog.MODELS[model]
    assert not called.args and given["prompt"] == "'a cat'"
    assert given[spec.guidance_argument] == repr(asked.guidance_scale)
    assert given["num_inference_steps"] == str(asked.num_inference_steps)
    assert "seed = 11\n" in program
    assert (f'model, revision="{spec.revision}"' in program) == (not spec.bundled)
    assert ("in pipe.transformer.named_modules()" in program) == (precision == "int8")
    assert ("quantize_(pipe.transformer" in program) == (precision not in ("bf16", "int8"))
    assert max(map(len, program.splitlines())) <= 120


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_program_of_an_emulated_precision_says_what_it_needs(precision):
    asked = CompareRequest.create("a cat", precisions=[precision])
    assert FORMATS[precision].hardware in code(asked, precision, "emulated")
    assert FORMATS[precision].hardware not in code(asked, precision, "native")


@pytest.mark.parametrize("precision", [name for name in QUANTIZED if name != "int8"])
def test_torchao_takes_the_configuration_of_the_program(precision):
    program = code(CompareRequest.create("a cat", precisions=[precision]), precision, "native")
    imports = "\n".join(line for line in program.splitlines() if line.startswith(("import torch", "from torchao")))
    config = next(
        node
        for node in ast.parse(program).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "config"
    )
    scope = {}
    exec(f"{imports}\n{ast.unparse(config)}", scope)
    assert type(scope["config"]).__module__.startswith("torchao")


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_the_programs_int8_layers_make_the_engines_bits(rows):
    torch.manual_seed(0)
    program = code(CompareRequest.create("a cat", precisions=["int8"]), "int8", "native")
    assert "torchao" not in program
    scope = {"torch": torch}
    exec(program[program.index("def rows(") : program.index("for name, module in")], scope)
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight[3] = 0
    x = torch.randn(2, rows, 64, dtype=torch.bfloat16)
    engines = torch.nn.Sequential(copy.deepcopy(linear))
    quantize_(engines, Int8Config())
    scope["quantize_int8"](linear)
    assert torch.equal(linear(x), engines(x))


def test_a_recipe_that_mixes_formats_has_each_in_its_program(monkeypatch):
    tuning = Tuning(layers={"proj_out": "int8", "x_embedder": "bf16"})
    rules = replace(recipes.recipe("mini-flux", "seed"), tunings={"nvfp4": tuning})
    monkeypatch.setattr(recipes, "recipe", lambda *_: rules)
    program = code(CompareRequest.create("a cat", precisions=["nvfp4"]), "nvfp4", "native")
    ast.parse(program)
    assert "quantize_(pipe.transformer, config, filter_fn=quantized)" in program
    assert "    if OTHERWISE.get(name) == 'int8':\n        quantize_int8(module)" in program
