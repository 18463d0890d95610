"""Slider, flicker, zoom and the two maps of a difference."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.support.fake_engine import FakeWorker, record, served, until
from tests.support.page import (
    finished,
    generate,
    shown,
)
from ui import words

browser_test = pytest.mark.browser


def above_of(page, name):
    """The choice of what lies above in a pair."""
    return page.locator("input[name=tf-above]").and_(page.get_by_role("radio", name=name, exact=True))


@browser_test
def test_any_two_columns_are_a_pair(visit, tmp_path):
    """What is chosen stays, and the other makes way; a difference of two quantized ones is that of pixels."""
    record(tmp_path / "rocket", precisions=["fp8", "nvfp4", "nvfp4@tuned"])
    with served(FakeWorker(), tmp_path) as url:
        page = visit(url)
        page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
        pair, below = page.locator(".tf-pair:visible"), page.locator("input[name=tf-below]")

        def shown_pair():
            return pair.get_attribute("data-pair").rpartition("/")[0]

        assert shown_pair() == "bf16/nvfp4"
        page.get_by_label(words.compare.MAPS["lpips"], exact=True).check()
        assert until(lambda: "the LPIPS of NVFP4 is" in pair.locator(".tf-worst").inner_text())
        below.and_(page.get_by_role("radio", name="NVFP4", exact=True)).check()
        assert shown_pair() == "nvfp4/nvfp4@tuned", "two of a kind are no pair"
        assert pair.locator("img").evaluate_all("(all) => all.map(i => i.alt.split(':')[0])") == [
            "NVFP4",
            "NVFP4 Tuned",
        ]
        said = "of 255 levels away from NVFP4 there"
        assert until(lambda: "NVFP4 Tuned is" in pair.locator(".tf-worst").inner_text())
        assert said in pair.locator(".tf-worst").inner_text()
        assert page.get_by_label(words.compare.MAPS["lpips"], exact=True).is_disabled()
        above_of(page, "FP8").check()
        assert shown_pair() == "nvfp4/fp8"
        above_of(page, "NVFP4").check()
        assert shown_pair() == "bf16/nvfp4"
        assert below.and_(page.get_by_role("radio", name="bf16", exact=True)).is_checked()
        assert page.get_by_label(words.compare.MAPS["lpips"], exact=True).is_checked()
        assert until(lambda: "the LPIPS of NVFP4 is" in pair.locator(".tf-worst").inner_text())


@browser_test
def test_the_slider_splits_two_pictures_by_keyboard(visit, quick):
    page = visit(quick[0])
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    assert not page.locator("#tf-stage").is_visible()
    pair = page.locator(".tf-pair:visible")
    assert pair.get_attribute("data-pair") == "bf16/nvfp4/0", "the farthest from bf16 is shown first"
    above_of(page, "MXFP8").check()
    assert pair.get_attribute("data-pair") == "bf16/mxfp8/0"
    above_of(page, "NVFP4").check()
    assert pair.get_attribute("data-pair") == "bf16/nvfp4/0"
    assert pair.locator("img").evaluate_all("(all) => all.map(i => i.alt.split(':')[0])") == ["bf16", "NVFP4"]
    above = pair.locator(".tf-above")
    before = above.evaluate("(layer) => getComputedStyle(layer).clipPath")
    pair.locator("input[type=range]").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert before == "inset(0px 0px 0px 50%)"
    assert above.evaluate("(layer) => getComputedStyle(layer).clipPath") == "inset(0px 0px 0px 60%)"
    box = pair.locator(".tf-layers").bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 80)
    page.mouse.up()
    assert above.evaluate("(layer) => getComputedStyle(layer).clipPath") == "inset(0px 0px 0px 25%)"


@browser_test
def test_the_slider_keeps_its_choice_over_a_new_run(visit, quick):
    page = visit(quick[0])
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    above_of(page, "MXFP8").check()
    generate(page, "a cat")
    finished(page)
    assert above_of(page, "MXFP8").is_checked()
    pair = page.locator(".tf-pair:visible")
    assert pair.count() == 1
    assert pair.locator("img").nth(1).get_attribute("alt") == "MXFP8: a cat, seed 7"


@browser_test
def test_all_pictures_zoom_and_move_together(visit, quick):
    page = visit(quick[0])
    frames = page.locator("#tf-stage .tf-frame")
    assert shown(page) == [[0, 0, 1]] * 3
    box = frames.nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.wheel(0, -200)
    assert shown(page) == [[0, 0, 1]] * 3, "the wheel scrolls the page until a picture is clicked"
    frames.nth(1).dblclick(position={"x": box["width"] / 4, "y": box["height"] / 4})
    assert shown(page) == [[-0.5, -0.5, 3]] * 3
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert shown(page) == [[-0.6, -0.6, 3]] * 3
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 4, steps=3)
    page.mouse.up()
    assert shown(page) == [[-0.1, -0.6, 3]] * 3
    page.keyboard.press("0")
    assert shown(page) == [[0, 0, 1]] * 3
    page.keyboard.press("+")
    assert shown(page) == [[-0.25, -0.25, 1.5]] * 3
    page.wait_for_timeout(50)
    page.mouse.wheel(0, -200)
    zoom = shown(page)[0][2]
    assert zoom > 1.5
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    assert shown(page, ".tf-pair:not([hidden])")[0][2] == zoom, "another view shows another part"
    generate(page, "a cat")
    finished(page)
    page.get_by_label(words.compare.SIDE, exact=True).check()
    assert [each[2] for each in shown(page)] == [zoom] * 3, "a new run forgets the zoom"
    page.get_by_role("button", name=words.compare.ZOOM_RESET).click()
    assert shown(page) == [[0, 0, 1]] * 3


@browser_test
def test_flicker_shows_one_or_the_other_in_the_same_place(visit, quick):
    page = visit(quick[0])
    page.locator("body").press("f")
    assert page.get_by_label(words.compare.FLICKER, exact=True).is_checked()
    above_of(page, "NVFP4").check()

    def seen():
        return page.eval_on_selector_all(
            ".tf-pair:not([hidden]) .tf-corner",
            "(all) => all.filter((e) => e.checkVisibility({visibilityProperty: true})).map((e) => e.textContent)",
        )

    def above():
        return page.locator(".tf-pair:not([hidden]) .tf-above").evaluate("(e) => getComputedStyle(e).visibility")

    assert (seen(), above()) == (["bf16"], "hidden")
    page.keyboard.press("f")
    assert (seen(), above()) == (["NVFP4"], "visible")
    page.locator(".tf-pair:not([hidden]) .tf-frame").click()
    assert (seen(), above()) == (["bf16"], "hidden")
    page.get_by_role("button", name=words.compare.FLIP, exact=True).click()
    assert (seen(), above()) == (["NVFP4"], "visible")
    page.fill("#tf-prompt textarea", "")
    page.locator("#tf-prompt textarea").press("f")
    assert seen() == ["NVFP4"], "typing a prompt flipped the picture"
    assert page.input_value("#tf-prompt textarea") == "f"


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """An app that opens with pictures that differ in one square alone, by 60 levels of red."""
    folder = tmp_path_factory.mktemp("marked")
    saved = record(folder / "rocket", precisions=["nvfp4"])
    with Image.open(saved.reference.files[0]) as picture:
        pixels = np.array(picture)
    pixels[160:192, 64:96] = 100
    Image.fromarray(pixels).save(saved.reference.files[0])
    pixels[160:192, 64:96, 0] += 60
    Image.fromarray(pixels).save(saved.results[1].files[0])
    with served(FakeWorker(), folder) as url:
        yield url


def card_score(page):
    """LPIPS of NVFP4 as it stands beside the pair."""
    return float(page.locator(".tf-pair:not([hidden]) .tf-lpips dd").inner_text().split()[0])


@browser_test
def test_the_difference_finds_the_one_spot_that_differs(visit, marked):
    page = visit(marked)
    page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
    said = page.locator(".tf-worst:visible")
    assert until(lambda: said.inner_text())
    assert said.inner_text() == (
        "The worst spot, 32 × 32 pixels: NVFP4 is 20.0 of 255 levels away from bf16 there, 0.3 over the whole picture."
    )
    spot = page.locator(".tf-spot").first
    assert spot.evaluate("(s) => [s.style.left, s.style.top, s.style.width]") == ["25%", "62.5%", "12.5%"]
    inside, outside = page.evaluate(
        """() => { const context = document.querySelector('.tf-map').getContext('2d');
             return [[80, 176], [20, 20]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3)); }"""
    )
    assert outside == [0, 0, 0]
    assert sum(inside) > 60
    crops = page.evaluate(
        """() => [...document.querySelectorAll('.tf-crop')].map((crop) =>
             [crop.width, ...crop.getContext('2d').getImageData(3, 3, 1, 1).data.slice(0, 3)])"""
    )
    assert crops == [[32, 100, 100, 100], [32, 160, 100, 100]]
    page.get_by_label(words.compare.SIDE, exact=True).check()
    page.get_by_role("button", name=words.compare.TO_WORST).click()
    assert shown(page) == [[-0.75, -2.0 - 0.25, 4]] * 2


@browser_test
def test_the_lpips_map_is_the_other_choice_with_a_legend_of_its_own(visit, marked):
    page = visit(marked)
    page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
    assert page.locator(".tf-colours:visible").inner_text().split("\n")[-1] == words.compare.MAP_ENDS["pixels"]
    page.get_by_label(words.compare.MAPS["lpips"], exact=True).check()
    said = page.locator(".tf-worst:visible")
    assert until(lambda: "LPIPS" in said.inner_text())
    shown_score = card_score(page)
    worst, whole = (float(number) for number in re.findall(r"\b0\.\d+", said.inner_text()))
    assert whole == pytest.approx(shown_score, abs=0.0006)
    assert worst == pytest.approx(4 * whole, rel=0.02), "the map of the fake engine is four times the score there"
    assert page.locator(".tf-spot").first.evaluate("(s) => [s.style.left, s.style.top]") == ["0%", "0%"]
    inside, outside = page.evaluate(
        """() => { const map = document.querySelector('.tf-map'), context = map.getContext('2d');
             return [0.2, 0.8].map((part) => [...context.getImageData(part * map.width, part * map.height, 1, 1).data]
               .slice(0, 3)); }"""
    )
    assert outside == [0, 0, 0]
    assert sum(inside) > 60
    assert page.locator(".tf-colours:visible").inner_text().split("\n")[-1] == words.compare.MAP_ENDS["lpips"]
    page.get_by_role("button", name=words.compare.TO_WORST).click()
    assert until(lambda: shown(page, ".tf-pair:not([hidden])")[0][2] == 4)
    assert shown(page, ".tf-pair:not([hidden])") == [[0, 0, 4]]


@browser_test
def test_a_recorded_run_without_maps_offers_none(visit, tmp_path):
    record(tmp_path / "old")
    file = tmp_path / "old" / "comparison.json"
    saved = json.loads(file.read_text())
    for result in saved["results"]:
        del result["lpips_maps"]
    file.write_text(json.dumps(saved))
    with served(FakeWorker(), tmp_path) as url:
        page = visit(url)
        page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
        assert until(lambda: page.locator(".tf-worst:visible").inner_text())
        assert page.get_by_label(words.compare.MAPS["lpips"], exact=True).count() == 0
