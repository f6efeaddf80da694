"""The pile: a spool in memory, for the simulator. Real segments, cut by the real functions; nothing is compressed.

Rule: it seals what `relay.spool` would seal of the same segments. The final's barrier is the spool's in short: a final
goes when it is all that its session has left.
"""

from __future__ import annotations

from collections import deque

import msgspec

from bench.simulate.traffic import Arrival, SdkBatch
from relay.protocol.cut import Limits, Pending, address, choose_cut, overhead_bytes, take

_LAST_ACTIVITY = b"1700000000000"
"""Any time of 13 digits."""

_CUT_SEGMENTS = 501
"""Segments that one cut looks at, as in the spool: one more than a batch can hold."""


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A run of events of one client batch."""

    batch: SdkBatch
    start: int
    """Index of its first event in the client batch."""
    end: int
    """Behind its last."""
    pending: Pending
    """What the cut looks at."""
    arrival: Arrival
    """The client batch's coming."""


class Sealed(msgspec.Struct, frozen=True):
    """An upstream batch."""

    number: int
    """Its identity."""
    session: int
    window: int
    segments: tuple[Segment, ...]
    """In order; at least one."""
    events: int
    events_bytes: int
    """Without the commas between segments."""
    finals: int
    """Final segments in it."""
    left: tuple[Segment, ...]
    """What the cut left of the segments that it looked at; empty where nothing is left."""


class Pile:
    """The pending segments of all windows."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._windows: dict[int, deque[Segment]] = {}
        self._ids: dict[tuple[int, int], int] = {}
        self._in_session: dict[int, int] = {}
        """Segments that are not upstream, sealed ones included."""
        self._sealed = 0

    def append(self, arrival: Arrival) -> tuple[int, list[Segment]]:
        """Add a client batch; returns its window's number and its segments."""
        window = self._ids.setdefault(arrival.window, len(self._ids) + 1)
        held = self._windows.setdefault(window, deque())
        added = []
        batch = arrival.batch
        for start, end in _runs(batch, self._limits):
            ends_session = arrival.is_final and end == len(batch.events)
            added.append(_segment(arrival, start, end, is_final=ends_session))
        held.extend(added)
        self._in_session[arrival.session] = self._in_session.get(arrival.session, 0) + len(added)
        return window, added

    def seal(self, window: int) -> Sealed | None:
        """Cut the window's next upstream batch; None where a final has to wait."""
        held = self._windows[window]
        seen = [held[index] for index in range(min(len(held), _CUT_SEGMENTS))]
        if not seen:
            return None
        session = seen[0].arrival.session
        envelope = seen[0].batch.envelope
        pending = [segment.pending for segment in seen]
        cut = choose_cut(pending, envelope, self._limits, allow_final=True)
        is_end = cut.whole > 0 and pending[cut.whole - 1].is_final
        if is_end and cut.whole == len(pending) and self._in_session[session] > cut.whole:
            cut = choose_cut(pending, envelope, self._limits, allow_final=False)
            if not cut.whole and not cut.split_events:
                return None
        chosen = [held.popleft() for _ in range(cut.whole)]
        if cut.split_events:
            whole = held.popleft()
            events = whole.batch.events
            taken = take(events, whole.start, cut.split_events, cut.split_bytes)
            taken = min(max(taken, 0 if chosen else 1), whole.end - whole.start - 1)
            if taken:
                middle = whole.start + taken
                chosen.append(_segment(whole.arrival, whole.start, middle, is_final=False))
                whole = _segment(whole.arrival, middle, whole.end, is_final=whole.pending.is_final)
                self._in_session[session] += 1
            held.appendleft(whole)
        self._sealed += 1
        return Sealed(
            self._sealed,
            session,
            window,
            tuple(chosen),
            sum(segment.pending.event_count for segment in chosen),
            sum(segment.pending.events_bytes for segment in chosen),
            sum(segment.pending.is_final for segment in chosen),
            tuple(held[index] for index in range(min(len(held), _CUT_SEGMENTS))),
        )

    def settle(self, sealed: Sealed) -> None:
        """Remove a batch that is upstream."""
        self._in_session[sealed.session] -= len(sealed.segments)


def _segment(arrival: Arrival, start: int, end: int, *, is_final: bool) -> Segment:
    batch = arrival.batch
    size = batch.run_bytes(start, end)
    number = address(arrival.sequence, start)
    pending = Pending(number, end - start, size, batch.envelope_id, _LAST_ACTIVITY, is_final)
    return Segment(batch, start, end, pending, arrival)


def _runs(batch: SdkBatch, limits: Limits) -> list[tuple[int, int]]:
    """Cut a client batch as `cut.cut_runs` does; returns start and end of each run."""
    max_bytes = limits.max_bytes - overhead_bytes(batch.envelope)
    count = len(batch.events)
    if count <= limits.max_events and batch.run_bytes(0, count) <= max_bytes:
        return [(0, count)]
    runs = []
    start = 0
    while start < count:
        end = start + (take(batch.events, start, limits.max_events, max_bytes) or 1)
        runs.append((start, end))
        start = end
    return runs
