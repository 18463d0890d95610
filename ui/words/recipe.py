"""The Recipe tab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.formats import REFERENCE
from ui.words.common import NAMES, change, megabytes, seconds, size

PLAN_NOTE = "Decided from names and shapes alone, without weights; on the command line"
REASONS, ROLES, OUTSIDE, LAYERS, ALL_LAYERS = "Why", "By role and depth", "Outside the blocks", "Layers", "All"
LAYER, IN, OUT, STORED, REASON = "Layer", "In", "Out", "Stored", "Why"
ROLE, DEPTH, SHAPE = "Role", "Depth", "Shape"
SHOW_ROLE = "Show these layers in the list below"
FILTER, FILTER_HINT, SHOWN = "Filter layers", "Filter, such as attn.to_q or transformer_blocks.*.ff*", "Which layers"
EVERY_LAYER, QUANTIZED, KEPT = "All layers", "Quantized", "Kept in bf16"
FILTERED = "{shown} of {all} layers · {bf16} → {stored} MB"
"""ui/static/recipe.js fills in the numbers."""
FILTERED_NONE = "No layer is called that."
SENSITIVITY = "Which layers are sensitive"
MEASURES = {
    "lpips": ("LPIPS from bf16, in thousandths", 1000),
    "drift": ("Drift: relative error of the denoiser's outputs, summed over the steps, %", 100),
}
"""What a map may show, and by how much its values are multiplied."""


def planned(plan: Mapping[str, Any], name: str) -> str:
    """What a recipe comes to, in one sentence."""
    before, after = plan["bytes"][REFERENCE], plan["bytes"]["quantized"]
    sizes = f"{' '.join(size(before / 1e9))} to {' '.join(size(after / 1e9))}"
    taken = f"{plan['quantized']:,} of the {plan['linears']:,} Linear layers of {name} are quantized"
    return f"{taken}: its denoiser goes from {sizes}, {change(1 - after / before)}."


def unmatched(patterns: Sequence[str]) -> str:
    return f"Rules that match no Linear layer of diffusers' class: {', '.join(patterns)}."


def stack(name: str, blocks: int) -> str:
    return f"{name}, {blocks} blocks"


def held(precision: str, blocks: int) -> str:
    return f"{NAMES.get(precision, precision)} in {blocks} block{'s' if blocks > 1 else ''}"


def run(role: str, first: int, last: int, precision: str) -> str:
    where = f"block {first}" if first == last else f"blocks {first} to {last}"
    return f"{role}, {where}: {NAMES.get(precision, precision)}"


def sensitivity(precision: str, prompts: int) -> str:
    """What maps of sensitivities show; `prompts` are those of LPIPS, if it was measured."""
    lpips = f" LPIPS is a mean over {prompts} prompts." if prompts else ""
    return f"One group of layers at a time in {precision}, everything else in bf16.{lpips} Colours are logarithmic."


def damage(measure: str, value: float) -> str:
    """One value of a map."""
    return seconds(MEASURES[measure][1] * value)


def warm(layers: int, saved: int) -> str:
    return f"{layers} layer{'s' if layers > 1 else ''}, {megabytes(saved)} MB less"
