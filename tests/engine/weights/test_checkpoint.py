"""Checkpoints as people have them: each loads to what its files say, or is refused in one sentence that says why.

The originals are tiny FLUX and LTX-2 checkpoints; what is changed is a tensor, an index or a configuration of them.
"""

import functools
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import app
from engine.catalog import MINI_FLUX, MODELS
from engine.errors import LoadError
from engine.metrics.distances import lpips_distance
from engine.request import CompareRequest
from engine.runtime import pipeline
from engine.weights import checkpoint, loading, schedulers
from engine.weights.source import Source
from tests.support import commands, tiny

CPU = torch.device("cpu")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
MUTATIONS = int(os.environ.get("TWINFRAME_TEST_MUTATIONS", "150"))
"""Mutated checkpoints that are tried; 2,000 take some minutes."""


def stem(part):
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny FLUX checkpoint in bf16, its denoiser in two files."""
    folder = tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("original") / "flux")
    for part in PARTS:
        tensors = {name: value.to(torch.bfloat16) for name, value in read(folder, part).items()}
        write(folder, part, tensors, shards=2 if part == "transformer" else 1)
    return folder


@pytest.fixture(scope="module")
def spec(original):
    return replace(MODELS["flux.1-dev"], configs=str(original))


@pytest.fixture
def copy(original, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def read(folder, part):
    found = {}
    for file in sorted((folder / part).glob("*.safetensors")):
        found |= load_file(file)
    return found


def write(folder, part, tensors, shards=1, variant="", name=None):
    """Replace a component's weights; gives its index, where there is one."""
    for file in [*(folder / part).glob("*.safetensors"), *(folder / part).glob("*.index*.json")]:
        file.unlink()
    base, names = name or stem(part), list(tensors)
    dotted = f".{variant}" if variant else ""
    if shards == 1:
        save_file(tensors, folder / part / f"{base}{dotted}.safetensors", {"format": "pt"})
        return None
    where = {}
    for i in range(shards):
        file = f"{base}-{i + 1:05}-of-{shards:05}{dotted}.safetensors"
        mine = names[i::shards]
        save_file({key: tensors[key].contiguous() for key in mine}, folder / part / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    index = folder / part / f"{base}.safetensors.index{dotted}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tensors_of(folder, spec):
    """Everything that is loaded, by component and name."""
    loaded = loading.load_pipeline(spec, CPU, Source(folder=folder))
    modules = {name: part for name, part in loaded.components.items() if isinstance(part, nn.Module)}
    return {
        f"{part}.{name}": value.detach()
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def refusal(folder, spec):
    with pytest.raises(LoadError) as caught:
        loading.load_pipeline(spec, CPU, Source(folder=folder))
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.endswith("."), text
    return text


# What loads


def test_all_of_a_checkpoint_is_what_its_files_hold(original, spec):
    """Text encoders, VAE and denoiser, buffers included, equal what plain diffusers reads."""
    from diffusers import FluxPipeline

    plain = FluxPipeline.from_pretrained(original, dtype=torch.bfloat16)
    ours = loading.load_pipeline(spec, CPU, Source(folder=original))
    for name, module in plain.components.items():
        if isinstance(module, nn.Module):
            mine = ours.components[name]
            assert same(mine.state_dict(), module.state_dict()), name
            assert same(dict(mine.named_buffers()), dict(module.named_buffers())) or name == "transformer"


def test_buffers_that_belong_into_a_file_come_from_it(tmp_path):
    """LTX-2's VAEs keep the mean and spread of their latents as buffers."""
    folder = tiny.checkpoint("ltx-2", tmp_path / "ltx")
    clip = replace(MODELS["ltx-2"], configs=str(folder))
    tensors = read(folder, "vae")
    assert "latents_mean" in tensors
    wanted = torch.arange(tensors["latents_mean"].numel(), dtype=torch.float32) + 1
    write(folder, "vae", tensors | {"latents_mean": wanted})
    loaded = loading.load_shared(clip, CPU, Source(folder=folder))["vae"]
    assert torch.equal(loaded.latents_mean.float(), wanted)
    write(folder, "vae", {name: value for name, value in tensors.items() if name != "latents_mean"})
    assert "latents_mean" in refusal(folder, clip)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants_load_and_say_what_they_are_stored_in(copy, spec, original, part, shards, variant):
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    stored = {name: value.to(kind) for name, value in read(copy, part).items()}
    write(copy, part, stored, shards=shards, variant=variant)
    found, wanted = tensors_of(copy, spec), tensors_of(original, spec)
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(kind).to(value.dtype) if name.startswith(f"{part}.") else value), name
    said = loading.described(spec, Source(folder=copy))
    assert (f"stored in float16 ({part})" in said) == (variant == "fp16")


def test_of_several_variants_the_plain_one_is_read(copy, spec, original):
    file = copy / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in read(copy, "vae").items()}, file, {"format": "pt"})
    assert same(tensors_of(copy, spec), tensors_of(original, spec))


