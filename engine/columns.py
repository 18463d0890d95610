"""Columns: what is compared with the reference, a number format and the recipe that says which layers get it.

Written `nvfp4` or `nvfp4@tuned`, in requests, results, files, links, the API and on the command line; `nvfp4` alone is
by the recipe of its request. In a recipe's place stands the name of a quantized checkpoint (engine/quantized.py), whose
layers are as they were stored. Everything that is written so is read and written here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine import quantized
from engine.catalog import ModelSpec
from engine.errors import RequestError, shown
from engine.formats import LABELS, PRECISIONS, REFERENCE

POST = "post"
"""The recipe of the post, as published; the first of every model."""
_BY = "@"
_OLD_NAMES = dict(zip(quantized.OLD_RECIPES, (POST, "post-corrected"), strict=True))
"""Of recipes, in what was saved, linked or typed earlier."""


@dataclass(frozen=True)
class Column:
    """A number format by a recipe."""

    format: str
    recipe: str
    """Or the name of a quantized checkpoint; empty for the reference, of which nothing is quantized."""

    @classmethod
    def of(cls, written: str, recipe: str) -> Column:
        """What a column of a validated request stands for; `recipe` is that of those that name none."""
        name, _, own = written.partition(_BY)
        return cls(name, "" if name == REFERENCE else own or recipe)

    @classmethod
    def parse(cls, text: object, spec: ModelSpec, recipe: str) -> Column:
        """A column as somebody wrote it, for a model; `recipe` is that of those that name none.

        Raises:
            RequestError: there is no such format, recipe or checkpoint, in one sentence that says what there is.
        """
        name, by, own = text.partition(_BY) if isinstance(text, str) else (text, "", "")
        if name not in PRECISIONS:
            raise RequestError(f"There is no precision {shown(name)}: choose from {', '.join(PRECISIONS)}.")
        if by and name == REFERENCE:
            raise RequestError(f"{REFERENCE} is the reference, which no recipe changes: leave out {shown(by + own)}.")
        if by and (stored := quantized.named(own)) is not None:
            return cls(name, _stored_as(name, stored, spec))
        return cls(name, "" if name == REFERENCE else recipe_of(spec, own) if by else recipe)

    def written(self, recipe: str) -> str:
        """As a request of this recipe writes it: its own recipe is left out."""
        return self.format if self.recipe in ("", recipe) else f"{self.format}{_BY}{self.recipe}"


def _stored_as(name: str, stored: quantized.Quantized, spec: ModelSpec) -> str:
    """The name of a checkpoint that is of this model and in this format.

    Raises:
        RequestError: it is not.
    """
    if spec.id not in stored.models:
        raise RequestError(
            f"{stored.name} is a quantized checkpoint of {' or '.join(stored.models)}, not of {spec.id}: ask for it "
            "with that model."
        )
    if name != stored.format:
        raise RequestError(f"{stored.name} is stored in {stored.format}: ask for {stored.format}{_BY}{stored.name}.")
    return stored.name


EXACT = Column(REFERENCE, "")
"""The reference."""


def ordered(columns: Iterable[Column], spec: ModelSpec) -> tuple[Column, ...]:
    """Each once, by the formats' order, then by that of the model's recipes; those that it does not offer come last."""
    stored = (checkpoint.name for checkpoint in quantized.of_model(spec.id))
    rank = {name: index for index, name in enumerate(("", *spec.recipes, *stored))}

    def place(column: Column) -> tuple[int, int]:
        return PRECISIONS.index(column.format), rank.get(column.recipe, len(rank))

    return tuple(sorted(dict.fromkeys(columns), key=place))


def label(written: str) -> str:
    """A column for people: "NVFP4", "NVFP4 tuned"."""
    name, _, recipe = written.partition(_BY)
    return f"{LABELS[name]} {recipe}".rstrip()


def format_of(written: str) -> str:
    """The format of a column."""
    return written.partition(_BY)[0]


def recipe_of(spec: ModelSpec, name: object) -> str:
    """The model's recipe of that name, today's or an older one.

    Raises:
        RequestError: it has none; the sentence lists those it has.
    """
    recipe = recipe_named(name) if isinstance(name, str) else name
    if recipe not in spec.recipes:
        raise RequestError(f"{spec.name} has no recipe {shown(name)}: choose {' or '.join(spec.recipes)}.")
    return recipe


def recipe_named(name: str) -> str:
    """A recipe by its name of today."""
    return _OLD_NAMES.get(name, name)
