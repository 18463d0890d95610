"""Checkpoints of somebody's own: which kind they are, how they are named, and what is said of the others."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from engine import catalog
from engine.benchmark import bench
from engine.errors import LoadError, RequestError
from engine.outputs.program import code
from engine.quality import evaluate, prompts
from engine.quantization import recipes
from engine.quantization.inspection import inspect
from engine.request import CompareRequest
from engine.runtime.multi_device import driving
from engine.runtime.studio import Studio
from engine.weights import hub, loading, own
from tests.support import tiny
from ui.words import verdict

pytestmark = pytest.mark.usefixtures("catalog_for_one_test")
KINDS = ("flux.1-dev", "qwen-image", "ltx-2")
CARD = "---\nlicense: other\nlicense_name: my-own-licence\nlicense_link: https://example.org/licence\n---\n# Mine\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny checkpoint of each kind, once."""
    at = tmp_path_factory.mktemp("tiny")
    return {kind: tiny.checkpoint(kind, at / kind) for kind in KINDS}


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made["flux.1-dev"], tmp_path / "My style v2"))


def change(file, **values):
    said = json.loads(file.read_text()) | values
    file.write_text(json.dumps(said))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_a_model_under_its_own_name_by_its_kinds_rules(made, tmp_path, kind):
    folder = Path(shutil.copytree(made[kind], tmp_path / "My style v2"))
    (folder / "README.md").write_text(CARD)
    spec = catalog.model(own.model(str(folder)))
    assert (spec.id, spec.name, spec.like, spec.family) == ("My-style-v2", "My style v2", kind, kind)
    assert set(spec.recipes) >= {"post", "strict", "full"} and "tuned" not in spec.recipes
    assert (spec.licence, spec.licence_url) == ("my-own-licence", "https://example.org/licence")
    assert spec.defaults == catalog.MODELS[kind].defaults
    shared = loading.load_shared(spec, loading.torch.device("cpu"))
    pipeline = loading.assemble(spec, shared, loading.load_transformer(spec, loading.torch.device("cpu")))
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in shared.items() if hasattr(part, "parameters")
    }
    assert spec.memory_gb.transformer == pytest.approx(2e-9 * sum(p.numel() for p in pipeline.transformer.parameters()))
    assert spec.memory_gb.shared == pytest.approx(2e-9 * sum(sizes.values()), rel=0.02)
    assert loading.described(spec).startswith("the local folder My style v2, stored in float32")
    assert pickle.loads(pickle.dumps(spec)) == spec
    for column in ("nvfp4", "fp8@full", "mxfp8@strict"):
        assert inspect(spec.id, column)["linears"] > 0


def test_a_folder_is_compared_benched_evaluated_and_copied(folder, tmp_path, cache):
    spec = catalog.model(own.model(str(folder)))
    small = {"height": 256, "width": 256, "num_inference_steps": 1}
    asked = CompareRequest.create("a cat", model=spec.id, precisions=["nvfp4@full"], **small)
    studio = Studio("cpu")
    (tmp_path / "out").mkdir()
    with driving(studio.device):
        compared = studio.compare(asked, tmp_path / "out", lambda _: None, lambda: False)
    assert compared.results[1].metrics.mean_lpips > 0 and compared.results[1].layers.quantized
    program = code(asked, "bf16", "native")
    assert 'model = "My style v2"' in program and "revision" not in program
    size = {"height": 256, "width": 256, "steps": 1}
    settings = bench.Settings(precisions=("bf16",), batch_sizes=(1,), methods=("engine",), repeats=1, **size)
    assert bench.run(spec, settings, "cpu", loading.Source(), tmp_path / "b.json")["rows"][0]["error"] is None
    (tmp_path / "prompts.txt").write_text("a cat\n")
    summary = evaluate.run(
        spec,
        evaluate.Settings(precisions=("nvfp4",), recipes=("full",), **size),
        prompts.read(str(tmp_path / "prompts.txt")),
        "cpu",
        loading.Source(),
        tmp_path / "quality",
    )
    assert summary["model"] == spec.id


def test_a_copy_of_a_miniature_has_its_recipes_but_not_its_calibrated_weights(tmp_path):
    folder = shutil.copytree(catalog.MINI_FLUX.folder, tmp_path / "mine")
    spec = catalog.model(own.model(str(folder)))
    assert (spec.family, spec.recipes, spec.bundled) == ("mini-flux", catalog.MINI_FLUX.recipes, False)
    plan = recipes.plan_of(
        loading.empty_transformer(spec),
        spec,
        CompareRequest.create("a cat", model=spec.id, precisions=["nvfp4@tuned"]).columns[1],
    )
    assert any(layer.searched for layer in plan.layers) and not any(layer.calibrated for layer in plan.layers)


@pytest.mark.parametrize(
    ("embedded", "shifts", "argument", "guidance", "steps"),
    [
        (True, True, "guidance_scale", 3.5, 28),
        (False, False, "guidance_scale", 0.0, 4),
        (False, True, "true_cfg_scale", 3.5, 28),
    ],
)
def test_guidance_and_steps_follow_the_configuration_and_the_scheduler(
    folder, embedded, shifts, argument, guidance, steps
):
    change(folder / "transformer" / "config.json", guidance_embeds=embedded)
    change(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=shifts)
    spec = catalog.model(own.model(str(folder)))
    assert (spec.guidance_argument, spec.defaults.guidance_scale) == (argument, guidance)
    assert spec.defaults.num_inference_steps == steps


