"""The page in Chromium, around a fake worker, and the parts of it that need no browser."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from html import escape
from pathlib import Path
from urllib.parse import parse_qsl, unquote

import numpy as np
import pytest
from PIL import Image

from engine import catalog, events, reference
from engine.benchmark import plots
from engine.errors import RequestError
from engine.request import CompareRequest
from tests.support.fake_engine import BLACKWELL, LAPTOP, NO_FP8, RULER, FakeWorker, open_tab, record, served, until
from ui import link, words
from ui import view as views
from ui.html import cards
from ui.tabs import benchmarks
from ui.web.served_files import Shelf

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a rocket on a blue background"
HOSTILE = "<img src=x onerror=window.hit=1><script>window.hit=1</script> ${window.hit=1} {{7*7}} \"'&amp;"
BEYOND_THE_EDGE = """() => [...document.querySelectorAll('main *')].filter((e) => {
  const inside = e.closest('.tf-scroll, #tf-examples > .gallery, .visually-hidden');
  return (!inside || inside === e) && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1;
}).map((e) => e.className || e.tagName)"""
"""Elements that stick out of the screen, other than in a box that scrolls by itself: clipped, or scrolling the page."""
browser_test = pytest.mark.browser


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    return folder


@pytest.fixture(scope="module")
def quick(recorded):
    """An app whose worker is done at once."""
    worker = FakeWorker()
    with served(worker, recorded) as url:
        yield url, worker


@pytest.fixture
def slow(recorded):
    """An app whose worker takes its time: `step_seconds` may be changed while it runs."""
    worker = FakeWorker(step_seconds=0.05, ruler_runs=2)
    with served(worker, recorded) as url:
        yield url, worker
        worker.step_seconds = 0


def generate(page, prompt=None):
    if prompt is not None:
        page.fill("#tf-prompt textarea", prompt)
    page.click("#tf-go")


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


# The first screen


@browser_test
def test_the_first_screen_shows_a_recorded_comparison_and_fetches_nothing_elsewhere(chromium, quick):
    page = chromium.new_page()
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(quick[0])
    page.wait_for_selector("#tf-stage img")
    assert until(lambda: len(pictures(page)) == 3)
    assert pictures(page) == [f"{name}: {PROMPT}, seed 7" for name in ("bf16", "MXFP8", "NVFP4")]
    origin = page.inner_text(".tf-origin")
    assert origin.startswith("recorded")
    assert "Fake recorder 9000" in origin
    assert PROMPT in origin
    assert "Fake laptop CPU · FP8 native · MXFP8, NVFP4 emulated" in page.inner_text(".tf-header")
    assert page.input_value("#tf-prompt textarea") == PROMPT
    assert not [url for url in fetched if not url.startswith((quick[0], "data:", "blob:"))]
    page.close()


@browser_test
def test_without_a_recorded_comparison_the_page_says_what_to_do(visit, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "comparison.json").write_text('{"request": ')
    with served(FakeWorker(), tmp_path) as url:
        page = visit(url)
        assert words.compare.WELCOME in page.inner_text("#tf-headline")
        assert pictures(page) == []
        generate(page)
        finished(page)
        assert until(lambda: len(pictures(page)) == 3)


# A run


@browser_test
def test_pictures_appear_as_each_precision_finishes(visit, slow):
    page = visit(slow[0])
    generate(page, "a cat on a red background")
    page.wait_for_selector(".tf-blank progress")
    assert pictures(page) == [], "a recorded picture could be taken for a new one"
    assert "recorded" not in page.inner_text("#tf-headline")
    assert "Making the bf16 picture, 1 of 3" in page.inner_text(".tf-verdict")
    assert until(lambda: "left" in page.inner_text(".tf-detail"))
    assert page.is_disabled("#tf-go")
    page.wait_for_selector("#tf-stage img")
    assert until(lambda: pictures(page) == ["bf16: a cat on a red background, seed 7"])
    assert page.locator(".tf-blank").count() == 2
    assert until(lambda: "Making the NVFP4 picture, 3 of 3" in page.inner_text(".tf-verdict"))
    assert len(pictures(page)) == 2
    finished(page)
    assert until(lambda: len(pictures(page)) == 3)
    assert page.is_enabled("#tf-go")
    assert page.is_disabled("#tf-stop")


@browser_test
def test_enter_generates_and_a_second_enter_does_not_start_another(visit, slow):
    page = visit(slow[0])
    page.fill("#tf-prompt textarea", "a cat")
    page.press("#tf-prompt textarea", "Enter")
    page.wait_for_selector(".tf-blank progress")
    page.press("#tf-prompt textarea", "Enter")
    assert notice(page) == words.BUSY
    slow[1].step_seconds = 0
    finished(page)
    assert len(slow[1].jobs) == 1


@browser_test
def test_stop_keeps_what_is_finished_and_frees_the_worker(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    generate(page, "a cat")
    page.wait_for_selector(".tf-blank progress")
    page.wait_for_selector("#tf-stage img")
    worker.step_seconds = 1  # on a busy machine too, Stop comes before the other pictures
    page.click("#tf-stop")
    page.get_by_text(words.run.STOPPED_KEPT).wait_for()
    assert until(lambda: worker.jobs[0].outcome == "cancelled")
    assert worker.jobs[0].steps < 45
    assert until(lambda: pictures(page) == ["bf16: a cat, seed 7"])
    assert page.locator(".tf-blank").all_inner_texts() == [words.run.STOPPED_BEFORE] * 2
    assert page.inner_text(".tf-notice") == ""
    worker.step_seconds = 0
    generate(page, "a dog")
    finished(page)
    assert until(lambda: len(pictures(page)) == 3)


@browser_test
def test_stop_before_the_first_picture_brings_the_earlier_results_back(visit, slow):
    page, worker = visit(slow[0]), slow[1]
    worker.step_seconds = 0.5  # on a busy machine too, Stop comes before the picture
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
    worker.step_seconds = 0.2
    one, other = visit(url), visit(url)
    generate(one, "a cat")
    one.wait_for_selector(".tf-blank progress")
    generate(other, "a dog")
    other.get_by_text(words.STARTING).wait_for()
    assert pictures(other) == []
    other.click("#tf-stop")
    other.wait_for_selector(".tf-recorded")
    worker.step_seconds = 0
    finished(one)
    generate(other, "a fish")
    finished(other)
    assert [job.request.prompt for job in worker.jobs if job.steps] == ["a cat", "a fish"]
    assert worker.most_at_once == 1


@browser_test
def test_closing_the_tab_frees_the_worker(chromium, slow):
    url, worker = slow
    page = chromium.new_page()
    page.goto(url)
    page.wait_for_selector("#tf-go")
    generate(page)
    page.wait_for_selector(".tf-blank progress")
    page.close()
    assert until(lambda: worker.jobs[0].outcome == "cancelled")
    assert worker.jobs[0].steps < 60


@browser_test
def test_a_batch_shows_every_picture(visit, quick):
    page = visit(quick[0])
    page.get_by_text(words.compare.MORE).click()
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
    assert len(set(pictures(page))) == 12
    assert quick[1].jobs[-1].request.batch_size == 4
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    page.get_by_label("3", exact=True).check()
    assert page.locator(".tf-pair:visible").get_attribute("data-pair") == "mxfp8/2"


@browser_test
def test_the_form_decides_what_is_asked(visit, quick):
    page = visit(quick[0])
    page.get_by_role("button", name="an octopus on a yellow background").click()
    page.get_by_label("FP8", exact=True).check()
    page.get_by_label("MXFP8 · emulated").uncheck()
    page.click("#tf-dice")
    assert until(lambda: page.input_value("#tf-seed input") != "7")
    seed = int(page.input_value("#tf-seed input"))
    page.get_by_text(words.compare.MORE).click()
    page.get_by_text(words.RECIPES["full"]).click()
    page.click("#tf-go")
    finished(page)
    asked = quick[1].jobs[-1].request
    assert asked == CompareRequest.create(
        "an octopus on a yellow background", precisions=["fp8", "nvfp4"], seed=seed, recipe="full"
    )


# What goes wrong


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
def test_an_unavailable_precision_has_no_chip_and_a_reason(visit):
    with served(FakeWorker(support=NO_FP8)) as url:
        page = visit(url)
        assert page.locator("#tf-precisions label").all_inner_texts() == ["MXFP8 · emulated", "NVFP4 · emulated"]
        assert "FP8 is unavailable here: FP8 needs an RTX 40 or H100 class device." in page.inner_text(".tf-form")


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


# The numbers


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


# Models


@pytest.fixture(scope="module")
def many(recorded):
    """An app that offers every model."""
    worker = FakeWorker()
    with served(worker, recorded, models=tuple(catalog.MODELS)) as url:
        yield url, worker


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


@browser_test
def test_the_form_follows_the_model(visit, many):
    page = visit(many[0])
    page.get_by_text(words.compare.MORE).click()
    for spec in (catalog.FLUX_DEV, catalog.LTX_2, catalog.FLUX_SCHNELL, catalog.MINI_FLUX):
        choose_model(page, spec.name)
        steps = field(page, words.compare.STEPS_LABEL)
        assert until(lambda: steps.input_value() == str(spec.defaults.num_inference_steps)), spec.id  # noqa: B023
        limits = spec.limits
        shown = {
            "#tf-guidance": limits.guidance_scale[0] < limits.guidance_scale[1],
            "#tf-frames": spec.modality == "video",
            "#tf-size": len(limits.sizes) > 1,
            "#tf-recipe": len(spec.recipes) > 1,
        }
        assert {part: page.locator(part).is_visible() for part in shown} == shown, spec.id
        labels = [words.compare.recipe(name, summary) for name, summary in many[1].recipes(spec.id).items()]
        assert page.locator("#tf-recipe label").all_inner_texts() == labels
        assert page.locator("#tf-examples .gallery-item").count() == len(spec.examples)
        assert page.input_value("#tf-prompt textarea") == spec.examples[0]
        assert f"up to {limits.prompt_characters} characters" in page.get_attribute(
            "#tf-prompt textarea", "placeholder"
        )
        hints = page.inner_text(".tf-form")
        assert (f"The weights of {spec.id} are not here." in hints) == (not spec.bundled)
        assert ("non-commercial use only" in hints) == (spec is catalog.FLUX_DEV)
        assert spec.licence_note in hints
        assert spec.licence in hints


@browser_test
def test_another_model_shows_a_recording_of_its_own_and_a_result_is_one_step_back(visit, tmp_path):
    record(tmp_path / "rocket")
    for name, example in enumerate(catalog.MINI_LTX2.examples[:2]):
        record(tmp_path / f"clip-{name}", example, model="mini-ltx2")
    with served(FakeWorker(), tmp_path, models=("mini-flux", "mini-qwen", "mini-ltx2")) as url:
        page = visit(url)
        page.wait_for_selector("#tf-stage img")
        choose_model(page, catalog.MINI_LTX2.name)
        page.wait_for_selector("#tf-stage video")
        assert page.locator("#tf-headline .tf-recorded").count() == 1
        assert catalog.MINI_LTX2.examples[0] in page.inner_text("#tf-headline")
        choose_model(page, catalog.MINI_QWEN.name)  # of which nothing is recorded
        page.wait_for_selector("#tf-frames", state="hidden")  # the form is that of pictures now
        generate(page)
        finished(page)
        made = pictures(page)
        choose_model(page, catalog.MINI_LTX2.name)
        page.wait_for_selector("#tf-stage video")
        page.go_back()
        assert until(lambda: pictures(page) == made != [])
        assert page.locator("#tf-headline .tf-recorded").count() == 0
        assert page.input_value("#tf-model input") == catalog.MINI_QWEN.name


@browser_test
def test_a_prompt_of_ones_own_stays_when_the_model_changes(visit, many):
    page = visit(many[0])
    page.fill("#tf-prompt textarea", "a cat of my own")
    choose_model(page, "FLUX.1-schnell")
    assert until(lambda: page.locator("#tf-examples .gallery-item").count() == len(catalog.FLUX_SCHNELL.examples))
    assert page.input_value("#tf-prompt textarea") == "a cat of my own"
    generate(page)
    finished(page)
    assert many[1].jobs[-1].request == CompareRequest.create("a cat of my own", model="flux.1-schnell")


@browser_test
def test_a_single_model_needs_no_choice(visit, quick):
    page = visit(quick[0])
    assert page.locator("#tf-model").count() == 0
    generate(page, "a cat")
    finished(page)
    assert quick[1].jobs[-1].request.model == "mini-flux"


# Clips

CLIP = {"model": "ltx-2", "num_frames": 49, "height": 256, "width": 256}
WATCH = """(frames) => new Promise((done) => {
  const clips = [...document.querySelectorAll('#tf-stage video:not([hidden])')], seen = [];
  const look = () => {
    seen.push(clips.map((clip) => clip.currentTime));
    if (seen.length < frames) requestAnimationFrame(look); else done(seen);
  };
  look();
})"""
"""Where all clips are, over a number of screen refreshes."""


@pytest.fixture(scope="module")
def theatre(tmp_path_factory):
    """An app that opens with recorded clips: two in each of three precisions."""
    folder = tmp_path_factory.mktemp("clips")
    record(folder / "train", "a steam train on a teal background", batch_size=2, **CLIP)
    with served(FakeWorker(), folder, models=("mini-flux", "ltx-2")) as url:
        yield url


def clips(page, script, part="#tf-stage"):
    """Something of each clip that is shown."""
    return page.eval_on_selector_all(f"{part} video:not([hidden])", f"(all) => all.map((clip) => {script})")


def seated(visit, url):
    """The page once every clip can be played."""
    page = visit(url)
    assert until(lambda: clips(page, "clip.readyState") == [4] * 3)
    return page


def seek(page, frame):
    page.locator("#tf-stage .tf-seek").fill(str(frame))


def frame_of(page):
    return int(page.inner_text("#tf-stage .tf-time").split("frame ")[1].split()[0])


@browser_test
def test_clips_play_together_with_the_sound_of_one(visit, theatre):
    page = seated(visit, theatre)
    assert clips(page, "clip.paused") == [True] * 3
    page.click("#tf-stage .tf-play")
    assert until(lambda: all(at > 0.1 for at in clips(page, "clip.currentTime")))
    assert clips(page, "clip.paused") == [False] * 3
    assert clips(page, "clip.muted") == [False, True, True]
    assert clips(page, "clip.webkitAudioDecodedByteCount > 0")[0], "there is no sound track"

    def apart():
        seen = page.evaluate(WATCH, 12)
        return max(max(at) - min(at) for at in seen if max(at) - min(at) < 1)  # one of them may just have begun again

    assert until(lambda: apart() < 1 / 24)
    first = frame_of(page)
    assert until(lambda: frame_of(page) != first)
    page.locator("#tf-stage .tf-sound").get_by_label("NVFP4", exact=True).check()
    assert clips(page, "clip.muted") == [True, True, False]
    page.locator("#tf-stage .tf-sound").get_by_label(words.compare.SILENCE, exact=True).check()
    assert clips(page, "clip.muted") == [True] * 3
    page.click("#tf-stage .tf-play")
    assert clips(page, "clip.paused") == [True] * 3
    assert len(set(clips(page, "Math.floor(clip.currentTime * 24)"))) == 1, "they stop at different frames"


@browser_test
def test_clips_begin_again_together(visit, theatre):
    page = seated(visit, theatre)
    seek(page, 47)
    page.click("#tf-stage .tf-play")
    assert until(lambda: all(0.1 < at < 1.5 for at in clips(page, "clip.currentTime")))
    assert clips(page, "clip.paused") == [False] * 3


@browser_test
def test_seeking_moves_every_clip_and_the_keyboard_goes_frame_by_frame(visit, theatre):
    page = seated(visit, theatre)

    def at(frame):
        return until(lambda: clips(page, "Math.floor(clip.currentTime * 24)") == [frame] * 3)

    seek(page, 30)
    assert at(30)
    assert page.inner_text("#tf-stage .tf-time") == "1.25 s · frame 31 of 49"
    page.keyboard.press("ArrowRight")
    assert at(31)
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert at(28)
    page.focus("#tf-stage .tf-seek")
    page.keyboard.press("ArrowRight")
    assert at(29)
    page.keyboard.press("Space")
    assert until(lambda: clips(page, "clip.paused") == [False] * 3)
    page.keyboard.press("ArrowRight")
    assert clips(page, "clip.paused") == [True] * 3
    page.focus("#tf-prompt textarea")
    frame = frame_of(page)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    assert frame_of(page) == frame, "typing a prompt moved the clips"
    assert clips(page, "clip.paused") == [True] * 3


@browser_test
def test_the_curve_gives_the_score_of_each_frame(visit, theatre):
    page = seated(visit, theatre)
    saved = page.evaluate("document.querySelector(\"a[href$='comparison.json']\").href")
    found = page.request.get(saved).json()["results"]
    expected = {r["precision"]: r["lpips_frames"][0] for r in found if r["lpips_frames"]}
    assert page.locator("#tf-stage svg:not([hidden]) polyline").count() == len(expected) == 2

    def told():
        return {name: page.inner_text(f"#tf-stage .tf-value[data-precision={name}] b") for name in expected}

    assert told() == {name: words.score(values[0]) for name, values in expected.items()}
    plot = page.locator("#tf-stage .tf-plot")
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] * 20 / 48, "y": 20})
    assert told() == {name: words.score(values[20]) for name, values in expected.items()}
    assert clips(page, "clip.currentTime < 0.1") == [True] * 3, "pointing at a frame is not seeking"
    plot.click(position={"x": box["width"] * 36 / 48, "y": 20})
    page.mouse.move(0, 0)
    assert frame_of(page) == 37
    assert told() == {name: words.score(values[36]) for name, values in expected.items()}
    # The playhead stands over the handle of the seek bar.
    bar = page.locator("#tf-stage .tf-seek").bounding_box()
    head = plot.evaluate(
        "(plot) => plot.getBoundingClientRect().x + parseFloat(getComputedStyle(plot, '::before').left)"
    )
    assert abs(head - (bar["x"] + 7 + (bar["width"] - 14) * 36 / 48)) < 2
    assert f"{words.score(found[2]['lpips'])} mean of 2" in " ".join(card(page, "NVFP4").inner_text().split())


@browser_test
def test_the_curve_is_a_seek_bar_and_the_maps_follow_it(visit, theatre):
    page = seated(visit, theatre)
    page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
    page.get_by_label(words.compare.MAPS["lpips"], exact=True).check()
    pair = page.locator(".tf-pair:visible")
    assert until(lambda: "LPIPS" in pair.locator(".tf-worst").inner_text())
    plot = pair.locator(".tf-plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 24 / 48, box["y"] + 20, steps=4)
    page.mouse.move(box["x"] + box["width"] * 40 / 48, box["y"] + 90, steps=4)
    page.mouse.up()
    assert "frame 41 of 49" in pair.locator(".tf-time").inner_text()
    told = pair.locator(".tf-value[data-precision=mxfp8] b").inner_text()
    assert until(lambda: f"{float(told):.3f} over the whole frame" in pair.locator(".tf-worst").inner_text())


@browser_test
def test_one_clip_of_a_batch_is_compared_at_a_time(visit, theatre):
    page = seated(visit, theatre)
    page.locator("#tf-stage .tf-clip").get_by_label("2", exact=True).check()
    assert clips(page, "clip.src.split('/').pop()") == ["bf16-2.mp4", "mxfp8-2.mp4", "nvfp4-2.mp4"]
    assert page.locator("#tf-stage svg:visible").count() == 1
    assert until(lambda: clips(page, "clip.readyState") == [4] * 3)
    with page.expect_download() as download:
        card(page, "NVFP4").get_by_text("MP4 2").click()
    assert download.value.suggested_filename == "nvfp4-2.mp4"


@browser_test
def test_the_slider_splits_two_clips_that_play_together(visit, theatre):
    page = seated(visit, theatre)
    page.click("#tf-stage .tf-play")
    assert until(lambda: clips(page, "clip.paused") == [False] * 3)
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    assert until(lambda: clips(page, "clip.paused") == [True] * 3), "a clip out of sight goes on, with its sound"
    page.get_by_role("radio", name="NVFP4").check()
    pair = ".tf-pair:not([hidden])"
    assert until(lambda: clips(page, "clip.readyState", pair) == [4, 4])
    page.click(f"{pair} .tf-play")
    assert until(lambda: all(at > 0.1 for at in clips(page, "clip.currentTime", pair)))
    assert clips(page, "clip.muted", pair) == [False, True]
    page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
    assert until(lambda: "NVFP4 is " in page.inner_text(f"{pair} .tf-worst"))


@browser_test
def test_clips_appear_as_each_precision_finishes_and_stay_in_place(visit, tmp_path):
    worker = FakeWorker(step_seconds=0.05)
    with served(worker, models=("ltx-2",)) as url:
        page = visit(url)
        page.get_by_text(words.compare.MORE).click()
        set_field(page, words.compare.frames_label(catalog.LTX_2), "25")
        generate(page, "waves on a teal background")
        page.wait_for_selector("#tf-stage video")
        page.evaluate("document.querySelector('#tf-stage video').kept = true")
        assert "Making the MXFP8 clip, 2 of 3" in page.inner_text(".tf-verdict")
        worker.step_seconds = 0
        finished(page)
        assert until(lambda: clips(page, "clip.readyState") == [4] * 3)
        assert page.evaluate("document.querySelector('#tf-stage video').kept"), "a clip was loaded anew"
        assert worker.jobs[-1].request.num_frames == 25
        assert "25 frames" in page.inner_text(".tf-origin")


# Benchmarks


def benchmark(**changes):
    """What `python -m engine bench` writes, made up."""

    def row(precision, batch_size, execution, seconds, peak):
        latency = {"median": seconds, "p10": 0.99 * seconds, "p90": 1.01 * seconds}
        return {
            "precision": precision,
            "batch_size": batch_size,
            "method": "engine",
            "execution": execution,
            "latency_s": latency | {"text": 0.05, "denoise": seconds - 0.2, "decode": 0.15},
            "step_ms": 1000 * (seconds - 0.2) / 28,
            "repeats": 3,
            "memory_gb": {"weights": 0.8 * peak, "peak_allocated": peak, "peak_reserved": 1.1 * peak},
            "first_call_s": 21.5,
            "error": None,
        }

    return {
        "device": "Fake H200",
        "versions": {"torch": "2.11.0"},
        "date": "2026-11-22T10:00:00+00:00",
        "model": "flux.1-dev",
        "weights": "random",
        "settings": {
            "height": 1024,
            "width": 1024,
            "num_frames": 1,
            "num_inference_steps": 28,
            "guidance_scale": 3.5,
            "recipe": "post",
            "repeats": 5,
        },
        "rows": [
            row("bf16", 1, "native", 4.0, 39.0),
            row("fp8", 1, "native", 3.2, 27.3),
            row("nvfp4", 1, "emulated", 31.7, 21.3),
            row("bf16", 4, "native", 15.0, 44.0),
            row("fp8", 4, "native", 12.0, 33.0),
        ],
    } | changes


def rows_of(html, heading):
    """The text of a table's rows, cell by cell, in the article with that heading."""
    article = html.split(f">{heading}</h3>")[1].split("</article>")[0]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", article)]
    return [[re.sub("<[^>]+>", "", cell) for cell in row] for row in cells]


