"""Weights that come a block at a time: the same pictures, two blocks at most, never timed. The device is the CPU, told
to have room for few."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.catalog import FLUX_DEV, LTX_2, MINI_FLUX, QWEN_IMAGE, Memory
from engine.columns import Column
from engine.errors import NoRoomError
from engine.events import Finished
from engine.request import CompareRequest
from engine.results import DENOISER, TEXT, Comparison
from engine.runtime.studio import Studio
from engine.runtime.timing import weight_bytes
from engine.weights import loading, residency, streaming
from engine.weights.host_memory import Pool, blocks
from engine.weights.residency import HOST
from tests.support import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def never():
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).relu()


class Model(nn.Module):
    """Two lists of blocks, of which one has lists inside, beside layers of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.many = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])[0]) for _ in range(3))
        self.few = nn.ModuleList([Block(), Block()])
        self.none = nn.ModuleList([nn.ReLU()])
        self.tied = nn.ModuleList([nn.Linear(4, 4)])
        self.tied[0].weight = self.first.weight
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        x = self.first(x) * self.scale
        for block in (*self.many, *self.few, *self.none, *self.tied):
            x = block(x)
        return x


def streamed(model, install=None):
    stored = Pool(pinned=False, chunk=1000).store([model])
    traffic = streaming.Traffic(CPU)
    return streaming.Stream(stored, [model], CPU, traffic, install), traffic


def test_blocks_are_the_elements_of_the_outermost_lists_that_share_nothing():
    assert list(blocks(Model())) == ["many.0", "many.1", "many.2", "few.0", "few.1"]


def test_blocks_come_two_at_a_time_and_go():
    model, x = Model(), torch.randn(2, 4)
    before, most = model(x), []
    stream, traffic = streamed(model)
    for block in blocks(model).values():
        block.register_forward_hook(lambda *_: most.append(traffic.here))
    assert model.many[0][0].weight.is_meta and not model.first.weight.is_meta and not model.scale.is_meta
    for _ in range(2):
        assert torch.equal(model(x), before)
        assert traffic.here == 0 and model.many[2][0].weight.is_meta
    large, small = (stream._stored.size(block) for block in (model.many[0], model.few[0]))
    assert most == [2 * large, 2 * large, large, 2 * small, small] * 2
    stream.end()
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    stream._stored.restore(CPU)
    assert torch.equal(model(x), before)


def test_compiled_code_is_shared_by_blocks_that_come_and_go():
    graphs, model, x = [], Model(), torch.randn(2, 4)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.inference_mode():
        before = model(x)
        compiled = {
            block: torch.compile(block._call_impl, backend=backend, fullgraph=True, dynamic=False)
            for block in model.few
        }

        def install(around):
            for block in blocks(model).values():
                block._compiled_call_impl = around and around(block, compiled.get(block, block._call_impl))

        stream, _ = streamed(model, install)
        for _ in range(2):
            assert torch.equal(model(x), before)
        stream.end()
    assert len(graphs) == 1


def test_what_fails_halfway_leaves_nothing_there():
    model, x = Model(), torch.randn(2, 4)
    before, failing = model(x), model.many[1].register_forward_hook(lambda *_: 1 / 0)
    _, traffic = streamed(model)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert traffic.here == 0 and all(p.is_meta for p in model.many.parameters())
    failing.remove()
    assert torch.equal(model(x), before)


def test_while_loading_a_block_leaves_before_the_next_is_there():
    model, there, pool = Model(), [], Pool(pinned=False, chunk=1000)
    with streaming.Arriving(pool) as arriving:
        place = arriving.place(lambda name, part: there.append(sum(not p.is_meta for p in model.many.parameters())))
        for name, part in list(model.named_modules()):
            place(name, part)
        stored = arriving.stored([model])
    assert there[0] == 12 and there[-1] == 0 and sorted(there, reverse=True) == there
    assert not model.first.weight.is_meta and model.few[1].layer.weight.is_meta
    stored.restore(CPU)
    assert not model.few[1].layer.weight.is_meta


