"""Results as JSON and on disk: the command line's contract, and everything back as it was."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest

from engine.errors import OutputError
from engine.request import CompareRequest
from engine.results import Comparison, Generation, Latency, LayerCounts, LpipsMap, Memory, Metrics, Ruler

CONTRACT = {"model", "device", "versions", "request", "results", "ruler"}
RESULT_CONTRACT = {
    "precision": None,
    "execution": None,
    "files": None,
    "latency_s": {"text", "denoise", "decode", "total"},
    "latency_comparable": None,
    "memory_gb": {"weights", "peak"},
    "layers": {"quantized", "skipped", "left"},
    "lpips": None,
    "psnr_db": None,
}


def generation(precision, folder, *, total=2.0, peak=0.2, native=True, metrics=None):
    return Generation(
        column=precision,
        execution="native" if native else "emulated",
        files=(str(folder / f"{precision}-1.png"), str(folder / f"{precision}-2.png")),
        latency=Latency(text=0.25, denoise=total - 0.5, decode=0.25, total=total),
        latency_comparable=native,
        memory=Memory(weights=0.1, transformer=0.04, peak=peak),
        layers=LayerCounts(quantized=78, skipped=10, left=0),
        ran={"Device": "some machine"},
        metrics=metrics,
    )


@pytest.fixture
def comparison(tmp_path):
    return Comparison(
        request=CompareRequest.create("a cat ✓", precisions=["fp8", "nvfp4"], batch_size=2),
        device="some machine",
        versions={"torch": "1"},
        results=(
            generation("bf16", tmp_path),
            generation(
                "fp8", tmp_path, total=1.6, peak=0.15, metrics=Metrics(lpips=(0.0, 0.5), psnr_db=(math.inf, 20.0))
            ),
            generation(
                "nvfp4",
                tmp_path,
                total=9.0,
                peak=0.25,
                native=False,
                metrics=Metrics(lpips=(0.1, 0.3), psnr_db=(30.0, 20.0)),
            ),
        ),
        ruler=Ruler(floor=0.01, ceiling=0.4, note="How."),
        created="2000-01-01T00:00:00+00:00",
    )


def test_json_has_the_contracts_keys(comparison):
    values = comparison.to_json()
    assert set(values) >= CONTRACT
    assert values["model"] == "mini-flux"
    assert set(values["ruler"]) >= {"floor", "ceiling"}
    for result in values["results"]:
        assert set(result) >= set(RESULT_CONTRACT)
        for key, inner in RESULT_CONTRACT.items():
            assert inner is None or set(result[key]) >= inner, key


def test_json_holds_the_means_and_every_pictures_own(comparison):
    bf16, fp8, nvfp4 = comparison.to_json()["results"]
    assert nvfp4["lpips"] == pytest.approx(0.2) and nvfp4["psnr_db"] == pytest.approx(25)
    assert nvfp4["lpips_each"] == [0.1, 0.3]
    assert bf16["lpips"] is None and bf16["psnr_db"] is None and bf16["lpips_each"] is None
    assert fp8["psnr_db_each"] == [None, 20.0] and fp8["psnr_db"] is None  # JSON has no infinity


def test_json_is_strict_and_comes_back_equal(comparison):
    text = json.dumps(comparison.to_json(), allow_nan=False)
    assert Comparison.from_json(json.loads(text)) == comparison


def test_every_frames_lpips_comes_back(comparison):
    frames = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    clips = Metrics(lpips=(0.2, 0.5), psnr_db=(30.0, 20.0), lpips_frames=frames)
    bf16, fp8, nvfp4 = comparison.results
    filmed = replace(comparison, results=(bf16, fp8, replace(nvfp4, metrics=clips)))
    values = json.loads(json.dumps(filmed.to_json(), allow_nan=False))
    assert [g["lpips_frames"] for g in values["results"]] == [None, None, [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]]
    assert Comparison.from_json(values) == filmed


def test_a_comparison_recorded_before_there_were_clips_still_loads(comparison):
    values = comparison.to_json()
    for result in values["results"]:
        del result["lpips_frames"], result["lpips_maps"]
    assert Comparison.from_json(values) == comparison


def test_a_comparison_recorded_before_there_were_columns_still_loads(comparison):
    values = comparison.to_json()
    values["request"]["recipe"] = "seed"
    for result in values["results"]:
        del result["column"]
    assert Comparison.from_json(values) == comparison


def test_several_recipes_of_a_format_are_results_of_their_own(comparison, tmp_path):
    request = CompareRequest.create("a cat", precisions=["nvfp4", "nvfp4@tuned"], batch_size=2)
    metrics = Metrics(lpips=(0.1, 0.2), psnr_db=(30.0, 29.0))
    made = [generation(column, tmp_path, metrics=metrics if i else None) for i, column in enumerate(request.precisions)]
    found = replace(comparison, request=request, results=tuple(made))
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    names = [(row["precision"], row["column"]) for row in found.to_json()["results"]]
    assert names == [("bf16", "bf16"), ("nvfp4", "nvfp4"), ("nvfp4", "nvfp4@tuned")]
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(row["precision"], row["recipe"], row["column"]) for row in rows] == [
        ("bf16", "post", "bf16"),
        ("nvfp4", "post", "nvfp4"),
        ("nvfp4", "tuned", "nvfp4@tuned"),
    ]


def test_scores_that_know_the_prompt_come_back_and_are_in_the_table(comparison):
    reference, fp8, nvfp4 = comparison.results
    scored = (replace(reference, scores={"words_read": (1.0, 0.9)}), replace(fp8, scores={"words_read": (0.5, 0.7)}))
    found = replace(comparison, results=(*scored, nvfp4))
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["words_read"] for row in rows] == ["0.95", "0.6", ""]
    assert "words_read" not in comparison.to_csv() and '"scores":' not in json.dumps(comparison.to_json())


def test_lpips_maps_come_back_and_move_with_the_folder(comparison, tmp_path):
    (tmp_path / "old").mkdir()
    made = generation("fp8", tmp_path / "old", metrics=Metrics(lpips=(0.1, 0.2), psnr_db=(30.0, 29.0)))
    maps = tuple(LpipsMap(file=str(tmp_path / "old" / f"fp8-{i}-lpips.png"), top=i / 4) for i in (1, 2))
    replace(comparison, results=(comparison.results[0], replace(made, lpips_maps=maps))).save(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    found = Comparison.load(tmp_path / "new").results[1].lpips_maps
    assert found == tuple(replace(m, file=m.file.replace("/old/", "/new/")) for m in maps)


@pytest.mark.parametrize("kind", ["one", "all"])
def test_pictures_without_a_score_come_back_and_no_mean_counts_them(comparison, kind):
    bf16, fp8, nvfp4 = comparison.results
    scores = (None, 0.5) if kind == "one" else (None, None)
    decibels = (None, math.inf) if kind == "one" else (None, None)
    frames = tuple(None if score is None else (score, score) for score in scores)
    maps = tuple(None if score is None else LpipsMap(file="a.png", top=1.0) for score in scores)
    spoilt = Metrics(lpips=scores, psnr_db=decibels, lpips_frames=frames)
    damaged = replace(comparison, results=(bf16, fp8, replace(nvfp4, metrics=spoilt, lpips_maps=maps)))
    values = damaged.to_json()
    assert Comparison.from_json(json.loads(json.dumps(values, allow_nan=False))) == damaged
    assert values["results"][2]["lpips"] == (0.5 if kind == "one" else None)
    assert [row["unscored"] for row in values["results"]] == [None, 0, 1 if kind == "one" else 2]
    moved = damaged.results[2].with_files(str.upper).lpips_maps
    assert [m and m.file for m in moved] == [None, "A.PNG" if kind == "one" else None]


def test_json_without_a_ruler_comes_back_equal(comparison):
    bare = replace(comparison, ruler=None)
    assert bare.to_json()["ruler"] is None
    assert Comparison.from_json(json.loads(json.dumps(bare.to_json()))) == bare


def test_speedup_is_none_wherever_one_side_is_emulated(comparison):
    bf16, fp8, nvfp4 = comparison.results
    assert comparison.speedup(fp8) == pytest.approx(1.25)
    assert comparison.speedup(bf16) == 1
    assert comparison.speedup(nvfp4) is None
    slow = replace(comparison, results=(replace(bf16, latency_comparable=False), fp8, nvfp4))
    assert slow.speedup(fp8) is None


def test_memory_saving_is_a_fraction_of_the_references_peak(comparison):
    bf16, fp8, nvfp4 = comparison.results
    assert comparison.memory_saving(bf16) == 0
    assert comparison.memory_saving(fp8) == pytest.approx(0.25)
    assert comparison.memory_saving(nvfp4) == pytest.approx(-0.25)


def test_the_reference_is_found_wherever_it_stands(comparison):
    assert replace(comparison, results=comparison.results[::-1]).reference.precision == "bf16"


def test_saved_files_are_named_relative_to_the_folder_and_load_back(comparison, tmp_path):
    assert comparison.save(tmp_path) == tmp_path / "comparison.json"
    assert [f.name for f in tmp_path.iterdir()] == ["comparison.json"]
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["results"][0]["files"] == ["bf16-1.png", "bf16-2.png"]
    assert Comparison.load(tmp_path) == comparison


def test_a_saved_folder_can_be_moved(comparison, tmp_path):
    (tmp_path / "old").mkdir()
    inside = tuple(generation(p, tmp_path / "old") for p in ("bf16", "fp8"))
    replace(comparison, results=inside).save(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    files = Comparison.load(tmp_path / "new").results[1].files
    assert files == (str(tmp_path / "new" / "fp8-1.png"), str(tmp_path / "new" / "fp8-2.png"))


def test_loaded_files_are_absolute_even_from_a_relative_folder(comparison, tmp_path, monkeypatch):
    comparison.save(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert Comparison.load(tmp_path.relative_to(tmp_path.parent)).results == comparison.results


def test_files_elsewhere_keep_their_names(comparison, tmp_path):
    (tmp_path / "here").mkdir()
    comparison.save(tmp_path / "here")
    assert Comparison.load(tmp_path / "here") == comparison


def test_a_folder_that_cannot_be_written(comparison, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(OutputError, match=r"Cannot write .*comparison\.json: .*\.$"):
            comparison.save(folder)


def test_a_save_that_fails_leaves_nothing(comparison, tmp_path):
    (tmp_path / "comparison.json").mkdir()
    with pytest.raises(OutputError):
        comparison.save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["comparison.json"]


def test_a_table_has_a_row_for_each_precision_and_no_speed_of_an_emulation(comparison):
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert [row["precision"] for row in rows] == [g.precision for g in comparison.results]
    assert {row["prompt"] for row in rows} == {comparison.request.prompt}
    for row, made in zip(rows, comparison.results, strict=True):
        assert (row["latency_total_s"] != "") is made.latency_comparable
        assert (row["memory_peak_gb"] == "") is (made.execution == "emulated")
        assert (row["lpips"] == "") is (made.metrics is None)
