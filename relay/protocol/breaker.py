"""The breaker: after a run of failures, one probe at a time instead of everything at once.

closed ──(`max_failures` in a row, or `trip`)──► open ──(its time has come)──► one probe in flight
   ▲                                              ▲                                  │
   └───────────────(it succeeds)──────────────────┼──────────(it fails)──────────────┘

Sends that were in flight when it opened count as probes: the next begins when the last of them has ended.
"""

from __future__ import annotations

from math import inf


class Breaker:
    """Decides when a lane may send.

    Args:
        max_failures: Failures in a row that open it.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0
        self._probe_at: float | None = None
        self._in_flight = 0

    @property
    def is_open(self) -> bool:
        """Whether only probes are sent."""
        return self._probe_at is not None

    @property
    def failures(self) -> int:
        """Failures since the last success."""
        return self._failures

    def ready_at(self) -> float:
        """Return from when on a send may begin: now (-inf), at a time, or not before what is in flight ends (inf)."""
        if self._probe_at is None:
            return -inf
        return inf if self._in_flight else self._probe_at

    def begin(self) -> None:
        """Note that a send begins."""
        self._in_flight += 1

    def end(self) -> None:
        """Note that a send that began is over, whether or not it came to an answer."""
        self._in_flight -= 1

    def succeed(self) -> None:
        """Note an answer that shows upstream at work."""
        self._failures = 0
        self._probe_at = None

    def fail(self, now: float, delay_seconds: float) -> None:
        """Note a failure; the next probe, if it comes to that, is `delay_seconds` away."""
        self._failures += 1
        if self._probe_at is not None or self._failures >= self._max_failures:
            self._probe_at = now + delay_seconds

    def trip(self, now: float, delay_seconds: float) -> None:
        """Open at once: upstream refuses everything of this lane until something changes there."""
        self._failures += 1
        self._probe_at = now + delay_seconds
