"""Which layers NVFP4 hurts most: one group of layers quantized at a time, by role and depth, and the damage measured.

The damage is seen where it is cheap, in the denoiser's output for inputs of the bf16 run, and where it counts, as LPIPS
of finished pictures. Of the first there are two measures. `denoiser_error` is the relative L2 error of one output.
`drift` is that of the outputs summed over the steps, weighted as the sampler weights them: errors that point another
way in every step, as those of quantized activations do, cancel in it as they cancel in the picture, and errors of
weights, which stay the same, do not.

Knows nothing of remedies or choices: engine/quality/tune.py does.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from engine.formats import FORMATS, QUANTIZED, REFERENCE
from engine.quality.lab import PRECISION, Bench, Quality, quantized_layers
from engine.quantization import recipes
from engine.quantization.recipe_files import Tuning
from engine.quantization.recipes import Recipe
from engine.quantization.roles import ROLES, role_of
from engine.runtime.pipeline import call
from engine.weights import loading

OUTSIDE = "outside"
"""The depth of a layer that is in no block."""
_BLOCK = re.compile(r"^(?P<kind>\w*blocks)\.(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The layers of one role at one depth."""

    role: str
    depth: str
    names: tuple[str, ...]


def groups(names: Sequence[str]) -> list[Group]:
    """The layers of a transformer by role and depth, blocks of all kinds counted through."""
    kinds: dict[str, int] = {}
    for found in filter(None, map(_BLOCK.match, names)):
        kinds[found["kind"]] = max(kinds.get(found["kind"], 0), int(found["index"]) + 1)
    before = {kind: sum(list(kinds.values())[:i]) for i, kind in enumerate(kinds)}
    held: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        block = _BLOCK.match(name)
        depth = str(before[block["kind"]] + int(block["index"])) if block else OUTSIDE
        held[role_of(name), depth].append(name)
    return [Group(role=role, depth=depth, names=tuple(some)) for (role, depth), some in held.items()]


