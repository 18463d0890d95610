"""Several recipes of one format in one comparison: each its own denoiser, files and facts, from the same noise."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from engine import catalog, events
from engine.columns import EXACT, Column
from engine.outputs import blind, media
from engine.quality import evaluate
from engine.quality.evaluate import Settings
from engine.request import CompareRequest
from engine.results import Comparison
from engine.runtime.multi_device import Studios, driving
from engine.runtime.studio import Studio
from engine.serving.telemetry import Telemetry
from tests.support import tiny

COLUMNS = ("bf16", "nvfp4", "nvfp4@full")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A random FLUX of a few hundred kilobytes."""
    folder = tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux")
    made = replace(tiny.spec("flux.1-dev", folder), recipes=("post", "full"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, made.id: made}))
        yield made


@pytest.fixture(scope="module")
def studio(cache):
    return Studio("cpu")


def made(studio, spec, out, **asked):
    request, told = CompareRequest.create("a cat", model=spec.id, num_inference_steps=1, **asked), []
    with driving(studio.device):
        comparison = studio.compare(request, out, told.append, lambda: False)
    return SimpleNamespace(comparison=comparison, told=told, out=out)


@pytest.fixture(scope="module")
def both(studio, spec, tmp_path_factory):
    return made(studio, spec, tmp_path_factory.mktemp("both"), precisions=["nvfp4", "nvfp4@full"])


def test_each_column_is_told_of_kept_and_counted_by_itself(both):
    results = both.comparison.results
    assert tuple(g.column for g in results) == both.comparison.request.precisions == COLUMNS
    assert [g.precision for g in results] == ["bf16", "nvfp4", "nvfp4"]
    assert [Path(g.files[0]).name for g in results] == ["bf16.png", "nvfp4.png", "nvfp4@full.png"]
    assert [e.column for e in both.told if isinstance(e, events.Finished)] == list(COLUMNS)
    assert {e.column for e in both.told if isinstance(e, events.Step)} == set(COLUMNS)
    _, post, full = results
    assert full.layers.quantized > post.layers.quantized and full.memory.weights < post.memory.weights
    assert [g.ran["Recipe"].split(":")[0] for g in results] == ["post", "post", "full"]
    assert len({Path(g.files[0]).read_bytes() for g in results}) == 3
    assert Comparison.load(both.out) == both.comparison


def test_a_columns_file_does_not_depend_on_how_it_was_asked_for(both, studio, spec, tmp_path):
    alone = made(studio, spec, tmp_path, precisions=["nvfp4"], recipe="full").comparison.results[1]
    together = both.comparison.results[2]
    assert Path(alone.files[0]).name == "nvfp4.png"
    assert Path(alone.files[0]).read_bytes() == Path(together.files[0]).read_bytes()
    assert media.read_recipe(Path(together.files[0]))["request"]["recipe"] == "full"
    assert (alone.metrics, alone.memory, alone.layers) == (together.metrics, together.memory, together.layers)


def test_what_is_loaded_is_kept_by_column(both, studio, spec):
    there = {key[1:] for key in studio._renditions if key[0] == spec.id}
    assert there >= {("bf16", ""), ("nvfp4", "post"), ("nvfp4", "full")}


def test_blind_pairs_and_metrics_know_their_column(both):
    pairs = list(blind.pairs(both.comparison, fresh=False))
    assert [(pair.precision, pair.recipe, pair.column) for pair in pairs] == [
        ("nvfp4", "post", "nvfp4"),
        ("nvfp4", "full", "nvfp4@full"),
    ]
    assert blind.Sitting(pairs, lambda: both.out).ask(pairs[0].model, "nvfp4@full", blind.WHICH).pair == pairs[1]
    native = [replace(g, latency_comparable=True) for g in both.comparison.results]
    telemetry = Telemetry()
    telemetry.completed(replace(both.comparison, results=tuple(native)))
    assert 'precision="nvfp4@full",stage="total"} 1' in telemetry.exposition({})


def test_recipes_of_a_format_are_made_on_different_devices(spec):
    studios = SimpleNamespace(_others=("one", "two"))
    places = [Studios._place(studios, spec, Column("nvfp4", recipe)) for recipe in spec.recipes]
    assert set(places) == {"one", "two"} and Studios._place(studios, spec, EXACT) is studios


def test_an_evaluation_scores_a_column_by_its_own_recipe_and_the_others_by_each(spec):
    settings = Settings(precisions=("nvfp4", "mxfp8@full", "bf16"), recipes=("full", "seed"))
    wanted = [Column("mxfp8", "full"), Column("nvfp4", "post"), Column("nvfp4", "full")]
    assert evaluate._lanes(spec, settings) == wanted
    assert evaluate._lanes(spec, Settings(precisions=("nvfp4", "nvfp4@post"))) == [Column("nvfp4", "post")]
