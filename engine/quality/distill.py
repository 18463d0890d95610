"""NVFP4 weights whose rounding is learnt: the quantized denoiser is trained to say what the bf16 one says.

Calibration (engine/quantization/gptq.py) rounds one layer after the other, for exact inputs. Here all layers learn
together, with activations quantized as they are when the denoiser runs, so weights also make up for what activations
and other layers lose: quantization-aware distillation, with the straight-through estimator of Bengio et al. 2013. Block
scales stay, and so do biases, norms and all layers in other formats. What comes out fills the same format: no more
bytes, no other kernel, no time.

Knows nothing of recipe files and of scores: assets/figures/frontier.py does.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, pack_uint4

from engine.quality.lab import Bench
from engine.quantization import nvfp4
from engine.quantization.emulation import fp8_rows, nvfp4_activation
from engine.quantization.nvfp4 import BLOCK, E2M1_MAX, Packed, round_e2m1_
from engine.quantization.roles import OF_PICTURES, role_of
from engine.runtime.pipeline import call

RATE = 0.005
"""Adam's step at most, in units of e2m1 before the block scale, where neighbouring values are 0.5 to 2 apart."""
WARM = 0.05
"""Of the time, over which the step rises from nothing."""
SOUND = 0.25
"""What an error of a clip's sound counts, of one of its picture."""
BETAS = (0.9, 0.95)
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = (*(-value for value in reversed(_HALF[1:])), *_HALF)
_INSIDE = 1e-3
"""How far from the border between two e2m1 values is within one of them."""
_TOWARDS = 0.6
"""Of the way from the stored value to the exact one, where a weight starts. On the border itself, where calibration
puts many, Adam's first steps would round them back whatever their gradient, and undo the calibration."""

_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""Kernels with gradients. cuDNN's, which PyTorch takes first on Hopper, gave NaN and invalid addresses for gradients of
mini-flux's attention on an H200 (PyTorch 2.11)."""

Call = tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]
"""Arguments of a denoiser, and what the bf16 one said."""


def calls(bench: Bench, prompts: Sequence[str], seeds: Sequence[int]) -> list[Call]:
    """What the bf16 denoiser is asked, and says, in all steps of pictures of the prompts, all made at once from the
    noise of one seed, for each seed."""
    held: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Sequence[Tensor]) -> None:
        held.append((args, dict(kwargs), tuple(part for part in output if isinstance(part, Tensor))))

    hook = bench.exact.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            for seed in seeds:
                call(bench.pipeline(bench.exact), bench.spec, bench.request(prompts[0]), seed, prompts=prompts)
    finally:
        hook.remove()
    return held


def loss(denoiser: nn.Module, one: Call) -> Tensor:
    """Squared error of what it says, of the square of what bf16 says; of sound `SOUND` times that is added; fp32 ()."""
    args, kwargs, exact = one
    said = [part for part in denoiser(*args, **kwargs) if isinstance(part, Tensor)]
    parts = [
        F.mse_loss(mine.float(), its.float()) / its.float().square().mean()
        for mine, its in zip(said, exact, strict=True)
    ]
    return parts[0] + SOUND * sum(parts[1:], torch.zeros_like(parts[0]))


def error(denoiser: nn.Module, some: Sequence[Call]) -> float:
    """The mean of `loss`."""
    with torch.no_grad():
        return torch.stack([loss(denoiser, one) for one in some]).mean().item()


class _Activations(torch.autograd.Function):
    """Activations as the quantized layer multiplies them; gradients as if they were exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, four_over_six: bool) -> Tensor:
        values, scale = nvfp4_activation(x.reshape(-1, x.shape[-1]).contiguous(), four_over_six)
        return (values * scale).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Rounded(torch.autograd.Function):
    """e2m1 values of weights; gradients as if they were not rounded."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        return round_e2m1_(weights.clamp(-E2M1_MAX, E2M1_MAX))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Last:
    """The activations that were quantized last, which the layers that take the same ones need not quantize again."""

    def __init__(self, four_over_six: bool):
        self.four_over_six = four_over_six
        self._x: Tensor | None = None
        self._quantized: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._quantized is None or x is not self._x:
            self._x, self._quantized = x, _Activations.apply(x, self.four_over_six)
        return self._quantized

    def forget(self) -> None:
        self._x = self._quantized = None


class LearningLinear(nn.Linear):
    """A Linear that multiplies as its NVFP4 weight would, and whose weight has gradients.

    Attributes:
        latent: fp32 (out_features, in_features), the weight over its scales before it is rounded to e2m1.
        scales: fp32 (out_features, in_features / 16), block scales times tensor scale.
        activations: quantizes inputs; None where they stay bf16.
    """

    latent: nn.Parameter
    scales: Tensor
    activations: _Last | None

    def forward(self, input: Tensor) -> Tensor:
        """bf16 (..., in_features) -> bf16 (..., out_features)."""
        values = _Rounded.apply(self.latent).view(*self.scales.shape, BLOCK)
        weight = (values * self.scales.unsqueeze(-1)).view(self.latent.shape).to(torch.bfloat16)
        return F.linear(self.activations(input) if self.activations else input, weight, self.bias)


