"""The command line as other tools call it: JSON on stdout, one line on stderr and exit 2 for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from engine import __main__ as cli
from engine import catalog
from engine.formats import PRECISIONS
from engine.machine import Machine
from engine.results import Comparison

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a cat on a red background"
COMPARE = ("compare", "--prompt", PROMPT, "--device", "cpu")
CHEAP = ("--steps", "4", "--guidance", "1", "--seed", "7")
"""As in the other tests of the real miniature, so that they share one ruler."""


@pytest.fixture
def command(cache):
    """Run the command line in a process of its own."""

    def run(*args, **variables):
        return subprocess.run(
            [sys.executable, "-m", "engine", *map(str, args)],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def main(cache, monkeypatch, capsys):
    """Run the command line in this process; gives exit status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["engine", *map(str, args)])
        try:
            cli.main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def is_one_line(text):
    assert text.endswith("\n") and len(text.splitlines()) == 1, text
    assert "Traceback" not in text
    return text.strip()


def untouched(folder):
    return not folder.exists() or list(folder.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# What it gives


def test_models_lists_every_model_and_precision(command):
    done = command("models", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["device"]
    assert [m["id"] for m in values["models"]] == list(catalog.MODELS)
    for model in values["models"]:
        state = model["state"]
        assert state == "ready" if catalog.model(model["id"]).bundled else state.endswith(".") and len(state) > 20
        assert list(model["precisions"]) == list(PRECISIONS)
        for support in model["precisions"].values():
            assert support["execution"] in ("native", "emulated", "unavailable")
            assert support["reason"].endswith(".")


def test_models_in_words(main):
    status, out, _ = main("models")
    assert status == 0 and "mini-flux" in out and all(p in out for p in PRECISIONS)


def test_a_driver_too_old_is_told_and_refused_where_a_gpu_was_asked_for(main, monkeypatch, tmp_path):
    from engine.quantization import capability

    monkeypatch.setattr(capability, "_unusable_gpu", lambda: "The NVIDIA driver 535.104.05 is too old.")
    monkeypatch.setattr(capability.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(capability.torch.cuda, "device_count", lambda: 0)
    status, out, _ = main("models", "--json")
    assert status == 0 and "CPU, not on a GPU. The NVIDIA driver 535" in json.loads(out)["note"]
    assert "The NVIDIA driver 535.104.05 is too old." in main("models")[1]
    asked = ("compare", "--prompt", PROMPT, "--device", "cuda", *CHEAP, "--out", tmp_path / "out")
    status, _, err = main(*asked)
    assert status == 2 and is_one_line(err) == "The NVIDIA driver 535.104.05 is too old."
    assert untouched(tmp_path / "out")


def test_models_tells_of_a_damaged_checkpoint(main, monkeypatch, damaged):
    status, out, _ = main("models", "--json")
    assert status == 0
    assert str(damaged) in json.loads(out)["models"][0]["state"]


@pytest.fixture
def roomy(monkeypatch, tmp_path):
    """A machine with room for everything, no token, and a hub cache that is empty."""
    from engine.weights import hub, residency

    room = residency.Room(what="host memory", free=200, total=200)
    monkeypatch.setattr(residency, "rooms", lambda device: (room, room))
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "cached", lambda spec, patterns: None)


def states(main, *args):
    status, out, err = main("models", "--json", *args)
    assert status == 0, err
    return {model["id"]: model["state"] for model in json.loads(out)["models"]}


def test_models_tells_what_stands_in_the_way(main, roomy):
    found = states(main)
    assert found["mini-flux"] == "ready"
    assert "gated" in found["flux.1-dev"] and "HF_TOKEN" in found["flux.1-dev"]
    assert "downloads 58 GB" in found["qwen-image"] and "downloads 68 GB" in found["ltx-2"]
    assert "nothing may be fetched" in states(main, "--offline")["qwen-image"]
    assert set(states(main, "--random-weights").values()) == {"ready"}


def test_models_tells_what_does_not_fit(main, monkeypatch):
    from engine.weights import residency

    room = residency.Room(what="host memory", free=10, total=16)
    monkeypatch.setattr(residency, "rooms", lambda device: (room, room))
    found = states(main, "--random-weights")
    assert found["mini-flux"] == "ready"
    assert "62.2 GB" in found["qwen-image"] and "16.0 GB" in found["qwen-image"]


@pytest.mark.parametrize(
    ("model", "linears", "quantized", "mxfp8", "nvfp4"),
    [
        ("flux.1-dev", 504, 494, 12.34, 6.79),
        ("qwen-image", 846, 360, 34.28, 31.09),
        ("ltx-2", 1370, 1356, 19.52, 10.70),
    ],
)
def test_inspect_of_the_posts_models(main, model, linears, quantized, mxfp8, nvfp4):
    for capability, gigabytes in (("mxfp8", mxfp8), ("nvfp4", nvfp4)):
        values = json.loads(
            main("inspect", "--model", model, "--precision", capability, "--recipe", "post", "--json")[1]
        )
        assert (values["quantized"], values["linears"]) == (quantized, linears)
        assert values["bytes"]["quantized"] / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_inspect_shows_patterns_that_match_nothing(main):
    out = main("inspect", "--model", "ltx-2", "--precision", "nvfp4", "--recipe", "post")[1]
    assert "pattern adaln_single matches no Linear layer." in out
    assert (
        "matches no" not in main("inspect", "--model", "ltx-2", "--precision", "nvfp4", "--recipe", "post-corrected")[1]
    )


def test_random_weights_are_compared_like_any_other(main, monkeypatch, tmp_path):

    monkeypatch.setattr("engine.runtime.studio.RULER_PROMPTS", 1)
    args = ("--steps", "1", "--precision", "bf16", "nvfp4", "--random-weights", "--out", tmp_path / "out", "--json")
    status, out, err = main(*COMPARE, *args)
    assert status == 0, err
    results = json.loads(out)["results"]
    assert [r["precision"] for r in results] == ["bf16", "nvfp4"] and results[1]["lpips"] > 0


def test_inspect_follows_the_contract(command):
    done = command("inspect", "--model", "mini-flux", "--precision", "nvfp4", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert {"linears", "quantized", "skipped", "bytes", "layers"} <= values.keys()
    assert values["bytes"].keys() == {"bf16", "quantized"}
    assert values["bytes"]["quantized"] < 0.5 * values["bytes"]["bf16"]
    assert values["linears"] == len(values["layers"]) and values["quantized"] == sum(
        x["quantized"] for x in values["layers"]
    )
    for layer in values["layers"]:
        keys = {"name", "in", "out", "quantized", "precision", "bytes", "parts", "reason"}
        assert layer.keys() == keys and layer["reason"]


def test_inspect_of_the_full_recipe_quantizes_more(main):
    seed, full = (
        json.loads(main("inspect", "--model", "mini-flux", "--precision", "nvfp4", "--recipe", r, "--json")[1])
        for r in ("post", "full")
    )
    assert full["quantized"] > seed["quantized"] and full["linears"] == seed["linears"]
    assert full["bytes"]["quantized"] < seed["bytes"]["quantized"]


def test_inspect_loads_no_weights(main, monkeypatch):
    from engine.weights import loading

    def never(*_):
        raise AssertionError("loaded weights")

    monkeypatch.setattr(loading, "load_pipeline", never)
    monkeypatch.setattr(loading, "load_transformer", never)
    status, out, _ = main("inspect", "--model", "mini-flux", "--precision", "mxfp8")
    assert status == 0 and "Linear layers in mxfp8" in out


@pytest.fixture(scope="module")
def ruler(worker, ask, tmp_path_factory):
    """The ruler of the cheap settings, measured once and kept for the child processes."""
    job = worker.submit(ask(precisions=["bf16"]), tmp_path_factory.mktemp("ruler"))
    return list(job.events())[-1].comparison.ruler


def test_compare_follows_the_contract_and_repeats_to_the_byte(command, main, ruler, tmp_path):
    """Once in a process of its own and once in this one."""
    outs = [tmp_path / "a", tmp_path / "b" / "deeper"]
    done = command(*COMPARE, *CHEAP, "--precision", "bf16", "nvfp4", "--out", outs[0], "--json")
    assert done.returncode == 0, done.stderr
    status, printed, err = main(*COMPARE, *CHEAP, "--precision", "bf16", "nvfp4", "--out", outs[1], "--json")
    assert status == 0, err
    runs = [json.loads(done.stdout), json.loads(printed)]
    for out, values in zip(outs, runs, strict=True):
        assert {"model", "device", "versions", "request", "results", "ruler"} <= values.keys()
        assert values["request"]["prompt"] == PROMPT and values["request"]["seed"] == 7
        bf16, nvfp4 = values["results"]
        assert (bf16["precision"], nvfp4["precision"]) == ("bf16", "nvfp4")
        assert bf16["lpips"] is None and 0 < nvfp4["lpips"] < 1
        assert nvfp4["execution"] == "emulated" and nvfp4["latency_comparable"] is False
        assert nvfp4["latency_s"].keys() == {"text", "denoise", "decode", "total"}
        assert nvfp4["memory_gb"]["weights"] < bf16["memory_gb"]["weights"] < bf16["memory_gb"]["peak"]
        assert nvfp4["layers"].keys() == {"quantized", "skipped", "left"}
        assert values["ruler"] == {"floor": ruler.floor, "ceiling": ruler.ceiling, "note": ruler.note}
        assert {f.name for f in out.iterdir()} == {"bf16.png", "nvfp4.png", "nvfp4-lpips.png", "comparison.json"}
        assert [f for r in values["results"] for f in r["files"]] == [str(out / "bf16.png"), str(out / "nvfp4.png")]
        assert Comparison.load(out) == Comparison.from_json(values)
    for name in ("bf16.png", "nvfp4.png"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    results = [[(r["lpips"], r["psnr_db"]) for r in values["results"]] for values in runs]
    assert results[0] == results[1]


def test_compare_in_words(main, ruler, tmp_path):
    status, out, err = main(*COMPARE, *CHEAP, "--precision", "bf16", "--out", tmp_path / "out")
    assert status == 0, err
    assert PROMPT in out and str(tmp_path / "out" / "bf16.png") in out and "ruler" in out


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

BAD = {
    "unknown model": (["--model", "maxi-flux"], ["'maxi-flux'", "mini-flux"]),
    "unknown precision": (["--precision", "bf16", "int4"], ["'int4'", *PRECISIONS]),
    "no precision": (["--precision", ""], PRECISIONS),
    "unknown recipe": (["--recipe", "half"], ["'half'", "post", "tuned", "full"]),
    "empty prompt": (["--prompt", ""], ["empty"]),
    "blank prompt": (["--prompt", " \t\n"], ["empty"]),
    "long prompt": (["--prompt", "x" * 151], ["151", "150"]),
    "control characters": (["--prompt", "a\x07b"], ["control characters"]),
    "prompt that is not UTF-8": (["--prompt", "a\udcffb"], ["not text"]),
    "negative seed": (["--seed", "-1"], ["seed", "between 0 and 4294967295"]),
    "big seed": (["--seed", str(2**32)], ["seed", "between 0 and 4294967295"]),
    "fractional seed": (["--seed", "1.5"], ["--seed", "1.5"]),
    "seed in words": (["--seed", "seven"], ["--seed", "seven"]),
    "absurd seed": (["--seed", "9" * 5000], ["--seed"]),
    "no steps": (["--steps", "0"], ["steps", "between 1 and 50"]),
    "many steps": (["--steps", "51"], ["steps", "between 1 and 50"]),
    "low guidance": (["--guidance", "0.5"], ["guidance", "between 1 and 6"]),
    "guidance nan": (["--guidance", "nan"], ["guidance", "nan"]),
    "guidance inf": (["--guidance", "inf"], ["guidance", "inf"]),
    "guidance in words": (["--guidance", "much"], ["--guidance", "much"]),
    "height": (["--height", "512"], ["256x512", "256x256"]),
    "width": (["--width", "255"], ["255x256", "256x256"]),
    "no batch": (["--batch-size", "0"], ["batch_size", "between 1 and 4"]),
    "big batch": (["--batch-size", "5"], ["batch_size", "between 1 and 4"]),
    "frames of a picture": (["--frames", "9"], ["num_frames", "makes pictures"]),
    "frames not 8k+1": (["--model", "ltx-2", "--frames", "120"], ["120", "multiple of 8", "113 or 121"]),
    "sides not divisible": (["--model", "ltx-2", "--width", "770", "--height", "512"], ["multiples of 32", "768x512"]),
    "too many pixels": (["--model", "flux.1-dev", "--width", "2048", "--height", "2048"], ["2,097,152 pixels"]),
    "no weights folder": (["--weights", "/nowhere"], ["no folder /nowhere", "--weights"]),
    "a folder that is no checkpoint": (["--weights", str(ROOT / "tests")], ["not a checkpoint", "model_index.json"]),
    "two sources": (["--weights", str(ROOT), "--random-weights"], ["choose one"]),
    "unknown flag": (["--sampler", "ddim"], ["--sampler"]),
    "unknown flag of two lines": (["--two\nlines"], ["--two"]),
    "stray word": (["stray"], ["stray"]),
    "flag without a value": (["--seed"], ["--seed"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_exits_2_with_one_line_and_writes_nothing(main, tmp_path, case):
    args, words = BAD[case]
    status, out, err = main(*COMPARE, "--out", tmp_path / "out", *args)
    assert status == 2 and out == ""
    line = is_one_line(err)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["command"]),
        (("paint",), ["'paint'", "compare"]),
        (("models", "--colour"), ["--colour"]),
        (("compare",), ["--prompt", "--out"]),
        (("compare", "--prompt", "a cat"), ["--out"]),
        (("inspect",), ["--model", "--precision"]),
    ],
)
def test_a_wrong_command_exits_2_with_one_line(command, args, words):
    done = command(*args)
    assert done.returncode == 2 and done.stdout == ""
    line = is_one_line(done.stderr)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "maxi-flux", "--precision", "nvfp4"), ["'maxi-flux'", "mini-flux"]),
        (("--model", "mini-flux", "--precision", "int4"), ["'int4'", *PRECISIONS]),
        (("--model", "mini-flux", "--precision", "nvfp4", "--recipe", "half"), ["'half'", "post or full or tuned"]),
    ],
)
def test_inspecting_what_is_not_there(main, args, words):
    status, out, err = main("inspect", *args, "--json")
    assert status == 2 and out == ""
    line = is_one_line(err)
    assert all(word in line for word in words)


