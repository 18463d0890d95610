"""Text encoders and VAE compiled while a worker is idle: never in front of a visitor, and alike for all columns."""

import json
from types import SimpleNamespace

import pytest
import torch

from engine import events
from engine.compiler import compilation, ends
from engine.request import CompareRequest
from engine.runtime.device import Device
from engine.serving.telemetry import Preload
from engine.serving.worker import Worker
from engine.weights import residency
from ui import words

EAGER = "bf16, shared by all precisions"
COMPILED = f"{EAGER}; compiled: text_encoder, text_encoder_2 and vae"


@pytest.fixture
def worker(spec):
    made = Worker((spec.id,), Device("cpu"))
    yield made
    made.close()


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for Inductor: what it compiles makes something else in the last bits. `during` is called in the first
    call of each block."""
    seen = SimpleNamespace(compiled=[], calls=0, during=lambda: None)

    def compiled(call, **how):
        first = []

        def called(*args, **kwargs):
            if not first:
                first.append(True)
                seen.compiled.append(call.__self__)
                seen.during()
            seen.calls += 1
            return torch.utils._pytree.tree_map_only(torch.Tensor, lambda made: made * 1.004, call(*args, **kwargs))

        return called

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compilation, "configure", lambda: None)
    return seen


@pytest.fixture
def ask(spec, worker, tmp_path_factory):
    """Submit a comparison; gives its job and its folder."""

    def submit(**fields):
        out = tmp_path_factory.mktemp("out")
        return worker.submit(CompareRequest.create("a cat", model=spec.id, **fields), out), out

    return submit


def said(job):
    """What the columns of a comparison say of their ends, each thing once."""
    assert job.wait(120) and isinstance(job.ending, events.Completed), job.ending
    return {made.ran["Text encoders and VAE"] for made in job.ending.comparison.results}


def pictures(out):
    return {file.name: file.read_bytes() for file in out.glob("*.png")}


@pytest.mark.parametrize("where", ["on a CPU", "streamed", "on several devices"])
def test_on_a_cpu_streamed_and_on_several_devices_ends_are_left_as_they_are(where, spec, compiler, monkeypatch):
    studio = Device("cpu,cpu" if where == "on several devices" else "cpu").studio
    request = CompareRequest.create("a cat", model=spec.id)
    if where != "on a CPU":
        monkeypatch.setattr(ends, "wanted", lambda device, machine: True)
    if where == "streamed":
        monkeypatch.setattr(studio, "_streams", {residency.shared_key(spec.id): None})
    assert not studio.warm_ends(spec, request, lambda _: None, lambda: False)
    assert not compiler.compiled and not studio._renditions, "something was loaded for it"


def rulers(cache):
    """Keys of those that are kept."""
    file = cache / "rulers.json"
    return set(json.loads(file.read_text())) if file.is_file() else set()


def test_whoever_comes_in_between_has_eager_ends_and_later_all_columns_have_compiled_ones(
    worker, ask, spec, compiler, cache, monkeypatch
):
    monkeypatch.setattr(ends, "wanted", lambda device, machine: True)
    kept = rulers(cache)
    before, out_before = ask()
    assert said(before) == {EAGER} and not compiler.compiled, "somebody waited"
    between, begun, compare = [], [], worker.device.compare

    def noted(*asked):
        begun.append(len(compiler.compiled))
        return compare(*asked)

    def during():
        if len(compiler.compiled) == 2:
            between.append(ask())

    compiler.during = during
    worker.device.compare = noted
    preload = worker.preload(spec.id)
    assert preload.wait(120) and isinstance(preload.ending, events.Prepared)
    ((job, out),) = between
    assert said(job) == {EAGER} and pictures(out) == pictures(out_before)
    assert begun == [2] and len(compiler.compiled) > 2, "it had to wait for more than one piece"

    calls, count = compiler.calls, len(compiler.compiled)
    after, out_after = ask()
    assert said(after) == {COMPILED} and compiler.calls > calls
    assert not any(isinstance(e, events.Warming | events.Measuring | events.Loading) for e in after.events())
    old, new = pictures(out_before), pictures(out_after)
    assert all(new[f"{name}.png"] != old[f"{name}.png"] for name in ("bf16", "mxfp8", "nvfp4"))
    assert any(key.endswith("|vae") for key in rulers(cache) - kept), "one ruler for both kinds of ends"

    assert said(ask(batch_size=2, precisions=["nvfp4"])[0]) == {EAGER}, "no such batch was compiled"
    assert len(compiler.compiled) == count


def test_model_is_ready_while_they_are_compiled():
    preload = Preload(model="flux.1-dev", part=events.Preparing("bf16", 1, 3)).after(events.CompilingEnds(2, 7))
    assert preload.ready
    headline, detail = words.warming.said("ready", (preload,))
    assert headline == "FLUX.1-dev is ready, its text encoders and VAE are being compiled"
    assert detail == "piece 2 of 7"
