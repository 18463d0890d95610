"""The Compare tab: the form, the views of its results, what stands under a picture."""

from __future__ import annotations

from collections.abc import Mapping

from engine.catalog import ModelSpec
from engine.columns import Column
from engine.formats import REFERENCE
from engine.machine import FAULT, FINE, LIMIT, Support
from engine.request import CompareRequest
from engine.results import Generation
from ui.words.common import NAMES, RECIPES, name, of_column, of_pair, thing
from ui.words.prompt import can

PROMPT_LABEL = "Prompt"
EXAMPLES_LABEL = "Try"
PRECISIONS_LABEL = "Precisions (bf16 always takes part)"
FURTHER_LABEL = "Add a format by another recipe"
STALE = {
    "act": "Press Generate to see this.",
    "prompt": "Dimmed below: “{prompt}”.",
    "settings": "Dimmed below: the same prompt with other settings.",
    "busy": "Still being made: “{prompt}”.",
    "foreign": "Below: a recording of “{prompt}”. Generate makes what the box says.",
}
"""What is said where the form asks for something else than is shown; ui/static/address.js fills in the prompt."""
SEED_LABEL, DICE = "Seed", "Pick a random seed"
MORE = "Settings"
STEPS_LABEL = "Steps"
GUIDANCE_LABEL = "Guidance"
SIZE_LABEL = "Size"
VIEW_LABEL = "View"
SIDE, SLIDER, FLICKER, DIFFERENCE, TABLE = "Side by side", "Slider", "Flicker", "Difference", "Table"
MAP_LABEL = "Map"
MAPS = {"pixels": "|a − b|", "lpips": "LPIPS"}
MAP_ENDS = {"pixels": "64 levels of 255, or more", "lpips": "LPIPS 0.5, or more"}
"""Of the colour scales; the numbers are those of ui/static/viewer.js."""
PLAY_PAUSE = "Play / pause"
ZOOM = "Zoom of all pictures"
ZOOM_OUT, ZOOM_RESET, ZOOM_IN = "Zoom out (−)", "Whole picture (0)", "Zoom in (+)"
TO_WORST, TO_WORST_HINT = "Worst spot", "Zoom to where the pictures differ most, averaged over an eighth of each side"
FLIP, FLIP_HINT = "Flip", "Show the other one in the same place (F)"
ZOOM_HINT = (
    "Zoom: plus, minus and 0, a pinch, Ctrl and the wheel, or a double click. Move: drag, or the arrow keys. All "
    "pictures move together."
)
LINK, LINK_HINT = "Copy link", "Copy an address that opens this page with these settings"
CODE, CODE_SUMMARY, CODE_COPY = "Copy code", "Code", "Copy"
CODE_NOTE = "The diffusers and torchao calls of this comparison, as programs that run without Twinframe."
COPIED, NOT_COPIED = "Copied", "Press Ctrl+C"
PAIR_LABELS = ("Compare", "with")
"""Of the two columns of a pair."""
SOUND_LABEL, SILENCE = "Sound", "Off"
CURVE = "LPIPS of each frame"
RAN = "What really ran"
NOT_TIMED_NOTE = "Previews were drawn between the steps."
SHARED_DEVICE_NOTE = "Another precision ran on the same device at the same time."
MEASURING_LPIPS, NO_REFERENCE = "Measuring LPIPS", "No LPIPS: there is no bf16 to compare with"
STREAMED_NOTE = "It does not fit on this device, so it was streamed from host memory, block by block."
COMPILED_NOTE = "Something was compiled during this run: press Generate again for a time."
PREVIEWS_LABEL, PREVIEWS_HINT = "Live previews", "Shows what is being made after each step; such a run is not timed."
EMULATED_NOTE = "An emulation's speed and peak are not the format's."
MACHINE, MACHINE_HINT = "This machine", "What this machine is and runs, and how that is known"
SEVERITIES = {FINE: "Fine:", LIMIT: "Limit:", FAULT: "Fault:"}
THEME_TOGGLE = "Switch between light and dark"
WELCOME = "Type a prompt and press Generate."
WELCOME_MORE = (
    "Each precision starts from the same noise and the same prompt embeddings, so whatever differs is the cost of "
    "quantization."
)


def no_latency_note(generation: Generation, asked: CompareRequest) -> str:
    """Why a precision has no latency, in a sentence."""
    if generation.execution == "emulated":
        return generation.disproof or EMULATED_NOTE
    if generation.is_streamed:
        return STREAMED_NOTE
    if asked.previews:
        return NOT_TIMED_NOTE
    return SHARED_DEVICE_NOTE if generation.at_once else COMPILED_NOTE


