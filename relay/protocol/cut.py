"""The cut: which events form an upstream batch, and the number it bears.

Rules:
1. An event's address is `client_sequence * 16384 + index`; an upstream batch bears the address of its first event.
   So any cut, at any time, by any relay, is unique and increasing, with no counter to share.
2. No batch is over one of the `Limits`; only a single event that is itself too large travels alone.
3. Segments merge only within one window and one envelope, in order of address, and nothing follows a final. With
   merged pages, envelopes may differ in their `page`; the batch bears that of its last segment.
4. While more is pending than fits, a batch is filled to the limit exactly: the segment that does not fit whole is
   split at an event boundary.
5. A batch grows segment by segment, and is within the limits with the envelope of each. So are all batches that it may
   be cut into later, whichever envelopes these end with.

The functions choose; the spool makes the choice durable before a byte is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import accumulate
from math import inf
from typing import Literal, TypeAlias

import msgspec

from relay.protocol.assemble import COMMA_BYTES, frame_bytes
from relay.protocol.node_json import split_events
from relay.protocol.replay import ClientBatch, Envelope
from relay.protocol.schema import MAX_BATCH_EVENTS

_EVENTS_OPEN = b',"events":['
_CLOSE = b"]}}"
_CLOSE_FINAL = b']},"flush":"final"}'

_NUMBERS_BYTES = 32 + 16
"""The longest lastActivityAt and the longest address (2**53) in digits."""

_JSON_TO_GZIP = 16
"""How much larger the JSON of a batch may be than its gzip body, where the latter is measured. Recorded batches deflate
to a sixteenth at best, so this is in the way of nothing but what was made to inflate. It bounds what upstream has to
hold; here a batch is never inflated, only now and then one of its segments."""

Merge: TypeAlias = Literal["strict", "page", "page-when-scarce"]
"""Whether segments whose envelopes differ in nothing but their `page` may share a batch."""

Measure: TypeAlias = Literal["json", "compressed"]
"""What a limit in bytes is about."""


class Limits(msgspec.Struct, frozen=True):
    """What one upstream batch may be."""

    max_events: int
    """Events."""
    max_bytes: int
    """Bytes of the whole body, uncompressed."""
    max_gzip_bytes: float = inf
    """Bytes of the whole body as it is sent; inf where only its JSON is limited."""

    def fullness(self, events: int, events_bytes: int, deflated_bytes: int) -> float:
        """Return how full a batch is, 0 to 1: its share of the nearest limit; a single larger event is full."""
        shares = (events / self.max_events, events_bytes / self.max_bytes, deflated_bytes / self.max_gzip_bytes)
        return min(1.0, max(shares))


def make_limits(max_events: int, max_bytes: int, measure: Measure) -> Limits:
    """Return the limits of an upstream batch, as the options of the section `batch` have them."""
    if measure == "json":
        return Limits(max_events, max_bytes)
    return Limits(max_events, _JSON_TO_GZIP * max_bytes, max_bytes)


class Likeness(msgspec.Struct, frozen=True, gc=False):
    """What decides whether segments may merge."""

    digest: bytes
    """Of the envelope."""
    pageless: bytes
    """Of all of it but the page."""


class Parting(IntEnum):
    """What parts a run of segments from those behind it."""

    NOTHING = 0
    PAGE = 1
    """Another page; nothing to those who merge pages."""
    ENVELOPE = 2
    """Something else in the envelope."""

    def parts(self, *, merges_pages: bool) -> bool:
        """Return whether the run ends there."""
        return self > (Parting.PAGE if merges_pages else Parting.NOTHING)


def parting(first: Likeness, second: Likeness) -> Parting:
    """Return what parts two segments."""
    if first.digest == second.digest:
        return Parting.NOTHING
    return Parting.PAGE if first.pageless == second.pageless else Parting.ENVELOPE


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
    deflated_bytes: int
    """As it is sent."""
    envelope_id: int
    """Equal ids, equal envelopes."""
    likeness: Likeness
    """Of that envelope."""
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
    split_deflated_bytes: float = inf
    """Largest number of bytes these may have as a segment."""


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


def choose_cut(
    segments: Sequence[Pending],
    envelope: Callable[[int], Envelope],
    limits: Limits,
    *,
    allow_final: bool,
    merges_pages: bool = False,
) -> Cut:
    """Choose the next upstream batch from the pending segments of one window.

    Args:
        segments: In order of address, unsealed; the cut begins with the first.
        envelope: Returns an envelope by its id; asked again only where the id changes from segment to segment.
        limits: Of an upstream batch.
        allow_final: Whether a final segment may be sent now. If not, the cut ends before it.
        merges_pages: Whether a changed page does not end the batch.

    Returns:
        The cut. `whole` and `split_events` are both 0 only where the first segment is a final not allowed.
    """
    events = run_bytes = deflated_bytes = 0  # the latter with a comma behind each segment
    latest = b""
    current = None
    for index, segment in enumerate(segments):
        is_parted = parting(segments[0].likeness, segment.likeness).parts(merges_pages=merges_pages)
        if is_parted or (segment.is_final and not allow_final):
            return Cut(index)
        if current is None or segment.envelope_id != segments[index - 1].envelope_id:
            current = envelope(segment.envelope_id)
        latest = later_activity(latest, segment.last_activity)
        prefix = body_prefix(current, latest, segments[0].address)
        left_events = limits.max_events - events
        left_bytes = limits.max_bytes - len(prefix) - len(_CLOSE) - run_bytes
        left_deflated = limits.max_gzip_bytes - deflated_bytes
        if left_deflated < inf:
            left_deflated -= frame_bytes(prefix, _CLOSE)
        final_bytes = len(_CLOSE_FINAL) - len(_CLOSE) if segment.is_final else 0
        if (
            segment.event_count > left_events
            or segment.events_bytes + final_bytes > left_bytes
            or segment.deflated_bytes + final_bytes > left_deflated
        ):
            return _split(segment, Cut(index, left_events, left_bytes, left_deflated))
        events += segment.event_count
        run_bytes += segment.events_bytes + 1
        deflated_bytes += segment.deflated_bytes + COMMA_BYTES
        if segment.is_final:
            return Cut(index + 1)
    return Cut(len(segments))


def _split(segment: Pending, room: Cut) -> Cut:
    """Decide on the segment that does not fit whole into the room that is left."""
    if segment.event_count == 1:
        return Cut(room.whole or 1)  # a single event cannot be split: it waits, or travels alone
    if room.whole and min(room.split_events, room.split_bytes, room.split_deflated_bytes) < 1:
        return Cut(room.whole)
    return Cut(
        room.whole,
        max(1, min(room.split_events, segment.event_count - 1)),
        max(1, room.split_bytes),
        max(1, room.split_deflated_bytes),
    )


def take_part(events: Sequence[bytes], cut: Cut, deflate: Callable[[bytes], bytes]) -> tuple[int, bytes]:
    """Return how many of a segment's events a cut takes, and these as a segment; 0 where not one fits into the rest.

    How far a run deflates is known only once it is done, so the number is searched for where that counts: the result
    fits and one more event would not.

    Args:
        events: Of the segment, as `split_events` returns them; more than the cut takes.
        cut: One that splits the segment.
        deflate: Makes a segment of a run.
    """
    least = 0 if cut.whole else 1  # a batch has at least one event
    most = max(least, take(events, 0, cut.split_events, cut.split_bytes))
    fitting, too_many, found = 0, most + 1, b""
    tried, by_proportion = most, True
    while too_many - fitting > 1:
        segment = deflate(b",".join(events[:tried]))
        if len(segment) <= cut.split_deflated_bytes or tried == least:
            fitting, found = tried, segment
            tried = (fitting + too_many) // 2
        else:
            too_many = tried
            # In turns by proportion, which is near at once, and by half, which is never far.
            tried = int(tried * cut.split_deflated_bytes / len(segment)) if by_proportion else (fitting + tried) // 2
            by_proportion = not by_proportion
        tried = min(max(tried, fitting + 1), too_many - 1)
    return fitting, found


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
