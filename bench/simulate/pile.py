"""The pile: a spool in memory, for the simulator. Real segments, cut by the real functions; nothing is kept compressed.

Rule: it seals what `relay.spool` would seal of the same segments. The final's barrier is the spool's in short: a final
goes when it is all that its session has left.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from math import inf

import msgspec

from bench.simulate.traffic import Arrival, SdkBatch
from relay.protocol.codings import SegmentDeflater
from relay.protocol.cut import Limits, Parting, Pending, address, choose_cut, overhead_bytes, parting, take, take_part

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
    deflated_bytes: int
    """As they are sent; 0 where that does not matter."""
    finals: int
    """Final segments in it."""
    left: tuple[Segment, ...]
    """What the cut left of the segments that it looked at; empty where nothing is left."""


class Pile:
    """The pending segments of all windows.

    Args:
        limits: Of an upstream batch.
        run_bytes: Largest JSON of a segment with its envelope, as the intake cuts them.
    """

    def __init__(self, limits: Limits, run_bytes: int) -> None:
        self._limits = limits
        self._run_limits = Limits(limits.max_events, run_bytes)
        self._is_measured = limits.max_gzip_bytes < inf
        self._deflate = SegmentDeflater().deflate if self._is_measured else lambda _run: b""
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
        for start, end in _runs(batch, self._run_limits):
            ends_session = arrival.is_final and end == len(batch.events)
            added.append(self._segment(arrival, start, end, is_final=ends_session))
        held.extend(added)
        self._in_session[arrival.session] = self._in_session.get(arrival.session, 0) + len(added)
        return window, added

    def seal(self, window: int, *, merges_pages: bool = False) -> Sealed | None:
        """Cut the window's next upstream batch; None where a final has to wait."""
        held = self._windows[window]
        seen = [held[index] for index in range(min(len(held), _CUT_SEGMENTS))]
        if not seen:
            return None
        session = seen[0].arrival.session
        envelopes = {segment.pending.envelope_id: segment.batch.envelope for segment in seen}
        pending = [segment.pending for segment in seen]
        choose = partial(choose_cut, pending, envelopes.__getitem__, self._limits, merges_pages=merges_pages)
        cut = choose(allow_final=True)
        is_end = cut.whole > 0 and pending[cut.whole - 1].is_final
        if is_end and cut.whole == len(pending) and self._in_session[session] > cut.whole:
            cut = choose(allow_final=False)
            if not cut.whole and not cut.split_events:
                return None
        chosen = [held.popleft() for _ in range(cut.whole)]
        if cut.split_events:
            whole = held.popleft()
            taken, _ = take_part(whole.batch.events[whole.start : whole.end], cut, self._deflate)
            if taken:
                middle = whole.start + taken
                chosen.append(self._segment(whole.arrival, whole.start, middle, is_final=False))
                whole = self._segment(whole.arrival, middle, whole.end, is_final=whole.pending.is_final)
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
            sum(segment.pending.deflated_bytes for segment in chosen),
            sum(segment.pending.is_final for segment in chosen),
            tuple(held[index] for index in range(min(len(held), _CUT_SEGMENTS))),
        )

    def settle(self, sealed: Sealed) -> None:
        """Remove a batch that is upstream."""
        self._in_session[sealed.session] -= len(sealed.segments)

    def _segment(self, arrival: Arrival, start: int, end: int, *, is_final: bool) -> Segment:
        batch = arrival.batch
        number = address(arrival.sequence, start)
        sizes = (batch.run_bytes(start, end), batch.deflated_bytes(start, end) if self._is_measured else 0)
        envelope = (batch.envelope_id, batch.likeness)
        pending = Pending(number, end - start, *sizes, *envelope, _LAST_ACTIVITY, is_final)
        return Segment(batch, start, end, pending, arrival)


def parting_of(segments: tuple[Segment, ...]) -> Parting:
    """Return what parts the first of a window's segments from the rest."""
    return max((parting(segments[0].batch.likeness, each.batch.likeness) for each in segments), default=Parting.NOTHING)


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
