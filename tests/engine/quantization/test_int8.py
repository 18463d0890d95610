"""INT8 layers against int64 arithmetic written here from the format's definition."""

import copy
import io
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.utils import get_model_size_in_bytes

from engine.compiler import fusion
from engine.compiler.nodes import aten
from engine.quantization import int8
from engine.quantization.int8 import Int8Config, Int8Tensor, quantize_rows
from tests.support.graphs import count, rewritten, traced

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCALINGS = {
    "plain": lambda x: x,
    "small": lambda x: x * 1e-6,
    "large": lambda x: x * 1e4,
    "rows": lambda x: x * torch.logspace(-4, 1, x.shape[0])[:, None],
    "outliers": lambda x: torch.where(torch.arange(x.shape[1]) % 97 == 0, 100 * x, x),
    "heavy": lambda x: x * torch.exp(1.5 * torch.randn_like(x)),
    "one value": lambda x: x.sign() * 3,  # every product is the largest
}
SHAPES = ((272, 320, 1280), (272, 1280, 320), (17, 48, 16), (16, 64, 32), (1, 320, 1920), (40, 5000, 24))
ODD = ((3, 13, 7), (1, 1, 1), (17, 1041, 9))
"""Widths that CUDA's product does not take."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["instructions", "fp32"])
def product(request, monkeypatch):
    """Both ways in which a CPU multiplies, whatever this one has."""
    monkeypatch.setattr(int8, "cpu_has_int8", lambda: request.param == "instructions")


def layer(in_features, out_features, bias=True, scaling=None):
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.weight.data = (scaling or SCALINGS["plain"])(linear.weight.data)
    return linear.to(torch.bfloat16).requires_grad_(False)


def quantized(linear):
    linear = copy.deepcopy(linear)
    quantize_(linear, Int8Config())
    return linear


def reference_rows(x):
    """Codes, int64, and fp32 scales by numpy's IEEE single arithmetic."""
    x = x.float().numpy()
    scale = np.abs(x).max(-1, keepdims=True) * (np.float32(1) / np.float32(127))
    scale = np.maximum(scale, np.float32(2.0**-120))
    codes = np.rint(x * (np.float32(1) / scale)).astype(np.int64)
    assert np.abs(codes).max() <= 127
    return codes, scale


def reference(linear, x):
    """The layer in int64, with the roundings that its docstring names."""
    (a, a_scale), (w, w_scale) = reference_rows(x), reference_rows(linear.weight)
    made = (a @ w.T).astype(np.float32) * a_scale * w_scale.T
    if linear.bias is not None:
        made = made + linear.bias.float().numpy()
    return torch.from_numpy(made).to(torch.bfloat16)


def differing(scaling, rows, k, n, bias, device="cpu"):
    """Outputs of a layer that differ from int64 arithmetic, and all its outputs."""
    linear, x = layer(k, n, bias, scaling), scaling(torch.randn(rows, k)).to(torch.bfloat16)
    expected = reference(linear, x)
    made = quantized(linear).to(device)(x.to(device)).cpu()
    return (made != expected).sum().item(), expected.numel()


def test_every_output_equals_int64_arithmetic(product):
    counts = [
        differing(scaling, *shape, bias=number % 2 == 0)
        for scaling in SCALINGS.values()
        for number, shape in enumerate((*SHAPES, *ODD))
    ]
    assert sum(outputs for _, outputs in counts) > 3_000_000
    assert sum(differing for differing, _ in counts) == 0


@pytest.mark.parametrize("width", [1, int8.EXACT, int8.EXACT + 1, 4 * int8.EXACT + 3])
def test_the_largest_sums_are_exact(product, width):
    """Of alternating and of equal signs: fp32 sums of more products than `EXACT` would be rounded."""
    a = torch.full((18, width), 127, dtype=torch.int8)
    b = torch.full((9, width), -127, dtype=torch.int8)
    b[3, ::2] = 126
    expected = a.long() @ b.long().t()
    assert torch.equal(int8.multiply(a, b).long(), expected)
    assert width > 1 or expected.min() == -(127**2)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_codes_are_symmetric_and_reach_their_ends(scaling):
    x = SCALINGS[scaling](torch.randn(64, 1280)).to(torch.bfloat16)
    (codes, scales), (opposite, same) = quantize_rows(x), quantize_rows(-x)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (64, 1)
    assert torch.equal(opposite, -codes) and torch.equal(same, scales)
    assert (codes.abs().amax(-1) == 127).all() and codes.min() >= -127
    expected, expected_scales = reference_rows(x)
    assert np.array_equal(codes.numpy(), expected) and np.array_equal(scales.numpy(), expected_scales)


def test_every_bf16_magnitude_reaches_the_end_of_its_row_and_no_further():
    """All that a row's largest value can be, from the least sub-normal to the greatest finite one."""
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)[:, None]
    codes, scales = quantize_rows(x)
    normal = x.float() * (1 / 127) >= int8.LEAST_SCALE
    assert scales.isfinite().all() and (scales > 0).all()
    assert (codes[normal] == 127).all() and (codes >= 0).all()
    assert (quantize_rows(-x)[0] == -codes).all()


