"""Quantized checkpoints: they hold the bits that quantizing makes, and plain diffusers makes the same picture of them;
what is none, damaged or another's is refused in one sentence."""

import json
import shutil
import sys
import textwrap
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, TorchAoConfig
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4DynamicActivationNVFP4WeightConfig
from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    PerTensor,
)

import app
from engine import quantized
from engine.catalog import MINI_FLUX, MINI_QWEN
from engine.columns import POST, Column
from engine.errors import LoadError, OutputError, RequestError
from engine.machine import Machine
from engine.outputs import export as writing
from engine.outputs import program
from engine.quantization import capability, recipe_files, recipes, stored
from engine.quantization.recipe_files import Tuning
from engine.quantization.remedies import WeightOnlySteps
from engine.request import CompareRequest
from engine.runtime import pipeline
from engine.runtime.residents import OTHER_WEIGHTS, Holdings
from engine.serving.process import Process
from engine.weights import loading
from engine.weights import torchao_layout as reading
from engine.weights.source import BUNDLED_OR_HUB
from tests.support import commands, plain

CPU = torch.device("cpu")
HERE = capability.detect(CPU)
B200 = Machine(name="NVIDIA B200", kind="cuda", capability=(10, 0), mslk=True)
COLUMNS = ("fp8", "mxfp8", "nvfp4", "int8", "nvfp4@tuned")
PROMPT, STEPS, SIDE = "a cat on a red background", 2, 64


@pytest.fixture(scope="module")
def written(tmp_path_factory, cache):
    """Column -> what `quantize` wrote of it, of the miniature."""
    made = {}
    for column in COLUMNS:
        out = tmp_path_factory.mktemp("stored") / column.replace("@", "-by-")
        made[column] = writing.write(MINI_FLUX, Column.parse(column, MINI_FLUX, POST), CPU, BUNDLED_OR_HUB, out)
    return made


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch):
    """Each test gives its own checkpoints."""
    monkeypatch.setattr(quantized, "_given", {})


def given(written, column, name="mine"):
    return reading.give(written[column].folder, name)


def planned(column, spec=MINI_FLUX):
    return recipes.plan_of(loading.empty_transformer(spec), spec, column)


def load(column, machine=HERE):
    plan = planned(column)
    support = capability.support(column.format, machine)
    denoiser = stored.denoiser(MINI_FLUX, plan, support, CPU, BUNDLED_OR_HUB)
    recipes.verify(denoiser, plan)
    return denoiser


def bits(tensor):
    """All that a weight is, by name."""
    names = getattr(tensor, "tensor_data_names", None)
    if names is None:
        return {"": tensor.reshape(-1)}
    names = [*names, *(n for n in getattr(tensor, "optional_tensor_data_names", ()) if getattr(tensor, n) is not None)]
    return {name: getattr(tensor, name).contiguous().reshape(-1).view(torch.uint8) for name in names}


def same(one, other):
    """See that two denoisers are the same to the bit, in everything."""
    mine, its = one.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        assert type(tensor) is type(its[name]), name
        for attribute in ("act_quant_kwargs", "native", "four_over_six", "kernel_preference"):
            assert str(getattr(tensor, attribute, None)) == str(getattr(its[name], attribute, None)), (name, attribute)
        for part, value in bits(tensor).items():
            assert torch.equal(value, bits(its[name])[part]), (name, part)


# ---------------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.parametrize("machine", [HERE, B200], ids=["emulated", "native"])
@pytest.mark.parametrize("column", COLUMNS)
def test_what_was_stored_is_what_quantizing_makes(written, column, machine):
    asked = Column.parse(column, MINI_FLUX, POST)
    held = given(written, column)
    assert (held.format, held.models) == (asked.format, ("mini-flux",))
    same(load(Column(held.format, held.name), machine), load(asked, machine))


