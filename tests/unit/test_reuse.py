"""What is new in a batch that bears the sequence of another one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.codings import crc32
from relay.protocol.node_json import split_events
from relay.protocol.replay import ClientBatch, Envelope
from relay.protocol.reuse import Earlier, Known, find_known, rest_of

A, B, C, D, E = (b'{"timestamp":%d,"type":3,"data":{"n":%d,"of":"x"}}' % (number, number) for number in range(5))


def sent(*events: bytes, comma: bytes = b",") -> ClientBatch:
    """Return a batch of these events."""
    return ClientBatch("s", "w", 0, False, b"1", Envelope(b"", b""), comma.join(events), len(events))


class Past:
    """The batches of one sequence that were stored, and what of their events is still in the spool."""

    def __init__(self) -> None:
        self.marks: list[Earlier] = []
        self.spooled: dict[int, Sequence[bytes]] = {}

    def add(self, batch: ClientBatch) -> Known:
        """Store a batch as the relay would; returns what of it was known."""
        known = self.find(batch) if self.marks else Known(0, 0, 0)
        rest = rest_of(batch, known)
        number = len(self.marks) + 1
        shape = (batch.event_count, len(batch.events), crc32(batch.events))
        if rest.event_count:
            self.marks.append(Earlier(number, 1, 0, 0, *shape, known.event_count, known.mark_id))
            self.spooled[number] = split_events(bytes(rest.events))
        return known

    def find(self, batch: ClientBatch) -> Known:
        """Compare a batch with what was stored."""
        return find_known(batch, self.marks, self.stored)

    def stored(self, earlier: Earlier) -> Iterable[bytes]:
        """Yield what is left in the spool."""
        yield from self.spooled[earlier.mark_id]

    def deliver(self) -> None:
        """Let everything leave the spool."""
        self.spooled = dict.fromkeys(self.spooled, ())


def past_of(*batches: Sequence[bytes], is_delivered: bool = False) -> Past:
    """Return a past of batches."""
    past = Past()
    for events in batches:
        past.add(sent(*events))
    if is_delivered:
        past.deliver()
    return past


@pytest.mark.parametrize("is_delivered", [False, True])
@pytest.mark.parametrize(
    ("past", "batch", "known"),
    [
        ([[A, B]], [A, B, C], 2),
        ([[A, B]], [C, D], 0),
        ([[A, B], [A, B, C]], [A, B, C, D], 3),
        ([[A, B], [A, B, C]], [A, B, D], 2),
        ([[A, B], [C]], [C, D], 1),
        ([[A, B], [C]], [A, B, D], 2),
        ([[A, B], [C, D], [C, D, E]], [A, B, E], 2),
    ],
)
def test_whole_batches_are_recognised(
    past: list[list[bytes]], batch: list[bytes], known: int, *, is_delivered: bool
) -> None:
    """What begins with the whole of an earlier batch is known so far, wherever that batch is by now."""
    assert past_of(*past, is_delivered=is_delivered).find(sent(*batch)).event_count == known


@pytest.mark.parametrize(
    ("past", "batch", "known"),
    [
        ([[A, B, C]], [A, B, D], 2),
        ([[A, B, C]], [A, B], 2),
        ([[A, B], [A, B, C, D]], [A, B, C, E], 3),
        ([[A, B], [C, D], [C, D, E]], [C, D, A], 2),
        ([[A, B], [A, C], [A, C, D]], [A, C, E], 2),
    ],
)
def test_part_of_a_batch_is_recognised_while_it_is_spooled(
    past: list[list[bytes]], batch: list[bytes], known: int
) -> None:
    """A common beginning of any length is found, through batches of which only the end was new; later it is not."""
    assert past_of(*past).find(sent(*batch)).event_count == known
    assert past_of(*past, is_delivered=True).find(sent(*batch)).event_count in {0, len(past[0])}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ('{"timestamp":1,"type":3,"data":{"a":1,"b":2}}', '{"type":3, "data":{"b":2.0,"a":1},"timestamp":1}', True),
        ('{"timestamp":1,"type":3,"data":"é"}', '{"timestamp":1,"type":3,"data":"\\u00e9"}', True),
        ('{"timestamp":1e2,"type":3,"data":0}', '{"timestamp":100,"type":3,"data":-0}', False),
        ('{"timestamp":1e2,"type":3,"data":0}', '{"timestamp":100,"type":3.0,"data":0}', True),
        ('{"timestamp":1,"type":3,"data":true}', '{"timestamp":1,"type":3,"data":1}', False),
        ('{"timestamp":1,"type":3,"data":null}', '{"timestamp":1,"type":3,"data":0}', False),
        ('{"timestamp":1,"type":3,"data":[1,2]}', '{"timestamp":1,"type":3,"data":[2,1]}', False),
        ('{"timestamp":1,"type":3,"data":"\\ud83d"}', '{"timestamp":1,"type":3,"data":"\\uD83D"}', True),
        ('{"timestamp":9007199254740993,"type":3,"data":0}', '{"timestamp":9007199254740992,"type":3,"data":0}', True),
    ],
)  # fmt: skip
def test_events_written_anew_are_the_same(first: str, second: str, *, same: bool) -> None:
    """Events are compared as JavaScript would read them."""
    assert past_of([first.encode()]).find(sent(second.encode(), A)).event_count == same


def test_nesting_beyond_comparison_is_new() -> None:
    """Values too deep to be compared are kept rather than lost."""
    deep = b'{"timestamp":1,"type":3,"data":%b%b}' % (b"[" * 100_000, b"]" * 100_000)
    assert past_of([deep]).find(sent(deep.replace(b":3", b": 3"))).event_count == 0
    assert past_of([deep]).find(sent(deep, A)).event_count == 1


def test_blanks_between_events_count_as_they_were_sent() -> None:
    """A client that writes blanks behind its commas grows its batch like any other, and loses only them."""
    past = Past()
    past.add(sent(A, B, comma=b", "))
    past.deliver()
    grown = sent(A, B, C, D, comma=b", ")
    assert rest_of(grown, past.find(grown)).events == C + b"," + D


@given(st.data())
def test_nothing_is_lost_and_nothing_new_is_known(data: st.DataObject) -> None:
    """Whatever is sent under one sequence, in any order: the known part of a batch was stored, in its order.

    And whatever is sent again is known to the last event, for as long as the earlier ones are spooled.
    """
    batches = st.lists(st.sampled_from([A, B, C, D, E]), min_size=1, max_size=6, unique=True)
    past = Past()
    stored: list[bytes] = []
    contents: list[tuple[bytes, ...]] = []
    for events in data.draw(st.lists(batches, min_size=1, max_size=6)):
        known = past.add(sent(*events)).event_count
        longest = max((_common(events, content) for content in contents), default=0)
        assert known == longest
        assert set(events[:known]) <= set(stored)
        stored += events[known:]
        contents.append(tuple(events))
        assert past.find(sent(*events)).event_count == len(events)


def _common(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count


def test_what_is_known_is_what_was_sent() -> None:
    """The rest of a batch is its own bytes, and JSON."""
    past = past_of([A])
    rest = rest_of(sent(A, B, C), past.find(sent(A, B, C)))
    assert (rest.event_count, rest.events) == (2, B + b"," + C)
    assert len(json.loads(b"[%b]" % bytes(rest.events))) == 2
