"""What tests of the page do in Chromium, and what they look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.request import CompareRequest
from tests.support.fake_engine import LAPTOP, FakeWorker, until

PROMPT = "a rocket on a blue background"


HOSTILE = "<img src=x onerror=window.hit=1><script>window.hit=1</script> ${window.hit=1} {{7*7}} \"'&amp;"


BEYOND_THE_EDGE = """() => [...document.querySelectorAll('main *')].filter((e) => {
  const inside = e.closest('.tf-scroll, #tf-examples > .gallery, .visually-hidden');
  return (!inside || inside === e) && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1;
}).map((e) => e.className || e.tagName)"""
"""Elements that stick out of the screen, other than in a box that scrolls by itself: clipped, or scrolling the page."""


def generate(page, prompt=None):
    if prompt is not None:
        page.fill("#tf-prompt textarea", prompt)
    page.click("#tf-go")


@contextmanager
def held(page, holds: Callable = lambda request: True) -> Iterator[Callable]:
    """What the page asks Gradio for past its queue gets no answer until the block ends; gives what tells of those held.

    Telling asks the page something: only meanwhile does Playwright hear of requests.
    """
    routes, open_ = [], []

    def hold(route):
        route.continue_() if open_ or not holds(route.request) else routes.append(route)

    page.route("**/gradio_api/run/predict*", hold)
    try:
        yield lambda: page.evaluate("true") and routes
    finally:
        open_.append(True)
        for route in routes:
            route.continue_()


def finished(page):
    """Wait for the end of a run that was made here; gives the verdict."""
    page.wait_for_selector("a[href$='comparison.json']")
    page.wait_for_selector("#tf-headline:not(:has(.tf-recorded)):not(:has(.tf-pulse))")
    return page.inner_text(".tf-verdict")


def notice(page):
    page.wait_for_selector(".tf-notice:not(:empty)")
    return page.inner_text(".tf-notice")


def pictures(page):
    """The pictures that are shown side by side and really loaded, as their alternative texts."""
    return page.evaluate(
        "[...document.querySelectorAll('#tf-stage img')].filter(i => i.complete && i.naturalWidth).map(i => i.alt)"
    )


def card(page, name):
    return page.locator("#tf-stage .tf-card").filter(has=page.get_by_role("heading", name=name, exact=True))


def shown(page, part="#tf-stage"):
    """Left, top and width of each picture inside its frame, in widths of the frame."""
    return page.eval_on_selector_all(
        f"{part} .tf-frame",
        """(frames) => frames.map((frame) => {
             const [a, b] = [frame, frame.querySelector('.tf-move')].map((e) => e.getBoundingClientRect());
             return [(b.left - a.left) / a.width, (b.top - a.top) / a.width, b.width / a.width].map((n) =>
               Math.round(100 * n) / 100);
           })""",
    )


def choose_model(page, name):
    page.click("#tf-model input")
    page.get_by_role("option", name=name, exact=True).click()
    page.wait_for_function("name => document.querySelector('#tf-model input').value === name", arg=name)


def field(page, name):
    """A slider's number box of that label, once Gradio has built it: a value typed before that is lost."""
    box = page.get_by_label(f"number input for {name}")
    box.wait_for()
    page.wait_for_timeout(500)
    return box


def set_field(page, name, value):
    field(page, name).fill(value)
    page.keyboard.press("Tab")
    assert until(lambda: page.get_by_label(f"range slider for {name}").input_value() == value)


def comparison(tmp_path, support=LAPTOP, **changes):
    job = FakeWorker(support=support).submit(CompareRequest.create(PROMPT, **changes), tmp_path)
    *_, done = job.events()
    return done.comparison