def prompt_hint(spec: ModelSpec) -> str:
    if said := can(spec.id):
        return said
    return f"Describe a {spec.makes.removesuffix('s')} in up to {spec.limits.prompt_characters} characters"


def batch_label(spec: ModelSpec) -> str:
    return f"{spec.makes.capitalize()} per precision"


def frames_label(spec: ModelSpec) -> str:
    return f"Frames, {spec.defaults.frame_rate:g} a second"


def recipe(recipe_id: str, summary: str) -> str:
    return f"{RECIPES.get(recipe_id, recipe_id)}: {summary}"


def pair_hints(asked: CompareRequest) -> dict[str, str]:
    """How to use each view of two pictures or clips."""
    made = thing(asked)
    click = "Click the picture, or press F" if made == "picture" else "Press F"
    return {
        "slider": f"Drag across the {made}, or use the arrow keys.",
        "flicker": f"{click}, to see the other one in the same place.",
    }


def map_hints(asked: CompareRequest) -> dict[str, str]:
    """What each map of a difference shows."""
    moving = thing(asked) == "clip"
    of_files = ", of the frame that is shown, after video compression" if moving else ""
    of_tensors = ", of the frame that is shown, before video compression" if moving else ""
    box = "The box marks the worst spot."
    return {
        "pixels": f"|a − b| of each pixel, averaged over its three colours{of_files}. {box}",
        "lpips": f"Where LPIPS comes from{of_tensors}: its mean over the whole is the score. {box}",
    }


def preview_alt(name: str, note: str) -> str:
    return f"{name} so far, {note}, a rough preview"


def pair_empty(asked: CompareRequest | None) -> str:
    return f"This view needs two finished {thing(asked)}s." if asked else "This view needs a comparison."


def worst(asked: CompareRequest, below: str, above: str) -> dict[str, str]:
    """What is said of the worst spot of each map; ui/static/viewer.js fills in the numbers."""
    whole = f"over the whole {'picture' if asked.num_frames == 1 else 'frame'}."
    spot = "The worst spot, {size} pixels:"
    return {
        "pixels": f"{spot} {above} is {{worst}} of 255 levels away from {below} there, {{mean}} {whole}",
        "lpips": f"{spot} the LPIPS of {above} is {{worst}} there, {{mean}} {whole}",
    }


def frame_label(name: str) -> str:
    return f"{name}, with zoom"


def link_wrong(reason: str) -> str:
    return f"This link cannot be used, so everything keeps its default: {reason}"


def table_empty(asked: CompareRequest | None) -> str:
    return f"The table fills in as {thing(asked)}s are finished." if asked else "The table needs a comparison."


def reference_note(asked: CompareRequest) -> str:
    return f"The reference: every other {thing(asked)} is measured against this one."


def machine(name: str, support: Mapping[str, Support]) -> str:
    """The device, and what it does natively and emulates: "NVIDIA H100 · FP8 native · MXFP8, NVFP4 emulated"."""
    parts = [name]
    for execution in ("native", "emulated", "unavailable"):
        of_kind = [NAMES[p] for p, s in support.items() if p != REFERENCE and s.execution == execution]
        if of_kind:
            parts.append(f"{', '.join(of_kind)} {execution}")
    return " · ".join(parts)


def chip(column: Column, execution: str) -> str:
    """A column to be chosen: the format, where it is by a recipe of its own with that, and how it runs here."""
    shown = of_pair(column) if column.rules else of_column(column)
    return shown + (" · emulated" if execution == "emulated" or column.fp8_attention else "")


def unavailable(precision: str, reason: str) -> str:
    return f"{NAMES[precision]} is unavailable here: {reason}"


def settings(asked: CompareRequest, model_name: str) -> str:
    """How the pictures were asked for, after the prompt."""
    parts = [
        model_name,
        f"{asked.width} × {asked.height}",
        *([f"{asked.num_frames} frames"] if asked.num_frames > 1 else []),
        f"{asked.num_inference_steps} steps",
        *([f"guidance {asked.guidance_scale:g}"] if asked.guidance_scale else []),
        f"seed {asked.seed}",
    ]
    if asked.batch_size > 1:
        parts.append(f"{asked.batch_size} {thing(asked)}s")
    return " · ".join(parts)


def alt(column: str, asked: CompareRequest, index: int) -> str:
    which = f", {thing(asked)} {index + 1} of {asked.batch_size}" if asked.batch_size > 1 else ""
    return f"{name(asked, column)}: {asked.prompt}, seed {asked.seed}{which}"
