"""What happens when somebody presses something: requests go to the worker, its events come back as page updates.

Handlers yield dictionaries keyed by component. The only state kept here is which job belongs to which browser
session, so that Stop and a closed tab reach it.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr
from gradio.components import Component

from engine import catalog, events, quantized
from engine.columns import FP8_ATTENTION, NO_LORA, Column
from engine.errors import RequestError, TwinframeError
from engine.formats import QUANTIZED, REFERENCE
from engine.outputs import recordings
from engine.outputs.pool import Pool, Seen
from engine.outputs.recordings import Bundle
from engine.quantization import recipe_files
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving.contracts import Worker
from ui import link, words
from ui import view as views
from ui.fields import FOLLOWING, columns_of, fitting, unchanged
from ui.html import cards, cover
from ui.html.cover import Cover
from ui.runs import Run, Runs
from ui.view import View
from ui.web import middleware
from ui.web.served_files import Shelf

TYPED = ("prompt", "seed")
"""Fields of the form that are typed into."""
OURS = {*link.NAMES, link.RECORDED, link.MADE, "stage"}
"""Names in the page's address that say what it shows."""
KEPT = 24
"""Results of a browser session that are found again, at most."""
LOOK_SECONDS = 0.2
"""How soon a page notices that its run was taken from it."""
PLACED_SECONDS = 10.0
"""How long it may take until it is known what is shown in its place."""
Updates = dict[Component, Any]
"""Component -> its value, as a handler gets it from Gradio, or what it is to be, as a handler gives it."""
REDRAW_SECONDS = 0.1
"""Steps come faster than this on a GPU; a browser needs no more."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """The components a request is read from."""

    prompt: gr.Textbox
    model: gr.Dropdown
    precisions: gr.CheckboxGroup
    seed: gr.Number
    num_inference_steps: gr.Slider
    guidance_scale: gr.Slider
    size: gr.Dropdown
    num_frames: gr.Slider
    batch_size: gr.Slider
    recipe: gr.Radio
    previews: gr.Checkbox

    def components(self) -> set[Component]:
        return {getattr(self, field.name) for field in fields(self)}

    def request(self, values: Updates) -> CompareRequest:
        """The values of the form as a validated request; what the model does not take is its default.

        Raises:
            RequestError: the first field that is wrong.
        """
        raw = {field.name: values[getattr(self, field.name)] for field in fields(self)}
        following = fitting(raw["model"], {name: raw.pop(name) for name in FOLLOWING})
        # bf16 has no chip to switch off, so an empty selection means bf16 alone, not "nothing".
        precisions = [REFERENCE, *columns_of(raw["model"], raw.pop("precisions") or [])]
        return CompareRequest.create(raw.pop("prompt"), **raw, **following, precisions=precisions)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components that handlers write to, besides the form."""

    form: Form
    examples: gr.Dataset
    about: gr.HTML
    hints: gr.HTML
    further: gr.Radio
    """Columns that have no chip yet."""
    go: gr.Button
    stop: gr.Button
    notice: gr.HTML
    headline: gr.HTML
    stage: gr.HTML
    pairs: gr.HTML
    table: gr.HTML
    ran: gr.HTML
    header: gr.HTML
    on_stage: gr.HTML
    """Its value is empty, but for on stage (ui/static/stage.js)."""
    typed: gr.HTML
    """Its value is what prompt and seed are to be set to, as JSON: unless they were typed into meanwhile, as only the
    browser knows (ui/static/address.js)."""
    net: gr.HTML
    """What the browser shows on stage while the connection is lost (ui/static/stage.js)."""
    following: gr.HTML
    """Which run a page that came back is to follow: a new value starts that."""
    asked: gr.State
    """The validated request on its way from the button to the queue."""
    shown: gr.State
    """The last finished `View`, to come back to when a run ends with nothing."""

    @property
    def drawn(self) -> list[Any]:
        """What a run draws."""
        return [self.notice, self.go, self.stop, self.headline, self.stage, self.pairs, self.table, self.ran]


