"""One comparison: the same noise and the same prompt through each precision in turn, timed, weighed and compared.

A `Studio` holds what is loaded on one device. It knows nothing of threads, queues or pages: it is given a function
to tell events to, and a function that says whether to stop.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from engine import catalog, events, loading, media, metrics, precision, recipes, timing
from engine.catalog import ModelSpec
from engine.errors import UnsupportedError
from engine.files import write_whole
from engine.request import PRECISIONS, REFERENCE, CompareRequest
from engine.results import Comparison, Generation, LayerCounts, Memory, Metrics, Ruler

ATTENTION = "native"
"""diffusers' name for PyTorch's scaled_dot_product_attention, which picks a fused kernel."""
FLOOR_ATTENTION = "_native_math"
"""The second legitimate bf16 path of the noise floor: the same attention, unfused."""
RULER_PROMPTS = 3
PACKAGES = ("torch", "torchao", "diffusers", "transformers", "lpips", "mslk-cuda")


class CancelledRun(Exception):
    """Raised out of a pipeline call when the job was cancelled."""


@dataclass(frozen=True, kw_only=True)
class Rendition:
    """One model in one precision, ready to run."""

    pipeline: DiffusionPipeline
    support: precision.Support
    layers: LayerCounts
    weights: float
    """GB of the whole pipeline."""
    transformer: float
    """GB of the denoiser as stored."""


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result; those not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Studio:
    """Models loaded on one device, and what they make. Use it from one thread only.

    Raises:
        UnsupportedError: there is no such device.
    """

    def __init__(self, device: str | torch.device):
        self.device = precision.device_named(device)
        self.machine = precision.Machine.detect(self.device)
        self.support = {p: precision.support(p, self.machine) for p in PRECISIONS}
        timing.prepare(self.device)
        self._renditions: dict[tuple[str, str, str], Rendition] = {}
        self._added: dict[tuple, int] = {}
        """Bytes a run allocates, by rendition and shape; measured in the warm-up, so that a shape is warm once here."""
        self._rulers = RulerShelf()
        self._fingerprints: dict[str, str] = {}

    def compare(
        self, request: CompareRequest, out: Path, tell: Callable[[events.Event], None], stop: Callable[[], bool]
    ) -> Comparison:
        """Carry out a request; pictures and `comparison.json` go into `out`.

        Raises:
            UnsupportedError, LoadError, OutputError: in one sentence.
            CancelledRun: `stop` said so.
        """
        spec = catalog.model(request.model)
        reference, results = None, []
        for name in request.precisions:
            rendition = self.rendition(spec, name, request.recipe, tell)
            generation, pictures = self.generate(rendition, spec, request, out, tell, stop)
            tell(events.Finished(name, generation))
            if reference is None:
                reference = pictures
            else:
                distance = Metrics(
                    lpips=tuple(metrics.lpips_distance(pictures, reference).tolist()),
                    psnr_db=tuple(metrics.psnr(pictures, reference).tolist()),
                )
                tell(events.Compared(name, distance))
                generation = replace(generation, metrics=distance)
            results.append(generation)
        ruler = self.ruler(spec, request, tell, stop)
        comparison = Comparison(
            request=request,
            device=self.machine.name,
            versions=versions(),
            results=tuple(results),
            ruler=ruler,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        comparison.save(out)
        return comparison

    def rendition(self, spec: ModelSpec, name: str, recipe: str, tell: Callable[[events.Event], None]) -> Rendition:
        """The model in one precision, loaded and quantized on first use, then kept.

        Raises:
            UnsupportedError: this machine cannot run the precision.
            LoadError: the weights are missing or damaged.
        """
        key = (spec.id, name, recipe if name != REFERENCE else "")
        if key not in self._renditions:
            self._renditions[key] = self._load(spec, name, recipe, tell)
        return self._renditions[key]

    def _load(self, spec: ModelSpec, name: str, recipe: str, tell: Callable[[events.Event], None]) -> Rendition:
        support = self.support[name]
        if support.execution == "unavailable":
            raise UnsupportedError(support.reason)
        plan = recipes.plan(loading.empty_transformer(spec), recipes.recipe(spec.id, recipe), name)
        if name == REFERENCE:
            tell(events.Loading(spec.name))
            pipeline = loading.load_pipeline(spec, self.device)
        else:
            shared = self.rendition(spec, REFERENCE, recipe, tell).pipeline
            tell(events.Loading(f"{spec.name} in {name}"))
            transformer = recipes.apply(loading.load_transformer(spec, self.device), plan, support)
            scheduler = type(shared.scheduler).from_config(shared.scheduler.config)
            pipeline = type(shared)(**(shared.components | {"transformer": transformer, "scheduler": scheduler}))
            pipeline.set_progress_bar_config(disable=True)
        modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
        return Rendition(
            pipeline=pipeline,
            support=support,
            layers=recipes.verify(pipeline.transformer, plan),
            weights=timing.weight_bytes(*modules) / timing.GB,
            transformer=timing.weight_bytes(pipeline.transformer) / timing.GB,
        )

    def generate(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        out: Path,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> tuple[Generation, Tensor]:
        """One precision's pictures, (N, 3, H, W) in [-1, 1], and what is known of them."""
        name = rendition.support.precision
        added = self.warm(rendition, spec, request, tell, stop)
        progress = _Progress(name, request.num_inference_steps, tell, stop)
        with timing.stages(rendition.pipeline, self.device) as clock:
            pictures = _call(rendition.pipeline, spec, request, request.seed, progress)
        asked = request.to_json()
        del asked["precisions"]  # a picture's bytes must not depend on what else was asked for
        recipe = {
            "request": asked,
            "precision": name,
            "execution": rendition.support.execution,
            "device": self.machine.name,
            "versions": versions(),
            "model_licence": spec.licence,
        }
        files = []
        for i, picture in enumerate(pictures):
            file = out / (f"{name}.png" if len(pictures) == 1 else f"{name}-{i + 1}.png")
            media.save_png(picture, file, recipe | {"picture": i, "seed": request.seed + i})
            files.append(str(file))
        generation = Generation(
            precision=name,
            execution=rendition.support.execution,
            files=tuple(files),
            latency=clock.latency,
            latency_comparable=rendition.support.execution == "native",
            memory=Memory(
                weights=rendition.weights,
                transformer=rendition.transformer,
                peak=rendition.weights + added / timing.GB,
            ),
            layers=rendition.layers,
            ran=self._ran(rendition, spec, request),
        )
        return generation, pictures * 2 - 1

    def warm(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> int:
        """Run one untimed step of the request's shape, once; returns the bytes that a run of it allocates."""
        shape = (request.height, request.width, request.batch_size, request.guidance_scale > 1)
        key = (spec.id, rendition.support.precision, request.recipe, *shape)
        if key not in self._added:
            tell(events.Warming(rendition.support.precision))
            once = replace(request, num_inference_steps=1)
            quiet = _Progress(rendition.support.precision, 1, lambda _: None, stop)
            gc.collect()
            self._added[key] = timing.added_bytes(
                lambda: _call(rendition.pipeline, spec, once, request.seed, quiet), self.device
            )
        return self._added[key]

    def ruler(
        self,
        spec: ModelSpec,
        request: CompareRequest,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> Ruler:
        """Noise floor and other-seed ceiling of bf16 at the request's shape and steps, measured once, then kept.

        Raises:
            CancelledRun: `stop` said so.
        """
        key = "|".join(
            str(part)
            for part in (
                spec.id,
                self._fingerprint(spec),
                self.machine.name,
                version("torch"),
                version("diffusers"),
                f"{request.width}x{request.height}",
                request.num_inference_steps,
                request.guidance_scale,
            )
        )
        ruler = self._rulers.get(key)
        if ruler is None:
            ruler = self._measure_ruler(spec, request, tell, stop)
            self._rulers.put(key, ruler)
        tell(events.RulerReady(ruler))
        return ruler

    def _fingerprint(self, spec: ModelSpec) -> str:
        if spec.id not in self._fingerprints:
            self._fingerprints[spec.id] = loading.fingerprint(spec)
        return self._fingerprints[spec.id]

    def _measure_ruler(
        self,
        spec: ModelSpec,
        request: CompareRequest,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> Ruler:
        pipeline = self.rendition(spec, REFERENCE, request.recipe, tell).pipeline
        prompts, seed = spec.examples[:RULER_PROMPTS], spec.defaults.seed
        quiet = _Progress(REFERENCE, request.num_inference_steps, lambda _: None, stop)
        done, total = 0, 3 * len(prompts)
        floors, ceilings = [], []
        for prompt in prompts:
            asked = replace(request, prompt=prompt, batch_size=1)
            made = []
            for attention, noise in ((ATTENTION, seed), (FLOOR_ATTENTION, seed), (ATTENTION, seed + 1)):
                tell(events.Measuring(done, total))
                pipeline.transformer.set_attention_backend(attention)
                try:
                    made.append(_call(pipeline, spec, asked, noise, quiet) * 2 - 1)
                finally:
                    pipeline.transformer.set_attention_backend(ATTENTION)
                done += 1
            floors.append(metrics.lpips_distance(made[0], made[1]).item())
            ceilings.append(metrics.lpips_distance(made[0], made[2]).item())
        note = (
            f"Mean LPIPS over {len(prompts)} prompts in bf16 on this device. Floor: fused against unfused attention, "
            f"same noise. Ceiling: seed {seed} against seed {seed + 1}."
        )
        return Ruler(floor=fmean(floors), ceiling=fmean(ceilings), note=note)

    def _ran(self, rendition: Rendition, spec: ModelSpec, request: CompareRequest) -> dict[str, str]:
        """What really ran, label -> words."""
        support, layers = rendition.support, rendition.layers
        linears = layers.quantized + layers.skipped + layers.left
        return {
            "Device": self.machine.name,
            "Execution": f"{support.execution}: {support.reason}",
            "Linear layers": (
                f"{layers.quantized} of {linears} quantized, {layers.skipped} skipped by the recipe, "
                f"{layers.left} left in bf16 for their shape"
            ),
            "Prompt": _read(rendition.pipeline, spec, request.prompt),
            "Recipe": f"{request.recipe}: {recipes.recipe(spec.id, request.recipe).summary}",
            "GEMM": support.gemm,
            "Attention": f"PyTorch scaled_dot_product_attention in bf16 (diffusers backend {ATTENTION!r})",
            "Compile": "off (eager), for every precision",
            "Text encoders and VAE": "bf16, shared by all precisions",
            "Scheduler": f"{type(rendition.pipeline.scheduler).__name__}, {request.num_inference_steps} steps",
            "Noise": f"CPU generator, seed {request.seed}, the same for every precision",
            "Timing": "one pipeline call between device synchronisations, after a warm-up step of the same shape",
            "Memory": (
                "weights as stored, plus the peak that one step and decoding allocate"
                + (" through PyTorch's CPU allocator" if self.device.type == "cpu" else " on the device")
            ),
        }


class _Progress:
    """The pipeline's `callback_on_step_end`: tells each step, and stops the run when asked to."""

    def __init__(self, name: str, total: int, tell: Callable[[events.Event], None], stop: Callable[[], bool]):
        self._name, self._total, self._tell, self._stop = name, total, tell, stop
        self._first: datetime | None = None

    def check(self) -> None:
        if self._stop():
            raise CancelledRun

    def __call__(self, pipeline: DiffusionPipeline, index: int, timestep: Tensor, kwargs: dict) -> dict:
        self.check()
        now, done = datetime.now(UTC), index + 1
        if self._first is None:
            self._first = now
        spent = (now - self._first).total_seconds()
        left = spent / index * (self._total - done) if index else None
        self._tell(events.Step(self._name, done, self._total, left))
        return {}


def _call(
    pipeline: DiffusionPipeline, spec: ModelSpec, request: CompareRequest, seed: int, progress: _Progress
) -> Tensor:
    """The real pipeline call; pictures (N, 3, H, W) in [0, 1].

    Picture i of a batch has the noise of seed + i, from a CPU generator, so that it can be made again alone and on
    any device.
    """
    progress.check()
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(request.batch_size)]
    result = pipeline(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        num_images_per_prompt=request.batch_size,
        generator=generators,
        output_type="pt",
        callback_on_step_end=progress,
        **{**spec.call, spec.guidance_argument: request.guidance_scale},
    )
    return result.images.float()


def _read(pipeline: DiffusionPipeline, spec: ModelSpec, prompt: str) -> str:
    """How much of the prompt the text encoder reads: pipelines cut what is too long without a word."""
    tokens, limit = len(pipeline.tokenizer_2(prompt).input_ids), spec.call["max_sequence_length"]
    cut = f"; the last {tokens - limit} were cut off" if tokens > limit else ""
    return f"{tokens} tokens, of at most {limit}{cut}"


class RulerShelf:
    """Rulers measured on this machine, in one JSON file below the user's cache folder ($TWINFRAME_CACHE).

    Losing the file costs a few seconds, so one that cannot be read or written is done without.
    """

    def __init__(self) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        self._file = Path(os.environ.get("TWINFRAME_CACHE", home / "twinframe")) / "rulers.json"
        self._kept: dict[str, Ruler] = {}

    def get(self, key: str) -> Ruler | None:
        if key not in self._kept:
            self._kept |= self._read()
        return self._kept.get(key)

    def put(self, key: str, ruler: Ruler) -> None:
        self._kept |= self._read() | {key: ruler}  # another process may have added some since
        kept = {name: asdict(value) for name, value in self._kept.items()}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(kept, indent=1).encode())

    def _read(self) -> dict[str, Ruler]:
        try:
            return {key: Ruler(**values) for key, values in json.loads(self._file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
