"""The Quality tab: how far each recipe is from bf16 and what it weighs, drawn from what was measured.

Reads assets/quality/: `<model>.json`, which the search for recipes writes, `<model>-remedies.json` of
assets/figures/remedies.py, and folders that `python -m engine evaluate --out assets/quality/<name>` made. What a file
does not hold is not drawn. Knows nothing of the engine; bytes are bytes, LPIPS are means with the ends of a 95%
interval.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from engine import catalog, columns, reference
from engine.columns import recipe_named
from engine.errors import RequestError
from engine.formats import PRECISIONS, REFERENCE
from engine.request import CompareRequest
from ui import link, words
from ui.html import cards
from ui.html.lengths import Bar, lengths
from ui.html.scatter import Point, plot
from ui.html.tables import Head, table

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
"""A recipe with its `label`, `parts`, `precision`, `weight_bytes` and scores."""
Score = Mapping[str, float]
"""A mean with `low`, `high` and `n`."""
Column = tuple[Head, Callable[[Row], str]]
"""A head, and what makes the cell of a row; nothing where the row has no such value."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
WORST = 12
"""Pairs that are listed, at most."""


def tab(opened: gr.Tab, folder: Path, models: Sequence[str]) -> None:
    """The tab, drawn when it is opened: until then nobody has to load it."""
    drawn = gr.HTML(apply_default_css=False, elem_id="tf-quality", js_on_load=cards.script("sort"))
    quick = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    opened.select(lambda: page(folder, models), None, drawn, **quick)


def page(folder: Path, models: Sequence[str]) -> str:
    """Answers and one chart over everything in `folder`, and a section each; how to make one if there is none.

    Args:
        models: ids of those that are offered, whose worst pairs can be opened.
    """
    said, read = [], []
    files = [*folder.glob("*.json"), *folder.glob("*/summary.json")]
    for file in sorted(files, key=lambda file: file.relative_to(folder).with_suffix("").parts):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            found = found if file.parent == folder else _of_evaluation(found, file.parent)
            said.append(_section(found, models))
            read.append(found)
        except UNREADABLE as error:
            log.warning("Measurements %s cannot be shown: %r", file, error)
            said.append(
                f'<p class="tf-small">{escape(words.quality.no_measurements(str(file.relative_to(folder))))}</p>'
            )
    if not said:
        said.append(f'<p class="tf-small">{words.quality.NO_QUALITY}</p>')
        said.append(f'<pre class="tf-command">{words.quality.EVALUATE_COMMAND}</pre>')
    return f'<div class="tf-tab tf-quality">{_overview(read)}{"".join(said)}</div>'


# Answers, and one chart


def _overview(read: Sequence[Mapping[str, Any]]) -> str:
    """A sentence a model, and every format's score in one chart with what the post found of the real models."""
    groups: dict[str, dict[tuple[str, str], Row]] = {}
    for found in read:
        rows = groups.setdefault(found["model"], {})
        for row in (row for part in ("frontier", "ablation", "formats") for row in found.get(part) or ()):
            recipe = row["recipe"] and recipe_named(row["recipe"])
            if _score(row) and recipe in words.RECIPES:
                rows.setdefault((row["precision"], recipe), row)
    groups = {model: rows for model, rows in groups.items() if rows}
    answers = "".join(
        f"<li>{escape(words.quality.answer(words.model(m), _told(rows)))}</li>" for m, rows in groups.items()
    )
    if answers:
        answers = (
            f'<section class="tf-overview"><h2 class="tf-said">{words.quality.ANSWERS}</h2>'
            f'<ul class="tf-answers">{answers}</ul><p class="tf-small">{words.quality.TRANSFER}</p></section>'
        )
    bars = {
        words.quality.small(words.model(model)): [_bar(row) for row in _ordered(rows)] for model, rows in groups.items()
    }
    post = reference.read()
    bars |= {
        words.quality.real(words.model(model)): [
            Bar(
                label=words.NAMES[precision],
                precision=precision,
                value=score,
                shown=f"{score:.2f}",
                quoted=True,
            )
            for precision, score in scores.items()
            if precision != REFERENCE
        ]
        for model, scores in post["mean_lpips_drawbench_alex"].items()
    }
    return (
        f'{answers}<section class="tf-overview"><h2 class="tf-said">{words.quality.CHART}</h2>{lengths(bars)}'
        f'<p class="tf-small">{words.quality.CHART_NOTE} {escape(post["lpips_note"])}</p></section>'
    )


