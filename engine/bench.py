"""Speed and memory of a model's precisions, against the seed post's method and the bare pipeline, as JSON.

One run measures everything it compares in one process, in turns (A B A B), so that a slow minute hits all sides
alike. Random weights serve as well as real ones: what the model makes is only compared between methods. An emulated
precision is never timed: its rows carry memory alone.

Methods: `engine` is what a comparison does; `bare` is the same pipeline called without the engine around it, for the
engine's own cost; `seed` is the post's method, torchao's configurations with their defaults, `quantize_` and
`compile_repeated_blocks(fullgraph=True)`, everything else as it is by default.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean, median
from types import MappingProxyType

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4DynamicActivationNVFP4WeightConfig
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
from torchao.quantization.quantize_.common import KernelPreference

from engine import compilation, events, loading, profile, recipes, residency, timing
from engine.catalog import ModelSpec
from engine.compare import Studio, versions
from engine.errors import RequestError, UnsupportedError
from engine.files import write_whole
from engine.holdings import Rendition
from engine.pipeline import Made, Progress, call, finished
from engine.request import CompareRequest
from engine.results import Latency
from engine.several import driving

log = logging.getLogger(__name__)

METHODS = ("engine", "seed", "bare")
TOGETHER = 0.8
"""Denoisers stay in memory, to be timed in turns, if with text encoders, VAE and the largest batch's run they fill no
more of it: all of them, or else those of one precision."""

SEED_CONFIGS: Mapping[str, Callable[[], AOBaseConfig]] = MappingProxyType(
    {
        "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
        "mxfp8": lambda: MXDynamicActivationMXWeightConfig(
            activation_dtype=torch.float8_e4m3fn,
            weight_dtype=torch.float8_e4m3fn,
            kernel_preference=KernelPreference.AUTO,
        ),
        "nvfp4": lambda: NVFP4DynamicActivationNVFP4WeightConfig(
            use_dynamic_per_tensor_scale=True, use_triton_kernel=True
        ),
    }
)
"""The post's two, and torchao's FP8 in the same manner."""
SEED_OPTIONS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # What torchao's FP8 configuration sets for the whole process unless told not to (its
        # `recommended_inductor_config_setter`), as options of this compile alone, so that the others keep theirs.
        "fp8": {
            "coordinate_descent_tuning": True,
            "coordinate_descent_check_all_directions": True,
            "force_fuse_int_mm_with_mul": True,
            "fx_graph_cache": True,
            "triton.unique_kernel_names": True,
        }
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and for how long.

    Raises:
        RequestError: a method that does not exist, or nothing to measure.
    """

    precisions: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    methods: tuple[str, ...] = ("engine",)
    repeats: int = 5
    recipe: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    time_limit: float | None = None
    """Seconds after which no further batch size and no further repeat is begun; the first of each always is."""
    profile: bool = False
    """Also take a denoising step apart (engine/profile.py), on CUDA devices."""

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise RequestError(
                f"There is no method {', '.join(unknown) or '(none)'}: choose from {', '.join(METHODS)}."
            )
        if self.repeats < 1:
            raise RequestError(f"repeats is {self.repeats}: measure at least once.")
        if not self.batch_sizes:
            raise RequestError("No batch size was given: try 1.")


@dataclass
class _Lane:
    """One denoiser by one method, at one batch size: a row of the result."""

    precision: str
    method: str
    execution: str
    pipeline: DiffusionPipeline
    weights: float
    """GB of the whole pipeline."""
    load_s: float
    """Seconds until the denoiser was there, the first one with text encoders and VAE."""
    blocks: compilation.Blocks
    rendition: Rendition | None = None
    """The engine's; the seed's method has none."""
    mode: str = compilation.EAGER
    error: str | None = None
    first_call_s: float | None = None
    graphs: int = 0
    recompiled: int = 0
    kept: int = 0
    """Bytes that stay allocated after the warm-up, such as those of CUDA graphs."""
    peak: int = 0
    """Most bytes beyond the weights that a timed call had allocated; `kept` is part of it."""
    warm_peak: int = 0
    """The same for the warm-up, in which CUDA graphs are captured."""
    reserved: int = 0
    latencies: list[Latency] = field(default_factory=list)
    made: Made | None = None
    """By the last timed call."""
    from_seed: dict[str, float] | None = None
    """Mean LPIPS and PSNR of what the engine made from what the seed's method made of the same noise."""


