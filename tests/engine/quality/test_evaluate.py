"""Evaluation over prompts: what a folder holds, that a kill loses and repeats nothing, that the numbers are right."""

import csv
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from engine import __main__ as cli
from engine import catalog, environment
from engine.errors import OutputError, RequestError
from engine.metrics import distances, scores, statistics
from engine.outputs import media
from engine.quality import evaluate, prompts, report
from engine.quality.evaluate import Settings
from engine.quantization import recipes
from engine.runtime import pipeline
from engine.runtime.pipeline import Made, token_ids
from engine.runtime.studio import Studio
from engine.weights import loading
from tests.support import tiny
from ui import words
from ui.tabs import quality

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = Settings(precisions=("mxfp8", "nvfp4"), recipes=("full",), steps=1)
NAMES = ("bf16", "floor", "ceiling", "mxfp8-full", "nvfp4-full")


@pytest.fixture
def prompt_file(tmp_path):
    def write(content, name="prompts.txt"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return write


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A random FLUX of a few hundred kilobytes: what is scored means nothing, every path is taken."""
    folder = tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux")
    made = replace(tiny.spec("flux.1-dev", folder), recipes=("post", "full"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, made.id: made}))
        yield made


CHOSEN = prompts.PromptSet(
    name="three.csv",
    counted="line",
    prompts=(
        prompts.Prompt(id=2, category="Animals", text="a cat"),
        prompts.Prompt(id=3, category="Animals", text='a "dog", <b>big</b>'),
        prompts.Prompt(id=5, category="Things", text="a rocket"),
    ),
    repeated=0,
)


@pytest.fixture(scope="module", autouse=True)
def studio(cache):
    """One for all runs in this process, so that every model is loaded and warmed once."""
    with pytest.MonkeyPatch.context() as patch:
        shared = Studio("cpu")
        patch.setattr(evaluate, "studio_on", lambda device, source: shared)
        yield shared


def run(spec, out, settings=SETTINGS, chosen=CHOSEN, say=lambda _: None):
    return evaluate.run(spec, settings, chosen, "cpu", loading.Source(), out, say)


@pytest.fixture(scope="module")
def whole(spec, cache, tmp_path_factory):
    """An uninterrupted evaluation, and the folder that holds it."""
    out = tmp_path_factory.mktemp("whole")
    return run(spec, out), out


def table(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


# What it leaves


def test_a_line_for_each_prompt_precision_and_recipe(whole):
    summary, out = whole
    lines = table(out / "scores.csv")
    assert list(lines[0]) == ["prompt_id", "category", "prompt", "precision", "recipe", "lpips", "psnr_db"]
    assert [(line["prompt_id"], line["precision"], line["recipe"]) for line in lines] == [
        (str(prompt.id), name, "full") for prompt in CHOSEN.prompts for name in ("mxfp8", "nvfp4")
    ]
    assert lines[2]["prompt"] == 'a "dog", <b>big</b>'
    for row in summary["results"]:
        own = [float(line["lpips"]) for line in lines if line["precision"] == row["precision"]]
        assert row["lpips"]["mean"] == pytest.approx(np.mean(own)) and row["lpips"]["n"] == 3
        assert row["lpips"]["low"] <= row["lpips"]["mean"] <= row["lpips"]["high"]
        assert row["categories"]["Animals"]["lpips"]["mean"] == pytest.approx(np.mean(own[:2]))
        assert row["categories"]["Things"]["lpips"]["low"] is None  # of one prompt
    assert json.loads((out / "summary.json").read_text()) == summary


def test_words_that_prompts_ask_for_are_compared_with_what_bf16_wrote(spec, cache, tmp_path, monkeypatch):
    texts = ('a sign that says "cat"', "a rocket", 'a sign that says "dog"')
    chosen = replace(
        CHOSEN, prompts=tuple(prompts.Prompt(id=i, category="", text=text) for i, text in enumerate(texts))
    )
    read = {"bf16": {"cat": 1.0, "dog": 0.5}, "other": {"cat": 0.5, "dog": 0.25}}
    made = []

    def scored(prompt, pixels):
        if prompt == "a rocket":
            return {}
        made.append(prompt)
        of = read["bf16" if made.count(prompt) == 1 else "other"]  # the reference is made first
        return {"words_read": (of["cat" if "cat" in prompt else "dog"],)}

    monkeypatch.setattr(scores, "scored", scored)
    summary = run(spec, tmp_path, chosen=chosen)
    for row in summary["results"]:
        found = row["scores"]["words_read"]
        assert [found[part]["mean"] for part in ("own", "reference", "more")] == pytest.approx([0.375, 0.75, -0.375])
        assert found["own"]["n"] == 2
    lines = table(tmp_path / "scores.csv")
    assert [line["words_read"] for line in lines if line["precision"] == "nvfp4"] == ["0.5", "", "0.25"]
    html = (tmp_path / "report.html").read_text()
    assert "<h2>Words read</h2>" in html and "-0.375" in html


def test_rulers_are_measured_over_the_same_prompts(whole):
    summary, out = whole
    lines = table(out / "rulers.csv")
    assert [(line["prompt_id"], line["ruler"]) for line in lines] == [
        (str(prompt.id), name) for prompt in CHOSEN.prompts for name in ("floor", "ceiling")
    ]
    for name in ("floor", "ceiling"):
        own = [float(line["lpips"]) for line in lines if line["ruler"] == name]
        assert summary["ruler"][name]["lpips"]["mean"] == pytest.approx(np.mean(own))
    assert summary["ruler"]["floor"]["lpips"]["mean"] < summary["ruler"]["ceiling"]["lpips"]["mean"]


def test_only_native_precisions_have_a_latency_and_all_have_memory(whole):
    summary, _ = whole
    assert summary["reference"]["execution"] == "native" and summary["reference"]["latency_s"]["median"] > 0
    for row in summary["results"]:
        assert row["execution"] == "emulated" and row["latency_s"] is None
        assert row["memory_gb"]["peak"] > row["memory_gb"]["weights"] > 0
    weights = [row["memory_gb"]["transformer"] for row in (summary["reference"], *summary["results"])]
    assert weights == sorted(weights, reverse=True)


def test_every_picture_carries_its_recipe(whole):
    _, out = whole
    for prompt in CHOSEN.prompts:
        folder = out / "pictures" / f"{prompt.id:05}"
        assert {file.name for file in folder.iterdir()} == {f"{n}.{kind}" for n in NAMES for kind in ("png", "json")}
        for name in NAMES:
            inside = media.read_recipe(folder / f"{name}.png")
            assert inside["request"]["prompt"] == prompt.text
            assert inside["precision"] == (name.partition("-")[0] if "-" in name else "bf16")
            assert inside["seed"] == (8 if name == "ceiling" else 7)
            assert inside.get("ruler") == (name if name in ("floor", "ceiling") else None)


def test_no_pair_is_both_among_the_worst_and_the_best(whole):
    summary, _ = whole
    for row in summary["results"]:
        worst, best = ([pair["lpips"] for pair in row[kind]] for kind in ("worst", "best"))
        assert worst and best and min(worst) >= max(best)
        assert not {p["prompt_id"] for p in row["worst"]} & {p["prompt_id"] for p in row["best"]}


# Kills


@pytest.fixture
def calls(monkeypatch):
    """Every pipeline run, as (prompt, what it was for); `stop_at` raises out of the n-th."""
    made, stop = [], {}
    original = evaluate._Evaluation._make

    def counted(self, folder, name, rendition, request):
        row = original(self, folder, name, rendition, request)
        if len(made) == stop.get("at"):
            raise KeyboardInterrupt  # the picture is there, its row is not
        made.append((request.prompt, name))
        return row

    monkeypatch.setattr(evaluate._Evaluation, "_make", counted)
    made_and_stop = {"made": made, "stop": stop}
    return made_and_stop


@pytest.mark.parametrize("large", [False, True])
def test_a_run_that_was_stopped_goes_on_and_repeats_nothing(spec, whole, tmp_path, calls, monkeypatch, large):
    if large:  # one precision after the other, over a few prompts each
        monkeypatch.setattr(evaluate, "AT_ONCE", 2)
        spec = replace(spec, memory_gb=catalog.Memory(transformer=0.001, shared=0.001, run=0.001, host=0.001))
    for at in (2, 7, 9):
        calls["stop"]["at"] = at
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path)
        assert not (tmp_path / "scores.csv").exists()
    calls["stop"].clear()
    run(spec, tmp_path)
    assert sorted(calls["made"]) == sorted(itertools.product([p.text for p in CHOSEN.prompts], NAMES))
    for name in ("scores.csv", "rulers.csv"):
        assert (tmp_path / name).read_bytes() == (whole[1] / name).read_bytes()
    assert not list(tmp_path.rglob("*.safetensors"))
    run(spec, tmp_path)
    assert len(calls["made"]) == len(CHOSEN.prompts) * len(NAMES)


def test_what_is_damaged_or_lost_is_made_again(spec, whole, tmp_path, calls):
    run(spec, tmp_path, chosen=replace(CHOSEN, prompts=CHOSEN.prompts[:1]))
    folder = tmp_path / "pictures" / "00002"
    (folder / "mxfp8-full.json").write_text('{"lpips":')
    (folder / "nvfp4-full.png").unlink()
    scores = (tmp_path / "scores.csv").read_bytes()
    calls["made"].clear()
    run(spec, tmp_path, chosen=replace(CHOSEN, prompts=CHOSEN.prompts[:1]))
    assert [name for _, name in calls["made"]] == ["bf16", "mxfp8-full", "nvfp4-full"]  # bf16 to compare with
    assert (tmp_path / "scores.csv").read_bytes() == scores


# Several processes; killed ones are in test_evaluate_ranks.py


def test_whoever_slept_while_another_took_over_finds_all_done(spec, whole, tmp_path, calls, monkeypatch):
    original = evaluate._Evaluation._make

    def sleeping(self, folder, name, *rest):
        if name == "mxfp8-full" and len(calls["made"]) == 3:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(evaluate.Claims, "_is_there", lambda self, name: False)
                run(spec, tmp_path)  # the other one, which thinks that this one is gone
        return original(self, folder, name, *rest)

    monkeypatch.setattr(evaluate._Evaluation, "_make", sleeping)
    assert run(spec, tmp_path) == json.loads((tmp_path / "summary.json").read_text())
    assert sorted(calls["made"]) == sorted(itertools.product([p.text for p in CHOSEN.prompts], NAMES))
    for name in ("scores.csv", "rulers.csv"):
        assert (tmp_path / name).read_bytes() == (whole[1] / name).read_bytes()
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / ".claims").exists()


def test_what_is_made_beside_another_process_of_the_machine_is_not_timed(spec, tmp_path):
    with evaluate.Claims(tmp_path / ".claims"):
        summary = run(spec, tmp_path, chosen=replace(CHOSEN, prompts=CHOSEN.prompts[:1]))
    assert summary["reference"]["latency_s"] is None
    assert summary["reference"]["ran"]["Timing"].startswith("not timed: several processes of one host")
    assert "not timed" in (tmp_path / "report.html").read_text()


def test_a_cpu_goes_on_with_the_threads_that_it_began_with(spec, tmp_path, calls, monkeypatch):
    """They decide how sums are split, and launchers set them."""
    before, seen, original = torch.get_num_threads(), set(), evaluate._Evaluation._make

    def make(*args):
        seen.add(torch.get_num_threads())
        return original(*args)

    calls["stop"]["at"] = 2
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path)
        torch.set_num_threads(1)
        calls["stop"].clear()
        monkeypatch.setattr(evaluate._Evaluation, "_make", make)
        assert run(spec, tmp_path)["threads"] == 2 and seen == {2} and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# Folders that hold something else


def unchanged(out):
    return {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("settings", "chosen", "says"),
    [
        (replace(SETTINGS, steps=2), CHOSEN, "num_inference_steps 1, not 2"),
        (replace(SETTINGS, seed=1), CHOSEN, "seed 7, not 1"),
        (replace(SETTINGS, recipes=("post",)), CHOSEN, "of mxfp8 full, nvfp4 full, not of mxfp8 post, nvfp4 post"),
        (replace(SETTINGS, precisions=("nvfp4",)), CHOSEN, "not of nvfp4 full"),
        (SETTINGS, replace(CHOSEN, prompts=CHOSEN.prompts[:2]), "over other prompts"),
    ],
)
def test_another_evaluations_folder_is_left_alone(spec, whole, settings, chosen, says):
    _, out = whole
    before = unchanged(out)
    with pytest.raises(OutputError, match=re.escape(says)):
        run(spec, out, settings, chosen)
    assert unchanged(out) == before


@pytest.mark.parametrize("key", ["weights", "device", "versions"])
def test_results_of_other_weights_or_machines_do_not_mix(spec, whole, tmp_path, key):
    manifest = json.loads((whole[1] / "manifest.json").read_text())
    manifest[key] = {"torch": "1.0"} if key == "versions" else "another"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match="holds another evaluation"):
        run(spec, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", f'{{"format": {evaluate.FORMAT}}}'])
def test_a_damaged_manifest_is_said_and_nothing_is_lost(spec, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "pictures").mkdir()
    before = unchanged(tmp_path)
    with pytest.raises(OutputError, match=r"manifest\.json is damaged: restore it"):
        run(spec, tmp_path)
    assert unchanged(tmp_path) == before


def test_a_folder_of_something_else_is_left_alone(spec, tmp_path):
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(OutputError, match=r"holds thesis\.doc but no evaluation"):
        run(spec, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.doc"]


# Settings that change between a kill and going on


def _rewritten(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def _other_scheduler(folder, patch):
    _rewritten(folder / "scheduler" / "scheduler_config.json", lambda config: config | {"shift": 3.0})


def _other_configuration(folder, patch):
    _rewritten(folder / "text_encoder_2" / "config.json", lambda config: config | {"feed_forward_proj": "gated-gelu"})


def _other_tokenizer(folder, patch):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b"\n")


def _other_weights(folder, patch):
    """One bit of one weight, with size and time as they were."""
    file = next((folder / "transformer").glob("*.safetensors"))
    state, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def _other_recipe(folder, patch):
    rules = recipes.RECIPES["flux.1-dev", "full"]
    changed = {**recipes.RECIPES, ("flux.1-dev", "full"): replace(rules, min_features=64)}
    patch.setattr(recipes, "RECIPES", MappingProxyType(changed))


def _other_package(folder, patch):
    patch.setattr(environment, "version", lambda package: "0.0.1")


def _other_engine(folder, patch):
    patch.setattr(environment, "ENGINE", "another")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_other_scheduler, "of a checkpoint that has changed since: scheduler"),
        (_other_configuration, "of a checkpoint that has changed since: text_encoder_2"),
        (_other_tokenizer, "of a checkpoint that has changed since: tokenizer"),
        (_other_weights, "of a checkpoint that has changed since: transformer"),
        (_other_recipe, "by a recipe that has changed since: full"),
        (_other_package, "torch "),
        (_other_engine, f"twinframe {environment.ENGINE}, not another"),
    ],
)
def test_a_killed_evaluation_is_not_gone_on_with_when_a_setting_has_changed(spec, tmp_path, calls, change, says):
    shutil.copytree(spec.folder, tmp_path / "model")
    mine, out = replace(spec, source=str(tmp_path / "model")), tmp_path / "out"
    calls["stop"]["at"] = 2
    with pytest.raises(KeyboardInterrupt):
        run(mine, out)
    calls["stop"].clear()
    before, made = unchanged(out), len(calls["made"])
    with pytest.MonkeyPatch.context() as patch:
        change(mine.folder, patch)
        with pytest.raises(OutputError, match=re.escape(says)) as refused:
            run(mine, out)
    assert unchanged(out) == before and len(calls["made"]) == made
    assert str(refused.value).count(". ") == 0 and "ask for the same" in str(refused.value)


def test_a_killed_evaluation_goes_on_when_nothing_has_changed_but_notes(spec, tmp_path, calls):
    shutil.copytree(spec.folder, tmp_path / "model")
    mine = replace(spec, source=str(tmp_path / "model"))
    calls["stop"]["at"] = 2
    with pytest.raises(KeyboardInterrupt):
        run(mine, tmp_path / "out")
    calls["stop"].clear()
    (mine.folder / "README.md").write_text("Notes.")
    for file in mine.folder.rglob("*.*"):
        os.utime(file)  # as a copy of it has another time
    assert run(mine, tmp_path / "out")["prompts"]["count"] == 3


def test_an_evaluation_of_an_older_version_is_left_alone(spec, tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1, "weights": "0123"}')
    with pytest.raises(OutputError, match="of another version of Twinframe: choose another folder"):
        run(spec, tmp_path)


# Prompts


LONG = "a cat and a dog and a rocket and " * 4
COPIES = prompts.PromptSet(
    name="copies.txt",
    counted="line",
    prompts=tuple(
        prompts.Prompt(id=i, category="", text=text)
        # The tokenizers know neither capitals nor what lies beyond 32 tokens.
        for i, text in enumerate(("a cat", "A cat", "a dog", f"{LONG}a cat", f"{LONG}a dog", "a CAT"), start=1)
    ),
    repeated=0,
)


def test_prompts_that_the_model_cannot_tell_apart_are_counted_once_and_said(spec, tmp_path, calls):
    said, settings = [], replace(SETTINGS, precisions=("nvfp4",))
    summary = run(spec, tmp_path / "out", settings, COPIES, said.append)
    found = {key: summary["prompts"][key] for key in ("given", "count", "same")}
    assert found == {"given": 6, "count": 3, "same": {"2": 1, "5": 4, "6": 1}}
    assert {prompt for prompt, _ in calls["made"]} == {"a cat", "a dog", f"{LONG}a cat"}
    assert summary["results"][0]["lpips"]["n"] == summary["ruler"]["floor"]["lpips"]["n"] == 3
    assert [line["prompt_id"] for line in table(tmp_path / "out" / "scores.csv")] == ["1", "3", "4"]
    told = f"3 prompts that {spec.name} cannot tell from another left out: 2 is 1 to it, 5 is 4 to it, 6 is 1 to it"
    assert told in said and f"3 prompts of copies.txt (6 given; {told})" in evaluate.heading(summary)
    page = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "6 were given" in page and "2 as 1, 5 as 4, 6 as 1" in page
    # The distinct ones alone give the same interval, which copies would narrow.
    alone = replace(COPIES, prompts=tuple(p for p in COPIES.prompts if p.id in (1, 3, 4)))
    without = run(spec, tmp_path / "alone", settings, alone)
    assert without["results"][0]["lpips"] == summary["results"][0]["lpips"] and without["prompts"]["same"] == {}
    assert "given" not in evaluate.heading(without)
    # Going on asks the manifest, and no tokenizer.
    calls["made"].clear()
    assert run(spec, tmp_path / "out", settings, COPIES)["prompts"] == summary["prompts"] and not calls["made"]


@pytest.mark.parametrize("model", ["mini-flux", "mini-qwen", "mini-ltx2"])
def test_every_tokenizer_of_a_model_has_to_read_the_same(model):
    found = catalog.MODELS[model]
    parts = loading.load_shared(found, torch.device("cpu"))
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    pipeline = SimpleNamespace(components=parts, prompt_template_encode=template, **parts)

    def read(text):
        return token_ids(pipeline, found, text)

    assert len(read("a cat")) == (2 if model == "mini-flux" else 1)
    assert read("a cat on a red background") == read("a cat on a red background") != read("a dog on a red background")
    far = "a cat on a red background " * 40
    limit = found.call["max_sequence_length"] + found.template_tokens
    assert read(far + "cat") == read(far + "dog") and len(read(far)[-1]) == limit
    if model == "mini-flux":  # T5's knows no digits, CLIP's does
        (clip, t5), (other_clip, other_t5) = read("prompt 0"), read("prompt 31")
        assert t5 == other_t5 and clip != other_clip


def test_drawbench_is_bundled():
    found = prompts.read("drawbench")
    assert len(found.prompts) == 200 and found.repeated == 0
    assert len({prompt.category for prompt in found.prompts}) == 11
    assert [p.id for p in prompts.read("drawbench", 3).prompts] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("p.txt", "a cat\n\n  a dog \r\n", [(1, "", "a cat"), (3, "", "a dog")]),
        ("p.txt", b"\xef\xbb\xbfa caf\xc3\xa9", [(1, "", "a café")]),
        ("p.txt", "a\x0cb\na\u2028b", [(1, "", "a\x0cb"), (2, "", "a\u2028b")]),
        ("p.csv", 'Category,Prompt\nA,"a cat, red"\n,a dog\n', [(2, "A", "a cat, red"), (3, "", "a dog")]),
        ("p.tsv", "Prompts\tCategory\na cat\tA\na dog\n", [(2, "A", "a cat"), (3, "", "a dog")]),
        ("p.json", '["a cat", {"prompt": "a dog", "category": "B"}]', [(1, "", "a cat"), (2, "B", "a dog")]),
    ],
)
def test_prompts_come_from_a_file(prompt_file, name, content, found):
    read = prompts.read(prompt_file(content, name))
    assert [(p.id, p.category, p.text) for p in read.prompts] == found


def test_each_prompt_is_taken_once_however_many_lines_there_are(prompt_file):
    read = prompts.read(prompt_file("".join(f"prompt {i % 9000}\n" for i in range(10_000))))
    assert len(read.prompts) == 9000 and read.repeated == 1000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "has no prompts"),
        ("p.txt", " \n\n", "has no prompts"),
        ("p.txt", "a caf\xe9".encode("latin-1"), "not UTF-8 text (byte 6)"),
        ("p.csv", "", "no column named prompt"),
        ("p.csv", "text,kind\na,b\n", "no column named prompt"),
        ("p.csv", "prompt\n", "has no prompts"),
        ("p.csv", "kind,prompt\nA\n", "Line 2 of"),
        ("p.csv", 'prompt\n"a cat', "cannot be read"),
        ("p.json", "", "has no prompts"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", "[" * 100_000, "not valid JSON"),
        ("p.json", '{"prompt": "a"}', "not a list of prompts"),
        ("p.json", '["a", 3]', "Entry 2 of"),
        ("p.json", '[{"prompt": "a", "category": 1}]', "category of entry 1"),
    ],
)
def test_a_bad_file_is_one_sentence(prompt_file, name, content, says):
    with pytest.raises(RequestError, match=re.escape(says)) as raised:
        prompts.read(prompt_file(content, name))
    assert "\n" not in str(raised.value)


def test_a_prompt_that_the_model_refuses_is_named_with_its_line(spec, cache, tmp_path, prompt_file, monkeypatch):
    chosen = prompts.read(prompt_file(f"a cat\n\n{'x' * 2001}\na dog\n"))
    monkeypatch.setattr(evaluate, "Studio", None)  # before anything is loaded
    with pytest.raises(RequestError, match=r"Line 3 of prompts\.txt: The prompt has 2001 characters.*--skip-refused"):
        run(spec, tmp_path / "out", chosen=chosen)
    assert not (tmp_path / "out").exists()
    said = []
    taken, refused = evaluate._taken(spec, replace(SETTINGS, skip_refused=True), chosen, said.append)
    assert [prompt.id for prompt in taken.prompts] == [1, 4] and refused == [3]
    assert said == [f"1 prompts that {spec.name} does not take are left out"]
    with pytest.raises(RequestError, match="takes none of the prompts"):
        evaluate._taken(spec, replace(SETTINGS, skip_refused=True), replace(chosen, prompts=chosen.prompts[1:2]), print)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompts", "missing.txt"), "There is no file missing.txt"),
        (("--prompts", "/"), "Cannot read /"),
        (("--prompts", "drawbench", "--limit", "0"), "limit is 0"),
        (("--prompts", "drawbench", "--limit", "1", "--precision", "bf16"), "nothing to compare with bf16"),
        (("--prompts", "drawbench", "--limit", "1", "--precision", "int3"), "no precision 'int3'"),
        (("--prompts", "drawbench", "--limit", "1", "--recipe", "post", "mine"), "no recipe 'mine'"),
        (("--prompts", "drawbench", "--limit", "1", "--steps", "0"), "num_inference_steps is 0"),
        (("--prompts", "drawbench"), "Entry 67 of drawbench"),
        ((), "--prompts"),
    ],
)
def test_a_mistake_exits_2_with_one_sentence(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(sys, "argv", ["engine", "evaluate", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and says in said.err
    assert len(said.err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


# Numbers


def test_the_interval_is_the_percentile_bootstraps():
    assert statistics.interval([0.0, 1.0]) == (0.0, 1.0)  # each end has a quarter of the resamples
    assert statistics.interval([0.5]) is None
    assert statistics.interval([0.25] * 5) == (0.25, 0.25)
    values = np.random.default_rng(1).normal(0.3, 0.1, 400)
    low, high = statistics.interval(values)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    assert statistics.interval(values) == (low, high)


def test_pairs_that_are_equal_have_no_finite_psnr():
    rows = [
        (prompt, {"lpips": score, "psnr_db": psnr, "temporal_lpips": None, "unscored": False})
        for prompt, score, psnr in zip(CHOSEN.prompts, (0.0, 0.1, 0.3), (None, 30.0, 20.0), strict=True)
    ]
    found = evaluate._scored(rows, ["Animals"])
    assert found["equal"] == 1 and found["psnr_db"]["mean"] == 25.0 and found["lpips"]["n"] == 3


@pytest.fixture(scope="module")
def moving():
    """A smooth clip: a picture that drifts."""
    torch.manual_seed(0)
    still = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), 64, mode="bicubic")[0].clamp(0.2, 0.8) * 2 - 1
    return torch.stack([still.roll(step, dims=2) for step in range(6)])


def test_flicker_counts_in_time_and_a_change_of_colour_does_not(moving):
    cpu = torch.device("cpu")
    flicker = torch.tensor([0.3, -0.3] * 3).view(-1, 1, 1, 1)
    flickering, brighter = moving + flicker, moving + 0.3
    by_frame = [distances.clip_distance(clip, moving, cpu)[0].mean() for clip in (flickering, brighter)]
    in_time = [distances.temporal_distance(clip, moving, cpu) for clip in (flickering, brighter)]
    assert by_frame[0] == pytest.approx(by_frame[1], rel=0.5)  # frame by frame they are much the same
    assert in_time[0] > 0.02 and in_time[1] == pytest.approx(0, abs=1e-4)
    assert distances.temporal_distance(moving, moving, cpu) == 0


def test_a_long_clip_is_compared_in_pieces_that_give_the_same(moving, monkeypatch):
    cpu, other = torch.device("cpu"), moving.flip(0)
    at_once = distances.temporal_distance(moving, other, cpu)
    monkeypatch.setattr(distances, "_PIXELS_AT_ONCE", 2 * 64 * 64)
    assert distances.temporal_distance(moving, other, cpu) == pytest.approx(at_once.item(), rel=1e-5)
    one, two = moving[1] - moving[0], other[1] - other[0]
    pair = distances.temporal_distance(moving[:2], other[:2], cpu)
    assert pair == pytest.approx(distances.lpips_distance(one[None] / 2, two[None] / 2).item(), rel=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        distances.temporal_distance(moving[:1], other[:1], cpu)


def test_clips_are_scored_by_frame_and_in_time(cache, tmp_path, monkeypatch):
    clips = tiny.spec("ltx-2", tiny.checkpoint("ltx-2", tmp_path / "ltx"))
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, clips.id: clips}))
    settings = Settings(precisions=("mxfp8",), steps=2)
    out = tmp_path / "out"
    summary = run(clips, out, settings, replace(CHOSEN, prompts=CHOSEN.prompts[:2]))
    assert list(table(out / "scores.csv")[0])[-1] == "temporal_lpips"
    row = json.loads((out / "pictures" / "00002" / "mxfp8-full.json").read_text())
    assert row["lpips"] == pytest.approx(np.mean(row["lpips_frames"])) and len(row["lpips_frames"]) == 9
    assert summary["results"][0]["temporal_lpips"]["mean"] > 0
    assert media.read_recipe(out / "pictures" / "00002" / "mxfp8-full.mp4")["precision"] == "mxfp8"
    page = (out / "report.html").read_text()
    assert "Temporal LPIPS" in page and page.count("data:image/webp") == 4


# The report


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_stands_alone_and_escapes_prompts(whole):
    summary, out = whole
    page = Page((out / "report.html").read_text())
    assert {"script", "link", "iframe", "b"}.isdisjoint(page.tags)
    assert page.links and all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert 'a "dog", <b>big</b>' in page.text
    for row in summary["results"]:
        assert f"{row['lpips']['mean']:.4f}" in page.text
    assert f"{summary['ruler']['ceiling']['lpips']['mean']:.4f}" in page.text
    assert "10,000 resamples" in page.text and "not comparable" in page.text and summary["device"] in page.text
    assert "quoted" not in page.text  # only one of the post's two recipes was evaluated


def test_the_posts_ablation_stands_beside_ours_with_a_badge(whole):
    summary, out = whole
    both = summary | {"results": [row | {"recipe": r} for r in ("post", "full") for row in summary["results"]]}
    text = Page(report.page(both, out)).text
    assert "quoted: NVIDIA B200" in text and "0.4797" in text and text.index("measured") < text.index("quoted:")


@pytest.mark.parametrize("lost", ["of one", "of all", "the reference of one", "the reference of all"])
def test_pictures_that_are_not_numbers_have_no_score_anywhere(spec, cache, tmp_path, monkeypatch, lost):
    """And count in no mean, interval or extreme, whichever side they are on; also when a killed run goes on."""
    one, making = CHOSEN.prompts[1].text, []

    def finished(made_by, kind, output, usual=pipeline.finished):
        (prompt, name) = making[-1]
        side = "bf16" if "reference" in lost else "nvfp4-full"
        if name == side and (lost.endswith("all") or prompt == one):
            output.images[:] = torch.nan
        return usual(made_by, kind, output)

    def make(self, folder, name, rendition, request, usual=evaluate._Evaluation._make):
        making.append((request.prompt, name))
        return usual(self, folder, name, rendition, request)

    monkeypatch.setattr("engine.runtime.studio.finished", finished)
    monkeypatch.setattr(evaluate._Evaluation, "_make", make)
    out, settings, said = tmp_path / "mine" / "out", replace(SETTINGS, precisions=("nvfp4",)), []
    out.mkdir(parents=True)
    summary = run(spec, out, settings, say=said.append)
    (row,), damaged = summary["results"], 3 if "all" in lost else 1
    assert row["unscored"] == damaged and json.loads((out / "summary.json").read_text()) == summary
    json.dumps(summary, allow_nan=False)
    lines = table(out / "scores.csv")
    empty = [line["prompt"] for line in lines if line["lpips"] == ""]
    assert len(empty) == damaged and (damaged == 3 or empty == [one])
    assert all((line["lpips"] == "") is (line["psnr_db"] == "") for line in lines)
    scored = [float(line["lpips"]) for line in lines if line["lpips"]]
    assert (row["lpips"] is None) is (not scored)
    if scored:
        assert row["lpips"]["mean"] == pytest.approx(np.mean(scored)) and row["lpips"]["n"] == 2
    pairs = [pair["prompt"] for kind in ("worst", "best") for pair in row[kind]]
    assert len(pairs) == 3 - damaged and not set(pairs) & set(empty)
    phrase = "no score: values are not numbers"
    assert sum(phrase in text for text in said) == damaged * (4 if "reference" in lost else 1)
    assert f"{damaged} of 3 prompts: {phrase}" in evaluate.line(row)
    page = Page((out / "report.html").read_text()).text
    assert f"NVFP4 full: {phrase}. This holds for {damaged} of 3 prompts" in page
    if "reference" in lost:
        assert all(summary["ruler"][name]["unscored"] == damaged for name in ("floor", "ceiling"))
        assert f"({damaged} of 3 prompts: {phrase})" in evaluate.ruler(summary)
    assert f"{phrase}. This holds for {damaged} of its prompts" in quality.page(tmp_path / "mine", [])
    # Killed before its last pair, a run knows what the reference was.
    (out / "pictures" / f"{CHOSEN.prompts[1].id:05}" / "nvfp4-full.json").unlink()
    assert run(spec, out, settings)["results"][0]["unscored"] == damaged


def test_values_that_are_not_numbers_are_said(whole):
    summary, out = whole
    spoilt = summary | {"results": [summary["results"][0] | {"not_numbers": 2}]}
    assert "2 outputs have values that are not numbers" in Page(report.page(spoilt, out)).text


# The command


def test_one_command_makes_the_posts_ablation(spec, cache, tmp_path, capsys, monkeypatch, prompt_file):
    monkeypatch.setattr(Studio, "distance", scored := _counted(Studio.distance))
    line = ["engine", "evaluate", "--model", spec.id, "--precision", "mxfp8", "nvfp4", "--recipe", "full", "seed"]
    line += ["--prompts", prompt_file("a cat\na dog\na cat\n"), "--steps", "1", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", [*line, "--out", str(tmp_path / "out")])
    cli.main()
    said = capsys.readouterr()
    printed = json.loads(said.out)
    assert printed == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(row["precision"], row["recipe"]) for row in printed["results"]] == [
        ("mxfp8", "post"),
        ("mxfp8", "full"),
        ("nvfp4", "post"),
        ("nvfp4", "full"),
    ]
    assert printed["prompts"]["repeated"] == 1 and "1 prompts of prompts.txt came before" in said.err
    assert "14 of 14" in said.err and " left\n" in said.err
    assert len(scored.calls) == 12
    assert "quoted" in (tmp_path / "out" / "report.html").read_text()


def _counted(original):
    def distance(self, made: Made, reference: Made):
        distance.calls.append(made)
        return original(self, made, reference)

    distance.calls = []
    return distance


def test_the_page_draws_an_evaluation(whole, tmp_path):
    summary, out = whole
    (tmp_path / "mine").symlink_to(out)
    html = quality.page(tmp_path, [])
    for row in summary["results"]:
        mean = words.score(row["lpips"]["mean"])
        assert f"<td>{mean}</td><td>{words.quality.ends(row['lpips'])}</td>" in html
    assert html.count('class="tf-dots"') == len(summary["results"])
    assert html.count('class="tf-each"') == len(summary["results"])
