"""What was measured and can be is let through, what cannot be is named, and the constants are counted again."""

from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import catalog
from engine.benchmark import methods
from engine.reproduction import plausibility
from engine.reproduction.cards import CARDS, card
from engine.weights import loading

RECORDED = sorted((catalog.ASSETS / "benchmarks").glob("*.json"))
H200 = catalog.ASSETS / "benchmarks" / "flux.1-dev-h200.json"
BATCHES = catalog.ASSETS / "benchmarks" / "flux.1-dev-h200_batches-4-8.json"


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_every_recorded_benchmark_can_be(file):
    for result in methods.read_all(file):
        checks = plausibility.of_benchmark(result)
        assert [check for check in checks if check.faults] == []
        engines = [c for c, row in zip(checks, result["rows"], strict=True) if row["method"] == "engine"]
        assert all(0.001 < check.bandwidth < 1 and 0.5 < check.weights < 1.01 for check in engines)
        if result["settings"]["width"] != 512:
            assert all(0.25 < check.flops < 0.7 for check in engines)


def faster(row, times):
    row["step_ms"] /= times
    for name in ("median", "p10", "p90", "text", "denoise", "decode"):
        row["latency_s"][name] /= times


def emulate(row):
    row["execution"] = "emulated"


LIES = {
    "faster than the card's peak": lambda row: faster(row, 3),
    "too short to read the weights": lambda row: faster(row, 100),
    "Its weights take": lambda row: row["memory_gb"].update(weights=12.0),
    "less than its weights'": lambda row: row["memory_gb"].update(peak_allocated=20.0),
    "more than the card has": lambda row: row["memory_gb"].update(peak_allocated=200.0),
    "A format that is emulated has a latency": emulate,
    "does not lie between its percentiles": lambda row: row["latency_s"].update(p10=9.0),
    "Its phases take longer": lambda row: row["latency_s"].update(denoise=50.0),
}


@pytest.mark.parametrize("said", LIES)
def test_what_cannot_be_is_named_in_its_row_alone(said):
    result = methods.read(H200)
    LIES[said](result["rows"][0])
    checks = plausibility.of_benchmark(result)
    assert any(said in fault for fault in checks[0].faults), checks[0].faults
    assert not any(check.faults for check in checks[1:])


def test_a_larger_batch_is_not_done_sooner():
    result = methods.read(BATCHES)
    four, eight = (next(r for r in result["rows"] if (r["precision"], r["batch_size"]) == ("fp8", n)) for n in (4, 8))
    for row, value in ((four, 20.0), (eight, 10.0)):
        row["latency_s"] |= {"median": value, "p10": value, "p90": value}
        row["latency_s"] |= dict.fromkeys(("text", "denoise", "decode"))
    faults = [fault for check in plausibility.of_benchmark(result) for fault in check.faults]
    assert faults == ["It takes less time than a batch of 4."]


def test_a_card_that_nobody_knows_is_not_compared():
    result = methods.read(H200) | {"device": "NVIDIA Z9000"}
    assert {(check.flops, check.bandwidth) for check in plausibility.of_benchmark(result)} == {(None, None)}


def summary(**changes):
    row = {
        "precision": "nvfp4",
        "recipe": "post",
        "lpips": {"mean": 0.1},
        "not_numbers": 0,
        "memory_gb": {"weights": 1.0},
    } | changes
    return {
        "model": "mini-flux",
        "ruler": {"ceiling": {"lpips": {"mean": 0.3}}},
        "reference": {"memory_gb": {"weights": 2.0}},
        "results": [row],
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lpips": None}, "No pair of pictures has a score"),
        ({"lpips": {"mean": -0.1}}, "out of its range"),
        ({"lpips": {"mean": 0.5}}, "more than another seed's"),
        ({"not_numbers": 3}, "3 of its pictures"),
        ({"memory_gb": {"weights": 2.5}}, "more than bf16's"),
    ],
)
def test_scores_that_cannot_be_are_named(changes, said):
    assert plausibility.of_quality(summary())[0].faults == ()
    (fault,) = plausibility.of_quality(summary(**changes))[0].faults
    assert said in fault


