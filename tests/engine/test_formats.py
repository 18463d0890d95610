"""Number formats: one home, and everything that shows one follows it."""

import ast
import subprocess
import sys
from pathlib import Path

from engine.formats import DEFAULTS, FORMATS, LABELS, PRECISIONS, QUANTIZED, REFERENCE

ROOT = Path(__file__).resolve().parents[2]
CODE = [*(ROOT / "engine").glob("**/*.py"), *(ROOT / "ui").glob("**/*.py"), ROOT / "app.py"]
ANOTHER = """
FP6 = Format(
    id="fp6", label="FP6", bits=6, element="e2m3", block=32, scale="e8m0", scale_bits=8, multiple_in=32,
    multiple_out=16, time=1 / 2, hardware="a made-up GPU", default=True, colour=Colour(light="#123456", dark="#654321"),
)
ROWS = (BF16, FP8, MXFP8, NVFP4, INT8, FP6)
"""
ADDED = """
import importlib.util, sys
from pathlib import Path

file = Path("engine/formats.py")
text = file.read_text().replace("ROWS = (BF16, FP8, MXFP8, NVFP4, INT8)\\n", ANOTHER)
assert "FP6" in text
spec = importlib.util.spec_from_loader("engine.formats", None, origin=str(file))
formats = sys.modules["engine.formats"] = importlib.util.module_from_spec(spec)
exec(compile(text, str(file), "exec"), formats.__dict__)
"""
"""Before anything else of the engine is imported: the row, as somebody would write it."""


def in_its_own_process(code: str) -> str:
    """What a program prints that has one more row in engine/formats.py."""
    program = f"ANOTHER = {ANOTHER!r}\n{ADDED}\n{code}"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_reference_is_first_and_a_default():
    assert PRECISIONS[0] == REFERENCE and DEFAULTS[0] == REFERENCE
    assert (REFERENCE, *QUANTIZED) == PRECISIONS == tuple(FORMATS) == tuple(LABELS)


def test_bytes_are_those_of_the_values_and_of_every_scale():
    sizes = {name: FORMATS[name].size(256, 128) for name in PRECISIONS}
    assert sizes == {
        "bf16": 2 * 256 * 128,
        "fp8": 256 * 128 + 4 * 128,
        "mxfp8": 256 * 128 + 256 // 32 * 128,
        "nvfp4": 256 * 128 // 2 + 256 // 16 * 128 + 4,
        "int8": 256 * 128 + 4 * 128,
    }
    # A tile of scales is 128 x 4: a layer of half as many rows stores as many of them.
    assert FORMATS["mxfp8"].size(256, 64) == 256 * 64 + 256 // 32 * 128


def test_a_new_row_is_asked_for_planned_and_told_of_without_another_edit():
    said = in_its_own_process("""
from engine import __main__, catalog
from engine.quantization import recipe_files, recipes
from engine.request import CompareRequest
from torch import nn

print(CompareRequest.create("a rocket").precisions)
print(CompareRequest.create("a rocket", precisions="fp6,fp8").precisions)
for command in ("compare", "bench", "evaluate"):
    help = __main__._parser()._subparsers._group_actions[0].choices[command].format_help()
    assert "fp6" in help, help
plan = recipes.plan(nn.Sequential(nn.Linear(64, 64, bias=False)), recipes.recipe("mini-flux", "full"), "fp6")
print(plan.layers[0].precision, plan.layers[0].bytes)
odd = recipes.plan(nn.Sequential(nn.Linear(40, 64, bias=False)), recipes.recipe("mini-flux", "full"), "fp6")
print(odd.layers[0].reason)
content = {"id": "mine", "base": "post", "summary": "Mine.", "tunings": {"nvfp4": {"layers": {"a": "fp6"}}}}
print(recipe_files._recipe(recipe_files.FOLDER / "mine.json", content).tunings["nvfp4"].layers["a"])
""").splitlines()
    assert said == [
        "('bf16', 'mxfp8', 'nvfp4', 'fp6')",
        "('bf16', 'fp8', 'fp6')",
        f"fp6 {64 * 64 * 6 // 8 + 2 * 64}",
        "FP6 needs multiples of 32 x 16; this layer is 40 x 64.",
        "fp6",
    ]


