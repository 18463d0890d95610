"""Checkpoints of somebody's own as models: a folder, or a repository on the hub.

The class in model_index.json decides the kind: how the pipeline is called, which sizes it takes and which recipes are
there come from a model of the catalog with the same pipeline. What its own files say goes first: the denoiser's
configuration, the scheduler, the VAE, the card. Reads JSON files and headers alone, and knows no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from engine import catalog
from engine.catalog import UNKNOWN, Limits, Memory, ModelSpec
from engine.errors import LoadError, RequestError, shown
from engine.weights import checkpoint, hub

COPY_AGAIN = "copy the folder again"
CLASSIFIER_FREE = 3.5
"""Guidance by two passes of a FLUX.1 that has none embedded; diffusers' example for `true_cfg_scale` has 4, FLUX.1-dev
itself 3.5."""
LICENCES = "https://huggingface.co/docs/hub/repositories-licenses"
"""What the names of licences in cards stand for."""
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?", re.ASCII)
_FAMILY_RECIPES = ("post", "post-corrected", "strict", "full")
"""Rules by names of layers, which hold for any size of a class; a recipe file is for one size alone."""


def model(text: str, offline: bool = False) -> str:
    """Id of a model of the catalog, or of one that is named by its folder or repository and given to the catalog.

    Raises:
        RequestError: there is no such model, folder or repository.
        LoadError: it cannot be compared here; the sentence says which class it is and what is missing.
    """
    if text in catalog.MODELS:
        return text
    if text in catalog.KINDS:
        return _unpinned(catalog.KINDS[text], offline).id
    if Path(text).is_dir():
        spec = _spec(Path(text), Path(text).resolve().name, "", "", offline)
    elif named := _REPOSITORY.fullmatch(text):
        folder, revision = hub.described(named[1], named[2], offline)
        spec = _of_source(named[1], revision) or _spec(folder, named[1], named[1], revision, offline)
    elif "/" in text:
        raise RequestError(f"There is no folder {shown(text)}: give one, or a repository as owner/name[@revision].")
    else:
        return catalog.model(text).id
    catalog.give(spec)
    return spec.id


def _unpinned(kind: ModelSpec, offline: bool) -> ModelSpec:
    """A model of which no commit is pinned, at that which its repository has now; without one where that cannot be
    asked, which does for whoever needs no weights."""
    try:
        _, revision = hub.described(kind.source, None, offline)
    except LoadError:
        revision = None
    catalog.give(spec := replace(kind, revision=revision))
    return spec


def _of_source(repository: str, revision: str) -> ModelSpec | None:
    """The model of which no commit is pinned whose repository this is, at that commit."""
    kinds = (kind for kind in catalog.KINDS.values() if kind.revision is None and not kind.bundled)
    return next((replace(kind, revision=revision) for kind in kinds if kind.source == repository), None)


def _spec(folder: Path, name: str, repository: str, revision: str, offline: bool) -> ModelSpec:
    index = folder / "model_index.json"
    if not index.is_file():
        checkpoint.require_no_cache(folder)
        raise LoadError(f"{name} is no checkpoint as diffusers saves it: it has no model_index.json.")
    kinds = list(catalog.KINDS.values())
    made = checkpoint.read_json(index, COPY_AGAIN).get("_class_name")
    known = [spec for spec in kinds if spec.pipeline == made]
    if not known:
        there = ", ".join(sorted({spec.pipeline for spec in kinds}))
        raise LoadError(f"{name} is a {made or 'pipeline without a name'}, which is not known here: known are {there}.")
    kind, family, recipes = _kind(folder, name, known)
    kind = _before_expanded_timesteps(_undistilled(kind, folder), folder)
    card = _card(folder)
    spec = replace(
        kind,
        id=_free(name),
        name=name,
        summary=_summary(kind, family, name),
        family=family,
        recipes=recipes,
        source=repository or folder.resolve().name,
        revision=revision or None,
        bundled=False,
        gated=False,
        configs=str(folder.resolve()),
        overrides=MappingProxyType({}),
        like=kind.id,
        place=None if repository else folder.resolve(),
        licence=str(card.get("license_name") or card.get("license") or "not stated"),
        licence_url=_licence_url(card, repository),
        licence_note="",
        limits=_limits(kind, folder),
    )
    return replace(spec, memory_gb=_memory(spec, kind, folder, offline))


def _kind(folder: Path, name: str, known: Sequence[ModelSpec]) -> tuple[ModelSpec, str, tuple[str, ...]]:
    """The model of the catalog that it is called like, and the family and names of its recipes.

    Raises:
        LoadError: a component is missing, or of another class than the pipeline's others.
    """
    for spec in known:
        if not checkpoint.misfit(spec, folder, COPY_AGAIN) and (spec.bundled or _guided_alike(spec, folder)):
            return spec, spec.family, spec.recipes
    its = checkpoint.parts(folder, COPY_AGAIN)
    if "transformer_2" in its:  # as Wan 2.2 A14B has, one for much noise and one for little
        raise LoadError(
            f"{name} cannot be run: it has two denoisers, and a {known[0].pipeline} is only known with one here."
        )
    kind = _by_guidance([spec for spec in known if not _others(spec, its)] or known, folder)
    for part, (library, _) in checkpoint.parts(kind.folder).items():
        if part not in its:
            raise LoadError(
                f"{name} cannot be run: its model_index.json names no {part}, and a {kind.pipeline} needs one."
            )
        if library not in ("diffusers", "transformers") or its[part][0] == library:
            continue
        raise LoadError(f"{name} cannot be run: its {part} is {'.'.join(its[part])}, code that is not of {library}.")
    for part in _others(kind, its):
        library, cls = checkpoint.parts(kind.folder)[part]
        raise LoadError(
            f"{name} cannot be run: its {part} is a {its[part][1]}, and a {kind.pipeline} is only known with "
            f"{library}'s {cls}."
        )
    if its["transformer"][1] != checkpoint.parts(kind.folder)["transformer"][1]:
        return kind, UNKNOWN, ("strict", "full")
    return kind, kind.family, tuple(recipe for recipe in kind.recipes if recipe in _FAMILY_RECIPES)


def _others(kind: ModelSpec, its: Mapping[str, tuple[str, str]]) -> list[str]:
    """Components besides the denoiser that are there, and of another class than a kind's."""
    return [
        part
        for part, (_, cls) in checkpoint.parts(kind.folder).items()
        if part in its and part != "transformer" and checkpoint.is_module(cls) and its[part][1] != cls
    ]


