"""What a comparison gives back: plain frozen dataclasses that turn into JSON and back.

Knows nothing of tensors or devices. GB means 1e9 bytes throughout; latencies are seconds.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from engine.columns import Column, format_of
from engine.files import write_whole
from engine.formats import REFERENCE
from engine.request import CompareRequest

TEXT, DENOISER = "text encoders", "denoiser"
"""What can be streamed (engine/weights/streaming.py), in words."""
NO_SCORE = "no score: values are not numbers"
"""Of a pair of which either side has NaN or infinite values."""
SAME_DEVICE = "not timed: what ran at once ran on the same device"
"""Of a generation's clock."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Wall clock of one pipeline call between device synchronisations, in seconds, by stage."""

    text: float
    denoise: float
    decode: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that belongs to one precision, in GB (1e9 bytes)."""

    weights: float
    """All weights its pipeline needs: denoiser as stored, text encoders, VAE."""
    transformer: float
    """The denoiser's weights alone, as stored (packed, for quantized layers)."""
    peak: float
    """`weights` plus the most its run allocates beyond them."""
    device: float | None = None
    """The most that was allocated on the device at once, where weights were streamed; None where they were not, and on
    a CPU."""


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Linear layers of the denoiser, counted on the module after quantization."""

    quantized: int
    skipped: int
    """Left in bf16 by a rule of the recipe."""
    left: int
    """The recipe asked for them, but the format could not take their shape, so they stayed bf16."""


SCORES = {"words_read": "words read"}
"""Scores that know the prompt, in words; each is from 0 to 1 (engine/metrics/scores.py)."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Distance from the bf16 reference, one value a picture or clip; None where either side has values that are not
    numbers, which no mean counts."""

    lpips: tuple[float | None, ...]
    """Of a clip: the mean over its frames."""
    psnr_db: tuple[float | None, ...]
    """Infinite where they are equal; of a clip: over all its frames."""
    lpips_frames: tuple[tuple[float, ...] | None, ...] | None = None
    """Every frame's LPIPS, clip by clip; None for pictures."""

    @property
    def mean_lpips(self) -> float | None:
        """None where nothing has a score."""
        return _mean(self.lpips)

    @property
    def mean_psnr_db(self) -> float | None:
        """Infinite where any are equal; None where nothing has a score."""
        return _mean(self.psnr_db)

    @property
    def unscored(self) -> int:
        """How many pictures or clips have no score."""
        return sum(value is None for value in self.lpips)

    @property
    def damage(self) -> str:
        """Why there is no score, or not one of all that was made, in words; empty if there is."""
        if self.unscored == len(self.lpips):
            return NO_SCORE
        has = "has" if self.unscored == 1 else "have"
        return f"{self.unscored} of {len(self.lpips)} {has} {NO_SCORE}" if self.unscored else ""


