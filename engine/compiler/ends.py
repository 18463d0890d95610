"""The two ends of a call, text encoders and VAE, compiled by their repeated blocks while nobody waits.

All columns of a comparison share them, so they are all compiled or all eager in it: what is used is switched between
comparisons alone, and only to what has been compiled and was seen to make what the eager blocks make. Compiling goes
by pieces, the calls of alike blocks with inputs of one shape, so that whoever asks for something meanwhile waits for
one of them at most. Knows neither models nor requests: a size is whatever tells shapes apart.

Call everything here from the thread that runs the model, as in engine/compiler/compilation.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from engine.compiler import compilation
from engine.errors import CancelledRun
from engine.events import Stop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.machine import Machine

log = logging.getLogger(__name__)

Call = Callable[..., Any]
Told = Callable[[int, int], None]
"""Called with a piece's number, from 1 on, and how many there are."""

BLOCKS = frozenset(
    (
        "CLIPEncoderLayer",
        "T5Block",
        "UMT5Block",
        "LTX2TransformerBlock1d",
        "UNetMidBlock2D",
        "UpDecoderBlock2D",
        "QwenImageMidBlock",
        "QwenImageUpBlock",
        "LTX2VideoMidBlock3d",
        "LTX2VideoUpBlock3d",
    )
)
"""Classes of blocks that Dynamo takes whole. It does not those of language models (Qwen2.5-VL, Qwen3, Gemma 3,
Mistral), in which transformers 5 hooks attention by a `ContextVar`, nor of Wan's VAE, which compares what it keeps of
a frame before with a string."""
TOLERANCE = 0.02
"""How far what a compiled block makes may lie from what the eager one makes of the same input, as relative L2. Rounding
to bf16 in other places moved whole FLUX.1-dev text encoders by 0.024 and its whole decoder by 0.015
(assets/figures/ends.json), each many blocks long; a wrong block is off by about 1."""


def wanted(device: torch.device, machine: Machine) -> bool:
    """Whether ends are compiled: where denoisers are."""
    return compilation.compiles(device, machine)


class _Piece(NamedTuple):
    """What is compiled at a time."""

    part: str
    """The component's name."""
    kind: tuple[Hashable, ...]
    """Class of its blocks, and the shapes of their weights."""
    given: Hashable
    """What they are called with, as of `_described`."""