def _undistilled(kind: ModelSpec, folder: Path) -> ModelSpec:
    """A FLUX.2 [klein] before distillation, as its index says, with the settings of diffusers' example."""
    if kind.pipeline != "Flux2KleinPipeline" or checkpoint.switches(folder, COPY_AGAIN).get("is_distilled"):
        return kind
    return replace(
        kind,
        defaults=replace(kind.defaults, num_inference_steps=50, guidance_scale=4.0),
        limits=replace(kind.limits, guidance_scale=(1.0, 10.0)),
    )


def _before_expanded_timesteps(kind: ModelSpec, folder: Path) -> ModelSpec:
    """A Wan 2.1, which has one timestep a clip and not one a token, with its makers' size, length and rate."""
    if kind.pipeline != "WanPipeline" or checkpoint.switches(folder, COPY_AGAIN).get("expand_timesteps"):
        return kind
    return replace(
        kind,
        defaults=replace(kind.defaults, height=480, width=832, num_frames=81, frame_rate=16.0),
        limits=replace(kind.limits, sizes=((480, 832), (832, 480)), num_frames=(5, 81), max_pixels=720 * 1280),
    )


def _by_guidance(known: Sequence[ModelSpec], folder: Path) -> ModelSpec:
    """A model of full size, if there is one, that is guided as the checkpoint is."""
    large = [spec for spec in known if not spec.bundled] or list(known)
    alike = [spec for spec in large if _guided_alike(spec, folder)]
    if alike:
        return alike[0]
    negative = {**large[0].call, "negative_prompt": "", "guidance_scale": 1.0}
    return replace(
        large[0],
        guidance_argument="true_cfg_scale",
        defaults=replace(large[0].defaults, guidance_scale=CLASSIFIER_FREE),
        call=MappingProxyType(negative),
    )


def _guided_alike(spec: ModelSpec, folder: Path) -> bool:
    """Guidance embedded or not, and steps as the scheduler has them: FLUX.1 without either is distilled to a few steps
    where its scheduler does not shift by the size of the picture."""
    if spec.pipeline != "FluxPipeline":
        return True
    its = checkpoint.read_json(folder / "transformer" / "config.json", COPY_AGAIN)
    shifts = _scheduler(folder).get("use_dynamic_shifting", False)
    if its.get("guidance_embeds", False):
        return spec.guidance_argument == "guidance_scale" and spec.limits.guidance_scale[1] > 0
    return spec.guidance_argument == "true_cfg_scale" if shifts else spec.limits.guidance_scale[1] == 0


