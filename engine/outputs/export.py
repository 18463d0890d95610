"""A column of a model as a folder that plain diffusers with torchao loads: `python -m engine quantize`.

The denoiser is stored as its layers are quantized, in torchao's layout for the hardware that runs the format natively.
Everything else is the source's own, as hard links where the disk allows it. Beside it lies where it comes from
(engine/weights/torchao_layout.py), and a model card. The folder is whole or not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import TorchAoConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.catalog import ModelSpec
from engine.columns import FP8_ATTENTION, Column, label
from engine.environment import versions
from engine.errors import RequestError, UnsupportedError
from engine.files import whole_folder
from engine.formats import FORMATS, NVFP4, REFERENCE
from engine.outputs import program
from engine.quantization import capability, recipe_files, recipes, stored
from engine.quantization.recipe_files import Tuning
from engine.quantization.recipes import Plan
from engine.weights import checkpoint, fingerprint, loading
from engine.weights.source import Source
from engine.weights.torchao_layout import BRANCHES, PROVENANCE

SHARD_BYTES = 5e9
"""Of one file of the denoiser at most, unless a single layer is larger; the hub takes up to 50 GB, diffusers' own
default is 10."""
CARD = "README.md"
_STEM = "diffusion_pytorch_model"
_BESIDE = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Of the source's files beside its components, what has to go with them."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written."""

    folder: Path
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    """What plain diffusers makes of it otherwise than the engine, in sentences."""

    def to_json(self) -> dict[str, Any]:
        """The command's object."""
        return {"folder": str(self.folder), "plain_diffusers": list(self.notes)} | dict(self.provenance)


def write(
    spec: ModelSpec,
    column: Column,
    device: torch.device,
    source: Source,
    out: Path,
    told: loading.Told | None = None,
) -> Written:
    """Quantize a model's denoiser and write the folder.

    Raises:
        RequestError: the column is the reference, or stored already.
        UnsupportedError: the device cannot run the format.
        LoadError: the weights cannot be had, or a file of them is bad.
        OutputError: the folder is there already, or cannot be written.
    """
    if column.format == REFERENCE:
        raise RequestError(f"{REFERENCE} is not quantized: give --column a format, such as {NVFP4.id}.")
    if not column.adapted:
        raise RequestError("A checkpoint without the LoRA is that of the model alone: leave out --lora.")
    if column.fp8_attention:
        raise RequestError(f"A checkpoint stores weights, which FP8 attention leaves alone: leave out {FP8_ATTENTION}.")
    recipe = recipes.recipe(spec.family, column.recipe)
    if recipe.held is not None:
        raise RequestError(f"{column.recipe} is stored quantized already: give --column a recipe.")
    support = capability.support(column.format, capability.detect(device))
    if support.execution == "unavailable":
        raise UnsupportedError(support.reason)
    with whole_folder(out) as partial:
        origin = loading.folder(spec, source, told)
        plan = recipes.plan_of(loading.blueprint(spec), spec, column)
        denoiser = stored.denoiser(spec, plan, support, device, source, told)
        recipes.verify(denoiser, plan)
        _bring(origin, partial)
        _write_denoiser(denoiser, column.format, origin / "transformer", partial / "transformer")
        said = _provenance(spec, plan, column, source, support.machine.name)
        (partial / PROVENANCE).write_text(json.dumps(said, indent=1) + "\n")
        notes = tuple(_notes(plan))
        (partial / CARD).write_text(_card(spec, plan, said, notes))
    return Written(folder=out, provenance=said, notes=notes)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _bring(origin: Path, target: Path) -> None:
    """Everything of the source but its denoiser, which plain diffusers reads."""
    wanted = [origin / "model_index.json", *(file for glob in _BESIDE for file in origin.glob(glob))]
    for part in checkpoint.parts(origin):
        if part != "transformer":
            wanted += [file for file in sorted((origin / part).rglob("*")) if file.is_file()]
    for file in wanted:
        _link(file, target / file.relative_to(origin))


def _link(file: Path, target: Path) -> None:
    """The same weights twice take no room; what somebody may edit is copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(file.resolve(), target)
            return
    shutil.copyfile(file, target)


def _write_denoiser(denoiser: nn.Module, form: str, origin: Path, target: Path) -> None:
    target.mkdir()
    config = checkpoint.read_json(origin / "config.json")
    config["quantization_config"] = TorchAoConfig(stored.config(form)).to_dict()
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if branches := stored.branches(denoiser):
        save_file(branches, target / BRANCHES, {"format": "pt"})
        (target / BRANCHES).chmod(0o644)
    state = stored.state(denoiser)
    shards = _shards(state)
    metadata = {"format": "pt", "tensor_names": stored.tensor_names(state)}
    for name, tensor in state.items():
        metadata |= stored.described(name, tensor)
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"{_STEM}.safetensors" if len(shards) == 1 else f"{_STEM}-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: value for name in names for key, value in stored.taken_apart(name, state[name]).items()}
        save_file(tensors, target / file, metadata)
        (target / file).chmod(0o644)  # the library keeps it to its owner
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (target / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in runs of `SHARD_BYTES` at most."""
    shards: list[list[str]] = [[]]
    taken = 0.0
    for name, tensor in state.items():
        size = stored.size(tensor)
        if shards[-1] and taken + size > SHARD_BYTES:
            shards.append([])
            taken = 0.0
        shards[-1].append(name)
        taken += size
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# Where it comes from


