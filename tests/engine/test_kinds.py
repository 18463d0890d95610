"""Kinds of models without a pinned commit: configurations, rules, and every path on a tiny checkpoint."""

import inspect as signatures
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from engine import catalog
from engine.benchmark import bench
from engine.outputs.program import code
from engine.quality import evaluate, prompts
from engine.quantization import recipes
from engine.quantization.inspection import inspect
from engine.quantization.roles import role_of
from engine.request import CompareRequest
from engine.runtime.multi_device import driving
from engine.runtime.pipeline import read, token_ids
from engine.runtime.previews import DECODERS
from engine.runtime.studio import Studio
from engine.weights import loading, lora, own
from engine.weights.checkpoint import parts
from engine.weights.loading import _hollow
from tests.support import adapters, memory, tiny

pytestmark = pytest.mark.usefixtures("catalog_for_one_test")
UNPINNED = tuple(model for model in catalog.KINDS if model not in catalog.MODELS)
SMALL = {"height": 256, "width": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    return {model: tiny.checkpoint(model, at / f"tiny-{model}") for model in UNPINNED}


@pytest.fixture(params=UNPINNED)
def kind(request):
    return catalog.KINDS[request.param]


@pytest.fixture
def spec(kind, folders):
    return catalog.model(own.model(str(folders[kind.id])))


# ---------------------------------------------------------------------------------------------------------------------
# What is bundled of the full size


PUBLISHED = {  # parameters in billions, as their makers name them; Qwen3-4B has 4.0 by its technical report
    "z-image-turbo": {"transformer": 6.15, "text_encoder": 4.02},
    "flux.2-klein-4b": {"transformer": 3.88, "text_encoder": 4.02},
}


def test_memory_is_what_the_configurations_add_up_to(kind):
    names = [part for part, (_, cls) in parts(kind.folder).items() if "Tokenizer" not in cls and "Scheduler" not in cls]
    counted = {part: sum(p.numel() for p in _hollow(kind, part, kind.folder).parameters()) for part in names}
    for part, billions in PUBLISHED[kind.id].items():
        assert counted[part] / 1e9 == pytest.approx(billions, abs=0.006)
    assert kind.memory_gb.transformer == pytest.approx(2e-9 * counted.pop("transformer"), abs=0.006)
    assert kind.memory_gb.shared == pytest.approx(2e-9 * sum(counted.values()), abs=0.006)


def test_what_streaming_leaves_on_the_device_is_what_the_configurations_add_up_to(kind):
    names = [part for part, (_, cls) in parts(kind.folder).items() if "Tokenizer" not in cls and "Scheduler" not in cls]
    made = {part: _hollow(kind, part, kind.folder) for part in names}
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
    }.items():
        file = catalog.KINDS[model].folder / "transformer" / "config.json"
        config = json.loads(file.read_text())
        made = getattr(diffusers, config.pop("_class_name"))
        usual = {
            name: p.default for name, p in signatures.signature(made.__init__).parameters.items() if name != "self"
        }
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in usual.items()}
        assert {name for name in config if config[name] != plain[name]} == differs and config.keys() == plain.keys()


def test_every_argument_exists_in_the_pipeline(kind):
    accepted = signatures.signature(getattr(diffusers, kind.pipeline).__call__).parameters
    assert {*kind.call, kind.guidance_argument, kind.batch_argument, "prompt"} <= accepted.keys()
    assert kind.pipeline in DECODERS and kind.licence == "Apache-2.0"
    assert (kind.defaults.height, kind.defaults.width) == kind.limits.sizes[0]


def test_stand_in_tokenizers_take_the_chat_template(kind):
    words = PreTrainedTokenizerFast.from_pretrained(kind.folder / "tokenizer", local_files_only=True)
    said = [{"role": "user", "content": "a cat"}]
    text = words.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **kind.chat)
    assert text.startswith("<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n")
    assert ("<think>" in text) == (kind.chat["enable_thinking"] is False)
    assert max(words(text).input_ids) < 151936


