"""Weights from the bundled checkpoint, a folder, the hub or at random, and what is said where they are missing."""

import errno
import shutil
import struct
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file
from torch import nn

from engine.catalog import ASSETS, MINI_FLUX, MODELS
from engine.errors import LoadError
from engine.quantization import capability, recipes
from engine.weights import hub, loading
from engine.weights.source import Source
from tests.support import tiny

SHARDS = sorted(str(f.relative_to(MINI_FLUX.folder)) for f in MINI_FLUX.folder.rglob("*.safetensors"))
SHARD = "transformer/diffusion_pytorch_model-00002-of-00005.safetensors"


def damage(spec, name, content):
    (spec.folder / name).unlink()
    (spec.folder / name).write_bytes(content)


def refused(act, spec):
    with pytest.raises(LoadError) as caught:
        act(spec)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.endswith(".") and "git checkout" in text
    return text


@pytest.mark.parametrize("spec", [m for m in MODELS.values() if m.bundled], ids=lambda m: m.id)
def test_bundled_checkpoints_are_whole(spec):
    loading.check(spec)


def test_a_copy_passes_so_that_what_follows_means_something(copied):
    assert copied.folder != MINI_FLUX.folder and len(SHARDS) >= 5
    loading.check(copied)


@pytest.mark.parametrize("name", ["model_index.json", *SHARDS])
def test_a_missing_file_is_named(copied, name):
    (copied.folder / name).unlink()
    text = refused(loading.check, copied)
    assert str(copied.folder / name) in text and "missing" in text


@pytest.mark.parametrize(
    "name",
    ["vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"],
)
def test_a_missing_configuration_is_named(copied, name):
    (copied.folder / name).unlink()
    assert name in refused(lambda spec: loading.load_pipeline(spec, torch.device("cpu")), copied)


@pytest.mark.parametrize("name", SHARDS)
def test_a_weights_file_that_lacks_its_last_byte_is_named(copied, name):
    whole = (MINI_FLUX.folder / name).read_bytes()
    damage(copied, name, whole[:-1])
    text = refused(loading.check, copied)
    assert str(copied.folder / name) in text
    assert f"{len(whole) - 1} of {len(whole)} bytes" in text


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100])
def test_a_weights_file_cut_within_its_header_is_named(copied, left):
    damage(copied, SHARD, (MINI_FLUX.folder / SHARD).read_bytes()[:left])
    assert str(copied.folder / SHARD) in refused(loading.check, copied)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8628888\n",
        struct.pack("<Q", 4) + b"\xff\xfe{}" + bytes(64),
        struct.pack("<Q", 8) + b"not json" + bytes(64),
        struct.pack("<Q", 2) + b"[]" + bytes(64),
        struct.pack("<Q", 7) + b'{"a":1}' + bytes(64),
        struct.pack("<Q", 2**63) + b"{}",
        bytes(1000),
    ],
    ids=["lfs", "encoding", "text", "list", "no offsets", "length", "zeros"],
)
def test_a_garbage_header_is_named(copied, content):
    damage(copied, SHARD, content)
    assert str(copied.folder / SHARD) in refused(loading.check, copied)


@pytest.mark.parametrize("load", [loading.load_pipeline, loading.load_transformer])
def test_loading_checks_first(copied, load):
    (copied.folder / SHARD).unlink()
    assert SHARD in refused(lambda spec: load(spec, torch.device("cpu")), copied)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_shapes_without_their_configuration(copied, name):
    (copied.folder / name).unlink()
    assert name in refused(loading.empty_transformer, copied)


@pytest.mark.parametrize(
    "name", ["model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors.index.json"]
)
def test_a_garbage_json_file_is_named(copied, name):
    damage(copied, name, b'{"half')
    assert name in refused(lambda spec: loading.load_pipeline(spec, torch.device("cpu")), copied)


def test_the_fingerprint_changes_with_the_weights_and_not_with_the_place(copied):
    before = loading.fingerprint(copied)
    assert before == loading.fingerprint(MINI_FLUX)
    whole = bytearray((MINI_FLUX.folder / SHARD).read_bytes())
    whole[-1] ^= 1
    damage(copied, SHARD, bytes(whole))
    assert loading.fingerprint(copied) != before


def test_the_empty_transformer_has_shapes_and_no_weights():
    empty = loading.empty_transformer(MINI_FLUX)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    real = loading.load_transformer(MINI_FLUX, torch.device("cpu"))
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in empty.named_parameters()}
    assert not real.training
    assert {type(m) for m in real.modules()} == {type(m) for m in empty.modules()}


