"""The first screen that the server draws: what it shows, for which addresses, and how the built page takes over."""

from html import unescape

import httpx
import pytest

from engine.errors import FaultError
from tests.support.fake_engine import FakeWorker, record, served, until
from ui import words
from ui.web.middleware import Doors

ROCKET = "a rocket on a blue background"
CAT = "a cat on a red background"
SCREENS = [(1440, 900, "light"), (1440, 900, "dark"), (1920, 1080, "light"), (390, 844, "light"), (390, 844, "dark")]
HELD = """
const define = customElements.define.bind(customElements);
customElements.define = (name, Cover) => {
  const give = Cover.prototype.give;
  Cover.prototype.give = function () {
    window.cover = this;
    window.give = () => give.call(this);
  };
  define(name, Cover);
};"""
"""Keeps the first screen where it is until `give()` is called."""


PARTS = (
    *(
        ".tf-header h1",
        ".tf-machine",
        "#tf-tabs [role=tab]",
        ".tf-purpose",
        "#tf-prompt textarea",
        "#tf-go",
        "#tf-stop",
    ),
    *("#tf-precisions label", "#tf-seed input", "#tf-dice", "#tf-more button", ".tf-verdict", ".tf-origin"),
    *(".tf-segments", "#tf-stage img", ".tf-card .tf-title", ".tf-card .tf-lpips", ".tf-pair .tf-layers"),
)
PLACES = f"""(where) => Object.fromEntries({list(PARTS)}.map((selector) => [selector,
  [...where.querySelectorAll(selector)].filter((e) => e.checkVisibility())
    .map((e) => e.getBoundingClientRect()).filter((box) => box.top < innerHeight && box.width)
    .slice(0, selector.includes('tab]') ? 2 : 9)
    .map(({{ left, top, width }}) => [left, top, width].map((n) => Math.round(n * 2) / 2))]))"""
