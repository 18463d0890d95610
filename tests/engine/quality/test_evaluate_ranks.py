"""An evaluation by several processes: killed at random, started by a launcher, asleep while others take over."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from assets.figures import evaluation_time
from engine import __main__ as cli
from engine.errors import RequestError
from engine.quality import evaluate
from tests.support import rank_kills

ROOT = Path(__file__).resolve().parents[3]


def test_four_that_are_killed_at_random_lose_nothing_and_make_the_tables_of_one(tmp_path):
    out = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, "-m", "tests.support.rank_kills", "--times", "1", "--out", out], cwd=ROOT, check=True
    )
    (found,) = json.loads(out.read_text())["rounds"]
    assert found["tables_equal"] and found["kills"] and found["rows"] == rank_kills.ROWS
    assert (found["hung"], found["failed"], found["left_behind"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("rank", "named", "device"),
    [
        (None, "cuda:1", "cuda:1"),
        ("0", None, "cuda:0"),
        ("3", "cuda", "cuda:3"),
        ("1", "cuda:2,cuda:3", "cuda:3"),
        ("1", "cpu", "cpu"),
        ("1", "cuda:0+cuda:1", "cuda:0+cuda:1"),
    ],
)
def test_a_launcher_tells_each_process_its_card(monkeypatch, rank, named, device):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(cli, "_default_device", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert cli._own_device(SimpleNamespace(device=named, command="evaluate")) == device


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ("", r"one device a process: start it once for each of cpu, cuda:0, .* accelerate launch --num_processes 2"),
        ("2", "This is process 3 on this machine, and --devices names 2 devices"),
        ("first", "LOCAL_RANK is 'first'"),
    ],
)
def test_devices_that_no_process_is_for_are_one_sentence(monkeypatch, rank, says):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(RequestError, match=says):
        cli._own_device(SimpleNamespace(device="cpu,cuda:0", command="evaluate"))


def test_where_a_launcher_shows_each_process_its_own_card_alone_it_is_that(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli._own_device(SimpleNamespace(device="cuda", command="evaluate")) == "cuda"


def test_large_models_take_fewer_prompts_at_a_time_towards_the_end(monkeypatch):
    """Guided self-scheduling: of 100 prompts for four processes at first 16 at a time, and single ones in the end."""
    monkeypatch.setattr(evaluate, "_is_done", lambda *_: False)
    monkeypatch.setattr(evaluate, "_rows_there", lambda folder: [])
    taken = set()
    claims = SimpleNamespace(look=lambda: None, others=lambda: 3, is_taken=taken.__contains__)
    claims.take = lambda piece: piece not in taken and not taken.add(piece)
    chosen = [evaluate.Prompt(id=number, category="", text="") for number in range(100)]
    spec = SimpleNamespace(memory_gb=object())
    one = evaluate._Evaluation(spec, None, [], chosen, None, Path("out"), claims, print)
    sizes = []
    while some := one._some():
        sizes.append(len(some))
    assert sum(sizes) == 100 and sizes[0] == 16 and sizes[-3:] == [1, 1, 1] and sizes == sorted(sizes, reverse=True)


def test_the_readme_says_what_was_found_and_reckoned():
    said = (ROOT / "engine" / "README.md").read_text(encoding="utf-8")
    table = said.split("<!-- evaluation time -->\n")[1].split("\n<!-- /evaluation time -->")[0]
    assert table == evaluation_time.table()
    rounds = json.loads((ROOT / "assets" / "figures" / "rank-kills.json").read_text())["rounds"]
    equal, killed = sum(found["tables_equal"] for found in rounds), {found["kills"] for found in rounds}
    assert f"Of {len(rounds)} evaluations by {rank_kills.RANKS} processes" in said and killed == {rank_kills.KILLS}
    assert f"at random {rank_kills.KILLS} times in each, {equal} had the tables of one process" in said
    assert not any(found["rows_made_twice"] or found["hung"] or found["left_behind"] for found in rounds)