def test_a_measurement_is_set_against_bf16_of_its_own_file(tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(benchmark()))
    post = reference.read()
    html = benchmarks.measured(tmp_path, post)
    for part in ("Fake H200", "22 Nov 2026", "random weights", "torch 2.11.0", "1024 × 1024 · 28 steps · guidance 3.5"):
        assert part in html
    rows = rows_of(html, "FLUX.1-dev")
    assert " ".join(rows[2]) == "1 FP8 0.05 3.00 0.15 3.20 3.17–3.23 1.25× 107 21.84 27.30 −30% 21.5"
    assert rows[3] == ["1", "NVFP4", words.NOT_COMPARABLE, "17.04", "–", "–", "–"]
    assert "31.7" not in html
    assert ["1", "39.00", "38.34", "+1.7%"] in rows
    assert ["4", "44.00", "44.39", "−0.9%"] in rows
    assert html.count("<svg") == 2
    assert "quoted" not in html


@pytest.mark.parametrize("key", ["stopped", "note"])
def test_what_limits_a_measurement_is_said_beside_it(tmp_path, key):
    (tmp_path / "h200.json").write_text(json.dumps(benchmark(**{key: "after 90 s <b>"})))
    assert "after 90 s &lt;b&gt;" in benchmarks.measured(tmp_path, reference.read())


