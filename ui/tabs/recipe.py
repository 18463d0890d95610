"""The Recipe tab: what a recipe does with every Linear layer of a model, and why.

A plan needs names and shapes only, so every model of the catalog can be looked at, whether it is offered here or not.
Plans come from the worker as the JSON of `python -m engine inspect`, sensitivities from assets/quality/; this module
makes HTML of both and knows nothing of how either was found. ui/static/recipe.js filters the layers in the browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from engine import catalog
from engine.columns import Column, format_of
from engine.errors import TwinframeError
from engine.formats import DEFAULTS, PRECISIONS, REFERENCE
from engine.quantization.roles import role_name
from engine.serving.contracts import Worker
from ui import view as views
from ui import words
from ui.fields import Radio, unchanged
from ui.handlers import Form
from ui.html import cards
from ui.html.tables import Head, table
from ui.tabs import quality

Layer = Mapping[str, Any]
"""A layer of a plan: name, in, out, precision, bytes (bf16 and stored) and reason."""
BYTES: tuple[Head, ...] = ((words.NAMES[REFERENCE], "MB", "bf16 bytes"), (words.recipe.STORED, "MB", "stored"))
"""The heads of two columns."""
QUICK = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


def tab(worker: Worker, compare: Form, opened: gr.Tab, measured: Path) -> None:
    """The components of the tab, and what answers them.

    Args:
        compare: the form of the Compare tab: what is chosen there is shown here when the tab opens.
        measured: the folder of the sensitivities.
    """
    first = next(iter(catalog.MODELS))
    with gr.Column(elem_classes="tf-form"), gr.Row(elem_classes="tf-choose"):
        model = gr.Dropdown(
            [(spec.name, spec.id) for spec in catalog.MODELS.values()],
            value=first,
            label=words.MODEL_LABEL,
            filterable=False,
            elem_id="tf-plan-model",
        )
        precision = gr.Radio(
            [(words.NAMES[p], p) for p in PRECISIONS if p != REFERENCE],
            value=DEFAULTS[-1],
            label=words.PRECISION_LABEL,
            elem_classes="tf-chips",
            elem_id="tf-plan-precision",
        )
        recipe = Radio(
            _choices(worker, first)["choices"],
            value=_choices(worker, first)["value"],
            label=words.RECIPE_LABEL,
            elem_classes="tf-chips",
            elem_id="tf-plan-recipe",
        )
    summed = gr.HTML(apply_default_css=False, elem_id="tf-plan")
    gr.HTML(filters(), apply_default_css=False, elem_id="tf-filter")
    listed = gr.HTML(apply_default_css=False, elem_id="tf-layers", js_on_load=cards.script("recipe"))
    followed = gr.State(None)

    def draw(model_id: str, name: str, recipe_id: str) -> dict[str, Any]:
        recipes = worker.recipes(model_id)
        if recipe_id not in recipes:  # of the model before
            recipe_id = next(iter(recipes))
        try:
            plan = worker.plan(model_id, name, recipe_id)
        except TwinframeError as error:
            return {summed: cards.notice(str(error)), listed: ""}
        about, measures = recipes[recipe_id], quality.sensitivity(measured, model_id)
        return {summed: summary(plan, about, measures), listed: layers(plan["layers"])}

    def follow(values: dict[str, Any]) -> dict[str, Any]:
        """Show what Compare has chosen, unless that was followed before: a choice made here stays."""
        chosen = (values[compare.model], values[compare.recipe], tuple(values[compare.precisions] or ()))
        if chosen == values[followed]:
            return unchanged()
        model_id, recipe_id, names = chosen
        quantized = [name for name in names if format_of(name) != REFERENCE]
        column = Column.of(views.told(quantized or DEFAULTS[1:])[0], recipe_id)
        name, recipe_id = column.format, column.rules
        recipes = gr.Radio(**(_choices(worker, model_id) | {"value": recipe_id}))
        updates = {followed: chosen, model: model_id, precision: name, recipe: recipes}
        return updates | draw(model_id, name, recipe_id)

    def choose_model(model_id: str, name: str) -> dict[str, Any]:
        recipes = _choices(worker, model_id)
        return {recipe: gr.Radio(**recipes)} | draw(model_id, name, recipes["value"])

    opened.select(
        follow,
        {compare.model, compare.recipe, compare.precisions, followed},
        [followed, model, precision, recipe, summed, listed],
        **QUICK,
    )
    # Not input, which a dropdown sends twice.
    model.select(choose_model, [model, precision], [recipe, summed, listed], **QUICK)
    for choice in (precision, recipe):
        choice.input(draw, [model, precision, recipe], [summed, listed], **QUICK)


def _choices(worker: Worker, model_id: str) -> dict[str, Any]:
    names = list(worker.recipes(model_id))
    return {"choices": [(words.RECIPES.get(name, name), name) for name in names], "value": names[0]}


# What the recipe comes to


def summary(plan: Mapping[str, Any], about: str, sensitivity: str) -> str:
    """Totals, reasons, the layers by role and depth, and what is known of their sensitivity, as HTML."""
    name = catalog.model(plan["model"]).name
    command = f"python -m engine inspect --model {plan['model']} --precision {plan['precision']}"
    unmatched = ""
    if plan["unmatched"]:
        unmatched = f'<p class="tf-small">{escape(words.recipe.unmatched(plan["unmatched"]))}</p>'
    planned = plan["layers"]
    return (
        f'<div class="tf-tab tf-plan"><p class="tf-verdict">{escape(words.recipe.planned(plan, name))}</p>'
        f'<p class="tf-small">{escape(about)} {words.recipe.PLAN_NOTE}'
        f" <code>{command} --recipe {plan['recipe']}</code></p>{unmatched}"
        f'<div class="tf-two"><div><section><h2>{words.recipe.REASONS}</h2>{_reasons(planned)}</section>'
        f"<section><h2>{words.recipe.OUTSIDE}</h2>{_outside(planned)}</section></div>"
        f"<section><h2>{words.recipe.ROLES}</h2>{_keys(planned)}{_roles(planned)}</section></div>{sensitivity}"
        f"<h2>{words.recipe.LAYERS}</h2></div>"
    )


def _reasons(planned: Sequence[Layer]) -> str:
    """How many layers and bytes each reason decides, the most bytes first, and all of them together."""
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in planned:
        groups.setdefault((layer["precision"], layer["reason"]), []).append(layer)
    rows = "".join(
        f'<tr><th scope="row">{_stored_as(precision)}</th><td class="tf-word">{escape(reason)}</td>{_totals(some)}</tr>'
        for (precision, reason), some in sorted(groups.items(), key=lambda group: -_bytes(group[1], REFERENCE))
    )
    whole = f'<tr class="tf-whole"><th scope="row">{words.recipe.ALL_LAYERS}</th><td></td>{_totals(planned)}</tr>'
    heads: list[Head] = [
        (words.PRECISION_LABEL, None),
        (words.recipe.REASON, None, "rule"),
        (words.recipe.LAYERS, ""),
        *BYTES,
    ]
    return table(heads, rows + whole, words.recipe.REASONS)


def _totals(some: Sequence[Layer]) -> str:
    values = (f"{len(some):,}", *(words.megabytes(_bytes(some, kind)) for kind in (REFERENCE, "stored")))
    return "".join(f"<td>{value}</td>" for value in values)


def _bytes(some: Sequence[Layer], kind: str) -> int:
    return sum(layer["bytes"][kind] for layer in some)


def _stored_as(precision: str) -> str:
    return f'<i class="tf-key" data-precision="{precision}"></i>{words.NAMES[precision]}'


# By role and depth


@dataclass(frozen=True)
class Place:
    """Where a layer stands: `transformer_blocks.3.attn.to_q` is the role attn.to_q of block 3."""

    stack: str
    """The list of blocks; empty outside of any."""
    depth: int
    role: str

    @classmethod
    def of(cls, name: str) -> Place:
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if index is None:
            return cls("", 0, name)
        return cls(".".join(parts[:index]), int(parts[index]), ".".join(parts[index + 1 :]))


def _keys(planned: Sequence[Layer]) -> str:
    held = {layer["precision"] for layer in planned}
    keys = "".join(f"<span>{_stored_as(p)}</span>" for p in PRECISIONS if p in held)
    return f'<p class="tf-keys">{keys}</p>'


def _roles(planned: Sequence[Layer]) -> str:
    """A row a role, with a strip on which every block has the colour of what the layer is stored in."""
    stacks: dict[str, dict[str, dict[int, Layer]]] = {}
    for layer in planned:
        place = Place.of(layer["name"])
        if place.stack:
            stacks.setdefault(place.stack, {}).setdefault(place.role, {})[place.depth] = layer
    body = ""
    for stack, roles in stacks.items():
        blocks = 1 + max(max(depths) for depths in roles.values())
        name = escape(words.recipe.stack(stack, blocks))
        body += f'<tr class="tf-stack"><th colspan="5" scope="rowgroup">{name}</th></tr>'
        body += "".join(
            f"<tr>{_shown(role, f'{stack}.*.{role}')}<td>{_strip(role, depths, blocks)}</td>"
            f"{_size(list(depths.values()))}</tr>"
            for role, depths in roles.items()
        )
    heads: list[Head] = [
        (words.recipe.ROLE, None),
        (words.recipe.DEPTH, None),
        (words.recipe.SHAPE, "", "shape"),
        *BYTES,
    ]
    return table(heads, body, words.recipe.ROLES, "tf-placed")


def _outside(planned: Sequence[Layer]) -> str:
    """What belongs to no block: embedders, the last projection."""
    body = "".join(
        f'<tr>{_shown(layer["name"], layer["name"])}<td class="tf-word">{_stored_as(layer["precision"])}</td>'
        f"{_size([layer])}</tr>"
        for layer in planned
        if not Place.of(layer["name"]).stack
    )
    heads: list[Head] = [
        (words.recipe.LAYER, None),
        (words.PRECISION_LABEL, None),
        (words.recipe.SHAPE, "", "shape"),
        *BYTES,
    ]
    return table(heads, body, words.recipe.OUTSIDE, "tf-placed")


def _shown(name: str, wanted: str) -> str:
    """What a layer is for, as the map calls it, and its name: pressed, they filter the list of layers."""
    return (
        f'<th scope="row"><button type="button" class="tf-copy" data-filter="{escape(wanted)}"'
        f' title="{words.recipe.SHOW_ROLE}">{escape(role_name(wanted))} <small>{_breakable(name)}</small></button></th>'
    )


def _size(some: Sequence[Layer]) -> str:
    """Shape and bytes of layers of one role."""
    shapes = sorted({f"{layer['in']:,} × {layer['out']:,}" for layer in some})
    sizes = (words.megabytes(_bytes(some, kind)) for kind in (REFERENCE, "stored"))
    return f"<td>{' / '.join(shapes)}</td>{''.join(f'<td>{size}</td>' for size in sizes)}"


def _strip(role: str, depths: Mapping[int, Layer], blocks: int) -> str:
    """One rectangle for neighbouring blocks that hold the same precision."""
    runs = []
    held = [depths[depth]["precision"] if depth in depths else None for depth in range(blocks)]
    begin = 0
    for precision, same in groupby(held):
        count = len(list(same))
        if precision is not None:
            said = words.recipe.run(role, begin, begin + count - 1, precision)
            runs.append(
                f'<rect data-precision="{precision}" x="{begin}" width="{count}" height="1">'
                f"<title>{escape(said)}</title></rect>"
            )
        begin += count
    said = escape("; ".join(words.recipe.held(p, held.count(p)) for p in dict.fromkeys(held) if p is not None))
    return (
        f'<svg class="tf-strip" viewBox="0 0 {blocks} 1" preserveAspectRatio="none" role="img" aria-label="{said}">'
        f"{''.join(runs)}</svg>"
    )


# Every layer


def filters() -> str:
    """The filter of the layers; it stays when another plan is shown."""
    kinds = (("all", words.recipe.EVERY_LAYER), ("quantized", words.recipe.QUANTIZED), ("kept", words.recipe.KEPT))
    options = "".join(f'<option value="{kind}">{text}</option>' for kind, text in kinds)
    return (
        f'<div class="tf-filter"><input type="search" aria-label="{words.recipe.FILTER}"'
        f' placeholder="{words.recipe.FILTER_HINT}" spellcheck="false" autocomplete="off">'
        f'<select aria-label="{words.recipe.SHOWN}">{options}</select>'
        f'<p class="tf-small" role="status" data-said="{words.recipe.FILTERED}"'
        f' data-none="{words.recipe.FILTERED_NONE}"></p></div>'
    )


def layers(planned: Sequence[Layer]) -> str:
    """Every layer in the order of the model, in as few elements as will do, because there may be 1,370 of them.

    What is filtered reads the text of a row and its bytes.
    """
    rows = "".join(
        f'<tr data-kind="{"kept" if layer["precision"] == REFERENCE else "quantized"}"'
        f' data-bf16="{layer["bytes"][REFERENCE]}" data-stored="{layer["bytes"]["stored"]}">'
        f'<th scope="row">{escape(layer["name"])}</th><td>{layer["in"]:,}</td><td>{layer["out"]:,}</td>'
        f"<td>{words.megabytes(layer['bytes'][REFERENCE])}</td><td>{words.megabytes(layer['bytes']['stored'])}</td>"
        f'<td data-precision="{layer["precision"]}">{words.NAMES[layer["precision"]]}</td>'
        f"<td>{escape(_why(layer))}</td></tr>"
        for layer in planned
    )
    heads: list[Head] = [
        (words.recipe.LAYER, None),
        (words.recipe.IN, ""),
        (words.recipe.OUT, ""),
        *BYTES,
        (words.PRECISION_LABEL, None),
        (words.recipe.REASON, None, "rule"),
    ]
    return f'<div class="tf-tab tf-list">{table(heads, rows, words.recipe.LAYERS)}</div>'


def _why(layer: Layer) -> str:
    return " · ".join([*layer.get("parts", ()), layer["reason"]])


def _breakable(name: str) -> str:
    """A dotted name that a narrow column may break after its dots."""
    return escape(name).replace(".", ".<wbr>")
