"""Rewrites of a block's graph: less work, the same values."""

import logging
from random import Random
from types import MappingProxyType

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config, inductor_prims
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from engine import catalog
from engine.compiler import compilation, fusion, nodes, rotary
from engine.compiler.nodes import aten, prims
from engine.quantization.emulation import fp8_rows
from engine.request import CompareRequest
from engine.runtime.pipeline import call, finished
from engine.weights import loading
from tests.support import tiny
from tests.support.graphs import count, rewritten, traced

FP8 = torch.float8_e4m3fn


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
    for a, b in zip(graph(x), before, strict=True):
        # A product with the reciprocal and a quotient may fall on two sides of a tie: one step of e4m3, and seldom.
        torch.testing.assert_close(a, b, rtol=0.13, atol=0)
        assert (a != b).float().mean() < 0.02


def test_a_scale_is_computed_of_the_rows_that_the_layers_take():
    """Else Inductor computes what is quantized twice: once by rows, and once by picture and row."""
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    graph = traced(three_layers, x)
    rewritten(graph, fusion.Rewrites())
    (amax,) = (n for n in graph.graph.nodes if n.target is aten.amax.default)
    assert amax.meta["val"].shape == (10, 1)


def modulated(x, table, vector):
    scale, shift, _ = (table[None] + vector.reshape(len(x), 3, -1)).unbind(1)
    return x * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize(("rows", "written"), [(fusion.ROWS, 1), (fusion.ROWS - 1, 0)])
def test_a_sum_of_vectors_for_many_rows_is_written_once(rows, written):
    given = torch.randn(2, rows, 8), torch.randn(3, 8), torch.randn(2, 24)
    graph = traced(modulated, *given)
    before = graph(*given)
    assert rewritten(graph, fusion.sum_vectors) == [written]
    assert count(graph, inductor_prims.force_stride_order) == written
    assert torch.equal(graph(*given), before)


def test_whether_a_sum_is_for_many_rows_is_found_at_once():
    """However many ways lead from it to what it is used for."""

    def function(a, b):
        a = a + b
        for _ in range(60):
            a = a * 2 - a
        return a

    assert rewritten(traced(function, torch.ones(8), torch.ones(8)), fusion.sum_vectors) == [0]


def test_a_symbolic_length_is_not_bound_by_looking_at_it():
    guards = []

    def look(graph, _):
        values = (node.meta["val"] for node in graph.graph.nodes)
        env = next(value for value in values if isinstance(value, torch.Tensor)).fake_mode.shape_env
        before = len(env.guards)
        assert rewritten(graph, fusion.sum_vectors) == [0]
        guards.append(len(env.guards) - before)
        return graph

    x = torch.randn(1500, 8)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x, a, b: x * (a + b), backend=aot_autograd(fw_compiler=look))(x, *torch.randn(2, 8))
    torch._dynamo.reset()
    assert guards == [0]


@pytest.mark.parametrize(
    ("length", "loads", "rows", "warps"),
    [
        (64, 6, 8, 4),  # FLUX.1-dev's queries and keys, in words
        (128, 6, 4, 4),
        (2048, 1, 1, 2),
        (3072, 5, 1, 2),
        (4096, 8, 1, 4),
        (4096, 10, 1, 8),  # more than fits a thread's registers of four warps
        (12288, 1, 1, 8),
        (16384, 1, 1, 8),
        (16384, 10, 1, 16),  # as many as there may be
    ],
)
def test_a_block_fits_its_rows(length, loads, rows, warps):
    assert fusion.tile(length, loads) == {"XBLOCK": rows, "num_warps": warps, "num_stages": 1}


def test_what_draws_or_changes_is_never_shared():
    def function(x):
        return torch.rand_like(x) + torch.rand_like(x), torch.empty_like(x), torch.empty_like(x)

    graph = traced(function, torch.ones(3))
    assert rewritten(graph, fusion.share) == [0]