def run(
    spec: ModelSpec,
    settings: Settings,
    device: str,
    source: loading.Source,
    out: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Measure, and write `out` anew after every call, so that a run that is killed leaves what it has measured.

    Returns:
        The JSON object that `out` holds in the end (README, "Command line").

    Raises:
        RequestError: a setting that the model does not allow.
        UnsupportedError, LoadError, OutputError: in one sentence.
    """
    began = time.monotonic()
    requests = [_request(spec, settings, size) for size in settings.batch_sizes]
    studio = Studio(device, source)
    with driving(studio.device):
        bench = _Bench(spec, settings, studio, requests[0].recipe, say)
        groups = bench.groups()
        result = {
            "device": bench.studio.machine.name,
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": spec.id,
            "weights": "random" if source.random else "checkpoint",
            "settings": _settings(spec, settings, requests[0], groups),
            "rows": [],
            "switches": [],
            "profiles": [],
        }
        _write(result, out)
        for group in groups:
            for request in requests:
                passed = settings.time_limit is not None and time.monotonic() - began > settings.time_limit
                if passed and result["rows"]:
                    result["stopped"] = f"after {time.monotonic() - began:.0f} s: the time limit was reached"
                    _write(result, out)
                    say(result["stopped"])
                    return result
                deadline = None if settings.time_limit is None else began + settings.time_limit
                measured = result["rows"]
                for rows in bench.rows(group, request, deadline):
                    result["rows"] = measured + rows
                    _write(result, out)
                if settings.profile:
                    result["profiles"] += bench.profiles(request)
                    _write(result, out)
                for row in rows:
                    say(line(row))
            result["switches"] += bench.switches(group)
            _write(result, out)
            bench.empty()
    return result


class _Bench:
    """One run's model on one device."""

    def __init__(self, spec: ModelSpec, settings: Settings, studio: Studio, recipe: str, say: Callable[[str], None]):
        self.spec, self.settings, self.studio, self.recipe, self.say = spec, settings, studio, recipe, say
        self.device = studio.device
        self._seeded: dict[str, _Lane] = {}
        self._load_s: dict[str, float] = {}
        self._lanes: list[_Lane] = []
        """Those measured last."""

    def groups(self) -> list[list[tuple[str, str]]]:
        """(precision, method) pairs that are measured in turns: all, or where memory is short those of a precision, or
        one denoiser after the other."""
        for name in self.settings.precisions:
            if self.studio.support[name].execution == "unavailable":
                raise UnsupportedError(self.studio.support[name].reason)
        groups, gigabytes = [], {}
        empty = loading.empty_transformer(self.spec)
        for name in self.settings.precisions:
            native = self.studio.support[name].execution == "native"
            methods = [m for m in METHODS if m in self.settings.methods] if native else ["engine"]
            groups.append([(name, method) for method in methods])
            plan = recipes.plan(empty, recipes.recipe(self.spec.family, self.recipe), name)
            copies = ("seed" in methods) + bool({"engine", "bare"} & set(methods))  # `bare` runs the engine's denoiser
            gigabytes[name] = copies * plan.quantized_bytes / timing.GB
        shared = self.spec.memory_gb.shared if self.spec.memory_gb is not None else 0.0
        largest = _request(self.spec, self.settings, max(self.settings.batch_sizes))
        room = TOGETHER * _memory(self.device) - shared - residency.run_memory(self.spec, largest)
        if sum(gigabytes.values()) <= room:
            return [[pair for group in groups for pair in group]]
        split = []
        for group in groups:
            fits = gigabytes[group[0][0]] <= room
            split += [group] if fits else [[p for p in group if (p[1] == "seed") == seed] for seed in (False, True)]
        return [group for group in split if group]

    def rows(
        self, group: Sequence[tuple[str, str]], request: CompareRequest, deadline: float | None
    ) -> Iterator[list[dict]]:
        """Measure a group of lanes at one batch size; gives its rows again and again, each time with more in them."""
        # Each batch size compiles from nothing, as in a process of its own: none gets kernels of symbolic shape
        # because another came before it.
        torch.compiler.reset()
        lanes = self._lanes = [self._lane(name, method) for name, method in group]
        for lane in lanes:
            self.say(f"{lane.precision} {lane.method}, batch {request.batch_size}: first call")
            self._guarded(lane, partial(self._warm_up, lane, request))
            yield [self._row(lane, request) for lane in lanes]
        timed = [lane for lane in lanes if lane.execution == "native"]
        for lane in timed:  # the allocator has been emptied for each lane's own figure: fill it again, untimed
            self._guarded(lane, partial(self._few, lane, request))
        for done in range(self.settings.repeats):
            if done and deadline is not None and time.monotonic() > deadline:
                break
            for lane in (lane for lane in timed if lane.error is None):
                turn = f"{done + 1} of {self.settings.repeats}"
                self.say(f"{lane.precision} {lane.method}, batch {request.batch_size}: {turn}")
                self._guarded(lane, partial(self._time, lane, request))
                yield [self._row(lane, request) for lane in lanes]
        for lane in timed:
            seed = next((other for other in timed if (other.precision, other.method) == (lane.precision, "seed")), None)
            if lane.method == "engine" and lane.made is not None and seed is not None and seed.made is not None:
                found, _ = self.studio.distance(lane.made, seed.made)
                lane.from_seed = {"lpips": found.mean_lpips, "psnr_db": fmean(found.psnr_db)}
        yield [self._row(lane, request) for lane in lanes]

    def switches(self, group: Sequence[tuple[str, str]]) -> list[dict]:
        """What it takes to send each of the engine's denoisers to host memory and back; nothing on a CPU, which has
        no other memory."""
        if self.device.type == "cpu":
            return []
        names = [name for name, method in group if method == "engine"]
        found = [(name, self.studio.switch(self.spec, name, self.recipe)) for name in names]
        return [{"precision": name} | took for name, took in found if took is not None]

    def empty(self) -> None:
        """Drop the group's denoisers; text encoders and VAE stay."""
        torch.compiler.reset()
        self._seeded.clear()
        self._load_s.clear()
        self._lanes.clear()
        for name in self.settings.precisions:
            self.studio.drop(self.spec, name, self.recipe)

    def _lane(self, name: str, method: str) -> _Lane:
        support = self.studio.support[name]
        if method == "seed":
            if name not in self._seeded:
                self._seeded[name] = self._seed_lane(name)
            return replace(self._seeded[name], latencies=[])
        began = time.monotonic()
        rendition = self.studio.rendition(self.spec, name, self.recipe, self._loading)
        self._load_s.setdefault(name, time.monotonic() - began)
        return _Lane(
            precision=name,
            method=method,
            execution=support.execution,
            pipeline=rendition.pipeline,
            weights=rendition.weights,
            load_s=self._load_s[name],
            blocks=rendition.blocks,
            rendition=rendition,
        )

    def _loading(self, event: events.Event) -> None:
        if isinstance(event, events.Loading):
            self.say(f"loading {event.what}")

    def _seed_lane(self, name: str) -> _Lane:
        spec, studio = self.spec, self.studio
        began = time.monotonic()
        plan = recipes.plan(loading.empty_transformer(spec), recipes.recipe(spec.family, spec.recipes[0]), name)

        def place(layer: str, module: nn.Module) -> None:
            if layer in plan.names:
                quantize_(
                    nn.ModuleDict({"layer": module}), SEED_CONFIGS[name](), filter_fn=lambda _, fqn: fqn == "layer"
                )

        transformer = loading.load_transformer(spec, self.device, studio.source, place=place)
        pipeline = loading.assemble(spec, studio.shared(spec), transformer)
        modules = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
        return _Lane(
            precision=name,
            method="seed",
            execution=studio.support[name].execution,
            pipeline=pipeline,
            weights=timing.weight_bytes(*modules) / timing.GB,
            load_s=time.monotonic() - began,
            blocks=compilation.Blocks(transformer, dynamic=None, options=SEED_OPTIONS.get(name, {})),
        )

    def _guarded(self, lane: _Lane, step: Callable[[], None]) -> None:
        """A lane that fails ends with its reason in its row; the others go on."""
        if lane.error is not None:
            return
        try:
            step()
        except Exception as error:  # out of memory, or it cannot be compiled: the log has all, the row its first line
            log.exception("%s by %s failed", lane.precision, lane.method)
            lane.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            timing.free(self.device)

    def _warm_up(self, lane: _Lane, request: CompareRequest) -> None:
        native = lane.execution == "native"
        lane.mode = compilation.mode(request.batch_size, native, self.device)
        if lane.method == "seed":  # the post compiles, come what may
            lane.mode = compilation.DEFAULT
        timing.free(self.device)
        graphs, began = compilation.graphs_compiled(), timing.now(self.device)
        if self.device.type == "cuda":
            before, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._few(lane, request)
            lane.first_call_s = timing.now(self.device) - began
            lane.kept = torch.cuda.memory_allocated(self.device) - before
            lane.warm_peak = torch.cuda.max_memory_allocated(self.device) - before
            lane.reserved = torch.cuda.max_memory_reserved(self.device) - reserved
        else:
            self._few(lane, request)
            lane.first_call_s = timing.now(self.device) - began
            lane.warm_peak = timing.added_bytes(lambda: self._few(lane, request), self.device)
        lane.peak = lane.warm_peak if not native else 0
        lane.graphs = compilation.graphs_compiled() - graphs

    def _time(self, lane: _Lane, request: CompareRequest) -> None:
        graphs, cuda = compilation.graphs_compiled(), self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        if lane.method == "bare":
            lane.blocks.use(lane.mode)
            began = timing.now(self.device)
            steps = lane.rendition.weight_only(request.num_inference_steps)
            output = call(lane.pipeline, self.spec, request, request.seed, steps=steps)
            lane.latencies.append(Latency(text=0, denoise=0, decode=0, total=timing.now(self.device) - began))
        else:
            with timing.stages(lane.pipeline, self.device) as clock:
                output = self._call(lane, request)
            lane.latencies.append(clock.latency)
        lane.made = finished(lane.pipeline, self.spec, output)
        if cuda:
            lane.peak = max(lane.peak, lane.kept + torch.cuda.max_memory_allocated(self.device) - before)
        else:
            lane.peak = lane.warm_peak
        lane.recompiled += compilation.graphs_compiled() - graphs

    def _few(self, lane: _Lane, request: CompareRequest) -> object:
        """As few steps as warm everything up."""
        rendition = lane.rendition
        count = rendition.warm_up_steps(lane.mode) if rendition else compilation.WARM_UP_STEPS[lane.mode]
        return self._call(lane, replace(request, num_inference_steps=count), warming=True)

    def _call(self, lane: _Lane, request: CompareRequest, warming: bool = False) -> object:
        lane.blocks.use(lane.mode)
        progress = Progress(lane.precision, lambda _: None, lambda: False)
        steps = lane.rendition.weight_only(request.num_inference_steps, warming) if lane.rendition else None
        return call(lane.pipeline, self.spec, request, request.seed, progress, steps)

    def profiles(self, request: CompareRequest) -> list[dict]:
        """The last group's denoisers, one step each taken apart; nothing on a CPU."""
        lanes = [lane for lane in self._lanes if lane.error is None and lane.method != "bare" and lane.latencies]
        return [self._profile(lane, request) for lane in lanes] if self.device.type == "cuda" else []

    def _profile(self, lane: _Lane, request: CompareRequest) -> dict:
        self.say(f"{lane.precision} {lane.method}, batch {request.batch_size}: profile")
        denoiser, given = lane.pipeline.transformer, []
        lane.blocks.use(compilation.EAGER)
        hook = denoiser.register_forward_pre_hook(lambda _, *call: given.append(call), with_kwargs=True)
        with profile.counted(denoiser) as work:
            call(lane.pipeline, self.spec, replace(request, num_inference_steps=1), request.seed)
        hook.remove()
        lane.blocks.use(lane.mode)

        def step() -> None:
            for args, kwargs in given:  # guidance may call twice
                denoiser(*args, **kwargs)

        about = {"precision": lane.precision, "method": lane.method, "batch_size": request.batch_size}
        return about | {"floor": profile.floor(work, self.device)} | profile.table(step, self.device)

    def _row(self, lane: _Lane, request: CompareRequest) -> dict:
        latency, step_ms = None, None
        if lane.latencies:
            totals = [entry.total for entry in lane.latencies]
            low, high = np.percentile(totals, (10, 90))
            latency = {"median": median(totals), "p10": float(low), "p90": float(high)}
            latency |= dict.fromkeys(("text", "denoise", "decode"))
            if lane.method != "bare":  # whose call is not taken apart
                for stage in ("text", "denoise", "decode"):
                    latency[stage] = median(getattr(entry, stage) for entry in lane.latencies)
                step_ms = 1000 * latency["denoise"] / request.num_inference_steps
        ran = lane.first_call_s is not None
        on_cuda = self.device.type == "cuda" and ran
        return {
            "precision": lane.precision,
            "batch_size": request.batch_size,
            "method": lane.method,
            "execution": lane.execution,
            "latency_s": latency,
            "step_ms": step_ms,
            "memory_gb": {
                "weights": lane.weights,
                "peak_allocated": lane.weights + (lane.peak or lane.warm_peak) / timing.GB if ran else None,
                "warm_up_peak_allocated": lane.weights + lane.warm_peak / timing.GB if ran else None,
                "peak_reserved": lane.weights + max(lane.reserved, lane.warm_peak) / timing.GB if on_cuda else None,
            },
            "load_s": lane.load_s,
            "first_call_s": lane.first_call_s if lane.execution == "native" else None,
            "compile": {"mode": lane.mode, "graphs": lane.graphs, "recompiled_in_timed_calls": lane.recompiled},
            "repeats": len(lane.latencies),
            "from_seed": lane.from_seed,
            "error": lane.error,
        }


def _request(spec: ModelSpec, settings: Settings, batch_size: int) -> CompareRequest:
    return CompareRequest.create(
        spec.examples[0],
        model=spec.id,
        precisions=settings.precisions,
        num_inference_steps=settings.steps,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        batch_size=batch_size,
        recipe=settings.recipe,
    )


def _settings(
    spec: ModelSpec, settings: Settings, request: CompareRequest, groups: Sequence[Sequence[tuple[str, str]]]
) -> dict:
    asked = request.to_json()
    for name in ("model", "precisions", "batch_size", "previews"):
        del asked[name]
    return asked | {
        "frame_rate": spec.defaults.frame_rate or None,
        "call": dict(spec.call),
        "precisions": list(settings.precisions),
        "batch_sizes": list(settings.batch_sizes),
        "methods": list(settings.methods),
        "repeats": settings.repeats,
        "order": (
            "all precisions and methods in memory at once, timed in turns (A B A B)"
            if len(groups) == 1
            else "one group after the other, each in turns (A B A B): "
            + "; ".join(", ".join(" ".join(pair) for pair in group) for group in groups)
        ),
        "warm_up_steps": dict(compilation.WARM_UP_STEPS),
        "memory": (
            "GB of 1e9 bytes: all weights of one pipeline, text encoders and VAE resident, plus what its own call "
            "allocates beyond what was there; peak_reserved is the allocator's growth in the warm-up"
        ),
        "seed_method": (
            "torchao's configurations, quantize_ by the post's rules, compile_repeated_blocks(fullgraph=True), FP8 "
            "with torchao's default Inductor settings; text encoders, VAE and attention backend as in the engine"
        ),
    }


def _memory(device: torch.device) -> float:
    """GB that the benchmark may fill."""
    room, _ = residency.rooms(device)
    return min(room.total, residency.limit()) if device.type == "cuda" else room.total


def _write(result: dict, out: Path) -> None:
    write_whole(out, (json.dumps(result, indent=1) + "\n").encode())


HEADER = f"{'precision':9} {'method':6} {'batch':>5} {'seconds':>9} {'ms/step':>9} {'weights':>8} {'peak GB':>8}  note"


def line(row: Mapping) -> str:
    """A row as one line of a table below `HEADER`."""
    latency, memory = row["latency_s"], row["memory_gb"]
    seconds = f"{latency['median']:.3f}" if latency else "-"
    step = f"{row['step_ms']:.1f}" if row["step_ms"] else "-"
    peak = f"{memory['peak_allocated']:.2f}" if memory["peak_allocated"] else "-"
    note = row["error"] or ("emulated: not timed" if row["execution"] == "emulated" else "")
    return (
        f"{row['precision']:9} {row['method']:6} {row['batch_size']:5} {seconds:>9} {step:>9} {memory['weights']:8.2f} "
        f"{peak:>8}  {note}"
    ).rstrip()