def _told(rows: Mapping[tuple[str, str], Row]) -> dict[tuple[str, str], tuple[float, int]]:
    """(Precision, recipe) -> mean LPIPS and bytes of the denoiser."""
    return {of: (_scored(row)["mean"], row["weight_bytes"]) for of, row in rows.items()}


def _ordered(rows: Mapping[tuple[str, str], Row]) -> list[Row]:
    order = list(words.RECIPES)
    return [rows[of] for of in sorted(rows, key=lambda of: (PRECISIONS.index(of[0]), order.index(of[1])))]


def _bar(row: Row) -> Bar:
    score = _scored(row)
    return Bar(
        label=f"{words.NAMES[row['precision']]}, {_short(row)}",
        precision=row["precision"],
        value=score["mean"],
        shown=words.score(score["mean"]),
        quoted=False,
        low=score["low"],
        high=score["high"],
    )


def sensitivity(folder: Path, model: str) -> str:
    """What was measured of a model's groups of layers; empty if nothing was, or it cannot be read."""
    try:
        found = json.loads((folder / f"{model}.json").read_text(encoding="utf-8"))["sensitivity"]
        return _heat_maps(found) if found else ""
    except FileNotFoundError:
        return ""
    except UNREADABLE as error:
        log.warning("Sensitivity of %s cannot be shown: %r", model, error)
        return ""


