"""A phone of 390 x 844: two pictures in one place and their LPIPS on the first screen."""

import pytest

from tests.support.fake_engine import FakeWorker, record, served, until
from ui import words

pytestmark = pytest.mark.browser
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    worker = FakeWorker(step_seconds=0.05)
    with served(worker, folder) as url:
        yield url, worker
        worker.step_seconds = 0


def inside(page, locator):
    box = locator.bounding_box()
    return box and box["y"] >= 0 and box["y"] + box["height"] <= PHONE["height"] and box["x"] + box["width"] <= 390


def test_the_first_screen_has_the_slider_whole_and_its_lpips(visit, app):
    page = visit(app[0], **PHONE)
    pair = page.locator(".tf-pair:visible")
    assert until(lambda: pair.count() == 1)
    for one in (page.locator("#tf-prompt"), page.locator("#tf-go"), pair.locator(".tf-layers")):
        assert inside(page, one)
    assert pair.locator(".tf-layers").bounding_box()["width"] > 340
    assert inside(page, pair.locator(".tf-lpips dd").first)
    assert page.get_by_label(words.compare.SLIDER, exact=True).is_checked()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_is_being_made_is_seen_as_well_and_then_the_slider_again(visit, app):
    page, worker = visit(app[0], **PHONE), app[1]
    worker.stands_at = "bf16"
    page.click("#tf-go")
    page.wait_for_selector(".tf-blank progress")
    cards = page.locator("#tf-stage .tf-card > :first-child")
    assert inside(page, cards.nth(0)) and inside(page, cards.nth(1))
    assert cards.nth(0).bounding_box()["y"] == cards.nth(1).bounding_box()["y"]
    worker.stands_at = None
    page.wait_for_selector(".tf-pair:not([hidden])")
    assert until(lambda: not page.locator("#tf-stage").is_visible())


def test_the_rest_of_the_form_is_below_the_pictures(visit, app):
    page = visit(app[0], **PHONE)
    picture = page.locator(".tf-layers:visible").bounding_box()
    for selector in ("#tf-examples", "#tf-precisions", "#tf-seed", "#tf-more"):
        assert page.locator(selector).bounding_box()["y"] > picture["y"] + picture["height"]
    assert page.locator("#tf-headline .tf-verdict").bounding_box()["y"] > picture["y"] + picture["height"]
