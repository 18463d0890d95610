"""Whether native products are right, before anything is shown that was made by them.

A device that has tensor cores for a format need not multiply right with the kernels that are installed: there are
cards on which a product returned zeros, or read its scales in another order, and raised nothing. So before a format's
layers are quantized for the first time, a few products of each of their shapes are made natively and by the exact
emulation, of the same weights and activations. Where they differ the format is emulated from then on, and every place
that says how it runs says why (`capability.support`).

What came of it is kept in the cache folder by device, driver and versions, so that only shapes that were never compared
take time. A product that does not return cannot be ended from within: a watchdog writes that down and ends the process.
So is it written down when a comparison begins, since a fault may end the process by itself.

Compared are the products that a layer makes uncompiled. What Inductor makes of the quantizers before them is not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from engine.environment import versions
from engine.files import cache_folder, write_whole
from engine.formats import FORMATS
from engine.leaving import abandon
from engine.machine import Machine, Proof, Support, nvidia_driver
from engine.quantization import capability

log = logging.getLogger(__name__)

Shape = tuple[int, int, bool]
"""Input and output features of a layer, and whether it can multiply one row a picture."""
ROWS = (1, 77, 512, 4096)
"""Of the activations: a modulation's, an odd number, a text's, a picture's of 1024 x 1024. The first is for layers that
can have it alone: cuBLAS, say, has no FP8 product of 1 row by 12288 x 3072, and no model needs it."""
CPU_ROWS = 512
"""The most on a CPU, where more takes long and meets no other code."""
DEADLINE_SECONDS = 60.0
"""For one product with its emulation, which takes milliseconds once kernels are loaded."""
LIVES = 2
"""Processes that may end while they compare: one may have been ended by somebody, two hardly."""
SEED = 0
LARGEST = 251 / 4
"""The greatest magnitude of an operand. 251 is a prime, so that by the scale of the tensor, which is made of it, no
block's is a tie between two e4m3 values, which a quantizer may break either way."""


def known(machine: Machine) -> Machine:
    """The machine with what was found out before on such a one."""
    kept = {name: _read(machine, name) for name in FORMATS}
    return replace(machine, proofs=tuple(found.proof(name) for name, found in kept.items() if found.is_known))


def prove(machine: Machine, device: torch.device, shapes: Mapping[str, Set[Shape]]) -> Machine:
    """Compare the native products of these formats where that was not done before, and give the machine that knows.

    Args:
        shapes: format -> shapes of the layers that are to be in it. What is not native is passed over.

    Raises:
        RuntimeError: a native product has spoilt the device for this process; the next one emulates the format.
    """
    for name, wanted in shapes.items():
        support = capability.support(name, machine)
        if support.execution == "native" and wanted:
            proof = _prove(machine, device, support, wanted)
            others = tuple(other for other in machine.proofs if other.precision != name)
            machine = replace(machine, proofs=(*others, proof))
    return machine


