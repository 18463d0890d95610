"""The post's tables, the commands that measure their cells, and how long those take: a plan, before anything runs.

A part is one command of `python -m engine` with a folder of its own, so that it can be repeated alone and gone on
with. Where a machine has tensor cores for FP8 but not for the post's formats, FP8 is timed in their place, and called
so. Their LPIPS is measured all the same, as an emulated format makes the real one's pictures. Runs nothing, and imports
no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine import catalog, reference
from engine.benchmark.methods import ENGINE, POST
from engine.columns import POST as POSTS_RECIPE
from engine.errors import RequestError
from engine.formats import FP8, MXFP8, NVFP4, REFERENCE
from engine.quality.prompts import DRAWBENCH
from engine.reproduction.cards import B200, card

PERFORMANCE: Mapping[str, str] = MappingProxyType(
    {"flux-performance": "flux.1-dev", "qwen-performance": "qwen-image", "ltx-performance": "ltx-2"}
)
"""Table -> model: latency, speedup and peak memory at batch 1, 4 and 8."""
LPIPS: Mapping[str, str] = MappingProxyType({"flux-lpips": "flux.1-dev", "qwen-lpips": "qwen-image"})
"""Table -> model: mean LPIPS over DrawBench."""
FULL = "flux-full-selective"
"""All layers quantized against those that the post selects: LPIPS, latency and memory of FLUX.1-dev."""
TABLES = (*PERFORMANCE, *LPIPS, FULL)
FORMATS = (MXFP8.id, NVFP4.id)
"""The post's."""
BATCH_SIZES = (1, 4, 8)
"""The post's."""
RECIPES = (POSTS_RECIPE, "full")
"""Of the last table."""
CHECK = "self-check"
"""How the name of the first part begins."""
_CHECK_STEPS = 4
"""Of the self-check's one prompt."""
_PROMPTS = 200
"""DrawBench's."""
_LOADING, _LANE = 60.0, 40.0
"""Seconds to start, and to load and compile one column by one method: guesses, corrected by what was measured."""
_EMULATED = 3.0
"""How many times bf16's latency an emulated format takes: a guess."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    rehearsal: str = ""
    """What stands for the models in a rehearsal; empty where it is none."""
    models: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """A model of the post -> what is run in its place."""
    random: bool = False
    """Random weights."""
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    repeats: int = 5
    steps: int | None = None
    """None for the model's own number."""
    prompts: int | None = None
    """The first few; None for all of DrawBench."""

    def model(self, posts: str) -> str:
        """What is run for a model of the post."""
        return self.models.get(posts, posts)


MINIATURES = Scale(
    rehearsal="miniatures",
    models=MappingProxyType({"flux.1-dev": "mini-flux", "qwen-image": "mini-qwen", "ltx-2": "mini-ltx2"}),
    batch_sizes=(1,),
    repeats=1,
    steps=2,
    prompts=1,
)
RANDOM = Scale(rehearsal="random weights", random=True, batch_sizes=(1,), repeats=1, steps=4, prompts=1)


def scale(rehearse: bool, random: bool, batch_sizes: Sequence[int] | None) -> Scale:
    """What the arguments ask for.

    Raises:
        RequestError: a batch size that the post has not.
    """
    chosen = (RANDOM if random else MINIATURES) if rehearse else Scale(random=random)
    if batch_sizes is None:
        return chosen
    if unknown := [str(size) for size in batch_sizes if size not in BATCH_SIZES]:
        raise RequestError(f"The post has no batch size {', '.join(unknown)}: choose from 1, 4 and 8.")
    return Scale(**(vars(chosen) | {"batch_sizes": tuple(sorted(set(batch_sizes)))}))


