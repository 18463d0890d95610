"""Which Linear layers of a transformer are quantized, and why: recipe -> plan -> applied -> verified.

A plan needs shapes only, so it can be made on the meta device before any weight is read. Knows nothing of devices;
how a chosen layer is quantized is engine/quantization/capability.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from engine import quantized
from engine.catalog import UNKNOWN, ModelSpec
from engine.columns import POST, Column, recipe_named
from engine.errors import LoadError, RequestError, TwinframeError, UnsupportedError
from engine.formats import FORMATS, NVFP4, REFERENCE
from engine.machine import Support
from engine.quantization import capability, gptq, nvfp4, recipe_files, remedies, rotation
from engine.quantization.recipe_files import TunedRecipe, Tuning
from engine.quantization.roles import OF_PICTURES, role_of
from engine.quantized import Quantized
from engine.results import LayerCounts
from engine.weights import checkpoint
from engine.weights.torchao_layout import PROVENANCE


class PlanMismatchError(TwinframeError, RuntimeError):
    """A module does not hold what its plan says: the numbers shown beside its pictures would be false."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules that choose among the `nn.Linear` layers of one transformer class."""

    id: str
    summary: str
    min_features: int = 0
    """A layer with fewer input or output features stays bf16."""
    skip_containing: tuple[str, ...] = ()
    """A layer whose fully qualified name contains one of these stays bf16."""
    skip_exact: tuple[str, ...] = ()
    """A layer with exactly this fully qualified name stays bf16."""
    min_rows: int = 0
    """A layer that multiplies fewer rows stays bf16."""
    rows: tuple[tuple[str, int], ...] = ()
    """Rows that a layer multiplies in one call at the post's settings and batch 1; the first pattern that its name
    contains decides, and a layer that none matches passes."""
    tunings: Mapping[str, Tuning] = field(default_factory=lambda: MappingProxyType({}))
    """Precision -> what a recipe file changes in these rules (engine/quantization/recipe_files.py)."""

    held: Quantized | None = None
    """The checkpoint whose layers are stored as they are; no rule chooses them."""

    def skip(self, name: str, in_features: int, out_features: int) -> str | None:
        """Why a layer stays bf16, as a sentence; None if the recipe quantizes it."""
        if self.held is not None:
            return "The checkpoint keeps it in bf16."
        for pattern in self.skip_containing:
            if pattern in name:
                return f"Its name contains {pattern}."
        if name in self.skip_exact:
            return f"The recipe names {name}."
        if min(in_features, out_features) < self.min_features:
            return f"It is narrower than {self.min_features} features."
        rows = next((rows for pattern, rows in self.rows if pattern in name), self.min_rows)
        if rows < self.min_rows:
            return f"It multiplies {rows} rows at the post's settings, fewer than {self.min_rows}."
        return None

    def weight_only_steps(self, precision: str) -> tuple[int, int]:
        """First and last steps in which activations stay bf16 when this precision is asked for."""
        return self.tunings.get(precision, Tuning()).weight_only_steps

    @property
    def patterns(self) -> tuple[str, ...]:
        """All that its rules look for in a name."""
        return (*self.skip_containing, *(pattern for pattern, _ in self.rows))


NARROWEST = 1024
"""The post's threshold for min(M, K, N): rows, input and output features of a matrix product."""

_FLUX_SKIPS: Mapping[str, Any] = {"skip_containing": ("embed",), "skip_exact": ("norm_out.linear", "proj_out")}
_QWEN_SKIPS: Mapping[str, Any] = {
    "skip_containing": (
        "embed",
        "img_in",
        "txt_in",
        "img_mod",
        "txt_mod",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "txt_mlp",
        "norm_out.linear",
    )
}
_LTX2_SKIPS: Mapping[str, Any] = {
    "skip_containing": (
        "patch_embed",
        "proj_in",
        "proj_out",
        "caption_projection",
        "adaln_single",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "norm_out",
    )
}
_LTX2_CORRECTED_SKIPS: Mapping[str, Any] = {
    "skip_containing": ("proj_in", "proj_out", "caption_projection", "time_embed", "av_cross_attn_")
}
_LTX23_SKIPS: Mapping[str, Any] = {
    "skip_containing": ("proj_in", "proj_out", "time_embed", "av_cross_attn_", "prompt_adaln")
}

