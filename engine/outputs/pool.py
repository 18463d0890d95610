"""What people saw: answers of the blind test's visitors, pooled in a file, and which scores they support a phrase for.

Off unless TWINFRAME_BLIND_POOL names the file. It gets one JSON line an answer: model, precision, recipe, LPIPS,
question, whether the answer was right. Who gave it, and when, is not written. Knows neither pages nor words.

A phrase about seeing needs answers to ABX: whoever cannot say which of two pictures is bf16 may see well that they
differ. A model's answers are put in order of LPIPS and taken in groups. Right answers lie between 50% (nobody sees a
difference) and 100% (everybody does); the middle, 75%, is the usual threshold of such a test (Macmillan and Creelman,
Detection Theory, 2005). A group counts on either side of it only where its exact binomial interval of 95% (Clopper and
Pearson 1934) leaves the threshold out, so that a few answers support nothing.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from engine.columns import recipe_named
from engine.errors import OutputError
from engine.files import check_target
from engine.outputs.blind import ABX, Given, p_value

log = logging.getLogger(__name__)

VARIABLE = "TWINFRAME_BLIND_POOL"
MOST = 20_000
"""Answers that are kept, about 2.5 MB; later ones are not."""
GROUP = 80
"""Answers in one group of the curve, at least."""
THRESHOLD = 0.75
"""The share of right answers from which a difference counts as seen."""
TAIL = 0.025
"""Of the interval, on either side."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of the file."""

    model: str
    precision: str
    recipe: str
    lpips: float
    mode: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the answers about one model support: nothing where there are none."""

    alike: float | None = None
    """Up to this LPIPS a difference is seen less often than the threshold."""
    apart: float | None = None
    """From this LPIPS it is seen more often."""


class Pool:
    """The answers in a file.

    Args:
        file: made with the first answer if it is not there. A line that is no answer is left out, with a warning.

    Raises:
        OutputError: the file cannot be read, or could not be written.
    """

    def __init__(self, file: Path):
        check_target(file)
        self._file, self._writing = file, threading.Lock()
        try:
            self._answers = list(_read(file)) if file.exists() else []
        except OSError as error:
            raise OutputError(f"Cannot read {file}: {error.strerror or error}.") from error
        self._known: dict[str, Seen] = {}
        """By model, until there is another answer."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Pool | None:
        """The pool in the file that TWINFRAME_BLIND_POOL names; None if it names none.

        Raises:
            OutputError: the file cannot be read, or could not be written.
        """
        named = environment.get(VARIABLE, "").strip()
        return cls(Path(named)) if named else None

    def add(self, given: Given) -> None:
        """Keep an answer, unless there are enough. A disk that is full costs this answer, not the visitor's test."""
        answer = Answer(**{name: getattr(given, name) for name in Answer.__dataclass_fields__})
        with self._writing:
            if len(self._answers) >= MOST:
                return
            try:
                with self._file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(asdict(answer)) + "\n")
            except OSError as error:
                log.error("An answer of the blind test could not be kept in %s: %s", self._file, error)
                return
            self._answers.append(answer)
            self._known.pop(answer.model, None)

    def seen(self, model: str) -> Seen:
        """What the answers so far support saying of a model's scores."""
        with self._writing:
            if model not in self._known:
                of_model = [a for a in self._answers if (a.model, a.mode) == (model, ABX)]
                self._known[model] = limits((a.lpips, a.right) for a in of_model)
            return self._known[model]


def limits(answers: Iterable[tuple[float, bool]]) -> Seen:
    """Where people begin to see a difference, and from where on they do, from pairs of LPIPS and whether right."""
    groups = _groups(sorted(answers))
    below = list(takewhile(lambda group: p_value(_wrong(group), len(group), 1 - THRESHOLD) < TAIL, groups))
    above = list(takewhile(lambda group: p_value(_right(group), len(group), THRESHOLD) < TAIL, reversed(groups)))
    return Seen(alike=below[-1][-1][0] if below else None, apart=above[-1][0][0] if above else None)


def _groups(answers: Sequence[tuple[float, bool]]) -> list[list[tuple[float, bool]]]:
    """By ascending LPIPS, equal scores together; what is left over at the end joins the last group."""
    groups: list[list[tuple[float, bool]]] = []
    for answer in answers:
        if not groups or (len(groups[-1]) >= GROUP and groups[-1][-1][0] < answer[0]):
            groups.append([])
        groups[-1].append(answer)
    if len(groups) > 1 and len(groups[-1]) < GROUP:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def _right(group: Sequence[tuple[float, bool]]) -> int:
    return sum(right for _, right in group)


def _wrong(group: Sequence[tuple[float, bool]]) -> int:
    return len(group) - _right(group)


def _read(file: Path) -> Iterable[Answer]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            answer = Answer(**json.loads(line))
            if not math.isfinite(answer.lpips) or not isinstance(answer.right, bool):
                raise ValueError("LPIPS is no number, or right is neither true nor false")
        except (ValueError, TypeError) as error:
            log.warning("%s, line %d is no answer of the blind test and is left out: %s", file, number, error)
            continue
        yield replace(answer, recipe=recipe_named(answer.recipe))