def chosen(names: Sequence[str] | None, asked: Scale) -> tuple[str, ...]:
    """The tables to fill.

    Raises:
        RequestError: there is no such table, or random weights cannot fill it.
    """
    for name in names or ():
        if name not in TABLES:
            raise RequestError(f"The post has no table {name}: choose from {', '.join(TABLES)}.")
    if not asked.random or asked.rehearsal:
        return tuple(name for name in TABLES if name in (names or TABLES))
    if pictures := [name for name in names or () if name not in PERFORMANCE]:
        raise RequestError(
            f"Random weights make no pictures to score: leave out {', '.join(pictures)}, or --random-weights."
        )
    return tuple(name for name in PERFORMANCE if name in (names or PERFORMANCE))


def model_of(table: str) -> str:
    """The model of the post that a table is about."""
    return {**PERFORMANCE, **LPIPS, FULL: LPIPS["flux-lpips"]}[table]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command, and what it leaves."""

    name: str
    """Of its folder."""
    tables: tuple[str, ...]
    """That it fills."""
    model: str
    """The post's."""
    arguments: tuple[str, ...]
    """Of `python -m engine`, without `--out`."""
    file: str
    """Its result, in its folder."""
    to_file: bool = False
    """`--out` is that file, not the folder."""
    bundled: bool = False
    """It runs a bundled model, so that TWINFRAME_WEIGHTS is not meant for it."""
    seconds: float
    """That it may take."""

    def command(self, out: Path) -> tuple[str, ...]:
        """All arguments, with results below `out`."""
        folder = out / self.name
        return (*self.arguments, "--out", str(folder / self.file if self.to_file else folder))

    @property
    def shown(self) -> str:
        """The command as it would be typed, without this machine's folders."""
        arguments = ["--weights=DIR" if said.startswith("--weights=") else said for said in self.command(Path("OUT"))]
        return f"python -m engine {shlex.join(arguments)}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of a machine decides the plan, as `python -m engine doctor --json` tells it."""

    device: str
    executions: Mapping[str, str]
    """Format -> "native", "emulated" or "unavailable"."""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Machine:
        return cls(
            device=found["device"],
            executions={name: about["execution"] for name, about in found["formats"].items()},
        )

    @property
    def native(self) -> bool:
        """It runs one of the post's formats natively."""
        return any(self.executions[name] == "native" for name in FORMATS)

    @property
    def stands_in(self) -> str:
        """The format that is timed in the place of the post's; empty where those are, or none can be."""
        return FP8.id if not self.native and self.executions[FP8.id] == "native" else ""

    @property
    def timed(self) -> tuple[str, ...]:
        """Formats of the performance tables."""
        return (self.stands_in,) if self.stands_in else FORMATS

    @property
    def scored(self) -> tuple[str, ...]:
        """Formats of the LPIPS tables."""
        return (self.stands_in, *FORMATS) if self.stands_in else FORMATS

    @property
    def methods(self) -> tuple[str, ...]:
        """The engine's, and the post's where it has its formats: the post has no FP8, and compiles nothing on a CPU."""
        return (ENGINE, POST) if self.native else (ENGINE,)

    @property
    def slower(self) -> float:
        """How many times a B200's time a call takes here, by the peaks in bf16."""
        kind = card(self.device)
        return 1.0 if kind is None else B200.bf16 / kind.bf16


def check(tables: Sequence[str], machine: Machine, more: Sequence[str]) -> Part:
    """The part that comes first: pictures of a bundled model in every format that these tables are measured in."""
    formats = machine.timed if set(tables) <= PERFORMANCE.keys() else machine.scored
    return Part(
        name="-".join((CHECK, *formats)),
        tables=(),
        model=catalog.MINI_FLUX.id,
        arguments=(
            *_evaluate(catalog.MINI_FLUX.id, formats, RECIPES[:1], DRAWBENCH, 1),
            *("--steps", str(_CHECK_STEPS), *more),
        ),
        file="summary.json",
        bundled=True,
        seconds=_LOADING,
    )


