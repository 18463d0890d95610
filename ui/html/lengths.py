"""Bars of one measure, one below the other, as lists in plain HTML: what was measured filled, what is quoted hollow and
with its badge. Knows nothing of what the values mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ui import words


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar; `low` and `high` are the ends of an interval, None without one."""

    label: str
    precision: str
    """Gives the colour."""
    value: float
    shown: str
    """The value in words."""
    quoted: bool
    low: float | None = None
    high: float | None = None


def lengths(groups: Mapping[str, Sequence[Bar]], start: float = 0.0) -> str:
    """A list of bars below each heading, all on one scale that begins at `start`."""
    top = max(bar.high or bar.value for bars in groups.values() for bar in bars)

    def part(value: float) -> str:
        return f"{100 * max(0.0, value - start) / max(top - start, 1e-9):.1f}%"

    def drawn(bar: Bar) -> str:
        interval = ""
        if bar.low is not None and bar.high is not None:
            interval = f'<s style="left:{part(bar.low)};right:calc(100% - {part(bar.high)})"></s>'
        return (
            f'<li data-precision="{bar.precision}"{" data-quoted" if bar.quoted else ""}>'
            f"<span>{escape(bar.label)}</span>"
            f'<span class="tf-length"><i style="width:{part(bar.value)}"></i>{interval}</span>'
            f"<b>{escape(bar.shown)}</b>{source(quoted=bar.quoted)}</li>"
        )

    drawn_groups = (
        f"<div><h3>{escape(heading)}</h3><ul>{''.join(drawn(bar) for bar in bars)}</ul></div>"
        for heading, bars in groups.items()
    )
    return f'<div class="tf-lengths">{"".join(drawn_groups)}</div>'


def source(*, quoted: bool) -> str:
    """A badge that says who measured something, and at length where it is hovered or tapped."""
    kind, said = ("quoted", words.QUOTED_BADGE) if quoted else ("measured", words.MEASURED_BADGE)
    return (
        f'<button type="button" class="tf-badge tf-{kind}" title="{escape(said)}" data-why>'
        f"{words.SOURCES[kind]}</button>"
    )
