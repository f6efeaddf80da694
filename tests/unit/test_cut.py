from __future__ import annotations

import gzip
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.protocol.assemble import Piece, assemble
from relay.protocol.codings import SegmentDeflater, crc32
from relay.protocol.cut import (
    Cut,
    Limits,
    Pending,
    address,
    body_prefix,
    body_suffix,
    choose_cut,
    cut_runs,
    later_activity,
    overhead_bytes,
    take,
)
from relay.protocol.node_json import split_events
from relay.protocol.replay import ClientBatch, Envelope
from relay.protocol.schema import MAX_BATCH_EVENTS, MAX_SEQUENCE

ENVELOPE = Envelope(b'{"session":{"id":"s","lastActivityAt":', b'},"user":{},"page":{},"replay":{"sequence":')
FIXED_BYTES = overhead_bytes(ENVELOPE)


def make_events(sizes: Sequence[int]) -> list[bytes]:
    """Return one event of each size, at least 2 bytes, no two alike where there is room."""
    return [b'"%b"' % (b"%d." % index + b"x" * size)[: size - 2] for index, size in enumerate(sizes)]


def make_batch(events: Sequence[bytes], envelope: Envelope = ENVELOPE) -> ClientBatch:
    """Return a client batch of these events."""
    return ClientBatch("s", "w", 0, False, b"1", envelope, b",".join(events), len(events))


# -- cutting a client batch

SIZES = st.lists(st.integers(2, 60), min_size=1, max_size=30)


def fewest_runs(sizes: Sequence[int], max_events: int, max_bytes: int) -> int:
    """Return the least number of runs, trying every cut."""
    best = [0]
    for end in range(1, len(sizes) + 1):
        fitting = [
            best[start]
            for start in range(max(0, end - max_events), end)
            if end - start == 1 or sum(sizes[start:end]) + end - start - 1 <= max_bytes
        ]
        best.append(min(fitting) + 1)
    return best[-1]


@given(SIZES, st.integers(1, 10), st.integers(-5, 200))
@example([2], 1, -5)
@example([60, 60, 60], 500, 60)
def test_a_client_batch_is_cut_into_the_fewest_runs(sizes: list[int], max_events: int, max_bytes: int) -> None:
    """Every event is kept, no run is over a limit unless a single event is, and no run could be spared."""
    events = make_events(sizes)
    limits = Limits(max_events, FIXED_BYTES + max_bytes)
    runs = cut_runs(make_batch(events), limits)
    assert [event for run in runs for event in split_events(bytes(run.events))] == events
    position = 0
    for run in runs:
        assert (run.index, run.event_count) == (position, len(split_events(bytes(run.events))))
        position += run.event_count
        assert run.event_count <= max_events
        assert run.event_count == 1 or len(run.events) <= max_bytes
    assert len(runs) == fewest_runs(sizes, max_events, max_bytes)


@given(SIZES, st.integers(1, 10), st.integers(0, 200), st.integers(0, MAX_SEQUENCE), st.booleans())
def test_every_run_fits_with_its_envelope(
    sizes: list[int], max_events: int, room: int, sequence: int, final: bool
) -> None:
    """A run makes an upstream body within the limit by itself, whatever its numbers and flag turn out to be."""
    limits = Limits(max_events, FIXED_BYTES + room)
    for run in cut_runs(make_batch(make_events(sizes)), limits):
        prefix = body_prefix(ENVELOPE, b"1" * 32, address(sequence, run.index))
        body = prefix + bytes(run.events) + body_suffix(is_final=final)
        assert run.event_count == 1 or len(body) <= limits.max_bytes


def test_a_batch_within_the_limits_is_not_looked_at() -> None:
    """Its bytes become the one run as they are, blanks and all."""
    batch = msgspec.structs.replace(make_batch([b"1", b"2"]), events=memoryview(b" 1 , 2\n"))
    [run] = cut_runs(batch, Limits(2, FIXED_BYTES + 7))
    assert run.events is batch.events
    assert len(cut_runs(batch, Limits(2, FIXED_BYTES + 6))) == 1  # without its blanks it fits
    assert len(cut_runs(batch, Limits(1, FIXED_BYTES + 7))) == 2


