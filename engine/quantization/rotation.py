"""A layer's inputs rotated block by block before they are quantized, and its weight likewise, once.

A Hadamard matrix mixes the values of a block, so that a large one is spread over all of them and the scale that they
share fits each (QuaRot, Ashkboos et al. 2024). x H (W H)^T is x W^T where H H^T = 1: in real arithmetic a rotation
changes nothing. Here inputs and weights are rounded to bf16 once after it.

Knows nothing of formats and recipes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


def block(width: int, most: int) -> int:
    """The size of the blocks in which a row of `width` values is rotated: the largest power of two that divides it,
    and is at most `most`, a power of two itself."""
    return min(width & -width, most)


@torch.library.custom_op("twinframe::rotate", mutates_args=())
def rotate(x: Tensor, size: int) -> Tensor:
    """Rotate each block of `size` values of a row, and multiply by a power of two: by 1 if the size is an even power
    of two, else by 2^-0.5 over what a rotation does, so that all factors are exact; `rotated` makes up for it.

    Args:
        x: bf16 (..., K), K a multiple of the size.

    Returns:
        bf16 (..., K).
    """
    return _turned(x, size, -(-_power(size) // 2))


@rotate.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape)


def rotated(weight: Tensor, size: int) -> Tensor:
    """The weight, bf16 (N, K), that takes inputs which `rotate` has turned."""
    return _turned(weight, size, _power(size) // 2)


class RotatedLinear(nn.Linear):
    """A Linear whose weight is rotated, and which rotates its inputs.

    Attributes:
        rotation: size of the blocks.
    """

    rotation: int

    def forward(self, input: Tensor) -> Tensor:
        """bf16 (..., in_features) -> bf16 (..., out_features)."""
        return super().forward(rotate(input, self.rotation))


def add(layer: nn.Linear, size: int) -> RotatedLinear:
    """Turn a bf16 layer into a `RotatedLinear` in place: whoever holds the layer, such as its parent, still does."""
    layer.weight = nn.Parameter(rotated(layer.weight, size), requires_grad=False)
    return turn_inputs(layer, size)


def turn_inputs(layer: nn.Linear, size: int) -> RotatedLinear:
    """The same of a layer whose weight is rotated already."""
    layer.__class__ = RotatedLinear
    layer.rotation = size
    return layer


def _power(size: int) -> int:
    return size.bit_length() - 1


def _turned(x: Tensor, size: int, halvings: int) -> Tensor:
    """Times the matrix of +-1 and 2^-halvings, summed in fp32, rounded to bf16 once."""
    # A CPU multiplies fp32 faster than bf16, and many add up bf16 in bf16.
    dtype = torch.bfloat16 if x.is_cuda else torch.float32
    matrix = _hadamard(size, halvings, dtype, x.device)
    return (x.reshape(-1, size).to(dtype) @ matrix).to(torch.bfloat16).view(x.shape)


@cache
def _hadamard(size: int, halvings: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of +-1 times 2^-halvings, (size, size); symmetric."""
    matrix = torch.full((1, 1), 2.0**-halvings, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