def start(exact: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Where a weight starts: towards the exact one, but so that it rounds to what is stored. Latent and scales, as of
    `LearningLinear`."""
    codes, block_scales, tensor_scale = packed
    scales = block_scales.float() * tensor_scale
    wide = scales.repeat_interleave(BLOCK, 1)
    levels = torch.tensor(_LEVELS, device=exact.device)
    middles = (levels[1:] + levels[:-1]) / 2
    edge = levels.new_tensor([E2M1_MAX])
    stored = nvfp4.dequantize(codes, block_scales, tensor_scale) / wide
    index = torch.bucketize(stored, middles)
    low, high = torch.cat((-edge, middles))[index], torch.cat((middles, edge))[index]
    nearest = (exact.float() / wide).clamp(low + _INSIDE, high - _INSIDE)
    return stored + _TOWARDS * (nearest - stored), scales


class Student:
    """The quantized denoiser while it learns.

    Args:
        packed: NVFP4 weights, as they are at the start; those learn that multiply a row a token.
        plain: names of layers whose weight is in FP8; it stays, and activations of it are not quantized here.
        alone: those of layers that learn, but whose activations stay bf16.
        four_over_six: as of `nvfp4_activation`.
    """

    def __init__(
        self,
        bench: Bench,
        packed: Mapping[str, Packed],
        plain: Sequence[str],
        alone: Sequence[str] = (),
        four_over_six: bool = False,
    ):
        self.denoiser: nn.Module = copy.deepcopy(bench.exact).requires_grad_(False)
        self.activations = _Last(four_over_six)
        self.packed = dict(packed)
        self.layers: dict[str, LearningLinear] = {}
        for name in plain:
            layer = self.denoiser.get_submodule(name)
            values, scales = fp8_rows(layer.weight.data)
            layer.weight.data = (values.float() * scales).to(torch.bfloat16)
        for name, one in packed.items():
            layer = self.denoiser.get_submodule(name)
            latent, scales = start(layer.weight.data, one)
            layer.__class__ = LearningLinear
            # A layer with a row a picture would learn the few rows by heart.
            layer.latent, layer.scales = nn.Parameter(latent, role_of(name) not in OF_PICTURES), scales
            layer.activations = None if name in alone else self.activations
            self.layers[name] = layer

    def loss(self, one: Call) -> Tensor:
        """As of `loss`."""
        found = loss(self.denoiser, one)
        self.activations.forget()
        return found

    def weights(self) -> dict[str, Packed]:
        """The weights as they are now."""
        found = {}
        for name, layer in self.layers.items():
            _, block_scales, tensor_scale = self.packed[name]
            values = round_e2m1_(layer.latent.detach().clamp(-E2M1_MAX, E2M1_MAX))
            found[name] = pack_uint4(f32_to_f4_unpacked(values)), block_scales, tensor_scale
        return found


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How learning goes."""

    seconds: float
    """Of the clock: after its rise the step falls to nothing over them, as half a cosine."""
    most: int = 100_000
    """Iterations at most, over which the step falls as well."""
    rate: float = RATE
    seed: int = 0
    """Of the order of calls."""


def learn(student: Student, some: Sequence[Call], lesson: Lesson, say: Callable[[str], None]) -> int:
    """Adam on one call at a time, in a random order; returns the number of iterations."""
    latents = [layer.latent for layer in student.layers.values() if layer.latent.requires_grad]
    fused = latents[0].is_cuda
    adam = torch.optim.Adam(latents, lr=lesson.rate, betas=BETAS, fused=fused)
    order, began, done = random.Random(lesson.seed), time.monotonic(), 0
    waiting: list[Call] = []
    while True:
        # The clock is that of launched work: what a GPU has yet to do is waited for now and then.
        if fused and done % 20 == 0:
            torch.cuda.synchronize()
        spent = max((time.monotonic() - began) / lesson.seconds, done / lesson.most)
        if spent >= 1:
            return done
        for group in adam.param_groups:
            group["lr"] = lesson.rate * min(spent / WARM, 0.5 * (1 + math.cos(math.pi * spent)))
        if not waiting:
            waiting = order.sample(list(some), len(some))
        with torch.enable_grad(), sdpa_kernel(list(_ATTENTION)):
            loss = student.loss(waiting.pop())
            adam.zero_grad()
            loss.backward()
        adam.step()
        done += 1
        if done % 100 == 0:
            say(f"{done} iterations, {spent:.0%} of the time, error {loss.item():.5f}")
