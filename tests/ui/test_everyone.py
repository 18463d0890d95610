"""The page for everyone: axe's rules in every tab, the keyboard alone, reduced motion, weight and the first second."""

from collections import Counter

import pytest

from engine.catalog import ASSETS
from tests.support.fake_engine import FakeWorker, record, served, until
from ui import words

browser_test = pytest.mark.browser
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
CLIP = {"model": "ltx-2", "num_frames": 9, "height": 256, "width": 256, "precisions": ["nvfp4"]}
OWN_BYTES = 1_500_000
REACHABLE = """() => [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex="0"]')]
  .filter((e) => !e.disabled && e.tabIndex >= 0 && e.checkVisibility({ visibilityProperty: true })
    && !e.closest('[inert], [aria-hidden=true]') && (e.type !== 'radio' || e.checked))"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """An app with something in every tab: recorded pictures and clips, the project's figures, pairs for the test."""
    folder = tmp_path_factory.mktemp("everything")
    record(folder / "recorded" / "a-rocket")
    record(folder / "recorded" / "train", "a steam train on a teal background", **CLIP)
    worker = FakeWorker()
    own = {"measured": ASSETS / "benchmarks", "scored": ASSETS / "quality", "unseen": folder / "recorded"}
    with served(worker, folder / "recorded", models=("mini-flux", "ltx-2"), **own) as url:
        yield url, worker


@pytest.fixture(scope="module")
def axe():
    return pytest.importorskip("axe_playwright_python.sync_playwright").Axe()


def violations(axe, page):
    """Of any kind, best practices too: rule, what is wrong, and an element each."""
    page.wait_for_timeout(400)  # a tab's fading in has contrasts of its own
    found = axe.run(page).response["violations"]
    return [
        (broken["id"], broken["impact"], broken["help"], [node["html"][:160] for node in broken["nodes"][:3]])
        for broken in found
    ]


def tabs(page):
    """Opens each tab in turn, by the menu where the screen is too narrow for all, and gives its name."""
    names = page.locator("#tf-tabs .tab-container[aria-hidden] button").all_inner_texts()
    assert {words.COMPARE, words.BLIND, words.GALLERY, words.QUALITY, words.RECIPE, words.BENCHMARKS} <= set(names)
    for name in names:
        tab = page.get_by_role("tab", name=name, exact=True)
        if not tab.count():
            page.get_by_label("More tabs").click()
            tab = page.locator(".overflow-dropdown").get_by_text(name, exact=True)
        tab.click()
        yield name


@browser_test
@pytest.mark.parametrize(("screen", "scheme"), [(WIDE, "light"), (PHONE, "dark")], ids=["wide-light", "phone-dark"])
def test_no_tab_has_a_violation_of_any_kind(visit, everything, axe, screen, scheme):
    page = visit(everything[0], color_scheme=scheme, **screen)
    found = {name: violations(axe, page) for name in tabs(page)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@browser_test
def test_neither_has_what_opens_and_what_goes_wrong(visit, everything, axe):
    page = visit(everything[0], color_scheme="dark")
    found = {}

    def look(where):
        if wrong := violations(axe, page):
            found[where] = wrong

    page.click("#tf-go")
    page.wait_for_selector("#tf-headline:not(:has(.tf-recorded)):not(:has(.tf-pulse))")
    page.get_by_text(words.compare.MORE, exact=True).click()
    page.get_by_text(words.compare.RAN, exact=True).first.click()
    page.get_by_text(words.compare.CODE_SUMMARY, exact=True).click()
    for view in (words.compare.SIDE, words.compare.DIFFERENCE, words.compare.TABLE):
        page.get_by_label(view, exact=True).check()
        look(view)
    page.fill("#tf-prompt textarea", "")
    page.click("#tf-go")
    page.wait_for_selector(".tf-notice:not(:empty)")
    look("an error")
    page.get_by_role("tab", name=words.BLIND).click()
    page.wait_for_selector(".tf-blind[data-open=true]")
    look("a question")
    page.keyboard.press("a")
    page.wait_for_selector(".tf-blind[data-open=false]")
    look("an answer")
    assert found == {}


@browser_test
def test_clips_and_their_player_have_no_violation_either(visit, tmp_path, axe):
    record(tmp_path / "train", "a steam train on a teal background", **CLIP)
    with served(FakeWorker(), tmp_path, models=("ltx-2",)) as url:
        page = visit(url)
        assert violations(axe, page) == []
        page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
        assert violations(axe, page) == []
        names = page.eval_on_selector_all("video", "(all) => all.map((clip) => clip.getAttribute('aria-label'))")
        assert all("a steam train" in name for name in names)
        assert page.get_by_role("group", name=words.PLAYER).count() > 0


@browser_test
def test_the_tab_key_reaches_whatever_can_be_used(visit, everything):
    page = visit(everything[0])
    page.get_by_text(words.compare.MORE, exact=True).click()
    page.wait_for_timeout(500)
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    count = page.evaluate(f"({REACHABLE})().forEach((e) => {{ e.wanted = true; }}); ({REACHABLE})().length")
    assert count > 40
    missed = f"({REACHABLE})().filter((e) => e.wanted).map((e) => e.outerHTML.slice(0, 120))"
    for _ in range(count + 20):
        page.keyboard.press("Tab")
        page.evaluate("document.activeElement.wanted = false")
    assert page.evaluate(missed) == []


@browser_test
def test_the_keyboard_alone_makes_looks_closer_and_changes_the_tab(visit, everything):
    page = visit(everything[0])
    page.focus("#tf-prompt textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type("a cat on a red background")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tf-headline:not(:has(.tf-recorded)):not(:has(.tf-pulse))")
    assert everything[1].jobs[-1].request.prompt == "a cat on a red background"
    page.focus("input[name=tf-view]:checked")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.get_by_label(words.compare.DIFFERENCE, exact=True).is_checked()
    assert until(lambda: page.locator(".tf-worst:visible").inner_text())
    page.get_by_role("tab", name=words.COMPARE).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert until(lambda: page.locator("#tf-blind-next").is_visible())


@browser_test
def test_nothing_moves_by_itself_where_less_motion_is_wanted(visit, everything):
    page = visit(everything[0], reduced_motion="reduce")
    everything[1].step_seconds, everything[1].stands_at = 0.05, "bf16"
    page.click("#tf-go")
    page.wait_for_selector(".tf-blank progress")
    moving = (
        "document.getAnimations().filter((a) => a.playState === 'running').map((a) => a.animationName ?? 'transition')"
    )
    seen = Counter(name for _ in range(5) for name in page.evaluate(moving) or page.wait_for_timeout(40) or ())
    everything[1].step_seconds, everything[1].stands_at = 0, None
    assert seen == {}


@browser_test
def test_the_first_screen_is_complete_and_within_its_weight(chromium, everything):
    """Its verdict and three pictures, in a browser without a cache. How long it takes depends on what else the machine
    does, and is measured, not tested."""
    context = chromium.new_context(viewport=WIDE)
    page = context.new_page()
    page.goto(everything[0], wait_until="commit")
    page.wait_for_function(
        """() => document.querySelector('.tf-verdict')?.checkVisibility() && [...document.querySelectorAll(
             '#tf-stage img')].filter((i) => i.complete && i.naturalWidth && i.checkVisibility()).length === 3"""
    )
    weight = page.evaluate(
        """() => [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
             .filter((e) => !/^\\/(assets|static|gradio_api\\/file=)/.test(new URL(e.name).pathname))
             .reduce((sum, e) => sum + e.decodedBodySize, 0)"""
    )
    context.close()
    assert 50_000 < weight < OWN_BYTES
