"""The Benchmarks tab: what the post measured, quoted, and what this project measured, never in one table.

Reads assets/reference/b200.json and the files that `python -m engine bench` writes, and makes HTML of them; of the
engine it knows what belongs together in such a file (engine/benchmark/plots.py). GB are 1e9 bytes, latencies seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

from engine import catalog, reference
from engine.benchmark import methods, plots
from engine.benchmark.methods import ENGINE, METHODS, POST, POST_DEFAULT, column_of
from engine.columns import format_of, label
from engine.formats import PRECISIONS, REFERENCE
from ui import words
from ui.html.tables import head, table

log = logging.getLogger(__name__)

LATENCY = slice(3, 12)
"""The columns of a table that one sentence takes the place of where nothing was timed."""

Row = Mapping[str, object]


def page(folder: Path) -> str:
    """Both halves of the tab; `folder` holds what was measured, one JSON file a device and model."""
    post = reference.read()
    return f'<div class="tf-benchmarks">{measured(folder, post)}{quoted(post)}</div>'


# What this project measured


def measured(folder: Path, post: Mapping) -> str:
    """Every benchmark in `folder`, a model's newest first; how to make one if there is none, and a line for each that
    cannot be read."""
    read: list[tuple[str, Path, Mapping]] = []
    runs: dict[str, list[str]] = {}
    unreadable: list[str] = []
    for file in sorted(folder.glob("*.json")):
        with _told(file, unreadable):
            found = methods.read(file)
            read.append((str(found["date"]), file, found))
    for _, file, found in sorted(read, key=lambda entry: entry[0], reverse=True):
        with _told(file, unreadable):
            article = _measurement(found, post, len(runs.get(found["model"], ())) + 1)
            runs.setdefault(found["model"], []).append(article)
    said = [f'<h3 class="tf-model">{escape(_name(model))}</h3>{"".join(made)}' for model, made in sorted(runs.items())]
    said += unreadable
    note = words.benchmarks.MEASURED_NOTE
    if not said:
        note = words.benchmarks.NO_BENCHMARKS
        said.append(f'<pre class="tf-command">{words.benchmarks.BENCH_COMMAND}</pre>')
    head = f'<h2>{words.benchmarks.MEASURED}</h2><p class="tf-small">{note}</p>'
    return f'<section class="tf-half">{head}{"".join(said)}</section>'


@contextmanager
def _told(file: Path, unreadable: list[str]) -> Iterator[None]:
    """What goes wrong with a file is a line of its own; the others are shown."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("Benchmark %s cannot be shown: %r", file, error)
        unreadable.append(f'<p class="tf-small">{escape(words.benchmarks.unreadable(file.name))}</p>')


def _measurement(found: Mapping, post: Mapping, run: int) -> str:
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
    title = words.benchmarks.run(run, {row["batch_size"] for row in rows})
    times = [(column_of(r), r["batch_size"], r["latency_s"]["median"]) for r in timed]
    peaks = [(column_of(r), r["batch_size"], r["memory_gb"]["peak_allocated"]) for r in timed]
    return (
        f'<article class="tf-bench"><h4>{escape(title)}</h4>'
        f'<p class="tf-facts-line"><span class="tf-badge tf-measured">{words.MEASURED_BADGE}</span>'
        f" {escape(' · '.join(facts))}</p>"
        f"{_plots(model, times, peaks)}{_measured_table(rows, f'{words.benchmarks.MEASURED}: {_name(model)}, {title}')}"
        f"{_posts_fp8(rows)}"
        f"{_beside_the_post(model, rows, post, title)}</article>"
    )


def _measured_table(rows: Sequence[Row], label: str) -> str:
    batches, used = {row["batch_size"] for row in rows}, {row["method"] for row in rows}
    heads = [
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
        speedup = against and against["latency_s"] and against["latency_s"]["median"] / took["median"]
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


def _beside_the_post(model: str, rows: Sequence[Row], post: Mapping, title: str) -> str:
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
    label = f"{words.benchmarks.PEAK_BESIDE}: {_name(model)}, {title}"
    return f"<h5>{words.benchmarks.PEAK_BESIDE}</h5>{table(heads, body, label)}"


# What the post measured


def quoted(post: Mapping) -> str:
    """The post's tables as they stand."""
    models = list(dict.fromkeys(row["model"] for row in post["performance"]))
    tables = "".join(_quoted_model(model, post) for model in models)
    return (
        f'<section class="tf-half"><h2>{words.benchmarks.QUOTED}</h2>'
        f'<p class="tf-small">{escape(words.benchmarks.QUOTED_NOTE)} {escape(post["latency_note"])}</p>'
        f"{tables}{_quoted_lpips(post['mean_lpips_drawbench_alex'], post['lpips_note'])}"
        f"{_quoted_selective(post['full_vs_selective_flux.1-dev'])}</section>"
    )


def _quoted_model(model: str, post: Mapping) -> str:
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
    table = (
        f'<div class="tf-scroll" tabindex="0" role="region" aria-label="{escape(_name(model))}">'
        f'<table class="tf-figures tf-grouped"><thead><tr><td></td>{groups}</tr>'
        f'<tr><th scope="col">Precision</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    return (
        f'<article class="tf-bench"><h3>{escape(_name(model))}</h3>{_quoted_badge()}'
        f'<p class="tf-small">{escape(words.bench_settings(post["settings"][model]))}</p>'
        f"{_plots(model, times, peaks)}{table}</article>"
    )


def _quoted_cells(row: Row) -> str:
    speedup = "–" if row["precision"] == REFERENCE else words.factor(row["speedup"])
    return f"<td>{row['latency_s']:.2f}</td><td>{speedup}</td><td>{row['peak_memory_gb']:.2f}</td>"


def _quoted_lpips(found: Mapping[str, Mapping[str, float]], note: str) -> str:
    precisions = list(dict.fromkeys(p for scores in found.values() for p in scores if p != REFERENCE))
    body = "".join(
        f'<tr><th scope="row">{escape(_name(model))}</th>'
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


def _name(model: str) -> str:
    return catalog.MODELS[model].name if model in catalog.MODELS else model


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
