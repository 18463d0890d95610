"""One comparison: the same noise and the same prompt through each column in turn, timed, weighed and compared.

A `Studio` makes things with what engine/runtime/residents.py has loaded on one device. It knows nothing of threads,
queues or pages: it is given a function to tell events to, and a function that says whether to stop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from engine import catalog, events, quantized, safety
from engine.catalog import ModelSpec
from engine.columns import EXACT, Column, format_of
from engine.compiler import compilation, ends
from engine.environment import versions
from engine.errors import NoRoomError
from engine.events import Stop, Tell
from engine.formats import REFERENCE
from engine.metrics import distances, scores
from engine.metrics.ruler import RulerShelf
from engine.outputs import media
from engine.quantization import attention
from engine.request import CompareRequest
from engine.results import DENOISER, Comparison, Generation, Memory, Metrics, Ruler
from engine.runtime import timing, what_ran
from engine.runtime.pipeline import Made, Progress, call, finished, seed_of, tokens
from engine.runtime.previews import Previewer
from engine.runtime.residents import Holdings, Rendition, key_of
from engine.runtime.what_ran import ATTENTION
from engine.weights import loading, residency, schedulers

FLOOR_ATTENTION = "_native_math"
"""The second legitimate bf16 path of the noise floor where nothing is compiled: the same attention, unfused."""
RULER_PROMPTS = 3
"""Of a miniature; one for a model that takes seconds to minutes a picture."""


Take = Callable[[Tell, Stop], tuple[Generation, Made]]
"""A timed call that only waits to be made, with what is told and what stops it; gives what it made, without files."""


def _ends_size(request: CompareRequest) -> tuple[object, ...]:
    """What of a request decides the shapes of text encoders and VAE, where prompts are padded."""
    return request.height, request.width, request.num_frames, request.batch_size, request.guidance_scale > 1


class Studio(Holdings):
    """Models loaded on one device, and what they make. Use it from one thread only.

    Raises:
        UnsupportedError: there is no such device.
    """

    def __init__(
        self,
        device: str | torch.device,
        source: loading.Source = loading.BUNDLED_OR_HUB,
        filtered: safety.Filter = safety.NO_FILTER,
    ):
        super().__init__(device, source)
        timing.prepare(self.device)
        self._guard = safety.Guard(filtered)
        self._warm: dict[tuple[object, ...], compilation.WarmUp] = {}
        """By rendition and shape: a shape is warm once it is here, until a recording is dropped."""
        self._compiled: dict[tuple[object, ...], float] = {}
        """Seconds of the first call that compiled for a rendition and a size; compiled code outlives moved weights."""
        self._rulers = RulerShelf()
        self._fingerprints: dict[str, str] = {}

    def _cold(self, key: residency.Key) -> None:
        self._warm = {warm: value for warm, value in self._warm.items() if warm[:3] != key}

    def compare(self, request: CompareRequest, out: Path, tell: Tell, stop: Stop) -> Comparison:
        """Carry out a request; pictures or clips and `comparison.json` go into `out`. Where the machine has not the
        memory for the reference, the others are made without it.

        Raises:
            UnsupportedError, LoadError, OutputError: in one sentence.
            CancelledRun: `stop` said so.
        """
        spec = catalog.model(request.model)
        self._guard.prompt(spec, request.prompt)
        reference, results = None, []
        lacks = self._lacks(spec, request)
        others = tuple(name for name in request.precisions if format_of(name) != REFERENCE)
        asked = replace(request, precisions=others) if lacks else request
        for generation, made in self.takes(spec, asked, tell, stop):
            generation = self._kept(generation, made, spec, request, out, generation.column)
            tell(events.Finished(generation.column, generation))
            if reference is None:
                reference = None if lacks else made
            else:
                distance, maps = self.distance(made, reference)
                tell(events.Compared(generation.column, distance))
                generation = replace(generation, metrics=distance, lpips_maps=media.save_maps(maps, generation.files))
            results.append(generation)
        ruler = None if lacks else self.ruler(spec, request, tell, stop)
        comparison = Comparison(
            request=request,
            device=self.machine.label,
            versions=versions(),
            results=tuple(results),
            ruler=ruler,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            lacks=lacks,
        )
        comparison.save(out)
        return comparison

    def _lacks(self, spec: ModelSpec, request: CompareRequest) -> str:
        """Why the reference cannot be made beside what else is asked for, in a sentence; empty if it can."""
        if spec.memory_gb is None or len(request.columns) == 1:
            return ""
        try:
            residency.require(spec, REFERENCE, spec.memory_gb.transformer, self.device)
        except NoRoomError as error:
            return str(error)
        return ""

    def takes(
        self, spec: ModelSpec, request: CompareRequest, tell: Tell, stop: Stop
    ) -> Iterator[tuple[Generation, Made]]:
        """What each column makes, in the request's order, one after the other; no files are written yet."""
        for column in request.columns:
            yield self.ready(spec, column, request, tell, stop)(tell, stop)

    def ready(
        self,
        spec: ModelSpec,
        column: Column,
        request: CompareRequest,
        tell: Tell,
        stop: Stop,
    ) -> Take:
        """Load one column and warm it for the request, and give the timed call, to be made before anything else.

        Raises:
            UnsupportedError, LoadError: as `rendition`.
            CancelledRun: `stop` said so.
        """
        rendition = self.rendition(spec, column, tell)
        return partial(self._take, rendition, spec, request, self.warm(rendition, spec, request, tell, stop))

    def generate(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        out: Path,
        tell: Tell,
        stop: Stop,
        stem: str | None = None,
    ) -> tuple[Generation, Made]:
        """One column's pictures or clips, and what is known of them.

        Args:
            stem: of the files' names; the column by default.
        """
        warm = self.warm(rendition, spec, request, tell, stop)
        generation, made = self._take(rendition, spec, request, warm, tell, stop)
        return self._kept(generation, made, spec, request, out, stem or generation.column), made

    def _take(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        warm: compilation.WarmUp,
        tell: Tell,
        stop: Stop,
    ) -> tuple[Generation, Made]:
        """The timed call, and what is known of it; no files are written yet."""
        name = rendition.column.written(request.recipe)
        scheduler = rendition.pipeline.scheduler
        foreseen = schedulers.is_euler(scheduler) or schedulers.keeps_goals(scheduler)  # others are heading elsewhere
        drawn = request.previews and foreseen
        preview = Previewer(rendition.pipeline, spec, request) if drawn else None
        progress = Progress(name, tell, stop, preview)
        before = compilation.Done.so_far(rendition.blocks)
        with timing.stages(rendition.pipeline, self.device) as clock:
            steps = rendition.weight_only(request.num_inference_steps)
            output = call(rendition.pipeline, spec, request, request.seed, progress, steps)
        rendition.blocks.settle()
        done = compilation.Done.so_far(rendition.blocks).since(before)
        made = finished(rendition.pipeline, spec, output)
        streamed = self.streaming(key_of(spec, rendition.column))
        native = rendition.support.execution == "native"
        generation = Generation(
            column=name,
            execution=rendition.support.execution,
            disproof=rendition.support.reason if rendition.support.disproved else "",
            shared_card=self.machine.shared,
            files=(),
            latency=clock.latency,
            latency_comparable=(native and not request.previews and not done.delayed and DENOISER not in streamed),
            streamed=streamed,
            memory=Memory(
                weights=rendition.weights,
                transformer=rendition.transformer,
                peak=rendition.weights + warm.added / timing.GB,
                device=None if warm.most is None else warm.most / timing.GB,
            ),
            layers=rendition.layers,
            ran=what_ran.described(
                rendition,
                spec,
                request,
                machine=self.machine,
                weights=self._weights(rendition.column, spec),
                residency=self.where(key_of(spec, rendition.column)),
                streamed=streamed,
                ends=self.ends(spec),
                warm=warm,
                done=done,
                not_numbers=sum(made.not_numbers),
            ),
        )
        return generation, made

    def _weights(self, column: Column, spec: ModelSpec) -> str:
        """Where they come from, in words."""
        said = loading.described(column.weights(spec), self.source)
        held = quantized.named(column.rules)
        if held is None or not held.repository:
            return said
        return f"{said}, the denoiser stored quantized: {held.repository} at revision {held.revision}"

    def _kept(
        self, generation: Generation, made: Made, spec: ModelSpec, request: CompareRequest, out: Path, stem: str
    ) -> Generation:
        """With files, once the filter has let them pass."""
        self._guard.outputs(spec, made.pixels)
        column, execution = request.column(generation.column), generation.execution
        found = scores.scored(request.prompt, made.pixels) if spec.modality == "image" else {}
        files = self.keep(made, column, spec, request, out, stem, execution=execution)
        return replace(generation, files=files, scores=found)

    def keep(
        self,
        made: Made,
        column: Column,
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
        asked = request.to_json() | {"recipe": column.rules or request.recipe}
        loras = column.weights(spec).loras
        del asked["precisions"], asked["previews"]  # a picture's bytes must not depend on what else was asked for
        recipe = {
            "request": asked,
            "precision": column.format,
            "execution": self.support[column.format].execution,
            "device": self.machine.label,
            "versions": versions(),
            "model_licence": spec.licence,
            **({} if (held := quantized.named(column.rules)) is None else {"checkpoint": held.provenance}),
            **({"loras": [lora.provenance for lora in loras]} if loras else {}),
            **({"attention": attention.WORDS} if column.fp8_attention else {}),
            **further,
        }
        inside = [recipe | {"picture": i, "seed": seed_of(request.seed, i)} for i in range(len(made.pixels))]
        frame_rate = spec.defaults.frame_rate if spec.modality == "video" else None
        return media.save(made.pixels, made.audio, frame_rate, made.audio_rate, out, stem, inside)

    def warm(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        tell: Tell,
        stop: Stop,
    ) -> compilation.WarmUp:
        """Make room for a run of the request, set the blocks to its mode, and run a few untimed steps of its shape,
        once, compiling what is needed.

        Raises:
            UnsupportedError: the rendition is not on the device any more, and there is no room to bring it back.
            CancelledRun: `stop` said so.
        """
        name, column = rendition.column.written(request.recipe), rendition.column
        key = key_of(spec, column)
        if self._renditions.get(key) is rendition:
            self.make_room(spec, key, rendition.transformer, request)
            self._shelf.use(key, residency.shared_key(spec.id))
        mode = self.mode(column, spec, request)
        if mode == compilation.GRAPHS and DENOISER in self.streaming(key):
            mode = compilation.DEFAULT  # the same kernels, launched one by one: recordings refer to addresses
        rendition.blocks.use(mode)
        self._use_ends(spec, request)
        compiled = (*key, request.height, request.width, request.num_frames, request.batch_size)
        shape: tuple[object, ...] = (*compiled, request.guidance_scale > 1, self.ends(spec))
        if mode != compilation.EAGER and not spec.text_padded:
            shape = (*shape, tokens(rendition.pipeline, spec, request.prompt))
        if shape not in self._warm or self._warm[shape].dropped != rendition.blocks.dropped:
            compiles = mode != compilation.EAGER and compiled not in self._compiled
            tell(events.Warming(name, compiles, max(self._compiled.values(), default=None) if compiles else None))
            few = replace(request, num_inference_steps=rendition.warm_up_steps(mode))
            self._warm[shape] = self._warm_up(rendition, spec, few, stop)
            if compiles:
                self._compiled[compiled] = self._warm[shape].seconds
        return self._warm[shape]

    def ends(self, spec: ModelSpec) -> tuple[str, ...]:
        """Names of a model's text encoders and VAE whose blocks run compiled now."""
        return self._ends[spec.id].used if spec.id in self._ends else ()

    def compile_ends(
        self,
        spec: ModelSpec,
        request: CompareRequest,
        run: Callable[[CompareRequest], object],
        tell: Tell,
        stop: Stop,
    ) -> bool:
        """Compile text encoders and VAE for the shapes of a request, a piece at a time, where that is wanted; they are
        used from the next `warm` on. Streamed ones are left as they are.

        Args:
            run: makes a call of the request it is given, with both ends in it.

        Returns:
            Whether there was anything to do.

        Raises:
            CancelledRun: `stop` said so, before a piece; what was compiled is kept.
        """
        if not self._lacks_ends(spec, request):
            return False
        if spec.id not in self._ends:
            self._ends[spec.id] = ends.Ends(self.shared(spec))

        def told(index: int, total: int) -> None:
            tell(events.CompilingEnds(index, total))

        few = replace(request, num_inference_steps=1)
        self._ends[spec.id].compile(_ends_size(request), lambda: run(few), stop, told)
        self._use_ends(spec, request)
        return True

    def warm_ends(self, spec: ModelSpec, request: CompareRequest, tell: Tell, stop: Stop) -> bool:
        """Compile text encoders and VAE as of `compile_ends`, and warm the request's columns with them.

        Raises:
            UnsupportedError, LoadError, CancelledRun: as `ready`.
        """
        if not self._lacks_ends(spec, request):
            return False
        rendition = self.rendition(spec, EXACT, tell)
        self.warm(rendition, spec, request, tell, stop)

        def run(few: CompareRequest) -> None:
            call(rendition.pipeline, spec, few, few.seed, Progress(REFERENCE, lambda _: None, stop))
            rendition.blocks.settle()

        done = self.compile_ends(spec, request, run, tell, stop)
        for column in request.columns if done else ():
            self.ready(spec, column, request, tell, stop)
        return done

    def _lacks_ends(self, spec: ModelSpec, request: CompareRequest) -> bool:
        """Whether text encoders and VAE are to be compiled for the request and are not yet."""
        if not ends.wanted(self.device, self.machine) or residency.shared_key(spec.id) in self._streams:
            return False
        return spec.id not in self._ends or not self._ends[spec.id].is_ready(_ends_size(request))

    def _use_ends(self, spec: ModelSpec, request: CompareRequest) -> None:
        """Those that are compiled for all shapes of the request, or eager ones: the same for all that it makes, as
        nothing is compiled meanwhile."""
        if spec.id in self._ends:
            self._ends[spec.id].use(_ends_size(request))

    def _warm_up(self, rendition: Rendition, spec: ModelSpec, few: CompareRequest, stop: Stop) -> compilation.WarmUp:
        """A few steps in which everything is compiled, tuned and recorded, and memory is weighed."""
        count = few.num_inference_steps
        steps = rendition.weight_only(count, warming=True)
        quiet = Progress(rendition.column.format, lambda _: None, stop)
        gc.collect()
        began, graphs = timing.now(self.device), compilation.graphs_compiled()
        most = None

        def run() -> None:
            call(rendition.pipeline, spec, few, few.seed, quiet, steps)
            rendition.blocks.settle()

        if self.device.type == "cuda" and self.streaming(key_of(spec, rendition.column)):
            added, most = self.traffic.weigh(run)
        else:
            added = timing.added_bytes(run, self.device)
        return compilation.WarmUp(
            seconds=timing.now(self.device) - began,
            graphs=compilation.graphs_compiled() - graphs,
            added=added,
            most=most,
            dropped=rendition.blocks.dropped,
        )

    def mode(self, column: Column, spec: ModelSpec, request: CompareRequest) -> str:
        """How this machine runs a denoiser's blocks as one column for a request."""
        if column.fp8_attention:
            return compilation.EAGER
        return compilation.mode(request.batch_size, self.support[column.format], self.device, spec.recordable)

    def distance(self, made: Made, reference: Made) -> tuple[Metrics, list[Tensor | None]]:
        """LPIPS and PSNR of what was made from the reference, and where LPIPS comes from; one a picture or clip.

        Returns:
            The numbers, and maps (F, h, w) as of `distances.lpips_maps`, F being 1 for a picture. Both are None for a
            picture or clip of which either side has values that are not numbers.
        """
        a, b = made.pixels * 2 - 1, reference.pixels * 2 - 1
        if a.ndim == 4:
            (scores, maps), decibels, frames = distances.lpips_maps(a, b), distances.psnr(a, b), None
            maps = list(maps[:, None])
        else:
            each = [distances.clip_distance(one, other, self.device) for one, other in zip(a, b, strict=True)]
            by_frame, decibels, maps = (list(values) for values in zip(*each, strict=True))
            frames = tuple(tuple(values.tolist()) for values in by_frame)
            scores, decibels = torch.stack([d.mean() for d in by_frame]), torch.stack(decibels)
        lost = [made.is_damaged(i) or reference.is_damaged(i) for i in range(len(a))]

        def kept(values: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(None if no else value for no, value in zip(lost, values, strict=True))

        found = Metrics(
            lpips=kept(scores.tolist()), psnr_db=kept(decibels.tolist()), lpips_frames=frames and kept(frames)
        )
        return found, list(kept(maps))

    def ruler(
        self,
        spec: ModelSpec,
        request: CompareRequest,
        tell: Tell,
        stop: Stop,
    ) -> Ruler | None:
        """Noise floor and other-seed ceiling of bf16 at the request's shape and steps, measured once, then kept.

        None where bf16 makes values that are not numbers: there is nothing to measure with then, and nothing is kept.

        Raises:
            CancelledRun: `stop` said so.
        """
        self._use_ends(spec, replace(request, batch_size=1))  # which it is measured with
        key = "|".join(
            str(part)
            for part in (
                spec.id,
                self._fingerprint(spec),
                self.machine.label,
                *(f"{name} {number}" for name, number in versions().items()),
                f"{request.width}x{request.height}x{request.num_frames}",
                request.num_inference_steps,
                request.guidance_scale,
                *self.ends(spec),
            )
        )
        ruler = self._rulers.get(key)
        if ruler is None:
            ruler = self._measure_ruler(spec, request, tell, stop)
            if ruler is None:
                return None
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
        tell: Tell,
        stop: Stop,
    ) -> Ruler | None:
        rendition = self.rendition(spec, EXACT, tell)
        prompts, seed = spec.examples[: RULER_PROMPTS if spec.bundled else 1], spec.defaults.seed
        done, total = 0, 3 * len(prompts)
        floors: list[float] = []
        ceilings: list[float] = []
        for prompt in prompts:
            asked = replace(request, prompt=prompt, batch_size=1, seed=seed)
            made = []
            for path, noise in ((False, seed), (True, seed), (False, seed + 1)):
                tell(events.Measuring(done, total))
                made.append(self.retake(rendition, spec, replace(asked, seed=noise), stop, second_path=path))
                if made[-1].is_damaged(0):
                    return None
                done += 1
            floor, ceiling = (self.distance(other, made[0])[0].mean_lpips for other in made[1:])
            if floor is None or ceiling is None:
                return None
            floors.append(floor)
            ceilings.append(ceiling)
        note = what_ran.ruler(len(prompts), self.mode(EXACT, spec, request), seed)
        return Ruler(floor=fmean(floors), ceiling=fmean(ceilings), note=note)

    def retake(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        stop: Stop,
        second_path: bool = False,
    ) -> Made:
        """The request once more in bf16, untimed; by `second_path` with other kernels as legitimate (see `paths`).

        Raises:
            CancelledRun: `stop` said so.
        """
        if self.mode(EXACT, spec, request) != compilation.EAGER and not second_path:
            self.warm(rendition, spec, request, lambda _: None, stop)
        return self._retake(rendition, spec, request, stop, second_path)

    def _retake(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        stop: Stop,
        second_path: bool,
    ) -> Made:
        self._use_ends(spec, request)
        transformer = rendition.pipeline.transformer
        quiet = Progress(REFERENCE, lambda _: None, stop)
        if self.mode(EXACT, spec, request) == compilation.EAGER:
            transformer.set_attention_backend(FLOOR_ATTENTION if second_path else ATTENTION)
        elif second_path:
            rendition.blocks.use(compilation.EAGER)
        try:
            made = finished(rendition.pipeline, spec, call(rendition.pipeline, spec, request, request.seed, quiet))
            rendition.blocks.settle()
            return made
        finally:
            transformer.set_attention_backend(ATTENTION)

    def paths(self, spec: ModelSpec, request: CompareRequest) -> str:
        """The two paths of the noise floor, in words."""
        return what_ran.paths(self.mode(EXACT, spec, request))
