"""How many requests upstream is good for at once, told by its latency, where no budget says how many it takes.

Up to some number upstream serves requests side by side; from there on they queue, each takes longer, and nothing is won
but memory spent on both sides. The limit is looked for in rounds of requests that began under it:

1. Grow by the square root of itself as long as a round takes about as long as the fastest has; above that, shrink by
   the ratio. So it settles where a few requests queue. (After Netflix's gradient limit; the square root keeps the
   queue short for small limits and finds large ones in a dozen rounds.)
2. Grow only where it was used: a limit that nobody reaches says nothing.
3. A failure takes a third, once a round.
4. Where it shrinks for long, upstream may have become slower for good: then a round with a quarter of the requests
   measures anew how fast it is.
"""

from __future__ import annotations

from math import inf, sqrt

MIN_LIMIT = 2
"""One request that hangs must not stop all others; and how fast upstream is alone is best told near one."""

_MIN_ROUND = 5
"""Requests of a round at least, so that one odd latency is not taken for upstream's."""

_TOLERANCE = 1.25
"""Of the fastest round, what is not yet slow: bodies differ in size, and so do a few requests' latencies."""

_STEEPEST = 0.5
"""What is left of the limit after the slowest round; one stall must not close everything."""

_FAILURE_SHARE = 0.7
"""What is left of it after a failure."""

_ROUNDS_TO_MEASURE = 50
"""Rounds after which upstream's speed is measured anew: costs under 2% of the requests."""

_MEASURE_SHARE = 0.25
"""Of the limit, to measure with: where the limit is up to four times too high, nothing queues then."""


class ConcurrencyLimit:
    """The limit of one upstream.

    Args:
        max_limit: It is never higher; at least 1.
    """

    def __init__(self, max_limit: int) -> None:
        self._max = max_limit
        self._limit = float(min(MIN_LIMIT, max_limit))
        self._fastest = inf
        self._measuring: float | None = None
        """While measuring anew: the limit to return to."""
        self._rounds = 0
        """Since upstream's speed was measured."""
        self._in_flight = 0
        self._round = 0
        self._ended = 0
        self._seconds = 0.0
        self._peak = 0

    @property
    def limit(self) -> int:
        """Requests that may be under way."""
        return int(self._limit)

    def begin(self) -> int:
        """Note that a request begins; returns its round, for `end`."""
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)
        return self._round

    def end(self, began_in: int, latency_seconds: float, *, is_ok: bool | None) -> None:
        """Note that a request is over.

        Args:
            began_in: What `begin` returned.
            latency_seconds: How long it took.
            is_ok: True where upstream did what it was asked; None where it did not, for no reason of load.
        """
        self._in_flight -= 1
        if began_in != self._round or is_ok is None:
            return
        if not is_ok:
            self._start_round(self._limit * _FAILURE_SHARE)
            return
        self._ended += 1
        self._seconds += latency_seconds
        if self._ended >= max(self.limit, _MIN_ROUND):
            self._finish_round(self._seconds / self._ended)

    def _finish_round(self, seconds: float) -> None:
        if self._measuring is not None:
            limit, self._measuring = self._measuring, None
            self._fastest, self._rounds = seconds, 0
            self._start_round(limit)
            return
        self._fastest = min(self._fastest, seconds)
        self._rounds += 1
        gradient = min(1.0, max(_STEEPEST, _TOLERANCE * self._fastest / seconds)) if seconds else 1.0
        was_used = self._peak > self._limit / 2
        limit = self._limit * gradient + (sqrt(self._limit) if was_used else 0.0)
        if gradient < 1.0 and self._rounds >= _ROUNDS_TO_MEASURE:
            self._measuring = self._clamp(limit)
            limit *= _MEASURE_SHARE
        self._start_round(limit)

    def _start_round(self, limit: float) -> None:
        self._limit = self._clamp(limit)
        self._round += 1
        self._ended = 0
        self._seconds = 0.0
        self._peak = self._in_flight

    def _clamp(self, limit: float) -> float:
        return min(float(self._max), max(float(min(MIN_LIMIT, self._max)), limit))
