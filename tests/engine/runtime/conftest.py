"""Shared by what runs comparisons on one device or several."""

from types import MappingProxyType

import pytest

from engine import catalog
from engine.runtime import timing
from tests.support import tiny


@pytest.fixture(scope="module")
def spec(cache, tmp_path_factory):
    """A random FLUX of a few hundred kilobytes, quick to warm."""
    made = tiny.spec("flux.1-dev", tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, made.id: made}))
        patch.setattr("engine.runtime.studio.RULER_PROMPTS", 1)
        patch.setattr(timing, "added_bytes", lambda run, device: (run(), 1000)[1])  # the CPU's profiler takes seconds
        yield made
