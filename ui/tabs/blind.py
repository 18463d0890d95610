"""The Blind test tab: which of two pictures is bf16, and how much the answers given so far are worth.

The open question is kept here, on the server, by browser session; the page gets two or three random file names and,
once it has answered, the truth (engine/outputs/blind.py).
"""

from __future__ import annotations

import base64
import csv
import io
import json
import secrets
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from engine import catalog, events
from engine.columns import POST, Column, format_of
from engine.errors import TwinframeError
from engine.formats import DEFAULTS, QUANTIZED, REFERENCE
from engine.outputs import blind, recordings
from engine.outputs.pool import Pool
from engine.request import CompareRequest
from engine.serving.contracts import Job, Worker
from ui import words
from ui.fields import unchanged
from ui.html import cards
from ui.web import middleware
from ui.web.served_files import Shelf

RECORDED, FRESH = "recorded", "fresh"
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The tab's components."""

    model: gr.Dropdown
    precision: gr.Radio
    mode: gr.Radio
    source: gr.Radio
    prompt: gr.Textbox
    go: gr.Button
    stop: gr.Button
    notice: gr.HTML
    question: gr.HTML
    a: gr.Button
    b: gr.Button
    score: gr.HTML

    def components(self) -> set[gr.components.Component]:
        return {getattr(self, field.name) for field in fields(self)}


def tab(
    demo: gr.Blocks,
    opened: gr.Tab,
    worker: Worker,
    shelf: Shelf,
    models: tuple[str, ...],
    unseen: Path,
    pool: Pool | None = None,
) -> None:
    """Build the tab; `unseen` holds recorded comparisons that the page shows nowhere else, and `pool` keeps answers,
    which is said."""
    recorded = [pair for bundle in recordings.read(unseen) for pair in blind.pairs(bundle.comparison, fresh=False)]
    models = tuple(dict.fromkeys([*models, *(pair.model for pair in recorded)]))
    usable = [name for name in QUANTIZED if worker.support[name].execution != "unavailable"]
    columns = sorted({*usable, *(pair.column for pair in recorded)}, key=_order)
    source = RECORDED if any(pair.model == models[0] for pair in recorded) else FRESH
    gr.HTML(
        intro(pooled=pool is not None),
        apply_default_css=False,
        js_on_load=cards.script("blind"),
        elem_id="tf-blind-intro",
    )
    with gr.Column(elem_classes="tf-form"):
        with gr.Row(elem_classes="tf-blind-choose"):
            model = gr.Dropdown(
                [(catalog.model(m).name, m) for m in models],
                value=models[0],
                label=words.MODEL_LABEL,
                filterable=False,
                visible=len(models) > 1,
                elem_id="tf-blind-model",
            )
            precision = gr.Radio(
                [(words.of_column(Column.of(column, POST)), column) for column in columns],
                value=([c for c in columns if format_of(c) in DEFAULTS] or columns)[-1],
                label=words.blind.PRECISION,
                elem_id="tf-blind-precision",
                elem_classes="tf-chips",
            )
            mode = gr.Radio(
                [(said, key) for key, said in words.blind.MODES.items()],
                value=blind.SAME,
                label=words.blind.MODE,
                elem_id="tf-blind-mode",
                elem_classes="tf-chips",
            )
            sources = gr.Radio(
                [(words.blind.SOURCES[key], key) for key in (RECORDED, FRESH)],
                value=source,
                label=words.blind.SOURCE,
                elem_id="tf-blind-source",
                elem_classes="tf-chips",
            )
        prompt = gr.Textbox(
            label=words.blind.PROMPT,
            show_label=False,
            placeholder=words.blind.PROMPT,
            lines=1,
            max_lines=4,
            visible=source == FRESH,
            elem_id="tf-blind-prompt",
        )
    notice = gr.HTML(cards.notice(""), apply_default_css=False)
    question = gr.HTML(apply_default_css=False, js_on_load=cards.script("player"), elem_id="tf-blind-question")
    with gr.Row(elem_classes="tf-blind-answers"):
        a, b = (gr.Button(visible=False, elem_id=f"tf-blind-{letter.lower()}") for letter in "AB")
        go = gr.Button(words.blind.NEXT, variant="primary", elem_id="tf-blind-next")
        stop = gr.Button(words.STOP, visible=False, elem_id="tf-blind-stop")
    score = gr.HTML(apply_default_css=False, elem_id="tf-blind-score")
    parts = Parts(
        model=model, precision=precision, mode=mode, source=sources, prompt=prompt, go=go, stop=stop, notice=notice,
        question=question, a=a, b=b, score=score,
    )  # fmt: skip
    test = BlindTest(worker, shelf, recorded, parts, pool)
    drawn = [notice, question, a, b, go, stop, score]
    asking = {model, precision, mode, sources, prompt}
    opened.select(test.begin, asking, drawn, queue=False, **PRIVATE)
    gr.on([go.click, prompt.submit], test.ask, inputs=asking, outputs=drawn, concurrency_limit=None, **PRIVATE)
    a.click(test.answer_a, None, drawn, queue=False, **PRIVATE)
    b.click(test.answer_b, None, drawn, queue=False, **PRIVATE)
    stop.click(test.stop, None, stop, queue=False, **PRIVATE)
    sources.input(lambda chosen: gr.Textbox(visible=chosen == FRESH), sources, prompt, queue=False, **PRIVATE)
    demo.unload(test.leave)


