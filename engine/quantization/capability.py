"""bf16, fp8, mxfp8, nvfp4, int8: what a machine runs natively, emulates or cannot run, and how a layer gets there.

Every hardware gate of the engine is in `support`, with the sentence that tells a user why. Knows which torchao
configuration belongs to a precision, but not which layers deserve it: that is engine/quantization/recipes.py.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.float8.inference import Float8MMConfig
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, nvfp4_tensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
from torchao.prototype.mx_formats.utils import hp_data_dims_to_swizzled_scale_dims_nvfp4, to_blocked
from torchao.quantization import Float8Tensor, PerRow, quantize_
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import is_mslk_version_at_least

from engine.environment import lends_cards
from engine.errors import UnsupportedError
from engine.formats import FORMATS, FP8, INT8, MXFP8, NVFP4, REFERENCE, Format
from engine.machine import Machine, Support, nvidia_driver, unusable_gpu
from engine.quantization import int8, nvfp4
from engine.quantization.emulation import (
    FP8_AMAX_FLOOR,
    EmulatedFP8Tensor,
    EmulatedMXFP8Tensor,
    EmulatedNVFP4Tensor,
    EmulationConfig,
)

log = logging.getLogger(__name__)

VOLTA, AMPERE, ADA, BLACKWELL = (7, 0), (8, 0), (8, 9), (10, 0)
"""Compute capabilities with the first kernels by Triton, and the first bf16, FP8 and block-scaled FP8/FP4 tensor
cores."""


LENT = "ZeroGPU lends its card too briefly"
"""Why nothing is compiled there: what is compiled ends with the call."""
SHARED_CARD = "This card is shared with others: its latencies are not to quote."


def default_device() -> str:
    """Where to run if nothing was named: on a GPU where PyTorch can use one, else on the CPU; logs it where that is not
    for want of an NVIDIA GPU."""
    if torch.cuda.is_available():
        return "cuda"
    if note := _note():
        log.warning(note)
    return "cpu"


def _note() -> str:
    """What to know where the CPU is used although an NVIDIA driver is here; empty otherwise."""
    why = _unusable_gpu()
    return f"This runs on the CPU, not on a GPU. {why}" if why else ""


def _unusable_gpu() -> str:
    if torch.cuda.is_available() or torch.version.hip is not None:
        return ""
    return unusable_gpu(torch.version.cuda, nvidia_driver(), os.environ)


def detect(device: str | torch.device) -> Machine:
    """Describe a device of this machine.

    Raises:
        UnsupportedError: there is no such device, or its kind is neither CPU nor CUDA.
    """
    device = device_named(device)
    if device.type == "cpu":
        return Machine(name=_cpu_name(), kind="cpu", int8=int8.cpu_has_int8(), note=_note())
    if device.type != "cuda":
        raise UnsupportedError(f"Twinframe runs on CPUs and CUDA GPUs, not on {device.type}: choose cpu or cuda.")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(
            _unusable_gpu() or f"There is no {device} here that PyTorch can use: choose cpu, or check the driver."
        )
    capability = torch.cuda.get_device_capability(device) if torch.version.cuda else None
    name, lent = torch.cuda.get_device_name(device), lends_cards(os.environ)
    no_compile = LENT if lent else _no_compile(capability)
    notes = [SHARED_CARD] if lent else []
    return Machine(
        name=name,
        kind="cuda",
        capability=capability,
        mslk=_mslk_usable(),
        no_compile=no_compile,
        shared=lent,
        note=" ".join([*notes, f"Nothing is compiled: {no_compile}."] if no_compile else notes),
    )


def device_named(name: str | torch.device) -> torch.device:
    """The torch device of this name.

    Raises:
        UnsupportedError: no such kind of device.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UnsupportedError(f"There is no device {str(name)!r}: choose cpu or cuda.") from error


