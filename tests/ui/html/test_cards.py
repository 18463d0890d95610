"""What the cards show: numbers, rulers, tables, and texts that are only text."""

from __future__ import annotations

import ast
from urllib.parse import unquote

import pytest

from engine import events
from engine.formats import PRECISIONS
from engine.machine import FAULT, FINE, Finding
from engine.request import CompareRequest
from tests.support.fake_engine import BLACKWELL, RULER, FakeWorker, served, until
from tests.support.page import (
    BEYOND_THE_EDGE,
    HOSTILE,
    PROMPT,
    card,
    comparison,
    finished,
    generate,
    pictures,
)
from ui import view as views
from ui import words
from ui.html import cards

browser_test = pytest.mark.browser


@browser_test
def test_a_hostile_prompt_is_only_text(visit, quick):
    page = visit(quick[0])
    generate(page, HOSTILE)
    finished(page)
    assert until(lambda: len(pictures(page)) == 3)
    assert page.inner_text(".tf-origin q").strip("“”\"'") == HOSTILE.strip("\"'")
    assert pictures(page)[0] == f"bf16: {HOSTILE}, seed 7"
    for name in (words.compare.SLIDER, words.compare.FLICKER, words.compare.DIFFERENCE, words.compare.TABLE):
        page.get_by_label(name, exact=True).check()
    page.get_by_text(words.compare.CODE_SUMMARY, exact=True).click()
    assert HOSTILE in ast.literal_eval(page.inner_text("#tf-program-bf16").split("prompt = ")[1])
    assert page.evaluate("window.hit") is None


@browser_test
def test_an_emulated_precision_has_no_latency_except_in_what_really_ran(visit, quick):
    page = visit(quick[0])
    text = card(page, "MXFP8").inner_text()
    assert words.NOT_COMPARABLE in text
    assert "×" not in text
    assert "5.01" not in text
    assert "5.01" not in page.inner_text("#tf-headline")
    assert "faster" not in page.inner_text(".tf-verdict")
    assert "speed is not compared" in page.inner_text(".tf-verdict")
    assert "2.10" in card(page, "bf16").inner_text()
    page.get_by_text(words.compare.TABLE, exact=True).click()
    row = page.locator("#tf-table tr").filter(has_text="MXFP8").inner_text()
    assert words.NOT_COMPARABLE in row
    assert "5.01" not in row
    page.get_by_text(words.compare.RAN, exact=True).first.click()
    ran = page.inner_text("#tf-ran")
    assert "5.01 s" in ran
    assert "dequantize, then aten::mm" in ran
    assert "96 quantized, 14 kept in bf16 by the recipe" in ran
    assert "torch 0.0, diffusers 0.0" in ran


@browser_test
def test_a_native_precision_has_latency_and_speedup(visit):
    with served(FakeWorker(support=BLACKWELL)) as url:
        page = visit(url)
        generate(page)
        verdict = finished(page)
        assert "NVFP4: 1.44× faster, 36% less memory" in verdict
        assert "emulated" not in page.inner_text("#tf-results")
        text = card(page, "NVFP4").inner_text()
        for part in ("1.45", "1.44×", "text 0.02 · denoise 1.29 · decode 0.14 s", "51", "−36%", "34", "−46%"):
            assert part in text


@browser_test
def test_the_ruler_places_the_score_between_floor_and_ceiling(visit, quick):
    page = visit(quick[0])
    ruler = card(page, "NVFP4").locator(".tf-ruler")
    left = {
        kind: ruler.locator(kind).evaluate_all("(all) => all.map(e => e.getBoundingClientRect().x)")
        for kind in (".tf-tick", ".tf-dot")
    }
    floor, ceiling = left[".tf-tick"]
    assert floor < left[".tf-dot"][0] < (floor + ceiling) / 2
    assert "17% of the way to another seed" in card(page, "NVFP4").inner_text()
    assert "bf16 noise 0.0021" in ruler.inner_text()
    assert "another seed 0.304" in ruler.inner_text()


