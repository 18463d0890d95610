"""One column of a comparison as a program of its own: the diffusers and torchao calls the engine makes, without it.

For whoever wants to leave the page with something that runs. The program holds the rules of the recipe, not the
engine's plan, so that it can be read; tests/engine/outputs/test_program.py holds the two together, layer by layer, and
on a CPU pixel by pixel. On a GPU last bits of bf16 may differ: the engine's blocks are compiled with rewrites of its
own, and in an app that was idle text encoders and VAE are compiled too (engine/compiler/ends.py), which are eager in
the program. Knows the request and the recipes, no device: a program for a precision that was emulated is the native
one, and says so."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from engine import catalog
from engine.catalog import Lora, ModelSpec
from engine.columns import Column
from engine.formats import FORMATS, FP8, INT8, MXFP8, NVFP4, REFERENCE
from engine.quantization import attention, recipes
from engine.quantization.recipe_files import Tuning, in_words
from engine.request import CompareRequest
from engine.weights.checkpoint import parts

_IMPORTS = {
    FP8.id: (
        "from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_",
        "from torchao.quantization.quantize_.common import KernelPreference",
    ),
    MXFP8.id: (
        "from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig",
        "from torchao.quantization import quantize_",
        "from torchao.quantization.quantize_.common import KernelPreference",
    ),
    NVFP4.id: (
        "from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig",
        "from torchao.quantization import quantize_",
    ),
}
_CONFIGS = {
    FP8.id: """Float8DynamicActivationFloat8WeightConfig(
    granularity=PerRow(),
    activation_value_lb=1e-12,  # a row of zeros would become NaN
    kernel_preference=KernelPreference.TORCH,
    set_inductor_config=False,  # its settings would hold for the whole process
)""",
    MXFP8.id: """MXDynamicActivationMXWeightConfig(
    activation_dtype=torch.float8_e4m3fn,
    weight_dtype=torch.float8_e4m3fn,
    kernel_preference=KernelPreference.AUTO,
)""",
    NVFP4.id: """NVFP4DynamicActivationNVFP4WeightConfig(
    use_dynamic_per_tensor_scale=True,
    use_triton_kernel=True,  # needs mslk-cuda; False without it
)""",
}
"""As engine/quantization/capability.py configures them where they are native."""
_INT8 = """def rows(x):
    # Codes from -127 to 127 and a scale for each row; a row of zeros stays zero.
    scale = (x.abs().amax(-1, keepdim=True).float() * (1 / 127)).clamp(min=2.0**-120)
    return (x.float() * scale.reciprocal()).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(torch.nn.Linear):
    def forward(self, x):
        codes, scale = rows(x.reshape(-1, x.shape[-1]))
        count = codes.shape[0]
        codes = torch.nn.functional.pad(codes, (0, 0, 0, max(0, 17 - count)))  # a GPU's product takes 17 rows or more
        result = torch._int_mm(codes, self.weight.t())[:count].float() * scale * self.weight_scale.t()
        if self.bias is not None:
            result = result + self.bias
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)


def quantize_int8(module):
    codes, scale = rows(module.weight)
    module.__class__ = Int8Linear
    module.weight = torch.nn.Parameter(codes, requires_grad=False)
    module.register_buffer("weight_scale", scale)"""
"""What engine/quantization/int8.py does; torchao's INT8 is another arithmetic."""
FLAT = ("AutoencoderKL", "AutoencoderKLFlux2")
"""VAEs of two-dimensional convolutions, which a CPU decodes in channels_last as engine/weights/loading.py has it."""
CONTIGUOUS = """pipe.transformer.register_forward_pre_hook(  # the latents are a view that torchao's quantizers refuse
    lambda module, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"].contiguous()}),
    with_kwargs=True,
)
"""