def test_help_is_no_mistake(command):
    done = command("compare", "--help")
    assert done.returncode == 0 and "--prompt" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("below", [(), ("deeper", "still")])
def test_an_output_folder_below_a_file(main, tmp_path, below):
    (tmp_path / "file").write_text("kept")
    out = tmp_path.joinpath("file", *below)
    status, stdout, err = main(*COMPARE, "--out", out)
    assert status == 2 and stdout == ""
    assert f"Cannot write into {out}" in is_one_line(err)
    assert (tmp_path / "file").read_text() == "kept" and [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("device", ["banana", "cuda:99", "mps"])
def test_a_device_that_is_not_there(main, tmp_path, device):
    status, stdout, err = main(*COMPARE, "--out", tmp_path / "out", "--device", device)
    assert status == 2 and stdout == ""
    assert "cpu" in is_one_line(err)
    assert untouched(tmp_path / "out")


@pytest.fixture
def damaged(copied, monkeypatch):
    """The miniature with one shard cut short, in the place of the real one; gives the shard."""
    shard = sorted((copied.folder / "transformer").glob("*.safetensors"))[-1]
    content = shard.read_bytes()[:-1000]
    shard.unlink()
    shard.write_bytes(content)
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({copied.id: copied}))
    return shard


def test_a_shard_cut_short(main, damaged, tmp_path):
    status, out, err = main(*COMPARE, *CHEAP, "--out", tmp_path / "out", "--json")
    assert status == 2 and out == ""
    assert str(damaged) in err and "cut short" in err and "Traceback" not in err
    assert untouched(tmp_path / "out")


