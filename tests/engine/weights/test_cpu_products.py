"""bf16 products in fp32 on a CPU without bf16 instructions; any CPU can compute them so."""

import pytest
import torch
import torch.nn.functional as F

from engine.weights import cpu_products

ONE_ROUNDING = 2**-8
"""Of bf16, relative: half a unit in the last place."""


@pytest.fixture
def as_they_were():
    """PyTorch's own kernels, whatever this process computes with."""
    computed_so = cpu_products._overrides.cache_info().currsize
    if computed_so:
        cpu_products._overrides()._destroy()
    yield
    cpu_products._overrides.cache_clear()
    if computed_so:
        cpu_products._overrides()


@pytest.fixture
def in_fp32(as_they_were):
    library = cpu_products._overrides.__wrapped__()
    yield
    library._destroy()


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


x, weight, bias = drawn(77, 40), drawn(24, 40), drawn(24)
picture, clip, sound = drawn(2, 6, 9, 9), drawn(1, 6, 4, 9, 9), drawn(1, 6, 30)
PRODUCTS = {
    "layer": (lambda x, w, b: F.linear(x, w, b), (x, weight, bias)),
    "layer of a batch": (lambda x, w, b: F.linear(x, w, b), (drawn(2, 7, 40), weight, bias)),
    "layer without bias": (lambda x, w: F.linear(x, w), (x, weight)),
    "matrices": (lambda a, b: torch.bmm(a, b), (drawn(3, 5, 8), drawn(3, 8, 4))),
    "matrices and a sum": (lambda c, a, b: torch.baddbmm(c, a, b), (drawn(3, 5, 4), drawn(3, 5, 8), drawn(3, 8, 4))),
    "picture": (lambda x, w: F.conv2d(x, w, padding=1), (picture, drawn(4, 6, 3, 3))),
    "picture, channels last": (
        lambda x, w: F.conv2d(x, w, padding=1),
        (picture.to(memory_format=torch.channels_last), drawn(4, 6, 3, 3).to(memory_format=torch.channels_last)),
    ),
    "clip": (lambda x, w: F.conv3d(x, w), (clip, drawn(4, 6, 3, 3, 3))),
    "sound": (lambda x, w, b: F.conv1d(x, w, b), (sound, drawn(4, 6, 3), drawn(4))),
    "picture, transposed": (lambda x, w: F.conv_transpose2d(x, w), (picture, drawn(6, 4, 3, 3))),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_the_exact_one_rounded_once(product, in_fp32):
    compute, operands = PRODUCTS[product]
    made = compute(*operands)
    exact = compute(*(operand.double() for operand in operands))
    assert made.dtype is torch.bfloat16 and made.stride() == exact.stride()
    # fp32 sums of so few values stray by less than a thousandth of what rounding to bf16 does.
    allowed = 1.01 * ONE_ROUNDING * exact.abs() + 1e-5
    assert ((made.double() - exact).abs() <= allowed).all()


def test_what_is_written_into_a_tensor_is_there(in_fp32):
    out = torch.zeros(77, 24, dtype=torch.bfloat16)
    assert torch.addmm(bias, x, weight.t(), out=out) is out
    assert torch.equal(out, F.linear(x, weight, bias)) and out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_products_of_other_types_are_as_they_were(dtype, as_they_were):
    a, b = (drawn(9, 12) * 8).to(dtype), (drawn(12, 5) * 8).to(dtype)
    before = a @ b
    library = cpu_products._overrides.__wrapped__()
    assert torch.equal(a @ b, before)
    library._destroy()


def test_gradients_are_still_computed(in_fp32):
    leaf = x.clone().requires_grad_()
    F.linear(leaf, weight).sum().backward()
    assert torch.allclose(leaf.grad.double(), weight.double().sum(0).expand(77, 40), rtol=2 * ONE_ROUNDING)


@pytest.mark.parametrize("slow", [True, False])
def test_only_a_cpu_without_instructions_computes_so(slow, monkeypatch):
    made = []
    monkeypatch.setattr(cpu_products, "_overrides", lambda: made.append(True))
    monkeypatch.setattr(cpu_products, "are_slow", lambda: slow)
    cpu_products.multiply_in_fp32_where_bf16_is_slow()
    assert made == [True] * slow