@browser_test
def test_the_ends_of_a_ruler_do_not_run_into_each_other(visit, quick):
    """Also where a score lies far beyond another seed, which pushes that mark to the left."""
    page = visit(quick[0])
    page.evaluate(
        """html => { const box = document.createElement('div'); box.style.width = '290px'; box.innerHTML = html;
        document.querySelector('#tf-stage').replaceChildren(box); }""",
        cards._ruler(10 * RULER.ceiling, RULER, words.verdict.NOBODY),
    )
    floor, ceiling = (page.locator(f"#tf-stage .tf-{end}").bounding_box() for end in ("floor", "ceiling"))
    assert floor["x"] + floor["width"] < ceiling["x"]
    assert ceiling["x"] + ceiling["width"] <= floor["x"] + 290


@browser_test
def test_any_number_is_explained_by_keyboard_and_touch(visit, quick):
    page = visit(quick[0])
    note = page.locator("#tf-note")
    assert not note.is_visible()
    card(page, "NVFP4").get_by_role("button", name="LPIPS").press("Enter")
    assert note.inner_text() == words.WHY["lpips"]
    page.keyboard.press("Escape")
    assert not note.is_visible()
    card(page, "bf16").locator("dd").first.click()
    assert note.inner_text() == words.WHY["latency"]
    assert card(page, "bf16").get_by_title(words.WHY["latency"], exact=True).first.get_attribute("data-why") is not None
    page.get_by_label(words.compare.TABLE, exact=True).check()
    page.get_by_role("button", name="PSNR").click()
    assert note.inner_text() == words.WHY["psnr"]


@browser_test
def test_the_table_has_a_row_a_precision(visit, quick):
    page = visit(quick[0])
    page.get_by_label(words.compare.TABLE, exact=True).check()
    rows = page.locator("#tf-table tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["bf16", "NVFP4", "MXFP8"]
    assert "27.4" in rows[1]


def test_what_to_know_of_the_machine_stands_in_the_header():
    assert "tf-note" not in cards.header("Some CPU")
    said = cards.header("Some CPU", "The driver <535> is too old.")
    assert '<p class="tf-note" role="note">The driver &lt;535&gt; is too old.</p>' in said


def test_the_device_opens_what_was_found_of_it():
    assert "popover" not in cards.header("Some CPU")
    found = (
        Finding(topic="FP8", severity=FINE, said="It is <right>.", do="Nothing."),
        Finding(topic="NVFP4", severity=FAULT, said="It is wrong.", do="Mend it."),
    )
    said = cards.header("Some CPU", "", found)
    assert "It is &lt;right&gt;." in said and "Mend it." in said and "Nothing." not in said
    assert said.count('data-severity="fine"') == said.count('data-severity="fault"') == 1


@browser_test
@pytest.mark.parametrize("width", [1440, 390])
def test_the_header_opens_the_findings_and_the_theme_still_switches(visit, quick, width):
    page = visit(quick[0], width=width)
    page.click(".tf-machine button")
    findings = page.locator("#tf-doctor:popover-open .tf-finding")
    findings.first.wait_for()
    assert findings.count() == 1 + len(PRECISIONS)
    assert page.evaluate(BEYOND_THE_EDGE) == []
    page.keyboard.press("Escape")
    assert page.locator("#tf-doctor:popover-open").count() == 0
    dark = page.evaluate("document.body.classList.contains('dark')")
    page.click(".tf-theme")
    assert page.evaluate("document.body.classList.contains('dark')") != dark


def test_a_view_never_shows_a_picture_of_an_earlier_run(tmp_path):
    view = views.begin(CompareRequest.create(PROMPT), "device")
    assert view.finished == ()
    for event in FakeWorker().submit(view.request, tmp_path).events():
        view = views.advance(view, event)
        if isinstance(event, events.Compared):
            assert {made.column: made.metrics for made in view.finished}[event.column] == event.metrics
    assert len(view.finished) == 3
    assert view.ruler == RULER


def test_every_text_of_a_request_is_escaped(tmp_path):
    done = comparison(tmp_path)
    odd = CompareRequest.create(HOSTILE)
    view = views.of(done, tmp_path, recorded=True)
    view = views.replace(view, request=odd, device="<b>device</b>")
    for html in (cards.headline(view), cards.stage(view), cards.pairs(view), cards.table(view), cards.ran(view)):
        assert "<script" not in html
        assert "<img src=x" not in html
        assert "<b>" not in html


def test_files_are_linked_relative_to_the_page(tmp_path):
    address = cards.link(tmp_path / "a b#c.png")
    assert not address.startswith(("/", "http"))
    assert "#" not in address
    assert unquote(address) == f"gradio_api/file={tmp_path}/a b#c.png"
