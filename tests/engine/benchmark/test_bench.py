"""The benchmark on a tiny FLUX on the CPU: what is timed, what is not, and that nothing measured is lost."""

import json
import math
import re
import sys
from dataclasses import replace
from types import MappingProxyType
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torchao.prototype.mx_formats import inference_workflow
from torchao.quantization import quantize_
from torchao.quantization.utils import recommended_inductor_config_setter

from assets.figures import speed_steps
from engine import __main__, catalog
from engine.benchmark import bench, methods, plots
from engine.benchmark.methods import METHODS
from engine.columns import Column
from engine.compiler import compilation, ends
from engine.errors import LoadError, OutputError, RequestError
from engine.quantization import capability
from engine.quantization.capability import Machine
from engine.weights import loading, residency
from tests.support import tiny

ROW = {
    "precision",
    "batch_size",
    "method",
    "execution",
    "latency_s",
    "step_ms",
    "memory_gb",
    "first_call_s",
    "repeats",
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    made = tiny.spec("flux.1-dev", tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("tiny") / "flux"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, made.id: made}))
        yield made


@pytest.fixture
def eager(monkeypatch):
    """Compiling for a CPU takes minutes and is not what is tested."""
    for calls in ("_compiled", "_replayed"):
        monkeypatch.setattr(compilation.Blocks, calls, lambda self: [None] * len(self._blocks))


@pytest.fixture
def measure(spec, tmp_path):
    def run(**settings):
        cheap = {"precisions": ("bf16",), "batch_sizes": (1,), "repeats": 1, "steps": 2}
        return bench.run(spec, bench.Settings(**(cheap | settings)), "cpu", loading.Source(), tmp_path / "b.json")

    return run


def test_native_precisions_are_timed_and_emulated_ones_never(measure, tmp_path):
    result = measure(precisions=("bf16", "mxfp8", "nvfp4"), batch_sizes=(1, 2), repeats=3)
    assert json.loads((tmp_path / "b.json").read_text()) == result
    assert {"device", "versions", "date", "model", "weights", "settings", "rows"} <= result.keys()
    assert [(r["batch_size"], r["precision"]) for r in result["rows"]] == [
        (size, name) for size in (1, 2) for name in ("bf16", "mxfp8", "nvfp4")
    ]
    for row in result["rows"]:
        assert row.keys() >= ROW and row["error"] is None
        memory = row["memory_gb"]
        assert memory["peak_allocated"] > memory["weights"] > 0
        if row["precision"] == "bf16":
            latency = row["latency_s"]
            assert row["execution"] == "native" and row["repeats"] == 3
            assert 0 < latency["p10"] <= latency["median"] <= latency["p90"]
            assert min(latency["text"], latency["denoise"], latency["decode"]) > 0
            assert row["step_ms"] == pytest.approx(latency["denoise"] * 1000 / 2)
        else:
            assert row["execution"] == "emulated" and row["repeats"] == 0
            assert row["latency_s"] is None and row["step_ms"] is None and row["first_call_s"] is None
    weights = {row["precision"]: row["memory_gb"]["weights"] for row in result["rows"]}
    assert weights["bf16"] > weights["mxfp8"] > weights["nvfp4"]


def test_the_bare_call_is_timed_whole(measure):
    rows = measure(methods=("bare", "engine"))["rows"]
    assert [row["method"] for row in rows] == ["engine", "bare"]
    assert rows[1]["latency_s"]["median"] > 0 and rows[1]["latency_s"]["text"] is None and rows[1]["step_ms"] is None
    assert rows[0]["memory_gb"]["weights"] == rows[1]["memory_gb"]["weights"]


