"""The Benchmarks tab: what was measured, set against bf16, and what the post says."""

from __future__ import annotations

import json
import re
from html import escape

import pytest

from engine import catalog, reference
from engine.benchmark import plots
from tests.support.fake_engine import FakeWorker, open_tab, served
from tests.support.page import (
    BEYOND_THE_EDGE,
)
from ui import words
from ui.tabs import benchmarks

browser_test = pytest.mark.browser


def benchmark(**changes):
    """What `python -m engine bench` writes, made up."""

    def row(precision, batch_size, execution, seconds, peak):
        latency = {"median": seconds, "p10": 0.99 * seconds, "p90": 1.01 * seconds}
        return {
            "precision": precision,
            "batch_size": batch_size,
            "method": "engine",
            "execution": execution,
            "latency_s": latency | {"text": 0.05, "denoise": seconds - 0.2, "decode": 0.15},
            "step_ms": 1000 * (seconds - 0.2) / 28,
            "repeats": 3,
            "memory_gb": {"weights": 0.8 * peak, "peak_allocated": peak, "peak_reserved": 1.1 * peak},
            "first_call_s": 21.5,
            "error": None,
        }

    return {
        "device": "Fake H200",
        "versions": {"torch": "2.11.0"},
        "date": "2026-11-22T10:00:00+00:00",
        "model": "flux.1-dev",
        "weights": "random",
        "settings": {
            "height": 1024,
            "width": 1024,
            "num_frames": 1,
            "num_inference_steps": 28,
            "guidance_scale": 3.5,
            "recipe": "seed",
            "repeats": 5,
        },
        "rows": [
            row("bf16", 1, "native", 4.0, 39.0),
            row("fp8", 1, "native", 3.2, 27.3),
            row("nvfp4", 1, "emulated", 31.7, 21.3),
            row("bf16", 4, "native", 15.0, 44.0),
            row("fp8", 4, "native", 12.0, 33.0),
        ],
    } | changes


def rows_of(html, heading):
    """The text of a table's rows, cell by cell, in the article with that heading."""
    article = html.split(f">{heading}</h3>")[1].split("</article>")[0]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", article)]
    return [[re.sub("<[^>]+>", "", cell) for cell in row] for row in cells]


def test_a_measurement_is_set_against_bf16_of_its_own_file(tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(benchmark()))
    post = reference.read()
    html = benchmarks.measured(tmp_path, post)
    for part in ("Fake H200", "22 Nov 2026", "random weights", "torch 2.11.0", "1024 × 1024 · 28 steps · guidance 3.5"):
        assert part in html
    rows = rows_of(html, "FLUX.1-dev")
    assert " ".join(rows[2]) == "1 FP8 0.05 3.00 0.15 3.20 3.17–3.23 1.25× 107 21.84 27.30 −30% 21.5"
    assert rows[3] == ["1", "NVFP4", words.NOT_COMPARABLE, "17.04", "–", "–", "–"]
    assert "31.7" not in html
    assert ["1", "39.00", "38.34", "+1.7%"] in rows
    assert ["4", "44.00", "44.39", "−0.9%"] in rows
    assert html.count("<svg") == 2
    assert "quoted" not in html


@pytest.mark.parametrize("key", ["stopped", "note"])
def test_what_limits_a_measurement_is_said_beside_it(tmp_path, key):
    (tmp_path / "h200.json").write_text(json.dumps(benchmark(**{key: "after 90 s <b>"})))
    assert "after 90 s &lt;b&gt;" in benchmarks.measured(tmp_path, reference.read())


def test_what_was_not_measured_is_not_filled_in(tmp_path):
    made = benchmark()
    bf16, fp8, *_ = made["rows"]
    fp8 |= {"latency_s": None, "step_ms": None, "first_call_s": None, "error": "OutOfMemoryError: <no> room"}
    fp8["memory_gb"]["peak_allocated"] = None
    bare = bf16 | {"method": "bare", "latency_s": bf16["latency_s"] | dict.fromkeys(("text", "denoise", "decode"))}
    (tmp_path / "h200.json").write_text(json.dumps(made | {"rows": [bf16, fp8, bare | {"step_ms": None}]}))
    rows = rows_of(benchmarks.measured(tmp_path, reference.read()), "FLUX.1-dev")
    assert " ".join(rows[3]) == "bf16 bare pipeline – – – 4.00 3.96–4.04 – – 31.20 39.00 – 21.5"
    assert rows[2][2:] == ["OutOfMemoryError: &lt;no&gt; room", "21.84", "–", "–", "–"]


def test_the_engines_step_is_set_against_the_posts_method_at_the_same_precision(tmp_path):
    made = benchmark()
    bf16, fp8, *_ = made["rows"]
    posts = [row | {"method": "post", "step_ms": 1.25 * row["step_ms"]} for row in (bf16, fp8)]
    posts += [row | {"method": "post-default", "step_ms": 1.5 * row["step_ms"]} for row in (bf16, fp8)]
    (tmp_path / "h200.json").write_text(json.dumps(made | {"rows": [bf16, fp8, *posts]}))
    html = benchmarks.measured(tmp_path, reference.read())
    heads, *rows = rows_of(html, "FLUX.1-dev")[:7]
    for head, factor in (("vs the post's", "1.25×"), ("vs default mode", "1.50×")):
        column = next(k for k, text in enumerate(heads) if text.startswith(head))
        assert [row[column] for row in rows] == [factor, factor, "–", "–", "–", "–"]
    named = ["Twinframe", "the post&#x27;s", "default mode"]
    assert [row[1] for row in rows] == [name for name in named for _ in range(2)]
    assert escape(plots.POSTS_FP8) in html


