"""Several devices that work on one picture: a CPU named several times, and a rank that is lost."""

import os
import signal
import time
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from engine import catalog, events
from engine.columns import EXACT, Column
from engine.errors import FaultError, UnsupportedError
from engine.request import CompareRequest
from engine.runtime import joint, ranks, timing
from engine.runtime.joint import JointStudio
from engine.runtime.multi_device import driving, studio_on
from engine.runtime.residents import key_of
from engine.runtime.studio import Studio
from engine.serving import command_line
from engine.weights import residency
from tests.support import tiny

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
COLUMNS = (EXACT, Column("fp8", "full"))


@pytest.fixture(scope="module")
def spec(cache, tmp_path_factory):
    """A random FLUX of a few hundred kilobytes, with two heads."""
    made = tiny.spec("flux.1-dev", tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, made.id: made}))
        patch.setattr(timing, "added_bytes", lambda run, device: (run(), 1000)[1])  # the CPU's profiler takes seconds
        yield made


@pytest.fixture(scope="module", params=["cpu+cpu", pytest.param("cuda:0+cuda:1", marks=two_gpus)])
def two(request, spec):
    studio = JointStudio(request.param.split("+"), limit=60)
    yield studio
    studio.close()


def make(studio, spec, column=EXACT, tell=lambda event: None, **asked):
    """What a studio makes, and what is known of it."""
    request = CompareRequest.create("a cat", model=spec.id, precisions=[column.written("full")], **asked)
    with driving(studio.device):
        take = studio.ready(spec, column, request, lambda event: None, lambda: False)
        return take(tell, lambda: False)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.format)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_two_devices_make_the_picture_of_one(two, spec, column, batch_size):
    _, alone = make(Studio(two.device), spec, column, batch_size=batch_size)
    generation, together = make(two, spec, column, batch_size=batch_size)
    if two.device.type == "cpu":
        assert together.pixels.equal(alone.pixels)
    assert (alone.pixels - together.pixels).abs().max() <= 16 / 255
    assert generation.ran["Device"].startswith("2 cards, ") and generation.ran["Cards"].startswith(
        " and ".join(two.ranks.devices)
    )


def test_weights_that_waited_in_host_memory_come_back_in_every_rank(two, spec):
    _, before = make(two, spec)
    with driving(two.device):
        two._move(residency.Move(key=key_of(spec, EXACT), to=residency.HOST))
    _, after = make(two, spec)
    assert after.pixels.equal(before.pixels)


@pytest.mark.parametrize(("how", "said"), [(signal.SIGKILL, "ended (SIGKILL)"), (signal.SIGSTOP, "did not answer")])
def test_a_rank_lost_in_a_call_ends_it_in_a_sentence_and_the_next_has_fresh_ones(two, spec, how, said, monkeypatch):
    _, before = make(two, spec)
    lost = two.ranks.pids

    def lose(event):
        if isinstance(event, events.Step) and event.index == 1:
            monkeypatch.setattr(two.ranks, "_limit", 3 if how == signal.SIGSTOP else 60)
            # Who ends the lost ones is late: the fresh ones are there by then.
            monkeypatch.setattr(ranks.log, "error", lambda *_, **__: time.sleep(1))
            os.kill(lost[0], how)

    with pytest.raises(FaultError) as caught:
        make(two, spec, tell=lose)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    _, after = make(two, spec)
    assert after.pixels.equal(before.pixels) and two.ranks.pids != lost


def test_what_ranks_cannot_share_is_refused_in_one_sentence(spec):
    joint.require(spec, 2)
    with pytest.raises(
        UnsupportedError, match=r"^3 devices cannot share the 2 attention heads of .*: name one, or 2\.$"
    ):
        joint.require(spec, 3)
    assert "2, 3, 4, 6, 8, 12, 24." in _refusal(catalog.model("flux.1-dev"), 5)
    assert "FLUX.1 alone" in _refusal(catalog.model("qwen-image"), 2)


def _refusal(spec, devices):
    with pytest.raises(UnsupportedError) as caught:
        joint.require(spec, devices)
    return str(caught.value)


def test_devices_of_one_picture_are_named_with_a_plus(spec):
    assert command_line.devices("cuda:0 + cuda:1") == "cuda:0+cuda:1"
    for wrong in ("cuda:0+cuda:0", "cuda+cuda:0", "cuda:0+cuda:1,cuda:2"):
        with pytest.raises(command_line.argparse.ArgumentTypeError):
            command_line.devices(wrong)
    assert studio_on("cpu+cpu").machine.label == f"2 cards, {replace(Studio('cpu').machine, cards=1).label}"
