"""The gallery, the stage and the history of this browser, in Chromium around a fake worker."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
from contextlib import closing
from urllib.parse import unquote

import pytest

from engine.outputs import recordings
from engine.request import CompareRequest
from engine.serving.process import Process
from engine.serving.worker import Worker
from tests.support import fake_engine
from tests.support.fake_engine import NO_FP8, FakeWorker, served, until
from ui import words

pytestmark = pytest.mark.browser
ROCKET = "a rocket on a blue background"
CAT = "a cat on a red background"
SHOWN = "header.tf-header, #tf-go, #tf-examples, .tf-choose, #tf-views, .tf-stages, .tf-downloads, #tf-ran, footer"
"""What the stage does without."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    fake_engine.record(folder / "rocket")
    settings = {"seed": 3, "precisions": ["fp8", "nvfp4"], "num_inference_steps": 8, "guidance_scale": 2.5}
    fake_engine.record(folder / "cat", CAT, recipe="full", batch_size=2, **settings)
    fake_engine.record(folder / "clip", "waves", model="ltx-2", num_frames=9)
    return folder


@pytest.fixture(scope="module")
def quick(recorded):
    with served(FakeWorker(), recorded) as url:
        yield url


@pytest.fixture
def slow(recorded):
    """An app whose worker does not come to an end by itself."""
    worker = FakeWorker(step_seconds=0.05)
    worker.stands_at = "bf16"
    with served(worker, recorded) as url:
        yield url, worker


def origin(page):
    return page.inner_text(".tf-origin")


def loaded(page, selector):
    """How many pictures of a selector are there and really loaded."""
    return page.evaluate(
        "s => [...document.querySelectorAll(s)].filter(i => i.complete && i.naturalWidth).length", selector
    )


def gallery(page):
    page.get_by_role("tab", name=words.GALLERY).click()
    page.wait_for_selector("#tf-gallery .tf-tile")


def value(page, label):
    return page.get_by_label(f"range slider for {label}").input_value()


# The gallery


def test_the_gallery_shows_every_recording_and_opening_one_restores_every_control(visit, quick):
    page = visit(quick)
    gallery(page)
    tiles = page.get_by_role("link").filter(has=page.locator(".tf-halves"))
    assert [tile.get_attribute("href") for tile in tiles.all()] == [
        "?recorded=rocket",
        "?recorded=cat",
        "?recorded=clip",
    ]
    assert until(lambda: loaded(page, ".tf-tile img") == 4)
    assert "LPIPS NVFP4 Full" in tiles.nth(1).inner_text()
    assert "Fake recorder 9000" in page.inner_text("#tf-gallery")
    tiles.nth(1).click()
    page.get_by_text(CAT).and_(page.locator(".tf-origin q")).wait_for()
    assert origin(page).startswith("recorded")
    assert until(lambda: loaded(page, "#tf-stage img") == 6)
    assert until(lambda: page.input_value("#tf-prompt textarea") == CAT)
    assert page.input_value("#tf-seed input") == "3"
    page.get_by_text(words.compare.MORE, exact=True).click()
    assert until(lambda: value(page, words.compare.STEPS_LABEL) == "8")
    assert value(page, words.compare.GUIDANCE_LABEL) == "2.5"
    assert page.get_by_role("radio", name=words.RECIPES["full"]).is_checked()
    checked = page.locator("#tf-precisions input:checked").evaluate_all("all => all.map(i => i.value || i.name)")
    assert len(checked) == 2


def test_a_recording_has_an_address(visit, quick):
    page = visit(f"{quick}/?recorded=cat")
    page.get_by_text(CAT).and_(page.locator(".tf-origin q")).wait_for()
    assert until(lambda: page.input_value("#tf-seed input") == "3")
    wrong = visit(f"{quick}/?recorded=<b>dog</b>")
    wrong.wait_for_selector(".tf-notice:not(:empty)")
    assert wrong.inner_text(".tf-notice") == words.gallery.no_recording("<b>dog</b>")


def test_a_recording_of_a_model_that_is_not_offered_can_be_looked_at(visit, quick):
    page = visit(f"{quick}/?recorded=clip")
    page.get_by_text("waves").and_(page.locator(".tf-origin q")).wait_for()
    assert "LTX-2 is not offered here" in page.inner_text(".tf-notice")
    assert page.locator("#tf-stage video").count() == 3
    assert page.input_value("#tf-prompt textarea") == ROCKET


def test_a_precision_that_this_machine_cannot_run_is_left_out_of_the_form(visit, recorded):
    with served(FakeWorker(support=NO_FP8), recorded) as url:
        page = visit(f"{url}/?recorded=cat")
        assert until(lambda: page.input_value("#tf-seed input") == "3")
        assert page.locator("#tf-precisions input:checked").count() == 1
        assert page.get_by_role("heading", name="FP8 Full", exact=True).first.is_visible()


