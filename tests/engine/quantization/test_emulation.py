"""The emulated formats against references written here from the formats' definitions, in float64."""

import copy
import io
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common import KernelPreference
from torchao.utils import get_model_size_in_bytes

from engine.quantization.emulation import (
    EmulatedFP8Tensor,
    EmulatedNVFP4Tensor,
    EmulationConfig,
    nvfp4_activation,
    nvfp4_weight,
)
from engine.quantization.remedies import WeightOnlySteps

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()  # 0 ... 448

SCALINGS = {
    "plain": lambda x: x,
    "small": lambda x: x * 1e-6,
    "large": lambda x: x * 1e4,
    "rows": lambda x: x * torch.logspace(-4, 1, x.shape[0])[:, None],  # most block scales sub-normal or zero
    "outliers": lambda x: torch.where(torch.arange(x.shape[1]) % 97 == 0, 100 * x, x),
    "heavy": lambda x: x * torch.exp(1.5 * torch.randn_like(x)),
}


def nearest(grid, x):
    """Round to the nearest value of a grid by search, ties to the even code, saturating; float64 in and out."""
    size = np.abs(x)
    high = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    below, above = size - grid[high - 1], grid[high] - size
    up = (above < below) | ((above == below) & (high % 2 == 0))
    return np.copysign(np.where(up, grid[high], grid[high - 1]), x)