def test_the_posts_methods_are_timed_in_turns_and_not_tried_where_they_cannot_run(measure, eager, monkeypatch):
    used = []
    original = bench._Bench._time
    monkeypatch.setattr(
        bench._Bench, "_time", lambda self, lane, request: (used.append(lane), original(self, lane, request))
    )
    rows = measure(precisions=("bf16", "nvfp4"), methods=METHODS, repeats=2)["rows"]
    assert [(r["precision"], r["method"]) for r in rows] == [*(("bf16", m) for m in METHODS), ("nvfp4", "engine")]
    assert [lane.method for lane in used] == [*METHODS] * 2  # in turns
    assert len({id(lane.pipeline.transformer) for lane in used}) == 1  # nothing is quantized: the same weights
    assert [row["compile"]["mode"] for row in rows[:4]] == ["eager", "reduce-overhead", "default", "eager"]
    assert all(row["latency_s"]["median"] > 0 and row["also"] == [] for row in rows[:4])
    assert rows[0]["memory_gb"]["weights"] == pytest.approx(rows[1]["memory_gb"]["weights"])
    assert rows[0]["from_post"]["lpips"] == 0


def test_text_encoders_and_vae_are_compiled_before_anything_is_timed_and_alike_for_all_methods(
    measure, eager, monkeypatch
):
    compiled, at_first_time, original = [], [], bench._Bench._time
    monkeypatch.setattr(ends, "wanted", lambda device, machine: True)
    monkeypatch.setattr(compilation, "configure", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda call, **how: (compiled.append(call), call)[1])

    def timed(self, lane, request):
        at_first_time.append((request.batch_size, len(compiled), self.studio.ends(self.spec)))
        original(self, lane, request)

    monkeypatch.setattr(bench._Bench, "_time", timed)
    rows = measure(methods=("engine", "post", "bare"), batch_sizes=(1, 2))["rows"]
    named = ("text_encoder", "text_encoder_2", "vae")
    count = len(compiled) // 2
    assert at_first_time == [(size, size * count, named) for size in (1, 2) for _ in range(3)] and count
    assert [row["ends"] for row in rows] == [list(named)] * 6


def test_where_the_posts_two_methods_are_one_it_is_measured_once(measure, eager):
    both = measure(methods=("post-default", "post"), batch_sizes=(1, 2))["rows"]
    assert [(row["batch_size"], row["method"], row["also"]) for row in both] == [
        (1, "post", []),
        (1, "post-default", []),
        (2, "post", ["post-default"]),
    ]
    assert [row["compile"]["mode"] for row in both] == ["reduce-overhead", "default", "default"]
    (alone,) = measure(methods=("post-default",), batch_sizes=(2,))["rows"]
    assert (alone["method"], alone["also"]) == ("post-default", [])


@pytest.mark.parametrize("model", catalog.MODELS)
def test_only_the_pictures_models_at_batch_1_have_graphs_of_blocks(model):
    assert methods.block_graphs(model, 1) == ("ltx" not in model)
    assert not methods.block_graphs(model, 4)


def test_a_lane_never_runs_what_another_one_put_into_the_denoiser_they_share(measure, monkeypatch):
    """The calls of a step's blocks, by lane."""
    for calls in ("_compiled", "_replayed"):
        monkeypatch.setattr(
            compilation.Blocks, calls, lambda self, c=calls: [named(c, b.forward) for b in self._blocks]
        )
    seen, ran = {}, []

    def named(name, call):
        return lambda *args, **kwargs: ran.append(name) or call(*args, **kwargs)

    original = bench._Bench._call

    def watched(self, lane, request, **more):
        ran.clear()
        made = original(self, lane, request, **more)
        seen.setdefault(lane.method, set()).update(ran)
        return made

    monkeypatch.setattr(bench._Bench, "_call", watched)
    measure(methods=("engine", "post", "post-default"), repeats=2)
    assert seen == {"engine": set(), "post": {"_replayed"}, "post-default": {"_compiled"}}


def test_where_memory_is_short_one_denoiser_goes_before_the_next_comes(measure, eager, monkeypatch):
    held = []
    original = bench._Bench.rows

    def look(self, group, request, deadline):
        yield from original(self, group, request, deadline)
        group = [(column.format, method) for column, method in group]
        held.append((group, sorted(key[1] for key in self.studio._renditions), sorted(self._posts)))

    monkeypatch.setattr(bench, "TOGETHER", 0)
    monkeypatch.setattr(bench._Bench, "rows", look)
    result = measure(precisions=("bf16", "nvfp4"), methods=("engine", "post", "bare"))
    assert held == [
        ([("bf16", "engine"), ("bf16", "post"), ("bf16", "bare")], ["bf16"], []),
        ([("nvfp4", "engine")], ["nvfp4"], []),
    ]
    assert "one group after the other" in result["settings"]["order"]
    assert len(result["rows"]) == 4


