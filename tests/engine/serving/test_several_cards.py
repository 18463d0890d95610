"""A service of several cards: one queue, a comparison a card; which card gets what, and what one that fails costs."""

import json
import threading
from types import SimpleNamespace

import pytest

from assets.figures import service_cards
from engine import events
from engine.errors import CancelledRun, FaultError, UnsupportedError
from engine.machine import Machine
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving.admission import Door, Limits
from engine.serving.process import Process, require_one_kind
from engine.serving.worker import Worker
from tests.support import stand_in

MODELS = ("mini-flux", "mini-qwen")


class Card(stand_in.StandIn):
    """Runs until it is let go; a prompt may say that it fails."""

    def __init__(self):
        super().__init__("cpu", None, None)
        self.ready, self.gate, self.began, self.prepared = True, threading.Semaphore(0), [], []
        self.renewed = 0

    def compare(self, request, out, tell, stop):
        self.began.append(request.prompt)
        while not self.gate.acquire(timeout=0.005):
            if stop():
                raise CancelledRun
        if request.prompt == "dies":
            self.ready = False
            self.lost("SIGKILL")
            raise FaultError("The engine's process ended.", kind="ProcessLost", lost=True)
        return Comparison(request=request, device="", versions={}, results=(), ruler=None, created="")

    def prepare(self, model_id, tell, stop):
        self.prepared.append(model_id)

    def watch(self, lost):
        self.lost = lost

    def renew(self):
        self.renewed += 1

    def close(self):
        pass


@pytest.fixture
def service():
    """Of three cards."""
    cards = [Card() for _ in range(3)]
    worker = Worker(MODELS, cards[0], others=cards[1:])
    yield SimpleNamespace(worker=worker, cards=cards)
    worker.close()


def ask(prompt, model="mini-flux"):
    return CompareRequest.create(prompt, model=model)


def free(service, until):
    """Wait until every card has laid down what it has ended."""
    until(lambda: not any(card.running for card in service.worker._cards))


def began(service):
    return [card.began for card in service.cards]


def test_as_many_run_at_once_as_there_are_cards_and_the_first_in_the_queue_gets_the_first_that_is_free(
    service, tmp_path, until
):
    jobs = [service.worker.submit(ask(str(number)), tmp_path) for number in range(5)]
    until(lambda: sum(map(len, began(service))) == 3)
    assert began(service) == [["0"], ["1"], ["2"]] and service.worker.health().queue == 2
    assert "twinframe_running 3" in service.worker.metrics()
    service.cards[1].gate.release()
    until(lambda: began(service)[1] == ["1", "3"])
    assert [job.wait(0) for job in jobs] == [False, True, False, False, False]


def test_whoever_asks_alone_has_the_first_card_and_models_stay_where_they_are(service, tmp_path, until):
    for number, model in enumerate(("mini-flux", "mini-flux")):
        service.cards[0].gate.release()
        assert service.worker.submit(ask(str(number), model), tmp_path).wait(10)
        free(service, until)
    busy = service.worker.submit(ask("busy"), tmp_path)
    until(lambda: len(service.cards[0].began) == 3)
    service.cards[1].gate.release()
    assert service.worker.submit(ask("other", "mini-qwen"), tmp_path).wait(10)
    service.cards[0].gate.release()
    assert busy.wait(10)
    free(service, until)
    service.cards[1].gate.release()
    assert service.worker.submit(ask("again", "mini-qwen"), tmp_path).wait(10)
    assert began(service) == [["0", "1", "busy"], ["other", "again"], []]


def test_places_count_what_has_to_end_first_and_waits_go_by_the_card_that_is_free_first(service, tmp_path, until):
    service.worker._durations.append(100.0)
    running = [service.worker.submit(ask(str(number)), tmp_path) for number in range(3)]
    until(lambda: sum(map(len, began(service))) == 3)
    waiting = [service.worker.submit(ask(str(number)), tmp_path) for number in range(3, 8)]
    now = running[0].began_at
    for job, spent in zip(running, (60.0, 30.0, 10.0), strict=True):
        job.began_at = now - spent
    places = [service.worker._place(job) for job in waiting]
    assert [place.position for place in places] == [1, 2, 3, 4, 5]
    assert [place.seconds for place in places] == pytest.approx([40, 70, 90, 140, 170], abs=5)
    waiting[1].cancel()
    assert service.worker._place(waiting[2]).position == 2 and service.worker._place(waiting[1]) is None