def test_what_was_not_measured_is_not_filled_in(tmp_path):
    made = benchmark()
    bf16, fp8, *_ = made["rows"]
    fp8 |= {"latency_s": None, "step_ms": None, "first_call_s": None, "error": "OutOfMemoryError: <no> room"}
    fp8["memory_gb"]["peak_allocated"] = None
    bare = bf16 | {"method": "bare", "latency_s": bf16["latency_s"] | dict.fromkeys(("text", "denoise", "decode"))}
    (tmp_path / "h200.json").write_text(json.dumps(made | {"rows": [bf16, fp8, bare | {"step_ms": None}]}))
    rows = rows_of(benchmarks.measured(tmp_path, reference.read()), "FLUX.1-dev")
    assert " ".join(rows[3]) == "bf16 bare pipeline – – – 4.00 3.96–4.04 – – 31.20 39.00 – 21.5"
    assert rows[2][2:] == ["OutOfMemoryError: &lt;no&gt; room", "21.84", "–", "–", "–"]


def test_the_engines_step_is_set_against_the_posts_method_at_the_same_precision(tmp_path):
    made = benchmark()
    bf16, fp8, *_ = made["rows"]
    posts = [row | {"method": "post", "step_ms": 1.25 * row["step_ms"]} for row in (bf16, fp8)]
    posts += [row | {"method": "post-default", "step_ms": 1.5 * row["step_ms"]} for row in (bf16, fp8)]
    (tmp_path / "h200.json").write_text(json.dumps(made | {"rows": [bf16, fp8, *posts]}))
    html = benchmarks.measured(tmp_path, reference.read())
    heads, *rows = rows_of(html, "FLUX.1-dev")[:7]
    for head, factor in (("vs the post's", "1.25×"), ("vs default mode", "1.50×")):
        column = next(k for k, text in enumerate(heads) if text.startswith(head))
        assert [row[column] for row in rows] == [factor, factor, "–", "–", "–", "–"]
    named = ["Twinframe", "the post&#x27;s", "default mode"]
    assert [row[1] for row in rows] == [name for name in named for _ in range(2)]
    assert escape(plots.POSTS_FP8) in html


