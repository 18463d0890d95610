"""The load tool: short runs of it against the real app, and the table of tests/README.md, made from its figures."""

import json
from argparse import Namespace

import pytest

from tests.support import load
from tests.support.running import ROOT, running

FIGURES = {
    "crowd": {
        "clients": 60,
        "minutes": 5.0,
        "outcomes": {"result": 100, "queue full": 7},
        "other_outcomes": 0,
        "page_s": {"median": 0.04, "p99": 0.3, "most": 0.81},
    },
    "faults": {
        "kinds": {"a full disk": {"times": 20, "one_sentence": 20, "next_succeeded": 19, "broken_files": 1}},
    },
}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    with running(
        folder, TWINFRAME_OUTPUTS_GB="0.02", TWINFRAME_CACHE=str(folder / "cache"), TWINFRAME_QUEUE="2"
    ) as app:
        assert load.outcome(app) == "result"
        yield app


def test_a_crowd_gets_results_or_hears_that_the_queue_is_full(app):
    found = load.crowd(app, Namespace(clients=12, minutes=0.1))
    assert set(found["outcomes"]) == {"result", "queue full"} and found["other_outcomes"] == 0
    assert found["page_s"]["most"] < 5, "one machine runs the model, a dozen clients and the page"


def test_whoever_goes_away_leaves_the_worker_free(app):
    found = load.cancels(app, Namespace(times=4))
    assert found["cancelled"] >= 4 and found["next_request"] == "result"
    assert found["freed_s"]["most"] < 10 and abs(load._change(found)) < 100


def test_nothing_grows_while_everything_is_mixed(app):
    found = load.soak(app, Namespace(minutes=0.2))
    assert found["failures"] == [] and found["errors_in_log"] == 0
    assert set(found["outcomes"]) <= {"result", "queue full", "gone away", "hostile", "page"}
    assert found["last"]["threads"] < found["first"]["threads"] + 20
    assert found["last"]["files"] < found["first"]["files"] + 20


def test_the_table_says_what_the_figures_say():
    assert load.table(FIGURES).splitlines() == [
        "| | |",
        "|---|---|",
        "| 60 clients at once for 5 minutes | 100 result, 7 queue full; anything else or hung: 0; the page answered "
        "within 0.81 s (median 0.040 s) |",
        "| a full disk, 20 times | 20 ended in one sentence, 19 next requests succeeded, 1 broken files |",
    ]


def test_the_tests_readme_has_the_table_of_the_recorded_figures():
    assert load.table(json.loads(load.FIGURES.read_text())) in (ROOT / "tests" / "README.md").read_text()
