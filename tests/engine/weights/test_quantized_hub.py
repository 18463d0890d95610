"""Quantized checkpoints on the hub as columns: pinned, named after themselves, and one sentence where there is none."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch

from engine import quantized
from engine.catalog import MODELS
from engine.columns import POST, Column
from engine.errors import LoadError, RequestError
from engine.outputs import export, program
from engine.request import CompareRequest
from engine.serving import command_line
from engine.weights import hub, torchao_layout
from engine.weights.source import BUNDLED_OR_HUB, Source
from tests.support import commands

MODEL, COMMIT = MODELS["mini-flux"], "0123abcd" * 5


@pytest.fixture(scope="module")
def repository(tmp_path_factory, cache):
    """A snapshot as the hub's cache has it."""
    out = tmp_path_factory.mktemp("hub") / COMMIT
    export.write(MODEL, Column.parse("nvfp4", MODEL, POST), torch.device("cpu"), BUNDLED_OR_HUB, out)
    return out


@pytest.fixture(autouse=True)
def answers(repository, monkeypatch):
    """A hub that has one repository; gives what it is asked."""
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
        asked.append((name, revision, local_files_only, tuple(allow_patterns)))
        if name != "somebody/Mini.NVFP4":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(repository)

    monkeypatch.setattr(quantized, "_given", {})
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return asked


def test_a_repository_is_a_column_and_its_name_says_the_commit(answers, repository):
    found = torchao_layout.give("somebody/Mini.NVFP4@main")
    assert found.name == "Mini.NVFP4-0123abc" and quantized.named(found.name) is found
    assert (found.repository, found.revision, found.folder) == (
        "somebody/Mini.NVFP4",
        COMMIT,
        repository / "transformer",
    )
    assert [revision for _, revision, *_ in answers] == ["main", COMMIT]  # weights are of the commit that was looked at
    assert all(file.startswith("transformer/") or "twinframe" in file for file in answers[1][3])
    asked = CompareRequest.create("a cat", precisions=[f"nvfp4@{found.name}"])
    assert asked.to_json()["precisions"] == ["bf16", "nvfp4@Mini.NVFP4-0123abc"]


def test_whatever_is_made_of_it_says_where_it_is_from(answers):
    found = torchao_layout.give("somebody/Mini.NVFP4")
    assert found.provenance == {"name": found.name, "repository": "somebody/Mini.NVFP4", "revision": COMMIT}
    text = program.code(
        CompareRequest.create("a cat", precisions=[f"nvfp4@{found.name}"]), f"nvfp4@{found.name}", "native"
    )
    compile(text, "program", "exec")
    assert '"somebody/Mini.NVFP4",' in text and f'revision="{COMMIT}",' in text and 'subfolder="transformer"' in text
    assert replace(found, repository="").provenance == {"name": found.name}


def test_the_app_takes_one_by_a_name_of_its_own():
    name, place = command_line.named_folder("mine=somebody/Mini.NVFP4@v1")
    (found,) = Source.create(stored=[(name, place)]).quantized
    assert (found.name, found.revision) == ("mine", COMMIT)
    with pytest.raises(RequestError, match="is a recipe"):
        Source.create(stored=[("tuned", place)])


@pytest.mark.parametrize(
    ("offline", "sentence"),
    [(True, "is not on this machine and nothing may be fetched offline"), (False, "cannot be fetched from the hub")],
)
def test_one_that_is_not_to_be_had_is_one_sentence(answers, offline, sentence):
    with pytest.raises(LoadError, match=f"^nobody/nothing {sentence}: give a folder"):
        torchao_layout.give("nobody/nothing", offline=offline)
    assert answers[0][2] is offline


def test_the_command_line_says_so_too(monkeypatch, capsys, tmp_path):
    said = commands.refused(monkeypatch, capsys, tmp_path / "out", "compare", "--precision", "nvfp4@nobody/nothing")
    assert "nobody/nothing cannot be fetched from the hub" in said


def test_one_without_weights_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda *_, **__: str(Path(tmp_path)))
    with pytest.raises(LoadError, match="has no weights in safetensors files here"):
        torchao_layout.give("somebody/empty")
