"""What the body of a request to Gradio's API may hold: one JSON object of plain values, and no files.

Gradio trusts its own page: values that are not JSON's, or files where the app takes none, end in it as exceptions
instead of answers. So they are refused before they get there. Knows no routes.
"""

from __future__ import annotations

import json
import math

DEEPEST = 32
"""Nested lists and objects; ours need five."""


def wrong(content: bytes) -> str | None:
    """What is wrong with a body, as a sentence; None if nothing is, or if there is none."""
    if not content:
        return None
    try:
        body = json.loads(content, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return "The body must be JSON, in UTF-8 and with finite numbers."
    if not isinstance(body, dict | list):
        return "The body must be a JSON object."
    if isinstance(body, dict):
        if not isinstance(body.get("data", []), list | dict):
            return "data must be a list of the endpoint's parameters."
        if not isinstance(body.get("fn_index"), int | None) or isinstance(body.get("fn_index"), bool):
            return "fn_index must be a whole number."
        if not isinstance(body.get("session_hash"), str | None):
            return "session_hash must be text."
    return _within(body)


def _within(value: object, depth: int = 0) -> str | None:
    if depth > DEEPEST:
        return f"The body must not be nested more than {DEEPEST} deep."
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return "The body has characters that are not text."
    inside = value if isinstance(value, list) else ()
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) or isinstance(value.get("url"), str):
            return "This app takes no files."
        inside = (*value, *value.values())
    return next(filter(None, (_within(part, depth + 1) for part in inside)), None)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value
