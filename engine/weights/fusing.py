"""LoRAs fused into a denoiser's bf16 weights as they arrive, before anything else is done with them.

diffusers' own loader of the model's pipeline reads the many ways in which trainers name tensors. The arithmetic is that
of peft's `merge` on a CPU, with which diffusers fuses: factors in bf16, W + bf16(scale * alpha / rank * B @ A), the
product in fp32, one LoRA after the other (peft 0.21, tuners/lora/layer.py, `get_delta_weight`). peft itself is not
needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.catalog import Lora, ModelSpec
from engine.errors import LoadError

Place = Callable[[str, nn.Module], None]
"""Called with each submodule's fully qualified name and itself once its weights are on the device; may change it."""

_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's configuration in a file's metadata."""
_PART = "transformer."


@dataclass(frozen=True, kw_only=True)
class _Pair:
    down: Tensor
    """`lora_A`, (rank, K)."""
    up: Tensor
    """`lora_B`, (N, rank)."""
    alpha: float

    def delta(self, scale: float, device: torch.device) -> Tensor:
        """What is added to the weight, bf16 (N, K)."""
        down, up = (part.to(device, torch.bfloat16).float() for part in (self.down, self.up))
        return ((up @ down) * (scale * self.alpha)).to(torch.bfloat16)


def check(spec: ModelSpec, denoiser: nn.Module) -> None:
    """See that the model's LoRAs are for it, by their names and shapes.

    Raises:
        LoadError: one is not, in one sentence that says how much of it fits.
    """
    for lora in spec.loras:
        _read(lora, spec, denoiser)


def before(place: Place | None, spec: ModelSpec, denoiser: nn.Module) -> Place:
    """Fuses the model's LoRAs into a layer, then does with it what was to be done.

    Args:
        denoiser: of the model, for its layers' names and shapes.

    Raises:
        LoadError: as `check`.
    """
    adapters = [(lora.scale, _read(lora, spec, denoiser)) for lora in spec.loras]

    def fuse(name: str, module: nn.Module) -> None:
        for scale, pairs in adapters:
            if name in pairs:
                weight = module.weight
                weight.data += pairs[name].delta(scale, weight.device)
        if place is not None:
            place(name, module)

    return fuse


def _read(lora: Lora, spec: ModelSpec, denoiser: nn.Module) -> Mapping[str, _Pair]:
    """Fully qualified name of a Linear layer -> its two factors.

    Raises:
        LoadError: it is for another model, fits in part, or is no plain LoRA of the denoiser.
    """
    tensors, alphas, said = _as_diffusers_names_it(lora, spec)
    others = sorted({name.partition(".")[0] for name in tensors if not name.startswith(_PART)})
    if others:
        raise LoadError(
            f"The LoRA {lora.source} changes {' and '.join(others)} too, and only the denoiser's part can be fused: "
            "give one of the denoiser alone."
        )
    tensors = {name.removeprefix(_PART): tensor for name, tensor in tensors.items()}
    named: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, factor = _factor(name)
        if not factor:
            raise LoadError(f"The LoRA {lora.source} holds {name}, which is no factor of a product: give a plain LoRA.")
        named.setdefault(layer, {})[factor] = tensor
    halves = [layer for layer, factors in named.items() if factors.keys() != {"A", "B"}]
    if halves:
        raise LoadError(f"The LoRA {lora.source} has one of two factors of {halves[0]}: copy it again.")
    _require_fit(lora, spec, denoiser, named)
    alpha = _alphas(lora, named, alphas, said)
    return {
        layer: _Pair(down=factors["A"], up=factors["B"], alpha=alpha(layer, factors["B"].shape[1]))
        for layer, factors in named.items()
    }


def _as_diffusers_names_it(lora: Lora, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The file's tensors, further alphas by name, and peft's configuration where the file has it."""
    try:
        with safe_open(lora.file, "pt") as file:
            raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            said = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(f"The LoRA {lora.source} cannot be read: copy it again.") from error
    reader = getattr(diffusers, spec.pipeline)
    if not hasattr(reader, "lora_state_dict"):
        raise LoadError(f"diffusers reads no LoRA for {spec.stored_as}, a {spec.pipeline}: leave out --lora.")
    further = {"return_alphas": True} if spec.pipeline == "FluxPipeline" else {}
    try:
        found = reader.lora_state_dict(raw, **further)
    except Exception as error:  # converters stumble over names that they do not know in any way
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise LoadError(
            f"The LoRA {lora.source} is not one for {spec.stored_as}, diffusers cannot read its names ({why}): give "
            "one that was trained for it."
        ) from error
    tensors, alphas = found if isinstance(found, tuple) else (found, None)
    prefix = len(_PART)
    config = {name[prefix:]: value for name, value in said.items() if name.startswith(_PART)}
    if config.get("use_dora") or config.get("lora_bias"):
        raise LoadError(
            f"The LoRA {lora.source} is trained with DoRA or biases, which are not fused: give a plain LoRA."
        )
    return tensors, alphas or {}, config


