"""Compiling the denoiser: its repeated blocks one by one, alike for every precision, on GPUs only.

Compiling one block and running it many times ("regional compilation") starts up several times faster than compiling
the whole model and is nearly as fast. On a CPU it costs a minute and gains emulated precisions nothing, so there
everything stays eager.

Dynamo's and Inductor's settings belong to a thread: call everything here from the thread that runs the model.
Knows nothing of precisions beyond what their `Support` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.compiler import text_kv
from engine.compiler.step_graph import PLAIN_CALLS, StepGraph
from engine.files import cache_folder
from engine.machine import Machine, Support

if TYPE_CHECKING:
    from engine.compiler.sequence import Shared

EAGER, DEFAULT, GRAPHS, BLOCK_GRAPHS = "eager", "default", "step graph", "reduce-overhead"
"""How the blocks run. EAGER: not compiled. DEFAULT: compiled. GRAPHS: compiled, with the whole step as one CUDA graph.
BLOCK_GRAPHS: compiled with torch.compile's mode of that name, which makes each block a CUDA graph of its own. The
engine never uses the last one; the benchmark does, because the post does."""
WARM_UP_STEPS: Mapping[str, int] = {EAGER: 1, DEFAULT: 2, GRAPHS: PLAIN_CALLS + 1, BLOCK_GRAPHS: 5}
"""Denoising steps until nothing new happens. The second step meets tensors with other strides, and a step graph is
recorded after that. Graphs of blocks take longest where guidance has prompts of two lengths: step 2 runs the first
length with the symbolic code of the second, whose first call is not recorded, step 3 records it, step 4 replays it."""

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_RECOMPILE_LIMIT = 128
"""Graphs of one block class; all precisions and shapes of all models with it share them, and torch's 8 are too few."""


PROMPT: Mapping[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]] = {
    "QwenImageTransformerBlock": lambda given: ((given["encoder_hidden_states"], 1), (given["image_rotary_emb"][1], 0)),
}
"""For models whose prompts are not padded: class of a block -> those of its arguments that are as long as the prompt,
each with the dimension that is. It is made symbolic, so that one graph serves every prompt. Padding instead would need
a mask. FlashAttention takes none, and on mini-qwen masked pictures differ as much as fused from unfused attention."""
DECIDED: Mapping[str, tuple[str, str]] = {"LTX2VideoTransformerBlock": ("all_perturbed", "perturbation_mask")}
"""Class of a block -> two of its arguments: a tensor in host memory that says that all attention is left out, as
LTX-2.3's guidance wants of one block, and the mask that is then not read. Compiled code cannot branch on a tensor, so
it is given a plain value."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What the first run of a shape took."""

    seconds: float
    """Wall clock, with the compile."""
    graphs: int
    """Graphs that were compiled."""
    added: int
    """The most bytes it allocated beyond what was there when it began, weights that came and went left out."""
    most: int | None = None
    """The most bytes that were allocated on the device at once, with everything; None where no weights came and went,
    and on a CPU."""
    dropped: int = 0
    """Recordings that had been given up by then (`Blocks.dropped`)."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What compiling and recording did; a difference of two is what was done in between."""

    compiled: int = 0
    """Graphs, in this process."""
    plain: int = 0
    """Steps that ran as they are, on the way to a recording."""
    recorded: int = 0
    """CUDA graphs, of one denoiser in its mode."""
    replayed: int = 0
    """Its steps that were replays of a recorded one."""

    @classmethod
    def so_far(cls, blocks: Blocks) -> Done:
        steps = {"plain": blocks.plain, "recorded": blocks.recorded, "replayed": blocks.replayed}
        return cls(compiled=graphs_compiled(), **steps)

    def since(self, before: Done) -> Done:
        """What was done after `before`."""
        return Done(**{name: value - getattr(before, name) for name, value in asdict(self).items()})

    @property
    def delayed(self) -> bool:
        """Something was done that a call of a warm shape does not do, so that its time is not that of the call."""
        return bool(self.compiled or self.plain or self.recorded)


def compiles(device: torch.device, machine: Machine) -> bool:
    """Whether anything is compiled on a device."""
    return device.type == "cuda" and not machine.no_compile


