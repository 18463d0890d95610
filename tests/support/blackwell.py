"""A Blackwell GPU that is not there: every kind's transformer on a fake cuda:0, quantized as a B200 would have it.

Fake tensors (`FakeTensorMode`) have a shape, a type, strides and a device, but no values, and every operator checks
what it is given. Knows nothing of what is to be proven: tests/engine/quantization/test_blackwell_*.py do that.
"""

# ruff: noqa: E402 (what is not for every system is looked for first)
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="Triton, which compiles the NVFP4 quantizer, is for Linux only")
fp4_quantize = pytest.importorskip("mslk.quantize.triton.fp4_quantize", reason="mslk-cuda is for Linux on x86-64 only")

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import async_compile, compile_fx, config, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchao.prototype.mx_formats import kernels, mx_tensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.utils import TorchAOBaseTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine import catalog
from engine.compiler import fusion
from engine.errors import CancelledRun
from engine.machine import Machine, Support
from engine.quantization import capability, recipes
from engine.quantization.capability import support
from engine.request import CompareRequest
from engine.runtime.pipeline import Progress, call
from engine.weights import checkpoint, loading

B200 = Machine(name="NVIDIA B200", kind="cuda", capability=(10, 0), mslk=True)

aten = torch.ops.aten
SCALED_MM = aten._scaled_mm.default
QUANTIZE_NVFP4 = torch.ops.ao.mslk_quantize_nvfp4.default
INT8_MM = torch.ops.twinframe.int8_multiply.default
PLAIN_MM = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default, aten.matmul.default})


@dataclass(frozen=True, kw_only=True)
class System:
    """What a model's transformer is given in one denoising step at its default settings, and what it must hold."""

    inputs: Callable[[int], dict]
    """From the batch size."""
    outputs: Callable[[int], list[tuple[int, ...]]]


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda:0")


def _flux(batch: int) -> dict:
    """1024 x 1024: 64 x 64 tokens of the picture, 512 of the text."""
    return {
        "hidden_states": bf16(batch, 4096, 64),
        "encoder_hidden_states": bf16(batch, 512, 4096),
        "pooled_projections": bf16(batch, 768),
        "timestep": bf16(batch),
        "guidance": torch.empty(batch, device="cuda:0"),
        "img_ids": bf16(4096, 3),
        "txt_ids": bf16(512, 3),
    }


def _qwen(batch: int) -> dict:
    """1024 x 1024: 64 x 64 tokens of the picture; the text's depend on the prompt and meet no quantized layer.

    Guidance runs the two prompts one after the other.
    """
    return {
        "hidden_states": bf16(batch, 4096, 64),
        "encoder_hidden_states": bf16(batch, 20, 3584),
        "timestep": bf16(batch),
        "img_shapes": [[(1, 64, 64)]] * batch,
    }


def _ltx(batch: int) -> dict:
    """768 x 512, 121 frames at 24 a second: 16 x 16 x 24 tokens of the clip, 126 of its sound, 1024 of the text.

    Guidance runs both prompts at once, so everything is there twice.
    """
    both = 2 * batch
    return {
        "hidden_states": bf16(both, 6144, 128),
        "audio_hidden_states": bf16(both, 126, 128),
        "encoder_hidden_states": bf16(both, 1024, 3840),
        "audio_encoder_hidden_states": bf16(both, 1024, 3840),
        "encoder_attention_mask": bf16(both, 1024),
        "audio_encoder_attention_mask": bf16(both, 1024),
        "timestep": torch.empty(both, device="cuda:0"),
        "sigma": torch.empty(both, device="cuda:0"),
        "num_frames": 16,
        "height": 16,
        "width": 24,
        "fps": 24.0,
        "audio_num_frames": 126,
        "use_cross_timestep": False,
    }


