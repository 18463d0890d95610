"""Step previews: what they show, how little they take, that nothing else changes, and what is said of such a run."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine import events
from engine.columns import Column
from engine.request import CompareRequest
from engine.runtime import previews
from engine.runtime.pipeline import Progress, call
from engine.runtime.studio import Studio
from tests.support import tiny
from tests.support.fake_engine import FakeWorker, served, until
from ui import words

browser_test = pytest.mark.browser
SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def levels(jpeg):
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.array(picture)


@pytest.fixture
def clock():
    return SimpleNamespace(now=0.0, step=0.0)


@pytest.fixture
def previewer(monkeypatch, clock):
    """One whose latents are pictures, and whose decoder takes as long as `clock.step` says."""
    seen = []

    def decode(pipeline, latents, request):
        clock.now += clock.step
        seen.append(latents)
        return latents

    monkeypatch.setitem(previews.DECODERS, "Fake", decode)
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(sigmas=SIGMAS))
    made = previews.Previewer(pipeline, SimpleNamespace(pipeline="Fake"), None, clock=lambda: clock.now)
    made.seen = seen
    return made


def test_what_is_expected_lies_where_the_path_is_heading(previewer):
    """On the straight line between noise and a picture, it is the picture from the second step on."""
    picture, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    drawn = [previewer((1 - s) * picture + s * noise, index) for index, s in enumerate(SIGMAS[1:])]
    assert drawn[0] is None
    for found in previewer.seen:
        torch.testing.assert_close(found, picture[:1], rtol=0, atol=1e-5)
    assert len(previewer.seen) == 3
    assert levels(drawn[1]).shape == (8, 8, 3)


def test_previews_take_a_fifth_of_the_time_at_most(previewer, clock):
    clock.step = 0.3
    drawn = 0
    for index in range(100):
        clock.now += 0.1  # a step
        drawn += previewer(torch.zeros(1, 3, 8, 8), index % 4) is not None
    assert drawn > 5
    assert drawn * 0.3 / clock.now <= previews.SHARE + 0.01


def test_a_large_picture_is_shown_small(previewer):
    for index in range(2):
        drawn = previewer(torch.zeros(1, 3, 512, 1024), index)
    assert levels(drawn).shape == (128, 256, 3)


@pytest.mark.parametrize("model", ["flux.1-dev", "qwen-image", "ltx-2"])
def test_the_last_latents_are_decoded_as_the_pipeline_does(tmp_path, model, cache):
    spec = tiny.spec(model, tiny.checkpoint(model, tmp_path / "weights"))
    frames = 9 if spec.modality == "video" else 1
    asked = replace(CompareRequest.create("a cat", model=model, num_inference_steps=2), height=64, width=64)
    asked = replace(asked, num_frames=frames)
    studio = Studio("cpu")
    pipeline = studio.rendition(spec, Column.of("bf16", spec.recipes[0]), lambda _: None).pipeline
    kept = {}

    class Keep(Progress):
        def __call__(self, pipeline, index, timestep, kwargs):
            kept.update(latents=kwargs["latents"].clone())
            return super().__call__(pipeline, index, timestep, kwargs)

    with torch.inference_mode():
        made = call(pipeline, spec, asked, 7, Keep("bf16", lambda _: None, lambda: False))
        found = previews.DECODERS[spec.pipeline](pipeline, kept["latents"][:1], asked)[0]
    expected = made.images[0] if spec.modality == "image" else made.frames[0, 0]
    assert found.shape == expected.shape
    if spec.modality == "image":  # a clip's first frame alone lacks what its neighbours tell the decoder
        assert ((found / 2 + 0.5).clamp(0, 1) - expected).abs().mean() < 0.01


@pytest.fixture(scope="module")
def seen(worker, ask, tmp_path_factory):
    """The same request with previews and without."""

    def carry_out(**fields):
        out = tmp_path_factory.mktemp("out")
        return list(worker.submit(ask(precisions=["nvfp4"], **fields), out).events())

    return SimpleNamespace(plain=carry_out(), live=carry_out(previews=True))


def test_the_miniature_shows_both_sides_while_they_are_made_and_makes_the_same(seen):
    comparison = seen.live[-1].comparison
    for made, plain in zip(comparison.results, seen.plain[-1].comparison.results, strict=True):
        file = Path(made.files[0])
        assert file.read_bytes() == Path(plain.files[0]).read_bytes(), "a preview changed the picture"
        drawn = [e.preview for e in seen.live if isinstance(e, events.Step) and e.column == made.column]
        assert drawn[0] is None and drawn[-1] is None
        last = next(preview for preview in reversed(drawn) if preview is not None)
        with Image.open(file) as picture:
            apart = np.abs(levels(last).astype(float) - np.array(picture.convert("RGB"))).mean()
        assert apart < 40, "the preview shows something else"


def test_a_run_with_previews_is_not_timed_and_one_without_has_none(seen):
    live, plain = (stream[-1].comparison for stream in (seen.live, seen.plain))
    assert [g.latency_comparable for g in live.results] == [False, False]
    assert plain.reference.latency_comparable
    assert "not timed" in live.reference.ran["Timing"]
    assert "not timed" not in plain.reference.ran["Timing"]
    assert not any(e.preview for e in seen.plain if isinstance(e, events.Step))
    assert live.reference.memory.peak == plain.reference.memory.peak


def with_previews(page):
    """Press Generate with live previews on; gives the page back."""
    page.get_by_text(words.compare.MORE, exact=True).click()
    page.get_by_label(words.compare.PREVIEWS_LABEL).check()
    page.click("#tf-go")
    return page


@browser_test
def test_the_page_shows_previews_where_they_were_asked_for_and_says_that_nothing_was_timed(visit):
    worker = FakeWorker(step_seconds=0.08)
    with served(worker) as url:
        page = with_previews(visit(url))
        preview = page.locator(".tf-preview").first
        preview.wait_for()
        assert preview.get_attribute("alt").startswith("bf16 so far, step ")
        first = preview.get_attribute("src")
        assert until(lambda: page.locator(".tf-preview").first.get_attribute("src") != first)
        assert until(lambda: "left" in page.inner_text(".tf-blank >> nth=0"))
        worker.step_seconds = 0
        page.wait_for_selector("a[href$='comparison.json']")
        assert page.locator(".tf-preview").count() == 0
        assert words.verdict.PREVIEWED in page.inner_text(".tf-verdict")
        text = page.inner_text("#tf-stage .tf-card >> nth=0")
        assert words.NOT_TIMED_SHORT in text and words.compare.NOT_TIMED_NOTE in text
        assert "2.10" not in text and "text 0.02" not in text
        assert "×" not in page.inner_text("#tf-stage")
        page.get_by_label(words.compare.TABLE, exact=True).check()
        assert words.NOT_TIMED in page.inner_text("#tf-table tr >> nth=1")
        assert worker.jobs[-1].request.previews


@browser_test
def test_stop_ends_a_run_with_previews_within_a_step(visit):
    worker = FakeWorker(step_seconds=0.08)
    worker.stands_at = "bf16"
    with served(worker) as url:
        page = with_previews(visit(url))
        page.locator(".tf-preview").first.wait_for()
        page.click("#tf-stop")
        assert until(lambda: worker.jobs[0].outcome == "cancelled")
        steps = worker.jobs[0].steps
        page.wait_for_timeout(300)
        assert worker.jobs[0].steps <= steps + 1
        assert page.locator(".tf-preview").count() == 0