def mode(batch_size: int, support: Support, device: torch.device, recordable: bool = True) -> str:
    """How the blocks run: a CUDA graph pays where launching kernels takes a good part of a step, at one picture or
    clip.

    Args:
        recordable: the denoiser's step can be one (`ModelSpec.recordable`).
    """
    if not compiles(device, support.machine):
        return EAGER
    recorded = support.execution == "native" and batch_size == 1 and recordable and not support.no_graph
    return GRAPHS if recorded else DEFAULT


def configure() -> None:
    """Settings that key the compile caches: the same before every compile of this thread.

    Compiled code is kept across processes below the user's cache folder, unless $TORCHINDUCTOR_CACHE_DIR says where.
    """
    # Inductor takes a second to import, and where nothing is compiled nobody needs it.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from engine.compiler import fusion

    if os.environ.get(_CACHE_VARIABLE) in (None, default_cache_dir()):  # torch writes its default into it
        os.environ[_CACHE_VARIABLE] = str(cache_folder() / "inductor")
    fusion.install()
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 8 * _RECOMPILE_LIMIT


def graphs_compiled() -> int:
    """Graphs that this process has compiled so far; a difference counts compiles in between."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def forget_sizes() -> None:
    """Forget the sizes that were compiled before. With `dynamic=None`, Dynamo makes a dimension symbolic once it has
    seen it change, in whatever model that was."""
    torch._dynamo.pgo.reset_code_state()


def block_graphs_recorded(device: torch.device) -> int:
    """How many calls of blocks in this thread were no replays so far: those that were recorded, and the first one of
    each compiled function, which is not. Begins again at 0 with `torch.compiler.reset`."""
    from torch._inductor.cudagraph_trees import get_manager  # belongs to the thread that imports it first

    trees = get_manager(device.index or 0, create_if_none_exists=False)
    if trees is None:
        return 0
    nodes, waiting = 0, list(trees.get_roots())
    while waiting:
        nodes += 1
        waiting += chain.from_iterable(waiting.pop().children.values())
    return nodes + len(trees.warmed_up_functions)


def block_graphs_skipped() -> int:
    """How often Inductor has given up recording a compiled function in this process."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


