"""What the post published: every table of it, its settings, and what to know beside its figures. Imports no torch."""

from __future__ import annotations

import json

from engine.catalog import ASSETS

POST = ASSETS / "reference" / "b200.json"


def read() -> dict:
    """The post's tables; `latency_note` and `lpips_note` say how its latencies and its LPIPS differ from others."""
    return json.loads(POST.read_text(encoding="utf-8"))
