"""What fits: the memory a model needs in one precision against what this machine has, before anything is loaded.

GB are 1e9 bytes. Knows nothing of how weights are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from engine.catalog import Memory, ModelSpec
from engine.errors import UnsupportedError

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory of one device or of the host, in GB."""

    what: str
    """"GPU memory" or "host memory"."""
    free: float
    total: float


def rooms(device: torch.device) -> tuple[Room, Room]:
    """What `device` and the host have; the same twice for a CPU."""
    memory = psutil.virtual_memory()
    host = Room(what="host memory", free=memory.available / GB, total=memory.total / GB)
    if device.type == "cpu":
        return host, host
    free, total = torch.cuda.mem_get_info(device)
    # What PyTorch holds but does not use is as good as free.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(what="GPU memory", free=free / GB, total=total / GB), host


def needed(memory: Memory, transformer: float, shared: bool) -> float:
    """GB on the device for a denoiser of `transformer` GB and one run, with the shared parts if they are not there."""
    return transformer + memory.run + (memory.shared if shared else 0)


def lack(spec: ModelSpec, precision: str, transformer: float, device: torch.device, shared: bool) -> str | None:
    """Why the model cannot be loaded beside what is loaded now, as a sentence with the numbers; None if it can.

    Args:
        transformer: GB of the denoiser in this precision, as its plan says.
        shared: whether text encoders and VAE still have to be loaded.
    """
    return _lack(spec, precision, transformer, device, shared, lambda room: room.free)


def require(spec: ModelSpec, precision: str, transformer: float, device: torch.device) -> None:
    """Refuse what does not fit even where nothing else is loaded.

    Raises:
        UnsupportedError: in one sentence with the numbers.
    """
    sentence = _lack(spec, precision, transformer, device, True, lambda room: room.total)
    if sentence is not None:
        raise UnsupportedError(sentence)


def _lack(
    spec: ModelSpec,
    precision: str,
    transformer: float,
    device: torch.device,
    shared: bool,
    counted: Callable[[Room], float],
) -> str | None:
    if spec.memory_gb is None:
        return None
    here, host = rooms(device)
    need = needed(spec.memory_gb, transformer, shared)
    if device.type != "cpu" and need <= counted(here):
        here, need = host, spec.memory_gb.host
    if need <= counted(here):
        return None
    return (
        f"{spec.name} in {precision} needs {need:.1f} GB of {here.what}, and this machine has {here.total:.1f} GB, "
        f"{here.free:.1f} GB of them free: choose a smaller model or a larger machine."
    )
