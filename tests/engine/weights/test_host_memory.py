"""Weights to host memory and back: bit for bit, for every kind of tensor a denoiser is made of."""

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.quantization import Float8Tensor, PerRow

from engine.quantization.emulation import EmulatedFP8Tensor, EmulatedNVFP4Tensor
from engine.quantization.int8 import Int8Tensor
from engine.weights.host_memory import CHUNK, Pool

CPU = torch.device("cpu")
gpu = pytest.mark.gpu
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

QUANTIZED = {
    "EmulatedNVFP4Tensor": EmulatedNVFP4Tensor.from_weight,
    "EmulatedFP8Tensor": EmulatedFP8Tensor.from_weight,
    "Int8Tensor": Int8Tensor.from_weight,
    "Float8Tensor": lambda weight: Float8Tensor.from_hp(weight, granularity=PerRow()),
    "MXTensor": lambda weight: MXTensor.to_mx(weight, torch.float8_e4m3fn, 32),
    "MXTensor, swizzled": lambda weight: MXTensor.to_mx(weight, torch.float8_e4m3fn, 32, is_swizzled_scales=True),
    "NVFP4Tensor": lambda weight: NVFP4Tensor.to_nvfp4(
        weight, per_tensor_scale=torch.tensor(0.5, device=weight.device)
    ),
}


