"""The breaker: after a run of failures, one probe at a time instead of everything at once, and a gentle return.

closed ──(`max_failures` in a row, or `trip`)──► open ──(its time has come)──► one probe in flight
   ▲                                            ▲  ▲                                  │     │
   │                            (a failure)─────┘  └──────────(it fails)──────────────┘     │
   └──(`_FULL_SPEED` is reached)── resuming ◄──────────────(it succeeds)────────────────────┘

While resuming, each success allows one more in flight, so that what is allowed doubles with every round, and a failure
opens again at once: who has just come back is not buried under what has waited for it.

Sends that were in flight when it opened count as probes: the next begins when the last of them has ended.
"""

from __future__ import annotations

from math import inf

_FULL_SPEED = 8
"""Sends in flight from which on a return is complete: three rounds of doubling after the probe, and as many as a key
has in flight by default."""


class Breaker:
    """Decides when a lane may send.

    Args:
        max_failures: Failures in a row that open it.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0
        self._probe_at: float | None = None
        self._allowed: float = inf
        """Sends in flight, while not open."""
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
            return -inf if self._in_flight < self._allowed else inf
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
        self._allowed = 2 if self._probe_at is not None else self._allowed + 1
        if self._allowed >= _FULL_SPEED:
            self._allowed = inf
        self._probe_at = None

    def fail(self, now: float, delay_seconds: float) -> None:
        """Note a failure; the next probe, if it comes to that, is `delay_seconds` away."""
        self._failures += 1
        if self._probe_at is not None or self._allowed < inf or self._failures >= self._max_failures:
            self._probe_at = now + delay_seconds

    def trip(self, now: float, delay_seconds: float) -> None:
        """Open at once: upstream refuses everything of this lane until something changes there."""
        self._failures += 1
        self._probe_at = now + delay_seconds

    def hurry(self, now: float) -> None:
        """Let the next probe go now, if it is open."""
        if self._probe_at is not None:
            self._probe_at = now
