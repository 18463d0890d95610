"""A better recipe than the post's: which precision each group of layers gets for so many bytes, and what it is worth.

Groups are as in engine/quality/sensitivity.py, whose drift says what each costs in NVFP4. Squared drifts add up, as the
errors of layers point in unrelated directions, so a choice is a knapsack: every group takes the precision with the
least damage + price * bytes, and the price is the lowest at which the whole keeps to its budget; time has a price as
well where it would take too long. Weights are also calibrated (engine/quantization/gptq.py). Candidates are chosen and
compared on one half of the prompts; the best is then reported on the other half, as are each remedy alone, the recipe
`full`, and all other formats."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

from torch import nn

from engine.columns import POST, recipe_named
from engine.errors import RequestError
from engine.files import write_whole
from engine.formats import FORMATS, QUANTIZED, REFERENCE
from engine.metrics.statistics import estimate
from engine.quality import sensitivity
from engine.quality.lab import PRECISION, Bench, Quality
from engine.quantization import gptq, recipe_files, recipes
from engine.quantization.nvfp4 import Packed
from engine.quantization.recipe_files import TunedRecipe, Tuning
from engine.quantization.recipes import LayerPlan, Plan, Recipe

TIME_PERCENT = 20.0
"""By which matrix products may take longer than the post's recipe's, by `Format.time`, for mixed precisions: where
rules keep most bytes in bf16, a few percent of them would buy all layers back, and with them the time."""
PRICES = 60
"""Halvings of the interval in which a price is searched."""
WEIGHT_ONLY = (2, 0)
"""First and last steps in which activations stay bf16, where they do."""
CALIBRATING = 8
"""Prompts, of the half that chooses, on whose activations weights are calibrated."""
AT_ONCE = 8
"""Prompts that the post's and the tuned recipe make in turn, so that a run that is ended early has as many of both."""
WORST = 8


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One recipe in one precision, under a name."""

    id: str
    label: str
    recipe: Recipe
    precision: str = PRECISION
    parts: tuple[str, ...] = ()

    @property
    def weight_only_steps(self) -> tuple[int, int]:
        return self.recipe.weight_only_steps(self.precision)


WEIGHTS_ALONE = "nvfp4 weights"
"""NVFP4 with bf16 activations, as a choice for a group of layers."""


@dataclass(frozen=True)
class _Option:
    """A precision for a group of layers."""

    name: str
    damage: float
    size: int
    time: float


def choose(
    groups: Sequence[Mapping[str, Any]],
    layers: Mapping[str, LayerPlan],
    shares: Mapping[str, float],
    work: Mapping[str, float],
    budget: int,
    time: float,
) -> dict[str, str]:
    """The precision of every layer that keeps the sum of squared drifts small within a budget of bytes and of time.

    Bytes have a price, the lowest at which all keeps to the budget; time has one too if that takes too long.

    Args:
        groups: cells of a sensitivity: `names` and `drift`.
        layers: those names' shapes.
        shares: precision -> what it leaves of NVFP4's squared drift, and so may `WEIGHTS_ALONE`.
        work: layer name -> multiplications.
        budget: bytes of all these weights together.
        time: of all their products together, `work` times `Format.time`.

    Raises:
        RequestError: even the smallest precision takes more bytes.
    """
    options = []
    for group in groups:
        shapes = [(layers[name].in_features, layers[name].out_features) for name in group["names"]]
        multiplied = sum(work.get(name, 0) for name in group["names"])
        options.append(
            [
                _Option(
                    name,
                    group["drift"] ** 2 * share,
                    sum(FORMATS[PRECISION if name == WEIGHTS_ALONE else name].size(*shape) for shape in shapes),
                    multiplied * FORMATS[REFERENCE if name == WEIGHTS_ALONE else name].time,
                )
                for name, share in {**shares, PRECISION: 1.0}.items()
            ]
        )
    if sum(min(option.size for option in some) for some in options) > budget:
        raise RequestError(f"No choice of precisions fits into {budget} bytes: allow more with --budget.")
    highest = max(option.damage for some in options for option in some) + 1.0

    def within_bytes(time_price: float) -> list[_Option]:
        def at(price: float) -> list[_Option]:
            cost = lambda option: option.damage + price * option.size + time_price * option.time  # noqa: E731
            return [min(some, key=cost) for some in options]

        return _lowest(at, highest * (1 + time_price), lambda chosen: sum(option.size for option in chosen) <= budget)

    chosen = within_bytes(0.0)
    if sum(option.time for option in chosen) > time:
        fastest = max(sum(min(option.time for option in some) for some in options), time)
        chosen = _lowest(within_bytes, highest, lambda some: sum(option.time for option in some) <= fastest)
    return {name: option.name for group, option in zip(groups, chosen, strict=True) for name in group["names"]}


def _lowest(at: Callable[[float], list[_Option]], high: float, fits: Callable[[list[_Option]], bool]) -> list[_Option]:
    """What is chosen at the lowest price that fits; `high` is doubled until it does."""
    low = 0.0
    while not fits(at(high)):
        low, high = high, 2 * high
    for _ in range(PRICES):
        price = (low + high) / 2
        low, high = (low, price) if fits(at(price)) else (price, high)
    return at(high)


def run(bench: Bench, quality: Quality, budget: float, recipe_file: Path, probes: int, steps: int) -> dict[str, Any]:
    """Search, write the recipe, and measure what is not known yet; `quality` is written after every score.

    Args:
        budget: bytes of the denoiser beyond the post's recipe's, in percent.
        probes, steps: as for `sensitivity.run`, which is run first where it has not been.

    Returns:
        What the file holds.

    Raises:
        RequestError: nothing fits into the budget.
        UnsupportedError, OutputError, LoadError: in one sentence.
    """
    held = quality["sensitivity"]
    probe = sensitivity.run(bench, quality, probes, steps, held["lpips_prompts"] if held else 0)
    search = _Search(bench, quality, budget, recipe_file, probe.rows)
    best = search.best()
    chosen = {
        "by": "python -m engine tune",
        "model": quality["model"],
        "prompts": f"from every other one of {quality['prompts']['source']}",
        "budget_percent": budget,
        "weights": quality["weights"],
    }
    write_recipe(recipe_file, "tuned", search.rules.id, best.recipe.tunings[PRECISION], chosen)
    search.report(best)
    return quality.content


class _Search:
    """The lanes, and the rows of what was measured."""

    def __init__(self, bench: Bench, quality: Quality, budget: float, recipe_file: Path, rows: Mapping[str, int]):
        self.bench, self.quality, self.budget, self.rows = bench, quality, budget, rows
        self.recipe_file = recipe_file
        self.rules = recipes.recipe(bench.spec.family, bench.spec.recipes[0])
        self.post = Lane(id=POST, label="Post", recipe=self.rules)
        self.post_bytes = self._plan(self.post).quantized_bytes
        self._loaded: dict[str, nn.Module] = {}
        """The two denoisers that were needed last."""

    # Candidates

    def best(self) -> Lane:
        """The candidate with the least mean LPIPS on prompts of the half that chooses."""
        calibrated, mixed = self._calibrated(), self._mixed(self.budget)
        together = [self._with_steps(self._with_files(lane, calibrated)) for lane in (self.post, mixed)]
        candidates = [self._searched(), mixed, *together]
        some = self.quality["prompts"]["search"]
        scores = {lane.id: fmean(self._scores(lane, some)) for lane in (self.post, *candidates)}
        found = min(candidates, key=lambda lane: scores[lane.id])
        self.bench.say(f"best on {len(some)} prompts: {found.label}, LPIPS {scores[found.id]:.4f}")
        half = self._with_steps(self._with_files(self._mixed(self.budget / 2), calibrated))
        # Where time is what is short, half the bytes buy the same.
        more = [half] if half.recipe.tunings != together[-1].recipe.tunings else []
        self.frontier = [self.post, *candidates, *more]
        return found

    def _calibrated(self) -> tuple[Path, ...]:
        """Calibrate every layer that a candidate stores in NVFP4, and keep them beside the recipe's file, once."""
        held = self.quality["calibration"]
        if held is not None:
            files = tuple(self.recipe_file.parent / name for name in held["files"])
            if [_digest(file) for file in files if file.is_file()] == held["digests"]:
                return files
        search = self.quality["prompts"]["search"]
        prompts = search[:: max(1, len(search) // CALIBRATING)][:CALIBRATING]
        plans = [self._plan(lane) for lane in (self.post, self._mixed(self.budget), self._mixed(self.budget / 2))]
        names = sorted({layer.name for plan in plans for layer in plan.layers if layer.precision == PRECISION})
        layers = {name: self.bench.exact.get_submodule(name) for name in names}
        packed: dict[str, Packed] = {}
        for portion in gptq.portions(layers):
            self.bench.say(f"calibrating layers {len(packed) + 1} to {len(packed) + len(portion)} of {len(layers)}")
            with gptq.second_moments(portion) as moments:
                for prompt in prompts:
                    self.bench.make(self.bench.exact, prompt)
            packed |= {name: gptq.quantize(layer.weight, moments.pop(name)) for name, layer in portion.items()}
        self.recipe_file.parent.mkdir(parents=True, exist_ok=True)
        files = gptq.write(self.recipe_file.parent, self.recipe_file.stem, packed)
        said = {"prompts": prompts, "files": [file.name for file in files], "digests": [_digest(f) for f in files]}
        self.quality.put(calibration=said)
        return files

    def _with_files(self, lane: Lane, files: Sequence[Path]) -> Lane:
        """The same with calibrated weights, whose block scales are searched too."""
        tuning = lane.recipe.tunings.get(PRECISION, Tuning())
        parts = [part for part in lane.parts if "scales" not in part]
        name = f"{lane.id}-calibrated" if lane.parts else "calibrated"
        label = f"{lane.label}, calibrated" if lane.parts else "Calibrated"
        return self._lane(name, label, replace(tuning, searched=True, calibrated=tuple(files)), *parts, "calibrated")

    def _searched(self) -> Lane:
        return self._lane("scales", "Searched scales", Tuning(searched=True), "searched block scales")

    def _mixed(self, percent: float, searched: bool = True) -> Lane:
        part = self.quality["sensitivity"]
        layers = {layer.name: layer for layer in self._plan(self.post).layers}
        measured = [name for cell in part["cells"] for name in cell["names"]]
        post = sum(layers[name].bytes for name in measured)
        budget = post + int(self.post_bytes * percent / 100)
        work = {name: self.rows.get(name, 0) * x.in_features * x.out_features for name, x in layers.items()}
        times = {name: work[name] * FORMATS[layers[name].precision].time for name in layers}
        time = sum(times[name] for name in measured) + TIME_PERCENT / 100 * sum(times.values())
        chosen = choose(part["cells"], layers, part["shares"], work, budget, time)
        # Only what differs from the rules is data.
        changed = {name: stored for name, stored in chosen.items() if layers[name].precision != stored}
        kinds = " + ".join(sorted({*changed.values()} - {PRECISION}))
        scales = ("searched block scales",) if searched else ()
        name = f"mixed-{percent:g}" + ("" if searched else "-plain")
        label = f"Mixed, up to +{percent:g}%" + ("" if searched else ", usual scales")
        return self._lane(name, label, Tuning(layers=changed, searched=searched), f"layers in {kinds}", *scales)

    def _with_steps(self, lane: Lane) -> Lane:
        """The same, with weight-only steps."""
        tuning = replace(lane.recipe.tunings.get(PRECISION, Tuning()), weight_only_steps=WEIGHT_ONLY)
        steps = f"bf16 activations in {recipe_files.in_words(WEIGHT_ONLY)}"
        return self._lane(f"{lane.id}-steps", f"{lane.label}, first steps", tuning, *lane.parts, steps)

    def _lane(self, name: str, label: str, tuning: Tuning, *parts: str) -> Lane:
        recipe = replace(self.rules, id=name, tunings=MappingProxyType({PRECISION: tuning}))
        return Lane(id=name, label=label, recipe=recipe, parts=parts)

    # Remedies

    def _low_rank(self) -> Lane:
        """Branches of one rank beside every NVFP4 layer, as large as the budget allows."""
        names = [layer for layer in self._plan(self.post).layers if layer.quantized]
        each = sum(2 * (layer.in_features + layer.out_features) for layer in names)
        rank = max(1, int(self.post_bytes * self.budget / 100) // each)
        tuning = Tuning(low_rank={layer.name: rank for layer in names})
        return self._lane(f"low-rank-{rank}", f"Low rank {rank}", tuning, f"low-rank branch {rank}")

    def _remedies(self) -> list[tuple[str, str, Lane]]:
        return [
            ("Searched scales", "Block scales of the weights by least squared error; the format is the same.",
             self._searched()),
            ("Calibrated rounding", "GPTQ on the activations of a few prompts; the format is the same.",
             self._with_files(self.post, self._calibrated())),
            ("Mixed precision", "Groups that drift most in FP8, some that the post keeps in bf16 in FP8 or NVFP4.",
             self._mixed(self.budget, searched=False)),
            ("Low-rank branch", "A bf16 branch beside every NVFP4 layer, from the SVD of its weight's error.",
             self._low_rank()),
            ("Weight-only steps", "Activations in bf16 while the layout is decided; the same weights, unpacked.",
             self._with_steps(self.post)),
        ]  # fmt: skip

    # Measuring

    def report(self, best: Lane) -> None:
        """Measure the post's and the best on the other half, then each remedy, `full` and all formats; write rows."""
        full = recipes.recipe(self.bench.spec.family, "full")
        ablation = [
            replace(self.post, precision=p, id=r.id, label=f"{r.id.capitalize()}, {FORMATS[p].label}", recipe=r)
            for p in (*(name for name in QUANTIZED if name != PRECISION), PRECISION)
            for r in (self.rules, full)
        ]
        remedies = self._remedies()
        others = [*(lane for _, _, lane in remedies), *self.frontier, *reversed(ablation)]
        # What matters most first, should the run be ended early.
        half = self.quality["prompts"]["report"]
        some = [half[begin : begin + AT_ONCE] for begin in range(0, len(half), AT_ONCE)]
        work = [(lane, prompts) for prompts in some for lane in (self.post, best)]
        for lane, prompts in work + [(lane, half) for lane in others]:
            self._scores(lane, prompts)
            self._write(best, ablation, remedies)

    def _write(self, best: Lane, ablation: Sequence[Lane], remedies: Sequence[tuple[str, str, Lane]]) -> None:
        shown = [
            replace(lane, label="Tuned") if lane.id == best.id else lane for lane in (*self.frontier, ablation[-1])
        ]
        names = {self.post.id: self.rules.id, "full": "full", best.id: "tuned"}
        rows = [self._row(lane, names.get(lane.id)) for lane in shown]
        post_time = self._time(self._plan(self.post))
        self.quality.put(
            bytes={REFERENCE: self._plan(self.post).bf16_bytes, POST: self.post_bytes},
            frontier=sorted(rows, key=lambda row: row["weight_bytes"]),
            remedies=[
                {
                    "name": name,
                    "what": what,
                    "alone": (row := self._row(lane, None)),
                    "added_bytes_percent": row["bytes_over_seed_percent"],
                    "added_flops_percent": 100 * (self._flops(lane) - 1),
                    "added_gemm_time_percent": 100 * (row["gemm_time_of_bf16"] / post_time - 1),
                    "basis": "derived",
                }
                for name, what, lane in remedies
            ],
            ablation=[self._row(lane, lane.id) for lane in ablation],
            worst=self._worst(best),
        )

    def _scores(self, lane: Lane, prompts: Sequence[str]) -> list[float]:
        return self.quality.score(_key(lane), prompts, lambda prompt: self._measure(lane, prompt), self.bench.say)

    def _measure(self, lane: Lane, prompt: str) -> float:
        key = _key(lane)
        if key not in self._loaded:
            self._loaded = dict([*self._loaded.items()][-1:])  # before the next one takes the room
            self._loaded[key] = self.bench.quantized(lane.recipe, lane.precision)[0]
        return self.bench.lpips(self._loaded[key], prompt, lane.weight_only_steps)

    # Rows

    def _plan(self, lane: Lane) -> Plan:
        return recipes.plan(self.bench.exact, lane.recipe, lane.precision)

    def _row(self, lane: Lane, recipe_id: str | None) -> dict[str, Any]:
        plan, known = self._plan(lane), self.quality["scores"].get(_key(lane), {})
        each = {half: [known[p] for p in self.quality["prompts"][half] if p in known] for half in ("search", "report")}
        size = plan.quantized_bytes
        return {
            "id": "tuned" if recipe_id == "tuned" else lane.id,
            "recipe": recipe_id,
            "label": lane.label,
            "precision": lane.precision,
            "parts": list(lane.parts),
            "weight_bytes": size,
            "bytes_over_seed_percent": 100 * (size / self.post_bytes - 1),
            "gemm_time_of_bf16": self._time(plan, lane.weight_only_steps),
            "lpips": {half: estimate(values) for half, values in each.items()}
            | {"both": estimate(each["search"] + each["report"])},
            "each": {half: [round(value, 4) for value in values] for half, values in each.items()},
            "offered": recipe_id is not None,
        }

    def _time(self, plan: Plan, weight_only: tuple[int, int] = (0, 0)) -> float:
        return product_time(plan, self.rows, weight_only, self.bench.spec.defaults.num_inference_steps)

    def _flops(self, lane: Lane) -> float:
        """Multiplications of all Linear layers as a multiple of the bf16 model's."""
        layers = self._plan(lane).layers
        total = sum(self.rows.get(x.name, 0) * x.in_features * x.out_features for x in layers)
        added = sum(self.rows.get(x.name, 0) * x.rank * (x.in_features + x.out_features) for x in layers)
        return 1 + added / total

    def _worst(self, best: Lane) -> list[dict[str, Any]]:
        known, report = self.quality["scores"].get(_key(best), {}), self.quality["prompts"]["report"]
        ordered = sorted((p for p in report if p in known), key=lambda prompt: -known[prompt])
        seed = self.bench.request(report[0]).seed
        shared = {"seed": seed, "precision": PRECISION, "recipe": "tuned"}
        return [{"prompt": prompt, **shared, "lpips": known[prompt]} for prompt in ordered[:WORST]]


def product_time(plan: Plan, rows: Mapping[str, int], weight_only: tuple[int, int], steps: int) -> float:
    """Matrix products of all Linear layers in a picture, as a share of bf16's time, by `Format.time`.

    Args:
        rows: layer name -> rows that it multiplies in one step.
        weight_only: first and last steps with bf16 activations, of so many `steps`.
    """
    total = spent = 0.0
    for layer in plan.layers:
        product = rows.get(layer.name, 0) * layer.in_features * layer.out_features
        total += product
        branch = rows.get(layer.name, 0) * layer.rank * (layer.in_features + layer.out_features)
        spent += product * FORMATS[REFERENCE if layer.weights_alone else layer.precision].time + branch
    share = sum(weight_only) / steps
    return share + (1 - share) * spent / total


def _key(lane: Lane) -> str:
    """What a lane's scores are kept under: all that decides them, a tuning as a digest."""
    tuning = lane.recipe.tunings.get(lane.precision)
    if tuning is None:
        return f"{lane.precision} {lane.id}"
    said = json.dumps([tuning.searched, sorted(tuning.layers.items()), sorted(tuning.low_rank.items())])
    if tuning.rotation or tuning.four_over_six:
        said += json.dumps([tuning.rotation, tuning.four_over_six])
    if tuning.weights_alone:
        said += json.dumps(tuning.weights_alone)
    if any(tuning.weight_only_steps):
        said += json.dumps(tuning.weight_only_steps)
    said += "".join(map(_digest, tuning.calibrated))
    return f"{lane.precision} {lane.id} {hashlib.sha256(said.encode()).hexdigest()[:8]}"


def _digest(file: Path) -> str:
    return _digest_at(file, file.stat().st_mtime_ns)


@lru_cache
def _digest_at(file: Path, changed: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def write_recipe(file: Path, recipe_id: str, rules: str, tuning: Tuning, chosen: Mapping[str, object]) -> None:
    """Write a recipe file that changes NVFP4 alone, with a summary of what it changes.

    Args:
        rules: id of the family's recipe whose rules it changes.
        chosen: how it was found.
    """
    stored = Counter(tuning.layers.values())
    changed = [f"{count} layers in {name.upper()} instead" for name, count in stored.most_common()]
    if count := len(tuning.weights_alone):
        changed.append(f"bf16 activations in {count} layers")
    if any(tuning.weight_only_steps):
        changed.append(f"bf16 activations in {recipe_files.in_words(tuning.weight_only_steps)}")
    weights = "calibrated weights" if tuning.calibrated else "searched block scales"
    summary = ", ".join([f"The rules of {rules} with {weights}", *changed])
    recipe = TunedRecipe(
        id=recipe_id,
        base=rules,
        summary=f"{summary}; changes NVFP4 alone, other precisions follow {rules}.",
        tunings={PRECISION: tuning},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, recipe_files.write(file, recipe, chosen))


def table(found: Mapping[str, Any]) -> str:
    """What a file of the lab holds, as a Markdown table: the post's recipe, each remedy, then what goes together."""
    remedies = {(row["alone"]["id"], PRECISION): row["name"] + " alone" for row in found["remedies"]}
    alone = [row["alone"] for row in found["remedies"]]
    rows = {
        (recipe_named(row["id"]), row["precision"]): row for row in (*found["frontier"], *alone, *found["ablation"])
    }
    first = [(POST, PRECISION), *remedies]
    ordered = [rows[key] for key in (*first, *(key for key in rows if key not in first))]
    lines = [
        f"| {found['model']}, NVFP4 unless it says otherwise | Denoiser, MB | Products, of bf16's time | "
        f"LPIPS, {len(found['prompts']['report'])} prompts that report | Median |",
        "|---|---|---|---|---|",
    ]
    for row in ordered:
        if (score := row["lpips"]["report"]) is None:
            continue
        few = "" if score["n"] == len(found["prompts"]["report"]) else f", {score['n']} prompts"
        parts = f": {', '.join(row['parts'])}" if row["parts"] else ""
        what = remedies.get((row["id"], row["precision"])) or row["label"] + parts
        interval = "" if score["low"] is None else f" ({score['low']:.3f} to {score['high']:.3f}{few})"
        lines.append(
            f"| {what} | {row['weight_bytes'] / 1e6:.2f} ({row['bytes_over_seed_percent']:+.1f}%) | "
            f"{row['gemm_time_of_bf16']:.2f} | {score['mean']:.3f}{interval} | {score['median']:.3f} |"
        )
    return "\n".join(lines)