def support(precision: str, machine: Machine) -> Support:
    """How `precision` runs on `machine`.

    Raises:
        ValueError: no such precision.
    """
    gates = {REFERENCE: _bf16, FP8.id: _fp8, MXFP8.id: _mxfp8, NVFP4.id: _nvfp4, INT8.id: _int8}
    if precision not in gates:
        raise ValueError(f"No precision {precision!r}: choose from {', '.join(gates)}.")
    if precision != REFERENCE and machine.kind == "cuda":
        if machine.capability is None:
            reason = f"Quantized precisions run on NVIDIA GPUs and on CPUs; the {machine.name} is neither."
            return Support(precision=precision, execution="unavailable", reason=reason, gemm="", machine=machine)
        if machine.capability < AMPERE:
            reason = f"Quantized precisions need bf16 tensor cores (compute capability 8.0); {_has(machine)}."
            return Support(precision=precision, execution="unavailable", reason=reason, gemm="", machine=machine)
    execution, reason, gemm, fused = gates[precision](machine)
    proof = machine.proof(precision) if execution == "native" else None
    if disproved := proof is not None and bool(proof.fault):
        execution, gemm, fused = "emulated", _emulation(precision, machine), False
        has = reason.removesuffix(".").partition(";")[0]
        reason = f"{has}, but {proof.fault}, so {FORMATS[precision].label} is emulated."
    elif proof is not None:
        reason = f"{reason.removesuffix('.')}; {proof.products} products there agree with the exact emulation."
    return Support(
        precision=precision,
        execution=execution,
        reason=reason,
        gemm=gemm,
        fused_quantizer=fused,
        disproved=disproved,
        no_graph=_no_graph(precision, machine),
        machine=machine,
    )


def supports(machine: Machine) -> dict[str, Support]:
    """How each precision runs on `machine`."""
    return {precision: support(precision, machine) for precision in FORMATS}


def _emulation(precision: str, machine: Machine) -> str:
    """What multiplies where a format is emulated, in words."""
    if precision == FP8.id and machine.kind == "cpu":
        return "fp32 GEMM on FP8 values"
    return {
        FP8.id: "bf16 GEMM on FP8 values, fp32 accumulation",
        MXFP8.id: "bf16 GEMM on MXFP8 values",
        NVFP4.id: "bf16 GEMM on NVFP4 values, fp32 accumulation",
        INT8.id: "fp32 GEMM on INT8 values, in sums that are exact",
    }[precision]


def _no_graph(precision: str, machine: Machine) -> str:
    if precision == FP8.id and machine.capability == ADA and torch.__version__ < (2, 12):
        # It clears its workspace on the default stream, which a recording on another one does not see: replays would
        # start from what the last left there, and hang or compute something else. Mended in 2.12.
        return f"PyTorch {torch.__version__} cannot replay its FP8 product on compute capability 8.9, 2.12 can"
    return ""


def _bf16(machine: Machine) -> tuple[str, str, str, bool]:
    if machine.kind == "cpu":
        return "native", f"The {machine.name} computes bf16 with its ordinary kernels.", "CPU bf16 GEMM", False
    if machine.capability is not None and machine.capability < AMPERE:
        reason = f"bf16 tensor cores begin with compute capability 8.0; {_has(machine)}, so bf16 is converted."
        return "emulated", reason, "cuBLAS bf16 GEMM", False
    return "native", f"The {machine.name} has bf16 tensor cores.", "cuBLAS bf16 GEMM", False


def _fp8(machine: Machine) -> tuple[str, str, str, bool]:
    if machine.kind == "cpu":
        return "emulated", "CPUs have no row-wise FP8 GEMM, so FP8 is emulated.", _emulation(FP8.id, machine), False
    if _capability(machine) < ADA:
        reason = f"FP8 tensor cores begin with compute capability 8.9; {_has(machine)}, so FP8 is emulated."
        return "emulated", reason, _emulation(FP8.id, machine), False
    return "native", f"The {machine.name} has FP8 tensor cores.", "torch._scaled_mm, row-wise FP8", False


def _mxfp8(machine: Machine) -> tuple[str, str, str, bool]:
    if machine.kind == "cuda" and _capability(machine) >= BLACKWELL:
        reason = f"The {machine.name} has tensor cores for MXFP8."
        return "native", reason, "torch._scaled_mm, FP8 with e8m0 scales of 32", False
    return "emulated", _no_blackwell(MXFP8, machine), _emulation(MXFP8.id, machine), False


def _nvfp4(machine: Machine) -> tuple[str, str, str, bool]:
    if machine.kind == "cuda" and _capability(machine) >= BLACKWELL:
        gemm = "torch._scaled_mm, FP4 with e4m3 scales of 16"
        if machine.mslk:
            return "native", f"The {machine.name} has tensor cores for NVFP4.", gemm, True
        reason = (
            f"The {machine.name} has tensor cores for NVFP4; without mslk 1.1 (pip install mslk-cuda) activations are "
            "quantized by slower PyTorch operations."
        )
        return "native", reason, gemm, False
    return "emulated", _no_blackwell(NVFP4, machine), _emulation(NVFP4.id, machine), False


