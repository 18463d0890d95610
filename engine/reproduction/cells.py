"""What was measured beside what the post says, a row of one of its tables each.

Knows results as engine/benchmark/bench.py and engine/quality/evaluate.py write them, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine import reference
from engine.benchmark.methods import ENGINE, POST, stands_for
from engine.formats import FP8, LABELS, REFERENCE
from engine.reproduction.tables import FORMATS, FULL, LPIPS, PERFORMANCE, RECIPES, Machine, Scale, posts_row

LATENCY, SPEEDUP, MEMORY, SCORE = "latency_s", "speedup", "peak_memory_gb", "lpips"
_CALLED = {"memory_gb": MEMORY}
"""The post's tables differ in a name."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One figure, three times."""

    post: float | None = None
    """The post's, of a B200."""
    engine: float | None = None
    """As a comparison runs it; an LPIPS has no other."""
    method: float | None = None
    """By the post's method; None where that was not run."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a table."""

    table: str
    precision: str
    """The post's; or what it has not, where that is shown besides."""
    batch_size: int
    recipe: str
    """Empty for bf16."""
    ran: str
    """The format that was measured: another where one stands in."""
    execution: str
    """"native", "emulated", or empty where nothing was measured."""
    values: Mapping[str, Value]
    """`LATENCY` in seconds, `SPEEDUP` over bf16, `MEMORY` in GB of 1e9 bytes, `SCORE`."""
    note: str = ""
    """What to know beside it, in a sentence."""

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"values": {name: vars(value) for name, value in self.values.items()}}


Results = Mapping[str, Mapping[str, Any]]
"""Name of a part -> what it left."""


def lines(tables: Sequence[str], asked: Scale, machine: Machine, results: Results) -> list[Line]:
    """The rows of the tables, in their order."""
    found: list[Line] = []
    for table in tables:
        if table in PERFORMANCE:
            found += _performance(table, asked, machine, results)
        elif table in LPIPS:
            part = results.get(table) or (results.get(FULL) if LPIPS[table] == LPIPS["flux-lpips"] else None)
            found += _scores(table, machine, part)
        else:
            found += _full(machine, results.get(FULL))
    return found


# Latency, speedup and memory


def _performance(table: str, asked: Scale, machine: Machine, results: Results) -> Iterator[Line]:
    model = PERFORMANCE[table]
    for size in asked.batch_sizes:
        rows = results.get(f"{table}-batch-{size}", {}).get("rows", ())
        for precision in (REFERENCE, *FORMATS):
            ran = precision if precision == REFERENCE or not machine.stands_in else machine.stands_in
            engine, method = _of(rows, ran, ENGINE), _of(rows, ran, POST)
            post = posts_row(model, precision, size)
            yield Line(
                table=table,
                precision=precision,
                batch_size=size,
                recipe="" if precision == REFERENCE else RECIPES[0],
                ran=ran,
                execution=engine["execution"] if engine else "",
                values={
                    LATENCY: Value(post=post[LATENCY], engine=_seconds(engine), method=_seconds(method)),
                    SPEEDUP: Value(
                        post=post[SPEEDUP],
                        engine=_ratio(_seconds(_of(rows, REFERENCE, ENGINE)), _seconds(engine)),
                        method=_ratio(_seconds(_of(rows, REFERENCE, POST)), _seconds(method)),
                    ),
                    MEMORY: Value(post=post[MEMORY], engine=_peak(engine), method=_peak(method)),
                },
                note=_note(precision, ran, engine),
            )


Row = Mapping[str, Any]


def _of(rows: Sequence[Row], precision: str, method: str) -> Row | None:
    return next((row for row in rows if row["precision"] == precision and stands_for(row, method)), None)


def _seconds(row: Row | None) -> float | None:
    return row["latency_s"]["median"] if row and row["latency_s"] else None


def _peak(row: Row | None) -> float | None:
    """None for an emulated format, whose run needs other memory than the real one's."""
    return row["memory_gb"]["peak_allocated"] if row and row["execution"] == "native" else None


def _ratio(slower: float | None, faster: float | None) -> float | None:
    return slower / faster if slower and faster else None


def _note(precision: str, ran: str, row: Row | None) -> str:
    if ran != precision:
        return in_place(precision, ran)
    if row is None:
        return ""
    if row.get("error"):
        return str(row["error"])
    return "Emulated here: neither time nor peak is the format's." if row["execution"] == "emulated" else ""


def in_place(precision: str, ran: str) -> str:
    """That another format stands in."""
    return f"{LABELS[ran]} in the place of {LABELS[precision]}, which needs a Blackwell GPU."


# Quality


def _scores(table: str, machine: Machine, summary: Row | None) -> Iterator[Line]:
    post = reference.read()["mean_lpips_drawbench_alex"][LPIPS[table]]
    for precision in machine.scored:
        row = _lane(summary, precision, RECIPES[0])
        score = row["lpips"]["mean"] if row and row["lpips"] else None
        yield Line(
            table=table,
            precision=precision,
            batch_size=1,
            recipe=RECIPES[0],
            ran=precision,
            execution=row["execution"] if row else "",
            values={SCORE: Value(post=post.get(precision), engine=score)},
            note=_pictures(precision, row),
        )


def _full(machine: Machine, summary: Row | None) -> Iterator[Line]:
    quoted = reference.read()["full_vs_selective_flux.1-dev"]
    theirs = {
        (row["precision"], "full" if row["quantization"] == "full" else RECIPES[0]): {
            _CALLED.get(name, name): value for name, value in row.items()
        }
        for row in quoted
    }
    for precision in machine.scored:
        for recipe in reversed(RECIPES):
            row, post = _lane(summary, precision, recipe), theirs.get((precision, recipe), {})
            native = row is not None and row["execution"] == "native"
            yield Line(
                table=FULL,
                precision=precision,
                batch_size=1,
                recipe=recipe,
                ran=precision,
                execution=row["execution"] if row else "",
                values={
                    SCORE: Value(post=post.get(SCORE), engine=row["lpips"]["mean"] if row and row["lpips"] else None),
                    LATENCY: Value(post=post.get(LATENCY), engine=_seconds(row)),
                    MEMORY: Value(post=post.get(MEMORY), engine=row["memory_gb"]["peak"] if row and native else None),
                },
                note=_pictures(precision, row),
            )


def _lane(summary: Row | None, precision: str, recipe: str) -> Row | None:
    rows: Sequence[Row] = summary["results"] if summary else ()
    return next((row for row in rows if (row["precision"], row["recipe"]) == (precision, recipe)), None)


def _pictures(precision: str, row: Row | None) -> str:
    if precision == FP8.id:
        return "The post has no FP8."
    if row and row["execution"] == "emulated":
        return "Emulated here: the pictures are the format's, time and peak are not."
    return ""
