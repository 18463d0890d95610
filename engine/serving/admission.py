"""Who may ask for how much: a bounded queue, one comparison at a time per visitor, budgets by the hour, a deadline.

`Worker.submit` asks the door for every comparison, so page, API and command line pass through the same one. It knows
nothing of where a visitor comes from, nor of devices; its limits are numbers from the environment.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.environment import positive
from engine.errors import RefusedError

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """Somebody who asks."""

    session: str
    """One browser tab, or one API client: has one comparison at a time."""
    address: str
    """The network address, which the budget belongs to, because a new session costs nothing. Behind a proxy that
    does not overwrite X-Forwarded-For it can be invented, so a public app needs the budget of all visitors too."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a door lets through. None: no limit; so by default everything passes, as the command line needs."""

    waiting: int | None = None
    """Comparisons in the queue, besides the one that runs."""
    jobs_per_visitor_hour: int | None = None
    jobs_per_hour: int | None = None
    """Of all visitors together."""
    deadline: float | None = None
    """Seconds a comparison may run, from its turn on; checked after each denoising step."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Limits:
        """The limits of a served app: 20 waiting, an hour each, no budgets, unless TWINFRAME_* says otherwise.

        Raises:
            RequestError: a variable is not a positive number.
        """

        def number(name: str, default: int | None) -> int | None:
            value = positive(environment, name, default)
            return None if value is None else math.ceil(value)

        return cls(
            waiting=number("TWINFRAME_QUEUE", 20),
            jobs_per_visitor_hour=number("TWINFRAME_JOBS_PER_VISITOR_HOUR", None),
            jobs_per_hour=number("TWINFRAME_JOBS_PER_HOUR", None),
            deadline=positive(environment, "TWINFRAME_DEADLINE", HOUR),
        )


class Door:
    """Admits or refuses. Not locked: the worker asks it while it holds its own lock.

    Args:
        limits: what passes.
        clock: seconds that only grow.
    """

    def __init__(self, limits: Limits = Limits(), clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self._clock = clock
        self._admitted: deque[tuple[float, str | None]] = deque()
        """When, and from which address, in the past hour."""

    def admit(self, visitor: Visitor | None, waiting: int, has_one: bool) -> None:
        """Let one more comparison in, and charge it to the budgets.

        Args:
            visitor: None for the owner of the machine, whom only the queue's length and the common budget limit.
            waiting: comparisons in the queue.
            has_one: one of this visitor's is running or waiting.

        Raises:
            RefusedError: queue full or budget spent, in one sentence that says what to do.
        """
        limits, now = self.limits, self._clock()
        while self._admitted and self._admitted[0][0] <= now - HOUR:
            self._admitted.popleft()
        if visitor is not None and has_one:
            raise RefusedError("You already have a comparison here: wait until it ends, or stop it.")
        if limits.waiting is not None and waiting >= limits.waiting:
            raise RefusedError(f"The queue is full ({waiting} are waiting): try again in a few minutes.")
        address = None if visitor is None else visitor.address
        mine = [when for when, whose in self._admitted if whose == address]
        self._within(None if visitor is None else limits.jobs_per_visitor_hour, mine, now, "Your budget")
        self._within(limits.jobs_per_hour, [when for when, _ in self._admitted], now, "This app's budget")
        self._admitted.append((now, address))

    @staticmethod
    def _within(most: int | None, spent: list[float], now: float, whose: str) -> None:
        if most is not None and len(spent) >= most:
            minutes = math.ceil((spent[-most] + HOUR - now) / 60)
            comparisons = "comparison" if most == 1 else "comparisons"
            again = "1 minute" if minutes == 1 else f"{minutes} minutes"
            raise RefusedError(f"{whose} of {most} {comparisons} an hour is spent: try again in {again}.")
