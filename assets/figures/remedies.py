"""Every format, and every remedy alone and together, on prompts that nothing was chosen on: mean LPIPS from bf16.

python -m assets.figures.remedies MODEL OUT [--device D] [--limit N] [--at-once N]
python -m assets.figures.remedies --table OUT

MODEL is a miniature with a tuned recipe. Its prompts are those that report in assets/quality/MODEL.json, and its
calibrated weights those of its recipe file. A remedy is compared with the same format without it, prompt by prompt:
the mean difference with its interval. OUT is written after every picture, and gone on with where it is for the same
machine, versions and weights. Several prompts are made at once, on a GPU as many as fit; bf16 is made of the same ones
together. NVFP4's scale of a whole activation is then that of all of them, which only says where its grid ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from engine import catalog
from engine.environment import versions
from engine.files import write_whole
from engine.formats import FORMATS, INT8, NVFP4, QUANTIZED, REFERENCE
from engine.metrics import distances
from engine.metrics.statistics import estimate
from engine.quality.lab import Bench
from engine.quantization import capability, recipe_files, recipes
from engine.quantization.inspection import inspect
from engine.quantization.recipe_files import Tuning
from engine.runtime.multi_device import driving
from engine.weights import loading
from engine.weights.source import Source

ANOTHER_SEED = "another seed"
STEPS = (2, 0)
"""Weight-only steps, as of engine/quality/tune.py."""


@dataclass(frozen=True)
class Lane:
    """A format with some remedies."""

    precision: str
    label: str
    tuning: Tuning = field(default_factory=Tuning)

    @property
    def name(self) -> str:
        return f"{FORMATS[self.precision].label}{', ' * bool(self.label)}{self.label}"


def lanes(family: str) -> list[Lane]:
    """Every format plain, then remedies; those with calibrated weights where the family has them."""
    found, *_ = recipe_files.read(family)
    files = found.tunings[NVFP4.id].calibrated
    made = [Lane(name, "") for name in QUANTIZED]
    made += [Lane(INT8.id, f"rotated by {most}", Tuning(rotation=most)) for most in (16, 1024)]
    remedies = {
        "four over six": {"four_over_six": True},
        "rotated by 16": {"rotation": 16},
        "rotated by 1024": {"rotation": 1024},
        "searched scales": {"searched": True},
        "four over six, searched scales": {"four_over_six": True, "searched": True},
        "four over six, rotated by 16": {"four_over_six": True, "rotation": 16},
        "calibrated": {"calibrated": files},
        "calibrated, first steps": {"calibrated": files, "weight_only_steps": STEPS},
        "four over six, calibrated": {"four_over_six": True, "calibrated": files},
        "four over six, calibrated, first steps": {
            "four_over_six": True,
            "calibrated": files,
            "weight_only_steps": STEPS,
        },
    }
    return made + [Lane(NVFP4.id, label, Tuning(**said)) for label, said in remedies.items()]


def measure(model: str, out: Path, device: str, limit: int, at_once: int) -> dict:
    """Score what is not known yet, some prompts in all lanes after others, so that a run that is ended early has all
    lanes alike. What is written is what the Quality tab reads (ui/tabs/quality.py)."""
    spec = catalog.model(model)
    bench = Bench(spec, device, Source(), say=lambda text: print(text, file=sys.stderr))
    prompts = json.loads((catalog.ASSETS / "quality" / f"{model}.json").read_text())["prompts"]["report"][:limit]
    asked = bench.request(prompts[0])
    execution = {name: support.execution for name, support in bench.support.items()}
    conditions = {
        "model": model,
        "title": f"{spec.name}, formats and remedies",
        "device": bench.machine.name,
        "execution": ", ".join(f"{FORMATS[name].label} {how}" for name, how in execution.items() if name != REFERENCE),
        "versions": versions(),
        "weights": loading.fingerprint(spec, bench.source),
        "recipe": spec.recipes[0],
        "at_once": at_once,
        "settings": {k: v for k, v in asked.to_json().items() if k not in ("prompt", "precisions", "recipe", "model")},
    }
    known = _known(out, conditions)
    rules = recipes.recipe(spec.family, spec.recipes[0])
    made: dict[str, tuple[nn.Module, tuple[int, int], int]] = {}
    with driving(bench.device):
        for lane in lanes(spec.family):
            recipe = replace(rules, id=lane.name, tunings=MappingProxyType({lane.precision: lane.tuning}))
            made[lane.name] = (bench.quantized(recipe, lane.precision)[0], lane.tuning.weight_only_steps, asked.seed)
        made[ANOTHER_SEED] = (bench.exact, (0, 0), asked.seed + 1)
        for begin in range(0, len(prompts), at_once):
            some = prompts[begin : begin + at_once]
            exact = bench.make_all(bench.exact, some)
            for name, (denoiser, steps, seed) in made.items():
                scores = known.setdefault(name, {})
                if any(prompt not in scores for prompt in some):
                    found = distances_of(bench, bench.make_all(denoiser, some, steps, seed), exact)
                    scores |= dict(zip(some, found, strict=True))
                    bench.say(name)
            done = conditions | rows(spec, prompts[: begin + len(some)], known)
            write_whole(out, (json.dumps(done, indent=1, ensure_ascii=False) + "\n").encode())
            bench.say(f"{begin + len(some)} of {len(prompts)} prompts")
    return done


def _known(out: Path, conditions: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Lane -> prompt -> score, of what was measured under the same conditions."""
    found = json.loads(out.read_text()) if out.is_file() else {}
    if any(found.get(name) != value for name, value in conditions.items()):
        return {}
    each = {row["label"]: row["each"]["report"] for row in found["formats"]} | {ANOTHER_SEED: found[ANOTHER_SEED]}
    return {name: dict(zip(found["prompts"]["report"], scores, strict=True)) for name, scores in each.items()}