def test_a_new_row_is_drawn_and_reported_without_another_edit():
    said = in_its_own_process("""
from pathlib import Path
from engine.benchmark import methods, plots
from engine.quality import report
from engine.formats import PRECISIONS
from tests.support.fake_engine import plan
from ui import api, style, words
from ui.tabs import benchmarks, how
from ui.view import View

assert words.NAMES["fp6"] == "FP6" and "FP8, MXFP8, INT8 and FP6 half" in words.WHY["gemms"]
assert "fp6" in api.endpoint(None, None).__doc__ and " fp6" in words.quality.EVALUATE_COMMAND
sheet = style.head()
assert '[data-precision="fp6"] {\\n  --tf-line-colour: #123456' in sheet and "#654321" in sheet
drawn = how.page(View(), {p: plan("mini-flux", p, "post") for p in PRECISIONS})
assert "<b>FP6</b> 6 bits each (e2m3), one power of two (e8m0) for 32" in drawn

result = methods.read(Path("assets/benchmarks/flux.1-dev-h200.json"))
rows = [row for row in result["rows"] if row["precision"] == "fp8"]
assert rows
result["rows"] += [row | {"precision": "fp6"} for row in rows]
assert "| FP6 |" in plots.table(result) and "| FP6 |" in plots.section([result])
assert all(".fp6 { fill: #123456" in svg and "FP6" in svg for svg in plots.drawings(result).values())
assert "FP6" in benchmarks._measurement(result, {"performance": []}, 1)

estimate = {"n": 2, "mean": 0.1, "low": None, "high": None, "median": 0.1}
scores = {"lpips": estimate, "psnr_db": estimate, "temporal_lpips": None, "equal": 0, "unscored": 0, "categories": {}}
costs = {
    "latency_s": None, "execution": "emulated", "memory_gb": {"weights": 1, "transformer": 1, "peak": 1},
    "layers": {"quantized": 1}, "not_numbers": 0, "ran": {},
}
page = report.page(
    {
        "name": "Model", "device": "here", "created": "2026-01-01", "versions": {}, "settings": {},
        "weights": {"from": "there", "fingerprint": "f"},
        "prompts": {"source": "a file", "count": 2, "given": 2, "refused": [], "repeated": 0, "same": {}},
        "interval": {"confidence": 0.95, "method": "m", "resamples": 1},
        "ruler": {"floor": scores, "ceiling": scores, "note": ""},
        "reference": costs,
        "results": [scores | costs | {"precision": "fp6", "recipe": "post", "worst": [], "best": []}],
    },
    Path("."),
)
assert '<th scope="row">FP6</th>' in page and "Model: FP6" in page
print("all")
""")
    assert said == "all\n"


def test_no_module_spells_a_format():
    """A format's id or label as a string of its own; the row's constants are for modules that are about one format."""
    theirs = {
        "formats.py": "its home",
        "checkpoint.py": "names that others give to variants and methods of their checkpoints",
        "device.py": "the type of a stored checkpoint",
    }
    names = {*PRECISIONS, *LABELS.values()}
    found = {
        (file.name, node.value)
        for file in CODE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert {name for name, _ in found} == theirs.keys()


def test_only_modules_about_one_format_name_its_row():
    about_one = {
        "capability.py": "how each is run and quantized",
        "bench.py": "the post's configuration of each",
        "program.py": "the lines of a program that quantize to each",
        "recipes.py": "NVFP4's packed weights and low-rank branches",
        "recipe_files.py": "the remedies that a recipe file may have in NVFP4 alone",
        "lab.py": "the lab looks into NVFP4",
        "plots.py": "what FP8 by the post's method is",
        "torchao_layout.py": "how torchao names and stores each",
        "stored.py": "and what runs here of each",
        "export.py": "NVFP4's remedies in a folder of its own",
        "tables.py": "the formats that the post's tables have",
        "cells.py": "and which stands in for those that a card has not",
        "cards.py": "the peaks of cards in each",
    }
    rows = {"BF16", *(name.upper() for name in QUANTIZED)}
    found = {
        file.name
        for file in CODE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "engine.formats"
        if rows & {alias.name for alias in node.names}
    }
    assert found == about_one.keys()


def test_no_style_sheet_or_script_names_a_quantized_format():
    files = [*(ROOT / "ui").glob("**/*.css"), *(ROOT / "ui").glob("**/*.js")]
    assert files
    for file in files:
        assert not [name for name in QUANTIZED if name in file.read_text().lower()], file.name
