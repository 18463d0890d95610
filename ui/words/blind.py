"""The Blind test tab."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.columns import POST, Column
from engine.outputs.blind import Given, Tally
from ui.words.common import of_column, score

TITLE = "Can you tell?"
NOTE = (
    "Two from the same noise: the same one twice, or one in bf16 and one quantized, which only the server knows until "
    "you answer. In ABX they always differ, and a third, X, is one of the two again. "
    "Recorded pairs are shown nowhere else on this page; fresh ones nobody has seen before. Clips are silent."
)
POOLED = "This server keeps each answer with its LPIPS, and nothing about you."
KEYS = "Keys: A and B press the first and the second answer, N shows the next pair, Z or a click zooms all pictures."
PRECISION, MODE, SOURCE = "bf16 against", "Question", "Pairs"
MODES = {"same": "Same or different?", "abx": "ABX", "which": "Which one is bf16?"}
SOURCES = {"recorded": "Recorded", "fresh": "Fresh, made now"}
PROMPT = "Prompt of the fresh pair; empty takes an example"
NEXT, SKIP = "Next pair", "Skip"
ASKED = {
    "which": "Which one is bf16?",
    "same": "The same picture twice, or two different ones?",
    "abx": "X is one of the two again: which?",
}
ANSWERS = {"which": ("A is bf16", "B is bf16"), "same": ("Same", "Different"), "abx": ("X is A", "X is B")}
MAKING, MEASURING = "Making a fresh pair", "Measuring the fresh pair"
STOPPING = "Stopping after this step"
GONE = "The server has forgotten this question: press Next pair."
SCORE = "Your score"
SHARE, SHARE_HINT = "Copy score", "Copy your score in words, with the address of this test"
HEADS = ("bf16 against", "Question", "Right", "Share, 95% interval", "p", "What it is worth")
STATISTICS = (
    "p: how often a tossed coin gets at least as many right, by the exact binomial test; the interval is Wilson's. "
    "Decide beforehand how many pairs to answer: to stop as soon as p looks good makes it worthless."
)
NOT_NUMBERS = "This pair has no score, as its values are not numbers: choose another precision or another model."
FEWEST = 5
"""With fewer answers, even all right, a coin gets as many too often to say anything: 1/2^4 is more than 5%."""


def nothing(column: str) -> str:
    return f"There is no recorded pair of {of_column(Column.of(column, POST))} for this model: choose fresh ones."


def frame(letter: str) -> str:
    return f"{letter}, click to zoom"


def truth(given: Given) -> str:
    """What is said of an answer."""
    verdict = "Right" if given.right else "Wrong"
    if given.mode == "abx":
        return f"{verdict}: X is {given.asked}."
    if given.mode == "same":
        return f"{verdict}: they are {'the same' if given.asked == 'A' else 'different'}."
    return f"{verdict}: {given.bf16} is bf16."


def told(given: Given) -> str:
    """What a question did not say."""
    other = f"{of_column(Column(given.precision, given.recipe))} {given.execution}, LPIPS {score(given.lpips)}"
    return f"{given.source} · seed {given.seed} · {other}"


def skipped(count: int) -> str:
    return f"{count} pair{'s were' if count > 1 else ' was'} left unanswered, which can make a score look better."


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def worth(p: float, asked: int) -> str:
    """A p-value in words."""
    if asked < FEWEST:
        return "too few to say"
    return "you can tell" if p < 0.05 else "no better than a coin so far"


def shared(tallies: Sequence[Tally], model: Callable[[str], str]) -> str:
    """A score in words, for others: what was asked, how many were right, and what that is worth."""
    told = [
        f"{of_column(Column(tally.precision, tally.recipe))} against bf16 ({model(tally.model)}, {MODES[tally.mode]}): "
        f"{tally.right} of {tally.asked} right, p {p_value(tally.p_value)}, {worth(tally.p_value, tally.asked)}."
        for tally in tallies
    ]
    return " ".join(["My blind test of quantized pictures.", *told, "Yours:"])
