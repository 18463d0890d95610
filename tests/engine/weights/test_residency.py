"""What stays on the device, what waits and what gives way: the plans against a simulated machine, and a real Studio."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import catalog
from engine.catalog import FLUX_DEV, LTX_2, MINI_FLUX, QWEN_IMAGE, Memory
from engine.columns import Column
from engine.errors import NoRoomError, RequestError, UnsupportedError
from engine.quantization import recipes
from engine.request import CompareRequest
from engine.results import TEXT
from engine.runtime.studio import Studio
from engine.runtime.timing import weight_bytes
from engine.weights import loading, residency
from engine.weights.residency import DEVICE, GONE, HOST, Move, NoRoom, Shelf, shared_key
from tests.support import tiny

CUDA = torch.device("cuda")


def use(shelf, key, sizes, run, device, host):
    """What the engine does with a plan, on a machine that exists in numbers only; gives the moves."""
    shared = shared_key(key[0])
    wanted = {shared: sizes[shared], key: sizes[key]}
    moves = shelf.plan(wanted, run, device, host)
    for move in moves:
        shelf.done(move)
        assert shelf.held(HOST) <= host + 1e-9
        assert shelf.held(DEVICE) <= device + 1e-9
    for part in wanted:
        if shelf.place(part) == GONE:
            shelf.put(part, sizes[part])
    shelf.use(key, shared)
    return moves


# ---------------------------------------------------------------------------------------------------------------------
# Plans


MODELS = st.sampled_from("abc")
SIZES = st.fixed_dictionaries(
    {(model, precision, ""): st.integers(1, 40) for model in "abc" for precision in ("", "bf16", "fp8", "nvfp4")}
)


@given(
    sizes=SIZES,
    asked=st.lists(st.tuples(MODELS, st.sampled_from(["bf16", "fp8", "nvfp4"]), st.just("")), max_size=12),
    run=st.integers(0, 10),
    device=st.integers(1, 150),
    host=st.integers(0, 150),
)
def test_plans_keep_what_they_promise(sizes, asked, run, device, host):
    shelf = Shelf()
    for key in asked:
        shared, before = shared_key(key[0]), {part.key: part for part in shelf.parts}
        need = sizes[key] + sizes[shared] + run
        if need > device:
            with pytest.raises(NoRoom):
                use(shelf, key, sizes, run, device, host)
            assert {part.key: part for part in shelf.parts} == before
            continue
        moves = use(shelf, key, sizes, run, device, host)
        assert shelf.place(key) == shelf.place(shared) == DEVICE
        assert shelf.held(DEVICE) + run <= device and shelf.held(HOST) <= host
        assert all(move.to == DEVICE for move in moves if move.key in (key, shared)), "what runs is never evicted"
        assert [part.key for part in shelf.parts][-2:] == [key, shared]
        places = {part.key for part in shelf.parts}
        assert all(shared_key(model) in places for model, _, _ in places)
        assert all(any(k[0] == k2[0] and k2[1] for k2 in places) for k in places), "nothing is kept that is of no use"
        slack = device - run - shelf.held(DEVICE)
        left = [move.key for move in moves if move.to == HOST and before[move.key].place == DEVICE]
        assert all(sizes[k] > slack for k in left), "nothing leaves that could have stayed"


@given(sizes=SIZES, asked=st.lists(st.tuples(MODELS, st.sampled_from(["bf16", "fp8"]), st.just("")), min_size=1))
def test_with_room_for_all_nothing_moves(sizes, asked):
    shelf = Shelf()
    for key in asked:
        assert use(shelf, key, sizes, run=5, device=sum(sizes.values()) + 5, host=0) == ()


@given(sizes=SIZES, asked=st.lists(st.tuples(MODELS, st.sampled_from(["bf16", "fp8"]), st.just("")), min_size=1))
def test_with_a_large_host_nothing_is_forgotten(sizes, asked):
    shelf = Shelf()
    for key in asked:
        moves = use(shelf, key, sizes, run=5, device=90, host=2 * sum(sizes.values()))
        assert all(move.to != GONE for move in moves)


@pytest.fixture
def shelf():
    """Three denoisers of one model, used in this order, and what they share."""
    made = Shelf()
    for name, size in (("bf16", 24), ("fp8", 12), ("nvfp4", 7)):
        made.put(("m", name, ""), size)
    made.put(shared_key("m"), 10)
    return made


WANTED = {("m", "mxfp8", ""): 12, shared_key("m"): 10}


@pytest.mark.parametrize(
    ("device", "host", "moves"),
    [
        (70, 0, []),
        (60, 100, [(("m", "bf16", ""), HOST)]),
        (46, 100, [(("m", "bf16", ""), HOST)]),
        (35, 100, [(("m", "bf16", ""), HOST), (("m", "fp8", ""), HOST)]),
        (35, 12, [(("m", "bf16", ""), GONE), (("m", "fp8", ""), HOST)]),
        (35, 0, [(("m", "bf16", ""), GONE), (("m", "fp8", ""), GONE)]),
    ],
)
def test_what_was_used_longest_ago_leaves_first_and_waits_if_it_can(shelf, device, host, moves):
    assert shelf.plan(WANTED, 5, device, host) == tuple(Move(key=key, to=to) for key, to in moves)


def test_using_a_part_saves_it(shelf):
    shelf.use(("m", "bf16", ""), shared_key("m"))
    assert shelf.plan(WANTED, 5, 60, 100) == (Move(key=("m", "fp8", ""), to=HOST),)


def test_a_small_part_stays_where_a_large_one_has_to_leave():
    shelf = Shelf()
    for key, size in ((("mini", "bf16", ""), 0.1), (shared_key("mini"), 0.1), (("m", "bf16", ""), 24)):
        shelf.put(key, size)
    shelf.put(shared_key("m"), 10)
    moves = shelf.plan({("m", "fp8", ""): 12, shared_key("m"): 10}, 5, 40, 100)
    assert moves == (Move(key=("m", "bf16", ""), to=HOST),)


def test_another_models_text_encoders_wait_with_its_denoiser(shelf):
    moves = shelf.plan({("n", "bf16", ""): 40, shared_key("n"): 15}, 5, 60, 100)
    assert {move.to for move in moves} == {HOST} and len(moves) == 4


def test_without_its_text_encoders_a_denoiser_is_of_no_use(shelf):
    moves = shelf.plan({("n", "bf16", ""): 40, shared_key("n"): 15}, 5, 60, 9)  # room for a denoiser, not for these
    assert {move.to for move in moves} == {GONE} and len(moves) == 4


def test_what_waited_gives_way_to_what_was_used_since(shelf):
    for move in shelf.plan(WANTED, 5, 60, 24):
        shelf.done(move)
    shelf.put(("m", "mxfp8", ""), 12)
    shelf.use(shared_key("m"))
    assert shelf.plan({("m", "bf16", "full"): 20, shared_key("m"): 10}, 5, 55, 24) == (
        Move(key=("m", "bf16", ""), to=GONE),
        Move(key=("m", "fp8", ""), to=HOST),
    )


def test_host_memory_is_counted_in_whole_chunks():
    shelf = Shelf(grain=4)
    for key, size in ((("m", "bf16", ""), 9), (("m", "fp8", ""), 5), (shared_key("m"), 1)):
        shelf.put(key, size)
    wanted = {("m", "nvfp4", ""): 3, shared_key("m"): 1}
    assert [move.to for move in shelf.plan(wanted, 0, 4, 20)] == [HOST, HOST]
    assert [move.to for move in shelf.plan(wanted, 0, 4, 19)] == [GONE, HOST]


# ---------------------------------------------------------------------------------------------------------------------
# The catalog's models on the machines they are meant for


@pytest.fixture(scope="module")
def sizes():
    """GB of every part, from the recipes' plans."""
    found = {}
    for spec in (FLUX_DEV, QWEN_IMAGE, LTX_2):
        empty, recipe = loading.empty_transformer(spec), recipes.recipe(spec.family, "post")
        found[shared_key(spec.id)] = spec.memory_gb.shared
        for name in ("bf16", "fp8", "mxfp8", "nvfp4"):
            found[spec.id, name, ""] = recipes.plan(empty, recipe, name).quantized_bytes / residency.GB
    return found


