"""The cut: which events form an upstream batch, and the number it bears.

Rules:
1. An event's address is `client_sequence * 16384 + index`; an upstream batch bears the address of its first event.
   So any cut, at any time, by any relay, is unique and increasing, with no counter to share.
2. No batch has more than `max_events` events or `max_bytes` bytes of body; only a single event that is itself too
   large travels alone.
3. Segments merge only within one window and one envelope, in order of address, and nothing follows a final.
4. While more is pending than fits, a batch is filled to the limit exactly: the segment that does not fit whole is
   split at an event boundary.

The functions choose; the spool makes the choice durable before a byte is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import msgspec

from relay.protocol.node_json import split_events
from relay.protocol.replay import ClientBatch, Envelope
from relay.protocol.schema import MAX_BATCH_EVENTS

_EVENTS_OPEN = b',"events":['
_CLOSE = b"]}}"
_CLOSE_FINAL = b']},"flush":"final"}'

_NUMBERS_BYTES = 32 + 16
"""The longest lastActivityAt and the longest address (2**53) in digits."""


class Limits(msgspec.Struct, frozen=True):
    """What one upstream batch may be."""

    max_events: int
    """Events."""
    max_bytes: int
    """Bytes of the whole body, uncompressed."""

    def fullness(self, events: int, events_bytes: int) -> float:
        """Return how full a batch is, 0 to 1: its share of the nearer limit; a single larger event is full."""
        return min(1.0, max(events / self.max_events, events_bytes / self.max_bytes))


class Run(msgspec.Struct, frozen=True, gc=False):
    """Consecutive events of one client batch."""

    index: int
    """Index of the first event in its client batch."""
    event_count: int
    """At least 1."""
    events: bytes | memoryview
    """The events, joined by commas."""


class Pending(msgspec.Struct, frozen=True, gc=False):
    """What the cut must know of a segment."""

    address: int
    """Of its first event."""
    event_count: int
    """At least 1."""
    events_bytes: int
    """Uncompressed, with the commas between its events."""
    envelope_id: int
    """Equal ids, equal envelopes."""
    last_activity: bytes
    """JSON text of a number."""
    is_final: bool
    """Whether it ends its session."""


class Cut(msgspec.Struct, frozen=True):
    """A choice: the first `whole` segments, and perhaps the beginning of the next."""

    whole: int
    """Segments taken whole."""
    split_events: int = 0
    """Largest number of events to take of the segment after them, never all it has; 0 to take none."""
    split_bytes: int = 0
    """Largest number of bytes these may have, with the commas between them."""


def overhead_bytes(envelope: Envelope) -> int:
    """Return what a body has beside its events, at most."""
    return len(envelope.head) + len(envelope.tail) + _NUMBERS_BYTES + len(_EVENTS_OPEN) + len(_CLOSE_FINAL)


def body_prefix(envelope: Envelope, last_activity: bytes, sequence: int) -> bytes:
    """Return an upstream body up to its first event."""
    return b"%b%b%b%d%b" % (envelope.head, last_activity, envelope.tail, sequence, _EVENTS_OPEN)


def body_suffix(*, is_final: bool) -> bytes:
    """Return an upstream body after its last event."""
    return _CLOSE_FINAL if is_final else _CLOSE


def cut_runs(batch: ClientBatch, limits: Limits) -> list[Run]:
    """Cut a client batch into the fewest runs, none of which is over the limits together with its envelope.

    A batch within the limits, as nearly all are, is one run: its bytes are not looked at.
    """
    max_bytes = limits.max_bytes - overhead_bytes(batch.envelope)
    if batch.event_count <= limits.max_events and len(batch.events) <= max_bytes:
        return [Run(0, batch.event_count, batch.events)]
    events = split_events(bytes(batch.events))
    runs = []
    start = 0
    while start < len(events):
        taken = take(events, start, limits.max_events, max_bytes) or 1
        runs.append(Run(start, taken, b",".join(events[start : start + taken])))
        start += taken
    return runs


def take(events: Sequence[bytes], start: int, max_events: int, max_bytes: int) -> int:
    """Return how many events from `start` on fit, with the commas between them; 0 where the first alone does not."""
    room = max_bytes + 1  # the first event has no comma before it
    for index in range(start, min(len(events), start + max_events)):
        room -= len(events[index]) + 1
        if room < 0:
            return index - start
    return min(len(events) - start, max_events)


def choose_cut(segments: Sequence[Pending], envelope: Envelope, limits: Limits, *, allow_final: bool) -> Cut:
    """Choose the next upstream batch from the pending segments of one window.

    Args:
        segments: In order of address, unsealed; the cut begins with the first.
        envelope: The first segment's.
        limits: Of an upstream batch.
        allow_final: Whether a final segment may be sent now. If not, the cut ends before it.

    Returns:
        The cut. `whole` and `split_events` are both 0 only where the first segment is a final not allowed.
    """
    fixed = len(body_prefix(envelope, b"", segments[0].address)) + len(body_suffix(is_final=False))
    events = 0
    room = limits.max_bytes - fixed + 1  # the first segment has no comma before it
    latest = b""
    for index, segment in enumerate(segments):
        if segment.envelope_id != segments[0].envelope_id or (segment.is_final and not allow_final):
            return Cut(index)
        later = later_activity(latest, segment.last_activity)
        left_events = limits.max_events - events
        left_bytes = room - len(later) - 1
        final_bytes = len(_CLOSE_FINAL) - len(_CLOSE) if segment.is_final else 0
        if segment.event_count > left_events or segment.events_bytes + final_bytes > left_bytes:
            return _split(segment, index, left_events, left_bytes)
        events += segment.event_count
        room -= segment.events_bytes + 1
        latest = later
        if segment.is_final:
            return Cut(index + 1)
    return Cut(len(segments))


def _split(segment: Pending, index: int, max_events: int, max_bytes: int) -> Cut:
    """Decide on the segment that does not fit whole."""
    if segment.event_count == 1:
        return Cut(index or 1)  # a single event cannot be split: it waits, or travels alone
    if index and (max_events < 1 or max_bytes < 1):
        return Cut(index)
    return Cut(index, max(1, min(max_events, segment.event_count - 1)), max(1, max_bytes))


def later_activity(first: bytes, second: bytes) -> bytes:
    """Return the greater of two lastActivityAt texts; an empty one is less than any."""
    if not first or (second != first and float(second) > float(first)):
        return second
    return first


def halve(sizes: Sequence[int]) -> int:
    """Return how many of the first to take so that both parts are as equal as can be: at least 1, and never all."""
    total = sum(sizes)
    return 1 + min(enumerate(accumulate(sizes[:-1])), key=lambda each: abs(2 * each[1] - total))[0]


def address(sequence: int, index: int) -> int:
    """Return the address of the event at `index` of the client batch with `sequence`."""
    return sequence * MAX_BATCH_EVENTS + index
