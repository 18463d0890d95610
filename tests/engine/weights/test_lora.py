"""LoRAs: fused as diffusers fuses them, before anything is quantized, and refused where they do not fit."""

import json
import pickle
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from engine import catalog
from engine.columns import EXACT, Column
from engine.errors import LoadError, RequestError
from engine.outputs import blind, media
from engine.outputs.program import code
from engine.quantization import recipes
from engine.request import CompareRequest
from engine.results import Comparison
from engine.runtime.multi_device import driving
from engine.runtime.pipeline import call, finished
from engine.runtime.studio import Studio
from engine.weights import fusing, loading, lora
from tests.support import adapters, own_catalog, tiny
from ui.words import verdict

pytestmark = pytest.mark.usefixtures("catalog_for_one_test")
CPU = torch.device("cpu")
WITH = ["bf16", "bf16+no-lora", "nvfp4", "nvfp4+no-lora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture
def spec(folder):
    made = replace(tiny.spec("flux.1-dev", folder), recipes=("full", "post"))
    catalog.give(made)
    return made


def adapted(spec, *texts):
    return catalog.model(lora.given(map(str, texts), spec.id))


def state(spec):
    return loading.load_transformer(spec, CPU).state_dict()


def by_diffusers(spec, files, scales):
    """The pipeline as diffusers and peft fuse it."""
    pipeline = getattr(diffusers, spec.pipeline).from_pretrained(
        spec.folder, torch_dtype=torch.bfloat16, local_files_only=True
    )
    names = [f"number-{index}" for index in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(names, scales)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline


def test_a_lora_for_the_miniature_makes_the_pixels_that_diffusers_makes_with_it(tmp_path):
    mini = catalog.MINI_FLUX
    file = adapters.write(adapters.factors(loading.empty_transformer(mini)), tmp_path / "style.safetensors")
    ours = adapted(mini, file)
    theirs = by_diffusers(mini, [file], [1.0])
    for name, weight in state(ours).items():
        assert torch.equal(weight, theirs.transformer.state_dict()[name]), name
    request, pixels = CompareRequest.create("a cat", model=ours.id, num_inference_steps=1), []
    fused = loading.load_pipeline(ours, CPU)
    theirs.transformer.set_attention_backend("native")
    theirs.vae.to(memory_format=torch.channels_last)
    theirs.set_progress_bar_config(disable=True)
    for pipeline in (fused, theirs, loading.load_pipeline(mini, CPU)):
        pixels.append(finished(pipeline, mini, call(pipeline, mini, request, 7)).pixels)
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


def metadata(**config):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}


def test_several_scaled_and_configured_ones_are_fused_as_diffusers_does(spec, tmp_path):
    empty = loading.empty_transformer(spec)
    layers = [name for name, layer in empty.named_modules() if "ff" in name and isinstance(layer, torch.nn.Linear)]
    first = adapters.write(adapters.factors(empty), tmp_path / "one.safetensors")
    said = metadata(r=4, lora_alpha=8, alpha_pattern={layers[0]: 2}, target_modules=layers)
    second = adapters.write(adapters.factors(empty, "ff", 1), tmp_path / "two" / "my style.v2.safetensors", said)
    ours = adapted(spec, f"{first}:0.5", f"{second}:-1.25")
    assert ours.id == f"{spec.id}+one:0.5+my-style-v2:-1.25"
    theirs = by_diffusers(spec, [first, second], [0.5, -1.25]).transformer.state_dict()
    for name, weight in state(ours).items():
        assert torch.equal(weight, theirs[name]), name


def test_alphas_beside_the_factors_count_as_diffusers_counts_them(spec, tmp_path):
    tensors = adapters.factors(loading.empty_transformer(spec))
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    alphas = {f"{layer}.alpha": torch.tensor(2.0 if index else 6.0) for index, layer in enumerate(layers)}
    file = adapters.write(tensors | alphas, tmp_path / "alphas.safetensors")
    theirs = by_diffusers(spec, [file], [1.0]).transformer.state_dict()
    for name, weight in state(adapted(spec, file)).items():
        assert torch.equal(weight, theirs[name]), name


@pytest.fixture(scope="module")
def shown(folder, cache, tmp_path_factory):
    """One comparison, with and without, in each column."""
    with pytest.MonkeyPatch.context() as patch:
        own_catalog.begin(patch)
        base = replace(tiny.spec("flux.1-dev", folder), recipes=("full", "post"))
        catalog.give(base)
        at = tmp_path_factory.mktemp("lora")
        (at / "out").mkdir()
        (at / "base").mkdir()
        file = adapters.write(adapters.factors(loading.empty_transformer(base)), at / "style.safetensors")
        spec, studio = adapted(base, f"{file}:0.8"), Studio("cpu")
        asked = CompareRequest.create("a cat", model=spec.id, precisions=WITH[1:], num_inference_steps=1)
        with driving(studio.device):
            compared = studio.compare(asked, at / "out", lambda _: None, lambda: False)
        yield studio, base, spec, compared, at


def test_with_and_without_are_columns_of_one_comparison(shown):
    studio, base, spec, compared, at = shown
    catalog.give(base)
    catalog.give(spec)
    assert [g.column for g in compared.results] == list(compared.request.precisions) == WITH
    assert len({(at / "out" / g.files[0]).read_bytes() for g in compared.results}) == 4
    assert compared.reference.metrics is None and all(g.metrics.mean_lpips > 0 for g in compared.results[1:])
    assert ["LoRA style.safetensors at 0.8" in g.ran["Weights"] for g in compared.results] == [True, False] * 2
    alone = CompareRequest.create("a cat", model=base.id, precisions=["nvfp4"], num_inference_steps=1)
    with driving(studio.device):
        without = studio.compare(alone, at / "base", lambda _: None, lambda: False)
    for mine, other in zip(compared.results[1::2], without.results, strict=True):
        with Image.open(at / "out" / mine.files[0]) as one, Image.open(at / "base" / other.files[0]) as two:
            assert np.array_equal(np.asarray(one), np.asarray(two))
    assert Comparison.load(at / "out") == compared
    assert [pair.precision for pair in blind.pairs(compared, fresh=True)] == ["nvfp4"]


def test_a_picture_says_which_lora_made_it_and_a_ruler_is_not_anothers(shown):
    _, base, spec, compared, at = shown
    said = [media.read_recipe(at / "out" / g.files[0]) for g in compared.results]
    assert [one.get("loras") for one in said] == [[spec.loras[0].provenance], None] * 2
    assert said[0]["request"]["model"] == spec.id == f"{base.id}+style:0.8"
    assert loading.fingerprint(spec) != loading.fingerprint(base) in loading.fingerprint(spec)
    assert loading.fingerprint(spec).endswith(f", lora-style:0.8 {spec.loras[0].digest[:8]}")


@pytest.mark.parametrize("column", ["bf16", "bf16+no-lora"])
def test_the_program_has_the_same_weights(shown, tmp_path, monkeypatch, column):
    _, base, spec, compared, at = shown
    catalog.give(base)
    catalog.give(spec)
    program = code(compared.request, column, "native").replace(f"assets/{base.source}", base.source)
    assert ("load_lora_weights" in program, "peft" in program) == ((True, True) if column == "bf16" else (False, False))
    (tmp_path / "style.safetensors").symlink_to(at / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(program[: program.index("pipe.transformer.set_attention_backend")], scope)
    theirs, asked = scope["pipe"].transformer.state_dict(), compared.request.column(column)
    for name, weight in state(asked.weights(spec)).items():
        assert torch.equal(weight, theirs[name]), name


def test_columns_without_are_written_and_read_back(spec, tmp_path):
    file = adapters.write(adapters.factors(loading.empty_transformer(spec)), tmp_path / "style.safetensors")
    ours = adapted(spec, file)
    asked = CompareRequest.create(
        "a cat", model=ours.id, precisions=["nvfp4@post+no-lora", "nvfp4+no-lora", "fp8", "bf16+no-lora"], recipe="post"
    )
    assert asked.precisions == ("bf16", "bf16+no-lora", "fp8", "nvfp4+no-lora")
    assert asked.columns[0] == EXACT != asked.columns[1]
    assert asked.columns[3] == Column("nvfp4", "post+no-lora") and asked.columns[3].rules == "post"
    assert CompareRequest.from_json(asked.to_json()) == asked
    assert replace(asked, recipe="full").columns[3].recipe == "full+no-lora"
    with pytest.raises(RequestError, match=r"has no LoRA to leave out: leave out \+no-lora"):
        CompareRequest.create("a cat", model=spec.id, precisions=["nvfp4+no-lora"])


def test_calibrated_weights_do_not_take_the_place_of_weights_with_a_lora(tmp_path):
    mini = catalog.MINI_FLUX
    file = adapters.write(adapters.factors(loading.empty_transformer(mini)), tmp_path / "style.safetensors")
    ours, empty = adapted(mini, file), loading.empty_transformer(mini)
    column = Column.parse("nvfp4@tuned", ours, "post")
    plan = recipes.plan_of(empty, ours, column)
    assert any(layer.searched for layer in plan.layers) and not any(layer.calibrated for layer in plan.layers)
    without = recipes.plan_of(empty, ours, replace(column, recipe=f"{column.recipe}+no-lora"))
    assert any(layer.calibrated for layer in without.layers)


def test_a_model_with_loras_reaches_another_process(spec, tmp_path):
    file = adapters.write(adapters.factors(loading.empty_transformer(spec)), tmp_path / "style.safetensors")
    ours = adapted(spec, file)
    assert pickle.loads(pickle.dumps(ours)) == ours


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


def wrong(tensors):
    some = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        some[name.replace("attn", "attention") if index < 4 else name] = tensor
    return some


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda found: {n.replace("attn", "attention"): t for n, t in found.items()},
            "another model than .* none of its",
        ),
        (lambda found: {n: t.repeat(1, 2) if "_A" in n else t for n, t in found.items()}, "64 x 64 and not 128 x 64"),
        (wrong, "in part, 2 of its 22 layers do not: there is no layer"),
        (lambda found: dict(list(found.items())[1:]), "one of two factors"),
        (lambda found: found | {"text_encoder.q_proj.lora_A.weight": torch.ones(4, 4)}, "changes text_encoder too"),
        (lambda found: found | {"transformer.norm_out.alpha": torch.ones(())}, "alphas for 1 of its 22 layers"),
        (lambda found: found | {"transformer.norm.weight": torch.ones(4)}, "no factor of a product"),
        (lambda found: {"base_model.odd.lora_A.weight": torch.ones(4, 4)}, "LoRA style.safetensors"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_in_one_sentence(spec, tmp_path, change, said):
    empty = loading.empty_transformer(spec)
    file = adapters.write(change(adapters.factors(empty)), tmp_path / "style.safetensors")
    with pytest.raises(LoadError, match=said) as raised:
        fusing.check(adapted(spec, file), empty)
    assert str(raised.value).count(". ") == 0 and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere.safetensors", "There is no LoRA 'nowhere.safetensors': give a file"),
        ("lora.bin", "lora.bin is no safetensors file"),
        ("some.safetensors", "some.safetensors holds no LoRA"),
        ("lokr.safetensors", "is a LoKr adapter"),
        ("empty", "empty holds none"),
        ("two", "two holds 2 of them"),
        ("lora.safetensors:much", "has the scale 'much'"),
        ("lora.safetensors:0", "has the scale '0'"),
        ("lora.safetensors:nan", "has the scale 'nan'"),
        ("nobody/nothing", "no LoRA nobody/nothing on this machine, and nothing may be fetched offline"),
        ("nobody/nothing/file.safetensors", "no LoRA nobody/nothing on this machine"),
    ],
)
def test_what_names_no_lora_is_told_in_one_sentence(spec, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    plain = {"transformer.a.lora_A.weight": torch.ones(2, 2)}
    for name, tensors in {
        "some": {"weight": torch.ones(1)},
        "lokr": {"a.lokr_w1": torch.ones(1)},
        "lora": plain,
        "two/a": plain,
        "two/b": plain,
    }.items():
        adapters.write(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises((LoadError, RequestError), match=said):
        lora.given([text], spec.id, offline=True)


def test_a_model_with_a_lora_that_is_not_here_is_told_how_to_get_it():
    with pytest.raises(RequestError, match="started with --lora"):
        catalog.model("mini-flux+style:0.8")


def test_the_verdict_says_what_is_left_of_the_lora(shown):
    *_, compared, _ = shown
    catalog.give(shown[1])
    catalog.give(shown[2])
    of = {g.column: g.metrics.mean_lpips for g in compared.results[1:]}
    (said,) = [text for _, text in verdict.verdicts(compared) if text.startswith("What the LoRA does")]
    assert f"{of['bf16+no-lora']:.3g}"[:4] in said
    far = of["nvfp4"] / of["bf16+no-lora"]
    told = f"{far:.0f} times" if far >= 2 else f"{far:.0%}"
    assert f"NVFP4 moves the picture {told} as far." in said
