"""The How it works tab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.formats import REFERENCE, Format
from engine.outputs.pool import Seen
from engine.results import Ruler
from ui.words.common import megabytes, score
from ui.words.verdict import on_the_ruler

HOW_FORMATS = "Fewer bits, shared scales"
HOW_FORMATS_SAID = (
    "A weight in bf16 takes 16 bits. A microscaling format gives each value 8 or 4, and every short block of "
    "neighbours one scale of its own, so that one large weight spoils the precision of its block and of nothing else. "
    "Below, 32 neighbouring weights in each format: a pale box is a value, a strong one a scale, its area its bits."
)
E2M1 = "All that 4 bits can say: 15 values. The scale stretches them over a block; what lies between is rounded."
HOW_SELECTIVE = "Not every layer"
HOW_SELECTIVE_SAID = (
    "A recipe keeps in bf16 what gains little or would hurt much: usually the layers that take in the prompt and the "
    "noise, the last ones before the picture, and those too small for a faster product to matter. What is quantized "
    "here, and what stays:"
)
HOW_LPIPS = "How different is different"
HOW_LPIPS_SAID = (
    "LPIPS runs both pictures through a network that was trained to recognise things (AlexNet), and compares what it "
    "sees, layer by layer; 0 is the same. A score alone says little, so it stands on a ruler: on the left the noise of "
    "bf16 itself, computed in another, equally valid order; on the right bf16 with another seed, another picture."
)
HOW_NO_RULER = "The scores of a comparison appear here once it is finished."
NOISE, OTHER_SEED = "bf16's own noise", "another seed"


def layout(found: Format) -> str:
    """How a format stores numbers: "4 bits each (e2m1), one e4m3 scale for 16, one fp32 for all"."""
    element = "" if found.id == REFERENCE else f" ({found.element})"
    scales = []
    if found.block:
        kind = "power of two (e8m0)" if found.scale == "e8m0" else f"{found.scale} scale"
        scales.append(f"one {kind} for {found.block}")
    if found.outer:
        shared = "a row" if found.outer == "row" else "all"
        scales.append(f"one fp32{'' if scales else ' scale'} for {shared}")
    return ", ".join([f"{found.bits} bits each{element}", *(scales or ["no scale"])])


def bits(count: int, weights: int) -> str:
    return f"{8 * count / weights:.2f} bits a weight, {megabytes(count)} MB"


def largest(layer: str, inputs: int, outputs: int, name: str) -> str:
    return f"The figures are those of the largest layer of {name} that is quantized: {layer}, {inputs:,} × {outputs:,}."


def signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def selected(plan: Mapping[str, Any], name: str, count: int, reason: str) -> str:
    """A recipe's outcome, with the reason that keeps the most layers."""
    kept = plan["linears"] - plan["quantized"]
    said = f"{plan['quantized']:,} of {plan['linears']:,} Linear layers of {name}; {kept:,} stay bf16"
    return f"{said}, {count:,} of them because: {reason} The Recipe tab lists each." if reason else f"{said}."


def told(name: str, lpips: float, ruler: Ruler, seen: Seen) -> str:
    return f"{name}: {score(lpips)}, {on_the_ruler(lpips, ruler, seen)}."
