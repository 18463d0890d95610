"""Low-precision layers on hardware that has no tensor cores for them: NVFP4 anywhere, FP8 before Ada and on CPUs, MXFP8
on CPUs.

A picture made here should be the picture the format makes, so every rounding of the native path is reproduced:
operands are quantized by the native algorithm, multiplied exactly, accumulated in fp32 and rounded where the native
kernel rounds. Weights stay packed between calls; a layer unpacks its own for the length of one GEMM, unless a CPU has
the memory to keep what it unpacks (engine/quantization/reuse.py). MXFP8 is torchao's own `KernelPreference.EMULATED`,
which is faithful; on a CPU the same bits are made here in fewer passes.

Each layer that may be compiled is one custom operator. torch.compile therefore cannot drop its roundings, as Inductor
does inside a native layer: compiled or eager, it makes the same bits. What is not reproduced: the order, and for
Hopper's FP8 the reduced width, of the hardware's accumulation.

Knows nothing of devices' capabilities, models or recipes: engine/quantization/capability.py decides when these are
used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs, _to_mx_rceil
from torchao.prototype.mx_formats.nvfp4_tensor import QuantizeTensorToNVFP4Kwargs
from torchao.quantization import Float8Tensor, PerRow
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.transform_module import register_quantize_module_handler

from engine.formats import MXFP8
from engine.quantization import nvfp4, reuse
from engine.quantization.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, round_e2m1_
from engine.quantization.weight_tensor import WeightTensor

FP8_AMAX_FLOOR = 1e-12
"""A row whose largest magnitude is below this is scaled as if it were this: zeros would divide by zero otherwise."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E4M3_TINY = 2.0**-9  # smallest positive e4m3, a sub-normal
_E4M3_LEAST_NORMAL = 2.0**-6
_MAGNITUDE = 0x7FFF  # of a bf16's bits


# ---------------------------------------------------------------------------------------------------------------------
# NVFP4: e2m1 codes, one e4m3 scale a block of 16, one fp32 scale a tensor


NVFP4_ACTIVATIONS = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=True)


