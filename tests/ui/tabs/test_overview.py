"""Answers before tables: a sentence a model, one chart with each source named, filters, and columns that sort."""

import json
import re

import pytest

from engine import catalog, reference
from engine.benchmark import overview
from tests.support.fake_engine import FakeWorker, open_tab, served, until
from tests.ui.tabs.test_benchmarks import benchmark
from ui import words
from ui.tabs import benchmarks, quality

BENCHMARKS = catalog.ASSETS / "benchmarks"
QUALITY = catalog.ASSETS / "quality"


def lane(name, precision, method, step, batch=1):
    made = benchmark()["rows"][0]
    took = {"median": step / 10, "p10": step / 10, "p90": step / 10, "text": 0, "denoise": step / 10, "decode": 0}
    return made | {
        "precision": precision,
        "method": method,
        "step_ms": step,
        "latency_s": took,
        "batch_size": batch,
        "note": name,
    }


def answer(*results):
    found = overview.figures(results, reference.read())
    some = [figure for figure in found if (figure.model, figure.batch_size) == ("flux.1-dev", 1)]
    return words.benchmarks.answer("FLUX.1-dev", some)


POSTS = "on a B200 the post reports MXFP8 1.21× and NVFP4 1.50× bf16"


def test_an_answer_is_computed_from_the_newest_run_that_has_both_rows():
    old = benchmark(date="2026-11-20", rows=[lane("old", "bf16", "engine", 150), lane("old", "fp8", "engine", 100)])
    new = benchmark(date="2026-11-22", rows=[lane("new", "fp8", "engine", 80), lane("new", "fp8", "post", 120)])
    assert answer(old) == f"FLUX.1-dev, FP8, Fake H200: 1.50× bf16; {POSTS}."
    assert answer(old, new) == f"FLUX.1-dev, FP8, Fake H200: 1.50× the post's compile, 1.50× bf16; {POSTS}."
    newest = benchmark(date="2026-11-23", rows=[lane("x", "bf16", "engine", 160), lane("x", "fp8", "engine", 80)])
    assert answer(newest, old, new) == f"FLUX.1-dev, FP8, Fake H200: 1.50× the post's compile, 2.00× bf16; {POSTS}."


def test_the_posts_compile_is_its_faster_mode():
    rows = [lane("x", "fp8", "engine", 80), lane("x", "fp8", "post", 120), lane("x", "fp8", "post-default", 100)]
    assert answer(benchmark(rows=rows)) == f"FLUX.1-dev, FP8, Fake H200: 1.25× the post's compile; {POSTS}."


def test_an_emulated_format_has_no_answer():
    row = lane("x", "nvfp4", "engine", 10) | {"execution": "emulated"}
    assert "NVFP4, Fake" not in answer(benchmark(rows=[lane("x", "bf16", "engine", 100), row]))


def test_without_measurements_the_post_is_quoted_and_nothing_else():
    assert answer() == f"FLUX.1-dev, {POSTS}; nothing of it was measured here."


def test_the_answers_that_come_with_the_project_are_those_of_its_files():
    html = benchmarks.page(BENCHMARKS)
    ratios = {}
    for found in (found for file in BENCHMARKS.glob("*.json") for found in benchmarks.methods.read_all(file)):
        if found["settings"]["width"] < 768:
            continue  # a sentence is of the largest size
        own = [r for r in found["rows"] if r["batch_size"] == 1]
        steps = {(r["precision"], r["method"]): r["step_ms"] for r in own}
        if posts := [r["step_ms"] for r in own if r["precision"] == "fp8" and r["method"].startswith("post")]:
            steps["fp8", "post"] = min(posts)
        for precision, method in (("bf16", "engine"), ("fp8", "post")):
            if ("fp8", "engine") in steps and (precision, method) in steps:
                key = (found["model"], method)
                value = steps[precision, method] / steps["fp8", "engine"]
                ratios[key] = max(ratios.get(key, ("", 0)), (found["date"], value))
    assert {model for model, _ in ratios} >= {"flux.1-dev", "qwen-image", "ltx-2", "flux.2-klein-4b", "z-image-turbo"}
    for (model, method), (_, value) in ratios.items():
        line = html.split(f"<li>{catalog.KINDS[model].name}, ")[1].split("</li>")[0]
        assert f"{words.factor(value)} {'bf16' if method == 'engine' else 'the post'}" in line


def test_every_bar_says_whether_it_was_measured_or_quoted():
    html = benchmarks.page(BENCHMARKS)
    chart = html.split('<div class="tf-lengths">')[1].split("</section>")[0]
    bars = [bar.split("</li>")[0] for bar in chart.split("<li ")[1:]]
    assert len(bars) == sum(1 for f in overview.figures(benchmarks._read(BENCHMARKS)[0], reference.read()) if f.speedup)
    for bar in bars:
        quoted = "data-quoted" in bar
        assert (words.QUOTED_BADGE in bar, words.MEASURED_BADGE in bar) == (quoted, not quoted)
        assert ("B200" in bar) == quoted


