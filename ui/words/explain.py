"""What a format, a recipe or a badge is, for whoever never heard of it: said where it is hovered, pressed, focused."""

from __future__ import annotations

from engine.columns import FP8_ATTENTION, POST, Column
from engine.formats import FORMATS, LABELS, QUANTIZED, REFERENCE
from ui.words.common import NAMES, WHY
from ui.words.how import layout

RECIPES = {
    POST: "By the post's recipe: most layers are quantized, and those that it names stay in bf16.",
    "post-corrected": "By the post's recipe, with the names that the layers really have.",
    "tuned": "Tuned: the post's recipe with better rounding, and where a search found that it helps, a few layers in "
    "other formats and a few steps with more bits.",
    "rebalanced": "Rebalanced: no more bytes and no more product time than the post's recipe, spent on other layers, "
    "with better rounding.",
    "strict": "Strict: only layers whose products are large in every dimension, as the post's text says.",
    "full": "Full: every layer that the format can take.",
}
OPTIONS = {
    FP8_ATTENTION: "With FP8 attention: it is computed from FP8 queries, keys and values, which loses more; emulated."
}
BADGES = {
    "native": "Ran in the format's own arithmetic on this device, so its time and memory are the format's.",
    "emulated": WHY["emulated"],
    "recorded": "Made earlier, on the device and the day that stand beside it; nothing in it was measured now.",
    "quoted": "Published by the authors of the post, for their device; this project did not measure it.",
}


def purpose() -> str:
    """What this page is for, in one sentence."""
    least = min((FORMATS[name] for name in QUANTIZED), key=lambda row: row.bits)
    return (
        f"{least.label} stores a model's numbers in {least.bits} bits where {LABELS[REFERENCE]} takes "
        f"{FORMATS[REFERENCE].bits}: smaller and faster; here you see what that costs, in the same picture from the "
        "same noise."
    )


def formats() -> dict[str, str]:
    """Format -> what it is."""
    return {name: _format(name) for name in FORMATS}


def column(asked: Column) -> str:
    """What a column is: its format, its recipe, and its attention where that is lossy."""
    further = (said for option, said in OPTIONS.items() if option in asked.options)
    return " ".join(filter(None, (_format(asked.format), RECIPES.get(asked.rules), *further)))


def _format(name: str) -> str:
    if name == REFERENCE:
        return (
            f"{NAMES[name]} is the {FORMATS[name].bits}-bit format that models are published in; everything else is "
            "compared with it."
        )
    bits, plain = FORMATS[name].bits, FORMATS[REFERENCE].bits
    return f"{NAMES[name]} stores each number in {bits} bits instead of {plain}: {layout(FORMATS[name])}."
