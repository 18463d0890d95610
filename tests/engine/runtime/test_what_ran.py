"""What really ran, and whether its time counts, are facts of the run: what it compiled, recorded and replayed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from engine.columns import Column
from engine.compiler import compilation, step_graph
from engine.request import CompareRequest
from engine.runtime.studio import Studio
from tests.support import tiny
from ui import words

STEPS = 3


class Recording:
    """Makes the recorded call again with the tensors given now."""

    def __init__(self, call, args, kwargs, pool):
        self._call = call
        self._leaves, self._nesting = tree_flatten((args, kwargs))

    def replay(self, tensors):
        given = iter(tensors)
        args, kwargs = tree_unflatten(
            [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves], self._nesting
        )
        return self._call(*args, **kwargs)


@pytest.fixture
def take(tmp_path, monkeypatch):
    """Make one picture in a precision; `spoil` is called in the timed call."""
    spec = tiny.spec("flux.1-dev", tiny.checkpoint("flux.1-dev", tmp_path / "weights"))
    asked = CompareRequest.create("a cat", model="flux.1-dev", num_inference_steps=STEPS)
    asked = replace(asked, height=64, width=64, recipe=spec.recipes[0])
    studio = Studio("cpu")

    def made(precision="bf16", spoil=lambda rendition: None):
        rendition = studio.rendition(spec, Column.of(precision, asked.recipe), lambda _: None)
        with torch.inference_mode():
            timed = studio.ready(spec, Column.of(precision, asked.recipe), asked, lambda _: None, lambda: False)
            return timed(lambda _: spoil(rendition), lambda: False)[0]

    return SimpleNamespace(made=made, asked=asked)


@pytest.fixture
def recorder(monkeypatch):
    """Steps are recorded as on a GPU."""
    monkeypatch.setattr(compilation, "mode", lambda *_: compilation.GRAPHS)
    monkeypatch.setattr(compilation.Blocks, "_compiled", lambda self: [None] * len(self._blocks))
    monkeypatch.setattr(step_graph, "_Recording", Recording)
    monkeypatch.setattr(step_graph, "_recordable", bool)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))


def test_replays_are_counted_and_not_assumed(take, recorder):
    found = take.made()
    assert f"{STEPS} of its steps replayed from a CUDA graph, 0 recorded" in found.ran["Compile"]
    assert found.latency_comparable and "after 3 warm-up steps" in found.ran["Timing"]


def test_a_step_that_cannot_be_recorded_is_not_called_a_graph(take, recorder, monkeypatch):
    monkeypatch.setattr(step_graph, "_recordable", lambda tensors: False)
    assert "0 of its steps replayed from a CUDA graph, 0 recorded" in take.made().ran["Compile"]


def test_a_call_that_recorded_has_no_latency_and_says_why(take, recorder):
    found = take.made(spoil=lambda rendition: rendition.blocks.forget())
    assert not found.latency_comparable and "compiled or recorded" in found.ran["Timing"]
    assert words.no_latency(found, take.asked) == words.COMPILED
    assert words.compare.no_latency_note(found, take.asked) == words.compare.COMPILED_NOTE


def test_a_call_in_which_something_compiled_has_no_latency(take, monkeypatch):
    counter = []
    monkeypatch.setattr(compilation, "graphs_compiled", lambda: len(counter))
    assert take.made().latency_comparable
    assert not take.made(spoil=lambda _: counter.append(1)).latency_comparable


@pytest.mark.parametrize(
    ("precision", "kinds"), [("bf16", "bfloat16"), ("mxfp8", "EmulatedMXFP8Tensor (kernel preference emulated)")]
)
def test_the_products_are_told_by_the_weights_that_are_there(take, precision, kinds):
    found = take.made(precision)
    count = found.layers.quantized if precision == "mxfp8" else found.layers.skipped + found.layers.left
    assert f"{count} {kinds}" in found.ran["GEMM"] and count > 0