# 1024 x 1024 pixels: the VAE divides each side by 8, and `_pack_latents` of both pipelines makes patches of 2 x 2.
_IMAGE = (1024 // 16) ** 2
_FLUX_TEXT = 512  # max_sequence_length, to which FLUX pads every prompt
_FLUX_ROWS = (
    # Single blocks run over text and picture together, but their modulation sees one vector a picture.
    (".norm.linear", 1),
    ("single_transformer_blocks.", _FLUX_TEXT + _IMAGE),
    (".norm1.linear", 1),
    (".norm1_context.linear", 1),
    (".attn.add_", _FLUX_TEXT),
    (".attn.to_add_out", _FLUX_TEXT),
    (".ff_context.", _FLUX_TEXT),
    ("transformer_blocks.", _IMAGE),
)
# The text stream, skipped by name, has as many rows as the prompt has tokens; guidance is a second call.
_QWEN_ROWS = ((".attn.to_", _IMAGE), (".img_mlp.", _IMAGE))
_FLUX2_SKIPS: Mapping[str, Any] = {
    "skip_containing": ("embed", "modulation"),
    "skip_exact": ("norm_out.linear", "proj_out"),
}
_FLUX2_ROWS = (
    ("single_transformer_blocks.", _FLUX_TEXT + _IMAGE),
    (".attn.add_", _FLUX_TEXT),
    (".attn.to_add_out", _FLUX_TEXT),
    (".ff_context.", _FLUX_TEXT),
    ("transformer_blocks.", _IMAGE),
)
_WAN_SKIPS: Mapping[str, Any] = {"skip_containing": ("condition_embedder", "proj_out")}
# 704 x 1280 pixels, 121 frames: the VAE divides sides by 16 and time by 4, and patches are of 2 x 2. Text is padded to
# 512 tokens; guidance is a second call.
_WAN_ROWS = ((".attn2.to_k", 512), (".attn2.to_v", 512), ("blocks.", (704 // 32) * (1280 // 32) * ((121 - 1) // 4 + 1)))
_Z_IMAGE_SKIPS: Mapping[str, Any] = {"skip_containing": ("embedder", "adaLN_modulation", "final_layer")}
# Text and picture are one sequence in the layers; before them each is refined alone. Text is at most 512 tokens, and
# as long as that here.
_Z_IMAGE_ROWS = (("context_refiner.", 512), ("noise_refiner.", _IMAGE), ("layers.", 512 + _IMAGE))
# 512 x 768 pixels, 121 frames: the VAE divides sides by 32 and time by 8; sound has 25 latents a second
# (16,000 Hz, hops of 160, VAE 4 in time); LTX2Pipeline runs both halves of guidance as one batch of 2.
_VIDEO = 2 * (512 // 32) * (768 // 32) * ((121 - 1) // 8 + 1)
_AUDIO = 2 * round(121 / 24 * 25)
_LTX2_TEXT = 2 * 1024
_LTX2_ROWS = (
    ("time_embed.", 2),
    ("av_cross_attn_", 2),
    (".audio_attn1.", _AUDIO),
    (".audio_attn2.to_k", _LTX2_TEXT),
    (".audio_attn2.to_v", _LTX2_TEXT),
    (".audio_attn2.", _AUDIO),
    (".audio_ff.", _AUDIO),
    (".audio_to_video_attn.to_k", _AUDIO),
    (".audio_to_video_attn.to_v", _AUDIO),
    (".audio_to_video_attn.", _VIDEO),
    (".video_to_audio_attn.to_k", _VIDEO),
    (".video_to_audio_attn.to_v", _VIDEO),
    (".video_to_audio_attn.", _AUDIO),
    (".attn2.to_k", _LTX2_TEXT),
    (".attn2.to_v", _LTX2_TEXT),
    (".attn1.", _VIDEO),
    (".attn2.", _VIDEO),
    (".ff.", _VIDEO),
)
# Guidance in LTX-2.3 has two more passes, of half as many rows each, which fall below no limit that these pass.
_LTX23_ROWS = (("prompt_adaln.", 2), *_LTX2_ROWS)


def _strict(skips: Mapping[str, Any], rows: tuple[tuple[str, int], ...]) -> Recipe:
    return Recipe(
        id="strict",
        summary="The post's rule as its text states it: no dimension of the product below 1024, rows included.",
        min_features=NARROWEST,
        min_rows=NARROWEST,
        rows=rows,
        **skips,
    )


_FULL = Recipe(id="full", summary="Every Linear layer whose shape the format can take.")

_FLUX2 = (
    Recipe(
        id=POST,
        summary="The post's rules for FLUX.1-dev in this class's names; its shared modulations stay bf16 too.",
        min_features=NARROWEST,
        **_FLUX2_SKIPS,
    ),
    _strict(_FLUX2_SKIPS, _FLUX2_ROWS),
    _FULL,
)
_FAMILIES: Mapping[str, tuple[Recipe, ...]] = {
    "mini-flux": (
        Recipe(
            id=POST,
            summary="The FLUX.1-dev rules by name; width limit 256 instead of 1024, as the miniature is 320 wide.",
            min_features=256,
            **_FLUX_SKIPS,
        ),
        _FULL,
    ),
    "mini-qwen": (
        Recipe(
            id=POST,
            summary="The Qwen-Image rules by name; width limit 256 instead of 1024, as the miniature is 256 wide.",
            min_features=256,
            **_QWEN_SKIPS,
        ),
        _FULL,
    ),
    "mini-ltx2": (
        Recipe(
            id=POST,
            summary="The LTX-2 rules by name; width limit 128 instead of 1024, as the miniature's sound is 160 wide.",
            min_features=128,
            **_LTX2_SKIPS,
        ),
        Recipe(
            id="post-corrected",
            summary="The same rules in the names of diffusers' class: adaptive norms stay bf16 too.",
            min_features=128,
            **_LTX2_CORRECTED_SKIPS,
        ),
        _FULL,
    ),
    "flux.1-dev": (
        Recipe(
            id=POST,
            summary="Everything but embeddings, the last normalisation, the last projection and narrow layers.",
            min_features=NARROWEST,
            **_FLUX_SKIPS,
        ),
        _strict(_FLUX_SKIPS, _FLUX_ROWS),
        _FULL,
    ),
    "qwen-image": (
        Recipe(
            id=POST,
            summary="Image attention and image feed-forward only; modulation and the text stream stay bf16.",
            min_features=NARROWEST,
            **_QWEN_SKIPS,
        ),
        _strict(_QWEN_SKIPS, _QWEN_ROWS),
        _FULL,
    ),
    "ltx-2": (
        Recipe(
            id=POST,
            summary="As published; most of its name rules match no layer of diffusers' LTX-2 class.",
            min_features=NARROWEST,
            **_LTX2_SKIPS,
        ),
        Recipe(
            id="post-corrected",
            summary="What the published rules mean, in the names of diffusers' class: adaptive norms stay bf16 too.",
            min_features=NARROWEST,
            **_LTX2_CORRECTED_SKIPS,
        ),
        _strict(_LTX2_SKIPS, _LTX2_ROWS),
        _FULL,
    ),
    "ltx-2.3": (
        Recipe(
            id=POST,
            summary="What the post's rules for LTX-2 mean, in this class's names: adaptive norms, those of the text "
            "among them, and gates stay bf16.",
            min_features=NARROWEST,
            **_LTX23_SKIPS,
        ),
        _strict(_LTX23_SKIPS, _LTX23_ROWS),
        _FULL,
    ),
    "flux.2-klein": _FLUX2,
    "flux.2-dev": _FLUX2,
    "wan-2.2": (
        Recipe(
            id=POST,
            summary="What the post's rules for LTX-2 mean, in this class's names: what embeds text and time and the "
            "last projection stay bf16.",
            min_features=NARROWEST,
            **_WAN_SKIPS,
        ),
        _strict(_WAN_SKIPS, _WAN_ROWS),
        Recipe(
            id="full",
            summary="Every Linear layer whose shape the format can take, but the time embedding, which diffusers keeps "
            "in fp32.",
            skip_containing=("time_embedder",),
        ),
    ),
    "z-image": (
        Recipe(
            id=POST,
            summary="The post's rules for FLUX.1-dev in this class's names: embedders, modulations and the last layer "
            "stay bf16.",
            min_features=NARROWEST,
            **_Z_IMAGE_SKIPS,
        ),
        _strict(_Z_IMAGE_SKIPS, _Z_IMAGE_ROWS),
        _FULL,
    ),
    UNKNOWN: (
        Recipe(
            id="strict",
            summary="For a class that no recipe was written for: nothing narrower than 1024; embedders, norms and "
            "modulations, which multiply a row a picture, and the first and last layer stay bf16 by their names.",
            min_features=NARROWEST,
            skip_containing=("embed", "norm", "modulation", "_mod.", "time_", "guidance", "final_layer"),
            skip_exact=("proj_in", "proj_out", "x_in", "img_in", "txt_in"),
        ),
        _FULL,
    ),
}
RECIPES: Mapping[tuple[str, str], Recipe] = MappingProxyType(
    {(family, recipe.id): recipe for family, recipes in _FAMILIES.items() for recipe in recipes}
)
"""(family, recipe id) -> rules; a family is a transformer class at one size (`ModelSpec.family`)."""


def recipe(family: str, recipe_id: str) -> Recipe:
    """The recipe with this id for models of this family, by the rules above or from a recipe file; or of the quantized
    checkpoint with this name, what its layers are.

    Raises:
        RequestError: the family has no such recipe; the sentence lists those it has.
        LoadError: its recipe file is damaged.
    """
    recipe_id = recipe_named(recipe_id)
    if (held := quantized.named(recipe_id)) is not None:
        return stored_recipe(held)
    if (family, recipe_id) in RECIPES:
        return RECIPES[family, recipe_id]
    files = recipe_files.read(family)
    for found in files:
        if found.id == recipe_id:
            return tuned_recipe(family, found)
    offered = [r for f, r in RECIPES if f == family] + [found.id for found in files]
    choice = f"choose {' or '.join(offered)}" if offered else "it has none"
    raise RequestError(f"{family} has no recipe {recipe_id!r}: {choice}.")


def tuned_recipe(family: str, found: TunedRecipe) -> Recipe:
    """A recipe file's changes upon the rules that it names.

    Raises:
        LoadError: the family has no such rules.
    """
    if (family, found.base) not in RECIPES:
        raise LoadError(f"The recipe {found.id!r} of {family} changes a recipe {found.base!r}, which there is not.")
    return replace(RECIPES[family, found.base], id=found.id, summary=found.summary, tunings=found.tunings)


def uncalibrated(found: Recipe) -> Recipe:
    """A recipe for other weights than those that its files were calibrated for."""
    tunings = {
        name: replace(tuning, calibrated=(), searched=tuning.searched or bool(tuning.calibrated))
        for name, tuning in found.tunings.items()
    }
    return replace(found, tunings=MappingProxyType(tunings))


def stored_recipe(held: Quantized) -> Recipe:
    """What a quantized checkpoint's layers are.

    Raises:
        LoadError: what its maker says of it cannot be.
    """
    said = recipe_files.read_tuning(held.folder / PROVENANCE, held.format, dict(held.tuning))
    tunings = {held.format: replace(said, layers=held.layers)}
    return Recipe(id=held.name, summary=held.summary, tunings=MappingProxyType(tunings), held=held)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What happens to one Linear layer, and why."""

    name: str
    in_features: int
    out_features: int
    precision: str
    """In which it is stored."""
    reason: str
    """One sentence for the user."""
    left: bool = False
    """The recipe asked for it, but the format cannot take its shape."""
    rank: int = 0
    """Of the bf16 branch beside it; 0 without one."""
    searched: bool = False
    """The block scales of its NVFP4 weight are searched."""
    calibrated: bool = False
    """Its NVFP4 weight was calibrated."""
    rotation: int = 0
    """Size of the blocks in which its inputs are rotated; 0 for none."""
    four_over_six: bool = False
    """Each block of its NVFP4 weight and activations takes the better of two scales."""
    weights_alone: bool = False
    """Its activations stay bf16 in every step, for which its NVFP4 weight is unpacked."""
    in_fp32: bool = False
    """Its class keeps it in fp32, whatever the recipe says."""

    @property
    def quantized(self) -> bool:
        """Whether the layer leaves bf16."""
        return self.precision != REFERENCE

    @property
    def bytes(self) -> int:
        """Of the weight as stored, with scales and branch."""
        branch = self.rank * (self.in_features + self.out_features)
        if not self.quantized:
            return self.plain_bytes
        return FORMATS[self.precision].size(self.in_features, self.out_features) + 2 * branch

    @property
    def plain_bytes(self) -> int:
        """Of the weight before anything is quantized."""
        return (2 if self.in_fp32 else 1) * FORMATS[REFERENCE].size(self.in_features, self.out_features)

    @property
    def parts(self) -> list[str]:
        """What it has besides its precision, in words."""
        rounding = ["calibrated weights"] if self.calibrated else ["searched block scales"] * self.searched
        turned = [f"inputs rotated by {self.rotation}"] * bool(self.rotation)
        return [
            *rounding,
            *["four over six"] * self.four_over_six,
            *turned,
            *[f"low-rank branch {self.rank}"] * bool(self.rank),
            *["bf16 activations"] * self.weights_alone,
        ]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every Linear layer of a transformer, decided for one precision."""

    recipe: Recipe
    precision: str
    layers: tuple[LayerPlan, ...]
    bf16_bytes: int
    """The whole transformer's parameters in bf16, but those that diffusers keeps in fp32."""
    quantized_bytes: int
    """The same with the chosen weights as they are stored; everything else stays bf16."""
    unmatched: tuple[str, ...]
    """Name rules of the recipe that match no Linear layer: probably written for another version of the class."""

    @property
    def counts(self) -> LayerCounts:
        """How many layers are quantized, skipped by a rule, and left for their shape."""
        quantized = sum(layer.quantized for layer in self.layers)
        left = sum(layer.left for layer in self.layers)
        return LayerCounts(quantized=quantized, skipped=len(self.layers) - quantized - left, left=left)

    @property
    def names(self) -> frozenset[str]:
        """The layers to quantize."""
        return frozenset(layer.name for layer in self.layers if layer.quantized)

    @property
    def shapes(self) -> dict[str, frozenset[tuple[int, int, bool]]]:
        """Formats -> input and output features of the layers to be stored in them, and whether they can multiply one
        row a picture."""
        found: dict[str, set[tuple[int, int, bool]]] = {}
        for layer in self.layers:
            if layer.quantized:
                few = role_of(layer.name) in OF_PICTURES
                found.setdefault(layer.precision, set()).add((layer.in_features, layer.out_features, few))
        return {name: frozenset(found[name]) for name in sorted(found)}

    def to_json(self) -> dict[str, Any]:
        """The command line's `inspect` object (assets/docs/cli.md)."""
        counts = self.counts
        return {
            "linears": len(self.layers),
            "quantized": counts.quantized,
            "skipped": counts.skipped,
            "left": counts.left,
            "unmatched": list(self.unmatched),
            "bytes": {REFERENCE: self.bf16_bytes, "quantized": self.quantized_bytes},
            "weight_only_steps": list(self.recipe.weight_only_steps(self.precision)),
            "layers": [
                {
                    "name": layer.name,
                    "in": layer.in_features,
                    "out": layer.out_features,
                    "quantized": layer.quantized,
                    "precision": layer.precision,
                    "bytes": {
                        REFERENCE: layer.plain_bytes,
                        "stored": layer.bytes,
                    },
                    "parts": layer.parts,
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
        }


def plan(transformer: nn.Module, recipe: Recipe, precision: str) -> Plan:
    """Decide every `nn.Linear` of a not yet quantized transformer; the meta device will do.

    Raises:
        KeyError: no such precision.
        LoadError: the recipe's file names a layer that the transformer has not.
    """
    linears = _linears(transformer)
    if precision in recipe.tunings:
        _check_names(recipe.tunings[precision], linears.keys(), type(transformer).__name__)
    kept = {name for name, _ in transformer.named_parameters() if checkpoint.in_fp32(type(transformer), name)}
    layers = tuple(
        _decide(name, layer.in_features, layer.out_features, recipe, precision, f"{name}.weight" in kept)
        for name, layer in linears.items()
    )
    bf16_bytes = sum((4 if name in kept else 2) * p.numel() for name, p in transformer.named_parameters())
    saved = sum(layer.plain_bytes - layer.bytes for layer in layers)
    unmatched = [p for p in recipe.patterns if not any(p in name for name in linears)]
    unmatched += [p for p in recipe.skip_exact if p not in linears]
    return Plan(
        recipe=recipe,
        precision=precision,
        layers=layers,
        bf16_bytes=bf16_bytes,
        quantized_bytes=bf16_bytes - saved,
        unmatched=tuple(unmatched),
    )


def plan_of(transformer: nn.Module, spec: ModelSpec, column: Column) -> Plan:
    """The plan of a model's column; of the reference's layers none is quantized. Weights of somebody's own, or with a
    LoRA, are not those that a recipe's calibrated weights were made of: their block scales are searched instead.

    Raises:
        RequestError, LoadError: as `recipe` and `plan`.
    """
    rules = recipe(spec.family, column.rules or spec.recipes[0])
    if column.weights(spec).retrained and rules.held is None:
        rules = uncalibrated(rules)
    return plan(transformer, rules, column.format)


def _check_names(tuning: Tuning, linears: Set[str], kind: str) -> None:
    for name in (*tuning.layers, *tuning.low_rank, *tuning.weights_alone):
        if name not in linears:
            raise LoadError(f"The recipe file {tuning.source} names a layer {name}, which {kind} has not: correct it.")


def _decide(name: str, in_features: int, out_features: int, recipe: Recipe, precision: str, in_fp32: bool) -> LayerPlan:
    shape: dict[str, Any] = {"name": name, "in_features": in_features, "out_features": out_features}
    if in_fp32:
        return LayerPlan(**shape, precision=REFERENCE, in_fp32=True, reason="diffusers keeps it in fp32.")
    if precision == REFERENCE:
        return LayerPlan(**shape, precision=REFERENCE, reason="The reference keeps every layer in bf16.")
    tuning = recipe.tunings.get(precision, Tuning())
    wanted, why = tuning.layers.get(name), None
    if wanted is None:
        wanted, reason = precision, "No rule keeps it in bf16."
        why = recipe.skip(name, in_features, out_features)
    elif wanted == REFERENCE:
        why = "The recipe file keeps it in bf16."
    else:
        reason = f"The {'checkpoint' if recipe.held else 'recipe file'} stores it in {FORMATS[wanted].label}."
    if why is not None:
        return LayerPlan(**shape, precision=REFERENCE, reason=why)
    needs = FORMATS[wanted]
    if in_features % needs.multiple_in or out_features % needs.multiple_out:
        reason = (
            f"{FORMATS[wanted].label} needs multiples of {needs.multiple_in} x {needs.multiple_out}; "
            f"this layer is {in_features} x {out_features}."
        )
        return LayerPlan(**shape, precision=REFERENCE, left=True, reason=reason)
    extras: dict[str, Any] = {}
    if wanted == NVFP4.id:
        calibrated = name in gptq.names(tuning.calibrated)
        extras = {
            "rank": tuning.low_rank.get(name, 0),
            "searched": tuning.searched,
            "calibrated": calibrated,
            "four_over_six": tuning.four_over_six,
            "weights_alone": name in tuning.weights_alone,
        }
    if wanted in recipe_files.ROTATED and tuning.rotation:
        extras["rotation"] = rotation.block(in_features, tuning.rotation)
    return LayerPlan(**shape, precision=wanted, reason=reason, **extras)


def apply(transformer: nn.Module, plan: Plan, support: Support) -> nn.Module:
    """Quantize a bf16 transformer in place as planned, on the device where it is; returns the same module.

    Raises:
        ValueError: `support` is for another precision, or the module is not the one that was planned.
        UnsupportedError: the machine cannot run a precision.
    """
    place = quantizer(plan, support)
    for name, layer in _linears(transformer).items():
        place(name, layer)
    return transformer


def quantizer(plan: Plan, support: Support) -> Callable[[str, nn.Module], None]:
    """Quantizes a planned layer in place when it is called with the layer's name and the layer; ignores any other.

    For a denoiser that arrives layer by layer (`loading.load_transformer`), so that bf16 weights never pile up.

    Raises:
        ValueError: `support` is for another precision.
        LoadError: calibrated weights are missing, damaged or for other weights; when a layer is placed.
    """
    if support.precision != plan.precision:
        raise ValueError(f"A plan for {plan.precision} cannot be applied as {support.precision}.")
    planned = {layer.name: layer for layer in plan.layers if layer.quantized}
    files = plan.recipe.tunings.get(plan.precision, Tuning()).calibrated

    def place(name: str, module: nn.Module) -> None:
        if name in planned:
            _quantize(planned[name], module, support, files)

    return place


def _quantize(layer: LayerPlan, module: nn.Linear, support: Support, files: Sequence[Path]) -> None:
    if layer.precision != support.precision:
        support = capability.support(layer.precision, support.machine)
    if layer.four_over_six:
        require_four_over_six(layer, support)
    if layer.rotation:
        rotation.add(module, layer.rotation)
    exact = module.weight
    packed = None
    if layer.calibrated:
        packed = gptq.read(files, layer.name, exact)
    elif layer.searched or layer.rank or layer.four_over_six:
        packed = nvfp4.quantize(exact, layer.searched, layer.four_over_six)
    capability.quantize_linear_modules(nn.ModuleDict({"layer": module}), {"layer"}, support, packed)
    if layer.four_over_six:
        module.weight.four_over_six = True
    if layer.weights_alone:
        module.weight.act_quant_kwargs = None
    if layer.rank and packed is not None:
        remedies.add_low_rank(module, exact.float() - nvfp4.dequantize(*packed), layer.rank)


def require_four_over_six(layer: LayerPlan, support: Support) -> None:
    """Raises UnsupportedError: the layer's format is native, where no kernel gives activations the better scale."""
    if support.execution == "native":
        raise UnsupportedError(
            f"Four over six has no kernel for activations where {FORMATS[layer.precision].label} is native: choose a "
            "recipe without it."
        )


def verify(transformer: nn.Module, plan: Plan) -> LayerCounts:
    """Count what the module really holds, by the types of its weights, and compare it with the plan layer by layer.

    Raises:
        PlanMismatchError: some layer is not in the planned precision, missing or unplanned.
    """
    planned = {layer.name: layer for layer in plan.layers}
    linears = _linears(transformer)
    wrong = sorted(planned.keys() ^ linears.keys())
    wrong += [name for name, layer in planned.items() if name in linears and not _is_as_planned(linears[name], layer)]
    if wrong:
        raise PlanMismatchError(
            f"{len(wrong)} of {len(planned)} layers are not as the {plan.precision} plan says, {wrong[0]} for one."
        )
    return plan.counts


def _is_as_planned(module: nn.Linear, layer: LayerPlan) -> bool:
    if layer.in_fp32:
        return type(module.weight.data) is Tensor and module.weight.dtype == torch.float32
    rank = module.rank if isinstance(module, remedies.LowRankLinear) else 0
    turned = module.rotation if isinstance(module, rotation.RotatedLinear) else 0
    held = capability.stored_precision(module.weight)
    # No other format leaves activations in bf16.
    alone = held == NVFP4.id and module.weight.act_quant_kwargs is None
    told = (layer.precision, layer.rank, layer.rotation, layer.weights_alone)
    return (held, rank, turned, alone) == told


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