@pytest.mark.parametrize(("batch_size", "head"), [(1, "vs default mode"), (4, "vs the post's")])
def test_an_older_files_one_method_of_the_post_is_shown_for_what_it_was(tmp_path, batch_size, head):
    """It compiled with the default mode everywhere, which at batch 1 of FLUX.1-dev is not what the post does."""
    made = benchmark()
    engine = next(row for row in made["rows"] if row["batch_size"] == batch_size)
    (tmp_path / "h200.json").write_text(json.dumps(made | {"rows": [engine, engine | {"method": "seed"}]}))
    heads, first, _ = rows_of(benchmarks.measured(tmp_path, reference.read()), "FLUX.1-dev")[:3]
    shown = [text for text in heads if text.startswith(("vs the post's", "vs default mode"))]
    assert [text.startswith(head) for text in shown] == [True]
    assert first[heads.index(shown[0])] == "1.00×"


def test_beside_the_posts_figures_stands_what_sets_them_apart():
    html = benchmarks.quoted(reference.read())
    assert "PIL" in html and "104 of the 200 prompts" in html


def test_the_runs_of_a_model_stand_below_its_name_each_with_a_name_of_its_own(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(benchmark()))
    html = benchmarks.measured(tmp_path, reference.read())
    assert re.findall("<h3[^>]*>(.*?)</h3>", html) == ["FLUX.1-dev"]
    assert len(re.findall("<h4>Run [12]: ", html)) == 2
    regions = re.findall('role="region" aria-label="([^"]*)"', html)
    assert len(regions) == len(set(regions)) == 4


