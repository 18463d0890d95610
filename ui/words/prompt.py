"""What a miniature can draw, and which words of a prompt it never learnt: while one types, and beside what was made.

ui/static/prompt.js fills in {words}, {thing} and {count}.
"""

from __future__ import annotations

from engine import catalog, vocabulary
from engine.request import CompareRequest
from ui.words.common import listed

NEVER = "This miniature never learnt {words}: what it makes will be something else."
NOTHING = "This miniature draws one thing on a background: name something that it has learnt."
SEVERAL = "This miniature draws one thing at a time, and here are {words}."
OFFERED = "{count} suggestions: arrow down to choose."
LIST = "What this miniature can draw"


def can(model: str) -> str:
    """What a miniature draws; empty for a model that was trained on more than can be listed."""
    known = vocabulary.of(model)
    if known is None:
        return ""
    moving = f", {len(known.motions)} motions" if known.motions else ""
    return f"Draws one of {len(known.things)} emoji{moving}, on one of {len(known.colours)} background colours."


def not_of_the_prompt(asked: CompareRequest) -> str:
    """Why what was made is no picture of the prompt; empty if it may well be."""
    known = vocabulary.of(asked.model)
    if known is None:
        return ""
    found = known.read(asked.prompt)
    if found.drawn:
        return ""
    made = catalog.model(asked.model).makes
    if found.unknown:
        why = f"It never learnt {quoted(found.unknown)}"
    elif found.things:
        why = f"It draws one thing at a time, not {quoted(found.things)}"
    else:
        why = "It draws one thing on a background, and the prompt names none that it has learnt"
    return (
        f"No verdict, as these {made} are not of the prompt. {why}. The numbers below say how far its {made} "
        "are from each other, and nothing else."
    )


def quoted(names: tuple[str, ...]) -> str:
    return listed(f"“{name}”" for name in names)