def test_the_pipeline_is_bf16_and_ready():
    pipeline = loading.load_pipeline(MINI_FLUX, torch.device("cpu"))
    assert type(pipeline).__name__ == MINI_FLUX.pipeline
    for module in (m for m in pipeline.components.values() if isinstance(m, nn.Module)):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert not module.training


def test_assets_stay_small():
    """A Space refuses files over 10 MB, and everybody who clones the repository carries all of them."""
    files = [f for f in ASSETS.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    sizes = {str(f.relative_to(ASSETS)): f.stat().st_size for f in files}
    assert {name: size for name, size in sizes.items() if size >= 10_000_000} == {}
    assert sum(size for name, size in sizes.items() if name.startswith("models/")) <= 220_000_000
    assert any(Path(name).suffix == ".safetensors" for name in sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Other sources

CPU = torch.device("cpu")
FLUX = MODELS["flux.1-dev"]
SHAPES = {"flux.1-dev": {}, "qwen-image": {}, "ltx-2": {"num_frames": 9, "frame_rate": 24.0}}


def sentence(act):
    with pytest.raises(LoadError) as caught:
        act()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.endswith(".")
    return text


@pytest.fixture(scope="module", params=SHAPES)
def small(request, tmp_path_factory):
    """A tiny checkpoint of a real pipeline class in a folder, and a spec whose configurations it is."""
    folder = tiny.checkpoint(request.param, tmp_path_factory.mktemp("small") / request.param)
    return replace(MODELS[request.param], configs=str(folder))


@pytest.mark.parametrize("random", [False, True], ids=["folder", "random"])
def test_every_pipeline_runs_from_a_folder_and_with_random_weights(small, random):
    source = Source(random=True) if random else Source(folder=small.folder)
    pipeline = loading.load_pipeline(small, CPU, source)
    assert type(pipeline).__name__ == small.pipeline
    fixed = dict(small.call) | {"max_sequence_length": 32, small.guidance_argument: 2.0, small.batch_argument: 1}
    with torch.inference_mode():
        made = pipeline(
            "a cat on a mat", height=64, width=64, num_inference_steps=2, output_type="pt", **SHAPES[small.id], **fixed
        )
    if small.modality == "video":
        pixels, sound = torch.as_tensor(made.frames).float(), made.audio
        assert sound.isfinite().all() and sound.std() > 0
        assert pipeline.vae.use_tiling
    else:
        pixels = made.images.float()
    assert pixels.isfinite().all() and pixels.std() > 0.01


def test_random_weights_are_the_same_every_time_and_built_like_real_ones(small):
    first, second = (loading.load_pipeline(small, CPU, Source(random=True)) for _ in range(2))
    real = loading.load_pipeline(small, CPU, Source(folder=small.folder))
    for name, module in real.components.items():
        if not isinstance(module, nn.Module):
            continue
        made, again = first.components[name], second.components[name]
        shapes = {key: (value.shape, value.dtype) for key, value in module.named_parameters()}
        assert {key: (value.shape, value.dtype) for key, value in made.named_parameters()} == shapes
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
        assert not made.training
        for (key, buffer), (_, mine) in zip(module.named_buffers(), made.named_buffers(), strict=True):
            torch.testing.assert_close(mine.to(buffer.dtype), buffer, msg=key)  # computed, not random
        if hasattr(module.config, "_attn_implementation"):
            assert made.config._attn_implementation == module.config._attn_implementation


def test_a_denoiser_from_a_folder_is_the_one_that_was_saved(small):
    loaded = loading.load_transformer(small, CPU, Source(folder=small.folder)).state_dict()
    saved = {}
    for file in (small.folder / "transformer").glob("*.safetensors"):
        saved |= load_file(file)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key].to(torch.bfloat16)) for key in saved)


@pytest.mark.parametrize("source", ["folder", "random"])
def test_each_layer_is_quantized_before_the_next_is_read(small, source, monkeypatch):
    """At no time are two planned layers in bf16, read or still held."""
    support = capability.support("nvfp4", capability.Machine(name="Some CPU", kind="cpu"))
    plan = recipes.plan(loading.empty_transformer(small), recipes.recipe(small.family, "full"), "nvfp4")
    quantize, waiting, most, done = recipes.quantizer(plan, support), set(), 0, []
    exact = []
    read = loading._reader if source == "folder" else loading._random

    def reader(*args):
        inner = read(*args)

        def counted(name, empty):
            nonlocal most
            if name.removesuffix(".weight") in plan.names:
                waiting.add(name.removesuffix(".weight"))
                most = max(most, len(waiting))
            return inner(name, empty)

        return counted

    def place(name, module):
        if name in plan.names:
            exact.append(weakref.ref(module.weight))
        quantize(name, module)
        if name in plan.names:
            waiting.remove(name)
            done.append(name)
            assert sum(weight() is not None for weight in exact) <= 1

    monkeypatch.setattr(loading, read.__name__, reader)
    where = Source(folder=small.folder) if source == "folder" else Source(random=True)
    transformer = loading.load_transformer(small, CPU, where, place=place)
    assert most == 1 and set(done) == plan.names and len(done) > 5
    assert recipes.verify(transformer, plan) == plan.counts


