"""Scores of what was made that know the prompt. They stand beside LPIPS, which knows the reference alone.

A score is a row of `MADE_BY`, and of `engine.results.SCORES` with its name in words: which prompts it is for, and what
a picture gets. It is not shown where no prompt asks for it, nor where what it needs is not installed. Reading needs
`python -m pip install rapidocr onnxruntime`: both are optional, and the networks come with the first.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from torch import Tensor

log = logging.getLogger(__name__)


class Score(Protocol):
    """A score of a picture by its prompt, from 0 to 1, where 1 is best."""

    def asks(self, prompt: str) -> bool:
        """Whether a picture of this prompt has such a score."""

    def of(self, prompt: str, picture: np.ndarray) -> float:
        """The score of a picture, uint8 (H, W, 3) in RGB, of such a prompt."""

    def can(self) -> bool:
        """Whether what it needs is installed."""


_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|(?<!\w)[\'‘]([^\'’]+(?:[\'’]\w[^\'’]*)*)[\'’](?!\w)')
"""Words in quotation marks. A single one also is an apostrophe: it opens before a word, and closes behind one."""
_VERB = r"\b(?:says?|saying|reads?|reading|spells?|written|writes?|titled|labell?ed)\b"
_WRITTEN_ON = r"\b(?:sign|text|words?|letters?|caption|title|label|poster|banner|shirt|book|neon|graffiti|logo)\b"
_SAID = re.compile(_VERB + r"[\s:,]*([^.,;:!?\"“]+)", re.IGNORECASE)


def asked_words(prompt: str) -> str:
    """What a prompt asks to be written: all that stands in quotation marks, or else what follows "says", "reads" and
    the like up to the next mark. Empty where nothing is to be written: quotation marks alone ("rock 'n' roll") or a
    verb alone ("a man who says hello") are no writing."""
    on, verb = re.search(_WRITTEN_ON, prompt, re.IGNORECASE), re.search(_VERB, prompt, re.IGNORECASE)
    quoted = [next(filter(None, groups)) for groups in _QUOTED.findall(prompt)]
    if quoted:
        return " ".join(quoted) if on or verb else ""
    said = _SAID.search(prompt)
    return said[1].strip() if said and on else ""


def share_read(asked: str, read: str) -> float:
    """The share of the asked characters that were read: 1 - e / n, with n of them and e the fewest insertions,
    deletions and replacements that turn them into any part of what was read (Sellers 1980); at least 0.

    Case, spaces and punctuation do not count. Further writing beside the asked words does not either.
    """
    wanted, found = (re.sub(r"[\W_]+", "", text.casefold()) for text in (asked, read))
    if not wanted:
        return 1.0
    errors = [0] * (len(found) + 1)
    for index, letter in enumerate(wanted, 1):
        above, errors[0] = errors[0], index
        for place, other in enumerate(found, 1):
            above, errors[place] = (
                errors[place],
                min(above + (letter != other), errors[place] + 1, errors[place - 1] + 1),
            )
    return max(0.0, 1 - min(errors) / len(wanted))


class WordsRead:
    """The share of the characters a prompt asks for that optical character recognition reads back (PP-OCR through
    RapidOCR, whose own networks are used as they come)."""

    def asks(self, prompt: str) -> bool:
        """Whether it asks for writing."""
        return bool(asked_words(prompt))

    def of(self, prompt: str, picture: np.ndarray) -> float:
        """`share_read` of what stands in the picture, line below line."""
        found: Any = _reader()(np.ascontiguousarray(picture[:, :, ::-1]))  # it takes BGR
        lines = sorted(zip(found.boxes, found.txts, strict=True), key=lambda line: line[0][:, 1].min()) if found else ()
        return share_read(asked_words(prompt), "".join(text for _, text in lines))

    def can(self) -> bool:
        """Whether rapidocr and onnxruntime are here."""
        return all(find_spec(name) is not None for name in ("rapidocr", "onnxruntime"))


@cache
def _reader() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "critical"})


MADE_BY: Mapping[str, Score] = {"words_read": WordsRead()}
"""By the names of `engine.results.SCORES`."""


def scored(prompt: str, pixels: Tensor, scores: Mapping[str, Score] = MADE_BY) -> dict[str, tuple[float, ...]]:
    """Every score that the prompt asks for and that can be had, one value a picture.

    Args:
        pixels: (N, 3, H, W), float in [0, 1].

    Returns:
        Name -> (N,). A score that fails is left out, and the log says why: no picture is lost for want of it.
    """
    made: dict[str, tuple[float, ...]] = {}
    for name, score in scores.items():
        if score.asks(prompt) and score.can():
            try:
                made[name] = tuple(score.of(prompt, picture) for picture in _levels(pixels))
            except (RuntimeError, ValueError, OSError, ImportError) as error:
                log.warning("%s could not be computed: %r", name, error)
    return made


def _levels(pixels: Tensor) -> Sequence[np.ndarray]:
    levels = (pixels.float().nan_to_num(0).clamp(0, 1) * 255).round().byte()
    return [np.asarray(picture.permute(1, 2, 0).cpu()) for picture in levels]