def test_a_licences_link_is_one_to_a_page(folder):
    (folder / "README.md").write_text(CARD.replace("https://example.org/licence", "javascript:alert(1)"))
    assert catalog.model(own.model(str(folder))).licence_url == own.LICENCES
    (folder / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert catalog.model(own.model(str(folder))).licence == "not stated"


def test_a_vae_that_compresses_more_has_sizes_in_larger_multiples(folder):
    change(folder / "vae" / "config.json", block_out_channels=[8] * 5)
    spec = catalog.model(own.model(str(folder)))
    assert spec.limits.size_multiple == 32 and all(not any(side % 32 for side in size) for size in spec.limits.sizes)


def test_an_unknown_denoiser_in_a_known_pipeline_is_quantized_strictly_and_says_so(folder):
    index = folder / "model_index.json"
    change(index, transformer=["diffusers", "ChromaTransformer2DModel"])
    spec = catalog.model(own.model(str(folder)))
    assert (spec.family, spec.recipes) == (catalog.UNKNOWN, ("strict", "full"))
    assert "no recipe was written for" in spec.summary
    rules = recipes.recipe(spec.family, "strict")
    assert rules.skip("blocks.0.attn.to_q", 1024, 4096) is None
    for kept in ("x_embedder", "blocks.0.norm1.linear", "proj_out", "time_text_embed.timestep_embedder.linear_1"):
        assert rules.skip(kept, 4096, 4096)
    assert rules.skip("blocks.0.attn.to_q", 1023, 4096)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "is a StableDiffusionPipeline, which is not known here: known are",
        ),
        ({"_class_name": None}, "is a pipeline without a name"),
        ({"text_encoder_2": [None, None]}, "names no text_encoder_2, and a FluxPipeline needs one"),
        ({"text_encoder_2": ["transformers", "UMT5EncoderModel"]}, "its text_encoder_2 is a UMT5EncoderModel"),
        ({"transformer": ["my_code", "Mine"]}, "its transformer is my_code.Mine, code that is not of diffusers"),
    ],
)
def test_what_cannot_work_says_which_class_it_is_and_what_is_missing(folder, values, said):
    change(folder / "model_index.json", **values)
    with pytest.raises(LoadError, match=said):
        own.model(str(folder))


def test_a_class_that_diffusers_has_not_is_named(folder):
    change(folder / "model_index.json", transformer=["diffusers", "TomorrowsTransformer"])
    spec = catalog.model(own.model(str(folder)))
    with pytest.raises(LoadError, match=r"has no class TomorrowsTransformer, which My style v2 needs: update"):
        loading.empty_transformer(spec)


def test_a_recipe_that_quantizes_nothing_of_it_is_not_shown_as_lossless(folder, tmp_path):
    spec = catalog.model(own.model(str(folder)))
    assert spec.recipes[0] == "post"  # which leaves layers of fewer than 1024 features alone
    asked = CompareRequest.create("a cat", model=spec.id, precisions=["nvfp4"], num_inference_steps=1)
    made = Studio("cpu").compare(asked, tmp_path, lambda _: None, lambda: False)
    assert [g.is_unquantized for g in made.results] == [False, True]
    assert verdict.unquantized(asked, "nvfp4") in verdict.verdict(made)


def test_a_folder_of_the_hubs_cache_is_told_from_the_checkpoint_in_it(folder, tmp_path):
    inside = tmp_path / "models--acme--mine" / "snapshots" / "abc"
    inside.parent.mkdir(parents=True)
    inside.symlink_to(folder)
    with pytest.raises(LoadError, match=f"give the checkpoint in it, {inside}"):
        own.model(str(inside.parent.parent))
    assert catalog.model(own.model(str(inside))).family == "flux.1-dev"


def test_names_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="empty is no checkpoint as diffusers saves it"):
        own.model("empty")
    with pytest.raises(RequestError, match="There is no folder 'out/of/place'"):
        own.model("out/of/place")
    with pytest.raises(LoadError, match="nobody/nothing is not on this machine and nothing may be fetched offline"):
        own.model("nobody/nothing@main", offline=True)
    with pytest.raises(RequestError, match=r"There is no model 'flux\.9'"):
        own.model("flux.9")
    assert own.model("mini-qwen") == "mini-qwen"


def test_a_repository_is_pinned_and_named_by_itself(folder, monkeypatch):
    commit = "0123abc"
    monkeypatch.setattr(hub, "described", lambda name, revision, offline: (folder, commit))
    monkeypatch.setattr(hub, "weight_bytes", lambda *_: {"transformer": 24_000_000_000, "vae": 200_000_000})
    spec = catalog.model(own.model("somebody/Fine-Tune.v1@main"))
    assert (spec.id, spec.name, spec.source, spec.revision) == (
        "Fine-Tune.v1",
        "somebody/Fine-Tune.v1",
        "somebody/Fine-Tune.v1",
        commit,
    )
    assert (spec.memory_gb.transformer, spec.memory_gb.shared) == (24.0, 0.2)
    assert spec.url == "https://huggingface.co/somebody/Fine-Tune.v1"
    assert 'revision="0123abc"' in code(CompareRequest.create("a cat", model=spec.id), "bf16", "native")
    assert catalog.model(own.model("another/Fine-Tune.v1")).id == "Fine-Tune.v1-2"