def _ltx23(batch: int) -> dict:
    """LTX-2's clip; the connectors hand over the text as wide as each stream. This is the pass for both prompts."""
    both = 2 * batch
    return _ltx(batch) | {
        "encoder_hidden_states": bf16(both, 1024, 4096),
        "audio_encoder_hidden_states": bf16(both, 1024, 2048),
        "use_cross_timestep": True,
    }


def _flux2(batch: int, text: int) -> dict:
    """1024 x 1024: 64 x 64 tokens of the picture, 512 of the text, four coordinates each."""
    return {
        "hidden_states": bf16(batch, 4096, 128),
        "encoder_hidden_states": bf16(batch, 512, text),
        "timestep": bf16(batch),
        "img_ids": torch.empty(batch, 4096, 4, dtype=torch.int64, device="cuda:0"),
        "txt_ids": torch.empty(batch, 512, 4, dtype=torch.int64, device="cuda:0"),
    }


def _klein(batch: int) -> dict:
    return _flux2(batch, 7680) | {"guidance": None}


def _flux2_dev(batch: int) -> dict:
    return _flux2(batch, 15360) | {"guidance": torch.empty(batch, device="cuda:0")}


def _z_image(batch: int) -> dict:
    """1024 x 1024: latents of 128 x 128 and text in lists, a tensor a picture.

    The text is as long as the longest prompt, less what is filled up to a multiple of 32.
    """
    return {
        "x": [bf16(16, 1, 128, 128) for _ in range(batch)],
        "t": torch.empty(batch, device="cuda:0"),
        "cap_feats": [bf16(500, 2560) for _ in range(batch)],
    }


def _wan(batch: int) -> dict:
    """1280 x 704, 121 frames: latents of 31 x 44 x 80, a timestep for each of their 31 x 22 x 40 tokens, 512 of text.

    Guidance runs the two prompts one after the other.
    """
    return {
        "hidden_states": bf16(batch, 48, 31, 44, 80),
        "timestep": torch.empty(batch, 31 * 22 * 40, device="cuda:0"),
        "encoder_hidden_states": bf16(batch, 512, 4096),
    }


SYSTEMS = {
    "flux.1-dev": System(
        inputs=_flux,
        outputs=lambda batch: [(batch, 4096, 64)],
    ),
    "qwen-image": System(inputs=_qwen, outputs=lambda batch: [(batch, 4096, 64)]),
    "ltx-2": System(
        inputs=_ltx,
        outputs=lambda batch: [(2 * batch, 6144, 128), (2 * batch, 126, 128)],
    ),
    "flux.2-klein-4b": System(inputs=_klein, outputs=lambda batch: [(batch, 4096, 128)]),
    "flux.2-dev": System(inputs=_flux2_dev, outputs=lambda batch: [(batch, 4096, 128)]),
    "z-image-turbo": System(inputs=_z_image, outputs=lambda batch: [(16, 1, 128, 128)] * batch),
    "ltx-2.3": System(inputs=_ltx23, outputs=lambda batch: [(2 * batch, 6144, 128), (2 * batch, 126, 128)]),
    "wan-2.2-5b": System(inputs=_wan, outputs=lambda batch: [(batch, 48, 31, 44, 80)]),
}

NATIVE = ("mxfp8", "nvfp4")
"""The formats that a B200 has and a Hopper has not."""
BATCHES = (1, 4, 8)
PUBLISHED = ("flux.1-dev", "qwen-image", "ltx-2")
"""Those of the post."""
PAIRS = list(product(PUBLISHED, NATIVE))
OTHERS = list(product([model for model in SYSTEMS if model not in PUBLISHED], NATIVE))

MINIATURES = ("mini-flux", "mini-qwen", "mini-ltx2")
"""The bundled models, which are given what their own pipelines give them (`one_step`)."""


