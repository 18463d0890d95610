"""What the remedies of engine/quantization/remedies.py add to a denoising step on a GPU: FLUX.1-dev, random weights,
batch 1.

python -m assets.figures.remedy_times OUT [--tiny]

- A bf16 branch of rank 16 or 32 beside every quantized layer, over the same FP8 denoiser without: both native.
- A weight-only step, over a bf16 step: a bf16 product and the unpacking of the NVFP4 weights before it. The emulation
  unpacks here; its other steps are never timed.

Searched block scales and calibrated weights have the same format and kernels and are not timed. Variants are compiled
and recorded as the engine does it, then timed in turns (A B A B), ROUNDS rounds of CALLS steps each. A variant that
fails says why and the rest goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from assets.figures.speed_steps import Sweep
from engine.compiler import compilation
from engine.quantization.remedies import LowRankLinear, WeightOnlySteps

RANKS = (16, 32)
ROUNDS, CALLS = 3, 8


def add_branches(denoiser: nn.Module, rank: int) -> int:
    """Give every quantized layer a branch of random values, whose time is that of any other; gives how many."""
    generator = torch.Generator("cpu").manual_seed(0)
    layers = [m for m in denoiser.modules() if isinstance(m, nn.Linear) and type(m.weight.data) is not torch.Tensor]
    for layer in layers:
        for name, shape in (("down", (rank, layer.in_features)), ("up", (layer.out_features, rank))):
            values = torch.randn(shape, generator=generator) / 1000
            value = values.to(layer.weight.device, torch.bfloat16)
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
        layer.__class__ = LowRankLinear
    return len(layers)


class Times(Sweep):
    """`ready` holds what is compiled: name -> a call of one step."""

    def run(self) -> None:
        self.ready: dict[str, Callable[[], object]] = {}
        self.guarded("bf16", partial(self.prepare, "bf16", "bf16"))
        self.guarded("FP8", partial(self.prepare, "FP8", "fp8"))
        for rank in RANKS:
            self.guarded(f"rank {rank}", partial(self.prepare, f"FP8, rank {rank}", "fp8", rank))
        self.guarded("weight-only", partial(self.prepare, "NVFP4 weights, bf16 activations", "nvfp4", weight_only=True))
        rounds: dict[str, list[float]] = {name: [] for name in self.ready}
        for _ in range(ROUNDS):
            for name, step in self.ready.items():
                rounds[name] += self.timed(step, rounds=1, calls=CALLS)
        for name, found in rounds.items():
            self.result["rows"].append({"variant": name, "step_ms": median(found), "rounds_ms": found})
            self.say(f"{name}: {median(found):.2f} ms")
        self.write()

    def prepare(self, name: str, precision: str, rank: int = 0, weight_only: bool = False) -> None:
        self.denoisers.pop(precision, None)  # each variant has a denoiser of its own
        denoiser = self.denoiser(precision)
        if rank:
            self.say(f"{add_branches(denoiser, rank)} branches of rank {rank}")
        if weight_only:
            WeightOnlySteps(denoiser, (1, 0), 1).ended(0)
        given = self.inputs(denoiser, 1024)
        blocks = compilation.Blocks(denoiser)
        mode = compilation.GRAPHS if self.cuda else compilation.EAGER
        blocks.use(mode)
        for _ in range(compilation.WARM_UP_STEPS[mode] + 1):
            denoiser(**given)
        self.ready[name] = lambda: denoiser(**given)
        self.say(f"{name}: ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    compilation.configure()
    with torch.inference_mode():
        Times(args.out, args.tiny).run()


if __name__ == "__main__":
    main()
