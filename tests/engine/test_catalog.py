"""The catalog against the configurations it names: call settings, sizes in memory, architectures, tokenizers."""

import json
from dataclasses import fields

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from engine import catalog
from engine.catalog import MODELS
from engine.weights import host_memory, loading
from engine.weights.checkpoint import parts
from engine.weights.loading import _hollow
from tests.support.memory import gigabytes, streamed

LARGE = [spec for spec in MODELS.values() if not spec.bundled]
# GB of 1e9 bytes in bf16, as the published checkpoints have them.
PUBLISHED = {
    "flux.1-dev": {"transformer": 23.80, "text_encoder": 0.25, "text_encoder_2": 9.52, "vae": 0.17},
    "flux.1-schnell": {"transformer": 23.78, "text_encoder": 0.25, "text_encoder_2": 9.52, "vae": 0.17},
    "qwen-image": {"transformer": 40.86, "text_encoder": 16.58, "vae": 0.25},
    "ltx-2": {"transformer": 37.75, "text_encoder": 24.41, "connectors": 2.86, "vae": 2.44},
}


@pytest.fixture(scope="module")
def modules():
    """Each module of each large model, built without weights."""

    def made(spec):
        names = [part for part, (_, kind) in parts(spec.folder).items() if _is_module(kind)]
        return {part: _hollow(spec, part, spec.folder) for part in names}

    return {spec.id: made(spec) for spec in LARGE}


@pytest.fixture(scope="module")
def sizes(modules):
    """GB of these."""
    return {model: {part: gigabytes(module) for part, module in made.items()} for model, made in modules.items()}


def _is_module(kind):
    return "Tokenizer" not in kind and "Scheduler" not in kind


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_component_has_its_published_size(sizes, model):
    for part, published in PUBLISHED[model].items():
        assert sizes[model][part] == pytest.approx(published, rel=0.003, abs=0.006), part


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
def test_memory_is_what_the_configurations_add_up_to(sizes, spec):
    held = dict(sizes[spec.id])
    assert spec.memory_gb.transformer == pytest.approx(held.pop("transformer"), abs=0.006)
    assert spec.memory_gb.shared == pytest.approx(sum(held.values()), abs=0.006)


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
def test_what_streaming_leaves_on_the_device_is_what_the_configurations_add_up_to(modules, spec):
    made = dict(modules[spec.id])
    kept, footprint = streamed(made.pop("transformer"), made)
    text = [block for module in loading.text_parts(made) for block in host_memory.blocks(module).values()]
    assert spec.memory_gb.kept == pytest.approx(kept, abs=0.006)
    assert spec.memory_gb.footprint == pytest.approx(footprint, abs=0.006)
    assert max(map(gigabytes, text)) * 2 < spec.memory_gb.run, "no more than a run takes"


@pytest.mark.parametrize("model", ["flux.1-dev", "qwen-image", "ltx-2"])
def test_weights_and_run_give_the_posts_peak(model):
    """The only use of the post's figures here: what a run adds to the weights, to refuse what cannot fit."""
    reference = json.loads((catalog.ASSETS / "reference" / "b200.json").read_text())
    peak = next(
        row["peak_memory_gb"]
        for row in reference["performance"]
        if (row["model"], row["precision"], row["batch_size"]) == (model, "bf16", 1)
    )
    memory = MODELS[model].memory_gb
    assert memory.transformer + memory.shared + memory.run == pytest.approx(peak, abs=0.06)


def test_the_texts_keys_and_values_are_what_the_configuration_adds_up_to():
    """Of a prompt and a negative one, in bf16, for the clip and for its sound."""
    spec = MODELS["ltx-2"]
    config = json.loads((spec.folder / "transformer" / "config.json").read_text())
    features = sum(
        config[f"{of}num_attention_heads"] * config[f"{of}attention_head_dim"] * config["num_layers"]
        for of in ("", "audio_")
    )
    assert spec.memory_gb.text_kv == pytest.approx(
        2 * 2 * spec.call["max_sequence_length"] * features * 2 / 1e9, abs=0.005
    )


@pytest.mark.parametrize("model", ["flux.1-dev", "qwen-image", "ltx-2"])
def test_call_settings_are_the_posts(model):
    spec = MODELS[model]
    asked = dict(json.loads((catalog.ASSETS / "reference" / "b200.json").read_text())["settings"][model])
    assert asked.pop("prompt") == spec.examples[0]
    assert asked.pop("vae_tiling", False) == spec.vae_tiling
    guidance = asked.pop(spec.guidance_argument)
    assert spec.defaults.guidance_scale == guidance
    mine = {f.name: getattr(spec.defaults, f.name) for f in fields(spec.defaults)} | dict(spec.call)
    assert {name: mine[name] for name in asked} == asked


def test_ltx2_runs_two_forward_passes_and_no_newer_guidance():
    """In the arguments of the installed diffusers: stochastic, cross-modal and rescaled guidance are off."""
    call = MODELS["ltx-2"].call
    for stream in ("", "audio_"):
        assert call[f"{stream}stg_scale"] == 0 and call[f"{stream}guidance_rescale"] == 0
        assert call[f"{stream}modality_scale"] == 1
    assert call["audio_guidance_scale"] is None  # follows guidance_scale
    assert call["spatio_temporal_guidance_blocks"] is None and call["use_cross_timestep"] is False


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.id)
def test_every_argument_exists_in_the_pipeline(spec):
    import inspect

    import diffusers

    accepted = inspect.signature(getattr(diffusers, spec.pipeline).__call__).parameters
    assert {*spec.call, spec.guidance_argument, spec.batch_argument} <= accepted.keys()
    assert spec.guidance_argument not in spec.call
    assert ("num_frames" in accepted) == (spec.modality == "video")
    assert spec.tokenizer in parts(spec.folder)


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
def test_large_models_are_pinned_and_licensed(spec):
    assert len(spec.revision) == 40 and int(spec.revision, 16)
    assert spec.url == f"https://huggingface.co/{spec.source}"
    assert spec.licence and spec.licence_url.startswith("https://")


