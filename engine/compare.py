"""One comparison: the same noise and the same prompt through each precision in turn, timed, weighed and compared.

A `Studio` holds what is loaded on one device. It knows nothing of threads, queues or pages: it is given a function
to tell events to, and a function that says whether to stop.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from engine import (
    catalog,
    compilation,
    content,
    events,
    loading,
    media,
    metrics,
    pinned,
    precision,
    recipes,
    residency,
    timing,
    tuned,
)
from engine.catalog import ModelSpec
from engine.errors import UnsupportedError
from engine.files import cache_folder, write_whole
from engine.pipeline import Made, Progress, call, finished, read, seed_of, tokens
from engine.previews import Previewer
from engine.remedies import WeightOnlySteps
from engine.request import PRECISIONS, REFERENCE, CompareRequest
from engine.results import Comparison, Generation, LayerCounts, LpipsMap, Memory, Metrics, Ruler

ATTENTION = "native"
"""diffusers' name for PyTorch's scaled_dot_product_attention, which picks a fused kernel."""
FLOOR_ATTENTION = "_native_math"
"""The second legitimate bf16 path of the noise floor where nothing is compiled: the same attention, unfused."""
RULER_PROMPTS = 3
"""Of a miniature; one for a model that takes seconds to minutes a picture."""
PACKAGES = ("torch", "torchao", "diffusers", "transformers", "lpips", "mslk-cuda")


Take = Callable[[Callable[[events.Event], None], Callable[[], bool]], tuple[Generation, Made]]
"""A timed call that only waits to be made, with what is told and what stops it; gives what it made, without files."""


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
    blocks: compilation.Blocks
    """The denoiser's, to be run eager or compiled."""
    weight_only_steps: tuple[int, int]
    """First and last steps in which activations stay bf16."""

    def warm_up_steps(self, mode: str) -> int:
        """Steps of a warm-up, in which all is done that a run in this mode may do."""
        return compilation.WARM_UP_STEPS[mode] * (2 if any(self.weight_only_steps) else 1)

    def weight_only(self, total: int, warming: bool = False) -> WeightOnlySteps | None:
        """What leaves activations in bf16 in some steps of a call of `total`, or, `warming`, in every other half."""
        if not any(self.weight_only_steps):
            return None
        steps = (total // 2, 0) if warming else self.weight_only_steps
        return WeightOnlySteps(self.pipeline.transformer, steps, total, self.blocks.vary)


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

    def __init__(
        self,
        device: str | torch.device,
        source: loading.Source = loading.BUNDLED_OR_HUB,
        filtered: content.Filter = content.NO_FILTER,
    ):
        self.device = precision.device_named(device)
        self.source = source
        self._guard = content.Guard(filtered)
        self.machine = precision.detect(self.device)
        self.support = {p: precision.support(p, self.machine) for p in PRECISIONS}
        timing.prepare(self.device)
        self._renditions: dict[residency.Key, Rendition] = {}
        self._shared: dict[str, dict[str, object]] = {}
        """Text encoders, VAE and the like, by model."""
        self._limit = residency.limit()
        self._shelf = residency.Shelf(grain=pinned.CHUNK / timing.GB)
        self._pool = pinned.Pool(pinned=self.device.type == "cuda")
        self._waiting: dict[residency.Key, pinned.Stored] = {}
        """The weights that are in host memory."""
        self._arrived: dict[residency.Key, tuple[float, float]] = {}
        """GB and seconds of a part's last way from there to the device."""
        self._warm: dict[tuple, compilation.WarmUp] = {}
        """By rendition and shape: a shape is warm once it is here, until a recording is dropped."""
        self._compiled: dict[tuple, float] = {}
        """Seconds of the first call that compiled for a rendition and a size; compiled code outlives moved weights."""
        self._rulers = RulerShelf()
        self._fingerprints: dict[str, str] = {}

    def compare(
        self, request: CompareRequest, out: Path, tell: Callable[[events.Event], None], stop: Callable[[], bool]
    ) -> Comparison:
        """Carry out a request; pictures or clips and `comparison.json` go into `out`.

        Raises:
            UnsupportedError, LoadError, OutputError: in one sentence.
            CancelledRun: `stop` said so.
        """
        spec = catalog.model(request.model)
        self._guard.prompt(spec, request.prompt)
        reference, results = None, []
        for generation, made in self.takes(spec, request, tell, stop):
            generation = self._kept(generation, made, spec, request, out, generation.precision)
            tell(events.Finished(generation.precision, generation))
            if reference is None:
                reference = made
            else:
                distance, maps = self.distance(made, reference)
                tell(events.Compared(generation.precision, distance))
                generation = replace(generation, metrics=distance, lpips_maps=keep_maps(maps, generation))
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

    def takes(
        self, spec: ModelSpec, request: CompareRequest, tell: Callable[[events.Event], None], stop: Callable[[], bool]
    ) -> Iterator[tuple[Generation, Made]]:
        """What each precision makes, in the request's order, one after the other; no files are written yet."""
        for name in request.precisions:
            yield self.ready(spec, name, request, tell, stop)(tell, stop)

    def ready(
        self,
        spec: ModelSpec,
        name: str,
        request: CompareRequest,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> Take:
        """Load one precision and warm it for the request, and give the timed call, to be made before anything else.

        Raises:
            UnsupportedError, LoadError: as `rendition`.
            CancelledRun: `stop` said so.
        """
        rendition = self.rendition(spec, name, request.recipe, tell)
        return partial(self._take, rendition, spec, request, self.warm(rendition, spec, request, tell, stop))

    def rendition(self, spec: ModelSpec, name: str, recipe: str, tell: Callable[[events.Event], None]) -> Rendition:
        """The model in one precision, on the device: loaded and quantized on first use, then kept there or in host
        memory while there is room. It stays on the device until another is asked for.

        Raises:
            UnsupportedError: this machine cannot run the precision, or has not the memory for it.
            LoadError: the weights are missing or damaged.
        """
        key, shared = _key(spec, name, recipe), residency.shared_key(spec.id)
        if key not in self._renditions:
            self._renditions[key] = self._load(spec, name, recipe, tell)
        else:
            if self._shelf.place(key) == residency.HOST or self._shelf.place(shared) == residency.HOST:
                tell(events.Loading(spec.name if name == REFERENCE else f"{spec.name} in {name}"))
            self._make_room(spec, key, self._shelf.gigabytes(key))
        self._shelf.use(key, shared)
        return self._renditions[key]

    def _load(self, spec: ModelSpec, name: str, recipe: str, tell: Callable[[events.Event], None]) -> Rendition:
        support = self.support[name]
        if support.execution == "unavailable":
            raise UnsupportedError(support.reason)
        plan = recipes.plan(loading.empty_transformer(spec), recipes.recipe(spec.family, recipe), name)
        key, gigabytes = _key(spec, name, recipe), plan.quantized_bytes / timing.GB
        residency.require(spec, name, gigabytes, self.device)
        self._make_room(spec, key, gigabytes)

        def told(done: int, total: int) -> None:
            tell(events.Downloading(spec.name, done, total))

        tell(events.Loading(spec.name if name == REFERENCE else f"{spec.name} in {name}"))
        shared = self.shared(spec, told)
        transformer = loading.load_transformer(
            spec, self.device, self.source, place=recipes.quantizer(plan, support), told=told
        )
        pipeline = loading.assemble(spec, shared, transformer)
        stored = timing.weight_bytes(transformer) / timing.GB
        self._shelf.put(key, stored)
        return Rendition(
            pipeline=pipeline,
            support=support,
            layers=recipes.verify(pipeline.transformer, plan),
            weights=timing.weight_bytes(*_modules(pipeline.components)) / timing.GB,
            transformer=stored,
            blocks=compilation.Blocks(pipeline.transformer),
            weight_only_steps=plan.recipe.weight_only_steps(name),
        )

    def shared(self, spec: ModelSpec, told: loading.Told | None = None) -> dict[str, object]:
        """Text encoders, VAE and whatever else all precisions of the model share, on the device, loaded on first use.

        Raises:
            UnsupportedError: the machine has not the memory for them.
            LoadError: the weights are missing or damaged.
        """
        key = residency.shared_key(spec.id)
        if spec.id not in self._shared:
            self._shared[spec.id] = loading.load_shared(spec, self.device, self.source, told)
            self._shelf.put(key, timing.weight_bytes(*_modules(self._shared[spec.id])) / timing.GB)
        elif self._shelf.place(key) == residency.HOST:
            self._make_room(spec, key, self._shelf.gigabytes(key))
        return self._shared[spec.id]

    def _make_room(
        self, spec: ModelSpec, key: residency.Key, gigabytes: float, request: CompareRequest | None = None
    ) -> None:
        """Bring a denoiser of so many GB, or make room to load it, with what it shares and a run of the request or, by
        default, of the default settings.

        Raises:
            UnsupportedError: it does not fit even if everything else leaves.
        """
        shared = residency.shared_key(spec.id)
        known = self._shelf.gigabytes(shared)
        memory = spec.memory_gb
        wanted = {shared: known if known is not None else memory.shared if memory else 0.0, key: gigabytes}
        need, run = sum(wanted.values()), memory.run if memory else 0.0
        device = residency.capacity(self.device, self._shelf.held(residency.DEVICE), self._limit)
        if memory is None:  # a miniature is never refused
            device = max(device, need)
        if request is not None:  # an estimate from above empties the device, but refuses nothing
            run = min(residency.run_memory(spec, request), device - need)
        host = residency.waiting_room(self.device, self._pool.bytes / timing.GB)
        try:
            moves = self._shelf.plan(wanted, run, device, host)
        except residency.NoRoom as error:
            raise UnsupportedError(
                residency.refusal(spec, key[1] or REFERENCE, error.need, device, self.device)
            ) from error
        for move in moves:
            self._move(move)

    def _move(self, move: residency.Move) -> None:
        key = move.key
        if self._shelf.place(key) == residency.GONE:
            return  # it went with what it shared
        if key in self._renditions:  # CUDA graphs refer to addresses, so what was warm is not any more
            self._renditions[key].blocks.forget()
        if move.to == residency.GONE:
            self._forget(key)
        elif move.to == residency.HOST:
            stored = self._pool.store(self._parts(key))
            if stored is None:
                self._forget(key)
                return
            self._waiting[key] = stored
            self._shelf.done(move)
            timing.free(self.device)
        else:
            began = timing.now(self.device)
            self._waiting[key].restore(self.device)
            del self._waiting[key]
            self._arrived[key] = (self._shelf.gigabytes(key), timing.now(self.device) - began)
            self._shelf.done(move)
        self._warm = {warm: value for warm, value in self._warm.items() if warm[:3] != key}

    def _parts(self, key: residency.Key) -> list[torch.nn.Module]:
        if key == residency.shared_key(key[0]):
            return _modules(self._shared[key[0]])
        return [self._renditions[key].pipeline.transformer]

    def _forget(self, key: residency.Key) -> None:
        """Let go of a part wherever it is, and of all that cannot be used without it."""
        if key == residency.shared_key(key[0]):
            self._shared.pop(key[0], None)
            for other in [other for other in self._renditions if other[0] == key[0]]:
                self._forget(other)
        self._renditions.pop(key, None)
        self._arrived.pop(key, None)
        if key in self._waiting:
            self._waiting.pop(key).discard()
        self._warm = {warm: value for warm, value in self._warm.items() if warm[:3] != key}
        self._shelf.done(residency.Move(key=key, to=residency.GONE))
        timing.free(self.device)

    def switch(self, spec: ModelSpec, name: str, recipe: str) -> dict[str, float] | None:
        """Send a rendition's denoiser to host memory and bring it back, twice, and measure the second time.

        Returns:
            `gigabytes`, `to_host_s`, `to_device_s`, and `first_to_host_s` of the first time, which takes the host
            memory. None if it is not on the device, or the host has not the memory.
        """
        key, took = _key(spec, name, recipe), []
        room = residency.waiting_room(self.device, self._pool.bytes / timing.GB)
        for _ in range(2):
            if self._shelf.place(key) != residency.DEVICE or self._shelf.gigabytes(key) > room:
                return None
            began = timing.now(self.device)
            self._move(residency.Move(key=key, to=residency.HOST))
            took.append(timing.now(self.device) - began)
            if self._shelf.place(key) == residency.HOST:
                self._move(residency.Move(key=key, to=residency.DEVICE))
        if key not in self._arrived:
            return None
        gigabytes, back = self._arrived[key]
        return {"gigabytes": gigabytes, "to_host_s": took[1], "to_device_s": back, "first_to_host_s": took[0]}

    def drop(self, model_id: str, name: str, recipe: str) -> None:
        """Forget a rendition, if there is one, so that its denoiser leaves memory."""
        self._forget((model_id, name, recipe if name != REFERENCE else ""))

    def generate(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        out: Path,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
        stem: str | None = None,
    ) -> tuple[Generation, Made]:
        """One precision's pictures or clips, and what is known of them.

        Args:
            stem: of the files' names; the precision by default.
        """
        warm = self.warm(rendition, spec, request, tell, stop)
        generation, made = self._take(rendition, spec, request, warm, tell, stop)
        return self._kept(generation, made, spec, request, out, stem or generation.precision), made

    def _take(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        warm: compilation.WarmUp,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> tuple[Generation, Made]:
        """The timed call, and what is known of it; no files are written yet."""
        name = rendition.support.precision
        preview = Previewer(rendition.pipeline, spec, request) if request.previews else None
        progress = Progress(name, request.num_inference_steps, tell, stop, preview)
        graphs = compilation.graphs_compiled()
        with timing.stages(rendition.pipeline, self.device) as clock:
            steps = rendition.weight_only(request.num_inference_steps)
            output = call(rendition.pipeline, spec, request, request.seed, progress, steps)
        recompiled = compilation.graphs_compiled() - graphs
        made = finished(rendition.pipeline, spec, output)
        generation = Generation(
            precision=name,
            execution=rendition.support.execution,
            files=(),
            latency=clock.latency,
            latency_comparable=rendition.support.execution == "native" and not request.previews,
            memory=Memory(
                weights=rendition.weights,
                transformer=rendition.transformer,
                peak=rendition.weights + warm.added / timing.GB,
            ),
            layers=rendition.layers,
            ran=self._ran(rendition, spec, request, warm, recompiled, made.not_numbers),
        )
        return generation, made

    def _kept(
        self, generation: Generation, made: Made, spec: ModelSpec, request: CompareRequest, out: Path, stem: str
    ) -> Generation:
        """With files, once the filter has let them pass."""
        self._guard.outputs(spec, made.pixels)
        return replace(generation, files=self.keep(made, generation.precision, spec, request, out, stem))

    def keep(
        self,
        made: Made,
        precision: str,
        spec: ModelSpec,
        request: CompareRequest,
        out: Path,
        stem: str,
        **further: object,
    ) -> tuple[str, ...]:
        """Write what was made into `out`, each file with its recipe inside; `further` JSON values are added to it.

        Returns:
            The files' names, one a picture or clip.

        Raises:
            OutputError: they cannot be written.
        """
        asked = request.to_json()
        del asked["precisions"], asked["previews"]  # a picture's bytes must not depend on what else was asked for
        recipe = {
            "request": asked,
            "precision": precision,
            "execution": self.support[precision].execution,
            "device": self.machine.name,
            "versions": versions(),
            "model_licence": spec.licence,
            **further,
        }
        files = []
        for i, pixels in enumerate(made.pixels):
            name = stem if len(made.pixels) == 1 else f"{stem}-{i + 1}"
            inside = recipe | {"picture": i, "seed": seed_of(request.seed, i)}
            if spec.modality == "image":
                file = out / f"{name}.png"
                media.save_png(pixels, file, inside)
            else:
                file = out / f"{name}.mp4"
                sound = None if made.audio is None else made.audio[i]
                media.save_mp4(pixels, sound, spec.defaults.frame_rate, made.audio_rate, file, inside)
            files.append(str(file))
        return tuple(files)

    def warm(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> compilation.WarmUp:
        """Make room for a run of the request, set the blocks to its mode, and run a few untimed steps of its shape,
        once, compiling what is needed.

        Raises:
            UnsupportedError: the rendition is not on the device any more, and there is no room to bring it back.
            CancelledRun: `stop` said so.
        """
        name = rendition.support.precision
        key = _key(spec, name, request.recipe)
        if self._renditions.get(key) is rendition:
            self._make_room(spec, key, rendition.transformer, request)
            self._shelf.use(key, residency.shared_key(spec.id))
        mode = self.mode(name, spec, request)
        rendition.blocks.use(mode)
        shape = (request.height, request.width, request.num_frames, request.batch_size)
        compiled = (*key, *shape)
        shape += (request.guidance_scale > 1,)
        if mode != compilation.EAGER and not spec.text_padded:
            shape += (tokens(rendition.pipeline, spec, request.prompt),)
        key = (*key, *shape)
        if key not in self._warm or self._warm[key].dropped != rendition.blocks.dropped:
            compiles = mode != compilation.EAGER and compiled not in self._compiled
            tell(events.Warming(name, compiles, max(self._compiled.values(), default=None) if compiles else None))
            few = replace(request, num_inference_steps=rendition.warm_up_steps(mode))
            self._warm[key] = self._warm_up(rendition, spec, few, stop)
            if compiles:
                self._compiled[compiled] = self._warm[key].seconds
        return self._warm[key]

    def _warm_up(
        self, rendition: Rendition, spec: ModelSpec, few: CompareRequest, stop: Callable[[], bool]
    ) -> compilation.WarmUp:
        """A few steps in which everything is compiled, tuned and recorded, and memory is weighed."""
        count = few.num_inference_steps
        steps = rendition.weight_only(count, warming=True)
        quiet = Progress(rendition.support.precision, count, lambda _: None, stop)
        gc.collect()
        began, graphs = timing.now(self.device), compilation.graphs_compiled()
        added = timing.added_bytes(lambda: call(rendition.pipeline, spec, few, few.seed, quiet, steps), self.device)
        return compilation.WarmUp(
            seconds=timing.now(self.device) - began,
            graphs=compilation.graphs_compiled() - graphs,
            added=added,
            dropped=rendition.blocks.dropped,
        )

    def mode(self, name: str, spec: ModelSpec, request: CompareRequest) -> str:
        """How this machine runs a denoiser's blocks in one precision for a request."""
        native = self.support[name].execution == "native"
        return compilation.mode(spec, request.batch_size, native, self.device)

    def distance(self, made: Made, reference: Made) -> tuple[Metrics, list[Tensor]]:
        """LPIPS and PSNR of what was made from the reference, and where LPIPS comes from; one a picture or clip.

        Returns:
            The numbers, and maps (F, h, w) as of `metrics.lpips_maps`, F being 1 for a picture.
        """
        a, b = made.pixels * 2 - 1, reference.pixels * 2 - 1
        if a.ndim == 4:
            (distances, maps), decibels, frames = metrics.lpips_maps(a, b), metrics.psnr(a, b), None
            maps = list(maps[:, None])
        else:
            each = [metrics.clip_distance(one, other, self.device) for one, other in zip(a, b, strict=True)]
            by_frame, decibels, maps = (list(values) for values in zip(*each, strict=True))
            frames = tuple(tuple(distances.tolist()) for distances in by_frame)
            distances, decibels = torch.stack([d.mean() for d in by_frame]), torch.stack(decibels)
        found = Metrics(lpips=tuple(distances.tolist()), psnr_db=tuple(decibels.tolist()), lpips_frames=frames)
        return found, maps

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
                f"{request.width}x{request.height}x{request.num_frames}",
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
            self._fingerprints[spec.id] = loading.fingerprint(spec, self.source)
        return self._fingerprints[spec.id]

    def _measure_ruler(
        self,
        spec: ModelSpec,
        request: CompareRequest,
        tell: Callable[[events.Event], None],
        stop: Callable[[], bool],
    ) -> Ruler:
        rendition = self.rendition(spec, REFERENCE, request.recipe, tell)
        prompts, seed = spec.examples[: RULER_PROMPTS if spec.bundled else 1], spec.defaults.seed
        done, total = 0, 3 * len(prompts)
        floors, ceilings = [], []
        for prompt in prompts:
            asked = replace(request, prompt=prompt, batch_size=1, seed=seed)
            made = []
            for path, noise in ((False, seed), (True, seed), (False, seed + 1)):
                tell(events.Measuring(done, total))
                made.append(self.retake(rendition, spec, replace(asked, seed=noise), stop, second_path=path))
                done += 1
            floors.append(self.distance(made[1], made[0])[0].mean_lpips)
            ceilings.append(self.distance(made[2], made[0])[0].mean_lpips)
        note = (
            f"Mean LPIPS over {len(prompts)} prompt{'s' * (len(prompts) > 1)} in bf16 on this device. Floor: "
            f"{self.paths(spec, asked)}, same noise. Ceiling: seed {seed} against seed {seed + 1}."
        )
        return Ruler(floor=fmean(floors), ceiling=fmean(ceilings), note=note)

    def retake(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        stop: Callable[[], bool],
        second_path: bool = False,
    ) -> Made:
        """The request once more in bf16, untimed; by `second_path` with other kernels as legitimate (see `paths`).

        Raises:
            CancelledRun: `stop` said so.
        """
        if self.mode(REFERENCE, spec, request) != compilation.EAGER and not second_path:
            self.warm(rendition, spec, request, lambda _: None, stop)
        return self._retake(rendition, spec, request, stop, second_path)

    def _retake(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        stop: Callable[[], bool],
        second_path: bool,
    ) -> Made:
        transformer = rendition.pipeline.transformer
        quiet = Progress(REFERENCE, request.num_inference_steps, lambda _: None, stop)
        if self.mode(REFERENCE, spec, request) == compilation.EAGER:
            transformer.set_attention_backend(FLOOR_ATTENTION if second_path else ATTENTION)
        elif second_path:
            rendition.blocks.use(compilation.EAGER)
        try:
            return finished(rendition.pipeline, spec, call(rendition.pipeline, spec, request, request.seed, quiet))
        finally:
            transformer.set_attention_backend(ATTENTION)

    def paths(self, spec: ModelSpec, request: CompareRequest) -> str:
        """The two paths of the noise floor, in words."""
        eager = self.mode(REFERENCE, spec, request) == compilation.EAGER
        return "fused against unfused attention" if eager else "compiled against eager blocks"

    def _ran(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        warm: compilation.WarmUp,
        recompiled: int,
        not_numbers: int,
    ) -> dict[str, str]:
        """What really ran, label -> words."""
        support, layers = rendition.support, rendition.layers
        linears = layers.quantized + layers.skipped + layers.left
        mode = self.mode(support.precision, spec, request)
        if mode == compilation.EAGER:
            compiled = "off (eager), for every precision"
            warm_up = "a warm-up step"
        else:
            recorded = ", one CUDA graph a step" if mode == compilation.GRAPHS else ""
            compiled = (
                f"repeated blocks, fullgraph{recorded}, settings of engine/fusion.py; {warm.graphs} graphs compiled in "
                f"a first call of {warm.seconds:.1f} s, {recompiled} in the timed one"
            )
            warm_up = f"{rendition.warm_up_steps(mode)} warm-up steps"
        spoilt = f"{not_numbers} values are not numbers and are shown as 0: do not trust this output"
        return (
            {
                "Device": self.machine.name,
                "Weights": loading.described(spec, self.source),
                "Execution": f"{support.execution}: {support.reason}",
                "Linear layers": (
                    f"{layers.quantized} of {linears} quantized, {layers.skipped} skipped by the recipe, "
                    f"{layers.left} left in bf16 for their shape"
                ),
                "Prompt": read(rendition.pipeline, spec, request.prompt),
                "Recipe": f"{request.recipe}: {recipes.recipe(spec.family, request.recipe).summary}",
                "GEMM": support.gemm,
                "Attention": f"PyTorch scaled_dot_product_attention in bf16 (diffusers backend {ATTENTION!r})",
                "Compile": compiled,
                "Text encoders and VAE": "bf16, shared by all precisions",
                "Residency": self._where(_key(spec, support.precision, request.recipe)),
                "Scheduler": f"{type(rendition.pipeline.scheduler).__name__}, {request.num_inference_steps} steps",
                "Noise": f"CPU generator, seed {request.seed}, the same for every precision",
                "Timing": (
                    "not timed: previews were drawn between the steps"
                    if request.previews
                    else f"one pipeline call between device synchronisations, after {warm_up} of the same shape"
                ),
                "Memory": (
                    "weights as stored, plus the peak that the warm-up, with decoding, allocates"
                    + (" through PyTorch's CPU allocator" if self.device.type == "cpu" else " on the device")
                ),
            }
            | ({"Damage": spoilt} if not_numbers else {})
            | _activations(rendition)
        )

    def _where(self, key: residency.Key) -> str:
        """Where weights are while a precision runs, in words."""
        if self.device.type == "cpu":
            return "all weights in host memory, which is the device's own"
        said = "denoiser, text encoders and VAE on the device before the clock started"
        if key in self._arrived:
            gigabytes, seconds = self._arrived[key]
            said += f" (denoiser back from pinned host memory, {gigabytes:.1f} GB in {seconds:.2f} s, before warm-up)"
        else:
            said += " (not moved since loading)"
        others = [part for part in self._shelf.parts if part.key not in (key, residency.shared_key(key[0]))]
        for place, words in ((residency.DEVICE, "also there"), (residency.HOST, "waiting in pinned host memory")):
            there = [f"{_part_name(p.key)}, {p.gigabytes:.1f} GB" for p in others if p.place == place]
            said += f"; {words}: {'; '.join(there)}" if there else ""
        return said


def _activations(rendition: Rendition) -> dict[str, str]:
    steps = tuned.in_words(rendition.weight_only_steps)
    return (
        {"Activations": f"bf16 in {steps}, where NVFP4 weights are unpacked; quantized in all others"} if steps else {}
    )


def _key(spec: ModelSpec, name: str, recipe: str) -> residency.Key:
    """Of a model's denoiser in one precision: bf16 has no recipe."""
    return (spec.id, name, recipe if name != REFERENCE else "")


def _part_name(key: residency.Key) -> str:
    """Weights in words."""
    if key == residency.shared_key(key[0]):
        return f"text encoders and VAE of {key[0]}"
    return " ".join(filter(None, key))


def _modules(components: Mapping[str, object]) -> list[torch.nn.Module]:
    """Those components that have weights."""
    return [component for component in components.values() if isinstance(component, torch.nn.Module)]


def keep_maps(maps: Sequence[Tensor], generation: Generation) -> tuple[LpipsMap, ...]:
    """Write LPIPS maps, one a picture or clip, beside its file.

    Raises:
        OutputError: they cannot be written.
    """
    kept = []
    for each, made in zip(maps, generation.files, strict=True):
        file = Path(made).with_name(f"{Path(made).stem}-lpips.png")
        kept.append(LpipsMap(file=str(file), top=media.save_map(each, file)))
    return tuple(kept)


class RulerShelf:
    """Rulers measured on this machine, in one JSON file below the user's cache folder ($TWINFRAME_CACHE).

    Losing the file costs a few seconds, so one that cannot be read or written is done without.
    """

    def __init__(self) -> None:
        self._file = cache_folder() / "rulers.json"
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
