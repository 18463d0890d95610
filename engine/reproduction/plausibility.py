"""Whether measurements can be true: products against the card's peak, weights against its bandwidth, memory against
what the weights take.

What passes is not proven; what does not pass was measured wrongly, or by something else than it says. Knows results as
engine/benchmark/bench.py and engine/quality/evaluate.py write them, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine import catalog
from engine.benchmark.methods import column_of
from engine.columns import label
from engine.formats import FORMATS, LABELS, REFERENCE
from engine.reproduction.cards import Card, card

SLACK = 1.03
"""Of what is compared with another measurement or with a catalog's figure."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a denoiser multiplies in one step at the catalog's size, batch 1, both passes of guidance, in TFLOP."""

    linear: float
    """Products of Linear layers."""
    attention: float
    """Of queries with keys, and of what comes of that with values; in bf16, whatever the format."""


STEPS: Mapping[str, Step] = MappingProxyType(
    {
        "flux.1-dev": Step(linear=59.5, attention=14.87),
        "flux.1-schnell": Step(linear=59.5, attention=14.87),
        "qwen-image": Step(linear=111.9, attention=24.97),
        # The text's keys and values are left out, which the engine computes once a call (engine/compiler/text_kv.py).
        "ltx-2": Step(linear=318.7, attention=70.6),
        "flux.2-klein-4b": Step(linear=28.3, attention=6.52),
        "z-image-turbo": Step(linear=46.75, attention=8.37),
    }
)
"""Counted by PyTorch's FlopCounterMode on meta tensors; tests/engine/reproduction/test_plausibility.py counts again.
Qwen-Image's and Z-Image's with 20 tokens of text."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one row was compared with."""

    subject: str
    """Which row."""
    flops: float | None = None
    """The step's fastest time by the card's peak, as a share of the measured; None where either is not known."""
    bandwidth: float | None = None
    """The same by reading the denoiser's weights once."""
    weights: float | None = None
    """Of the whole pipeline, as a share of bf16's by the catalog."""
    faults: tuple[str, ...] = ()
    """What cannot be, a sentence each."""


def of_benchmark(result: Mapping[str, Any]) -> list[Check]:
    """A check of each row of a benchmark."""
    kind = card(result["device"])
    return [_row(row, result, kind) for row in result["rows"]]


def _row(row: Mapping[str, Any], result: Mapping[str, Any], kind: Card | None) -> Check:
    faults: list[str] = []
    subject = f"{result['model']} {label(column_of(row))}, batch {row['batch_size']}, {row['method']}"
    flops = _share(_product_ms(row, result, kind), row["step_ms"])
    bandwidth = _share(_reading_ms(row, result, kind), row["step_ms"])
    if flops is not None and flops > 1:
        faults.append(f"A step in {row['step_ms']:.1f} ms is faster than the card's peak, by {flops:.2f} times.")
    if bandwidth is not None and bandwidth > 1:
        faults.append(
            f"A step in {row['step_ms']:.1f} ms is too short to read the weights once: {bandwidth:.2f} times."
        )
    return Check(
        subject=subject,
        flops=flops,
        bandwidth=bandwidth,
        weights=_weights(row, result["model"], faults),
        faults=tuple([*faults, *_latency(row), *_memory(row, kind), *_batches(row, result)]),
    )


def _share(least: float | None, measured: float | None) -> float | None:
    return least / measured if least is not None and measured else None


def _product_ms(row: Mapping[str, Any], result: Mapping[str, Any], kind: Card | None) -> float | None:
    """Least milliseconds of a step's products; None where the size is not the catalog's, or the card is not known."""
    step, spec = STEPS.get(result["model"]), catalog.KINDS.get(result["model"])
    asked = result["settings"]
    if kind is None or step is None or spec is None:
        return None
    usual = spec.defaults
    if (asked["height"], asked["width"], asked["num_frames"]) != (usual.height, usual.width, usual.num_frames):
        return None
    least = step.linear / kind.peak(row["precision"]) + step.attention / kind.bf16
    return 1000 * least * int(row["batch_size"])