@pytest.mark.parametrize(
    ("specs", "precisions", "gpu", "host", "all_at_once"),
    [
        ((FLUX_DEV,), ("bf16", "fp8", "mxfp8", "nvfp4"), 80, 64, True),
        ((FLUX_DEV,), ("bf16", "fp8", "mxfp8", "nvfp4"), 48, 72, False),
        ((LTX_2,), ("bf16", "fp8", "mxfp8", "nvfp4"), 141, 64, True),
        ((LTX_2,), ("bf16", "mxfp8", "nvfp4"), 80, 96, False),
        ((FLUX_DEV, QWEN_IMAGE, LTX_2), ("bf16", "mxfp8", "nvfp4"), 180, 256, False),
    ],
)
def test_every_precision_of_the_models_is_there_or_waits(sizes, specs, precisions, gpu, host, all_at_once):
    device, host = gpu - residency.RESERVE, host - residency.HOST_RESERVE
    shelf, moved = Shelf(), []
    keys = [(spec.id, name, "") for spec in specs for name in precisions]
    for key in keys * 3:
        run = catalog.model(key[0]).memory_gb.one_run
        moved += use(shelf, key, sizes, run, device, host)
    assert all(move.to != GONE for move in moved), "nothing is ever read from disk again"
    assert {part.key for part in shelf.parts} == {*keys, *(shared_key(spec.id) for spec in specs)}
    assert all_at_once == (not moved)


