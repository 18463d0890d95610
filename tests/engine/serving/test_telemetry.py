"""What Prometheus is told, read as its own client reads it."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.request import CompareRequest
from engine.serving.telemetry import BUCKETS, Telemetry
from tests.support.fake_engine import BLACKWELL, FakeWorker


@pytest.fixture
def told(tmp_path):
    """Name -> family, after three comparisons, one of which ran natively in both its columns and ended well."""
    telemetry = Telemetry()
    asked = CompareRequest.create("a cat", precisions=["nvfp4"])
    *_, done = FakeWorker(support=BLACKWELL).submit(asked, tmp_path).events()
    telemetry.completed(done.comparison)
    telemetry.outcome("completed", 2.5)
    telemetry.outcome("refused")
    telemetry.outcome("fault", 400.0)
    telemetry.fault("OutOfMemoryError")
    text = telemetry.exposition({"twinframe_queue_length": 2, "twinframe_resident_memory_bytes": 1.5e9})
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family, suffix="", **labels):
    return {
        tuple(value for key, value in sample.labels.items() if key not in labels): sample.value
        for sample in family.samples
        if sample.name == family.name + suffix and labels.items() <= sample.labels.items()
    }


def test_each_metric_has_its_type_and_its_samples(told):
    assert {name: family.type for name, family in told.items()} == {
        "twinframe_jobs": "counter",
        "twinframe_faults": "counter",
        "twinframe_job_seconds": "histogram",
        "twinframe_latency_seconds": "histogram",
        "twinframe_queue_length": "gauge",
        "twinframe_resident_memory_bytes": "gauge",
    }
    assert all(family.documentation for family in told.values())
    assert values(told["twinframe_jobs"], "_total") == {("completed",): 1, ("refused",): 1, ("fault",): 1}
    assert values(told["twinframe_faults"], "_total") == {("OutOfMemoryError",): 1}
    assert values(told["twinframe_queue_length"]) == {(): 2}


def test_a_histograms_buckets_hold_the_smaller_ones_too(told):
    family = told["twinframe_job_seconds"]
    buckets = {float(bound): count for (bound,), count in values(family, "_bucket").items()}
    assert buckets == {bound: (bound >= 2.5) + (bound >= 400) for bound in (*BUCKETS, float("inf"))}
    assert (values(family, "_sum"), values(family, "_count")) == ({(): 402.5}, {(): 2})


def test_latencies_are_by_model_column_and_part(told):
    counts = values(told["twinframe_latency_seconds"], "_count")
    parts = ("text", "denoise", "decode", "total")
    assert counts == {("mini-flux", column, part): 1 for column in ("bf16", "nvfp4") for part in parts}
