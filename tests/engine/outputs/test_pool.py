"""What people saw: the pool of blind answers, and that the page speaks of seeing only where it supports that."""

import ast
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from engine.errors import OutputError
from engine.outputs import blind, pool
from engine.outputs.pool import Answer, Pool, Seen
from tests.support.fake_engine import FakeWorker, open_tab, record, served, until
from ui import view as views
from ui import words
from ui.html import cards

ROOT = Path(__file__).resolve().parents[3]
SEEING = re.compile(
    r"hard to tell|to the eye|up close|look(s|ing)? (close|the same|alike|different|like)|visibl|notice(d|able)"
    r"|indistinguishab|impercepti|barely|nearly (the same|identical)|can(not)? be seen|tell(s)? (them )?apart",
    re.IGNORECASE,
)
"""What claims that a difference is seen, or is not."""


def made_up(sees, model="mini-flux", count=1200, mode=blind.ABX):
    """Answers at scores from 0 to 0.2, of which `sees` gives the share of people who see a difference."""
    dice = random.Random(7)
    scores = [0.2 * index / count for index in range(count)]
    return [
        Answer(
            model=model,
            precision="nvfp4",
            recipe="post",
            lpips=lpips,
            mode=mode,
            right=dice.random() < 0.5 + sees(lpips) / 2,
        )
        for lpips in scores
    ]


def write(file, answers):
    file.write_text("".join(json.dumps(vars(answer)) + "\n" for answer in answers))
    return file


@pytest.mark.parametrize("edge", [0.06, 0.12])
def test_the_limits_of_phrases_follow_the_pooled_curve(tmp_path, edge):
    answers = made_up(lambda lpips: float(lpips > edge))
    seen = Pool(write(tmp_path / "pool.jsonl", answers)).seen("mini-flux")
    assert seen.alike == pytest.approx(edge, abs=0.02), "a group of 80 spans 0.0134"
    assert seen.apart == pytest.approx(edge, abs=0.02)
    assert seen.alike < seen.apart
    made = record(tmp_path / "made", precisions=["nvfp4"])
    for lpips, phrase in ((seen.alike, "alike"), (seen.apart, "apart"), ((seen.alike + seen.apart) / 2, None)):
        other = replace(made.results[1], metrics=replace(made.results[1].metrics, lpips=(lpips,)))
        view = views.of(replace(made, results=(made.results[0], other)), tmp_path, recorded=False, seen=seen)
        for drawn in (view.headline, cards.headline(view), cards.stage(view), cards.pairs(view)):
            said = [name for name, text in words.verdict.SEEN.items() if text in drawn]
            assert said == ([phrase] if phrase else [])


def test_few_answers_and_those_of_another_model_or_question_support_nothing(tmp_path):
    blind_people = made_up(lambda lpips: 0.0)
    for answers in (
        [],
        blind_people[:12],
        made_up(lambda _: 0.0, model="mini-qwen"),
        made_up(lambda _: 1.0, mode="which"),
    ):
        assert Pool(write(tmp_path / "pool.jsonl", answers)).seen("mini-flux") == Seen()
    assert Pool(write(tmp_path / "pool.jsonl", blind_people)).seen("mini-flux").alike == blind_people[-1].lpips
    assert Pool(write(tmp_path / "pool.jsonl", made_up(lambda _: 0.5))).seen("mini-flux") == Seen(), "at the threshold"


@pytest.mark.parametrize("right", range(40, 81))
def test_a_group_counts_where_its_exact_interval_leaves_the_threshold_out(right):
    low, high = binomtest(right, 80).proportion_ci(0.95, method="exact")
    seen = pool.limits((0.1, index < right) for index in range(80))
    assert (seen.alike is not None, seen.apart is not None) == (high < pool.THRESHOLD, low > pool.THRESHOLD)


