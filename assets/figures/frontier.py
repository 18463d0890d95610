"""What NVFP4 can be at the post's bytes and product time, and at 8% more bytes: learnt weights, layers exchanged.

python -m assets.figures.frontier MODEL OUT [--device D] [--seconds S] [--at-once N] [--limit N] [--learn-from N]
python -m assets.figures.frontier --table FILE

MODEL is a miniature with a tuned recipe. First the layers that the post keeps in bf16 and those that it quantizes are
weighed anew, by the drifts in assets/quality/MODEL.json: as close as can be at no byte and no product time more, and at
8% more bytes and 20% more time. What is nearer to bf16 before learning, those layers or the post's own, learns
(engine/quality/distill.py), on prompts and noise that no score is made of. Then all is scored on the prompts that
report, as in assets/figures/remedies.py. The layers exchanged at the post's cost become a recipe file, if they are
nearer.

OUT is a folder. What has been learnt and scored there for the same machine, versions and weights is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from assets.figures.remedies import distances_of
from engine import catalog, vocabulary
from engine.environment import versions
from engine.files import write_whole
from engine.formats import FORMATS, FP8, INT8, NVFP4, REFERENCE
from engine.metrics.statistics import estimate
from engine.quality import distill, tune
from engine.quality.distill import Call, Lesson, Student
from engine.quality.lab import Bench
from engine.quality.sensitivity import Probe
from engine.quantization import capability, gptq, nvfp4, recipe_files, recipes
from engine.quantization.nvfp4 import Packed
from engine.quantization.recipe_files import Tuning
from engine.quantization.recipes import Plan, Recipe
from engine.quantization.remedies import WeightOnlySteps
from engine.weights import loading
from engine.weights.source import Source

MORE = (8.0, tune.TIME_PERCENT)
"""Percent of bytes and of product time beyond the post's, of the second search."""
ROUNDS = 8
"""Parts in which what is learnt from is made, each with a noise of its own."""
NOISE = 1000
"""Seed of the first of them; scores are made with the model's own."""
SHARES = {"post": 0.55, "four": 0.15, "more": 0.3}
"""Of the seconds, for what learns: at the post's bytes; then with four over six; and at more bytes."""
FIRST_STEPS = (2, 0)
REBALANCED = "rebalanced"
"""Id of the recipe that takes no more bytes and no more product time than the post's."""
Layers = Mapping[str, str]
"""Layer -> format, of those that are stored otherwise than the post does."""


@dataclass(frozen=True)
class Lane:
    """An NVFP4 recipe, and how it is called in the table."""

    label: str
    tuning: Tuning
    recipe: str = ""
    """Its id where it is one that can be chosen."""


