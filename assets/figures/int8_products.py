"""What INT8 costs beside bf16: the bare product, by `torch._int_mm` and as the engine multiplies, and a whole layer.

python -m assets.figures.int8_products [cpu|cuda] > assets/figures/int8-products-<device>.json

On a CPU one core is timed by its own clock, which other programs do not stop; on a GPU a run of calls between two
events. Each in turns, the median of `ROUNDS`. A layer quantizes its activation and is not compiled here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

from engine.environment import versions
from engine.quantization import capability, int8

SHAPES = {
    "cpu": ((272, 320, 1280), (272, 1280, 320), (272, 320, 320), (17, 320, 320), (1, 320, 1920)),
    "cuda": ((4608, 3072, 12288), (4608, 12288, 3072), (4608, 3072, 3072), (512, 3072, 3072), (1, 3072, 18432)),
}
"""Rows, input and output features: of `mini-flux` at 256x256, and of FLUX.1-dev at 1024x1024."""
ROUNDS, CALLS = 15, 20
"""Medians are of so many; on a GPU each is of so many calls."""


def seconds(call: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def measured(rows: int, k: int, n: int, device: str) -> Mapping[str, float]:
    """Name -> milliseconds."""
    x, weight = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in ((rows, k), (n, k)))
    codes, weight_codes = int8.quantize_rows(x)[0], int8.quantize_rows(weight)[0]
    exact = codes.double() @ weight_codes.double().t()
    assert torch.equal(int8.multiply(codes, weight_codes).double(), exact)
    layers = [nn.Linear(k, n, device=device, dtype=torch.bfloat16).requires_grad_(False) for _ in range(2)]
    quantize_(layers[1], int8.Int8Config())
    calls = {
        "bf16 product": lambda: x @ weight.t(),
        "fp32 product": lambda: x.float() @ weight.float().t(),
        "torch._int_mm": lambda: torch._int_mm(codes, weight_codes.t()),
        "the engine's product": lambda: int8.multiply(codes, weight_codes),
        "bf16 layer": lambda: layers[0](x),
        "INT8 layer": lambda: layers[1](x),
    }
    if device == "cuda" and rows < int8.CUDA_ROWS:
        del calls["torch._int_mm"]
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    return {name: round(1e3 * median(values), 4) for name, values in taken.items()}


def measure(device: str) -> dict:
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    machine = capability.detect(device)
    with torch.inference_mode():
        found = [{"rows": m, "in": k, "out": n, "ms": measured(m, k, n, device)} for m, k, n in SHAPES[device]]
    return {
        "device": machine.name,
        "int8_instructions": machine.kind == "cuda" or machine.int8,
        "instruction_set": torch.backends.cpu.get_cpu_capability() if device == "cpu" else None,
        "versions": versions(),
        "rounds": ROUNDS,
        "products": found,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1] if len(sys.argv) > 1 else "cpu"), indent=1))
