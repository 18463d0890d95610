"""The blind test: pairs shown without a trace of which side is which, and what a row of answers is worth.

A pair's files are written anew for every trial, under random names, without their recipe, equally long, so that
names, sizes, dates and what is inside beside the pixels tell nothing. The answer stays in a `Trial` on the server.
Knows neither pages nor models: pairs come from finished comparisons.
"""

from __future__ import annotations

import io
import math
import os
import random
import secrets
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from PIL import Image

from engine.columns import EXACT, POST, Column
from engine.results import Comparison

WHICH, ABX, SAME = "which", "abx", "same"
"""Two unnamed sides, of which bf16 is to be found; two, and a third that is one of them again; or two that are one and
the same half of the time."""
CONFIDENCE = 0.95
"""Of the interval for the chance of a right answer."""
SLACK = 4096
"""Files are filled up to a multiple of this many bytes beyond the longest."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One picture or clip in bf16 and as another column, from the same noise."""

    model: str
    precision: str
    recipe: str
    """Of the column."""
    execution: str
    prompt: str
    seed: int
    lpips: float
    fresh: bool
    """Made for this test a moment ago, so that nobody can have seen it; otherwise recorded."""
    frames: int
    size: tuple[int, int]
    """Width and height, in pixels."""
    reference: Path
    other: Path

    @property
    def column(self) -> str:
        """As a request by the post's recipe writes it."""
        return Column(self.precision, self.recipe).written(POST)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One question."""

    pair: Pair
    mode: str
    answer: str
    """Where bf16 is, or what X is: A or B; A too where both sides are the same, and B where they differ."""
    files: dict[str, Path]
    """What is shown as A, B and, in ABX, X."""
    bf16: str
    """Under which letters bf16 is shown: one, or both or none where the sides are the same."""
    asked_at: float = field(default_factory=monotonic)


@dataclass(frozen=True, kw_only=True)
class Given:
    """An answer, as it is exported."""

    model: str
    precision: str
    recipe: str
    execution: str
    mode: str
    source: str
    """Whether the pair was recorded or fresh."""
    prompt: str
    seed: int
    lpips: float
    bf16: str
    asked: str
    """The letter that was right."""
    given: str
    right: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Answers to one kind of question."""

    model: str
    precision: str
    recipe: str
    mode: str
    right: int
    asked: int

    @property
    def p_value(self) -> float:
        """By the exact binomial test against a tossed coin, one-sided."""
        return p_value(self.right, self.asked)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the share of right answers."""
        return wilson(self.right, self.asked)


class Sitting:
    """One visitor's trials, one after another.

    Args:
        pairs: those to ask about; more can be added.
        place: gives an empty folder for a trial's files, in which they can be fetched.
    """

    def __init__(self, pairs: Sequence[Pair], place: Callable[[], Path]):
        self._pairs, self._place = list(pairs), place
        self._left: dict[tuple[str, str], list[Pair]] = {}
        self._dice = secrets.SystemRandom()
        self.trial: Trial | None = None
        """The open question; None before the first and once it is answered."""
        self.given: list[Given] = []
        self._answered: set[Pair] = set()
        self.skipped = 0
        """Questions left open, which count for nothing."""

    def ask(self, model: str, column: str, mode: str, pair: Pair | None = None) -> Trial | None:
        """The next question, about `pair` or any of the model and column; each comes once before any comes again.

        Returns:
            None if there is no pair of them.
        """
        self.skipped += self.trial is not None
        self.trial = None
        pair = pair or self._draw(model, column)
        if pair is not None:
            self.trial = trial(pair, mode, self._place(), self._dice)
        return self.trial

    def _draw(self, model: str, column: str) -> Pair | None:
        left = self._left.setdefault((model, column), [])
        if not left:
            left += [pair for pair in self._pairs if (pair.model, pair.column) == (model, column)]
            self._dice.shuffle(left)
        return left.pop() if left else None

    def answer(self, letter: str) -> tuple[Trial, Given, bool] | None:
        """Close the open question with an answer; None if there is none, as when a button is pressed twice.

        The last value says whether it is the first answer about this pair: after it, the truth is known.
        """
        asked, self.trial = self.trial, None
        if asked is None:
            return None
        pair = asked.pair
        given = Given(
            model=pair.model,
            precision=pair.precision,
            recipe=pair.recipe,
            execution=pair.execution,
            mode=asked.mode,
            source="fresh" if pair.fresh else "recorded",
            prompt=pair.prompt,
            seed=pair.seed,
            lpips=pair.lpips,
            bf16=asked.bf16,
            asked=asked.answer,
            given=letter,
            right=letter == asked.answer,
            seconds=round(monotonic() - asked.asked_at, 1),
        )
        self.given.append(given)
        first = pair not in self._answered
        self._answered.add(pair)
        return asked, given, first

    def tallies(self) -> list[Tally]:
        """The score, by model, column and mode, in the order in which they were first asked."""
        kinds: dict[tuple[str, str, str, str], list[bool]] = {}
        for given in self.given:
            kinds.setdefault((given.model, given.precision, given.recipe, given.mode), []).append(given.right)
        return [
            Tally(model=model, precision=precision, recipe=recipe, mode=mode, right=sum(right), asked=len(right))
            for (model, precision, recipe, mode), right in kinds.items()
        ]


def pairs(comparison: Comparison, *, fresh: bool) -> Iterator[Pair]:
    """Each other column of a comparison against its bf16, picture by picture; pictures without a score are left
    out, as whoever sees a black one need not look."""
    asked = comparison.request
    for made in comparison.results:
        column = comparison.column(made)
        if column == EXACT or not column.adapted or made.metrics is None:  # what a LoRA does is not asked
            continue
        for index, (reference, other) in enumerate(zip(comparison.reference.files, made.files, strict=True)):
            if (lpips := made.metrics.lpips[index]) is None:
                continue
            yield Pair(
                model=asked.model,
                precision=made.precision,
                recipe=column.recipe,
                execution=made.execution,
                prompt=asked.prompt,
                seed=(asked.seed + index) % 2**32,
                lpips=lpips,
                fresh=fresh,
                frames=asked.num_frames,
                size=(asked.width, asked.height),
                reference=Path(reference),
                other=Path(other),
            )


def trial(pair: Pair, mode: str, folder: Path, dice: random.Random) -> Trial:
    """A question about a pair, sides tossed, files disguised into `folder`."""
    bf16 = dice.choice("AB")
    sides = {letter: pair.reference if letter == bf16 else pair.other for letter in "AB"}
    answer = bf16
    if mode == ABX:
        answer = dice.choice("AB")
        sides["X"] = sides[answer]
    elif mode == SAME:
        answer = dice.choice("AB")
        if answer == "A":
            shown = dice.choice((pair.reference, pair.other))
            sides, bf16 = dict.fromkeys("AB", shown), "AB" if shown is pair.reference else ""
    files = dict(zip(sides, disguise(list(sides.values()), folder), strict=True))
    return Trial(pair=pair, mode=mode, answer=answer, files=files, bf16=bf16)


def disguise(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Write pictures or clips anew into `folder`: the same pixels, and nothing else that could tell.

    Names and filling are random, lengths and dates equal, text and comments gone; even a copy of one of them differs
    from it in its bytes.
    """
    contents = [_bare_png(file) if file.suffix == ".png" else _bare_mp4(file) for file in sources]
    length = SLACK * math.ceil((max(map(len, contents)) + SLACK) / SLACK)
    written = []
    for source, content in zip(sources, contents, strict=True):
        fill = _fill_png if source.suffix == ".png" else _fill_mp4
        file = folder / f"{secrets.token_hex(16)}{source.suffix}"
        file.write_bytes(fill(content, length))
        os.utime(file, (0, 0))  # servers tell dates
        written.append(file)
    return written


