"""The benchmark on a device that has no room for all or any of it."""

from dataclasses import replace

import pytest

from engine.benchmark import bench
from engine.catalog import MINI_FLUX, Memory
from engine.errors import NoRoomError
from engine.results import DENOISER, TEXT
from engine.runtime.studio import Studio
from engine.weights import residency
from engine.weights.source import BUNDLED_OR_HUB

WHY = "FLUX miniature in fp8 needs 26.5 GB of GPU memory, and this machine has 30.0 GB, 3.1 GB of them to use here"


@pytest.mark.parametrize(
    ("precisions", "advice"),
    [
        (("bf16", "fp8@full"), "run the precisions apart, each as a command of its own (--precision bf16, then --prec"),
        (("fp8@full",), "choose a smaller model or a larger machine."),
    ],
)
def test_where_not_all_fit_they_are_to_be_run_apart(tmp_path, monkeypatch, precisions, advice):
    def refuse(*_):
        raise NoRoomError(f"{WHY}: choose a smaller model or a larger machine.")

    monkeypatch.setattr(Studio, "rendition", refuse)
    settings = bench.Settings(precisions=precisions, batch_sizes=(1,), steps=1)
    with pytest.raises(NoRoomError) as caught:
        bench.run(MINI_FLUX, settings, "cpu", BUNDLED_OR_HUB, tmp_path / "bench.json")
    assert str(caught.value).startswith(f"{WHY}: {advice}")


def test_what_is_streamed_is_weighed_and_not_timed(tmp_path, monkeypatch):
    spec = replace(MINI_FLUX, memory_gb=Memory(transformer=0.05, shared=0.05, run=0.0, host=0.0))
    monkeypatch.setattr(residency, "streams_text", lambda *_: True)
    monkeypatch.setattr(residency, "capacity", lambda *_: 0.01)
    monkeypatch.setattr(residency, "waiting_room", lambda *_: 10.0)
    settings = bench.Settings(precisions=("bf16",), batch_sizes=(1,), steps=1, repeats=1)
    found = bench.run(spec, settings, "cpu", BUNDLED_OR_HUB, tmp_path / "bench.json")
    (row,) = found["rows"]
    assert row["streamed"] == [TEXT, DENOISER] and row["error"] is None
    assert row["latency_s"] is None and row["first_call_s"] is None and row["repeats"] == 0
    assert row["memory_gb"]["peak_allocated"] > row["memory_gb"]["weights"] > 0
    assert bench.line(row).endswith("streamed: not timed")
