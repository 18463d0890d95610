"""Where a denoising step goes: kernels by kind, gaps between them, and the floor that the hardware leaves.

Kinds are told by the kernels' names: cuBLAS's, cuDNN's and CUTLASS's own, and those that Inductor puts together from
the operations inside. The floor is the step's products and attention, each shape timed alone on the same device in the
same format, and nothing else: no norm, no activation, no copy. Knows a denoiser only by its Linear layers and its calls
of scaled_dot_product_attention.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("GEMM", re.compile(r"^triton_tem|^(?!triton).*(gemm|gemv|nvjet|cutlass|cublas|xmma|splitk)", re.I)),
    ("attention", re.compile(r"^(?!triton).*(flash|fmha|sdpa|attention)", re.I)),
    ("quantize", re.compile(r"^triton.*amax", re.I)),
    ("norm and rotary", re.compile(r"^triton.*(norm|rsqrt|stack|complex)", re.I)),
    ("copies", re.compile(r"^(?!triton).*(memcpy|memset|copy|catarray)", re.I)),
)
"""What a kernel does -> how its name tells; the first that fits counts, and `REST` is what none fits."""
REST = "other elementwise"
PRODUCTS = frozenset({"linear", "mm", "addmm", "_scaled_mm", "_scaled_mm_v2", "_int_mm", "f8f8bf16_rowwise"})
"""Operations that multiply matrices: PyTorch's, and the one that torchao's FP8 takes from mslk."""
_TIMED = 20


@dataclass(frozen=True)
class Product:
    """One matrix product, (m, k) by (k, n), of a Linear layer."""

    m: int
    k: int
    n: int
    kind: str
    """Type of the stored weight."""


@dataclass
class Work:
    """What one step multiplies."""

    products: Counter[Product] = field(default_factory=Counter)
    layers: dict[Product, nn.Linear] = field(default_factory=dict)
    """A layer of each product."""
    attentions: Counter[tuple[int, int, int, int, int]] = field(default_factory=Counter)
    """By (batch, heads, queries, keys, features of a head)."""

    @property
    def gemm_flops(self) -> int:
        """Of all linear layers: 2 M K N each."""
        return sum(2 * p.m * p.k * p.n * times for p, times in self.products.items())

    @property
    def attention_flops(self) -> int:
        """Of both products of attention: 4 batch heads queries keys width each."""
        return sum(4 * b * h * q * k * d * times for (b, h, q, k, d), times in self.attentions.items())


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Work]:
    """Counts the products and attentions of the eager calls inside."""
    work, attention = Work(), F.scaled_dot_product_attention

    def linear(layer: nn.Linear, args: tuple[Any, ...], made: Tensor) -> None:
        product = Product(
            args[0].numel() // layer.in_features,
            layer.in_features,
            layer.out_features,
            type(layer.weight.data).__name__,
        )
        work.products[product] += 1
        work.layers.setdefault(product, layer)

    def attend(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch, heads, queries, features = query.shape
        work.attentions[batch, heads, queries, key.shape[2], features] += 1
        return attention(query, key, *args, **kwargs)

    hooks = [m.register_forward_hook(linear) for m in denoiser.modules() if isinstance(m, nn.Linear)]
    F.scaled_dot_product_attention = attend  # diffusers looks it up at each call
    try:
        yield work
    finally:
        F.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()


def floor(work: Work, device: torch.device) -> dict[str, Any]:
    """Milliseconds that the step's products and attentions take alone, each shape at its own measured rate.

    The product alone is timed, in any format: an activation is quantized before the clock starts. `alone` is false of a
    layer among whose operations no product was found, so that all of it was timed.
    """
    gemm: list[dict[str, Any]] = []
    for product, times in work.products.items():
        layer = work.layers[product]
        products = _alone(layer, product.m, device)
        whole = torch.randn(product.m, product.k, device=device, dtype=torch.bfloat16)
        alone = milliseconds(products or partial(layer, whole), device)
        gemm.append(
            {
                "m": product.m,
                "k": product.k,
                "n": product.n,
                "weight": product.kind,
                "times": times,
                "ms": alone,
                "alone": products is not None,
                "tflops": 2 * product.m * product.k * product.n / alone / 1e9,
            }
        )
    attention: list[dict[str, Any]] = []
    for (b, h, q, k, d), times in work.attentions.items():
        # Laid out as diffusers does: (batch, tokens, heads, features), seen as (batch, heads, tokens, features).
        tensors = [torch.randn(b, n, h, d, device=device, dtype=torch.bfloat16).transpose(1, 2) for n in (q, k, k)]
        alone = milliseconds(partial(F.scaled_dot_product_attention, *tensors), device)
        attention.append(
            {"shape": [b, h, q, k, d], "times": times, "ms": alone, "tflops": 4 * b * h * q * k * d / alone / 1e9}
        )
    parts = {
        "gemm_ms": sum(g["ms"] * g["times"] for g in gemm),
        "attention_ms": sum(a["ms"] * a["times"] for a in attention),
    }
    return parts | {"floor_ms": sum(parts.values()), "gemm": gemm, "attention": attention}


def _alone(layer: nn.Linear, rows: int, device: torch.device) -> Callable[[], object] | None:
    """The matrix products among a layer's operations on random rows, with the operands they had there: without the
    quantization of the activation, in whatever format. None if there is no operation that is known for one."""
    with torch.inference_mode(), _Products() as found:
        layer(torch.randn(rows, layer.in_features, device=device, dtype=torch.bfloat16))
    if not found.calls:
        return None

    def products() -> None:
        for operation, args, kwargs in found.calls:
            operation(*args, **kwargs)

    return torch.inference_mode()(products)


class _Products(TorchDispatchMode):
    """Keeps the matrix products of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self,
        operation: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a quantized tensor's own operation, inside which the product comes
        if operation.overloadpacket.__name__ in PRODUCTS:
            self.calls.append((operation, args, kwargs or {}))
        return operation(*args, **kwargs or {})


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the mean of some in a row on the GPU, after a few untimed ones."""
    for _ in range(3):
        call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(_TIMED):
        call()
    ended.record()
    torch.cuda.synchronize(device)
    return began.elapsed_time(ended) / _TIMED


def table(call: Callable[[], object], device: torch.device, calls: int = 3) -> dict[str, Any]:
    """Run `call` under the profiler: milliseconds of one call by kind and by kernel, and what of its span is idle.

    Returns:
        {"span_ms", "busy_ms", "gaps_ms", "kinds": {kind: ms}, "kernels": [{"name", "kind", "ms", "times"}]}.
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    once = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=activities, schedule=once, acc_events=True) as record:
        call()  # not counted: the first replay of a large CUDA graph under the profiler seems to wait for it
        torch.cuda.synchronize(device)
        record.step()
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
    # The profiler's step is such an annotation: one event as long as all kernels together.
    events = [e for e in record.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return summed([(e.name, e.time_range.start, e.time_range.end) for e in events], calls)


def summed(events: list[tuple[str, float, float]], calls: int) -> dict[str, Any]:
    """The table of some calls' kernels: (name, start, end), in microseconds."""
    spent: dict[str, float] = defaultdict(float)
    kinds: dict[str, float] = defaultdict(float)
    times: Counter[str] = Counter()
    busy, free_from = 0.0, float("-inf")
    for name, start, end in sorted(events, key=lambda event: event[1]):
        spent[name] += end - start
        times[name] += 1
        kinds[kind_of(name)] += end - start
        busy += max(0.0, end - max(start, free_from))
        free_from = max(free_from, end)
    span = max((end for _, _, end in events), default=0.0) - min((start for _, start, _ in events), default=0.0)
    scale = 1 / 1000 / calls
    return {
        "span_ms": span * scale,
        "busy_ms": busy * scale,
        "gaps_ms": (span - busy) * scale,
        "kinds": {kind: ms * scale for kind, ms in _most_first(kinds)},
        "kernels": [
            {"name": name, "kind": kind_of(name), "ms": ms * scale, "times": times[name] / calls}
            for name, ms in _most_first(spent)
        ],
    }


def _most_first(spent: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(spent.items(), key=lambda item: -item[1])


def kind_of(kernel: str) -> str:
    """What a kernel with this name does."""
    return next((kind for kind, pattern in KINDS if pattern.search(kernel)), REST)