def weight(device=CPU):
    return torch.randn(64, 96, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass
class Plain:
    """A tensor as it was, with its layout."""

    bits: torch.Tensor
    stride: tuple
    dtype: torch.dtype


def plain(tensor):
    """All plain tensors inside, and what the outer ones say of themselves."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        inside = [entry for name in names for entry in plain(getattr(tensor, name))]
        return [(type(tensor), str(context), tensor.shape, tensor.dtype), *inside]
    return [Plain(tensor.detach().cpu().clone(), tensor.stride(), tensor.dtype)]


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        if isinstance(one, tuple):
            assert one == other
            continue
        assert (one.stride, one.dtype, one.bits.shape) == (other.stride, other.dtype, other.bits.shape)
        assert torch.equal(bits(one.bits), bits(other.bits))


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def holding(tensor, device=CPU):
    module = nn.Linear(1, 1, device=device)
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


def there_and_back(modules, device, pool):
    before = [[plain(t) for t in (*m.parameters(), *m.buffers())] for m in modules]
    stored = pool.store(modules)
    assert all(t.is_meta for m in modules for t in (*m.parameters(), *m.buffers()))
    stored.restore(device)
    after = [[plain(t) for t in (*m.parameters(), *m.buffers())] for m in modules]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            same(a, b)
    assert all(t.device.type == device.type for m in modules for t in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize("chunk", [1000, CHUNK])  # the first cuts through tensors and numbers
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_come_back_bit_for_bit(kind, chunk):
    module = holding(QUANTIZED[kind](weight()))
    x = torch.randn(8, 96, dtype=torch.bfloat16)
    module.bias = None
    before = module(x) if kind.startswith(("Emulated", "Int8")) else None
    there_and_back([module], CPU, Pool(pinned=False, chunk=chunk))
    assert isinstance(module.weight, nn.Parameter) and not module.weight.requires_grad
    assert before is None or torch.equal(module(x), before)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last),
        torch.tensor(3.5),
        torch.randn(5, 7).t(),
        torch.randn(6, 10)[:, 2:5],
        torch.empty(0, 4),
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.randn(3, 4, dtype=torch.complex64),
        torch.tensor([float("nan"), -0.0, float("inf")]),
    ],
    ids=["channels_last", "scalar", "transposed", "gaps", "empty", "bool", "int64", "complex", "nan"],
)
def test_plain_tensors_keep_bits_and_layout(tensor):
    module = nn.Module()
    module.register_buffer("held", tensor)
    there_and_back([module], CPU, Pool(pinned=False, chunk=16))


def test_tied_weights_stay_tied_and_are_stored_once():
    first, second = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    second.weight = first.weight
    pool = Pool(pinned=False, chunk=64 * 32 * 4)
    there_and_back([first, second], CPU, pool)
    assert second.weight is first.weight and pool.bytes == 64 * 32 * 4


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_block_comes_alone_bit_for_bit(kind):
    model = nn.Module()
    model.many = nn.ModuleList([holding(QUANTIZED[kind](weight()))])
    block, before = model.many[0], [plain(t) for t in model.parameters()]
    stored = Pool(pinned=False, chunk=1000).store([model])
    stored.copy(block, stored.bring(block, CPU))
    for old, new in zip(before, model.parameters(), strict=True):
        same(old, plain(new))
    stored.leave(block)
    assert all(t.is_meta for t in model.parameters())


def test_a_block_that_shares_with_another_module_does_not_come_alone():
    one, other = nn.Module(), nn.Linear(4, 4)
    one.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    one.many[0].weight = other.weight
    stored = Pool(pinned=False, chunk=64).store([one, other])
    assert one.many[0] not in stored and one.many[1] in stored and other.weight.is_meta
    stored.restore(CPU)
    assert one.many[0].weight is other.weight and not other.weight.is_meta


def test_using_what_waits_fails():
    module = nn.Linear(4, 4)
    Pool(pinned=False, chunk=64).store([module])
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(module(torch.ones(1, 4)).sum())


def test_host_memory_is_used_again():
    pool = Pool(pinned=False, chunk=1000)
    modules = [nn.Linear(40, 40) for _ in range(3)]
    for module in modules:
        pool.store([module]).restore(CPU)
    assert pool.bytes == 7000  # 40 * 40 weights and 40 biases of 4 bytes, 6560 in all
    waiting = pool.store(modules[:1])
    pool.store(modules[1:2])
    assert pool.bytes == 14000
    waiting.discard()
    pool.store(modules[2:])
    assert pool.bytes == 14000


def test_a_host_without_memory_changes_nothing(monkeypatch, caplog):
    module, pool = nn.Linear(40, 40), Pool(pinned=False, chunk=1000)
    before = plain(module.weight)
    original, calls = torch.empty, []

    def empty(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    assert pool.store([module]) is None
    same(plain(module.weight), before)
    assert pool.bytes == 2000 and "out of memory" in caplog.text


def test_compiled_code_outlives_the_move():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    with torch.inference_mode():  # as the engine's thread
        linear = holding(EmulatedNVFP4Tensor.from_weight(weight()))
        linear.bias = None
        module = nn.Sequential(linear, nn.LayerNorm(64, dtype=torch.bfloat16))
        compiled, x = torch.compile(module, backend=backend, fullgraph=True), torch.randn(8, 96, dtype=torch.bfloat16)
        before = compiled(x)
        Pool(pinned=False, chunk=1000).store([module]).restore(CPU)
        assert torch.equal(compiled(x), before)
    assert len(seen) == 1


@gpu
@cuda
@pytest.mark.parametrize("kind", QUANTIZED)
def test_gpu_weights_wait_pinned_and_come_back(kind):
    device = torch.device("cuda")
    there_and_back([holding(QUANTIZED[kind](weight(device)), device)], device, Pool(pinned=True, chunk=1024))


@gpu
@cuda
def test_gpu_a_recorded_graph_is_recorded_again_after_a_move():
    device = torch.device("cuda")
    module = nn.Linear(256, 256, dtype=torch.bfloat16, device=device).requires_grad_(False)
    compiled, x = (
        torch.compile(module, mode="reduce-overhead"),
        torch.randn(8, 256, dtype=torch.bfloat16, device=device),
    )
    with torch.inference_mode():
        for _ in range(3):
            before = compiled(x).clone()
        stored = Pool(pinned=True, chunk=2**20).store([module])
        elsewhere = torch.full((2**20,), float("nan"), device=device)  # takes the old place
        stored.restore(device)
        for _ in range(3):
            assert torch.equal(compiled(x), before)
        del elsewhere


@gpu
@cuda
def test_gpu_gets_20_gb_a_second():
    device = torch.device("cuda")
    module = nn.ModuleList(nn.Linear(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(32))
    size = sum(p.numel() * p.itemsize for p in module.parameters())
    pool = Pool(pinned=True)
    pool.store([module]).restore(device)  # pins the memory and makes room on the device
    stored = pool.store([module])
    torch.cuda.synchronize()
    began = time.perf_counter()
    stored.restore(device)
    assert size / (time.perf_counter() - began) >= 20e9
