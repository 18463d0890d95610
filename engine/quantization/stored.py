"""Denoisers that are stored quantized, in torchao's layouts: read into the weights that run here, and taken apart.

torchao's classes are what plain diffusers reads and runs; the engine runs its own where a format is emulated. Between
the two nothing is rounded: codes and scales are the same bits, in another order. Which layouts are taken is
engine/weights/torchao_layout.py's; knows no recipe's rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.float8.inference import Float8MMConfig
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4DynamicActivationNVFP4WeightConfig
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.mx_formats.utils import from_blocked
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
)
from torchao.quantization import Int8Tensor as TorchaoInt8Tensor
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

from engine.catalog import ModelSpec
from engine.errors import LoadError
from engine.formats import FP8, INT8, MXFP8, NVFP4
from engine.machine import Support
from engine.quantization import capability, nvfp4, recipes, remedies, rotation
from engine.quantization.emulation import FP8_AMAX_FLOOR, EmulatedFP8Tensor, EmulatedMXFP8Tensor, EmulatedNVFP4Tensor
from engine.quantization.int8 import Int8Tensor
from engine.quantization.recipes import LayerPlan, Plan
from engine.quantized import Quantized
from engine.weights import loading
from engine.weights.checkpoint import QUANTIZE_AGAIN, Packed
from engine.weights.source import Source
from engine.weights.torchao_layout import BRANCHES, KINDS

_NAN = 0x7F
"""Bits of e4m3's NaN without its sign."""
_NAN_E8M0 = 0xFF


def denoiser(
    spec: ModelSpec,
    plan: Plan,
    support: Support,
    device: torch.device,
    source: Source,
    told: loading.Told | None = None,
    leaving: Callable[[loading.Place], loading.Place] | None = None,
) -> nn.Module:
    """A planned denoiser on `device`: stored quantized, or quantized layer by layer as it arrives in bf16.

    Args:
        leaving: makes of what is done with each layer what is done with it before it leaves the device again.

    Raises:
        LoadError: the weights cannot be had, or a file of them is bad.
        UnsupportedError: the machine cannot run a precision.
    """
    held = plan.recipe.held
    if held is None:
        quantize = recipes.quantizer(plan, support)
        return loading.load_transformer(spec, device, source, leaving(quantize) if leaving else quantize, told)

    planned = {layer.name: layer for layer in plan.layers if layer.quantized}

    def unpack(name: str, packed: Packed, parts: Mapping[str, Tensor]) -> Tensor:
        return read(packed, parts, capability.support(KINDS[packed.kind], support.machine), f"{name} in {held.folder}")

    def place(name: str, module: nn.Module) -> None:
        if name in planned:
            _complete(planned[name], module, support, held)

    return loading.load_quantized(spec, held.folder, device, unpack, leaving(place) if leaving else place)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(packed: Packed, parts: Mapping[str, Tensor], support: Support, where: str) -> Tensor:
    """A stored weight as what runs here.

    Args:
        packed, parts: of a layout that `weights.torchao_layout.read` takes.
        support: how its format runs.
        where: the weight and its folder, for a message.

    Raises:
        LoadError: it has values that are no numbers, or scales that are none.
    """
    native, scale = support.execution == "native", parts["scale"]
    codes, form = parts["qdata"], support.precision
    if form in (FP8.id, INT8.id):
        _require(scale.isfinite() & (scale > 0), where)
    if form in (FP8.id, MXFP8.id):
        _require((codes.view(torch.uint8) & _NAN) != _NAN, where)
    if form == FP8.id:
        return _fp8(codes, scale) if native else EmulatedFP8Tensor(codes, scale)
    if form == INT8.id:
        zero_point = parts.get("zero_point")
        _require(torch.ones(()) if zero_point is None else zero_point == 0, where)
        return Int8Tensor(codes, scale, native)
    swizzled = packed.attributes["is_swizzled_scales"] is True
    if form == MXFP8.id:
        _require(scale.view(torch.uint8) != _NAN_E8M0, where)
        scaling = packed.attributes["act_quant_kwargs"]["_data"].get("scaling_mode") or {}
        weight = _mxfp8(codes, scale, swizzled, scaling.get("_data", "RCEIL"), native)
        return EmulatedMXFP8Tensor.of(weight) if not native and support.machine.kind == "cpu" else weight
    shape = (codes.shape[0], 2 * codes.shape[1])
    tensor_scale = parts["per_tensor_scale"]
    _require(tensor_scale.isfinite() & (tensor_scale > 0), where)
    if swizzled:
        scale = _in_rows(scale, shape)
    _require(scale.view(torch.uint8) <= nvfp4.E4M3_MAX_BITS, where)
    if native:
        return capability.nvfp4_weight((codes, scale, tensor_scale), support.fused_quantizer)
    return EmulatedNVFP4Tensor.from_packed(codes, scale, tensor_scale)


def _require(usable: Tensor, where: str) -> None:
    if not bool(usable.all()):
        raise LoadError(f"{where} has codes or scales that are no numbers of its format: {QUANTIZE_AGAIN}.")


def _complete(layer: LayerPlan, module: nn.Linear, support: Support, held: Quantized) -> None:
    """What a layer has besides its stored weight."""
    if layer.rotation:
        rotation.turn_inputs(module, layer.rotation)
    if layer.four_over_six:
        recipes.require_four_over_six(layer, capability.support(layer.precision, support.machine))
        module.weight.four_over_six = True
    if layer.weights_alone:
        module.weight.act_quant_kwargs = None
    if layer.rank:
        _add_branch(held, layer.name, module, layer.rank)


