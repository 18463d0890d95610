"""How it works: the formats, selective quantization and LPIPS, drawn with the figures of the model on the screen.

What is drawn is to scale: in the first figure an area is a number of bits, in the second a length is a number of
bytes. The bits of a format are those of its specification (MX: OCP Microscaling Formats v1.0, 2023; NVFP4: NVIDIA's
e2m1 with e4m3 scales of 16); the bytes of a layer come from the plan, the distances from the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from engine import catalog
from engine.errors import TwinframeError
from engine.formats import FORMATS, OUTER_BITS, PRECISIONS, REFERENCE
from engine.serving.contracts import Worker
from ui import words
from ui.handlers import Parts
from ui.html import cards
from ui.view import View

Plans = Mapping[str, Mapping[str, Any]]
"""Precision -> plan of the denoiser, as the worker gives it."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that four bits can say."""


def tab(worker: Worker, parts: Parts, opened: gr.Tab) -> None:
    """The tab, drawn anew when it opens, with what the Compare tab shows by then."""
    drawn = gr.HTML(apply_default_css=False, elem_id="tf-how")

    def draw(values: dict[str, Any]) -> str:
        view: View = values[parts.shown]
        model_id = view.request.model if view.request else values[parts.form.model]
        recipe = view.request.recipe if view.request else catalog.model(model_id).recipes[0]
        try:
            plans = {p: worker.plan(model_id, p, recipe) for p in PRECISIONS}
        except TwinframeError as error:
            return cards.notice(str(error))
        return page(view, plans)

    opened.select(
        draw, {parts.shown, parts.form.model}, drawn, queue=False, api_visibility="private", show_progress="hidden"
    )


def page(view: View, plans: Plans) -> str:
    """Three figures with a few sentences each."""
    name = catalog.model(plans[REFERENCE]["model"]).name
    chosen = [p for p in plans if p != REFERENCE and (not view.finished or p in {g.precision for g in view.finished})]
    sections = (
        (words.how.HOW_FORMATS, words.how.HOW_FORMATS_SAID, _formats(plans, name)),
        (words.how.HOW_SELECTIVE, words.how.HOW_SELECTIVE_SAID, _selective(plans, chosen or list(plans)[1:], name)),
        (words.how.HOW_LPIPS, words.how.HOW_LPIPS_SAID, _lpips(view)),
    )
    drawn = "".join(f"<section><h2>{head}</h2><p>{said}</p>{figure}</section>" for head, said, figure in sections)
    return f'<div class="tf-tab tf-how">{drawn}</div>'


# Blocks and scales


PITCH, HEIGHT = 10.0, 34.0
"""Of a value, and of a figure; a bit is 2 high where a value is 9 wide."""
DRAWN = 32
"""Neighbouring weights in a figure."""


def _formats(plans: Plans, name: str) -> str:
    last = [*plans.values()][-1]["layers"]
    largest = max(last, key=lambda layer: (layer["quantized"], layer["bytes"][REFERENCE]))
    rows = ""
    for precision, plan in plans.items():
        layer = next(layer for layer in plan["layers"] if layer["name"] == largest["name"])
        said = ""
        if layer["precision"] == precision:  # a recipe may hold this layer in another one
            said = f"<span>{words.how.bits(layer['bytes']['stored'], layer['in'] * layer['out'])}</span>"
        rows += (
            f'<figure class="tf-format"><figcaption><b>{words.NAMES[precision]}</b> '
            f"{words.how.layout(FORMATS[precision])}{said}</figcaption>{_block(precision)}</figure>"
        )
    said = words.how.largest(largest["name"], largest["in"], largest["out"], name)
    return f'{rows}<p class="tf-small">{escape(said)}</p>{_line()}'