def code(request: CompareRequest, column: str, execution: str) -> str:
    """A Python program that makes the request's pictures or clips as one column and writes them where it is run.

    Args:
        column: one of the request's, as it writes it.
        execution: how the comparison ran it, "native" or "emulated".

    Raises:
        RequestError: the model has no such recipe.
    """
    asked = request.column(column)
    spec = asked.weights(catalog.model(request.model))
    precision, recipe = asked.format, recipes.recipe(spec.family, asked.rules or request.recipe)
    blocks = [_head(spec, asked, execution, recipe), _load(spec, recipe)]
    if precision != REFERENCE and recipe.held is None:
        blocks += [chooser(recipe, precision), _quantize(precision, _others(recipe, precision))]
    steps = recipe.weight_only_steps(precision)
    blocks += [f"\n{attention.source()}\n\n\nuse_in(pipe.transformer)"] if asked.fp8_attention else []
    blocks += [_prepare(spec, asked), *([switch(steps, request.num_inference_steps)] if any(steps) else [])]
    return "\n\n".join([*blocks, _call(spec, request, any(steps)), _save(spec, request, column)]) + "\n"


def chooser(recipe: recipes.Recipe, precision: str) -> str:
    """The source of `quantized(module, name)`, torchao's `filter_fn`: which layers a recipe takes for a format.

    Where a recipe file mixes formats, also `OTHERWISE`, name -> precision, which goes before the rules.
    """
    stored, names, rules = FORMATS[precision], "", []
    shape = f"module.in_features % {stored.multiple_in} == 0 and module.out_features % {stored.multiple_out} == 0"
    if recipe.min_features:
        rules.append(f"min(module.in_features, module.out_features) >= {recipe.min_features}")
    if recipe.skip_containing:
        names += _tuple("KEPT", "a layer whose name contains one of these stays bf16", recipe.skip_containing)
        rules.append("not any(part in name for part in KEPT)")
    if recipe.skip_exact:
        rules.append(f"name not in {recipe.skip_exact!r}")
    if recipe.min_rows:
        names += _tuple("ROWS", "of a product, by the layer's name: the first that matches decides", recipe.rows)
        rules.append(f"next((n for part, n in ROWS if part in name), {recipe.min_rows}) >= {recipe.min_rows}")
    tuning = recipe.tunings.get(precision, Tuning())
    if tuning.layers:
        pairs = (f"    {name!r}: {kept!r}," for name, kept in tuning.layers.items())
        names += "\n".join(["OTHERWISE = {  # these go before the rules", *pairs, "}", ""])
        rules = [f"(name in OTHERWISE or {rule})" for rule in rules]
        rules.append(f"OTHERWISE.get(name, {precision!r}) == {precision!r}")
    tests = "\n        and ".join(["isinstance(module, torch.nn.Linear)", shape, *rules])
    return f"{names}\n\ndef quantized(module, name):\n    # {recipe.summary}\n    return (\n        {tests}\n    )\n"


def _others(recipe: recipes.Recipe, precision: str) -> list[str]:
    """The further precisions in which a recipe file stores layers."""
    tuning = recipe.tunings.get(precision, Tuning())
    return sorted({*tuning.layers.values()} - {precision, REFERENCE})


def _tuple(name: str, comment: str, values: tuple[Any, ...]) -> str:
    return "\n".join([f"{name} = (  # {comment}", *(f"    {value!r}," for value in values), ")", ""])


def _head(spec: ModelSpec, column: Column, execution: str, recipe: recipes.Recipe) -> str:
    precision = column.format
    own = dict.fromkeys(line for name in (precision, *_others(recipe, precision)) for line in _IMPORTS.get(name, ()))
    needs = ["torch", "diffusers", "transformers", *(["torchao"] if own or recipe.held else [])]
    needs += ["peft"] if spec.loras else []
    own = {} if recipe.held else own
    said = [f"# {spec.name} in {column.written(spec.recipes[0])}, as Twinframe runs it. Needs {', '.join(needs)}."]
    if column.fp8_attention:
        said += ["# Its FP8 attention is emulated, as Twinframe's is, which takes longer than bf16's."]
        said += [f"# Its layers need {FORMATS[precision].hardware}."] if FORMATS[precision].hardware else []
        own |= dict.fromkeys(attention.IMPORTS)
    elif execution != "native" and FORMATS[precision].hardware:
        said += [
            f"# Needs {FORMATS[precision].hardware}. This comparison ran on a machine without",
            "# that, so its result comes from an emulation of the same arithmetic.",
        ]
    tuning = recipe.tunings.get(precision, Tuning())
    remedied = (
        tuning.searched,
        tuning.low_rank,
        tuning.calibrated,
        tuning.rotation,
        tuning.four_over_six,
        tuning.weights_alone,
    )
    if recipe.held is not None:
        said += [f"# {line}" for line in beyond_diffusers(set(recipe.held.layers.values()), tuning)]
    elif any(remedied):
        said += [
            "# Twinframe also searches block scales of NVFP4 weights, calibrates weights, rotates inputs and adds",
            "# low-rank branches where its recipe says so, which this program does not: it is further from bf16.",
        ]
    if any(recipe.weight_only_steps(precision)):
        own["from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor"] = None
    video = ("from diffusers.utils import encode_video",) if spec.modality == "video" else ()
    classes = f"{_denoiser(spec)}, {spec.pipeline}" if recipe.held else spec.pipeline
    return "\n".join([*said, "import torch", f"from diffusers import {classes}", *video, *own])