@pytest.mark.parametrize(("batch_size", "head"), [(1, "vs default mode"), (4, "vs the post's")])
def test_an_older_files_one_method_of_the_post_is_shown_for_what_it_was(tmp_path, batch_size, head):
    """It compiled with the default mode everywhere, which at batch 1 of FLUX.1-dev is not what the post does."""
    made = benchmark()
    engine = next(row for row in made["rows"] if row["batch_size"] == batch_size)
    (tmp_path / "h200.json").write_text(json.dumps(made | {"rows": [engine, engine | {"method": "seed"}]}))
    heads, first, _ = rows_of(benchmarks.measured(tmp_path, reference.read()), "FLUX.1-dev")[:3]
    shown = [text for text in heads if text.startswith(("vs the post's", "vs default mode"))]
    assert [text.startswith(head) for text in shown] == [True]
    assert first[heads.index(shown[0])] == "1.00×"


def test_beside_the_posts_figures_stands_what_sets_them_apart():
    html = benchmarks.quoted(reference.read())
    assert "PIL" in html and "104 of the 200 prompts" in html


def test_the_runs_of_a_model_stand_below_its_name_each_with_a_name_of_its_own(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(benchmark()))
    html = benchmarks.measured(tmp_path, reference.read())
    assert re.findall("<h3[^>]*>(.*?)</h3>", html) == ["FLUX.1-dev"]
    assert len(re.findall("<h4>Run [12]: ", html)) == 2
    regions = re.findall('role="region" aria-label="([^"]*)"', html)
    assert len(regions) == len(set(regions)) == 4


def test_a_models_newest_run_comes_first(tmp_path):
    for name, day in (("a", 20), ("b", 22), ("c", 21)):
        made = benchmark(date=f"2026-11-{day}T10:00:00+00:00", device=f"GPU of the {day}th")
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    html = benchmarks.measured(tmp_path, reference.read())
    assert re.findall(r"<h4>Run (\d)", html) == ["1", "2", "3"]
    assert re.findall(r"GPU of the (\d+)th", html) == ["22", "21", "20"]


def test_rows_that_were_not_measured_equally_often_say_so(tmp_path):
    made = benchmark()
    for row, repeats in zip(made["rows"], (3, 2, 3, 3), strict=False):
        row["repeats"] = repeats
    (tmp_path / "a.json").write_text(json.dumps(made))
    assert "median of 2 to 3" in benchmarks.measured(tmp_path, reference.read())


def test_a_file_that_is_no_benchmark_is_named_and_the_others_are_shown(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [')
    (tmp_path / "b.json").write_text(json.dumps({"rows": [1]}))
    (tmp_path / "c.json").write_text(json.dumps(benchmark(device="<b>device</b>")))
    html = benchmarks.measured(tmp_path, reference.read())
    assert words.benchmarks.unreadable("a.json") in html
    assert words.benchmarks.unreadable("b.json") in html
    assert "&lt;b&gt;device" in html
    assert "<b>" not in html


def test_every_figure_of_the_post_is_quoted_and_every_table_says_so():
    post = reference.read()
    html = benchmarks.quoted(post)
    for model in {row["model"] for row in post["performance"]}:
        found = rows_of(html, catalog.MODELS[model].name)[2:]
        for row in post["performance"]:
            if row["model"] == model:
                line = next(cells for cells in found if cells[0] == words.NAMES[row["precision"]])
                speedup = "–" if row["precision"] == "bf16" else f"{row['speedup']:.2f}×"
                cells = [f"{row['latency_s']:.2f}", speedup, f"{row['peak_memory_gb']:.2f}"]
                assert line[1 + 3 * [1, 4, 8].index(row["batch_size"]) :][:3] == cells
    assert ["FLUX.1-dev", "0.11", "0.44"] in rows_of(html, words.benchmarks.QUOTED_LPIPS)
    assert ["NVFP4", "full", "0.480", "2.11", "21.25"] in rows_of(html, words.benchmarks.QUOTED_SELECTIVE)
    assert html.count("<table") == html.count(words.QUOTED_BADGE) == 5


@browser_test
def test_the_benchmarks_tab_keeps_quoted_and_measured_apart(visit, tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(benchmark()))
    with served(FakeWorker(), measured=tmp_path) as url:
        page = visit(url, width=390, height=844)
        open_tab(page, words.BENCHMARKS)
        page.wait_for_selector(".tf-half")
        measured, quoted = page.locator(".tf-half").all()
        assert "Fake H200" in measured.inner_text()
        assert words.MEASURED_BADGE in measured.inner_text()
        assert words.QUOTED_BADGE not in measured.inner_text()
        assert words.QUOTED_BADGE in quoted.inner_text()
        assert "38.34" in quoted.inner_text()
        assert "Fake H200" not in quoted.inner_text()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(BEYOND_THE_EDGE) == []


@browser_test
def test_without_measurements_the_tab_says_how_to_make_one(visit, quick):
    page = visit(quick[0])
    page.get_by_role("tab", name=words.BENCHMARKS).click()
    assert "python -m engine bench --model" in page.inner_text(".tf-half >> nth=0")