GPU = Machine(name="NVIDIA H100 80GB HBM3", kind="cuda", capability=(9, 0))


@pytest.mark.parametrize(
    ("model", "memory", "groups"),
    [
        (
            "flux.1-dev",
            85,
            [["bf16 engine", "bf16 post", "bf16 post-default", "fp8 engine", "fp8 post", "fp8 post-default"]],
        ),
        (
            "qwen-image",
            85,
            [["bf16 engine", "bf16 post", "bf16 post-default"], ["fp8 engine", "fp8 post", "fp8 post-default"]],
        ),
        (
            "qwen-image",
            150,
            [["bf16 engine", "bf16 post", "bf16 post-default", "fp8 engine", "fp8 post", "fp8 post-default"]],
        ),
    ],
)
def test_as_much_as_fits_is_timed_in_turns(model, memory, groups, monkeypatch):
    """In GB. In bf16 all methods run one denoiser, so that they are together wherever one of them can be."""
    monkeypatch.setattr(bench, "_memory", lambda _: float(memory))
    studio = bench.Studio("cpu", bench.loading.Source(random=True))
    studio.support = {name: capability.support(name, GPU) for name in ("bf16", "fp8")}
    settings = bench.Settings(precisions=("bf16", "fp8"), batch_sizes=(1,), methods=("engine", "post", "post-default"))
    found = bench._Bench(catalog.MODELS[model], settings, studio, print).groups()
    assert [[f"{column.format} {method}" for column, method in group] for group in found] == groups


def test_the_posts_denoiser_takes_memory_for_its_quantized_weights_alone(spec, monkeypatch):
    """MXFP8, which torchao's own configuration stores on any machine."""
    studio = bench.Studio("cpu", loading.Source())
    settings = bench.Settings(precisions=("mxfp8",), batch_sizes=(1,), methods=("engine", "post"))
    held, original = [], bench.quantize_
    monkeypatch.setattr(
        bench, "quantize_", lambda layers, *a, **k: (held.append(layers["layer"].weight), original(layers, *a, **k))
    )
    with torch.inference_mode():
        measured = bench._Bench(spec, settings, studio, print)
        engines = studio.rendition(spec, Column.of("mxfp8", spec.recipes[0]), print).pipeline.transformer
        posts = measured._post("mxfp8", engines)[0].transformer
    theirs, both = dict(engines.named_parameters()), dict(posts.named_parameters())
    quantized = {name for name, own in both.items() if type(own.data) is not torch.Tensor}
    assert 0 < len(quantized) < len(both) and len(held) == len(quantized)
    assert not any(exact.numel() for exact in held)  # nor while it is loaded
    for name in both.keys() - quantized:
        assert both[name].data_ptr() == theirs[name].data_ptr(), name
    for name in quantized:
        assert both[name].qdata.data_ptr() != theirs[name].qdata.data_ptr(), name


def test_weights_that_differ_are_not_shared():
    one, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.bias.data = one.bias.data.clone()
    before = one.weight.clone()
    bench._share(one, other)
    assert torch.equal(one.weight, before) and one.bias.data_ptr() == other.bias.data_ptr()


def test_the_posts_methods_are_measured_once_for_each_format(monkeypatch):
    """They have the post's recipe, whatever the engine's columns have."""
    monkeypatch.setattr(bench, "_memory", lambda _: 1000.0)
    studio = bench.Studio("cpu", bench.loading.Source(random=True))
    studio.support = {name: capability.support(name, GPU) for name in ("bf16", "fp8")}
    settings = bench.Settings(
        precisions=("fp8", "fp8@full", "bf16", "fp8@post"), batch_sizes=(1,), methods=("engine", "post")
    )
    (found,) = bench._Bench(catalog.MODELS["flux.1-dev"], settings, studio, print).groups()
    assert [(column.written("post"), method) for column, method in found] == [
        ("fp8", "engine"),
        ("fp8", "post"),
        ("fp8@full", "engine"),
        ("bf16", "engine"),
        ("bf16", "post"),
    ]


