"""The bundled checkpoint, and what is said of one that is missing a file or holds a damaged one."""

import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import loading
from engine.catalog import ASSETS, MINI_FLUX, MODELS
from engine.errors import LoadError

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


def test_the_fingerprint_changes_with_the_weights_alone(copied):
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
    assert sum(sizes.values()) <= 90_000_000
    assert any(Path(name).suffix == ".safetensors" for name in sizes)
