"""What can be compared: one frozen `ModelSpec` a model, with its defaults and limits.

Knows nothing of devices or weights in memory. Adding a model of a known pipeline class is one entry in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from engine.errors import RequestError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model's default call settings, named as the arguments of its diffusers pipeline."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int = 7
    batch_size: int = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a user may choose; both ends of each range are allowed."""

    sizes: tuple[tuple[int, int], ...]
    """Allowed (height, width) pairs in pixels."""
    num_inference_steps: tuple[int, int]
    guidance_scale: tuple[float, float]
    batch_size: tuple[int, int]
    prompt_characters: int
    seed: tuple[int, int] = (0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model that can be compared."""

    id: str
    name: str
    summary: str
    pipeline: str
    """Class name in diffusers."""
    modality: str
    """"image" or "video"."""
    source: str
    """Folder below assets/ for a bundled model, repository id on the hub otherwise."""
    bundled: bool
    licence: str
    licence_url: str
    defaults: Settings
    limits: Limits
    recipes: tuple[str, ...]
    """Recipe ids a user may choose, the default first; defined in engine/recipes.py."""
    guidance_argument: str = "guidance_scale"
    """The pipeline argument that a request's guidance goes to: embedded ("guidance_scale") or two forward passes a
    step against a negative prompt ("true_cfg_scale")."""
    call: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Further fixed keyword arguments of the pipeline call."""
    examples: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where a bundled model's weights lie."""
        return ASSETS / self.source


MINI_FLUX = ModelSpec(
    id="mini-flux",
    name="FLUX miniature",
    summary="A 21-million-parameter FluxTransformer2DModel trained on Fluent 3D emoji; bundled, runs on a laptop CPU.",
    pipeline="FluxPipeline",
    modality="image",
    source="models/mini-flux",
    bundled=True,
    licence="Apache-2.0 (trained on Fluent Emoji, MIT)",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    defaults=Settings(height=256, width=256, num_inference_steps=20, guidance_scale=1.0),
    limits=Limits(
        sizes=((256, 256),),
        num_inference_steps=(1, 50),
        guidance_scale=(1.0, 6.0),
        batch_size=(1, 4),
        prompt_characters=150,
    ),
    recipes=("seed", "full"),
    guidance_argument="true_cfg_scale",
    call=MappingProxyType({"max_sequence_length": 32, "negative_prompt": "", "guidance_scale": 1.0}),
    examples=(
        "a rocket on a blue background",
        "a cat on a red background",
        "a snowman on a purple background",
        "an octopus on a yellow background",
    ),
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType({spec.id: spec for spec in (MINI_FLUX,)})


def model(model_id: object) -> ModelSpec:
    """The spec with this id.

    Raises:
        RequestError: no such model; the sentence lists those there are.
    """
    if isinstance(model_id, str) and model_id in MODELS:
        return MODELS[model_id]
    raise RequestError(f"There is no model {model_id!r}: choose one of {', '.join(MODELS)}.")
