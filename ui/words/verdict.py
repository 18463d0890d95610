"""What a comparison comes to, in sentences.

Speed is only ever spoken of where the engine calls the latency comparable, and memory at the peak only where the
precision ran natively. Whether a difference is seen is only spoken of where people's answers say so; elsewhere a score
stands as a number, with its place between bf16's own noise and another seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine import catalog
from engine.columns import NO_LORA
from engine.formats import REFERENCE
from engine.outputs.pool import Seen
from engine.request import CompareRequest
from engine.results import Comparison, Generation, Ruler
from ui.words.common import NAMES, change, factor, listed, name, score, thing
from ui.words.prompt import not_of_the_prompt

NOBODY = Seen()
PREVIEWED = "This run showed previews, so nothing in it was timed."
WITHOUT_REFERENCE = "There is no bf16 to compare with, so no LPIPS, no saving and no speedup."
NO_RULER = "its scale has not been measured"
QUOTED_HERE = "With these settings the post measured"
ON_SHARED_CARD = "Others used the card too, so these latencies are not to quote."
MINIATURE = "Made by a miniature: a full-size model can lose more or less."
COSTS_THE_SAME = "costs the same"
"""Of bf16 without the model's LoRAs, which are fused."""
BF16_WITHOUT = f"{REFERENCE}{NO_LORA}"
WITHIN_NOISE = "within bf16's own noise"
SEEN = {"alike": "hard to tell from bf16 in blind tests", "apart": "different to the eye in blind tests"}
"""What is said of a score where the answers of people support it (engine/outputs/pool.py), and nowhere else."""


def way(lpips: float, ruler: Ruler) -> float:
    """How far a score lies from the floor (0) to the ceiling (1)."""
    span = ruler.ceiling - ruler.floor
    return max(0.0, (lpips - ruler.floor) / span) if span > 0 else 0.0


def on_the_ruler(lpips: float, ruler: Ruler | None, seen: Seen = NOBODY) -> str:
    """Where a score lies, in words: for under the ruler."""
    return (_place(lpips, ruler, "to another seed") or NO_RULER) + _listed(as_seen(lpips, seen))


def as_seen(lpips: float, seen: Seen) -> str:
    """What people saw at such a score; empty where their answers support nothing."""
    if seen.alike is not None and lpips <= seen.alike:
        return SEEN["alike"]
    return SEEN["apart"] if seen.apart is not None and lpips >= seen.apart else ""


def mean_lpips(generation: Generation) -> float | None:
    """None until it is compared, and where nothing of it has a score."""
    return generation.metrics.mean_lpips if generation.metrics else None


def damage(generation: Generation) -> str:
    """Why it has no score, or not one of all that was made; empty if it has, or is not compared yet."""
    return generation.metrics.damage if generation.metrics else ""


def weights_saving(comparison: Comparison, generation: Generation) -> float:
    """Fraction of bf16's weight bytes that this precision does without."""
    return 1 - generation.memory.weights / comparison.reference.memory.weights


def denoiser_saving(comparison: Comparison, generation: Generation) -> float:
    """Fraction of the bytes of bf16's denoiser that this precision's does without."""
    return 1 - generation.memory.transformer / comparison.reference.memory.transformer


def verdict(comparison: Comparison, seen: Seen = NOBODY) -> str:
    """What the comparison says, from comparable numbers only.

    Args:
        seen: what people's answers support saying of this model's scores.
    """
    return " ".join(said for _, said in verdicts(comparison, seen))


def verdicts(comparison: Comparison, seen: Seen = NOBODY) -> list[tuple[float | None, str]]:
    """The same sentence by sentence, each with how far from the floor to the ceiling the score of its precision lies;
    None where it has none, or speaks of no precision."""
    if comparison.lacks:
        return [(None, f"{WITHOUT_REFERENCE} {comparison.lacks}")]
    others = [g for g in comparison.results if g.column != REFERENCE and g.metrics]
    if not others:
        return [(None, f"{NAMES[REFERENCE]} alone: choose another precision to compare it with.")]
    if nothing := not_of_the_prompt(comparison.request):
        return [(None, nothing)]
    emulated = [g for g in others if g.execution == "emulated"]
    say = _on_one if len(others) == 1 else _on_many
    said = [(_way(comparison, generation), say(comparison, generation, seen)) for generation in others]
    said = [*said, *_adapted(comparison, others)]
    further = [_emulated(comparison, emulated, len(others))] if emulated else []
    further += dict.fromkeys(g.disproof for g in emulated if g.disproof)
    further += [unquantized(comparison.request, g.column) for g in others if g.is_unquantized]
    further += [MINIATURE] if catalog.model(comparison.request.model).bundled else []
    further += _streamed(comparison)
    further += [PREVIEWED] if comparison.request.previews else []
    further += [ON_SHARED_CARD] if any(g.shared_card and g.latency_comparable for g in comparison.results) else []
    return said + [(None, sentence) for sentence in (*further, *_at_once(comparison))]


def unquantized(asked: CompareRequest, column: str) -> str:
    """What to say of a column whose recipe quantizes no layer of the model."""
    return f"{name(asked, column)} is bf16 under another name: its recipe quantizes no layer here, so choose another."


def _adapted(comparison: Comparison, others: Sequence[Generation]) -> list[tuple[float | None, str]]:
    """What the model's LoRAs do to the picture, and what each quantized column does to that; nothing without both."""
    without = next((mean_lpips(g) for g in others if g.column == BF16_WITHOUT), None)
    if not without:
        return []
    asked = comparison.request
    kept = {g.column: mean_lpips(g) for g in others if comparison.column(g).adapted}
    moved = {c: lpips / without for c, lpips in kept.items() if lpips is not None}
    parts = [
        f"{name(asked, c)} moves the {thing(asked)} {f'{far:.0f} times' if far >= 2 else f'{far:.0%}'} as far"
        for c, far in moved.items()
    ]
    beside = f"; {listed(parts)}" if parts else ""
    return [(None, f"What the LoRA does to the {thing(asked)} is an LPIPS of {score(without)} in bf16{beside}.")]


