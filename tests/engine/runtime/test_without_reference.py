"""A comparison on a machine that has no memory for bf16: the others are made, and it is said what is missing."""

from dataclasses import replace

import pytest
import torch

from engine.__main__ import _print
from engine.catalog import MINI_FLUX, Memory
from engine.errors import NoRoomError, UnsupportedError
from engine.events import Finished
from engine.formats import REFERENCE
from engine.outputs import blind, recordings
from engine.request import CompareRequest
from engine.results import Comparison
from engine.runtime.studio import Studio
from engine.weights import residency
from ui import view as views
from ui.html import cards
from ui.words import verdict

WHY = "FLUX miniature in bf16 needs, streamed, 3.0 GB of host memory: choose a smaller model or a larger machine."


@pytest.fixture
def small(monkeypatch):
    """A Studio whose machine has no memory for the reference."""
    spec = replace(MINI_FLUX, memory_gb=Memory(transformer=0.001, shared=0.001, run=0.0, host=0.0))

    def require(spec, precision, *_):
        if precision == REFERENCE:
            raise NoRoomError(WHY)
        return ()

    monkeypatch.setattr(residency, "require", require)
    monkeypatch.setattr("engine.catalog.model", lambda _: spec)
    return Studio("cpu")


def test_the_others_are_made_and_it_is_said_what_is_missing(small, tmp_path, capsys):
    request, told = CompareRequest.create("a cat", precisions=["nvfp4"], num_inference_steps=1), []
    with torch.inference_mode():
        found = small.compare(request, tmp_path, told.append, lambda: False)
    assert [event.column for event in told if isinstance(event, Finished)] == ["nvfp4"]
    (made,) = found.results
    assert found.lacks == WHY and found.ruler is None and made.metrics is None and found.request == request
    assert found.speedup(made) is None
    saved = Comparison.load(tmp_path)
    assert saved.lacks == WHY and saved.to_json()["lacks"] == WHY and saved.to_csv().count("\n") == 2
    assert list(blind.pairs(saved, fresh=True)) == []
    said = verdict.verdict(saved)
    assert "no LPIPS, no saving and no speedup" in said and said.endswith(WHY)
    view = views.of(saved, tmp_path, recorded=False)
    shown = "".join((cards.stage(view), cards.headline(view), cards.pairs(view), cards.table(view), cards.ran(view)))
    assert WHY in shown and "nvfp4" in shown and "comparison.json" in shown
    assert "No LPIPS: there is no bf16 to compare with" in shown and "Measuring LPIPS" not in shown
    _print(found)
    assert f"no reference, so no LPIPS, saving or speedup: {WHY}" in capsys.readouterr().out


def test_bf16_alone_is_refused_and_no_recording_is_kept(small, tmp_path):
    alone = CompareRequest.create("a cat", precisions=["bf16"], num_inference_steps=1)
    with pytest.raises(NoRoomError, match="needs, streamed"):
        small.compare(alone, tmp_path, print, lambda: False)
    both = {"cat": CompareRequest.create("a cat", precisions=["nvfp4"], num_inference_steps=1)}

    def lacking(request, folder):
        return Comparison(request=request, device="", versions={}, results=(), ruler=None, created="", lacks=WHY)

    with pytest.raises(UnsupportedError, match="needs, streamed"):
        list(recordings.record(both, tmp_path, lacking))
    assert list(tmp_path.iterdir()) == []