def test_a_models_newest_run_comes_first(tmp_path):
    for name, day in (("a", 20), ("b", 22), ("c", 21)):
        made = benchmark(date=f"2026-11-{day}T10:00:00+00:00", device=f"GPU of the {day}th")
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    html = benchmarks.measured(tmp_path, reference.read())
    assert re.findall(r"<h4>Run (\d)", html) == ["1", "2", "3"]
    assert re.findall(r"GPU of the (\d+)th", html) == ["22", "21", "20"]


def test_rows_that_were_not_measured_equally_often_say_so(tmp_path):
    made = benchmark()
    for row, repeats in zip(made["rows"], (3, 2, 3, 3), strict=False):
        row["repeats"] = repeats
    (tmp_path / "a.json").write_text(json.dumps(made))
    assert "median of 2 to 3" in benchmarks.measured(tmp_path, reference.read())


def test_a_file_that_is_no_benchmark_is_named_and_the_others_are_shown(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [')
    (tmp_path / "b.json").write_text(json.dumps({"rows": [1]}))
    (tmp_path / "c.json").write_text(json.dumps(benchmark(device="<b>device</b>")))
    html = benchmarks.measured(tmp_path, reference.read())
    assert words.benchmarks.unreadable("a.json") in html
    assert words.benchmarks.unreadable("b.json") in html
    assert "&lt;b&gt;device" in html
    assert "<b>" not in html


def test_every_figure_of_the_post_is_quoted_and_every_table_says_so():
    post = reference.read()
    html = benchmarks.quoted(post)
    for model in {row["model"] for row in post["performance"]}:
        found = rows_of(html, catalog.MODELS[model].name)[2:]
        for row in post["performance"]:
            if row["model"] == model:
                line = next(cells for cells in found if cells[0] == words.NAMES[row["precision"]])
                speedup = "–" if row["precision"] == "bf16" else f"{row['speedup']:.2f}×"
                cells = [f"{row['latency_s']:.2f}", speedup, f"{row['peak_memory_gb']:.2f}"]
                assert line[1 + 3 * [1, 4, 8].index(row["batch_size"]) :][:3] == cells
    assert ["FLUX.1-dev", "0.11", "0.44"] in rows_of(html, words.benchmarks.QUOTED_LPIPS)
    assert ["NVFP4", "full", "0.480", "2.11", "21.25"] in rows_of(html, words.benchmarks.QUOTED_SELECTIVE)
    assert html.count("<table") == html.count(words.QUOTED_BADGE) == 5


@browser_test
def test_the_benchmarks_tab_keeps_quoted_and_measured_apart(visit, tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(benchmark()))
    with served(FakeWorker(), measured=tmp_path) as url:
        page = visit(url, width=390, height=844)
        open_tab(page, words.BENCHMARKS)
        measured, quoted = page.locator(".tf-half").all()
        assert "Fake H200" in measured.inner_text()
        assert words.MEASURED_BADGE in measured.inner_text()
        assert words.QUOTED_BADGE not in measured.inner_text()
        assert words.QUOTED_BADGE in quoted.inner_text()
        assert "38.34" in quoted.inner_text()
        assert "Fake H200" not in quoted.inner_text()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(BEYOND_THE_EDGE) == []


@browser_test
def test_without_measurements_the_tab_says_how_to_make_one(visit, quick):
    page = visit(quick[0])
    page.get_by_role("tab", name=words.BENCHMARKS).click()
    assert "python -m engine bench --model" in page.inner_text(".tf-half >> nth=0")


# Views, downloads, screens


@browser_test
def test_the_slider_splits_two_pictures_by_keyboard(visit, quick):
    page = visit(quick[0])
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    assert not page.locator("#tf-stage").is_visible()
    pair = page.locator(".tf-pair:visible")
    assert pair.get_attribute("data-pair") == "mxfp8/0"
    page.get_by_role("radio", name="NVFP4").check()
    assert pair.get_attribute("data-pair") == "nvfp4/0"
    assert pair.locator("img").evaluate_all("(all) => all.map(i => i.alt.split(':')[0])") == ["bf16", "NVFP4"]
    above = pair.locator(".tf-above")
    before = above.evaluate("(layer) => getComputedStyle(layer).clipPath")
    pair.locator("input[type=range]").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert before == "inset(0px 0px 0px 50%)"
    assert above.evaluate("(layer) => getComputedStyle(layer).clipPath") == "inset(0px 0px 0px 60%)"
    box = pair.locator(".tf-layers").bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 80)
    page.mouse.up()
    assert above.evaluate("(layer) => getComputedStyle(layer).clipPath") == "inset(0px 0px 0px 25%)"


@browser_test
def test_the_slider_keeps_its_choice_over_a_new_run(visit, quick):
    page = visit(quick[0])
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    page.get_by_role("radio", name="NVFP4").check()
    generate(page, "a cat")
    finished(page)
    assert page.get_by_role("radio", name="NVFP4").is_checked()
    pair = page.locator(".tf-pair:visible")
    assert pair.count() == 1
    assert pair.locator("img").nth(1).get_attribute("alt") == "NVFP4: a cat, seed 7"


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


@browser_test
def test_all_pictures_zoom_and_move_together(visit, quick):
    page = visit(quick[0])
    frames = page.locator("#tf-stage .tf-frame")
    assert shown(page) == [[0, 0, 1]] * 3
    box = frames.nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.wheel(0, -200)
    assert shown(page) == [[0, 0, 1]] * 3, "the wheel scrolls the page until a picture is clicked"
    frames.nth(1).dblclick(position={"x": box["width"] / 4, "y": box["height"] / 4})
    assert shown(page) == [[-0.5, -0.5, 3]] * 3
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert shown(page) == [[-0.6, -0.6, 3]] * 3
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 4, steps=3)
    page.mouse.up()
    assert shown(page) == [[-0.1, -0.6, 3]] * 3
    page.keyboard.press("0")
    assert shown(page) == [[0, 0, 1]] * 3
    page.keyboard.press("+")
    assert shown(page) == [[-0.25, -0.25, 1.5]] * 3
    page.wait_for_timeout(50)
    page.mouse.wheel(0, -200)
    zoom = shown(page)[0][2]
    assert zoom > 1.5
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    assert shown(page, ".tf-pair:not([hidden])")[0][2] == zoom, "another view shows another part"
    generate(page, "a cat")
    finished(page)
    page.get_by_label(words.compare.SIDE, exact=True).check()
    assert [each[2] for each in shown(page)] == [zoom] * 3, "a new run forgets the zoom"
    page.get_by_role("button", name=words.compare.ZOOM_RESET).click()
    assert shown(page) == [[0, 0, 1]] * 3


