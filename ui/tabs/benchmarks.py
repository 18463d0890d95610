"""The Benchmarks tab: an answer a model, one chart and one table of all figures with each source named, and every run.

Reads assets/reference/b200.json and the files that `python -m engine bench` and `reproduce` write, and makes HTML of
them; of the engine it knows what belongs together in such a file (engine/benchmark/plots.py) and over all of them
(overview.py). GB are 1e9 bytes, latencies seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from engine import reference
from engine.benchmark import methods, overview, plots
from engine.benchmark.methods import ENGINE, METHODS, POST, POST_DEFAULT, column_of
from engine.benchmark.overview import Figure
from engine.columns import format_of, label
from engine.formats import PRECISIONS, REFERENCE
from ui import words
from ui.fields import Dropdown
from ui.html import cards
from ui.html.lengths import Bar, lengths, source
from ui.html.tables import Head, head, table

log = logging.getLogger(__name__)

LATENCY = slice(3, 12)
"""The columns of a table that one sentence takes the place of where nothing was timed."""

Row = Mapping[str, Any]


EVERY = ""
"""A filter's choice that leaves nothing out."""
FIRST_BATCH = "1"
FILTERS = {"model": "model", "device": "device", "precision": "precision", "batch": "batch_size"}
"""Name of a filter -> attribute of a figure."""
QUICK = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


def tab(opened: gr.Tab, folder: Path) -> None:
    """The components of the tab; `folder` holds what was measured, one JSON file a device and model.

    It is drawn when it is opened: until then nobody has to load it.
    """
    found = overview.figures(_read(folder)[0], reference.read())
    with gr.Column(elem_classes="tf-form"), gr.Row(elem_classes="tf-choose"):
        chosen = [
            Dropdown(
                [(words.benchmarks.EVERY[name], EVERY), *_values(found, name)],
                value=FIRST_BATCH if name == "batch" else EVERY,
                label=words.benchmarks.FILTERS[name],
                filterable=False,
                elem_id=f"tf-bench-{name}",
                elem_classes="tf-short",
            )
            for name in FILTERS
        ]
    drawn = gr.HTML(apply_default_css=False, elem_id="tf-benchmarks", js_on_load=cards.script("sort"))

    def draw(*values: str) -> str:
        return page(folder, dict(zip(FILTERS, values, strict=True)))

    opened.select(draw, chosen, drawn, **QUICK)
    for field in chosen:
        field.change(draw, chosen, drawn, **QUICK)


def _values(found: Sequence[Figure], name: str) -> list[tuple[str, str]]:
    """A filter's choices: what is shown, and its value."""
    values = dict.fromkeys(getattr(figure, FILTERS[name]) for figure in found)
    shown: Mapping[str, Callable[[Any], str]] = {
        "model": words.model,
        "precision": words.NAMES.__getitem__,
        "device": words.benchmarks.device,
    }
    said = shown.get(name, str)
    order = PRECISIONS.index if name == "precision" else None
    return [(said(value), str(value)) for value in sorted(values, key=order)]


def page(folder: Path, chosen: Mapping[str, str] | None = None) -> str:
    """The whole tab; `chosen` are the filters' values."""
    chosen = chosen or {}
    post = reference.read()
    results, _ = _read(folder)
    found = [figure for figure in overview.figures(results, post) if _passes(figure, chosen)]
    return (
        f'<div class="tf-benchmarks">{answers(found)}{_overview(found)}'
        f"{measured(folder, post, chosen.get('model', EVERY), chosen.get('device', EVERY))}"
        f"{quoted(post, chosen.get('model', EVERY))}</div>"
    )


def _passes(figure: Figure, chosen: Mapping[str, str]) -> bool:
    return all(chosen.get(name, EVERY) in (EVERY, str(getattr(figure, of))) for name, of in FILTERS.items())


# Answers, one chart, one table


