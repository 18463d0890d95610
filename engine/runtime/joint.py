"""A studio whose pictures are made by several devices together, each denoising step by all of them.

The first device is the studio's own: it has the pipeline, the text encoders and the VAE. Each of the others holds the
denoisers that the first one holds, as engine/runtime/ranks.py's processes have it, and follows it when weights wait in
host memory or leave. Every column runs so, so that speedups compare with bf16 on as many cards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from engine import quantized
from engine.catalog import ModelSpec
from engine.columns import FP8_ATTENTION, Column
from engine.compiler import compilation, sequence
from engine.errors import UnsupportedError
from engine.events import Stop, Tell
from engine.quantization import capability, recipes
from engine.request import CompareRequest
from engine.results import Generation
from engine.runtime.pipeline import Made
from engine.runtime.ranks import HUNG_SECONDS, Lead, Ranks
from engine.runtime.residents import Rendition, key_of
from engine.runtime.studio import Studio
from engine.safety import NO_FILTER, Filter
from engine.weights import loading, residency
from engine.weights.source import BUNDLED_OR_HUB, Source


class JointStudio(Studio):
    """The studio of several devices that work on one picture.

    Args:
        devices: names of torch devices of one kind; the first is the studio's own.
        limit: seconds after which a device that does not answer is given up.

    Raises:
        UnsupportedError: there is no such device, or they are not of one kind.
    """

    def __init__(
        self,
        devices: Sequence[str],
        source: Source = BUNDLED_OR_HUB,
        filtered: Filter = NO_FILTER,
        limit: float = HUNG_SECONDS,
    ):
        devices = ["cuda:0" if name == "cuda" else name for name in devices]
        super().__init__(devices[0], source, filtered)
        for name in devices[1:]:
            why = "each does an equal part of a picture"
            self.machine.require_like(devices[0], capability.detect(name), name, why)
        self.machine = replace(self.machine, cards=len(devices))
        self.support = capability.supports(self.machine)
        self.ranks = Ranks(devices, source, limit)
        self._held: set[residency.Key] = set()
        """Denoisers that the other ranks hold."""

    def rendition(self, spec: ModelSpec, column: Column, tell: Tell) -> Rendition:
        """As `Studio.rendition`, on all devices.

        Raises:
            UnsupportedError: also where the model cannot be split so, and of FP8 attention.
            FaultError: a rank was lost.
        """
        if column.fp8_attention:
            raise UnsupportedError(
                f"Several devices that make one picture together have no FP8 attention: leave out {FP8_ATTENTION}, or "
                "name one device."
            )
        if key_of(spec, column) not in self._renditions:  # it builds the denoiser, without weights, to look at it
            require(spec, len(self.ranks))
        if not self.ranks.alive:
            self._held.clear()
            for key, there in self._renditions.items():
                there.blocks.forget()
                self._cold(key)
            self.ranks.start()
        made = super().rendition(spec, column, tell)
        if key_of(spec, column) not in self._held:  # it was there before these ranks were
            self._send(spec, column, made.support)
            self.ranks.settle()
        return made

    def close(self) -> None:
        self.ranks.close()

    def make_room(
        self, spec: ModelSpec, key: residency.Key, gigabytes: float, request: CompareRequest | None = None
    ) -> None:
        super().make_room(spec, key, gigabytes, request)
        if key in self._streamed and key != residency.shared_key(spec.id):
            raise UnsupportedError(
                f"{spec.name} has to be streamed on such a card, which several cannot do together: name one device."
            )

    def _denoiser(
        self,
        spec: ModelSpec,
        column: Column,
        plan: recipes.Plan,
        told: loading.Told,
        leaving: Callable[[loading.Place], loading.Place] | None,
    ) -> nn.Module:
        self._send(spec, column, self.support[column.format])  # what is fetched is here: text encoders came first
        made = super()._denoiser(spec, column, plan, told, leaving)
        self.ranks.settle()
        return made

    def _send(self, spec: ModelSpec, column: Column, support: capability.Support) -> None:
        key = key_of(spec, column)
        self.ranks.tell("load", key, spec, column, support, quantized.of_model(spec.id))
        self._held.add(key)

    def _blocks(self, key: residency.Key, transformer: nn.Module) -> compilation.Blocks:
        return compilation.Blocks(transformer, shared=Lead(self.ranks, key, transformer))

    def _move(self, move: residency.Move) -> None:
        before = self._shelf.place(move.key)
        super()._move(move)
        if move.key in self._held and (now := self._shelf.place(move.key)) != before:
            self.ranks.tell("store" if now == residency.HOST else "restore", move.key)

    def _forget(self, key: residency.Key) -> None:
        super()._forget(key)
        if key in self._held:
            self._held.remove(key)
            self.ranks.tell("drop", key)

    def _take(
        self,
        rendition: Rendition,
        spec: ModelSpec,
        request: CompareRequest,
        warm: compilation.WarmUp,
        tell: Tell,
        stop: Stop,
    ) -> tuple[Generation, Made]:
        generation, made = super()._take(rendition, spec, request, warm, tell, stop)
        where = " and ".join(self.ranks.devices)
        said = f"{where}, each with the whole denoiser, compute a part of every step; memory is the first one's"
        return replace(generation, ran={**generation.ran, "Cards": said}), made


def require(spec: ModelSpec, devices: int) -> None:
    """Raises UnsupportedError: so many devices cannot make one picture of this model together, in one sentence."""
    heads = sequence.heads(loading.blueprint(spec))
    if heads is None:
        raise UnsupportedError(
            f"{spec.name} is made by one device: several work on one picture of FLUX.1 alone so far, so name one, or "
            "several with commas, which make columns at once."
        )
    if heads % devices:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise UnsupportedError(
            f"{devices} devices cannot share the {heads} attention heads of {spec.name} evenly: name one, or {fitting}."
        )