def nvfp4_reference(x):
    """mslk's quantizer with numpy's IEEE single arithmetic; block-scaled values in float64, and the tensor scale."""
    blocks = x.float().numpy().reshape(-1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    tensor_scale = amax.max() * (np.float32(1) / np.float32(448 * 6))  # as CUDA divides by a constant
    reciprocal = np.float32(1) / tensor_scale
    scale = nearest(E4M3, (amax / np.float32(6) * reciprocal).astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = nearest(E2M1, (blocks * (reciprocal / scale.astype(np.float32))).astype(np.float64))
    return np.where(scale == 0, 0, codes * scale).reshape(x.shape), tensor_scale


def weight_values(weight):
    """Unpack an emulated weight with torchao's own kernels."""
    codes = f4_unpacked_to_f32(unpack_uint4(weight.codes)).double().view(-1, 16)
    return (codes * weight.block_scales.double().view(-1, 1)).view(weight.shape)


def layer(in_features, out_features, bias=True, scaling=None):
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.weight.data = (scaling or SCALINGS["plain"])(linear.weight.data)
    return linear.to(torch.bfloat16).requires_grad_(False)


def emulated(linear, tensor_class=EmulatedNVFP4Tensor):
    linear = copy.deepcopy(linear)
    quantize_(linear, EmulationConfig(tensor_class))
    return linear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- NVFP4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
def test_nvfp4_activations_are_bit_equal_to_the_reference(scaling):
    x = SCALINGS[scaling](torch.randn(96, 640)).to(torch.bfloat16)
    values, scale = nvfp4_activation(x)
    expected, expected_scale = nvfp4_reference(x)
    assert scale.item() == expected_scale
    assert np.array_equal(values.double().numpy(), expected)


def test_nvfp4_rounding_hits_every_tie_like_the_reference():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.cat((ties, -ties)).repeat(4, 1).to(torch.bfloat16)
    x[0] *= 448  # makes the per-tensor scale exactly 1 and the others' block scale exactly 1
    values, scale = nvfp4_activation(x)
    rounded = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert scale == 1
    assert torch.equal(values[1].float(), torch.cat((rounded, -rounded)))
    assert torch.equal(values[0], values[1] * 448)


def test_nvfp4_activations_are_bit_equal_to_torchao_where_the_definitions_agree():
    # With a power of two as tensor scale, mslk's product with 1/scale is torchao's quotient; no scale is sub-normal.
    x = torch.randn(256, 320).to(torch.bfloat16)
    x[3, 5] = 2688 * 2.0**-8
    values, scale = nvfp4_activation(x)
    assert scale == 2.0**-8
    block_scales, codes = nvfp4_quantize(x, 16, scale)
    assert torch.equal(values.double(), weight_values(EmulatedNVFP4Tensor(codes, block_scales, scale)))


def test_nvfp4_weights_are_torchaos_but_for_its_divisions_by_constants():
    weight = torch.randn(640, 1280).to(torch.bfloat16)
    held = EmulatedNVFP4Tensor.from_weight(weight)
    block_scales, codes = nvfp4_quantize(weight, 16, per_tensor_amax_to_scale(weight.abs().max()))
    assert (held.block_scales.view(torch.uint8) != block_scales.view(torch.uint8)).float().mean() < 0.01
    assert (held.codes != codes).float().mean() < 0.01
    assert torch.equal(nvfp4_weight(held.codes, held.block_scales).double(), weight_values(held))


def test_nvfp4_weights_are_bit_equal_to_torchaos_where_no_division_rounds():
    # Every block's largest value is 6 times a power of two, and so is, in effect, the tensor's: all scales are exact.
    weight = torch.randn(64, 96).clamp(-6, 6).to(torch.bfloat16)
    weight.view(-1, 16)[:, 3] = 6
    weight[0, 3] = 2688
    held = EmulatedNVFP4Tensor.from_weight(weight)
    block_scales, codes = nvfp4_quantize(weight, 16, torch.tensor(1.0))
    assert held.tensor_scale == 1
    assert torch.equal(held.block_scales.view(torch.uint8), block_scales.view(torch.uint8))
    assert torch.equal(held.codes, codes)


def nvfp4_difference(scaling, rows, k, n, bias):
    """Outputs of an emulated layer that differ from the same layer accumulated in float64, and all its outputs."""
    linear, x = layer(k, n, bias, scaling), scaling(torch.randn(rows, k)).to(torch.bfloat16)
    quantized = emulated(linear)
    values, scale = nvfp4_reference(x)
    expected = (torch.from_numpy(values) @ weight_values(quantized.weight).t()).to(torch.bfloat16)
    expected = expected * (torch.tensor(scale) * quantized.weight.tensor_scale).to(torch.bfloat16)
    expected = expected + linear.bias if bias else expected
    return (quantized(x) != expected).sum().item(), expected.numel()


SHAPES = ((272, 320, 1280, True), (272, 1280, 320, False), (17, 48, 16, True), (1, 320, 1920, True))


def test_nvfp4_linear_equals_float64_accumulation():
    scalings = [f for name, f in SCALINGS.items() if name != "outliers"]
    counts = [nvfp4_difference(scaling, *shape) for scaling in scalings for shape in SHAPES]
    assert sum(outputs for _, outputs in counts) > 2_000_000
    assert sum(differing for differing, _ in counts) == 0


def test_nvfp4_linear_differs_only_by_fp32_accumulation_where_that_is_inexact():
    # Outliers in both operands make most fp32 sums inexact, so a few outputs fall on the other side of a bf16 tie.
    counts = [nvfp4_difference(SCALINGS["outliers"], *shape) for shape in SHAPES]
    assert sum(differing for differing, _ in counts) < 1e-4 * sum(outputs for _, outputs in counts)


def test_nvfp4_linear_takes_3d_and_strided_input():
    quantized = emulated(layer(64, 32))
    x = torch.randn(3, 10, 128).to(torch.bfloat16)[:, 2:, ::2]
    assert not x.is_contiguous()
    assert quantized(x).shape == (3, 8, 32)
    assert torch.equal(quantized(x), quantized(x.reshape(-1, 64)).view(3, 8, 32))


def test_nvfp4_zero_activations_give_the_bias():
    linear = layer(64, 32)
    assert torch.equal(emulated(linear)(torch.zeros(5, 64, dtype=torch.bfloat16)), linear.bias.expand(5, -1))


def test_nvfp4_zero_rows_blocks_and_weights_are_harmless():
    linear = layer(64, 32)
    x = torch.randn(5, 64).to(torch.bfloat16)
    x[1] = 0
    x[2, :16] = 0
    out = emulated(linear)(x)
    assert torch.equal(out[1], linear.bias)
    assert out.isfinite().all()
    linear.weight.data.zero_()
    assert torch.equal(emulated(linear)(x), linear.bias.expand(5, -1))


def test_nvfp4_tiny_activations_do_not_overflow_the_reciprocal():
    x = torch.full((2, 32), 1e-38).to(torch.bfloat16)
    assert emulated(layer(32, 16))(x).isfinite().all()


def test_nvfp4_keeps_0_5625_bytes_a_weight():
    model = nn.Sequential(layer(320, 1280, bias=False), layer(1280, 320, bias=False))
    quantize_(model, EmulationConfig(EmulatedNVFP4Tensor))
    model(torch.randn(4, 320).to(torch.bfloat16))
    assert get_model_size_in_bytes(model) == 2 * 320 * 1280 * 0.5625 + 2 * 4


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (2, 32, 32)])
def test_nvfp4_refuses_shapes_it_cannot_pack(shape):
    with pytest.raises(ValueError, match="NVFP4 takes"):
        EmulatedNVFP4Tensor.from_weight(torch.zeros(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("tensor_class", [EmulatedNVFP4Tensor, EmulatedFP8Tensor])
def test_emulated_layers_refuse_other_dtypes(tensor_class):
    with pytest.raises(ValueError, match="takes bf16"):
        tensor_class.from_weight(torch.zeros(32, 32))
    with pytest.raises(TypeError, match="bf16 activations"):
        emulated(layer(32, 32), tensor_class)(torch.zeros(2, 32))


# --- as modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_class", [EmulatedNVFP4Tensor, EmulatedFP8Tensor])
def test_emulated_modules_copy_move_save_and_load(tensor_class):
    quantized = emulated(layer(64, 32), tensor_class)
    x = torch.randn(7, 64).to(torch.bfloat16)
    expected = quantized(x)
    assert torch.equal(copy.deepcopy(quantized)(x), expected)

    saved = io.BytesIO()
    torch.save(quantized.state_dict(), saved)
    saved.seek(0)
    other = emulated(layer(64, 32), tensor_class)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(saved, weights_only=False))
    assert torch.equal(other(x), expected)

    moved = copy.deepcopy(quantized).to("meta")
    assert type(moved.weight.data) is tensor_class
    assert {getattr(moved.weight, n).device.type for n in moved.weight.tensor_data_names} == {"meta"}
    assert torch.equal(quantized.to("cpu").to(torch.bfloat16)(x), expected)


@pytest.mark.parametrize("tensor_class", [EmulatedNVFP4Tensor, EmulatedFP8Tensor])
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiled_equals_eager_bit_for_bit(tensor_class):
    model = nn.Sequential(layer(64, 128), nn.ReLU(), layer(128, 32))
    quantize_(model, EmulationConfig(tensor_class))
    x = torch.randn(2, 9, 64).to(torch.bfloat16)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, fullgraph=True)
        usual = model(x)
        assert torch.equal(compiled(x), usual)
        if tensor_class is EmulatedNVFP4Tensor:
            with WeightOnlySteps(model, (1, 0), 2):
                assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), usual)
            assert torch.equal(compiled(x), usual)


