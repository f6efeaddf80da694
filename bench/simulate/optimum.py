"""The yardstick: the fewest requests that deliver a trace, were all of it known beforehand and no event in a hurry.

Within a window events keep their order, so a batch is a run of neighbours, and taking as many as fit each time is
optimal: what fits goes on fitting when events at its beginning are taken away, so no other choice gets further with as
many batches. Only a final, the limits and a change of the envelope end a batch, where pages are merged a change of more
than the page; a single event over the limit travels alone.

Two things are given, not chosen: an event is compressed beside those that it came with, as the relay does it once and
for all; and a batch grows client batch by client batch, within the limits with the envelope of each.

Written apart from the relay's own cut, so that the two may be held against each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from math import inf

from bench.simulate.traffic import Arrival, SdkBatch
from relay.protocol.assemble import COMMA_BYTES, frame_bytes
from relay.protocol.cut import Limits, address, body_prefix, body_suffix

_LAST_ACTIVITY = b"1700000000000"


class _Open:
    """A batch that is being filled."""

    def __init__(self, first_address: int) -> None:
        self.first_address = first_address
        self.events = 0
        self.run_bytes = 0
        self.deflated_bytes = 0
        """Both with a comma behind each client batch's part."""

    def room(self, arrival: Arrival, start: int, limits: Limits) -> int:
        """Return how many of a client batch's events, from `start` on, fit behind what is there."""
        batch = arrival.batch
        count = len(batch.events)
        prefix = body_prefix(batch.envelope, _LAST_ACTIVITY, self.first_address)

        def is_too_much(taken: int) -> bool:
            end = start + taken
            suffix = body_suffix(is_final=arrival.is_final and end == count)
            if len(prefix) + self.run_bytes + batch.run_bytes(start, end) + len(suffix) > limits.max_bytes:
                return True
            if limits.max_gzip_bytes == inf:
                return False
            sent = self.deflated_bytes + batch.deflated_bytes(start, end) + frame_bytes(prefix, suffix)
            return sent > limits.max_gzip_bytes

        most = min(limits.max_events - self.events, count - start)
        if most <= 0 or not is_too_much(most):
            return max(0, most)
        return bisect_left(range(1, most), True, key=is_too_much)

    def take(self, batch: SdkBatch, start: int, taken: int, limits: Limits) -> None:
        """Add events of a client batch."""
        self.events += taken
        self.run_bytes += batch.run_bytes(start, start + taken) + 1
        if limits.max_gzip_bytes < inf:
            self.deflated_bytes += batch.deflated_bytes(start, start + taken) + COMMA_BYTES


class _Window:
    def __init__(self) -> None:
        self.requests = 0
        self.last: Arrival | None = None
        self.batch = _Open(0)

    def add(self, arrival: Arrival, limits: Limits, *, merges_pages: bool) -> None:
        """Fill a client batch in, beginning new upstream batches where it must."""
        last, batch = self.last, arrival.batch
        may_merge = last is not None and not last.is_final and _may_merge(last.batch, batch, merges_pages=merges_pages)
        start, count = 0, len(batch.events)
        while start < count:
            taken = self.batch.room(arrival, start, limits) if may_merge else 0
            if not taken:
                self.requests += 1
                self.batch = _Open(address(arrival.sequence, start))
                taken = max(1, self.batch.room(arrival, start, limits))
                may_merge = True
            self.batch.take(batch, start, taken, limits)
            start += taken
        self.last = arrival


def _may_merge(one: SdkBatch, other: SdkBatch, *, merges_pages: bool) -> bool:
    if merges_pages:
        return one.likeness.pageless == other.likeness.pageless
    return one.likeness.digest == other.likeness.digest


def fewest_requests(arrivals: Iterable[Arrival], limits: Limits, *, merges_pages: bool = False) -> int:
    """Return the optimum of a trace, whose arrivals are in order within each window."""
    windows: dict[tuple[int, int], _Window] = {}
    for arrival in arrivals:
        window = windows.get(arrival.window)
        if window is None:
            window = windows[arrival.window] = _Window()
        window.add(arrival, limits, merges_pages=merges_pages)
    return sum(window.requests for window in windows.values())