def _factor(name: str) -> tuple[str, str]:
    """The layer's name, and which factor a tensor is, "A" or "B"; an empty one for whatever else it is."""
    for end, factor in (
        (".lora_A.weight", "A"),
        (".lora_B.weight", "B"),
        (".lora.down.weight", "A"),
        (".lora.up.weight", "B"),
    ):
        if name.endswith(end):
            return name.removesuffix(end), factor
    return name, ""


def _require_fit(lora: Lora, spec: ModelSpec, denoiser: nn.Module, named: Mapping[str, Mapping[str, Tensor]]) -> None:
    modules = dict(denoiser.named_modules())
    why = [reason for layer, factors in named.items() if (reason := _misfit(modules.get(layer), layer, factors))]
    if not why:
        return
    if len(why) == len(named):
        raise LoadError(
            f"The LoRA {lora.source} is for another model than {spec.stored_as}, none of its {len(named)} layers fits: "
            f"{why[0]}; give one that was trained for {spec.stored_as}."
        )
    raise LoadError(
        f"The LoRA {lora.source} fits {spec.stored_as} in part, {len(why)} of its {len(named)} layers do not: {why[0]}"
        f"; give one that was trained for {spec.stored_as}."
    )


def _misfit(module: nn.Module | None, layer: str, factors: Mapping[str, Tensor]) -> str:
    if module is None:
        return f"there is no layer {layer}"
    if not isinstance(module, nn.Linear):
        return f"{layer} is no Linear layer"
    down, up = factors["A"].shape, factors["B"].shape
    if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
        return f"its factors of {layer}, {list(up)} and {list(down)}, do not multiply"
    if (down[1], up[0]) != (module.in_features, module.out_features):
        return f"{layer} is {module.in_features} x {module.out_features} and not {down[1]} x {up[0]}"
    return ""


def _alphas(
    lora: Lora, named: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, Any], said: Mapping[str, Any]
) -> Callable[[str, int], float]:
    """Layer's name and rank -> alpha / rank, as diffusers configures peft: by the file's configuration, by alphas
    beside the factors, or 1."""
    if said:
        patterns: Mapping[str, float] = said.get("alpha_pattern") or {}
        root = bool(said.get("use_rslora"))

        def configured(layer: str, rank: int) -> float:
            alpha = next(
                (a for part, a in patterns.items() if re.match(rf"(.*\.)?({part})$", layer)), said["lora_alpha"]
            )
            return float(alpha) / (math.sqrt(rank) if root else rank)

        return configured
    found = {name.removeprefix(_PART).removesuffix(".alpha"): float(value) for name, value in alphas.items()}
    if found and found.keys() != named.keys():  # diffusers takes the first one for all others
        raise LoadError(
            f"The LoRA {lora.source} has alphas for {len(found)} of its {len(named)} layers: save it again "
            "with all or none."
        )
    return lambda layer, rank: found[layer] / rank if found else 1.0
