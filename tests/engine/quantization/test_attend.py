"""FP8 attention in numbers: against float64 arithmetic, under masks, in pieces, and in one denoiser alone."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.quantization import attention
from engine.quantization.attention import attend, to_e4m3, use_in

TIES = 1e-3
"""Relative distance from the same arithmetic in float64: probabilities that fp32 rounds to e4m3's other neighbour."""


def given(queries, keys, features=16, heads=3, batch=2, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    shapes = [(batch, heads, tokens, features) for tokens in (queries, keys, keys)]
    spread = torch.tensor([0.01, 1.0, 30.0])[:heads].view(1, -1, 1, 1)  # a head's scale is its own
    return [(torch.randn(shape) * spread**power).to(dtype) for shape, power in zip(shapes, (0, 0, 1), strict=True)]


def in_float64(query, key, value, mask=None, scale=None):
    """The formula of `attend` as it stands, in one piece."""

    def stored(x):
        largest = x.double().abs().amax((-2, -1), keepdim=True)
        scaled = (x.float() * (448 / largest.float())).to(torch.float8_e4m3fn)
        return scaled.double() * largest / 448

    q, k, v = map(stored, (query, key, value))
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    shares = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    return shares.float().to(torch.float8_e4m3fn).double() @ v / shares.sum(-1, keepdim=True)


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize(("queries", "keys", "features"), [(1, 1, 1), (1, 7, 5), (33, 9, 64), (130, 257, 40)])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_it_is_its_formula_in_float64_for_odd_shapes_and_masks(queries, keys, features, mask):
    q, k, v = (x.float() for x in given(queries, keys, features))
    masks = {"bool": torch.rand(2, 1, queries, keys) < 0.7, "additive": torch.randn(2, 3, 1, keys).bfloat16()}
    chosen = masks.get(mask)
    if mask == "bool":
        chosen[..., 0] = True  # a row that is masked whole has a test of its own
    exact = in_float64(q, k, v, chosen)
    assert all(distance(attend(q, k, v, chosen)[:, head], exact[:, head]) < TIES for head in range(3))


def test_a_result_in_bf16_is_rounded_once():
    q, k, v = given(20, 30)
    assert torch.equal(attend(q, k, v), attend(*(x.float() for x in (q, k, v))).bfloat16())


def test_it_is_as_far_from_exact_attention_as_three_significant_bits_are():
    q, k, v = given(256, 1024, features=128, heads=1)
    assert 0.04 < distance(attend(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double())) < 0.06


def test_what_is_masked_does_not_count_and_a_row_without_keys_is_zero():
    q, k, v = given(8, 12, heads=2)
    k[..., 9:, :], v[..., 9:, :] = k[..., 9:, :] / 8, v[..., 9:, :] / 8  # not the largest, which decide the scales
    mask = torch.zeros(12, dtype=torch.bool)
    mask[:9] = True
    without = attend(q, k[..., :9, :], v[..., :9, :])
    assert distance(attend(q, k, v, mask), without) < TIES
    assert distance(attend(q, k, v, torch.where(mask, 0.0, -10000.0).view(1, 1, 1, 12)), without) < TIES
    rows = torch.ones(8, 12, dtype=torch.bool)
    rows[3] = False
    made = attend(q, k, v, rows)
    assert not made[..., 3, :].any() and torch.equal(made[..., 4:, :], attend(q, k, v)[..., 4:, :])


@pytest.mark.parametrize("at_once", [1, 1000, 5000])
def test_pieces_make_what_one_makes_and_the_same_twice(at_once):
    q, k, v = given(50, 40)
    mask = torch.rand(2, 3, 50, 40) < 0.9
    made = attend(q, k, v, mask, at_once=at_once)
    assert distance(made, attend(q, k, v, mask)) < 2**-8 and torch.equal(made, attend(q, k, v, mask, at_once=at_once))


def test_no_more_scores_are_there_at_once_than_is_said(monkeypatch):
    sizes, amax = [], torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda x, *a, **k: (sizes.append(x.numel()), amax(x, *a, **k))[1])
    attend(*given(50, 400, features=1), at_once=5000)
    assert max(sizes) == 2 * 3 * 2 * 400


def test_zeros_stay_zeros_and_what_is_no_number_stays_none():
    q, k, v = given(4, 4)
    assert not attend(q, k, torch.zeros_like(v)).any()
    assert distance(attend(torch.zeros_like(q), k, v), v.double().mean(-2, keepdim=True).expand(q.shape)) < 0.05
    for bad in (math.nan, math.inf):
        broken = v.clone()
        broken[0, 1, 2, 3] = bad
        made = attend(q, k, broken)
        assert made[0, 1].isnan().any() and not made[1].isnan().any() and not made[0, 0].isnan().any()


def test_codes_and_scale_give_back_the_largest_value():
    x = given(5, 5)[2]
    codes, scale = to_e4m3(x)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (2, 3, 1, 1)
    assert torch.equal((codes.float() * scale).abs().amax((-2, -1)), x.float().abs().amax((-2, -1)))


@pytest.mark.parametrize("further", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_what_the_kernels_formula_has_not_is_not_ignored(further):
    with pytest.raises(NotImplementedError, match="no dropout, causal mask or grouped heads"):
        attend(*given(4, 4), **further)


class Attends(nn.Module):
    def forward(self, q, k, v, then=lambda: None):
        then()
        return F.scaled_dot_product_attention(query=q, key=k, value=v)


def test_one_module_attends_so_and_no_other_not_even_meanwhile():
    lossy, exact, tensors = Attends(), Attends(), given(6, 6)
    use_in(lossy)
    beside = []

    def elsewhere():
        thread = threading.Thread(target=lambda: beside.append(exact(*tensors)))
        thread.start()
        thread.join()

    plain = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(lossy(*tensors, then=elsewhere), attend(*tensors)) and not torch.equal(attend(*tensors), plain)
    assert torch.equal(beside[0], plain)
    with pytest.raises(ZeroDivisionError):
        lossy(*tensors, then=lambda: 1 / 0)
    assert torch.equal(exact(*tensors), plain)


def test_its_source_is_a_program_that_makes_the_same_bits():
    scope, tensors = {"torch": torch}, given(6, 6)
    exec("\n".join([*attention.IMPORTS, attention.source()]), scope)
    module = Attends()
    scope["use_in"](module)
    assert torch.equal(module(*tensors), attend(*tensors))
