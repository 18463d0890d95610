"""What the bundled miniatures are: their recipes' counts, their figures in assets/models, and mini-ltx2's clips."""

from dataclasses import asdict
from types import SimpleNamespace

import av
import pytest
import torch

from assets.figures import retrieval
from assets.training import mini_ltx2
from engine import catalog
from engine.catalog import MINI_LTX2
from engine.columns import Column
from engine.quantization import recipes
from engine.request import CompareRequest
from engine.results import LayerCounts
from engine.runtime.studio import Studio
from engine.weights import loading

COUNTS = {
    ("mini-flux", "post"): (78, 88),
    ("mini-qwen", "post"): (48, 118),
    ("mini-ltx2", "post"): (186, 194),
    ("mini-ltx2", "post-corrected"): (168, 194),
    ("mini-ltx2", "full"): (194, 194),
}


@pytest.mark.parametrize("precision", ["fp8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("model", "name"), COUNTS)
def test_recipes_take_as_many_layers_as_the_readme_says(model, name, precision):
    quantized, linears = COUNTS[model, name]
    plan = recipes.plan(loading.empty_transformer(catalog.MODELS[model]), recipes.recipe(model, name), precision)
    assert plan.counts == LayerCounts(quantized=quantized, skipped=linears - quantized, left=0)
    readme = " ".join((catalog.ASSETS / "models" / "README.md").read_text().split())
    assert name == "full" or f"{quantized} of {linears} Linear" in readme or f"`{name}` {quantized}" in readme


def test_the_corrected_recipe_names_only_what_there_is():
    empty = loading.empty_transformer(MINI_LTX2)
    unmatched = {
        name: recipes.plan(empty, recipes.recipe("mini-ltx2", name), "nvfp4").unmatched
        for name in ("post", "post-corrected")
    }
    assert unmatched["post-corrected"] == () and len(unmatched["post"]) == 7


def test_the_readmes_table_is_what_the_figures_give():
    readme = (catalog.ASSETS / "models" / "README.md").read_text()
    assert readme.split("<!-- retrieval -->")[1].split("<!-- /retrieval -->")[0].strip() == retrieval.table()


def test_mini_ltx2_is_called_as_it_was_trained():
    trained = mini_ltx2.settings()
    mine = asdict(MINI_LTX2.defaults) | dict(MINI_LTX2.call)
    mine["audio_guidance_scale"] = mine["audio_guidance_scale"] or mine["guidance_scale"]  # None follows it
    assert {key: mine[key] for key in trained.keys() - {"return_dict"}} == {
        key: value for key, value in trained.items() if key != "return_dict"
    }
    assert MINI_LTX2.limits.sizes == ((trained["height"], trained["width"]),)
    assert MINI_LTX2.limits.num_frames == (trained["num_frames"],) * 2


# A real clip: what has been learnt is seen and heard


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """Something slides in on white, in bf16: the file and the tensors."""
    asked = CompareRequest.create(
        "a fire engine sliding in on a white background", model="mini-ltx2", precisions=["bf16"]
    )
    studio, out = Studio("cpu"), tmp_path_factory.mktemp("clip")
    with torch.inference_mode():
        rendition = studio.rendition(MINI_LTX2, Column.of("bf16", "post"), lambda _: None)
        generation, made = studio.generate(rendition, MINI_LTX2, asked, out, lambda _: None, lambda: False)
    return SimpleNamespace(file=generation.files[0], pixels=made.pixels[0].float(), sound=made.audio[0])


def test_a_clip_is_two_seconds_with_stereo_sound(slide):
    with av.open(slide.file) as clip:
        video, audio = clip.streams.video[0], clip.streams.audio[0]
        assert (video.frames, video.average_rate, video.width, video.height) == (25, 12, 160, 160)
        assert (audio.rate, audio.channels) == (16000, 2)
        assert float(audio.duration * audio.time_base) == pytest.approx(25 / 12, abs=0.05)


def test_it_slides_in_on_the_background_that_was_asked_for(slide):
    corners = slide.pixels[-1][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 0.8
    seen = (0.8 - slide.pixels.amin(1)).clamp(min=0)  # (frames, height, width)
    place = (seen.sum(1) * torch.linspace(-1, 1, 160)).sum(-1) / seen.sum((1, 2))
    assert place[-1] - place[8] > 0.15
    assert seen[0].sum() < 0.5 * seen[-1].sum(), "it is there from the start"


def test_its_sound_comes_from_the_left_to_the_middle(slide):
    left, right = slide.sound.abs()
    begin, end = slice(0, 2000), slice(-8000, -2000)
    assert left[begin].mean() > 2 * right[begin].mean() > 0
    assert left[end].mean().item() == pytest.approx(right[end].mean().item(), rel=0.3)


def test_a_recipe_that_takes_every_layer_runs_without_guidance_too(tmp_path):
    """The pipeline's latents are a view then, which torchao's MXFP8 refuses."""
    asked = CompareRequest.create(
        MINI_LTX2.examples[0], model="mini-ltx2", precisions=["mxfp8"], recipe="full", num_inference_steps=1
    )
    studio = Studio("cpu")
    with torch.inference_mode():
        rendition = studio.rendition(MINI_LTX2, Column.of("mxfp8", "full"), lambda _: None)
        _, made = studio.generate(rendition, MINI_LTX2, asked, tmp_path, lambda _: None, lambda: False)
    assert made.pixels[0].isfinite().all() and made.audio[0].isfinite().all()