class Blocks:
    """The repeated blocks of one denoiser, in one mode at a time.

    Args:
        denoiser: a diffusers model whose class names its `_repeated_blocks`.
        dynamic: torch.compile's argument. False gives every shape its own graph, the fastest, but for the length of
            prompts that are not padded, which is symbolic from the first (see `PROMPT`); None lets any dimension that
            changes become symbolic, so that what a size runs as depends on which came before it.
        options: Inductor settings on top of the mode's own.
        shared: how several ranks compute each step together.

    Attributes:
        mode: the one in use.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        dynamic: bool | None = False,
        options: Mapping[str, object] | None = None,
        shared: Shared | None = None,
    ):
        self._denoiser, self._dynamic = denoiser, dynamic
        self._given = options
        self._blocks = [m for m in denoiser.modules() if type(m).__name__ in denoiser._repeated_blocks]
        self.mode = EAGER
        self._around: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]] | None = None
        self._calls: dict[str, list[Callable[..., Any] | None]] = {EAGER: [None] * len(self._blocks)}
        """By mode; `GRAPHS` records the calls of `DEFAULT`."""
        self._shared = shared
        self._call = denoiser._call_impl if shared is None else shared.part(denoiser._call_impl)
        self._step = StepGraph(self._call)
        self._text_kv = text_kv.of(denoiser, self._blocks)
        """Used with the step graph: more than one clip would take that many times the memory."""
        self._key_value: Callable[..., Any] = text_kv.key_value

    def use(self, mode: str) -> None:
        """Run in `mode` from now on; what was compiled or recorded is kept."""
        self.mode = mode
        if self._shared is not None:
            self._shared.tell("use", mode)
        kind = DEFAULT if mode == GRAPHS else mode
        if kind not in self._calls:
            self._calls[kind] = list(self._compiled() if kind == DEFAULT else self._replayed())
        calls = self._calls[kind]
        whole: Callable[..., Any] | None = self._step if mode == GRAPHS else None
        if self._text_kv is not None:
            self._text_kv.install(mode == GRAPHS)
            if mode == GRAPHS:
                calls = [call and self._text_kv.instead(call, number) for number, call in enumerate(calls)]
                whole = self._text_kv.before(self._step, self._key_value)
        if self._around is not None:
            calls = [
                self._around(block, call or block._call_impl) for block, call in zip(self._blocks, calls, strict=True)
            ]
        for block, call in zip(self._blocks, calls, strict=True):
            block._compiled_call_impl = call  # where nn.Module.compile() keeps it
        if self._shared is not None:
            whole = self._shared.lead(whole or self._call)
        self._denoiser._compiled_call_impl = whole

    def surround(self, around: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]] | None) -> None:
        """Wrap the calls of blocks from now on, compiled or not, by block and call; None unwraps them. Use no recorded
        mode meanwhile. Runs eager until the next `use`."""
        self.forget()
        self._around = around
        self.use(EAGER)

    def vary(self, variant: object) -> None:
        """The blocks compute something else from now on, which this hashable names: it gets recordings of its own."""
        self._step.variant = variant
        if self._shared is not None:
            self._shared.tell("vary", variant)
        if self._text_kv is not None:
            self._text_kv.variant = variant

    @property
    def dropped(self) -> int:
        """Recorded steps that were given up for others so far: when it grows, what was warm may not be any more."""
        return self._step.dropped

    @property
    def recorded(self) -> int:
        """CUDA graphs recorded so far: of steps, or in their mode of blocks."""
        return self._step.recorded if self.mode != BLOCK_GRAPHS else block_graphs_recorded(self._denoiser.device)

    @property
    def plain(self) -> int:
        """Steps so far that ran as they are, on the way to a recording."""
        return self._step.plain

    @property
    def replayed(self) -> int:
        """Steps so far that were replays of a recorded one."""
        return self._step.replayed

    def forget(self) -> None:
        """The weights have moved: what was recorded with their addresses is of no use any more."""
        self._step.forget()
        if self._shared is not None:
            self._shared.tell("forget")
        if self._text_kv is not None:
            self._text_kv.forget()

    def settle(self) -> None:
        """Wait until all ranks have done their part of what was called, where there are several.

        Raises:
            FaultError: one of them was lost, so that what was made is not to be used.
        """
        if self._shared is not None:
            self._shared.settle()

    @property
    def text_once(self) -> bool:
        """Keys and values of the text are computed once a call, when a step is recorded."""
        return self._text_kv is not None

    @cached_property
    def _options(self) -> dict[str, object]:
        from engine.compiler import fusion, sequence

        further = sequence.OPTIONS if self._shared is not None else {}
        return {**(fusion.options() if self._given is None else self._given), **further}

    def _compiled(self) -> list[Callable[..., Any]]:
        configure()
        self._denoiser.compile_repeated_blocks(fullgraph=True, dynamic=self._dynamic, options=self._options)
        self._key_value = torch.compile(self._key_value, fullgraph=True, dynamic=self._dynamic, options=self._options)
        calls = [_decided(block, block._compiled_call_impl) for block in self._blocks]
        where = [PROMPT.get(type(block).__name__) for block in self._blocks]
        if self._dynamic is not False:
            return calls
        return [_any_prompt(call, at) if at else call for call, at in zip(calls, where, strict=True)]

    def _replayed(self) -> list[Callable[..., Any]]:
        """As the post has it: the compiled `forward` of every block, and copies of its outputs, which the next block's
        replay would overwrite. With copies every call may begin a new round, so that no step needs to be marked."""
        configure()
        options = self._options | torch._inductor.list_mode_options("reduce-overhead")
        return [
            _decided(
                block,
                _cloned(torch.compile(block.forward, fullgraph=True, dynamic=self._dynamic, options=dict(options))),
            )
            for block in self._blocks
        ]


def _cloned(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: object, **kwargs: object) -> object:
        made = call(*args, **kwargs)
        return made.clone() if isinstance(made, Tensor) else tuple(tensor.clone() for tensor in made)

    return called


def _decided(block: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    names = DECIDED.get(type(block).__name__)
    if names is None:
        return call
    decision, mask = names

    def called(*args: object, **kwargs: object) -> object:
        if isinstance(kwargs.get(decision), Tensor):
            kwargs[decision] = bool(kwargs[decision])
            kwargs[mask] = None if kwargs[decision] else kwargs[mask]
        return call(*args, **kwargs)

    return called


def _any_prompt(call: Callable[..., Any], where: Callable[[Mapping[str, Any]], tuple[Any, ...]]) -> Callable[..., Any]:
    def called(*args: object, **kwargs: object) -> object:
        for tensor, dimension in where(kwargs):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        return call(*args, **kwargs)

    return called
