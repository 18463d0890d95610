"""The page: which components there are, where they lie, and which handler answers which of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from engine import catalog
from engine.formats import DEFAULTS
from engine.outputs import recordings
from engine.outputs.pool import Pool
from engine.serving.contracts import Worker
from ui import api, style, words
from ui.fields import CheckboxGroup, Dropdown, Radio, Slider
from ui.handlers import Form, Handlers, Parts, chips, draw, settings
from ui.html import cards
from ui.html.cover import Cover
from ui.tabs import benchmarks, blind, gallery, how, quality, recipe
from ui.view import View
from ui.web.middleware import Doors
from ui.web.served_files import Shelf

BENCHMARKS = catalog.ASSETS / "benchmarks"
QUALITY = catalog.ASSETS / "quality"
BLIND = catalog.ASSETS / "blind"
DEVICE = {"concurrency_limit": None}
"""What makes pictures waits in the worker's queue, which knows positions and limits, not in Gradio's."""
THREADS = 128
"""For what waits: each comparison in the queue holds one."""
SESSIONS = 300
"""Browser tabs and API calls whose state Gradio keeps, 0.16 MB each; its own 10,000 would grow to 1.6 GB."""
DELIVERY_SECONDS = 5.0
"""How long the app, told to stop, waits for its last answers to be read."""
FETCH_SECONDS = 2.0
"""And then for their files."""
STATISTICS = {"GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9), "GRADIO_ANALYTICS_MAX_EVENTS": "1"}
"""Gradio makes a table of its last 10,000 events anew at each, for a page of statistics that is closed here."""
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
ASKED = "(...values) => { dispatchEvent(new Event('twinframe-asked')); return values; }"
SET_TYPED = "(...values) => window.twinframe.typed(...values)"
LOOK = "() => window.twinframe.look()"
ANSWERED = "() => window.twinframe.answered()"
FORM = """(...values) => {
  const form = Object.fromEntries(%s.map((name, index) => [name, values[index]]));
  dispatchEvent(new CustomEvent('twinframe-form', { detail: form }));
}"""
FOLLOW = "watch('value', () => trigger('submit'))"
TAB_OPENED = "() => { dispatchEvent(new CustomEvent('twinframe-tab', { detail: %s })); }"
"""What ui/static/address.js is told, and asked."""


@dataclass(frozen=True)
class Page:
    """The app, ready to be served, and the files it hands out."""

    demo: gr.Blocks
    shelf: Shelf
    worker: Worker
    gone: Callable[[str], None]
    """Told the name of a run whose page goes."""
    covered: Callable[[str], Cover | None]
    """The first screen of a page that is opened by a query, if it has one."""

    def serve(
        self,
        *,
        host: str | None = None,
        port: int | None = None,
        share: bool = False,
        quiet: bool = False,
        doors: Doors | None = None,
        mcp: bool = False,
    ) -> str:
        """Start serving in the background, for MCP clients too if `mcp` says so; returns the local address.

        Raises:
            OSError: the port is taken.
        """
        doors = doors or Doors()
        self.demo.queue(max_size=THREADS, api_open=False, default_concurrency_limit=1)
        _, address, _ = self.demo.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=quiet,
            prevent_thread_lock=True,
            show_error=False,
            max_file_size="1mb",
            allowed_paths=[],
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            footer_links=["api"],
            mcp_server=mcp,
            theme=style.theme(),
            head=style.head(),
            auth=doors.auth,
            max_threads=THREADS,
            state_session_capacity=SESSIONS,
            app_kwargs={"middleware": [doors.middleware(self.worker, self.gone, self.covered)]},
        )
        return str(address)

    def drain(self) -> None:
        """Before `close`: let what has ended reach those who wait for it, and let them fetch its files."""
        waiting, end = self.demo._queue.pending_event_ids_session, time.monotonic() + DELIVERY_SECONDS
        if not any(waiting.values()):
            return
        while any(waiting.values()) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(FETCH_SECONDS)

    def close(self) -> None:
        """Stop serving and remove the files of all comparisons."""
        self.demo.close(verbose=False)
        self.shelf.close()


def build_page(
    worker: Worker,
    *,
    models: tuple[str, ...] = (catalog.DEFAULT,),
    recorded: Path = recordings.FOLDER,
    measured: Path = BENCHMARKS,
    scored: Path = QUALITY,
    unseen: Path = BLIND,
) -> Page:
    """The page and the API around a worker.

    `recorded` holds one folder a recorded comparison: they fill the gallery, and the first of them the page at first.
    `measured` holds what `python -m engine bench` wrote, for the Benchmarks tab.
    `scored` holds how far recipes are from bf16, for the Quality and Recipe tabs.
    `unseen` holds recorded comparisons for the blind test alone, which the page shows nowhere else.
    """
    os.environ.update(STATISTICS)
    shelf = Shelf.from_environment(os.environ)
    bundles = gallery.collect(recorded, shelf)
    pool = Pool.from_environment(os.environ)
    handlers = Handlers(worker, shelf, models, bundles, pool)
    first = handlers.first_view()
    with gr.Blocks(title=words.TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        header = gr.HTML(
            cards.header(words.compare.machine(worker.machine.label, worker.support), worker.machine.note),
            js_on_load=cards.THEME_JS,
            apply_default_css=False,
        )
        on_stage = gr.HTML(
            html_template=cards.stage_keys(),
            js_on_load=cards.script("stage"),
            apply_default_css=False,
            elem_id="tf-on-stage",
        )
        typed = gr.HTML(
            html_template=cards.home(first.address),
            js_on_load=f"{{\n{cards.script('stream')}}}\n{{\n{cards.script('address')}}}\n",
            apply_default_css=False,
            elem_id="tf-address",
        )
        with gr.Tabs(elem_id="tf-tabs") as tabs:
            with _tab(words.COMPARE, id=words.COMPARE):
                parts = _compare(worker, models, first, handlers.hints, header=header, typed=typed, on_stage=on_stage)
            with _tab(words.BLIND) as opened:
                blind.tab(demo, opened, worker, shelf, models, unseen, pool)
            with _tab(words.GALLERY):
                gr.HTML(
                    gallery.page(bundles),
                    js_on_load=cards.script("history"),
                    apply_default_css=False,
                    elem_id="tf-gallery",
                )
            with _tab(words.QUALITY) as opened:
                quality.tab(opened, scored, models)
            with _tab(words.RECIPE) as opened:
                recipe.tab(worker, parts.form, opened, scored)
            with _tab(words.BENCHMARKS) as opened:
                benchmarks.tab(opened, measured)
            with _tab(words.HOW) as opened:
                how.tab(worker, parts, opened)
        gr.HTML(
            html_template=cards.warming(),
            js_on_load=cards.script("warming"),
            apply_default_css=False,
            elem_id="tf-warming",
        )
        # Later than the page: which models there is memory for takes a moment to find out.
        demo.load(handlers.machine, None, header, queue=False, **PRIVATE)
        handlers.attach(parts)
        _wire(demo, parts, handlers)
        gr.api(api.endpoint(worker, shelf), api_name="compare", **DEVICE)
    # Private events can still be called by name at /gradio_api/call/<name>: without a name there is nothing to call.
    for event in demo.fns.values():
        if event.api_visibility != "public":
            event.api_name = None
    names = [str(tab.label) for tab in tabs.children]
    return Page(demo, shelf, worker, handlers.gone, lambda query: handlers.covered(query, names))


def _compare(
    worker: Worker,
    models: tuple[str, ...],
    first: View,
    known_of: Callable[[catalog.ModelSpec], str],
    **outside: gr.blocks.Block,
) -> Parts:
    """The Compare tab.

    Args:
        known_of: what to know of a model here, as HTML.
        outside: those of its `Parts` that lie elsewhere.
    """
    asked = first.request
    spec = catalog.model(asked.model if asked else models[0])
    fields = settings(spec, worker, asked)
    example = spec.examples[0] if spec.examples else ""
    gr.HTML(cards.purpose(), apply_default_css=False, elem_id="tf-purpose")
    with gr.Column(elem_classes="tf-form"):
        with gr.Row(elem_classes="tf-ask"):
            prompt = gr.Textbox(
                asked.prompt if asked else example,
                label=words.compare.PROMPT_LABEL,
                show_label=False,
                placeholder=words.compare.prompt_hint(spec),
                lines=1,
                max_lines=4,
                scale=1,
                elem_id="tf-prompt",
            )
            go = gr.Button(words.GENERATE, variant="primary", scale=0, elem_id="tf-go")
            stop = gr.Button(words.STOP, scale=0, interactive=False, elem_id="tf-stop")
        gr.HTML(
            html_template=cards.known(),
            js_on_load=cards.script("prompt"),
            apply_default_css=False,
            elem_id="tf-known",
        )
        examples = gr.Dataset(
            label=words.compare.EXAMPLES_LABEL,
            components=[prompt],
            samples=[[example] for example in spec.examples],
            elem_id="tf-examples",
        )
        with gr.Row(elem_classes="tf-choose"):
            model = gr.Dropdown(
                [(catalog.model(m).name, m) for m in models],
                value=spec.id,
                label=words.MODEL_LABEL,
                filterable=False,
                visible=len(models) > 1,
                elem_id="tf-model",
            )
            columns, others = chips(spec, worker, asked.precisions if asked else DEFAULTS)
            precisions = CheckboxGroup(**columns, label=words.compare.PRECISIONS_LABEL, elem_id="tf-precisions")
            with gr.Row(elem_classes="tf-seed"):
                seed = gr.Number(**fields["seed"], label=words.compare.SEED_LABEL, elem_id="tf-seed")
                dice = gr.Button(words.compare.DICE, elem_id="tf-dice", scale=0)
        with gr.Accordion(words.compare.MORE, open=False, elem_id="tf-more"):
            more = _more_settings(fields)
            with gr.Row(elem_classes="tf-more"):
                further = Radio(
                    **others, label=words.compare.FURTHER_LABEL, elem_id="tf-further", elem_classes="tf-chips"
                )
            about = gr.HTML(cards.about(spec), apply_default_css=False)
        known = known_of(spec)
        hints = gr.HTML(known, visible=bool(known), apply_default_css=False, elem_id="tf-hints")
    notice = gr.HTML(cards.notice(""), apply_default_css=False)
    with gr.Column(elem_id="tf-results"):
        gr.HTML(cards.stale(), apply_default_css=False)
        headline = gr.HTML(
            apply_default_css=False,
            elem_id="tf-headline",
            js_on_load=f"{{\n{cards.script('history')}}}\n{{\n{cards.script('post')}}}\n",
        )
        gr.HTML(cards.views(), js_on_load=cards.script("toolbar"), apply_default_css=False, elem_id="tf-views")
        stage = gr.HTML(apply_default_css=False, elem_id="tf-stage", js_on_load=cards.script("player"))
        pairs = gr.HTML(
            apply_default_css=False,
            elem_id="tf-pairs",
            js_on_load=f"{{\n{cards.script('viewer')}}}\n{{\n{cards.script('player')}}}\n",
        )
        table = gr.HTML(apply_default_css=False, elem_id="tf-table")
        ran = gr.HTML(apply_default_css=False, elem_id="tf-ran")
    net = gr.HTML(apply_default_css=False, elem_id="tf-net")
    following = gr.HTML(apply_default_css=False, elem_id="tf-following", js_on_load=FOLLOW)
    quick = {"queue": False, **PRIVATE}
    gr.on([dice.click], fn=None, outputs=seed, js="() => Math.floor(Math.random() * 2 ** 32)", **quick)
    parts = Parts(
        form=Form(prompt=prompt, model=model, precisions=precisions, seed=seed, **more),
        examples=examples,
        about=about,
        hints=hints,
        further=further,
        go=go,
        stop=stop,
        notice=notice,
        headline=headline,
        stage=stage,
        pairs=pairs,
        table=table,
        ran=ran,
        net=net,
        following=following,
        asked=gr.State(None),
        shown=gr.State(first),
        **outside,
    )
    for part, value in draw(parts, first).items():
        part.value = value
    return parts


def _tab(label: str, **options: Any) -> gr.Tab:
    """A tab of which the address hears as soon as it is chosen.

    Before anything else is attached to that: Gradio does what is one after the other, and content that came late would
    give its tab's address to one that was chosen since.
    """
    tab = gr.Tab(label, **options)
    tab.select(None, js=TAB_OPENED % json.dumps(label), trigger_mode="multiple", queue=False, **PRIVATE)
    return tab


def _more_settings(fields: dict[str, dict[str, Any]]) -> dict[str, gr.components.Component]:
    """The rest of the form, as keyword arguments of `Form`."""
    with gr.Row(elem_classes="tf-more"):
        more = {
            "num_inference_steps": Slider(
                **fields["num_inference_steps"], step=1, label=words.compare.STEPS_LABEL, elem_id="tf-steps"
            ),
            "guidance_scale": Slider(
                **fields["guidance_scale"], step=0.1, label=words.compare.GUIDANCE_LABEL, elem_id="tf-guidance"
            ),
            "num_frames": Slider(**fields["num_frames"], elem_id="tf-frames"),
            "batch_size": Slider(**fields["batch_size"], step=1, elem_id="tf-batch"),
            "size": Dropdown(**fields["size"], label=words.compare.SIZE_LABEL, filterable=False, elem_id="tf-size"),
            "recipe": Radio(**fields["recipe"], label=words.RECIPE_LABEL, elem_id="tf-recipe"),
            "previews": gr.Checkbox(
                label=words.compare.PREVIEWS_LABEL, info=words.compare.PREVIEWS_HINT, elem_id="tf-previews"
            ),
        }
    return more


def _wire(demo: gr.Blocks, parts: Parts, handlers: Handlers) -> None:
    """Generate, Stop, the model's choice, what is opened, and the closed tab."""
    form = parts.form
    drawn = parts.drawn
    pressed = gr.on(
        [parts.go.click, form.prompt.submit],
        handlers.press,
        inputs=form.components(),
        outputs=[*drawn, parts.asked],
        # Not queue=False: past the queue, a generator is dropped after its first yield, and its error with it.
        concurrency_limit=None,
        **PRIVATE,
    )
    kept = {parts.asked, parts.shown, parts.on_stage}
    run = pressed.success(
        handlers.run,
        inputs=kept,
        outputs=[*drawn, parts.shown, parts.net],
        # A run that was stopped lasts until its step ends. The browser is not to hold the next one back for it, nor may
        # Gradio cancel it, which it reports as a failure, and only when the step has ended.
        trigger_mode="multiple",
        **DEVICE,
        **PRIVATE,
    )
    run.failure(handlers.broken, inputs=kept, outputs=[*drawn, parts.shown], queue=False, **PRIVATE)
    proven = [parts.header, form.precisions, parts.further]
    run.then(handlers.reexamine, {form.model, form.precisions}, proven, queue=False, **PRIVATE)
    parts.stop.click(handlers.stop, inputs={parts.shown}, outputs=[*drawn, parts.shown], queue=False, **PRIVATE)
    quick = {"queue": False, **PRIVATE}
    opened = [*drawn, parts.shown]
    parts.following.submit(handlers.follow, kept, opened, trigger_mode="multiple", **DEVICE, **PRIVATE)
    around = [parts.examples, parts.about, parts.hints, parts.further, parts.typed, *(form.components() - {form.seed})]

    def then_find(chosen: gr.events.Dependency) -> None:
        """Set what could have been typed into meanwhile, and show what there is of what the form asks for then."""
        set_ = chosen.then(None, parts.typed, [form.prompt, form.seed], js=SET_TYPED, **quick)
        set_.then(None, js=LOOK, **quick)
        chosen.failure(None, js=ANSWERED, **quick)

    # Not change, which an opened link would cause as well: it brings values of its own.
    # Not the whole form: a dropdown sends it twice, and settings of the model before do not fit the one after.
    choosing = {form.model, form.prompt, form.precisions, parts.shown}
    last = {"trigger_mode": "always_last", **quick}  # what is chosen while an answer is on its way is not dropped
    another = form.model.input(handlers.choose_model, choosing, around, js=ASKED, **last)
    adding = {form.model, form.precisions, parts.further}
    parts.further.input(handlers.add_column, adding, [form.precisions, parts.further], **quick)
    example = parts.examples.click(handlers.choose_example, parts.examples, parts.typed, js=ASKED, **last)
    page = demo.load(handlers.open_page, {parts.shown}, [*around, *opened, parts.following], **quick)
    address = parts.typed.select(handlers.open_address, {parts.shown}, [*around, *opened, parts.following], **quick)
    recorded = parts.on_stage.select(handlers.back_to_recorded, form.components(), opened, **quick)
    for chosen in (another, example, page, address, recorded.then(handlers.restore, {parts.shown}, around, **quick)):
        then_find(chosen)
    found = parts.typed.submit(handlers.find, form.components() | {parts.shown, parts.typed}, opened, **quick)
    for ended in (found.then, found.failure):
        ended(None, js=ANSWERED, **quick)
    named = {name: getattr(form, name) for name in Form.__dataclass_fields__}
    changed = [component.change for component in named.values()]
    told = FORM % json.dumps(list(named))
    # Each of them: a value that changes while another is told of must not be left out.
    gr.on([*changed, demo.load], None, list(named.values()), js=told, trigger_mode="multiple", **quick)
    demo.unload(handlers.leave)
