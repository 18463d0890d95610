"""What each step towards a faster denoiser gains: FLUX.1-dev in bf16 and FP8, random weights, one step at a time.

python -m assets.figures.speed_steps OUT [--side 512] [--tiny]
python -m assets.figures.speed_steps --table assets/figures/speed-steps.json

OUT is written anew after every measurement. A variant that fails says why and the rest goes on; none begins after
`LIMIT` seconds. With `--side` only the variants of that size are measured, and neither products nor whole calls. Every
variant's output is compared with the uncompiled one of its precision on the same input; how far a compile with the
default mode is from that is the noise floor. `--table` prints a result as Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import catalog
from engine.benchmark import profile
from engine.compiler import compilation, fusion
from engine.environment import versions
from engine.quantization import recipes
from engine.quantization.capability import detect, support
from engine.weights import loading
from engine.weights.source import Source

LIMIT = 300.0
SPEC = catalog.MODELS["flux.1-dev"]
BEGAN = time.monotonic()


class Some(CustomGraphPass):
    """A few of the rewrites, without the longer registers-only reductions."""

    def __init__(self, *names: str):
        self.names = names

    def __call__(self, graph: Graph) -> None:
        for name in self.names:
            getattr(fusion, name)(graph)

    def uuid(self) -> str:
        return "-".join(self.names)


SHARED = Some("share", "flatten_quantized", "share", "keep_quantized")
ROWS = type("Rows", (fusion.Rewrites,), {"__call__": lambda self, graph: SHARED(graph), "uuid": lambda self: "rows"})()
GELU = type(
    "Gelu",
    (fusion.Rewrites,),
    {
        "__call__": lambda self, graph: Some(
            "logistic_gelu", "share", "flatten_quantized", "multiply_and_saturate", "share", "keep_quantized"
        )(graph),
        "uuid": lambda self: "gelu",
    },
)()


@dataclass(frozen=True)
class Variant:
    name: str
    mode: str = compilation.DEFAULT
    options: dict = field(default_factory=dict)
    side: int = 1024
    precisions: tuple[str, ...] = ("fp8", "bf16")


ALL = dict(fusion.options())
PLAIN, POST, BEST = "default-mode compile", "the post's: + a CUDA graph of each block", "+ CUDA graph of the step"
OLD_NAMES = {"seed's compile": PLAIN}
"""In results of before: the post itself replays each block from a CUDA graph, which they had not measured."""
VARIANTS = [
    Variant(PLAIN),
    Variant(POST, compilation.BLOCK_GRAPHS),
    Variant("+ shared quantization", options={"post_grad_custom_pre_pass": SHARED}, precisions=("fp8",)),
    Variant(
        "+ one pass over a row",
        options={"post_grad_custom_pre_pass": ROWS, "split_reductions": False},
        precisions=("fp8",),
    ),
    Variant(
        "+ logistic GELU, multiplied casts", options={"post_grad_custom_pre_pass": GELU, "split_reductions": False}
    ),
    Variant("+ turned pairs (all rewrites)", options=ALL),
    Variant(BEST, compilation.GRAPHS, ALL),
    Variant(PLAIN, side=512),
    Variant(POST, compilation.BLOCK_GRAPHS, side=512),
    Variant("+ turned pairs (all rewrites)", options=ALL, side=512),
    Variant(BEST, compilation.GRAPHS, ALL, side=512),
]

ENDS = [next(v for v in VARIANTS if v.name == name) for name in (PLAIN, BEST)]


class Sweep:
    def __init__(self, out: Path, tiny: bool):
        self.out, self.tiny = out, tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        self.machine = detect(self.device)
        self.result = {
            "device": self.machine.name,
            "versions": versions(),
            "model": SPEC.id + (" (tiny)" if tiny else ""),
            "weights": "random",
            "rows": [],
            "profiles": {},
            "errors": {},
        }
        self.denoisers: dict[str, nn.Module] = {}
        self.truth: dict[tuple, Tensor] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - BEGAN:5.0f}s] {text}", flush=True)

    def write(self) -> None:
        self.result["seconds"] = time.monotonic() - BEGAN
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def guarded(self, name: str, run: Callable[[], object]) -> None:
        if time.monotonic() - BEGAN > LIMIT:
            self.result["errors"][name] = "not begun: out of time"
        else:
            try:
                run()
            except Exception as error:  # noqa: BLE001 (the others shall run)
                traceback.print_exc()
                self.result["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
                gc.collect()
                if self.cuda:
                    torch.cuda.empty_cache()
        self.write()

    # -----------------------------------------------------------------------------------------------------------------

    def denoiser(self, precision: str) -> nn.Module:
        if precision not in self.denoisers:
            spec = SPEC
            if self.tiny:
                small = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64}
                small |= {"joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (16, 24, 24)}
                spec = replace(SPEC, overrides={"transformer": small})
            rule = recipes.recipe(spec.family, "full" if self.tiny else "post")
            plan = recipes.plan(loading.empty_transformer(spec), rule, precision)
            place = recipes.quantizer(plan, support(precision, self.machine))
            self.denoisers[precision] = loading.load_transformer(spec, self.device, Source(random=True), place=place)
        return self.denoisers[precision]

    def inputs(self, denoiser: nn.Module, side: int) -> dict:
        """What FluxPipeline gives its transformer in the middle of a run."""
        side = 64 if self.tiny else side
        generator = torch.Generator("cpu").manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, torch.bfloat16)

        config, height = denoiser.config, side // 16
        text = 32 if self.tiny else 512
        return {
            "hidden_states": normal(1, height * height, config.in_channels),
            "timestep": torch.full((1,), 0.6, device=self.device, dtype=torch.bfloat16),
            "guidance": torch.full((1,), 3.5, device=self.device),
            "pooled_projections": normal(1, config.pooled_projection_dim),
            "encoder_hidden_states": normal(1, text, config.joint_attention_dim),
            "txt_ids": torch.zeros(text, 3, device=self.device, dtype=torch.bfloat16),
            "img_ids": FluxPipeline._prepare_latent_image_ids(1, height, height, self.device, torch.bfloat16),
            "joint_attention_kwargs": {},
            "return_dict": False,
        }

    def timed(self, call: Callable[[], object], rounds: int = 3, calls: int = 8) -> list[float]:
        if not self.cuda:
            rounds, calls = 1, 1
        found = []
        for _ in range(rounds):
            if self.cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            if self.cuda:
                torch.cuda.synchronize()
            found.append(1000 * (time.perf_counter() - began) / calls)
        return found

    def variant(self, precision: str, v: Variant) -> None:
        denoiser = self.denoiser(precision)
        given = self.inputs(denoiser, v.side)
        torch.compiler.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        blocks = compilation.Blocks(denoiser, dynamic=False, options=v.options)
        blocks.use(compilation.EAGER)
        key = (precision, v.side)
        if key not in self.truth:
            self.truth[key] = denoiser(**given)[0].float()
            eager = self.timed(lambda: denoiser(**given), rounds=1, calls=3)
            self.row(precision, Variant("eager", compilation.EAGER, side=v.side), eager, 0.0, 0.0, 0)
        before = torch.cuda.memory_reserved() if self.cuda else 0
        blocks.use(v.mode)
        began = time.perf_counter()
        for _ in range(compilation.WARM_UP_STEPS[v.mode] + 1):
            made = denoiser(**given)[0].float()
        if self.cuda:
            torch.cuda.synchronize()
        first = time.perf_counter() - began
        found = self.timed(lambda: denoiser(**given))
        away = ((made - self.truth[key]).norm() / self.truth[key].norm()).item()
        reserved = torch.cuda.memory_reserved() - before if self.cuda else 0
        self.row(precision, v, found, first, away, reserved)
        if self.cuda and v.name in (PLAIN, POST, BEST):
            name = f"{precision} {v.side} {v.name}"
            self.result["profiles"][name] = profile.table(lambda: denoiser(**given), self.device)
        blocks.use(compilation.EAGER)
        blocks.forget()

    def row(self, precision: str, v: Variant, found: list[float], first: float, away: float, reserved: int) -> None:
        self.result["rows"].append(
            {
                "precision": precision,
                "variant": v.name,
                "side": v.side,
                "mode": v.mode,
                "step_ms": median(found),
                "rounds_ms": found,
                "first_calls_s": first,
                "relative_l2_from_eager": away,
                "reserved_gb": reserved / 1e9,
            }
        )
        self.say(f"{precision} {v.side} {v.name}: {median(found):.2f} ms, first {first:.1f} s, away {away:.5f}")

    def trajectory(self, precision: str) -> None:
        """28 steps of the real pipeline by some variants: how far their last latents lie apart."""
        denoiser = self.denoiser(precision)
        given = self.inputs(denoiser, 1024)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=denoiser,
        )
        pipeline.set_progress_bar_config(disable=True)
        side = 64 if self.tiny else 1024

        def run() -> tuple[Tensor, float]:
            began = time.perf_counter()
            latents = pipeline(
                prompt_embeds=given["encoder_hidden_states"],
                pooled_prompt_embeds=given["pooled_projections"],
                num_inference_steps=2 if self.tiny else 28,
                guidance_scale=3.5,
                height=side,
                width=side,
                generator=torch.Generator("cpu").manual_seed(7),
                output_type="latent",
            ).images.float()
            if self.cuda:
                torch.cuda.synchronize()
            return latents, time.perf_counter() - began

        torch.compiler.reset()
        last: dict[str, Tensor] = {}
        for v in [Variant("eager", compilation.EAGER), *ENDS]:
            blocks = compilation.Blocks(denoiser, dynamic=False, options=v.options)
            blocks.use(v.mode)
            for _ in range(1 if v.mode == compilation.EAGER else 2):
                last[v.name], seconds = run()
            self.say(f"{precision} 28 steps by {v.name}: {seconds:.3f} s")
            rows = self.result.setdefault("trajectories", [])
            for other in last:
                if other != v.name:
                    away = ((last[v.name] - last[other]).norm() / last[other].norm()).item()
                    rows.append(
                        {"precision": precision, "a": other, "b": v.name, "relative_l2": away, "seconds_b": seconds}
                    )
            blocks.use(compilation.EAGER)
            blocks.forget()

    # -----------------------------------------------------------------------------------------------------------------

    def products(self) -> None:
        """Rates of the products of a step: bf16, row-wise FP8, FP8 with one scale; and one row, as modulation has."""
        rows, found = 4608, []
        for m, k, n in [
            (rows, 3072, 3072),
            (rows, 3072, 9216),
            (rows, 3072, 12288),
            (rows, 3072, 21504),
            (rows, 15360, 3072),
            (4096, 12288, 3072),
            (512, 3072, 3072),
            (512, 3072, 9216),
            (512, 3072, 12288),
            (1, 3072, 9216),
            (1, 3072, 18432),
            (8192, 8192, 8192),
        ]:
            x, w = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16() / k**0.5
            bias = torch.randn(n, device="cuda").bfloat16()
            a, b = x.to(torch.float8_e4m3fn), (w * 64).to(torch.float8_e4m3fn).t()
            ra, rb = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
            one = torch.ones((), device="cuda")
            mm = partial(torch._scaled_mm, a, b, out_dtype=torch.bfloat16, use_fast_accum=True)
            calls = {
                "bf16": partial(nn.functional.linear, x, w, bias),
                "fp8 rows": partial(mm, scale_a=ra, scale_b=rb, bias=bias),
                "fp8 rows without bias": partial(mm, scale_a=ra, scale_b=rb),
                "fp8 one scale": partial(mm, scale_a=one, scale_b=one, bias=bias),
            }
            entry = {"m": m, "k": k, "n": n}
            for name, call in calls.items():
                ms = profile.milliseconds(call, self.device)
                entry[name] = {"ms": ms, "tflops": 2 * m * k * n / ms / 1e9}
            found.append(entry)
            self.say(json.dumps(entry))
        self.result["products"] = found

    def attention(self) -> None:
        """FLUX's attention by PyTorch's kernels."""
        found = {}
        for tokens in (4608, 1536):
            shape = (1, tokens, 24, 128)
            tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
            attend = partial(nn.functional.scaled_dot_product_attention, *tensors)
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                with sdpa_kernel(backend):
                    ms = profile.milliseconds(attend, self.device)
                found[f"{tokens} {backend.name}"] = {"ms": ms, "tflops": 4 * 24 * tokens * tokens * 128 / ms / 1e9}
            found[f"{tokens} chosen by PyTorch"] = {"ms": profile.milliseconds(attend, self.device)}
        self.result["attention"] = found
        self.say(json.dumps(found))

    def floors(self) -> None:
        for precision in ("bf16", "fp8"):
            denoiser = self.denoiser(precision)
            with profile.counted(denoiser) as work:
                denoiser(**self.inputs(denoiser, 1024))
            found = profile.floor(work, self.device)
            found |= {"gemm_tflop": work.gemm_flops / 1e12, "attention_tflop": work.attention_flops / 1e12}
            self.result.setdefault("floors", {})[precision] = found
            self.say(
                f"floor {precision}: {found['floor_ms']:.2f} ms = {found['gemm_ms']:.2f} + {found['attention_ms']:.2f}"
            )

    def run(self) -> None:
        self.write()
        if self.cuda:
            self.guarded("products", self.products)
            self.guarded("attention", self.attention)
            self.guarded("floors", self.floors)
        self.variants(VARIANTS)
        for precision in ("fp8", "bf16"):
            self.guarded(f"trajectory {precision}", partial(self.trajectory, precision))
        self.variants([replace(v, name=f"again: {v.name}") for v in ENDS])  # drift, warm caches

    def variants(self, variants: list[Variant]) -> None:
        for v in variants:
            for precision in v.precisions:
                self.guarded(f"{precision} {v.side} {v.name}", partial(self.variant, precision, v))


def table(result: dict) -> str:
    """The steps of a result as Markdown: milliseconds of one denoising step, and how far it is from uncompiled."""
    heads = ("size", "step", *(f"{name}{what}" for name in ("bf16", "FP8") for what in (", ms", ": relative L2")))
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    found = {(row["side"], row["variant"], row["precision"]): row for row in result["rows"]}
    for side, variant in dict.fromkeys((side, variant) for side, variant, _ in found):
        if variant.startswith("again"):
            continue
        rows = [found.get((side, variant, precision)) for precision in ("bf16", "fp8")]
        cells = [
            c for r in rows for c in ((f"{r['step_ms']:.1f}", f"{r['relative_l2_from_eager']:.4f}") if r else "––")
        ]
        lines.append(f"| {' | '.join([f'{side}x{side}', OLD_NAMES.get(variant, variant), *cells])} |")
    for precision in ("bf16", "fp8"):
        floor = result["floors"][precision]
        lines.append(
            f"\nFloor in {precision}: {floor['floor_ms']:.1f} ms, {floor['gemm_ms']:.1f} of it matrix products and "
            f"{floor['attention_ms']:.1f} attention, each shape timed alone on the same {result['device']}."
        )
    if "note" in result:
        lines.append(f"\n{result['note']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("out", type=Path, nargs="?")
    what.add_argument("--table", type=Path)
    parser.add_argument("--side", type=int, choices=sorted({v.side for v in VARIANTS}))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())), end="")
        return
    compilation.configure()
    with torch.inference_mode():
        sweep = Sweep(args.out, args.tiny)
        if args.side is None:
            sweep.run()
        else:
            sweep.variants([v for v in VARIANTS if v.side == args.side])


if __name__ == "__main__":
    main()
