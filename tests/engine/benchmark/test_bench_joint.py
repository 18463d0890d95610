"""The benchmark of several devices that work on one picture."""

import json
from types import MappingProxyType

import pytest

from engine import catalog
from engine.benchmark import bench
from engine.errors import RequestError
from engine.weights.source import BUNDLED_OR_HUB
from tests.support import tiny


@pytest.fixture
def spec(cache, tmp_path, monkeypatch):
    made = tiny.spec("flux.1-dev", tiny.checkpoint("flux.1-dev", tmp_path / "flux"))
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, made.id: made}))
    return made


def test_the_engine_is_measured_on_both_and_the_posts_methods_are_refused(spec, tmp_path):
    settings = {"precisions": ("bf16",), "batch_sizes": (1,), "steps": 2, "repeats": 1}
    with pytest.raises(RequestError, match="runs on one card"):
        posts = bench.Settings(**settings, methods=("engine", "post"))
        bench.run(spec, posts, "cpu+cpu", BUNDLED_OR_HUB, tmp_path / "refused.json")
    result = bench.run(spec, bench.Settings(**settings), "cpu+cpu", BUNDLED_OR_HUB, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["device"].startswith("2 cards, ")
    (row,) = result["rows"]
    assert row["error"] is None and row["latency_s"] is not None
