"""Compiling the denoiser's blocks: when, how, and that compiled emulated layers make the same bits."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, QwenImageTransformer2DModel
from torch import nn
from torch._inductor import cudagraph_trees
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.torch_version import TorchVersion

from engine.compiler import compilation, fusion
from engine.compiler.compilation import BLOCK_GRAPHS, DEFAULT, EAGER, GRAPHS, WARM_UP_STEPS, Blocks
from engine.compiler.step_graph import PLAIN_CALLS, StepGraph
from engine.quantization.capability import Machine, quantize_linear_modules, support
from tests.support import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32, dtype=torch.bfloat16)

    def forward(self, x):
        return self.linear(x)


class Denoiser(ModelMixin, ConfigMixin):
    _repeated_blocks = ("Block",)

    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


H100 = Machine(name="NVIDIA H100", kind="cuda", capability=(9, 0))
L40S = Machine(name="NVIDIA L40S", kind="cuda", capability=(8, 9))
NO_TRITON = replace(H100, no_compile="Triton is missing: pip install triton-windows")
HOST = Machine(name="Some CPU", kind="cpu")


@pytest.mark.parametrize(
    ("batch_size", "precision", "machine", "expected"),
    [
        (1, "fp8", H100, GRAPHS),
        (4, "fp8", H100, DEFAULT),
        (1, "mxfp8", H100, DEFAULT),  # emulated
        (1, "bf16", HOST, EAGER),
        (8, "nvfp4", HOST, EAGER),
        (1, "bf16", L40S, GRAPHS),
        (1, "fp8", L40S, DEFAULT),
        (1, "bf16", NO_TRITON, EAGER),
        (4, "fp8", NO_TRITON, EAGER),
    ],
)
def test_the_mode_depends_on_machine_precision_and_shape(batch_size, precision, machine, expected, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    device = CUDA if machine.kind == "cuda" else CPU
    assert compilation.mode(batch_size, support(precision, machine), device) == expected


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return tmp_path


@pytest.fixture
def compiler_settings():
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


def test_compiled_code_is_kept_in_the_cache_folder(own_cache, compiler_settings):
    compilation.configure()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own_cache / "inductor")
    assert torch._dynamo.config.recompile_limit > 8
    assert torch._dynamo.config.accumulated_recompile_limit > torch._dynamo.config.recompile_limit


def test_torchs_own_default_gives_way_and_the_users_choice_does_not(own_cache, compiler_settings, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    compilation.configure()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own_cache / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compilation.configure()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_a_compiled_emulated_layer_makes_the_same_bits(precision, own_cache, compiler_settings):
    """fullgraph=True raises at a graph break, so this also shows that there is none."""
    torch.manual_seed(0)
    denoiser = Denoiser()
    names = {f"blocks.{i}.linear" for i in range(2)}
    quantize_linear_modules(denoiser, names, support(precision, Machine(name="a CPU", kind="cpu")))
    blocks = Blocks(denoiser)
    with torch.inference_mode():
        x = torch.randn(4, 32, dtype=torch.bfloat16)
        eager, before = denoiser(x), compilation.graphs_compiled()
        blocks.use(DEFAULT)
        assert torch.equal(denoiser(x), eager)
        assert compilation.graphs_compiled() - before == 1  # one graph serves both blocks
        blocks.use(EAGER)
        assert torch.equal(denoiser(x), eager)
        blocks.use(DEFAULT)
        assert torch.equal(denoiser(x), eager)
        assert compilation.graphs_compiled() - before == 1


def stub(denoiser, asked):
    def compile_repeated_blocks(**how):
        asked.append(how)
        for block in denoiser.blocks:
            block._compiled_call_impl = lambda x: x + 1

    denoiser.compile_repeated_blocks = compile_repeated_blocks


def test_blocks_are_compiled_whole_and_once_with_the_same_settings_for_every_mode(own_cache, compiler_settings):
    asked, denoiser = [], Denoiser()
    stub(denoiser, asked)
    blocks = Blocks(denoiser, dynamic=None)
    for mode in (DEFAULT, GRAPHS, DEFAULT, EAGER, GRAPHS):
        blocks.use(mode)
    (how,) = asked
    assert (how["fullgraph"], how["dynamic"]) == (True, None)
    assert how["options"].keys() == fusion.options().keys()


@pytest.mark.parametrize("mode", [DEFAULT, BLOCK_GRAPHS])
def test_a_block_whose_attention_a_tensor_leaves_out_is_compiled_whole(mode, own_cache, compiler_settings, monkeypatch):
    """As LTX-2.3's guidance has it: fullgraph=True raises where code branches on a tensor."""
    torch.manual_seed(0)
    denoiser = tiny.KINDS["ltx-2.3"]().transformer.eval()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._inductor, "list_mode_options", lambda _: {})
    whole = partial(type(denoiser).compile_repeated_blocks, denoiser, backend="eager")
    denoiser.compile_repeated_blocks = lambda fullgraph, dynamic, options: whole(fullgraph=fullgraph, dynamic=dynamic)
    given = {
        "hidden_states": torch.randn(1, 4, 16),
        "audio_hidden_states": torch.randn(1, 3, 32),
        "encoder_hidden_states": torch.randn(1, 5, 64),
        "audio_encoder_hidden_states": torch.randn(1, 5, 32),
        "timestep": torch.tensor([500.0]),
        "sigma": torch.tensor([500.0]),
        "num_frames": 1,
        "height": 2,
        "width": 2,
        "fps": 24.0,
        "audio_num_frames": 3,
        "use_cross_timestep": True,
        "return_dict": False,
    }
    blocks = Blocks(denoiser, options={})
    with torch.inference_mode():
        for left_out in ([], [0]):
            given["spatio_temporal_guidance_blocks"] = left_out
            blocks.use(EAGER)
            plain = denoiser(**given)
            blocks.use(mode)
            assert all(map(torch.equal, denoiser(**given), plain))


