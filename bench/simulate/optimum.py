"""The yardstick: the fewest requests that deliver a trace, were all of it known beforehand and no event in a hurry.

Within a window events keep their order, so a batch is a run of neighbours, and taking as many as fit each time is
optimal: no other choice gets further with as many batches. Only an envelope's change, a final and the two limits end
a batch; a single event over the limit travels alone.

Written apart from the relay's own cut, so that the two may be held against each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from bench.simulate.traffic import Arrival
from relay.protocol.cut import Limits, address, body_prefix, body_suffix

_LAST_ACTIVITY = b"1700000000000"


class _Window:
    __slots__ = ("envelope_id", "events", "is_over", "requests", "room")

    def __init__(self) -> None:
        self.requests = 0
        self.envelope_id: int | None = None
        self.events = 0
        """Free in the open batch."""
        self.room = 0
        """Bytes free in it, for events with a comma each."""
        self.is_over = False


def fewest_requests(arrivals: Iterable[Arrival], limits: Limits) -> int:
    """Return the optimum of a trace, whose arrivals are in order within each window."""
    windows: dict[tuple[int, int], _Window] = {}
    for arrival in arrivals:
        window = windows.get(arrival.window)
        if window is None:
            window = windows[arrival.window] = _Window()
        _fill(window, arrival, limits)
    return sum(window.requests for window in windows.values())


def _fill(window: _Window, arrival: Arrival, limits: Limits) -> None:
    batch = arrival.batch
    is_open = window.envelope_id == batch.envelope_id and not window.is_over
    at, count = 0, len(batch.events)
    while at < count:
        if is_open:
            fitting = bisect_right(batch.offsets, batch.offsets[at] + window.room) - 1 - at
            taken = min(fitting, window.events, count - at)
            if arrival.is_final and taken == count - at:  # `flush` has to fit, too
                taken -= batch.offsets[count] - batch.offsets[at] + _final_bytes() > window.room
            window.events -= taken
            window.room -= batch.offsets[at + taken] - batch.offsets[at]
            at += taken
        if at < count:
            window.requests += 1
            window.events = limits.max_events
            prefix = body_prefix(batch.envelope, _LAST_ACTIVITY, address(arrival.sequence, at))
            # The last event of a batch has no comma.
            window.room = limits.max_bytes - len(prefix) - len(body_suffix(is_final=False)) + 1
            if batch.run_bytes(at, at + 1) >= window.room:  # alone, over the limit
                window.events = 0
                at += 1
            is_open = True
    window.envelope_id = batch.envelope_id
    window.is_over = arrival.is_final


def _final_bytes() -> int:
    return len(body_suffix(is_final=True)) - len(body_suffix(is_final=False))