def _reading_ms(row: Mapping[str, Any], result: Mapping[str, Any], kind: Card | None) -> float | None:
    """Least milliseconds in which a denoiser's weights are read once."""
    spec = catalog.KINDS.get(result["model"])
    if kind is None or spec is None or spec.memory_gb is None:
        return None
    denoiser: float = row["memory_gb"]["weights"] - spec.memory_gb.shared
    return denoiser / kind.bandwidth


def _weights(row: Mapping[str, Any], model: str, faults: list[str]) -> float | None:
    spec = catalog.KINDS.get(model)
    if spec is None or spec.memory_gb is None:
        return None
    weights, whole, shared = row["memory_gb"]["weights"], spec.memory_gb.weights, spec.memory_gb.shared
    # A layer of this width has few scales beside its values: none can take less.
    least = shared + spec.memory_gb.transformer * FORMATS[row["precision"]].size(4096, 4096) / (2 * 4096 * 4096)
    if not least / SLACK <= weights <= whole * SLACK:
        between = f"{least:.1f} and {whole:.1f} GB" if row["precision"] != REFERENCE else f"{whole:.1f} GB"
        faults.append(f"Its weights take {weights:.1f} GB, and by the catalog {between}.")
    return float(weights / whole)


def _memory(row: Mapping[str, Any], kind: Card | None) -> list[str]:
    memory, faults = row["memory_gb"], []
    peak = memory["peak_allocated"]
    if peak is not None and peak < memory["weights"]:
        faults.append(f"Its peak of {peak:.1f} GB is less than its weights' {memory['weights']:.1f} GB.")
    if peak is not None and kind is not None and peak > kind.memory:
        faults.append(f"Its peak of {peak:.1f} GB is more than the card has, {kind.memory:.0f} GB.")
    return faults


def _latency(row: Mapping[str, Any]) -> list[str]:
    took, faults = row["latency_s"], []
    if took is None:
        return []
    if row["execution"] != "native":
        faults.append("A format that is emulated has a latency.")
    if not 0 < took["p10"] <= took["median"] <= took["p90"]:
        faults.append("Its median does not lie between its percentiles.")
    phases = [took[name] for name in ("text", "denoise", "decode")]
    if None not in phases and sum(phases) > took["p90"] * SLACK:
        faults.append("Its phases take longer together than the whole call.")
    return faults


def _batches(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """A larger batch is never done sooner than a smaller one by the same method."""
    if row["latency_s"] is None:
        return []
    key = (column_of(row), row["method"])
    smaller = [
        other
        for other in result["rows"]
        if (column_of(other), other["method"]) == key and other["batch_size"] < row["batch_size"] and other["latency_s"]
    ]
    return [
        f"It takes less time than a batch of {other['batch_size']}."
        for other in smaller
        if row["latency_s"]["median"] * SLACK < other["latency_s"]["median"]
    ]


def of_quality(summary: Mapping[str, Any]) -> list[Check]:
    """A check of each column of an evaluation."""
    ceiling = summary["ruler"]["ceiling"]["lpips"]
    found = []
    for row in summary["results"]:
        faults, scores = [], row["lpips"]
        if scores is None:
            faults.append("No pair of pictures has a score.")
        elif not 0 <= scores["mean"] <= 1:
            faults.append(f"An LPIPS of {scores['mean']:.3f} is out of its range.")
        elif ceiling is not None and scores["mean"] > 1.2 * ceiling["mean"]:
            faults.append(f"Its mean LPIPS, {scores['mean']:.3f}, is more than another seed's, {ceiling['mean']:.3f}.")
        if row["not_numbers"]:
            faults.append(f"{row['not_numbers']} of its pictures have values that are not numbers.")
        subject = f"{summary['model']} {LABELS[row['precision']]} {row['recipe']}, LPIPS"
        weights = row["memory_gb"]["weights"] / summary["reference"]["memory_gb"]["weights"]
        if weights > SLACK:
            faults.append("Its weights take more than bf16's.")
        found.append(Check(subject=subject, weights=weights, faults=tuple(faults)))
    return found
