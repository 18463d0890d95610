"""Each model's blocks compiled as for a B200: graphs without a break, and what Inductor makes of them."""

import re
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.compiler import text_kv
from engine.compiler.compilation import GRAPHS, Blocks
from tests.support.blackwell import (
    NATIVE,
    QUANTIZE_NVFP4,
    SCALED_MM,
    SYSTEMS,
    inductor_kernels,
    quantized,
    shapes,
)

pytestmark = [pytest.mark.blackwell, pytest.mark.usefixtures("on_blackwell")]


GRAPHS_OF = {
    "flux.1-dev": 3,
    "qwen-image": 1,
    "ltx-2": 1,
    "flux.2-klein-4b": 2,
    "z-image-turbo": 3,
    "wan-2.2-5b": 1,
}
"""How many of two blocks of each class. FLUX.1's first single block gets one of its own, as its input is laid out
differently from the next ones'; Z-Image has blocks of one class for the picture, for the text, and for both."""
COMPILED = [("flux.1-dev", "mxfp8"), *((model, "nvfp4") for model in GRAPHS_OF)]
"""MXFP8's quantizer is the same operations in every model, and takes long to trace."""


@dataclass(frozen=True)
class Compiled:
    model: str
    precision: str
    graphs: list[torch.fx.GraphModule]
    per_block: set[int]
    """Planned layers in one block of each class."""


@pytest.fixture(scope="module", params=COMPILED, ids="-".join)
def compiled(on_blackwell, request):
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
    assert shapes(outputs) == SYSTEMS[model].outputs(1)
    blocks = [f"{n}." for n, m in transformer.named_modules() if type(m).__name__ in transformer._repeated_blocks]
    return Compiled(model, precision, graphs, {sum(name.startswith(block) for name in plan.names) for block in blocks})


def test_repeated_blocks_compile_without_a_graph_break(compiled):
    """fullgraph=True raises at a break; the number of graphs tells that the blocks of a class share theirs."""
    calls = [Counter(n.target for n in graph.graph.nodes if n.op == "call_function") for graph in compiled.graphs]
    assert {graph[SCALED_MM] for graph in calls} == compiled.per_block
    assert len(calls) == GRAPHS_OF[compiled.model]
    for graph in calls:
        assert graph[QUANTIZE_NVFP4] == (graph[SCALED_MM] if compiled.precision == "nvfp4" else 0)


def test_a_recorded_clips_keys_and_values_of_the_text_reach_the_scaled_matmul_before_its_steps(monkeypatch):
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
        transformer, plan = quantized("ltx-2", "nvfp4", 2)
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
    assert all(graph[QUANTIZE_NVFP4] == graph[SCALED_MM] for graph in calls)


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