@dataclass(frozen=True, kw_only=True)
class LpipsMap:
    """Where LPIPS comes from in one picture or clip, as a picture in grey: level 255 is `top`, black 0."""

    file: str
    """A PNG of a quarter of each side (`engine.metrics.lpips_maps`); of a clip: one such map below the other."""
    top: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one column made."""

    column: str
    """As the request writes it."""
    execution: str
    """"native" or "emulated"."""
    files: tuple[str, ...]
    """One PNG a picture of the batch, or one MP4 a clip."""
    latency: Latency
    latency_comparable: bool
    """False for an emulated precision: its latency says nothing about the format's speed."""
    memory: Memory
    layers: LayerCounts
    ran: Mapping[str, str] = field(default_factory=dict)
    """What really ran, as label -> words: device, GEMM, attention, compile mode, warm-up, ..."""
    metrics: Metrics | None = None
    """None for the reference itself, and until compared."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What knows the prompt (engine/metrics/scores.py), as name -> one value a picture, from 0 to 1; mostly empty."""
    disproof: str = ""
    """Why it is emulated although the hardware has the format, in a sentence; mostly empty."""
    streamed: tuple[str, ...] = ()
    """What came from host memory a block at a time, in words, for want of room on the device; with the denoiser among
    it, the latency is the bus's and is not comparable."""
    at_once: tuple[str, ...] = ()
    """Columns that ran at the same time, each on a device of its own, and all on one host."""
    shared_card: bool = False
    """Others' work ran on the card too, so that the latency is not to quote."""
    lpips_maps: tuple[LpipsMap | None, ...] = ()
    """One a picture or clip, None where that has no score; none for the reference itself, and until the comparison is
    complete."""

    @property
    def is_streamed(self) -> bool:
        """Its denoiser came from host memory a block at a time."""
        return DENOISER in self.streamed

    @property
    def is_unquantized(self) -> bool:
        """Its recipe quantizes no layer of this model, nor is its attention: it is bf16 under another name."""
        exact = not Column.of(self.column, "").fp8_attention
        return exact and self.precision != REFERENCE and not self.layers.quantized

    @property
    def precision(self) -> str:
        """The column's format."""
        return format_of(self.column)

    def to_json(self) -> dict[str, Any]:
        metrics = self.metrics
        return {
            "precision": self.precision,
            "column": self.column,
            "execution": self.execution,
            "files": list(self.files),
            "latency_s": asdict(self.latency),
            "latency_comparable": self.latency_comparable,
            "memory_gb": {kind: value for kind, value in asdict(self.memory).items() if value is not None},
            "layers": asdict(self.layers),
            "lpips": metrics.mean_lpips if metrics else None,
            "psnr_db": _finite(metrics.mean_psnr_db) if metrics else None,
            "unscored": metrics.unscored if metrics else None,
            "lpips_each": list(metrics.lpips) if metrics else None,
            "psnr_db_each": [_finite(v) for v in metrics.psnr_db] if metrics else None,
            "lpips_frames": (
                [f and list(f) for f in metrics.lpips_frames] if metrics and metrics.lpips_frames else None
            ),
            "lpips_maps": [m and asdict(m) for m in self.lpips_maps],
            "ran": dict(self.ran),
            **({"scores": {name: list(each) for name, each in self.scores.items()}} if self.scores else {}),
            **({"disproof": self.disproof} if self.disproof else {}),
            **({"streamed": list(self.streamed)} if self.streamed else {}),
            **({"at_once": list(self.at_once)} if self.at_once else {}),
            **({"shared_card": True} if self.shared_card else {}),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Generation:
        metrics = None
        if values["lpips_each"] is not None:
            # Equal pictures have no decibels in JSON either, but they have an LPIPS.
            psnr = tuple(
                float("inf") if decibels is None and lpips is not None else decibels
                for lpips, decibels in zip(values["lpips_each"], values["psnr_db_each"], strict=True)
            )
            frames = values.get("lpips_frames")  # absent from comparisons recorded before there were clips
            metrics = Metrics(
                lpips=tuple(values["lpips_each"]),
                psnr_db=psnr,
                lpips_frames=tuple(f and tuple(f) for f in frames) if frames is not None else None,
            )
        return cls(
            column=values.get("column", values["precision"]),  # absent from what was recorded before there were columns
            execution=values["execution"],
            files=tuple(values["files"]),
            latency=Latency(**values["latency_s"]),
            latency_comparable=values["latency_comparable"],
            memory=Memory(**values["memory_gb"]),
            layers=LayerCounts(**values["layers"]),
            ran=values["ran"],
            metrics=metrics,
            scores={name: tuple(each) for name, each in values.get("scores", {}).items()},
            disproof=values.get("disproof", ""),
            streamed=tuple(values.get("streamed", ())),
            at_once=tuple(values.get("at_once", ())),
            shared_card=values.get("shared_card", False),
            # absent from comparisons recorded before there were maps
            lpips_maps=tuple(m and LpipsMap(**m) for m in values.get("lpips_maps", ())),
        )

    def mean_score(self, name: str) -> float | None:
        """Of one of `scores`, over all pictures; None where there is none."""
        return _mean(self.scores.get(name, ()))

    def with_files(self, change: Callable[[str], str]) -> Generation:
        """The same, with every file's name changed."""
        maps = tuple(m and replace(m, file=change(m.file)) for m in self.lpips_maps)
        return replace(self, files=tuple(change(f) for f in self.files), lpips_maps=maps)


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """Two LPIPS values that give a score its scale, for one model, shape and device."""

    floor: float
    """bf16 against a second legitimate bf16 path (other attention kernel): mean over the ruler's prompts."""
    ceiling: float
    """bf16 against bf16 from another seed: mean over the ruler's prompts."""
    note: str
    """How it was measured, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished comparison."""

    request: CompareRequest
    device: str
    versions: Mapping[str, str]
    results: tuple[Generation, ...]
    ruler: Ruler | None
    created: str
    """UTC time of the run, ISO 8601."""
    lacks: str = ""
    """Why there is no reference, in a sentence: this machine has not the memory for it. Mostly empty; otherwise nothing
    has metrics, and there is no ruler."""

    @property
    def reference(self) -> Generation:
        """Only of a comparison that lacks nothing."""
        return next(g for g in self.results if g.column == REFERENCE)

    def column(self, generation: Generation) -> Column:
        """What it is by: its format and recipe."""
        return self.request.column(generation.column)

    def speedup(self, generation: Generation) -> float | None:
        """bf16's latency over this one's; None where either is emulated or streams its denoiser, where only one streams
        its text encoders, where one ran beside others and the other alone, where both are bf16, which costs the same
        without LoRAs that are fused, or where there is no reference."""
        if self.lacks or (generation.precision == REFERENCE and generation.column != REFERENCE):
            return None
        if not (generation.latency_comparable and self.reference.latency_comparable):
            return None
        if bool(generation.at_once) != bool(self.reference.at_once) or generation.streamed != self.reference.streamed:
            return None
        return self.reference.latency.total / generation.latency.total

    def memory_saving(self, generation: Generation) -> float:
        """Fraction of bf16's peak memory that this precision does without; negative if it needs more."""
        return 1 - generation.memory.peak / self.reference.memory.peak

    def to_json(self) -> dict[str, Any]:
        """The command line's JSON object (assets/docs/cli.md)."""
        return {
            "model": self.request.model,
            "device": self.device,
            "versions": dict(self.versions),
            "created": self.created,
            "request": self.request.to_json(),
            "results": [g.to_json() for g in self.results],
            "ruler": asdict(self.ruler) if self.ruler else None,
            **({"lacks": self.lacks} if self.lacks else {}),
        }

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that any column has beside LPIPS."""
        return tuple(dict.fromkeys(name for made in self.results for name in made.scores))

    def to_csv(self) -> str:
        """A row for each column under a header; empty where there is no number, as for an emulation's latency."""
        asked = {name: v for name, v in self.request.to_json().items() if name != "precisions"}
        rows = []
        for g in self.results:
            latency = {f"latency_{part}_s": v if g.latency_comparable else "" for part, v in asdict(g.latency).items()}
            memory = {f"memory_{kind}_gb": v for kind, v in asdict(g.memory).items() if kind != "device"}
            memory["memory_peak_gb"] = g.memory.peak if g.execution == "native" else ""
            scores: dict[str, object] = {"lpips": "", "psnr_db": "", "unscored": ""}
            if g.metrics:  # None is written as nothing
                scores["lpips"], scores["psnr_db"] = g.metrics.mean_lpips, g.metrics.mean_psnr_db
                scores["unscored"] = g.metrics.unscored
            scores |= {name: g.mean_score(name) for name in self.scores}
            ran = {"precision": g.precision, "execution": g.execution, "device": self.device, "created": self.created}
            ran |= {"streamed": ", ".join(g.streamed)} if any(other.streamed for other in self.results) else {}
            ran |= {"at_once": " ".join(g.at_once)} if any(other.at_once for other in self.results) else {}
            column = {"recipe": self.column(g).rules or self.request.recipe, "column": g.column}
            rows.append(ran | latency | memory | scores | asked | column)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Comparison:
        return cls(
            request=CompareRequest.from_json(values["request"]),
            device=values["device"],
            versions=values["versions"],
            results=tuple(Generation.from_json(g) for g in values["results"]),
            ruler=Ruler(**values["ruler"]) if values["ruler"] else None,
            created=values["created"],
            lacks=values.get("lacks", ""),
        )

    def save(self, folder: Path) -> Path:
        """Write `comparison.json` into `folder`, whole or not at all; files inside it are named relative to it.

        Raises:
            OutputError: the folder cannot be written.
        """
        target = folder / "comparison.json"
        inside = tuple(g.with_files(lambda file: _relative(file, folder)) for g in self.results)
        written = json.dumps(replace(self, results=inside).to_json(), indent=1) + "\n"
        write_whole(target, written.encode())
        return target

    @classmethod
    def load(cls, folder: Path) -> Comparison:
        """Read a saved comparison; its files become absolute paths."""
        folder = folder.absolute()
        saved = cls.from_json(json.loads((folder / "comparison.json").read_text()))
        return replace(saved, results=tuple(g.with_files(lambda file: str(folder / file)) for g in saved.results))


def _relative(file: str, folder: Path) -> str:
    path = Path(file)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else file


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: equal pictures give null."""
    return None if value == float("inf") else value


def _mean(values: Iterable[float | None]) -> float | None:
    """Over those that are there."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None