class EmulatedNVFP4Tensor(WeightTensor):
    """An NVFP4 weight (N, K), logically bf16, that `F.linear` multiplies with dynamically quantized activations.

    Attributes:
        codes: uint8 (N, K / 2), two e2m1 values a byte, the even one in the low nibble.
        block_scales: float8_e4m3fn (N, K / 16).
        tensor_scale: float32 ().
        act_quant_kwargs: as of torchao's `NVFP4Tensor`: None leaves activations in bf16 (`nvfp4_weight_only`).
        four_over_six: a block of activations takes the better of two scales.
    """

    tensor_data_names = ["codes", "block_scales", "tensor_scale"]  # noqa: RUF012 (torchao copies the list)
    tensor_attribute_names: list[str] = []  # noqa: RUF012
    optional_tensor_attribute_names = ["act_quant_kwargs", "four_over_six"]  # noqa: RUF012

    def __new__(
        cls,
        codes: Tensor,
        block_scales: Tensor,
        tensor_scale: Tensor,
        act_quant_kwargs: object = NVFP4_ACTIVATIONS,
        four_over_six: bool = False,
    ) -> EmulatedNVFP4Tensor:
        shape = (codes.shape[0], codes.shape[1] * 2)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=codes.device)

    def __init__(
        self,
        codes: Tensor,
        block_scales: Tensor,
        tensor_scale: Tensor,
        act_quant_kwargs: object = NVFP4_ACTIVATIONS,
        four_over_six: bool = False,
    ) -> None:
        self.codes, self.block_scales, self.tensor_scale = codes, block_scales, tensor_scale
        self.act_quant_kwargs, self.four_over_six = act_quant_kwargs, four_over_six

    @classmethod
    def from_weight(cls, weight: Tensor) -> EmulatedNVFP4Tensor:
        """Quantize a bf16 (N, K) weight on any device, by `nvfp4.quantize`.

        Raises:
            ValueError: not bf16, not 2D, or a dimension that is not a multiple of 16.
        """
        return cls.from_packed(*nvfp4.quantize(weight))

    @classmethod
    def from_packed(cls, codes: Tensor, block_scales: Tensor, tensor_scale: Tensor) -> EmulatedNVFP4Tensor:
        """Take codes and scales as they are."""
        _scaled_pairs(codes.device)  # built now: built while a graph is recorded, it would lie in that graph's memory
        return cls(codes, block_scales, tensor_scale)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bf16 (..., K) -> bf16 (..., N)."""
        weight = (self.codes, self.block_scales, self.tensor_scale)
        if self.act_quant_kwargs is None:
            return nvfp4_weight_only(x, *weight, bias)
        if reuse.allowed(x):
            return _nvfp4_product(x, reuse.operand(self), self.tensor_scale, bias, self.four_over_six)
        return nvfp4_linear(x, *weight, bias, self.four_over_six)

    def unpack(self) -> Tensor:
        """`nvfp4_weight`."""
        return nvfp4_weight(self.codes, self.block_scales)


@torch.library.custom_op("twinframe::nvfp4_linear", mutates_args=())
def nvfp4_linear(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    four_over_six: bool = False,
) -> Tensor:
    """x @ weight.T + bias, rounded where torchao's `_addmm_nvfp4_dispatch` rounds around the FP4 GEMM.

    Args:
        x: bf16 (..., K).
        codes, block_scales, tensor_scale: the weight (N, K), as in `EmulatedNVFP4Tensor`.
        bias: bf16 (N,) or None.
        four_over_six: as of `nvfp4_activation`.

    Returns:
        bf16 (..., N). Zero activations give exactly the bias.
    """
    return _nvfp4_product(x, nvfp4_weight(codes, block_scales), tensor_scale, bias, four_over_six)


def _nvfp4_product(
    x: Tensor, operand: Tensor, tensor_scale: Tensor, bias: Tensor | None, four_over_six: bool
) -> Tensor:
    """`nvfp4_linear` by the weight as `nvfp4_weight` unpacks it."""
    values, scale = reuse.once(nvfp4_activation, x, four_over_six)
    # fp32 accumulation, rounded to bf16; times both per-tensor scales, rounded; plus the bias, rounded.
    result = _gemm(values, operand, torch.bfloat16)
    result = result.mul_((scale * tensor_scale).to(torch.bfloat16))
    if bias is not None:
        result = result.add_(bias)
    return result.view(*x.shape[:-1], operand.shape[0])


def nvfp4_activation(x: Tensor, four_over_six: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize activations to NVFP4 and return them as the operand of an ordinary GEMM.

    The algorithm is mslk 1.1.0's `triton_quantize_nvfp4_kernel`, which torchao's `use_triton_kernel=True` runs on
    Blackwell: block scale = e4m3((block amax / 6) * (1 / per-tensor scale)), sub-normal scales kept, then
    e2m1(x * ((1 / per-tensor scale) / block scale)). The per-tensor scale is torchao's `per_tensor_amax_to_scale`.

    Args:
        x: bf16 (M, K), K a multiple of 16.
        four_over_six: a block takes the scale of amax / 6 or of amax / 4, whichever leaves the smaller squared error,
            and that of amax / 6 if both leave the same; the per-tensor scale leaves room for both.

    Returns:
        The block-scaled values e2m1 * e4m3, bf16 (M, K): at most 2 + 4 significant bits, hence exact.
        The per-tensor scale, fp32 (): the quantized activation is their product.
    """
    blocks = x.contiguous().view(-1, BLOCK)
    # The bit patterns of non-negative bf16 numbers sort like the numbers, and integers reduce three times as fast.
    amax = _amax(blocks).float()
    # torchao divides by 448 * 6, which CUDA turns into this multiplication; spelled out, a CPU makes the same bits.
    tensor_scale = nvfp4.scale_of_tensor(amax.amax(), four_over_six)
    reciprocal = tensor_scale.reciprocal()
    values = _in_blocks(blocks, amax, reciprocal, E2M1_MAX)
    if four_over_six:
        exact = blocks.float().mul_(reciprocal)
        other = _in_blocks(blocks, amax, reciprocal, nvfp4.FOUR)
        usual, larger = ((value - exact).square_().sum(-1, keepdim=True) for value in (values, other))
        values = torch.where(larger < usual, other, values)
    return values.to(torch.bfloat16).view(x.shape), tensor_scale