def test_gated_models():
    assert [spec.id for spec in LARGE if spec.gated] == ["flux.1-dev"]


def test_schnell_is_one_entry_on_the_folder_and_the_recipes_of_dev():
    dev, schnell = MODELS["flux.1-dev"], MODELS["flux.1-schnell"]
    assert (schnell.folder, schnell.family, schnell.recipes) == (dev.folder, dev.family, dev.recipes)
    empty = {spec.id: loading.empty_transformer(spec) for spec in (dev, schnell)}
    assert empty[dev.id].config.guidance_embeds and not empty[schnell.id].config.guidance_embeds


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
def test_sizes_on_offer_obey_the_models_own_rules(spec):
    limits = spec.limits
    for height, width in limits.sizes:
        assert height % limits.size_multiple == width % limits.size_multiple == 0
        assert all(limits.side[0] <= side <= limits.side[1] for side in (height, width))
        assert height * width <= limits.max_pixels
    assert (spec.defaults.height, spec.defaults.width) == limits.sizes[0]


@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.id)
def test_the_vae_asks_for_the_multiples_that_requests_are_held_to(spec):
    vae = json.loads((spec.folder / "vae" / "config.json").read_text())
    if spec.modality == "video":
        assert vae["spatial_compression_ratio"] == spec.limits.size_multiple
        assert vae["temporal_compression_ratio"] == spec.limits.frames_step
    else:
        halvings = (
            len(vae["block_out_channels"]) - 1 if "block_out_channels" in vae else len(vae["temperal_downsample"])
        )
        assert 2 * 2**halvings == spec.limits.size_multiple  # pipelines pack latents in patches of two


def test_stand_in_tokenizers_keep_to_the_encoders_vocabularies():
    for spec in LARGE:
        for part in ("tokenizer", "tokenizer_2"):
            if not (spec.folder / part).is_dir():
                continue
            config = json.loads((spec.folder / part.replace("tokenizer", "text_encoder") / "config.json").read_text())
            tokenizer = PreTrainedTokenizerFast.from_pretrained(spec.folder / part, local_files_only=True)
            length = min(spec.call["max_sequence_length"], tokenizer.model_max_length)
            padded = tokenizer("a cat, on a mat", padding="max_length", max_length=length, truncation=True)
            cut = tokenizer("cat " * 5000, padding="max_length", max_length=length, truncation=True)
            assert len(padded.input_ids) == len(cut.input_ids) == length
            assert max(padded.input_ids) < config.get("text_config", config)["vocab_size"]


def test_stand_in_tokenizers_fit_their_pipelines():
    from diffusers import QwenImagePipeline

    flux, qwen, ltx2 = (MODELS[name].folder for name in ("flux.1-dev", "qwen-image", "ltx-2"))
    clip = PreTrainedTokenizerFast.from_pretrained(flux / "tokenizer", local_files_only=True)
    ids = clip("a cat", padding="max_length", max_length=77).input_ids
    assert max(ids) == ids[3] == clip.eos_token_id  # CLIP pools at the largest id, its end token
    gemma = PreTrainedTokenizerFast.from_pretrained(ltx2 / "tokenizer", local_files_only=True)
    assert gemma("a cat", padding="max_length", max_length=9).attention_mask == [0] * 6 + [1] * 3
    words = PreTrainedTokenizerFast.from_pretrained(qwen / "tokenizer", local_files_only=True)
    template = QwenImagePipeline.__init__.__code__.co_consts
    prompt = next(text for text in template if isinstance(text, str) and "{}" in text)
    assert len(words(prompt.split("{}")[0]).input_ids) == MODELS["qwen-image"].template_tokens


def test_the_hollow_gemma_keeps_its_tied_weight_and_real_frequencies():
    module = _hollow(MODELS["ltx-2"], "text_encoder", MODELS["ltx-2"].folder)
    assert module.lm_head.weight is module.model.language_model.embed_tokens.weight
    assert {p.device.type for p in module.parameters()} == {"meta"}
    frequencies = [b for name, b in module.named_buffers() if "inv_freq" in name]
    assert frequencies and all(b.device.type == "cpu" and torch.isfinite(b).all() and b.max() <= 1 for b in frequencies)


def test_what_a_licence_keeps_from_some_is_said_of_model_and_outputs():
    assert {spec.id for spec in MODELS.values() if spec.licence_note} == {"flux.1-dev", "ltx-2"}
    assert all("Apache" in spec.licence for spec in MODELS.values() if not spec.licence_note)
    said = MODELS["flux.1-dev"].licence_note
    assert "model FLUX.1-dev is licensed for non-commercial use only" in said
    assert "What it makes may be used for any purpose, commercial ones too" in said and "2(d)" in said
    assert "$10 million" in MODELS["ltx-2"].licence_note


def test_notice_names_everything_that_others_made():
    notice = (catalog.ASSETS.parent / "NOTICE").read_text(encoding="utf-8")
    for folder in catalog.ASSETS.iterdir():
        if folder.is_dir() and not folder.name.startswith(("_", ".")):
            assert f"assets/{folder.name}" in notice, folder.name
    for spec in LARGE:
        if spec.configs == spec.id:
            assert f"{spec.id} from {spec.source} ({spec.licence})" in " ".join(notice.split())
