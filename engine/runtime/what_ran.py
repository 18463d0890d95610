"""What really ran, in words: device, weights, recipe, kernels, compile, noise, timing and memory of one call.

Says what it is given, and finds out only which kinds of weights a denoiser holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from engine.catalog import ModelSpec
from engine.compiler import compilation
from engine.machine import Machine
from engine.quantization import attention, recipe_files, recipes
from engine.request import CompareRequest
from engine.results import DENOISER, TEXT
from engine.runtime.pipeline import read
from engine.runtime.residents import Rendition, in_words

ATTENTION = "native"
"""diffusers' name for PyTorch's scaled_dot_product_attention, which picks a fused kernel."""


def described(
    rendition: Rendition,
    spec: ModelSpec,
    request: CompareRequest,
    *,
    machine: Machine,
    weights: str,
    residency: str,
    streamed: Sequence[str],
    ends: Sequence[str],
    warm: compilation.WarmUp,
    done: compilation.Done,
    not_numbers: int,
) -> dict[str, str]:
    """Label -> words, as the results keep it and every view of them shows it.

    Args:
        weights: where they come from, in words.
        residency: where what the rendition needs is, in words.
        streamed: what of it comes from host memory a block at a time, in words.
        ends: text encoders and VAE whose blocks ran compiled, by their names in the pipeline.
        warm: what the first run of the shape took.
        done: what the timed call compiled, recorded and replayed.
        not_numbers: values of what was made that are none.
    """
    support, layers = rendition.support, rendition.layers
    recipe = recipes.recipe(spec.family, rendition.column.rules or request.recipe)
    linears = layers.quantized + layers.skipped + layers.left
    mode = rendition.blocks.mode
    steps = rendition.warm_up_steps(mode)
    warm_up = f"{steps} warm-up steps" if steps > 1 else "a warm-up step"
    if mode == compilation.EAGER:
        without = machine.no_compile
        compiled = f"off, for every precision: {without}" if without else "off (eager), for every precision"
        if machine.kind == "cuda" and rendition.column.fp8_attention and not without:
            compiled = "off (eager), as its attention is emulated"
    else:
        unrecorded = f", no CUDA graph ({support.no_graph})" if support.no_graph else ""
        compiled = (
            f"repeated blocks, fullgraph{unrecorded}, settings of engine/compiler/fusion.py; {warm.graphs} graphs "
            f"compiled in a first call of {warm.seconds:.1f} s, {done.compiled} in the timed one"
        )
        if mode == compilation.GRAPHS:
            compiled += f"; {done.replayed} of its steps replayed from a CUDA graph, {done.recorded} recorded"
            compiled += ", the text's keys and values computed once" if rendition.blocks.text_once else ""
    if DENOISER in streamed:
        timed = "not timed: the denoiser was streamed from host memory, whose bus sets the pace"
    elif request.previews:
        timed = "not timed: previews were drawn between the steps"
    elif done.delayed:
        timed = "not timed: something was compiled or recorded in the call; make it again"
    else:
        timed = f"one pipeline call between device synchronisations, after {warm_up} of the same shape"
        timed += "; encoding the prompt includes streaming the text encoders" if TEXT in streamed else ""
    if machine.shared:
        timed += "; a shared card, not to quote"
    spoilt = f"{not_numbers} values are not numbers and are shown as 0: do not trust this output, it has no score"
    return (
        {
            "Device": machine.label,
            "Weights": weights,
            "Execution": f"{support.execution}: {support.reason}",
            "Linear layers": (
                f"{layers.quantized} of {linears} quantized, {layers.skipped} skipped by the recipe, "
                f"{layers.left} left in bf16 for their shape"
            ),
            "Prompt": read(rendition.pipeline, spec, request.prompt),
            "Recipe": f"{recipe.id}: {recipe.summary}",
            "GEMM": f"{support.gemm}; weights of Linear layers: {_weights(rendition.pipeline.transformer)}",
            "Attention": (
                attention.WORDS
                if rendition.column.fp8_attention
                else f"PyTorch scaled_dot_product_attention in bf16 (diffusers backend {ATTENTION!r})"
            ),
            "Compile": compiled,
            "Text encoders and VAE": "bf16, shared by all precisions"
            + (f"; compiled: {in_words(ends)}" if ends else ""),
            "Residency": residency,
            "Scheduler": f"{type(rendition.pipeline.scheduler).__name__}, {request.num_inference_steps} steps",
            "Noise": f"CPU generator, seed {request.seed}, the same for every precision",
            "Timing": timed,
            "Memory": (
                "weights as stored, plus the peak that the warm-up, with decoding, allocates"
                + (" through PyTorch's CPU allocator" if machine.kind == "cpu" else " on the device")
                + _held(warm)
            ),
        }
        | ({"Damage": spoilt} if not_numbers else {})
        | _activations(rendition)
    )


def _held(warm: compilation.WarmUp) -> str:
    if warm.most is None:
        return ""
    return f" besides weights that come and go; with those, {warm.most / 1e9:.2f} GB were allocated there at most"


def paths(mode: str) -> str:
    """The two paths of the noise floor where bf16 runs in this mode."""
    return "fused against unfused attention" if mode == compilation.EAGER else "compiled against eager blocks"


def ruler(prompts: int, mode: str, seed: int) -> str:
    """How a ruler was measured."""
    return (
        f"Mean LPIPS over {prompts} prompt{'s' * (prompts > 1)} in bf16 on this device. Floor: {paths(mode)}, same "
        f"noise. Ceiling: seed {seed} against seed {seed + 1}."
    )


def _weights(denoiser: nn.Module) -> str:
    """Kinds of the weights that the Linear layers hold, on which their products depend, and how many of each."""
    kinds = Counter(_kind(layer.weight.data) for layer in denoiser.modules() if isinstance(layer, nn.Linear))
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _kind(weight: Tensor) -> str:
    if type(weight) is Tensor:
        return str(weight.dtype).removeprefix("torch.")
    chosen = getattr(weight, "kernel_preference", None)
    return type(weight).__name__ + (f" (kernel preference {chosen.value})" if chosen else "")


def _activations(rendition: Rendition) -> dict[str, str]:
    steps = recipe_files.in_words(rendition.weight_only_steps)
    return (
        {"Activations": f"bf16 in {steps}, where NVFP4 weights are unpacked; quantized in all others"} if steps else {}
    )
