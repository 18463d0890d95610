"""`torch._scaled_mm` as a Blackwell has it, on a CPU, in fp32; and as cards have it that lie.

All native products of FP8, MXFP8 and NVFP4 go through it. `rehearse` makes this process believe that its CPU is such a
card; `make` does so in a device's process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.utils import from_blocked

from engine import catalog
from engine.machine import Machine
from engine.quantization import capability, proof

RTX_5090 = Machine(name="NVIDIA GeForce RTX 5090", kind="cuda", capability=(12, 0))
"""Without mslk, whose quantizer is a kernel for a GPU."""


def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias=None, out_dtype=None, **_) -> Tensor:
    """What `torch._scaled_mm` gives for row-wise FP8, MXFP8 and NVFP4 operands."""
    return _sum(values(a, scale_a), values(b.t(), scale_b), bias, out_dtype)


def values(codes: Tensor, scale: Tensor, read: Callable = from_blocked) -> Tensor:
    """What codes and scales stand for, fp32 (R, K); `read` takes the scales of blocks out of their tiles."""
    if codes.dtype == torch.float4_e2m1fn_x2:
        codes = f4_unpacked_to_f32(unpack_uint4(codes.view(torch.uint8)))
    if scale.dtype == torch.float32:
        return codes.float() * scale.reshape(-1, 1)
    blocks = 16 if scale.dtype == torch.float8_e4m3fn else 32
    scale = read(scale.flatten(), len(codes), codes.shape[1] // blocks).float()
    return codes.float() * scale.repeat_interleave(blocks, 1)


def _sum(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    product = a @ b.t()
    return (product if bias is None else product + bias.float()).to(out_dtype)


def wrong_scales(a, b, scale_a, scale_b, bias=None, out_dtype=None, **_):
    """The activations' are read in another order: row by row where they lie in tiles, or those of the next row."""

    def in_rows(scale: Tensor, rows: int, blocks: int) -> Tensor:
        return scale[: rows * blocks].view(rows, blocks)

    if scale_a.dtype == torch.float32:
        scale_a = scale_a.reshape(-1, 1).roll(1, 0) * (2 if scale_a.numel() == 1 else 1)
    return _sum(values(a, scale_a, in_rows), values(b.t(), scale_b), bias, out_dtype)


def zeros(*args, **kwargs):
    return torch.zeros_like(multiply(*args, **kwargs))


def not_numbers(*args, **kwargs):
    """A single one."""
    made = multiply(*args, **kwargs)
    made[-1, -1] = torch.nan
    return made


def swapped_blocks(a, b, scale_a, scale_b, bias=None, out_dtype=None, **_):
    """The first two blocks of the activations' values."""
    left = values(a, scale_a)
    left = torch.cat([left[:, 32:64], left[:, :32], left[:, 64:]], 1)
    return _sum(left, values(b.t(), scale_b), bias, out_dtype)


def hang(*args, **kwargs):
    threading.Event().wait()


def refuse(*args, **kwargs):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with TORCH_USE.")


LIES = {
    "wrong scales": wrong_scales,
    "zeros": zeros,
    "not numbers": not_numbers,
    "swapped blocks": swapped_blocks,
    "hang": hang,
}


MODEL = "tiny-flux.1-dev"


def rehearse(multiply: Callable, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The CPU is a card that multiplies so, with a tiny model whose checkpoint lies in `folder`."""
    from tests.support import tiny  # brings diffusers

    patch.setattr(capability, "detect", lambda device: RTX_5090)
    patch.setattr(torch, "_scaled_mm", multiply)
    patch.setattr(catalog, "MODELS", MappingProxyType({MODEL: tiny.spec("flux.1-dev", folder)}))


def make(folder: str, *further: object) -> object:
    """A device whose native products hang."""
    from engine.runtime import studio
    from engine.runtime.device import Device

    rehearse(hang, Path(folder), pytest.MonkeyPatch())
    proof.DEADLINE_SECONDS, studio.RULER_PROMPTS = 0.5, 1
    return Device("cpu", *further)