def gelu(x):
    """As PyTorch takes `nn.GELU(approximate="tanh")` apart."""
    wide = x.float()
    inner = 0.7978845608028654 * (wide + 0.044715 * (wide * wide * wide))
    return wide * 0.5 * (aten.tanh(inner) + 1)


def test_gelu_is_a_logistic():
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.tensor([100.0, -100.0, 3e38, -3e38, 0.0])])
    graph = traced(gelu, x)
    assert rewritten(graph, fusion.logistic_gelu) == [1]
    assert count(graph, aten.tanh.default) == 0
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(graph(x).double(), exact, rtol=2e-6, atol=2e-7)
    assert graph(torch.tensor([float("nan")])).isnan().all()


def test_the_gelu_that_pytorch_hands_over_is_found():
    """In the very form in which Inductor gets it."""
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    graph = traced(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), x)
    before = graph(x)
    assert rewritten(graph, fusion.logistic_gelu) == [1]
    torch.testing.assert_close(graph(x), before, rtol=2.0**-7, atol=1e-6)


def projected(x, weight, bias):
    return torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias), approximate="tanh")


def test_gelu_behind_a_layer_is_the_products_epilogue():
    torch.manual_seed(0)
    given = [torch.randn(shape).to(torch.bfloat16) for shape in ((2, 5, 16), (24, 16), (24,))]
    graph = traced(projected, *given)
    before = graph(*given)
    assert rewritten(graph, fusion.gelu_in_product, fusion.logistic_gelu) == [1, 0]
    assert count(graph, aten.addmm.default, prims.convert_element_type.default) == 0
    torch.testing.assert_close(graph(*given), before, rtol=2.0**-6, atol=1e-3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight, bias: (
            (y := torch.nn.functional.linear(x, weight, bias)) * torch.nn.functional.gelu(y, approximate="tanh")
        ),
        lambda x, weight, bias: torch.nn.functional.gelu(x @ weight.t(), approximate="tanh"),
        lambda x, weight, bias: projected(x.float(), weight.float(), bias.float()).to(x.dtype),
    ],
    ids=["the product is used as well", "no bias", "not rounded before"],
)
def test_other_gelus_are_computed_by_themselves(function):
    given = [torch.randn(shape).to(torch.bfloat16) for shape in ((2, 5, 16), (24, 16), (24,))]
    assert rewritten(traced(function, *given), fusion.gelu_in_product, fusion.logistic_gelu) == [0, 1]


def test_another_tanh_is_left_alone():
    x = torch.ones(3)
    graph = traced(lambda x: (aten.tanh(x * 0.5) + 1) * x, x)
    assert rewritten(graph, fusion.logistic_gelu) == [0]


def quantized_like_torchao(x):
    scale = (x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12).to(torch.bfloat16) / 448).float()
    return aten.clamp_max(aten.clamp_min(x.float() / scale, -448.0), 448.0).to(FP8).view(torch.uint8)


def test_quantizing_by_multiplication_is_quantizing():
    torch.manual_seed(0)
    x = torch.randn(64, 3072).to(torch.bfloat16)
    x[0] = 0
    graph = traced(quantized_like_torchao, x)
    before = graph(x)
    assert rewritten(graph, fusion.multiply_and_saturate) == [1]
    assert count(graph, aten.div.Tensor) == 1 and count(graph, aten.clamp_max.default) == 0
    after = graph(x)
    assert (after != before).float().mean() < 1e-4  # ties that the last bit of a quotient decides
    codes = after.view(FP8).float()
    assert codes.isfinite().all() and codes.abs().max() == 448