def _order(column: str) -> tuple[int, str]:
    """By the formats' order, then by the recipe that is named."""
    return QUANTIZED.index(format_of(column)), column


class BlindTest:
    """The tab's event handlers; of each browser session, its sitting and the job that makes its next pair."""

    def __init__(
        self, worker: Worker, shelf: Shelf, recorded: list[blind.Pair], parts: Parts, pool: Pool | None = None
    ):
        self._worker, self._shelf, self._recorded, self._parts, self._pool = worker, shelf, recorded, parts, pool
        self._sittings: dict[str, blind.Sitting] = {}
        self._jobs: dict[str, Job] = {}

    def begin(self, values: dict[str, Any], http: gr.Request) -> dict[str, Any]:
        """The tab was opened: the first time a recorded pair is asked about at once, if there is one."""
        parts = self._parts
        if http.session_hash in self._sittings or values[parts.source] != RECORDED:
            return unchanged()
        try:
            trial = self._sitting(http).ask(values[parts.model], values[parts.precision], values[parts.mode])
        except TwinframeError as error:
            return self._idle(str(error))
        return unchanged() if trial is None else self._drawn(question(trial), answers=trial.mode)

    def _sitting(self, http: gr.Request) -> blind.Sitting:
        return self._sittings.setdefault(http.session_hash, blind.Sitting(self._recorded, self._shelf.new))

    def ask(self, values: dict[str, Any], http: gr.Request) -> Iterator[dict[str, Any]]:
        """The next pair was asked for: of the recorded ones, or made now."""
        parts, session, sitting = self._parts, http.session_hash, self._sitting(http)
        model, column, mode = values[parts.model], values[parts.precision], values[parts.mode]
        try:
            if values[parts.source] == RECORDED:
                if sitting.ask(model, column, mode) is None:
                    yield self._idle(words.blind.nothing(column))
                    return
            else:
                if session in self._jobs:
                    yield {parts.notice: cards.notice(words.BUSY)}
                    return
                request = _request(values[parts.prompt], model, column)
                # Not on the shelf: from there, anybody who guessed a name could fetch it.
                with tempfile.TemporaryDirectory(prefix="twinframe-blind-") as folder:
                    made = yield from self._make(request, Path(folder), http)
                    if made is None:
                        return
                    sitting.ask(model, column, mode, pair=made)
        except TwinframeError as error:
            yield self._idle(str(error))
            return
        if sitting.trial is not None:
            yield self._drawn(question(sitting.trial), answers=mode)

    def _make(
        self, request: CompareRequest, folder: Path, http: gr.Request
    ) -> Generator[dict[str, Any], None, blind.Pair | None]:
        """Yield what the page shows meanwhile; returns the pair, None if there is none."""
        job = self._jobs[http.session_hash] = self._worker.submit(request, folder, middleware.visitor(http))
        try:
            yield self._drawn(making(words.blind.MAKING), busy=True)
            for event in job.events():
                match event:
                    case events.Step(_, index, total, _):
                        yield {self._parts.question: making(words.blind.MAKING, words.run.step(index, total, None))}
                    case events.Queued(position, seconds):
                        yield {self._parts.question: making(words.run.waiting(position, seconds))}
                    case events.Finished(made, _) if made != REFERENCE:
                        yield {self._parts.question: making(words.blind.MEASURING)}
                    case events.Completed(comparison):
                        pair = next(blind.pairs(comparison, fresh=True), None)
                        if pair is None:
                            yield self._idle(words.blind.NOT_NUMBERS)
                        return pair
                    case events.Failed(reason):
                        yield self._idle(reason)
                        return None
                    case events.Cancelled():
                        yield self._idle("")
                        return None
            yield self._idle(words.BROKEN)
            return None
        finally:
            job.cancel()  # reached as well when the browser goes away
            self._jobs.pop(http.session_hash, None)

    def answer_a(self, http: gr.Request) -> dict[str, Any]:
        """A was pressed."""
        return self._answer("A", http)

    def answer_b(self, http: gr.Request) -> dict[str, Any]:
        """B was pressed."""
        return self._answer("B", http)

    def _answer(self, letter: str, http: gr.Request) -> dict[str, Any]:
        """The truth, and the new score."""
        sitting = self._sittings.get(http.session_hash)
        if sitting is None:
            return {self._parts.notice: cards.notice(words.blind.GONE)}
        closed = sitting.answer(letter)
        if closed is None:
            return {self._parts.notice: cards.notice("")}
        trial, given, first = closed
        if first and self._pool is not None and given.mode != blind.SAME:  # where both are one, no score was judged
            self._pool.add(given)
        return self._drawn(question(trial, given)) | {self._parts.score: score(sitting)}

    def stop(self, http: gr.Request) -> gr.Button:
        """Stop was pressed while a pair was made. Only the button says so, which is hidden when that has ended: this
        answer may come after the last one of what makes the pair."""
        if job := self._jobs.get(http.session_hash):
            job.cancel()
        return gr.Button(words.blind.STOPPING, interactive=False)

    def leave(self, http: gr.Request) -> None:
        """A tab was closed."""
        self.stop(http)
        self._sittings.pop(http.session_hash, None)

    def _idle(self, sentence: str) -> dict[str, Any]:
        return self._drawn("") | {self._parts.notice: cards.notice(sentence)}

    def _drawn(self, html: str, *, answers: str | None = None, busy: bool = False) -> dict[str, Any]:
        """The question's place, and which buttons there are: `answers` is the mode of an open question."""
        parts = self._parts
        labels = words.blind.ANSWERS[answers] if answers else ("A", "B")
        return {
            parts.notice: cards.notice(""),
            parts.question: html,
            parts.a: gr.Button(labels[0], visible=answers is not None),
            parts.b: gr.Button(labels[1], visible=answers is not None),
            parts.go: gr.Button(
                words.blind.SKIP if answers else words.blind.NEXT,
                variant="secondary" if answers else "primary",
                interactive=not busy,
            ),
            parts.stop: gr.Button(words.STOP, visible=busy, interactive=True),
        }


