"""Tables of figures as HTML: one unit a column, scrolling inside their own frame where the screen is narrow."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ui import words

Head = tuple[str, str | None] | tuple[str, str | None, str]
"""Text, unit (None for a column of words), and the key of `words.WHY` that explains it where that is needed."""


def table(heads: Iterable[Head], body: str, label: str, kind: str = "") -> str:
    """A table with a name, whose frame the keyboard reaches and scrolls; `kind` is a further class of it."""
    return (
        f'<div class="tf-scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="tf-figures{f" {kind}" if kind else ""}"><thead><tr>{"".join(head(*h) for h in heads)}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def head(text: str, unit: str | None = "", why: str = "") -> str:
    """The head of a column; ui/static/toolbar.js explains it where it is tapped."""
    said = f"{text}{f' <small>{unit}</small>' if unit else ''}"
    kind = ' class="tf-word"' if unit is None else ""
    if not why:
        return f'<th scope="col"{kind}>{said}</th>'
    return (
        f'<th scope="col"{kind} data-why title="{escape(words.WHY[why])}">'
        f'<button type="button" class="tf-why">{said}</button></th>'
    )
