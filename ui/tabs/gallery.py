"""The Gallery tab: every recorded comparison, to be opened on the Compare tab, and what this browser made.

The recordings are bundles (engine/outputs/recordings.py), put where the browser may fetch them. What this browser made
is known to the browser alone: ui/static/history.js keeps it there and draws it here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from engine import catalog
from engine.formats import REFERENCE
from engine.outputs import recordings
from engine.outputs.recordings import Bundle
from engine.results import Comparison, Generation
from ui import link, words
from ui import view as views
from ui.html import cards
from ui.web.served_files import Shelf


def collect(folder: Path, shelf: Shelf) -> dict[str, Bundle]:
    """Name -> the bundle in `folder`, with its files on the shelf, in the order they are shown."""
    found = {}
    for bundle in recordings.read(folder):
        pinned = shelf.pin(bundle.folder)
        found[bundle.name] = replace(bundle, folder=pinned, comparison=Comparison.load(pinned))
    return found


def page(bundles: Mapping[str, Bundle]) -> str:
    """The recorded comparisons, model by model, above a place for ui/static/history.js."""
    mine = (
        f'<section id="tf-mine" hidden><div class="tf-group"><h2>{words.gallery.HISTORY}</h2>'
        f'<p class="tf-small">{words.gallery.HISTORY_NOTE} <button type="button" class="tf-copy tf-forget">'
        f'{words.gallery.HISTORY_CLEAR}</button></p></div><ul class="tf-made"></ul></section>'
    )
    if not bundles:
        return (
            f'<p class="tf-empty">{words.gallery.NO_RECORDINGS} <code>{words.gallery.RECORD_COMMAND}</code></p>{mine}'
        )
    models = groupby(bundles.values(), key=lambda bundle: bundle.comparison.request.model)
    return f"{''.join(_group(model, list(of)) for model, of in models)}{mine}"


def _group(model: str, bundles: Sequence[Bundle]) -> str:
    origins = [words.gallery.recorded_on(bundle.comparison) for bundle in bundles]
    shared = len(set(origins)) == 1
    tiles = "".join(_tile(b, "" if shared else origin) for b, origin in zip(bundles, origins, strict=True))
    said = f'<p class="tf-small">{words.gallery.RECORDED_ON} {escape(origins[0])}</p>' if shared else ""
    return (
        f'<section><div class="tf-group"><h2>{escape(catalog.model(model).name)}</h2>{said}</div>'
        f'<ul class="tf-tiles">{tiles}</ul></section>'
    )


def _tile(bundle: Bundle, origin: str) -> str:
    """bf16, or what is first without it, on the left half, the precision that differs most on the right: the same
    noise, so one picture."""
    made = views.in_order(bundle.comparison)
    asked, scores = made.request, [(words.verdict.mean_lpips(g), g) for g in made.results]
    first = made.results[0]
    others = [(score, g) for score, g in scores if score is not None]
    _, other = max(others, key=lambda each: each[0], default=(0.0, first))
    halves = "".join(_half(made, g, side) for g, side in ((first, "left"), (other, "right")))
    sides = (
        ""
        if other is first
        else (
            f'<span class="tf-side">{words.NAMES[REFERENCE]}</span>'
            f'<span class="tf-side">{words.name(asked, other.column)}</span>'
        )
    )
    return (
        f'<li><a class="tf-tile" href="?{link.RECORDED}={quote(bundle.name)}" data-recorded="{escape(bundle.name)}">'
        f'<span class="tf-halves" style="aspect-ratio:{asked.width}/{asked.height}">{halves}{sides}</span>'
        f'<span class="tf-prompt">{escape(asked.prompt)}</span>'
        f'<span class="tf-small">{words.gallery.tile(made)}</span>'
        f'<span class="tf-small">{escape(origin)}</span></a></li>'
    )


def _half(made: Comparison, of: Generation, side: str) -> str:
    """Not described: the link that it is in says it all in words."""
    source = cards.link(of.files[0])
    if made.request.num_frames > 1:
        return (
            f'<video class="tf-{side}" src="{source}#t=1" muted playsinline preload="metadata" aria-hidden="true">'
            "</video>"
        )
    return f'<img class="tf-{side}" src="{source}" alt="" loading="lazy">'
