"""The native path of a Blackwell, rehearsed without one for every model: shapes, operators, graphs, compiled kernels.

Values, speed and memory are not rehearsed; tests/README.md says which questions only a B200 can answer.
"""

# ruff: noqa: E402 (what is not for every system is looked for first)
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import pytest

triton = pytest.importorskip("triton", reason="Triton, which compiles the NVFP4 quantizer, is for Linux only")
fp4_quantize = pytest.importorskip("mslk.quantize.triton.fp4_quantize", reason="mslk-cuda is for Linux on x86-64 only")

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import PTXASError

from engine import catalog
from engine.benchmark import profile
from engine.compiler import text_kv
from engine.compiler.compilation import GRAPHS, Blocks
from engine.quantization import recipes
from engine.quantization.capability import quantize_linear_modules, support
from engine.quantization.recipe_files import Tuning
from engine.quantization.remedies import WeightOnlySteps
from engine.results import LayerCounts
from engine.weights import loading
from tests.support.blackwell import (
    B200,
    DEQUANTIZE,
    MINIATURES,
    PLAIN_MM,
    QUANTIZE_NVFP4,
    SCALED_MM,
    SYSTEMS,
    Everything,
    Recorder,
    aten,
    bf16,
    blackwell,
    inductor_kernels,
    on_card,
    one_step,
    quantized,
    step,
)

pytestmark = pytest.mark.blackwell

NATIVE = ("mxfp8", "nvfp4")
BATCHES = (1, 4, 8)
PAIRS = list(product(SYSTEMS, NATIVE))


@pytest.fixture(scope="module", autouse=True)
def on_blackwell():
    with blackwell():
        yield


@dataclass(frozen=True)
class Rehearsal:
    model: str
    precision: str
    plan: recipes.Plan
    held: LayerCounts
    shapes: list[tuple[int, ...]]
    recorder: Recorder


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def rehearsal(request):
    """One step of a whole transformer at batch 1."""
    model, precision = request.param
    with FakeTensorMode():
        transformer, plan = quantized(model, precision)
        held = recipes.verify(transformer, plan)
        return Rehearsal(model, precision, plan, held, *step(transformer, SYSTEMS[model].inputs(1)))


@pytest.fixture(scope="module")
def products():
    """Every distinct matrix product of every model and batch size, from one block of each class."""
    found = {}
    for model, precision in PAIRS:
        with FakeTensorMode():
            transformer, _ = quantized(model, precision, blocks=1)
            for batch in BATCHES:
                shapes, recorder = step(transformer, SYSTEMS[model].inputs(batch))
                assert shapes == SYSTEMS[model].outputs(batch)
                found[model, precision, batch] = set(recorder.products.values())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The whole transformer


@pytest.mark.parametrize("precision", NATIVE)
def test_a_b200_runs_the_block_scaled_precisions_natively(precision):
    supported = support(precision, B200)
    assert supported.execution == "native"
    assert supported.fused_quantizer == (precision == "nvfp4")


def test_every_planned_layer_of_the_whole_model_reaches_the_scaled_matmul_once(rehearsal):
    system, recorder = SYSTEMS[rehearsal.model], rehearsal.recorder
    skipped = system.linears - system.quantized
    assert rehearsal.held == LayerCounts(quantized=system.quantized, skipped=skipped, left=0)
    native = [QUANTIZE_NVFP4, SCALED_MM] if rehearsal.precision == "nvfp4" else [SCALED_MM]
    assert len(recorder.operators) == system.linears
    for name, operators in recorder.operators.items():
        assert operators == (native if name in rehearsal.plan.names else [aten.addmm.default]), name
    assert set(recorder.outside) == {aten.bmm.default}  # attention, which stays bf16


def test_the_whole_model_gives_outputs_of_the_right_shape(rehearsal):
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


def test_one_block_of_each_class_stands_for_all(rehearsal, products):
    assert set(rehearsal.recorder.products.values()) == products[rehearsal.model, rehearsal.precision, 1]


@pytest.mark.parametrize("name", NATIVE)
def test_the_floor_times_the_product_alone(name):
    with FakeTensorMode():
        layer = nn.Sequential(nn.Linear(3072, 3072, dtype=torch.bfloat16, device="cuda:0")).requires_grad_(False)
        quantize_linear_modules(layer, {"0"}, support(name, B200))
        alone = profile._alone(layer[0], 512, torch.device("cuda:0"))
        with Everything() as ran:
            alone()
    assert ran.operators == [SCALED_MM]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes at batch 1, 4 and 8