def turned(x):
    """As diffusers writes it for FLUX."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-b, a], dim=-1).flatten(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_turned_pairs_are_turned_pairs(dtype):
    x = torch.randn(1, 5, 3, 8).to(dtype)
    graph = traced(turned, x)
    before = graph(x)
    assert rewritten(graph, rotary.turned_pairs) == [1]
    assert count(graph, aten.cat.default, aten.stack.default) == 0
    assert torch.equal(graph(x), before)


def test_other_stacks_are_left_alone():
    def function(x):
        a, b = x.unbind(-1)
        return torch.stack([-a, b], dim=-1), torch.stack([b, a], dim=-1)

    graph = traced(function, torch.randn(3, 2))
    assert rewritten(graph, rotary.turned_pairs) == [0]


def split_rotary(x, cosine, sine):
    """As diffusers writes it for LTX-2, from rows to rows."""
    batch, heads, length, half = cosine.shape
    parts = x.reshape(batch, length, heads, -1).swapaxes(1, 2).reshape(batch, heads, length, 2, half).float()
    cosine, sine = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    made = parts * cosine
    made[..., :1, :].addcmul_(-sine, parts[..., 1:, :])
    made[..., 1:, :].addcmul_(sine, parts[..., :1, :])
    rows = made.reshape(batch, heads, length, 2 * half).swapaxes(1, 2).reshape(batch, length, -1).to(x.dtype)
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_halves_are_turned_without_being_written_into(dtype):
    x = torch.randn(2, 5, 24).to(dtype)
    cosine, sine = torch.randn(2, 2, 3, 5, 4)
    graph = traced(torch.func.functionalize(split_rotary), x, cosine, sine)
    assert count(graph, aten.slice_scatter.default) == 2
    before = graph(x, cosine, sine)
    assert rewritten(graph, rotary.turned_halves) == [1]
    assert count(graph, aten.slice_scatter.default, aten.slice.Tensor) == 0
    assert torch.equal(graph(x, cosine, sine), before)


@pytest.mark.parametrize(
    "other",
    [
        lambda made, x, s: (made[:, :1].addcmul_(s, x[:, 1:]), made[:, 1:].addcmul_(s, x[:, :1])),
        lambda made, x, s: (made[:, :1].addcmul_(-s, x[:, :1]), made[:, 1:].addcmul_(s, x[:, 1:])),
        lambda made, x, s: (made[:, :1].addcmul_(-s, x[:, 1:]), made[:, :1].addcmul_(s, x[:, :1])),
        lambda made, x, s: (made[:, :1].addcmul_(-s, x[:, 1:]), made[:, 1:].addcmul_(s.cos(), x[:, :1])),
        lambda made, x, s: (made[:, :1].addcmul_(-s, x[:, 1:]), made[:, 1:].mul_(x[:, :1])),
        lambda made, x, s: made[1:].addcmul_(s[1:], x[1:]),
    ],
    ids=["no minus", "not the other half", "one half twice", "two factors", "a product", "rows"],
)
def test_what_else_is_written_into_halves_is_left_alone(other):
    def function(x, s):
        made = x * 3
        other(made, x, s)
        return made

    given = torch.randn(2, 2, 4), torch.randn(2, 1, 4)
    assert rewritten(traced(torch.func.functionalize(function), *given), rotary.turned_halves) == [0]


def test_heads_that_are_put_together_and_taken_apart_are_computed_by_rows():
    given = torch.randn(2, 5, 24).to(torch.bfloat16), *torch.randn(2, 2, 3, 5, 4)
    graph = traced(torch.func.functionalize(split_rotary), *given)
    before = graph(*given)
    assert rewritten(graph, rotary.turned_halves, fusion.cast_before_view, fusion.write_rows) == [1, 1, 1]
    rows = next(n for n in graph.graph.nodes if n.target is inductor_prims.force_stride_order)
    assert rows.meta["val"].shape == (2, 5, 24)
    parts = rows.args[0].args[0]
    assert parts.meta["val"].dtype == torch.bfloat16 and parts.args[0].target is aten.permute.default
    assert parts.meta["val"].shape == (2, 5, 3, 2, 4), "not put together to heads before"
    assert torch.equal(graph(*given), before)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(2, 3, 5, 8).transpose(1, 2).reshape(2, 5, 24),
        lambda x: x.reshape(2, 3, 5, 8).transpose(1, 3).reshape(2, 8, 15).reshape(2, 8, 5, 3),
        lambda x: x.transpose(1, 2).reshape(2, 5, 24).reshape(2, 5, 3, 8),
    ],
    ids=["rows are what is wanted", "halves do not stay together", "nothing was put together"],
)
def test_other_rows_are_left_alone(function):
    graph = traced(function, torch.randn(2, 3, 5, 2, 4))
    assert rewritten(graph, fusion.write_rows) == [0]


def as_complex(x, turns):
    """As diffusers writes it for Qwen-Image."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(3).type_as(x)