def test_the_largest_batches_of_the_post_are_within_the_estimate():
    post = json.loads((catalog.ASSETS / "reference" / "b200.json").read_text())
    for row in post["performance"]:
        spec = catalog.model(row["model"])
        if row["precision"] != "bf16":
            continue
        request = CompareRequest.create("a cat", model=spec.id, batch_size=row["batch_size"])
        estimate = spec.memory_gb.weights + residency.run_memory(spec, request)
        assert row["peak_memory_gb"] <= estimate + 0.05, row
    small = CompareRequest.create("a cat", model="flux.1-dev", height=512, width=512)
    assert residency.run_memory(FLUX_DEV, small) == FLUX_DEV.memory_gb.run
    assert residency.run_memory(MINI_FLUX, CompareRequest.create("a cat")) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What the machine has


@pytest.fixture
def machine(monkeypatch):
    """Play a machine with so much GPU and host memory, in GB."""

    def play(gpu, host, free=None):
        here = residency.Room(what="GPU memory", free=gpu if free is None else free, total=gpu)
        there = residency.Room(what="host memory", free=host, total=host)
        monkeypatch.setattr(residency, "rooms", lambda device: (here, there))
        return CUDA

    return play


@pytest.mark.parametrize(
    ("gpu", "host", "words"),
    [
        (79.2, 128, None),
        (8.1, 128, ["6.6 GB of GPU memory", "8.1 GB", "6.1 GB of them"]),
        (79.2, 6, ["8.0 GB of host memory", "6.0 GB"]),
    ],
)
def test_a_model_too_large_is_refused_with_the_numbers(machine, gpu, host, words):
    device = machine(gpu, host)
    if words is None:
        residency.require(FLUX_DEV, "bf16", 23.8, device)
        return
    with pytest.raises(UnsupportedError) as caught:
        residency.require(FLUX_DEV, "bf16", 23.8, device)
    assert all(word in str(caught.value) for word in ["FLUX.1-dev in bf16", *words])


def test_bundled_models_fit_everywhere(machine):
    residency.require(MINI_FLUX, "bf16", 1, machine(0.1, 0.1))