def beyond_diffusers(formats: Collection[str], tuning: Tuning) -> list[str]:
    """What plain diffusers does not do with a stored checkpoint that the engine does, in sentences, of which it is the
    subject; weight-only steps can be added to it (`switch`)."""
    said = []
    if INT8.id in formats:
        said += [
            "It quantizes INT8 activations by torchao's arithmetic, not by Twinframe's, so its picture is another."
        ]
    if tuning.rotation:
        said += ["It does not rotate the inputs of the rotated weights, so it makes noise of them: use Twinframe."]
    if tuning.four_over_six:
        said += ["It gives each block of activations one scale, without four over six, so its picture is another."]
    if tuning.weights_alone:
        said += ["It quantizes the activations of layers that Twinframe leaves in bf16, so its picture is another."]
    if tuning.low_rank:
        said += ["It does not know the low-rank branches beside the weights, so its picture is further from bf16."]
    return said


def _denoiser(spec: ModelSpec) -> str:
    return parts(spec.folder)["transformer"][1]


def types(spec: ModelSpec) -> str:
    """The argument of `from_pretrained` that says in which type a model runs."""
    chosen = '{"default": torch.bfloat16, "vae": torch.float32}' if spec.vae_fp32 else "torch.bfloat16"
    return f"torch_dtype={chosen}"


def _load(spec: ModelSpec, recipe: recipes.Recipe) -> str:
    typed = types(spec)
    if spec.place is not None:
        source, where = f'"{spec.place.name}"', "  # the checkpoint's folder, beside this program"
        options = f"{typed}, local_files_only=True"
    elif spec.bundled:
        source = f'"assets/{spec.source}"'
        where = "  # in a copy of Twinframe's repository"
        options = f"{typed}, local_files_only=True"
    else:
        source, where = f'"{spec.source}"', ""
        options = f'revision="{spec.revision}", {typed}'
    lines = [
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"model = {source}{where}",
    ]
    if recipe.held is not None:
        held = recipe.held
        lines += [
            f"transformer = {_denoiser(spec)}.from_pretrained(",
            *(
                [f'    "{held.repository}",', f'    revision="{held.revision}",']
                if held.repository
                else [f'    "{held.name}",  # the quantized checkpoint\'s folder']
            ),
            *(['    subfolder="transformer",'] if recipe.held.folder.name == "transformer" else []),
            "    torch_dtype=torch.bfloat16,",
            ")",
        ]
        options = f"transformer=transformer, {options}"
    lines += [
        f"pipe = {spec.pipeline}.from_pretrained(",
        f"    model, {options}",
        ").to(device)",
    ]
    if spec.loras and recipe.held is None:
        lines += [_fused(lora) for lora in spec.loras]
        names, scales = ([getattr(lora, of) for lora in spec.loras] for of in ("name", "scale"))
        lines += [f"pipe.set_adapters({names!r}, {scales!r})", "pipe.fuse_lora()", "pipe.unload_lora_weights()"]
    if json.loads((spec.folder / "model_index.json").read_text())["vae"][1] in FLAT:
        lines += ['if device == "cpu":', "    pipe.vae.to(memory_format=torch.channels_last)"]
    if spec.vae_tiling:
        lines.append("pipe.vae.enable_tiling()")
    return "\n".join(lines)