class Handlers:
    """The page's event handlers, around one worker."""

    def __init__(
        self,
        worker: Worker,
        shelf: Shelf,
        models: tuple[str, ...],
        bundles: Mapping[str, Bundle],
        pool: Pool | None = None,
    ):
        self._worker = worker
        self._shelf = shelf
        self._models = models
        self._bundles = bundles
        self._pool = pool
        self._hints: dict[str, str] = {}
        """Model -> what was to be known of it when that was asked last."""
        self._recordings = {name: self._recorded(bundle) for name, bundle in bundles.items()}
        """Drawn up before anybody asks: on stage they are the net, so that nothing may be needed for them then."""
        self._runs: dict[str, Run | CompareRequest] = {}
        """By browser session; from the press until the queue gets to it what was asked for. A run that Stop or a
        recording took the page from is no longer here: it shows nothing more and ends with its step, beside the next
        one if that was asked for meanwhile."""
        self._left: dict[str, tuple[Run | CompareRequest, Updates | None]] = {}
        """By browser session: such a run until it has noticed, and what is shown in its place, None until that is
        known."""
        self._placed = threading.Condition()
        self._named = Runs()
        self._kept: dict[str, dict[CompareRequest, View]] = {}
        """By browser session what it has made, the newest last."""

    def first_view(self) -> View:
        """What the page shows before anything was made: a recorded comparison of what is offered, or a welcome."""
        offered = [name for name, view in self._recordings.items() if not view.foreign]
        return self._recordings[min(offered, key=self._first)] if offered else View()

    def _first(self, name: str) -> tuple[bool, bool, bool]:
        """What sorts recordings: first those of the first model, of these the one that tells the story, and then that
        of what the form asks for by default."""
        asked, spec = self._bundles[name].comparison.request, catalog.model(self._models[0])
        default = CompareRequest.create(spec.examples[0], model=spec.id) if spec.examples else None
        return asked.model != spec.id, name != recordings.FIRST, asked != default

    def hints(self, spec: catalog.ModelSpec) -> str:
        """What to know of a model here, as HTML; asks the engine for what it knows of the weights."""
        self._hints[spec.id] = cards.hints(spec, self._worker.support, self._worker.about_weights(spec.id))
        return self._hints[spec.id]

    def covered(self, query: str, tabs: Sequence[str]) -> Cover | None:
        """The first screen of a page that is opened by a query: of what is shown at first, or of the recording that it
        names; None if it asks for anything else, or is opened on stage. The run that it names waits for the page.

        Args:
            tabs: their names.
        """
        asked = {name: value for name, value in parse_qsl(query, keep_blank_values=True) if name in OURS}
        self._named.awaited(asked.get(link.MADE, ""))
        if not asked:
            view = self.first_view()
        elif asked.keys() == {link.RECORDED} and asked[link.RECORDED] in self._bundles:
            view = self._recording(asked[link.RECORDED])
        else:
            return None
        if view.request is None or view.foreign:
            return None
        spec, worker = catalog.model(view.request.model), self._worker
        columns, _ = chips(spec, worker, view.request.precisions)
        form = cover.Form(
            model=spec.name,
            models=len(self._models),
            examples=spec.examples,
            chips=[(label, column, column in columns["value"]) for label, column in columns["choices"]],
            hints=self._hints.get(spec.id, ""),  # not asked anew: a page never waits for the engine
        )
        machine = worker.machine
        header = cards.header(words.compare.machine(machine.label, worker.support), machine.note)
        return cover.cover(view, form, header, tabs)

    def attach(self, parts: Parts) -> None:
        """Tell the handlers which components to write to."""
        self._parts = parts

    def press(self, values: Updates, http: gr.Request) -> Iterator[Updates]:
        """Generate was pressed: check the form at once, before the queue, and show placeholders."""
        parts = self._parts
        try:
            if http.session_hash in self._runs:
                raise RequestError(words.BUSY)
            asked = parts.form.request(values)
        except TwinframeError as error:
            yield {parts.notice: cards.notice(str(error))}
            # Keeps the run that is chained to this event from starting; the notice above is what is seen.
            raise gr.Error(str(error), visible=False, print_exception=False) from error
        self._left.pop(http.session_hash, None)
        self._runs[http.session_hash] = asked
        yield {
            parts.asked: asked,
            parts.notice: cards.notice(""),
            **self._buttons(busy=True),
            **draw(parts, self._begin(asked)),
        }

    def run(self, values: Updates, http: gr.Request) -> Iterator[Updates]:
        """The queued part: one comparison, redrawn as its events come."""
        parts, session = self._parts, http.session_hash
        asked, before = values[parts.asked], values[parts.shown]
        if asked is None or self._runs.get(session) != asked:
            # Stopped while it waited.
            yield (self._again(asked, session) if asked else {}) or gr.skip()
            return
        if earlier := self._earlier(values):
            self._runs.pop(session)
            yield {parts.shown: earlier, **self._end(earlier, "")}
            return
        try:
            with self._shelf.offer() as folder:
                job = self._worker.submit(asked, folder, middleware.visitor(http))
        except TwinframeError as error:
            self._runs.pop(session)
            yield self._net(values, str(error)) or self._end(before, str(error))
            return
        view = replace(self._begin(asked), address=f"{link.MADE}={folder.name}")
        run = self._runs[session] = self._named.add(Run(folder.name, job, asked, view, before))
        if values[parts.on_stage]:
            yield {parts.net: self._ready_net(asked)}
        yield from self._followed(run, values, session)

    def follow(self, values: Updates, http: gr.Request) -> Iterator[Updates]:
        """The page came back to a run that goes on, or that has ended meanwhile."""
        run = self._runs.get(http.session_hash)
        if not isinstance(run, Run):
            yield gr.skip()
            return
        yield from self._followed(run, values, http.session_hash)

    def gone(self, name: str) -> None:
        """The page that shows the run of that name says that it goes: the run ends if it is not back in time."""
        self._named.gone(name)

    def _followed(self, run: Run, values: Updates, session: str) -> Iterator[Updates]:
        """Show a run until it ends; if the page goes before, it is left to itself for a while."""
        parts, asked = self._parts, run.asked
        try:
            ending = yield from self._redraw(run, session)
        finally:
            left = self._runs.get(session) is not run
            if not left:
                self._runs.pop(session)
        if left:  # Stop or a recording has taken the page over
            yield self._again(run, session) or gr.skip()
            return
        match ending:
            case events.Completed(comparison):
                view = self._view(comparison, self._shelf.root / run.name, recorded=False, address=run.view.address)
                self._keep(session, asked, view)
                yield {parts.shown: view, **self._end(view, "")}
            case events.Cancelled():
                yield self._ended_early(run, words.run.STOPPED_KEPT, "")
            case events.Failed(reason):
                yield self._net(values, reason, asked) or self._ended_early(run, words.run.FAILED_KEPT, reason)
            case _:
                said = words.BROKEN
                yield self._net(values, said, asked) or self._ended_early(run, words.run.FAILED_KEPT, said)

    def _again(self, run: Run | CompareRequest, session: str) -> Updates:
        """What is shown in a run's place: an update of the run may have been on its way to the browser when that came
        there, and this, which is the run's last, comes after it."""
        with self._placed:
            if self._left.get(session, (None,))[0] != run:
                return {}
            self._placed.wait_for(lambda: self._left.get(session, (run, {}))[1] is not None, PLACED_SECONDS)
            _, instead = self._left.pop(session, (run, None))
        if instead is None or session in self._runs:  # another one draws by now
            return {}
        return {part: instead[part] for part in (*self._parts.drawn, self._parts.shown) if part in instead}

    def _instead(self, session: str, updates: Updates) -> Updates:
        """The page shows something else than a run that was left: given as it is, kept until the run has noticed."""
        with self._placed:
            if session in self._left:
                self._left[session] = (self._left[session][0], updates)
                self._placed.notify_all()
        return updates

    def _earlier(self, values: Updates) -> View | None:
        """What was made for the same request before, where results are shared; None to run it: on stage, and where
        that is what the page shows already."""
        asked, shown = values[self._parts.asked], values[self._parts.shown]
        if values[self._parts.on_stage] or (shown.shared and shown.request == asked):
            return None
        return self._of_others(asked)

    def _of_others(self, asked: CompareRequest) -> View | None:
        """What anybody has made for a request before, where results are shared."""
        if (found := self._worker.earlier(asked)) is None:
            return None
        made, folder = found
        return self._view(made, folder, recorded=True, shared=True)

    def _redraw(self, run: Run, session: str) -> Generator[Updates, None, events.Event | None]:
        """Yield what each event changes on the page; returns the event that ended the run, None if none did."""
        with run.followed() as page:
            sent, sent_at = draw(self._parts, run.view), 0.0
            while self._runs.get(session) is run:
                try:
                    event, view = page.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    continue
                if event is None or isinstance(event, events.TERMINAL):
                    return event
                soon = time.monotonic() - sent_at < REDRAW_SECONDS
                if soon and isinstance(event, (events.Step, events.Downloading)):
                    continue
                now = draw(self._parts, view)
                yield {part: value for part, value in now.items() if value != sent[part]} or unchanged()
                sent, sent_at = now, time.monotonic()
        return None

    def stop(self, values: Updates, http: gr.Request) -> Updates:
        """Stop was pressed: end the job, running or still in the queue, and show what there is."""
        if run := self._leave_run(http.session_hash):
            return self._instead(http.session_hash, self._ended_early(run, words.run.STOPPED_KEPT, ""))
        return self._instead(http.session_hash, self._end(values[self._parts.shown], ""))

    def leave(self, http: gr.Request) -> None:
        """A tab was closed, or its connection is lost: what runs goes on for a while, for a page that comes back."""
        for held in (self._runs, self._left, self._kept):
            held.pop(http.session_hash, None)

    def back_to_recorded(self, values: Updates, http: gr.Request) -> Updates:
        """The recorded run of what the form says, or the nearest: shown, and what runs is ended."""
        self._leave_run(http.session_hash)
        bundle = self._nearest(values, list(self._bundles.values()))
        if bundle is None:
            return {self._parts.notice: cards.notice(f"{words.gallery.NO_RECORDINGS} {words.gallery.RECORD_COMMAND}")}
        return self._instead(http.session_hash, self._open(bundle.name))

    def _nearest(self, values: Updates, bundles: Sequence[Bundle]) -> Bundle | None:
        """Of these the recorded run of what the form says, or the one most like it."""
        try:
            return recordings.nearest(self._parts.form.request(values), bundles)
        except RequestError:  # an empty prompt, say: any recording will do
            return next(iter(bundles), None)

    def _ready_net(self, asked: CompareRequest) -> str:
        """What the browser shows if the connection is lost in the middle of a run: the nearest recorded one, which says
        so; empty where nothing is recorded."""
        bundle = recordings.nearest(asked, self._bundles.values())
        return "" if bundle is None else cards.net(self._recording(bundle.name), asked)

    def _net(self, values: Updates, reason: str, asked: CompareRequest | None = None) -> Updates | None:
        """On stage, what stands in for a run that failed: a recorded run, which says so. None elsewhere."""
        asked = asked or values[self._parts.asked]
        bundle = recordings.nearest(asked, self._bundles.values()) if values[self._parts.on_stage] and asked else None
        if bundle is None:
            return None
        view = self._recording(bundle.name)
        said = words.stage.fell_back(reason, asked, bundle.comparison.request)
        return {self._parts.shown: view, **self._end(view, said)}

    def broken(self, values: Updates, http: gr.Request) -> Updates:
        """The run ended with something nobody foresaw, or the queue is full."""
        if isinstance(self._runs.get(http.session_hash), Run):
            return unchanged()  # what broke was stopped before, and the next one is under way
        self._runs.pop(http.session_hash, None)
        return self._net(values, words.BROKEN) or self._end(values[self._parts.shown], words.BROKEN)

    def choose_model(self, values: Updates) -> Updates:
        """Set the form to another model's limits and defaults, or to a recorded run of it; a prompt that was no example
        stays."""
        form, spec, prompt = (
            self._parts.form,
            catalog.model(values[self._parts.form.model]),
            values[self._parts.form.prompt],
        )
        examples = {example for other in catalog.MODELS.values() for example in other.examples}
        examples |= {bundle.comparison.request.prompt for bundle in self._bundles.values()}
        typed: dict[str, Any] = {"seed": spec.defaults.seed}
        chosen = values[form.precisions] or []
        if not prompt.strip() or prompt in examples:
            if recorded := self._recorded_of(spec, chosen):
                return self._but_the_model(recorded) | self._chips(spec, chosen)
            shown = values[self._parts.shown].request
            if shown and {REFERENCE, *chosen} == {*shown.precisions} and (recorded := self._recorded_of(spec, ())):
                return self._but_the_model(recorded)  # nobody chose the columns that came with what is shown
            typed |= {"prompt": spec.examples[0]} if spec.examples else {}
        fields = settings(spec, self._worker)
        return self._around(spec) | {
            self._parts.typed: json.dumps(typed),
            **self._chips(spec, chosen),
            **{getattr(form, name): gr.update(**fields[name]) for name in fields if name not in TYPED},
        }

    def _but_the_model(self, asked: CompareRequest) -> Updates:
        """Every control but the choice of the model, which may have changed while this is on its way."""
        return {part: value for part, value in self._controls(asked).items() if part is not self._parts.form.model}

    def _recorded_of(self, spec: catalog.ModelSpec, precisions: Sequence[str]) -> CompareRequest | None:
        """A recorded request of a model that shows these precisions: the default one if there is, or the first."""
        own = [b.comparison.request for b in self._bundles.values() if b.comparison.request.model == spec.id]
        shows = [asked for asked in own if set(precisions) <= set(asked.precisions)]
        return min(shows, key=lambda asked: asked.prompt != spec.examples[0], default=None)

    def choose_example(self, sample: Sequence[str]) -> str:
        """What the prompt is to be set to."""
        return json.dumps({"prompt": sample[0]})

    def find(self, values: Updates, http: gr.Request) -> Updates:
        """Something but typing has set the form: show what was recorded or made here of exactly what it asks for. If
        there is nothing, the browser sees that what is shown is of something else, and says so."""
        session, shown = http.session_hash, values[self._parts.shown]
        if not values[self._parts.typed]:  # nothing was set
            return unchanged()
        try:
            asked = self._parts.form.request(values)
        except RequestError:
            return unchanged()
        if session in self._runs or (shown.request and shown.request.covers(asked)):
            return unchanged()
        view = self._found(asked, session)
        return self._instead(session, {self._parts.shown: view, **self._end(view, "")}) if view else gr.skip()

    def _found(self, asked: CompareRequest, session: str) -> View | None:
        recorded = [name for name, bundle in self._bundles.items() if bundle.comparison.request.covers(asked)]
        if recorded:
            return self._recording(recorded[0])
        for made, view in reversed(self._kept.get(session, {}).items()):
            if made.covers(asked) and view.folder is not None and view.folder.is_dir():
                return view
        return self._of_others(asked)

    def _keep(self, session: str, asked: CompareRequest, view: View) -> None:
        kept = self._kept.setdefault(session, {})
        kept.pop(asked, None)
        kept[asked] = view
        if len(kept) > KEPT:
            kept.pop(next(iter(kept)))

    def machine(self) -> object:
        """The header, with what the machine is and runs by now; as it was while nobody can say."""
        try:
            machine, support = self._worker.machine, self._worker.support
            found = self._worker.examine()
        except TwinframeError:
            return gr.skip()
        return cards.header(words.compare.machine(machine.label, support), machine.note, found)

    def reexamine(self, values: Updates) -> Updates:
        """A run has ended: what the machine runs natively, where it was found meanwhile that it does not."""
        if not any(support.disproved for support in self._worker.support.values()):
            return unchanged()
        form = self._parts.form
        return {
            self._parts.header: self.machine(),
            **self._chips(catalog.model(values[form.model]), values[form.precisions] or []),
        }

    def open_page(self, values: Updates, http: gr.Request) -> Updates:
        """The page was opened: set the form, and show the recording, as the address says, and start nothing.

        Whoever is quick has pressed Generate before the browser asks for this: then the run stays.
        """
        if http.session_hash in self._runs:
            return unchanged()
        return self._opened(http.query_params, values, http.session_hash)

    def open_address(self, values: Updates, event: gr.EventData, http: gr.Request) -> Updates:
        """A link of this page was followed, or the browser went back: as if the page was opened so; what runs ends."""
        asked_for = dict(parse_qsl(event.query.removeprefix("?"), keep_blank_values=True))
        return self._instead(http.session_hash, self._opened(asked_for, values, http.session_hash))

    def _opened(self, query: Mapping[str, str], values: Updates, session: str) -> Updates:
        parts = self._parts
        ended = session in self._runs
        self._leave_run(session)
        before = {
            parts.typed: "",
            **(self._end(values[parts.shown], "") if ended else {parts.notice: cards.notice("")}),
        }
        if link.RECORDED in query:
            opened = self._open(query[link.RECORDED])
            return before | self._settings_of(opened.get(parts.shown)) | opened
        try:
            asked = link.read(query, self._models)
            for column in asked.columns if asked else ():
                if not self._runs_here(column.format):
                    reason = self._worker.support[column.format].reason
                    raise RequestError(words.compare.unavailable(column.format, reason))
        except RequestError as error:
            return before | {parts.notice: cards.notice(words.compare.link_wrong(str(error)))}
        if asked is None:
            return before
        name = query.get(link.MADE, "")
        run, view = self._named.named(name), self._kept_as(name, asked)
        if view is None and run and run.asked.covers(asked) and (self._shelf.root / run.name).is_dir():
            return before | self._controls(asked) | self._reattached(run, session)
        return before | self._controls(asked) | ({parts.shown: view, **self._end(view, "")} if view else {})

    def _reattached(self, run: Run, session: str) -> Updates:
        """Show a run that was left, and have it followed."""
        parts = self._parts
        self._runs[session] = run
        followed = {parts.following: f"{run.name} {session}", parts.notice: cards.notice("")}
        return followed | self._buttons(busy=True) | draw(parts, run.view)

    def _kept_as(self, name: str, asked: CompareRequest) -> View | None:
        """What was made here for a request and lies on the shelf by that name; None if it does not, any more."""
        folder = self._shelf.kept(name)
        if folder is None or not (made := Comparison.load(folder)).request.covers(asked):
            return None
        return self._view(made, folder, recorded=False, address=f"{link.MADE}={name}")

    def _open(self, name: str) -> Updates:
        parts = self._parts
        if name not in self._bundles:
            return {parts.notice: cards.notice(words.gallery.no_recording(name))}
        view, asked = self._recording(name), self._bundles[name].comparison.request
        notice = words.gallery.not_offered_here(asked) if view.foreign else ""
        return self._end(view, notice) | {parts.shown: view}

    def restore(self, values: Updates) -> Updates:
        """Set the form to what is shown; apart from showing it, as this may have to wait for the engine."""
        return self._settings_of(values[self._parts.shown]) or unchanged()

    def _settings_of(self, view: View | None) -> Updates:
        return {} if view is None or view.request is None or view.foreign else self._controls(view.request)

    def _recording(self, name: str) -> View:
        """A recorded comparison, with what people have answered by now."""
        return views.judged(self._recordings[name], self._seen(self._bundles[name].comparison.request.model))

    def _begin(self, asked: CompareRequest) -> View:
        return views.begin(asked, self._worker.machine.label, self._seen(asked.model))

    def _view(self, made: Comparison, folder: Path, **kind: Any) -> View:
        """The view of a finished comparison, with its code and what people's answers say of its model."""
        seen = self._seen(made.request.model)
        return views.of(made, folder, programs=programs(self._worker, made), seen=seen, **kind)

    def _seen(self, model: str) -> Seen:
        return self._pool.seen(model) if self._pool else words.verdict.NOBODY

    def _recorded(self, bundle: Bundle) -> View:
        made = bundle.comparison
        foreign = made.request.model not in self._models
        address = f"{link.RECORDED}={bundle.name}"
        return self._view(made, bundle.folder, recorded=True, address=address, foreign=foreign)

    def _leave_run(self, session: str) -> Run | None:
        """End a session's run, running or still in the queue, because something else is to be shown; gives the run,
        None if it had not begun."""
        run = self._runs.pop(session, None)
        if run is None:
            return None
        with self._placed:
            self._left[session] = (run, None)
        if not isinstance(run, Run):
            return None
        run.job.cancel()
        return run

    def _controls(self, asked: CompareRequest) -> Updates:
        """Every control as a request has it; columns that this machine cannot run are left out."""
        form, spec = self._parts.form, catalog.model(asked.model)
        others = {name: of for name, of in settings(spec, self._worker, asked).items() if name not in TYPED}
        return self._around(spec) | {
            self._parts.typed: json.dumps({name: getattr(asked, name) for name in TYPED}),
            form.model: asked.model,
            **self._chips(spec, asked.precisions),
            **{getattr(form, name): gr.update(**of) for name, of in others.items()},
        }

    def _runs_here(self, name: str) -> bool:
        return self._worker.support[name].execution != "unavailable"

    def _chips(self, spec: catalog.ModelSpec, chosen: Sequence[str]) -> Updates:
        """The columns to choose from, those chosen among them, and what else could be added."""
        shown, further = chips(spec, self._worker, chosen)
        return {
            self._parts.form.precisions: gr.update(**shown),
            self._parts.further: gr.update(**further),
        }

    def add_column(self, values: Updates) -> Updates:
        """A further column was chosen: it becomes a chip."""
        parts, added = self._parts, values[self._parts.further]
        if not added:
            return unchanged()
        spec = catalog.model(values[parts.form.model])
        return self._chips(spec, [*(values[parts.form.precisions] or []), added])

    def _around(self, spec: catalog.ModelSpec) -> Updates:
        """What stands in and around the form for a model, other than values."""
        parts, hints = self._parts, self.hints(spec)
        return {
            parts.examples: gr.Dataset(samples=[[example] for example in spec.examples]),
            parts.form.prompt: gr.Textbox(placeholder=words.compare.prompt_hint(spec)),
            parts.about: cards.about(spec),
            parts.hints: gr.HTML(hints, visible=bool(hints)),
        }

    def _ended_early(self, run: Run, headline: str, notice: str) -> Updates:
        if not run.view.finished:
            return self._end(run.before, notice)
        view = views.stopped(run.view, headline)
        return {self._parts.shown: view, **self._end(view, notice)}

    def _end(self, view: View, notice: str) -> Updates:
        parts = self._parts
        return {parts.notice: cards.notice(notice), **self._buttons(busy=False), **draw(parts, view)}

    def _buttons(self, *, busy: bool) -> Updates:
        return {self._parts.go: gr.Button(interactive=not busy), self._parts.stop: gr.Button(interactive=busy)}


