"""Which layers a recipe quantizes, and why, for anybody who asks: a plan as plain JSON, without weights or a device.

The denoiser is built on the meta device, where it takes no memory to speak of, so a plan is never queued behind a
comparison.
"""

from __future__ import annotations

from typing import Any

from engine import catalog
from engine.columns import Column
from engine.quantization import recipes
from engine.weights import loading


def inspect(model_id: str, precision: str, recipe_id: str | None = None) -> dict[str, Any]:
    """The plan of a model's denoiser as one column, as `python -m engine inspect --json` prints it.

    Args:
        precision: a column, as somebody wrote it.
        recipe_id: of a column that names none; None for the model's default.

    Raises:
        RequestError: no such model, precision or recipe.
        LoadError: the model's configuration is missing.
    """
    spec = catalog.model(model_id)
    recipe = recipes.recipe(spec.family, recipe_id or spec.recipes[0]).id
    column = Column.parse(precision, spec, recipe)
    found = recipes.plan_of(loading.blueprint(spec), spec, column)
    named = {"column": column.written(spec.recipes[0]), "recipe": column.rules or recipe}
    return {"model": spec.id, "precision": column.format} | named | found.to_json()