@browser_test
def test_flicker_shows_one_or_the_other_in_the_same_place(visit, quick):
    page = visit(quick[0])
    page.locator("body").press("f")
    assert page.get_by_label(words.compare.FLICKER, exact=True).is_checked()
    page.get_by_role("radio", name="NVFP4").check()

    def seen():
        return page.eval_on_selector_all(
            ".tf-pair:not([hidden]) .tf-corner",
            "(all) => all.filter((e) => e.checkVisibility({visibilityProperty: true})).map((e) => e.textContent)",
        )

    def above():
        return page.locator(".tf-pair:not([hidden]) .tf-above").evaluate("(e) => getComputedStyle(e).visibility")

    assert (seen(), above()) == (["bf16"], "hidden")
    page.keyboard.press("f")
    assert (seen(), above()) == (["NVFP4"], "visible")
    page.locator(".tf-pair:not([hidden]) .tf-frame").click()
    assert (seen(), above()) == (["bf16"], "hidden")
    page.get_by_role("button", name=words.compare.FLIP, exact=True).click()
    assert (seen(), above()) == (["NVFP4"], "visible")
    page.fill("#tf-prompt textarea", "")
    page.locator("#tf-prompt textarea").press("f")
    assert seen() == ["NVFP4"], "typing a prompt flipped the picture"
    assert page.input_value("#tf-prompt textarea") == "f"


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """An app that opens with pictures that differ in one square alone, by 60 levels of red."""
    folder = tmp_path_factory.mktemp("marked")
    saved = record(folder / "rocket", precisions=["nvfp4"])
    with Image.open(saved.reference.files[0]) as picture:
        pixels = np.array(picture)
    pixels[160:192, 64:96] = 100
    Image.fromarray(pixels).save(saved.reference.files[0])
    pixels[160:192, 64:96, 0] += 60
    Image.fromarray(pixels).save(saved.results[1].files[0])
    with served(FakeWorker(), folder) as url:
        yield url


@browser_test
def test_the_difference_finds_the_one_spot_that_differs(visit, marked):
    page = visit(marked)
    page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
    said = page.locator(".tf-worst:visible")
    assert until(lambda: said.inner_text())
    assert said.inner_text() == (
        "The worst spot, 32 × 32 pixels: NVFP4 is 20.0 of 255 levels away from bf16 there, 0.3 over the whole picture."
    )
    spot = page.locator(".tf-spot").first
    assert spot.evaluate("(s) => [s.style.left, s.style.top, s.style.width]") == ["25%", "62.5%", "12.5%"]
    inside, outside = page.evaluate(
        """() => { const context = document.querySelector('.tf-map').getContext('2d');
             return [[80, 176], [20, 20]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3)); }"""
    )
    assert outside == [0, 0, 0]
    assert sum(inside) > 60
    crops = page.evaluate(
        """() => [...document.querySelectorAll('.tf-crop')].map((crop) =>
             [crop.width, ...crop.getContext('2d').getImageData(3, 3, 1, 1).data.slice(0, 3)])"""
    )
    assert crops == [[32, 100, 100, 100], [32, 160, 100, 100]]
    page.get_by_label(words.compare.SIDE, exact=True).check()
    page.get_by_role("button", name=words.compare.TO_WORST).click()
    assert shown(page) == [[-0.75, -2.0 - 0.25, 4]] * 2


@browser_test
def test_the_lpips_map_is_the_other_choice_with_a_legend_of_its_own(visit, marked):
    page = visit(marked)
    page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
    assert page.locator(".tf-colours:visible").inner_text().split("\n")[-1] == words.compare.MAP_ENDS["pixels"]
    page.get_by_label(words.compare.MAPS["lpips"], exact=True).check()
    said = page.locator(".tf-worst:visible")
    assert until(lambda: "LPIPS" in said.inner_text())
    shown_score = card_score(page)
    worst, whole = (float(number) for number in re.findall(r"\b0\.\d+", said.inner_text()))
    assert whole == pytest.approx(shown_score, abs=0.0006)
    assert worst == pytest.approx(4 * whole, rel=0.02), "the map of the fake engine is four times the score there"
    assert page.locator(".tf-spot").first.evaluate("(s) => [s.style.left, s.style.top]") == ["0%", "0%"]
    inside, outside = page.evaluate(
        """() => { const map = document.querySelector('.tf-map'), context = map.getContext('2d');
             return [0.2, 0.8].map((part) => [...context.getImageData(part * map.width, part * map.height, 1, 1).data]
               .slice(0, 3)); }"""
    )
    assert outside == [0, 0, 0]
    assert sum(inside) > 60
    assert page.locator(".tf-colours:visible").inner_text().split("\n")[-1] == words.compare.MAP_ENDS["lpips"]
    page.get_by_role("button", name=words.compare.TO_WORST).click()
    assert until(lambda: shown(page, ".tf-pair:not([hidden])")[0][2] == 4)
    assert shown(page, ".tf-pair:not([hidden])") == [[0, 0, 4]]


