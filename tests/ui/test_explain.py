"""The page explains itself: what it is for, and each format, recipe and badge where it is pointed at or focused."""

import pytest

from engine import catalog
from engine.columns import Column
from engine.formats import FORMATS, REFERENCE
from engine.outputs import recordings
from tests.support.fake_engine import FakeWorker, record, served, until
from ui import words


def test_every_format_recipe_and_badge_is_explained():
    for spec in catalog.MODELS.values():
        for recipe in spec.recipes:
            assert words.explain.RECIPES[recipe] in words.explain.column(Column("nvfp4", recipe))
    for name, said in words.explain.formats().items():
        assert words.NAMES[name] in said and f"{FORMATS[name].bits}" in said and said.endswith(".")
    assert words.explain.column(Column(REFERENCE, "")) == words.explain.formats()[REFERENCE]
    assert words.explain.purpose().count(". ") == 0


@pytest.mark.browser
def test_the_purpose_stands_above_everything_and_a_stage_has_none(visit, quick):
    page = visit(quick[0])
    purpose, prompt = page.locator("#tf-purpose p"), page.locator("#tf-prompt")
    assert purpose.inner_text() == words.explain.purpose()
    assert purpose.bounding_box()["y"] < prompt.bounding_box()["y"]
    page.keyboard.press("p")
    page.wait_for_selector("body[data-stage]")
    assert not purpose.is_visible()


@pytest.mark.browser
def test_a_chip_is_explained_where_it_is_hovered_or_focused(visit, quick):
    page = visit(quick[0])
    note, tuned = page.locator("#tf-note"), page.locator("#tf-precisions label").filter(has_text="NVFP4 Tuned")
    said = words.explain.column(Column("nvfp4", "tuned"))
    tuned.hover()
    assert until(lambda: tuned.get_attribute("title") == said)
    page.focus("#tf-precisions label:first-of-type input")
    while not tuned.locator("input").evaluate("(input) => input === document.activeElement"):
        page.keyboard.press("Tab")
    assert until(lambda: note.is_visible() and note.inner_text() == said)
    page.keyboard.press("Tab")
    assert until(lambda: not note.is_visible() or note.inner_text() != said)


@pytest.mark.browser
def test_the_chip_of_a_link_with_fp8_attention_says_what_that_is(visit, quick):
    page = visit(f"{quick[0]}/?precisions=fp8%2Bfp8-attention")
    chip = page.locator("#tf-precisions label").filter(has_text="FP8 with FP8 attention · emulated")
    chip.hover()
    assert until(lambda: chip.get_attribute("title") == words.explain.column(Column("fp8", "+fp8-attention")))
    assert words.explain.OPTIONS["+fp8-attention"] in chip.get_attribute("title")


@pytest.mark.browser
def test_names_and_badges_under_a_picture_are_explained_where_they_are_pressed(visit, tmp_path):
    record(tmp_path / "rocket", precisions=["fp8", "nvfp4@tuned"])
    with served(FakeWorker(), tmp_path) as url:
        page = visit(url)
        note = page.locator("#tf-note")
        for name, said in (
            ("NVFP4 Tuned", words.explain.column(Column("nvfp4", "tuned"))),
            ("emulated", words.explain.BADGES["emulated"]),
            ("native", words.explain.BADGES["native"]),
            ("recorded", words.explain.BADGES["recorded"]),
        ):
            button = page.locator("#tf-results").get_by_role("button", name=name, exact=True).first
            button.scroll_into_view_if_needed()
            page.wait_for_timeout(150)  # a page that scrolls closes what was explained
            button.click()
            assert until(lambda said=said: note.is_visible() and note.inner_text() == said)
            assert button.evaluate("(b) => b.closest('[data-why]').title") == said
            page.keyboard.press("Escape")


@pytest.mark.browser
def test_the_page_opens_on_a_format_that_loses_the_picture_and_the_recipe_that_brings_it_back(visit):
    made = next(b for b in recordings.read(recordings.FOLDER) if b.name == recordings.FIRST).comparison
    scores = {g.column: g.metrics.mean_lpips for g in made.results if g.metrics}
    weights = {g.column: g.memory.weights for g in made.results}
    assert list(scores) == ["fp8", "nvfp4", "nvfp4@tuned", "int8"]
    assert scores["nvfp4"] > 10 * scores["nvfp4@tuned"] and scores["nvfp4"] > 0.5 * made.ruler.ceiling
    assert weights["nvfp4@tuned"] < 1.05 * weights["nvfp4"] < 0.7 * weights["bf16"]
    worker = FakeWorker()
    with served(worker, recordings.FOLDER) as url:
        page = visit(url)
        assert page.input_value("#tf-prompt textarea") == made.request.prompt
        heads = page.locator("#tf-stage h2").all_inner_texts()
        assert heads == ["bf16", "NVFP4", "NVFP4 Tuned", "FP8", "INT8"]
        assert page.locator("#tf-precisions input:checked").evaluate_all("(all) => all.map((i) => i.name)") == [
            "nvfp4",
            "nvfp4@tuned",
            "fp8",
            "int8",
        ]
        assert page.locator("#tf-stale").is_hidden() and not worker.jobs