@pytest.mark.parametrize("options", [{}, {"coordinate_descent_tuning": True}])
def test_the_seeds_method_keeps_its_own_settings(options, own_cache, compiler_settings):
    asked, denoiser = [], Denoiser()
    stub(denoiser, asked)
    Blocks(denoiser, options=options).use(DEFAULT)
    assert asked[0]["options"] == options
    torch.compile(nn.Identity(), options=asked[0]["options"])  # raises for an option that does not exist


@pytest.mark.parametrize("options", [{}, {"coordinate_descent_tuning": True}])
def test_the_posts_graphs_of_blocks_are_torchs_mode_with_further_options_and_copied_outputs(
    options, own_cache, compiler_settings, monkeypatch
):
    asked, denoiser, real = [], Denoiser(), torch.compile
    outputs = (torch.zeros(4, 32), torch.ones(4, 32))  # where a graph leaves them, at every replay

    def compiled(call, **how):
        asked.append((call, how))
        return lambda *_: outputs

    monkeypatch.setattr(torch, "compile", compiled)
    Blocks(denoiser, dynamic=None, options=options).use(BLOCK_GRAPHS)
    assert [call for call, _ in asked] == [block.forward for block in denoiser.blocks]
    mode = torch._inductor.list_mode_options("reduce-overhead")
    assert mode and all(how == {"fullgraph": True, "dynamic": None, "options": options | mode} for _, how in asked)
    real(nn.Identity(), options=asked[0][1]["options"])  # raises for an option that does not exist
    made = denoiser.blocks[0](torch.zeros(4, 32))
    assert type(made) is tuple and all(map(torch.equal, made, outputs))
    assert not {tensor.data_ptr() for tensor in made} & {tensor.data_ptr() for tensor in outputs}


def test_the_default_mode_and_graphs_of_blocks_stand_side_by_side(own_cache, compiler_settings, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda x: x + 10)
    denoiser, x = Denoiser(), torch.zeros(4, 32)
    stub(denoiser, [])
    blocks = Blocks(denoiser)
    for mode, more in ((DEFAULT, 2), (BLOCK_GRAPHS, 20), (GRAPHS, 2), (BLOCK_GRAPHS, 20)):
        blocks.use(mode)
        assert torch.equal(denoiser(x), x + more), mode