@pytest.mark.parametrize(
    ("device", "four"),
    [
        ("NVIDIA B200", 10000),
        ("NVIDIA GB200", 10000),
        ("NVIDIA H100 80GB HBM3", 0),
        ("NVIDIA H100 PCIe", 0),
        ("NVIDIA H200", 0),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 2016),
        ("NVIDIA GeForce RTX 5090", 1676),
        ("NVIDIA A100-SXM4-80GB", 0),
    ],
)
def test_cards_are_known_by_what_their_driver_calls_them(device, four):
    assert card(device).four == four


def test_a_cards_narrower_formats_are_never_slower():
    for kind in CARDS:
        assert kind.bf16 <= kind.peak("fp8") <= max(kind.peak("nvfp4"), kind.peak("fp8"))
        assert kind.peak("mxfp8") == kind.peak("fp8")
    assert card("AMD EPYC 9V74") is None


def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def given(model):
    """What one step of a transformer takes at the catalog's settings, batch 1."""
    if model == "flux.1-dev":
        return {
            "hidden_states": meta(1, 4096, 64),
            "encoder_hidden_states": meta(1, 512, 4096),
            "pooled_projections": meta(1, 768),
            "timestep": meta(1),
            "guidance": meta(1),
            "img_ids": meta(4096, 3),
            "txt_ids": meta(512, 3),
        }
    if model == "qwen-image":  # both prompts one after the other
        return {
            "hidden_states": meta(1, 4096, 64),
            "encoder_hidden_states": meta(1, 20, 3584),
            "timestep": meta(1),
            "img_shapes": [[(1, 64, 64)]],
        }
    if model == "flux.2-klein-4b":
        return {
            "hidden_states": meta(1, 4096, 128),
            "encoder_hidden_states": meta(1, 512, 7680),
            "timestep": meta(1),
            "guidance": None,
            "img_ids": meta(1, 4096, 4),
            "txt_ids": meta(1, 512, 4),
        }
    if model == "z-image-turbo":
        return {"x": [meta(16, 1, 128, 128)], "t": meta(1), "cap_feats": [meta(20, 2560)]}
    return {  # both prompts at once
        "hidden_states": meta(2, 6144, 128),
        "audio_hidden_states": meta(2, 126, 128),
        "encoder_hidden_states": meta(2, 1024, 3840),
        "audio_encoder_hidden_states": meta(2, 1024, 3840),
        "timestep": meta(2),
        "sigma": meta(2),
        "num_frames": 16,
        "height": 16,
        "width": 24,
        "fps": 24.0,
        "audio_num_frames": 126,
        "use_cross_timestep": False,
    }


@pytest.mark.parametrize(
    ("model", "calls"),
    [("flux.1-dev", 1), ("qwen-image", 2), ("ltx-2", 1), ("flux.2-klein-4b", 1), ("z-image-turbo", 1)],
)
def test_a_steps_products_are_those_that_pytorch_counts(model, calls):
    network = loading.empty_transformer(catalog.KINDS[model])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**given(model))
    counted = {str(op): flops * calls / 1e12 for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counted.items() if "bmm" in op or "attention" in op)
    linear = sum(counted.values()) - attention
    step = plausibility.STEPS[model]
    assert step.attention == pytest.approx(attention, rel=0.01)
    if model == "ltx-2":
        linear -= text_keys_and_values(network)
    assert step.linear == pytest.approx(linear, rel=0.01)


def text_keys_and_values(network):
    """TFLOP of LTX-2's keys and values of its texts, 1024 tokens of two prompts."""
    names = ("attn2.to_k", "attn2.to_v", "audio_attn2.to_k", "audio_attn2.to_v")
    layers = [module for name, module in network.named_modules() if name.endswith(names)]
    assert len(layers) == 4 * len(network.transformer_blocks)
    return sum(2 * 2 * 1024 * layer.in_features * layer.out_features for layer in layers) / 1e12


def test_a_result_is_not_changed_by_being_checked():
    result = methods.read(H200)
    before = deepcopy(result)
    plausibility.of_benchmark(result)
    assert result == before
