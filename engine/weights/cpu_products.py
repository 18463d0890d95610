"""bf16 products on a CPU without instructions for them, in fp32 and rounded once.

There PyTorch multiplies bf16 numbers one by one. On a CPU with AVX2 alone a layer took 8 to 9 times as long as in fp32,
a convolution 13 times in channels_last and 286 times otherwise. fp32 holds every product of two bf16 numbers exactly,
and sums of layers and convolutions are kept in fp32 either way, so only their order differs: one value in ten thousand
is rounded to the other side.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "mm.out", "addmm.out", "bmm.out", "baddbmm.out")
"""PyTorch's operators that multiply: layers and convolutions end in them, compiled ones in those with `out`."""


def are_slow() -> bool:
    """Whether this CPU has no instructions for bf16 products that PyTorch uses (AVX-512, AMX, or ARM's BF16)."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiply_in_fp32_where_bf16_is_slow() -> None:
    """From now on, in this process, bf16 products on the CPU are computed in fp32 where that is faster. Products of
    other types, and those on a GPU, are computed as before."""
    if are_slow():
        _overrides()


@cache
def _overrides() -> torch.library.Library:
    """Held as long as the process lives: kernels of a library that is let go are taken back."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
        for name in PRODUCTS:
            library.impl(name, _in_fp32(name), "CPU", with_keyset=True)
    return library


def _in_fp32(name: str) -> Any:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    kernel = torch.library.get_kernel(operator, "CPU")

    def product(keys: torch.DispatchKeySet, *args: Any, out: Tensor | None = None, **options: Any) -> Tensor:
        into = {} if out is None else {"out": out}
        if not any(_is_bf16(value) for value in args):
            made: Tensor = kernel.call_boxed(keys, *args, **into, **options)
            return made
        widened = [value.float() if _is_bf16(value) else value for value in args]
        if out is None:
            made = kernel.call_boxed(keys, *widened, **options)
            return made.to(torch.bfloat16)
        return out.copy_(kernel.call_boxed(keys, *widened, out=out.float(), **options))

    return product


def _is_bf16(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bfloat16