def test_a_rotation_needs_no_complex_numbers():
    x = torch.randn(1, 7, 3, 8).to(torch.bfloat16)
    turns = torch.polar(torch.ones(7, 4), torch.randn(7, 4))
    graph = traced(as_complex, x, turns)
    before = graph(x, turns)
    assert rewritten(graph, rotary.real_rotations, fusion.cast_before_view) == [1, 1]
    assert count(graph, aten.view_as_complex.default) == 0
    torch.testing.assert_close(graph(x, turns).float(), before.float(), rtol=2.0**-8, atol=1e-6)


def normed(x, weight):
    """As diffusers writes Qwen-Image's."""
    wide = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return wide.to(weight.dtype) * weight


def joined(text, picture, weights, scale, turns):
    """Qwen-Image's queries: of the text and of the picture, each a product, normed and turned."""
    made = [(rows @ weights).unflatten(-1, (3, 8)) for rows in (text, picture)]
    made = [normed(part, scale) for part in made] if scale is not None else made
    return torch.cat([as_complex(part, turn) for part, turn in zip(made, turns, strict=True)], 1)


def products(dtype=torch.bfloat16):
    torch.manual_seed(0)
    text, picture, weights, scale = (torch.randn(n).to(dtype) for n in ((1, 5, 16), (1, 7, 16), (16, 24), (8,)))
    return text, picture, weights, scale, [torch.polar(torch.ones(n, 4), torch.randn(n, 4)) for n in (5, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_norm", [True, False])
def test_pairs_are_turned_in_their_words(dtype, with_norm):
    given = list(products(dtype))
    given[3] = given[3] if with_norm else None
    graph = traced(torch.func.functionalize(joined), *given)
    assert rewritten(graph, rotary.real_rotations, fusion.cast_before_view) == [2, 2]
    before = graph(*given)
    assert rewritten(graph, rotary.pairs_in_words) == [2]
    assert count(graph, torch.ops.prims.rev.default) == 0
    assert [n.meta["val"].dtype for n in graph.graph.nodes if n.target is aten.cat.default] == [torch.int32]
    if with_norm:  # a sum in another order
        torch.testing.assert_close(graph(*given), before, rtol=2.0**-7, atol=1e-6)
    else:
        assert torch.equal(graph(*given), before)


def test_turned_pairs_of_rows_are_turned_in_their_words():
    """As diffusers writes FLUX's queries."""

    def function(x, weights, scale, cosine, sine):
        query = normed((x @ weights).unflatten(-1, (3, 8)), scale)
        return (query.float() * cosine + turned(query).float() * sine).to(query.dtype)

    text, _, weights, scale, _ = products()
    given = text, weights, scale, *torch.randn(2, 1, 5, 1, 8)
    graph = traced(torch.func.functionalize(function), *given)
    before = graph(*given)
    assert rewritten(graph, rotary.turned_pairs, rotary.pairs_in_words) == [1, 1]
    assert count(graph, torch.ops.prims.rev.default) == 0
    torch.testing.assert_close(graph(*given), before, rtol=2.0**-7, atol=1e-6)


def turned_together(text, picture, weights, scale, cosine, sine):
    """As diffusers writes FLUX's queries of the text and the picture."""
    query = torch.cat([normed((rows @ weights).unflatten(-1, (3, 8)), scale) for rows in (text, picture)], 1)
    return (query.float() * cosine + turned(query).float() * sine).to(query.dtype)


def test_parts_are_turned_before_they_are_put_together():
    text, picture, weights, scale, _ = products()
    given = text, picture, weights, scale, *torch.randn(2, 1, 12, 1, 8)
    graph = traced(torch.func.functionalize(turned_together), *given)
    before = graph(*given)
    assert rewritten(graph, rotary.turned_pairs, rotary.turned_before_put_together) == [1, 1]
    assert torch.equal(graph(*given), before)
    assert rewritten(graph, rotary.pairs_in_words) == [2]
    assert [n.meta["val"].dtype for n in graph.graph.nodes if n.target is aten.cat.default] == [torch.int32]
    torch.testing.assert_close(graph(*given), before, rtol=2.0**-7, atol=1e-6)


def test_what_is_used_together_is_put_together_first():
    def function(a, b, cosine, sine):
        both = torch.cat([a, b], 1)
        return (both.float() * cosine + turned(both).float() * sine).to(both.dtype), both.sum(1)

    given = (*torch.randn(2, 1, 5, 3, 8).to(torch.bfloat16), *torch.randn(2, 1, 10, 1, 8))
    assert rewritten(traced(function, *given), rotary.turned_pairs, rotary.turned_before_put_together) == [1, 0]


@pytest.mark.parametrize(
    "made",
    [
        lambda text, weights: text.float() @ weights.float(),
        lambda text, weights: torch.cat([text, text[..., :8]], -1),
        lambda text, weights: torch.sin(text @ weights),
        lambda text, weights: torch.add(text @ weights, weights[0], alpha=2),
        lambda text, weights: (text @ torch.cat([weights, weights[:, :1]], -1))[..., :24],
    ],
    ids=["4 bytes", "no product", "what is not known", "an argument by name", "an odd stride"],
)
def test_other_pairs_are_left_alone(made):
    text, _, weights, _, (turns, _) = products()
    graph = traced(lambda t, w, u: as_complex(made(t, w).unflatten(-1, (3, 8)), u), text, weights, turns)
    assert rewritten(graph, rotary.real_rotations, fusion.cast_before_view, rotary.pairs_in_words)[::2] == [1, 0]
    assert torch.ops.prims.rev.default in {node.target for node in graph.graph.nodes}


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


# ---------------------------------------------------------------------------------------------------------------------
# What is not exactly what a rewrite looks for


def bent_by(factor):
    """GELU by tanh but for one factor, which may be a tensor."""

    def function(x, y):
        chosen = {"tensor": y, "number": 0.8, "another": 0.7978845608028654}[factor]
        inner = (x + x * x * (y if factor == "another" else x) * 0.044715) * chosen
        return x * 0.5 * (aten.tanh(inner) + 1)

    return function


def saturated(quotient):
    return quotient.clamp(-448, 448).to(FP8)


def by_row(x):
    return x.abs().amax(-1, keepdim=True).float() / 448


UNLIKE = {
    "tanh of a product": (lambda x, y: aten.tanh(x * y), ((4, 8), (4, 8))),
    "tanh alone": (lambda x, y: aten.tanh(x * 0.7978845608028654), ((4, 8), ())),
    "tanh of a tensor's GELU": (bent_by("tensor"), ((4, 8), (4, 8))),
    "tanh of another factor": (bent_by("number"), ((4, 8), ())),
    "no cube": (bent_by("another"), ((4, 8), (4, 8))),
    "no cube but a number": (lambda x, y: x * 0.5 * (aten.tanh((x + 1.5) * 0.7978845608028654) + 1), ((4, 8), ())),
    "a divisor for all pictures": (
        lambda x, y: saturated(x / by_row(x) / y).reshape(-1, x.shape[-1]).float(),
        ((2, 5, 8), (5, 8)),
    ),
    "a divisor for all rows": (
        lambda x, y: saturated(x / by_row(x) / y).reshape(-1, x.shape[-1]).float(),
        ((2, 5, 8), (2, 1, 8)),
    ),
    "a divisor for all": (lambda x, y: saturated(x / y).reshape(-1, x.shape[-1]).float(), ((2, 5, 8), (1, 1, 8))),
    "one scale": (lambda x, y: saturated(x / (y.abs() + 9)).float(), ((4, 8), ())),
    "a scale from elsewhere": (lambda x, y: saturated(1000 * x / (y.abs() + 1)).float(), ((4, 8), (4, 1))),
    "quantized to a number": (lambda x, y: (x.amax() / 448).to(FP8).view(1, 1).float(), ((4, 8), ())),
    "complex times a number": (
        lambda x, y: torch.view_as_real(torch.view_as_complex(x) * 2.0),
        ((4, 2), ()),
    ),
    "complex times a conjugate": (
        lambda x, y: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y).conj()),
        ((4, 2), (4, 2)),
    ),
    "pairs beside each other": (
        lambda x, y: torch.stack([-x.unbind(-1)[1], x.unbind(-1)[0]]),
        ((2, 2), ()),
    ),
    "halves by a row's factor": (
        torch.func.functionalize(lambda x, y: other_halves(x * 3, x, y)),
        ((2, 2, 4), (4,)),
    ),
    "heads of a line": (
        lambda x, y: x.reshape(2, 3, 4).permute(1, 0, 2).reshape(3, 8).reshape(3, 2, 4),
        ((24,), ()),
    ),
    "heads counted from behind": (
        lambda x, y: x.reshape(2, 3, 2, 8).permute(0, -2, -3, 3).reshape(2, 2, 24).reshape(2, 2, 3, 8),
        ((2, 3, 2, 4, 2), ()),
    ),
}


