"""The verdict in one sentence, and scores as they are written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine import catalog
from engine.catalog import Lora
from engine.request import CompareRequest
from engine.results import Comparison
from tests.support import own_catalog
from tests.support.fake_engine import BLACKWELL, RULER
from tests.support.page import (
    PROMPT,
    comparison,
)
from ui import words

MINIATURE = f" {words.verdict.MINIATURE}"


def test_the_verdict_on_one_native_precision(tmp_path):
    said = words.verdict.verdict(comparison(tmp_path, BLACKWELL, precisions=["nvfp4"]))
    assert said == (
        "NVFP4 is 1.44× faster, needs 36% less memory (70% less for the denoiser's weights) and has an LPIPS of 0.054, "
        f"17% of the way from bf16's own noise to another seed.{MINIATURE}"
    )


def test_a_column_of_which_nothing_is_quantized_is_not_taken_for_lossless(tmp_path):
    made = comparison(tmp_path, precisions=["fp8", "nvfp4"])
    assert "under another name" not in words.verdict.verdict(made)
    results = [replace(g, layers=replace(g.layers, quantized=0)) if g.column == "nvfp4" else g for g in made.results]
    said = words.verdict.verdict(replace(made, results=tuple(results)))
    assert said.count("under another name") == 1
    assert "NVFP4 is bf16 under another name: its recipe quantizes no layer here, so choose another." in said


def test_the_verdict_never_speaks_of_an_emulated_speed(tmp_path):
    said = words.verdict.verdict(comparison(tmp_path, precisions=["fp8", "nvfp4"]))
    assert said == (
        "FP8: 1.27× faster, 25% less memory (denoiser −48%), LPIPS 0.0056, 1% of the way to another seed. "
        "NVFP4: 46% smaller weights (denoiser −70%), LPIPS 0.054, 17% of the way to another seed. NVFP4 is emulated, "
        f"so its speed is not compared.{MINIATURE}"
    )
    said = words.verdict.verdict(comparison(tmp_path, precisions=["mxfp8"]))
    assert said == (
        "MXFP8 needs 31% less memory for its weights (46% less for the denoiser's) and has an LPIPS of 0.0066, 1% of "
        f"the way from bf16's own noise to another seed. It is emulated, so its speed is not compared.{MINIATURE}"
    )


def test_only_a_miniature_is_called_one(tmp_path):
    made = comparison(tmp_path)
    large = replace(made, request=CompareRequest.create(PROMPT, model="flux.1-dev"))
    assert words.verdict.MINIATURE in words.verdict.verdict(made)
    assert words.verdict.MINIATURE not in words.verdict.verdict(large)


def test_a_shared_cards_latencies_are_not_to_quote(tmp_path):
    made = comparison(tmp_path, BLACKWELL, precisions=["nvfp4"])
    shared = replace(made, results=tuple(replace(g, shared_card=True) for g in made.results))
    assert words.verdict.ON_SHARED_CARD in words.verdict.verdict(shared)
    assert words.verdict.ON_SHARED_CARD not in words.verdict.verdict(made)
    for one, other in zip(made.results, shared.results, strict=True):
        assert words.stages(other) == f"{words.stages(one)} · shared card, not to quote"
    again = Comparison.from_json(shared.to_json())
    assert all(g.shared_card for g in again.results)
    assert not any(g.shared_card for g in Comparison.from_json(made.to_json()).results)


@pytest.mark.parametrize(
    ("lpips", "place"),
    [
        (0.001, "within bf16's own noise"),
        (0.01, "3% of the way to another seed"),
        (0.15, "49% of the way to another seed"),
        (0.6, "198% of the way to another seed"),
    ],
)
def test_a_score_is_put_into_words_by_its_place_on_the_ruler(lpips, place):
    assert words.verdict.on_the_ruler(lpips, RULER) == place


def test_a_score_too_small_for_four_digits_does_not_read_as_zero():
    assert words.score(0.00003) == "<0.0001"
    assert words.score(0.0) == "0.0000"


def test_what_was_streamed_is_said_and_has_no_speedup(tmp_path):
    made = comparison(tmp_path, BLACKWELL, precisions=["nvfp4"])
    bf16, nvfp4 = made.results
    slow = replace(bf16, streamed=("text encoders", "denoiser"), latency_comparable=False)
    fast = replace(nvfp4, streamed=("text encoders",))
    said = words.verdict.verdict(replace(made, results=(slow, fast)))
    assert "faster" not in said and "slower" not in said
    assert "bf16 does not fit on this device and was streamed from host memory, so not timed." in said
    assert words.no_latency(slow, made.request) == words.STREAMED
    assert words.compare.no_latency_note(slow, made.request) == words.compare.STREAMED_NOTE
    alike = replace(made, results=(replace(bf16, streamed=("text encoders",)), fast))
    assert "1.44× faster" in words.verdict.verdict(alike)
    assert "faster" not in words.verdict.verdict(replace(made, results=(bf16, fast)))


@pytest.mark.parametrize(("stands_for", "far"), [("fp8", "10 times"), ("nvfp4", "10%")])
def test_bf16_without_a_lora_costs_the_same_however_long_it_took(tmp_path, stands_for, far):
    with pytest.MonkeyPatch.context() as patch:
        own_catalog.begin(patch)
        lora = Lora(name="style", scale=1, file=tmp_path / "style", path="style", digest="0")
        catalog.give(spec := catalog.MINI_FLUX.with_loras((lora,)))
        made = comparison(tmp_path, BLACKWELL, precisions=["fp8", "nvfp4"])
        other = {"fp8": "nvfp4", "nvfp4": "fp8"}[stands_for]
        asked = CompareRequest.create(PROMPT, model=spec.id, precisions=["bf16+no-lora", other])
        bf16, *results = (replace(g, column="bf16+no-lora") if g.column == stands_for else g for g in made.results)
        found = replace(made, request=asked, results=(bf16, *results))
        said = words.verdict.verdict(found)
        assert all((found.speedup(g) is None) == (g.column == "bf16+no-lora") for g in found.results)
    assert "bf16 without LoRA: costs the same, LPIPS 0.0" in said and said.count("faster") == 1
    assert f"moves the picture {far} as far." in said