def test_filters_leave_only_what_passes():
    chosen = {"model": "ltx-2", "device": "NVIDIA H200", "precision": "fp8", "batch": "8"}
    html = benchmarks.page(BENCHMARKS, chosen)
    body = html.split(f'aria-label="{words.benchmarks.FIGURES}"')[1].split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr>") == 1 and "LTX-2" in body and "1.51×" in body
    assert re.findall("<h3[^>]*>(.*?)</h3>", html)[:2] == ["LTX-2, 768×512, batch 8", "LTX-2"]
    assert words.benchmarks.NONE_LEFT in benchmarks.page(BENCHMARKS, {"model": "ltx-2", "batch": "2"})


@pytest.mark.parametrize(
    "html", [benchmarks.page(BENCHMARKS), quality.page(QUALITY, list(catalog.BUNDLED))], ids=["benchmarks", "quality"]
)
def test_no_two_headings_are_called_alike(html):
    found = [re.sub("<[^>]+>", "", heading) for heading in re.findall(r"<h[1-6][^>]*>(.*?)</h[1-6]>", html)]
    assert len(found) > 15
    assert sorted(found) == sorted(set(found))


@pytest.fixture(scope="module")
def app():
    with served(FakeWorker(), measured=BENCHMARKS, scored=QUALITY) as url:
        yield url


@pytest.mark.browser
def test_columns_sort_up_and_down_and_what_has_no_value_comes_last(visit, app):
    page = visit(app)
    open_tab(page, words.BENCHMARKS)
    table = page.get_by_role("region", name=words.benchmarks.FIGURES, exact=True)
    table.wait_for()
    column = [h.split()[0] for h in table.locator("th[scope=col]").all_inner_texts()].index("Each")
    head = table.locator("th[scope=col]").nth(column)

    def values(which=column):
        return page.evaluate(
            """([table, n]) => [...table.tBodies[0].rows].map((row) => row.cells[n].dataset.value)""",
            [table.locator("table").element_handle(), which],
        )

    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(v) for v in values()] == sorted(float(v) for v in values())
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(v) for v in values()] == sorted((float(v) for v in values()), reverse=True)
    post = [h.split("\n")[0] for h in table.locator("th[scope=col]").all_inner_texts()].index("vs the post's")
    for way in ("ascending", "descending"):
        table.locator("th[scope=col]").nth(post).get_by_role("button").click()
        found = values(post)
        known = [v for v in found if v]
        assert found == known + [""] * (len(found) - len(known)) and 0 < len(known) < len(found), way


@pytest.mark.browser
def test_a_filter_redraws_the_answers_the_chart_and_the_table(visit, app):
    page = visit(app)
    open_tab(page, words.BENCHMARKS)
    page.click("#tf-bench-model input")
    page.get_by_role("option", name="Qwen-Image", exact=True).click()
    assert until(lambda: page.locator(".tf-answers li").count() == 1)
    assert page.locator(".tf-answers li").inner_text().startswith("Qwen-Image, FP8, H200: ")
    assert page.locator(".tf-lengths h3").all_inner_texts() == [
        "Qwen-Image, 1024×1024, batch 1",
        "Qwen-Image, 512×512, batch 1",
    ]
    assert page.locator(".tf-older").count() == 1 and not page.locator(".tf-older article").first.is_visible()


def test_quality_says_what_each_model_loses_and_sets_the_posts_beside_it():
    html = quality.page(QUALITY, list(catalog.BUNDLED))
    found = json.loads((QUALITY / "mini-flux.json").read_text())
    by = {(row["precision"], row["recipe"]): row for row in found["frontier"] if row["recipe"]}
    seed, tuned = (by["nvfp4", recipe]["lpips"]["report"]["mean"] for recipe in ("seed", "tuned"))
    line = html.split("<li>FLUX miniature: ")[1].split("</li>")[0]
    assert f"NVFP4 by the post&#x27;s recipe is at LPIPS {words.score(seed)}" in line
    assert f"Tuned brings it to {words.score(tuned)}, {words.change(1 - tuned / seed)}" in line
    searched = json.loads((QUALITY / "mini-flux-frontier.json").read_text())["formats"]
    (rebalanced,) = (row["lpips"]["report"]["mean"] for row in searched if row["recipe"] == "rebalanced")
    assert f"Rebalanced is at {words.score(rebalanced)}, with ±0% bytes" in line
    for model in catalog.BUNDLED:
        section = html.split(f"<h2>{catalog.MODELS[model].name}</h2>")[1].split("</section>")[0]
        assert words.quality.TRANSFER in section
    for model, scores in reference.read()["mean_lpips_drawbench_alex"].items():
        group = html.split(f"<h3>{words.quality.real(catalog.MODELS[model].name)}</h3>")[1].split("</ul>")[0]
        assert group.count("data-quoted") == group.count(words.QUOTED_BADGE) == len(scores) - 1
        assert all(f"{score:.2f}" in group for score in scores.values() if score)