def other_halves(made, x, factor):
    made[:, :1].addcmul_(-factor, x[:, 1:])
    made[:, 1:].addcmul_(factor, x[:, :1])
    return made


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_only_nearly_alike_makes_what_it_made(name):
    torch.manual_seed(0)
    function, shapes = UNLIKE[name]
    given = [torch.randn(shape) for shape in shapes]
    graph = traced(function, *given)
    before = graph(*given)
    rewritten(graph, fusion.Rewrites())
    torch.testing.assert_close(graph(*given), before, rtol=1e-6, atol=1e-6)


PATTERNS = {
    "quantized": (three_layers, [(2, 5, 32)], torch.bfloat16),
    "quantized like torchao": (lambda x: fp8_rows(x)[0].float(), [(2, 5, 16)], torch.bfloat16),
    "modulated": (modulated, [(2, 4, 8), (3, 8), (2, 24)], torch.float32),
    "gelu": (gelu, [(4, 8)], torch.float32),
    "projected": (projected, [(2, 5, 16), (24, 16), (24,)], torch.bfloat16),
    "pairs": (turned, [(1, 5, 2, 2)], torch.float32),
    "halves": (torch.func.functionalize(split_rotary), [(2, 2, 4), (2, 2, 2, 1), (2, 2, 2, 1)], torch.float32),
    "complex": (lambda x, y: as_complex(x, torch.view_as_complex(y)), [(1, 7, 3, 8), (7, 4, 2)], torch.float32),
    "together": (
        torch.func.functionalize(turned_together),
        [(1, 5, 16), (1, 7, 16), (16, 24), (8,), (1, 12, 1, 8), (1, 12, 1, 8)],
        torch.bfloat16,
    ),
    "rows": (
        lambda x: (x * 2).permute(0, 2, 1, 3).reshape(2, 4, 12).reshape(2, 4, 3, 4),
        [(2, 3, 4, 4)],
        torch.float32,
    ),
}
NUMBERS = (0.5, 1, 2, 0.044715, 0.7978845608028654, 448, -448.0, -1)


