"""What lowers the error of a quantized denoiser besides wider formats: a low-rank branch, and weight-only steps.

Better block scales are part of the format (engine/quantization/nvfp4.py), and rotations stand alone
(engine/quantization/rotation.py). Static activation scales,
which torchao offers for speed, are none: NVFP4's per-tensor scale only sets where the e4m3 grid of the block scales
ends, so a calibrated one changes which block scales round up or down, and values above the calibrated maximum are cut
off.

Knows nothing of recipes, which say where a remedy is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from engine.quantization.emulation import EmulatedNVFP4Tensor
from engine.quantization.rotation import RotatedLinear

_WEIGHTS = (NVFP4Tensor, EmulatedNVFP4Tensor)
"""Both multiply plain activations while their `act_quant_kwargs` is None."""


class LowRankLinear(nn.Linear):
    """A quantized Linear with a bf16 branch beside it: y = x W'^T + bias + (x down^T) up^T.

    The idea of SVDQuant (Li et al. 2024), here for what quantization left over of the weight, without smoothing.

    Attributes:
        down: bf16 (rank, in_features).
        up: bf16 (out_features, rank).
    """

    down: nn.Parameter
    up: nn.Parameter

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """bf16 (..., in_features) -> bf16 (..., out_features)."""
        return F.linear(input, self.weight, self.bias) + F.linear(F.linear(input, self.down), self.up)


class RotatedLowRankLinear(RotatedLinear, LowRankLinear):
    """Both: the branch takes rotated inputs too."""


def add_low_rank(layer: nn.Linear, error: Tensor, rank: int) -> LowRankLinear:
    """Turn a layer into a `LowRankLinear` in place: whoever holds the layer, such as its parent, still does.

    Args:
        layer: already quantized, and rotated if it is to be.
        error: fp32 (out_features, in_features), the exact weight less the quantized one.
        rank: of the branch, which is the best of that rank for the error (Eckart and Young 1936).

    Raises:
        ValueError: the rank is not between 1 and the smaller dimension.
    """
    if not 1 <= rank <= min(error.shape):
        raise ValueError(f"A branch of rank {rank} does not fit a layer of {tuple(error.shape)}.")
    # The eigenvectors of E E^T are E's left singular vectors; eigh is faster than an SVD and takes no random start.
    tall = error.shape[0] >= error.shape[1]
    gram = error.t() @ error if tall else error @ error.t()
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    up, down = (error @ vectors, vectors.t()) if tall else (vectors, vectors.t() @ error)
    return attach_branch(layer, down.to(torch.bfloat16).contiguous(), up.to(torch.bfloat16).contiguous())


def attach_branch(layer: nn.Linear, down: Tensor, up: Tensor) -> LowRankLinear:
    """The same of a branch that is there already, bf16 (rank, in_features) and (out_features, rank)."""
    layer.__class__ = RotatedLowRankLinear if isinstance(layer, RotatedLinear) else LowRankLinear
    layer.down, layer.up = nn.Parameter(down, requires_grad=False), nn.Parameter(up, requires_grad=False)
    return layer


class WeightOnlySteps:
    """Leaves activations in bf16 in the first and last steps of a pipeline call: what decides the layout, and the last
    touches, are then free of the error that changes with every step. NVFP4 weights stay as they are stored, and are
    unpacked for a bf16 product. Other precisions go on as they are.

    A context around one call, told of the end of each step.

    Args:
        transformer: quantized.
        steps: how many at the beginning and at the end.
        total: steps of the call.
        changed: is told with every change whether activations stay bf16 from now on.
    """

    def __init__(
        self,
        transformer: nn.Module,
        steps: tuple[int, int],
        total: int,
        changed: Callable[[bool], None] = lambda weight_only: None,
    ):
        (self._first, self._last), self._total, self._changed = steps, total, changed
        weights = [layer.weight for layer in transformer.modules() if isinstance(layer, nn.Linear)]
        self._quantizers = [(weight, weight.act_quant_kwargs) for weight in weights if isinstance(weight, _WEIGHTS)]

    def __enter__(self) -> WeightOnlySteps:
        self.ended(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.use(False)

    def ended(self, steps: int) -> None:
        """So many steps have ended."""
        self.use(steps < self._first or steps >= self._total - self._last)

    def use(self, weight_only: bool) -> None:
        """Leave activations in bf16 from now on, or quantize them again."""
        for weight, quantizer in self._quantizers:
            weight.act_quant_kwargs = None if weight_only else quantizer
        self._changed(weight_only)
