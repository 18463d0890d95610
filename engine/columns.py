"""Columns: what is compared with the reference, a number format and the recipe that says which layers get it.

Written `nvfp4` or `nvfp4@tuned`, in requests, results, files, links, the API and on the command line; `nvfp4` alone is
by the recipe of its request. In a recipe's place stands the name of a quantized checkpoint (engine/quantized.py), whose
layers are as they were stored. Of a model with LoRAs, `nvfp4+no-lora` is the same without them, `bf16+no-lora` too, so
that one comparison shows what they do and what quantization does to them. `fp8+fp8-attention` is FP8 whose attention is
FP8 too, which is lossy (engine/quantization/attention.py); `bf16+fp8-attention` shows what that alone costs. Everything
that is written so is read and written here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from engine import quantized
from engine.catalog import ModelSpec
from engine.errors import RequestError, shown
from engine.formats import LABELS, PRECISIONS, REFERENCE

POST = "post"
"""The recipe of the post, as published; the first of every model."""
_BY = "@"
NO_LORA, FP8_ATTENTION = "+no-lora", "+fp8-attention"
OPTIONS: Mapping[str, str] = MappingProxyType({NO_LORA: "without LoRA", FP8_ATTENTION: "with FP8 attention"})
"""What may end a column, in this order, in words: without the model's LoRAs; attention from FP8 values."""
_OLD_NAMES = dict(zip(quantized.OLD_RECIPES, (POST, "post-corrected"), strict=True))
"""Of recipes, in what was saved, linked or typed earlier."""


@dataclass(frozen=True)
class Column:
    """A number format by a recipe."""

    format: str
    recipe: str
    """Or the name of a quantized checkpoint; empty for the reference, of which nothing is quantized. It ends in the
    column's `OPTIONS`."""

    @classmethod
    def of(cls, written: str, recipe: str) -> Column:
        """What a column of a validated request stands for; `recipe` is that of those that name none."""
        name, own, options = _parts(written)
        return cls(name, ("" if name == REFERENCE else own or recipe) + options)

    @classmethod
    def parse(cls, text: object, spec: ModelSpec, recipe: str) -> Column:
        """A column as somebody wrote it, for a model; `recipe` is that of those that name none.

        Raises:
            RequestError: there is no such format, recipe or checkpoint, in one sentence that says what there is.
        """
        name, own, options = _parts(text) if isinstance(text, str) else (text, "", "")
        by = isinstance(text, str) and _BY in text
        if name not in PRECISIONS:
            raise RequestError(f"There is no precision {shown(name)}: choose from {', '.join(PRECISIONS)}.")
        if NO_LORA in options and not spec.loras:
            raise RequestError(f"{spec.name} has no LoRA to leave out: leave out {NO_LORA}, or name one with --lora.")
        if by and name == REFERENCE:
            raise RequestError(f"{REFERENCE} is the reference, which no recipe changes: leave out {shown(_BY + own)}.")
        if by and (stored := quantized.named(own)) is not None:
            if NO_LORA in options:
                raise RequestError(f"{own} is stored as it is: leave out {NO_LORA}.")
            return cls(name, _stored_as(name, stored, spec) + options)
        return cls(name, ("" if name == REFERENCE else recipe_of(spec, own) if by else recipe) + options)

    @property
    def rules(self) -> str:
        """Its recipe alone, without options."""
        return _split(self.recipe)[0]

    @property
    def options(self) -> str:
        """Those of `OPTIONS` that it has, as they are written."""
        return _split(self.recipe)[1]

    @property
    def adapted(self) -> bool:
        """The model's LoRAs are in it, where it has some."""
        return NO_LORA not in self.options

    @property
    def fp8_attention(self) -> bool:
        """Its attention is computed from FP8 queries, keys and values."""
        return FP8_ATTENTION in self.options

    @property
    def by(self) -> str:
        """Its recipe and options in words: "tuned", "tuned with FP8 attention"."""
        return " ".join(filter(None, (self.rules, in_words(self.options))))

    def weights(self, spec: ModelSpec) -> ModelSpec:
        """The model with the weights that it is made of."""
        return spec if self.adapted else replace(spec, loras=())

    def written(self, recipe: str) -> str:
        """As a request of this recipe writes it: its own recipe is left out."""
        named = self.format if self.rules in ("", recipe) else f"{self.format}{_BY}{self.rules}"
        return named + self.options


def _parts(written: str) -> tuple[str, str, str]:
    """Format, recipe and options of what is written, the last two empty where they are not there."""
    named, options = _split(written)
    name, _, recipe = named.partition(_BY)
    return name, recipe, options


def _split(written: str) -> tuple[str, str]:
    """What is written before options, and the options, each once and in their order."""
    found: set[str] = set()
    while ends := [option for option in OPTIONS if written.endswith(option)]:
        written = written.removesuffix(ends[0])
        found.update(ends)
    return written, "".join(option for option in OPTIONS if option in found)


def in_words(options: str) -> str:
    """A column's options for people; empty for none."""
    return " ".join(words for option, words in OPTIONS.items() if option in options)


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

    def place(column: Column) -> tuple[int, int, bool, bool]:
        by = rank.get(column.rules, len(rank))
        return PRECISIONS.index(column.format), by, not column.adapted, column.fp8_attention

    return tuple(sorted(dict.fromkeys(columns), key=place))


def label(written: str) -> str:
    """A column for people: "NVFP4", "NVFP4 tuned", "NVFP4 tuned with FP8 attention"."""
    column = Column.of(written, "")
    return f"{LABELS[column.format]} {column.by}".rstrip()


def format_of(written: str) -> str:
    """The format of a column."""
    return _parts(written)[0]


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
