"""The safety filter, with stand-ins for its classifiers: tiny, random, and biased to one verdict."""

import re
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from engine import catalog
from engine.errors import LoadError, RefusedError, RequestError
from engine.request import CompareRequest
from engine.runtime.device import Device
from engine.safety import FRAMES, NO_FILTER, PIECE, Filter, Guard
from tests.support import tiny

REAL = catalog.MODELS["flux.1-schnell"]
BLACK, WHITE = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)


def reader(folder, verdict, labels=("safe", "nsfw")):
    """A text classifier that always gives one verdict."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": 512}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words).save_pretrained(folder)
    config = DistilBertConfig(
        vocab_size=2, dim=8, n_heads=1, n_layers=1, hidden_dim=8, id2label=dict(enumerate(labels))
    )
    return _biased(DistilBertForSequenceClassification(config), verdict, folder)


def viewer(folder, verdict=None):
    """A picture classifier that always gives one verdict; without one it takes white for unsafe."""
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    sizes = {"image_size": 8, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=8, id2label={0: "normal", 1: "nsfw"}))
    if verdict is None:
        with torch.no_grad():
            projection = model.vit.embeddings.patch_embeddings.projection
            projection.weight[:] = 0
            projection.weight[0] = 1
            model.vit.embeddings.cls_token[:] = 0
            model.vit.embeddings.position_embeddings[:] = 0
    return _biased(model, verdict, folder)


def _biased(model, verdict, folder):
    if verdict is not None:
        head = model.classifier
        with torch.no_grad():
            head.weight[:] = 0
            head.bias[:] = torch.tensor([0.0, 0.0])
            head.bias[verdict] = 10
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def guard(tmp_path):
    def make(prompts=0, pictures=0, **changes):
        models = {"prompts": reader(tmp_path / "reader", prompts), "pictures": viewer(tmp_path / "viewer", pictures)}
        return Guard(Filter(on=True, **(models | changes)))

    return make


@pytest.mark.parametrize(
    ("environment", "public", "on"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"TWINFRAME_FILTER": "on"}, False, True),
        ({"TWINFRAME_FILTER": "off"}, True, False),
    ],
)
def test_on_by_default_where_strangers_can_reach_it_and_its_absence_is_said(environment, public, on, caplog):
    chosen = Filter.from_environment(environment, public)
    assert chosen.applies(REAL) is on and not chosen.applies(catalog.MINI_FLUX)
    assert chosen.about(catalog.MINI_FLUX) == ""
    said = chosen.about(REAL)
    assert ("Falconsai/nsfw_image_detection" in said) is on
    assert (said == "There is no safety filter here.") is (public and not on)
    assert ("no safety filter" in caplog.text) is (public and not on)


def test_the_classifiers_are_those_of_a_commit():
    """A name alone would be whatever its owner puts there tomorrow."""
    for name in (Filter.prompts, Filter.pictures):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)


@pytest.mark.parametrize(("task", "folder"), [("text-classification", "reader"), ("image-classification", "viewer")])
def test_the_revision_is_asked_for(monkeypatch, task, folder):
    asked = []

    def pipeline(task, model, revision, **_):
        asked.append((task, model, revision))
        raise OSError("offline")

    monkeypatch.setattr("transformers.pipeline", pipeline)
    guard = Guard(Filter(on=True))
    with pytest.raises(LoadError):
        guard.prompt(REAL, "a cat") if folder == "reader" else guard.outputs(REAL, BLACK)
    name, _, revision = (Filter.prompts if folder == "reader" else Filter.pictures).partition("@")
    assert asked == [(task, name, revision)]


def test_other_classifiers_and_a_wrong_word():
    said = {"TWINFRAME_FILTER": "on", "TWINFRAME_FILTER_PROMPTS": "a/b", "TWINFRAME_FILTER_PICTURES": "c/d@e"}
    chosen = Filter.from_environment(said, public=False)
    assert (chosen.prompts, chosen.pictures) == ("a/b", "c/d@e")
    with pytest.raises(RequestError, match="TWINFRAME_FILTER must be on or off, not 'maybe'"):
        Filter.from_environment({"TWINFRAME_FILTER": "maybe"}, public=True)


def test_a_prompt_passes_or_not(guard):
    guard(prompts=0).prompt(REAL, "a cat " * 300)
    with pytest.raises(RefusedError, match="stopped this prompt"):
        guard(prompts=1).prompt(REAL, "a cat")
    guard(prompts=1).prompt(catalog.MINI_FLUX, "a cat")
    guard(prompts=1, threshold=1.1).prompt(REAL, "a cat")


def test_the_end_of_a_long_prompt_is_read_too(guard, monkeypatch):
    looking, read = guard(), []
    monkeypatch.setitem(vars(looking), "_prompts", lambda texts, **_: read.extend(texts) or [[]])
    prompt = "".join(chr(0x4E00 + i) for i in range(2000))
    looking.prompt(REAL, prompt)
    assert {c for piece in read for c in piece} == set(prompt) and max(map(len, read)) <= PIECE
    assert prompt[PIECE - 5 : PIECE + 5] in "|".join(read), "nothing is torn apart everywhere"


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 33, 3, 32, 32)])
def test_what_is_made_passes_or_not(guard, shape):
    guard(pictures=0).outputs(REAL, torch.rand(shape))
    with pytest.raises(RefusedError, match="stopped what was made"):
        guard(pictures=1).outputs(REAL, torch.rand(shape))
    guard(pictures=1).outputs(catalog.MINI_FLUX, torch.rand(shape))


def test_every_picture_and_frames_all_along_a_clip_are_looked_at(guard, monkeypatch):
    seen = []
    looking = guard()
    monkeypatch.setitem(
        vars(looking),
        "_pictures",
        lambda pictures: seen.append(pictures[0].getpixel((0, 0))[0]) or [[{"label": "normal", "score": 1.0}]],
    )
    looking.outputs(REAL, torch.cat([BLACK, WHITE]))
    assert seen == [0, 255]
    seen.clear()
    clip = torch.linspace(0, 1, 121)[:, None, None, None].expand(121, 3, 8, 8)[None]
    looking.outputs(REAL, clip)
    assert len(seen) <= FRAMES and seen[0] == 0 and seen[-1] > 230 and seen == sorted(set(seen))


@pytest.mark.parametrize("which", ["prompts", "pictures"])
def test_without_its_classifier_nothing_is_made(tmp_path, which):
    guard = Guard(Filter(on=True, **{which: str(tmp_path / "nothing")}))
    with pytest.raises(LoadError, match="cannot be had, so nothing is made"):
        guard.prompt(REAL, "a cat") if which == "prompts" else guard.outputs(REAL, BLACK)


def test_a_classifier_that_cannot_say_so_is_no_filter(tmp_path):
    folder = reader(tmp_path, 0, labels=("positive", "negative"))
    with pytest.raises(LoadError, match="has no label with nsfw or unsafe"):
        Guard(Filter(on=True, prompts=folder)).prompt(REAL, "a cat")


@pytest.mark.parametrize(("prompts", "pictures", "stopped"), [(1, 0, "prompt"), (0, 1, "what was made"), (0, 0, None)])
def test_a_comparison_that_is_stopped_leaves_nothing(cache, tmp_path, monkeypatch, prompts, pictures, stopped):
    spec = tiny.spec("flux.1-dev", tiny.checkpoint("flux.1-dev", tmp_path / "checkpoint"))
    folder = spec.source
    real = replace(
        spec, bundled=False, configs=folder, memory_gb=catalog.Memory(transformer=0.01, shared=0.01, run=0.0, host=0.0)
    )
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({real.id: real}))
    from engine.weights.source import Source

    filtered = Filter(on=True, prompts=reader(tmp_path / "r", prompts), pictures=viewer(tmp_path / "v", pictures))
    device = Device("cpu", Source.create(folder), filtered)
    assert "A safety filter checks prompts" in device.about_weights(real.id)
    out = tmp_path / "out"
    out.mkdir()
    request = CompareRequest.create("a cat", model=real.id, precisions=["bf16"], num_inference_steps=2, previews=True)
    told = []
    if stopped is None:
        comparison = device.compare(request, out, told.append, lambda: False)
        assert not comparison.request.previews, "nobody looks at previews"
        assert (out / "bf16.png").exists()
    else:
        with pytest.raises(RefusedError, match=stopped):
            device.compare(request, out, told.append, lambda: False)
        assert list(out.iterdir()) == []
        assert bool(told) is (stopped == "what was made"), "a prompt is read before anything is loaded"


def test_no_filter_is_no_filter():
    Guard(NO_FILTER).prompt(REAL, "a cat")
    Guard(NO_FILTER).outputs(REAL, BLACK)