def _bare_png(file: Path) -> bytes:
    encoded = io.BytesIO()
    with Image.open(file) as picture:
        bare = Image.new("RGB", picture.size)
        bare.paste(picture.convert("RGB"))
    bare.save(encoded, format="PNG")
    return encoded.getvalue()


def _fill_png(content: bytes, length: int) -> bytes:
    """With a private chunk that no reader needs before the last one, of 12 bytes (PNG, second edition, 5.3)."""
    body, end = content[:-12], content[-12:]
    kind, data = b"tfIl", secrets.token_bytes(length - len(content) - 12)
    return body + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) + end


def _bare_mp4(file: Path) -> bytes:
    """The same frames, not encoded again, which would cost another loss, and no sound."""
    import av  # here, so that pictures do without

    # Fast start moves the index to the front in a second pass, which needs a real file.
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(file)) as source, av.open(str(bare), "w", options=options) as target:
            frames = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:  # the last one is empty
                    packet.stream = frames
                    target.mux(packet)
        return bare.read_bytes()


def _fill_mp4(content: bytes, length: int) -> bytes:
    """With a box that players skip behind the others (ISO/IEC 14496-12, 8.1.2)."""
    data = secrets.token_bytes(length - len(content) - 8)
    return content + struct.pack(">I", len(data) + 8) + b"free" + data


def p_value(right: int, asked: int, chance: float = 0.5) -> float:
    """How often somebody who is right by `chance`, as with a coin, gets at least so many right: the exact one-sided
    binomial test; 1 without answers."""
    from scipy.stats import binomtest  # takes half a second, which the page starts without

    return float(binomtest(right, asked, chance, "greater").pvalue) if asked else 1.0


def wilson(right: int, asked: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval for the chance of a right answer (Wilson 1927); (0, 1) without answers."""
    from scipy.stats import binomtest

    if not asked:
        return 0.0, 1.0
    found = binomtest(right, asked).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)