LAYERS = {  # of each recipe, quantized of all
    "z-image-turbo": (276, {"post": 238, "strict": 224, "full": 276}),
    "flux.2-klein-4b": (109, {"post": 100, "strict": 70, "full": 109}),
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


def test_a_tiny_checkpoint_is_compared_and_its_program_makes_the_pixels(spec, kind, tmp_path, monkeypatch, cache):
    assert (spec.like, spec.family, spec.recipes) == (kind.id, kind.family, kind.recipes)
    few = {**SMALL, "num_inference_steps": 2, "batch_size": 2}
    asked = CompareRequest.create("a cat", model=spec.id, precisions=["nvfp4@full", "fp8@full"], **few)
    studio, told = Studio("cpu"), []
    (tmp_path / "out").mkdir()
    with driving(studio.device):
        compared = studio.compare(asked, tmp_path / "out", told.append, lambda: False)
    assert all(g.metrics.mean_lpips > 0 and g.layers.quantized for g in compared.results[1:])
    program = code(asked, "bf16", "native")
    monkeypatch.chdir(tmp_path)
    (tmp_path / spec.name).symlink_to(spec.place)
    exec(program, {})
    for index, file in enumerate(compared.reference.files, 1):
        ours, theirs = (np.asarray(Image.open(at)) for at in (file, f"bf16-{index}.png"))
        apart = np.abs(ours.astype(int) - theirs.astype(int)).max()
        assert apart <= (0 if torch.cpu._is_avx512_bf16_supported() else 4)  # as in test_program.py


def test_a_tiny_checkpoint_is_benched_and_evaluated(spec, tmp_path, cache):
    settings = bench.Settings(
        precisions=("bf16", "nvfp4"), batch_sizes=(1,), methods=("engine",), repeats=1, steps=1, **SMALL
    )
    rows = bench.run(spec, settings, "cpu", loading.Source(), tmp_path / "b.json")["rows"]
    assert [row["error"] for row in rows] == [None, None]
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    scored = evaluate.Settings(precisions=("nvfp4",), recipes=("full",), steps=1, **SMALL)
    chosen = prompts.read(str(tmp_path / "prompts.txt"))
    summary = evaluate.run(spec, scored, chosen, "cpu", loading.Source(), tmp_path / "quality")
    assert summary["model"] == spec.id and (tmp_path / "quality" / "report.html").is_file()


def test_weights_are_in_bf16_and_rotary_frequencies_are_not(spec):
    """As diffusers and transformers load them: positions in bf16 would shift what the text encoder reads."""
    encoder = loading.load_shared(spec, torch.device("cpu"))["text_encoder"]
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    frequencies = [buffer for name, buffer in encoder.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and {buffer.dtype for buffer in frequencies} == {torch.float32}


def test_a_prompt_is_read_within_its_template(spec, kind):
    pipeline = loading.load_pipeline(spec, torch.device("cpu"))
    (ids,) = token_ids(pipeline, spec, "a cat")
    said = [{"role": "user", "content": "a cat"}]
    text = pipeline.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **kind.chat)
    assert list(ids) == pipeline.tokenizer(text).input_ids
    assert read(pipeline, spec, "a cat") == f"{len(ids)} tokens, of at most 512"
    assert "were cut off" in read(pipeline, spec, "cat " * 600)


def test_a_lora_is_fused_into_it(spec, tmp_path):
    tensors = adapters.factors(loading.empty_transformer(spec), "to_q")
    file = adapters.write(tensors, tmp_path / "style.safetensors")
    ours = catalog.model(lora.given([str(file)], spec.id))
    plain, fused = (loading.load_transformer(one, torch.device("cpu")).state_dict() for one in (spec, ours))
    changed = {name for name, weight in fused.items() if not torch.equal(weight, plain[name])}
    assert changed == {name.replace("transformer.", "").replace("lora_A.", "") for name in tensors if "lora_A" in name}


def test_flux2_klein_before_distillation_is_guided(folders, tmp_path):
    folder = shutil.copytree(folders["flux.2-klein-4b"], tmp_path / "base")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False}))
    spec = catalog.model(own.model(str(folder)))
    assert (spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == (50, 4.0)
    assert spec.limits.guidance_scale == (1.0, 10.0)
    assert loading.load_pipeline(spec, torch.device("cpu")).config.is_distilled is False