@pytest.mark.parametrize(("model", "precision", "batch"), list(product(SYSTEMS, NATIVE, BATCHES)))
def test_every_product_is_one_that_the_kernels_take(products, model, precision, batch):
    """Rules of PyTorch's `_scaled_mm_out_cuda`, torchao's `to_mx` and `to_blocked`, mslk's `triton_quantize_nvfp4`.

    None limits the number of rows: one row of modulation is as good as 98,304 of a clip.
    """
    assert products[model, precision, batch]
    for p in products[model, precision, batch]:
        assert is_taken(p)


def is_taken(p):
    """Whether the kernel takes this product; FP8's scales are one a row."""
    stored = p.k // 2 if p.operands == torch.float4_e2m1fn_x2 else p.k  # two FP4 numbers a byte
    if stored % 16 or p.n % 16:
        return False
    if p.scales == torch.float32:
        return (p.scales_a, p.scales_b) == (p.m, p.n)
    block = 16 if p.operands == torch.float4_e2m1fn_x2 else 32
    # Scales come in tiles of 128 rows by 4 blocks, the rest of the last ones zero.
    per_128_rows = -(-p.k // (4 * block)) * 512
    scales = (-(-p.m // 128) * per_128_rows, -(-p.n // 128) * per_128_rows)
    return p.k % block == 0 and (p.scales_a, p.scales_b) == scales


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


@pytest.mark.parametrize(("model", "precision"), [*PAIRS, *product(MINIATURES, NATIVE)])
def test_no_recipe_plans_a_layer_that_a_b200_would_refuse(model, precision):
    empty = loading.empty_transformer(catalog.model(model))
    for recipe_id in catalog.model(model).recipes:
        for layer in recipes.plan(empty, recipes.recipe(model, recipe_id), precision).layers:
            assert not layer.quantized or (layer.in_features % 32 == 0 and layer.out_features % 16 == 0), layer


# ---------------------------------------------------------------------------------------------------------------------
# The bundled miniatures

SMALL = [(m, p, r) for m, p in product(MINIATURES, NATIVE) for r in catalog.model(m).recipes]


def small(model, recipe_id):
    """A recipe without calibrated weights, which are for real ones alone: others of the same format stand for them."""
    recipe = recipes.recipe(model, recipe_id)
    tunings = {precision: replace(tuning, calibrated=()) for precision, tuning in recipe.tunings.items()}
    return replace(recipe, tunings=tunings)


@pytest.mark.parametrize(("model", "precision", "recipe_id"), SMALL)
def test_every_recipe_of_a_miniature_runs_natively(model, precision, recipe_id):
    """Two pictures, and three with guidance, so that there is an odd number of rows where one is a picture's."""
    calls = [given for batch, guidance in ((2, 1.0), (3, 3.0)) for given in one_step(model, batch, guidance)]
    with FakeTensorMode():
        transformer, plan = quantized(model, precision, recipe=small(model, recipe_id))
        stored = {layer.name: layer.precision for layer in plan.layers}
        assert recipes.verify(transformer, plan).quantized > len(stored) / 3
        for given in calls:
            _, recorder = step(transformer, on_card(given))
            for name, operators in recorder.operators.items():
                expected = {
                    "bf16": PLAIN_MM,
                    "fp8": {SCALED_MM},
                    "mxfp8": {SCALED_MM},
                    "nvfp4": {SCALED_MM, QUANTIZE_NVFP4},
                }[stored[name]]
                assert operators and set(operators) <= expected, name
            assert all(map(is_taken, recorder.products.values()))
            assert recorder.products.keys() == plan.names


@pytest.mark.parametrize(("model", "precision"), list(product(MINIATURES, NATIVE)))
def test_a_miniatures_layers_that_a_b200_would_refuse_are_left_with_the_reason(model, precision):
    """Of a width that no format takes; of those the bundled ones have none."""
    plan = recipes.plan(loading.empty_transformer(catalog.model(model)), small(model, "full"), precision)
    assert plan.counts.left == 0
    odd = recipes.plan(nn.ModuleDict({"odd": nn.Linear(48, 20)}), small(model, "full"), precision)
    assert odd.counts.left == 1 and "needs multiples of 32" in odd.layers[0].reason


@pytest.mark.parametrize(("model", "precision"), list(product(MINIATURES, NATIVE)))
def test_a_miniatures_blocks_compile_without_a_graph_break(model, precision):
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph)
    (given, *_) = one_step(model, 1, 1.0)
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        transformer, _ = quantized(model, precision, blocks=2)
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
        transformer(**on_card(given))
    torch._dynamo.reset()
    assert len(graphs) == {"mini-flux": 3, "mini-qwen": 1, "mini-ltx2": 1}[model]
    assert all(any(n.target is SCALED_MM for n in graph.graph.nodes) for graph in graphs)


# ---------------------------------------------------------------------------------------------------------------------
# Regional compilation


@dataclass(frozen=True)
class Compiled:
    model: str
    precision: str
    graphs: list[torch.fx.GraphModule]
    per_block: set[int]
    """Planned layers in one block of each class."""


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def compiled(request):
    """The post's regional compile, as far as the graphs that Inductor would be given, of two blocks of each class."""
    model, precision = request.param
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table)
    torch._dynamo.reset()
    counters.clear()
    with FakeTensorMode(), torch.no_grad():
        transformer, plan = quantized(model, precision, blocks=2)
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
        outputs = transformer(**SYSTEMS[model].inputs(1), return_dict=False)
    torch._dynamo.reset()
    assert [tuple(output.shape) for output in outputs] == SYSTEMS[model].outputs(1)
    blocks = [f"{n}." for n, m in transformer.named_modules() if type(m).__name__ in transformer._repeated_blocks]
    return Compiled(model, precision, graphs, {sum(name.startswith(block) for name in plan.names) for block in blocks})


def test_repeated_blocks_compile_without_a_graph_break(compiled):
    """fullgraph=True raises at a break; the number of graphs tells that the blocks of a class share theirs.

    FLUX's first single block gets one of its own: its input is laid out differently from the next ones'.
    """
    calls = [Counter(n.target for n in graph.graph.nodes if n.op == "call_function") for graph in compiled.graphs]
    assert {graph[SCALED_MM] for graph in calls} == compiled.per_block
    assert len(calls) == {"flux.1-dev": 3, "qwen-image": 1, "ltx-2": 1}[compiled.model]
    for graph in calls:
        assert graph[QUANTIZE_NVFP4] == (graph[SCALED_MM] if compiled.precision == "nvfp4" else 0)


@pytest.mark.parametrize("precision", NATIVE)
def test_a_recorded_clips_keys_and_values_of_the_text_reach_the_scaled_matmul_before_its_steps(precision, monkeypatch):
    """The step of one clip as the engine runs it: two layers of each attention to a text are not in the blocks."""
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph)

    def compiled(self):
        how = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._denoiser.compile_repeated_blocks(**how)
        self._key_value = torch.compile(text_kv.key_value, **how)
        return [block._compiled_call_impl for block in self._blocks]

    monkeypatch.setattr(Blocks, "_compiled", compiled)
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        transformer, plan = quantized("ltx-2", precision, 2)
        Blocks(transformer).use(GRAPHS)
        inputs = SYSTEMS["ltx-2"].inputs(1)
        for _ in range(2):
            outputs = transformer(**inputs, return_dict=False)
    torch._dynamo.reset()
    assert [tuple(output.shape) for output in outputs] == SYSTEMS["ltx-2"].outputs(1)
    calls = [Counter(n.target for n in graph.graph.nodes if n.op == "call_function") for graph in graphs]
    block = sum(name.startswith("transformer_blocks.0.") for name in plan.names)
    assert [graph[SCALED_MM] for graph in calls] == [2, 2, block - 4], "of the clip's text, of its sound's, of a block"
    # Activations are quantized anew for each layer here: what shares them comes after, in engine/compiler/fusion.py.
    quantizers = [graph[SCALED_MM] if precision == "nvfp4" else 0 for graph in calls]
    assert [graph[QUANTIZE_NVFP4] for graph in calls] == quantizers


