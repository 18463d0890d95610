"""The first screen, the form of each model, and the page on every screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import catalog
from engine.request import CompareRequest
from tests.support.fake_engine import NO_FP8, FakeWorker, record, served, until
from tests.support.page import (
    BEYOND_THE_EDGE,
    PROMPT,
    card,
    choose_model,
    field,
    finished,
    generate,
    pictures,
)
from ui import words

browser_test = pytest.mark.browser


@browser_test
def test_the_first_screen_shows_a_recorded_comparison_and_fetches_nothing_elsewhere(chromium, quick):
    page = chromium.new_page()
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(quick[0])
    page.wait_for_selector("#tf-stage img")
    assert until(lambda: len(pictures(page)) == 3)
    assert pictures(page) == [f"{name}: {PROMPT}, seed 7" for name in ("bf16", "NVFP4", "MXFP8")]
    origin = page.inner_text(".tf-origin")
    assert origin.startswith("recorded")
    assert "Fake recorder 9000" in origin
    assert PROMPT in origin
    assert "Fake laptop CPU · FP8, INT8 native · MXFP8, NVFP4 emulated" in page.inner_text(".tf-header")
    assert page.input_value("#tf-prompt textarea") == PROMPT
    assert not [url for url in fetched if not url.startswith((quick[0], "data:", "blob:"))]
    page.close()


@browser_test
def test_without_a_recorded_comparison_the_page_says_what_to_do(visit, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "comparison.json").write_text('{"request": ')
    with served(FakeWorker(), tmp_path) as url:
        page = visit(url)
        assert words.compare.WELCOME in page.inner_text("#tf-headline")
        assert pictures(page) == []
        generate(page)
        finished(page)
        assert until(lambda: len(pictures(page)) == 3)


@browser_test
def test_an_unavailable_precision_has_no_chip_and_a_reason(visit):
    with served(FakeWorker(support=NO_FP8)) as url:
        page = visit(url)
        offered = page.locator("#tf-precisions label").all_inner_texts()
        emulated = [f"{name} · emulated" for name in ("NVFP4", "NVFP4 Tuned", "NVFP4 Rebalanced", "MXFP8")]
        assert offered == [*emulated, "INT8"]
        assert "FP8 is unavailable here: FP8 needs an RTX 40 or H100 class device." in page.inner_text(".tf-form")


@browser_test
def test_the_form_follows_the_model(visit, many):
    page = visit(many[0])
    page.get_by_text(words.compare.MORE, exact=True).click()
    for spec in (catalog.FLUX_DEV, catalog.LTX_2, catalog.FLUX_SCHNELL, catalog.MINI_FLUX):
        choose_model(page, spec.name)
        steps = field(page, words.compare.STEPS_LABEL)
        assert until(lambda: steps.input_value() == str(spec.defaults.num_inference_steps)), spec.id  # noqa: B023
        limits = spec.limits
        shown = {
            "#tf-guidance": limits.guidance_scale[0] < limits.guidance_scale[1],
            "#tf-frames": spec.modality == "video",
            "#tf-size": len(limits.sizes) > 1,
            "#tf-recipe": len(spec.recipes) > 1,
        }
        assert {part: page.locator(part).is_visible() for part in shown} == shown, spec.id
        labels = [words.compare.recipe(name, summary) for name, summary in many[1].recipes(spec.id).items()]
        assert page.locator("#tf-recipe label").all_inner_texts() == labels
        assert page.locator("#tf-examples .gallery-item").count() == len(spec.examples)
        assert page.input_value("#tf-prompt textarea") == spec.examples[0]
        assert page.get_attribute("#tf-prompt textarea", "placeholder") == words.compare.prompt_hint(spec)
        hints = page.inner_text(".tf-form")
        assert (f"The weights of {spec.id} are not here." in hints) == (not spec.bundled)
        assert ("non-commercial use only" in hints) == (spec is catalog.FLUX_DEV)
        assert spec.licence_note in hints
        assert spec.licence in hints


@browser_test
def test_another_model_shows_a_recording_of_its_own_and_a_result_is_one_step_back(visit, tmp_path):
    record(tmp_path / "rocket")
    for name, example in enumerate(catalog.MINI_LTX2.examples[:2]):
        record(tmp_path / f"clip-{name}", example, model="mini-ltx2")
    with served(FakeWorker(), tmp_path, models=("mini-flux", "mini-qwen", "mini-ltx2")) as url:
        page = visit(url)
        page.wait_for_selector("#tf-stage img")
        choose_model(page, catalog.MINI_LTX2.name)
        page.wait_for_selector("#tf-stage video")
        assert page.locator("#tf-headline .tf-recorded").count() == 1
        assert catalog.MINI_LTX2.examples[0] in page.inner_text("#tf-headline")
        choose_model(page, catalog.MINI_QWEN.name)  # of which nothing is recorded
        page.wait_for_selector("#tf-frames", state="hidden")  # the form is that of pictures now
        generate(page)
        finished(page)
        assert until(lambda: len(pictures(page)) == 3)  # each is there some time after its card
        made = pictures(page)
        choose_model(page, catalog.MINI_LTX2.name)
        page.wait_for_selector("#tf-stage video")
        page.wait_for_url("**recorded=clip**")  # a step of its own, by now
        page.go_back()
        assert until(lambda: pictures(page) == made != [])
        assert page.locator("#tf-headline .tf-recorded").count() == 0
        assert page.input_value("#tf-model input") == catalog.MINI_QWEN.name


@browser_test
def test_a_prompt_of_ones_own_stays_when_the_model_changes(visit, many):
    page = visit(many[0])
    page.fill("#tf-prompt textarea", "a cat of my own")
    choose_model(page, "FLUX.1-schnell")
    assert until(lambda: page.locator("#tf-examples .gallery-item").count() == len(catalog.FLUX_SCHNELL.examples))
    assert page.input_value("#tf-prompt textarea") == "a cat of my own"
    generate(page)
    finished(page)
    assert many[1].jobs[-1].request == CompareRequest.create("a cat of my own", model="flux.1-schnell")


@browser_test
def test_a_single_model_needs_no_choice(visit, quick):
    page = visit(quick[0])
    assert page.locator("#tf-model").count() == 0
    generate(page, "a cat")
    finished(page)
    assert quick[1].jobs[-1].request.model == "mini-flux"


@browser_test
def test_pictures_and_json_download(visit, quick):
    page = visit(quick[0])
    generate(page)
    finished(page)
    job = quick[1].jobs[-1]
    with page.expect_download() as download:
        page.click("a[href$='comparison.json']")
    assert json.loads(Path(download.value.path()).read_text())["request"] == job.request.to_json()
    with page.expect_download() as download:
        card(page, "NVFP4").get_by_text("PNG").click()
    assert download.value.suggested_filename.endswith("_nvfp4.png")
    assert Path(download.value.path()).read_bytes() == (job.out / "nvfp4.png").read_bytes()


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit, quick, scheme):
    page = visit(quick[0], width=390, height=844, color_scheme=scheme, has_touch=True, is_mobile=True)
    generate(page, "wide" * 36)
    finished(page)
    page.get_by_text(words.compare.MORE, exact=True).click()
    page.get_by_text(words.compare.RAN, exact=True).first.click()
    said = words.compare
    for name in (said.SIDE, said.SLIDER, said.FLICKER, said.DIFFERENCE, said.TABLE):
        page.get_by_label(name, exact=True).check()
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        assert page.evaluate(BEYOND_THE_EDGE) == [], name
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 17, 19)"
    assert dark == (scheme == "dark")


@browser_test
def test_light_and_dark_can_be_switched_and_stay(visit, quick):
    page = visit(quick[0], color_scheme="light")
    page.get_by_label(words.compare.THEME_TOGGLE).click()
    assert page.evaluate("document.body.classList.contains('dark')")
    page.reload()
    page.wait_for_selector("#tf-go")
    assert until(lambda: page.evaluate("document.body.classList.contains('dark')"))


@browser_test
def test_the_keyboard_reaches_everything_with_a_visible_focus(visit, quick):
    page = visit(quick[0])
    page.focus("#tf-prompt textarea")
    seen = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        state = page.evaluate(
            """() => { const e = document.activeElement, ring = e.closest('label') ?? e;
               const visible = [e, ring].some(x => getComputedStyle(x).outlineStyle !== 'none');
               return [e.id || e.name || e.className || e.innerText, visible]; }"""
        )
        seen.add(state[0])
        if state[0] in ("tf-go", "fp8", "nvfp4", "tf-dice", "tf-view"):
            assert state[1], f"no visible focus on {state[0]}"
    assert {"tf-go", "fp8", "nvfp4", "tf-dice", "tf-view"} <= seen