def draw(parts: Parts, view: View) -> Updates:
    """The five places of the page that show a view."""
    return {
        parts.headline: cards.headline(view),
        parts.stage: cards.stage(view),
        parts.pairs: cards.pairs(view),
        parts.table: cards.table(view),
        parts.ran: cards.ran(view) + cards.programs(view),
    }


def programs(worker: Worker, comparison: Comparison) -> dict[str, str]:
    """Column -> the code that makes what it made."""
    return {g.column: worker.code(comparison.request, g.column, g.execution) for g in comparison.results}


def chips(spec: catalog.ModelSpec, worker: Worker, chosen: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the columns' chips have to be for a model, and the choice of further ones.

    bf16 has no chip, because it always takes part, but without the model's LoRAs it has one. A format by the form's
    recipe has one, and so has one that a recipe file was made for, a quantized checkpoint, and whatever is chosen. FP8
    attention is not offered: a link can ask for it.

    Args:
        chosen: columns; what this machine or the model does not have is left out.
    """
    formats = views.told(name for name in QUANTIZED if worker.support[name].execution != "unavailable")
    made = {file.id: file.tunings for file in recipe_files.read(spec.family)}
    stored = [Column(one.format, one.name) for one in quantized.of_model(spec.id) if one.format in formats]
    ways = [Column(name, by) for name in formats for by in ("", *spec.recipes)]
    if spec.loras:
        ways += [Column(name, NO_LORA) for name in (REFERENCE, *formats)]
    every = {c.written(""): c for c in (*ways, *stored)}
    lossy = {c: c.removesuffix(FP8_ATTENTION) for c in chosen if c.endswith(FP8_ATTENTION)}
    every |= {c: Column.of(c, "") for c, exact in lossy.items() if exact in (REFERENCE, *every)}
    wanted = [column for column in chosen if column in every]

    def choices(shown: Callable[[str, Column], bool]) -> list[tuple[str, str]]:
        some = {written: column for written, column in every.items() if shown(written, column)}
        return [(words.compare.chip(c, worker.support[c.format].execution), written) for written, c in some.items()]

    def has_chip(written: str, column: Column) -> bool:
        made_for = column in stored or column.format in made.get(column.recipe, ())
        return column.format == REFERENCE or not column.recipe or written in wanted or made_for

    def further(written: str, column: Column) -> bool:
        # A file's recipe leaves other formats to the model's first, which those that name none can have.
        return not has_chip(written, column) and column.rules not in (spec.recipes[0], *made)

    return {"choices": choices(has_chip), "value": wanted}, {"choices": choices(further), "value": None}


def settings(spec: catalog.ModelSpec, worker: Worker, asked: CompareRequest | None = None) -> dict[str, dict[str, Any]]:
    """Field of the form -> what its component has to be for a model; one without a choice is not shown.

    Its value is that of a request, or else the default.
    """
    defaults, limits = spec.defaults, spec.limits
    sizes = [(f"{width} × {height}", f"{width}x{height}") for height, width in limits.sizes]
    recipes = [(words.compare.recipe(name, summary), name) for name, summary in worker.recipes(spec.id).items()]
    found = {
        "seed": {"value": defaults.seed},
        "num_inference_steps": _span(limits.num_inference_steps, defaults.num_inference_steps),
        "guidance_scale": _span(limits.guidance_scale, defaults.guidance_scale),
        "num_frames": _span(limits.num_frames, defaults.num_frames)
        | {"step": limits.frames_step, "label": words.compare.frames_label(spec)},
        "batch_size": _span(limits.batch_size, defaults.batch_size) | {"label": words.compare.batch_label(spec)},
        "size": {
            "choices": sizes,
            "value": f"{defaults.width}x{defaults.height}",
            "visible": len(sizes) > 1,
        },
        "recipe": {"choices": recipes, "value": spec.recipes[0], "visible": len(recipes) > 1},
    }
    if asked is not None:
        size = (f"{asked.width} × {asked.height}", f"{asked.width}x{asked.height}")
        if size not in sizes:
            found["size"] |= {"choices": [*sizes, size], "visible": True}
        values = asked.to_json() | {"size": size[1]}
        found = {name: of | {"value": values[name]} for name, of in found.items()}
    return found


def _span(bounds: tuple[float, float], value: float) -> dict[str, Any]:
    low, high = bounds
    # Gradio refuses a slider without a range, even one that is not shown.
    return {"minimum": low, "maximum": high if low < high else low + 1, "value": value, "visible": low < high}