def test_a_card_that_dies_costs_its_own_comparison_and_gets_none_until_it_is_back(service, tmp_path, until):
    jobs = [service.worker.submit(ask(prompt), tmp_path) for prompt in ("0", "dies", "2")]
    until(lambda: sum(map(len, began(service))) == 3)
    service.cards[1].gate.release()
    assert jobs[1].wait(10) and isinstance(jobs[1].ending, events.Failed)
    assert not jobs[0].wait(0) and not jobs[2].wait(0)
    assert service.worker.health().status == "busy" and "twinframe_engine_restarts 1" in service.worker.metrics()
    waits = service.worker.submit(ask("3"), tmp_path)
    service.cards[2].gate.release()
    until(lambda: service.cards[2].began == ["2", "3"])
    assert service.cards[1].began == ["dies"]
    service.cards[1].ready = True
    last = service.worker.submit(ask("4"), tmp_path)
    until(lambda: service.cards[1].began == ["dies", "4"])
    for card in service.cards:
        card.gate.release()
    assert all(job.wait(10) and isinstance(job.ending, events.Completed) for job in (jobs[0], jobs[2], waits, last))


def test_cancelling_frees_the_card_that_runs_it_alone(service, tmp_path, until):
    jobs = [service.worker.submit(ask(str(number)), tmp_path) for number in range(4)]
    until(lambda: sum(map(len, began(service))) == 3)
    jobs[2].cancel()
    until(lambda: service.cards[2].began == ["2", "3"])
    assert isinstance(jobs[2].ending, events.Cancelled) and not jobs[0].wait(0) and not jobs[1].wait(0)


def test_the_queue_holds_what_no_card_runs(service, tmp_path, until):
    service.worker._door = Door(Limits(waiting=1))
    for number in range(3):
        service.worker.submit(ask(str(number)), tmp_path)
        until(lambda number=number: sum(map(len, began(service))) == number + 1)
    assert service.worker.health().accepting
    service.worker.submit(ask("3"), tmp_path)
    assert not service.worker.health().accepting


def test_every_card_is_preloaded_and_one_that_was_lost_again(service, until):
    service.worker.preload("mini-flux")
    until(lambda: [card.prepared for card in service.cards] == [["mini-flux"]] * 3)
    until(lambda: service.worker.preloads() == ())
    service.cards[1].lost("SIGKILL")
    until(lambda: service.cards[1].prepared == ["mini-flux"] * 2)
    assert service.worker.preloads() == () and service.worker.health().status == "ready"


def test_memory_is_told_of_each_card(service):
    said = service.worker.metrics()
    for number in range(3):
        assert f'twinframe_device_memory_allocated_bytes{{card="{number}"}} 17' in said


def test_closing_ends_what_runs_on_every_card(service, tmp_path, until):
    jobs = [service.worker.submit(ask(str(number)), tmp_path) for number in range(5)]
    until(lambda: sum(map(len, began(service))) == 3)
    service.worker.close()
    assert all(isinstance(job.ending, events.Cancelled) for job in jobs)
    assert not any(card.thread.is_alive() for card in service.worker._cards)


def test_what_ran_beside_another_card_says_so(service, tmp_path, until):
    jobs = [service.worker.submit(ask(str(number)), tmp_path / str(number)) for number in range(2)]
    until(lambda: sum(map(len, began(service))) == 2)
    for card in service.cards:
        card.gate.release()
    assert all(job.wait(10) and job.beside for job in jobs)
    assert (tmp_path / "0" / "comparison.json").exists()
    free(service, until)
    service.cards[0].gate.release()
    alone = service.worker.submit(ask("alone"), tmp_path / "alone")
    assert alone.wait(10) and not alone.beside


def test_a_process_that_is_killed_costs_one_comparison_of_two(tmp_path, until):
    devices = [Process("cpu", make=stand_in.make) for _ in range(2)]
    until(lambda: all(device.ready for device in devices))
    worker = Worker(MODELS, devices[0], others=devices[1:])
    jobs = [
        worker.submit(CompareRequest.create(prompt, num_inference_steps=20), tmp_path / prompt)
        for prompt in ("killed", "a cat", "a dog")
    ]
    for job in jobs:
        assert job.wait(30)
    assert [type(job.ending) for job in jobs] == [events.Failed, events.Completed, events.Completed]
    worker.close()


def test_cards_of_several_kinds_are_one_sentence():
    one, other = (SimpleNamespace(machine=Machine(name=name, kind="cuda")) for name in ("H100", "H200"))
    with pytest.raises(
        UnsupportedError, match="cuda:0 is the H100, cuda:1 the H200: choose devices of one kind, as any"
    ):
        require_one_kind(["cuda:0", "cuda:1"], [one, other])
    require_one_kind(["cuda:0", "cuda:1"], [one, one])


def test_the_documents_have_the_table_of_the_recorded_simulation():
    said = (service_cards.ASSETS / "docs" / "deploy.md").read_text(encoding="utf-8")
    table = said.split("<!-- cards -->\n")[1].split("\n<!-- /cards -->")[0]
    assert table == service_cards.table(json.loads(service_cards.FIGURES.read_text()))
