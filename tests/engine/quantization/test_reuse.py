"""What the emulation on a CPU does fast, against the straightforward way, bit for bit."""

import copy
import gc

import pytest
import torch
from torch import nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
from torchao.quantization.quantize_.common import KernelPreference

from engine.machine import Machine
from engine.quantization import capability, int8, nvfp4, reuse
from engine.quantization.emulation import (
    UNPACKED,
    EmulatedMXFP8Tensor,
    _e4m3_in_bf16,
    _e8m0,
    _round_e4m3_,
    fp8_rows,
    nvfp4_activation,
    nvfp4_weight,
)
from engine.runtime.timing import weight_bytes

CPU = Machine(kind="cpu", name="a CPU", capability=None)
FORMATS = ("fp8", "mxfp8", "nvfp4", "int8")
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def straight(layer, name, x, bias):
    """A layer's product as it is defined: quantize, unpack, multiply, each anew and by torchao where it has it."""
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), layer.weight
    if name == "fp8":
        values, scales = fp8_rows(rows)
        result = values.float() @ weight.values.float().t() * scales * weight.row_scales.t()
        result = (result if bias is None else result + bias).to(torch.bfloat16)
    elif name == "mxfp8":
        parts = (*weight.tensor_data_names, *weight.tensor_attribute_names)
        plain = MXTensor(*(getattr(weight, part) for part in parts))
        with torch.no_grad():
            result = nn.functional.linear(rows, plain, bias)
    elif name == "nvfp4":
        values, scale = nvfp4_activation(rows)
        result = values @ nvfp4_weight(weight.codes, weight.block_scales).t()
        result = result * (scale * weight.tensor_scale).to(torch.bfloat16)
        result = result if bias is None else result + bias
    else:
        values, scales = int8.quantize_rows(rows)
        result = (values.long() @ weight.codes.long().t()).float() * scales * weight.row_scales.t()
        result = (result if bias is None else result + bias).to(torch.bfloat16)
    return result.view(*x.shape[:-1], -1)


def quantized(name, k=96, n=64, bias=True, scale=1.0):
    layer = nn.Linear(k, n, bias=bias).to(torch.bfloat16).requires_grad_(False)
    layer.weight.mul_(scale)
    layer.weight[3] = 0
    model = nn.ModuleDict({"layer": layer})
    return capability.quantize_linear_modules(model, {"layer"}, capability.support(name, CPU))


def bits(x):
    """As integers; all NaN are one."""
    return torch.where(x.isnan(), torch.nan, x).contiguous().view(torch.int16)