def test_host_memory_that_cannot_be_had_is_one_sentence_and_is_given_back(monkeypatch):
    model, pool = Model(), Pool(pinned=False, chunk=200)
    original, calls = pool.take, []
    monkeypatch.setattr(
        pool, "take", lambda count: calls.append(count) or (original(count) if len(calls) < 3 else None)
    )
    with pytest.raises(NoRoomError, match=r"close other programs"), streaming.Arriving(pool) as arriving:
        place = arriving.place()
        for name, part in list(model.named_modules()):
            place(name, part)
    assert pool.bytes == 200 * len(pool._spare) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Which machines stream what


@pytest.fixture
def machine(monkeypatch):
    def play(gpu, host=128):
        here = residency.Room(what="GPU memory", free=gpu, total=gpu)
        there = residency.Room(what="host memory", free=host, total=host)
        monkeypatch.setattr(residency, "rooms", lambda device: (here, there))
        return CUDA

    return play


@pytest.mark.parametrize(
    ("spec", "transformer", "gpu", "streams"),
    [
        (FLUX_DEV, 23.8, 80, ()),
        (FLUX_DEV, 23.8, 32, (TEXT,)),
        (FLUX_DEV, 23.8, 24, (TEXT, DENOISER)),
        (FLUX_DEV, 12.0, 24, (TEXT,)),
        (FLUX_DEV, 6.8, 24, (TEXT,)),  # as bf16's: what is compared runs alike
        (FLUX_DEV, 12.0, 16, (TEXT, DENOISER)),
        (FLUX_DEV, 6.8, 16, (TEXT,)),
        (FLUX_DEV, 23.8, 10, (TEXT, DENOISER)),
        (QWEN_IMAGE, 40.86, 12, (TEXT, DENOISER)),
        (LTX_2, 37.75, 16, (TEXT, DENOISER)),
    ],
)
def test_text_encoders_are_streamed_before_the_denoiser(machine, spec, transformer, gpu, streams):
    assert residency.require(spec, "fp8", transformer, machine(gpu)) == streams


@pytest.mark.parametrize(
    ("gpu", "host", "words"),
    [
        (8, 128, "FLUX.1-dev in bf16 needs, streamed, 6.6 GB of GPU memory, and this machine has 8.0 GB, 6.0 GB"),
        (24, 40, "FLUX.1-dev in bf16 needs, streamed, 33.2 GB of host memory, and this machine has 40.0 GB, 24.0 GB"),
        (24, 20, "FLUX.1-dev in bf16 needs 38.3 GB of GPU memory, and this machine has 24.0 GB, 22.0 GB"),
    ],
)
def test_what_cannot_even_be_streamed_is_refused_with_the_numbers(machine, gpu, host, words):
    with pytest.raises(NoRoomError) as caught:
        residency.require(FLUX_DEV, "bf16", 23.8, machine(gpu, host))
    assert words in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The same pictures


def sizes(spec):
    """A tiny or small model with the sizes it really has, in GB."""
    shared = loading.load_shared(spec, CPU)
    modules = [part for part in shared.values() if isinstance(part, nn.Module)]
    denoiser = loading.load_transformer(spec, CPU)
    text = [block for part in loading.text_parts(shared) for block in blocks(part).values()]
    whole = weight_bytes(*modules)
    memory = Memory(
        transformer=weight_bytes(denoiser) / residency.GB,
        shared=whole / residency.GB,
        kept=(whole - weight_bytes(*text)) / residency.GB,
        footprint=0.0,  # of few blocks two are all
        run=0,
        host=0,
    )
    return replace(spec, memory_gb=memory)


@pytest.fixture
def small(monkeypatch):
    """A Studio on a CPU that plays a device with room for a part of a model's bf16 denoiser besides what stays of its
    text encoders and VAE."""

    def make(spec, part):
        memory = spec.memory_gb
        room = memory.kept + part * memory.transformer
        monkeypatch.setattr(residency, "streams_text", lambda *_: True)
        monkeypatch.setattr(residency, "capacity", lambda *_: room)
        monkeypatch.setattr(residency, "waiting_room", lambda *_: 10.0)
        return Studio("cpu")

    return make


