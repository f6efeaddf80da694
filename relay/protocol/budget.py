"""The budget: how many requests a key may still spend, by upstream's sliding window.

Upstream counts a request when it arrives, which we cannot see: only that it was after the send began and before
the exchange ended. So a request occupies its slot from its beginning until a window after its end, and whatever the
network does, no window as upstream sees it holds more than the limit.

The first half of the slots may be spent at once, the second half is paced. Spent in one burst, they would all come
free in one burst a minute later, and so on for ever, and in the waits between not even a retry or a final would find a
slot. Pacing gives hardly any away:

1. The slots that are free are spread over the time until the next comes free.
2. Two requests may be a little nearer than evenly spread. Where many slots come free at once, a few of them are so
   made up for in each minute, until they lie even.
"""

from __future__ import annotations

from collections import deque
from math import inf

WINDOW_SECONDS = 60.0
"""Upstream's published window."""

_UNPACED_SHARE = 0.5
"""Slots that are spent without pacing. A key that needs no more than half its allowance never waits for it."""

_NEAREST_SHARE = 0.97
"""How near two paced requests may be, of the even distance. At 1, a gap once made would never be filled. Measured, 99%
of the allowance is used where exchanges take 0.25 s, 97.5% where 1 s, and no two are more than two distances apart."""


class Budget:
    """Requests of one upstream key.

    Args:
        limit: Requests a window; 0 is unlimited.
        margin_seconds: Added to the window, for a clock unlike upstream's.
    """

    def __init__(self, limit: int, margin_seconds: float) -> None:
        self._limit = limit
        self._window = WINDOW_SECONDS + margin_seconds
        self._ends: deque[float] = deque()
        self._in_flight = 0
        self._begun_at = -inf

    @property
    def limit(self) -> int:
        """Requests a window; 0 is unlimited."""
        return self._limit

    @property
    def in_flight(self) -> int:
        """Requests begun and not ended."""
        return self._in_flight

    def used(self, now: float) -> int:
        """Return the slots that are occupied."""
        self._expire(now)
        return len(self._ends) + self._in_flight

    def is_scarce(self, now: float) -> bool:
        """Return whether half of the slots or more are occupied, so that a request begun now delays a later one.

        Never without a limit. Right after an outage requests are plentiful until half of them are spent, which takes
        seconds where there is a backlog.
        """
        return 0 < self._limit * _UNPACED_SHARE <= self.used(now)

    def ready_at(self, now: float) -> float:
        """Return from when on a request may begin: `now`, later, or inf while only an end can free a slot."""
        if not self.is_scarce(now):
            return now
        used = len(self._ends) + self._in_flight
        free_at = self._ends[0] + self._window if self._ends else inf
        if used >= self._limit:
            return free_at
        pause = _NEAREST_SHARE * self._window / self._limit
        if free_at < inf:
            pause = max(pause, (free_at - self._begun_at) / (self._limit - used + 1))
        return max(now, self._begun_at + pause)

    def begin(self, now: float) -> None:
        """Occupy a slot, from `now` on."""
        self._in_flight += 1
        self._begun_at = now

    def abandon(self) -> None:
        """Give a slot back: nothing was sent. The next may still have to keep its distance."""
        self._in_flight -= 1

    def end(self, now: float) -> None:
        """Note that an exchange has ended, however."""
        self._in_flight -= 1
        self._remember(now)

    def restore(self, at: float) -> None:
        """Count a send of an earlier run, which ended at `at` at the latest."""
        self._remember(at)

    def is_forgettable(self, now: float) -> bool:
        """Return whether nothing of it matters any more."""
        return not self.used(now)

    def resize(self, limit: int) -> None:
        """Change the limit; neither the old nor the new one is 0."""
        self._limit = limit
        while len(self._ends) > limit:
            self._ends.popleft()

    # What upstream's answers say of the limit is nothing new where it is given; `limit.LearnedBudget` listens.

    def note_waiting(self, now: float) -> None:
        """Note that something waits for a slot and for nothing else."""

    def note_taken(self, began_at: float) -> None:
        """Note that upstream took a request."""

    def note_refused(self, began_at: float, now: float) -> None:
        """Note that upstream answered 429 to a request that is still under way."""

    def _remember(self, at: float) -> None:
        if self._limit:
            self._ends.append(at)
            if len(self._ends) > self._limit:  # more than a window holds need not be known
                self._ends.popleft()

    def _expire(self, now: float) -> None:
        while self._ends and self._ends[0] + self._window <= now:
            self._ends.popleft()
