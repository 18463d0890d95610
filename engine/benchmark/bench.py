"""Speed and memory of a model's columns, against the post's method and the bare pipeline, as JSON.

One run measures everything it compares in one process, in turns (A B A B), so that a slow minute hits all sides
alike. Random weights serve as well as real ones: what the model makes is only compared between methods. An emulated
precision is never timed, nor is one whose denoiser is streamed: their rows carry memory alone.

Methods are those of engine/benchmark/methods.py. The post's two have torchao's configurations with their defaults, put
in by `quantize_`, and everything else as it is by default; FP8, which the post has not, is torchao's configuration in
the post's manner. INT8 is none of theirs: compiled, torchao's has no product of fewer than 17 rows, as modulations
are. A timed call in which something was compiled or recorded is left out and made again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4DynamicActivationNVFP4WeightConfig
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
from torchao.quantization.quantize_.common import KernelPreference

from engine import events
from engine.benchmark import methods, profile
from engine.benchmark.methods import BARE, ENGINE, METHODS, POST, POST_DEFAULT, POSTS
from engine.catalog import ModelSpec
from engine.columns import FP8_ATTENTION, Column
from engine.compiler import compilation
from engine.environment import versions
from engine.errors import NoRoomError, RequestError, UnsupportedError
from engine.files import check_target, writable, write_whole
from engine.formats import FP8, LABELS, MXFP8, NVFP4, QUANTIZED, REFERENCE
from engine.metrics import distances
from engine.metrics.statistics import spread
from engine.quantization import recipes
from engine.request import CompareRequest
from engine.results import DENOISER, Latency
from engine.runtime import timing
from engine.runtime.multi_device import driving, studio_on
from engine.runtime.pipeline import Made, Progress, call, finished
from engine.runtime.residents import Rendition, key_of
from engine.runtime.studio import Studio
from engine.weights import loading, residency

log = logging.getLogger(__name__)

Pair = tuple[Column, str]
"""A column and a method: what a row measures."""
SPOILT = 3
"""Timed calls in a row that may be left out, because something was compiled or recorded in them, before a lane is given
up as not comparable."""
TOGETHER = 0.8
"""Denoisers stay in memory, to be timed in turns, if with text encoders, VAE and the largest batch's run they fill no
more of it: all of them, or else those of one precision."""

POST_CONFIGS: Mapping[str, Callable[[], AOBaseConfig]] = MappingProxyType(
    {
        FP8.id: lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
        MXFP8.id: lambda: MXDynamicActivationMXWeightConfig(
            activation_dtype=torch.float8_e4m3fn,
            weight_dtype=torch.float8_e4m3fn,
            kernel_preference=KernelPreference.AUTO,
        ),
        NVFP4.id: lambda: NVFP4DynamicActivationNVFP4WeightConfig(
            use_dynamic_per_tensor_scale=True, use_triton_kernel=True
        ),
    }
)
"""The post's two, and torchao's FP8 in the same manner."""
POST_OPTIONS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # What torchao's FP8 configuration sets for the whole process unless told not to (its
        # `recommended_inductor_config_setter`), as options of this compile alone, so that the others keep theirs.
        FP8.id: {
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
        RequestError: a method that does not exist or has not a precision, or nothing to measure.
    """

    precisions: tuple[str, ...]
    """Columns, as somebody wrote them."""
    batch_sizes: tuple[int, ...]
    methods: tuple[str, ...] = (ENGINE,)
    repeats: int = 5
    recipe: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    time_limit: float | None = None
    """Seconds after which no further batch size and no further repeat is begun; the first of each always is."""
    profile: bool = False
    """Also take a denoising step apart (engine/benchmark/profile.py), on CUDA devices."""

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise RequestError(
                f"There is no method {', '.join(unknown) or '(none)'}: choose from {', '.join(METHODS)}."
            )
        without = [LABELS[name] for name in QUANTIZED if name in self.precisions and name not in POST_CONFIGS]
        if without and (by := [method for method in self.methods if method in POSTS]):
            raise RequestError(
                f"The post has no {' and no '.join(without)}, so there is none by the method {' or '.join(by)}: "
                "leave out one or the other."
            )
        if self.repeats < 1:
            raise RequestError(f"repeats is {self.repeats}: measure at least once.")
        if not self.batch_sizes:
            raise RequestError("No batch size was given: try 1.")