def _request(prompt: str, model: str, column: str) -> CompareRequest:
    """Of a fresh pair: an example's prompt if none was given, and a seed that nobody knows.

    Raises:
        RequestError: the prompt cannot be used.
    """
    prompt = prompt.strip() or secrets.choice(catalog.model(model).examples)
    return CompareRequest.create(prompt, model=model, precisions=[column], seed=secrets.randbelow(2**32))


def intro(*, pooled: bool) -> str:
    note = f"{words.blind.NOTE} {words.blind.POOLED}" if pooled else words.blind.NOTE
    return (
        f'<div class="tf-blind-intro"><h2>{words.blind.TITLE}</h2><p class="tf-small">{note}</p>'
        f'<p class="tf-small">{words.blind.KEYS}</p></div>'
    )


def making(said: str, detail: str = "") -> str:
    beside = f'<span class="tf-detail">{escape(detail)}</span>' if detail else ""
    return (
        '<p class="tf-verdict tf-blind-said"><span class="tf-pulse" aria-hidden="true"></span>'
        f'<span aria-live="polite">{escape(said)}</span>{beside}</p>'
    )


def question(trial: blind.Trial, given: blind.Given | None = None) -> str:
    """The pictures of a question, and once it is answered, the truth."""
    pair = trial.pair
    figures = "".join(_figure(trial, letter, file, given is not None) for letter, file in trial.files.items())
    if given is None:
        said = f'<p class="tf-verdict tf-blind-said" aria-live="polite">{words.blind.ASKED[trial.mode]}</p>'
        told = ""
    else:
        kind = "right" if given.right else "wrong"
        said = (
            f'<p class="tf-verdict tf-blind-said tf-{kind}" aria-live="polite">{escape(words.blind.truth(given))}</p>'
        )
        told = f" {escape(words.blind.told(given))}"
    shown = f'<div class="tf-blind-shown" style="--n:{len(trial.files)}">{figures}</div>'
    if pair.frames > 1:
        shown = _player(pair, shown)
    return (
        f'<div class="tf-blind" data-open="{str(given is None).lower()}">{said}'
        f'<p class="tf-origin"><q>{escape(pair.prompt)}</q>{told}</p>{shown}</div>'
    )


