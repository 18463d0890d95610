"""What the bundled miniatures are: their recipes' counts, their figures in the README, and mini-ltx2's clips."""

from dataclasses import asdict

import pytest

from assets.figures import retrieval
from assets.training import mini_ltx2
from engine import catalog, loading, recipes
from engine.catalog import MINI_LTX2
from engine.results import LayerCounts

COUNTS = {
    ("mini-flux", "seed"): (78, 88),
    ("mini-qwen", "seed"): (48, 118),
    ("mini-ltx2", "seed"): (186, 194),
    ("mini-ltx2", "seed-corrected"): (168, 194),
    ("mini-ltx2", "full"): (194, 194),
}


@pytest.mark.parametrize("precision", ["fp8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("model", "name"), COUNTS)
def test_recipes_take_as_many_layers_as_the_readme_says(model, name, precision):
    quantized, linears = COUNTS[model, name]
    plan = recipes.plan(loading.empty_transformer(catalog.MODELS[model]), recipes.recipe(model, name), precision)
    assert plan.counts == LayerCounts(quantized=quantized, skipped=linears - quantized, left=0)
    readme = (catalog.ASSETS.parent / "README.md").read_text()
    assert name == "full" or f"{quantized} of {linears} Linear" in readme or f"`{name}` {quantized}" in readme


def test_the_corrected_recipe_names_only_what_there_is():
    empty = loading.empty_transformer(MINI_LTX2)
    unmatched = {
        name: recipes.plan(empty, recipes.recipe("mini-ltx2", name), "nvfp4").unmatched
        for name in ("seed", "seed-corrected")
    }
    assert unmatched["seed-corrected"] == () and len(unmatched["seed"]) == 7


def test_the_readmes_table_is_what_the_figures_give():
    readme = (catalog.ASSETS.parent / "README.md").read_text()
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