KERNELS = {"mxfp8": (31, 14), "nvfp4": (21, 12)}
"""What Inductor makes of a double and of a single block; tests/README.md has these numbers."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="Inductor would compile for the GPU that is here")
@pytest.mark.parametrize("compiled", [("flux.1-dev", p) for p in NATIVE], ids="-".join, indirect=True)
def test_inductor_makes_kernels_for_sm_100_of_the_graphs(compiled, tmp_path):
    """MXFP8's quantizer is one of them: torchao writes it in PyTorch operations and leaves it to Inductor."""
    for number, graph in enumerate(compiled.graphs[:2]):  # a double and a single block
        ptx = inductor_kernels(graph, tmp_path / str(number))
        assert len(ptx) == KERNELS[compiled.precision][number]
        assert all(".target sm_100a" in text for text in ptx.values())
        to_fp8 = any("cvt.rn.satfinite.e4m3x2" in text for text in ptx.values())
        assert to_fp8 == (compiled.precision == "mxfp8")


def scaled(x):
    """As torchao quantizes to FP8 by rows."""
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.mark.skipif(torch.cuda.is_available(), reason="Inductor would compile for the GPU that is here")
@pytest.mark.parametrize(
    ("function", "short", "long"),
    [
        (lambda x, row: scaled(x), {128}, {64}),
        (lambda x, row: scaled(x * row), {128}, {256}),
        (lambda x, row: scaled(torch.cat([x[:, :100], x[:, 100:] * 2], 1)), {128}, {256}),
        (lambda x, row: scaled(x * torch.arange(x.shape[1], device=x.device)[:, None]), {128}, {256}),
        (lambda x, row: x.float().sum(1), {256}, {256}),
        (lambda x, row: scaled(x.unflatten(-1, (4, -1)).transpose(1, 2).flatten(0, 1)), {64, 128}, {32, 128}),
    ],
    ids=["rows", "a value a row", "two parts", "a row's number", "columns", "heads of their own"],
)
def test_kernels_of_rows_get_blocks_that_fit_and_others_are_left_to_inductor(function, short, long, tmp_path):
    """Told by the threads of a block. Inductor cannot write each kernel with blocks of one row: all shall compile."""
    for features, threads in ((64, short), (3072, long)):
        graphs = []
        backend = aot_autograd(
            fw_compiler=lambda graph, _, found=graphs: found.append(graph) or graph,
            decompositions=select_decomp_table,
        )
        torch._dynamo.reset()
        with FakeTensorMode(), torch.no_grad():
            x = torch.empty(2, 1536, features, device="cuda", dtype=torch.bfloat16)
            torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(x, x[..., :1].contiguous())
        torch._dynamo.reset()
        ptx = inductor_kernels(graphs[0], tmp_path / str(features)).values()
        assert {int(re.search(r"\.reqntid (\d+)", text)[1]) for text in ptx} == threads