def neighbour(graph, given, random):
    """Change one argument somewhere in a graph: another node, a number, a tensor of another shape or type, another
    order, a keyword, or one more use. Gives the inputs."""
    order = list(graph.nodes)
    node = random.choice([n for n in order if n.op == "call_function" and n.args])
    place = random.randrange(len(node.args))
    kind = random.choice(["node", "number", "tensor", "tensor", "tensor", "order", "keyword", "use", "within"])
    if kind == "node":
        node.update_arg(place, random.choice(order[: order.index(node)]))
    elif kind == "number":
        node.update_arg(place, random.choice(NUMBERS))
    elif kind == "order":
        node.args = node.args[::-1]
    elif kind == "keyword":
        node.kwargs = {"alpha": random.choice([1, 2, 0.5])} if node.target in (aten.add.Tensor, aten.sub.Tensor) else {}
    elif kind == "use":
        (made,) = order[-1].args
        order[-1].args = ([*(made if isinstance(made, list | tuple) else [made]), node],)
    elif kind == "within" and isinstance(node.args[place], list):
        node.update_arg(place, [random.choice([-1, 0, 1, 2]) if isinstance(n, int) else n for n in node.args[place]])
    elif kind == "tensor":
        shape = list(random.choice([n.meta["val"].shape for n in order if nodes.tensor(n) is not None]))
        if shape and random.random() < 0.5:
            shape[random.randrange(len(shape))] = 1
        shape = random.choice([shape, shape, shape[1:], [1, *shape], shape[-1:], []])
        dtype = random.choice([torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.complex64])
        with graph.inserting_before(order[0]):
            node.update_arg(place, graph.placeholder("other"))
        given = [(3 * torch.randn(shape)).to(dtype), *given]
    return given