# --- FP8 and MXFP8 ---------------------------------------------------------------------------------------------------


def fp8_reference(x):
    """Row-wise e4m3: float64 values (R, K) and scales (R, 1); torchao computes the scale in bf16."""
    amax = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    scale = (amax / 448).to(torch.bfloat16).float()
    return torch.from_numpy(nearest(E4M3, (x.float() / scale).double().numpy())), scale.double()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_linear_equals_float64(scaling):
    linear, x = layer(320, 640, True, SCALINGS[scaling]), SCALINGS[scaling](torch.randn(128, 320)).to(torch.bfloat16)
    (a, a_scale), (w, w_scale) = fp8_reference(x), fp8_reference(linear.weight)
    exact = (a @ w.t()) * a_scale * w_scale.t() + linear.bias.double()
    difference = (emulated(linear, EmulatedFP8Tensor)(x) != exact.to(torch.bfloat16)).sum().item()
    assert difference <= 20  # of 81,920: fp32 rounding next to a bf16 tie


def test_fp8_rows_of_zeros_are_harmless():
    linear = layer(64, 32)
    linear.weight.data[3] = 0
    x = torch.randn(5, 64).to(torch.bfloat16)
    x[1] = 0
    out = emulated(linear, EmulatedFP8Tensor)(x)
    assert torch.equal(out[1], linear.bias)
    assert torch.equal(out[:, 3], linear.bias[3].expand(5))
    assert out.isfinite().all()


