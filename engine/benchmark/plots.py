"""A benchmark's JSON as plots and tables: latency, speedup and memory against batch size, and the table of all runs.

Standalone SVG, for light and dark backgrounds, and Markdown. Only what was timed is drawn: an emulated precision has
no place here. Knows nothing of how the numbers were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from engine import reference
from engine.benchmark.methods import BARE, ENGINE, METHODS, POST, POST_DEFAULT, column_of, stands_for
from engine.columns import format_of, label
from engine.errors import OutputError
from engine.files import write_whole
from engine.formats import FP8, PRECISIONS, REFERENCE, ROWS

Row = Mapping[str, Any]
"""A row of the JSON that engine/benchmark/bench.py writes."""
Bar = tuple[Row, float]
"""A row and its value."""

_DRAWN = (ENGINE, POST, POST_DEFAULT)
"""`bare` is the engine's denoiser again, called without the engine."""
_ABSENT = "–"
POSTS_FP8 = (
    "The post has no FP8: by its method, FP8 is torchao's row-wise configuration, compiled as the post compiles MXFP8 "
    "and NVFP4."
)
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #18181b; text-anchor: middle; font-variant-numeric: tabular-nums }
.title { font-size: 14px; font-weight: 600; text-anchor: start }
.soft { fill: #62626c }
.key { text-anchor: start }
line { stroke: #dcdce1 }
rect { stroke-width: 1.5 }
%(light)s
.post { fill-opacity: 0.15 } .post-default { fill-opacity: 0.15; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f0f2 } .soft { fill: #a3a3ad } line { stroke: #34343a }
  %(dark)s
}
"""


def timed(result: Mapping[str, Any]) -> list[Row]:
    """The rows that have a latency of the real format, by batch size, column and method."""
    rows = [row for row in result["rows"] if row["execution"] == "native" and row["latency_s"]]
    return sorted(rows, key=lambda r: (r["batch_size"], place(r), METHODS.index(r["method"])))


def place(row: Row) -> tuple[int, str]:
    """By which columns of rows are sorted."""
    return PRECISIONS.index(row["precision"]), column_of(row)


def speedup(row: Row, rows: Sequence[Row], precision: str, method: str) -> float | None:
    """How many times as fast a row is as another precision or method at its batch size; None without that one."""
    base = other(row, rows, precision, method)
    return None if base is None else base["latency_s"]["median"] / row["latency_s"]["median"]


def table(result: Mapping[str, Any]) -> str:
    """Every timed row as Markdown, below a line that says what was measured, on what and with what."""
    rows = timed(result)
    columns = {
        "Batch": [str(row["batch_size"]) for row in rows],
        "Precision": [label(column_of(row)) for row in rows],
        "Method": [", ".join([row["method"], *row.get("also", ())]) for row in rows],
        "Median s": [f"{row['latency_s']['median']:.3f}" for row in rows],
        "10-90% s": [f"{row['latency_s']['p10']:.3f}-{row['latency_s']['p90']:.3f}" for row in rows],
        "Step ms": [_cell(row["step_ms"], 1) for row in rows],
        "vs bf16": [
            _factor(None if row["precision"] == REFERENCE else speedup(row, rows, REFERENCE, row["method"]))
            for row in rows
        ],
        **{
            f"vs {method}": [
                _factor(None if stands_for(row, method) else speedup(row, rows, row["precision"], method))
                for row in rows
            ]
            for method in (POST, POST_DEFAULT)
        },
        "Weights GB": [_cell(row["memory_gb"]["weights"], 2) for row in rows],
        "Peak GB": [_cell(row["memory_gb"]["peak_allocated"], 2) for row in rows],
        "First call s": [_cell(row["first_call_s"], 1) for row in rows],
    }
    return "\n".join([f"{_about(result)}.", "", *_grid(columns), "", *_posts_fp8([result])]).rstrip() + "\n"


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """Several results as one table in Markdown, the engine's rows beside the other methods', and what each of them is.

    Models stand in the order of their names, a model's newest run first. Within a row everything comes from one run;
    `step` is the pipeline's denoising divided by its steps. A compile with the default mode has columns of its own
    where that is not the post's method.
    """
    columns: dict[str, list[str]] = {}
    results = sorted(results, key=lambda result: result["date"], reverse=True)
    results.sort(key=lambda result: result["model"])
    for result in results:
        rows = timed(result)
        for row in (row for row in rows if row["method"] == ENGINE):
            post, default, bare = (other(row, rows, row["precision"], m) for m in (POST, POST_DEFAULT, BARE))
            if default is post:
                default = None
            bf16 = None if row["precision"] == REFERENCE else other(row, rows, REFERENCE, ENGINE)
            cells = {
                "": f"{result['model']} {_shape(result)}",
                "GPU": result["device"].removeprefix("NVIDIA "),
                "steps": str(result["settings"]["num_inference_steps"]),
                "batch": str(row["batch_size"]),
                "precision": label(column_of(row)),
                "whole call, s": f"{row['latency_s']['median']:.2f}",
                "step, ms": _cell(row["step_ms"], 1),
                "step by the post's method, ms": _cell(_step(post), 1),
                "faster than it": _factor(_ratio(_step(post), _step(row))),
                "step by default-mode compile, ms": _cell(_step(default), 1),
                "faster than that": _factor(_ratio(_step(default), _step(row))),
                "faster than bf16": _factor(_ratio(_step(bf16), _step(row))),
                "LPIPS from the post's": _cell((row.get("from_post") or {}).get("lpips"), 4),
                "over the bare pipeline": _percent(_ratio(_whole(row), _whole(bare))),
                "peak, GB": _cell(row["memory_gb"]["peak_allocated"], 1),
                "first call, s": _cell(row["first_call_s"], 0),
            }
            for head, cell in cells.items():
                columns.setdefault(head, []).append(cell)
    notes = [
        f"- {_about(result)}; median of {_repeats(result)}." + (f" {result['note']}" if "note" in result else "")
        for result in results
    ]
    beside = [*_posts_fp8(results), reference.read()["latency_note"], ""]
    return "\n".join([*_grid(columns), "", *beside, *dict.fromkeys(notes)]) + "\n"


def posts_fp8(rows: Iterable[Row]) -> str:
    """What FP8 by the post's method is; empty where there is none."""
    there = any(row["precision"] == FP8.id and row["method"] in (POST, POST_DEFAULT) for row in rows)
    return POSTS_FP8 if there else ""


def _posts_fp8(results: Sequence[Mapping[str, Any]]) -> list[str]:
    said = posts_fp8(row for result in results for row in timed(result))
    return [said, ""] if said else []


def other(row: Row, rows: Sequence[Row], precision: str, method: str) -> Row | None:
    """The row of another precision or method at the same batch size; of several columns, the row's own."""
    wanted = (row["batch_size"], precision)
    found = [r for r in rows if (r["batch_size"], r["precision"]) == wanted and stands_for(r, method)]
    return min(found, key=lambda r: column_of(r) != column_of(row), default=None)


def _step(row: Row | None) -> float | None:
    return None if row is None else row["step_ms"]


def _whole(row: Row | None) -> float | None:
    return None if row is None else row["latency_s"]["median"]


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _about(result: Mapping[str, Any]) -> str:
    """What was measured, on what and with what."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    asked = result["settings"]
    return (
        f"{result['model']}, {_shape(result)}, {asked['num_inference_steps']} steps, {result['weights']} weights, "
        f"recipe `{asked['recipe']}`; {result['device']}; {result['date'][:10]}; {versions}"
    )


def _shape(result: Mapping[str, Any]) -> str:
    asked = result["settings"]
    return f"{asked['width']}x{asked['height']}" + (f"x{asked['num_frames']}" if asked["num_frames"] > 1 else "")


def repeats(result: Mapping[str, Any]) -> list[int]:
    """How often its timed rows were measured: not equally often where a time limit came between."""
    return sorted({row["repeats"] for row in timed(result)})


def _repeats(result: Mapping[str, Any]) -> str:
    counts = repeats(result)
    return f"{'-'.join(map(str, counts))} call{'s' * (counts != [1])}"


def _grid(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """A Markdown table's lines, without the columns that say nothing."""
    shown = {head: cells for head, cells in columns.items() if any(cell != _ABSENT for cell in cells)}
    lines = [f"| {' | '.join(shown)} |", f"|{'---|' * len(shown)}"]
    return lines + [f"| {' | '.join(cells)} |" for cells in zip(*shown.values(), strict=True)]


def drawings(result: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name: latency, speedup (where there is something to be faster than) and memory, against batch size."""
    rows = timed(result)
    drawn = [row for row in rows if row["method"] in _DRAWN]
    each = "clip" if result["settings"]["num_frames"] > 1 else "picture"
    faster = [
        (row, factor)
        for row in drawn
        if row["precision"] != REFERENCE and (factor := speedup(row, rows, REFERENCE, row["method"]))
    ]
    bars = {
        # A batch's latency grows with the batch, which would hide everything else.
        "latency": (f"Seconds a {each}", "s", [(row, row["latency_s"]["median"] / row["batch_size"]) for row in drawn]),
        "speedup": ("Speedup over bf16 by the same method", "x", faster),
        "memory": ("Peak memory, GB", "GB", [(row, row["memory_gb"]["peak_allocated"]) for row in drawn]),
    }
    where = f"{result['model']} on {result['device']}"
    return {name: _bars(title, where, unit, values) for name, (title, unit, values) in bars.items() if values}


def write(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write the drawings and the table into `folder`, made if missing, as `stem`-latency.svg and so on.

    Raises:
        OutputError: the folder cannot be written.
    """
    files = {f"{stem}-{name}.svg": drawn for name, drawn in drawings(result).items()}
    files[f"{stem}.md"] = table(result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write into {folder}: {error.strerror or error}. Choose another folder.") from error
    for name, text in files.items():
        write_whole(folder / name, text.encode())
    return [folder / name for name in files]


def _bars(title: str, where: str, unit: str, values: Sequence[Bar]) -> str:
    """A group of bars a batch size, a bar a precision and method, its value above it."""
    floor, tall = 210, 140
    batches = sorted({row["batch_size"] for row, _ in values})
    ordered = sorted((row for row, _ in values), key=lambda row: (place(row), row["method"]))
    lanes = list(dict.fromkeys(map(_lane, ordered)))
    bar = 40
    group = max(bar * len(lanes) + 28, 344 // len(batches))
    width = group * len(batches) + 16
    top = max(value for _, value in values)
    drawn = []
    for row, value in values:
        middle = 8 + group * (batches.index(row["batch_size"]) + 0.5)
        left = middle + bar * (lanes.index(_lane(row)) - len(lanes) / 2)
        height = tall * value / top
        drawn.append(
            f'<rect class="{row["precision"]} {row["method"]}" x="{left + 2:.1f}" y="{floor - height:.1f}" '
            f'width="{bar - 4}" height="{height:.1f}"><title>{label(column_of(row))} by {row["method"]}, '
            f"batch {row['batch_size']}: {value:.3f} {unit}</title></rect>"
            f'<text x="{left + bar / 2:.1f}" y="{floor - height - 6:.1f}">{_short(value)}</text>'
        )
    labels = "".join(
        f'<text class="soft" x="{8 + group * (index + 0.5):.1f}" y="{floor + 18}">batch {batch}</text>'
        for index, batch in enumerate(batches)
    )
    keys, methods = [], {method for _, method in lanes}
    for index, (written, method) in enumerate(lanes):
        x, y = 8 + 118 * (index % 3), floor + 42 + 20 * (index // 3)
        name = label(written) + (f", {method}" if len(methods) > 1 else "")
        keys.append(
            f'<rect class="{format_of(written)} {method}" x="{x}" y="{y - 10}" width="11" height="11"/>'
            f'<text class="key" x="{x + 17}" y="{y}">{name}</text>'
        )
    bottom = floor + 42 + 20 * ((len(lanes) - 1) // 3) + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom}" width="{width}" height="{bottom}" '
        f'role="img" aria-label="{escape(title)}"><style>{_style()}</style>'
        f'<text class="title" x="8" y="20">{escape(title)}</text>'
        f'<text class="soft key" x="8" y="38">{escape(where)}</text>'
        f'<line x1="8" x2="{width - 8}" y1="{floor}" y2="{floor}"/>{"".join(drawn)}{labels}{"".join(keys)}</svg>\n'
    )


def _style() -> str:
    """The style sheet, with a colour for each format."""
    light = [_fill(row.id, row.colour.light) for row in ROWS]
    dark = [_fill(row.id, row.colour.dark) for row in ROWS]
    return _STYLE % {"light": _in_pairs(light, "\n"), "dark": _in_pairs(dark, "\n  ")}


def _fill(name: str, colour: str) -> str:
    return f".{name} {{ fill: {colour}; stroke: {colour} }}"


def _in_pairs(rules: Sequence[str], between: str) -> str:
    return between.join(" ".join(rules[index : index + 2]) for index in range(0, len(rules), 2))


def _lane(row: Row) -> tuple[str, str]:
    return column_of(row), row["method"]


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _cell(value: float | None, digits: int) -> str:
    return _ABSENT if value is None else f"{value:.{digits}f}"


def _factor(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{100 * (value - 1):+.1f}%"