def test_two_columns_of_a_format_are_told_apart():
    timed = {"execution": "native", "batch_size": 1, "method": "engine", "latency_s": {"median": 1.0}}
    bf16, fp8 = (timed | {"precision": name} for name in ("bf16", "fp8"))
    full = fp8 | {"column": "fp8@full"}
    rows = [bf16, fp8, full]
    assert plots.other(full, rows, "fp8", "engine") is full, "its own, where there is one"
    assert plots.other(bf16, rows, "fp8", "engine") is fp8
    assert [plots.label(methods.column_of(row)) for row in plots.timed({"rows": rows[::-1]})] == [
        "bf16",
        "FP8",
        "FP8 full",
    ]


@pytest.mark.parametrize(("batch_sizes", "groups"), [((1, 4), 1), ((4, 8), 2)])
def test_denoisers_stay_together_only_if_the_largest_batch_runs_beside_them(batch_sizes, groups, monkeypatch):
    """LTX-2's two on 150 GB: at batch 8 they ran out of memory."""
    monkeypatch.setattr(bench, "_memory", lambda _: 150.0)
    settings = bench.Settings(precisions=("bf16", "fp8"), batch_sizes=batch_sizes)
    studio = bench.Studio("cpu", bench.loading.Source(random=True))
    found = bench._Bench(catalog.MODELS["ltx-2"], settings, studio, print).groups()
    assert len(found) == groups
    assert [(column.format, method) for group in found for column, method in group] == [
        ("bf16", "engine"),
        ("fp8", "engine"),
    ]


def test_a_run_that_is_killed_leaves_what_it_measured(measure, tmp_path, monkeypatch):
    calls = []
    original = bench._Bench._time

    def interrupted(self, lane, request):
        calls.append(lane)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, lane, request)

    monkeypatch.setattr(bench._Bench, "_time", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(batch_sizes=(1, 2), repeats=2)
    first, second = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert first["repeats"] == 2 and first["latency_s"]["median"] > 0
    assert second["repeats"] == 0 and second["latency_s"] is None and second["memory_gb"]["peak_allocated"] > 0


@pytest.fixture
def compiles(monkeypatch):
    """Has something compile in the whole calls with these numbers, from 0."""

    def set_(*spoilt):
        calls, compiled = [], []
        original = bench._Bench._call

        def call(self, lane, request, warming=False):
            if not warming:
                compiled.extend([1] * (len(calls) in spoilt))
                calls.append(lane)
            return original(self, lane, request, warming=warming)

        monkeypatch.setattr(bench._Bench, "_call", call)
        monkeypatch.setattr(compilation, "graphs_compiled", lambda: len(compiled))
        return calls

    return set_


def test_a_call_in_which_something_compiled_is_left_out_and_made_again(measure, compiles):
    calls = compiles(0, 2)
    (row,) = measure(repeats=3)["rows"]
    assert len(calls) == 5 and row["repeats"] == 3 and row["error"] is None
    assert row["compile"]["timed_calls_left_out"] == 2


def test_a_lane_that_compiles_in_every_call_is_not_comparable(measure, compiles):
    calls = compiles(*range(100))
    (row,) = measure(repeats=3)["rows"]
    assert len(calls) == bench.SPOILT and row["repeats"] == 0 and row["latency_s"] is None
    assert row["error"] == "not comparable: something was compiled or recorded in each of 3 timed calls"
    assert "not comparable" in bench.line(row)


def test_a_call_in_which_a_step_was_recorded_is_left_out_too(measure, monkeypatch):
    recorded = iter([0, 0, 0, 1] + [1] * 100)
    monkeypatch.setattr(compilation.Blocks, "recorded", property(lambda _: next(recorded)))
    (row,) = measure(repeats=1)["rows"]
    assert row["repeats"] == 1 and row["compile"]["timed_calls_left_out"] == 1


def test_what_nobody_else_can_use_holds_the_pools_of_cuda_graphs_whole(monkeypatch):
    def segment(pool, total, allocated, device=0):
        return {"segment_pool_id": pool, "total_size": total, "allocated_size": allocated, "device": device}

    segments = [segment((0, 0), 100, 60), segment((0, 1), 50, 10), segment((2, 0), 8, 8), segment((0, 1), 70, 0, 1)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 78)
    assert residency.held_bytes(torch.device("cuda", 0)) == 78 + 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["mini-flux", "mini-qwen"])