def given(**changes):
    values = {"model": "mini-flux", "precision": "nvfp4", "recipe": "post", "execution": "emulated", "mode": blind.ABX}
    values |= {"source": "fresh", "prompt": "a secret", "seed": 7, "lpips": 0.05, "bf16": "A", "asked": "A"}
    return blind.Given(**(values | {"given": "A", "right": True, "seconds": 3.2} | changes))


def test_an_answer_is_one_line_that_says_nothing_about_a_person_and_no_more_than_enough_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "pool.jsonl"
    kept = Pool(file)
    monkeypatch.setattr(pool, "MOST", 2)
    for right in (True, False, True):
        kept.add(given(right=right))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    told = {"model": "mini-flux", "precision": "nvfp4", "recipe": "post", "lpips": 0.05, "mode": "abx"}
    assert lines == [told | {"right": True}, told | {"right": False}]


def test_a_line_that_is_no_answer_is_left_out_and_a_file_that_cannot_be_used_is_one_sentence(tmp_path, logged):
    file = write(tmp_path / "pool.jsonl", made_up(lambda _: 0.0))
    good = Pool(file).seen("mini-flux")
    file.write_text('{"model": "mini-flux"\n[]\n' + file.read_text() + json.dumps(vars(made_up(lambda _: 1.0)[0]))[:40])
    assert Pool(file).seen("mini-flux") == good
    assert len(logged()) == 3
    for place in (tmp_path, tmp_path / "pool.jsonl" / "below"):
        with pytest.raises(OutputError):
            Pool(place)


def test_a_pool_is_off_unless_a_file_is_named(tmp_path):
    assert Pool.from_environment({}) is None
    assert Pool.from_environment({pool.VARIABLE: str(tmp_path / "new.jsonl")}).seen("mini-flux") == Seen()


# Without answers


def texts(file):
    """Every string of a module but its docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare
    ]


def test_without_answers_no_phrase_about_seeing_appears_anywhere(tmp_path):
    files = sorted((ROOT / "ui" / "words").glob("*.py"))
    said = {text for file in files for text in texts(file) if SEEING.search(text)}
    assert said == set(words.verdict.SEEN.values())
    made = record(tmp_path, precisions=["fp8", "mxfp8", "nvfp4"])
    for lpips in (0.0, 0.003, 0.01, 0.05, 0.1, 0.2, 0.3, 0.9):
        results = [replace(g, metrics=g.metrics and replace(g.metrics, lpips=(lpips,))) for g in made.results]
        view = views.of(replace(made, results=tuple(results)), tmp_path, recorded=False)
        for drawn in (view.headline, cards.headline(view), cards.stage(view), cards.pairs(view), cards.table(view)):
            assert not SEEING.search(re.sub("<[^>]+>", "", drawn))


# In the browser


@pytest.mark.browser
def test_first_answers_are_pooled_where_that_is_switched_on_and_it_is_said(visit, tmp_path, monkeypatch):
    record(tmp_path / "unseen" / "rocket", precisions=["nvfp4"])
    file = tmp_path / "pool.jsonl"
    monkeypatch.setenv(pool.VARIABLE, str(file))
    with served(FakeWorker(), unseen=tmp_path / "unseen") as url:
        page = visit(url)
        open_tab(page, words.BLIND)
        page.get_by_label(words.blind.MODES["abx"], exact=True).check()
        page.keyboard.press("n")
        page.locator(".tf-blind figcaption", has_text="X").wait_for()
        for _ in range(2):  # of the same pair, whose truth is known the second time
            page.wait_for_selector(".tf-blind[data-open=true]")
            page.keyboard.press("a")
            page.wait_for_selector(".tf-blind[data-open=false]")
            page.click("#tf-blind-next")
        assert words.blind.POOLED in page.inner_text("#tf-blind-intro")
        assert until(lambda: file.exists() and len(file.read_text().splitlines()) == 1)
    monkeypatch.delenv(pool.VARIABLE)
    with served(FakeWorker(), unseen=tmp_path / "unseen") as url:
        page = visit(url)
        open_tab(page, words.BLIND)
        assert words.blind.POOLED not in page.inner_text("#tf-blind-intro")
