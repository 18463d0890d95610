"""The stage's keys wherever the focus is, and how much of the screen its pictures have."""

import pytest

from tests.support.fake_engine import FakeWorker, record, served, until
from ui import words

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    with served(FakeWorker(), folder) as url:
        yield url


@pytest.fixture
def page(visit, app):
    page = visit(f"{app}/?stage=1", width=1280, height=720)
    page.wait_for_selector("body[data-stage]")
    return page


def split(page):
    return float(page.locator(".tf-pair:visible .tf-split").input_value())


@pytest.mark.parametrize("key", ["s", "o", "w", "+", "?", "e", "d"])
def test_the_arrow_keys_move_the_slider_after_any_key(page, key):
    page.keyboard.press("s")
    page.keyboard.press(key)
    if key in "?e":
        page.keyboard.press("Escape")
    if key == "d":
        page.keyboard.press("s")
    if page.locator("#tf-results[data-zoomed]").count():  # arrows move the picture then
        page.keyboard.press("0")
    before = split(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    after = split(page)
    page.keyboard.press("ArrowLeft")
    assert after > before and split(page) < after


def test_zoom_and_the_worst_spot_have_keys(page):
    zoom = page.locator("#tf-results .tf-zoomed")
    page.keyboard.press("+")
    assert until(lambda: zoom.text_content() == "1.5×")
    page.keyboard.press("-")
    assert until(lambda: zoom.text_content() == "1×")
    page.keyboard.press("d")
    page.keyboard.press("w")
    assert until(lambda: zoom.text_content() == "4×")
    page.keyboard.press("w")
    assert until(lambda: zoom.text_content() == "1×")
    page.keyboard.press("?")
    shown = page.locator("#tf-keys kbd").all_inner_texts()
    assert {"W", "+", "-"} <= set(shown)


def test_a_pair_is_nearly_as_high_as_a_small_screen(page):
    page.keyboard.press("s")
    box = page.locator(".tf-pair:visible .tf-layers").bounding_box()
    assert box["height"] > 0.75 * 720 and box["y"] + box["height"] <= 720
    for selector in (".tf-verdict", ".tf-pair:visible .tf-stats >> nth=0"):
        beside = page.locator(selector).first.bounding_box()
        assert beside["x"] > box["x"] + box["width"]


def test_the_difference_has_its_crops_and_its_legend_in_view(page):
    page.keyboard.press("d")
    crops = page.locator(".tf-pair:visible .tf-crop")
    legend = page.locator(".tf-pair:visible .tf-colours:visible")
    for one in (crops.nth(0), crops.nth(1), legend):
        box = one.bounding_box()
        assert box["width"] > 100 and box["x"] + box["width"] <= 1280 and box["y"] + box["height"] <= 720
    drawn = "(e) => new Set(e.getContext('2d').getImageData(0, 0, e.width, e.height).data).size"
    assert until(lambda: crops.nth(1).evaluate(drawn) > 2)


def test_figures_stand_under_the_pictures(page):
    cards = page.locator("#tf-stage .tf-card")
    assert cards.count() == 3
    for card in cards.all():
        assert card.locator(".tf-stats").first.is_visible()
    assert cards.nth(2).get_by_text("LPIPS").first.is_visible()
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")


def test_the_prompts_box_has_its_height_back(visit, app):
    page = visit(app, width=1280, height=720)
    box = page.locator("#tf-prompt textarea")
    before = box.bounding_box()["height"]
    page.keyboard.press("p")
    page.wait_for_selector("body[data-stage]")
    page.wait_for_timeout(300)
    page.keyboard.press("e")
    page.keyboard.type("a longer prompt for the stage")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.wait_for_selector("body:not([data-stage])")
    assert until(lambda: abs(box.bounding_box()["height"] - before) < 2)
    assert page.get_by_role("button", name=words.GENERATE, exact=True).is_visible()