class Frontier:
    """One model's search, kept in a folder."""

    def __init__(self, model: str, out: Path, args: argparse.Namespace):
        self.spec, self.out, self.args = catalog.model(model), out, args
        self.bench = Bench(self.spec, args.device or capability.default_device(), Source(), self.say)
        self.file = out / f"{model}-frontier.json"
        self.known = json.loads((catalog.ASSETS / "quality" / f"{model}.json").read_text())
        self.rules = recipes.recipe(self.spec.family, self.spec.recipes[0])
        (found, *_) = recipe_files.read(self.spec.family)
        self.calibrated = found.tunings[NVFP4.id].calibrated
        self.report = self.known["prompts"]["report"][: args.limit]
        self.search = self.known["prompts"]["search"]
        self.by_rules = self.plan(Tuning())
        self.began = time.monotonic()
        conditions = {
            "model": model,
            "title": f"{self.spec.name}, NVFP4 searched again",
            "device": self.bench.machine.name,
            "execution": ", ".join(
                f"{FORMATS[name].label} {self.bench.support[name].execution}" for name in (NVFP4.id, FP8.id, INT8.id)
            ),
            "versions": versions(),
            "weights": loading.fingerprint(self.spec, self.bench.source),
            "at_once": args.at_once,
            "learning": {"seconds": args.seconds, "prompts": args.learn_from, "rate": args.rate},
            "settings": {
                k: v
                for k, v in self.bench.request(self.report[0]).to_json().items()
                if k not in ("prompt", "precisions", "recipe", "model")
            },
            "prompts": {"report": self.report},
        }
        held = json.loads(self.file.read_text()) if self.file.is_file() else {}
        same = all(held.get(name) == value for name, value in conditions.items())
        self.content: dict = held if same else {**conditions, "steps": {}, "each": {}}
        self.out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        began = getattr(self, "began", None)
        print(f"{time.monotonic() - began:6.1f} s  {text}" if began else text, file=sys.stderr, flush=True)

    def put(self) -> None:
        self.content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_whole(self.file, (json.dumps(self.content, indent=1, ensure_ascii=False) + "\n").encode())

    # What is learnt from

    def prompts(self) -> list[str]:
        """The prompts that choose, and others of what the model has learnt; none that reports."""
        learnt = vocabulary.of(self.spec.id)
        order, motions = random.Random(0), [*learnt.motions.values()]
        found = list(self.search)
        while len(found) < self.args.learn_from:
            thing, colour = order.choice(learnt.things), order.choice([*learnt.colours])
            moving = f" {order.choice(order.choice(motions))}" if motions and order.random() < 2 / 3 else ""
            said = f"a {thing}{moving} on a {colour} background"
            if said not in found and said not in self.known["prompts"]["report"]:
                found.append(said)
        order.shuffle(found)
        return found[: self.args.learn_from]

    def learnt_from(self) -> tuple[list[Call], list[Call]]:
        """Calls to learn from, and calls of other noise to compare by."""
        some = self.prompts()
        at_once = min(self.args.at_once, len(some))
        made: list[Call] = []
        for number in range(self.args.rounds):
            begin = number * at_once % len(some)
            made += distill.calls(self.bench, (some * 2)[begin : begin + at_once], [NOISE + number])
        kept = distill.calls(self.bench, self.search[:at_once], [NOISE - 1])
        self.say(f"{len(made)} calls of {at_once} pictures to learn from, {len(kept)} to compare by")
        return made, kept

    # Which layers

    def weigh(self, kept: Sequence[Call]) -> dict[str, float]:
        """What each choice for a layer leaves of the squared error of calibrated NVFP4."""
        self.error(Lane("post", Tuning()), kept)
        calibrated, alone = self.errors(Lane("calibrated", self.tuning({})), kept)
        eight = {name: self.error(Lane(name, Tuning()), kept, name) for name in (FP8.id, INT8.id)}
        shares = {name: found / calibrated for name, found in {**eight, tune.WEIGHTS_ALONE: alone}.items()}
        return {REFERENCE: 0.0, **shares}

    def layers(self, shares: Mapping[str, float], rows: Mapping[str, int], more: tuple[float, float]) -> Layers:
        """What is stored otherwise than the post does, by `tune.choose`."""
        plan = self.by_rules
        layers = {layer.name: layer for layer in plan.layers}
        cells = self.known["sensitivity"]["cells"]
        measured = [name for cell in cells for name in cell["names"]]
        budget = sum(layers[name].bytes for name in measured) + int(plan.quantized_bytes * more[0] / 100)
        work = {name: rows.get(name, 0) * x.in_features * x.out_features for name, x in layers.items()}
        times = {name: work[name] * FORMATS[layers[name].precision].time for name in layers}
        allowed = sum(times[name] for name in measured) + more[1] / 100 * sum(times.values())
        chosen = tune.choose(cells, layers, shares, work, budget, allowed)
        return {name: stored for name, stored in chosen.items() if layers[name].precision != stored}

    def tuning(self, layers: Layers, files: Sequence[Path] = (), **more: object) -> Tuning:
        """Of what is stored otherwise than by the post, only what differs from its rules is data."""
        alone = tuple(name for name, stored in layers.items() if stored == tune.WEIGHTS_ALONE)
        named = {name: NVFP4.id if name in alone else stored for name, stored in layers.items()}
        post = {layer.name: layer.precision for layer in self.by_rules.layers}
        return Tuning(
            layers={name: stored for name, stored in named.items() if post[name] != stored},
            searched=True,
            calibrated=(*self.calibrated, *files),
            weights_alone=alone,
            **more,
        )

    def recipe(self, lane: Lane, precision: str = NVFP4.id) -> Recipe:
        return replace(self.rules, id=lane.label, tunings=MappingProxyType({precision: lane.tuning}))

    def plan(self, tuning: Tuning) -> Plan:
        return recipes.plan(self.bench.exact, self.recipe(Lane("", tuning)), NVFP4.id)

    def denoiser(self, lane: Lane, precision: str = NVFP4.id) -> nn.Module:
        return self.bench.quantized(self.recipe(lane, precision), precision)[0]

    def error(self, lane: Lane, kept: Sequence[Call], precision: str = NVFP4.id) -> float:
        """Mean squared error of what the denoiser says, of the square of what bf16 says."""
        return self.errors(lane, kept, precision)[0]

    def errors(self, lane: Lane, kept: Sequence[Call], precision: str = NVFP4.id) -> tuple[float, float]:
        """The same, and that with all activations in bf16."""
        made = self.denoiser(lane, precision)
        found = distill.error(made, kept)
        with WeightOnlySteps(made, (1, 0), 1):
            alone = distill.error(made, kept)
        self.say(f"{lane.label}: error {found:.5f}, of the weights alone {alone:.5f}")
        return found, alone

    # Learning

    def learnt(self, step: str, layers: Layers, made: Sequence[Call], kept: Sequence[Call], **how: object) -> dict:
        """The weights of these layers learnt, and kept as files; `how` is that of `learn`. Not done twice."""
        held = self.content["steps"].get(step)
        if held and held["layers"] == dict(layers) and all((self.out / name).is_file() for name in held["files"]):
            self.say(f"{step}: learnt before")
            return held
        found = self.learn(step, layers, made, kept, **how)
        self.content["steps"][step] = found
        self.put()
        return found

    def learn(
        self,
        step: str,
        layers: Layers,
        made: Sequence[Call],
        kept: Sequence[Call],
        begin: Sequence[str] = (),
        four_over_six: bool = False,
    ) -> dict:
        """Args: begin: files of what was learnt before; it is gone on with."""
        tuning = self.tuning(layers)
        wanted = {layer.name for layer in self.plan(tuning).layers if layer.precision == NVFP4.id}
        before = [self.out / name for name in begin]
        places = gptq.names(before) if before else frozenset()
        stored = {name: self.packed(name, ()) for name in wanted}
        first = {name: self.packed(name, before) if name in places else one for name, one in stored.items()}
        eight = [name for name, stored in tuning.layers.items() if stored == FP8.id]
        student = Student(self.bench, first, eight, tuning.weights_alone, four_over_six)
        lesson = Lesson(seconds=self.args.seconds * SHARES[step], most=self.args.most or 100_000, rate=self.args.rate)
        start = distill.error(student.denoiser, kept)
        done = distill.learn(student, made, lesson, self.say)
        end = distill.error(student.denoiser, kept)
        # What is no better on other noise has learnt by heart: it stays as it was.
        after = student.weights() if end < start else first
        files = gptq.write_changes(
            self.out, f"{self.spec.family}-{step}", {name: (stored[name], after[name]) for name in sorted(after)}
        )
        size = sum(file.stat().st_size for file in files)
        self.say(f"{step}: error {start:.5f} -> {end:.5f} in {done} iterations, {size} bytes")
        return {
            "layers": dict(layers),
            "four_over_six": four_over_six,
            "iterations": done,
            "error": [start, end],
            "taken": end < start,
            "files": [file.name for file in files],
        }

    def packed(self, name: str, files: Sequence[Path]) -> Packed:
        """A weight that has been learnt, or calibrated, or else with searched scales."""
        weight = self.bench.exact.get_submodule(name).weight.data
        places = (*self.calibrated, *files)
        if name in gptq.names(places):
            return gptq.read(places, name, weight)
        return nvfp4.quantize(weight, searched=True)

    # Scores

    def score(self, lanes: Sequence[Lane]) -> None:
        """LPIPS of every lane on the prompts that report, where it is not known yet."""
        each, at_once = self.content["each"], self.args.at_once
        exact: dict[int, list] = {}
        seed = self.bench.request(self.report[0]).seed
        work = [(lane.label, lane) for lane in lanes if lane.label not in each]
        if "another seed" not in each:
            work.append(("another seed", None))
        for label, lane in work:
            made, scores = self.bench.exact if lane is None else self.denoiser(lane), []
            steps = (0, 0) if lane is None else lane.tuning.weight_only_steps
            for begin in range(0, len(self.report), at_once):
                some = self.report[begin : begin + at_once]
                if begin not in exact:
                    exact[begin] = self.bench.make_all(self.bench.exact, some)
                pictures = self.bench.make_all(made, some, steps, seed + (lane is None))
                scores += distances_of(self.bench, pictures, exact[begin])
            each[label] = scores
            self.say(f"{label}: LPIPS {sum(scores) / len(scores):.4f}")
            self.put()

    def run(self) -> dict:
        with torch.no_grad():
            return self._run()

    def _run(self) -> dict:
        rows = Probe(self.bench, self.search[:1], 1).rows
        made, kept = self.learnt_from()
        shares = self.content.get("shares") or self.weigh(kept)
        self.content["shares"] = shares
        other, more = (self.layers(shares, rows, allowed) for allowed in ((0.0, 0.0), MORE))
        if "chosen" not in self.content:
            errors = {
                name: self.error(Lane(f"{name} layers", self.tuning(layers)), kept)
                for name, layers in (("the post's", {}), ("exchanged", other))
            }
            self.content["chosen"] = {
                "layers": other if errors["exchanged"] < errors["the post's"] else {},
                "errors": errors,
            }
            self.put()
        at_post = self.content["chosen"]["layers"]
        first = self.learnt("post", at_post, made, kept)
        four = self.learnt("four", at_post, made, kept, begin=first["files"], four_over_six=True)
        last = self.learnt("more", more, made, kept, begin=first["files"])
        files = {
            step: [self.out / name for name in found["files"]]
            for step, found in (("post", first), ("four", four), ("more", last))
        }
        learnt = self.tuning(at_post, files["post"])
        exchanged = "layers exchanged, " if at_post else ""
        rebalanced = Lane("NVFP4, layers exchanged, calibrated", self.tuning(other), REBALANCED)
        lanes = [
            Lane("NVFP4", Tuning(), self.rules.id),
            Lane("NVFP4, calibrated", self.tuning({})),
            rebalanced,
            Lane(f"NVFP4, {exchanged}learnt", learnt),
            Lane(f"NVFP4, {exchanged}four over six, learnt", self.tuning(at_post, files["four"], four_over_six=True)),
            Lane(f"NVFP4, {exchanged}learnt, first steps", replace(learnt, weight_only_steps=FIRST_STEPS)),
            Lane("NVFP4, up to +8%, calibrated", self.tuning(more)),
            Lane("NVFP4, up to +8%, learnt", self.tuning(more, files["more"])),
        ]
        self.score(lanes)
        self.content |= self.rows(lanes, rows)
        self.put()
        if at_post:
            self.recipe_file(rebalanced)
        return self.content

    def rows(self, lanes: Sequence[Lane], rows: Mapping[str, int]) -> dict:
        """A row a lane, as the Quality tab reads them (ui/tabs/quality.py)."""
        each, made, total = self.content["each"], [], self.spec.defaults.num_inference_steps
        for lane in lanes:
            plan, scores = self.plan(lane.tuning), each[lane.label]
            kinds = Counter(layer.precision for layer in plan.layers)
            made.append(
                {
                    "recipe": lane.recipe or None,
                    "label": lane.label,
                    "remedy": lane.label.partition(", ")[2],
                    "precision": NVFP4.id,
                    "layers": {name: kinds[name] for name in FORMATS if kinds[name]},
                    "weight_bytes": plan.quantized_bytes,
                    "gemm_time_of_bf16": tune.product_time(plan, rows, lane.tuning.weight_only_steps, total),
                    "lpips": {"report": estimate(scores)},
                    "each": {"report": scores},
                }
            )
        other = each["another seed"]
        return {"ruler": {"ceiling": estimate(other)}, "another seed": other, "formats": made}

    def recipe_file(self, lane: Lane) -> None:
        """The layers exchanged at the post's cost as a recipe, to be put beside the others."""
        chosen = {
            "by": "python -m assets.figures.frontier",
            "model": self.spec.id,
            "prompts": "those of the search and of calibration, none of those that report",
            "weights": self.content["weights"],
        }
        file = self.out / f"{self.spec.family}-{REBALANCED}.json"
        tune.write_recipe(file, REBALANCED, self.rules.id, lane.tuning, chosen)


