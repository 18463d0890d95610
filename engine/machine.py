"""What a device is and how it runs each precision, as plain values; engine/quantization/capability.py finds them out.

Here, so that the page and the worker's queue can hold them without torch.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

DRIVERS: Mapping[int, int] = MappingProxyType({11: 450, 12: 525, 13: 580})
"""Major version of CUDA -> that of the oldest NVIDIA driver on which its builds run (NVIDIA, "CUDA Compatibility")."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came of comparing a format's native products on one device with its exact emulation
    (engine/quantization/proof.py)."""

    precision: str
    fault: str = ""
    """Why native products are not used, in a clause; empty where they agree."""
    products: int = 0
    """That were compared and agree."""
    distance: float = 0.0
    """The greatest, relative."""


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
    int8: bool = False
    """Of a CPU: whether it has instructions that multiply int8 into int32 (VNNI, AMX)."""
    no_compile: str = ""
    """Why nothing can be compiled for a GPU, beginning with what is missing; empty where it can."""
    shared: bool = False
    """Others' work runs on the card too, so that latencies are not to quote."""
    cards: int = 1
    """How many such devices make one picture together."""
    note: str = ""
    """What a user should know before anything else, in a sentence or two; mostly empty."""
    proofs: tuple[Proof, ...] = field(default=(), compare=False)
    """One a format whose native products were compared, now or before. Not part of what makes two machines alike."""

    @property
    def label(self) -> str:
        """Its name, with how many work together where several do: what results say of where they were made."""
        return self.name if self.cards == 1 else f"{self.cards} cards, {self.name}"

    def proof(self, precision: str) -> Proof | None:
        """None where nothing was compared."""
        return next((proof for proof in self.proofs if proof.precision == precision), None)


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
    disproved: bool = False
    """It is emulated because native products were wrong, which the reason tells."""
    no_graph: str = ""
    """Why no CUDA graph may be recorded of it, in a clause; empty where one may."""
    machine: Machine
    """The one machine, which a recipe that mixes precisions asks for the others."""


FINE, LIMIT, FAULT = "fine", "limit", "fault"
"""As it should be; something is not to be had here, which may be all right; something does not work that should."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that `python -m engine doctor` looked at."""

    topic: str
    """In a word or two."""
    severity: str
    """`FINE`, `LIMIT` or `FAULT`."""
    said: str
    """One sentence."""
    do: str = ""
    """What to do about it, in a sentence; empty for nothing."""


def nvidia_driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of this machine's NVIDIA driver, such as "535.104.05"; None without one.

    Args:
        told: where Linux says it; elsewhere, and in WSL, nvidia-smi does.
    """
    try:
        said = told.read_text()
    except OSError:
        said = _nvidia_smi()
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", said)
    return found[0] if found else None


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    ask = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # left behind by a driver that is gone, or one that hangs
        return ""


def unusable_gpu(cuda: str | None, driver: str | None, environment: Mapping[str, str]) -> str:
    """Why PyTorch, which finds no GPU, finds none although an NVIDIA driver is here; empty where that is as it should
    be: there is no driver, or CUDA_VISIBLE_DEVICES hides all GPUs.

    Args:
        cuda: the version that PyTorch was built for; None without CUDA.
        driver: as of `nvidia_driver`.

    Returns:
        One sentence that says what to do.
    """
    if driver is None or environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "none", "NoDevFiles"):
        return ""
    if cuda is None:
        return (
            f"An NVIDIA driver {driver} is here, but this PyTorch was built without CUDA: install one that was built "
            "with it (https://pytorch.org/get-started)."
        )
    needed = DRIVERS.get(int(cuda.partition(".")[0]), max(DRIVERS.values()))
    if int(driver.partition(".")[0]) < needed:
        return (
            f"The NVIDIA driver {driver} is too old for this PyTorch, whose CUDA {cuda} needs driver {needed} or "
            "newer: update the driver, or install a PyTorch that was built for an older CUDA."
        )
    return (
        f"An NVIDIA driver {driver} is here, but PyTorch can use no GPU: see whether nvidia-smi lists one, and start a "
        "container with --gpus all."
    )