def _way(comparison: Comparison, generation: Generation) -> float | None:
    lpips = mean_lpips(generation)
    return None if comparison.ruler is None or lpips is None else way(lpips, comparison.ruler)


def _on_one(comparison: Comparison, generation: Generation, seen: Seen) -> str:
    """One precision, in a whole sentence: speed, memory, and how far it is from bf16."""
    native = generation.execution == "native"
    memory = "memory" if native else "memory for its weights"
    percent, denoiser = _percents(comparison, generation)
    sign = "less" if percent > 0 else "more"
    needs = f"needs as much {memory}" if percent == 0 else f"needs {abs(percent)}% {sign} {memory}"
    needs += f" ({_signed(denoiser)} for the denoiser's{' weights' if native else ''})"
    speedup, lpips = comparison.speedup(generation), mean_lpips(generation)
    parts = [needs] if speedup is None else [f"is {_speed(speedup)}", needs]
    parts = [COSTS_THE_SAME] if generation.column == BF16_WITHOUT else parts
    if lpips is not None:
        parts.append(f"has an LPIPS of {score(lpips)}")
    said = f"{name(comparison.request, generation.column)} {listed(parts)}"
    if lost := damage(generation):
        said += f" ({lost})"
    if lpips is None:
        return f"{said}."
    place = _place(lpips, comparison.ruler, "from bf16's own noise to another seed")
    return f"{said}{_listed(place, as_seen(lpips, seen))}."


def _on_many(comparison: Comparison, generation: Generation, seen: Seen) -> str:
    """One precision of several, in a few words."""
    native = generation.execution == "native"
    percent, denoiser = _percents(comparison, generation)
    speedup, lpips = comparison.speedup(generation), mean_lpips(generation)
    parts = [] if speedup is None else [_speed(speedup)]
    if native:
        sign = "less" if percent > 0 else "more"
        parts.append("as much memory" if percent == 0 else f"{abs(percent)}% {sign} memory")
    else:
        sign = "smaller" if percent > 0 else "larger"
        parts.append("weights as large" if percent == 0 else f"{abs(percent)}% {sign} weights")
    parts[-1] += f" (denoiser {change(denoiser / 100)})"
    parts = [COSTS_THE_SAME] if generation.column == BF16_WITHOUT else parts
    if lpips is not None:
        place = _place(lpips, comparison.ruler, "to another seed")
        parts.append(f"LPIPS {score(lpips)}{_listed(place, as_seen(lpips, seen))}")
    if lost := damage(generation):
        parts.append(lost)
    return f"{name(comparison.request, generation.column)}: {', '.join(parts)}."


def _place(lpips: float, ruler: Ruler | None, ends: str) -> str:
    if ruler is None:
        return ""
    return WITHIN_NOISE if lpips <= ruler.floor else f"{way(lpips, ruler):.0%} of the way {ends}"


def _listed(*parts: str) -> str:
    return "".join(f", {part}" for part in parts if part)


def _percents(comparison: Comparison, generation: Generation) -> tuple[int, int]:
    """What it saves, of the whole pipeline and of the denoiser alone."""
    return round(100 * _saving(comparison, generation)), round(100 * denoiser_saving(comparison, generation))


def _signed(percent: int) -> str:
    return "as much" if percent == 0 else f"{abs(percent)}% {'less' if percent > 0 else 'more'}"


def _saving(comparison: Comparison, generation: Generation) -> float:
    """Of peak memory where that is the format's own, otherwise of the weights."""
    native = generation.execution == "native"
    return comparison.memory_saving(generation) if native else weights_saving(comparison, generation)


def _speed(speedup: float) -> str:
    if 0.98 < speedup < 1.02:
        return "as fast"
    return f"{factor(speedup)} faster" if speedup > 1 else f"{factor(1 / speedup)} slower"


def _emulated(comparison: Comparison, emulated: Sequence[Generation], compared: int) -> str:
    names = [name(comparison.request, g.column) for g in emulated]
    if compared == 1:
        return "It is emulated, so its speed is not compared."
    if len(names) == compared:
        return f"{'Both' if compared == 2 else 'All'} are emulated, so their speed is not compared."
    if len(names) == 1:
        return f"{names[0]} is emulated, so its speed is not compared."
    return f"{listed(names)} are emulated, so their speed is not compared."


def _streamed(comparison: Comparison) -> list[str]:
    """What did not fit on the device."""
    names = [name(comparison.request, g.column) for g in comparison.results if g.is_streamed]
    if not names:
        return []
    verb, said = ("does", "was") if len(names) == 1 else ("do", "were")
    return [f"{listed(names)} {verb} not fit on this device and {said} streamed from host memory, so not timed."]


def _at_once(comparison: Comparison) -> list[str]:
    """What ran beside what, where several devices did."""
    beside = [g for g in comparison.results if g.at_once]
    if not beside:
        return []
    asked = comparison.request
    names = listed(name(asked, g.column) for g in beside)
    said = [f"{names} ran at the same time on one host, which may slow them down."]
    alone = [g for g in comparison.results if g.latency_comparable and not g.at_once]
    if alone:
        said.append(f"{listed(name(asked, g.column) for g in alone)} ran alone, so no speedup is given.")
    return said


def quoted(name: str, speedup: float, saving: float) -> str:
    """What the post measured of something that is emulated here."""
    return f"{name} {_speed(speedup)}, {round(100 * saving)}% less memory"