def test_zero_rows_and_zero_weights_give_the_bias(product):
    linear, x = layer(64, 32), torch.randn(5, 64).to(torch.bfloat16)
    x[1] = 0
    linear.weight.data[3] = 0
    out = quantized(linear)(x)
    assert out.isfinite().all()
    assert torch.equal(out[1], linear.bias) and torch.equal(out[:, 3], linear.bias[3].expand(5))
    linear.weight.data.zero_()
    assert torch.equal(quantized(linear)(x), linear.bias.expand(5, -1))


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_reaches_every_output_that_it_has_a_part_in(product, bad):
    linear, x = layer(64, 32), torch.randn(8, 64).to(torch.bfloat16)
    usual = quantized(linear)(x)
    x[2, 7] = bad
    out = quantized(linear)(x)
    others = [row for row in range(8) if row != 2]
    assert not out[2].isfinite().any() and torch.equal(out[others], usual[others])
    x[2, 7] = 0
    usual = quantized(linear)(x)
    linear.weight.data[3, 5] = bad
    out = quantized(linear)(x)
    others = [column for column in range(32) if column != 3]
    assert not out[:, 3].isfinite().any() and torch.equal(out[:, others], usual[:, others])


def test_it_takes_3d_and_strided_input():
    module = quantized(layer(64, 32))
    x = torch.randn(3, 10, 128).to(torch.bfloat16)[:, 2:, ::2]
    assert not x.is_contiguous()
    assert module(x).shape == (3, 8, 32)
    assert torch.equal(module(x), module(x.reshape(-1, 64)).view(3, 8, 32))


def test_it_refuses_other_types():
    with pytest.raises(ValueError, match="takes bf16"):
        Int8Tensor.from_weight(torch.zeros(32, 32))
    with pytest.raises(TypeError, match="bf16 activations"):
        quantized(layer(32, 32))(torch.zeros(2, 32))


def test_it_keeps_one_byte_a_weight_and_four_a_row():
    assert get_model_size_in_bytes(nn.Sequential(quantized(layer(320, 640, bias=False)))) == 320 * 640 + 4 * 640


def test_modules_copy_move_save_and_load():
    module, x = quantized(layer(64, 32)), torch.randn(7, 64).to(torch.bfloat16)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    other = quantized(layer(64, 32))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(saved, weights_only=False))
    assert torch.equal(other(x), expected)
    assert type(copy.deepcopy(module).to("meta").weight.data) is Int8Tensor
    assert torch.equal(module.to("cpu").to(torch.bfloat16)(x), expected)


def test_vnni_without_avx_512_is_found_where_linux_tells_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    found = int8.cpu_has_int8.__wrapped__
    file = tmp_path / "cpuinfo"
    file.write_text("flags\t\t: avx2 avx_vnni fma\n")
    assert found(file)
    file.write_text("flags\t\t: avx2 fma\n")
    assert not found(file) and not found(tmp_path / "nothing")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert found(file)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_layer_is_one_graph_with_the_same_values():
    module, x = quantized(layer(64, 128)), torch.randn(2, 9, 64).to(torch.bfloat16)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        made, expected = torch.compile(module, fullgraph=True)(x), module(x)
    # A product and a sum that are rounded together may fall to the other side of a bf16 tie.
    torch.testing.assert_close(made, expected, rtol=0.008, atol=0)
    assert (made != expected).float().mean() < 1e-3


def test_one_activation_is_quantized_once_for_all_its_layers():
    x, *weights = (torch.randn(*shape).to(torch.bfloat16) for shape in ((2, 5, 32), (16, 32), (48, 32), (16, 32)))
    weights = [quantize_rows(weight) for weight in weights]

    def three_layers(x, weights):
        return [int8.linear(x, *weight, None) for weight in weights]

    graph = traced(three_layers, x, weights)
    assert count(graph, aten.amax.default) == 3
    before = graph(x, weights)
    rewritten(graph, fusion.Rewrites())
    assert count(graph, aten.amax.default) == count(graph, aten.round.default) == 1
    assert count(graph, torch._inductor.inductor_prims.force_stride_order) == 1, "written to memory once"
    for a, b in zip(graph(x, weights), before, strict=True):
        assert torch.equal(a, b)


@gpu
@needs_cuda
def test_gpu_every_output_equals_int64_arithmetic():
    counts = [
        differing(scaling, *shape, bias=number % 2 == 0, device="cuda")
        for scaling in SCALINGS.values()
        for number, shape in enumerate(SHAPES)
    ]
    assert sum(outputs for _, outputs in counts) > 3_000_000
    assert sum(differing for differing, _ in counts) == 0


@gpu
@needs_cuda
@pytest.mark.parametrize("scaling", SCALINGS)
def test_gpu_quantizes_weights_and_activations_as_the_cpu(scaling):
    x = SCALINGS[scaling](torch.randn(272, 1280)).to(torch.bfloat16)
    for ours, theirs in zip(quantize_rows(x), quantize_rows(x.cuda()), strict=True):
        assert torch.equal(ours, theirs.cpu())


@gpu
@needs_cuda
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_gpu_compiled_in_one_graph_with_the_engines_rewrites(rows):
    first, second, third = (quantized(layer(320, 640)).cuda() for _ in range(3))

    def block(x):
        x = nn.functional.layer_norm(x, (320,))
        return first(x), second(x), third(x)

    x = torch.randn(1, rows, 320).to(torch.bfloat16).cuda()
    fusion.install()
    with torch.inference_mode():
        compiled = torch.compile(block, fullgraph=True, options=dict(fusion.options()))
        for made, expected in zip(compiled(x), block(x), strict=True):
            # The norm is rounded once less, and a code may fall to the other side of a tie.
            error = (made.float() - expected.float()).norm() / expected.float().norm()
            assert error < 0.01