def test_an_index_that_was_left_over_beside_a_whole_file(copy, spec, original):
    tensors = read(copy, "transformer")
    index = write(copy, "transformer", tensors, shards=2).read_text()
    write(copy, "transformer", tensors)
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    assert same(tensors_of(copy, spec), tensors_of(original, spec))


def test_parts_that_nothing_calls_are_left_out(copy, spec, original):
    (copy / "feature_extractor").mkdir()
    (copy / "feature_extractor" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor"}'
    )
    edit(copy / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    assert same(tensors_of(copy, spec), tensors_of(original, spec))


def test_names_of_older_versions(copy, spec, original):
    """The hub's CLIP has a prefix, and T5's embeddings go by two names."""
    write(copy, "text_encoder", {f"text_model.{name}": value for name, value in read(copy, "text_encoder").items()})
    t5 = read(copy, "text_encoder_2")
    write(
        copy, "text_encoder_2", {name.replace("shared.weight", "encoder.embed_tokens.weight"): t5[name] for name in t5}
    )
    edit(copy / "text_encoder_2" / "config.json", tie_word_embeddings=False)
    assert same(tensors_of(copy, spec), tensors_of(original, spec))


def scaled(tensors, suffix, shape):
    """fp8 codes and scales of every weight of the blocks."""
    made, wanted = {}, {}
    for name, value in tensors.items():
        if "blocks" not in name or not name.endswith(".weight") or value.ndim != 2:
            made[name] = wanted[name] = value
            continue
        exact, (rows, columns) = value.float(), value.shape
        if shape == "rows":
            scale = exact.abs().amax(1, keepdim=True) / 448
            spread = scale
        elif shape == "blocks":
            scale = torch.rand(math.ceil(rows / 128), math.ceil(columns / 128)) + 0.5
            spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        else:
            scale = (exact.abs().max() / 448).reshape(())
            spread = scale
        made[name] = (exact / spread).to(torch.float8_e4m3fn)
        made[name.removesuffix(".weight") + suffix] = scale
        wanted[name] = (made[name].float() * spread).to(torch.bfloat16)
    return made, wanted


@pytest.mark.parametrize("suffix", checkpoint.SCALES)
@pytest.mark.parametrize("shape", ["whole", "rows", "blocks"])
def test_scales_beside_fp8_weights_are_applied(copy, spec, suffix, shape):
    made, wanted = scaled(read(copy, "transformer"), suffix, shape)
    further = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if suffix == ".scale_weight" else {}
    further["transformer_blocks.0.attn.to_q.input_scale"] = torch.ones(())
    if suffix == ".scale_weight":
        del further["transformer_blocks.0.attn.to_q.input_scale"]
        further = {"transformer_blocks.0.attn.to_q.scale_input": torch.ones(())}
    write(copy, "transformer", made | further)
    found = tensors_of(copy, spec)
    assert all(torch.equal(found[f"transformer.{name}"], value) for name, value in wanted.items())
    assert "fp8 (e4m3) with scales (transformer)" in loading.described(spec, Source(folder=copy))


def test_fp8_without_scales_says_so(copy, spec):
    plain = {n: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for n, v in read(copy, "transformer").items()}
    write(copy, "transformer", plain)
    found = tensors_of(copy, spec)
    assert all(torch.equal(found[f"transformer.{n}"], v.to(torch.bfloat16)) for n, v in plain.items())
    assert "stored in bfloat16 and fp8 (e4m3) (transformer)" in loading.described(spec, Source(folder=copy))


# What is refused


def drop(part, name):
    def change(folder):
        write(folder, part, {key: value for key, value in read(folder, part).items() if key != name})

    return change


def replaced(part, name, make):
    def change(folder):
        tensors = read(folder, part)
        write(folder, part, tensors | {name: make(tensors[name].clone())})

    return change


def spoilt(value):
    value.view(-1)[0] = math.inf
    return value


def indexed(change):
    def do(folder):
        index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    return do


def other_file(content):
    name = sorted(content["weight_map"])[0]
    mine = content["weight_map"][name]
    content["weight_map"][name] = next(f for f in content["weight_map"].values() if f != mine)


def absolute(content):
    content["weight_map"] = {name: f"/home/other/{file}" for name, file in content["weight_map"].items()}


def adapter(folder):
    tensors = read(folder, "transformer")
    name = "transformer_blocks.0.attn.to_q"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    tensors[f"{name}.lora_A.default.weight"] = torch.zeros(4, 64)
    write(folder, "transformer", tensors)


def int8(folder):
    tensors = read(folder, "transformer")
    name = "transformer_blocks.0.attn.to_q"
    tensors |= {f"{name}.weight": tensors[f"{name}.weight"].to(torch.int8), f"{name}.weight_scale": torch.ones(64, 1)}
    write(folder, "transformer", tensors)


def some_scales(folder):
    made, _ = scaled(read(folder, "transformer"), ".weight_scale", "whole")
    del made["transformer_blocks.0.attn.to_q.weight_scale"]
    write(folder, "transformer", made)


def negative_scale(folder):
    made, _ = scaled(read(folder, "transformer"), ".weight_scale", "whole")
    made["transformer_blocks.0.attn.to_q.weight_scale"] = torch.zeros(())
    write(folder, "transformer", made)


def pickle(folder):
    tensors = read(folder, "vae")
    write(folder, "vae", {"a": torch.zeros(1)}, name="x")
    (folder / "vae" / "x.safetensors").unlink()
    torch.save(tensors, folder / "vae" / "diffusion_pytorch_model.bin")


def gguf(folder):
    write(folder, "transformer", {"a": torch.zeros(1)}, name="x")
    (folder / "transformer" / "x.safetensors").unlink()
    (folder / "transformer" / "model-Q4_0.gguf").write_bytes(b"GGUF")


def configured(file, **values):
    return lambda folder: edit(folder / file, **values)


def beyond_vocabulary(folder):
    """Tokens for which the encoder has no embeddings."""
    encoder = read(folder, "text_encoder")
    name = next(key for key in encoder if "token_embedding" in key)
    write(folder, "text_encoder", encoder | {name: encoder[name][:100].contiguous()})
    edit(folder / "text_encoder" / "config.json", vocab_size=100)


Q = "transformer_blocks.0.attn.to_q.weight"
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
REFUSED = {
    "text encoder lacks": (drop("text_encoder_2", T5), ("text_encoder_2", T5, "copy it again")),
    "vae lacks": (drop("vae", "decoder.conv_in.bias"), ("vae", "decoder.conv_in.bias")),
    "denoiser lacks": (drop("transformer", Q), ("transformer", Q)),
    "denoiser inf": (replaced("transformer", Q, spoilt), (Q, "not finite")),
    "vae inf": (replaced("vae", "decoder.conv_in.bias", spoilt), ("decoder.conv_in.bias", "not finite")),
    "text encoder inf": (
        replaced("text_encoder_2", T5, spoilt),
        (T5, "not finite", "text_encoder_2/model.safetensors"),
    ),
    "too large for bf16": (replaced("vae", "decoder.conv_in.bias", lambda v: v.double() + 1e300), ("not finite",)),
    "shape": (replaced("transformer", Q, lambda v: torch.cat([v, v])), (Q, "[128, 64]", "[64, 64]")),
    "text encoder shape": (replaced("text_encoder_2", T5, lambda v: torch.cat([v, v])), (T5, "of shape")),
    "whole numbers": (replaced("transformer", Q, lambda v: v.to(torch.int32)), (Q, "I32", "bf16")),
    "extra": (lambda f: write(f, "vae", read(f, "vae") | {"more": torch.zeros(2)}), ("more", "has not")),
    "text encoder extra": (
        lambda f: write(f, "text_encoder_2", read(f, "text_encoder_2") | {"encoder.more": torch.zeros(2)}),
        ("encoder.more", "has not"),
    ),
    "adapter": (adapter, ("adapter", "lora_A", "fuse or unload")),
    "int8 with scales": (int8, ("quantized", "to_q")),
    "some scales": (some_scales, (Q, "none for")),
    "no positive scale": (negative_scale, ("to_q.weight_scale", "positive")),
    "index lacks": (indexed(lambda c: c["weight_map"].pop(Q)), ("does not name", Q)),
    "index names more": (
        indexed(lambda c: c["weight_map"].update(more=next(iter(c["weight_map"].values())))),
        ("lacks more",),
    ),
    "index names another file": (indexed(other_file), ("which is in",)),
    "index without a map": (indexed(lambda c: c.pop("weight_map")), ("index.json", "no weight_map")),
    "index elsewhere": (indexed(absolute), ("/home/other/", "only files beside it")),
    "pickle": (pickle, ("diffusion_pytorch_model.bin", "safetensors")),
    "gguf": (gguf, ("model-Q4_0.gguf", "GGUF")),
    "bitsandbytes": (
        configured("text_encoder_2/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        ("text_encoder_2/config.json", "bitsandbytes"),
    ),
    "torchao": (configured("transformer/config.json", quantization_config={"quant_method": "torchao"}), ("torchao",)),
    "depth": (configured("transformer/config.json", num_single_layers=1), ("num_single_layers is 1 instead of 2",)),
    "default": (
        lambda f: (f / "transformer" / "config.json").write_text(
            json.dumps(
                {
                    k: v
                    for k, v in json.loads((f / "transformer" / "config.json").read_text()).items()
                    if "axes" not in k
                }
            )
        ),
        ("axes_dims_rope",),
    ),
    "other pipeline": (configured("model_index.json", _class_name="FluxKontextPipeline"), ("FluxKontextPipeline",)),
    "other denoiser": (configured("model_index.json", transformer=["nunchaku", "Nunchaku"]), ("nunchaku.Nunchaku",)),
    "no denoiser": (configured("model_index.json", transformer=[None, None]), ("no transformer",)),
    "unknown scheduler": (configured("model_index.json", scheduler=["diffusers", "NextScheduler"]), ("NextScheduler",)),
    "other scheduler": (configured("model_index.json", scheduler=["diffusers", "DDIMScheduler"]), ("DDIMScheduler",)),
    "drawing scheduler": (
        configured("scheduler/scheduler_config.json", stochastic_sampling=True),
        ("draw noise of its own",),
    ),
    "vocabulary": (beyond_vocabulary, ("tokenizer", "embeddings for 100")),
    "merges": (
        lambda f: (f / "tokenizer" / "tokenizer.json").rename(f / "tokenizer" / "vocab.json"),
        ("merges.txt", "missing"),
    ),
    "list": (lambda f: (f / "model_index.json").write_text("[]"), ("model_index.json", "damaged")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_how(copy, spec, case):
    change, words = REFUSED[case]
    change(copy)
    text = refusal(copy, spec)
    assert all(word in text for word in words), text
    assert "git" not in text.split(": ")[-1]  # it is the user's folder


@pytest.mark.parametrize("asked", [("mini-flux",), ("mini-qwen", "mini-ltx2")])
def test_a_folder_that_is_none_of_the_models_asked_for_is_refused_at_once(copy, asked):
    with pytest.raises(LoadError) as caught:
        Source.create(copy, asked=asked)
    assert "is a checkpoint, but not of" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_folder_of_one_model_leaves_the_others_their_own(tmp_path):
    (tmp_path / "mine").symlink_to(MINI_FLUX.folder)
    source = Source.create(tmp_path / "mine", asked=("mini-qwen", "mini-flux"))
    assert "local folder mine" in loading.described(MODELS["mini-flux"], source)
    assert loading.described(MODELS["mini-qwen"], source) == "the bundled checkpoint"


def test_a_folder_of_folders_without_the_model_is_refused(tmp_path, original):
    (tmp_path / "flux").symlink_to(original)
    with pytest.raises(LoadError, match="no folder named mini-flux, only flux"):
        Source.create(tmp_path, asked=("mini-flux",))


def test_a_relative_is_recognised_by_its_configuration(copy, spec):
    """Before any weights are looked at."""
    shutil.rmtree(copy / "vae")
    edit(copy / "transformer" / "config.json", num_layers=8, guidance_embeds=False)
    text = refusal(copy, spec)
    assert "num_layers is 8 instead of 2" in text and "guidance_embeds is False instead of True" in text


# Commands

AT_ONCE = (
    "adapter",
    "whole numbers",
    "int8 with scales",
    "some scales",
    "index lacks",
    "index names more",
    "index names another file",
    "index without a map",
    "index elsewhere",
    "pickle",
    "gguf",
    "bitsandbytes",
    "torchao",
    "depth",
    "other pipeline",
    "other denoiser",
    "no denoiser",
    "list",
)
"""What is told from JSON files and headers alone, by the app as well, before anything heavy is imported."""
LATER = tuple(case for case in REFUSED if case not in AT_ONCE and case != "default")
"""What is told when the model is loaded."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The miniature's checkpoint with one of the faults, made once."""

    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp("broken") / "mine"
        shutil.copytree(MINI_FLUX.folder, folder)
        REFUSED[case][0](folder)
        return folder

    return make


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path / "cache"))
    return lambda name, folder: commands.refused(monkeypatch, capsys, tmp_path / "out", name, "--weights", folder)


@pytest.mark.parametrize("case", AT_ONCE)
def test_every_command_and_the_app_refuse_a_folder_that_is_bad_on_the_face_of_it(broken, refused, case):
    folder = broken(case)
    with pytest.raises(LoadError) as caught:
        app.run(app.arguments(["--weights", str(folder), "--port", "7999"]))
    for name in commands.COMMANDS:
        text = refused(name, folder)
        assert text == str(caught.value) or "model" in text  # which models are asked for is another matter
        assert str(folder) in text and "git" not in text.split(": ")[-1]


@pytest.mark.parametrize("case", LATER)
def test_every_command_that_makes_anything_refuses_the_others_when_it_loads(broken, refused, case):
    for name in commands.MAKERS:
        assert "git" not in refused(name, broken(case)).split(": ")[-1]


NUMBERS = ("denoiser inf", "vae inf", "text encoder inf", "too large for bf16", "no positive scale", "vocabulary")
"""What only the weights and the vocabulary themselves tell."""


@pytest.mark.parametrize("case", [case for case in LATER if case not in NUMBERS])
def test_models_says_what_is_wrong_with_a_folder(broken, monkeypatch, capsys, case):
    status, said, _ = commands.run(monkeypatch, capsys, "models", "--json", "--weights", broken(case))
    states = {model["id"]: model["state"] for model in json.loads(said)["models"]}
    assert status == 0 and states["mini-flux"] != "ready" and states["mini-qwen"] == "ready"


# Schedulers


STEPS = 6


@pytest.fixture(scope="module")
def miniature():
    return loading.load_pipeline(MINI_FLUX, CPU)


def picture(miniature, kind, seed=7, **config):
    """The miniature's picture by one scheduler, in [-1, 1], and the steps that were told."""
    request = CompareRequest.create("a cat on a red background", num_inference_steps=STEPS)
    usual = json.loads((MINI_FLUX.folder / "scheduler" / "scheduler_config.json").read_text())
    miniature.scheduler = schedulers.make(kind, usual | config, "model_index.json")
    told = []
    progress = pipeline.Progress("bf16", told.append, lambda: False)
    made = pipeline.finished(miniature, MINI_FLUX, pipeline.call(miniature, MINI_FLUX, request, seed, progress))
    return made.pixels * 2 - 1, told


@pytest.fixture(scope="module")
def by_euler(miniature):
    return [picture(miniature, schedulers.EULER, seed)[0] for seed in (7, 8)]


@pytest.mark.parametrize("kind", schedulers.KNOWN[1:])
def test_every_known_scheduler_makes_the_same_picture_twice_and_near_eulers(miniature, by_euler, kind):
    """The miniature's picture by another way of stepping is near the usual one, and far from that of another seed."""
    config = {} if kind.startswith("FlowMatch") else {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    mine, told = picture(miniature, kind, **config)
    assert told[-1].index == told[-1].total == schedulers.timesteps(miniature.scheduler, STEPS)
    assert torch.equal(mine, picture(miniature, kind, **config)[0])
    usual, other = by_euler
    assert lpips_distance(mine, usual) < 0.6 * lpips_distance(other, usual)


# Mutations


def mutate(draw, folder):
    """Change a copy in one way; gives what must then be loaded (None: it must be refused) and what must be said."""
    part = draw(st.sampled_from(PARTS))
    tensors = read(folder, part)
    name = draw(st.sampled_from(sorted(tensors)))
    others = [key for key in sorted(tensors) if tensors[key].shape != tensors[name].shape]
    shards = 2 if part == "transformer" else 1
    kind = draw(
        st.sampled_from(("drop", "rename", "swap", "cut", "grow", "truncate", "type", "not finite", "index", "junk"))
    )
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[f"{name}{draw(st.sampled_from(('_', '.weight', '.lora_A', '_scale', '2')))}"] = tensors.pop(name)
    elif kind == "swap":
        other = draw(st.sampled_from(others))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind in ("cut", "grow"):
        value = tensors[name]
        tensors[name] = value[:-1].clone() if kind == "cut" and value.shape[0] > 1 else torch.cat([value, value])
    elif kind == "type":
        to = draw(
            st.sampled_from((torch.float64, torch.float32, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool))
        )
        tensors[name] = tensors[name].to(to)
        write(folder, part, tensors, shards)
        if not to.is_floating_point:
            return None
        return {f"{part}.{name}": tensors[name].to(torch.bfloat16)}, "" if to.itemsize > 2 else str(to).split(".")[1][
            :6
        ]
    elif kind == "not finite":
        place = draw(st.integers(0, tensors[name].numel() - 1))
        tensors[name].view(-1)[place] = draw(st.sampled_from((math.inf, -math.inf, math.nan)))
    write(folder, part, tensors, shards)
    if kind == "truncate":
        file = draw(st.sampled_from(sorted((folder / part).glob("*.safetensors"))))
        file.write_bytes(file.read_bytes()[: draw(st.integers(0, file.stat().st_size - 1))])
    elif kind == "junk":
        file = draw(st.sampled_from(sorted((folder / part).glob("*.safetensors"))))
        content = bytearray(file.read_bytes())
        content[draw(st.integers(0, 7))] ^= draw(st.integers(1, 255))
        file.write_bytes(content)
    elif kind == "index":
        index = write(folder, part, tensors, 2)
        content = json.loads(index.read_text())
        where = content["weight_map"]
        files = sorted(set(where.values()))
        change = draw(st.sampled_from(("pop", "other", "absolute", "missing file", "map")))
        if change == "pop":
            del where[name]
        elif change == "other":
            where[name] = files[1 - files.index(where[name])]
        elif change == "absolute":
            where[name] = f"/tmp/{where[name]}"
        elif change == "missing file":
            (folder / part / where[name]).unlink()
        else:
            content["weight_map"] = draw(st.sampled_from(([], None, {}, "x", {name: 1})))
        index.write_text(json.dumps(content))
    return None


@settings(max_examples=MUTATIONS, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_checkpoint_is_refused_or_loads_to_what_it_says(original, spec, tmp_path_factory, data):
    """None loads to anything else in silence. (Two tensors of one shape, exchanged, are another valid checkpoint.)"""
    folder = tmp_path_factory.mktemp("mutated") / "flux"
    shutil.copytree(original, folder)
    try:
        expected = mutate(data.draw, folder)
        if expected is None:
            refusal(folder, spec)
            return
        changed, said = expected
        found, wanted = tensors_of(folder, spec), tensors_of(original, spec)
        assert changed.keys() <= wanted.keys()
        assert same(found, wanted | changed)
        assert said in loading.described(spec, Source(folder=folder)).replace("(e4m3)", "").replace("fp8", "float8")
    finally:
        shutil.rmtree(folder.parent)
