"""Every format, and every remedy alone and together, on prompts that nothing was chosen on: mean LPIPS from bf16.

python -m assets.figures.remedies MODEL OUT [--device D] [--limit N] [--share I/N]
python -m assets.figures.remedies --join OUT SHARE...

MODEL is a miniature with a tuned recipe. Its prompts are those that report in assets/quality/MODEL.json, and its
calibrated weights those of its recipe file. A remedy is compared with the same format without it, prompt by prompt:
the mean difference with its interval. OUT is written after every picture, and gone on with where it is for the same
machine, versions and weights. Several processes share the prompts of a model; what they found is joined.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from torch import nn

from engine import catalog
from engine.environment import versions
from engine.files import write_whole
from engine.formats import FORMATS, INT8, NVFP4, QUANTIZED, REFERENCE
from engine.metrics import distances
from engine.metrics.statistics import estimate
from engine.quality.lab import Bench
from engine.quantization import capability, recipe_files, recipes
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
    (found,) = recipe_files.read(family)
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


def measure(model: str, out: Path, device: str, limit: int, share: tuple[int, int] = (0, 1)) -> dict:
    """Score what is not known yet, prompt after prompt, so that a run that is ended early has all lanes alike.

    Args:
        share: (i, n) takes every n-th prompt from the i-th on, counted from 0.
    """
    spec = catalog.model(model)
    bench = Bench(spec, device, Source(), say=lambda text: print(text, file=sys.stderr))
    prompts = json.loads((catalog.ASSETS / "quality" / f"{model}.json").read_text())["prompts"]["report"]
    prompts = prompts[:limit][share[0] :: share[1]]
    asked = bench.request(prompts[0])
    conditions = {
        "model": model,
        "device": bench.machine.name,
        "execution": {name: support.execution for name, support in bench.support.items()},
        "versions": versions(),
        "weights": loading.fingerprint(spec, bench.source),
        "recipe": spec.recipes[0],
        "settings": {k: v for k, v in asked.to_json().items() if k not in ("prompt", "precisions", "recipe", "model")},
    }
    found = json.loads(out.read_text()) if out.is_file() else {}
    if any(found.get(name) != value for name, value in conditions.items()):
        found = conditions | {"lpips": {}}
    rules = recipes.recipe(spec.family, spec.recipes[0])
    chosen = lanes(spec.family)
    with driving(bench.device):
        made: dict[str, nn.Module] = {}
        for lane in chosen:
            recipe = replace(rules, id=lane.name, tunings=MappingProxyType({lane.precision: lane.tuning}))
            made[lane.name], _ = bench.quantized(recipe, lane.precision)
        for prompt in prompts:
            for lane in chosen:
                known = found["lpips"].setdefault(lane.name, {})
                if prompt not in known:
                    value = bench.lpips(made[lane.name], prompt, lane.tuning.weight_only_steps)
                    known[prompt] = round(value, 6)
            known = found["lpips"].setdefault(ANOTHER_SEED, {})
            if prompt not in known:
                known[prompt] = round(other_seed(bench, prompt), 6)
            write_whole(out, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
            bench.say(f"{len(known)} of {len(prompts)} prompts")
    return found


def join(shares: list[dict]) -> dict:
    """What several processes found, as if one had; prompts that lack a lane are left out.

    Raises:
        ValueError: they were not measured alike.
    """
    first, *rest = shares
    if any({**share, "lpips": None} != {**first, "lpips": None} for share in rest):
        raise ValueError("These were not measured on the same machine with the same versions, weights and settings.")
    lanes = {name: {p: v for share in shares for p, v in share["lpips"][name].items()} for name in first["lpips"]}
    whole = set.intersection(*(set(known) for known in lanes.values()))
    return first | {"lpips": {name: {p: v for p, v in known.items() if p in whole} for name, known in lanes.items()}}


def other_seed(bench: Bench, prompt: str) -> float:
    """The ceiling: bf16 with the next seed, from bf16."""
    made = bench.make(bench.exact, prompt, seed=bench.request(prompt).seed + 1)
    return distances.clip_distance(made, bench.reference(prompt), bench.device)[0].mean().item()


def table(found: Mapping) -> str:
    """Markdown: a row a lane, with what it changes against its format without remedies."""
    scores = found["lpips"]
    count = min(map(len, scores.values()))
    lines = [
        f"| {catalog.model(found['model']).name} | LPIPS, {count} prompts | Median | Less than plain, of plain's |",
        "|---|---|---|---|",
    ]
    plain = {FORMATS[name].label for name in QUANTIZED}
    for name, known in scores.items():
        score = estimate([*known.values()])
        base = name.partition(", ")[0]
        said = ""
        if name not in plain and base in plain:
            mean = estimate([*scores[base].values()])["mean"]
            less = estimate([(scores[base][prompt] - value) / mean for prompt, value in known.items()])
            said = f"{less['mean']:+.0%} ({less['low']:+.0%} to {less['high']:+.0%})"
        shown = name if base in plain else f"{REFERENCE}, {name}"
        interval = f"{score['mean']:.4f} ({score['low']:.4f} to {score['high']:.4f})"
        lines.append(f"| {shown} | {interval} | {score['median']:.4f} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default=None)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--share", default="0/1")
    if sys.argv[1:2] == ["--join"]:
        out, *shares = map(Path, sys.argv[2:])
        found = join([json.loads(share.read_text()) for share in shares])
        write_whole(out, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    else:
        args = parser.parse_args()
        share = int(args.share.partition("/")[0]), int(args.share.partition("/")[2])
        found = measure(args.model, args.out, args.device or capability.default_device(), args.limit, share)
    print(table(found))


if __name__ == "__main__":
    main()