def test_on_a_gpu_every_lane_replays_what_it_says(model, tmp_path):
    settings = bench.Settings(precisions=("bf16",), batch_sizes=(1,), methods=METHODS, repeats=2, steps=4, profile=True)
    result = bench.run(catalog.MODELS[model], settings, "cuda", loading.Source(), tmp_path / "b.json")
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(METHODS) and all(row["error"] is None and row["repeats"] == 2 for row in rows.values())
    for row in rows.values():
        assert row["compile"]["timed_calls_left_out"] == row["compile"]["cuda_graphs_given_up"] == 0
        memory = row["memory_gb"]
        assert memory["weights"] < memory["peak_allocated"] <= memory["peak_reserved"]
    ran = {method: row["compile"] for method, row in rows.items()}
    assert ran["engine"]["steps_replayed"] >= 4 and ran["bare"]["steps_replayed"] >= 4
    assert ran["post"]["cuda_graphs_recorded"] > 4 and ran["post"]["steps_replayed"] == 0
    assert ran["post-default"]["cuda_graphs_recorded"] == ran["post-default"]["steps_replayed"] == 0
    assert rows["engine"]["from_post"]["lpips"] < 0.3
    assert all(product["alone"] for part in result["profiles"] for product in part["floor"]["gemm"])


def test_the_time_limit_ends_a_run_after_the_row_that_passes_it(measure):
    result = measure(batch_sizes=(1, 2), repeats=5, time_limit=0)
    assert [(row["batch_size"], row["repeats"]) for row in result["rows"]] == [(1, 1)]
    assert "time limit" in result["stopped"]


def test_a_lane_that_fails_says_why_and_the_others_go_on(measure, monkeypatch):
    original = bench._Bench._call

    def fails(self, lane, request, **more):
        if request.batch_size == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return original(self, lane, request, **more)

    monkeypatch.setattr(bench._Bench, "_call", fails)
    one, two, three = measure(batch_sizes=(1, 2, 3))["rows"]
    assert one["error"] is None and three["error"] is None and three["latency_s"] is not None
    assert two["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert two["latency_s"] is None and two["memory_gb"]["peak_allocated"] is None
    assert "OutOfMemoryError" in bench.line(two)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"methods": ("engine", "guess")}, "no method guess"),
        ({"methods": ()}, "no method"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch_sizes": ()}, "batch size"),
        ({"batch_sizes": (99,)}, "batch_size is 99"),
        ({"precisions": ("int3",)}, "int3"),
        ({"steps": 0}, "num_inference_steps is 0"),
        ({"recipe": "mine"}, "no recipe"),
    ],
)
def test_a_mistake_is_said_before_anything_is_loaded(measure, tmp_path, monkeypatch, settings, says):
    monkeypatch.setattr(bench, "Studio", None)
    with pytest.raises(RequestError, match=says):
        measure(**settings)
    assert not (tmp_path / "b.json").exists()


def test_a_target_that_cannot_be_written_is_found_before_measuring(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(bench._Bench, "rows", None)
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OutputError, match=r"b\.json"):
        measure()


def quantized_on_a_b200(config):
    layer = nn.ModuleDict({"layer": nn.Linear(64, 32, dtype=torch.bfloat16)}).requires_grad_(False)
    torch.manual_seed(0)
    layer.layer.weight.normal_()
    quantize_(layer, config, filter_fn=lambda _, name: name == "layer")
    return layer.layer.weight.data


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_the_native_configurations_are_the_posts(name, monkeypatch):
    """They make the same of a weight that is not zero; with what the post's divides by, see
    tests/engine/quantization/test_capability.py."""
    monkeypatch.setattr(inference_workflow, "is_sm_at_least_100", lambda: True)
    b200 = Machine(name="NVIDIA B200", kind="cuda", capability=(10, 0), mslk=True)
    engines = quantized_on_a_b200(capability._config(capability.support(name, b200), None))
    posts = quantized_on_a_b200(bench.POST_CONFIGS[name]())
    assert type(engines) is type(posts) and torch.equal(engines.qdata, posts.qdata)
    assert torch.equal(engines.scale.view(torch.uint8).flatten(), posts.scale.view(torch.uint8).flatten())
    further = getattr(posts, "optional_tensor_attribute_names", [])
    for attribute in (*posts.tensor_attribute_names, *further):
        assert getattr(engines, attribute) == getattr(posts, attribute), attribute


