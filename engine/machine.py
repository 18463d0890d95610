"""What a device is and how it runs each precision, as plain values; engine/precision.py finds them out.

Here, so that the page and the worker's queue can hold them without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of a device decides how a precision runs on it."""

    name: str
    """As the driver or /proc/cpuinfo gives it."""
    kind: str
    """"cpu" or "cuda"."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for a CPU or another maker's GPU."""
    mslk: bool = False
    """Whether mslk's Triton quantizer for NVFP4 can be used."""


@dataclass(frozen=True, kw_only=True)
class Support:
    """How one precision runs on one machine."""

    precision: str
    execution: str
    """"native", "emulated" or "unavailable"."""
    reason: str
    """One sentence for the user."""
    gemm: str
    """What multiplies the matrices, in words; empty when unavailable."""
    fused_quantizer: bool = False
    """NVFP4 activations are quantized by mslk's Triton kernel."""
    machine: Machine | None = None
    """The one machine, which a recipe that mixes precisions asks for the others; None where nothing is quantized."""