"""Where each part of the first screen lies, in half pixels."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    record(folder / "cat", CAT, seed=3, precisions=["nvfp4", "nvfp4@tuned", "fp8", "int8"])
    record(folder / "waves", "waves", model="ltx-2", num_frames=9, height=256, width=256, precisions=["nvfp4"])
    return folder


@pytest.fixture(scope="module")
def app(recorded):
    worker = FakeWorker()
    with served(worker, recorded, models=("mini-flux", "mini-qwen")) as url:
        yield url, worker


def served_html(url, query="", **options):
    return unescape(httpx.get(f"{url}/{query}", **options).text)


def held(visit, url, width=1440, height=900, scheme="light"):
    page = visit(url, width, height, wait=False, color_scheme=scheme)
    page.add_init_script(HELD)
    page.reload()
    page.wait_for_function("window.cover")
    return page


def test_a_page_does_not_wait_for_the_engine(recorded):
    """Which may be starting again, or hang."""
    worker = FakeWorker()
    with served(worker, recorded) as url:
        before = httpx.get(url).text

        def lost(model):
            raise FaultError("The engine does not answer: please retry in a few minutes.", kind="ProcessHangs")

        worker.about_weights = lost
        after = httpx.get(url)
    assert after.status_code == 200 and "<twinframe-cover" in before and "<twinframe-cover" in after.text


@pytest.mark.parametrize(("query", "prompt"), [("", ROCKET), ("?recorded=cat", CAT), ("?__theme=dark", ROCKET)])
def test_the_page_comes_with_the_pictures_and_prompt_that_it_will_show(app, query, prompt):
    html = served_html(app[0], query)
    cover = html[html.index("<twinframe-cover") : html.index("</twinframe-cover>")]
    assert f'data-prompt="{prompt}"' in cover and f">{prompt}</textarea>" in cover
    alts = [part.partition('"')[0] for part in cover.split('alt="')[1:]]
    assert alts and all(prompt in alt for alt in alts)
    assert html.index("</twinframe-cover>") < html.index("<gradio-app"), "what is built lies below"


@pytest.mark.parametrize(
    "query",
    ["?model=mini-qwen", f"?prompt={CAT}", "?recorded=waves", "?recorded=nobody", "?stage=1", "?seed=8", "?made=x"],
)
def test_an_address_that_asks_for_something_else_has_no_pictures_of_the_story(app, query):
    html = served_html(app[0], query)
    assert "<twinframe-cover" not in html and 'rel="preload" as="image"' not in html
    assert '<script type="module"' in html, "the page's own script waits for nothing"


def test_nobody_sees_it_before_signing_in(recorded):
    with served(FakeWorker(), recorded, doors=Doors(auth=("me", "secret"))) as url:
        html = served_html(url)
        assert "<twinframe-cover" not in html and ROCKET not in html and "file=" not in html


def test_there_is_none_where_nothing_is_recorded_or_clips_come_first(tmp_path):
    with served(FakeWorker(), tmp_path) as url:
        assert "<twinframe-cover" not in served_html(url)
    record(tmp_path / "waves", "waves", model="ltx-2", num_frames=9, height=256, width=256, precisions=["nvfp4"])
    with served(FakeWorker(), tmp_path, models=("ltx-2",)) as url:
        assert "<twinframe-cover" not in served_html(url)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
def test_nothing_moves_when_the_page_takes_over(visit, app, width, height, scheme):
    page = held(visit, f"{app[0]}/?recorded=cat", width, height, scheme)
    mine = page.evaluate(f"({PLACES})(window.cover.root)")
    assert any(mine["#tf-stage img"]) != any(mine[".tf-pair .tf-layers"])
    assert until(lambda: page.evaluate(f"({PLACES})(document.querySelector('gradio-app'))") == mine), mine
    page.evaluate("window.give()")
    page.wait_for_selector("twinframe-cover", state="detached")
    assert page.evaluate(f"({PLACES})(document)") == mine


@pytest.mark.browser
def test_colours_are_those_of_the_page(visit, app):
    page = held(visit, app[0], scheme="dark")
    colours = """(where) => ['.tf-purpose', '#tf-go', '#tf-stop', '#tf-prompt textarea', '#tf-precisions label',
      '.tf-verdict', '.tf-badge'].map((s) => getComputedStyle(where.querySelector(s)))
      .map((s) => [s.color, s.backgroundColor, s.borderTopWidth === '0px' || s.borderTopColor, s.fontSize,
        s.fontFamily, s.fontWeight])"""
    assert page.evaluate(f"({colours})(window.cover.root)") == page.evaluate(
        f"({colours})(document.querySelector('gradio-app'))"
    )


@pytest.mark.browser
def test_what_was_typed_and_pressed_meanwhile_is_done(visit, app):
    url, worker = app
    page = held(visit, url)
    made = len(worker.jobs)
    page.evaluate("window.cover.prompt.focus(); window.cover.prompt.select()")
    page.keyboard.type("a violin on a white background")
    page.keyboard.press("Enter")
    page.evaluate("window.give()")
    assert until(lambda: len(worker.jobs) > made)
    assert worker.jobs[-1].request.prompt == "a violin on a white background"
    assert page.input_value("#tf-prompt textarea") == "a violin on a white background"
    assert page.evaluate("document.activeElement.matches('#tf-prompt textarea')")


@pytest.mark.browser
def test_a_chip_and_a_view_that_were_pressed_are_chosen(visit, app):
    page = held(visit, f"{app[0]}/?recorded=cat")
    chip = page.locator("#tf-precisions label", has_text="MXFP8").locator("input")
    assert not chip.is_checked()
    page.evaluate("""[...window.cover.root.querySelectorAll('#tf-precisions label, #tf-views label')]
      .filter((label) => /MXFP8|Table/.test(label.textContent)).forEach((label) => label.click()); window.give()""")
    assert until(lambda: chip.is_checked() and page.locator("#tf-table").is_visible())


@pytest.mark.browser
def test_a_tab_that_was_pressed_opens_and_the_address_keeps_its_rest(visit, app):
    page = held(visit, f"{app[0]}/?recorded=cat")
    page.evaluate("window.cover.root.querySelectorAll('[role=tab]')[2].click()")
    page.wait_for_selector("twinframe-cover", state="detached")
    assert until(lambda: page.get_by_role("tab", name=words.GALLERY).get_attribute("aria-selected") == "true")
    assert page.url.endswith("/?recorded=cat#gallery")


@pytest.mark.browser
def test_a_recorded_link_never_shows_the_pictures_of_another_prompt(visit, app):
    """From the first frame on, above and below."""
    page = visit(app[0], wait=False)
    page.add_init_script("""new MutationObserver(() => {
      const there = document.querySelector('gradio-app #tf-stage img');
      const covered = document.querySelector('twinframe-cover');
      if (there && !covered) (window.seen ??= new Set()).add(there.alt);
    }).observe(document, { childList: true, subtree: true, attributes: true });""")
    page.goto(f"{app[0]}/?recorded=cat")
    page.wait_for_selector("twinframe-cover", state="detached")
    page.wait_for_function("window.seen?.size")
    page.wait_for_timeout(300)
    assert [CAT in alt for alt in page.evaluate("[...window.seen]")] == [True]
    assert page.input_value("#tf-prompt textarea") == CAT


@pytest.mark.browser
def test_an_address_of_a_tab_opens_the_tab(visit, app):
    page = visit(f"{app[0]}/#gallery", wait=False)
    page.wait_for_selector("twinframe-cover", state="detached")
    assert until(lambda: page.get_by_role("tab", name=words.GALLERY).get_attribute("aria-selected") == "true")


@pytest.mark.browser
def test_a_page_that_is_not_built_in_time_is_uncovered_all_the_same(chromium, app):
    """What Gradio shows by then, a message or a half of itself, is to be read."""
    context = chromium.new_context()
    errors = []
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route("**/assets/index-*.js", lambda route: route.abort())
    page.clock.install()
    page.goto(app[0])
    page.wait_for_selector("twinframe-cover", state="attached")

    def uncovered():
        page.clock.run_for(1000)
        return page.locator("twinframe-cover").count() == 0

    assert until(uncovered) and not errors
    assert page.locator("#tf-go").count() == 0
    context.close()
