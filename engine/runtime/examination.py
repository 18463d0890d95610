"""What a device is, how it runs each format and which models it has the memory for, as findings.

Runs nothing and loads no weights: what is told of native products is what was found out before
(engine/quantization/proof.py)."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from engine import catalog
from engine.catalog import ModelSpec
from engine.columns import Column
from engine.errors import NoRoomError
from engine.formats import LABELS, PRECISIONS, QUANTIZED, REFERENCE
from engine.machine import FAULT, FINE, LIMIT, Finding, Machine, Support, nvidia_driver
from engine.quantization import capability, recipes
from engine.results import DENOISER
from engine.runtime import timing
from engine.runtime.residents import Holdings, in_words
from engine.weights import cpu_products, loading, residency


def examine(held: Holdings) -> tuple[Finding, ...]:
    """Findings about a device and its libraries, its formats and the models of the catalog, in this order."""
    return (
        *_device(held.machine),
        *(_format(held.support[name], held.machine) for name in QUANTIZED),
        *(_model(spec, held) for spec in catalog.MODELS.values()),
    )


def _device(machine: Machine) -> Iterator[Finding]:
    capable = "" if machine.capability is None else ", compute capability {}.{}".format(*machine.capability)
    yield Finding(topic="Device", severity=FINE, said=f"{machine.name}{capable}.")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding(topic="PyTorch", severity=FINE, said=f"PyTorch {torch.__version__}, {built}.")
    if driver := nvidia_driver():
        yield Finding(topic="Driver", severity=FINE, said=f"NVIDIA driver {driver}.")
    if machine.note and machine.kind == "cpu":
        said, _, do = machine.note.partition(": ")
        yield Finding(topic="GPU", severity=FAULT, said=f"{said.rstrip('.')}.", do=f"{do[:1].upper()}{do[1:]}")
    if platform.system() == "Darwin":
        said = "A Mac's GPU is not used: its bf16 was never compared with another's, and no format is native there."
        yield Finding(topic="GPU", severity=LIMIT, said=said)
    if machine.kind == "cpu" and cpu_products.are_slow():
        said = "This CPU has no bf16 instructions that PyTorch uses: products are computed in fp32 and rounded once."
        yield Finding(topic="Products", severity=FINE, said=said)
    if machine.kind != "cuda":
        return
    if machine.no_compile:
        why, _, do = machine.no_compile.partition(": ")
        said = f"Nothing is compiled, so bf16 and all others are slower: {why[:1].lower()}{why[1:]}."
        yield Finding(
            topic="Triton",
            severity=FAULT if do else LIMIT,
            said=said,
            do=f"Run {do}." if do.startswith("pip") else f"{do[:1].upper()}{do[1:]}." if do else "",
        )
    else:
        yield Finding(topic="Triton", severity=FINE, said=f"{_package('triton')}, so denoisers are compiled.")
    if machine.mslk:
        yield Finding(topic="mslk", severity=FINE, said=f"{_package('mslk-cuda')}, which quantizes for NVFP4.")
    elif machine.capability is not None and machine.capability >= capability.BLACKWELL:
        said = "Without mslk 1.1, activations are quantized to NVFP4 by slower PyTorch operations."
        yield Finding(topic="mslk", severity=LIMIT, said=said, do="Run pip install mslk-cuda.")


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:  # as triton-windows, or built into another
        return name


def _format(support: Support, machine: Machine) -> Finding:
    label = LABELS[support.precision]
    if support.disproved:
        do = (
            "Update the driver, PyTorch, torchao and mslk, after which it is compared anew; to do that now, delete "
            "proofs.json in the cache folder."
        )
        return Finding(topic=label, severity=FAULT, said=support.reason, do=do)
    if support.execution != "native":
        return Finding(topic=label, severity=LIMIT, said=support.reason)
    proof = machine.proof(support.precision)
    if proof is None:
        said = f"{support.reason.removesuffix('.')}; its products have not been compared with the exact emulation yet."
        do = "Nothing: its first use does it, and so does python -m engine doctor."
        return Finding(topic=label, severity=LIMIT, said=said, do=do)
    return Finding(
        topic=label, severity=FINE, said=f"{support.reason.removesuffix('.')}, {proof.distance:.2g} away at most."
    )


def _model(spec: ModelSpec, held: Holdings) -> Finding:
    """Which formats there is memory for."""
    if spec.memory_gb is None:
        return Finding(topic=spec.name, severity=FINE, said="It is bundled and needs little memory.")
    needs = {name: f"{need:.1f} GB in {LABELS[name]}" for name, need in needed(spec.id).items()}
    fit = fitting(spec, held.device)
    streamed = [LABELS[name] for name, parts in fit.items() if DENOISER in parts]
    there = residency.rooms(held.device)[0]
    room = f"{there.total:.1f} GB of {there.what} here"
    said = f"It needs {', '.join(needs.values())}, of the {room}"
    if streamed and REFERENCE in fit:
        said += f": {in_words(streamed)} {'is' if len(streamed) == 1 else 'are'} streamed from host memory, not timed."
        do = "Nothing for pictures, LPIPS and memory, which are the same; for speedups run it on a larger machine."
        return Finding(topic=spec.name, severity=LIMIT, said=said, do=do)
    if REFERENCE in fit:
        said += ": its text encoders are streamed from host memory." if fit[REFERENCE] else "."
        return Finding(topic=spec.name, severity=FINE, said=said)
    do = "Measure it on a larger machine; the miniatures take the same code."
    said = f"It needs {needs[REFERENCE]}, to which all else is compared, and there are {room}"
    if fit:
        said += f"; {', '.join(needs[name] for name in fit)} can be made, without a reference"
    return Finding(topic=spec.name, severity=LIMIT, said=f"{said}.", do=do)


@cache
def needed(model_id: str) -> dict[str, float]:
    """GB that a model needs in each format by its first recipe, with what a run allocates; none for a bundled one."""
    spec = catalog.model(model_id)
    if spec.memory_gb is None:
        return {}
    rest = spec.memory_gb.shared + spec.memory_gb.one_run
    return {name: plan.quantized_bytes / timing.GB + rest for name, plan in _plans(model_id).items()}


@cache
def _plans(model_id: str) -> dict[str, recipes.Plan]:
    """By format, by the model's first recipe."""
    spec = catalog.model(model_id)
    empty = loading.blueprint(spec)
    return {name: recipes.plan_of(empty, spec, Column.of(name, spec.recipes[0])) for name in PRECISIONS}


def fitting(spec: ModelSpec, device: torch.device) -> dict[str, tuple[str, ...]]:
    """The formats in which a device has the memory for a model, where nothing else is loaded, each with what is then
    streamed (`residency.require`)."""
    found = {}
    for name, plan in _plans(spec.id).items():
        with suppress(NoRoomError):
            found[name] = residency.require(spec, name, plan.quantized_bytes / timing.GB, device)
    return found


def provable(held: Holdings) -> list[recipes.Plan]:
    """The plans of all that this device calls native and has the memory for."""
    native = [name for name in QUANTIZED if held.support[name].execution == "native"]
    if not native:
        return []
    return [
        _plans(spec.id)[name]
        for spec in catalog.MODELS.values()
        for name in fitting(spec, held.device)
        if name in native
    ]
