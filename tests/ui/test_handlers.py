"""A run from Generate to its end: by turns, stopped, refused, failed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from engine import catalog
from engine.request import CompareRequest
from tests.support.fake_engine import BLACKWELL, FakeWorker, open_tab, served, until
from tests.support.page import (
    PROMPT,
    finished,
    generate,
    held,
    notice,
    pictures,
)
from ui import words

browser_test = pytest.mark.browser


@browser_test
def test_pictures_appear_as_each_precision_finishes(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    worker.stands_at = "bf16"
    generate(page, "a cat on a red background")
    page.wait_for_selector(".tf-blank progress")
    assert pictures(page) == [], "a recorded picture could be taken for a new one"
    assert "recorded" not in page.inner_text("#tf-headline")
    assert "Making the bf16 picture, 1 of 3" in page.inner_text(".tf-verdict")
    assert until(lambda: "left" in page.inner_text(".tf-detail"))
    assert page.is_disabled("#tf-go")
    worker.stands_at = "mxfp8"
    page.wait_for_selector("#tf-stage img")
    assert until(lambda: pictures(page) == ["bf16: a cat on a red background, seed 7"])
    assert page.locator(".tf-blank").count() == 2
    worker.stands_at = "nvfp4"
    assert until(lambda: "Making the NVFP4 picture, 3 of 3" in page.inner_text(".tf-verdict"))
    assert until(lambda: len(pictures(page)) == 2)
    worker.stands_at = None
    finished(page)
    assert until(lambda: len(pictures(page)) == 3)
    assert page.is_enabled("#tf-go")
    assert page.is_disabled("#tf-stop")


SLOW_TO_END = """() => {
  const reader = ReadableStreamDefaultReader.prototype;
  const cancel = reader.cancel;
  reader.cancel = async function (...why) {
    for (let turn = 0; turn < 100; turn += 1) await null;
    return cancel.apply(this, why);
  };
}"""
"""Has the browser end what is read a moment later, without letting any task of the page run before."""


@browser_test
def test_a_run_is_made_and_ends_well_however_soon_the_browser_tells_of_an_abort(visit, quick):
    page, worker = visit(quick[0]), quick[1]
    page.evaluate(SLOW_TO_END)
    made = len(worker.jobs)
    for prompt in ("a cat on a red background", "a fish", "a dog"):
        generate(page, prompt)
        assert until(lambda: set(pictures(page)) == {f"{p}: {prompt}, seed 7" for p in ("bf16", "MXFP8", "NVFP4")})  # noqa: B023
        finished(page)
    assert len(worker.jobs) == made + 3
    assert page.inner_text(".tf-notice") == ""


@browser_test
def test_enter_generates_and_a_second_enter_does_not_start_another(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    worker.stands_at = "bf16"
    page.fill("#tf-prompt textarea", "a cat")
    page.press("#tf-prompt textarea", "Enter")
    page.wait_for_selector(".tf-blank progress")
    page.press("#tf-prompt textarea", "Enter")
    assert notice(page) == words.BUSY
    worker.stands_at = None
    finished(page)
    assert len(worker.jobs) == 1


@browser_test
def test_stop_keeps_what_is_finished_and_frees_the_worker(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    worker.stands_at = "mxfp8"
    generate(page, "a cat")
    page.wait_for_selector(".tf-blank progress")
    page.wait_for_selector("#tf-stage img")
    page.click("#tf-stop")
    page.get_by_text(words.run.STOPPED_KEPT).wait_for()
    assert until(lambda: worker.jobs[0].outcome == "cancelled")
    assert worker.jobs[0].steps < 45
    assert until(lambda: pictures(page) == ["bf16: a cat, seed 7"])
    assert page.locator(".tf-blank").all_inner_texts() == [words.run.STOPPED_BEFORE] * 2
    assert page.inner_text(".tf-notice") == ""
    worker.stands_at = None
    generate(page, "a dog")
    finished(page)
    assert until(lambda: len(pictures(page)) == 3)


HOLD = """() => {
  window.held = true;
  const reader = ReadableStreamDefaultReader.prototype;
  const read = reader.read;
  reader.read = async function () {
    const some = await read.call(this);
    while (window.held) await new Promise((resolve) => { setTimeout(resolve, 20); });
    return some;
  };
}"""
"""What a run tells reaches the page no more until `held` is false."""


@browser_test
@pytest.mark.parametrize("how", ["stop", "back"])
def test_what_a_run_had_on_its_way_does_not_stay_over_what_took_its_place(visit, slow, how):
    page, worker = visit(slow[0]), slow[1]
    worker.step_seconds, worker.stands_at = 0, "mxfp8"
    generate(page, "a cat")
    page.wait_for_selector("#tf-stage img")
    assert until(lambda: "Making the MXFP8 picture" in page.inner_text(".tf-verdict"))
    page.evaluate(HOLD)
    worker.stands_at = "nvfp4"
    assert until(lambda: worker.jobs[0].steps >= 45)
    time.sleep(0.5)  # in which the page is told of it
    if how == "stop":
        page.click("#tf-stop")
        page.get_by_text(words.run.STOPPED_KEPT).wait_for()
    else:
        page.go_back()
        page.wait_for_selector(".tf-recorded")
    assert until(lambda: worker.jobs[0].outcome == "cancelled")
    page.evaluate("window.held = false")
    page.wait_for_timeout(1500)
    prompt, columns = ("a cat", {"bf16", "MXFP8"}) if how == "stop" else (PROMPT, {"bf16", "MXFP8", "NVFP4"})
    assert until(lambda: set(pictures(page)) == {f"{column}: {prompt}, seed 7" for column in columns})
    assert "Making" not in page.inner_text(".tf-verdict")
    assert page.is_enabled("#tf-go") and page.is_disabled("#tf-stop")


@browser_test
def test_nor_does_what_was_on_its_way_before_the_run_began(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    page.evaluate(HOLD)
    generate(page, "a cat")
    time.sleep(0.5)  # in which the page is told that a run begins
    open_tab(page, words.GALLERY)
    page.locator("[data-recorded=rocket]").click()
    page.wait_for_selector("#tf-stage img", state="visible")
    time.sleep(0.5)
    page.evaluate("window.held = false")
    page.wait_for_timeout(1500)
    made = {f"{column}: {PROMPT}, seed 7" for column in ("bf16", "MXFP8", "NVFP4")}
    assert until(lambda: set(pictures(page)) == made)
    assert page.is_enabled("#tf-go") and page.is_disabled("#tf-stop") and not worker.jobs


@browser_test
def test_stop_before_the_first_picture_brings_the_earlier_results_back(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    worker.stands_at = "bf16"
    generate(page, "a cat")
    page.wait_for_selector(".tf-blank progress")
    page.click("#tf-stop")
    page.wait_for_selector(".tf-recorded")
    assert until(lambda: len(pictures(page)) == 3)
    assert until(lambda: worker.jobs[0].outcome == "cancelled")
    assert page.is_enabled("#tf-go")
    assert page.input_value("#tf-prompt textarea") == "a cat"


@browser_test
def test_stop_does_not_wait_for_the_step_to_end(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    worker.step_seconds = 3
    generate(page, "a cat")
    assert until(lambda: worker.jobs)
    page.click("#tf-stop")
    assert until(lambda: worker.jobs[0].outcome == "cancelled", 1)
    page.wait_for_selector(".tf-recorded")
    generate(page, "a dog")  # nor does the next one, but for its turn
    assert until(lambda: len(worker.jobs) == 2, 2)
    assert until(lambda: "a dog" in page.inner_text("#tf-headline"), 2)
    worker.step_seconds = 0
    finished(page)
    assert until(lambda: pictures(page)[0] == "bf16: a dog, seed 7")
    assert page.inner_text(".tf-notice") == ""
    assert [job.outcome for job in worker.jobs] == ["cancelled", "completed"]


@browser_test
def test_two_visitors_take_turns_and_stop_works_while_waiting(visit, slow):
    url, worker = slow
    worker.stands_at = "bf16"
    one, other = visit(url), visit(url)
    generate(one, "a cat")
    one.wait_for_selector(".tf-blank progress")
    generate(other, "a dog")
    other.get_by_text(words.STARTING).wait_for()
    assert pictures(other) == []
    other.click("#tf-stop")
    other.wait_for_selector(".tf-recorded")
    worker.stands_at = None
    finished(one)
    generate(other, "a fish")
    finished(other)
    ran = [(job.request.prompt, job.outcome, job.steps > 0) for job in worker.jobs]
    assert ran == [("a cat", "completed", True), ("a dog", "cancelled", False), ("a fish", "completed", True)]
    assert worker.most_at_once == 1


@browser_test
def test_closing_the_tab_frees_the_worker(chromium, slow):
    url, worker = slow
    page = chromium.new_page()
    page.goto(url)
    page.wait_for_selector("#tf-go")
    worker.stands_at = "bf16"
    generate(page)
    page.wait_for_selector(".tf-blank progress")
    page.close(run_before_unload=True)  # as a person closes it: the page says that it goes
    assert until(lambda: worker.jobs[0].outcome == "cancelled")


@browser_test
def test_a_batch_shows_every_picture(visit, quick):
    page = visit(quick[0])
    page.get_by_text(words.compare.MORE, exact=True).click()
    label = words.compare.batch_label(catalog.MINI_FLUX)
    number = page.get_by_label(f"number input for {label}")
    # Gradio builds the settings as they unfold, and a value typed into one that is not ready yet is lost.
    page.wait_for_timeout(500)
    number.fill("4")
    page.keyboard.press("Tab")
    assert until(lambda: page.get_by_label(f"range slider for {label}").input_value() == "4")
    generate(page)
    finished(page)
    assert until(lambda: len(pictures(page)) == 12)
    assert until(lambda: len(set(pictures(page))) == 12)
    assert quick[1].jobs[-1].request.batch_size == 4
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    page.get_by_label("3", exact=True).check()
    assert page.locator(".tf-pair:visible").get_attribute("data-pair") == "bf16/nvfp4/2"


@browser_test
def test_the_form_decides_what_is_asked(visit, quick):
    page = visit(quick[0])
    page.get_by_role("button", name="an octopus on a yellow background").click()
    page.get_by_label("FP8", exact=True).check()
    page.get_by_label("MXFP8 · emulated").uncheck()
    page.click("#tf-dice")
    assert until(lambda: page.input_value("#tf-seed input") != "7")
    seed = int(page.input_value("#tf-seed input"))
    page.get_by_text(words.compare.MORE, exact=True).click()
    page.get_by_text(words.RECIPES["full"]).click()
    page.click("#tf-go")
    finished(page)
    asked = quick[1].jobs[-1].request
    assert asked == CompareRequest.create(
        "an octopus on a yellow background", precisions=["fp8", "nvfp4"], seed=seed, recipe="full"
    )


@browser_test
@pytest.mark.parametrize(
    ("prompt", "seed", "sentence"),
    [
        ("   ", "7", "The prompt is empty: describe the picture in a few words."),
        ("x" * 151, "7", "The prompt has 151 characters: this model takes at most 150."),
        (PROMPT, "-1", "seed is -1: it must lie between 0 and 4294967295."),
        (PROMPT, "4294967296", "seed is 4294967296: it must lie between 0 and 4294967295."),
        (PROMPT, "1.5", "seed must be a whole number, not 1.5."),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_lost(visit, quick, prompt, seed, sentence):
    url, worker = quick
    jobs = len(worker.jobs)
    page = visit(url)
    page.fill("#tf-seed input", seed)
    generate(page, prompt)
    assert notice(page) == sentence
    assert until(lambda: len(pictures(page)) == 3)
    assert page.locator(".tf-recorded").is_visible()
    assert page.input_value("#tf-prompt textarea") == prompt
    assert page.input_value("#tf-seed input") == seed
    assert page.is_enabled("#tf-go")
    assert len(worker.jobs) == jobs
    page.fill("#tf-seed input", "7")
    generate(page, "a cat")
    finished(page)
    assert page.inner_text(".tf-notice") == ""


@browser_test
def test_a_failure_shows_its_sentence_and_the_earlier_results(visit, recorded):
    with served(FakeWorker(fail_at="bf16", failure="Shard 2 of mini-flux is cut short."), recorded) as url:
        page = visit(url)
        generate(page, "a cat")
        assert notice(page) == "Shard 2 of mini-flux is cut short."
        page.wait_for_selector(".tf-recorded")
        assert until(lambda: len(pictures(page)) == 3)
        assert page.is_enabled("#tf-go")


@browser_test
def test_a_failure_halfway_keeps_the_finished_picture(visit, recorded):
    with served(FakeWorker(fail_at="nvfp4", failure="Out of memory."), recorded) as url:
        page = visit(url)
        generate(page, "a cat")
        assert notice(page) == "Out of memory."
        assert until(lambda: len(pictures(page)) == 2)
        assert words.run.FAILED_KEPT in page.inner_text(".tf-verdict")


@browser_test
def test_a_crash_of_the_worker_leaves_a_usable_page(visit, recorded):
    worker = FakeWorker()
    worker.submit = lambda request, out: 1 / 0
    with served(worker, recorded) as url:
        page = visit(url)
        generate(page)
        assert notice(page) == words.BROKEN
        assert page.is_enabled("#tf-go")
        del worker.submit
        generate(page)
        finished(page)


@browser_test
def test_a_format_that_a_run_disproves_is_called_emulated_without_a_reload(visit, recorded):
    worker = FakeWorker(support=BLACKWELL)
    with served(worker, recorded) as url:
        page = visit(url)
        assert "NVFP4, INT8 native" in page.inner_text(".tf-machine")
        assert "NVFP4" in page.locator("#tf-precisions label").all_inner_texts()
        worker.support["nvfp4"] = replace(BLACKWELL["nvfp4"], execution="emulated", disproved=True)
        generate(page, "a cat on a red background")
        finished(page)
        assert until(lambda: "NVFP4 emulated" in page.inner_text(".tf-machine"))
        assert until(lambda: "NVFP4 · emulated" in page.locator("#tf-precisions label").all_inner_texts())


@browser_test
def test_who_presses_generate_before_the_page_was_told_what_to_show_gets_the_run(visit, quick):
    url, worker = quick
    jobs = len(worker.jobs)
    page = visit("about:blank", wait=False)
    with held(page) as came:
        page.goto(url)
        page.wait_for_selector("twinframe-cover", state="detached")
        page.fill("#tf-prompt textarea", PROMPT)
        page.keyboard.press("Enter")
        assert until(lambda: page.get_by_role("button", name="Stop").is_enabled() and came())
    page.wait_for_selector("#tf-headline [data-address^='made=']:not([data-busy])")
    assert len(worker.jobs) == jobs + 1 and worker.jobs[-1].request.prompt == PROMPT