def card_score(page):
    """LPIPS of NVFP4 as it stands beside the pair."""
    return float(page.locator(".tf-pair:not([hidden]) .tf-lpips dd").inner_text().split()[0])


@browser_test
def test_a_recorded_run_without_maps_offers_none(visit, tmp_path):
    record(tmp_path / "old")
    file = tmp_path / "old" / "comparison.json"
    saved = json.loads(file.read_text())
    for result in saved["results"]:
        del result["lpips_maps"]
    file.write_text(json.dumps(saved))
    with served(FakeWorker(), tmp_path) as url:
        page = visit(url)
        page.get_by_label(words.compare.DIFFERENCE, exact=True).check()
        assert until(lambda: page.locator(".tf-worst:visible").inner_text())
        assert page.get_by_label(words.compare.MAPS["lpips"], exact=True).count() == 0


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
    assert card(page, "bf16").locator("[data-why]").first.get_attribute("title") == words.WHY["latency"]
    page.get_by_label(words.compare.TABLE, exact=True).check()
    page.get_by_role("button", name="PSNR").click()
    assert note.inner_text() == words.WHY["psnr"]


# Links and code


LINKED = {
    "model": "ltx-2",
    "precisions": ["fp8", "nvfp4"],
    "seed": 41,
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "num_frames": 49,
    "height": 320,
    "width": 416,
    "batch_size": 2,
    "recipe": "strict",
}


@browser_test
def test_a_copied_link_restores_every_control_and_starts_nothing(visit, many):
    url, worker = many
    asked = CompareRequest.create("waves & “stones” #1? 100%", **LINKED)
    jobs = len(worker.jobs)
    page = visit(f"{url}/{link.query(asked)}", permissions=["clipboard-read", "clipboard-write"])
    assert until(lambda: page.input_value("#tf-prompt textarea") == asked.prompt)
    assert page.input_value("#tf-model input") == "LTX-2"
    page.wait_for_timeout(300)
    assert len(worker.jobs) == jobs
    assert page.locator(".tf-recorded").is_visible()
    page.click("#tf-go")
    finished(page)
    assert worker.jobs[-1].request == asked
    page.get_by_role("button", name=words.compare.LINK).click()
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == f"{url}/{link.query(asked)}")
    assert words.compare.COPIED in page.inner_text(".tf-origin")


@browser_test
def test_a_wrong_link_is_one_sentence_and_the_defaults(visit, quick):
    page = visit(f"{quick[0]}/?prompt=a+fish&seed=-1")
    assert notice(page) == words.compare.link_wrong("seed is -1: it must lie between 0 and 4294967295.")
    assert page.input_value("#tf-prompt textarea") == PROMPT
    generate(page)
    finished(page)
    assert quick[1].jobs[-1].request == CompareRequest.create(PROMPT)


@browser_test
def test_the_code_of_a_precision_is_copied(visit, quick):
    page = visit(quick[0], permissions=["clipboard-read", "clipboard-write"])
    card(page, "NVFP4").get_by_role("button", name=words.compare.CODE).click()
    expected = f"# nvfp4, emulated\nprompt = {PROMPT!r}\n"
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": "flux.9"}, f"There is no model 'flux.9': choose one of {', '.join(catalog.MODELS)}."),
        ({"model": "ltx-2"}, "LTX-2 is not offered here: choose mini-flux."),
        ({"seed": "abc"}, "seed must be a whole number, not text."),
        ({"steps": "1e999"}, "num_inference_steps must be a whole number, not the number inf."),
        ({"size": "256"}, "size is '256': write it as width x height, such as 256x256."),
        ({"precisions": "fp3"}, "There is no precision 'fp3': choose from bf16, fp8, mxfp8, nvfp4."),
        ({"prompt": " "}, "The prompt is empty: describe the picture in a few words."),
    ],
)
def test_a_link_is_checked_like_every_request(values, sentence):
    with pytest.raises(RequestError, match=re.escape(sentence)):
        link.read(values, ["mini-flux"])


@pytest.mark.parametrize("changes", [{}, LINKED, {"precisions": ["bf16"], "guidance_scale": 1.2345678}])
def test_a_link_holds_the_whole_request(changes):
    asked = CompareRequest.create("a “cat” & a dog + 50% #1", **changes)
    assert link.read(dict(parse_qsl(link.query(asked)[1:])), list(catalog.MODELS)) == asked


def test_an_address_that_asks_for_nothing_is_no_link():
    assert link.read({"__theme": "dark", "utm_source": "x"}, ["mini-flux"]) is None


@browser_test
def test_the_table_has_a_row_a_precision(visit, quick):
    page = visit(quick[0])
    page.get_by_label(words.compare.TABLE, exact=True).check()
    rows = page.locator("#tf-table tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["bf16", "MXFP8", "NVFP4"]
    assert "27.4" in rows[2]


@browser_test
def test_pictures_and_json_download(visit, quick):
    page = visit(quick[0])
    generate(page)
    finished(page)
    job = quick[1].jobs[-1]
    with page.expect_download() as download:
        page.click("a[href$='comparison.json']")
    assert json.loads(Path(download.value.path()).read_text())["request"] == job.request.to_json()
    with page.expect_download() as download:
        card(page, "NVFP4").get_by_text("PNG").click()
    assert download.value.suggested_filename == "nvfp4.png"
    assert Path(download.value.path()).read_bytes() == (job.out / "nvfp4.png").read_bytes()


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit, quick, scheme):
    page = visit(quick[0], width=390, height=844, color_scheme=scheme, has_touch=True, is_mobile=True)
    generate(page, "wide" * 36)
    finished(page)
    page.get_by_text(words.compare.MORE).click()
    page.get_by_text(words.compare.RAN, exact=True).first.click()
    said = words.compare
    for name in (said.SIDE, said.SLIDER, said.FLICKER, said.DIFFERENCE, said.TABLE):
        page.get_by_label(name, exact=True).check()
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        assert page.evaluate(BEYOND_THE_EDGE) == [], name
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 17, 19)"
    assert dark == (scheme == "dark")


