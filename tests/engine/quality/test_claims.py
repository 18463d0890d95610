"""Claims: each piece of work has one owner, and what its owner leaves behind, however it ends, goes to another."""

import multiprocessing
import os
import signal
import threading
from collections import Counter

import pytest

from engine.errors import OutputError
from engine.quality import claims
from engine.quality.claims import Claims, at_work

PIECES = [str(number) for number in range(60)]


@pytest.fixture
def shared(tmp_path):
    return tmp_path / "shared"


@pytest.fixture
def elsewhere(monkeypatch):
    """Has a process be on another machine from here on, whose kernel knows nothing of our locks."""
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.2)
    return lambda name: monkeypatch.setattr(claims, "_machine", lambda: name)


def killed(shared, take):
    """A process that takes pieces and is killed."""

    def live(pipe):
        with Claims(shared) as ours:
            ours.look()
            pipe.send([ours.take(piece) for piece in take])
            signal.pause()

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=live, args=(there,))
    process.start()
    taken = here.poll(30) and here.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert taken == [True] * len(take)


def test_a_piece_has_one_owner_among_many_at_once(shared):
    owners, gate = Counter(), threading.Barrier(8)

    def live():
        with Claims(shared) as ours:
            gate.wait(30)
            ours.look()
            owners.update(piece for piece in PIECES if ours.take(piece))
            gate.wait(30)

    threads = [threading.Thread(target=live) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert owners == Counter(PIECES)


def test_what_one_has_the_others_see_and_have_not(shared):
    with Claims(shared) as one, Claims(shared) as other:
        assert one.take("5") and one.take("5") and not other.take("5")
        other.look()
        assert other.is_taken("5") and not other.is_taken("6") and one.others() == 1 and one.beside()
        assert one.holds("5")


def test_whoever_leaves_or_is_killed_gives_all_back_at_once(shared):
    with Claims(shared) as one:
        assert one.take("1")
    killed(shared, ["2", "3"])
    with Claims(shared) as heir:
        heir.look()
        assert heir.take("1") and heir.take("2") and heir.take("3") and not heir.beside()
        with Claims(shared) as other:
            other.look()
            assert not any(map(other.take, "123"))


def test_an_heir_has_heirs_and_of_several_only_one_inherits(shared):
    for _ in range(3):
        killed(shared, ["1"])
    with Claims(shared) as one, Claims(shared) as other:
        one.look(), other.look()
        assert [one.take("1"), other.take("1")] == [True, False]


def test_on_another_machine_beats_tell_who_is_there(shared, elsewhere, until):
    elsewhere("a")
    with Claims(shared) as one:
        assert one.take("1")
        elsewhere("b")
        with Claims(shared) as other:
            seen = [other.take("1") or one._ended.wait(0.05) for _ in range(10)]  # half a second, more than a lease
            assert not any(seen) and one.holds("1") and other.others() == 1 and not other.beside()
            one._ended.set()  # its machine has lost its power
            until(lambda: other.take("1"), 10)
            assert not one.holds("1")


def test_a_claim_of_which_the_owner_was_not_written_lapses_too(shared, elsewhere, until):
    with Claims(shared) as ours:
        (shared / "claims" / "1.1").touch()
        ours.look()
        assert not ours.take("1")
        until(lambda: ours.take("1"), 10)


def test_the_end_is_heard_by_all_and_leaves_nothing(shared):
    with Claims(shared) as one, Claims(shared) as other:
        one.take("1"), other.take("2")
        assert at_work(shared) and not other.over
        one.end()
        assert other.over and not other.take("3")
    assert not shared.exists() and not at_work(shared)


def test_the_last_to_leave_takes_an_empty_folder_along(shared):
    with Claims(shared), Claims(shared):
        pass
    assert not shared.exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"Cannot write into .*file/claims: Not a directory\. Choose another"),
        Claims(tmp_path / "file" / "claims"),
    ):
        pass
