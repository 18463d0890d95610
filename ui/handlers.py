"""What happens when somebody presses something: requests go to the worker, its events come back as page updates.

Handlers yield dictionaries keyed by component. The only state kept here is which job belongs to which browser
session, so that Stop and a closed tab reach it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import gradio as gr

from engine import catalog, events
from engine.errors import RequestError, TwinframeError
from engine.formats import REFERENCE
from engine.outputs import recordings
from engine.outputs.recordings import Bundle
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving.contracts import Job, Worker
from ui import link, words
from ui import view as views
from ui.html import cards
from ui.view import View
from ui.web import middleware
from ui.web.served_files import Shelf

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

    def components(self) -> set[gr.components.Component]:
        return {getattr(self, field.name) for field in fields(self)}

    def request(self, values: dict) -> CompareRequest:
        """The values of the form as a validated request.

        Raises:
            RequestError: the first field that is wrong.
        """
        raw = {field.name: values[getattr(self, field.name)] for field in fields(self)}
        width, height = (int(side) for side in raw.pop("size").split("x"))
        # bf16 has no chip to switch off, so an empty selection means bf16 alone, not "nothing".
        precisions = [REFERENCE, *(raw.pop("precisions") or [])]
        return CompareRequest.create(raw.pop("prompt"), **raw, precisions=precisions, height=height, width=width)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components that handlers write to, besides the form."""

    tabs: gr.Tabs
    form: Form
    examples: gr.Dataset
    about: gr.HTML
    hints: gr.HTML
    go: gr.Button
    stop: gr.Button
    notice: gr.HTML
    headline: gr.HTML
    stage: gr.HTML
    pairs: gr.HTML
    table: gr.HTML
    ran: gr.HTML
    on_stage: gr.HTML
    """Its value is empty, but for on stage (ui/static/stage.js)."""
    asked: gr.State
    """The validated request on its way from the button to the queue."""
    shown: gr.State
    """The last finished `View`, to come back to when a run ends with nothing."""


@dataclass
class _Run:
    """A job in flight, and what the page shows of it."""

    job: Job
    view: View
    before: View


