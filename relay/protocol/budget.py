"""The budget: how many requests a key may still spend, by upstream's sliding window.

Upstream counts a request when it arrives, which we cannot see: only that it was after the send began and before
the exchange ended. So a request occupies its slot from its beginning until a window after its end, and whatever the
network does, no window as upstream sees it holds more than the limit.
"""

from __future__ import annotations

from collections import deque
from math import inf

WINDOW_SECONDS = 60.0
"""Upstream's published window."""


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

    def ready_at(self, now: float) -> float:
        """Return from when on a request may begin: `now`, later, or inf while only an end can free a slot."""
        if not self._limit or self.used(now) < self._limit:
            return now
        return self._ends[0] + self._window if self._ends else inf

    def begin(self) -> None:
        """Occupy a slot."""
        self._in_flight += 1

    def abandon(self) -> None:
        """Give a slot back: nothing was sent."""
        self._in_flight -= 1

    def end(self, now: float) -> None:
        """Note that an exchange has ended, however."""
        self._in_flight -= 1
        self._remember(now)

    def restore(self, at: float) -> None:
        """Count a send of an earlier run, which ended at `at` at the latest."""
        self._remember(at)

    def _remember(self, at: float) -> None:
        if self._limit:
            self._ends.append(at)
            if len(self._ends) > self._limit:  # more than a window holds need not be known
                self._ends.popleft()

    def _expire(self, now: float) -> None:
        while self._ends and self._ends[0] + self._window <= now:
            self._ends.popleft()
