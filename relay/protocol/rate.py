"""What a token may still ask of the data API, by what upstream says of it and by our own count.

Rules:
1. Upstream's word counts: `X-RateLimit-Remaining` until `X-RateLimit-Reset`, less what was begun since; whatever its
   window is, no request is refused here that upstream has said it would take.
2. Where upstream has said nothing, a minute holds what the operator says that it holds (upstream's published limit).
3. A 429 blocks until its `Retry-After`, or until the reset that it names; one that names neither blocks nothing.
4. Times upstream gives by its own clock are made relative by its own `date`: no clock has to agree with another.
"""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from math import ceil, inf

import msgspec

from relay.protocol.fields import Fields, find_field, parse_date, parse_number
from relay.protocol.verdict import parse_retry_after

WINDOW_SECONDS = 60.0
"""Upstream's published window."""

MAX_WAIT_SECONDS = 300.0
"""A longer wait is clamped to this, as the forwarder does: the window is a minute, the rest is slack."""

_REMEMBERED = 1_000
"""Requests that are counted, of a minute: more than three times the published limit. Where the operator says that a
minute holds more, as many as that."""


class Spent(msgspec.Struct, frozen=True):
    """Why a request would be wasted."""

    wait_seconds: float
    """Until one may be sent, more than 0."""
    limit: int
    """Requests a window; 0 where nobody has said."""

    def fields(self, wall_now: float) -> Fields:
        """Return what a 429 says, as upstream's would.

        Args:
            wall_now: Seconds since the epoch.
        """
        seconds = max(1, ceil(self.wait_seconds))
        limit = ((b"x-ratelimit-limit", b"%d" % self.limit),) if self.limit else ()
        return (
            (b"retry-after", b"%d" % seconds),
            *limit,
            (b"x-ratelimit-remaining", b"0"),
            (b"x-ratelimit-reset", b"%d" % ceil(wall_now + self.wait_seconds)),
        )


class Rate:
    """Requests of one token, either its reads or its writes.

    Args:
        limit: Requests a minute as published; 0 to leave the count to upstream.
    """

    def __init__(self, limit: int) -> None:
        self._published = limit
        self._limit = limit
        self._begun: deque[float] = deque(maxlen=max(_REMEMBERED, limit))
        self._reported = 0
        """Left as upstream said, less what was begun since."""
        self._reported_at = -inf
        """When the request was begun whose answer said so."""
        self._reset_at = -inf
        """Until when that holds."""
        self._blocked_until = -inf

    @property
    def limit(self) -> int:
        """Requests a window, as upstream said last; as published before; 0 where neither is known."""
        return self._limit

    def remaining(self, now: float) -> int | None:
        """Return how many requests may be begun now; None where nobody knows."""
        if now < self._blocked_until:
            return 0
        if now < self._reset_at:
            return max(0, self._reported)
        if not self._published:
            return None
        since = max(self._reset_at, now - WINDOW_SECONDS)
        return max(0, self._limit - sum(at > since for at in self._begun))

    def spent(self, now: float) -> Spent | None:
        """Return how long a request has to wait; None where it may be sent."""
        if now < self._blocked_until:
            return Spent(self._blocked_until - now, self._limit)
        if now < self._reset_at:
            return Spent(self._reset_at - now, self._limit) if self._reported <= 0 else None
        if not self._published or len(self._begun) < self._limit:
            return None
        # Our own window opens when the oldest of the last `limit` requests leaves it.
        oldest = self._begun[-self._limit]
        is_full = oldest > max(self._reset_at, now - WINDOW_SECONDS)
        return Spent(oldest + WINDOW_SECONDS - now, self._limit) if is_full else None

    def begin(self, now: float) -> None:
        """Count a request."""
        self._begun.append(now)
        self._reported -= 1

    def take_back(self, begun_at: float) -> None:
        """Uncount a request that was never sent.

        Args:
            begun_at: When it was counted.
        """
        if begun_at in self._begun:
            self._begun.remove(begun_at)
            self._reported += begun_at > self._reported_at

    def learn(self, status: int, fields: Fields, *, begun_at: float, now: float, wall_now: float) -> None:
        """Take what an answer says.

        Args:
            status: Of the answer.
            fields: Of the answer.
            begun_at: When its request was counted.
            now: When it came.
            wall_now: The same, in seconds since the epoch.
        """
        limit = parse_number(find_field(fields, b"x-ratelimit-limit"))
        if limit:
            self._limit = limit
        date = parse_date(find_field(fields, b"date"))
        their_now = wall_now if date is None else date  # rule 4
        reset_at = self._parse_reset(fields, now, their_now)
        left = parse_number(find_field(fields, b"x-ratelimit-remaining"))
        if left is not None:
            self._report(left, begun_at, reset_at or begun_at + WINDOW_SECONDS, now)
        if status == 429:
            asked = find_field(fields, b"retry-after")
            wait = None if asked is None else parse_retry_after(asked, their_now, MAX_WAIT_SECONDS)
            if wait is not None:
                self._blocked_until = now + wait
                self._reset_at = min(self._reset_at, self._blocked_until)
            elif reset_at is not None:
                self._blocked_until = reset_at

    def _report(self, left: int, begun_at: float, reset_at: float, now: float) -> None:
        # Answers overtake one another: of those for one window the lowest counts.
        left -= sum(1 for _ in takewhile(lambda at: at > begun_at, reversed(self._begun)))
        is_same_window = now < self._reset_at and abs(reset_at - self._reset_at) < 1.5
        if not is_same_window or left < self._reported:
            self._reported, self._reported_at = left, begun_at
        self._reset_at = reset_at

    def _parse_reset(self, fields: Fields, now: float, their_now: float) -> float | None:
        """Return when the window resets, on our clock."""
        reset = parse_number(find_field(fields, b"x-ratelimit-reset"))
        if reset is None:
            return None
        return now + min(max(0.0, reset - their_now), MAX_WAIT_SECONDS)