def _figure(trial: blind.Trial, letter: str, file: Path, told: bool) -> str:
    pair = trial.pair
    width, height = pair.size
    shape = f'width="{width}" height="{height}"'
    label = f"{letter}: {escape(pair.prompt)}"
    if pair.frames > 1:
        content = (
            f'<video src="{cards.link(file)}" aria-label="{label}" {shape} data-column="{letter}" data-clip="0"'
            ' preload="auto" muted playsinline></video>'
        )
    else:
        content = f'<img src="{cards.link(file)}" alt="{label}" {shape}>'
    name = ""
    if told:
        bf16 = (trial.answer if letter == "X" else letter) in trial.bf16
        shown = words.NAMES[REFERENCE] if bf16 else words.of_column(Column(pair.precision, pair.recipe))
        name = f' <span class="tf-badge">{escape(shown)}</span>'
    return (
        f'<figure><div class="tf-blind-frame" tabindex="0" role="group" aria-label="{words.blind.frame(letter)}">'
        f'<div class="tf-blind-move">{content}</div></div><figcaption>{letter}{name}</figcaption></figure>'
    )


def _player(pair: blind.Pair, content: str) -> str:
    """What ui/static/player.js plays together."""
    rate = catalog.model(pair.model).defaults.frame_rate
    return (
        f'<div class="tf-player" role="group" aria-label="{words.PLAYER}" data-frames="{pair.frames}"'
        f' data-rate="{rate:g}" data-clip="0">{content}<div class="tf-transport">'
        f'<button type="button" class="tf-play" aria-label="{words.PLAY}" title="{words.PLAYER_HINT}"></button>'
        f'<input type="range" class="tf-seek" min="0" max="{pair.frames - 1}" value="0" aria-label="{words.SEEK}">'
        '<output class="tf-time" aria-live="off"></output></div></div>'
    )


def score(sitting: blind.Sitting) -> str:
    """The running score by model, column and mode, with what it is worth, and everything to take along."""
    tallies = sitting.tallies()
    several = len({tally.model for tally in tallies}) > 1
    rows = "".join(_row(tally, several) for tally in tallies)
    heads = "".join(
        f'<th scope="col"{" class=tf-word" if head == words.blind.MODE else ""}>{head}</th>'
        for head in (*([words.MODEL_LABEL] * several), *words.blind.HEADS)
    )
    skipped = f" {words.blind.skipped(sitting.skipped)}" if sitting.skipped else ""
    return (
        f'<h2 class="tf-blind-heading">{words.blind.SCORE}</h2><div class="tf-scroll" tabindex="0" role="region"'
        f' aria-label="{words.blind.SCORE}"><table class="tf-figures"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<p class="tf-small">{words.blind.STATISTICS}{skipped}</p>'
        f'<p class="tf-downloads"><button type="button" class="tf-copy" title="{words.blind.SHARE_HINT}"'
        f' data-copy-text="{escape(words.blind.shared(tallies, _model))}"'
        f' data-copy-tab="blind-test">{words.blind.SHARE}</button>'
        f" Download {_download('json', 'application/json', exported(sitting))}"
        f" {_download('csv', 'text/csv', table(sitting))}</p>"
    )


def _model(model: str) -> str:
    return catalog.model(model).name


def _row(tally: blind.Tally, several: bool) -> str:
    low, high = tally.interval
    model = f"<td>{escape(catalog.model(tally.model).name)}</td>" if several else ""
    cells = (
        words.blind.MODES[tally.mode],
        f"{tally.right} of {tally.asked}",
        f"{tally.right / tally.asked:.0%} <small>{low:.0%}–{high:.0%}</small>",
        words.blind.p_value(tally.p_value),
        words.blind.worth(tally.p_value, tally.asked),
    )
    first, *rest = cells
    name = escape(words.of_column(Column(tally.precision, tally.recipe)))
    return (
        f'<tr>{model}<th scope="row">{name}</th><td class="tf-word">{first}</td>'
        f"{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
    )


def exported(sitting: blind.Sitting) -> str:
    """Score and answers as JSON."""
    tallies = [asdict(t) | {"p_value": t.p_value, "interval_95": list(t.interval)} for t in sitting.tallies()]
    answers = [given.to_json() for given in sitting.given]
    return json.dumps({"score": tallies, "skipped": sitting.skipped, "answers": answers}, indent=1) + "\n"


def table(sitting: blind.Sitting) -> str:
    """The answers as CSV, one a row."""
    written = io.StringIO()
    writer = csv.DictWriter(written, [field.name for field in fields(blind.Given)])
    writer.writeheader()
    writer.writerows(given.to_json() for given in sitting.given)
    return written.getvalue()


def _download(kind: str, media_type: str, content: str) -> str:
    packed = base64.b64encode(content.encode()).decode()
    return f'<a href="data:{media_type};base64,{packed}" download="twinframe-blind-test.{kind}">{kind.upper()}</a>'
