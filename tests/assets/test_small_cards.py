"""What was measured of cards too small for bf16, and the table that tells it."""

import json
import re
from pathlib import Path

from assets.figures import small_cards

ROOT = Path(__file__).resolve().parents[2]
MEASURED = json.loads((ROOT / "assets/figures/small-cards.json").read_text(encoding="utf-8"))


def test_the_table_is_what_was_measured():
    readme = (ROOT / "engine/README.md").read_text(encoding="utf-8")
    said = re.search(r"<!-- small cards -->\n(.*?)\n<!-- /small cards -->", readme, re.DOTALL)
    assert said and said[1] == small_cards.table(MEASURED), f"\n{small_cards.table(MEASURED)}"


def test_every_peak_lies_below_its_budget_and_every_picture_is_the_one_without():
    whole, *limited = MEASURED["budgets"]
    assert {row["budget_gb"] for row in limited} >= {12, 16, 24, 32}
    for row in limited:
        assert row["peak_reserved_gb"] < row["budget_gb"]
        assert [one["pixels"] for one in row["results"]] == [one["pixels"] for one in whole["results"]]


def test_what_was_streamed_or_emulated_has_no_latency():
    timed = [one for row in MEASURED["budgets"] for one in row["results"] if one["latency_comparable"]]
    assert timed and not any("denoiser" in one.get("streamed", []) or one["execution"] != "native" for one in timed)