# ---------------------------------------------------------------------------------------------------------------------
# A recipe file's mixture: another precision, searched block scales, a low-rank branch

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


# ---------------------------------------------------------------------------------------------------------------------
# mslk's quantizer, compiled for GPUs that are not here


@pytest.fixture(scope="module")
def launches(products):
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
        for (_, precision, _), found in products.items():
            for p in found if precision == "nvfp4" else ():
                activations = torch.empty(p.m, p.k, dtype=torch.bfloat16, device="meta")
                fp4_quantize.triton_quantize_nvfp4(activations, torch.empty((), device="meta"))
    return [dict(constants) for constants in sorted(seen)]


def compile_quantizer(constants, capability):
    types = {"x_ptr": "*bf16", "global_scale_ptr": "*fp32", "q_ptr": "*u8", "s_ptr": "*fp8e4nv"}
    kernel = fp4_quantize.triton_quantize_nvfp4_kernel
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_mslk_needs_variants_for_few_rows_and_for_rows_that_do_not_fill_a_tile(launches):
    assert {c["M_PER_BLOCK"] for c in launches} == {1, 2, 4, 8, 16, 128}
    assert {c["USE_MASK"] for c in launches} == {False, True}
    assert not any(c["USE_INT64_INDEXING"] for c in launches)


@pytest.mark.parametrize("capability", [100, 103, 120])
def test_mslks_quantizer_compiles_for_blackwells(launches, capability, no_cache):
    for constants in launches:
        asm = compile_quantizer(constants, capability).asm
        assert asm["cubin"]
        assert re.search(rf"\.target sm_{capability}a\b", asm["ptx"])
        assert "cvt.rn.satfinite.e2m1x2" in asm["ptx"]  # the instruction that makes two FP4 numbers


def test_ptxas_refuses_mslks_quantizer_on_hopper(launches, no_cache, capfd):
    with pytest.raises(PTXASError, match=r"e2m1x2.*not supported"):
        compile_quantizer(launches[0], 90)