def answers(found: Sequence[Figure]) -> str:
    """A sentence a model, at its smallest batch size and largest picture."""
    said = []
    for model, group in groupby(found, key=lambda figure: figure.model):
        some = list(group)
        first = [figure for figure in some if _shape(figure) == _shape(some[0])]
        if sentence := words.benchmarks.answer(words.model(model), first):
            said.append(f"<li>{escape(sentence)}</li>")
    if not said:
        return ""
    return (
        f'<section class="tf-overview"><h2>{words.benchmarks.ANSWERS}</h2><ul class="tf-answers">{"".join(said)}</ul>'
        f'<p class="tf-small">{words.benchmarks.ANSWERS_NOTE}</p></section>'
    )


def _shape(figure: Figure) -> tuple[int, int, int]:
    return figure.width, figure.height, figure.batch_size


def _overview(found: Sequence[Figure]) -> str:
    if not found:
        return f'<p class="tf-small">{words.benchmarks.NONE_LEFT}</p>'
    bars = [figure for figure in found if figure.speedup]
    chart = _chart(bars) if bars else f'<p class="tf-small">{words.benchmarks.NO_SPEEDUP}</p>'
    return (
        f'<section class="tf-overview"><h2>{words.benchmarks.CHART}</h2>{chart}</section>'
        f'<section class="tf-overview"><h2>{words.benchmarks.FIGURES}</h2>'
        f'<p class="tf-small">{words.benchmarks.FIGURES_NOTE}</p>{_table_of(found)}</section>'
    )


def _chart(found: Sequence[Figure]) -> str:
    """Speedup over bf16 as bars that begin at 1."""
    groups: dict[str, list[Bar]] = {}
    for figure in found:
        if figure.speedup is None:
            continue
        bar = Bar(
            label=f"{words.NAMES[figure.precision]}, {words.benchmarks.device(figure.device)}",
            precision=figure.precision,
            value=figure.speedup,
            shown=words.factor(figure.speedup),
            quoted=figure.quoted,
        )
        groups.setdefault(words.benchmarks.group(words.model(figure.model), *_shape(figure)), []).append(bar)
    return f'{lengths(groups, start=1.0)}<p class="tf-small">{words.benchmarks.CHART_NOTE}</p>'


def _table_of(found: Sequence[Figure]) -> str:
    heads: list[Head] = [
        (words.MODEL_LABEL, None), (words.benchmarks.DEVICE, None), (words.PRECISION_LABEL, None),
        (words.benchmarks.SIZE, ""), (words.benchmarks.BATCH, ""), (words.benchmarks.STEPS, ""),
        (words.benchmarks.EACH, "s", "each"),
        (words.benchmarks.OVER_BF16, "", "speedup"), (words.benchmarks.STEP_OVER_BF16, "", "step speedup"),
        (words.benchmarks.OVER_POST, "", "over the post"), (words.benchmarks.PEAK, "GB", "peak"),
        (words.benchmarks.SAVING, "", "saving"), (words.benchmarks.SOURCE, None),
    ]  # fmt: skip
    body = "".join(
        f'<tr><th scope="row" class="tf-word">{escape(words.model(f.model))}</th>'
        f'<td class="tf-word">{escape(words.benchmarks.device(f.device))}</td>'
        f'<td class="tf-word">{words.NAMES[f.precision]}</td>'
        f'<td data-value="{f.width * f.height}">{words.benchmarks.size(f.width, f.height)}</td>'
        f"<td>{f.batch_size}</td><td>{f.steps}</td>"
        f"{_value(f.seconds, words.seconds)}{_value(f.speedup, words.factor)}{_value(f.step_speedup, words.factor)}"
        f"{_value(f.over_post, words.factor)}{_value(f.peak_gb, words.gigabytes)}{_value(f.saving, words.change)}"
        f'<td class="tf-word">{source(quoted=f.quoted)}</td></tr>'
        for f in found
    )
    return table(heads, body, words.benchmarks.FIGURES, "tf-every", sorts=True)


def _value(value: float | None, shown: Callable[[float], str]) -> str:
    """A cell that ui/static/sort.js sorts by its exact value."""
    return f'<td data-value="{"" if value is None else f"{value:.6g}"}">{_or_dash(value, shown)}</td>'