@pytest.mark.parametrize("method", ["post", "post-default"])
def test_a_format_that_the_post_has_not_is_refused_by_its_method(method):
    with pytest.raises(RequestError, match=f"no INT8, so there is none by the method {method}: leave out"):
        bench.Settings(precisions=("bf16", "int8"), batch_sizes=(1,), methods=("engine", method))
    assert bench.Settings(precisions=("bf16", "int8"), batch_sizes=(1,), methods=("engine", "bare"))


def test_a_lane_of_the_post_that_this_machine_cannot_run_says_why(measure, monkeypatch):
    original = capability.detect
    why = "Triton is missing: pip install triton-windows"
    monkeypatch.setattr(capability, "detect", lambda device: replace(original(device), no_compile=why))
    rows = measure(precisions=("bf16",), methods=("engine", "post-default"))["rows"]
    assert {row["method"]: row["error"] for row in rows} == {"engine": None, "post-default": why}


def test_no_lane_records_fp8_graphs_that_cannot_be_replayed(measure, monkeypatch):
    original = capability.support
    monkeypatch.setattr(capability, "support", lambda *args: replace(original(*args), no_graph="it hangs"))
    monkeypatch.setattr(bench.methods, "block_graphs", lambda *_: True)
    rows = measure(precisions=("bf16",), methods=("engine", "post"))["rows"]
    assert {row["method"]: row["error"] for row in rows} == {"engine": None, "post": "it hangs"}


def test_fp8s_options_are_what_torchao_would_set_for_the_whole_process():
    config = torch._inductor.config
    with config.patch(coordinate_descent_tuning=False):
        before = config.get_config_copy()
        recommended_inductor_config_setter()
        after = config.get_config_copy()
        changed = {name for name in after if after[name] != before[name]}
        wanted = bench.POST_OPTIONS["fp8"]
        assert changed <= wanted.keys()
        assert all(after[name] == value for name, value in wanted.items())
        for name in changed - {"coordinate_descent_tuning"}:
            setattr(config, name, before[name])
    assert bench.POST_CONFIGS["fp8"]().set_inductor_config is False


def test_a_line_of_the_table_is_one_line(measure):
    rows = measure(precisions=("bf16", "nvfp4"))["rows"]
    for row in rows:
        assert "\n" not in bench.line(row)
        assert bench.line(row).startswith(row["precision"])
    assert "emulated: not timed" in bench.line(rows[1])


def test_values_that_are_not_numbers_do_not_stop_it(spec, measure, monkeypatch):
    original = loading.load_transformer

    def spoilt(*args, **kwargs):
        transformer = original(*args, **kwargs)
        transformer.proj_out.bias.fill_(math.nan)
        return transformer

    monkeypatch.setattr(loading, "load_transformer", spoilt)
    assert measure()["rows"][0]["latency_s"]["median"] > 0


@pytest.fixture
def command(spec, tmp_path, monkeypatch):
    def run(*arguments):
        line = ["engine", "bench", "--model", spec.id, "--steps", "1", "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [*line, "--out", str(tmp_path / "b.json")])
        __main__.main()

    return run


def test_what_compares_pictures_is_looked_for_before_anything_is_timed(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.distances, "_ALEXNET", tmp_path / "gone.safetensors")
    with pytest.raises(LoadError, match=r"gone\.safetensors is missing"):
        measure(methods=("engine", "post"))
    assert not (tmp_path / "b.json").exists()


def test_the_command_writes_what_it_prints(command, tmp_path, capsys):
    command("--precision", "bf16", "nvfp4", "--batch-size", "1", "2", "--repeats", "1", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "b.json").read_text())
    assert len(printed["rows"]) == 4 and printed["weights"] == "checkpoint"