class Probe:
    """Inputs and outputs of the bf16 denoiser at a few steps of a few prompts.

    Raises:
        RequestError: the model does not take a prompt.
    """

    def __init__(self, bench: Bench, prompts: Sequence[str], steps: int):
        self.transformer, self._bench, self._prompts = bench.exact, bench, prompts
        count = bench.request(prompts[0]).num_inference_steps
        self.steps = sorted({round((i + 0.5) * count / min(steps, count) - 0.5) for i in range(min(steps, count))})
        self.rows: dict[str, int] = {}
        """Rows that each Linear layer multiplies in one step, all passes of guidance together."""
        self._runs: list[list[tuple[tuple[Any, ...], dict[str, Any], Tensor, float]]] = []
        for prompt in prompts:
            self._capture(bench, prompt)

    def _capture(self, bench: Bench, prompt: str) -> None:
        pipeline, request = bench.pipeline(self.transformer), bench.request(prompt)
        calls: list[tuple[float, tuple[Any, ...], dict[str, Any], Tensor]] = []
        hooks = [self.transformer.register_forward_hook(_keeper(calls), with_kwargs=True)]
        self.rows = {}
        for name, layer in self.transformer.named_modules():
            if isinstance(layer, nn.Linear):
                hooks.append(layer.register_forward_hook(self._counter(name)))
        call(pipeline, bench.spec, request, request.seed)
        for hook in hooks:
            hook.remove()
        if not all(output.isfinite().all() for *_, output in calls):
            raise bench.not_numbers(prompt)
        sigmas = pipeline.scheduler.sigmas.tolist()
        times = list(dict.fromkeys(time for time, *_ in calls))
        self.rows = {name: rows // len(times) for name, rows in self.rows.items()}
        passes: dict[int, list[tuple[tuple[Any, ...], dict[str, Any], Tensor, float]]] = defaultdict(list)
        seen: dict[float, int] = defaultdict(int)
        for time, args, kwargs, output in calls:
            step, number = times.index(time), seen[time]
            seen[time] += 1
            if step in self.steps:
                passes[number].append((args, kwargs, output, sigmas[step + 1] - sigmas[step]))
        self._runs += passes.values()

    def _counter(self, name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]:
        def count(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.rows[name] = self.rows.get(name, 0) + output.numel() // module.out_features

        return count

    def damage(self) -> tuple[float, float]:
        """`denoiser_error` and `drift` of the denoiser as it is now: root mean squares over calls and over runs.

        Raises:
            UnsupportedError: one is not a number, because the denoiser's output is not.
        """
        errors, drifts = [], []
        for run in self._runs:
            strayed = way = torch.zeros((), device=run[0][2].device)
            for args, kwargs, exact, step in run:
                wrong = _first(self.transformer(*args, **kwargs)).float() - exact.float()
                errors.append((wrong.norm() / exact.float().norm()).item() ** 2)
                strayed, way = strayed + step * wrong, way + step * exact.float()
            drifts.append((strayed.norm() / way.norm()).item() ** 2)
        found = math.sqrt(sum(errors) / len(errors)), math.sqrt(sum(drifts) / len(drifts))
        if not all(map(math.isfinite, found)):
            raise self._bench.not_numbers(self._prompts[0])
        return found


def _keeper(calls: list[tuple[float, tuple[Any, ...], dict[str, Any], Tensor]]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Sequence[Tensor]) -> None:
        calls.append((kwargs["timestep"].flatten()[0].item(), args, dict(kwargs), _first(output)))

    return keep


def _first(output: Sequence[Tensor]) -> Tensor:
    """What a denoiser says of picture or clip; of a clip with sound, the clip alone."""
    return output[0]


def everything(searched: bool) -> Recipe:
    """Every layer in one precision."""
    tunings = {PRECISION: Tuning(searched=searched)}
    return Recipe(id="everything", summary="Every layer.", tunings=MappingProxyType(tunings))


def run(bench: Bench, quality: Quality, probes: int, steps: int, lpips_prompts: int) -> Probe:
    """Measure every group that `quality` does not have yet, with searched block scales, and write each into it.

    Args:
        probes: prompts for the denoiser's output, from those that choose.
        steps: of them, spread evenly.
        lpips_prompts: prompts for LPIPS; 0 leaves it out.

    Raises:
        UnsupportedError, OutputError: in one sentence.
    """
    search = quality["prompts"]["search"]
    probe = Probe(bench, search[:probes], steps)
    plan = recipes.plan(bench.exact, everything(searched=True), PRECISION)
    planned = {layer.name: layer for layer in plan.layers if layer.quantized}
    place = bench.quantizer(plan)
    found = groups(list(planned))
    roles = [role for role in ROLES if any(group.role == role for group in found)]
    depths = list(dict.fromkeys(group.depth for group in found))
    part: dict[str, Any] = {
        "precision": PRECISION,
        "measure": "relative L2 error of the denoiser's outputs, summed over steps as the sampler weights them",
        "prompts": probes,
        "steps": probe.steps,
        "lpips_prompts": lpips_prompts,
        "roles": roles,
        "role_names": {role: ROLES[role][0] for role in roles},
        "depths": sorted(depths, key=lambda depth: (depth == OUTSIDE, int(depth) if depth.isdigit() else 0)),
        "shares": {},
        "cells": [],
    }
    held = quality["sensitivity"]
    if held and all(held[key] == part[key] for key in ("prompts", "steps", "roles", "depths")):
        part |= {"cells": held["cells"], "shares": held["shares"]}
    known = {(cell["role"], cell["depth"]): cell for cell in part["cells"]}
    for i, group in enumerate(found):
        cell = known.get((group.role, group.depth))
        if cell is None or (lpips_prompts and cell["lpips"] is None):
            with quantized_layers(bench.exact, group.names, place):
                error, drift = probe.damage() if cell is None else (cell["denoiser_error"], cell["drift"])
            saved = sum(
                FORMATS[REFERENCE].size(planned[n].in_features, planned[n].out_features) - planned[n].bytes
                for n in group.names
            )
            cell = {
                "role": group.role,
                "depth": group.depth,
                "layers": len(group.names),
                "names": list(group.names),
                "bytes_saved": saved,
                "denoiser_error": error,
                "drift": drift,
                "lpips": _lpips(bench, group, place, search[:lpips_prompts]),
            }
            known[group.role, group.depth] = cell
            part["cells"] = list(known.values())
            quality.put(sensitivity=part)
            bench.say(
                f"{i + 1} of {len(found)}: {ROLES[group.role][0]}, depth {group.depth}, drift {cell['drift']:.4f}"
            )
    if not part["shares"]:
        part["shares"] = _shares(bench, probe)
        quality.put(sensitivity=part)
    return probe


def agreement(part: Mapping[str, Any]) -> dict[str, float]:
    """Spearman's rank correlation of each measure of the denoiser's output with LPIPS, over the groups that have it;
    empty where fewer than three do."""
    cells = [cell for cell in part["cells"] if cell["lpips"] is not None]
    if len(cells) < 3:
        return {}
    scores = [cell["lpips"] for cell in cells]
    return {
        measure: float(spearmanr([cell[measure] for cell in cells], scores).statistic)
        for measure in ("drift", "denoiser_error")
    }


def _lpips(bench: Bench, group: Group, place: loading.Place, prompts: Sequence[str]) -> float | None:
    if not prompts:
        return None
    # The references are bf16 pictures, so they are made before the layers are changed.
    for prompt in prompts:
        bench.reference(prompt)
    with quantized_layers(bench.exact, group.names, place):
        return sum(bench.lpips(bench.exact, prompt) for prompt in prompts) / len(prompts)


def _shares(bench: Bench, probe: Probe) -> dict[str, float]:
    """What each precision leaves of NVFP4's squared drift, with the post's layers in it."""
    post, drifts = recipes.recipe(bench.spec.family, bench.spec.recipes[0]), {}
    for name in (PRECISION, *(other for other in QUANTIZED if other != PRECISION)):
        searching = replace(post, tunings=MappingProxyType({PRECISION: Tuning(searched=True)}))
        plan = recipes.plan(bench.exact, searching, name)
        place = bench.quantizer(plan)
        with quantized_layers(bench.exact, sorted(plan.names), place):
            drifts[name] = probe.damage()[1]
    return {REFERENCE: 0.0, **{name: (drift / drifts[PRECISION]) ** 2 for name, drift in drifts.items()}}