def test_a_batch_of_all_addresses_and_30_mb_is_cut() -> None:
    """The largest batch a native app may send becomes full runs, every event in place."""
    events = make_events([1_010 + index % 1_700 for index in range(MAX_BATCH_EVENTS)])
    limits = Limits(500, 1_048_576)
    runs = cut_runs(make_batch(events), limits)
    assert sum(map(len, events)) > 30_000_000
    assert b",".join(bytes(run.events) for run in runs) == b",".join(events)
    assert max(run.event_count for run in runs) <= 500
    assert max(len(run.events) for run in runs) <= limits.max_bytes - FIXED_BYTES
    assert len(runs) <= 35


@given(SIZES, st.integers(0, 5), st.integers(0, 40), st.integers(-3, 200))
def test_take_counts_what_fits(sizes: list[int], start: int, max_events: int, max_bytes: int) -> None:
    """The count is the largest for which the events, joined, are within both limits."""
    events = make_events(sizes)
    fitting = [
        count
        for count in range(len(events[start:]) + 1)
        if count <= max_events and (count == 0 or len(b",".join(events[start : start + count])) <= max_bytes)
    ]
    assert take(events, min(start, len(events)), max_events, max_bytes) == max(fitting)


# -- choosing what to send


class Spooled(msgspec.Struct, frozen=True):
    """A pending segment with its events."""

    events: tuple[bytes, ...]
    pending: Pending


@st.composite
def windows(draw: st.DrawFn) -> list[Spooled]:
    """Return a window's pending segments: of one or two envelopes, a final perhaps among them."""
    segments: list[Spooled] = []
    sequence = draw(st.sampled_from([0, 1, 6_000, MAX_SEQUENCE - 50]))
    for _ in range(draw(st.integers(1, 7))):
        events = make_events(draw(st.lists(st.integers(2, 40), min_size=1, max_size=8)))
        pending = Pending(
            address(sequence, 0),
            len(events),
            len(b",".join(events)),
            draw(st.sampled_from([1, 1, 1, 1, 2])),
            draw(st.sampled_from([b"1", b"17e11", b"1700000000000", b"1700000000000.0625", b"-1"])),
            draw(st.sampled_from([False, False, False, True])),
        )
        segments.append(Spooled(tuple(events), pending))
        sequence += draw(st.integers(1, 3))
    return segments


def model(segments: list[Spooled], limits: Limits, *, allow_final: bool) -> list[bytes]:
    """Return the events of the next batch, added one by one as long as the real body stays within the limits."""
    taken: list[bytes] = []
    activities: list[bytes] = []
    for segment in segments:
        pending = segment.pending
        if pending.envelope_id != segments[0].pending.envelope_id or (pending.is_final and not allow_final):
            return taken
        activities.append(pending.last_activity)
        for index, event in enumerate(segment.events):
            ends = pending.is_final and index == len(segment.events) - 1
            prefix = body_prefix(ENVELOPE, max(activities, key=float), segments[0].pending.address)
            body = prefix + b",".join([*taken, event]) + body_suffix(is_final=ends)
            if taken and (len(taken) == limits.max_events or len(body) > limits.max_bytes):
                return taken
            taken.append(event)
        if pending.is_final:
            return taken
    return taken


def carry_out(segments: list[Spooled], choice: Cut) -> list[bytes]:
    """Return the events that the spool seals for a cut."""
    taken = [event for segment in segments[: choice.whole] for event in segment.events]
    if choice.split_events:
        events = segments[choice.whole].events
        assert choice.split_events < len(events)
        count = take(events, 0, choice.split_events, choice.split_bytes)
        taken += events[: count if taken else max(count, 1)]
    return taken


ROOM = st.integers(len(body_prefix(ENVELOPE, b"1", 0)) - 5, len(body_prefix(ENVELOPE, b"1", 0)) + 400)


@given(windows(), st.integers(1, 30), ROOM, st.booleans())
def test_a_batch_is_filled_to_the_limit_exactly(
    segments: list[Spooled], max_events: int, max_bytes: int, allow_final: bool
) -> None:
    """The cut takes just what adding events one by one would: not one over, not one that would still have fitted."""
    limits = Limits(max_events, max_bytes)
    pending = [segment.pending for segment in segments]
    choice = choose_cut(pending, ENVELOPE, limits, allow_final=allow_final)
    taken = carry_out(segments, choice)
    assert taken == model(segments, limits, allow_final=allow_final)
    assert bool(taken) or (pending[0].is_final and not allow_final)
    whole = pending[: choice.whole]
    assert not any(segment.is_final for segment in whole[:-1])
    assert allow_final or not any(segment.is_final for segment in whole)


