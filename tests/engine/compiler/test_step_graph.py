"""When a step is recorded, replayed and forgotten, with a recorder that needs no GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from engine.compiler import step_graph
from engine.compiler.step_graph import KEPT, PLAIN_CALLS, StepGraph


class Recording:
    """Replays what was recorded, whatever it is given now: as a CUDA graph, it reads its own inputs."""

    made = 0

    def __init__(self, call, args, kwargs, pool):
        Recording.made += 1
        self.pool = pool
        self.number = Recording.made

    def replay(self, tensors):
        return self.number, [tensor.item() for tensor in tensors]


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    Recording.made = 0
    pools = iter(range(100))
    monkeypatch.setattr(step_graph, "_Recording", Recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(step_graph, "_recordable", lambda tensors: bool(tensors))


def plain(x, scale=1.0, more=None):
    return "plain"


def numbered(value):
    return torch.full((), float(value))


def test_a_shape_runs_plainly_first_and_is_replayed_from_then_on():
    step = StepGraph(plain)
    assert [step(numbered(i)) for i in range(PLAIN_CALLS)] == ["plain"] * PLAIN_CALLS
    assert step(numbered(7), more={"y": [numbered(8)]}) == "plain"  # another nesting
    assert (step.recorded, step.replayed) == (0, 0)
    assert step(numbered(5)) == (1, [5.0])
    assert step(numbered(6)) == (1, [6.0])
    assert (step.plain, step.recorded, step.replayed) == (PLAIN_CALLS + 1, 1, 2)


@pytest.mark.parametrize(
    "other",
    [(torch.zeros(3),), (torch.zeros((), dtype=torch.float64),), (numbered(0), 2.0)],
    ids=["size", "type", "a number"],
)
def test_another_shape_type_or_value_is_another_recording(other):
    step = StepGraph(plain)
    for _ in range(PLAIN_CALLS + 1):
        step(numbered(0))
    assert [step(*other) for _ in range(PLAIN_CALLS)] == ["plain"] * PLAIN_CALLS


def test_only_so_many_are_kept_and_the_one_used_longest_ago_goes():
    step = StepGraph(lambda *_: "plain")

    def record(value):
        for _ in range(PLAIN_CALLS):
            step(numbered(0), value)
        return step(numbered(0), value)[0]

    assert [record(value) for value in range(KEPT)] == list(range(1, KEPT + 1))
    assert step(numbered(0), 0)[0] == 1  # used just now
    assert step.dropped == 0
    record("one more")
    assert step.dropped == 1
    assert step(numbered(0), 0)[0] == 1
    assert step(numbered(0), 1) == "plain"


def test_weights_that_moved_are_recorded_anew_in_memory_of_their_own():
    step = StepGraph(plain)
    for _ in range(PLAIN_CALLS + 1):
        step(numbered(0))
    (before,) = step._recorded.values()
    step.forget()
    assert [step(numbered(0)) for _ in range(PLAIN_CALLS)] == ["plain"] * PLAIN_CALLS
    step(numbered(0))
    (after,) = step._recorded.values()
    assert after.number == 2 and after.pool != before.pool


@pytest.mark.parametrize("places", [(), ("cpu",), ("cuda:0", "cpu")])
def test_what_lies_outside_the_gpu_is_never_recorded(places, monkeypatch):
    monkeypatch.undo()
    assert not step_graph._recordable([SimpleNamespace(is_cuda=place != "cpu") for place in places])


def test_each_device_records_on_one_stream_of_its_own(monkeypatch):
    monkeypatch.undo()
    used = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, **_: used.append(stream) or nullcontext())
    step_graph._stream.cache_clear()
    for place in ("cpu", "meta", "cpu"):
        step_graph._Recording(plain, (torch.zeros(1, device=place),), {}, None)
    step_graph._stream.cache_clear()
    assert [stream.device.type for stream in used] == ["cpu", "meta", "cpu"]
    assert used[0] is used[2]
