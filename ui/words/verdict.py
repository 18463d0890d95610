"""What a comparison comes to, in sentences.

Speed is only ever spoken of where the engine calls the latency comparable, and memory at the peak only where the
precision ran natively.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.formats import REFERENCE
from engine.results import Comparison, Generation, Ruler
from ui.words.common import NAMES, factor, listed, thing

PREVIEWED = "This run showed previews, so nothing in it was timed."
NO_RULER = "its scale has not been measured"
QUOTED_HERE = "With these settings the post measured"
CLOSENESS = (
    (0.10, "near", "hard to tell from bf16"),
    (0.45, "close", "different only up close"),
    (0.85, "far", "visibly different"),
    (float("inf"), "other", "another {thing}"),
)
"""How a score is put into words: up to which part of the way from the floor to the ceiling, its tone, a phrase."""
WITHIN_NOISE = ("same", "within bf16's own noise")


def way(lpips: float, ruler: Ruler) -> float:
    """How far a score lies from the floor (0) to the ceiling (1)."""
    span = ruler.ceiling - ruler.floor
    return max(0.0, (lpips - ruler.floor) / span) if span > 0 else 0.0


def on_the_ruler(lpips: float, ruler: Ruler | None, made: str) -> str:
    """Where a score lies, in words: for under the ruler."""
    if ruler is None:
        return NO_RULER
    if lpips <= ruler.floor:
        return WITHIN_NOISE[1]
    return f"{way(lpips, ruler):.0%} of the way to another seed: {closeness(lpips, ruler, made)[1]}"


def closeness(lpips: float, ruler: Ruler, made: str) -> tuple[str, str]:
    """How near something made, a "picture" or "clip", is to bf16's: its tone, for the look, and a phrase."""
    if lpips <= ruler.floor:
        return WITHIN_NOISE
    part = way(lpips, ruler)
    tone, phrase = next(said for limit, *said in CLOSENESS if part < limit)
    return tone, phrase.format(thing=made)


def mean_lpips(generation: Generation) -> float | None:
    """None until it is compared, and where nothing of it has a score."""
    return generation.metrics.mean_lpips if generation.metrics else None


def damage(generation: Generation) -> str:
    """Why it has no score, or not one of all that was made; empty if it has, or is not compared yet."""
    return generation.metrics.damage if generation.metrics else ""


def weights_saving(comparison: Comparison, generation: Generation) -> float:
    """Fraction of bf16's weight bytes that this precision does without."""
    return 1 - generation.memory.weights / comparison.reference.memory.weights


def verdict(comparison: Comparison) -> str:
    """What the comparison says, from comparable numbers only."""
    return " ".join(said for _, said in verdicts(comparison))


def verdicts(comparison: Comparison) -> list[tuple[str, str]]:
    """The same sentence by sentence, each with the tone of the precision it speaks of; empty where there is none."""
    others = [g for g in comparison.results if g.precision != REFERENCE and g.metrics]
    if not others:
        return [("", f"{NAMES[REFERENCE]} alone: choose another precision to compare it with.")]
    emulated = [g for g in others if g.execution == "emulated"]
    say = _on_one if len(others) == 1 else _on_many
    said = [(_tone(comparison, generation), say(comparison, generation)) for generation in others]
    further = [("", _emulated(emulated, len(others)))] if emulated else []
    further += [("", PREVIEWED)] if comparison.request.previews else []
    return said + further + [("", sentence) for sentence in _at_once(comparison)]


def _tone(comparison: Comparison, generation: Generation) -> str:
    if comparison.ruler is None or mean_lpips(generation) is None:
        return ""
    return closeness(mean_lpips(generation), comparison.ruler, thing(comparison.request))[0]


def _on_one(comparison: Comparison, generation: Generation) -> str:
    """One precision, in a whole sentence: speed, memory, and how far it is from bf16."""
    native = generation.execution == "native"
    percent = round(100 * _saving(comparison, generation))
    memory = "memory" if native else "memory for its weights"
    sign = "less" if percent > 0 else "more"
    needs = f"needs as much {memory}" if percent == 0 else f"needs {abs(percent)}% {sign} {memory}"
    speedup, lpips = comparison.speedup(generation), mean_lpips(generation)
    parts = [needs] if speedup is None else [f"is {_speed(speedup)}", needs]
    if comparison.ruler is not None and lpips is not None:
        parts.append(f"is {closeness(lpips, comparison.ruler, thing(comparison.request))[1]}")
    said = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    said = f"{NAMES[generation.precision]} {said}"
    if lost := damage(generation):
        said += f" ({lost})"
    if comparison.ruler is None or lpips is None or lpips <= comparison.ruler.floor:
        return f"{said}."
    return f"{said}: {way(lpips, comparison.ruler):.0%} of the way from bf16's own noise to another seed."


def _on_many(comparison: Comparison, generation: Generation) -> str:
    """One precision of several, in a few words."""
    native = generation.execution == "native"
    percent = round(100 * _saving(comparison, generation))
    speedup = comparison.speedup(generation)
    parts = [] if speedup is None else [_speed(speedup)]
    if native:
        sign = "less" if percent > 0 else "more"
        parts.append("as much memory" if percent == 0 else f"{abs(percent)}% {sign} memory")
    else:
        sign = "smaller" if percent > 0 else "larger"
        parts.append("weights as large" if percent == 0 else f"{abs(percent)}% {sign} weights")
    if comparison.ruler is not None and mean_lpips(generation) is not None:
        parts.append(closeness(mean_lpips(generation), comparison.ruler, thing(comparison.request))[1])
    if lost := damage(generation):
        parts.append(lost)
    return f"{NAMES[generation.precision]}: {', '.join(parts)}."


def _saving(comparison: Comparison, generation: Generation) -> float:
    """Of peak memory where that is the format's own, otherwise of the weights."""
    native = generation.execution == "native"
    return comparison.memory_saving(generation) if native else weights_saving(comparison, generation)


def _speed(speedup: float) -> str:
    if 0.98 < speedup < 1.02:
        return "as fast"
    return f"{factor(speedup)} faster" if speedup > 1 else f"{factor(1 / speedup)} slower"


def _emulated(emulated: Sequence[Generation], compared: int) -> str:
    names = [NAMES[g.precision] for g in emulated]
    if compared == 1:
        return "It is emulated, so its speed is not compared."
    if len(names) == compared:
        return f"{'Both' if compared == 2 else 'All'} are emulated, so their speed is not compared."
    if len(names) == 1:
        return f"{names[0]} is emulated, so its speed is not compared."
    return f"{listed(names)} are emulated, so their speed is not compared."


def _at_once(comparison: Comparison) -> list[str]:
    """What ran beside what, where several devices did."""
    beside = [g for g in comparison.results if g.at_once]
    if not beside:
        return []
    said = [f"{listed(NAMES[g.precision] for g in beside)} ran at the same time on one host, which may slow them down."]
    alone = [g for g in comparison.results if g.latency_comparable and not g.at_once]
    if alone:
        said.append(f"{listed(NAMES[g.precision] for g in alone)} ran alone, so no speedup is given.")
    return said


def quoted(precision: str, speedup: float, saving: float) -> str:
    """What the post measured of something that is emulated here."""
    return f"{NAMES[precision]} {_speed(speedup)}, {round(100 * saving)}% less memory"