def _fused(lora: Lora) -> str:
    source, note = (lora.repository, "") if lora.repository else (".", "  # the LoRA's file, in this folder")
    revision = f', revision="{lora.revision}"' if lora.revision else ""
    named = f'"{source}", weight_name="{lora.path}", adapter_name="{lora.name}"{revision}'
    return f"pipe.load_lora_weights(\n    {named}{note}\n)"


def _quantize(precision: str, others: list[str]) -> str:
    parts = [_INT8, "\n"] if INT8.id in (precision, *others) else []
    for name in (precision, *others):
        of = "" if name == precision else f"_{name}"
        chosen = f"OTHERWISE.get(name) == {name!r}"
        if name == INT8.id:
            test = "quantized(module, name)" if name == precision else chosen
            parts.append(
                f"for name, module in pipe.transformer.named_modules():\n    if {test}:\n        quantize_int8(module)"
            )
            continue
        test = "quantized" if name == precision else f"lambda module, name: {chosen}"
        parts.append(f"config{of} = {_CONFIGS[name]}\nquantize_(pipe.transformer, config{of}, filter_fn={test})")
    return "\n".join(parts)


def _prepare(spec: ModelSpec, column: Column) -> str:
    dynamic = False if spec.text_padded else None
    # Its guidance has a block leave its attention out where a tensor says so, at which a graph ends.
    whole = not spec.call.get("spatio_temporal_guidance_blocks")
    kernel = 'pipe.transformer.set_attention_backend("native")'
    contiguous = CONTIGUOUS if spec.modality == "video" else ""
    if column.fp8_attention:
        return f"{kernel}\n{contiguous}".rstrip()
    return (
        f"{kernel}\n{contiguous}"
        'if device == "cuda":  # Twinframe also records CUDA graphs for single pictures, which changes their speed\n'
        f"    pipe.transformer.compile_repeated_blocks(fullgraph={whole}, dynamic={dynamic})"
    )


def switch(weight_only: tuple[int, int], total: int) -> str:
    """The source of what engine/quantization/remedies.py's `WeightOnlySteps` does."""
    first, last = weight_only
    return f"""linears = [module for module in pipe.transformer.modules() if isinstance(module, torch.nn.Linear)]
weights = [linear.weight for linear in linears if isinstance(linear.weight, NVFP4Tensor)]
quantizers = [weight.act_quant_kwargs for weight in weights]


def before(step):
    # Activations stay bf16 in {in_words(weight_only)}, for which NVFP4 weights are unpacked.
    plain = step < {first} or step >= {total - last}
    for weight, quantizer in zip(weights, quantizers):
        weight.act_quant_kwargs = None if plain else quantizer


def ended(pipe, index, timestep, kwargs):
    before(index + 1)
    return {{}}


before(0)"""


def _call(spec: ModelSpec, request: CompareRequest, switched: bool) -> str:
    further = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        **spec.call,
        **spec.clip(request.num_frames),
        spec.guidance_argument: request.guidance_scale,
        spec.batch_argument: request.batch_size,
    }
    arguments = [
        f"prompt={request.prompt!r}",
        *(f"{name}={value!r}" for name, value in further.items()),
        f'generator=[torch.Generator("cpu").manual_seed((seed + i) % 2**32) for i in range({request.batch_size})]',
        *(["callback_on_step_end=ended"] if switched else []),
        *(['output_type="np"'] if spec.modality == "video" else []),
    ]
    return "\n".join([f"seed = {request.seed}", "output = pipe(", *(f"    {a}," for a in arguments), ")"])


def _save(spec: ModelSpec, request: CompareRequest, column: str) -> str:
    kind = "png" if spec.modality == "image" else "mp4"
    name = f'"{column}.{kind}"' if request.batch_size == 1 else f'f"{column}-{{i + 1}}.{kind}"'
    if spec.modality == "image":
        return f"for i, picture in enumerate(output.images):\n    picture.save({name})"
    sound = [
        "        audio=output.audio[i].float().cpu(),",
        "        audio_sample_rate=pipe.vocoder.config.output_sampling_rate,",
    ]
    return "\n".join(
        [
            "for i, frames in enumerate(output.frames):",
            "    encode_video(",
            "        frames,",
            f"        fps={spec.defaults.frame_rate:g},",
            *(sound if spec.sound else []),
            f"        output_path={name},",
            "    )",
        ]
    )