def test_opening_a_recording_ends_what_runs(visit, slow):
    url, worker = slow
    page = visit(url)
    page.click("#tf-go")
    page.wait_for_selector(".tf-blank progress")
    gallery(page)
    page.locator("[data-recorded=cat]").click()
    page.get_by_text(CAT).and_(page.locator(".tf-origin q")).wait_for()
    assert until(lambda: worker.jobs[0].outcome == "cancelled")
    page.wait_for_timeout(300)
    assert origin(page).startswith("recorded")
    assert page.is_enabled("#tf-go")


def test_without_recordings_the_gallery_says_how_to_make_one(visit, tmp_path):
    with served(FakeWorker(), tmp_path) as url:
        page = visit(url)
        page.get_by_role("tab", name=words.GALLERY).click()
        page.get_by_text(words.gallery.RECORD_COMMAND).wait_for()
        page.keyboard.press("p")
        page.keyboard.press("r")
        page.wait_for_selector(".tf-notice:not(:empty)")
        assert words.gallery.NO_RECORDINGS in page.inner_text(".tf-notice")


# The stage


@pytest.mark.parametrize("by", ["address", "key", "button"])
def test_the_stage_shows_the_prompt_the_verdict_and_the_pictures_alone(visit, quick, by):
    page = visit(f"{quick}/?stage=1" if by == "address" else quick)
    if by == "key":
        page.keyboard.press("p")
    elif by == "button":
        page.get_by_role("button", name=words.stage.STAGE, exact=True).click()
    page.wait_for_selector("body[data-stage]")
    assert "stage=1" in page.url
    assert page.locator("#tf-prompt textarea").is_visible()
    assert page.locator(".tf-verdict").is_visible()
    assert page.locator(".tf-recorded").is_visible()
    assert page.locator("#tf-stage img").count() == 3
    assert not [e for e in page.locator(SHOWN).all() if e.is_visible()]
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    page.keyboard.press("Escape")
    assert page.locator("#tf-go").is_visible()
    assert "stage" not in page.url


def test_the_stage_has_a_key_for_everything(visit, slow):
    url, worker = slow
    page = visit(f"{url}/?stage=1")
    page.wait_for_selector("body[data-stage]")
    view = "document.querySelector('#tf-results').dataset.view"
    page.keyboard.press("?")
    assert page.locator("#tf-keys button").all_inner_texts()[0].endswith(words.stage.ACTS["g"])
    page.keyboard.press("Escape")
    page.wait_for_selector("#tf-keys", state="hidden")
    page.keyboard.press("s")
    assert page.evaluate(view) == "slider"
    split = page.locator(".tf-pair:visible .tf-split")
    before = split.input_value()
    page.keyboard.press("ArrowRight")
    assert split.input_value() != before
    page.keyboard.press("o")
    assert page.locator(".tf-pair:visible").get_attribute("data-pair") == "bf16/mxfp8/0"
    page.keyboard.press("f")
    page.keyboard.press("f")
    assert page.evaluate(view) == "flicker"
    assert page.locator("#tf-results[data-flipped]").count() == 1
    page.keyboard.press("n")
    assert until(lambda: page.input_value("#tf-prompt textarea") == CAT)
    page.keyboard.press("b")
    page.keyboard.press("g")
    page.wait_for_selector(".tf-blank progress")
    assert worker.jobs[-1].request.prompt == CAT
    page.keyboard.press("r")
    page.wait_for_selector(".tf-recorded")
    assert CAT in origin(page)
    assert until(lambda: worker.jobs[-1].outcome == "cancelled")
    assert until(lambda: page.input_value("#tf-seed input") == "3")


