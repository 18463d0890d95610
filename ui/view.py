"""What the results part of the page shows at one moment, and how an engine event changes it.

`View` is a frozen value and `advance` a pure function, so the page's behaviour over a run can be tested without a
browser. Knows neither HTML nor Gradio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine import events
from engine.columns import format_of
from engine.formats import FORMATS, REFERENCE
from engine.outputs.pool import Seen
from engine.request import CompareRequest
from engine.results import Comparison, Generation, Ruler
from ui import words


@dataclass(frozen=True, kw_only=True)
class Card:
    """One column: a picture or clip when `generation` is there, otherwise how far it is."""

    column: str
    note: str = ""
    """What is going on, in words, while there is none."""
    progress: float | None = None
    """0 to 1 while denoising."""
    preview: bytes | None = None
    """A JPEG of how far it is, while denoising, where previews were asked for."""
    generation: Generation | None = None


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything shown of one comparison, finished or not."""

    request: CompareRequest | None = None
    cards: tuple[Card, ...] = ()
    headline: str = words.compare.WELCOME
    detail: str = words.compare.WELCOME_MORE
    busy: bool = False
    recorded: bool = False
    shared: bool = False
    """Made by this app before, for the same request: to ask for it again runs it."""
    device: str = ""
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    ruler: Ruler | None = None
    seen: Seen = words.verdict.NOBODY
    """What people's answers support saying of this model's scores."""
    folder: Path | None = None
    """Where comparison.json lies once the comparison is complete."""
    address: str = ""
    """What brings it back as an item of the page's address, `recorded=cat` or `made=tmpq7`; empty if nothing does."""
    foreign: bool = False
    """Of a model that is not offered here: it can be looked at, and the form cannot ask for it."""
    programs: Mapping[str, str] = field(default_factory=dict)
    """Column -> the code that makes the same without this project, once the comparison is complete."""

    @property
    def asked(self) -> CompareRequest:
        """The request of a view of something; only the welcome has none."""
        if self.request is None:
            raise ValueError("The welcome is no view of a request.")
        return self.request

    @property
    def finished(self) -> tuple[Generation, ...]:
        return tuple(c.generation for c in self.cards if c.generation)

    @property
    def comparison(self) -> Comparison | None:
        """What is finished so far as a comparison; None until the reference is."""
        if self.request is None or not any(g.column == REFERENCE for g in self.finished):
            return None
        return Comparison(
            request=self.request,
            device=self.device,
            versions=self.versions,
            results=self.finished,
            ruler=self.ruler,
            created=self.created,
        )


def told(columns: Iterable[str]) -> list[str]:
    """Columns in the order in which the page tells of them: the reference, then the fewest bits first, which cost the
    most. Those of equally many bits stay in their order."""
    return sorted(columns, key=lambda column: (format_of(column) != REFERENCE, FORMATS[format_of(column)].bits))


def in_order(comparison: Comparison) -> Comparison:
    """A comparison with its results in that order."""
    made = {generation.column: generation for generation in comparison.results}
    return replace(comparison, results=tuple(made[column] for column in told(made)))


def begin(request: CompareRequest, device: str, seen: Seen = words.verdict.NOBODY) -> View:
    """The view of a comparison that has just been submitted: placeholders, no picture of an earlier one."""
    return View(
        request=request,
        cards=tuple(Card(column=column) for column in told(request.precisions)),
        headline=words.STARTING,
        detail="",
        busy=True,
        device=device,
        seen=seen,
    )


def of(
    comparison: Comparison,
    folder: Path,
    *,
    recorded: bool,
    shared: bool = False,
    programs: Mapping[str, str] | None = None,
    seen: Seen = words.verdict.NOBODY,
    address: str = "",
    foreign: bool = False,
) -> View:
    """The view of a finished comparison whose comparison.json lies in `folder`."""
    comparison = in_order(comparison)
    return View(
        request=comparison.request,
        cards=tuple(Card(column=g.column, generation=g) for g in comparison.results),
        headline=words.verdict.verdict(comparison, seen),
        detail=words.run.SHARED if shared else "",
        recorded=recorded,
        shared=shared,
        device=comparison.device,
        created=comparison.created,
        versions=comparison.versions,
        ruler=comparison.ruler,
        seen=seen,
        folder=folder,
        address=address,
        foreign=foreign,
        programs=programs or {},
    )


def judged(view: View, seen: Seen) -> View:
    """A finished comparison's view, with what people have answered by now."""
    if (made := view.comparison) is None:
        return view
    return replace(view, seen=seen, headline=words.verdict.verdict(made, seen))


def advance(view: View, event: events.Event) -> View:
    """The view after one event of the stream; `Completed`, `Failed` and `Cancelled` are the caller's to end on."""
    match event:
        case events.Queued(position, seconds):
            return replace(view, headline=words.run.WAITING_IN_LINE, detail=words.run.waiting(position, seconds))
        case events.Loading(what):
            return replace(view, headline=words.run.LOADING, detail=what)
        case events.Downloading(what, done, total):
            return replace(view, headline=words.run.DOWNLOADING, detail=words.run.downloading(what, done, total))
        case events.Warming(column):
            return _working(view, column, words.run.warming_up(event), None)
        case events.Step(column, index, total, left, preview):
            view = _with(view, column, preview=preview) if preview is not None else view
            return _working(view, column, words.run.step(index, total, left), index / total)
        case events.Finished(column, generation):
            return _with(view, column, generation=generation, note="", progress=None, preview=None)
        case events.Compared(column, metrics):
            made = next(g for g in view.finished if g.column == column)
            return _with(view, column, generation=replace(made, metrics=metrics))
        case events.Measuring(index, total):
            return replace(view, headline=words.run.MEASURING, detail=words.run.measuring(index, total))
        case events.RulerReady(ruler):
            return replace(view, ruler=ruler)
    return view


def stopped(view: View, headline: str) -> View:
    """A run that ended early: finished pictures stay, the others say so."""
    cards = tuple(
        c if c.generation else replace(c, note=words.run.STOPPED_BEFORE, progress=None, preview=None)
        for c in view.cards
    )
    return replace(view, cards=cards, headline=headline, detail="", busy=False)


def _working(view: View, column: str, note: str, progress: float | None) -> View:
    if (asked := view.request) is None:  # nothing is shown that an event could be of
        return view
    name, made, order = words.name(asked, column), words.thing(asked), asked.precisions
    said = words.run.making(name, made, order.index(column) + 1, len(order))
    view = _with(view, column, note=note, progress=progress)
    at_once = [words.name(asked, c.column) for c in view.cards if c.progress is not None]
    if len(at_once) > 1:  # on several devices
        return replace(view, headline=words.run.making_at_once(at_once, made), detail="")
    return replace(view, headline=said, detail=note)


def _with(view: View, column: str, **changes: Any) -> View:
    return replace(view, cards=tuple(replace(c, **changes) if c.column == column else c for c in view.cards))