@given(windows(), st.integers(1, 30), ROOM)
def test_the_assembled_body_is_within_the_limits(segments: list[Spooled], max_events: int, max_bytes: int) -> None:
    """What goes over the wire, inflated, has at most the limit, unless a single event has more."""
    limits = Limits(max_events, max_bytes)
    choice = choose_cut([segment.pending for segment in segments], ENVELOPE, limits, allow_final=True)
    taken = carry_out(segments, choice)
    activity = b""
    for segment in segments[: choice.whole + bool(choice.split_events)]:
        activity = later_activity(activity, segment.pending.last_activity)
    run = b",".join(taken)
    piece = Piece(SegmentDeflater().deflate(run), crc32(run), len(run))
    is_final = choice.whole > 0 and segments[choice.whole - 1].pending.is_final and not choice.split_events
    prefix = body_prefix(ENVELOPE, activity, segments[0].pending.address)
    body = gzip.decompress(assemble(prefix, [piece], body_suffix(is_final=is_final)))
    assert len(taken) == 1 or (len(body) <= max_bytes and len(taken) <= max_events)


def make_pending(count: int, size: int, *, envelope: int = 1, final: bool = False) -> Pending:
    """Return a segment by its measures."""
    return Pending(0, count, size, envelope, b"1", final)


@pytest.mark.parametrize(
    ("segments", "allow_final", "choice"),
    [
        ([make_pending(1, 10)], True, Cut(1)),
        ([make_pending(1, 10**9)], True, Cut(1)),
        ([make_pending(1, 10, final=True)], False, Cut(0)),
        ([make_pending(1, 10), make_pending(1, 10, final=True)], False, Cut(1)),
        ([make_pending(1, 10, final=True), make_pending(1, 10)], True, Cut(1)),
        ([make_pending(1, 10), make_pending(1, 10, envelope=2)], True, Cut(1)),
        ([make_pending(1, 10), make_pending(1, 10**9)], True, Cut(1)),
        ([make_pending(600, 1_000)], True, Cut(0, 500, 1_048_576 - len(body_prefix(ENVELOPE, b"1", 0)) - 3)),
        ([make_pending(500, 1_000), make_pending(2, 10)], True, Cut(1)),
        ([make_pending(2, 10**9)], True, Cut(0, 1, 1_048_576 - len(body_prefix(ENVELOPE, b"1", 0)) - 3)),
    ],
)
def test_cuts_by_example(segments: list[Pending], allow_final: bool, choice: Cut) -> None:
    """The plain cases, at upstream's limits."""
    assert choose_cut(segments, ENVELOPE, Limits(500, 1_048_576), allow_final=allow_final) == choice


# -- numbers


@given(st.integers(0, MAX_SEQUENCE - 1), st.integers(0, MAX_BATCH_EVENTS - 1), st.integers(0, MAX_BATCH_EVENTS - 1))
def test_addresses_are_unique_and_increasing(sequence: int, index: int, other: int) -> None:
    """Events of a later batch have greater addresses, whatever their indexes, and all are safe integers."""
    assert address(sequence, index) < address(sequence + 1, other)
    assert (address(sequence, index) < address(sequence, other)) == (index < other)
    assert address(MAX_SEQUENCE, MAX_BATCH_EVENTS - 1) == 2**53 - 1


@pytest.mark.parametrize(
    ("first", "second", "later"),
    [(b"", b"1", b"1"), (b"1", b"2", b"2"), (b"2", b"1", b"2"), (b"1e3", b"1000", b"1e3"), (b"-2", b"-10", b"-2")],
)
def test_the_later_activity_is_the_greater_number(first: bytes, second: bytes, later: bytes) -> None:
    """Texts are compared as numbers; of equal ones the first stays."""
    assert later_activity(first, second) == later


def test_the_overhead_is_the_most_that_a_body_needs() -> None:
    """Longest numbers, final flag: the allowance is met exactly."""
    longest = body_prefix(ENVELOPE, b"1" * 32, 2**53 - 1) + body_suffix(is_final=True)
    assert len(longest) == overhead_bytes(ENVELOPE)
