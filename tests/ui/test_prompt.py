"""A miniature's vocabulary on the page: completion while one types, a warning before, and no verdict after."""

import pytest

from engine.request import CompareRequest
from tests.support.fake_engine import FakeWorker, record, served, until
from ui import words

BOX = "#tf-prompt textarea"
STRANGE = "a wizard eating pancakes"


@pytest.fixture(scope="module")
def app():
    worker = FakeWorker()
    with served(worker, models=("mini-flux", "mini-ltx2", "flux.1-dev")) as url:
        yield url, worker


@pytest.fixture
def page(visit, app):
    page = visit(app[0])
    assert until(lambda: "model=" in page.evaluate("location.search"))
    page.fill(BOX, "")
    page.focus(BOX)
    return page


def offered(page):
    return page.locator("#tf-words li:visible").all_inner_texts()


def value(page):
    return page.input_value(BOX)


@pytest.mark.browser
def test_a_prompt_is_completed_by_the_keyboard_alone(page, app):
    made = len(app[1].jobs)
    page.keyboard.type("a rocke")
    assert until(lambda: offered(page) == ["a rocket"])
    page.keyboard.press("ArrowDown")
    active = page.get_attribute(BOX, "aria-activedescendant")
    assert page.get_attribute(f"#{active}", "aria-selected") == "true"
    page.keyboard.press("Enter")
    assert value(page) == "a rocket"
    page.keyboard.type(" on a pur")
    assert until(lambda: offered(page) == ["a rocket on a purple background"])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert value(page) == "a rocket on a purple background"
    assert offered(page) == [] and len(app[1].jobs) == made
    page.keyboard.press("Enter")
    assert until(lambda: page.wait_for_timeout(20) or len(app[1].jobs) == made + 1)
    assert app[1].jobs[-1].request.prompt == "a rocket on a purple background"


@pytest.mark.browser
def test_enter_generates_what_was_typed_and_escape_closes_the_list(page, app):
    page.keyboard.type("a ro")
    assert until(lambda: len(offered(page)) > 3)
    page.keyboard.press("Escape")
    assert offered(page) == []
    page.keyboard.type("b")
    assert until(lambda: offered(page))
    page.keyboard.press("Enter")
    assert until(lambda: page.wait_for_timeout(20) or (app[1].jobs and app[1].jobs[-1].request.prompt == "a rob"))
    assert offered(page) == []


@pytest.mark.browser
def test_a_finger_chooses_on_a_phone(visit, app):
    page = visit(app[0], width=390, height=844, has_touch=True, is_mobile=True)
    assert until(lambda: "model=" in page.evaluate("location.search"))
    page.fill(BOX, "")
    page.tap(BOX)
    page.keyboard.type("a snowm")
    page.locator("#tf-words li", has_text="a snowman").first.tap()
    assert value(page).startswith("a snowman")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_words_that_were_never_learnt_are_said_before_and_there_is_no_verdict_after(page, app):
    never = page.locator(".tf-never")
    page.keyboard.type(STRANGE)
    assert until(lambda: "“wizard”" in never.inner_text() or "“eating”" in never.inner_text())
    page.click("#tf-go")
    said = words.prompt.not_of_the_prompt(CompareRequest.create(STRANGE))
    assert until(lambda: said in page.inner_text("#tf-headline"))
    assert "of the way" not in page.inner_text("#tf-headline")
    page.fill(BOX, "a cat on a red background")
    assert until(lambda: never.inner_text() == "")


@pytest.mark.browser
def test_another_model_has_other_words(page):
    page.keyboard.type("a castle on a teal background")
    never = page.locator(".tf-never")
    assert until(lambda: not never.is_visible())
    page.click("#tf-model input")
    page.get_by_role("option", name="LTX-2 miniature", exact=True).click()
    assert until(lambda: "“castle”" in never.inner_text())
    page.fill(BOX, "a penguin bouncing on teal")
    assert until(lambda: not never.is_visible())
    page.click("#tf-model input")
    page.get_by_role("option", name="FLUX.1-dev", exact=True).click()
    page.fill(BOX, "a wizard eating pancakes on the moon")
    assert until(lambda: not never.is_visible())
    page.keyboard.type(" a ro")
    page.wait_for_timeout(200)
    assert offered(page) == []


@pytest.mark.parametrize("prompt", [STRANGE, "a cat and a dog on a red background", "a red background"])
def test_nothing_is_concluded_from_pictures_of_something_else(tmp_path, prompt):
    made = record(tmp_path, prompt)
    [(part, said)] = words.verdict.verdicts(made)
    assert part is None and said.startswith("No verdict")


def test_a_prompt_that_was_learnt_has_its_verdict(tmp_path):
    assert "of the way" in words.verdict.verdict(record(tmp_path, "a rocket on a blue background"))
