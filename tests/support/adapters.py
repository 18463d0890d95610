"""LoRAs made up for a test: random factors, written as trainers write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 4


def factors(denoiser: nn.Module, part: str = "attn", seed: int = 0) -> dict[str, Tensor]:
    """Factors of all Linear layers whose name contains `part`, as diffusers names them."""
    dice, found = torch.Generator().manual_seed(seed), {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and part in name:
            down = torch.randn(RANK, layer.in_features, generator=dice) / layer.in_features**0.5
            found[f"transformer.{name}.lora_A.weight"] = down
            found[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=dice) * 0.1
    return found


def write(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file, {"format": "pt", **(metadata or {})})
    return file