def test_one_compile_knows_nothing_of_the_sizes_of_another(compiler_settings):
    """Two that differ only in their settings share what Dynamo remembers of the code's inputs."""
    seen = []

    class Backend:
        def __call__(self, graph, inputs):
            seen.append([value for value in inputs if not isinstance(value, torch.Tensor)])
            return graph

    def double(x):
        return x * 2

    def sizes(forget):
        torch._dynamo.reset()
        for length in (5, 6):
            torch.compile(double, backend=(backend := Backend()))(torch.zeros(length))
            if forget:
                compilation.forget_sizes()
        return [bool(symbols) for symbols in seen[-2:]], backend

    assert sizes(forget=False)[0] == [False, True]
    assert sizes(forget=True)[0] == [False, False]


def test_recordings_of_blocks_are_counted_with_the_plain_calls_before_them(monkeypatch):
    def node(*children):
        return SimpleNamespace(children={"function": list(children)})

    trees = SimpleNamespace(get_roots=lambda: iter([node(node(), node(node())), node()]), warmed_up_functions={1, 2})
    monkeypatch.setattr(cudagraph_trees, "get_manager", lambda index, create_if_none_exists: trees)
    assert compilation.block_graphs_recorded(torch.device("cuda", 0)) == 7
    monkeypatch.setattr(cudagraph_trees, "get_manager", lambda index, create_if_none_exists: None)
    assert compilation.block_graphs_recorded(torch.device("cuda", 0)) == 0


def test_a_step_graph_is_used_in_its_mode_alone(own_cache, compiler_settings):
    denoiser = Denoiser()
    stub(denoiser, [])
    blocks = Blocks(denoiser)
    x = torch.zeros(4, 32)
    for mode in (GRAPHS, DEFAULT):
        blocks.use(mode)
        assert isinstance(denoiser._compiled_call_impl, StepGraph) == (mode == GRAPHS)
        assert torch.equal(denoiser(x), x + 2)  # both blocks, either way: nothing is recorded on a CPU
    blocks.use(EAGER)
    assert denoiser._compiled_call_impl is None
    assert all(block._compiled_call_impl is None for block in denoiser.blocks)


def test_the_warm_up_reaches_the_first_replay():
    assert WARM_UP_STEPS[GRAPHS] > PLAIN_CALLS


def test_a_prompt_of_another_length_compiles_nothing_and_a_size_compiles_once(compiler_settings):
    """Graphs are traced here, but not compiled further, which takes a GPU or minutes."""
    small = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1, "joint_attention_dim": 16}
    denoiser = QwenImageTransformer2DModel(**small, axes_dims_rope=(4, 6, 6)).eval()
    compiled = denoiser.compile_repeated_blocks
    denoiser.compile_repeated_blocks = lambda dynamic, **_: compiled(fullgraph=True, dynamic=dynamic, backend="eager")
    blocks, sizes, before = Blocks(denoiser), set(), compilation.graphs_compiled()
    for words, side in ((9, 4), (6, 4), (40, 4), (7, 6), (16, 6), (3, 4)):
        given = [torch.randn(1, side * side, 64), torch.randn(1, words, 16), None, torch.full((1,), 0.5)]
        made = []
        for mode in (EAGER, DEFAULT):
            blocks.use(mode)
            with torch.inference_mode():
                made.append(denoiser(*given, img_shapes=[[(1, side, side)]], return_dict=False)[0])
        sizes.add(side)
        assert torch.equal(*made)
        assert compilation.graphs_compiled() - before == len(sizes)


def test_only_repeated_blocks_are_touched(own_cache, compiler_settings):
    denoiser = Denoiser()
    stub(denoiser, [])
    Blocks(denoiser).use(DEFAULT)
    assert denoiser._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in denoiser.blocks)
    assert all(block.linear._compiled_call_impl is None for block in denoiser.blocks)