def test_a_missing_shard(main, damaged, tmp_path):
    damaged.unlink()
    status, out, err = main(*COMPARE, *CHEAP, "--out", tmp_path / "out", "--json")
    assert status == 2 and out == ""
    assert f"{damaged} is missing" in err and "Traceback" not in err
    assert untouched(tmp_path / "out")


def test_a_missing_shard_is_told_in_one_line(main, damaged, tmp_path):
    damaged.unlink()
    assert str(damaged) in is_one_line(main(*COMPARE, *CHEAP, "--out", tmp_path / "out", "--json")[2])


def test_a_precision_that_this_machine_cannot_run(main, monkeypatch, tmp_path):
    old = Machine(name="Tesla T4", kind="cuda", capability=(7, 5))
    monkeypatch.setattr("engine.quantization.capability.detect", lambda device: old)
    status, out, err = main(*COMPARE, "--precision", "bf16", "nvfp4", "--out", tmp_path / "out", "--json")
    assert status == 2 and out == ""
    line = is_one_line(err)
    assert "Tesla T4" in line and "7.5" in line
    assert untouched(tmp_path / "out")


@pytest.mark.parametrize("model", ["flux.1-dev", "qwen-image", "ltx-2"])
def test_a_model_too_large_for_this_machine(main, monkeypatch, tmp_path, model):
    from engine.weights import residency

    room = residency.Room(what="host memory", free=10, total=16)
    monkeypatch.setattr(residency, "rooms", lambda device: (room, room))
    status, out, err = main(*COMPARE, "--model", model, "--out", tmp_path / "out", "--json")
    assert status == 2 and out == ""
    line = is_one_line(err)
    assert "GB of host memory" in line and "16.0 GB" in line
    assert untouched(tmp_path / "out")