def test_fp8_keeps_one_byte_a_weight_and_four_a_row():
    model = nn.Sequential(emulated(layer(320, 640, bias=False), EmulatedFP8Tensor))
    assert get_model_size_in_bytes(model) == 320 * 640 + 4 * 640


def mxfp8_reference(x):
    """OCP MX with e4m3 and round-up power-of-two scales of 32 (RCEIL); dequantized float64 values."""
    blocks = x.double().numpy().reshape(-1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(np.where(amax == 0, 448, amax) / 448))
    return torch.from_numpy((nearest(E4M3, blocks / scale) * scale).reshape(x.shape))


@pytest.mark.parametrize("scaling", ["plain", "rows", "outliers"])
def test_torchaos_mxfp8_emulation_equals_float64(scaling):
    linear, x = layer(320, 640, True, SCALINGS[scaling]), SCALINGS[scaling](torch.randn(128, 320)).to(torch.bfloat16)
    x[7] = 0
    exact = mxfp8_reference(x) @ mxfp8_reference(linear.weight).t() + linear.bias.double()
    config = MXDynamicActivationMXWeightConfig(
        activation_dtype=torch.float8_e4m3fn,
        weight_dtype=torch.float8_e4m3fn,
        kernel_preference=KernelPreference.EMULATED,
    )
    quantize_(linear, config)
    with torch.no_grad():
        assert (linear(x) != exact.to(torch.bfloat16)).sum() <= 20  # of 81,920: fp32 rounding next to a bf16 tie


# --- what is no number -----------------------------------------------------------------------------------------------


def quantized_in(name, linear):
    """The layer in a format: by our emulation, or by torchao's own for MXFP8."""
    if name != "mxfp8":
        return emulated(linear, {"nvfp4": EmulatedNVFP4Tensor, "fp8": EmulatedFP8Tensor}[name])
    linear = copy.deepcopy(linear)
    config = MXDynamicActivationMXWeightConfig(
        activation_dtype=torch.float8_e4m3fn,
        weight_dtype=torch.float8_e4m3fn,
        kernel_preference=KernelPreference.EMULATED,
    )
    quantize_(linear, config)
    return linear


BAD = [float("nan"), -float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD, ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["nvfp4", "fp8", "mxfp8"])
def test_a_weight_that_is_no_number_reaches_every_output_that_it_has_a_part_in(name, bad):
    linear, x = layer(64, 32), torch.randn(8, 64).to(torch.bfloat16)
    usual = quantized_in(name, linear)(x)
    linear.weight.data[3, 5] = bad
    with torch.no_grad():
        out = quantized_in(name, linear)(x)
    if name == "nvfp4":  # one scale spans the tensor
        assert out.isnan().all()
        return
    # An infinity in MXFP8 saturates to 448 * 2^127, which overflows fp32; in FP8 it makes its row's scale infinite.
    assert out[:, 3].isnan().all() if name == "fp8" or bad != bad else out[:, 3].isinf().all()
    others = [column for column in range(32) if column != 3]
    assert torch.equal(out[:, others], usual[:, others])


@pytest.mark.parametrize("bad", BAD, ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["nvfp4", "fp8", "mxfp8"])
def test_an_activation_that_is_no_number_reaches_every_output_that_it_has_a_part_in(name, bad):
    quantized, x = quantized_in(name, layer(64, 32)), torch.randn(8, 64).to(torch.bfloat16)
    usual = quantized(x)
    x[2, 7] = bad
    with torch.no_grad():
        out = quantized(x)
    if name == "nvfp4":
        assert out.isnan().all()
        return
    assert out[2].isnan().all() if name == "fp8" or bad != bad else out[2].isinf().all()
    others = [row for row in range(8) if row != 2]
    assert torch.equal(out[others], usual[others])


