"""NVFP4 weights as bits: e2m1 codes, one e4m3 scale a block of 16, one fp32 scale a tensor; native or emulated alike.

Block scales come by torchao's rule, so that the largest value of a block just fits, are the better of two, or are
searched for the least squared error. All fill the same format: a searched weight takes no more memory, time or support
than another.

Knows nothing of activations, devices or tensors with behaviour: engine/quantization/emulation.py and
engine/quantization/capability.py do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked, pack_uint4, unpack_uint4

Packed = tuple[Tensor, Tensor, Tensor]
"""Codes, block scales and tensor scale, as of `quantize`."""
BLOCK = 16
"""Elements of K that share one block scale."""
E2M1_MAX = 6.0
E4M3_MAX = 448.0
FOUR, ROOM = 4.0, 256.0
"""Four over six: the value of e2m1 that a block's largest may fall on instead of 6, which makes its scale half as large
again; and the largest block scale by 6, since half as much again, 384, is an e4m3 (Cook et al. 2025)."""
E4M3_LEAST_NORMAL = 2.0**-6
E4M3_MAX_BITS = 0x7E
"""Bit pattern of 448; the only ones above it are NaN and what has a sign."""
_NORMAL_BITS = (0x08, E4M3_MAX_BITS)
"""Of the least and the greatest normal e4m3, 2^-6 and 448; between them bit patterns sort like the numbers."""
SEARCHED_STEPS = range(-4, 7)
"""e4m3 neighbours of the usual block scale that are tried, 8 to an octave: from 0.7 of it, where the largest value is
clipped, to 1.7, where it falls on a finer part of the grid. More steps find next to nothing on the miniature."""
LEAST_SCALE = 2.0**-118
"""Of a tensor; its reciprocal divided by the least e4m3, 2^-9, is a finite fp32 yet."""


def quantize(weight: Tensor, searched: bool = False, four_over_six: bool = False) -> Packed:
    """Quantize a bf16 (N, K) weight; without a search, to the bits that torchao's config makes of it on a GPU.

    The usual algorithm is torchao 0.18's `nvfp4_quantize`: block scale = e4m3((block amax / 6) / tensor scale), not
    below 2^-6, then e2m1(x * ((1 / tensor scale) / block scale)). Its divisions by constants are multiplications
    with the reciprocal on CUDA, and so they are here, on any device.

    Args:
        searched: block scales by `search`.
        four_over_six: the tensor scale leaves room for the larger scale of a block; without `searched`, block scales
            are the better of two.

    Returns:
        codes: uint8 (N, K / 2), two e2m1 values a byte, the even one in the low nibble.
        block_scales: float8_e4m3fn (N, K / 16).
        tensor_scale: float32 ().

    Raises:
        ValueError: not bf16, not 2D, or a dimension that is not a multiple of 16.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2 or weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
        raise ValueError(f"NVFP4 takes bf16 (16 n, 16 k) weights, not {weight.dtype} {tuple(weight.shape)}.")
    blocks = weight.float().view(weight.shape[0], -1, BLOCK)
    amax = blocks.abs().amax(-1)
    tensor_scale = scale_of_tensor(amax.max(), four_over_six)
    block_scales = scales_of_blocks(amax, tensor_scale)
    if searched:
        block_scales = search(blocks, block_scales, tensor_scale)
    elif four_over_six:
        larger = scales_of_blocks(amax * (E2M1_MAX / FOUR), tensor_scale)
        block_scales = best(blocks, (block_scales, larger), tensor_scale)
    factors = tensor_scale.reciprocal() / block_scales.float()
    values = blocks.mul_(factors.unsqueeze(-1)).clamp_(-E2M1_MAX, E2M1_MAX)
    codes = pack_uint4(f32_to_f4_unpacked(values.view(weight.shape)))
    return codes, block_scales, tensor_scale


def scale_of_tensor(amax: Tensor, four_over_six: bool = False) -> Tensor:
    """The tensor scale, fp32 (), by the largest magnitude; for four over six by Cook et al.'s rule, so that the block
    with it may have a scale that is half as large again."""
    return usable(amax * (1 / ((ROOM if four_over_six else E4M3_MAX) * E2M1_MAX)))


def usable(scale: Tensor) -> Tensor:
    """A tensor scale whose reciprocal, over any block scale, is finite; 1 where it is not, and all codes are zero then.

    Scale 0, and one so small that its reciprocal is infinite, would make NaN of zeros.
    """
    return torch.where(scale < LEAST_SCALE, 1.0, scale)


def scales_of_blocks(amax: Tensor, tensor_scale: Tensor) -> Tensor:
    """The usual block scales, float8_e4m3fn, by the largest magnitudes of the blocks, fp32 of the same shape."""
    return (amax * (1 / E2M1_MAX) / tensor_scale).clamp_(E4M3_LEAST_NORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(codes: Tensor, block_scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """What `quantize` stored, in fp32 (N, K)."""
    values = f4_unpacked_to_f32(unpack_uint4(codes))
    scales = block_scales.float() * tensor_scale
    return (values.view(*scales.shape, BLOCK) * scales.unsqueeze(-1)).view(values.shape)


def round_e2m1_(y: Tensor) -> Tensor:
    """Round fp32 values within [-6, 6] to the nearest e2m1 value, ties to even, in place.

    e2m1 is spaced by 0.5 below 2, by 1 from 2 to 4 and by 2 above. Adding 1.5 * 2^22 * p, where p is 1, 2 or 4, puts
    the unit in the last place of the fp32 sum at exactly that spacing, so the addition does the rounding.
    """
    power = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0)  # 2 ^ exponent
    magic = 1.5 * 2.0**22
    return y.add_(power, alpha=magic).sub_(power, alpha=magic)


def search(blocks: Tensor, usual: Tensor, tensor_scale: Tensor) -> Tensor:
    """The block scales of least squared error among the neighbours of the usual ones, which win a tie.

    Choosing between two grids is Cook et al. 2025 ("Four Over Six"); here are eleven.

    Args:
        blocks: fp32 (N, K / 16, 16).
        usual: float8_e4m3fn (N, K / 16), normal and positive.
    """
    bits = usual.view(torch.uint8).to(torch.int16)
    steps = sorted(SEARCHED_STEPS, key=abs)
    tried = ((bits + step).clamp_(*_NORMAL_BITS).to(torch.uint8).view(torch.float8_e4m3fn) for step in steps)
    return best(blocks, tried, tensor_scale)


def best(blocks: Tensor, tried: Iterable[Tensor], tensor_scale: Tensor) -> Tensor:
    """The block scales of least squared error; of equal ones the first.

    Args:
        blocks: fp32 (N, K / 16, 16).
        tried: each float8_e4m3fn (N, K / 16), normal and positive.
    """
    found: Tensor | None = None
    least: Tensor | None = None
    for scales in tried:
        scale = scales.float().unsqueeze(-1)
        values = (blocks * (tensor_scale.reciprocal() / scale)).clamp_(-E2M1_MAX, E2M1_MAX)
        error = (round_e2m1_(values).mul_(scale * tensor_scale) - blocks).square_().sum(-1)
        if found is None or least is None:
            found, least = scales, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        found = torch.where(better, scales.view(torch.uint8), found.view(torch.uint8)).view(torch.float8_e4m3fn)
    return found