# What this project measured


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every benchmark in `folder`, the newest first, and a line for each file that cannot be read."""
    read: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for file in sorted(folder.glob("*.json")):
        with _told(file, unreadable):
            found = methods.read_all(file)
            overview.figures(found, reference.read())  # all that is needed of it is there
            read += [result | {"file": file} for result in found]
    return sorted(read, key=lambda found: str(found["date"]), reverse=True), unreadable


def measured(folder: Path, post: Mapping[str, Any], model: str = EVERY, device: str = EVERY) -> str:
    """Every benchmark in `folder`, a model's newest first and the others folded; how to make one if there is none, and
    a line for each that cannot be read. `model` and `device` leave the others out."""
    read, unreadable = _read(folder)
    runs: dict[str, list[str]] = {}
    for found in read:
        if model in (EVERY, found["model"]) and device in (EVERY, found["device"]):
            with _told(found["file"], unreadable):
                article = _measurement(found, post, len(runs.get(found["model"], ())) + 1)
                runs.setdefault(found["model"], []).append(article)
    said = [_runs(words.model(model), made) for model, made in sorted(runs.items())]
    said += unreadable
    note = words.benchmarks.MEASURED_NOTE
    if not said:
        note = words.benchmarks.NO_BENCHMARKS
        said.append(f'<pre class="tf-command">{words.benchmarks.BENCH_COMMAND}</pre>')
    head = f'<h2>{words.benchmarks.MEASURED}</h2><p class="tf-small">{note}</p>'
    return f'<section class="tf-half">{head}{"".join(said)}</section>'


def _runs(name: str, made: Sequence[str]) -> str:
    newest, *older = made
    folded = ""
    if older:
        said = escape(words.benchmarks.older(len(older), name))
        folded = f'<details class="tf-older"><summary>{said}</summary>{"".join(older)}</details>'
    return f'<h3 class="tf-model">{escape(name)}</h3>{newest}{folded}'


@contextmanager
def _told(file: Path, unreadable: list[str]) -> Iterator[None]:
    """What goes wrong with a file is a line of its own; the others are shown."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("Benchmark %s cannot be shown: %r", file, error)
        unreadable.append(f'<p class="tf-small">{escape(words.benchmarks.unreadable(file.name))}</p>')