def _prove(machine: Machine, device: torch.device, support: Support, wanted: Set[Shape]) -> Proof:
    name = support.precision
    kept = _read(machine, name)
    if kept.is_disproved or wanted <= set(kept.shapes):
        return kept.proof(name)

    def hangs(product: str) -> None:
        fault = f"{product} did not return within {DEADLINE_SECONDS:g} s"
        _write(machine, name, replace(kept, fault=fault))
        abandon(f"{capability.support(name, known(machine)).reason} The process had to be ended: please start again.")

    emulated = capability.support(name, replace(machine, proofs=(Proof(precision=name, fault="it is compared"),)))
    with _begun(machine, name, kept):
        for shape in sorted(wanted - set(kept.shapes)):
            for product, fault, distance in _compare(support, emulated, shape, device, hangs):
                if fault:
                    kept = replace(kept, fault=f"{product} {fault}")
                    break
                kept = replace(kept, products=kept.products + 1, distance=max(kept.distance, distance))
            if kept.fault:
                break
            kept = replace(kept, shapes=(*kept.shapes, shape))
    _write(machine, name, kept)
    if kept.fault:
        log.warning(capability.support(name, known(machine)).reason)
        _raise_if_spoilt(device, kept.fault)
    return kept.proof(name)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def _compare(
    native: Support, emulated: Support, shape: Shape, device: torch.device, hangs: Callable[[str], None]
) -> Iterator[tuple[str, str, float]]:
    """Each product of a layer of this shape in words, what is wrong with it, empty for nothing, and its distance."""
    width, out, few = shape
    chance = torch.Generator(device).manual_seed(SEED)
    weight = _uneven(out, width, chance)
    bias = torch.randn(out, generator=chance, device=device).to(torch.bfloat16)
    layers: dict[str, nn.Module] = {}
    for rows in ROWS:
        if (device.type == "cpu" and rows > CPU_ROWS) or (rows == 1 and not few):
            continue
        x = _uneven(rows, width, chance)
        if rows > 1:
            x[rows // 2] = 0
        product = f"a native product of {rows} {'rows' if rows > 1 else 'row'} by {width} x {out}"
        with _watchdog(hangs, product), torch.no_grad():
            try:
                if not layers:
                    layers["native"] = _layer(weight, bias, native)
                made = layers["native"](x)
                made.sum().item()  # some fail only where somebody waits for them
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it raises, it is no product
                said = next(iter(str(error).splitlines()), "").strip().rstrip(".")
                fault, distance = f"raised {type(error).__name__} ({said[:200]})", math.inf
            else:
                if "emulated" not in layers:
                    layers["emulated"] = _layer(weight, bias, emulated)
                distance = furthest(made, layers["emulated"](x))
                fault = _fault(made, distance, FORMATS[native.precision].bound)
        yield product, fault, distance


def _fault(made: Tensor, distance: float, bound: float) -> str:
    if not made.isfinite().all():
        return "holds values that are not numbers"
    return f"is {distance:.2g} away from the exact emulation, {bound:.2g} at most" if distance > bound else ""


def _uneven(rows: int, width: int, chance: torch.Generator) -> Tensor:
    """Normal numbers, times a power of 2 for each row and each block of 16: where scales are all alike, reading the
    wrong ones would show nothing. bf16 (rows, width)."""

    def powers(most: int, *shape: int) -> Tensor:
        return 2.0 ** torch.randint(-most, most + 1, shape, generator=chance, device=chance.device)

    blocks = powers(1, rows, -(-width // 16)).repeat_interleave(16, 1)[:, :width]
    x = torch.randn(rows, width, generator=chance, device=chance.device) * blocks * powers(2, rows, 1)
    x.clamp_(-LARGEST / 2, LARGEST / 2)[0, 0] = LARGEST
    return x.to(torch.bfloat16)


def _layer(weight: Tensor, bias: Tensor, support: Support) -> nn.Module:
    layer = nn.Linear(*reversed(weight.shape), device="meta")  # which draws no random numbers
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    held = nn.ModuleDict({"layer": layer})
    return capability.quantize_linear_modules(held, {"layer"}, support).layer


def furthest(made: Tensor, exact: Tensor) -> float:
    """The greatest relative L2 distance of a row, and, where there are 64 rows or more, of a column, its rows taken as
    equally large. So a single wrong row or column is as far away as a product that is all wrong.

    Args:
        made, exact: (M, N) on one device. A row below 1/1000 of the largest counts as if it were that large.

    Returns:
        Infinity where shapes differ or anything is not a number.
    """
    if made.shape != exact.shape:
        return math.inf
    made, exact = made.float(), exact.float()
    size = exact.square().mean(1, keepdim=True).sqrt()
    size = size.clamp(min=max(1e-3 * size.max().item(), torch.finfo(torch.float32).tiny))
    apart, exact = (made - exact).div_(size).square_(), exact.div_(size).square_()
    distance = apart.mean(1).max()
    if len(made) >= 64:
        distance = torch.maximum(distance, (apart.mean(0) / exact.mean(0).clamp(min=1e-6)).max())
    found = distance.sqrt().item()
    return math.inf if math.isnan(found) else found


def _raise_if_spoilt(device: torch.device, fault: str) -> None:
    """A fault may have taken the device's context with it, which only another process gets back."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise RuntimeError(f"The device is of no more use to this process: {fault}.") from error


# ---------------------------------------------------------------------------------------------------------------------
# What ends the process


@contextmanager
def _watchdog(hangs: Callable[[str], None], product: str) -> Iterator[None]:
    timer = threading.Timer(DEADLINE_SECONDS, hangs, [product])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _begun(machine: Machine, name: str, kept: _Kept) -> Iterator[None]:
    """Written down for as long as the comparison runs, and for good if the process ends over it."""
    _write(machine, name, replace(kept, begun=(*kept.ended, _self())))
    try:
        yield
    except BaseException:  # stopped, or out of memory: nothing came of it
        _write(machine, name, kept)
        raise


def _self() -> tuple[int, float]:
    return os.getpid(), psutil.Process().create_time()


def _is_alive(process: tuple[int, float]) -> bool:
    number, began = process
    try:
        return abs(psutil.Process(number).create_time() - began) < 1
    except psutil.Error:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is known of one format."""

    fault: str = ""
    shapes: tuple[Shape, ...] = ()
    """Of layers whose products agree."""
    products: int = 0
    distance: float = 0.0
    begun: tuple[tuple[int, float], ...] = ()
    """Processes that began a comparison and have not ended it, by number and time of their start."""

    @property
    def ended(self) -> tuple[tuple[int, float], ...]:
        """Those that are no more."""
        return tuple(process for process in self.begun if not _is_alive(process))

    @property
    def is_disproved(self) -> bool:
        return bool(self.fault) or len(self.ended) >= LIVES

    @property
    def is_known(self) -> bool:
        """Anything came of a comparison."""
        return self.is_disproved or self.products > 0

    def proof(self, name: str) -> Proof:
        fault = self.fault
        if not fault and self.is_disproved:
            fault = f"the process ended {len(self.ended)} times over its native products"
        return Proof(precision=name, fault=fault, products=self.products, distance=self.distance)


_driver = cache(nvidia_driver)


def _key(machine: Machine) -> str:
    driver = _driver() if machine.kind == "cuda" else None
    parts = (machine.name, machine.capability, driver, machine.mslk, torch.version.cuda)
    return "|".join([*map(str, parts), *(f"{name} {number}" for name, number in versions().items())])


def _all() -> dict[str, dict[str, Any]]:
    """By machine and format; what is damaged is passed over."""
    try:
        found = json.loads((cache_folder() / "proofs.json").read_text())
        return {key: value for key, value in found.items() if isinstance(value, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _read(machine: Machine, name: str) -> _Kept:
    try:
        found = _all().get(_key(machine), {}).get(name, {})
        return _Kept(**found | {part: tuple(map(tuple, found.get(part, ()))) for part in ("shapes", "begun")})
    except (TypeError, AttributeError):  # somebody else's
        return _Kept()


def _write(machine: Machine, name: str, kept: _Kept) -> None:
    """Without a place to write, the next process compares again."""
    everything = _all()
    everything[_key(machine)] = everything.get(_key(machine), {}) | {name: asdict(kept)}
    file = cache_folder() / "proofs.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(everything, indent=1).encode())