class Handlers:
    """The page's event handlers, around one worker."""

    def __init__(self, worker: Worker, shelf: Shelf, models: tuple[str, ...], bundles: Mapping[str, Bundle]):
        self._worker = worker
        self._shelf = shelf
        self._models = models
        self._bundles = bundles
        self._recordings = {name: self._recorded(bundle) for name, bundle in bundles.items()}
        """Drawn up before anybody asks: on stage they are the net, so that nothing may be needed for them then."""
        self._runs: dict[str, _Run | CompareRequest] = {}
        """By browser session; from the press until the queue gets to it what was asked for. A run that Stop or a
        recording took the page from is no longer here: it shows nothing more and ends with its step, beside the next
        one if that was asked for meanwhile."""

    def first_view(self) -> View:
        """What the page shows before anything was made: a recorded comparison of what is offered, or a welcome."""
        return next((view for view in self._recordings.values() if view.request.model in self._models), View())

    def attach(self, parts: Parts) -> None:
        """Tell the handlers which components to write to."""
        self._parts = parts

    def press(self, values: dict, http: gr.Request) -> Iterator[dict]:
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
        self._runs[http.session_hash] = asked
        yield {
            parts.asked: asked,
            parts.notice: cards.notice(""),
            **self._buttons(busy=True),
            **draw(parts, views.begin(asked, self._worker.machine.name)),
        }

    def run(self, values: dict, http: gr.Request) -> Iterator[dict]:
        """The queued part: one comparison, redrawn as its events come."""
        parts, session = self._parts, http.session_hash
        asked, before = values[parts.asked], values[parts.shown]
        if asked is None or self._runs.get(session) != asked:
            # Stopped while it waited.
            yield gr.skip()
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
        run = self._runs[session] = _Run(job, views.begin(asked, self._worker.machine.name), before)
        try:
            ending = yield from self._redraw(run, session)
        finally:
            # Reached as well when the browser goes away. Harmless to a job that ended.
            job.cancel()
            left = self._runs.get(session) is not run
            if not left:
                self._runs.pop(session)
        if left:  # Stop or a recording has taken the page over
            yield gr.skip()
            return
        match ending:
            case events.Completed(comparison):
                view = views.of(comparison, folder, recorded=False, programs=programs(self._worker, comparison))
                yield {parts.shown: view, **self._end(view, "")}
            case events.Cancelled():
                yield self._ended_early(run, words.run.STOPPED_KEPT, "")
            case events.Failed(reason):
                yield self._net(values, reason) or self._ended_early(run, words.run.FAILED_KEPT, reason)
            case _:
                yield self._net(values, words.BROKEN) or self._ended_early(run, words.run.FAILED_KEPT, words.BROKEN)

    def _earlier(self, values: dict) -> View | None:
        """What was made for the same request before, where results are shared; None to run it: on stage, and where
        that is what the page shows already."""
        asked, shown = values[self._parts.asked], values[self._parts.shown]
        if values[self._parts.on_stage] or (shown.shared and shown.request == asked):
            return None
        if (found := self._worker.earlier(asked)) is None:
            return None
        made, folder = found
        return views.of(made, folder, recorded=True, shared=True, programs=programs(self._worker, made))

    def _redraw(self, run: _Run, session: str) -> Generator[dict, None, events.Event | None]:
        """Yield what each event changes on the page; returns the event that ended the stream, None if none did."""
        sent, sent_at = draw(self._parts, run.view), 0.0
        for event in run.job.events():
            if self._runs.get(session) is not run:
                break
            if isinstance(event, events.TERMINAL):
                return event
            run.view = views.advance(run.view, event)
            if isinstance(event, (events.Step, events.Downloading)) and time.monotonic() - sent_at < REDRAW_SECONDS:
                continue
            now = draw(self._parts, run.view)
            yield {part: value for part, value in now.items() if value != sent[part]} or gr.skip()
            sent, sent_at = now, time.monotonic()
        return None

    def stop(self, values: dict, http: gr.Request) -> dict:
        """Stop was pressed: end the job, running or still in the queue, and show what there is."""
        if run := self._leave_run(http.session_hash):
            return self._ended_early(run, words.run.STOPPED_KEPT, "")
        return self._end(values[self._parts.shown], "")

    def leave(self, http: gr.Request) -> None:
        """A tab was closed: free the device."""
        self._leave_run(http.session_hash)

    def back_to_recorded(self, values: dict, http: gr.Request) -> dict:
        """The recorded run of what the form says, or the nearest: shown, and what runs is ended."""
        self._leave_run(http.session_hash)
        bundle = self._nearest(values, list(self._bundles.values()))
        if bundle is None:
            return {self._parts.notice: cards.notice(f"{words.gallery.NO_RECORDINGS} {words.gallery.RECORD_COMMAND}")}
        return self._open(bundle.name)

    def _nearest(self, values: dict, bundles: Sequence[Bundle]) -> Bundle | None:
        """Of these the recorded run of what the form says, or the one most like it."""
        try:
            return recordings.nearest(self._parts.form.request(values), bundles)
        except RequestError:  # an empty prompt, say: any recording will do
            return next(iter(bundles), None)

    def _net(self, values: dict, reason: str) -> dict | None:
        """On stage, what stands in for a run that failed: a recorded run, which says so. None elsewhere."""
        asked = values[self._parts.asked]
        bundle = recordings.nearest(asked, self._bundles.values()) if values[self._parts.on_stage] and asked else None
        if bundle is None:
            return None
        view = self._recordings[bundle.name]
        said = words.stage.fell_back(reason, asked, bundle.comparison.request)
        return {self._parts.shown: view, **self._end(view, said)}

    def broken(self, values: dict, http: gr.Request) -> dict:
        """The run ended with something nobody foresaw, or the queue is full."""
        if isinstance(self._runs.get(http.session_hash), _Run):
            return gr.skip()  # what broke was stopped before, and the next one is under way
        self._runs.pop(http.session_hash, None)
        return self._net(values, words.BROKEN) or self._end(values[self._parts.shown], words.BROKEN)

    def choose_model(self, model_id: str, prompt: str) -> dict:
        """Set the form to another model's limits and defaults; a prompt that was no example stays."""
        form, spec = self._parts.form, catalog.model(model_id)
        untouched = not prompt.strip() or any(prompt in other.examples for other in catalog.MODELS.values())
        value = {"value": spec.examples[0]} if untouched and spec.examples else {}
        return self._around(spec) | {
            form.prompt: gr.Textbox(placeholder=words.compare.prompt_hint(spec), **value),
            **{getattr(form, name): gr.update(**of) for name, of in settings(spec, self._worker).items()},
        }

    def show_model(self, values: dict, http: gr.Request) -> dict:
        """Another model was chosen: if a recording was shown, show one of its own; what was made here stays."""
        form, shown = self._parts.form, values[self._parts.shown]
        if http.session_hash in self._runs or not shown.recorded or shown.request.model == values[form.model]:
            return gr.skip()
        own = [bundle for bundle in self._bundles.values() if bundle.comparison.request.model == values[form.model]]
        bundle = self._nearest(values, own)
        return self._open(bundle.name) if bundle else gr.skip()

    def open_link(self, http: gr.Request) -> dict:
        """The page was opened: set the form, or show the recording, as the address says, and start nothing."""
        parts = self._parts
        if link.RECORDED in http.query_params:
            opened = self._open(http.query_params[link.RECORDED])
            return self._settings_of(opened.get(parts.shown)) | opened
        try:
            asked = link.read(http.query_params, self._models)
            for precision in asked.precisions if asked else ():
                if not self._runs_here(precision):
                    raise RequestError(words.compare.unavailable(precision, self._worker.support[precision].reason))
        except RequestError as error:
            return {parts.notice: cards.notice(words.compare.link_wrong(str(error)))}
        return gr.skip() if asked is None else self._controls(asked)

    def open_recorded(self, event: gr.EventData, http: gr.Request) -> dict:
        """A recording was chosen in the gallery: show it, and end what runs."""
        self._leave_run(http.session_hash)
        return self._open(event.recorded)

    def _open(self, name: str) -> dict:
        parts = self._parts
        if name not in self._bundles:
            return {parts.notice: cards.notice(words.gallery.no_recording(name))}
        view = self._recordings[name]
        notice = "" if view.request.model in self._models else words.gallery.not_offered_here(view.request)
        return self._end(view, notice) | {parts.shown: view, parts.tabs: gr.Tabs(selected=words.COMPARE)}

    def restore(self, values: dict) -> dict:
        """Set the form to what is shown; apart from showing it, as this may have to wait for the engine."""
        return self._settings_of(values[self._parts.shown]) or gr.skip()

    def _settings_of(self, view: View | None) -> dict:
        offered = view is not None and view.request is not None and view.request.model in self._models
        return self._controls(view.request) if offered else {}

    def _recorded(self, bundle: Bundle) -> View:
        made = bundle.comparison
        return views.of(made, bundle.folder, recorded=True, programs=programs(self._worker, made))

    def _leave_run(self, session: str) -> _Run | None:
        """End a session's run, running or still in the queue, because something else is to be shown; gives the run,
        None if it had not begun."""
        run = self._runs.pop(session, None)
        if not isinstance(run, _Run):
            return None
        run.job.cancel()
        return run

    def _controls(self, asked: CompareRequest) -> dict:
        """Every control as a request has it; precisions that this machine cannot run are left out."""
        form, spec = self._parts.form, catalog.model(asked.model)
        fields = settings(spec, self._worker)
        size = (f"{asked.width} × {asked.height}", f"{asked.width}x{asked.height}")
        if size not in fields["size"]["choices"]:
            fields["size"] |= {"choices": [*fields["size"]["choices"], size], "visible": True}
        values = asked.to_json() | {"size": size[1]}
        return self._around(spec) | {
            form.model: asked.model,
            form.prompt: gr.Textbox(asked.prompt, placeholder=words.compare.prompt_hint(spec)),
            form.precisions: [p for p in asked.precisions if p != REFERENCE and self._runs_here(p)],
            **{getattr(form, name): gr.update(**(of | {"value": values[name]})) for name, of in fields.items()},
        }

    def _runs_here(self, precision: str) -> bool:
        return self._worker.support[precision].execution != "unavailable"

    def _around(self, spec: catalog.ModelSpec) -> dict:
        """What stands around the form for a model."""
        parts, worker = self._parts, self._worker
        hints = cards.hints(spec, worker.support, worker.about_weights(spec.id))
        return {
            parts.examples: gr.Dataset(samples=[[example] for example in spec.examples]),
            parts.about: cards.about(spec),
            parts.hints: gr.HTML(hints, visible=bool(hints)),
        }

    def _ended_early(self, run: _Run, headline: str, notice: str) -> dict:
        if not run.view.finished:
            return self._end(run.before, notice)
        view = views.stopped(run.view, headline)
        return {self._parts.shown: view, **self._end(view, notice)}

    def _end(self, view: View, notice: str) -> dict:
        parts = self._parts
        return {parts.notice: cards.notice(notice), **self._buttons(busy=False), **draw(parts, view)}

    def _buttons(self, *, busy: bool) -> dict:
        return {self._parts.go: gr.Button(interactive=not busy), self._parts.stop: gr.Button(interactive=busy)}


def draw(parts: Parts, view: View) -> dict:
    """The five places of the page that show a view."""
    return {
        parts.headline: cards.headline(view),
        parts.stage: cards.stage(view),
        parts.pairs: cards.pairs(view),
        parts.table: cards.table(view),
        parts.ran: cards.ran(view) + cards.programs(view),
    }


def programs(worker: Worker, comparison: Comparison) -> dict[str, str]:
    """Precision -> the code that makes what it made."""
    return {g.precision: worker.code(comparison.request, g.precision, g.execution) for g in comparison.results}


def settings(spec: catalog.ModelSpec, worker: Worker) -> dict[str, dict]:
    """Field of the form -> what its component has to be for a model; one without a choice is not shown."""
    defaults, limits = spec.defaults, spec.limits
    sizes = [(f"{width} × {height}", f"{width}x{height}") for height, width in limits.sizes]
    recipes = [(words.compare.recipe(name, summary), name) for name, summary in worker.recipes(spec.id).items()]
    return {
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


def _span(bounds: tuple[float, float], value: float) -> dict:
    low, high = bounds
    # Gradio refuses a slider without a range, even one that is not shown.
    return {"minimum": low, "maximum": high if low < high else low + 1, "value": value, "visible": low < high}