class Ends:
    """The blocks of one pipeline's text encoders and VAE.

    Args:
        components: of the pipeline, by name.

    Attributes:
        used: names of the components whose blocks run compiled now.
    """

    def __init__(self, components: Mapping[str, object]):
        self._blocks = {
            part: found
            for part, module in components.items()
            if isinstance(module, nn.Module)
            and (found := [block for block in module.modules() if type(block).__name__ in BLOCKS])
        }
        self._plain: dict[nn.Module, Call] = {block: block.forward for of in self._blocks.values() for block in of}
        self._kinds = {block: _kind(block) for block in self._plain}
        self._compiled: dict[nn.Module, Call] = {}
        self._sizes: dict[Hashable, list[_Piece]] = {}
        """What a call of that size is made of."""
        self._proven: set[_Piece] = set()
        """Compiled, and seen to make what the eager blocks make."""
        self._eager: set[str] = set()
        """Components that stay so, as one of their pieces cannot be compiled."""
        self._ready: set[Hashable] = set()
        """Sizes with nothing left to compile."""
        self.used: tuple[str, ...] = ()

    def is_ready(self, size: Hashable) -> bool:
        """Nothing is left to compile for a size."""
        return size in self._ready

    def compile(self, size: Hashable, run: Callable[[], object], stop: Stop, told: Told = lambda *_: None) -> None:
        """Compile what is left for a size, to be used from the next `use` on; eager until then.

        Args:
            run: makes a call of that size, with both ends in it.
            stop: is asked before every piece; what was compiled until then is kept.

        Raises:
            CancelledRun: `stop` or `run` said so.
        """
        self.use(None)
        compilation.configure()
        if stop():
            raise CancelledRun
        if size not in self._sizes:
            self._sizes[size] = self._pieces(run)
        pieces = self._sizes[size]
        for number, piece in enumerate(pieces, 1):
            if piece.part in self._eager or piece in self._proven:
                continue
            if stop():
                raise CancelledRun
            told(number, len(pieces))
            self._prove(piece, run)
        self._ready.add(size)

    def use(self, size: Hashable | None) -> None:
        """From now on run compiled what is compiled for that size, if all of it is; otherwise everything eager."""
        ready = self._sizes[size] if size in self._ready else []
        parts = dict.fromkeys(piece.part for piece in ready if piece.part not in self._eager)
        self.used = tuple(parts)
        for part, blocks in self._blocks.items():
            for block in blocks:
                if part in parts:
                    block.forward = self._where_proven(part, block)
                else:
                    block.__dict__.pop("forward", None)

    def _where_proven(self, part: str, block: nn.Module) -> Call:
        """The compiled call with what it was proven with, so that nothing is ever compiled while somebody waits."""
        plain, compiled = self._plain[block], self._compiled.get(block, self._plain[block])
        proven = {piece.given for piece in self._proven if piece[:2] == (part, self._kinds[block])}

        def called(*args: object, **kwargs: object) -> object:
            call = compiled if _described((args, kwargs)) in proven else plain
            return call(*args, **kwargs)

        return called

    @contextmanager
    def _instead(self, call: Callable[[str, nn.Module], Call]) -> Iterator[None]:
        """Have every block run what `call` makes of it."""
        try:
            for part, blocks in self._blocks.items():
                for block in blocks:
                    block.forward = call(part, block)
            yield
        finally:
            self.use(None)

    def _pieces(self, run: Callable[[], object]) -> list[_Piece]:
        """What a call is made of, in the order in which it comes."""
        found: dict[_Piece, None] = {}

        def watched(part: str, block: nn.Module) -> Call:
            def called(*args: object, **kwargs: object) -> object:
                found[_Piece(part, self._kinds[block], _described((args, kwargs)))] = None
                return self._plain[block](*args, **kwargs)

            return called

        with self._instead(watched):
            run()
        return list(found)

    def _prove(self, piece: _Piece, run: Callable[[], object]) -> None:
        """Compile a piece, and compare each of its calls with the eager one, whose outputs the run goes on with."""
        why: list[str] = []

        def tried(part: str, block: nn.Module) -> Call:
            plain = self._plain[block]
            if (part, self._kinds[block]) != piece[:2]:
                return plain

            def called(*args: object, **kwargs: object) -> object:
                if why or _described((args, kwargs)) != piece.given:
                    return plain(*args, **kwargs)
                again, named = tree_map(lambda leaf: leaf, (args, kwargs))  # decoders' blocks write into lists
                made = plain(*args, **kwargs)
                try:
                    apart = _apart((self._compile(block)(*again, **named), again, named), (made, args, kwargs))
                except Exception as error:  # noqa: BLE001 - Dynamo, Inductor and Triton raise whatever they stumble over
                    why.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
                else:
                    if not apart <= TOLERANCE:
                        why.append(f"what is compiled lies {apart:.3g} from what is not")
                return made

            return called

        with self._instead(tried):
            run()
        if why:
            self._eager.add(piece.part)
            log.warning("%s is not compiled (%s): %s", piece.part, piece.kind[0], why[0])
        else:
            self._proven.add(piece)

    def _compile(self, block: nn.Module) -> Call:
        if block not in self._compiled:
            self._compiled[block] = torch.compile(self._plain[block], fullgraph=True, dynamic=False)
        return self._compiled[block]


def _kind(block: nn.Module) -> tuple[Hashable, ...]:
    return type(block).__name__, *((name, tuple(weight.shape)) for name, weight in block.named_parameters())


def _described(given: Any) -> Hashable:
    """All of a call's arguments that compiled code may depend on, without the values of tensors."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype
    if isinstance(given, tuple | list):
        return tuple(_described(one) for one in given)
    if isinstance(given, dict):
        return tuple((name, _described(one)) for name, one in given.items())
    return given if isinstance(given, int | float | str | None) else type(given).__name__


def _apart(made: object, wanted: object) -> float:
    """The largest relative L2 between tensors that two calls left behind, or NaN if they are not of the same shapes."""
    both = [[leaf for leaf in tree_leaves(one) if isinstance(leaf, Tensor)] for one in (made, wanted)]
    if [one.shape for one in both[0]] != [one.shape for one in both[1]]:
        return float("nan")
    most = torch.zeros(())
    for mine, theirs in zip(*both, strict=True):
        theirs = theirs.float()
        distance = (mine.float() - theirs).norm() / theirs.norm().clamp(min=torch.finfo(torch.float32).tiny)
        most = torch.maximum(most.to(distance.device), distance)
    return most.item()