def plan(tables: Sequence[str], asked: Scale, machine: Machine, more: Sequence[str]) -> list[Part]:
    """The parts that fill the tables, the cheapest first.

    Args:
        more: arguments that every command takes, such as where weights come from.
    """
    parts = [
        part
        for table, model in PERFORMANCE.items()
        if table in tables
        for part in _timed(table, model, asked, machine, more)
    ]
    for table, model in LPIPS.items():
        both = FULL in tables and model == LPIPS["flux-lpips"]
        if table in tables and not both:
            parts.append(_scored(table, (table,), model, RECIPES[:1], asked, machine, more))
    if FULL in tables:
        filled = tuple(table for table in ("flux-lpips", FULL) if table in tables)
        parts.append(_scored(FULL, filled, LPIPS["flux-lpips"], RECIPES, asked, machine, more))
    return sorted(parts, key=lambda part: part.seconds)


def _timed(table: str, model: str, asked: Scale, machine: Machine, more: Sequence[str]) -> Iterator[Part]:
    for size in asked.batch_sizes:
        arguments = ["bench", "--model", asked.model(model), "--precision", REFERENCE, *machine.timed]
        arguments += ["--batch-size", str(size), "--repeats", str(asked.repeats), "--methods", *machine.methods]
        arguments += _settings(asked.steps, asked, more)
        calls = (asked.repeats + 0.5) * len(machine.methods)
        lanes = (1 + len(machine.timed)) * len(machine.methods)
        took = sum(_latency(model, name, size, asked, machine) for name in (REFERENCE, *machine.timed))
        yield Part(
            name=f"{table}-batch-{size}",
            tables=(table,),
            model=model,
            arguments=tuple(arguments),
            file="bench.json",
            to_file=True,
            bundled=asked.model(model) in catalog.BUNDLED,
            seconds=_LOADING if asked.models else _LOADING + lanes * _LANE + calls * took,
        )


def _scored(
    name: str,
    tables: tuple[str, ...],
    model: str,
    recipes: Sequence[str],
    asked: Scale,
    machine: Machine,
    more: Sequence[str],
) -> Part:
    prompts = asked.prompts or _PROMPTS
    bf16 = _latency(model, REFERENCE, 1, asked, machine)
    lanes = [
        _latency(model, column, 1, asked, machine) if machine.executions[column] == "native" else _EMULATED * bf16
        for column in machine.scored
    ]
    took = prompts * (3 * bf16 + len(recipes) * sum(lanes))  # bf16 thrice: the reference, the floor and the ceiling
    arguments = _evaluate(asked.model(model), machine.scored, recipes, DRAWBENCH, asked.prompts)
    return Part(
        name=name,
        tables=tables,
        model=model,
        arguments=(*arguments, *_settings(asked.steps, asked, more)),
        file="summary.json",
        bundled=asked.model(model) in catalog.BUNDLED,
        seconds=_LOADING if asked.models else _LOADING + (1 + len(lanes) * len(recipes)) * _LANE + took,
    )


def _evaluate(
    model: str,
    columns: Sequence[str],
    recipes: Sequence[str],
    prompts: str,
    limit: int | None,
) -> tuple[str, ...]:
    first = () if limit is None else ("--limit", str(limit))
    return "evaluate", "--model", model, "--precision", *columns, "--recipe", *recipes, "--prompts", prompts, *first


def _settings(steps: int | None, asked: Scale, more: Sequence[str]) -> list[str]:
    count = [] if steps is None else ["--steps", str(steps)]
    return [*count, *(["--random-weights"] if asked.random else []), *more]


def _latency(model: str, precision: str, batch_size: int, asked: Scale, machine: Machine) -> float:
    """Seconds of a call, from the post's latency on a B200."""
    theirs = MXFP8.id if precision == FP8.id else precision
    row = posts_row(model, theirs, batch_size)
    share = 1.0 if asked.steps is None else asked.steps / catalog.MODELS[model].defaults.num_inference_steps
    return float(row["latency_s"]) * machine.slower * share


def posts_row(model: str, precision: str, batch_size: int) -> Mapping[str, Any]:
    """A row of the post's performance tables."""
    wanted = (model, precision, batch_size)
    found: Iterable[Mapping[str, Any]] = reference.read()["performance"]
    return next(row for row in found if (row["model"], row["precision"], row["batch_size"]) == wanted)


def spoken(seconds: float) -> str:
    """A duration as a plan gives it."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