def test_letters_typed_into_the_prompt_are_no_keys_and_off_stage_neither(visit, slow):
    url, worker = slow
    page = visit(url)
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.keyboard.press("p")
    page.keyboard.press("e")
    page.keyboard.type("grp?")
    assert page.input_value("#tf-prompt textarea") == "grp?"
    assert page.locator("body[data-stage]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("body[data-stage]").count() == 1, "the first Escape only ends the writing"
    assert not worker.jobs


@pytest.mark.parametrize(
    ("prompt", "same"), [(ROCKET, True), ("a cat on a green background", False)], ids=["same", "nearest"]
)
def test_a_run_that_fails_on_stage_falls_back_to_a_recording_and_says_so(visit, recorded, prompt, same):
    worker = FakeWorker(fail_at="mxfp8", failure="The engine's process was lost.")
    with served(worker, recorded) as url:
        page = visit(f"{url}/?stage=1")
        page.wait_for_selector("body[data-stage]")
        page.fill("#tf-prompt textarea", prompt)
        page.press("#tf-prompt textarea", "Enter")
        page.wait_for_selector(".tf-notice:not(:empty)")
        asked = CompareRequest.create(prompt)
        shown = recordings.nearest(asked, recordings.read(recorded)).comparison.request
        assert (asked == shown) is same
        assert page.inner_text(".tf-notice") == words.stage.fell_back(worker.failure, asked, shown)
        assert origin(page).startswith("recorded")
        assert shown.prompt in origin(page)
        assert page.input_value("#tf-prompt textarea") == prompt, "to try again"
        worker.fail_at = None
        page.press("body", "Escape")
        page.keyboard.press("g")
        page.wait_for_selector("#tf-headline:not(:has(.tf-recorded)):not(:has(.tf-pulse))")
        assert page.inner_text(".tf-notice") == ""


def test_the_worker_is_killed_mid_run_and_the_stage_falls_back(visit, recorded, cache):
    """The real engine in its child process, which is killed as the kernel would."""
    device = Process("cpu")
    with closing(Worker(("mini-flux",), device)) as worker, served(worker, recorded) as url:
        page = visit(f"{url}/?stage=1")
        page.wait_for_selector("body[data-stage]")
        page.keyboard.press("g")
        page.wait_for_selector(".tf-blank progress", timeout=240_000)
        (child,) = [process for process in multiprocessing.active_children() if process.name == "engine"]
        os.kill(child.pid, signal.SIGKILL)
        page.wait_for_selector(".tf-notice:not(:empty)")
        said = page.inner_text(".tf-notice")
        assert said.startswith("The live run failed: ") and "SIGKILL" in said
        assert said.endswith("This is a recorded run of the same request.")
        assert origin(page).startswith("recorded")
        assert loaded(page, "#tf-stage img") == 3
        page.wait_for_selector("#tf-go:not([disabled])", state="attached")  # it may come a moment after the notice
        page.keyboard.press("g")
        page.wait_for_selector(".tf-blank progress", timeout=240_000)


def test_off_stage_a_failed_run_is_not_replaced(visit, recorded):
    with served(FakeWorker(fail_at="mxfp8", failure="The disk is full."), recorded) as url:
        page = visit(url)
        page.click("#tf-go")
        page.wait_for_selector(".tf-notice:not(:empty)")
        assert page.inner_text(".tf-notice") == "The disk is full."
        assert "recorded" not in origin(page)


# What was made in this browser


def test_what_was_made_is_kept_in_the_browser_until_it_is_forgotten(visit, quick):
    page = visit(quick)
    hostile = "<img src=x onerror=window.hit=1> ${window.hit=1} green"
    for prompt, seed in ((CAT, "5"), (hostile, "6")):
        page.fill("#tf-seed input", seed)
        page.fill("#tf-prompt textarea", prompt)
        page.click("#tf-go")
        page.wait_for_selector(f"[data-made][data-query*='seed={seed}']")
    table = unquote(page.get_by_role("link", name="CSV", exact=True).get_attribute("href"))
    rows = list(csv.DictReader(io.StringIO(table.partition(",")[2])))
    assert [(row["precision"], row["prompt"]) for row in rows] == [(p, hostile) for p in ("bf16", "nvfp4", "mxfp8")]
    count = "JSON.parse(localStorage.getItem('twinframe-history') ?? '[]').length"
    assert until(lambda: page.evaluate(count) == 2)
    page.reload()
    page.wait_for_selector("#tf-stage img")
    gallery(page)
    made = page.locator("#tf-mine .tf-tile")
    assert made.locator(".tf-prompt").all_inner_texts() == [hostile, CAT]
    assert until(lambda: loaded(page, "#tf-mine img") == 4)
    assert not page.evaluate("window.hit")
    kept = json.loads(page.evaluate("localStorage.getItem('twinframe-history')"))
    assert len(json.dumps(kept)) < 20_000
    made.nth(1).click()
    page.wait_for_url("**/?prompt=*")
    assert until(lambda: page.input_value("#tf-seed input") == "5")
    gallery(page)
    page.get_by_role("button", name=words.gallery.HISTORY_CLEAR).click()
    page.wait_for_selector("#tf-mine", state="hidden")
    assert page.evaluate(count) == 0


def test_a_damaged_history_is_an_empty_one(visit, quick):
    page = visit(quick)
    page.evaluate("localStorage.setItem('twinframe-history', '{')")
    gallery(page)
    assert page.locator("#tf-mine").is_hidden()