def table(found: Mapping) -> str:
    """Markdown: a row a lane, with bytes, product time, and what it takes off the plain one's LPIPS."""
    count, plain = len(found["prompts"]["report"]), found["formats"][0]
    before, mean = plain["each"]["report"], plain["lpips"]["report"]["mean"]
    lines = [
        f"| {catalog.model(found['model']).name} | Denoiser, MB | Products, of bf16's time | LPIPS, {count} prompts | "
        "Median | Less than the post's, of the post's |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["formats"]:
        score, said = row["lpips"]["report"], ""
        if row is not plain:
            less = estimate([(b - a) / mean for a, b in zip(row["each"]["report"], before, strict=True)])
            said = f"{less['mean']:+.0%} ({less['low']:+.0%} to {less['high']:+.0%})"
        over = 100 * (row["weight_bytes"] / plain["weight_bytes"] - 1)
        lines.append(
            f"| {row['label']} | {row['weight_bytes'] / 1e6:.2f} ({over:+.1f}%) | {row['gemm_time_of_bf16']:.3f} | "
            f"{score['mean']:.4f} ({score['low']:.4f} to {score['high']:.4f}) | {score['median']:.4f} | {said} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default=None)
    parser.add_argument("--seconds", type=float, default=70, help="of learning, in all")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="iterations of each part of it at most")
    parser.add_argument("--rate", type=float, default=distill.RATE)
    parser.add_argument("--learn-from", type=int, default=256, metavar="N", help="prompts")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=32, metavar="N", help="prompts made together")
    if sys.argv[1:2] == ["--table"]:
        found = json.loads(Path(sys.argv[2]).read_text())
    else:
        args = parser.parse_args()
        found = Frontier(args.model, args.out, args).run()
    print(table(found))


if __name__ == "__main__":
    main()