@cache
def one_step(model: str, batch: int, guidance: float) -> tuple[dict, ...]:
    """What a bundled pipeline, run on the CPU, gives its transformer in the first step, for each call of it."""
    given: list[dict] = []

    def forward(**inputs: object) -> tuple[torch.Tensor, ...]:
        given.append(tree_map_only(torch.Tensor, _outline, inputs))
        return tuple(torch.zeros_like(inputs[name]) for name in STREAMS if name in inputs)

    with unset_fake_temporarily(), torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        spec, pipeline = catalog.model(model), _pipeline(model)
        patch.setattr(pipeline.transformer, "forward", forward)
        request = CompareRequest.create(spec.examples[0], model=model, batch_size=batch, guidance_scale=guidance)
        # Stopped at the end of that step: decoding a clip on a CPU would take minutes.
        with contextlib.suppress(CancelledRun):
            call(pipeline, spec, request, request.seed, Progress("bf16", lambda _: None, lambda: bool(given)))
        return tuple(given)


STREAMS = ("hidden_states", "audio_hidden_states")
"""What the bundled transformers take and give back, alike in shape."""


@cache
def _pipeline(model: str) -> DiffusionPipeline:
    return loading.load_pipeline(catalog.model(model), torch.device("cpu"))


@dataclass(frozen=True)
class Outline:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _outline(tensor: torch.Tensor) -> Outline:
    return Outline(tuple(tensor.shape), tensor.dtype)


def on_card(given: dict) -> dict:
    """Arguments as of `one_step`, on the fake device."""
    return tree_map_only(Outline, lambda o: torch.empty(o.shape, dtype=o.dtype, device="cuda:0"), given)


DEQUANTIZE = NVFP4Tensor.dequantize
"""torchao's own, for where it is meant to run."""


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a quantized tensor was dequantized")


