"""What lowers the error of a quantized denoiser besides wider formats: a low-rank branch, and protected steps.

Better block scales, the third remedy, are part of the format (engine/nvfp4.py). Static activation scales, which
torchao offers for speed, are none: NVFP4's per-tensor scale only sets where the e4m3 grid of the block scales ends, so
a calibrated one changes which block scales round up or down, and values above the calibrated maximum are cut off.

Knows nothing of recipes, which say where a remedy is used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def add_low_rank(layer: nn.Linear, error: Tensor, rank: int) -> LowRankLinear:
    """Turn a layer into a `LowRankLinear` in place: whoever holds the layer, such as its parent, still does.

    Args:
        layer: already quantized.
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
    layer.__class__ = LowRankLinear
    layer.down = nn.Parameter(down.to(torch.bfloat16).contiguous(), requires_grad=False)
    layer.up = nn.Parameter(up.to(torch.bfloat16).contiguous(), requires_grad=False)
    return layer


class ProtectedSteps:
    """Runs the first and last steps of each picture with bf16 weights, which must be in memory too.

    A context around pipeline calls of `steps` steps each. A step is told by the denoiser's `timestep`, since guidance
    calls it twice a step.
    """

    def __init__(self, transformer: nn.Module, exact: Mapping[str, Tensor], steps: int, first: int, last: int):
        """
        Args:
            transformer: quantized.
            exact: layer name -> its bf16 weight.
        """
        self._layers = {name: transformer.get_submodule(name) for name in exact}
        self._weights = {True: exact, False: {name: layer.weight for name, layer in self._layers.items()}}
        self._steps, self._first, self._last = steps, first, last
        self._transformer, self._step, self._time = transformer, -1, None

    def __enter__(self) -> ProtectedSteps:
        self._hook = self._transformer.register_forward_pre_hook(self._enter, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._use(False)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        time = kwargs["timestep"].flatten()[0].item()
        if time != self._time:
            self._step, self._time = (self._step + 1) % self._steps, time
        self._use(self._step < self._first or self._step >= self._steps - self._last)

    def _use(self, exact: bool) -> None:
        for name, layer in self._layers.items():
            weight = self._weights[exact][name]
            if layer.weight is not weight:
                layer.weight = weight