def _in_blocks(blocks: Tensor, amax: Tensor, reciprocal: Tensor, top: float) -> Tensor:
    """The block-scaled values, fp32 (B, 16), of blocks whose largest magnitude falls on `top`."""
    # mslk does divide by 6: hence a tensor as divisor, which CUDA leaves a division.
    block_scale = (amax / amax.new_full((), top)).mul_(reciprocal).clamp_(max=E4M3_MAX)
    block_scale = block_scale.to(torch.float8_e4m3fn).float()
    # A block scale that rounds to 0 makes its block 0 in the product; any finite factor will do for its codes.
    values = blocks.float().mul_(reciprocal / block_scale.clamp(min=_E4M3_TINY))
    return round_e2m1_(values.clamp_(-E2M1_MAX, E2M1_MAX)).mul_(block_scale)


def nvfp4_weight(codes: Tensor, block_scales: Tensor) -> Tensor:
    """Unpack an NVFP4 weight into the operand of an ordinary GEMM.

    Args:
        codes: uint8 (N, K / 2), contiguous.
        block_scales: float8_e4m3fn (N, K / 16), none of them negative.

    Returns:
        The block-scaled values e2m1 * e4m3, bf16 (N, K), exact; the per-tensor scale is not applied. A block whose
        scale is NaN is NaN.
    """
    rows, width = codes.shape
    # One lookup unpacks and scales: the index is the scale's bits above the byte with its two codes.
    # Without the sign, which a NaN may have, no scale points beyond the table: on a GPU that would end the process.
    scale = (block_scales.view(torch.uint8) & 0x7F).to(torch.int32).mul_(256)
    index = codes.view(rows, -1, BLOCK // 2).to(torch.int32).add_(scale.unsqueeze(-1))
    pairs = torch.index_select(_scaled_pairs(codes.device), 0, index.view(-1))
    return pairs.view(torch.bfloat16).view(rows, width * 2)


@cache
def _scaled_pairs(device: torch.device) -> Tensor:
    """Every product of a packed byte with a block scale: int32 (128 * 256,), each two bf16 values, low nibble first."""
    values = torch.tensor(_E2M1, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)
    scales = torch.arange(128, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    return (scales[:, None, None] * pairs).to(torch.bfloat16).view(torch.int32).flatten()


@torch.library.custom_op("twinframe::nvfp4_weight_only", mutates_args=())
def nvfp4_weight_only(
    x: Tensor, codes: Tensor, block_scales: Tensor, tensor_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """x @ weight.T + bias with bf16 activations, the weight rounded to bf16 as `NVFP4Tensor.dequantize` rounds it.

    Args, returns: as of `nvfp4_linear`.
    """
    weight = nvfp4.dequantize(codes, block_scales, tensor_scale).to(torch.bfloat16)
    return F.linear(x, weight, bias)


@nvfp4_linear.register_fake
@nvfp4_weight_only.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    block_scales: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    four_over_six: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


# ---------------------------------------------------------------------------------------------------------------------
# FP8: e4m3 values, one fp32 scale a row


class EmulatedFP8Tensor(WeightTensor):
    """A row-wise FP8 weight (N, K), logically bf16, that `F.linear` multiplies with dynamically quantized activations.

    Attributes:
        values: float8_e4m3fn (N, K).
        row_scales: float32 (N, 1).
    """

    tensor_data_names = ["values", "row_scales"]  # noqa: RUF012 (torchao copies the list)
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, values: Tensor, row_scales: Tensor) -> EmulatedFP8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16, device=values.device)

    def __init__(self, values: Tensor, row_scales: Tensor) -> None:
        self.values, self.row_scales = values, row_scales

    @classmethod
    def from_weight(cls, weight: Tensor) -> EmulatedFP8Tensor:
        """Quantize a bf16 (N, K) weight row by row.

        Raises:
            ValueError: not bf16 or not 2D.
        """
        if weight.dtype != torch.bfloat16 or weight.dim() != 2:
            raise ValueError(f"FP8 takes bf16 (N, K) weights, not {weight.dtype} {tuple(weight.shape)}.")
        return cls(*fp8_rows(weight))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bf16 (..., K) -> bf16 (..., N)."""
        if reuse.allowed(x):
            return _fp8_product(x, reuse.operand(self), self.row_scales, bias)
        return fp8_linear(x, self.values, self.row_scales, bias)

    def unpack(self) -> Tensor:
        """The e4m3 values in bf16 (N, K), exact; row scales are not applied."""
        return _e4m3_in_bf16(self.values)


@torch.library.custom_op("twinframe::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, values: Tensor, row_scales: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias; scales and bias act in fp32 and the sum is rounded once, as `torch._scaled_mm` does.

    Args:
        x: bf16 (..., K).
        values, row_scales: the weight (N, K), as in `EmulatedFP8Tensor`.
        bias: bf16 (N,) or None.

    Returns:
        bf16 (..., N). Rows of zeros give exactly the bias.
    """
    return _fp8_product(x, _e4m3_in_bf16(values), row_scales, bias)


def _fp8_product(x: Tensor, operand: Tensor, row_scales: Tensor, bias: Tensor | None) -> Tensor:
    """`fp8_linear` by the weight's e4m3 values in bf16."""
    x_values, x_scales = reuse.once(fp8_activation, x)
    result = _gemm(x_values, operand, torch.float32)
    result = result.mul_(x_scales).mul_(row_scales.t())
    if bias is not None:
        result = result.add_(bias)
    return result.to(torch.bfloat16).view(*x.shape[:-1], operand.shape[0])


def fp8_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `fp8_rows` makes of activations, bf16 (M, K), as the operand of an ordinary GEMM.

    Returns:
        The e4m3 values, exact: bf16 (M, K) on a GPU, fp32 on a CPU.
        The scales, fp32 (M, 1).
    """
    if x.is_cuda:
        values, scales = fp8_rows(x)
        return values.to(torch.bfloat16), scales
    # As torchao: the scale is rounded to bf16. A CPU converts to and from e4m3 value by value, which takes longest.
    scales = (_amax(x).clamp(min=FP8_AMAX_FLOOR) / E4M3_MAX).float()
    return _round_e4m3_(x.float().div_(scales).clamp_(-E4M3_MAX, E4M3_MAX)), scales


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 (R, K) -> float8_e4m3fn (R, K) and float32 (R, 1), by the portable quantizer that the native path uses."""
    rows = Float8Tensor.from_hp(
        x, granularity=PerRow(), hp_value_lb=FP8_AMAX_FLOOR, kernel_preference=KernelPreference.TORCH
    )
    return rows.qdata, rows.scale


@fp8_linear.register_fake
def _(x: Tensor, values: Tensor, row_scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


# ---------------------------------------------------------------------------------------------------------------------
# MXFP8: e4m3 values, one power of two for 32 of them


class EmulatedMXFP8Tensor(MXTensor):
    """torchao's MXFP8 weight (N, K) on a CPU: its emulation's bits, in fewer passes where nothing is compiled."""

    unpacked: Tensor | None = None
    """As of `WeightTensor`."""

    @classmethod
    def from_weight(cls, weight: Tensor) -> EmulatedMXFP8Tensor:
        """Quantize a bf16 (N, 32 k) weight as torchao's `MXDynamicActivationMXWeightConfig` does."""
        how = QuantizeTensorToMXKwargs(
            elem_dtype=torch.float8_e4m3fn,
            block_size=MXFP8.block,
            kernel_preference=KernelPreference.EMULATED,
            is_swizzled_scales=True,
            scaling_mode=ScaleCalculationMode.RCEIL,
        )
        made = MXTensor.to_mx(
            weight,
            how.elem_dtype,
            block_size=how.block_size,
            scaling_mode=how.scaling_mode,
            kernel_preference=how.kernel_preference,
            act_quant_kwargs=how,
            is_swizzled_scales=how.is_swizzled_scales,
        )
        return cls.of(made)

    @classmethod
    def of(cls, weight: MXTensor) -> EmulatedMXFP8Tensor:
        """The same weight, sharing its memory."""
        parts = (getattr(weight, name) for name in (*cls.tensor_data_names, *cls.tensor_attribute_names))
        return cls(*parts)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _mxfp8_multiply(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def unpack(self) -> Tensor:
        """bf16 (N, K), with scales."""
        return self.dequantize(torch.bfloat16)


def _mxfp8_multiply(input: Tensor, weight: EmulatedMXFP8Tensor, bias: Tensor | None = None) -> Tensor:
    rceil = weight.act_quant_kwargs.scaling_mode == ScaleCalculationMode.RCEIL
    if not (rceil and input.dtype == torch.bfloat16 and reuse.allowed(input)):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(input, weight, bias)
    values, operand = reuse.once(mxfp8_activation, input), reuse.operand(weight).t()
    result = values @ operand if bias is None else torch.addmm(bias, values, operand)
    return result.view(*input.shape[:-1], operand.shape[1])


def mxfp8_activation(x: Tensor) -> Tensor:
    """Quantize activations to MXFP8 as torchao does by `ScaleCalculationMode.RCEIL`, and dequantize them.

    Args:
        x: bf16 (M, K), K a multiple of 32.

    Returns:
        bf16 (M, K), exact but for what is sub-normal.
    """
    blocks = x.contiguous().view(-1, MXFP8.block)
    amax = _amax(blocks).float()
    scales, _ = _to_mx_rceil(amax, amax, E4M3_MAX)
    index = scales.view(-1).to(torch.int32)
    factor, scale = (torch.index_select(table, 0, index).view(scales.shape) for table in _e8m0())
    values = _round_e4m3_(blocks.float().mul_(factor).clamp_(-E4M3_MAX, E4M3_MAX))
    return values.mul_(scale).to(torch.bfloat16).view(x.shape)


@cache
def _e8m0() -> tuple[Tensor, Tensor]:
    """By the bits of a scale, fp32 (256,): what torchao multiplies by before it rounds, and the scale itself."""
    exponents = torch.arange(256, dtype=torch.float64) - 127
    scale = exponents.exp2()
    factor = (-exponents).exp2()
    factor[0] = 1.0
    scale[255] = factor[255] = torch.nan
    return factor.float(), scale.float()


# ---------------------------------------------------------------------------------------------------------------------
# Common to all


def _amax(x: Tensor) -> Tensor:
    """The largest magnitude in the last dimension, which is kept; bf16. NaN where there is one."""
    # The bit patterns of non-negative bf16 numbers sort like the numbers, and integers reduce three times as fast.
    return (x.view(torch.int16) & _MAGNITUDE).amax(-1, keepdim=True).view(torch.bfloat16)


def _round_e4m3_(y: Tensor) -> Tensor:
    """Round fp32 values within [-448, 448] to the nearest e4m3 value, ties to even, in place, as a cast does: with the
    sign of what becomes 0.

    e4m3 is spaced by 2^-9 below 2^-6, and by an eighth of the power of two above. Adding 1.5 * 2^20 times that power
    puts the unit in the last place of the fp32 sum at exactly that spacing, so the addition does the rounding.
    """
    power = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=_E4M3_LEAST_NORMAL)
    magic = 1.5 * 2.0**20
    rounded = torch.add(y, power, alpha=magic).sub_(power, alpha=magic)
    return torch.copysign(rounded, y, out=y)


def _e4m3_in_bf16(values: Tensor) -> Tensor:
    """e4m3 (N, K) in bf16, exact."""
    if values.is_cuda:
        return values.to(torch.bfloat16)
    # A CPU converts value by value; looking each up takes a third of the time.
    codes = values.contiguous().view(torch.uint8).view(-1).to(torch.int32)
    return torch.index_select(_e4m3_values(), 0, codes).view(values.shape)


@cache
def _e4m3_values() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)


def _gemm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b.T of (M, K), bf16 or on a CPU fp32, and bf16 (N, K), accumulated in fp32 and rounded once, to `dtype` (bf16
    or fp32)."""
    if a.is_cuda:
        # Asked for a bf16 result, cuBLAS might add the parts of a split K in bf16.
        return torch.mm(a, b.t(), out_dtype=torch.float32).to(dtype)
    if dtype == torch.bfloat16:
        return a @ b.t()
    return a.float() @ b.float().t()


@dataclass
class EmulationConfig(AOBaseConfig):
    """`torchao.quantization.quantize_` config that replaces a Linear's bf16 weight by an emulated one."""

    tensor_class: type[EmulatedNVFP4Tensor] | type[EmulatedFP8Tensor] | type[EmulatedMXFP8Tensor]
    packed: nvfp4.Packed | None = None
    """NVFP4 alone: codes, block scales and tensor scale, where they are not `nvfp4.quantize`'s usual ones."""


@register_quantize_module_handler(EmulationConfig)
def _emulate(module: nn.Linear, config: EmulationConfig) -> nn.Linear:
    if config.packed is None:
        weight = config.tensor_class.from_weight(module.weight)
    else:
        weight = EmulatedNVFP4Tensor.from_packed(*config.packed)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


UNPACKED = (EmulatedNVFP4Tensor, EmulatedFP8Tensor, EmulatedMXFP8Tensor)
"""Weights that are unpacked in every product, unless `reuse.keep` has done so."""
