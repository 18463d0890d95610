"""A connection that is lost in the middle of a run: what stands in, and what is there afterwards."""

import time

import pytest

from tests.support.cut import wire
from tests.support.fake_engine import FakeWorker, record, served, until
from ui import runs, words

pytestmark = pytest.mark.browser
CAT = "a cat on a red background"
SECONDS = 3.0
"""How soon the recorded run stands in."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    return folder


@pytest.fixture
def app(recorded):
    worker = FakeWorker(step_seconds=0.1)
    with served(worker, recorded) as url, wire(url) as line:
        yield line, worker
        worker.step_seconds, worker.stands_at = 0, None


@pytest.fixture
def page(chromium):
    """Not `visit`: a lost connection is an error of the console."""
    context = chromium.new_context(viewport={"width": 1280, "height": 720})
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    context.close()


def begun(page, line, worker, stage=True):
    """A run of another prompt than the recorded one, whose first picture is on the way until the worker may go on."""
    worker.stands_at = "bf16"
    page.goto(f"{line.url}/?stage=1" if stage else line.url)
    page.wait_for_selector("#tf-stage img")
    page.wait_for_selector("twinframe-cover", state="detached")
    if stage:
        page.wait_for_selector("body[data-stage]")
    page.fill("#tf-prompt textarea", CAT)
    page.keyboard.press("Enter")
    page.wait_for_selector("#tf-headline [data-busy][data-address^='made=']")
    page.wait_for_selector(".tf-blank progress")
    assert worker.jobs[-1].request.prompt == CAT


def finished(page):
    """Whether the run's own pictures are shown, three of them, whole."""
    return page.evaluate(
        """() => document.querySelector('#tf-headline .tf-origin q')?.textContent === arguments[0]
          || [...document.querySelectorAll('#tf-stage img')].length""".replace("arguments[0]", repr(CAT))
    ) is True and page.evaluate(
        """() => { const all = [...document.querySelectorAll('#tf-stage img')];
          return all.length === 3 && all.every((i) => i.complete && i.naturalWidth); }"""
    )


def back(page, worker):
    """Wait for the result, whatever reloads meanwhile; how many comparisons were made for it."""

    def there():
        try:
            page.wait_for_timeout(100)
            return worker.jobs[-1].outcome == "completed" and finished(page)
        except Exception as error:
            if "navigat" in str(error) or "context was destroyed" in str(error):
                return False
            raise

    assert until(there, seconds=40)
    return len(worker.jobs)


def test_the_recorded_run_stands_in_within_three_seconds_and_the_live_one_is_there_afterwards(page, app):
    line, worker = app
    begun(page, line, worker)
    line.cut()
    since = time.monotonic()
    page.wait_for_selector("body[data-lost]", timeout=int(1000 * SECONDS))
    said = page.locator("#tf-net").get_by_text("The connection is lost. This is the nearest recorded run")
    drawn = "[...document.querySelectorAll('#tf-net img')].filter((i) => i.complete && i.naturalWidth).length"
    left = SECONDS - (time.monotonic() - since)
    assert until(lambda: said.is_visible() and page.evaluate(drawn) == 3, seconds=left)
    assert not page.locator("#tf-stage").is_visible()
    worker.stands_at = None
    steps = worker.jobs[-1].steps
    assert until(lambda: worker.jobs[-1].steps > steps), "the worker goes on"
    line.mend()
    assert back(page, worker) == 1
    assert page.locator("body[data-stage]").count() == 1 and page.locator("body[data-lost]").count() == 0


def test_a_run_that_ends_while_nobody_looks_is_there_afterwards(page, app):
    line, worker = app
    begun(page, line, worker, stage=False)
    line.cut()
    worker.stands_at = None
    assert until(lambda: worker.jobs[-1].outcome == "completed")
    line.mend()
    assert back(page, worker) == 1


def test_a_reload_in_the_middle_comes_back_to_the_run(page, app):
    line, worker = app
    begun(page, line, worker, stage=False)
    page.reload()
    page.wait_for_selector("#tf-headline [data-busy]")
    assert not page.locator("#tf-go").is_enabled()
    worker.stands_at = None
    assert back(page, worker) == 1


def test_a_run_waits_for_a_reload_that_is_slow_and_not_for_a_tab_that_is_closed(page, app, monkeypatch):
    monkeypatch.setattr(runs, "LEFT_SECONDS", 0.0)
    line, worker = app
    begun(page, line, worker, stage=False)
    page.reload()
    page.wait_for_selector("#tf-headline [data-busy]")
    page.wait_for_selector("#tf-stop:enabled")
    assert worker.jobs[-1].outcome == "unfinished"
    page.close(run_before_unload=True)
    assert until(lambda: worker.jobs[-1].outcome == "cancelled", seconds=30)


def test_stop_works_after_coming_back(page, app):
    line, worker = app
    begun(page, line, worker, stage=False)
    page.reload()
    page.wait_for_selector("#tf-headline [data-busy]")
    page.wait_for_selector("#tf-stop:enabled")
    page.click("#tf-stop")
    assert until(lambda: worker.jobs[-1].outcome == "cancelled")
    assert until(lambda: page.locator("#tf-go").is_enabled())


def test_a_run_that_nobody_comes_back_to_ends(page, app, monkeypatch):
    monkeypatch.setattr(runs, "GRACE_SECONDS", 0.5)
    line, worker = app
    begun(page, line, worker, stage=False)
    line.cut()
    assert until(lambda: worker.jobs[-1].outcome == "cancelled", seconds=30)


def test_a_connection_that_is_lost_while_nothing_runs_is_said_and_nothing_goes_away(page, app):
    line, _ = app
    page.goto(f"{line.url}/?stage=1")
    page.wait_for_selector("#tf-stage img")
    line.cut()
    assert until(lambda: page.inner_text("#tf-lost") == words.stage.LOST)
    assert page.locator("#tf-stage img").count() == 3 and page.locator("#tf-stage").is_visible()
    line.mend()
    assert until(lambda: page.inner_text("#tf-lost") == "")
