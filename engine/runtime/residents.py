"""What is loaded on one device: models in their precisions, kept there, in host memory, or let go.

engine/weights/residency.py plans what stays, engine/weights/loading.py reads, engine/weights/host_memory.py moves and
engine/weights/streaming.py streams; this owns it. Knows nothing of what is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline

from engine import events
from engine.catalog import ModelSpec
from engine.columns import EXACT, Column
from engine.compiler import compilation, ends
from engine.errors import NoRoomError, UnsupportedError
from engine.events import Tell
from engine.formats import REFERENCE
from engine.machine import Machine, Support
from engine.quantization import attention, capability, proof, recipes, reuse, stored
from engine.quantization.emulation import UNPACKED
from engine.quantization.remedies import WeightOnlySteps
from engine.request import CompareRequest
from engine.results import DENOISER, TEXT, LayerCounts
from engine.runtime import timing
from engine.weights import fusing, host_memory, loading, residency, schedulers, streaming

OTHER_WEIGHTS = (
    "It was quantized from other bf16 weights than the reference's, so what differs is not quantization's alone."
)
"""What to know of such a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Rendition:
    """One model as one column, ready to run."""

    column: Column
    pipeline: DiffusionPipeline
    support: capability.Support
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
        """What leaves activations in bf16 in some steps of a call of `total` inference steps, or, `warming`, in every
        other half."""
        if not any(self.weight_only_steps):
            return None
        total = schedulers.timesteps(self.pipeline.scheduler, total)
        steps = (total // 2, 0) if warming else self.weight_only_steps
        return WeightOnlySteps(self.pipeline.transformer, steps, total, self.blocks.vary)


class Holdings:
    """The renditions of one device and what they share. Use it from one thread only.

    Raises:
        UnsupportedError: there is no such device.
    """

    def __init__(self, device: str | torch.device, source: loading.Source = loading.BUNDLED_OR_HUB):
        self.device = capability.device_named(device)
        self.source = source
        self.machine = proof.known(capability.detect(self.device))
        self.support = capability.supports(self.machine)
        self._renditions: dict[residency.Key, Rendition] = {}
        self._shared: dict[str, dict[str, object]] = {}
        """Text encoders, VAE and the like, by model."""
        self._ends: dict[str, ends.Ends] = {}
        """What of these is compiled, by model."""
        self._limit = residency.limit()
        self._shelf = residency.Shelf(grain=host_memory.CHUNK / timing.GB)
        self._pool = host_memory.Pool(pinned=self.device.type == "cuda")
        self._waiting: dict[residency.Key, host_memory.Stored] = {}
        """The weights that are in host memory."""
        self._streams: dict[residency.Key, streaming.Stream] = {}
        """Of the weights in host memory those that are used from there."""
        self._streamed: frozenset[residency.Key] = frozenset()
        """What is used from host memory, as was decided last, loaded or not."""
        self.traffic = streaming.Traffic(self.device)
        self._arrived: dict[residency.Key, tuple[float, float]] = {}
        """GB and seconds of a part's last way from there to the device."""

    def _cold(self, key: residency.Key) -> None:
        """A part has moved or is gone. Graphs that were recorded with its addresses are of no use now."""

    def rendition(self, spec: ModelSpec, column: Column, tell: Tell) -> Rendition:
        """The model as one column, on the device: loaded and quantized on first use, then kept there or in host
        memory while there is room. It stays on the device until another is asked for.

        Raises:
            UnsupportedError: this machine cannot run the precision, or has not the memory for it.
            LoadError: the weights are missing or damaged.
        """
        key, shared = key_of(spec, column), residency.shared_key(spec.id)
        if key not in self._renditions:
            self._renditions[key] = self._load(spec, column, tell)
            self._stream_some()
        else:
            waiting = [part for part in (key, shared) if self._shelf.place(part) == residency.HOST]
            if any(part not in self._streams for part in waiting):
                tell(events.Loading(_called(spec, column)))
            self.make_room(spec, key, self._shelf.gigabytes(key) or 0.0)
        self._shelf.use(key, shared)
        return self._renditions[key]

    def close(self) -> None:
        """End what it has in other processes, if anything."""

    def prove(self, plan: recipes.Plan, tell: Tell = lambda _: None) -> None:
        """See that the native products of a plan are right, once; a format of which they are not is emulated from then
        on.

        Raises:
            RuntimeError: as of `proof.prove`.
        """
        if self._learn(proof.prove(self.machine, self.device, plan.shapes)):
            tell(events.Proved())
            timing.free(self.device)

    def recall(self) -> None:
        """Learn what another process has found out of this machine."""
        self._learn(proof.known(self.machine))

    def _learn(self, machine: Machine) -> bool:
        """How the formats run, by what was found out of the machine; says whether anything was."""
        if machine.proofs == self.machine.proofs:
            return False
        self.machine, self.support = machine, capability.supports(machine)
        for key, made in list(self._renditions.items()):
            was_native = made.support.execution == "native" or made.column.fp8_attention  # whose layers may have been
            if was_native and self.support[made.column.format].execution != "native":
                self._forget(key)  # it was native while smaller layers were all that had been compared
        return True

    def _support_of(self, plan: recipes.Plan) -> Support:
        """How a plan's layers run: natively if all do, whatever formats they are in."""
        asked = self.support[plan.precision]
        others = [self.support[name] for name in plan.shapes if self.support[name].execution != "native"]
        if not others or asked.execution != "native":
            return asked
        other = others[0]
        return replace(asked, execution=other.execution, reason=other.reason, disproved=other.disproved)

    def _load(self, spec: ModelSpec, column: Column, tell: Tell) -> Rendition:
        if self.support[column.format].execution == "unavailable":
            raise UnsupportedError(self.support[column.format].reason)
        empty = loading.blueprint(spec)
        fusing.check(spec, empty)
        plan = recipes.plan_of(empty, spec, column)
        key, gigabytes = key_of(spec, column), plan.quantized_bytes / timing.GB
        residency.require(spec, column.format, gigabytes, self.device)
        self.make_room(spec, key, gigabytes)
        tell(events.Loading(_called(spec, column)))
        self.prove(plan, tell)

        def told(done: int, total: int) -> None:
            tell(events.Downloading(spec.name, done, total))

        shared = self.shared(spec, told)
        support, adapted = self._support_of(plan), column.weights(spec)
        streamed = key in self._streamed
        with streaming.Arriving(self._pool) as arriving:
            leaving = arriving.place if streamed else None
            transformer = self._denoiser(spec, column, plan, told, leaving)
            if streamed:
                self._waiting[key] = arriving.stored([transformer])
        held = plan.recipe.held
        if held is not None and held.source not in ("", loading.fingerprint(adapted, self.source)):
            support = replace(support, reason=f"{support.reason} {OTHER_WEIGHTS}")
        if self.device.type == "cpu" and support.execution == "emulated":
            reuse.keep(transformer, UNPACKED, residency.rooms(self.device)[0].free * timing.GB)
        pipeline = loading.assemble(spec, shared, transformer)
        if column.fp8_attention:
            attention.use_in(transformer)
            support = attention.supported(support)
        gigabytes = timing.weight_bytes(transformer) / timing.GB
        self._shelf.put(key, gigabytes, residency.HOST if streamed else residency.DEVICE)
        return Rendition(
            column=column,
            pipeline=pipeline,
            support=support,
            layers=recipes.verify(pipeline.transformer, plan),
            weights=timing.weight_bytes(*_modules(pipeline.components)) / timing.GB,
            transformer=gigabytes,
            blocks=self._blocks(key, pipeline.transformer),
            weight_only_steps=plan.recipe.weight_only_steps(column.format),
        )

    def _denoiser(
        self,
        spec: ModelSpec,
        column: Column,
        plan: recipes.Plan,
        told: loading.Told,
        leaving: Callable[[loading.Place], loading.Place] | None,
    ) -> torch.nn.Module:
        """As of `stored.denoiser`."""
        support = self.support[column.format]
        return stored.denoiser(column.weights(spec), plan, support, self.device, self.source, told, leaving)

    def _blocks(self, key: residency.Key, transformer: torch.nn.Module) -> compilation.Blocks:
        return compilation.Blocks(transformer)

    def shared(self, spec: ModelSpec, told: loading.Told | None = None) -> dict[str, object]:
        """Text encoders, VAE and whatever else all precisions of the model share, on the device, loaded on first use.

        Raises:
            UnsupportedError: the machine has not the memory for them.
            LoadError: the weights are missing or damaged.
        """
        key = residency.shared_key(spec.id)
        if spec.id not in self._shared:
            self._shared[spec.id] = self._load_shared(spec, told)
        elif self._shelf.place(key) == residency.HOST and key not in self._streams:
            self.make_room(spec, key, self._shelf.gigabytes(key) or 0.0)
        return self._shared[spec.id]

    def _load_shared(self, spec: ModelSpec, told: loading.Told | None) -> dict[str, object]:
        key = residency.shared_key(spec.id)
        if not residency.streams_text(spec, self.device):
            shared = loading.load_shared(spec, self.device, self.source, told)
            self._shelf.put(key, timing.weight_bytes(*_modules(shared)) / timing.GB)
            return shared
        with streaming.Arriving(self._pool) as arriving:
            shared = loading.load_shared(spec, self.device, self.source, told, arriving.place())
            self._waiting[key] = arriving.stored(_modules(shared))
        self._shelf.put(key, timing.weight_bytes(*_modules(shared)) / timing.GB, residency.HOST)
        self._stream(key, loading.text_parts(shared))
        return shared

    def forget_ends(self, model: str) -> None:
        """Run a model's text encoders and VAE eager again, and forget what of them is compiled."""
        if model in self._ends:
            self._ends.pop(model).use(None)

    def make_room(
        self, spec: ModelSpec, key: residency.Key, gigabytes: float, request: CompareRequest | None = None
    ) -> None:
        """Bring a denoiser of so many GB, or make room to load it, with what it shares and a run of the request or, by
        default, of the default settings.

        Raises:
            UnsupportedError: it does not fit even if everything else leaves.
        """
        shared, memory = residency.shared_key(spec.id), spec.memory_gb
        known = self._shelf.gigabytes(shared)
        sizes = {shared: known if known is not None else memory.shared if memory else 0.0, key: gigabytes}
        text = residency.streams_text(spec, self.device)
        kept = memory.kept if memory and text else sizes[shared]
        need, run = kept + (gigabytes if key != shared else 0.0), memory.one_run if memory else 0.0
        settled = self._shelf.place(key) == residency.DEVICE or (request is not None and key in self._streams)
        there = settled and (shared in self._streams if text else self._shelf.place(shared) == residency.DEVICE)
        device, host = self._capacity(), residency.waiting_room(self.device, self._pool.bytes / timing.GB)
        if need + run > device and not there and self._forget_recordings():
            device = self._capacity()
        streamed = {shared: sizes[shared]} if text else {}
        short = need + run > device and sum(streamed.values()) + gigabytes <= host
        if key in self._streams if there else memory is not None and key != shared and short:
            streamed[key] = gigabytes
            need = kept + (memory.footprint if memory else 0.0)
        if memory is None:  # a miniature is never refused
            device = max(device, need)
        run = run if request is None else residency.run_memory(spec, request)
        if request is not None or there:  # an estimate from above empties the device, but refuses nothing
            run = min(run, device - need)
        wanted = {part: size for part, size in sizes.items() if part not in streamed}
        try:
            moves = self._shelf.plan(wanted, run + need - sum(wanted.values()), device, host, streamed)
        except residency.NoRoom as error:
            raise NoRoomError(
                residency.refusal(spec, key[1] or REFERENCE, error, device, host, self.device, bool(streamed))
            ) from error
        self._streamed = frozenset(streamed)
        for part in self._streams.keys() - streamed.keys():
            self._streams.pop(part).end()
            self._cold(part)
        for move in moves:
            self._move(move)
        self._stream_some()

    def _stream_some(self) -> None:
        """Stream what is to be used from host memory and is there."""
        for key in self._streamed & self._waiting.keys() - self._streams.keys():
            if key == residency.shared_key(key[0]):
                self._stream(key, loading.text_parts(self._shared[key[0]]))
            elif key in self._renditions:
                self._stream(key, self._parts(key), self._renditions[key].blocks.surround)

    def _stream(
        self,
        key: residency.Key,
        modules: list[torch.nn.Module],
        install: Callable[[streaming.Around | None], None] | None = None,
    ) -> None:
        if key == residency.shared_key(key[0]):
            self.forget_ends(key[0])
        stored = self._waiting[key]
        self._streams[key] = streaming.Stream(stored, modules, self.device, self.traffic, install)
        self._cold(key)

    def streaming(self, key: residency.Key) -> tuple[str, ...]:
        """What is streamed while a denoiser runs: `TEXT`, `DENOISER`, both or nothing."""
        parts = {residency.shared_key(key[0]): TEXT, key: DENOISER}
        return tuple(words for part, words in parts.items() if part in self._streams)

    def _capacity(self) -> float:
        held = self._shelf.held(residency.DEVICE) + sum(stream.kept for stream in self._streams.values()) / timing.GB
        return residency.capacity(self.device, held, self._limit)

    def _forget_recordings(self) -> bool:
        """Give back what recorded graphs hold, which nothing else can use; says whether anything could be held.

        What is asked for next would push their denoisers off the device anyway.
        """
        for key, rendition in self._renditions.items():
            rendition.blocks.forget()
            self._cold(key)
        timing.free(self.device)
        return bool(self._renditions)

    def _move(self, move: residency.Move) -> None:
        key = move.key
        if self._shelf.place(key) == residency.GONE:
            return  # it went with what it shared
        if key in self._renditions:  # recorded graphs refer to addresses
            self._renditions[key].blocks.forget()
        if move.to == residency.GONE:
            self._forget(key)
        elif move.to == residency.HOST:
            stored = self._pool.store(self._parts(key))
            if stored is None:
                self._forget(key)
                if key in self._streamed:
                    raise NoRoomError(streaming.NO_HOST_MEMORY)
                return
            self._waiting[key] = stored
            self._shelf.done(move)
            timing.free(self.device)
        else:
            began = timing.now(self.device)
            self._waiting[key].restore(self.device)
            del self._waiting[key]
            self._arrived[key] = (self._shelf.gigabytes(key) or 0.0, timing.now(self.device) - began)
            self._shelf.done(move)
        self._cold(key)

    def _parts(self, key: residency.Key) -> list[torch.nn.Module]:
        if key == residency.shared_key(key[0]):
            return _modules(self._shared[key[0]])
        return [self._renditions[key].pipeline.transformer]

    def _forget(self, key: residency.Key) -> None:
        """Let go of a part wherever it is, and of all that cannot be used without it."""
        if key == residency.shared_key(key[0]):
            self._shared.pop(key[0], None)
            self.forget_ends(key[0])
            for other in [other for other in self._renditions if other[0] == key[0]]:
                self._forget(other)
        self._renditions.pop(key, None)
        self._arrived.pop(key, None)
        if key in self._streams:
            self._streams.pop(key).end()
        if key in self._waiting:
            self._waiting.pop(key).discard()
        self._cold(key)
        self._shelf.done(residency.Move(key=key, to=residency.GONE))
        timing.free(self.device)

    def switch(self, spec: ModelSpec, column: Column) -> dict[str, float] | None:
        """Send a rendition's denoiser to host memory and bring it back, twice, and measure the second time.

        Returns:
            `gigabytes`, `to_host_s`, `to_device_s`, and `first_to_host_s` of the first time, which takes the host
            memory. None if it is not on the device, or the host has not the memory.
        """
        key, took = key_of(spec, column), []
        room = residency.waiting_room(self.device, self._pool.bytes / timing.GB)
        for _ in range(2):
            if self._shelf.place(key) != residency.DEVICE or (self._shelf.gigabytes(key) or 0.0) > room:
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

    def drop(self, spec: ModelSpec, column: Column) -> None:
        """Forget a rendition, if there is one, so that its denoiser leaves memory."""
        self._forget(key_of(spec, column))

    def where(self, key: residency.Key) -> str:
        """Where weights are while a precision runs, in words."""
        streamed = self.streaming(key)
        if self.device.type == "cpu" and not streamed:
            return "all weights in host memory, which is the device's own"
        there = [part for part in (DENOISER, TEXT, "VAE") if part not in streamed]
        said = f"{in_words(there)} on the device before the clock started"
        if streamed:
            said = f"{in_words(streamed)} streamed from pinned host memory, a block at a time; {said}"
        if key in self._arrived and DENOISER not in streamed:
            gigabytes, seconds = self._arrived[key]
            said += f" (denoiser back from pinned host memory, {gigabytes:.1f} GB in {seconds:.2f} s, before warm-up)"
        elif DENOISER not in streamed:
            said += " (not moved since loading)"
        others = [part for part in self._shelf.parts if part.key not in (key, residency.shared_key(key[0]))]
        for place, words in ((residency.DEVICE, "also there"), (residency.HOST, "waiting in pinned host memory")):
            there = [f"{_part_name(p.key)}, {p.gigabytes:.1f} GB" for p in others if p.place == place]
            said += f"; {words}: {'; '.join(there)}" if there else ""
        return said


def key_of(spec: ModelSpec, column: Column) -> residency.Key:
    """Of a model's denoiser as one column."""
    return (spec.id, column.format, column.recipe)


def in_words(parts: Sequence[str]) -> str:
    """A list as it is said."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _called(spec: ModelSpec, column: Column) -> str:
    """A denoiser in words, while it is loaded."""
    return spec.name if column == EXACT else f"{spec.name} in {column.written(spec.recipes[0])}"


def _part_name(key: residency.Key) -> str:
    """Weights in words."""
    if key == residency.shared_key(key[0]):
        return f"text encoders and VAE of {key[0]}"
    return " ".join(filter(None, key))


def _modules(components: Mapping[str, object]) -> list[torch.nn.Module]:
    """Those components that have weights."""
    return [component for component in components.values() if isinstance(component, torch.nn.Module)]
