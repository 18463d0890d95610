"""Every hardware gate, on machines described by hand, and what each precision really puts into a layer."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torchao.prototype.mx_formats import nvfp4_tensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.mx_formats.utils import from_blocked
from torchao.quantization import Float8Tensor
from torchao.quantization.quantize_.common import KernelPreference

from engine.compiler.compilation import EAGER, GRAPHS, mode
from engine.errors import UnsupportedError
from engine.formats import PRECISIONS
from engine.machine import nvidia_driver, unusable_gpu
from engine.quantization import capability, nvfp4
from engine.quantization.capability import Machine, Support, detect, quantize_linear_modules, stored_precision, support
from engine.quantization.emulation import EmulatedFP8Tensor, EmulatedMXFP8Tensor, EmulatedNVFP4Tensor
from engine.quantization.int8 import Int8Tensor
from tests.support import products

B200 = Machine(name="NVIDIA B200", kind="cuda", capability=(10, 0), mslk=True)
B200_BARE = Machine(name="NVIDIA B200", kind="cuda", capability=(10, 0), mslk=False)
RTX_PRO = Machine(name="NVIDIA RTX PRO 6000", kind="cuda", capability=(12, 0), mslk=True)
H100 = Machine(name="NVIDIA H100 80GB HBM3", kind="cuda", capability=(9, 0), mslk=True)
L40S = Machine(name="NVIDIA L40S", kind="cuda", capability=(8, 9))
A100 = Machine(name="NVIDIA A100", kind="cuda", capability=(8, 0))
T4 = Machine(name="Tesla T4", kind="cuda", capability=(7, 5))
MI300 = Machine(name="AMD Instinct MI300X", kind="cuda", capability=None)
CPU = Machine(name="Some CPU", kind="cpu")
VNNI = Machine(name="Some newer CPU", kind="cpu", int8=True)

N, E, U = "native", "emulated", "unavailable"
GATES = [
    # machine, bf16, fp8, mxfp8, nvfp4, int8
    (B200, N, N, N, N, N),
    (B200_BARE, N, N, N, N, N),
    (RTX_PRO, N, N, N, N, N),
    (H100, N, N, E, E, N),
    (L40S, N, N, E, E, N),
    (A100, N, E, E, E, N),
    (T4, E, U, U, U, U),
    (MI300, N, U, U, U, U),
    (CPU, N, E, E, E, E),
    (VNNI, N, E, E, E, N),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.first_too = nn.Linear(64, 128)
        self.inner = nn.ModuleDict({"first": nn.Linear(128, 64)})


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize(("machine", "expected"), [(m, e) for m, *e in GATES])
def test_gates(machine, expected):
    found = [support(p, machine) for p in PRECISIONS]
    assert [s.execution for s in found] == expected
    assert [s.precision for s in found] == list(PRECISIONS)
    for s in found:
        assert s.reason.endswith(".") and "\n" not in s.reason
        assert bool(s.gemm) == (s.execution != "unavailable")


def test_reasons_name_the_device_and_what_it_lacks():
    assert "H100" in support("mxfp8", H100).reason and "10.0" in support("mxfp8", H100).reason
    assert "has 8.0" in support("fp8", A100).reason and "8.9" in support("fp8", A100).reason
    assert "NVIDIA" in support("nvfp4", MI300).reason
    assert "mslk-cuda" in support("nvfp4", B200_BARE).reason
    assert "mslk" not in support("nvfp4", B200).reason
    assert "VNNI or AMX" in support("int8", CPU).reason and "exact" in support("int8", CPU).reason
    assert "Tesla T4 has 7.5" in support("int8", T4).reason


def test_only_nvfp4_on_blackwell_with_mslk_uses_the_fused_quantizer():
    machines = [m for m, *_ in GATES]
    fused = [(m, p) for m in machines for p in PRECISIONS if support(p, m).fused_quantizer]
    assert fused == [(B200, "nvfp4"), (RTX_PRO, "nvfp4")]


@pytest.mark.parametrize(("version", "recorded"), [("2.11.0+cu130", False), ("2.12.0", True), ("2.14.1", True)])
def test_no_cuda_graph_of_ada_fp8_before_torch_2_12(monkeypatch, version, recorded):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    without = [(m, p) for m, *_ in GATES for p in PRECISIONS if support(p, m).no_graph]
    assert without == ([] if recorded else [(L40S, "fp8")])
    assert recorded or version in support("fp8", L40S).no_graph


PASCAL = (6, 1)


@pytest.mark.parametrize(
    ("modules", "version", "system", "words"),
    [
        ({}, (9, 0), "Linux", None),
        ({"triton": None, "triton.compiler": None}, (9, 0), "Windows", "pip install triton-windows"),
        ({"triton": None, "triton.compiler": None}, (9, 0), "Linux", "pip install triton,"),
        ({"triton.compiler": None}, (9, 0), "Linux", "Triton does not load"),
        ({}, PASCAL, "Linux", "7.0, this GPU has 6.1"),
    ],
)
def test_without_triton_a_gpu_says_that_nothing_is_compiled(monkeypatch, modules, version, system, words):
    if words is None or "triton" in words:
        pytest.importorskip("triton", reason="Triton is for Linux only")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(capability.platform, "system", lambda: system)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: version)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    machine = detect("cuda")
    if words is None:
        assert (machine.no_compile, machine.note) == ("", "")
    else:
        assert words in machine.no_compile and machine.no_compile in machine.note


@pytest.mark.parametrize("lent", [True, False])
def test_a_card_that_is_lent_is_shared_and_nothing_is_compiled_on_it(monkeypatch, lent):
    pytest.importorskip("triton", reason="Triton is for Linux only")
    monkeypatch.setenv("SPACES_ZERO_GPU", "true" if lent else "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX PRO 6000 Blackwell Server Edition")
    machine = detect("cuda")
    assert machine.shared == lent and bool(machine.no_compile) == lent
    assert machine.note == (f"{capability.SHARED_CARD} Nothing is compiled: {capability.LENT}." if lent else "")
    assert mode(1, support("nvfp4", machine), torch.device("cuda")) == (EAGER if lent else GRAPHS)


def proc(tmp_path, version):
    """As an open and a closed kernel module write it."""
    file = tmp_path / "version"
    file.write_text(
        f"NVRM version: NVIDIA UNIX {version}  Release Build  (dvs-builder)  Tue Mar 18 04:51:15 UTC 2025\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    return file


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_the_drivers_version_is_read(tmp_path, kind):
    assert nvidia_driver(proc(tmp_path, f"{kind}  535.104.05")) == "535.104.05"


@pytest.mark.parametrize(
    ("script", "found"),
    [("echo 572.60", "572.60"), ("echo no devices; exit 9", None), (None, None)],
    ids=["nvidia-smi", "it fails", "it is missing"],
)
def test_without_proc_nvidia_smi_is_asked(tmp_path, monkeypatch, script, found):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert nvidia_driver(tmp_path / "nothing") == found


@pytest.mark.parametrize(
    ("cuda", "driver", "environment", "words"),
    [
        ("13.0", None, {}, []),
        (None, None, {}, []),
        ("13.0", "535.104.05", {}, ["535.104.05 is too old", "CUDA 13.0 needs driver 580", "update the driver"]),
        ("13.0", "579.99", {}, ["too old"]),
        ("12.8", "470.1", {}, ["CUDA 12.8 needs driver 525"]),
        ("14.0", "470.1", {}, ["too old"]),
        ("13.0", "580.65.06", {}, ["580.65.06 is here", "nvidia-smi", "--gpus all"]),
        ("12.8", "535.104.05", {}, ["can use no GPU"]),
        (None, "535.104.05", {}, ["built without CUDA", "pytorch.org"]),
        ("13.0", "535.104.05", {"CUDA_VISIBLE_DEVICES": ""}, []),
        ("13.0", "535.104.05", {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ("13.0", "535.104.05", {"CUDA_VISIBLE_DEVICES": "0"}, ["too old"]),
    ],
)
def test_why_a_gpu_is_not_used(cuda, driver, environment, words):
    said = unusable_gpu(cuda, driver, environment)
    assert all(word in said for word in words) and bool(said) == bool(words)
    assert "\n" not in said and said.count(". ") == 0


def test_an_old_driver_is_no_cpu_in_silence(monkeypatch, caplog, logged):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(capability, "nvidia_driver", lambda: "535.104.05")
    assert capability.default_device() == "cpu"
    assert "This runs on the CPU, not on a GPU. The NVIDIA driver 535.104.05 is too old" in caplog.text
    assert "too old" in detect("cpu").note
    with pytest.raises(UnsupportedError, match=r"535\.104\.05 is too old .* needs driver 580"):
        detect("cuda")
    caplog.clear()
    monkeypatch.setattr(capability, "nvidia_driver", lambda: None)
    assert capability.default_device() == "cpu" and not logged() and detect("cpu").note == ""


def test_unknown_precision():
    with pytest.raises(ValueError, match="int2"):
        support("int2", CPU)


def test_detects_the_cpu():
    machine = detect("cpu")
    assert machine.kind == "cpu" and machine.capability is None and not machine.mslk
    assert machine.name.strip() == machine.name != ""


def test_detect_refuses_devices_that_are_not_there():
    with pytest.raises(UnsupportedError, match="cuda:99"):
        detect("cuda:99")
    with pytest.raises(UnsupportedError, match="mps"):
        detect("mps")


CPU_TENSORS = {"fp8": EmulatedFP8Tensor, "mxfp8": EmulatedMXFP8Tensor, "nvfp4": EmulatedNVFP4Tensor, "int8": Int8Tensor}


@pytest.mark.parametrize("name", CPU_TENSORS)
def test_quantizes_exactly_the_named_layers(net, name):
    before = copy.deepcopy(net)
    assert quantize_linear_modules(net, {"first"}, support(name, CPU)) is net
    assert type(net.first.weight.data) is CPU_TENSORS[name]
    assert stored_precision(net.first.weight) == name
    for left in ("first_too", "inner.first"):
        weight = net.get_submodule(left).weight
        assert stored_precision(weight) == "bf16"
        assert torch.equal(weight, before.get_submodule(left).weight)

    x = torch.randn(2, 33, 64).to(torch.bfloat16)
    with torch.inference_mode():
        exact, got = before.first(x).float(), net.first(x).float()
    error = (got - exact).norm() / exact.norm()
    lower, upper = {"fp8": (0.01, 0.06), "mxfp8": (0.01, 0.06), "nvfp4": (0.05, 0.2), "int8": (0.002, 0.03)}[name]
    assert lower < error < upper


@pytest.mark.parametrize("name", CPU_TENSORS)
def test_zero_rows_are_harmless(net, name):
    net.first.weight[5] = 0
    quantize_linear_modules(net, {"first"}, support(name, CPU))
    x = torch.randn(4, 64).to(torch.bfloat16)
    x[2] = 0
    with torch.inference_mode():
        out = net.first(x)
    assert out.isfinite().all()
    assert torch.equal(out[2], net.first.bias)
    assert torch.equal(out[:, 5], net.first.bias[5].expand(4))


def test_bf16_leaves_everything_alone(net):
    before = copy.deepcopy(net.state_dict())
    quantize_linear_modules(net, {"first"}, support("bf16", CPU))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_refuses_what_it_cannot_quantize(net):
    with pytest.raises(UnsupportedError, match="Tesla T4"):
        quantize_linear_modules(net, {"first"}, support("nvfp4", T4))
    with pytest.raises(ValueError, match="second is not"):
        quantize_linear_modules(net, {"first", "second"}, support("nvfp4", CPU))
    with pytest.raises(ValueError, match="inner is not"):
        quantize_linear_modules(net, {"inner"}, support("nvfp4", CPU))
    with pytest.raises(ValueError, match="first is not a bf16"):
        quantize_linear_modules(net.float(), {"first"}, support("nvfp4", CPU))
    assert stored_precision(net.to(torch.bfloat16).first.weight) == "bf16"


def test_stored_precision_knows_no_fp32():
    with pytest.raises(ValueError, match="float32"):
        stored_precision(nn.Parameter(torch.zeros(2, 2)))


def test_native_fp8_is_rowwise_guarded_and_leaves_inductor_alone(net):
    settings = torch._inductor.config.get_config_copy()
    net.first.weight[5] = 0
    quantize_linear_modules(net, {"first"}, support("fp8", H100))
    weight = net.first.weight.data
    assert type(weight) is Float8Tensor and stored_precision(weight) == "fp8"
    assert weight.scale.shape == (128, 1)
    assert weight.kernel_preference == weight.act_quant_kwargs.kernel_preference == KernelPreference.TORCH
    assert weight.act_quant_kwargs.hp_value_lb > 0
    assert not weight.qdata.isnan().any() and (weight.scale > 0).all()
    assert torch._inductor.config.get_config_copy() == settings


def test_emulated_and_native_fp8_hold_the_same_weights(net):
    other = copy.deepcopy(net)
    native = quantize_linear_modules(net, {"first"}, support("fp8", H100)).first.weight.data
    emulated = quantize_linear_modules(other, {"first"}, support("fp8", CPU)).first.weight.data
    assert torch.equal(native.qdata.view(torch.uint8), emulated.values.view(torch.uint8))
    assert torch.equal(native.scale, emulated.row_scales)


@pytest.mark.parametrize(("machine", "kernel"), [(B200, KernelPreference.AUTO), (H100, KernelPreference.EMULATED)])
def test_mxfp8_kernel_follows_the_hardware(net, machine, kernel):
    quantize_linear_modules(net, {"first"}, support("mxfp8", machine))
    weight = net.first.weight.data
    assert type(weight) is MXTensor and stored_precision(weight) == "mxfp8"
    assert weight.kernel_preference == weight.act_quant_kwargs.kernel_preference == kernel
    assert weight.elem_dtype == weight.act_quant_kwargs.elem_dtype == torch.float8_e4m3fn
    assert weight.block_size == 32


@pytest.mark.parametrize("machine", [B200, B200_BARE])
def test_native_nvfp4_uses_triton_only_with_mslk(net, machine):
    quantize_linear_modules(net, {"first"}, support("nvfp4", machine))
    weight = net.first.weight.data
    assert type(weight) is NVFP4Tensor and stored_precision(weight) == "nvfp4"
    assert weight.act_quant_kwargs.use_triton_kernel == machine.mslk
    assert weight.act_quant_kwargs.use_dynamic_per_tensor_scale


def test_emulated_and_native_nvfp4_hold_the_same_weights(net):
    other = copy.deepcopy(net)
    native = quantize_linear_modules(net, {"first"}, support("nvfp4", B200)).first.weight.data
    emulated = quantize_linear_modules(other, {"first"}, support("nvfp4", H100)).first.weight.data
    assert torch.equal(native.qdata, emulated.codes)
    assert torch.equal(native.per_tensor_scale, emulated.tensor_scale)
    scales = from_blocked(native.scale, *emulated.block_scales.shape)
    assert torch.equal(scales.view(torch.uint8), emulated.block_scales.view(torch.uint8))


@pytest.fixture
def scaled_mm(monkeypatch):
    """As a Blackwell multiplies; no CPU does."""
    monkeypatch.setattr(torch, "_scaled_mm", products.multiply)


EXTREMES = {
    "ordinary": lambda w: w,
    "all zero": lambda w: w * 0,
    "a zero row": lambda w: w.index_fill(0, torch.tensor([5]), 0),
    "a zero block": lambda w: torch.cat([w[:, :32] * 0, w[:, 32:]], 1),
    "all but zero": lambda w: w.sign() * 2.0**-130,
    "one value": lambda w: w.sign() * 448 * 6,
    "large": lambda w: w.sign() * 2.0**60,
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_engines_nvfp4_weights_are_torchaos_but_for_what_is_zero(extreme, net):
    weight = EXTREMES[extreme](net.first.weight)
    codes, block_scales, tensor_scale = nvfp4.quantize(weight)
    # torchao divides by 448 * 6, which CUDA makes a multiplication of, as the engine does.
    theirs = weight.abs().max().float() * (1 / (448 * 6))
    assert block_scales.float().isfinite().all() and tensor_scale.isfinite() and tensor_scale > 0
    assert nvfp4.dequantize(codes, block_scales, tensor_scale).isfinite().all()
    if extreme in ("all zero", "all but zero"):
        assert tensor_scale == 1 and not codes.bitwise_and(0x77).any()
        return
    assert torch.equal(tensor_scale, theirs)
    reference = nvfp4_tensor.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=theirs)
    assert torch.equal(codes, reference.qdata)
    # The largest of a block over 6, by a multiplication here: half a unit of e4m3 is far from any tie but by chance.
    assert torch.equal(block_scales.view(torch.uint8), reference.scale.view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "machine"),
    [("mxfp8", B200_BARE), ("mxfp8", H100), ("nvfp4", B200_BARE), ("nvfp4", H100), ("fp8", CPU), ("int8", CPU)],
)
@pytest.mark.parametrize("weights", EXTREMES)
@pytest.mark.parametrize("activations", EXTREMES)
def test_nothing_finite_becomes_nan(net, scaled_mm, name, machine, weights, activations):
    """As a Blackwell without mslk runs it, but for who multiplies; and emulated."""
    net.first.weight.copy_(EXTREMES[weights](net.first.weight))
    x = EXTREMES[activations](torch.randn(130, 64)).to(torch.bfloat16)
    exact = net.first(x).float()
    quantize_linear_modules(net, {"first"}, support(name, machine))
    assert (type(net.first.weight.data) is NVFP4Tensor) == (name == "nvfp4" and machine is B200_BARE)
    with torch.no_grad():
        made = net.first(x).float()
    assert exact.isfinite().all() and made.isfinite().all()
    zero = ("all zero", "all but zero")
    if weights in zero or activations in zero:
        assert torch.equal(made, net.first.bias.float().expand_as(made))


def test_mslk_is_usable_only_if_it_imports(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mslk.quantize.triton.fp4_quantize", None)
    assert capability._mslk_usable() is False


def test_support_is_hashable_and_frozen():
    found = support("fp8", CPU)
    assert found == Support(**vars(found)) and hash(found)
    with pytest.raises(AttributeError):
        found.execution = "native"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CPU_TENSORS)
def test_gpu_runs_what_it_says_it_can(net, name):
    found = support(name, detect("cuda"))
    if found.execution == "unavailable":
        pytest.skip(found.reason)
    x = torch.randn(2, 33, 64).to(torch.bfloat16)
    x[1, 4] = 0
    with torch.inference_mode():
        exact = copy.deepcopy(net).first(x).float()
        quantize_linear_modules(net.cuda(), {"first"}, found)
        got = net.first(x.cuda()).float().cpu()
    assert stored_precision(net.first.weight) == name
    assert got.isfinite().all()
    assert (got - exact).norm() / exact.norm() < {"fp8": 0.06, "mxfp8": 0.06, "nvfp4": 0.2, "int8": 0.03}[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_native_fp8_is_close_to_emulated_fp8(net):
    machine = detect("cuda")
    if support("fp8", machine).execution != "native":
        pytest.skip(support("fp8", machine).reason)
    other = quantize_linear_modules(copy.deepcopy(net).cuda(), {"first"}, support("fp8", CPU))
    quantize_linear_modules(net.cuda(), {"first"}, support("fp8", machine))
    x = torch.randn(512, 64, device="cuda").to(torch.bfloat16)
    with torch.inference_mode():
        native, emulated = net.first(x).float(), other.first(x).float()
    # Hopper accumulates FP8 in fewer bits than fp32.
    assert (native - emulated).norm() / emulated.norm() < 2e-3
