"""Apps around a fake worker: quick, slow, and with every model. Those that no test changes serve all files."""

from __future__ import annotations

import pytest

from engine import catalog
from tests.support.fake_engine import FakeWorker, record, served


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A folder with one recorded comparison."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "rocket")
    return folder


@pytest.fixture(scope="session")
def quick(recorded):
    """An app whose worker is done at once."""
    worker = FakeWorker()
    with served(worker, recorded) as url:
        yield url, worker


@pytest.fixture
def slow(recorded):
    """An app whose worker takes its time: `step_seconds` and `stands_at` may be changed while it runs."""
    worker = FakeWorker(step_seconds=0.05, ruler_runs=2)
    with served(worker, recorded) as url:
        yield url, worker
        worker.step_seconds, worker.stands_at = 0, None


@pytest.fixture(scope="session")
def many(recorded):
    """An app that offers every model."""
    worker = FakeWorker()
    with served(worker, recorded, models=tuple(catalog.MODELS)) as url:
        yield url, worker
