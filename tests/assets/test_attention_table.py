"""The table of what FP8 attention costs: read from evaluations, and in the README as it was measured."""

import json

import pytest

from assets.figures import fp8_attention
from engine import catalog
from engine.files import write_whole

FILE = catalog.ASSETS / "figures" / "fp8-attention.json"
ROWS = {"bf16+fp8-attention": [0.01, 0.03], "fp8": [0.1, 0.2], "fp8+fp8-attention": [0.1, 0.3]}


@pytest.fixture
def evaluated(tmp_path):
    """A folder as an evaluation leaves it."""
    parts = {"bf16+fp8-attention": ("bf16", "+fp8-attention"), "fp8": ("fp8", "post")}
    parts["fp8+fp8-attention"] = ("fp8", "post+fp8-attention")
    summary = {name: name for name in ("created", "device", "name", "versions", "settings", "threads")}
    results = [{"column": c, "precision": p, "recipe": r} for c, (p, r) in parts.items()]
    ends = {end: {"lpips": {"mean": value}} for end, value in (("floor", 0.0), ("ceiling", 0.4))}
    write_whole(
        tmp_path / "summary.json",
        json.dumps(summary | {"model": "mini-flux", "results": results, "ruler": ends}).encode(),
    )
    lines = ["prompt,precision,recipe,lpips"]
    for index, prompt in enumerate(("a cat", "a dog")):
        lines += [f"{prompt},{','.join(parts[column])},{ROWS[column][index]}" for column in ROWS]
    (tmp_path / "scores.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_column_is_compared_with_itself_without_fp8_attention(evaluated, capsys):
    out = evaluated / "out.json"
    fp8_attention.main([str(evaluated), str(out)])
    said = capsys.readouterr().out
    assert json.loads(out.read_text())["mini-flux"]["each"] == ROWS
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in said.splitlines() if line}
    assert rows["bf16 with FP8 attention"][1].startswith("0.0200") and "+0.0200 (" in rows["bf16 with FP8 attention"][3]
    assert rows["FP8"][3].strip(" |") == "" and rows["FP8 with FP8 attention"][3].startswith("+0.0500 (+0.0000 to")
    assert rows["bf16, another seed"][1] == "0.4000"
    fp8_attention.main(["--table", str(out)])
    assert capsys.readouterr().out == said


def test_the_recipes_readme_has_the_table_of_what_was_measured():
    said = (catalog.ASSETS / "recipes" / "README.md").read_text()
    for model, found in json.loads(FILE.read_text()).items():
        wanted = f"<!-- attention {model} -->\n{fp8_attention.table(found)}\n<!-- /attention -->"
        assert wanted in said