def odd(k):
    """Activations, bf16 (R, k): random ones of many sizes, and each thing that a quantizer may stumble over."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(64, k, generator=generator) * torch.logspace(-38, 37, 64)[:, None]
    rows = torch.cat((rows, torch.randn(40, k, generator=generator)))
    rows[64], rows[65], rows[66] = 0.0, -0.0, 448.0
    rows[67], rows[68] = 1e-41, -1e-41  # sub-normal
    rows[69, ::2], rows[69, 1::2] = 1e38, 1e-38
    rows[70] = torch.arange(k) / 16 - 3  # ties
    rows[71, 5] = 3.3e38
    rows[72:80] *= torch.exp(4 * torch.randn(8, k, generator=generator))
    return rows.to(torch.bfloat16)


def spoilt(k):
    """The same with what is no number."""
    rows = odd(k)
    rows[80, 7], rows[81, 7], rows[82, 7] = torch.nan, torch.inf, -torch.inf
    rows[83] = torch.inf
    rows[84] = torch.nan
    return rows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "unpacked anew"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_straightforward_way(name, keeps, bias):
    for scale in (1.0, 1e-30, 1e30):
        model = quantized(name, bias=bias, scale=scale)
        assert not keeps or reuse.keep(model, UNPACKED, float("inf"))
        for x in (odd(96), spoilt(96), odd(96).view(2, 52, 96), odd(192)[:, ::2], odd(96)[:1], odd(97)[:, 1:]):
            if name == "int8" and not x.isfinite().all():
                continue  # what a cast of no number gives is not defined; test_int8.py has the rule
            assert torch.equal(bits(model.layer(x)), bits(straight(model.layer, name, x, model.layer.bias)))


def test_rounding_to_e4m3_is_a_cast():
    sizes = torch.cat((torch.arange(0, 1 << 16, dtype=torch.int32) << 16, torch.randint(0, 1 << 31, (200_000,))))
    y = sizes.to(torch.int32).view(torch.float32).clamp_(-448, 448)
    grid = E4M3[:127].float()  # and every tie, and its neighbours
    ties = (grid[1:] + grid[:-1]) / 2
    y = torch.cat((y, grid, ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e3))))
    y = torch.cat((y, -y))
    expected = y.to(torch.float8_e4m3fn).float()
    assert torch.equal(expected.isnan(), y.isnan())
    found = _round_e4m3_(y.clone())
    no = expected.isnan()
    assert torch.equal(found[~no].view(torch.int32), expected[~no].view(torch.int32)) and found[no].isnan().all()


def test_tables_hold_what_torchao_computes():
    assert torch.equal(bits(_e4m3_in_bf16(E4M3)), bits(E4M3.float().to(torch.bfloat16)))
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    ones = torch.ones(256, 32).to(torch.float8_e4m3fn)
    exact = MXTensor(ones, scales[:, None], ones.dtype, 32, torch.float32, KernelPreference.EMULATED, None, False)
    assert torch.equal(exact.dequantize()[:, 0].nan_to_num(-1), _e8m0()[1].nan_to_num(-1))


@pytest.mark.parametrize("scaling", [mode for mode in ScaleCalculationMode if mode is not ScaleCalculationMode.RCEIL])
def test_mxfp8_by_another_scaling_is_torchaos(scaling):
    how = QuantizeTensorToMXKwargs(scaling_mode=scaling, is_swizzled_scales=True)
    weight = MXTensor.to_mx(torch.randn(64, 96).to(torch.bfloat16), how.elem_dtype, 32, scaling, act_quant_kwargs=how)
    with torch.no_grad():
        found = nn.functional.linear(odd(96), EmulatedMXFP8Tensor.of(weight))
        assert torch.equal(bits(found), bits(nn.functional.linear(odd(96), weight)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_kept_weight_counts_and_moves_as_a_packed_one(name):
    model = quantized(name)
    before = weight_bytes(model)
    assert reuse.keep(model, UNPACKED, float("inf"))
    assert (model.layer.weight.unpacked is None) == (name == "int8")
    assert weight_bytes(model) == before
    assert torch.equal(bits(copy.deepcopy(model).layer(odd(96))), bits(model.layer(odd(96))))
    assert model.to("meta").layer.weight.unpacked is None


def test_weights_are_kept_where_there_is_the_memory():
    model = quantized("nvfp4")
    need = 2 * 96 * 64
    assert not reuse.keep(model, UNPACKED, need / reuse.SHARE - 1) and model.layer.weight.unpacked is None
    assert reuse.keep(model, UNPACKED, need / reuse.SHARE) and model.layer.weight.unpacked.dtype == torch.bfloat16


def test_an_activation_is_quantized_once_for_the_layers_that_take_it():
    calls = []

    def quantize(x, *how):
        calls.append(how)
        return x.float()

    with torch.inference_mode():
        x = torch.randn(5, 32).to(torch.bfloat16)
        assert reuse.once(quantize, x) is reuse.once(quantize, x) and len(calls) == 1
        reuse.once(quantize, x, True)
        assert len(calls) == 2, "quantized another way"
        x[2, 3] += 1
        assert torch.equal(reuse.once(quantize, x, True), x.float()) and len(calls) == 3, "written into"
        reuse.once(quantize, x.clone(), True)
        assert len(calls) == 4, "another object"
        last = reuse._thread.last
        del x
        gc.collect()
        assert reuse._thread.last is not last or last.made is None
        y = torch.randn(4, 33).to(torch.bfloat16)[1:, :]
        assert reuse.once(quantize, y) is reuse.once(quantize, y)
        last = reuse._thread.last
        del y
        gc.collect()
        assert last.made is None, "it is held no longer than the activations"


def test_nothing_is_kept_of_nvfp4s_weight_only_products():
    model, x = quantized("nvfp4"), odd(96)
    weight = model.layer.weight
    reuse.keep(model, UNPACKED, float("inf"))
    weight.act_quant_kwargs = None
    exact = nvfp4.dequantize(weight.codes, weight.block_scales, weight.tensor_scale).to(torch.bfloat16)
    assert torch.equal(bits(model.layer(x)), bits(nn.functional.linear(x, exact, model.layer.bias)))