def test_the_commands_table_has_a_line_a_row(command, capsys):
    command("--precision", "bf16", "--repeats", "1")
    _, header, row = capsys.readouterr().out.splitlines()
    assert header == bench.HEADER and row.startswith("bf16")


# Plots and the table


def row(precision="bf16", batch_size=1, method="engine", seconds=4.0, execution="native"):
    latency = {"median": seconds, "p10": seconds - 0.01, "p90": seconds + 0.01}
    return {
        "precision": precision,
        "batch_size": batch_size,
        "method": method,
        "execution": execution,
        "latency_s": latency,
        "step_ms": None if method == "bare" else 100 * seconds,
        "memory_gb": {"weights": 30.0, "peak_allocated": 35.0 + batch_size},
        "first_call_s": 9.0,
    }


@pytest.fixture
def measured():
    def make(*rows):
        return {
            "device": "NVIDIA H100 & friends",
            "versions": {"torch": "2.11.0"},
            "date": "2026-01-02T03:04:05+00:00",
            "model": "flux.1-dev",
            "weights": "random",
            "settings": {"width": 1024, "height": 512, "num_frames": 1, "num_inference_steps": 28, "recipe": "post"},
            "rows": list(rows),
        }

    return make


def bars(svg):
    """Precision, method, batch size and value of every bar."""
    root = ElementTree.fromstring(svg)
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    return [re.fullmatch(r"(\S+) by (\S+), batch (\d+): (\S+) (?:s|x|GB)", title).groups() for title in titles]


def test_plots_show_seconds_a_picture_speedup_and_memory(measured):
    drawn = plots.drawings(
        measured(row("fp8", 4, seconds=8.0), row("bf16", 4, seconds=16.0), row("fp8", 1, seconds=2.5), row("bf16", 1))
    )
    assert bars(drawn["latency"]) == [
        ("bf16", "engine", "1", "4.000"),
        ("FP8", "engine", "1", "2.500"),
        ("bf16", "engine", "4", "4.000"),
        ("FP8", "engine", "4", "2.000"),
    ]
    assert bars(drawn["speedup"]) == [("FP8", "engine", "1", "1.600"), ("FP8", "engine", "4", "2.000")]
    assert [bar[3] for bar in bars(drawn["memory"])] == ["36.000", "36.000", "39.000", "39.000"]


def test_the_tallest_bar_is_the_largest_value_and_all_are_in_proportion(measured):
    root = ElementTree.fromstring(plots.drawings(measured(row(), row("fp8", seconds=1.0)))["latency"])
    heights = [float(e.get("height")) for e in root.iter() if e.tag.endswith("rect") and len(e)]
    assert heights[0] == pytest.approx(4 * heights[1])


def test_an_emulated_or_failed_row_is_nowhere(measured):
    found = measured(row(), row("nvfp4", execution="emulated"), row("fp8") | {"latency_s": None})
    assert [bar[0] for bar in bars(plots.drawings(found)["latency"])] == ["bf16"]
    assert "speedup" not in plots.drawings(found)
    assert "NVFP4" not in plots.table(found) and "FP8" not in plots.table(found)


def test_the_table_compares_with_bf16_and_with_the_posts_methods(measured):
    rows = [row(), row("fp8", seconds=3.0), row(method="post", seconds=5.0), row("fp8", method="post", seconds=4.5)]
    rows += [row(method="post-default", seconds=6.0)]
    about, _, head, _, *lines = plots.table(measured(*rows, row(method="bare", seconds=3.9))).splitlines()
    assert all(word in about for word in ("1024x512", "28 steps", "random weights", "NVIDIA H100", "2026-01-02"))
    heads = [cell.strip() for cell in head.strip("|").split("|")]
    *lines, _, note = lines
    found = [dict(zip(heads, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in lines]
    assert "has no FP8" in note
    columns = ("Precision", "Method", "vs bf16", "vs post", "vs post-default")
    assert [tuple(f[column] for column in columns) for f in found] == [
        ("bf16", "engine", "–", "1.25x", "1.50x"),
        ("bf16", "post", "–", "–", "1.20x"),
        ("bf16", "post-default", "–", "0.83x", "–"),
        ("bf16", "bare", "–", "1.28x", "1.54x"),
        ("FP8", "engine", "1.33x", "1.50x", "–"),
        ("FP8", "post", "1.11x", "–", "–"),
    ]
    assert "vs post" not in plots.table(measured(row()))


def cells(section):
    """A Markdown table's rows, by head."""
    heads, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heads, *lines)]
    return [dict(zip(split[0], line, strict=True)) for line in split[1:]]


