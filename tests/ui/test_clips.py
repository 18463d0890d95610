"""Clips that play together, their curve and their maps."""

from __future__ import annotations

import pytest

from engine import catalog
from tests.support.fake_engine import FakeWorker, record, served, until
from tests.support.page import (
    card,
    finished,
    generate,
    set_field,
)
from ui import words

browser_test = pytest.mark.browser


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
    assert clips(page, "clip.muted") == [True, False, True]
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
        return {name: page.inner_text(f"#tf-stage .tf-value[data-column={name}] b") for name in expected}

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
    told = pair.locator(".tf-value b").inner_text()
    assert until(lambda: f"{float(told):.3f} over the whole frame" in pair.locator(".tf-worst").inner_text())


@browser_test
def test_one_clip_of_a_batch_is_compared_at_a_time(visit, theatre):
    page = seated(visit, theatre)
    page.locator("#tf-stage .tf-clip").get_by_label("2", exact=True).check()
    assert clips(page, "clip.src.split('/').pop()") == ["bf16-2.mp4", "nvfp4-2.mp4", "mxfp8-2.mp4"]
    assert page.locator("#tf-stage svg:visible").count() == 1
    assert until(lambda: clips(page, "clip.readyState") == [4] * 3)
    with page.expect_download() as download:
        card(page, "NVFP4").get_by_text("MP4 2").click()
    assert download.value.suggested_filename.endswith("_nvfp4-2.mp4")


@browser_test
def test_the_slider_splits_two_clips_that_play_together(visit, theatre):
    page = seated(visit, theatre)
    page.click("#tf-stage .tf-play")
    assert until(lambda: clips(page, "clip.paused") == [False] * 3)
    page.get_by_label(words.compare.SLIDER, exact=True).check()
    assert until(lambda: clips(page, "clip.paused") == [True] * 3), "a clip out of sight goes on, with its sound"
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
    worker.stands_at = "mxfp8"
    with served(worker, models=("ltx-2",)) as url:
        page = visit(url)
        page.get_by_text(words.compare.MORE, exact=True).click()
        set_field(page, words.compare.frames_label(catalog.LTX_2), "25")
        generate(page, "waves on a teal background")
        page.wait_for_selector("#tf-stage video")
        page.evaluate("document.querySelector('#tf-stage video').kept = true")
        assert until(lambda: "Making the MXFP8 clip, 2 of 3" in page.inner_text(".tf-verdict"))
        worker.step_seconds, worker.stands_at = 0, None
        finished(page)
        assert until(lambda: clips(page, "clip.readyState") == [4] * 3)
        assert page.evaluate("document.querySelector('#tf-stage video').kept"), "a clip was loaded anew"
        assert worker.jobs[-1].request.num_frames == 25
        assert "25 frames" in page.inner_text(".tf-origin")