@dataclass
class _Lane:
    """One denoiser by one method, at one batch size: a row of the result."""

    column: Column
    name: str
    """The column's, as the request writes it."""
    method: str
    execution: str
    pipeline: DiffusionPipeline
    weights: float
    """GB of the whole pipeline."""
    load_s: float
    """Seconds until the denoiser was there, the first one with text encoders and VAE."""
    blocks: compilation.Blocks
    mode: str
    rendition: Rendition | None = None
    """The engine's; the post's methods have none."""
    also: tuple[str, ...] = ()
    """Methods that are this one at this batch size."""
    streamed: tuple[str, ...] = ()
    """What comes from host memory a block at a time; with the denoiser among it, the lane is not timed."""
    error: str | None = None
    first_call_s: float | None = None
    done: compilation.Done = field(default_factory=compilation.Done)
    """In the warm-up."""
    replayed: int = 0
    """Steps of the last timed call that were replays of a recorded step."""
    gave_up: int = 0
    """Compiled functions that Inductor would not record."""
    spoilt: int = 0
    """Timed calls left out, because something was compiled or recorded in them."""
    kept: int = 0
    """Bytes that stay taken after the warm-up, such as those of CUDA graphs."""
    peak: int = 0
    """Most bytes beyond the weights that a timed call needed; `kept` is part of it."""
    warm_peak: int = 0
    """The same for the warm-up, in which CUDA graphs are captured."""
    reserved: int = 0
    """Most bytes beyond the weights that the allocator took from the device, in the warm-up and in timed calls."""
    latencies: list[Latency] = field(default_factory=list)
    made: Made | None = None
    """By the last timed call."""
    from_post: dict[str, float | None] | None = None
    """Mean LPIPS and PSNR of what the engine made from what the post's method made of the same noise."""

    @property
    def precision(self) -> str:
        return self.column.format

    @property
    def is_timed(self) -> bool:
        return self.execution == "native" and DENOISER not in self.streamed

    def is_method(self, precision: str, method: str) -> bool:
        return self.precision == precision and method in (self.method, *self.also)