def test_a_section_sets_the_engine_beside_the_posts_method_and_the_bare_pipeline(measured):
    rows = [row(), row("fp8", seconds=2.0), row(method="post", seconds=5.0), row("fp8", method="post", seconds=3.0)]
    rows += [row(method="post-default", seconds=6.0), row("fp8", method="post-default", seconds=7.0)]
    rows = [r | {"repeats": 3, "from_post": {"lpips": 0.0123}} for r in [*rows, row(method="bare", seconds=3.9)]]
    section = plots.section([measured(*rows), measured(row() | {"repeats": 1})])
    first, second, third = cells(section)
    assert (first["precision"], first["step, ms"], first["faster than it"]) == ("bf16", "400.0", "1.25x")
    assert first["over the bare pipeline"] == "+2.6%" and first["LPIPS from the post's"] == "0.0123"
    assert (first["step by default-mode compile, ms"], first["faster than that"]) == ("600.0", "1.50x")
    assert (second["faster than it"], second["faster than bf16"]) == ("1.50x", "2.00x")
    assert third["faster than it"] == "–"
    assert "median of 3 calls" in section and "median of 1 call." in section


def marked(name):
    """What the benchmarks' README holds between two marks."""
    readme = (catalog.ASSETS / "benchmarks" / "README.md").read_text()
    return readme.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def test_the_steps_in_the_benchmarks_readme_are_what_the_script_makes_of_its_file():
    result = json.loads((catalog.ASSETS / "figures" / "speed-steps.json").read_text())
    assert marked("steps") == speed_steps.table(result).strip()


def test_the_table_in_the_benchmarks_readme_is_what_the_tool_makes_of_the_files(capsys, monkeypatch):
    """`python -m engine bench --table assets/benchmarks/*.json`."""
    files = sorted(str(file) for file in (catalog.ASSETS / "benchmarks").glob("*.json"))
    monkeypatch.setattr(sys, "argv", ["engine", "bench", "--table", *files])
    __main__.main()
    assert marked("benchmarks") == capsys.readouterr().out.strip()


def test_a_file_that_is_no_result_is_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "b.json").write_text("no")
    monkeypatch.setattr(sys, "argv", ["engine", "bench", "--table", str(tmp_path / "b.json")])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2 and "is no result of a benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((catalog.ASSETS / "benchmarks").glob("*.json")), ids=lambda file: file.stem)
def test_every_recorded_benchmark_can_be_drawn(file, tmp_path):
    for recorded in methods.read_all(file):
        files = plots.write(recorded, tmp_path / "plots", file.stem)
        assert {f.name for f in files} >= {f"{file.stem}-latency.svg", f"{file.stem}-memory.svg", f"{file.stem}.md"}
        for drawn in (f for f in files if f.suffix == ".svg"):
            assert len(bars(drawn.read_text())) > 0


def test_the_command_draws_what_it_measured(command, tmp_path):
    command("--precision", "bf16", "nvfp4", "--repeats", "1", "--plots", str(tmp_path / "plots"))
    assert {f.name for f in (tmp_path / "plots").iterdir()} == {"b-latency.svg", "b-memory.svg", "b.md"}


def test_plots_that_cannot_be_written_are_one_sentence(measured, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="Choose another folder"):
        plots.write(measured(row()), tmp_path / "taken", "b")


@pytest.mark.parametrize("arguments", [("--methods", "guess"), ("--repeats", "0"), ("--batch-size", "0")])
def test_a_mistake_exits_2_with_one_line(command, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and len(said.err.strip().splitlines()) == 1
