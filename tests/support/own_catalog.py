"""What a test gives to the catalog is gone after it."""

from types import MappingProxyType

import pytest

from engine import catalog


def begin(patch: pytest.MonkeyPatch) -> None:
    """A copy of the catalog until `patch` is undone."""
    models = dict(catalog._models)
    patch.setattr(catalog, "_models", models)
    patch.setattr(catalog, "_given", {})
    patch.setattr(catalog, "MODELS", MappingProxyType(models))