def compared(studio, spec, request, out, monkeypatch):
    monkeypatch.setattr("engine.catalog.model", lambda _: spec)
    monkeypatch.setattr(Studio, "ruler", lambda *_: None)
    out.mkdir()
    told = []
    with torch.inference_mode():
        found = studio.compare(request, out, told.append, never)
    made = [event.generation for event in told if isinstance(event, Finished)]
    assert [generation.column for generation in made] == [result.column for result in found.results]
    return found


@pytest.mark.parametrize("model", ["flux.1-dev", "qwen-image", "ltx-2"])
def test_pictures_are_those_of_weights_that_stay(model, small, tmp_path, monkeypatch):
    spec = sizes(tiny.spec(model, tiny.checkpoint(model, tmp_path / "tiny")))
    asked = CompareRequest.create("a cat", model=model, precisions=("bf16", "nvfp4"))
    defaults = spec.defaults
    request = replace(
        asked,
        recipe="full",
        num_inference_steps=2,
        height=defaults.height,
        width=defaults.width,
        num_frames=defaults.num_frames,
    )
    whole = compared(Studio("cpu"), spec, request, tmp_path / "whole", monkeypatch)
    studio = small(spec, 0.9)
    parts = compared(studio, spec, request, tmp_path / "parts", monkeypatch)
    assert [result.streamed for result in whole.results] == [()] * 2
    assert [result.streamed for result in parts.results] == [(TEXT, DENOISER), (TEXT,)]
    for one, other in zip(whole.results, parts.results, strict=True):
        assert one.metrics == other.metrics and one.memory.weights == other.memory.weights
        for a, b in zip(one.files, other.files, strict=True):
            if a.endswith(".png"):
                assert pixels(a) == pixels(b)
    reference = parts.reference
    assert not reference.latency_comparable and reference.ran["Timing"].startswith(
        "not timed: the denoiser was streamed"
    )
    assert "streamed from pinned host memory" in reference.ran["Residency"]
    assert all(parts.speedup(result) is None for result in parts.results)
    saved = Comparison.load(tmp_path / "parts")
    assert [result.streamed for result in saved.results] == [result.streamed for result in parts.results]
    assert "streamed" in parts.to_csv().splitlines()[0] and "streamed" not in whole.to_csv()
    assert studio._shelf.place((spec.id, "bf16", "")) == HOST and studio.traffic.here == 0


def pixels(file):
    from PIL import Image

    with Image.open(file) as picture:
        return picture.tobytes()


def test_a_denoiser_with_weight_only_steps_is_streamed_and_comes_back_whole(small, tmp_path, monkeypatch):
    """NVFP4 by the recipe of a file switches weights between steps, while they are away."""
    spec = sizes(MINI_FLUX)
    request = CompareRequest.create("a cat", precisions=("bf16", "nvfp4@tuned"), num_inference_steps=2)
    column = request.columns[1]
    plain, studio = Studio("cpu"), small(spec, 0.15)

    def made(studio, spec):
        rendition = studio.rendition(spec, column, print)
        return rendition, studio.generate(rendition, spec, request, tmp_path, print, never)[1].pixels

    with torch.inference_mode():
        _, expected = made(plain, MINI_FLUX)
        rendition, first = made(studio, spec)
        assert any(rendition.weight_only_steps) and studio.streaming((spec.id, *key(column))) == (TEXT, DENOISER)
        assert torch.equal(first, expected)
        monkeypatch.setattr(residency, "capacity", lambda *_: 10.0)
        monkeypatch.setattr(residency, "streams_text", lambda *_: False)
        again, whole = made(studio, spec)
        assert again is rendition and studio.streaming((spec.id, *key(column))) == ()
        assert not rendition.pipeline.transformer.transformer_blocks[0].norm1.linear.weight.is_meta
        assert torch.equal(whole, expected)


def key(column):
    return column.format, column.recipe


def test_without_host_memory_a_reference_is_refused_and_nothing_stays_behind(small, monkeypatch):
    spec = sizes(MINI_FLUX)
    studio = small(spec, 0.9)
    monkeypatch.setattr(studio._pool, "take", lambda count: None)
    with pytest.raises(NoRoomError, match="page-locked memory"):
        studio.rendition(spec, Column.of("bf16", "post"), print)
    assert studio._shelf.parts == () and not studio._streams
    assert studio._pool.bytes == 0
