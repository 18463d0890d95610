"""The stage: its keys, and what is said where a recording stands in for a run."""

from __future__ import annotations

from engine.request import CompareRequest

STAGE, STAGE_HINT = "Stage", "Only the prompt, the verdict and the pictures, with a key for everything (P)"
KEYS = "Keys"
LOST = "The connection is lost. What is shown stays; it comes back by itself."
ACTS = {
    "g": "Generate",
    "x": "Stop",
    "n": "Next example",
    "e": "Edit the prompt",
    "r": "Back to a recorded run",
    "b": "Side by side",
    "s": "Slider; the arrow keys move it",
    "f": "Flicker; again to flip",
    "d": "Difference",
    "w": "Worst spot; again for the whole picture",
    "+": "Zoom in",
    "-": "Zoom out",
    "o": "Against another column",
    "p": "Leave the stage",
    "?": "This list",
}
"""What ui/static/stage.js does at a key."""


def fell_back(reason: str, asked: CompareRequest, recorded: CompareRequest) -> str:
    """What is said where a recording stands in for a run that failed."""
    if asked == recorded:
        return f"The live run failed: {reason} This is a recorded run of the same request."
    return (
        f"The live run failed: {reason} This is the nearest recorded run, of “{recorded.prompt}”, seed {recorded.seed}."
    )


def lost(asked: CompareRequest, recorded: CompareRequest) -> str:
    """What is said while the connection is lost in the middle of a run."""
    back = "The live run goes on and is shown when the connection is back."
    if asked == recorded:
        return f"The connection is lost. This is a recorded run of the same request. {back}"
    which = f"of “{recorded.prompt}”, seed {recorded.seed}"
    return f"The connection is lost. This is the nearest recorded run, {which}. {back}"