def flat(made):
    return [one for one in (made if isinstance(made, list | tuple) else [made]) if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("name", PATTERNS)
def test_neighbours_of_every_pattern_make_what_they_made(name, caplog):
    """Graphs that differ from what a rewrite looks for by an argument, of which most are rewritten still."""
    caplog.set_level(logging.CRITICAL)
    function, shapes, dtype = PATTERNS[name]
    tried = 0
    for seed in range(24):
        torch.manual_seed(seed)
        given = [torch.randn(shape).to(dtype) for shape in shapes]
        graph = traced(function, *given)
        try:
            given = neighbour(graph.graph, given, Random(f"{name} {seed}"))
            graph.recompile()
            FakeTensorProp(graph, FakeTensorMode()).propagate(*given)
            before = [one.clone() for one in flat(graph(*given))]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            continue  # no graph that PyTorch could run
        tried += 1
        text = graph.code
        rewritten(graph, fusion.Rewrites())
        for made, was in zip(flat(graph(*given)), before, strict=True):
            assert (made.shape, made.dtype) == (was.shape, was.dtype), text
            size = was.to(torch.complex128)
            away = (made.to(torch.complex128) - size).abs()
            types = {nodes.tensor(n).dtype for n in graph.graph.nodes if nodes.tensor(n) is not None}
            step = 2.0**-3 if FP8 in types else 2.0**-5  # a tie may fall to the other side
            mean = size[size.isfinite()].abs().mean().nan_to_num()
            assert torch.equal(made.isnan(), was.isnan()), text
            assert not (away > step * size.abs() + 2.0**-5 * mean).any(), text
    assert tried >= 5


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
    """The post's methods compile in the same process and thread, with Inductor's own choices."""
    monkeypatch.setattr(fusion.InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: False))
    monkeypatch.setattr(Features, "reduction_numel", numel)
    with config.patch(**(fusion.options() if compiled_here else {})):
        assert fusion._Choices.should_use_persistent_reduction(Features(), False) == persistent