def rows(spec: catalog.ModelSpec, prompts: list[str], known: Mapping[str, Mapping[str, float]]) -> dict:
    """A row a lane, with its scores in the order of the prompts, and those of another seed."""
    first, made = spec.recipes[0], []
    for lane in lanes(spec.family):
        each = [known[lane.name][prompt] for prompt in prompts]
        made.append(
            {
                "recipe": first if lane.tuning == Tuning() else None,
                "label": lane.name,
                "remedy": lane.label,
                "precision": lane.precision,
                "weight_bytes": inspect(spec.id, lane.precision, first)["bytes"]["quantized"],
                "lpips": {"report": estimate(each)},
                "each": {"report": each},
            }
        )
    other = [known[ANOTHER_SEED][prompt] for prompt in prompts]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompts": {"report": prompts},
        "ruler": {"ceiling": estimate(other)},
        ANOTHER_SEED: other,
        "formats": made,
    }


def distances_of(bench: Bench, made: list[Tensor], exact: list[Tensor]) -> list[float]:
    """LPIPS of each pair; of a clip the mean over its frames."""
    pairs = zip(made, exact, strict=True)
    return [round(distances.clip_distance(a, b, bench.device)[0].mean().item(), 6) for a, b in pairs]


def table(found: Mapping) -> str:
    """Markdown: a row a lane, with what it changes against its format without remedies."""
    count = len(found["prompts"]["report"])
    lines = [
        f"| {catalog.model(found['model']).name} | LPIPS, {count} prompts | Median | Less than plain, of plain's |",
        "|---|---|---|---|",
    ]
    plain = {row["precision"]: row for row in found["formats"] if not row["remedy"]}
    for row in found["formats"]:
        said, base = "", plain[row["precision"]]
        if row["remedy"]:
            before, mean = base["each"]["report"], base["lpips"]["report"]["mean"]
            less = estimate([(b - a) / mean for a, b in zip(row["each"]["report"], before, strict=True)])
            said = f"{less['mean']:+.0%} ({less['low']:+.0%} to {less['high']:+.0%})"
        lines.append(f"| {row['label']} | {_interval(row['lpips']['report'])} | {said} |")
    return "\n".join([*lines, f"| bf16, {ANOTHER_SEED} | {_interval(found['ruler']['ceiling'])} | |"])


def _interval(score: Mapping[str, float]) -> str:
    return f"{score['mean']:.4f} ({score['low']:.4f} to {score['high']:.4f}) | {score['median']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default=None)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="prompts made together")
    if sys.argv[1:2] == ["--table"]:
        found = json.loads(Path(sys.argv[2]).read_text())
    else:
        args = parser.parse_args()
        device = args.device or capability.default_device()
        found = measure(args.model, args.out, device, args.limit, args.at_once)
    print(table(found))


if __name__ == "__main__":
    main()