@contextmanager
def blackwell() -> Iterator[None]:
    """torchao's checks answer as on a B200, and nothing can leave the native path by way of `dequantize`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("torchao") and "is_sm_at_least_100" in vars(module):
                patch.setattr(module, "is_sm_at_least_100", lambda: True)
        # torchao 0.18 imports triton only where there is a GPU, but its fake quantizer names it everywhere.
        patch.setattr(kernels, "triton", triton, raising=False)
        patch.setattr(MXTensor, "dequantize", _refuse)
        patch.setattr(NVFP4Tensor, "dequantize", _refuse)
        patch.setattr(NVFP4Tensor, "__repr__", object.__repr__)  # its own dequantizes; AOTAutograd logs it
        for owner in (capability, recipes):
            patch.setattr(owner, "Tensor", FakeTensor)  # how an ordinary weight looks in here
        yield


@cache
def _empty(model: str) -> nn.Module:
    with unset_fake_temporarily():
        return loading.empty_transformer(catalog.KINDS[model])


def quantized(
    model: str, precision: str, blocks: int | None = None, recipe: recipes.Recipe | None = None
) -> tuple[nn.Module, recipes.Plan]:
    """The transformer as a recipe of the engine leaves it, and the plan.

    Args:
        blocks: of each repeated class; None for all, of which alike layers share a weight.
        recipe: None for the post's.
    """
    empty = _empty(model)
    depths = {"num_layers", "num_single_layers", "n_layers", "n_refiner_layers"} & empty.config.keys()
    depth = dict.fromkeys(depths, blocks) if blocks else {}
    torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast afterwards
    try:
        with torch.device("cuda:0"):
            transformer = type(empty).from_config({**empty.config, **depth}).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in list(transformer.named_parameters()):
        if checkpoint.in_fp32(type(empty), name):
            module, _, own = name.rpartition(".")
            setattr(transformer.get_submodule(module), own, nn.Parameter(parameter.float()))
    transformer.requires_grad_(False)
    plan = recipes.plan(transformer, recipe or recipes.recipe(catalog.KINDS[model].family, "post"), precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx_tensor, "to_mx", _to_mx_once_a_kind)
        if not blocks:
            patch.setattr(recipes, "_quantize", _quantize_once_a_kind())
        recipes.apply(transformer, plan, support(precision, B200))
    return transformer, plan


_MADE: dict[tuple, tuple[torch.Tensor, ...]] = {}
_to_mx = mx_tensor.to_mx


def _to_mx_once_a_kind(data: torch.Tensor, *how: object) -> tuple[torch.Tensor, ...]:
    """torchao's quantizer of MXFP8, a hundred operations, for the first tensor of each shape and layout; for others,
    which have no values either, what is laid out like its results."""
    kind = (data.shape, data.stride(), data.dtype, *how)
    if kind not in _MADE:
        _MADE[kind] = _to_mx(data, *how)
    return tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=data.device) for t in _MADE[kind])


def _quantize_once_a_kind() -> Callable[[recipes.LayerPlan, nn.Linear, Support, Sequence[Path]], None]:
    """Quantizes one layer of each kind, and makes all others of it like that one: nothing here has values."""
    plain, first = recipes._quantize, {}

    def quantize(layer: recipes.LayerPlan, module: nn.Linear, support: Support, files: Sequence[Path]) -> None:
        kind = (replace(layer, name="", reason=""), module.bias is None)
        if kind not in first:
            plain(layer, module, support, files)
            first[kind] = module
        else:
            module.__class__ = type(first[kind])
            own = {name: copy(value) if isinstance(value, dict) else value for name, value in vars(first[kind]).items()}
            vars(module).update(own)

    return quantize


@dataclass(frozen=True)
class Product:
    """One block-scaled matrix product, (m, k) activations by (k, n) weights, and how many scales came with each."""

    m: int
    k: int
    n: int
    operands: torch.dtype
    scales: torch.dtype
    scales_a: int
    scales_b: int


class Recorder(TorchDispatchMode):
    """Notes what multiplies matrices in which Linear layer, below the quantized tensors that hide it."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        layers = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        self.operators: dict[str, list] = {name: [] for name in layers}
        self.outside: list = []
        self.products: dict[str, Product] = {}
        self._layer = None
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            layer.register_forward_hook(lambda *_: self._enter(None))

    def _enter(self, name: str | None) -> None:
        self._layer = name

    def __torch_dispatch__(self, operator: object, types: tuple, args: tuple = (), kwargs: dict | None = None):
        if any(issubclass(kind, TorchAOBaseTensor) for kind in types):
            return NotImplemented  # let the tensor take it apart, and look at the parts
        if operator in PLAIN_MM or operator in (SCALED_MM, QUANTIZE_NVFP4, INT8_MM):
            (self.operators[self._layer] if self._layer else self.outside).append(operator)
        if operator is SCALED_MM:
            a, b, scale_a, scale_b = args[:4]
            packed = 2 if a.dtype == torch.float4_e2m1fn_x2 else 1
            self.products[self._layer] = Product(
                len(a), packed * a.shape[1], b.shape[1], a.dtype, scale_a.dtype, scale_a.numel(), scale_b.numel()
            )
        return operator(*args, **(kwargs or {}))


class Everything(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self):
        super().__init__()
        self.operators: list = []

    def __torch_dispatch__(self, operator: object, types: tuple, args: tuple = (), kwargs: dict | None = None):
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


def step(transformer: nn.Module, inputs: dict) -> tuple[list[tuple[int, ...]], Recorder]:
    """One call of the denoiser: the shapes of its outputs, and what was recorded."""
    recorder = Recorder(transformer)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), recorder:
        patch.setattr(mx_tensor, "to_mx", _to_mx_once_a_kind)
        outputs = transformer(**inputs | {"return_dict": False})
    return shapes(outputs), recorder


def shapes(outputs: object) -> list[tuple[int, ...]]:
    """Of every tensor in what a denoiser returns."""
    return [tuple(output.shape) for output in tree_leaves(outputs)]