def test_quantizing_on_the_way_equals_quantizing_afterwards():
    support = capability.support("nvfp4", capability.Machine(name="Some CPU", kind="cpu"))
    plan = recipes.plan(loading.empty_transformer(MINI_FLUX), recipes.recipe("mini-flux", "post"), "nvfp4")
    on_the_way = loading.load_transformer(MINI_FLUX, CPU, place=recipes.quantizer(plan, support))
    afterwards = recipes.apply(loading.load_transformer(MINI_FLUX, CPU), plan, support)
    assert recipes.verify(on_the_way, plan) == recipes.verify(afterwards, plan)
    for name in plan.names:
        one, other = on_the_way.get_submodule(name), afterwards.get_submodule(name)
        rows = torch.randn(4, one.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(one(rows), other(rows)), name


def test_a_folder_with_a_folder_for_each_model(small, tmp_path):
    (tmp_path / small.id).symlink_to(small.folder)
    loading.check(small, Source.create(tmp_path))
    loading.check(MINI_FLUX, Source.create(tmp_path))  # its own weights: nothing here is meant for it


def test_the_environment_names_the_folder(small, monkeypatch):
    monkeypatch.setenv("TWINFRAME_WEIGHTS", str(small.folder))
    assert Source.create().folder == small.folder
    assert Source.create(small.folder.parent).folder == small.folder.parent
    assert "choose one" in sentence(lambda: Source.create(random=True))


def test_folders_that_are_no_checkpoint(tmp_path):
    assert f"no folder {tmp_path / 'none'}" in sentence(lambda: Source.create(tmp_path / "none"))
    assert f"{tmp_path} is not a checkpoint" in sentence(lambda: Source.create(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    assert "not of FLUX.1-dev" in sentence(lambda: loading.check(FLUX, Source.create(tmp_path)))
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "flux.1-dev").mkdir()
    source = Source(folder=tmp_path)
    assert f"{tmp_path / 'flux.1-dev'} is not a checkpoint of FLUX.1-dev" in sentence(
        lambda: loading.check(FLUX, source)
    )


def test_a_checkpoint_of_another_model_or_size(small):
    for spec in (MODELS["flux.1-dev"], MODELS["qwen-image"], MODELS["ltx-2"]):
        assert "but not of" in sentence(
            lambda spec=spec: loading.load_transformer(spec, CPU, Source(folder=small.folder))
        )


def test_a_damaged_folder_says_where_to_mend_it(small, tmp_path):
    shutil.copytree(small.folder, tmp_path / "copy")
    file = next((tmp_path / "copy" / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    text = sentence(lambda: loading.load_pipeline(small, CPU, Source(folder=tmp_path / "copy")))
    assert str(file) in text and "cut short" in text and "git" not in text


def test_fingerprints_tell_sources_apart(small, tmp_path):
    shutil.copytree(small.folder, tmp_path / "copy")
    file = next((tmp_path / "copy").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes() + b" ")
    found = {loading.fingerprint(small, Source(folder=folder)) for folder in (small.folder, tmp_path / "copy")}
    assert loading.fingerprint(small, Source(random=True)) == "random"
    assert loading.fingerprint(small) == f"{small.source}@{small.revision}"
    assert len(found) == 2 and "random" not in found


def test_every_result_says_where_its_weights_are_from(small):
    assert loading.described(MINI_FLUX) == "the bundled checkpoint"
    assert loading.described(small, Source(random=True)).startswith("random")
    assert loading.described(small, Source(folder=small.folder.parent)).startswith(
        f"the local folder {small.id}, stored in float32 ("
    )
    assert loading.described(small) == f"{small.source} at revision {small.revision}"


# ---------------------------------------------------------------------------------------------------------------------
# The hub, played by a function in place of huggingface_hub.snapshot_download


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """Set what the hub answers: `answer(token, error)`; nothing is in the local cache."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # whatever this machine's environment says
    asked = []

    def set_up(token=None, error=None, folder=None, gigabytes=0.0, during=None):
        def snapshot_download(repo_id, **options):
            asked.append((repo_id, options))
            if options.get("local_files_only"):
                raise LocalEntryNotFoundError("not cached")
            if error is not None:
                raise error
            if options.get("dry_run"):
                return [SimpleNamespace(file_size=int(gigabytes * 1e9) or 100, will_download=True)]
            if during is not None:
                raise during
            bar = options["tqdm_class"](desc="Reconstructing", total=0, unit="B")
            for _ in range(4):
                bar.update(25)
            return str(folder)

        monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: token)
        return asked

    return set_up


def response(kind, status):
    request = httpx2.Request("GET", "https://huggingface.co")
    return kind("refused", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("spec", "token", "error", "words"),
    [
        (FLUX, None, response(GatedRepoError, 401), ["gated", FLUX.url, "HF_TOKEN", hub.TOKENS]),
        (FLUX, "hf_x", response(GatedRepoError, 403), ["no access", FLUX.url]),
        (FLUX, "hf_x", response(RepositoryNotFoundError, 401), ["does not know this HF_TOKEN", hub.TOKENS]),
        (MODELS["qwen-image"], None, response(RepositoryNotFoundError, 404), ["no access", "--weights"]),
        (MODELS["ltx-2"], None, response(HfHubHTTPError, 503), ["503", "retry later"]),
        (FLUX, "hf_x", LocalEntryNotFoundError("no connection"), ["cannot be reached", "--random-weights"]),
        (FLUX, "hf_x", ConnectionError("refused"), ["cannot be reached", FLUX.url]),
        (FLUX, "hf_x", OSError(errno.ENOSPC, "No space left on device"), ["disk filled up", "kept"]),
        (FLUX, "hf_x", RuntimeError("IO Error: No space left on device (os error 28)"), ["disk filled up"]),
    ],
    ids=[
        "no token",
        "no access",
        "wrong token",
        "no such revision",
        "hub down",
        "offline",
        "refused",
        "disk",
        "xet disk",
    ],
)
def test_what_the_hub_refuses_is_one_sentence(answer, spec, token, error, words):
    during = error if "space" in str(error) else None
    answer(token=token, error=None if during else error, during=during)
    text = sentence(lambda: loading.load_pipeline(spec, CPU))
    assert all(word in text for word in words), text


def test_a_part_in_the_cache_is_not_taken_for_the_whole(answer, small, monkeypatch, tmp_path):
    answer(folder=small.folder)
    shutil.copytree(small.folder, tmp_path / "part")
    next((tmp_path / "part" / "vae").glob("*.safetensors")).unlink()
    monkeypatch.setattr(hub, "cached", lambda spec, patterns: tmp_path / "part")
    assert "not on this machine" in sentence(lambda: loading.check(small))
    loading.load_transformer(small, CPU)  # fetched
    monkeypatch.setattr(hub, "cached", lambda spec, patterns: small.folder)
    loading.check(small)


def test_a_disk_too_small_is_told_before_anything_is_fetched(answer):
    asked = answer(token="hf_x", gigabytes=1e6)
    text = sentence(lambda: loading.load_pipeline(FLUX, CPU))
    assert "1000000.0 GB more" in text and "HF_HOME" in text
    assert asked[-1][1]["dry_run"]


def test_offline_nothing_is_asked(answer):
    asked = answer(token="hf_x")
    text = sentence(lambda: loading.load_pipeline(FLUX, CPU, Source(offline=True)))
    assert "nothing may be fetched" in text and "--weights" in text
    assert all(options["local_files_only"] for _, options in asked)


def test_a_download_is_pinned_tells_its_progress_and_takes_only_what_diffusers_reads(answer, small):
    asked, told = answer(folder=small.folder), []
    loading.load_transformer(small, CPU, told=lambda done, total: told.append((done, total)))
    repository, options = asked[-1]
    assert (repository, options["revision"]) == (small.source, small.revision)
    assert "transformer/*.safetensors" in options["allow_patterns"] and "*" not in options["allow_patterns"]
    assert told[-1] == (100, 100)


def test_a_cancelled_job_leaves_its_download(answer, small, monkeypatch, tmp_path):
    from engine import catalog, events
    from engine.request import CompareRequest
    from engine.runtime.device import Device
    from engine.serving.worker import Job, Worker

    asked = answer(folder=small.folder)
    monkeypatch.setattr(catalog, "MODELS", {small.id: replace(small, memory_gb=None)})
    # From the first byte on.
    monkeypatch.setattr(Job, "stopping", property(lambda job: len(asked) > 1 and (job.cancel() or job.cancelled)))
    worker = Worker((small.id,), Device("cpu"))
    job = worker.submit(CompareRequest.create("a cat", model=small.id, precisions="bf16"), tmp_path / "out")
    told = list(job.events())
    worker.close()
    assert isinstance(told[-1], events.Cancelled)
    assert not any(isinstance(event, (events.Downloading, events.Warming)) for event in told)
    assert len(asked) == 3, "looked for in the cache, measured, begun, and not asked for again"
