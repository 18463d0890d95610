"""Tables of figures as HTML: one unit a column, scrolling inside their own frame where the screen is narrow."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ui import words

Head = tuple[str, str | None] | tuple[str, str | None, str]
"""Text, unit (None for a column of words), and the key of `words.WHY` that explains it where that is needed."""


def table(heads: Iterable[Head], body: str, label: str, kind: str = "", *, sorts: bool = False) -> str:
    """A table with a name, whose frame the keyboard reaches and scrolls.

    Args:
        kind: a further class of it.
        sorts: whether its heads are buttons that sort it (ui/static/sort.js).
    """
    return (
        f'<div class="tf-scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="tf-figures{f" {kind}" if kind else ""}"><thead><tr>'
        f"{''.join((_sorting if sorts else head)(*h) for h in heads)}</tr>"
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def head(text: str, unit: str | None = "", why: str = "") -> str:
    """The head of a column; ui/static/toolbar.js explains it where it is tapped."""
    said, kind = _said(text, unit)
    if not why:
        return f'<th scope="col"{kind}>{said}</th>'
    return (
        f'<th scope="col"{kind} data-why title="{escape(words.WHY[why])}">'
        f'<button type="button" class="tf-why">{said}</button></th>'
    )


def _sorting(text: str, unit: str | None = "", why: str = "") -> str:
    said, kind = _said(text, unit)
    told = f' title="{escape(words.WHY[why])}"' if why else ""
    return f'<th scope="col"{kind}{told} aria-sort="none"><button type="button" class="tf-sort">{said}</button></th>'


def _said(text: str, unit: str | None) -> tuple[str, str]:
    kind = ' class="tf-word"' if unit is None else ""
    return f"{text}{f' <small>{unit}</small>' if unit else ''}", kind