def run(
    spec: ModelSpec,
    settings: Settings,
    device: str,
    source: loading.Source,
    out: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure, and write `out` anew after every call, so that a run that is killed leaves what it has measured.

    Returns:
        The JSON object that `out` holds in the end (assets/docs/cli.md).

    Raises:
        RequestError: a setting that the model does not allow.
        UnsupportedError, LoadError, OutputError: in one sentence.
    """
    check_target(out)
    if ENGINE in settings.methods and set(POSTS) & {*settings.methods}:
        distances.require()
    began = time.monotonic()
    requests = [_request(spec, settings, size) for size in settings.batch_sizes]
    studio = studio_on(device, source)
    if studio.machine.cards > 1 and (alone := [method for method in settings.methods if method in POSTS]):
        raise RequestError(f"The method {' and '.join(alone)} runs on one card: leave it out, or name one device.")
    with closing(studio), driving(studio.device):
        bench = _Bench(spec, settings, studio, say)
        groups = bench.groups()
        result: dict[str, Any] = {
            "device": bench.studio.machine.label,
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": spec.id,
            "weights": "random" if source.random else "checkpoint",
            "settings": _settings(spec, settings, requests[0], groups),
            "rows": [],
            "switches": [],
            "profiles": [],
        }
        writable(out.parent)
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

    def __init__(self, spec: ModelSpec, settings: Settings, studio: Studio, say: Callable[[str], None]):
        self.spec, self.settings, self.studio, self.say = spec, settings, studio, say
        self.recipe = _request(spec, settings, settings.batch_sizes[0]).recipe
        self.columns = tuple(dict.fromkeys(Column.parse(text, spec, self.recipe) for text in settings.precisions))
        """In the order in which they were asked for."""
        if any(column.fp8_attention for column in self.columns):
            raise RequestError(
                f"FP8 attention is emulated, so that its time says nothing: leave out {FP8_ATTENTION}; evaluate says "
                "what it costs in LPIPS."
            )
        self.device = studio.device
        self._posts: dict[str, tuple[DiffusionPipeline, float]] = {}
        """Pipelines with the post's quantized denoisers, and the seconds that loading took."""
        self._load_s: dict[Column, float] = {}
        self._used: compilation.Blocks | None = None
        """What set the blocks last: several lanes may share a denoiser."""
        self._kept: dict[object, int] = {}
        """Bytes that CUDA graphs keep, by whose they are: of `Blocks`, or Inductor's one pool for graphs of blocks."""
        self._lanes: list[_Lane] = []
        """Those measured last."""

    def groups(self) -> list[list[Pair]]:
        """Pairs that are measured in turns: all, or where memory is short those of a column, or one denoiser after the
        other. The post's methods, which have one recipe, are measured with the first column of a format."""
        for column in self.columns:
            if self.studio.support[column.format].execution == "unavailable":
                raise UnsupportedError(self.studio.support[column.format].reason)
        groups, gigabytes = [], {}
        empty = loading.blueprint(self.spec)
        first = {column.format: column for column in reversed(self.columns)}
        for column in self.columns:
            plan = recipes.plan_of(empty, self.spec, column)
            self.studio.prove(plan)
            native = self.studio.support[column.format].execution == "native"
            asked = [m for m in METHODS if m in self.settings.methods] if native else [ENGINE]
            if first[column.format] != column:
                asked = [m for m in asked if m not in POSTS]
            groups.append([(column, method) for method in asked])
            gigabytes[column] = plan.quantized_bytes / timing.GB
            if len({self._denoiser(column, method) for method in asked}) > 1:
                shares = ENGINE in asked and column.recipe == self.spec.recipes[0]
                own = sum(layer.bytes for layer in plan.layers if layer.quantized) if shares else plan.quantized_bytes
                gigabytes[column] += own / timing.GB
        groups = [group for group in groups if group]
        shared = self.spec.memory_gb.shared if self.spec.memory_gb is not None else 0.0
        largest = _request(self.spec, self.settings, max(self.settings.batch_sizes))
        room = TOGETHER * _memory(self.device) - shared - residency.run_memory(self.spec, largest)
        if sum(gigabytes.values()) <= room:
            return [[pair for group in groups for pair in group]]
        split = []
        for group in groups:
            if gigabytes[group[0][0]] <= room:
                split.append(group)
            else:
                split += [[p for p in group if self._denoiser(*p) == of] for of in (ENGINE, POST)]
        return [group for group in split if group]

    @staticmethod
    def _denoiser(column: Column, method: str) -> str:
        """Whose denoiser a method runs: in bf16, where nothing is quantized, all run the engine's."""
        return POST if method in POSTS and column.format != REFERENCE else ENGINE

    def rows(
        self, group: Sequence[Pair], request: CompareRequest, deadline: float | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Measure a group of lanes at one batch size; gives its rows again and again, each time with more in them."""
        # Each batch size compiles from nothing, as in a process of its own: none gets kernels of symbolic shape
        # because another came before it.
        torch.compiler.reset()
        self.studio.forget_ends(self.spec.id)
        lanes = self._lanes = [self._lane(*pair, request) for pair in self._different(group, request)]
        for lane in lanes:
            lane.blocks.forget()  # recordings of another batch size would take memory
        self._kept.clear()
        for lane in lanes:
            self.say(f"{lane.name} {lane.method}, batch {request.batch_size}: first call")
            self._guarded(lane, partial(self._warm_up, lane, request))
            yield [self._row(lane, request) for lane in lanes]
        timed = [lane for lane in lanes if lane.is_timed]
        self._compile_ends([lane for lane in timed if lane.error is None], request)
        for lane in timed:  # the allocator has been emptied for each lane's own figure: fill it again, untimed
            self._guarded(lane, partial(self._few, lane, request))
        for done in range(self.settings.repeats):
            if done and deadline is not None and time.monotonic() > deadline:
                break
            for lane in (lane for lane in timed if lane.error is None):
                turn = f"{done + 1} of {self.settings.repeats}"
                self.say(f"{lane.name} {lane.method}, batch {request.batch_size}: {turn}")
                self._guarded(lane, partial(self._time, lane, request))
                yield [self._row(lane, request) for lane in lanes]
        for lane in timed:
            made = [o.made for method in POSTS for o in timed if o.is_method(lane.precision, method) and o.made]
            if lane.method == ENGINE and lane.made is not None and made:
                found, _ = self.studio.distance(lane.made, made[0])
                lane.from_post = {"lpips": found.mean_lpips, "psnr_db": found.mean_psnr_db}
        yield [self._row(lane, request) for lane in lanes]

    def _compile_ends(self, lanes: Sequence[_Lane], request: CompareRequest) -> None:
        """Compile text encoders and VAE, which all lanes share, as an app does once its model is ready."""

        def said(event: events.Event) -> None:
            if isinstance(event, events.CompilingEnds):
                self.say(f"text encoders and VAE, batch {request.batch_size}: piece {event.index} of {event.total}")

        def run(lane: _Lane, few: CompareRequest) -> None:
            self._use(lane)
            self._call(lane, few)
            lane.blocks.settle()

        for lane in lanes[:1]:
            compiling = (self.spec, request, partial(run, lane), said, lambda: False)
            self._guarded(lane, partial(self.studio.compile_ends, *compiling))

    def switches(self, group: Sequence[Pair]) -> list[dict[str, Any]]:
        """What it takes to send each of the engine's denoisers to host memory and back; nothing on a CPU, which has
        no other memory."""
        if self.device.type == "cpu":
            return []
        found = [(column, self.studio.switch(self.spec, column)) for column, method in group if method == ENGINE]
        return [self._said(column) | took for column, took in found if took is not None]

    def empty(self) -> None:
        """Drop the group's denoisers; text encoders and VAE stay."""
        self._rest()
        torch.compiler.reset()
        self.studio.forget_ends(self.spec.id)
        self._posts.clear()
        self._load_s.clear()
        self._lanes.clear()
        for column in self.columns:
            self.studio.drop(self.spec, column)

    def _said(self, column: Column) -> dict[str, str]:
        """A column in JSON."""
        return {"precision": column.format, "column": column.written(self.recipe)}

    def _different(
        self, group: Sequence[Pair], request: CompareRequest
    ) -> Iterator[tuple[Column, str, tuple[str, ...]]]:
        """Column, method and the methods that are the same at this batch size, each measured once."""
        same = not methods.block_graphs(self.spec.id, request.batch_size)
        for column, method in group:
            if same and method == POST and (column, POST_DEFAULT) in group:
                yield column, method, (POST_DEFAULT,)
            elif not same or method != POST_DEFAULT or (column, POST) not in group:
                yield column, method, ()

    def _lane(self, column: Column, method: str, also: tuple[str, ...], request: CompareRequest) -> _Lane:
        self._rest()  # `Blocks` remembers its denoiser's parts as it finds them
        name = column.format
        support, error = self.studio.support[name], None
        rendition = None
        streamed: tuple[str, ...] = ()
        if self._denoiser(column, method) == ENGINE:
            began = time.monotonic()
            rendition = self._rendition(column)
            self._load_s.setdefault(column, time.monotonic() - began)
            pipeline, load_s = rendition.pipeline, self._load_s[column]
            streamed = self.studio.streaming(key_of(self.spec, column))
        else:
            if name not in self._posts:
                beside = self.studio.rendition(self.spec, column, self._loading) if column in self._load_s else None
                self._posts[name] = self._post(name, beside and beside.pipeline.transformer)
            pipeline, load_s = self._posts[name]
        if method in POSTS or rendition is None:
            graphs = method == POST and methods.block_graphs(self.spec.id, request.batch_size)
            rendition, mode = None, compilation.BLOCK_GRAPHS if graphs else compilation.DEFAULT
            blocks = compilation.Blocks(pipeline.transformer, dynamic=None, options=POST_OPTIONS.get(name, {}))
            error = self.studio.machine.no_compile or (support.no_graph if graphs else "") or None
            error = "it does not fit on this device, and only the engine streams" if DENOISER in streamed else error
        else:
            mode = compilation.mode(request.batch_size, support, self.device, self.spec.recordable)
            if mode == compilation.GRAPHS and DENOISER in streamed:
                mode = compilation.DEFAULT
            blocks = rendition.blocks
        modules = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
        return _Lane(
            column=column,
            name=column.written(self.recipe),
            method=method,
            also=also,
            execution=support.execution,
            pipeline=pipeline,
            weights=timing.weight_bytes(*modules) / timing.GB,
            load_s=load_s,
            blocks=blocks,
            mode=mode,
            rendition=rendition,
            streamed=streamed,
            error=error,
        )

    def _rendition(self, column: Column) -> Rendition:
        """Raises NoRoomError: in a sentence that says to measure the columns apart, where there are several."""
        try:
            return self.studio.rendition(self.spec, column, self._loading)
        except NoRoomError as error:
            if len(self.columns) == 1:
                raise
            reason = str(error).partition(": ")[0]
            apart = ", then ".join(f"--precision {other.written(self.recipe)}" for other in self.columns)
            raise NoRoomError(f"{reason}: run the precisions apart, each as a command of its own ({apart}).") from error

    def _loading(self, event: events.Event) -> None:
        if isinstance(event, events.Loading):
            self.say(f"loading {event.what}")

    def _post(self, name: str, beside: nn.Module | None) -> tuple[DiffusionPipeline, float]:
        """The model with its denoiser quantized as the post does it, and the seconds that took.

        Args:
            beside: the engine's denoiser, if it is there; what is equal in both lies in memory once.
        """
        spec, studio = self.spec, self.studio
        self.say(f"loading {spec.name} in {name}, as the post quantizes")
        began = time.monotonic()
        plan = recipes.plan(loading.blueprint(spec), recipes.recipe(spec.family, spec.recipes[0]), name)

        def place(layer: str, module: nn.Module) -> None:
            if layer in plan.names:
                exact = module.weight
                quantize_(
                    nn.ModuleDict({"layer": module}), POST_CONFIGS[name](), filter_fn=lambda _, fqn: fqn == "layer"
                )
                exact.data = exact.data.new_empty(0)  # the loader holds it until all are loaded
            if beside is not None:
                _share(module, beside.get_submodule(layer))

        transformer = loading.load_transformer(spec, self.device, studio.source, place=place)
        return loading.assemble(spec, studio.shared(spec), transformer), time.monotonic() - began

    def _use(self, lane: _Lane) -> None:
        """Have the lane's denoiser run as the lane does."""
        if self._used is not lane.blocks:
            self._rest()
        self._used = lane.blocks
        lane.blocks.use(lane.mode)

    def _rest(self) -> None:
        """Leave the denoiser used last as it was found."""
        if self._used is not None:
            self._used.use(compilation.EAGER)
            self._used = None

    def _guarded(self, lane: _Lane, step: Callable[[], object]) -> None:
        """A lane that fails ends with its reason in its row; the others go on."""
        if lane.error is not None:
            return
        try:
            step()
        except Exception as error:  # out of memory, or it cannot be compiled: the log has all, the row its first line
            log.exception("%s by %s failed", lane.name, lane.method)
            lane.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            timing.free(self.device)

    def _warm_up(self, lane: _Lane, request: CompareRequest) -> None:
        timing.free(self.device)
        compilation.forget_sizes()  # as in a process of its own
        self._use(lane)
        before, skipped = compilation.Done.so_far(lane.blocks), compilation.block_graphs_skipped()
        began = timing.now(self.device)
        if self.device.type == "cuda" and lane.streamed and not lane.is_timed:
            lane.warm_peak, _ = self.studio.traffic.weigh(partial(self._few, lane, request))
            lane.first_call_s = timing.now(self.device) - began
        elif self.device.type == "cuda":
            held, reserved = residency.held_bytes(self.device), torch.cuda.memory_reserved(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._few(lane, request)
            lane.first_call_s = timing.now(self.device) - began
            owner = compilation.BLOCK_GRAPHS if lane.mode == compilation.BLOCK_GRAPHS else lane.blocks
            there = self._kept.get(owner, 0)  # by a lane before, and used by this one too
            lane.kept = self._kept[owner] = there + residency.held_bytes(self.device) - held
            lane.warm_peak = torch.cuda.max_memory_allocated(self.device) - allocated
            grown = torch.cuda.max_memory_reserved(self.device) - reserved
            lane.reserved = max(there + grown, lane.warm_peak)
        else:
            self._few(lane, request)
            lane.first_call_s = timing.now(self.device) - began
            lane.warm_peak = timing.added_bytes(lambda: self._few(lane, request), self.device)
        lane.peak = 0 if lane.is_timed else lane.warm_peak
        lane.done = compilation.Done.so_far(lane.blocks).since(before)
        lane.gave_up = compilation.block_graphs_skipped() - skipped

    def _time(self, lane: _Lane, request: CompareRequest) -> None:
        """One timed call in which nothing was compiled or recorded, or else the lane ends."""
        for _ in range(SPOILT):
            if self._timed(lane, request):
                return
            lane.spoilt += 1
        lane.error = f"not comparable: something was compiled or recorded in each of {SPOILT} timed calls"

    def _timed(self, lane: _Lane, request: CompareRequest) -> bool:
        """A timed call, counted if nothing was compiled or recorded in it."""
        self._use(lane)
        earlier, cuda = compilation.Done.so_far(lane.blocks), self.device.type == "cuda"
        if cuda:
            before, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        if lane.method == BARE:
            began = timing.now(self.device)
            steps = lane.rendition.weight_only(request.num_inference_steps) if lane.rendition else None
            output = call(lane.pipeline, self.spec, request, request.seed, steps=steps)
            latency = Latency(text=0, denoise=0, decode=0, total=timing.now(self.device) - began)
        else:
            with timing.stages(lane.pipeline, self.device) as clock:
                output = self._call(lane, request)
            latency = clock.latency
        lane.blocks.settle()
        done = compilation.Done.so_far(lane.blocks).since(earlier)
        if done.delayed:
            return False
        lane.latencies.append(latency)
        lane.replayed = done.replayed
        if cuda:
            lane.peak = max(lane.peak, lane.kept + torch.cuda.max_memory_allocated(self.device) - before)
            grown = lane.kept + torch.cuda.max_memory_reserved(self.device) - reserved
            lane.reserved = max(lane.reserved, grown, lane.peak)
        else:
            lane.peak = lane.warm_peak
        lane.made = finished(lane.pipeline, self.spec, output)
        return True

    def _few(self, lane: _Lane, request: CompareRequest) -> BaseOutput:
        """As few steps as warm everything up."""
        rendition = lane.rendition
        count = rendition.warm_up_steps(lane.mode) if rendition else compilation.WARM_UP_STEPS[lane.mode]
        self._use(lane)
        output = self._call(lane, replace(request, num_inference_steps=count), warming=True)
        lane.blocks.settle()
        return output

    def _call(self, lane: _Lane, request: CompareRequest, warming: bool = False) -> BaseOutput:
        progress = Progress(lane.precision, lambda _: None, lambda: False)
        steps = lane.rendition.weight_only(request.num_inference_steps, warming) if lane.rendition else None
        return call(lane.pipeline, self.spec, request, request.seed, progress, steps)

    def profiles(self, request: CompareRequest) -> list[dict[str, Any]]:
        """The last group's denoisers, one step each taken apart; nothing on a CPU."""
        lanes = [lane for lane in self._lanes if lane.error is None and lane.method != BARE and lane.latencies]
        return [self._profile(lane, request) for lane in lanes] if self.device.type == "cuda" else []

    def _profile(self, lane: _Lane, request: CompareRequest) -> dict[str, Any]:
        self.say(f"{lane.name} {lane.method}, batch {request.batch_size}: profile")
        denoiser, given = lane.pipeline.transformer, []
        self._rest()
        hook = denoiser.register_forward_pre_hook(lambda _, *call: given.append(call), with_kwargs=True)
        with profile.counted(denoiser) as work:
            call(lane.pipeline, self.spec, replace(request, num_inference_steps=1), request.seed)
        hook.remove()
        self._use(lane)

        def step() -> None:
            for args, kwargs in given:  # guidance may call twice
                denoiser(*args, **kwargs)

        about = self._said(lane.column) | {"method": lane.method, "batch_size": request.batch_size}
        return about | {"floor": profile.floor(work, self.device)} | profile.table(step, self.device)

    def _row(self, lane: _Lane, request: CompareRequest) -> dict[str, Any]:
        latency: dict[str, Any] | None = None
        step_ms = None
        if lane.latencies:
            totals = [entry.total for entry in lane.latencies]
            latency = spread(totals) | dict.fromkeys(("text", "denoise", "decode"))
            if lane.method != BARE:  # whose call is not taken apart
                for stage in ("text", "denoise", "decode"):
                    latency[stage] = median(getattr(entry, stage) for entry in lane.latencies)
                step_ms = 1000 * latency["denoise"] / request.num_inference_steps
        ran = lane.first_call_s is not None
        on_cuda = self.device.type == "cuda" and ran
        return self._said(lane.column) | {
            "batch_size": request.batch_size,
            "method": lane.method,
            "also": list(lane.also),
            "execution": lane.execution,
            **({"streamed": list(lane.streamed)} if lane.streamed else {}),
            "ends": list(self.studio.ends(self.spec)) if lane.latencies else [],
            "latency_s": latency,
            "step_ms": step_ms,
            "memory_gb": {
                "weights": lane.weights,
                "peak_allocated": lane.weights + (lane.peak or lane.warm_peak) / timing.GB if ran else None,
                "warm_up_peak_allocated": lane.weights + lane.warm_peak / timing.GB if ran else None,
                "peak_reserved": lane.weights + lane.reserved / timing.GB if on_cuda and lane.reserved else None,
            },
            "load_s": lane.load_s,
            "first_call_s": lane.first_call_s if lane.is_timed else None,
            "compile": {
                "mode": lane.mode,
                "graphs": lane.done.compiled,
                "cuda_graphs_recorded": lane.done.recorded,
                "cuda_graphs_given_up": lane.gave_up,
                "steps_replayed": lane.replayed,
                "timed_calls_left_out": lane.spoilt,
            },
            "repeats": len(lane.latencies),
            "from_post": lane.from_post,
            "error": lane.error,
        }


def _share(module: nn.Module, other: nn.Module) -> None:
    """Take the other module's parameters where they are the same plain numbers."""
    for key, own in module.named_parameters(recurse=False):
        theirs = other.get_parameter(key).data
        if type(own.data) is type(theirs) is Tensor and torch.equal(own, theirs):
            own.data = theirs


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
    spec: ModelSpec, settings: Settings, request: CompareRequest, groups: Sequence[Sequence[Pair]]
) -> dict[str, Any]:
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
            + "; ".join(
                ", ".join(f"{column.written(request.recipe)} {method}" for column, method in group) for group in groups
            )
        ),
        "warm_up_steps": dict(compilation.WARM_UP_STEPS),
        "memory": (
            "GB of 1e9 bytes: all weights of one pipeline, text encoders and VAE resident, plus what its own call "
            "needs beyond what was there. peak_allocated is the timed call's, with what stays for it between calls, "
            "pools of CUDA graphs whole; peak_reserved is what the allocator took from the device for the same, in "
            "the warm-up or a timed call"
        ),
        "post_method": (
            "torchao's configurations, quantize_ by the post's rules; at batch 1 of FLUX.1-dev and Qwen-Image each "
            'block by torch.compile(mode="reduce-overhead", fullgraph=True) with cloned outputs, everywhere else '
            "compile_repeated_blocks(fullgraph=True), which post-default is throughout; a row names in `also` the "
            "method that was the same there. FP8 is not the post's: it is torchao's configuration with its default "
            "Inductor settings, in the post's manner. Text encoders, VAE and attention backend as in the engine: "
            "a row names in `ends` those whose blocks all its methods ran compiled; in "
            "bf16 all methods run the same weights, elsewhere all but the quantized ones"
        ),
    }


