"""Kinds of models without a pinned commit: configurations, rules, and every path on a tiny checkpoint."""

import inspect as signatures
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from PIL import Image
from transformers import PreTrainedTokenizerFast

from engine import catalog
from engine.benchmark import bench
from engine.errors import LoadError
from engine.outputs.program import code
from engine.quality import evaluate, prompts
from engine.quantization import recipes
from engine.quantization.inspection import inspect
from engine.quantization.roles import role_of
from engine.request import CompareRequest
from engine.runtime import previews, timing
from engine.runtime.multi_device import driving
from engine.runtime.pipeline import Progress, _templated, call, finished, read, token_ids
from engine.runtime.previews import DECODERS
from engine.runtime.studio import Studio
from engine.weights import loading, lora, own
from engine.weights.checkpoint import is_module, parts
from engine.weights.loading import _hollow
from engine.weights.schedulers import keeps_goals
from tests.support import adapters, commands, memory, tiny

pytestmark = pytest.mark.usefixtures("catalog_for_one_test")
UNPINNED = tuple(model for model in catalog.KINDS if model not in catalog.MODELS)
OF_ITS_OWN = tuple(model for model in UNPINNED if catalog.KINDS[model].configs == model)
"""Without those of another model's architecture, for which that model's tests stand."""
NEW = tuple(
    model
    for model in OF_ITS_OWN
    if catalog.KINDS[model].pipeline not in {spec.pipeline for spec in catalog.MODELS.values()}
)
CHATS = tuple(model for model in UNPINNED if catalog.KINDS[model].chat is not None)
SMALL = {"height": 64, "width": 64}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """The CPU's profiler, which counts what a run allocates, takes longer than all else."""
    monkeypatch.setattr(timing, "added_bytes", lambda run, device: (run(), 1000)[1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    return {model: tiny.checkpoint(model, at / f"tiny-{model}") for model in OF_ITS_OWN}


@pytest.fixture(params=UNPINNED)
def kind(request):
    return catalog.KINDS[request.param]


@pytest.fixture(params=OF_ITS_OWN)
def spec(request, folders):
    return tiny_spec(folders[request.param])


def tiny_spec(folder):
    """Of a checkpoint in a folder, with smaller sizes than anybody is offered."""
    spec = catalog.model(own.model(str(folder)))
    catalog.give(replace(spec, limits=replace(spec.limits, side=(64, spec.limits.side[1]))))
    return catalog.model(spec.id)


def small(spec):
    return SMALL | ({"num_frames": spec.limits.num_frames[0]} if spec.modality == "video" else {})


# ---------------------------------------------------------------------------------------------------------------------
# What is bundled of the full size


PUBLISHED = {  # parameters in billions, as their makers name them; Qwen3-4B has 4.0 by its technical report
    "qwen-image-2512": {"transformer": 20.43},
    "ltx-2.3": {"transformer": 18.99, "connectors": 3.17},  # "22b", in one file
    "z-image-turbo": {"transformer": 6.15, "text_encoder": 4.02},
    "flux.2-klein-4b": {"transformer": 3.88, "text_encoder": 4.02},
    "flux.2-dev": {"transformer": 32.22, "text_encoder": 24.01},
    "wan-2.2-5b": {"transformer": 5.0, "text_encoder": 5.68, "vae": 0.705},  # "5B"; Wan2.2_VAE.pth has 2.82 GB
}


def test_memory_is_what_the_configurations_add_up_to(kind):
    made = {part: _hollow(kind, part, kind.folder) for part, (_, cls) in parts(kind.folder).items() if is_module(cls)}
    counted = {part: sum(p.numel() for p in module.parameters()) for part, module in made.items()}
    for part, billions in PUBLISHED[kind.id].items():
        assert counted[part] / 1e9 == pytest.approx(billions, abs=0.006)
    taken = {part: memory.gigabytes(module) for part, module in made.items()}
    assert kind.memory_gb.transformer == pytest.approx(taken.pop("transformer"), abs=0.006)
    assert kind.memory_gb.shared == pytest.approx(sum(taken.values()), abs=0.006)
    if kind.memory_gb.stored:  # the denoiser in fp32, as diffusers' script for Wan writes it
        assert kind.memory_gb.stored == pytest.approx(kind.memory_gb.shared + 4 * 5.0, abs=0.006)
    kept, footprint = memory.streamed(made.pop("transformer"), made)
    assert kind.memory_gb.kept == pytest.approx(kept, abs=0.006)
    assert kind.memory_gb.footprint == pytest.approx(footprint, abs=0.006)


def test_configurations_are_those_of_diffusers_classes_but_for_what_is_said():
    for model, differs in {
        "z-image-turbo": set(),
        "flux.2-klein-4b": {
            "num_layers",
            "num_single_layers",
            "num_attention_heads",
            "joint_attention_dim",
            "guidance_embeds",
        },
        "flux.2-dev": set(),
    }.items():
        file = catalog.KINDS[model].folder / "transformer" / "config.json"
        config = json.loads(file.read_text())
        made = getattr(diffusers, config.pop("_class_name"))
        usual = {
            name: p.default for name, p in signatures.signature(made.__init__).parameters.items() if name != "self"
        }
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in usual.items()}
        assert {name for name in config if config[name] != plain[name]} == differs and config.keys() == plain.keys()


def test_what_ltx_2_3_changes_of_ltx_2s_denoiser():
    old, new = (dict(loading.empty_transformer(catalog.KINDS[model]).config) for model in ("ltx-2", "ltx-2.3"))
    assert {name: new[name] for name in new if name[0] != "_" and new[name] != old[name]} == {
        **dict.fromkeys(("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod"), True),
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
    }


def test_every_argument_exists_in_the_pipeline(kind):
    accepted = signatures.signature(getattr(diffusers, kind.pipeline).__call__).parameters
    assert {*kind.call, kind.guidance_argument, kind.batch_argument, "prompt"} <= accepted.keys()
    assert kind.pipeline in DECODERS and (kind.licence == "Apache-2.0") == (not kind.licence_note)
    assert (kind.defaults.height, kind.defaults.width) == kind.limits.sizes[0]


@pytest.mark.parametrize(
    ("model", "begins", "ends"),
    [
        ("z-image-turbo", "<|im_start|>user\na cat<|im_end|>", "<|im_start|>assistant\n"),
        ("flux.2-klein-4b", "<|im_start|>user\na cat<|im_end|>", "<think>\n\n</think>\n\n"),
        ("flux.2-dev", "<s>[SYSTEM_PROMPT]You are an AI", "[INST]a cat[/INST]"),
    ],
)
def test_stand_in_tokenizers_take_the_chat_template(model, begins, ends):
    kind = catalog.KINDS[model]
    words = PreTrainedTokenizerFast.from_pretrained(kind.folder / "tokenizer", local_files_only=True)
    system = SimpleNamespace(system_message=SYSTEM_MESSAGE) if model == "flux.2-dev" else SimpleNamespace()
    system.tokenizer = words
    text = _templated(system, kind, "a cat")
    assert text.startswith(begins) and text.endswith(ends)
    encoder = json.loads((kind.folder / "text_encoder" / "config.json").read_text())
    assert max(words(text).input_ids) < encoder.get("text_config", encoder)["vocab_size"]


LAYERS = {  # of each recipe, quantized of all
    "qwen-image-2512": (846, {"post": 360, "strict": 360, "full": 846}),
    "flux.2-dev": (203, {"post": 192, "strict": 144, "full": 203}),
    "ltx-2.3": (1660, {"post": 1344, "strict": 768, "full": 1660}),
    "z-image-turbo": (276, {"post": 238, "strict": 224, "full": 276}),
    "flux.2-klein-4b": (109, {"post": 100, "strict": 70, "full": 109}),
    "wan-2.2-5b": (306, {"post": 300, "strict": 240, "full": 304}),
}


def test_recipes_are_counted_and_each_of_their_patterns_matches(kind):
    empty, (linears, quantized) = loading.empty_transformer(kind), LAYERS[kind.id]
    assert tuple(quantized) == kind.recipes
    for name, count in quantized.items():
        plan = recipes.plan(empty, recipes.recipe(kind.family, name), "nvfp4")
        assert (len(plan.layers), plan.counts.quantized, plan.unmatched) == (linears, count, ()), name
    assert not [layer.name for layer in plan.layers if role_of(layer.name) == "other"]


def test_it_is_asked_for_by_its_id_without_a_commit_where_no_weights_are_needed(kind):
    assert own.model(kind.id, offline=True) == kind.id
    found = inspect(kind.id, "nvfp4")
    assert found["quantized"] == LAYERS[kind.id][1]["post"]
    assert loading.described(catalog.model(kind.id), loading.Source(random=True)).startswith("random")


# ---------------------------------------------------------------------------------------------------------------------
# Every path, on a tiny checkpoint


def test_a_tiny_checkpoint_is_compared(spec, tmp_path, cache):
    kind = catalog.KINDS[spec.like]
    assert (spec.family, spec.recipes, spec.defaults) == (kind.family, kind.recipes, kind.defaults)
    asked = CompareRequest.create(
        "a cat", model=spec.id, precisions=["nvfp4@full"], num_inference_steps=2, **small(spec)
    )
    studio = Studio("cpu")
    with driving(studio.device):
        compared = studio.compare(asked, tmp_path, lambda _: None, lambda: False)
    assert compared.results[1].metrics.mean_lpips > 0 and compared.results[1].layers.quantized


def test_its_program_makes_the_pixels(spec, tmp_path, monkeypatch):
    """Of a batch of pictures the second too; of a clip the frames that go to the encoder."""
    batch = 2 if spec.modality == "image" else 1
    asked = CompareRequest.create(
        "a cat", model=spec.id, precisions=["bf16"], num_inference_steps=2, batch_size=batch, **small(spec)
    )
    pipeline = loading.load_pipeline(spec, torch.device("cpu"))
    with torch.inference_mode():
        ours = finished(pipeline, spec, call(pipeline, spec, asked, asked.seed)).pixels.float()
    frames = []
    monkeypatch.setattr(diffusers.utils, "encode_video", lambda clip, **_: frames.append(clip))
    monkeypatch.chdir(tmp_path)
    (tmp_path / spec.name).symlink_to(spec.place)
    exec(code(asked, "bf16", "native"), {})
    if spec.modality == "image":
        frames = [np.asarray(Image.open(f"bf16-{index}.png")) / 255 for index in (1, 2)]
    theirs = torch.as_tensor(np.stack(frames)).movedim(-1, -3)
    assert ours.shape == theirs.shape
    # As in test_program.py; a PNG has rounded once more.
    allowed = 0 if torch.cpu._is_avx512_bf16_supported() else 4
    assert (ours - theirs).abs().max() * 255 <= allowed + 0.5 * (spec.modality == "image")


@pytest.mark.parametrize("model", NEW)
def test_a_tiny_checkpoint_is_benched_and_evaluated(model, folders, tmp_path, cache):
    spec = tiny_spec(folders[model])
    settings = bench.Settings(
        precisions=("nvfp4",), batch_sizes=(1,), methods=("engine",), repeats=1, steps=2, **small(spec)
    )
    (row,) = bench.run(spec, settings, "cpu", loading.Source(), tmp_path / "b.json")["rows"]
    assert row["error"] is None
    (tmp_path / "prompts.txt").write_text("a cat\n")
    scored = evaluate.Settings(precisions=("nvfp4",), recipes=("full",), steps=2, **small(spec))
    chosen = prompts.read(str(tmp_path / "prompts.txt"))
    summary = evaluate.run(spec, scored, chosen, "cpu", loading.Source(), tmp_path / "quality")
    assert summary["model"] == spec.id and (tmp_path / "quality" / "report.html").is_file()


def test_weights_are_in_bf16_and_rotary_frequencies_are_not(spec):
    """As diffusers and transformers load them: positions in bf16 would shift what the text encoder reads."""
    encoder = loading.load_shared(spec, torch.device("cpu"))["text_encoder"]
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    frequencies = [buffer for name, buffer in encoder.named_buffers() if name.endswith("inv_freq")]
    assert frequencies or spec.like == "wan-2.2-5b"  # whose positions are learnt
    assert {buffer.dtype for buffer in frequencies} <= {torch.float32}


def test_a_prompt_is_counted_as_it_is_read(spec):
    pipeline = loading.load_pipeline(spec, torch.device("cpu"))
    assert re.fullmatch(r"\d+ tokens, of at most \d+", read(pipeline, spec, "a cat"))
    assert "were cut off" in read(pipeline, spec, "cat " * 1200)


@pytest.mark.parametrize("model", CHATS)
def test_a_prompt_is_read_within_its_template(model, folders):
    spec = catalog.model(own.model(str(folders[model])))
    pipeline = loading.load_pipeline(spec, torch.device("cpu"))
    (ids,) = token_ids(pipeline, spec, "a cat")
    read_by = []
    pipeline.text_encoder.register_forward_pre_hook(
        lambda _, args, given: read_by.append((given["input_ids"], given["attention_mask"])), with_kwargs=True
    )
    pipeline.encode_prompt("a cat", max_sequence_length=512)
    given, mask = read_by[0]  # of Z-Image the negative prompt is read too
    assert list(ids) == given[mask.bool()].tolist()
    assert read(pipeline, spec, "a cat") == f"{len(ids)} tokens, of at most 512"


def test_a_lora_is_fused_into_it(spec, tmp_path):
    tensors = adapters.factors(loading.empty_transformer(spec), "to_q")
    file = adapters.write(tensors, tmp_path / "style.safetensors")
    ours = catalog.model(lora.given([str(file)], spec.id))
    plain, fused = (loading.load_transformer(one, torch.device("cpu")).state_dict() for one in (spec, ours))
    changed = {name for name, weight in fused.items() if not torch.equal(weight, plain[name])}
    assert changed == {name.replace("transformer.", "").replace("lora_A.", "") for name in tensors if "lora_A" in name}


def test_what_diffusers_keeps_in_fp32_is_in_fp32(folders):
    spec = tiny_spec(folders["wan-2.2-5b"])
    ours = loading.load_pipeline(spec, torch.device("cpu"))
    types = {"default": torch.bfloat16, "vae": torch.float32}
    theirs = diffusers.WanPipeline.from_pretrained(spec.place, dtype=types, local_files_only=True)
    for part in ("transformer", "vae", "text_encoder"):
        mine, its = (getattr(pipeline, part).state_dict() for pipeline in (ours, theirs))
        assert {name: tensor.dtype for name, tensor in mine.items()} == {n: t.dtype for n, t in its.items()}
        assert all(torch.equal(tensor, its[name]) for name, tensor in mine.items())
    assert theirs.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    told = {
        layer.name: layer for layer in recipes.plan(ours.transformer, recipes.recipe("unknown", "full"), "fp8").layers
    }
    layer = told["condition_embedder.time_embedder.linear_1"]
    assert (layer.quantized, layer.reason) == (False, "diffusers keeps it in fp32.")
    assert layer.bytes == 4 * layer.in_features * layer.out_features


def test_what_is_stored_of_a_model_of_ones_own_is_a_column_of_it(folders, tmp_path, monkeypatch, capsys, cache):
    """What diffusers keeps in fp32 is in fp32 there too."""
    folder, stored = folders["wan-2.2-5b"], tmp_path / "stored"
    asked = ("--model", folder, "--offline", "--device", "cpu")
    assert commands.run(monkeypatch, capsys, "quantize", *asked, "--column", "nvfp4@full", "--out", stored)[0] == 0
    before = recipes.plan(loading.empty_transformer(tiny_spec(folder)), recipes.recipe("wan-2.2", "full"), "nvfp4")
    catalog._models.pop(folder.name)  # as at the start of another command
    status, said, err = commands.run(
        monkeypatch, capsys, "inspect", "--model", folder, "--precision", f"nvfp4@{stored}", "--json"
    )
    assert (status, json.loads(said)["bytes"]["quantized"]) == (0, before.quantized_bytes), err


def test_a_preview_of_wan_is_the_first_frame_of_what_its_scheduler_expects(folders, monkeypatch):
    """Of the last step it is the clip's own: the decoder looks back in time alone."""
    spec, seen = tiny_spec(folders["wan-2.2-5b"]), []
    monkeypatch.setattr(previews, "_jpeg", lambda picture: seen.append(picture) or b"")
    asked = CompareRequest.create("a cat", model=spec.id, num_inference_steps=4, **small(spec))
    pipeline = loading.load_pipeline(spec, torch.device("cpu"))
    preview = previews.Previewer(pipeline, spec, asked, clock=lambda: 0.0)

    class Every(Progress):
        def __call__(self, pipeline, index, timestep, given):
            preview(given["latents"], index)
            return {}

    with torch.inference_mode():
        made = call(pipeline, spec, asked, 7, Every("bf16", lambda _: None, lambda: False))
    assert keeps_goals(pipeline.scheduler) and len(seen) == 3
    first = [float(((picture / 2 + 0.5).clamp(0, 1) - made.frames[0, 0]).abs().max()) for picture in seen]
    assert first[-1] < 1e-4 < first[0]


def test_wan_2_1_is_asked_for_its_own_size_and_wan_with_two_denoisers_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["wan-2.2-5b"], tmp_path / "wan")
    index, vae = folder / "model_index.json", folder / "vae" / "config.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps(said | {"expand_timesteps": False}))
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scale_factor_spatial": 8}))
    spec = catalog.model(own.model(str(folder)))
    assert (spec.defaults.height, spec.defaults.num_frames, spec.defaults.frame_rate) == (480, 81, 16.0)
    assert spec.limits.size_multiple == 16
    index.write_text(json.dumps(said | {"transformer_2": said["transformer"]}))
    with pytest.raises(LoadError, match="it has two denoisers, and a WanPipeline is only known with one here"):
        own.model(str(folder))


def test_flux2_klein_before_distillation_is_guided(folders, tmp_path):
    folder = shutil.copytree(folders["flux.2-klein-4b"], tmp_path / "base")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False}))
    spec = catalog.model(own.model(str(folder)))
    assert (spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == (50, 4.0)
    assert spec.limits.guidance_scale == (1.0, 10.0)
    assert loading.load_pipeline(spec, torch.device("cpu")).config.is_distilled is False
