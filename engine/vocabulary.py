"""What a miniature has learnt to draw, as words, and which words of a prompt it never learnt.

Reads assets/models/vocabulary.json, which assets/training/vocabulary.py writes from the training data. A prompt is read
as the captions were built: one thing, perhaps a motion, and a colour behind it. Imports no torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.catalog import ASSETS

FILE = ASSETS / "models" / "vocabulary.json"
_WORD = re.compile(r"[^\s,.;:!?“”\"()]+")
Words = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A prompt as a model's vocabulary has it."""

    things: tuple[str, ...]
    """Names of what it knows, in the order of the prompt."""
    unknown: tuple[str, ...]
    """Words it never learnt, in the order of the prompt."""

    @property
    def drawn(self) -> bool:
        """Whether what comes out can be a picture of the prompt: one thing, and no word that says nothing to it."""
        return len(self.things) == 1 and not self.unknown


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What one model has learnt."""

    things: tuple[str, ...]
    """Names as captions have them, in lower case but for a few."""
    also: frozenset[str]
    """Other words that some captions had in place of a name."""
    colours: Mapping[str, tuple[str, ...]]
    """Background colour -> its synonyms."""
    motions: Mapping[str, tuple[str, ...]]
    """Motion -> the words for it, the first being the usual one; empty for pictures."""
    around: frozenset[str]
    """Words of the captions around all these."""

    def read(self, prompt: str) -> Reading:
        """Match a prompt against what was learnt, the longest names first."""
        words = tuple(_WORD.findall(prompt.lower().replace("’", "'")))
        things, either, unknown, at = [], [], [], 0
        while at < len(words):
            kind, length = self._longest(words[at:])
            said = " ".join(words[at : at + length])
            if kind == "thing":
                things.append(said)
            elif kind == "colour" and said in self._names:
                either.append(said)
            elif not kind:
                unknown.append(said)
            at += length
        things = things or either[:1]  # "an orange on a teal background"
        return Reading(things=tuple(dict.fromkeys(things)), unknown=tuple(dict.fromkeys(unknown)))

    def _longest(self, words: Words) -> tuple[str, int]:
        """What the words begin with, and how many of them that takes; "" and 1 for a word that was never learnt."""
        for length in range(min(len(words), self._most), 0, -1):
            if kind := self._phrases.get(words[:length]):
                return kind, length
        return "", 1

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return self.also.union(name.lower() for name in self.things)

    @functools.cached_property
    def _phrases(self) -> Mapping[Words, str]:
        """Every phrase, split into words, and what it is; a colour that is a thing as well counts as a colour."""
        colours = [said for colour, also in self.colours.items() for said in (colour, *also)]
        verbs = [said for some in self.motions.values() for said in some]
        kinds = {"thing": [*self.also, *self.things], "motion": verbs, "around": self.around, "colour": colours}
        return {tuple(_WORD.findall(phrase.lower())): kind for kind, some in kinds.items() for phrase in some}

    @functools.cached_property
    def _most(self) -> int:
        return max(map(len, self._phrases))

    def to_json(self) -> dict[str, Any]:
        """What a page needs to complete and to judge a prompt while it is typed."""
        return {
            "things": self.things,
            "also": sorted(self.also),
            "colours": {colour: list(also) for colour, also in self.colours.items()},
            "motions": {motion: list(said) for motion, said in self.motions.items()},
            "around": sorted(self.around),
        }


@functools.cache
def of(model: str) -> Vocabulary | None:
    """A model's vocabulary; None for one that was trained on more than can be listed."""
    found = _file()
    learnt = found["learnt"].get(found["models"].get(model))
    if learnt is None:
        return None
    return Vocabulary(
        things=tuple(learnt["things"]),
        also=frozenset(learnt["also"]),
        colours={colour: tuple(also) for colour, also in found["colours"].items()},
        motions={motion: tuple(said) for motion, said in learnt["motions"].items()},
        around=frozenset(found["around"]),
    )


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