def _block(precision: str) -> str:
    """32 values as boxes, as high as they have bits, and their scales beside them."""
    shape = FORMATS[precision]
    drawn, x = [], 0.0
    together = shape.block or DRAWN
    for _ in range(DRAWN // together):
        for _ in range(together):
            drawn.append(_box(x, 9, 2 * shape.bits))
            x += PITCH
        if shape.scale_bits:
            drawn.append(_box(x, 9, 2 * shape.scale_bits, "tf-shared"))
            x += 1.6 * PITCH
    if shape.outer:
        drawn.append(f'<text x="{x + 2:.0f}" y="{HEIGHT - 2:.0f}">…</text>')
        drawn.append(_box(x + 18, 18, OUTER_BITS, "tf-shared"))
    said = escape(f"{words.NAMES[precision]}: {words.how.layout(FORMATS[precision])}")
    return (
        f'<svg viewBox="0 0 400 {HEIGHT:.0f}" data-precision="{precision}" role="img" aria-label="{said}">'
        f"{''.join(drawn)}</svg>"
    )


def _box(x: float, width: float, height: float, kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<rect x="{x:g}" y="{HEIGHT - height:g}" width="{width:g}" height="{height:g}"{of_kind}/>'


def _line() -> str:
    """The fifteen values of NVFP4 between -6 and 6, before their scale; the halves have no room for a label."""
    values = [*(-value for value in reversed(E2M1[1:])), *E2M1]
    marks = "".join(
        f'<line x1="{_at(value)}" x2="{_at(value)}" y1="6" y2="18"/>'
        f'<text x="{_at(value)}" y="32">{"" if value % 1 else words.how.signed(value)}</text>'
        for value in values
    )
    return (
        f'<figure class="tf-line"><svg role="img" aria-label="{words.how.E2M1}">'
        f'<line x1="2%" x2="98%" y1="12" y2="12"/>{marks}</svg><figcaption>{words.how.E2M1}</figcaption></figure>'
    )


def _at(value: float) -> str:
    return f"{50 + 8 * value:.1f}%"


# Which layers


def _selective(plans: Plans, chosen: Sequence[str], name: str) -> str:
    whole = plans[REFERENCE]["bytes"][REFERENCE]
    bars = "".join(_bar(plans[p], whole) for p in (REFERENCE, *chosen))
    last = plans[chosen[-1]]
    reasons: dict[str, int] = {}
    for layer in last["layers"]:
        if layer["precision"] == REFERENCE:
            reasons[layer["reason"]] = reasons.get(layer["reason"], 0) + 1
    most = max(reasons, key=lambda reason: reasons[reason]) if reasons else ""
    said = words.how.selected(last, name, reasons.get(most, 0), most)
    return f'<div class="tf-bytes">{bars}</div><p class="tf-small">{escape(said)}</p>'


def _bar(plan: Mapping[str, Any], whole: int) -> str:
    """The denoiser's bytes as a bar: what is quantized, and what stays bf16."""
    precision, total = plan["precision"], plan["bytes"]["quantized"]
    taken: dict[str, int] = {}
    for layer in plan["layers"]:
        if layer["precision"] != REFERENCE:
            taken[layer["precision"]] = taken.get(layer["precision"], 0) + layer["bytes"]["stored"]
    taken[REFERENCE] = total - sum(taken.values())
    drawn, x = [], 0.0
    for held, count in taken.items():
        drawn.append(
            f'<rect data-precision="{held}" x="{100 * x / whole:.2f}%" width="{100 * count / whole:.2f}%" height="16">'
            f"<title>{words.NAMES[held]}: {words.megabytes(count)} MB</title></rect>"
        )
        x += count
    said = " ".join(words.size(total / 1e9))
    return (
        f"<p><b>{words.NAMES[precision]}</b> <span>{said}</span></p>"
        f'<svg role="img" aria-label="{words.NAMES[precision]}: {said}">{"".join(drawn)}</svg>'
    )


# The ruler


def _lpips(view: View) -> str:
    """The scores on the screen between bf16's own noise and another seed."""
    scores = ((g, words.name(view.asked, g.column), words.verdict.mean_lpips(g)) for g in view.finished)
    made = [(g.precision, name, value) for g, name, value in scores if value is not None]
    if view.ruler is None or not made:
        return f'<p class="tf-small">{words.how.HOW_NO_RULER}</p>'
    ruler = view.ruler
    end = 1.06 * max(ruler.ceiling, *(value for *_, value in made))
    height = 26 * len(made) + 8
    ends = "".join(
        f'<line class="tf-mark" x1="{100 * value / end:.1f}%" x2="{100 * value / end:.1f}%" y1="0" y2="{height}"/>'
        f'<text class="{side}" x="{100 * value / end:.1f}%" y="{height + 15}">{words.score(value)} {said}</text>'
        for value, side, said in (
            (ruler.floor, "tf-right", words.how.NOISE),
            (ruler.ceiling, "tf-left", words.how.OTHER_SEED),
        )
    )
    rows = "".join(
        f'<g data-precision="{precision}"><text class="tf-left" x="-10" y="{y + 4}">{name}</text>'
        f'<line x1="0" x2="{100 * value / end:.1f}%" y1="{y}" y2="{y}"/>'
        f'<circle cx="{100 * value / end:.1f}%" cy="{y}" r="5"/></g>'
        for y, (precision, name, value) in zip(range(18, height, 26), made, strict=False)
    )
    told = " ".join(words.how.told(name, value, ruler, view.seen) for _, name, value in made)
    return (
        f'<figure class="tf-scatter tf-measure"><div><svg role="img" aria-label="{escape(told)}"'
        f' style="height:{height}px">{ends}{rows}</svg></div></figure><p class="tf-small">{escape(told)}</p>'
    )
