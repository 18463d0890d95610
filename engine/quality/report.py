"""An evaluation as one HTML page that needs nothing else: figures, rulers, and the pairs that differ most and least.

Fills report.html with what engine/quality/evaluate.py summarised, and with small copies of the pictures that it names;
knows nothing of models. Jinja escapes whatever is not ours (prompts, names). There is no script, and nothing is loaded
from anywhere. Figures quoted from the post stand in a table of their own, with a badge.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from engine import reference
from engine.columns import POST, Column, recipe_named
from engine.formats import LABELS, REFERENCE
from engine.results import NO_SCORE, SCORES

SIDE = 320
"""Longer side of the embedded copies, in pixels."""
QUALITY = 82
"""WebP's; the copies are for looking, the scores come from tensors."""


def templates(*folders: Path) -> Environment:
    """Jinja over the templates of these folders and this one's, whose style every report includes."""
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def page(summary: Mapping[str, Any], folder: Path) -> str:
    """The report.

    Args:
        summary: what `evaluate.run` gives back.
        folder: what its file names are relative to.
    """
    results, ruler, prompts = summary["results"], summary["ruler"], summary["prompts"]
    scores = [row["lpips"] for row in (ruler["ceiling"], *results) if row["lpips"]]
    recipes = {recipe_named(row["recipe"]) for row in results}
    template = templates().get_template("report.html")
    return template.render(
        summary,
        REFERENCE=REFERENCE,
        POST=POST,
        labels=LABELS,
        number=lambda value, digits: f"{value:.{digits}f}",
        zip=zip,
        embedded=lambda file: _embedded(folder / file),
        title=f"{summary['name']}: {', '.join(dict.fromkeys(LABELS[row['precision']] for row in results))}",
        kept=_kept(prompts),
        note=_note(summary["interval"], ruler["note"]),
        by=_by,
        names=[f"{LABELS[row['precision']]} {_by(row)}" for row in results],
        clips=any(row["temporal_lpips"] is not None for row in (ruler["floor"], *results)),
        top=max([0, *(max(score["mean"], score["high"] or 0) for score in scores)]),
        damage=_damage(summary),
        prompted=_prompted(results),
        quoted=reference.read()
        if {"full", POST} <= recipes
        else None,  # an evaluation of both has the post's beside it
        facts=_facts(summary),
    )


def _by(row: Mapping[str, Any]) -> str:
    """A result's recipe and options in words."""
    return Column(row["precision"], row["recipe"]).by


def _prompted(results: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Score that knows the prompt, in words -> results that have one, each with it."""
    every = {said: [(row, row["scores"][name]) for row in results if name in row.get("scores", {})]
             for name, said in SCORES.items()}  # fmt: skip
    return {said: rows for said, rows in every.items() if rows}


def _kept(prompts: Mapping[str, Any]) -> str:
    """Over which prompts."""
    kept = f"{prompts['count']} prompt{'s' * (prompts['count'] != 1)} of {prompts['source']}"
    if left := len(prompts["refused"]):
        kept += f", {left} that the model does not take left out"
    if prompts["repeated"]:
        kept += f", {prompts['repeated']} repeated ones left out"
    if prompts["same"]:
        which = ", ".join(f"{prompt} as {other}" for prompt, other in prompts["same"].items())
        kept += f"; {prompts['given']} were given, but the model reads the same tokens of some, counted once: {which}"
    return kept


def _note(interval: Mapping[str, Any], ruler: str) -> str:
    return (
        "LPIPS (AlexNet) and PSNR are against bf16 from the same noise. In small print the "
        f"{interval['confidence']:.0%} interval of a mean: {interval['method']}, {interval['resamples']:,} resamples. "
        f"{ruler}"
    )


def _damage(summary: Mapping[str, Any]) -> list[str]:
    """What has no score, and whose values are not numbers."""
    ends = [(f"bf16, {name}", summary["ruler"][name]) for name in ("floor", "ceiling")]
    rows = [(f"{LABELS[row['precision']]} {_by(row)}", row) for row in summary["results"]]
    said = [
        f"{name}: {NO_SCORE}. This holds for {scores['unscored']} of {summary['prompts']['count']} prompts, which no "
        "mean or interval counts."
        for name, scores in (*rows, *ends)
        if scores["unscored"]
    ]
    return said + [
        f"{name}: {row['not_numbers']} outputs have values that are not numbers, shown as 0; do not trust them."
        for name, row in ((LABELS[REFERENCE], summary["reference"]), *rows)
        if row["not_numbers"]
    ]


def _embedded(file: Path) -> str:
    """A small copy of a picture, or of a clip's middle frame, as a data URI."""
    picture = _still(file)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, format="WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _still(file: Path) -> Image.Image:
    if file.suffix != ".mp4":
        with Image.open(file) as picture:
            return picture.convert("RGB")
    import av  # here, so that whoever makes no clips can do without

    with av.open(str(file)) as clip:
        frames = [frame.to_image() for frame in clip.decode(video=0)]
    return frames[len(frames) // 2]


def _facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    settings = {label.replace("_", " "): value for label, value in summary["settings"].items()}
    weights = f"{summary['weights']['from']} ({summary['weights']['fingerprint']})"
    about = {"device": summary["device"], "made": summary["created"], "weights": weights}
    return about | settings | summary["versions"]