def _measurement(found: Mapping[str, Any], post: Mapping[str, Any], run: int) -> str:
    model = found["model"]
    rows = sorted(
        found["rows"],
        key=lambda row: (row["batch_size"], METHODS.index(row["method"]), plots.place(row)),
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    asked = found["settings"]
    timed = [r for r in rows if r["execution"] == "native" and r["method"] == ENGINE and r["latency_s"]]
    facts = [
        found["device"],
        words.when(found["date"]),
        words.benchmarks.WEIGHTS[found["weights"]],
        words.bench_settings(asked),
        words.benchmarks.method(asked["recipe"], plots.repeats(found) or [asked["repeats"]]),
        versions,
        *(found[key] for key in ("stopped", "note") if key in found),
    ]
    title = words.benchmarks.run(run, {row["batch_size"] for row in rows}, words.model(model))
    times = [(column_of(r), r["batch_size"], r["latency_s"]["median"]) for r in timed]
    peaks = [(column_of(r), r["batch_size"], r["memory_gb"]["peak_allocated"]) for r in timed]
    return (
        f'<article class="tf-bench"><h4>{escape(title)}</h4>'
        f'<p class="tf-facts-line"><span class="tf-badge tf-measured">{words.MEASURED_BADGE}</span>'
        f" {escape(' · '.join(facts))}</p>"
        f"{_plots(model, times, peaks)}{_measured_table(rows, f'{words.benchmarks.MEASURED}: {title}')}"
        f"{_posts_fp8(rows)}"
        f"{_beside_the_post(model, rows, post, title)}</article>"
    )


def _measured_table(rows: Sequence[Row], label: str) -> str:
    batches, used = {row["batch_size"] for row in rows}, {row["method"] for row in rows}
    heads: list[Head] = [
        ("Batch", ""), ("Precision", ""), ("Method", ""), ("Text", "s", "stages"), ("Denoise", "s", "stages"),
        ("Decode", "s", "stages"), ("Total", "s", "median"), ("10–90%", "s", "spread"), ("vs bf16", "", "speedup"),
        ("Step", "ms", "step"), ("vs the post's", "", "over the post"),
        ("vs default mode", "", "over the default mode"), ("Weights", "GB", "weights"),
        ("Peak", "GB", "peak"), ("vs bf16", "", "saving"), ("First call", "s", "first call"),
    ]  # fmt: skip
    keep = [len(batches) > 1, True, len(used) > 1, *[True] * 7, POST in used, POST_DEFAULT in used, *[True] * 4]
    body = "".join(_measured_row(row, rows, keep) for row in rows)
    return table([of for of, kept in zip(heads, keep, strict=True) if kept], body, label)


def _measured_row(row: Row, rows: Sequence[Row], keep: Sequence[bool]) -> str:
    """A row of the table; what was not measured is a dash, and an emulation's time and peak are never shown."""
    native, took, memory = row["execution"] == "native", row["latency_s"], row["memory_gb"]
    against = plots.other(row, rows, REFERENCE, row["method"]) if native and row["precision"] != REFERENCE else None
    absent = f'<td colspan="{sum(keep[LATENCY])}" class="tf-absent">'
    if not native:
        latency = f"{absent}{words.NOT_COMPARABLE}</td>"
    elif took is None:
        latency = f"{absent}{escape(row['error'] or words.benchmarks.NOT_MEASURED)}</td>"
    else:
        theirs = against["latency_s"] if against else None
        speedup = theirs["median"] / took["median"] if theirs else None
        values = [
            *(_or_dash(took[stage], words.seconds) for stage in ("text", "denoise", "decode", "median")),
            f"{words.seconds(took['p10'])}–{words.seconds(took['p90'])}",
            _or_dash(speedup, words.factor),
            _or_dash(row["step_ms"], "{:.0f}".format),
            _or_dash(_over(POST, row, rows), words.factor),
            _or_dash(_over(POST_DEFAULT, row, rows), words.factor),
        ]
        latency = "".join(f"<td>{value}</td>" for value, kept in zip(values, keep[LATENCY], strict=True) if kept)
    peak = memory["peak_allocated"] if native else None
    base = against and against["memory_gb"]["peak_allocated"]
    lead = [
        f"<td>{row['batch_size']}</td>",
        f'<th scope="row">{escape(label(column_of(row)))}</th>',
        f"<td>{escape(words.benchmarks.METHODS[row['method']])}</td>",
    ]
    rest = [
        words.gigabytes(memory["weights"]),
        _or_dash(peak, words.gigabytes),
        _or_dash(1 - peak / base if peak and base else None, words.change),
        _or_dash(row["first_call_s"] if native else None, words.seconds),
    ]
    head = "".join(cell for cell, kept in zip(lead, keep, strict=False) if kept)
    return f"<tr>{head}{latency}{''.join(f'<td>{value}</td>' for value in rest)}</tr>"


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return "–" if value is None else shown(value)


def _over(method: str, row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast the engine's step is as the step by a method of the post's."""
    posts = plots.other(row, rows, row["precision"], method) if row["method"] == ENGINE else None
    return posts["step_ms"] / row["step_ms"] if posts and posts["step_ms"] and row["step_ms"] else None


def _posts_fp8(rows: Sequence[Row]) -> str:
    """What FP8 by the post's method is, where there is any."""
    said = plots.posts_fp8(rows)
    return f'<p class="tf-small">{escape(said)}</p>' if said else ""


def _beside_the_post(model: str, rows: Sequence[Row], post: Mapping[str, Any], title: str) -> str:
    """bf16's peak memory here and in the post: the one number that does not depend on the GPU's speed."""
    theirs = {
        r["batch_size"]: r["peak_memory_gb"]
        for r in post["performance"]
        if (r["model"], r["precision"]) == (model, REFERENCE)
    }
    ours = [
        r
        for r in rows
        if (r["precision"], r["method"]) == (REFERENCE, ENGINE)
        and r["batch_size"] in theirs
        and r["memory_gb"]["peak_allocated"]
    ]
    if not ours:
        return ""
    body = "".join(
        f"<tr><td>{r['batch_size']}</td><td>{r['memory_gb']['peak_allocated']:.2f}</td>"
        f'<td class="tf-quote">{theirs[r["batch_size"]]:.2f}</td>'
        f"<td>{words.change(1 - r['memory_gb']['peak_allocated'] / theirs[r['batch_size']], digits=1)}</td></tr>"
        for r in ours
    )
    heads = [("Batch", ""), ("Measured", "GB"), ("Post, B200", "GB"), ("Difference", "")]
    label = f"{words.benchmarks.PEAK_BESIDE}: {title}"
    return f'<p class="tf-sub">{words.benchmarks.PEAK_BESIDE}</p>{table(heads, body, label)}'


# What the post measured


def quoted(post: Mapping[str, Any], only: str = EVERY) -> str:
    """The post's tables as they stand; `only` is a model whose figures alone are wanted."""
    models = [model for model in dict.fromkeys(r["model"] for r in post["performance"]) if only in (EVERY, model)]
    tables = "".join(_quoted_model(model, post) for model in models)
    return (
        f'<section class="tf-half"><h2>{words.benchmarks.QUOTED}</h2>'
        f'<p class="tf-small">{escape(words.benchmarks.QUOTED_NOTE)} {escape(post["latency_note"])}</p>'
        f"{tables}{_quoted_lpips(post['mean_lpips_drawbench_alex'], post['lpips_note'])}"
        f"{_quoted_selective(post['full_vs_selective_flux.1-dev'])}</section>"
    )


def _quoted_model(model: str, post: Mapping[str, Any]) -> str:
    rows = [row for row in post["performance"] if row["model"] == model]
    batches = sorted({row["batch_size"] for row in rows})
    found = {(row["precision"], row["batch_size"]): row for row in rows}
    groups = "".join(f'<th colspan="3" scope="colgroup">Batch {batch}</th>' for batch in batches)
    heads = "".join(head(*of) for _ in batches for of in (("Latency", "s"), ("Speedup", ""), ("Peak", "GB")))
    body = "".join(
        f'<tr><th scope="row">{words.NAMES[precision]}</th>'
        + "".join(_quoted_cells(found[precision, batch]) for batch in batches)
        + "</tr>"
        for precision in dict.fromkeys(row["precision"] for row in rows)
    )
    times = [(row["precision"], row["batch_size"], row["latency_s"]) for row in rows]
    peaks = [(row["precision"], row["batch_size"], row["peak_memory_gb"]) for row in rows]
    name = escape(words.model(model))
    table = (
        f'<div class="tf-scroll" tabindex="0" role="region" aria-label="{words.benchmarks.POSTS} {name}">'
        f'<table class="tf-figures tf-grouped"><thead><tr><td></td>{groups}</tr>'
        f'<tr><th scope="col">Precision</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    return (
        f'<article class="tf-bench"><h3><span>{words.benchmarks.POSTS} </span>{name}</h3>{_quoted_badge()}'
        f'<p class="tf-small">{escape(words.bench_settings(post["settings"][model]))}</p>'
        f"{_plots(model, times, peaks)}{table}</article>"
    )


def _quoted_cells(row: Row) -> str:
    speedup = "–" if row["precision"] == REFERENCE else words.factor(row["speedup"])
    return f"<td>{row['latency_s']:.2f}</td><td>{speedup}</td><td>{row['peak_memory_gb']:.2f}</td>"


def _quoted_lpips(found: Mapping[str, Mapping[str, float]], note: str) -> str:
    precisions = list(dict.fromkeys(p for scores in found.values() for p in scores if p != REFERENCE))
    body = "".join(
        f'<tr><th scope="row">{escape(words.model(model))}</th>'
        + "".join(f"<td>{scores[p]:.2f}</td>" for p in precisions)
        + "</tr>"
        for model, scores in found.items()
    )
    heads = [("Model", ""), *((words.NAMES[p], "") for p in precisions)]
    return (
        f'<article class="tf-bench"><h3>{words.benchmarks.QUOTED_LPIPS}</h3>{_quoted_badge()}'
        f'<p class="tf-small">{escape(note)}</p>'
        f"{table(heads, body, words.benchmarks.QUOTED_LPIPS)}</article>"
    )


def _quoted_selective(rows: Sequence[Row]) -> str:
    body = "".join(
        f'<tr><th scope="row">{words.NAMES[row["precision"]]}</th>'
        f'<td class="tf-word">{escape(row["quantization"])}</td>'
        f"<td>{row['lpips']:.3f}</td><td>{row['latency_s']:.2f}</td><td>{row['memory_gb']:.2f}</td></tr>"
        for row in rows
    )
    heads = [("Precision", ""), ("Quantization", ""), ("LPIPS", ""), ("Latency", "s"), ("Memory", "GB")]
    return (
        f'<article class="tf-bench"><h3>{words.benchmarks.QUOTED_SELECTIVE}</h3>{_quoted_badge()}'
        f"{table(heads, body, words.benchmarks.QUOTED_SELECTIVE)}</article>"
    )


def _quoted_badge() -> str:
    return f'<p class="tf-facts-line"><span class="tf-badge tf-quoted">{words.QUOTED_BADGE}</span></p>'


# Parts of both


Point = tuple[str, int, float]
"""Column, batch size, value."""


def _plots(model: str, times: Sequence[Point], peaks: Sequence[Point]) -> str:
    """Latency and memory as bars by batch, where there are several batches to compare."""
    if len({batch for _, batch, _ in times}) < 2:
        return ""
    found = {column for column, *_ in times}
    columns = sorted(found, key=lambda column: (PRECISIONS.index(format_of(column)), column))
    keys = "".join(
        f'<span><i class="tf-key" data-precision="{format_of(c)}"></i>{escape(label(c))}</span>' for c in columns
    )
    # A batch's latency grows with the batch, which would hide everything else.
    each = [(column, batch, value / batch) for column, batch, value in times]
    return (
        f'<div class="tf-plots"><p class="tf-keys">{keys}</p>'
        f"{_bars(each, words.benchmarks.latency_plot(model), 's', columns)}"
        f"{_bars(peaks, words.benchmarks.MEMORY_PLOT, 'GB', columns)}</div>"
    )


def _bars(points: Sequence[Point], title: str, unit: str, columns: Sequence[str]) -> str:
    """Grouped bars as an SVG: a group a batch, a bar a column, its value above it."""
    width, height, floor = 344, 150, 126
    batches = sorted({batch for _, batch, _ in points})
    top = max(value for *_, value in points)
    group = width / len(batches)
    bar = min(34.0, (group - 20) / len(columns))
    drawn = []
    for column, batch, value in points:
        middle = group * (batches.index(batch) + 0.5)
        left = middle + bar * (columns.index(column) - len(columns) / 2)
        tall = (floor - 20) * value / top
        drawn.append(
            f'<rect data-precision="{format_of(column)}" x="{left:.1f}" y="{floor - tall:.1f}" width="{bar - 2:.1f}"'
            f' height="{tall:.1f}"><title>{escape(label(column))}, batch {batch}: {value:.2f} {unit}</title></rect>'
            f'<text x="{left + bar / 2 - 1:.1f}" y="{floor - tall - 5:.1f}">{words.seconds(value)}</text>'
        )
    labels = "".join(
        f'<text class="tf-axis" x="{group * (index + 0.5):.1f}" y="{floor + 17}">batch {batch}</text>'
        for index, batch in enumerate(batches)
    )
    return (
        f'<figure class="tf-bars"><figcaption>{title} <small>{unit}</small></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{title}">'
        f'<line x1="0" x2="{width}" y1="{floor}" y2="{floor}"/>{"".join(drawn)}{labels}</svg></figure>'
    )