def _memory(device: torch.device) -> float:
    """GB that the benchmark may fill."""
    room, _ = residency.rooms(device)
    return min(room.total, residency.limit()) if device.type == "cuda" else room.total


def _write(result: dict[str, Any], out: Path) -> None:
    write_whole(out, (json.dumps(result, indent=1) + "\n").encode())


HEADER = f"{'precision':9} {'method':12} {'batch':>5} {'seconds':>9} {'ms/step':>9} {'weights':>8} {'peak GB':>8}  note"


def line(row: Mapping[str, Any]) -> str:
    """A row as one line of a table below `HEADER`."""
    latency, memory = row["latency_s"], row["memory_gb"]
    seconds = f"{latency['median']:.3f}" if latency else "-"
    step = f"{row['step_ms']:.1f}" if row["step_ms"] else "-"
    peak = f"{memory['peak_allocated']:.2f}" if memory["peak_allocated"] else "-"
    untimed = "emulated: not timed" if row["execution"] == "emulated" else ""
    note = row["error"] or ("streamed: not timed" if DENOISER in row.get("streamed", ()) else untimed)
    return (
        f"{methods.column_of(row):9} {row['method']:12} {row['batch_size']:5} {seconds:>9} {step:>9} "
        f"{memory['weights']:8.2f} {peak:>8}  {note}"
    ).rstrip()
