"""What the engine's own quantized weights share: they are moved and pinned like tensors, and `F.linear` asks them.

Knows no format: engine/quantization/emulation.py and engine/quantization/int8.py do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor


class WeightTensor(TorchAOBaseTensor):
    """A quantized weight (N, K), logically bf16."""

    unpacked: Tensor | None = None
    """bf16 (N, K), `unpack()`, where the emulation on a CPU keeps it; it is not moved with the weight."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bf16 (..., K) -> bf16 (..., N), in place of `F.linear`."""
        raise NotImplementedError

    def unpack(self) -> Tensor:
        """The operand of an ordinary GEMM that emulates the format's."""
        raise NotImplementedError


@WeightTensor.implements(torch.ops.aten.is_pinned.default)
def _is_pinned(func: Callable[..., Any], types: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(getattr(args[0], name).is_pinned() for name in args[0].tensor_data_names)


@WeightTensor.implements(torch.ops.aten._pin_memory.default)
def _pin_memory(
    func: Callable[..., Any], types: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    return args[0]._apply_fn_to_data(lambda data: data.pin_memory())


@WeightTensor.implements_torch_function(F.linear)
def _linear(func: Callable[..., Any], types: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # F.linear itself is caught because, without gradients, aten.linear is decomposed before subclasses see it.
    return _multiply(*args, **kwargs)


def _multiply(input: Tensor, weight: WeightTensor, bias: Tensor | None = None) -> Tensor:
    if input.dtype != torch.bfloat16:
        raise TypeError(f"Quantized layers take bf16 activations, not {input.dtype}.")
    return weight.linear(input, bias)
