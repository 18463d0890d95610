"""Which layers a recipe quantizes, and why, for anybody who asks: a plan as plain JSON, without weights or a device.

The denoiser is built on the meta device, where FLUX.1-dev takes a tenth of a second and no memory to speak of, so a
plan is never queued behind a comparison. Both are kept, as they depend on names alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from engine import catalog
from engine.errors import RequestError
from engine.formats import PRECISIONS
from engine.quantization import recipes
from engine.weights import loading


def inspect(model_id: str, precision: str, recipe_id: str | None = None) -> dict[str, Any]:
    """The plan of a model's denoiser in one precision, as `python -m engine inspect --json` prints it.

    Args:
        recipe_id: None for the model's default.

    Raises:
        RequestError: no such model, precision or recipe.
        LoadError: the model's configuration is missing.
    """
    spec = catalog.model(model_id)
    if precision not in PRECISIONS:
        raise RequestError(f"There is no precision {precision!r}: choose from {', '.join(PRECISIONS)}.")
    recipe = recipes.recipe(spec.family, recipe_id or spec.recipes[0])
    found = recipes.plan(_denoiser(spec.id), recipe, precision)
    return {"model": spec.id, "precision": precision, "recipe": recipe.id} | found.to_json()


@lru_cache(maxsize=len(catalog.MODELS))
def _denoiser(model_id: str) -> nn.Module:
    return loading.empty_transformer(catalog.model(model_id))