@pytest.mark.parametrize("module", [fusion, nodes, rotary])
def test_the_settings_exist_and_key_the_caches(tmp_path, monkeypatch, module):
    torch.compile(torch.nn.Identity(), options=dict(fusion.options()))  # raises for one that does not exist
    passes = fusion.options()["post_grad_custom_pre_pass"]
    first = passes.uuid()
    assert first == fusion.Rewrites().uuid()
    changed = tmp_path / "changed.py"
    changed.write_text("# another text")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert passes.uuid() != first


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (
            "flux.1-dev",  # whose single blocks' GELU is put beside what attention makes
            {
                "gelu_in_product",
                "logistic_gelu",
                "turned_pairs",
                "turned_before_put_together",
                "pairs_in_words",
                "share",
            },
        ),
        ("qwen-image", {"gelu_in_product", "real_rotations", "cast_before_view", "pairs_in_words", "share"}),
        ("ltx-2", {"gelu_in_product", "turned_halves", "cast_before_view", "write_rows", "share"}),
        ("wan-2.2-5b", {"gelu_in_product", "share"}),
    ],
)
def test_a_models_rewritten_blocks_make_what_they_made(model, found, tmp_path, monkeypatch):
    """The very graphs that Inductor would get, run operator by operator."""
    spec = tiny.spec(model, tiny.checkpoint(model, tmp_path))
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, spec.id: spec}))
    pipeline = loading.load_pipeline(spec, torch.device("cpu"))
    used = set()
    turns = ("turned_pairs", "turned_halves", "turned_before_put_together", "pairs_in_words", "real_rotations")
    others = ("gelu_in_product", "logistic_gelu", "cast_before_view", "write_rows", "share")
    for module, name in [(rotary, name) for name in turns] + [(fusion, name) for name in others]:
        rewrite = getattr(module, name)
        monkeypatch.setattr(module, name, lambda graph, n=name, do=rewrite: used.update({n} if do(graph) else ()))

    def rewritten_only(graph, _):
        fusion.Rewrites()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return graph

    request = CompareRequest.create("a cat", model=spec.id, num_inference_steps=2)
    backend = aot_autograd(fw_compiler=rewritten_only, decompositions=select_decomp_table())
    torch._dynamo.reset()
    with torch.inference_mode():
        before = finished(pipeline, spec, call(pipeline, spec, request, 7)).pixels
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=None, backend=backend)
        after = finished(pipeline, spec, call(pipeline, spec, request, 7)).pixels
    torch._dynamo.reset()
    assert used == found
    assert (after - before).float().pow(2).mean().sqrt() < 0.01


class Modulated(torch.nn.Module):
    """What is rewritten for a GPU beside attention: a modulated norm, norms of heads, layers with a GELU between."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(3, 2048))
        self.heads = torch.nn.RMSNorm(128, eps=1e-6)
        self.up, self.down = torch.nn.Linear(2048, 4096), torch.nn.Linear(4096, 2048)

    def forward(self, x, vector):
        scale, shift, gate = (self.table[None] + vector.reshape(len(x), 3, -1)).unbind(1)
        rows = torch.nn.functional.rms_norm(x, (2048,)) * (1 + scale[:, None]) + shift[:, None]
        rows = self.heads(rows.unflatten(-1, (-1, 128))).flatten(2)
        inner = torch.nn.functional.gelu(self.up(rows), approximate="tanh")
        return x + gate[:, None] * self.down(inner)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rewritten_kernels_are_as_near_to_the_exact_result_as_what_they_replace(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    block = Modulated().cuda()
    given = torch.randn(2, 1536, 2048, device="cuda"), torch.randn(2, 6144, device="cuda")
    with torch.inference_mode():
        block, given = block.bfloat16(), [tensor.bfloat16() for tensor in given]
        exact = block.double()(*(tensor.double() for tensor in given))
        block.bfloat16()
        compilation.configure()
        compiled = torch.compile(block, fullgraph=True, dynamic=False, options=dict(fusion.options()))
        away = [(made.double() - exact).norm() / exact.norm() for made in (compiled(*given), block(*given))]
    assert away[0] < 1.1 * away[1]