def test_a_scale_that_is_nan_with_a_sign_makes_its_block_nan_and_no_other():
    held = EmulatedNVFP4Tensor.from_weight(layer(64, 32).weight)
    usual, scales = nvfp4_weight(held.codes, held.block_scales), held.block_scales.view(torch.uint8).clone()
    scales[0, 0], scales[1, 1] = 0x7F, 0xFF
    found = nvfp4_weight(held.codes, scales.view(torch.float8_e4m3fn))
    spoilt = torch.zeros(32, 64, dtype=torch.bool)
    spoilt[0, :16] = spoilt[1, 16:32] = True
    assert torch.equal(found.isnan(), spoilt) and torch.equal(found[~spoilt], usual[~spoilt])


# --- on a GPU --------------------------------------------------------------------------------------------------------


@gpu
@needs_cuda
@pytest.mark.parametrize("tensor_class", [EmulatedNVFP4Tensor, EmulatedFP8Tensor])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_gpu_equals_cpu(tensor_class, scaling):
    quantized = emulated(layer(1280, 640, True, SCALINGS[scaling]), tensor_class)
    x = SCALINGS[scaling](torch.randn(272, 1280)).to(torch.bfloat16).view(2, 136, 1280)
    expected = quantized(x)
    # Only the order of the fp32 sums differs.
    assert (quantized.cuda()(x.cuda()).cpu() != expected).float().mean() < 1e-3


@gpu
@needs_cuda
def test_gpu_quantizes_activations_bit_equal_to_cpu():
    for scaling in SCALINGS.values():
        x = scaling(torch.randn(272, 1280)).to(torch.bfloat16)
        (values, scale), (expected, expected_scale) = nvfp4_activation(x.cuda()), nvfp4_activation(x)
        assert torch.equal(values.cpu(), expected)
        assert torch.equal(scale.cpu(), expected_scale)


@gpu
@needs_cuda
@pytest.mark.parametrize("scaling", SCALINGS)
def test_gpu_quantizes_nvfp4_weights_as_torchao_there_and_as_the_cpu_here(scaling):
    weight = SCALINGS[scaling](torch.randn(640, 1280)).to(torch.bfloat16)
    on_cpu, on_gpu = EmulatedNVFP4Tensor.from_weight(weight), EmulatedNVFP4Tensor.from_weight(weight.cuda())
    scale = per_tensor_amax_to_scale(weight.cuda().abs().max())
    block_scales, codes = nvfp4_quantize(weight.cuda(), 16, scale)
    for held in (on_cpu, on_gpu):
        assert torch.equal(held.tensor_scale.cpu(), scale.cpu())
        assert torch.equal(held.block_scales.view(torch.uint8).cpu(), block_scales.view(torch.uint8).cpu())
        assert torch.equal(held.codes.cpu(), codes.cpu())


@gpu
@needs_cuda
def test_gpu_quantizes_fp8_weights_almost_like_cpu():
    # torchao divides by a constant, which CUDA rounds differently in the last bit.
    weight = torch.randn(640, 1280).to(torch.bfloat16)
    on_cpu, on_gpu = EmulatedFP8Tensor.from_weight(weight), EmulatedFP8Tensor.from_weight(weight.cuda())
    for name in on_cpu.tensor_data_names[:-1]:
        mine, other = getattr(on_cpu, name).view(torch.uint8), getattr(on_gpu, name).cpu().view(torch.uint8)
        assert (mine != other).float().mean() < 0.01


@gpu
@needs_cuda
@pytest.mark.parametrize("tensor_class", [EmulatedNVFP4Tensor, EmulatedFP8Tensor])
def test_gpu_weights_go_to_pinned_memory_and_back(tensor_class):
    quantized = emulated(layer(64, 32).cuda(), tensor_class)
    x = torch.randn(7, 64).to(torch.bfloat16).cuda()
    expected = F.linear(x, quantized.weight, quantized.bias)
    pinned = quantized.weight.data.to("cpu").pin_memory()
    assert pinned.is_pinned()
    assert torch.equal(F.linear(x, pinned.to("cuda", non_blocking=True), quantized.bias), expected)
