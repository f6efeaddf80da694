"""How long a client may take, at every point where it is waited for.

Rules:
1. Time is an argument; who compares deadlines and cancels is the listener's reaper.
2. Every phase but our own work has a deadline.
"""

from __future__ import annotations

import enum
import math
from typing import Final

from relay.config import Listen

LINGER_SECONDS: Final = 2.0
"""How long a client may take to notice our last answer and stop sending; several round trips of a bad network."""

REAP_SECONDS: Final = 1.0
"""Longest pause between two looks at the deadlines, so the most that a client may overstay; also how stale a `date`
may be. 10 000 connections take 1 ms to look through."""


class Phase(enum.Enum):
    """What a connection's task waits for."""

    IDLE = "idle"
    """The first byte of a request, `idle_seconds`. Then closed without a word."""
    HEADER = "header"
    """The rest of a head, `header_seconds`. Then 408."""
    BODY = "body"
    """The rest of a body, by grace and rate. Then 408."""
    HANDLING = "handling"
    """Our own handler, for ever."""
    WRITE = "write"
    """The client to take an answer, `write_seconds`. Then cut off."""
    LINGER = "linger"
    """The client to stop sending, `LINGER_SECONDS`. Then closed."""


class Patience:
    """The deadline of one connection.

    Attributes:
        phase: What is being waited for.
        deadline: When that has taken too long, on the clock of the `now` that was given.
    """

    __slots__ = ("_awaited", "_ends", "_settings", "deadline", "phase")

    def __init__(self, settings: Listen, now: float) -> None:
        self._settings = settings
        self._awaited = Phase.IDLE  # HEADER or BODY from the read on that left one incomplete
        self._ends = 0.0  # deadline of that
        self.phase = Phase.IDLE
        self.deadline = now + settings.idle_seconds

    def wait_for_request(self, now: float) -> None:
        """Begin to wait for a further request."""
        self.phase = Phase.IDLE
        self.deadline = now + self._settings.idle_seconds

    def handle(self) -> None:
        """Begin work of our own."""
        self.phase = Phase.HANDLING
        self.deadline = math.inf

    def answered(self) -> None:
        """Forget what was incomplete: the next head or body begins anew."""
        self._awaited = Phase.IDLE

    def write(self, now: float) -> None:
        """Begin to send."""
        self.phase = Phase.WRITE
        self.deadline = now + self._settings.write_seconds

    def linger(self, now: float) -> None:
        """Begin to wait for the client to stop sending."""
        self.phase = Phase.LINGER
        self.deadline = now + LINGER_SECONDS

    def wait_for_more(self, phase: Phase, received_bytes: int, now: float) -> None:
        """Go on waiting for the rest of a request.

        A head has `header_seconds` from its first byte. A body's patience is a bucket: `body_grace_seconds` deep, it
        runs out with time, and every byte adds what it may take at the least rate. So no stall is longer than the
        grace, and no credit can be saved up by sending fast and then holding memory for hours.

        Args:
            phase: HEADER or BODY.
            received_bytes: What the last read brought.
            now: Seconds.
        """
        settings = self._settings
        if self._awaited is not phase:
            self._awaited = phase
            first = settings.header_seconds if phase is Phase.HEADER else settings.body_grace_seconds
            self._ends = now + first
        elif phase is Phase.BODY:
            rate = settings.min_body_rate_bytes
            earned = received_bytes / rate if rate else math.inf
            self._ends = min(self._ends + earned, now + settings.body_grace_seconds)
        self.phase = phase
        self.deadline = self._ends

    def spent_seconds(self, now: float) -> float:
        """Return how much of the patience with a body is used up: next to nothing for one that is coming in."""
        return self._settings.body_grace_seconds - (self.deadline - now)


def reap_interval(settings: Listen) -> float:
    """Return the pause between two looks at the deadlines, in seconds: short against the shortest of them."""
    shortest = min(
        settings.idle_seconds,
        settings.header_seconds,
        settings.body_grace_seconds,
        settings.write_seconds,
        LINGER_SECONDS,
    )
    return min(REAP_SECONDS, shortest / 4)
