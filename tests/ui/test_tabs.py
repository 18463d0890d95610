"""The Recipe, Quality and How-it-works tabs: what a person sees of plans and measurements that are made up."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from urllib.parse import parse_qsl

import pytest

from engine import catalog, reference
from engine.errors import RequestError
from engine.formats import PRECISIONS, QUANTIZED
from engine.request import CompareRequest
from tests.support.fake_engine import RULER, FakeWorker, open_tab, plan, record, served, until
from tests.support.page import BEYOND_THE_EDGE
from ui import link, words
from ui import view as views
from ui.html import cards
from ui.html.scatter import ROOM, Point, plot, ticks
from ui.tabs import how, quality, recipe

browser_test = pytest.mark.browser
PROMPT = "a rocket on a blue background"


def row(label, weight_bytes, mean, precision="nvfp4", half="report", **changes):
    """A recipe as assets/quality/ has it."""
    score = {"n": 3, "mean": mean, "low": 0.9 * mean, "high": 1.1 * mean, "median": mean}
    return {
        "id": label,
        "recipe": None,
        "label": label,
        "precision": precision,
        "parts": [],
        "weight_bytes": weight_bytes,
        "lpips": {"search": None, "report": None} | {half: score},
        "offered": False,
    } | changes


def measured(**changes):
    """assets/quality/mini-flux.json, made up."""
    offered = {"recipe": "post", "offered": True, "gemm_time_of_bf16": 0.3}
    each = {"each": {"search": [], "report": [0.01, 0.05, 0.09]}}
    return {
        "format": 1,
        "model": "mini-flux",
        "device": "Fake <H100>",
        "versions": {"torch": "2.11.0"},
        "date": "2026-11-23T03:00:00+00:00",
        "settings": {"seed": 7, "num_inference_steps": 20, "guidance_scale": 1.0, "height": 256, "width": 256},
        "prompts": {"source": "fixed", "search": ["a", "b"], "report": ["c", "d", "e"]},
        "sensitivity": {
            "precision": "nvfp4",
            "measure": "as the engine calls it",
            "lpips_prompts": 0,
            "roles": ["q", "out"],
            "role_names": {"q": "attention q"},
            "depths": ["double 0", "double 1"],
            "cells": [
                {"role": "q", "depth": "double 0", "layers": 2, "bytes_saved": 4e5, "drift": 0.02, "lpips": None},
                {"role": "q", "depth": "double 1", "layers": 1, "bytes_saved": 2e5, "drift": 0.08, "lpips": None},
                {"role": "out", "depth": "double 0", "layers": 1, "bytes_saved": 2e5, "drift": 0.04, "lpips": None},
            ],
        },
        "frontier": [
            row("post", 13_200_000, 0.058, **offered, **each),
            row("three <groups> in bf16", 14_000_000, 0.031, half="search"),
            row("tried", 15_000_000, 0.02, half="search", parts=["low rank 16"]),
            row("not yet scored", 16_000_000, 0.0, lpips={"search": None, "report": None}),
        ],
        "remedies": [
            {
                "name": "low rank",
                "what": "A bf16 branch.",
                "alone": row("low rank", 13_900_000, 0.041),
                "added_bytes_percent": 5.2,
                "added_flops_percent": 2.1,
                "basis": "derived",
            },
            {"name": "scales", "alone": row("scales", 1, 0.0, lpips={"search": None}), "basis": "derived"},
        ],
        "ablation": [row("full", 12_000_000, 0.071, recipe="full", **each)],
        "worst": [{"prompt": "a “drum” & bass", "seed": 11, "precision": "nvfp4", "recipe": "full", "lpips": 0.31}],
    } | changes


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    (folder / "mini-flux.json").write_text(json.dumps(measured()))
    return folder


@pytest.fixture(scope="module")
def app(scored, tmp_path_factory):
    recorded = tmp_path_factory.mktemp("recorded")
    record(recorded / "rocket", PROMPT)
    with served(FakeWorker(), recorded, models=("mini-flux", "ltx-2"), scored=scored) as url:
        yield url


def opened(visit, url, tab, **options):
    page = visit(url, **options)
    open_tab(page, tab)
    return page


def shown(page):
    return page.locator("#tf-layers tbody tr:visible")


# Recipe


@browser_test
def test_the_recipe_tab_shows_what_compare_has_chosen_and_any_other_model(visit, app):
    page = visit(app)
    page.click("#tf-model input")
    page.get_by_role("option", name="LTX-2", exact=True).click()
    open_tab(page, words.RECIPE)
    verdict = page.locator("#tf-plan .tf-verdict")
    assert until(lambda: "6 of the 7 Linear layers of LTX-2 are quantized" in verdict.inner_text())
    page.get_by_label(words.RECIPES["full"], exact=True).last.check()
    assert until(lambda: "7 of the 7" in verdict.inner_text())
    assert page.locator("#tf-layers [data-kind=kept]").count() == 0
    page.click("#tf-plan-model input")
    page.get_by_role("option", name="Qwen-Image", exact=True).click()
    assert until(lambda: "6 of the 7 Linear layers of Qwen-Image" in verdict.inner_text())
    assert words.recipe.unmatched(["txt_mlp"]) in page.inner_text("#tf-plan")
    open_tab(page, words.COMPARE)
    open_tab(page, words.RECIPE)
    page.wait_for_timeout(300)
    assert "Qwen-Image" in verdict.inner_text(), "a choice that was made here is kept"


@browser_test
def test_layers_are_filtered_by_word_name_and_kind_and_added_up(visit, app):
    page = opened(visit, app, words.RECIPE)
    said = page.locator("#tf-filter [role=status]")
    assert until(lambda: said.inner_text().startswith("7 of 7 layers"))
    page.get_by_label(words.recipe.FILTER).fill("blocks TO_Q")
    assert until(lambda: shown(page).count() == 3)
    assert said.inner_text() == "3 of 7 layers · 0.61 → 0.17 MB"
    page.get_by_label(words.recipe.FILTER).fill("blocks.1.*")
    assert shown(page).locator("th").all_inner_texts() == ["blocks.1.attn.to_q", "blocks.1.ff.net.0.proj"]
    page.get_by_label(words.recipe.SHOWN).select_option("kept")
    assert said.inner_text() == words.recipe.FILTERED_NONE
    page.get_by_label(words.recipe.FILTER).fill("")
    assert shown(page).locator("td").last.inner_text() == "Its name contains embed."
    page.get_by_label(words.recipe.SHOWN).select_option("all")
    page.get_by_role("button", name="ff.net.0.proj").press("Enter")
    assert page.input_value("#tf-filter input") == "blocks.*.ff.net.0.proj"
    assert shown(page).count() == 3
    page.locator("#tf-plan-precision").get_by_label("MXFP8").check()
    assert until(lambda: "MXFP8" in shown(page).first.inner_text()), "the filter stays"
    assert shown(page).count() == 3


@browser_test
def test_a_thousand_layers_scroll_in_their_own_frame(visit):
    worker = FakeWorker()
    worker.plan = lambda *asked: plan(*asked, blocks=685)
    with served(worker) as url:
        page = opened(visit, url, words.RECIPE)
        assert until(lambda: page.inner_text("#tf-filter [role=status]").startswith("1371 of 1371"))
        frame = page.get_by_role("region", name=words.recipe.LAYERS)
        assert frame.evaluate("(e) => e.scrollHeight > 5 * e.clientHeight")
        frame.evaluate("(e) => { e.scrollTop = 9000 }")
        head = frame.locator("thead th").first
        assert head.bounding_box()["y"] == pytest.approx(frame.bounding_box()["y"], abs=1), "the head stays in sight"
        page.get_by_label(words.recipe.FILTER).fill("blocks.684.*")
        assert shown(page).count() == 2


@browser_test
def test_what_the_engine_refuses_is_one_sentence(visit):
    worker = FakeWorker()

    def refuse(*_):
        raise RequestError("There is no such recipe: choose seed.")

    worker.plan = refuse
    with served(worker) as url:
        page = opened(visit, url, words.RECIPE)
        assert until(lambda: page.inner_text("#tf-plan") == "There is no such recipe: choose seed.")
        open_tab(page, words.HOW)
        assert until(lambda: page.inner_text("#tf-how") == "There is no such recipe: choose seed.")


def test_reasons_add_up_to_the_whole_and_names_are_only_text():
    made = plan("mini-flux", "nvfp4", "post")
    made["layers"][0] |= {"name": "<b>x</b>", "reason": "<i>why</i>"}
    html = recipe.summary(made, "What it takes.", "") + recipe.layers(made["layers"])
    reasons = html.split(f'aria-label="{words.recipe.REASONS}"')[1].split("</table>")[0]
    counts = [int(cells[0]) for cells in (re.findall(r"<td>([\d,.]+)</td>", r) for r in reasons.split("<tr")) if cells]
    assert counts[-1] == sum(counts[:-1]) == made["linears"]
    assert "<b>" not in html and "<i>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html


def test_a_strip_shows_where_in_depth_a_role_is_quantized():
    made = plan("mini-flux", "nvfp4", "post", blocks=4)
    made["layers"][-1]["precision"] = "bf16"  # the last block's ff
    html = recipe.summary(made, "", "")
    assert words.recipe.run("ff.net.0.proj", 0, 2, "nvfp4") in html
    assert words.recipe.run("ff.net.0.proj", 3, 3, "bf16") in html


@pytest.mark.parametrize("model", catalog.MODELS)
def test_the_layers_of_a_real_plan_explain_its_bytes(model):
    from engine.quantization.inspection import inspect

    found = inspect(model, "nvfp4")
    saved = sum(layer["bytes"]["bf16"] - layer["bytes"]["stored"] for layer in found["layers"])
    assert saved == found["bytes"]["bf16"] - found["bytes"]["quantized"] > 0
    for layer in found["layers"]:
        assert (
            layer["quantized"] == (layer["precision"] != "bf16") == (layer["bytes"]["stored"] < layer["bytes"]["bf16"])
        )


# Quality


@browser_test
def test_the_quality_tab_has_every_format_of_every_miniature():
    html = quality.page(catalog.ASSETS / "quality", list(catalog.BUNDLED))
    for spec in (catalog.MODELS[model] for model in catalog.BUNDLED):
        answer = re.search(f"<li>{spec.name}: (.*?)</li>", html)[1]
        assert all(f"{words.NAMES[name]} by the post's recipe is at LPIPS" in unescape(answer) for name in QUANTIZED)
        assert f'aria-label="{words.quality.FORMATS}: {spec.name}, formats and remedies"' in html


def test_the_quality_tab_draws_what_was_measured(visit, app):
    page = opened(visit, app, words.QUALITY)
    tab = page.locator("#tf-quality")
    said = "Fake <H100> · 23 Nov 2026 · 256 × 256 · 20 steps · guidance 1"
    assert until(lambda: said in tab.inner_text()), "it is drawn when it is opened"
    assert words.MEASURED_BADGE in tab.inner_text()
    plots = tab.locator(".tf-scatter")
    assert plots.count() == 2
    assert plots.first.locator("circle").count() == 3
    assert plots.first.locator("[data-named] text").all_text_contents() == [words.quality.SHORT["post"]]
    assert "derived from FLOPs, not measured" in plots.last.inner_text()
    tab.get_by_text(words.quality.every_point(3)).click()
    frontier = tab.get_by_role("region", name=words.quality.SCORES).first.inner_text()
    assert "0.058" in frontier and "0.052–0.064" in frontier and "3 held out" in frontier
    assert "tried + low rank 16" in frontier
    remedies = tab.get_by_role("region", name=words.quality.REMEDIES).locator("tbody tr")
    assert "0.041\t0.037–0.045\t+5.2%" in remedies.first.inner_text()
    assert remedies.last.inner_text().split("\t") == ["scales", "–", "–", "–", "–", "–", "derived"]
    assert tab.locator(".tf-dots").count() == 2
    assert tab.locator(".tf-each").first.get_attribute("d").count("M") == 3
    tab.get_by_role("button", name="95%").first.click()
    assert page.inner_text("#tf-note") == words.WHY["interval"]
    plots.first.locator("circle").last.click()
    assert page.inner_text("#tf-note") == f"{words.RECIPES['post']}, NVFP4: LPIPS 0.058, 95% 0.052–0.064, 3 held out"


@browser_test
def test_a_worst_pair_opens_in_compare(visit, app):
    page = opened(visit, app, words.QUALITY)
    page.get_by_role("link", name="a “drum” & bass").click()
    page.wait_for_selector("#tf-seed input")
    assert until(lambda: page.input_value("#tf-prompt textarea") == "a “drum” & bass")
    assert page.input_value("#tf-seed input") == "11"
    asked = CompareRequest.create(
        "a “drum” & bass", model="mini-flux", precisions=["nvfp4"], recipe="full", seed=11, guidance_scale=1.0
    )
    address = page.evaluate("location.search")
    assert link.read(dict(parse_qsl(address[1:])), ["mini-flux"]) == asked


@browser_test
def test_sensitivity_is_a_map_of_role_and_depth_in_the_recipe_tab(visit, app):
    page = opened(visit, app, words.RECIPE)
    heat = page.get_by_role("region", name=words.recipe.MEASURES["drift"][0])
    heat.wait_for()
    cells = heat.locator("tbody tr").first.locator("th, td")
    assert cells.all_inner_texts() == ["attention q", "2.00", "8.00"]
    red = cells.nth(1).evaluate("(e) => getComputedStyle(e).backgroundColor")
    assert red != cells.nth(2).evaluate("(e) => getComputedStyle(e).backgroundColor")
    assert heat.locator("tbody tr").last.locator("td").all_inner_texts() == ["4.00", ""]
    assert page.get_by_role("region", name=words.recipe.MEASURES["lpips"][0]).count() == 0, "nothing was measured of it"


@pytest.mark.parametrize(("low", "high"), [(0, 0.08), (0.0, 1.0), (11.3, 23.1), (-3, 3), (1e-5, 9e-5), (0, 41_000)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 4 <= len(found) <= 11
    assert low <= found[0] < found[-1] <= high
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125"
    assert all(abs(tick / step - round(tick / step)) < 1e-3 for tick in found)


def test_words_read_back_stand_beside_lpips_where_a_prompt_asks_for_them(tmp_path):
    made = record(tmp_path, precisions=["nvfp4"])
    for share, shown in ((None, False), (0.5, True)):
        results = [replace(g, scores={} if share is None else {"words_read": (share,)}) for g in made.results]
        view = views.of(replace(made, results=tuple(results)), tmp_path, recorded=False)
        for drawn in (cards.table(view), cards.pairs(view)):
            text = unescape(re.sub("<[^>]+>", " ", drawn))
            assert ("Words read" in text) is shown and (" 50" in text) is shown, text


def test_a_pair_that_is_not_offered_is_no_link(tmp_path):
    (tmp_path / "mini-flux.json").write_text(json.dumps(measured()))
    assert "<a " in quality.page(tmp_path, ["mini-flux"])
    assert "<a " not in quality.page(tmp_path, ["flux.1-dev"])


def test_parts_that_were_not_measured_are_left_out(tmp_path):
    absent = dict.fromkeys(("sensitivity", "frontier", "remedies", "ablation", "worst"))
    (tmp_path / "mini-flux.json").write_text(json.dumps(measured(**absent)))
    html = quality.page(tmp_path, ["mini-flux"])
    assert "Fake &lt;H100&gt;" in html and words.quality.SENSITIVITY_ELSEWHERE not in html
    assert "<table" not in html and "<svg" not in html
    assert quality.sensitivity(tmp_path, "mini-flux") == ""


def test_a_damaged_file_is_named_and_the_others_are_shown(tmp_path):
    (tmp_path / "bad.json").write_text('{"model": ')
    (tmp_path / "odd.json").write_text(json.dumps(measured(frontier=[{"label": 1}])))
    (tmp_path / "mini-flux.json").write_text(json.dumps(measured()))
    html = quality.page(tmp_path, ["mini-flux"])
    assert words.quality.no_measurements("bad.json") in html
    assert words.quality.no_measurements("odd.json") in html
    assert html.count("<h2>") == 1
    assert "three &lt;groups&gt; in bf16" in html
    assert quality.sensitivity(tmp_path, "bad") == quality.sensitivity(tmp_path, "none") == ""
    (tmp_path / "odd.json").write_text(json.dumps(measured(sensitivity={"cells": [1]})))
    assert quality.sensitivity(tmp_path, "odd") == ""


def test_an_evaluation_is_drawn_as_well(tmp_path):
    score = {"n": 2, "mean": 0.05, "low": 0.04, "high": 0.06, "median": 0.05}
    lane = {"precision": "nvfp4", "recipe": "full", "lpips": score, "memory_gb": {"transformer": 0.012}}
    lane["temporal_lpips"] = score | {"mean": 0.0321}  # clips have it
    worst = [{"prompt": "a cat", "lpips": 0.07}, {"prompt": "a dog", "lpips": 0.03}]
    summary = measured() | {
        "created": "2026-11-23T03:00:00+00:00",
        "prompts": {"source": "drawbench", "count": 2},
        "ruler": {"floor": {"lpips": score | {"mean": 0.001}}, "ceiling": {"lpips": score | {"mean": 0.3}}},
        "results": [lane | {"worst": worst}],
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").write_text(json.dumps(summary))
    table = 'prompt,precision,recipe,lpips\n"a, cat",nvfp4,full,0.07\na dog,nvfp4,full,0.03\n'
    (tmp_path / "mine" / "scores.csv").write_text(table)
    html = quality.page(tmp_path, ["mini-flux"])
    assert words.quality.FLICKER in html and "0.032" in html
    assert words.quality.ABLATION in html and words.quality.FRONTIER not in html
    assert "12.0" in html and words.quality.spread([0.07, 0.03]) in html
    assert html.index("a cat") < html.index("a dog")
    assert "2 prompts" in html


def test_without_measurements_the_quality_tab_says_how_to_make_some(tmp_path):
    assert words.quality.EVALUATE_COMMAND in quality.page(tmp_path / "nowhere", ["mini-flux"])


# How it works, and the verdict


@browser_test
def test_how_it_works_has_the_figures_of_what_is_on_the_screen(visit, app):
    page = opened(visit, app, words.HOW)
    tab = page.locator("#tf-how")
    assert until(lambda: "FLUX miniature" in tab.inner_text())
    made = plan("mini-flux", "nvfp4", "post")
    largest = made["layers"][2]
    assert words.how.largest(largest["name"], largest["in"], largest["out"], "FLUX miniature") in tab.inner_text()
    assert words.how.bits(largest["bytes"]["stored"], largest["in"] * largest["out"]) in tab.inner_text()
    assert words.how.selected(made, "FLUX miniature", 1, "Its name contains embed.") in tab.inner_text()
    assert f"{words.score(RULER.ceiling)} {words.how.OTHER_SEED}" in tab.inner_text()
    names = [picture.get_attribute("aria-label") for picture in tab.get_by_role("img").all()]
    assert len(names) == 5 + len(PRECISIONS) and all(names)


def test_an_area_is_a_number_of_bits():
    wanted = {"bf16": 32 * 16, "fp8": 32 * 8 + 32, "mxfp8": 32 * 8 + 8, "nvfp4": 32 * 4 + 2 * 8 + 32}
    for precision, bits in wanted.items():
        boxes = re.findall(r'width="([\d.]+)" height="([\d.]+)"', how._block(precision))
        assert sum(float(width) * float(height) for width, height in boxes) == pytest.approx(18 * bits)


def test_without_a_comparison_how_it_works_has_the_model_alone():
    html = how.page(views.View(), {p: plan("mini-flux", p, "full") for p in ("bf16", "fp8", "mxfp8", "nvfp4")})
    assert words.how.HOW_NO_RULER in html
    assert words.how.selected(plan("mini-flux", "nvfp4", "full"), "FLUX miniature", 0, "") in html


def test_a_verdict_marks_how_far_each_precision_is(tmp_path):
    comparison = record(tmp_path, PROMPT)
    html = cards.headline(views.of(comparison, tmp_path, recorded=True))
    marked = re.findall(r'--way:([\d.]+)%"[^>]*>(\w+)', html)
    assert [(round(float(part)), name) for part, name in marked] == [(2, "MXFP8"), (17, "NVFP4")]
    assert re.sub("<[^>]+>", "", html).startswith(cards.escape(words.verdict.verdict(comparison)))


@pytest.mark.parametrize("lost", [(0,), (0, 1)])
def test_a_clip_without_a_score_says_so_and_draws_no_curve(tmp_path, lost):
    made = record(tmp_path, PROMPT, model="ltx-2", precisions=["nvfp4"], num_frames=9, batch_size=2)
    bf16, other = made.results

    def without(values):
        return tuple(None if index in lost else value for index, value in enumerate(values))

    scores = {name: without(getattr(other.metrics, name)) for name in ("lpips", "psnr_db", "lpips_frames")}
    other = replace(other, metrics=replace(other.metrics, **scores), lpips_maps=without(other.lpips_maps))
    view = views.of(replace(made, results=(bf16, other)), tmp_path, recorded=False)
    said = "no score: values are not numbers" if len(lost) == 2 else "1 of 2 has no score: values are not numbers"
    for drawn in (cards.headline(view), cards.stage(view), cards.pairs(view), cards.table(view)):
        assert said in drawn or said.capitalize() in drawn
    assert cards.stage(view).count("<polyline") == 2 - len(lost)
    assert cards.pairs(view).count("data-top=") == 2 - len(lost)
    explained = how.page(view, {p: plan("mini-flux", p, "full") for p in ("bf16", "nvfp4")})
    assert (words.how.HOW_NO_RULER in explained) is (len(lost) == 2)


def test_the_post_is_quoted_where_the_same_call_is_only_emulated(tmp_path):
    made = record(tmp_path, PROMPT, precisions=["fp8", "nvfp4"])
    asked = CompareRequest.create(PROMPT, model="flux.1-dev", precisions=["fp8", "nvfp4"], batch_size=4)

    def headline(request):
        return cards.headline(views.of(replace(made, request=request), tmp_path, recorded=False))

    post = {(r["model"], r["precision"], r["batch_size"]): r for r in reference.read()["performance"]}
    row = post["flux.1-dev", "nvfp4", 4]
    saving = 1 - row["peak_memory_gb"] / post["flux.1-dev", "bf16", 4]["peak_memory_gb"]
    assert f"{words.verdict.QUOTED_HERE} {words.verdict.quoted('NVFP4', row['speedup'], saving)}." in headline(asked)
    assert words.QUOTED_BADGE in headline(asked)
    for change in ({"batch_size": 2}, {"num_inference_steps": 20}, {"recipe": "full"}, {"model": "mini-flux"}):
        assert words.QUOTED_BADGE not in headline(replace(asked, **change))
    native = record(tmp_path, PROMPT, precisions=["fp8"])
    view = views.of(replace(native, request=asked), tmp_path, recorded=False)
    assert words.QUOTED_BADGE not in cards.headline(view)


# Any screen


@browser_test
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (768, "light")])
def test_the_tabs_fit_a_narrow_screen(visit, app, width, scheme):
    page = visit(app, width=width, height=844, color_scheme=scheme)
    for tab, part in ((words.RECIPE, "#tf-layers tbody tr"), (words.QUALITY, ".tf-dots"), (words.HOW, ".tf-bytes")):
        open_tab(page, tab)
        page.wait_for_selector(part)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        assert page.evaluate(BEYOND_THE_EDGE) == [], tab


def test_names_in_a_plot_are_never_on_top_of_each_other():
    def point(x, y, name):
        return Point(x=x, y=y, low=None, high=None, precision="mxfp8", said=name, name=name)

    drawn = plot(
        "a plot", [point(1, 1.0, "first"), point(9, 0.05, "low"), point(10, 0.04, "lower"), point(9, 0.5, "far")]
    )
    at = {
        name: float(y)
        for y, name in re.findall(r'<text class="tf-(?:left|right)" x="[^"]+" y="([^%]+)%"[^>]*>(\w+)<', drawn)
    }
    assert at["lower"] - at["low"] == pytest.approx(100 * ROOM, abs=0.02)
    assert at["far"] == pytest.approx(100 - 100 * 0.5 / 1.08, abs=0.01)
