"""Points with intervals over two axes, as an inline SVG that any screen can show.

Positions are percentages of the frame, so type and marks keep their size whatever the width. Knows nothing of what
the points mean: colours come from their precision, by the style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROOM = 0.055
"""What a line of type takes of a plot's height."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point; `low` and `high` are None where there is no interval."""

    x: float
    y: float
    low: float | None
    high: float | None
    precision: str
    said: str
    """What it is, in words: for who hovers, taps, or listens."""
    name: str = ""
    """Written beside it, which also fills it; empty for a point among many."""


def plot(title: str, points: Sequence[Point], floor: tuple[float, str] | None = None) -> str:
    """A figure with y from 0 and x around the points; those with a name lie on top.

    Args:
        floor: a value of y that is drawn as a dashed line, and what it is.
    """
    low, high = _around([point.x for point in points])
    top = 1.08 * max(point.high or point.y for point in points)
    names = _apart([point for point in points if point.name], (low + high) / 2, ROOM * top)

    def x(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    def y(value: float) -> str:
        return f"{100 - 100 * value / top:.2f}%"

    def drawn(point: Point) -> str:
        bar = name = ""
        if point.low is not None and point.high is not None:
            bar = f'<line x1="{x(point.x)}" x2="{x(point.x)}" y1="{y(point.low)}" y2="{y(point.high)}"/>'
        if point.name:
            side, off = ("tf-left", -9) if point.x > (low + high) / 2 else ("tf-right", 9)
            at = f'x="{x(point.x)}" y="{y(names[point])}" dx="{off}" dy="4"'
            name = f'<text class="{side}" {at}>{escape(point.name)}</text>'
        named = " data-named" if point.name else ""
        return (
            f'<g data-precision="{point.precision}"{named} data-why><title>{escape(point.said)}</title>{bar}'
            f'<circle cx="{x(point.x)}" cy="{y(point.y)}" r="{5 if point.name else 3.5}"/>{name}</g>'
        )

    grid = "".join(
        f'<line x1="0" x2="100%" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text class="tf-left" x="-8" y="{y(tick)}" dy="4">{tick:g}</text>'
        for tick in ticks(0, top)
    )
    grid += "".join(f'<text x="{x(tick)}" y="100%" dy="18">{tick:,g}</text>' for tick in ticks(low, high))
    if floor is not None:
        value, said = floor
        grid += f'<line class="tf-mark" x1="0" x2="100%" y1="{y(value)}" y2="{y(value)}"><title>{said}</title></line>'
    marks = "".join(drawn(point) for point in sorted(points, key=lambda point: bool(point.name)))
    return (
        f'<figure class="tf-scatter"><figcaption>{escape(title)}</figcaption><div>'
        f'<svg role="img" aria-label="{escape(title)}">{grid}{marks}</svg></div></figure>'
    )


def _apart(points: Sequence[Point], middle: float, room: float) -> dict[Point, float]:
    """The y of each point's name: its own, or above the name below it on the same side of the middle."""
    places: dict[Point, float] = {}
    for left in (True, False):
        below = -math.inf
        for point in sorted((p for p in points if (p.x > middle) == left), key=lambda p: p.y):
            below = places[point] = max(point.y, below + room)
    return places


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis, a little beyond the values."""
    low, high = min(values), max(values)
    beyond = 0.06 * (high - low) or 0.1 * high or 1.0
    return low - beyond, high + beyond


def ticks(low: float, high: float) -> list[float]:
    """Four to eleven round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(power * part for part in (2, 1, 0.5, 0.2) if (high - low) / (power * part) >= 4)
    return [round(step * index, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