def _int8(machine: Machine) -> tuple[str, str, str, bool]:
    gemm = "torch._int_mm, INT8 with int32 accumulation"
    if machine.kind == "cuda":
        return "native", f"The {machine.name} has INT8 tensor cores.", gemm, False
    if machine.int8:
        return "native", f"The {machine.name} has instructions for INT8 products (VNNI or AMX).", gemm, False
    reason = (
        f"The {machine.name} has no instructions for INT8 products (VNNI or AMX), so INT8 is emulated: the same sums, "
        "exact, in fp32."
    )
    return "emulated", reason, _emulation(INT8.id, machine), False


def _no_blackwell(wanted: Format, machine: Machine) -> str:
    name = wanted.label
    if machine.kind == "cpu":
        return f"{name} needs a Blackwell GPU; on a CPU it is emulated."
    return f"{name} tensor cores begin with compute capability 10.0; {_has(machine)}, so {name} is emulated."


def _capability(machine: Machine) -> tuple[int, int]:
    """Of a CUDA GPU; what has none comes before all that have one."""
    return machine.capability or (0, 0)


def _has(machine: Machine) -> str:
    major, minor = _capability(machine)
    return f"the {machine.name} has {major}.{minor}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    if platform.system() == "Darwin":  # whose processor is "arm" otherwise
        with suppress(OSError, subprocess.SubprocessError):
            ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return platform.processor() or platform.machine() or "CPU"


def _no_compile(capability: tuple[int, int] | None) -> str:
    """Why Inductor cannot compile for a GPU; empty where it can."""
    if capability is not None and capability < VOLTA:
        return "Triton needs compute capability 7.0, this GPU has {}.{}".format(*capability)
    try:
        import triton
        import triton.compiler  # noqa: F401
    except (ImportError, OSError, AttributeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        package = "triton-windows" if platform.system() == "Windows" else "triton"
        if missing:
            return f"Triton is missing: pip install {package}, in the version that belongs to this PyTorch"
        return f"Triton does not load ({error}): install the version of {package} that belongs to this PyTorch"
    return ""


def _mslk_usable() -> bool:
    try:
        import mslk.quantize.triton.fp4_quantize  # noqa: F401
    except (ImportError, OSError):  # absent, or built for another torch
        return False
    return is_mslk_version_at_least("1.1.0")


# ---------------------------------------------------------------------------------------------------------------------
# Applying a precision


def quantize_linear_modules(
    module: nn.Module, names: Set[str], support: Support, packed: nvfp4.Packed | None = None
) -> nn.Module:
    """Quantize the Linear layers with these fully qualified names in place, on the device where they are.

    Activations are quantized dynamically in every precision. Call it under neither autocast nor compile.

    Args:
        module: holds bf16 Linear layers.
        names: exact names, as `named_modules` gives them; for bf16 nothing is done.
        support: how the precision runs on that device.
        packed: NVFP4's codes and scales, where they are not to be torchao's usual ones; for a single layer.

    Returns:
        The same module.

    Raises:
        UnsupportedError: the precision is unavailable; the text is `support.reason`.
        ValueError: a name is not that of a bf16 Linear.
    """
    if support.execution == "unavailable":
        raise UnsupportedError(support.reason)
    if support.precision == REFERENCE:
        return module
    held = dict(module.named_modules())
    for name in sorted(names):
        layer = held.get(name)
        if not isinstance(layer, nn.Linear) or layer.weight.dtype != torch.bfloat16:
            raise ValueError(f"{name} is not a bf16 Linear layer.")
    # A filter by exact name: FqnToConfig raises inside diffusers, and its own exclusion list matches substrings.
    quantize_(module, _config(support, packed), filter_fn=lambda _, name: name in names)
    return module


def stored_precision(weight: Tensor) -> str:
    """The precision in which a weight is really held, told by its type.

    Raises:
        ValueError: neither plain bf16 nor a tensor that this module makes.
    """
    for precision, kinds in _TENSORS.items():
        if isinstance(weight.data, kinds):
            return precision
    if type(weight.data) is Tensor and weight.dtype == torch.bfloat16:
        return REFERENCE
    raise ValueError(f"A {type(weight.data).__name__} of {weight.dtype} is in no precision known here.")


_TENSORS = {
    FP8.id: (Float8Tensor, EmulatedFP8Tensor),
    MXFP8.id: (MXTensor,),
    NVFP4.id: (NVFP4Tensor, EmulatedNVFP4Tensor),
    INT8.id: (int8.Int8Tensor,),
}


@dataclass
class _RowwiseFP8Config(AOBaseConfig):
    """torchao's `Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`, less three of its habits.

    It changes Inductor's settings for the whole process, which would also change how the bf16 twin compiles; it leaves
    layers of odd shape in bf16 without a word; and it cannot guard weights, so a row of zeros in one becomes NaN.
    """


@register_quantize_module_handler(_RowwiseFP8Config)
def _to_rowwise_fp8(module: nn.Linear, config: _RowwiseFP8Config) -> nn.Linear:
    # Not AUTO, which changes the GEMM where mslk is installed: what runs should depend on the hardware alone.
    kernel = KernelPreference.TORCH
    weight = Float8Tensor.from_hp(
        module.weight,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        hp_value_lb=FP8_AMAX_FLOOR,
        kernel_preference=kernel,
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
            granularity=PerRow(), hp_value_lb=FP8_AMAX_FLOOR, kernel_preference=kernel
        ),
    )
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@dataclass
class _NVFP4Config(AOBaseConfig):
    """torchao's `NVFP4DynamicActivationNVFP4WeightConfig`, whose scale of an all-zero tensor is 0 and its values NaN.

    So weights are packed by engine/quantization/nvfp4.py, to the same bits otherwise, or come packed, and the scale of
    activations is guarded."""

    packed: nvfp4.Packed | None
    use_triton_kernel: bool