@browser_test
def test_light_and_dark_can_be_switched_and_stay(visit, quick):
    page = visit(quick[0], color_scheme="light")
    page.get_by_label(words.compare.THEME_TOGGLE).click()
    assert page.evaluate("document.body.classList.contains('dark')")
    page.reload()
    page.wait_for_selector("#tf-go")
    assert until(lambda: page.evaluate("document.body.classList.contains('dark')"))


@browser_test
def test_the_keyboard_reaches_everything_with_a_visible_focus(visit, quick):
    page = visit(quick[0])
    page.focus("#tf-prompt textarea")
    seen = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        state = page.evaluate(
            """() => { const e = document.activeElement, ring = e.closest('label') ?? e;
               const visible = [e, ring].some(x => getComputedStyle(x).outlineStyle !== 'none');
               return [e.id || e.name || e.className || e.innerText, visible]; }"""
        )
        seen.add(state[0])
        if state[0] in ("tf-go", "fp8", "nvfp4", "tf-dice", "tf-view"):
            assert state[1], f"no visible focus on {state[0]}"
    assert {"tf-go", "fp8", "nvfp4", "tf-dice", "tf-view"} <= seen


# Without a browser


def test_what_to_know_of_the_machine_stands_in_the_header():
    assert "tf-note" not in cards.header("Some CPU")
    said = cards.header("Some CPU", "The driver <535> is too old.")
    assert '<p class="tf-note" role="note">The driver &lt;535&gt; is too old.</p>' in said


def comparison(tmp_path, support=LAPTOP, **changes):
    job = FakeWorker(support=support).submit(CompareRequest.create(PROMPT, **changes), tmp_path)
    *_, done = job.events()
    return done.comparison


MINIATURE = f" {words.verdict.MINIATURE}"


def test_the_verdict_on_one_native_precision(tmp_path):
    said = words.verdict.verdict(comparison(tmp_path, BLACKWELL, precisions=["nvfp4"]))
    assert said == (
        "NVFP4 is 1.44× faster, needs 36% less memory (70% less for the denoiser's weights) and has an LPIPS of 0.054, "
        f"17% of the way from bf16's own noise to another seed.{MINIATURE}"
    )


def test_the_verdict_never_speaks_of_an_emulated_speed(tmp_path):
    said = words.verdict.verdict(comparison(tmp_path, precisions=["fp8", "nvfp4"]))
    assert said == (
        "FP8: 1.27× faster, 25% less memory (denoiser −48%), LPIPS 0.0056, 1% of the way to another seed. "
        "NVFP4: 46% smaller weights (denoiser −70%), LPIPS 0.054, 17% of the way to another seed. NVFP4 is emulated, "
        f"so its speed is not compared.{MINIATURE}"
    )
    said = words.verdict.verdict(comparison(tmp_path, precisions=["mxfp8"]))
    assert said == (
        "MXFP8 needs 31% less memory for its weights (46% less for the denoiser's) and has an LPIPS of 0.0066, 1% of "
        f"the way from bf16's own noise to another seed. It is emulated, so its speed is not compared.{MINIATURE}"
    )


def test_only_a_miniature_is_called_one(tmp_path):
    made = comparison(tmp_path)
    large = replace(made, request=CompareRequest.create(PROMPT, model="flux.1-dev"))
    assert words.verdict.MINIATURE in words.verdict.verdict(made)
    assert words.verdict.MINIATURE not in words.verdict.verdict(large)


@pytest.mark.parametrize(
    ("lpips", "place"),
    [
        (0.001, "within bf16's own noise"),
        (0.01, "3% of the way to another seed"),
        (0.15, "49% of the way to another seed"),
        (0.6, "198% of the way to another seed"),
    ],
)
def test_a_score_is_put_into_words_by_its_place_on_the_ruler(lpips, place):
    assert words.verdict.on_the_ruler(lpips, RULER) == place


def test_a_view_never_shows_a_picture_of_an_earlier_run(tmp_path):
    view = views.begin(CompareRequest.create(PROMPT), "device")
    assert view.finished == ()
    for event in FakeWorker().submit(view.request, tmp_path).events():
        view = views.advance(view, event)
        if isinstance(event, events.Compared):
            assert view.finished[-1].metrics == event.metrics
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


def test_the_shelf_outlives_a_cleaned_temporary_folder_and_sweeps_only_what_is_old(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("ui.web.served_files.SWEEP_SECONDS", 0)
    shelf = Shelf()
    shutil.rmtree(shelf.root)
    fresh = shelf.new()
    old = shelf.new()
    (tmp_path / "recorded").mkdir()
    pinned = shelf.pin(tmp_path / "recorded")
    for folder in (old, pinned):
        os.utime(folder, (0, 0))
    assert shelf.new().is_dir()
    assert (fresh.is_dir(), old.exists(), pinned.is_dir()) == (True, False, True)
    shelf.close()
    assert not shelf.root.exists()


def start(*arguments, code="import app; app.main()", **options):
    """`python app.py`, with fakes in the place of the worker and of the child process that needs torch."""
    code = (
        "import sys, types; from tests.support import fake_engine; fake = types.ModuleType('engine.serving.worker');"
        "fake.Worker = lambda *_, **options: fake_engine.FakeWorker(); sys.modules['engine.serving.worker'] = fake;"
        "fake.Process = types.SimpleNamespace(from_arguments=lambda _: None);"
        "sys.modules['engine.serving.process'] = fake;" + code
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, **pipes, **options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "flux.9"], f"There is no model 'flux.9': choose one of {', '.join(catalog.MODELS)}."),
        (["--models", ","], f"--models names no model: choose from {', '.join(catalog.MODELS)}."),
        (["--preload", "other"], "--preload other is not among --models mini-flux,mini-qwen,mini-ltx2."),
        (["--port", "abc"], "Argument --port: invalid int value: 'abc'. See app.py --help."),
        (["--port", "70000"], "Port 70000 does not exist: choose one from 1 to 65535."),
    ],
)
def test_a_wrong_argument_exits_2_with_one_line(arguments, sentence):
    process = start(*arguments)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (2, sentence + "\n")


def test_a_port_in_use_exits_2_with_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert stderr == (f"Cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another with --port.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_app_cleanly(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("--port", str(port))
    try:

        def answers():
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        assert until(answers, 30)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in stderr


def test_a_score_too_small_for_four_digits_does_not_read_as_zero():
    assert words.score(0.00003) == "<0.0001"
    assert words.score(0.0) == "0.0000"


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
