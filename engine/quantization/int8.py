"""INT8 weights and activations: whole numbers from -127 to 127, one fp32 scale a row, symmetric about zero.

A weight is quantized by output channel, an activation anew in every call by its rows. Sums of products are exact in
int32, so all devices agree on them to the bit; what is rounded is said in `linear`. torchao's
`Int8DynamicActivationInt8WeightConfig` is another arithmetic: it scales by 127.5, uses -128, rounds to bf16 between
its two scales, and multiplies in int32 on a CPU.

The quantizer is written in plain operations, so that a compiled block fuses it and shares it among the layers that
take one activation; only the product is an operator. Knows no device's capabilities but a CPU's instructions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from engine.quantization import reuse
from engine.quantization.weight_tensor import WeightTensor

LARGEST = 127
"""Magnitude of a code; -128 has no counterpart and is not used."""
LEAST_SCALE = 2.0**-120
"""Of a row; its reciprocal is finite. A row of zeros gets it, and stays zero."""
CUDA_ROWS = 17
"""Rows that cuBLAS's INT8 product takes at least (`torch._int_mm`)."""
EXACT = 2**24 // (LARGEST * (LARGEST + 1))
"""Products of two codes, one of which may be torchao's -128, whose sum is exact in fp32 in any order: 2^24 is the first
that has no odd neighbour."""


class Int8Tensor(WeightTensor):
    """An INT8 weight (N, K), logically bf16, that `F.linear` multiplies with dynamically quantized activations.

    Attributes:
        codes: int8 (N, K), from -127 to 127; torchao's, in a stored checkpoint, from -128.
        row_scales: float32 (N, 1).
        native: as of `multiply`.
    """

    tensor_data_names = ["codes", "row_scales"]  # noqa: RUF012 (torchao copies the list)
    tensor_attribute_names: list[str] = ["native"]  # noqa: RUF012

    def __new__(cls, codes: Tensor, row_scales: Tensor, native: bool = True) -> Int8Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)

    def __init__(self, codes: Tensor, row_scales: Tensor, native: bool = True) -> None:
        self.codes, self.row_scales, self.native = codes, row_scales, native

    @classmethod
    def from_weight(cls, weight: Tensor, native: bool = True) -> Int8Tensor:
        """Quantize a bf16 (N, K) weight by `quantize_rows`.

        Raises:
            ValueError: not bf16 or not 2D.
        """
        if weight.dtype != torch.bfloat16 or weight.dim() != 2:
            raise ValueError(f"INT8 takes bf16 (N, K) weights, not {weight.dtype} {tuple(weight.shape)}.")
        return cls(*quantize_rows(weight), native)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bf16 (..., K) -> bf16 (..., N)."""
        return linear(x, self.codes, self.row_scales, bias, self.native)


def linear(x: Tensor, codes: Tensor, row_scales: Tensor, bias: Tensor | None, native: bool = True) -> Tensor:
    """x @ weight.T + bias. The exact sum of products is rounded to fp32, times the activation's scale, times the
    weight's, plus the bias, each rounded in fp32; the result is rounded to bf16 once.

    Args:
        x: bf16 (..., K).
        codes, row_scales: the weight (N, K), as in `Int8Tensor`.
        bias: bf16 (N,) or None.
        native: as of `multiply`.

    Returns:
        bf16 (..., N). Rows of zeros give exactly the bias; rows with what is no number give none.
    """
    x_codes, x_scales = reuse.once(quantize_rows, x)
    result = multiply(x_codes, codes, native).float() * x_scales * row_scales.t()
    if bias is not None:
        result = result + bias
    return result.to(torch.bfloat16).view(*x.shape[:-1], codes.shape[0])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize by rows: scale = amax * (1 / 127), codes = x * (1 / scale) to the nearest, ties to even.

    Both are multiplications because CUDA makes one of a division by a constant: so all devices make the same bits.

    Args:
        x: bf16 (R, K).

    Returns:
        Codes, int8 (R, K), and scales, fp32 (R, 1). The scale of a row with an infinity is infinite, and that of one
        with NaN is NaN.
    """
    amax = x.abs().amax(-1, keepdim=True).float()
    scales = (amax * (1 / LARGEST)).clamp(min=LEAST_SCALE)
    codes = (x.float() * scales.reciprocal()).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return codes, scales


@torch.library.custom_op("twinframe::int8_multiply", mutates_args=())
def multiply(a: Tensor, b: Tensor, native: bool = True) -> Tensor:
    """a @ b.T of int8 (M, K) within -127 to 127 and (N, K), exact: int32 (M, N).

    K is below 2^17, beyond which int32 could overflow; on CUDA, K and N are multiples of 8.

    Args:
        native: by the device's own INT8 product where it has one, else in fp32.
    """
    rows, width = a.shape
    if native and a.is_cuda:
        if rows < CUDA_ROWS:
            return torch._int_mm(F.pad(a, (0, 0, 0, CUDA_ROWS - rows)), b.t())[:rows]
        return torch._int_mm(a, b.t())
    # PyTorch 2.11's leaves the result unwritten where K is 1, on CPUs with AMX.
    if native and width > 1 and cpu_has_int8():
        return torch._int_mm(a, b.t())
    # Without such instructions `torch._int_mm` takes three times as long as the bf16 product; fp32 takes an eighth.
    total = torch.zeros((rows, b.shape[0]), dtype=torch.int32, device=a.device)
    for begin in range(0, width, EXACT):
        part = slice(begin, begin + EXACT)
        total += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return total


@multiply.register_fake
def _(a: Tensor, b: Tensor, native: bool = True) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@cache
def cpu_has_int8(flags: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies int8 into int32 by instructions that PyTorch uses: VNNI or AMX.

    Args:
        flags: where Linux lists them; PyTorch does not tell of VNNI without AVX-512.
    """
    if torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported():
        return True
    try:
        return "avx_vnni" in flags.read_text().split()
    except OSError:
        return False


@dataclass
class Int8Config(AOBaseConfig):
    """`torchao.quantization.quantize_` config that replaces a Linear's bf16 weight by an `Int8Tensor`."""

    native: bool = True
    """As of `multiply`."""


@register_quantize_module_handler(Int8Config)
def _to_int8(module: nn.Linear, config: Int8Config) -> nn.Linear:
    module.weight = nn.Parameter(Int8Tensor.from_weight(module.weight, config.native), requires_grad=False)
    return module