def test_what_others_took_is_not_given_away(machine):
    device = machine(80, 64, free=30)
    assert residency.capacity(device, held=20) == 30 + 20 - residency.RESERVE
    assert residency.capacity(device, held=20, most=40) == 40
    assert residency.waiting_room(device, pooled=10) == 64 + 10 - residency.HOST_RESERVE
    assert residency.waiting_room(machine(80, 8), pooled=0) == 0
    assert residency.waiting_room(torch.device("cpu"), pooled=10) == 0


def segment(total, used, pool=(0, 0), device=0):
    """Of PyTorch's allocator, as `torch.cuda.memory_snapshot` describes it."""
    return {"device": device, "total_size": total, "allocated_size": used, "segment_pool_id": pool}


@pytest.mark.parametrize("device", [CUDA, torch.device("cuda:0")])
def test_what_recorded_graphs_hold_is_not_free_for_others(monkeypatch, device):
    segments = [
        segment(10 * 10**9, 7 * 10**9),
        segment(2 * 10**9, 0),
        segment(6 * 10**9, 1 * 10**9, pool=(0, 3)),  # of a private pool, in use or not
        segment(5 * 10**9, 0, pool=[1, 0]),
        segment(9 * 10**9, 0, device=1),
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 23 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 8 * 10**9)
    here, _ = residency.rooms(device)
    assert (here.free, here.total) == (20 + 3 + 2, 80)


def test_a_limit_counts_like_a_smaller_card(machine, monkeypatch):
    device = machine(80, 64)
    monkeypatch.setenv(residency.LIMIT_VARIABLE, "30.5")
    assert residency.limit() == 30.5
    assert residency.usable(device) == 30.5 and residency.require(FLUX_DEV, "bf16", 23.8, device) == (TEXT,)
    monkeypatch.setenv(residency.LIMIT_VARIABLE, "6.5")
    with pytest.raises(NoRoomError, match=r"6\.5 GB of them"):
        residency.require(FLUX_DEV, "bf16", 23.8, device)