def test_a_stored_column_takes_the_bytes_and_steps_of_the_one_it_was_made_of(written):
    given(written, "nvfp4@tuned")
    ours, its = planned(Column("nvfp4", "tuned")), planned(Column("nvfp4", "mine"))
    assert its.quantized_bytes == ours.quantized_bytes
    assert its.recipe.weight_only_steps("nvfp4") == ours.recipe.weight_only_steps("nvfp4") == (2, 0)
    assert [(a.name, a.precision) for a in its.layers] == [(a.name, a.precision) for a in ours.layers]
    kept = {layer.reason for layer in its.layers if not layer.quantized}
    assert kept == {"The checkpoint keeps it in bf16."}


def test_no_file_of_the_bf16_denoiser_is_read(written, monkeypatch):
    given(written, "nvfp4")
    monkeypatch.setattr(loading, "load_transformer", lambda *_, **__: pytest.fail("bf16 weights were loaded"))
    load(Column("nvfp4", "mine"))


REMEDIES = {
    "nvfp4": Tuning(low_rank={"proj_out": 4}, layers={"proj_out": "nvfp4"}, rotation=64, four_over_six=True),
    "int8": Tuning(rotation=64),
}


@pytest.mark.parametrize("form", REMEDIES)
def test_what_a_recipe_does_besides_weights_is_kept(form, monkeypatch, tmp_path, cache):
    rules = replace(recipes.recipe("mini-flux", POST), tunings={form: REMEDIES[form]})
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "RECIPES", {**recipes.RECIPES, ("mini-flux", POST): rules})
        made = writing.write(MINI_FLUX, Column(form, POST), CPU, BUNDLED_OR_HUB, tmp_path / "out")
        fresh = load(Column(form, POST))
    reading.give(made.folder, "mine")
    again = load(Column(form, "mine"))
    same(fresh, again)
    x = torch.randn(3, 320, dtype=torch.bfloat16)
    name = "transformer_blocks.0.attn.to_q"
    assert torch.equal(fresh.get_submodule(name)(x), again.get_submodule(name)(x))
    assert any("rotate" in note for note in made.notes)
    assert all(note.endswith(".") for note in made.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Plain diffusers

PLAIN = """
import sys

import numpy
import torch
from diffusers import DiffusionPipeline
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization.quantize_.common import KernelPreference


def row_wise(a, b, scale_a, scale_b, bias=None, out_dtype=None, **_):
    # PyTorch's CPU multiplies FP8 with one scale a tensor alone; this is what its GPU product computes.
    result = (a.float() @ b.float()) * scale_a * scale_b
    return (result if bias is None else result + bias).to(out_dtype)


torch._scaled_mm = row_wise
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    options = {}
    for module in pipe.transformer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, MXTensor):  # stored for a Blackwell GPU
            weight.kernel_preference = weight.act_quant_kwargs.kernel_preference = KernelPreference.EMULATED
    SWITCH
    output = pipe(PROMPT, **CALL, generator=torch.Generator("cpu").manual_seed(7), output_type="pt", **options)
    numpy.save(out, output.images.float().numpy())
"""


def test_plain_diffusers_makes_the_same_pixels(written, tmp_path):
    """In a process without the engine. FP8 by a product of the test's, as PyTorch's CPU has none with a scale a row;
    MXFP8 by torchao's emulation; NVFP4 in the recipe's weight-only steps, by the lines of the model card."""
    request = replace(CompareRequest.create(PROMPT, num_inference_steps=STEPS), height=SIDE, width=SIDE)
    given_to = {
        **MINI_FLUX.call,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": STEPS,
        MINI_FLUX.guidance_argument: request.guidance_scale,
    }
    card = (written["nvfp4@tuned"].folder / "README.md").read_text()
    switch = card[card.index("linears = [") : card.index('pipe("a cat"')]
    lines = 'if "tuned" in folder:\n' + textwrap.indent(f"{switch}\noptions['callback_on_step_end'] = ended", "    ")
    script = PLAIN.replace("SWITCH", textwrap.indent(lines, "    ").strip())
    script = script.replace("CALL", repr(given_to)).replace("PROMPT", repr(PROMPT))
    (tmp_path / "plain.py").write_text(
        script.replace(
            "from torchao.prototype.mx_formats.mx_tensor import MXTensor",
            "from torchao.prototype.mx_formats.mx_tensor import MXTensor\n"
            "from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor",
        )
    )
    columns = ("fp8", "mxfp8", "nvfp4@tuned")
    pairs = [str(part) for c in columns for part in (written[c].folder, tmp_path / f"{c}.npy")]
    plain.run(tmp_path / "plain.py", *pairs)
    shared = loading.load_shared(MINI_FLUX, CPU)
    for column in columns:
        held = given(written, column)
        denoiser = load(Column(held.format, held.name))
        steps = recipes.stored_recipe(held).weight_only_steps(held.format)
        made = pipeline.call(
            loading.assemble(MINI_FLUX, shared, denoiser),
            MINI_FLUX,
            request,
            7,
            steps=WeightOnlySteps(denoiser, steps, STEPS),
        )
        np.testing.assert_array_equal(np.load(tmp_path / f"{column}.npy"), made.images.float().numpy(), err_msg=column)


@pytest.mark.parametrize("column", COLUMNS)
def test_plain_diffusers_reads_the_bits(written, column):
    """Each weight as torchao's class, with the configuration for activations that the native path has."""
    theirs = FluxTransformer2DModel.from_pretrained(
        written[column].folder, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    ours = load(Column.parse(column, MINI_FLUX, POST), B200)
    kinds = set()
    for name, tensor in ours.state_dict().items():
        wanted, found = stored.as_torchao(tensor), theirs.state_dict()[name]
        kinds.add(type(found).__name__)
        assert type(found) is type(wanted), name
        assert str(getattr(found, "act_quant_kwargs", "")) == str(getattr(wanted, "act_quant_kwargs", "")), name
        for part, value in bits(wanted).items():
            assert torch.equal(value, bits(found)[part]), (name, part)
    assert len(kinds) > 1


def test_a_denoiser_in_several_files_is_the_same(written, monkeypatch, tmp_path):
    monkeypatch.setattr(writing, "SHARD_BYTES", 2e6)
    made = writing.write(MINI_FLUX, Column("nvfp4", POST), CPU, BUNDLED_OR_HUB, tmp_path / "many")
    files = sorted((made.folder / "transformer").glob("*.safetensors"))
    assert len(files) > 3
    theirs = FluxTransformer2DModel.from_pretrained(made.folder / "transformer", torch_dtype=torch.bfloat16)
    whole = FluxTransformer2DModel.from_pretrained(written["nvfp4"].folder / "transformer", torch_dtype=torch.bfloat16)
    same(theirs, whole)
    reading.give(made.folder, "many")
    given(written, "nvfp4")
    same(load(Column("nvfp4", "many")), load(Column("nvfp4", "mine")))


# ---------------------------------------------------------------------------------------------------------------------
# As others wrote it


@pytest.fixture
def anywhere(monkeypatch):
    """torchao quantizes weights on a CPU too, once it does not ask for the GPU that would multiply them."""
    for name, module in list(sys.modules.items()):
        for gate in ("is_sm_at_least_100", "_check_hardware_support"):
            if name.startswith("torchao") and gate in vars(module):
                monkeypatch.setattr(module, gate, lambda *_: True)


def by_diffusers(folder, config):
    """What diffusers saves of the miniature with a configuration of torchao's."""
    made = FluxTransformer2DModel.from_pretrained(
        MINI_FLUX.folder,
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(config, modules_to_not_convert=["proj_out", "time_text_embed"]),
    )
    made.save_pretrained(folder)
    return made


TAKEN = {
    "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
    "mxfp8": MXDynamicActivationMXWeightConfig,
    "nvfp4": lambda: NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False),
    "int8": Int8DynamicActivationInt8WeightConfig,
}


@pytest.mark.parametrize("form", TAKEN)
def test_what_diffusers_saved_with_torchao_is_a_column(form, anywhere, tmp_path):
    theirs = by_diffusers(tmp_path / "theirs", TAKEN[form]())
    held = reading.give(tmp_path / "theirs")
    assert (held.name, held.format, held.tuning) == ("theirs", form, {})
    ours = load(Column(form, "theirs"))
    layers = {name for name, kept in held.layers.items()}
    assert layers and "proj_out" not in layers
    for name in layers:
        wanted, found = theirs.get_submodule(name).weight, ours.get_submodule(name).weight
        for part, value in bits(stored.as_torchao(found)).items():
            assert torch.equal(value, bits(wanted)[part]), (name, part)


REFUSED = {
    "with scales that are not one a row": lambda: Float8DynamicActivationFloat8WeightConfig(
        granularity=PerTensor(), set_inductor_config=False
    ),
    "with weights alone quantized": Float8WeightOnlyConfig,
    "with weights alone quantized ": NVFP4WeightOnlyConfig,
}


@pytest.mark.parametrize("why", REFUSED)
def test_another_layout_of_torchaos_is_refused_by_name(why, anywhere, tmp_path):
    by_diffusers(tmp_path / "theirs", REFUSED[why]())
    with pytest.raises(LoadError, match=f"as torchao's (Float8Tensor|NVFP4Tensor) {why.strip()}"):
        reading.give(tmp_path / "theirs")


# ---------------------------------------------------------------------------------------------------------------------
# What is none


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written["nvfp4"].folder, tmp_path / "copy")


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(folder, change):
    """The denoiser's file with other tensors."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, said = load_file(file), reading.checkpoint.metadata(file, "")
    change(tensors, said)
    save_file(tensors, file, said)


def another_model(folder):
    shutil.copy(MINI_QWEN.folder / "transformer" / "config.json", folder / "transformer" / "config.json")
    edit(folder / "transformer" / "config.json", quantization_config={"quant_method": "torchao"})


def another_size(folder):
    edit(folder / "transformer" / "config.json", num_layers=4)


def cut_short(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def modelopt(folder):
    edit(
        folder / "transformer" / "config.json", quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}
    )


def other_layers(folder):
    edit(folder / reading.PROVENANCE, layers={"proj_out": "nvfp4"})


def no_metadata(folder):
    rewrite(folder, lambda tensors, said: said.clear())


def no_part(folder):
    rewrite(folder, lambda tensors, said: tensors.pop("transformer_blocks.0.attn.to_q._weight_scale"))


def other_shape(folder):
    def change(tensors, said):
        name = "transformer_blocks.0.attn.to_q._weight_scale"
        tensors[name] = tensors[name][:32].contiguous()

    rewrite(folder, change)


def int4(folder):
    def change(tensors, said):
        name = "transformer_blocks.0.attn.to_q.weight"
        said[name] = said[name].replace("NVFP4Tensor", "Int4Tensor")

    rewrite(folder, change)


WRONG = {
    another_model: "copy is a quantized checkpoint of mini-qwen, not of mini-flux",
    another_size: "is the denoiser of no model here: in its transformer/config.json num_layers is 4",
    cut_short: "is cut short",
    modelopt: "are quantized by NVIDIA ModelOpt (NVFP4)",
    other_layers: "tells of other layers",
    no_metadata: "is quantized in a layout that is not read here|none of its weights is quantized",
    no_part: "lacks transformer_blocks.0.attn.to_q._weight_scale",
    other_shape: "has F8_E4M3 of",
    int4: "as torchao's Int4Tensor which is none of its formats",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_folder_that_is_bad_is_refused_before_anything_is_loaded(copy, change, monkeypatch, capsys, tmp_path):
    change(copy)
    told = commands.refused(monkeypatch, capsys, tmp_path / "out", "compare", "--precision", f"nvfp4@{copy}")
    assert any(
        part.replace("(", "").replace(")", "") in told.replace("(", "").replace(")", "")
        for part in WRONG[change].split("|")
    ), told


def nan_scale(tensors, said):
    tensors["transformer_blocks.0.attn.to_q._weight_scale"].view(torch.uint8)[0, 0] = 0x7F


def minus_scale(tensors, said):
    tensors["transformer_blocks.0.attn.to_q._weight_per_tensor_scale"].mul_(-1)


def nan_weight(tensors, said):
    tensors["proj_out.weight"][0, 0] = float("nan")


@pytest.mark.parametrize("change", [nan_scale, minus_scale, nan_weight], ids=lambda change: change.__name__)
def test_values_that_are_no_numbers_are_refused(copy, change):
    rewrite(copy, change)
    held = reading.give(copy, "mine")
    with pytest.raises(LoadError, match=r"(no numbers of its format|not finite in bf16).*\.$"):
        load(Column(held.format, "mine"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nvfp4@/no/such/folder", "There is no folder /no/such/folder"),
        (f"nvfp4@{MINI_FLUX.folder}", "names no quantization by torchao"),
        (f"nvfp4@{MINI_FLUX.folder.parent}", "is no quantized checkpoint"),
    ],
)
def test_a_folder_that_is_none_is_refused(text, sentence, monkeypatch, capsys, tmp_path):
    assert sentence in commands.refused(monkeypatch, capsys, tmp_path / "out", "compare", "--precision", text)


def test_a_checkpoint_is_of_its_own_model_and_format(written):
    given(written, "nvfp4")
    with pytest.raises(RequestError, match="mine is a quantized checkpoint of mini-flux, not of mini-qwen"):
        CompareRequest.create("a cat", model="mini-qwen", precisions=["nvfp4@mine"])
    with pytest.raises(RequestError, match=r"mine is stored in nvfp4: ask for nvfp4@mine\."):
        CompareRequest.create("a cat", precisions=["fp8@mine"])
    with pytest.raises(RequestError, match="has no recipe 'mine'"):  # of those that name none
        CompareRequest.create("a cat", precisions=["fp8"], recipe="mine")
    asked = CompareRequest.create("a cat", precisions=["nvfp4@mine", "nvfp4"])
    assert asked.precisions == ("bf16", "nvfp4", "nvfp4@mine")
    assert CompareRequest.from_json(asked.to_json()) == asked


def test_no_request_has_a_path_looked_at(copy, monkeypatch):
    """Names alone, given when the process was started."""
    monkeypatch.setattr(reading, "read", lambda *_: pytest.fail("a folder was looked at"))
    with pytest.raises(RequestError, match="has no recipe"):
        CompareRequest.create("a cat", precisions=[f"nvfp4@{copy}"])


@pytest.mark.parametrize("name", ["tuned", "seed", "a b", "a@b", "../x", "", "x" * 41])
def test_a_name_is_plain_and_no_recipes(name):
    with pytest.raises(RequestError, match="cannot be called"):
        quantized.check_name(name)


def test_folders_of_one_name_get_names_of_their_own(written, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(written["nvfp4"].folder, tmp_path / place / "tuned run")
    first, second = (reading.give(tmp_path / place / "tuned run").name for place in ("a", "b"))
    assert (first, second) == ("tuned-run", "tuned-run-2")
    assert reading.give(tmp_path / "a" / "tuned run").name == first


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_quantize_writes_nothing_over_what_is_there(written, monkeypatch, capsys, tmp_path):
    out = tmp_path / "there"
    out.mkdir()
    status, said, err = commands.run(monkeypatch, capsys, "quantize", *commands.CPU, "--column", "nvfp4", "--out", out)
    assert (status, said) == (2, "") and "is there already" in err
    assert not list(out.iterdir()) and [file.name for file in tmp_path.iterdir()] == ["there"]


def test_a_failure_leaves_nothing(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        writing.write(MINI_FLUX, Column("nvfp4", POST), CPU, BUNDLED_OR_HUB, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "more", "sentence"),
    [
        ("bf16", (), "bf16 is not quantized"),
        ("nvfp4@best", (), "has no recipe 'best'"),
        ("nvfp5", (), "There is no precision 'nvfp5'"),
        ("nvfp4", ("--random-weights",), "Random weights lie in no folder"),
    ],
)
def test_quantize_refuses_what_it_cannot_write(column, more, sentence, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    status, said, err = commands.run(
        monkeypatch, capsys, "quantize", *commands.CPU, "--column", column, "--out", out, *more
    )
    assert (status, said) == (2, "") and sentence in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_provenance_says_where_it_comes_from(written):
    made = written["nvfp4@tuned"]
    said = json.loads((made.folder / reading.PROVENANCE).read_text())
    assert said["source"]["fingerprint"] == loading.fingerprint(MINI_FLUX)
    assert (said["model"], said["column"]) == ("mini-flux", "nvfp4@tuned")
    assert said["tuning"] == recipe_files.functional(recipes.recipe("mini-flux", "tuned").tunings["nvfp4"])
    assert said["versions"]["torchao"] and said["recipe"]["fingerprint"]
    assert "first 2 steps" in made.notes[0] and made.notes[0] in (made.folder / "README.md").read_text()
    assert written["nvfp4"].notes == ()


def test_what_is_not_quantized_is_the_sources_own(written):
    for file in MINI_FLUX.folder.rglob("*.safetensors"):
        if file.parent.name != "transformer":
            mine = written["fp8"].folder / file.relative_to(MINI_FLUX.folder)
            assert mine.samefile(file) or mine.read_bytes() == file.read_bytes()


def test_bf16_is_not_made_of_it(written, monkeypatch, capsys, tmp_path):
    told = commands.refused(monkeypatch, capsys, tmp_path / "out", "compare", "--weights", written["nvfp4"].folder)
    assert "quantized already, by torchao" in told and "as a column" in told


def test_the_program_of_a_stored_column_loads_it(written):
    held = given(written, "nvfp4@tuned")
    asked = CompareRequest.create("a cat", precisions=["nvfp4@mine"])
    text = program.code(asked, "nvfp4@mine", "native")
    compile(text, "program", "exec")
    assert '"mine",' in text and "quantize_" not in text and "callback_on_step_end=ended" in text
    assert str(held.folder.parent) not in text  # nobody's paths


def test_a_checkpoint_of_other_weights_says_so(written):
    held, reasons = given(written, "nvfp4"), {}
    for source in (held.source, "model_index.json 00000000", ""):
        quantized.give(replace(held, source=source))
        rendition = Holdings("cpu").rendition(MINI_FLUX, Column("nvfp4", "mine"), lambda _: None)
        reasons[source] = rendition.support.reason.endswith(OTHER_WEIGHTS)
        assert rendition.layers == planned(Column("nvfp4", "mine")).counts
    assert reasons == {held.source: False, "model_index.json 00000000": True, "": False}


def test_the_apps_child_process_knows_the_names_that_it_was_started_with(written):
    args = app.arguments(["--device", "cpu", "--quantized", f"mine={written['nvfp4'].folder}"])
    with closing(Process.from_arguments(args)) as process:
        plan = process.plan("mini-flux", "nvfp4@mine", POST)
    assert (plan["column"], plan["quantized"]) == ("nvfp4@mine", planned(Column("nvfp4", POST)).counts.quantized)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("mine", "is not NAME=DIR"),
        ("tuned={folder}", "cannot be called tuned, which is a recipe"),
        ("mine={folder}/nothing", "There is no folder"),
    ],
)
def test_the_app_refuses_what_it_cannot_offer(given, sentence, written):
    with pytest.raises((RequestError, LoadError), match=sentence):
        Process.from_arguments(app.arguments(["--quantized", given.format(folder=written["nvfp4"].folder)]))