def _scheduler(folder: Path) -> Mapping[str, Any]:
    file = folder / "scheduler" / "scheduler_config.json"
    return checkpoint.read_json(file, COPY_AGAIN) if file.is_file() else {}


def _limits(kind: ModelSpec, folder: Path) -> Limits:
    """The kind's, in multiples of what its own VAE and patches compress."""
    mine, its = (_compression(at) for at in (kind.folder, folder))
    if mine == its or kind.limits.size_multiple is None:
        return kind.limits
    multiple = kind.limits.size_multiple * its // mine
    sizes = tuple(size for size in kind.limits.sizes if not any(side % multiple for side in size))
    return replace(kind.limits, sizes=sizes or kind.limits.sizes[:1], size_multiple=multiple)


def _compression(folder: Path) -> int:
    """Of a VAE in space, as diffusers' pipelines tell it from a configuration."""
    config = checkpoint.read_json(folder / "vae" / "config.json", COPY_AGAIN)
    if told := config.get("spatial_compression_ratio") or config.get("scale_factor_spatial"):
        return int(told)
    stages = config.get("block_out_channels") or config.get("temperal_downsample") or [0] * 4
    return int(2 ** (len(stages) - ("block_out_channels" in config)))


def _memory(spec: ModelSpec, kind: ModelSpec, folder: Path, offline: bool) -> Memory | None:
    """Weights as its files tell, in bf16, and for a run what its kind needs, by the width of its denoiser.

    What stays of weights that are streamed is the kind's, and more where its own are larger: a block grows with the
    square of the width, and embeddings no faster than the components that they are part of.
    """
    if kind.memory_gb is None:
        return None
    if spec.place is None:
        stored = {} if offline else hub.weight_bytes(spec.source, str(spec.revision))
        weights = {part: stored.get(part, 0) for part in checkpoint.parts(kind.folder)}
    else:
        weights = {part: _bf16_bytes(folder / part, kind) for part in checkpoint.parts(kind.folder)}
        weights["vae"] *= 2 if kind.vae_fp32 else 1
    if not weights["transformer"]:
        return kind.memory_gb
    mine, its = (_width(at) for at in (kind.folder, folder))
    wider = its / mine if mine and its else 1.0
    transformer, shared = weights.pop("transformer") / 1e9, sum(weights.values()) / 1e9
    return replace(
        kind.memory_gb,
        transformer=transformer,
        shared=shared,
        run=kind.memory_gb.run * wider,
        kept=kind.memory_gb.kept * max(1.0, shared / kind.memory_gb.shared),
        footprint=kind.memory_gb.footprint * max(1.0, wider) ** 2,
        stored=0.0,
    )


def _bf16_bytes(folder: Path, kind: ModelSpec) -> int:
    if not (folder / "config.json").is_file():
        return 0
    library = checkpoint.parts(kind.folder)[folder.name][0]
    found = checkpoint.component(folder, library, COPY_AGAIN)
    return 2 * sum(
        math.prod(stored.shape) for name, stored in found.tensors.items() if name not in found.scales.values()
    )


def _width(folder: Path) -> int:
    config = checkpoint.read_json(folder / "transformer" / "config.json", COPY_AGAIN)
    return int(config.get("num_attention_heads", 0)) * int(config.get("attention_head_dim", 0))


def _summary(kind: ModelSpec, family: str, name: str) -> str:
    if family == UNKNOWN:
        return f"A {kind.pipeline} with a denoiser of a class that no recipe was written for: its recipe is strict."
    return f"A {kind.pipeline} of your own, called and quantized as {kind.name} is."


def _card(folder: Path) -> Mapping[str, Any]:
    """What the front matter of a checkpoint's card says; nothing where there is none that can be read."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        return metadata_load(file) or {}
    except (ValueError, YAMLError):
        return {}


def _licence_url(card: Mapping[str, Any], repository: str) -> str:
    """The card's link, if it is one to a page; it may also name a file of the repository."""
    link = str(card.get("license_link") or "")
    if link.startswith("https://"):
        return link
    return f"https://huggingface.co/{repository}" if repository else LICENCES


def _free(name: str) -> str:
    """An id after a name, which no other model has."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name.rpartition("/")[2]).strip("-._")[:40] or "own"
    taken = catalog.MODELS.keys()
    return next(made for n in range(1, len(taken) + 2) if (made := plain if n == 1 else f"{plain}-{n}") not in taken)
