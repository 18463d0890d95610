"""Rewrites of a block's graph: less work, the same values."""

import pytest
import torch
from torch._inductor import config
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from engine import fusion
from engine.fusion import aten

FP8 = torch.float8_e4m3fn


def traced(function, *given):
    return make_fx(function, tracing_mode="fake")(*given)


def count(graph, *targets):
    return sum(node.target in targets for node in graph.graph.nodes)


def rewritten(graph, *rewrites):
    found = [rewrite(graph.graph) for rewrite in rewrites]
    graph.graph.lint()
    graph.recompile()
    return found


def quantized(x):
    """As torchao does it, row by row."""
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    return (x.float() / scale).clamp(-448, 448).to(FP8), scale


def three_layers(x):
    made = []
    for factor in (1.0, 2.0, 3.0):  # each quantizes its input itself
        codes, scale = quantized(x)
        rows = codes.reshape(-1, x.shape[-1])
        made.append(rows.float() * scale.reshape(-1, 1) * factor)
    return made


def test_one_activation_is_quantized_once_for_all_its_layers():
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    graph = traced(three_layers, x)
    assert count(graph, aten.amax.default) == 3
    before = graph(x)
    rewritten(graph, fusion.Rewrites())
    casts = [n for n in graph.graph.nodes if "val" in n.meta and n.meta["val"].dtype == FP8]
    assert count(graph, aten.amax.default) == 1
    assert {tuple(node.meta["val"].shape) for node in casts} <= {(10, 32), (2, 5, 32)}
    assert all(torch.equal(a, b) for a, b in zip(graph(x), before, strict=True))


def test_what_draws_or_changes_is_never_shared():
    def function(x):
        return torch.rand_like(x) + torch.rand_like(x), torch.empty_like(x), torch.empty_like(x)

    graph = traced(function, torch.ones(3))
    assert rewritten(graph, fusion.share) == [0]


def test_tanh_by_exponentials_is_tanh():
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])])
    graph = traced(lambda x: aten.tanh(x), x)
    assert rewritten(graph, fusion.exponential_tanh) == [1]
    assert count(graph, aten.tanh.default) == 0
    torch.testing.assert_close(graph(x), x.tanh(), rtol=0, atol=2.5e-7)
    assert graph(torch.tensor([float("nan")])).isnan().all()


def test_a_gelu_in_bf16_moves_by_no_more_than_its_rounding():
    def gelu(x):
        wide = x.float()
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        return (0.5 * wide * (1 + aten.tanh(inner))).to(torch.bfloat16)

    x = torch.linspace(-9, 9, 20001).to(torch.bfloat16)
    graph = traced(gelu, x)
    before = graph(x).float()
    rewritten(graph, fusion.exponential_tanh)
    away = (graph(x).float() - before).abs()
    assert (away <= 2.0**-8 * before.abs() + 1e-6).all()


def test_a_half_precision_tanh_is_left_alone():
    x = torch.ones(3, dtype=torch.bfloat16)
    graph = traced(lambda x: aten.tanh(x), x)
    rewritten(graph, fusion.exponential_tanh)
    assert count(graph, aten.tanh.default) == 1


def rotary(x, turns):
    """As diffusers writes it for Qwen-Image."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(3).type_as(x)


def test_a_rotation_needs_no_complex_numbers():
    x = torch.randn(1, 7, 3, 8).to(torch.bfloat16)
    turns = torch.polar(torch.ones(7, 4), torch.randn(7, 4))
    graph = traced(rotary, x, turns)
    before = graph(x, turns)
    assert rewritten(graph, fusion.real_rotations, fusion.cast_before_view) == [1, 1]
    assert count(graph, aten.view_as_complex.default) == 0
    torch.testing.assert_close(graph(x, turns).float(), before.float(), rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda x: x.reshape(-1).to(torch.bfloat16), 1),
        (lambda x: x.to(torch.bfloat16).reshape(-1).float(), 0),
        (lambda x: (lambda flat: flat.to(torch.bfloat16) + flat.sum())(x.reshape(-1)), 0),
    ],
    ids=["smaller", "larger", "the view is used twice"],
)
def test_a_view_is_cast_to_a_smaller_type_before_it_is_taken(function, moved):
    x = torch.randn(4, 6)
    graph = traced(function, x)
    before = graph(x)
    assert rewritten(graph, fusion.cast_before_view) == [moved]
    assert torch.equal(graph(x), before)


class Features:
    reduction_numel = 15360

    def get_reduction_hint(self):
        return None


class Sizes:
    def statically_known_leq(self, a, b):
        return a <= b


@pytest.fixture
def graph(monkeypatch):
    handler = type("Graph", (), {"sizevars": Sizes()})()
    with V.set_graph_handler(handler):
        yield


@pytest.mark.parametrize(
    ("compiled_here", "numel", "persistent"), [(True, 15360, True), (True, 32768, False), (False, 15360, False)]
)
def test_only_graphs_of_the_engine_keep_long_rows_in_registers(graph, monkeypatch, compiled_here, numel, persistent):
    """The seed post's method compiles in the same process and thread, with Inductor's own choices."""
    monkeypatch.setattr(fusion.InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: False))
    monkeypatch.setattr(Features, "reduction_numel", numel)
    with config.patch(**(fusion.options() if compiled_here else {})):
        assert fusion._Choices.should_use_persistent_reduction(Features(), False) == persistent


def test_the_settings_exist_and_key_the_caches(tmp_path, monkeypatch):
    torch.compile(torch.nn.Identity(), options=dict(fusion.options()))  # raises for one that does not exist
    passes = fusion.options()["post_grad_custom_pre_pass"]
    first = passes.uuid()
    assert first == fusion.Rewrites().uuid()
    changed = tmp_path / "fusion.py"
    changed.write_text("# another text")
    monkeypatch.setattr(fusion, "__file__", str(changed))
    assert passes.uuid() != first