@pytest.mark.parametrize(("args", "words"), [((), ["gated", "HF_TOKEN"]), (("--offline",), ["--offline", "--weights"])])
def test_a_model_that_is_not_here(main, roomy, monkeypatch, tmp_path, args, words):
    import httpx2
    from huggingface_hub.errors import GatedRepoError

    from engine.weights import hub

    def refuse(*_, **__):
        request = httpx2.Request("GET", "https://huggingface.co")
        raise GatedRepoError("refused", response=httpx2.Response(401, request=request))

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # whatever this machine's environment says
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    status, out, err = main(*COMPARE, "--model", "flux.1-dev", *args, "--out", tmp_path / "out")
    assert status == 2 and out == ""
    line = is_one_line(err)
    assert all(word in line for word in words), line
    assert untouched(tmp_path / "out")


def test_a_run_that_fails_half_way_leaves_nothing(main, monkeypatch, tmp_path):
    from engine.errors import LoadError

    def fail(studio, request, out, tell, stop):
        (out / "bf16.png").write_bytes(b"whole")
        raise LoadError("The file x is missing.")

    monkeypatch.setattr("engine.runtime.studio.Studio.compare", fail)
    status, out, err = main(*COMPARE, "--out", tmp_path / "out", "--json")
    assert (status, out, err) == (2, "", "The file x is missing.\n")
    assert untouched(tmp_path / "out")


def test_an_older_result_is_spared_when_a_run_fails(main, monkeypatch, tmp_path):
    from engine.errors import LoadError

    def fail(studio, request, out, tell, stop):
        (out / "bf16.png").write_bytes(b"new")
        raise LoadError("The file x is missing.")

    (tmp_path / "bf16.png").write_bytes(b"old")
    monkeypatch.setattr("engine.runtime.studio.Studio.compare", fail)
    assert main(*COMPARE, "--out", tmp_path)[0] == 2
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("bf16.png", b"old")]


def test_a_reader_that_closes_the_pipe_early_sees_no_traceback(cache):
    """As in `... | head`."""
    inspect = ["inspect", "--model", "mini-flux", "--precision", "nvfp4", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "engine", *inspect], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
