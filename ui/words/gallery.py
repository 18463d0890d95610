"""The Gallery tab, and recordings wherever they are shown."""

from __future__ import annotations

from engine import catalog
from engine.errors import shown
from engine.request import CompareRequest
from engine.results import Comparison
from ui.words.common import name, score, thing, when

NO_RECORDINGS = "Nothing has been recorded yet. A comparison is recorded, on any machine, by"
RECORD_COMMAND = 'python -m engine record --prompt "a rocket on a blue background" --out assets/recorded'
RECORDED_ON = "Recorded on"
HISTORY = "Made in this browser"
HISTORY_NOTE = "Kept in this browser alone; each opens with its settings."
HISTORY_CLEAR = "Forget them"


def tile(comparison: Comparison) -> str:
    """What sets a comparison apart from others, below its prompt."""
    asked = comparison.request
    found = [(name(asked, g.column), g.metrics) for g in comparison.results if g.metrics]
    lost = [f"{column}: {metrics.damage}" for column, metrics in found if metrics.damage]
    scored = [(column, metrics.mean_lpips) for column, metrics in found]
    scores = ", ".join(f"{column}\N{NO-BREAK SPACE}{score(lpips)}" for column, lpips in scored if lpips is not None)
    parts = ([f"LPIPS {scores}"] if scores else []) + lost
    if asked.num_frames > 1:
        spec = catalog.model(asked.model)
        parts.append(f"{asked.num_frames / spec.defaults.frame_rate:.1f} s{' with sound' if spec.sound else ''}")
    if asked.batch_size > 1:
        parts.append(f"{asked.batch_size} {thing(asked)}s")
    return " · ".join(parts)


def recorded_on(comparison: Comparison) -> str:
    return f"{comparison.device}, {when(comparison.created)}"


def not_offered_here(asked: CompareRequest) -> str:
    model = catalog.model(asked.model).name
    return f"{model} is not offered here, so this recording can be looked at, and the settings stay as they are."


def no_recording(name: str) -> str:
    return f"There is no recording {shown(name)} here: choose one in the gallery."