@pytest.mark.parametrize("said", ["", None])
def test_without_a_limit_there_is_none(monkeypatch, said):
    monkeypatch.delenv(residency.LIMIT_VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(residency.LIMIT_VARIABLE, said)
    assert residency.limit() == math.inf


@pytest.mark.parametrize("said", ["much", "0", "-3", "nan"])
def test_a_limit_that_is_no_number_is_refused_before_anything_is_loaded(monkeypatch, said):
    monkeypatch.setenv(residency.LIMIT_VARIABLE, said)
    with pytest.raises(RequestError, match=residency.LIMIT_VARIABLE):
        Studio("cpu")


def test_a_containers_limit_counts(tmp_path):
    real = residency._host(tmp_path)  # no such files
    (tmp_path / "memory.max").write_text("1500000000\n")
    (tmp_path / "memory.current").write_text("700000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\ninactive_file 100000000\n")
    limited = residency._host(tmp_path)
    assert limited.total == pytest.approx(1.5) and limited.free == pytest.approx(min(0.9, real.free), rel=0.1)
    (tmp_path / "memory.max").write_text("max\n")
    assert residency._host(tmp_path).total == real.total


# ---------------------------------------------------------------------------------------------------------------------
# A Studio that carries plans out; its device is the CPU, told to have room for few


def test_refusing_comes_before_loading(monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "load_shared", never)
    monkeypatch.setattr(loading, "load_transformer", never)
    huge = replace(MINI_FLUX, memory_gb=Memory(transformer=1, shared=1e6, run=1, host=1))
    with pytest.raises(UnsupportedError, match="GB of host memory"):
        Studio("cpu").rendition(huge, Column.of("bf16", "post"), print)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A tiny FLUX with the sizes it really has, in GB."""
    made = tiny.spec("flux.1-dev", tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux"))
    shared = loading.load_shared(made, torch.device("cpu"))
    modules = [part for part in shared.values() if isinstance(part, torch.nn.Module)]
    denoiser = loading.load_transformer(made, torch.device("cpu"))
    memory = [weight_bytes(*parts) / residency.GB for parts in ([denoiser], modules)]
    return replace(made, memory_gb=Memory(transformer=memory[0], shared=memory[1], run=0, host=0))


@pytest.fixture
def crowded(monkeypatch, spec):
    """A Studio on a CPU that plays a device with room for text encoders, VAE and so many bf16 denoisers, beside a host
    with so many GB to wait in."""

    def make(denoisers, host=10.0):
        device = spec.memory_gb.shared + denoisers * spec.memory_gb.transformer
        monkeypatch.setattr(residency, "capacity", lambda *_: device)
        monkeypatch.setattr(residency, "waiting_room", lambda *_: host)
        return Studio("cpu")

    return make


def places(studio):
    return {part.key[1]: part.place for part in studio._shelf.parts}


def never():
    return False


def test_a_denoiser_waits_and_comes_back_unchanged(crowded, spec, tmp_path):
    studio, told = crowded(1.7), []  # bf16 and one that is quantized, or two of these
    request = replace(CompareRequest.create("a cat", model="flux.1-dev"), num_inference_steps=1, height=64, width=64)
    request = replace(request, recipe="full")

    def made(name):
        rendition = studio.rendition(spec, Column.of(name, "full"), told.append)
        return studio.generate(rendition, spec, request, tmp_path, told.append, never)[1].pixels

    with torch.inference_mode():
        first = {name: made(name) for name in ("bf16", "mxfp8")}
        bf16 = studio._renditions[spec.id, "bf16", ""]
        assert {key[1] for key in studio._warm} == {"bf16", "mxfp8"}
        first["nvfp4"] = made("nvfp4")
        assert places(studio) == {"bf16": HOST, "mxfp8": DEVICE, "nvfp4": DEVICE, "": DEVICE}
        assert bf16.pipeline.transformer.proj_out.weight.is_meta
        assert {key[1] for key in studio._warm} == {"mxfp8", "nvfp4"}, "what was moved is not warm any more"
        told.clear()
        assert torch.equal(made("bf16"), first["bf16"])
        assert [type(event).__name__ for event in told[:2]] == ["Loading", "Warming"]
        assert studio._renditions[spec.id, "bf16", ""] is bf16
        for name in ("mxfp8", "nvfp4", "bf16"):
            assert torch.equal(made(name), first[name])


def test_recordings_are_given_up_before_anything_is_refused(crowded, spec, monkeypatch):
    """A recording's memory is its denoiser's alone: with the denoiser it leaves, so it is no reason to refuse."""
    studio = crowded(1.1)
    first = studio.rendition(spec, Column.of("bf16", "full"), print)
    forgotten, room = [], residency.capacity()
    monkeypatch.setattr(first.blocks, "forget", lambda: forgotten.append("bf16"))
    monkeypatch.setattr(residency, "capacity", lambda *_: room if forgotten else 0.7 * room)
    assert studio.rendition(spec, Column.of("bf16", "full"), print) is first and not forgotten, (
        "what is there stays warm"
    )
    studio.rendition(spec, Column.of("mxfp8", "full"), print)
    assert forgotten and places(studio)["mxfp8"] == DEVICE


def test_without_room_to_wait_it_is_loaded_again(crowded, spec):
    studio = crowded(1.7, host=0.0)
    for name in ("bf16", "mxfp8", "nvfp4"):
        studio.rendition(spec, Column.of(name, "full"), print)
    shared = studio._shared[spec.id]
    assert set(places(studio)) == {"mxfp8", "nvfp4", ""}
    again = studio.rendition(spec, Column.of("bf16", "full"), print)
    assert again.pipeline.vae is shared["vae"] and not again.pipeline.transformer.proj_out.weight.is_meta


def test_another_model_sends_text_encoders_and_vae_to_wait_and_gets_them_back(crowded, spec):
    studio = crowded(1.1)
    first = studio.rendition(spec, Column.of("bf16", "full"), print)
    studio.rendition(replace(spec, id="other"), Column.of("bf16", "full"), print)
    assert next(first.pipeline.vae.parameters()).is_meta
    vae = studio.shared(spec)["vae"]
    assert not next(vae.parameters()).is_meta, "whoever asks for them has them on the device"
    assert studio.rendition(spec, Column.of("bf16", "full"), print) is first
    assert not next(first.pipeline.transformer.parameters()).is_meta


def test_if_host_memory_cannot_be_had_after_all_it_is_forgotten(crowded, spec, monkeypatch):
    studio = crowded(1.1)
    monkeypatch.setattr(studio._pool, "store", lambda modules: None)
    for name in ("bf16", "mxfp8"):
        studio.rendition(spec, Column.of(name, "full"), print)
    assert set(places(studio)) == {"mxfp8", ""}


def test_what_fits_by_no_means_is_refused_with_the_numbers(crowded, spec):
    with pytest.raises(UnsupportedError, match=r"FLUX\.1-dev in bf16 needs 0\.0 GB of host memory"):
        crowded(0.9, host=0.0).rendition(spec, Column.of("bf16", "full"), print)


def test_a_rendition_that_is_used_again_is_brought_back_by_warming(crowded, spec):
    studio = crowded(1.1)
    first = studio.rendition(spec, Column.of("bf16", "full"), print)
    studio.rendition(spec, Column.of("mxfp8", "full"), print)
    assert next(first.pipeline.transformer.parameters()).is_meta
    request = replace(CompareRequest.create("a cat", model="flux.1-dev"), height=64, width=64)
    studio.warm(first, spec, request, print, never)
    assert places(studio)["bf16"] == DEVICE


def test_what_really_ran_says_where_everything_was(crowded, spec):
    studio = crowded(1.7)
    for name in ("bf16", "mxfp8", "nvfp4", "bf16"):
        studio.rendition(spec, Column.of(name, "full"), print)
    assert studio.where((spec.id, "bf16", "")).startswith("all weights in host memory")
    studio.device = CUDA
    said = studio.where((spec.id, "bf16", ""))
    assert "on the device before the clock started (denoiser back from pinned host memory" in said
    assert f"also there: {spec.id} nvfp4 full" in said
    assert f"waiting in pinned host memory: {spec.id} mxfp8 full" in said


def test_a_switch_is_measured_and_leaves_everything_as_it_was(crowded, spec):
    studio = crowded(1.1)
    assert studio.switch(spec, Column.of("bf16", "full")) is None, "it is not loaded"
    rendition = studio.rendition(spec, Column.of("bf16", "full"), print)
    weight = rendition.pipeline.transformer.proj_out.weight.clone()
    found = studio.switch(spec, Column.of("bf16", "full"))
    assert found["gigabytes"] == pytest.approx(spec.memory_gb.transformer)
    assert min(found["to_host_s"], found["to_device_s"]) > 0
    assert torch.equal(rendition.pipeline.transformer.proj_out.weight, weight)
    assert studio.rendition(spec, Column.of("bf16", "full"), print) is rendition
    studio = crowded(1.1, host=0.0)
    studio.rendition(spec, Column.of("bf16", "full"), print)
    assert studio.switch(spec, Column.of("bf16", "full")) is None and places(studio)["bf16"] == DEVICE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_a_denoiser_that_waited_makes_the_same_picture(spec, tmp_path, monkeypatch):
    """With compiled blocks and CUDA graphs, whose addresses have changed."""
    room = spec.memory_gb.shared + 1.7 * spec.memory_gb.transformer
    monkeypatch.setattr(residency, "capacity", lambda *_: room)
    studio = Studio("cuda")
    request = replace(CompareRequest.create("a cat", model="flux.1-dev"), num_inference_steps=4, height=64, width=64)
    request = replace(request, recipe="full")

    def made(name):
        rendition = studio.rendition(spec, Column.of(name, "full"), print)
        generation, output = studio.generate(rendition, spec, request, tmp_path, print, never)
        assert "on the device before the clock started" in generation.ran["Residency"]
        return output.pixels.cpu()

    with torch.inference_mode():
        first = {name: made(name) for name in ("bf16", "mxfp8", "nvfp4")}
        assert places(studio)["bf16"] == HOST
        for name in ("bf16", "mxfp8", "nvfp4", "bf16"):
            assert torch.equal(made(name), first[name])