def _add_branch(held: Quantized, name: str, module: nn.Linear, rank: int) -> None:
    file = held.folder / BRANCHES
    try:
        with safe_open(file, "pt", device=str(module.weight.device)) as tensors:
            down, up = (tensors.get_tensor(f"{name}.{part}") for part in ("down", "up"))
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{file} lacks the branch of {name}: {QUANTIZE_AGAIN}.") from error
    if down.shape != (rank, module.in_features) or up.shape != (module.out_features, rank):
        raise LoadError(f"{file} has a branch of {name} in another shape than the layer's: {QUANTIZE_AGAIN}.")
    remedies.attach_branch(module, down, up)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def taken_apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor as diffusers and torchao keep it in safetensors: plain tensors on the host, by their names there.

    Args:
        name: as in the model's state.
        tensor: plain, or a weight that runs here.
    """
    tensors, _ = flatten_tensor_state_dict({name: as_torchao(tensor)})
    return {key: value.cpu().contiguous() for key, value in tensors.items()}


def described(name: str, tensor: Tensor) -> dict[str, str]:
    """What every file of the model says of it."""
    _, said = flatten_tensor_state_dict({name: as_torchao(tensor)})
    return {name: said[name]}


def size(tensor: Tensor) -> int:
    """Bytes as stored."""
    names = getattr(tensor, "tensor_data_names", None)
    parts = [tensor] if names is None else [getattr(tensor, part) for part in names]
    return sum(part.nbytes for part in parts)


def as_torchao(weight: Tensor) -> Tensor:
    """What plain torchao makes of a weight that runs here, on hardware that runs its format natively."""
    weight = weight.detach()
    if isinstance(weight, EmulatedFP8Tensor):
        return _fp8(weight.values, weight.row_scales)
    if isinstance(weight, Int8Tensor):
        return TorchaoInt8Tensor(
            weight.codes,
            weight.row_scales,
            [1, weight.shape[1]],
            torch.bfloat16,
            act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
        )
    if isinstance(weight, MXTensor):
        scaling = weight.act_quant_kwargs.scaling_mode.name
        return _mxfp8(weight.qdata, weight.scale, weight.is_swizzled_scales, scaling, native=True)
    if isinstance(weight, EmulatedNVFP4Tensor):
        # With mslk's kernel for activations, which the emulation follows too.
        return capability.nvfp4_weight((weight.codes, weight.block_scales, weight.tensor_scale), fused_quantizer=True)
    if isinstance(weight, NVFP4Tensor):
        return capability.nvfp4_weight(
            (weight.qdata, _in_rows(weight.scale, weight.shape), weight.per_tensor_scale), True
        )
    return weight


def config(form: str) -> AOBaseConfig:
    """torchao's configuration of a format, for a denoiser's config.json; what is stored is not quantized by it."""
    return {
        FP8.id: partial(
            Float8DynamicActivationFloat8WeightConfig,
            granularity=PerRow(),
            activation_value_lb=FP8_AMAX_FLOOR,
            kernel_preference=KernelPreference.TORCH,
            set_inductor_config=False,
        ),
        MXFP8.id: MXDynamicActivationMXWeightConfig,
        NVFP4.id: NVFP4DynamicActivationNVFP4WeightConfig,
        INT8.id: Int8DynamicActivationInt8WeightConfig,
    }[form]()


def branches(transformer: nn.Module) -> dict[str, Tensor]:
    """The low-rank branches of a denoiser, for `BRANCHES`."""
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu().contiguous()
        for name, layer in transformer.named_modules()
        if isinstance(layer, remedies.LowRankLinear)
        for part in ("down", "up")
    }


def state(transformer: nn.Module) -> dict[str, Tensor]:
    """All that belongs into a denoiser's files, by name."""
    beside = set(branches(transformer))
    return {name: tensor for name, tensor in transformer.state_dict().items() if name not in beside}


def tensor_names(state: Mapping[str, Tensor]) -> str:
    """What every file says of all of them."""
    return json.dumps(list(state))


def _fp8(values: Tensor, row_scales: Tensor) -> Float8Tensor:
    kernel = KernelPreference.TORCH
    return Float8Tensor(
        values,
        row_scales,
        block_size=[1, values.shape[1]],
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
            granularity=PerRow(), hp_value_lb=FP8_AMAX_FLOOR, kernel_preference=kernel
        ),
        kernel_preference=kernel,
        dtype=torch.bfloat16,
    )


def _mxfp8(values: Tensor, scale: Tensor, swizzled: bool, scaling: str, native: bool) -> MXTensor:
    kernel = KernelPreference.AUTO if native else KernelPreference.EMULATED
    activations = QuantizeTensorToMXKwargs(
        elem_dtype=torch.float8_e4m3fn,
        block_size=MXFP8.block,
        kernel_preference=kernel,
        is_swizzled_scales=True,
        scaling_mode=ScaleCalculationMode[scaling],
    )
    return MXTensor(
        values,
        scale,
        torch.float8_e4m3fn,
        MXFP8.block,
        torch.bfloat16,
        kernel,
        activations,
        is_swizzled_scales=swizzled,
    )


def _in_rows(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Block scales in tiles, as Blackwell's products take them, as (N, K / 16)."""
    return from_blocked(scale.flatten(), shape[0], shape[1] // nvfp4.BLOCK).contiguous()
