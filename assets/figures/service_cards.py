"""How many comparisons a service of several cards ends, and how long its visitors wait: a simulation.

python -m assets.figures.service_cards [--seconds 44]

The real queue before devices that do nothing but sleep: a comparison takes SECONDS on average, between half and one and
a half of it. VISITORS ask again as soon as they have their answer. What cards cost each other (the host's cores and
memory, the bus) is not in it. Writes service-cards.json and prints the table of assets/docs/deploy.md.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from engine import events
from engine.errors import CancelledRun
from engine.events import Stop, Tell
from engine.formats import PRECISIONS
from engine.machine import Machine, Support
from engine.request import CompareRequest
from engine.results import Comparison
from engine.serving.admission import Visitor
from engine.serving.worker import Worker

ASSETS = Path(__file__).resolve().parents[1]
FIGURES = ASSETS / "figures" / "service-cards.json"
CARDS, VISITORS, SECONDS = (1, 2, 4, 8), 16, 2.0
SETTLING = 10.0
"""Seconds until the queue is as long as it stays."""


class Sleeping:
    """A device that sleeps as long as a comparison takes."""

    ready = True
    machine = Machine(name="a card that sleeps", kind="cuda")

    def __init__(self, seed: int):
        self._draw, self._takes = random.Random(seed), list[float]()
        self.support = {
            name: Support(precision=name, execution="native", reason="", gemm="", machine=self.machine)
            for name in PRECISIONS
        }

    def compare(self, request: CompareRequest, out: Path, tell: Tell, stop: Stop) -> Comparison:
        if not self._takes:  # in another order each time, so that every card's mean is the same
            self._takes = [SECONDS * (0.5 + tenth / 10) for tenth in range(11)]
            self._draw.shuffle(self._takes)
        end = time.monotonic() + self._takes.pop()
        while (left := end - time.monotonic()) > 0:
            if stop():
                raise CancelledRun
            time.sleep(min(left, 0.05))
        return Comparison(request=request, device="", versions={}, results=(), ruler=None, created="")

    def gauges(self) -> dict[str, float]:
        return {}

    def watch(self, lost: object) -> None:
        pass

    def renew(self) -> None:
        pass

    def close(self) -> None:
        pass


def simulate(cards: int, seconds: float, out: Path) -> dict[str, Any]:
    """What visitors met in some time."""
    device, *others = map(Sleeping, range(cards))
    worker = Worker(("mini-flux",), device, others=others)
    waited: list[float] = []
    missed: list[float] = []
    ended = 0
    begin = time.monotonic() + SETTLING
    end = begin + seconds

    def visit(number: int) -> None:
        nonlocal ended
        visitor = Visitor(session=str(number), address=str(number))
        while time.monotonic() < end:
            asked, told = time.monotonic(), None
            job = worker.submit(CompareRequest.create("a cat", seed=number), out, visitor)
            for event in job.events():
                if isinstance(event, events.Queued) and told is None and event.seconds is not None:
                    told = event.seconds
            if job.began_at is not None and begin < time.monotonic() < end:
                ended += 1
                waited.append(job.began_at - asked)
                if told is not None:
                    missed.append(abs(told - waited[-1]))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(VISITORS)]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join()
    worker.close()
    return {
        "cards": cards,
        "comparisons_a_minute": round(60 * ended / seconds, 1),
        "waited_s": round(median(waited), 3),
        "told_wrong_s": round(median(missed), 3),
    }


def table(figures: Mapping[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| Cards | Comparisons a minute | of one card's | Wait, s | What was told of it is off by, s |",
        "|---|---|---|---|---|",
    ]
    first = figures["rows"][0]["comparisons_a_minute"]
    for row in figures["rows"]:
        rate = row["comparisons_a_minute"]
        lines.append(
            f"| {row['cards']} | {rate:.0f} | {rate / first:.2f}x | {row['waited_s']:.2f} | {row['told_wrong_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=44.0, help="of each number of cards")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [simulate(cards, args.seconds, Path(folder)) for cards in CARDS]
    figures = {"simulation": True, "visitors": VISITORS, "comparison_s": SECONDS, "seconds": args.seconds, "rows": rows}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