def _of_evaluation(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An evaluation's summary and scores in the shape of `<model>.json`."""
    each: dict[tuple[str, str], list[float]] = {}
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as scores:
        for line in csv.DictReader(scores):
            if line["lpips"]:  # empty where values are not numbers
                each.setdefault((line["precision"], line["recipe"]), []).append(float(line["lpips"]))
    results = summary["results"]
    return {
        **{key: summary[key] for key in ("model", "device", "versions", "settings", "ruler")},
        "date": summary["created"],
        "title": words.quality.evaluated(words.model(summary["model"]), summary["prompts"]["count"]),
        "prompts": {"report": [summary["prompts"]["source"]] * summary["prompts"]["count"]},
        "ruler": {end: score for end in ("floor", "ceiling") if (score := summary["ruler"][end]["lpips"])},
        # absent from evaluations made before there were prompts without a score
        "unscored": [(row["precision"], row["recipe"], lost) for row in results if (lost := row.get("unscored"))],
        "ablation": [
            {
                "recipe": row["recipe"],
                "label": words.of_recipe(row["recipe"]),
                "precision": row["precision"],
                "lpips": {"report": row["lpips"]},
                "temporal_lpips": row.get("temporal_lpips"),
                "weight_bytes": round(row["memory_gb"]["transformer"] * 1e9),
                "each": {"report": each.get((row["precision"], row["recipe"]), [])},
            }
            for row in results
        ],
        "worst": sorted(
            (
                {key: row[key] for key in ("precision", "recipe")}
                | {"prompt": pair["prompt"], "seed": summary["settings"]["seed"], "lpips": pair["lpips"]}
                for row in results
                for pair in row["worst"]
            ),
            key=lambda pair: -pair["lpips"],
        ),
    }


# One model


def _section(found: Mapping[str, Any], models: Sequence[str]) -> str:
    model = found["model"]
    name = found.get("title") or words.model(model)
    versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
    facts = [
        found["device"],
        found.get("execution"),
        words.when(found["date"]),
        words.bench_settings(found["settings"]),
        versions,
    ]
    frontier, ablation = ([row for row in found.get(part) or () if _score(row)] for part in ("frontier", "ablation"))
    remedies = found.get("remedies") or ()
    ruler = found.get("ruler") or {}
    offered = [row for row in frontier if row.get("offered")]
    told = {_label(row): row for row in (*ablation, *offered) if _each(row)}  # a recipe may be in both
    searched = {row["precision"] for row in frontier}
    points = [*frontier, *(row for row in ablation if row["precision"] not in searched)]
    parts = [
        _part(words.quality.FRONTIER, name, words.quality.FRONTIER_NOTE, _frontier(points, ruler, name))
        if frontier
        else "",
        _part(
            words.quality.ABLATION,
            name,
            words.quality.ABLATION_NOTE,
            _scores(ablation, f"{words.quality.ABLATION}, {name}"),
        )
        if ablation
        else "",
        _part(words.quality.REMEDIES, name, words.quality.REMEDIES_NOTE, _remedies(remedies, name)) if remedies else "",
        _part(words.quality.FORMATS, name, words.quality.FORMATS_NOTE, _formats(found["formats"], name))
        if found.get("formats")
        else "",
        _distributions(list(told.values()), ruler, name),
        _part(words.quality.WORST, name, words.quality.WORST_NOTE, _worst(model, found, models, name))
        if found.get("worst")
        else "",
        f'<p class="tf-small tf-elsewhere">{words.quality.SENSITIVITY_ELSEWHERE}</p>'
        if found.get("sensitivity")
        else "",
    ]
    small = catalog.MODELS[model].bundled if model in catalog.MODELS else False
    transfer = f'<p class="tf-small">{words.quality.TRANSFER}</p>' if small else ""
    lost = "".join(
        f'<p class="tf-small">{escape(words.quality.unscored(*each))}</p>' for each in found.get("unscored") or ()
    )
    return (
        f'<section class="tf-model"><h2>{escape(name)}</h2><p class="tf-facts-line">'
        f'<span class="tf-badge tf-measured">{words.MEASURED_BADGE}</span> {escape(" · ".join(filter(None, facts)))}'
        f"<br>{escape(words.quality.prompts(found['prompts']))}</p>{transfer}{lost}{''.join(parts)}</section>"
    )


def _part(heading: str, name: str, note: str, content: str) -> str:
    return (
        f'<article class="tf-bench"><h3>{heading}<span class="tf-unseen">, {escape(name)}</span></h3>'
        f'<p class="tf-small">{note}</p>{content}</article>'
    )


def _name(row: Row) -> str:
    """What a recipe is called where it can be chosen, or else by its file."""
    return words.RECIPES.get(recipe_named(row["recipe"]) if row["recipe"] else "", str(row["label"]))


def _short(row: Row) -> str:
    """The same where there is little room."""
    return words.quality.SHORT.get(recipe_named(row["recipe"]) if row["recipe"] else "", _name(row))


def _label(row: Row) -> str:
    """A recipe in words: its name, what was added to it, and its precision."""
    return f"{' + '.join([_name(row), *row.get('parts', ())])}, {words.NAMES[row['precision']]}"


def _half(row: Row) -> str:
    """Over which prompts it is judged: those that nothing was chosen on, once it was scored on those."""
    return "report" if row["lpips"].get("report") else "search"


def _score(row: Row) -> Score | None:
    """None while it has not been scored at all."""
    score: Score | None = row["lpips"].get(_half(row))
    return score


def _scored(row: Row) -> Score:
    """Of a row that has been scored."""
    score: Score = row["lpips"][_half(row)]
    return score


def _each(row: Row) -> Sequence[float]:
    """Its score prompt by prompt, where that was kept."""
    each: Sequence[float] = row.get("each", {}).get(_half(row), ())
    return each


# The frontier


def _frontier(rows: Sequence[Row], ruler: Mapping[str, Score], name: str) -> str:
    floor = (ruler["floor"]["mean"], words.quality.FLOOR) if "floor" in ruler else None
    plots = plot(words.quality.BY_BYTES, [_point(row, row["weight_bytes"] / 1e6) for row in rows], floor)
    if timed := [row for row in rows if row.get("gemm_time_of_bf16")]:
        plots += plot(words.quality.BY_SPEED, [_point(row, row["gemm_time_of_bf16"]) for row in timed], floor)
    keys = "".join(
        f'<span><i class="tf-key" data-precision="{p}"></i>{words.NAMES[p]}</span>'
        for p in dict.fromkeys(row["precision"] for row in rows)
    )
    if floor:
        keys += f"<span>{words.quality.FLOOR_KEY}</span>"
    return (
        f'<p class="tf-keys">{keys}<span>{words.quality.OFFERED_KEY}</span></p><div class="tf-two">{plots}</div>'
        f"<details><summary>{words.quality.every_point(len(rows))}</summary>{_scores(rows, name)}</details>"
    )


def _point(row: Row, x: float) -> Point:
    score = _scored(row)
    return Point(
        x=x,
        y=score["mean"],
        low=score["low"],
        high=score["high"],
        precision=row["precision"],
        said=f"{_label(row)}: LPIPS {words.quality.interval(score)}, {words.quality.over(score, _half(row))}",
        name=_short(row) if row.get("offered") else "",
    )


# Tables


def _scores(rows: Sequence[Row], of: str) -> str:
    """A recipe a row; a column that no row fills is left out."""
    columns = [
        ((words.quality.RECIPE_COLUMN, None), lambda row: _word(" + ".join([_name(row), *row.get("parts", ())]))),
        ((words.PRECISION_LABEL, None), lambda row: _word(words.NAMES[row["precision"]])),
        *_lpips(_score),
        ((words.quality.FLICKER, "", "flicker"), lambda row: _optional(row, "temporal_lpips", _mean)),
        ((words.quality.PROMPTS, None), lambda row: _word(words.quality.over(_scored(row), _half(row)))),
        ((words.quality.WEIGHTS_OF, "MB", "denoiser"), lambda row: _cell(words.megabytes(row["weight_bytes"]))),
        ((words.quality.OVER_SEED, ""), lambda row: _optional(row, "bytes_over_seed_percent", words.percent)),
        ((words.quality.GEMMS, "", "gemms"), lambda row: _optional(row, "gemm_time_of_bf16", "{:.2f}".format)),
    ]
    return _filled(columns, rows, f"{words.quality.SCORES}: {of}")


def _remedies(rows: Sequence[Row], name: str) -> str:
    columns = [
        ((words.quality.REMEDY, None), lambda row: _word(row["name"])),
        ((words.quality.WHAT, None), lambda row: _word(row["what"]) if row.get("what") else ""),
        *_lpips(lambda row: _score(row["alone"])),
        ((words.quality.MORE_BYTES, ""), lambda row: _optional(row, "added_bytes_percent", words.percent)),
        ((words.quality.MORE_WORK, ""), lambda row: _optional(row, "added_flops_percent", words.percent)),
        ((words.quality.GEMMS, "", "gemms"), lambda row: _optional(row, "added_gemm_time_percent", words.percent)),
        ((words.quality.BASIS, None), lambda row: _word(row["basis"]) if row.get("basis") else ""),
    ]
    return _filled(columns, rows, f"{words.quality.REMEDIES}: {name}")


def _formats(rows: Sequence[Row], name: str) -> str:
    columns = [
        ((words.PRECISION_LABEL, None), lambda row: _word(words.NAMES[row["precision"]])),
        ((words.quality.REMEDY, None), lambda row: _word(row["remedy"] or words.quality.PLAIN)),
        *_lpips(_score),
        ((words.quality.WEIGHTS_OF, "MB", "denoiser"), lambda row: _cell(words.megabytes(row["weight_bytes"]))),
    ]
    return _filled(columns, rows, f"{words.quality.FORMATS}: {name}")


def _lpips(score: Callable[[Row], Score | None]) -> list[Column]:
    return [
        (("LPIPS", "", "mean_lpips"), lambda row: _cell(words.score(s["mean"])) if (s := score(row)) else ""),
        (("95%", "", "interval"), lambda row: _cell(words.quality.ends(s)) if (s := score(row)) else ""),
    ]


def _filled(columns: Sequence[Column], rows: Sequence[Row], label: str) -> str:
    cells = [[cell(row) for row in rows] for _, cell in columns]
    kept = [index for index, column in enumerate(cells) if any(column)]
    body = "".join(
        f"<tr>{''.join(cells[column][index] or _cell('–') for column in kept)}</tr>" for index in range(len(rows))
    )
    return table([columns[index][0] for index in kept], body, label)


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _word(text: str) -> str:
    return f'<td class="tf-word">{escape(text)}</td>'


def _mean(score: Score) -> str:
    return words.score(score["mean"])


def _optional(row: Row, key: str, shown: Callable[[Any], str]) -> str:
    return "" if row.get(key) is None else _cell(shown(row[key]))


# Distributions and pairs


def _distributions(rows: Sequence[Row], ruler: Mapping[str, Score], name: str) -> str:
    """Every prompt's score as a dot, a line a recipe, on one scale; where the means are, and bf16's own noise."""
    if not rows:
        return ""
    top = 1.04 * max(max(_each(row)) for row in rows)

    def at(value: float) -> str:
        return f"{1000 * value / top:.0f}"

    marks = "".join(
        f'<path class="tf-mark" d="M{at(ruler[end]["mean"])} 0v10"/>'
        for end in ("floor", "ceiling")
        if end in ruler and ruler[end]["mean"] <= top
    )
    lines = "".join(
        f'<div class="tf-dots"><p>{escape(_label(row))}</p>'
        f'<svg data-precision="{row["precision"]}" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(words.quality.spread(_each(row)))}">{marks}'
        f'<path class="tf-each" d="{"".join(f"M{at(value)} 5h0" for value in _each(row))}"/>'
        f'<path class="tf-mean" d="M{at(_scored(row)["mean"])} 0v10"/></svg>'
        f"<p>{words.quality.spread(_each(row))}</p></div>"
        for row in rows
    )
    note = (
        f"{words.quality.DISTRIBUTIONS_NOTE} {words.quality.DISTRIBUTIONS_ENDS}"
        if ruler
        else words.quality.DISTRIBUTIONS_NOTE
    )
    return _part(words.quality.DISTRIBUTIONS, name, note, f'<div class="tf-spread">{lines}</div>')


def _worst(model: str, found: Mapping[str, Any], models: Sequence[str], name: str) -> str:
    rows = "".join(
        f'<tr><td>{words.score(row["lpips"])}</td><td class="tf-word">{words.NAMES[row["precision"]]}</td>'
        f'<td class="tf-word">{escape(words.of_recipe(row["recipe"]))}</td>'
        f'<td class="tf-word">{_opens(model, found["settings"], row, models)}</td></tr>'
        for row in found["worst"][:WORST]
    )
    heads = [
        ("LPIPS", ""),
        (words.PRECISION_LABEL, None),
        (words.quality.RECIPE_COLUMN, None),
        (words.compare.PROMPT_LABEL, None),
    ]
    return table(heads, rows, f"{words.quality.WORST}: {name}")


def _opens(model: str, settings: Row, row: Row, models: Sequence[str]) -> str:
    """A pair's prompt, as a link that restores it in Compare where the model and its recipe are offered."""
    said = escape(row["prompt"])
    by = columns.Column(row["precision"], row["recipe"])
    taken = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")
    try:
        asked = CompareRequest.create(
            row["prompt"],
            model=model,
            precisions=[by.written(by.rules)],
            recipe=by.rules or None,
            seed=row["seed"],
            **{name: settings[name] for name in taken if name in settings},
        )
    except RequestError:
        return said
    if model not in models:
        return said
    return f'<a href="{escape(link.query(asked))}" title="{words.quality.OPEN_PAIR}">{said}</a>'


# Sensitivity, for the Recipe tab


def _heat_maps(found: Mapping[str, Any]) -> str:
    """Role x depth: the damage of quantizing one group of layers alone, in numbers and in colour."""
    measures = [name for name in words.recipe.MEASURES if any(cell.get(name) is not None for cell in found["cells"])]
    maps = "".join(_heat(found, measure) for measure in measures)
    note = words.recipe.sensitivity(words.NAMES[found["precision"]], found["lpips_prompts"])
    return (
        f'<section><h2>{words.recipe.SENSITIVITY}</h2><p class="tf-small">{escape(note)}</p>'
        f'<div class="tf-heats">{maps}</div></section>'
    )


def _heat(found: Mapping[str, Any], measure: str) -> str:
    cells = {(cell["role"], cell["depth"]): cell for cell in found["cells"] if cell.get(measure) is not None}
    values = [cell[measure] for cell in cells.values() if cell[measure] > 0] or [1.0]
    names = found.get("role_names", {})
    rows = "".join(
        f'<tr><th scope="row">{escape(names.get(role, role))}</th>'
        + "".join(_warm(cells.get((role, depth)), measure, (min(values), max(values))) for depth in found["depths"])
        + "</tr>"
        for role in found["roles"]
    )
    heads = [(words.recipe.ROLE, None), *((escape(depth), "") for depth in found["depths"])]
    said, _ = words.recipe.MEASURES[measure]
    return f"<div><h3>{said}</h3>{table(heads, rows, said, 'tf-heat-map')}</div>"


def _warm(cell: Row | None, measure: str, ends: tuple[float, float]) -> str:
    """A cell as warm as its value lies between the ends, in logarithms: one layer may hurt as much as all others."""
    if cell is None:
        return "<td></td>"
    value, (low, high) = cell[measure], ends
    warmth = math.log(value / low) / math.log(high / low) if value > low else 0.0
    said = words.recipe.warm(cell["layers"], cell["bytes_saved"])
    return f'<td style="--warmth:{warmth:.3f}" data-why title="{said}">{words.recipe.damage(measure, value)}</td>'
