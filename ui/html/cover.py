"""The first screen as plain HTML, which a new visitor sees until Gradio has built the page: the same view drawn by the
same functions (ui/html/cards.py), the form as it will be, and no id or class that the page's scripts could take for its
own, as all of it lies in a closed shadow root. ui/static/cover.js hands over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from engine.formats import REFERENCE
from ui import style, words
from ui.html import cards
from ui.view import View

ABOVE = """
twinframe-cover { position: absolute; inset: 0 0 auto; z-index: 100; }
twinframe-cover ~ gradio-app { opacity: 0; }
"""
"""Of the page itself: what is being built is not seen before it is complete."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the form shows at first."""

    model: str
    """Its name."""
    models: int
    """How many there are to choose from."""
    examples: Sequence[str]
    chips: Sequence[tuple[str, str, bool]]
    """Label, column, and whether it is chosen."""
    hints: str
    """HTML of what to know of the model here."""


@dataclass(frozen=True, kw_only=True)
class Cover:
    """What the page's body begins with, and which pictures it shows."""

    html: str
    pictures: tuple[str, ...]
    """Addresses relative to the page."""


def cover(view: View, form: Form, header: str, tabs: Sequence[str]) -> Cover | None:
    """The first screen of a view; None for one that has no pictures of its own: a welcome, or clips, which need their
    player.

    Args:
        header: HTML of the page's head.
        tabs: their names, the first of which is open.
    """
    if view.comparison is None or view.asked.num_frames > 1:
        return None
    asked, made = view.asked, view.comparison
    results = {
        "headline": cards.headline(view),
        "views": cards.views(),
        "stage": cards.stage(view),
        "pairs": cards.pairs(_pair(view)),
    }
    panel = (
        f'{_block("purpose", cards.purpose())}{_form(view, form)}<div id="tf-results" class="column">'
        f"{''.join(_block(name, content) for name, content in results.items())}</div>"
    )
    screen = (
        '<div class="gradio-container"><div class="main app"><div class="column">'
        f'{_block("header", header)}{_tabs(tabs)}<div class="tf-panel">{panel}</div></div></div></div>'
    )
    html = (
        f"<style>{ABOVE}</style>"
        f'<twinframe-cover data-address="{escape(view.address)}" data-prompt="{escape(asked.prompt)}">'
        f'<template shadowrootmode="closed"><style>{style.cover()}</style><div>{screen}</div></template>'
        f"</twinframe-cover><script>{{\n{cards.script('cover')}}}</script>"
    )
    return Cover(html=html, pictures=tuple(cards.link(generation.files[0]) for generation in made.results))


def _pair(view: View) -> View:
    """bf16 and what is farthest from it, which a phone shows first."""
    made = view.comparison
    shown = {REFERENCE, cards.farthest(made).column} if made else set()
    return replace(view, cards=tuple(card for card in view.cards if card.column in shown))


def _block(name: str, content: str) -> str:
    return f'<div id="tf-{name}" class="block"><div class="html-container">{content}</div></div>'


def _tabs(names: Sequence[str]) -> str:
    each = "".join(
        f'<a role="tab" href="#{name.lower().replace(" ", "-")}" aria-selected="{str(not index).lower()}"'
        f"{'' if index else ' class=selected'}>{name}</a>"
        for index, name in enumerate(names)
    )
    return f'<nav id="tf-tabs"><div role="tablist">{each}</div><i></i></nav>'


def _form(view: View, form: Form) -> str:
    examples = "".join(
        f'<button type="button" class="gallery-item" data-press="#tf-examples button:nth-of-type({index})">'
        f"<span><div>{escape(example)}</div></span></button>"
        for index, example in enumerate(form.examples, 1)
    )
    chips = "".join(
        f'<label{" class=selected" * chosen} data-press="#tf-precisions input[name=&quot;{escape(column)}&quot;]">'
        f"<span>{escape(label)}</span></label>"
        for label, column, chosen in form.chips
    )
    info = '<span data-testid="block-info">'
    model = (
        f'<div id="tf-model" class="block">{info}{words.MODEL_LABEL}</span><div class="wrap"><div class="wrap-inner">'
        f'<input value="{escape(form.model)}" aria-label="{words.MODEL_LABEL}" readonly><i></i></div></div></div>'
    )
    shown = f'<div id="tf-hints" class="block"><div>{form.hints}</div></div>' if form.hints else ""
    return (
        '<div class="column tf-form"><div class="row tf-ask">'
        f'<div id="tf-prompt" class="block"><label><textarea rows="1" aria-label="{words.compare.PROMPT_LABEL}">'
        f"{escape(view.asked.prompt)}</textarea></label></div>"
        f'<button type="button" id="tf-go" style="flex-grow:0" data-press="#tf-go">{words.GENERATE}</button>'
        f'<button type="button" id="tf-stop" style="flex-grow:0" disabled>{words.STOP}</button></div>'
        '<div id="tf-known" class="block"></div>'
        f'<div id="tf-examples" class="block"><div class="label">{words.compare.EXAMPLES_LABEL}</div>'
        f'<div class="gallery">{examples}</div></div>'
        f'<div class="row tf-choose">{model * (form.models > 1)}'
        f'<div id="tf-precisions" class="block">{info}{words.compare.PRECISIONS_LABEL}</span>'
        f'<div class="wrap">{chips}</div></div>'
        f'<div class="row tf-seed"><div id="tf-seed" class="block">{info}{words.compare.SEED_LABEL}</span>'
        f'<input value="{view.asked.seed}" aria-label="{words.compare.SEED_LABEL}" readonly></div>'
        f'<button type="button" id="tf-dice" aria-label="{words.compare.DICE}"></button></div></div>'
        f'<div id="tf-more" class="block"><button type="button" class="label-wrap"><span>{words.compare.MORE}</span>'
        f'<span class="icon">▼</span></button></div>{shown}</div>'
    )
