"""Reuse: a client batch that bears the sequence of another one, and what of it is new.

A client that saw no answer sends its batch again; that is a retry, and recognised by its length and CRC without a look
at its events. But a client may also send something else under the same session, window and sequence: the failed batch
grown by newer events, or, after a reload that restarted its counter, events that have nothing to do with it. Upstream
would drop those silently.

Rules:
1. What a batch shares with an earlier one is their common beginning. What follows is new, and all of it where they
   share nothing: to deliver an event twice is better than to lose it.
2. A batch that begins with the whole of an earlier one is always recognised, by the bytes. A shorter common beginning
   is found as far as the earlier batch's events are still in the spool, event by event.
3. Events are compared as JSON values, as JavaScript reads them: a client may write one anew with its members in another
   order. Only what is compared by CRC must be the same bytes.
4. CRC-32 together with the length is enough against accident. Who forges it loses events of his own window only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import islice

import msgspec

from relay.protocol.codings import crc32
from relay.protocol.node_json import split_events
from relay.protocol.replay import ClientBatch


class Earlier(msgspec.Struct, frozen=True, gc=False):
    """A stored batch of the same session, window and sequence."""

    mark_id: int
    """Row of its mark; a later batch has a greater one."""
    window_id: int
    """Row of its window."""
    block: int
    """Where its new events are numbered: the sequence in their addresses."""
    first_index: int
    """Index of the first of them in the block."""
    event_count: int
    """Events of the batch as it was sent."""
    events_bytes: int
    """These, joined by commas, as they were sent."""
    crc: int
    """CRC-32 of that."""
    known_events: int
    """Its first so many events were stored before it."""
    known_in: int
    """Mark of the batch that they belong to; 0 where `known_events` is."""


class Known(msgspec.Struct, frozen=True, gc=False):
    """What of a batch was stored before."""

    event_count: int
    """Its first so many events."""
    mark_id: int
    """Of the batch that they belong to; 0 where they are none."""
    latest_id: int
    """The latest mark that it was compared with."""


Stored = Callable[[Earlier], Iterable[bytes]]
"""Yields the new events of an earlier batch, from the first on and as far as they are still in the spool."""


def find_known(batch: ClientBatch, earlier: Sequence[Earlier], stored: Stored) -> Known:
    """Find the longest beginning that a batch shares with one of the earlier ones (rules 1 to 3).

    Args:
        batch: As it was sent.
        earlier: In the order of their marks, at least one.
        stored: Reads their events.
    """
    split = cache(lambda: split_events(bytes(batch.events)))  # which a batch that has only grown does not need
    shared: dict[int, int] = {}
    for each in earlier:
        shared[each.mark_id] = _shared_events(batch, split, each, shared, stored)
    event_count, mark_id = max((count, mark_id) for mark_id, count in shared.items())
    return Known(event_count, mark_id if event_count else 0, earlier[-1].mark_id)


def rest_of(batch: ClientBatch, known: Known) -> ClientBatch:
    """Return what is new in a batch; it may have no events."""
    if not known.event_count:
        return batch
    rest = split_events(bytes(batch.events))[known.event_count :]
    return msgspec.structs.replace(batch, events=b",".join(rest), event_count=len(rest))


def _shared_events(
    batch: ClientBatch,
    split: Callable[[], Sequence[bytes]],
    earlier: Earlier,
    shared: dict[int, int],
    stored: Stored,
) -> int:
    """Return how many events a batch has in common with an earlier one, given what it shares with those before."""
    size = earlier.events_bytes
    # Equal bytes end where an event ends: events are objects, and the earlier run ended with one.
    if len(batch.events) >= size and crc32(batch.events[:size]) == earlier.crc:
        return earlier.event_count
    # What the earlier batch itself did not bring lies with another, and the comparison begins there.
    known = min(earlier.known_events, shared.get(earlier.known_in, 0))
    if known < earlier.known_events or known >= batch.event_count:
        return known
    return known + _count_same(split()[known:], stored(earlier))


def _count_same(ours: Sequence[bytes], theirs: Iterable[bytes]) -> int:
    """Return how many events two runs have in common from their beginning."""
    count = 0
    for our, their in zip(ours, islice(theirs, len(ours)), strict=False):
        if our != their and not _is_same_value(our, their):
            break
        count += 1
    return count


def _is_same_value(first: bytes, second: bytes) -> bool:
    """Return whether two JSON texts are the same to JavaScript, but for the order of members."""
    try:
        return _canonical(first) == _canonical(second)
    except RecursionError:  # nested too deeply to be compared, so they are taken for different (rule 1)
        return False


def _canonical(text: bytes) -> str:
    # Text, not values: to Python 1 == True. And every number is a double, as to JavaScript.
    return json.dumps(json.loads(text, parse_int=float), sort_keys=True)