@register_quantize_module_handler(_NVFP4Config)
def _to_nvfp4(module: nn.Linear, config: _NVFP4Config) -> nn.Linear:
    weight = nvfp4_weight(config.packed or nvfp4.quantize(module.weight), config.use_triton_kernel)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def nvfp4_weight(packed: nvfp4.Packed, fused_quantizer: bool) -> NVFP4Tensor:
    """torchao's weight of codes and scales, whose activations are quantized by mslk's kernel or by plain operations."""
    nvfp4_tensor.per_tensor_amax_to_scale = _scale_of_activations
    codes, block_scales, tensor_scale = packed
    shape = (codes.shape[0], 2 * codes.shape[1])
    return NVFP4Tensor(
        codes,
        to_blocked(block_scales).view(hp_data_dims_to_swizzled_scale_dims_nvfp4(*shape)),
        nvfp4.BLOCK,
        torch.bfloat16,
        per_tensor_scale=tensor_scale,
        is_swizzled_scales=True,
        use_triton_kernel=fused_quantizer,
        act_quant_kwargs=QuantizeTensorToNVFP4Kwargs(
            use_dynamic_per_tensor_scale=True, use_triton_kernel=fused_quantizer, is_swizzled_scales=True
        ),
    )


def _by_rows(cls: type, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """`__torch_function__` of torchao's microscaling weights, which have none. Their products take rows that lie one
    after the other; of others, such as diffusers cuts for FLUX.2's text from a longer sequence, torch makes a batch."""
    with torch._C.DisableTorchFunctionSubclass():
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, *others = args
        made = F.linear(x.reshape(-1, x.shape[-1]).contiguous(), *others)
        return made.view(*x.shape[:-1], made.shape[-1])


for _kind in (MXTensor, NVFP4Tensor):
    _kind.__torch_function__ = classmethod(_by_rows)


_SCALE_OF_TENSOR = nvfp4_tensor.per_tensor_amax_to_scale


def _scale_of_activations(amax: Tensor) -> Tensor:
    """torchao's `per_tensor_amax_to_scale`, in whose place it is called, but for what is zero or as good as zero."""
    return nvfp4.usable(_SCALE_OF_TENSOR(amax))


def _config(support: Support, packed: nvfp4.Packed | None) -> AOBaseConfig:
    native = support.execution == "native"
    if support.precision == INT8.id:
        return int8.Int8Config(native)
    if support.precision == MXFP8.id and not native and support.machine.kind == "cpu":
        return EmulationConfig(EmulatedMXFP8Tensor)
    if support.precision == MXFP8.id:
        return MXDynamicActivationMXWeightConfig(
            activation_dtype=torch.float8_e4m3fn,
            weight_dtype=torch.float8_e4m3fn,
            kernel_preference=KernelPreference.AUTO if native else KernelPreference.EMULATED,
        )
    if support.precision == NVFP4.id and native:
        return _NVFP4Config(packed, use_triton_kernel=support.fused_quantizer)
    if native:
        return _RowwiseFP8Config()
    if support.precision == FP8.id:
        return EmulationConfig(EmulatedFP8Tensor)
    return EmulationConfig(EmulatedNVFP4Tensor, packed)