def products(model: str, precision: str, *batches: int) -> dict[int, set[Product]]:
    """Every distinct matrix product of a model's step at each batch size, from one block of each class."""
    found = {}
    with FakeTensorMode():
        transformer, _ = quantized(model, precision, blocks=1)
        for batch in batches:
            made, recorder = step(transformer, SYSTEMS[model].inputs(batch))
            assert made == SYSTEMS[model].outputs(batch)
            found[batch] = set(recorder.products.values())
    return found


def is_taken(p: Product) -> bool:
    """Whether the kernel takes this product; FP8's scales are one a row.

    Rules of PyTorch's `_scaled_mm_out_cuda`, torchao's `to_mx` and `to_blocked`, mslk's `triton_quantize_nvfp4`. None
    limits the number of rows: one row of modulation is as good as 98,304 of a clip.
    """
    stored = p.k // 2 if p.operands == torch.float4_e2m1fn_x2 else p.k  # two FP4 numbers a byte
    if stored % 16 or p.n % 16:
        return False
    if p.scales == torch.float32:
        return (p.scales_a, p.scales_b) == (p.m, p.n)
    block = 16 if p.operands == torch.float4_e2m1fn_x2 else 32
    # Scales come in tiles of 128 rows by 4 blocks, the rest of the last ones zero.
    per_128_rows = -(-p.k // (4 * block)) * 512
    scales = (-(-p.m // 128) * per_128_rows, -(-p.n // 128) * per_128_rows)
    return p.k % block == 0 and (p.scales_a, p.scales_b) == scales


def inductor_kernels(graph: torch.fx.GraphModule, folder: Path) -> dict[str, str]:
    """PTX of every Triton kernel that Inductor makes of a graph for a B200, assembled by ptxas but never loaded.

    Inductor asks the GPU for its properties and loads what it compiles; both are replaced here. Of the configurations
    that a GPU would time against each other, the first is compiled.
    """
    # The published figures of the architecture; they steer tile sizes, not correctness.
    figures = {"multi_processor_count": 148, "regs_per_multiprocessor": 65536, "warp_size": 32}
    figures |= {"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
    properties = SimpleNamespace(name=B200.name, major=10, minor=0, total_memory=180 * 10**9, **figures)
    hints = DeviceProperties(type="cuda", index=0, cc=100, major=10, **figures)
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 100, 32), get_current_device=lambda: 0)
    sources = {}

    def collect(_: object, name: str, source: str, device_str: str = "cuda") -> Callable:
        sources[name] = source
        return lambda *_, **__: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        for owner in (CudaInterface, CudaInterface.Worker, torch.cuda):
            patch.setattr(owner, "get_device_properties", staticmethod(lambda *_: properties))
            patch.setattr(owner, "current_device", staticmethod(lambda: 0))
        patch.setattr(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 100))
        patch.setattr(CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True))
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: B200.capability)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(DeviceProperties, "create", classmethod(lambda *_: hints))
        patch.setattr(scheduler, "has_triton", lambda *_: True)
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
        patch.setattr(async_compile.AsyncCompile, "triton", collect)
        fusion.install()  # compiled as the engine compiles
        settings = {"fx_graph_cache": False, "compile_threads": 1, "use_static_cuda_launcher": False}
        with config.patch(**settings, **fusion.options()), torch.no_grad():
            inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            compile_fx.compile_fx_inner(graph, inputs)
            ptx = {}
            for name, source in sources.items():
                kernel = getattr(PyCodeCache.load(source), name)
                compiled = kernel._precompile_config(kernel.configs[0]).kernel
                assert compiled.asm["cubin"]
                ptx[name] = compiled.asm["ptx"]
            return ptx


def compile_quantizer(constants: dict, capability: int) -> triton.compiler.CompiledKernel:
    """A variant of mslk's NVFP4 quantizer, compiled and assembled for a GPU that need not be here."""
    types = {"x_ptr": "*bf16", "global_scale_ptr": "*fp32", "q_ptr": "*u8", "s_ptr": "*fp8e4nv"}
    kernel = fp4_quantize.triton_quantize_nvfp4_kernel
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))