def _tuning(plan: Plan) -> Tuning:
    return plan.recipe.tunings.get(plan.precision, Tuning())


def _provenance(spec: ModelSpec, plan: Plan, column: Column, source: Source, device: str) -> dict[str, Any]:
    counts = plan.counts
    return {
        "made_by": "Twinframe, python -m engine quantize",
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "summary": f"{label(f'{column.format}@{column.recipe}')}, stored: {plan.recipe.summary}",
        "model": spec.id,
        "column": f"{column.format}@{column.recipe}",
        "format": column.format,
        "recipe": {
            "id": plan.recipe.id,
            "summary": plan.recipe.summary,
            "fingerprint": fingerprint.of_recipe(plan.recipe),
        },
        "tuning": recipe_files.functional(_tuning(plan)),
        "source": {
            "from": loading.described(spec, source),
            "fingerprint": loading.fingerprint(spec, source),
            "licence": spec.licence,
            "licence_url": spec.licence_url,
        },
        "device": device,
        "versions": versions(),
        "linears": {"quantized": counts.quantized, "skipped": counts.skipped, "left": counts.left},
        "bytes": {REFERENCE: plan.bf16_bytes, "quantized": plan.quantized_bytes},
        "layers": {layer.name: layer.precision for layer in plan.layers if layer.quantized},
    }


def _notes(plan: Plan) -> Iterator[str]:
    tuning = _tuning(plan)
    if steps := recipe_files.in_words(tuning.weight_only_steps):
        yield (
            f"Its recipe leaves activations in bf16 in {steps}, which plain diffusers does not by itself, so its "
            "picture is another there: the model card has the lines that do it."
        )
    for said in program.beyond_diffusers({layer.precision for layer in plan.layers if layer.quantized}, tuning):
        yield f"Plain diffusers: {said[0].lower()}{said[1:]}"


def _card(spec: ModelSpec, plan: Plan, said: Mapping[str, Any], notes: tuple[str, ...]) -> str:
    form, counts = FORMATS[plan.precision], plan.counts
    base = "" if spec.bundled or spec.place is not None else f"base_model: {spec.source}\n"
    used = ", ".join(f"{name} {version}" for name, version in said["versions"].items() if name != "twinframe")
    needs = f"It runs on {form.hardware}." if form.hardware else ""
    if plan.precision == NVFP4.id:
        needs += " Activations are quantized by a kernel of mslk: `pip install mslk-cuda`."
    load = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("this folder", {program.types(spec)}).to("cuda")',
        *([program.CONTIGUOUS.rstrip()] if spec.modality == "video" else []),
    ]
    first, last = _tuning(plan).weight_only_steps
    if first or last:
        steps = spec.defaults.num_inference_steps
        load = [
            *load[:2],
            "from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor",
            *load[2:],
            "",
            program.switch((first, last), steps),
            f'pipe("a cat", num_inference_steps={steps}, callback_on_step_end=ended)',
        ]
    lines = [
        f"---\n{base}library_name: diffusers\ntags:\n- torchao\n- {plan.precision}\n---",
        f"# {spec.name}, {label(said['column'])}",
        f"{counts.quantized} of {len(plan.layers)} Linear layers of the denoiser are stored quantized, in {form.label} "
        f"by the recipe `{plan.recipe.id}`: {plan.recipe.summary} Its weights take "
        f"{plan.quantized_bytes / 1e9:.3f} GB instead of {plan.bf16_bytes / 1e9:.3f} GB in bf16. Everything else is as "
        "in the source.",
        "\n".join(
            [
                "| | |",
                "|---|---|",
                f"| Source | {said['source']['from']} ({said['source']['fingerprint']}) |",
                f"| Licence | {spec.licence}: {spec.licence_url} |",
                f"| Made | {said['made']} by Twinframe on {said['device']} |",
                f"| With | {used} |",
            ]
        ),
        *([spec.licence_note] if spec.licence_note else []),
        "## Load",
        "\n".join(["```python", *load, "```"]),
        needs.strip(),
        *(["## What plain diffusers makes otherwise", "\n".join(f"- {note}" for note in notes)] if notes else []),
        "## Compare",
        "Anywhere, emulated where it has to be, beside bf16:",
        f"```\npython -m engine compare --model {spec.id} --precision {plan.precision}@DIR --prompt ... --out OUT\n```",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"
