from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from math import inf

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.protocol.assemble import COMMA_BYTES, Piece, assemble, frame_bytes
from relay.protocol.codings import SegmentDeflater, crc32
from relay.protocol.cut import (
    Cut,
    Likeness,
    Limits,
    Pending,
    address,
    body_prefix,
    body_suffix,
    choose_cut,
    cut_runs,
    later_activity,
    make_limits,
    overhead_bytes,
    take,
    take_part,
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

ENVELOPES = {
    1: ENVELOPE,
    2: Envelope(ENVELOPE.head, ENVELOPE.tail.replace(b'"page":{}', b'"page":{"url":"/a/longer/one"}')),
    3: Envelope(ENVELOPE.head, ENVELOPE.tail.replace(b'"user":{}', b'"user":{"anonymousId":"other"}')),
    4: Envelope(ENVELOPE.head, ENVELOPE.tail.replace(b'"page":{}', b'"page":{"url":"%b"}' % (b"ab" * 300))),
}
"""A page, two longer ones, the second of which is long enough to be deflated, and another user."""

LIKENESS = {1: Likeness(b"1", b"x"), 2: Likeness(b"2", b"x"), 3: Likeness(b"3", b"y"), 4: Likeness(b"4", b"x")}

DEFLATER = SegmentDeflater()


class Spooled(msgspec.Struct, frozen=True):
    """A pending segment with its events."""

    events: tuple[bytes, ...]
    pending: Pending

    def part(self, count: int) -> Piece:
        """Return its first events as they are sent; all of them as they are kept."""
        run = b",".join(self.events[:count])
        return Piece(DEFLATER.deflate(run), crc32(run), len(run))


def make_segment(
    sequence: int, sizes: list[int], envelope_id: int, *, last_activity: bytes = b"1", is_final: bool = False
) -> Spooled:
    """Return the segment of a client batch with events of given sizes."""
    events = make_events(sizes)
    run = b",".join(events)
    deflated_bytes = len(DEFLATER.deflate(run))
    likeness = LIKENESS[envelope_id]
    pending = Pending(
        address(sequence, 0), len(events), len(run), deflated_bytes, envelope_id, likeness, last_activity, is_final
    )
    return Spooled(tuple(events), pending)


@st.composite
def windows(draw: st.DrawFn) -> list[Spooled]:
    """Return a window's pending segments: of a few envelopes, a final perhaps among them."""
    segments: list[Spooled] = []
    sequence = draw(st.sampled_from([0, 1, 6_000, MAX_SEQUENCE - 50]))
    pages = draw(st.sampled_from([(1,), (1, 1, 1, 2), (1, 2), (1, 1, 2, 2, 3), (1, 2, 4)]))
    for _ in range(draw(st.integers(1, 7))):
        segment = make_segment(
            sequence,
            draw(st.lists(st.integers(2, 40), min_size=1, max_size=8)),
            draw(st.sampled_from(pages)),
            last_activity=draw(st.sampled_from([b"1", b"17e11", b"1700000000000", b"1700000000000.0625", b"-1"])),
            is_final=draw(st.sampled_from([False, False, False, True])),
        )
        segments.append(segment)
        sequence += draw(st.integers(1, 3))
    return segments


def assembled(segments: Sequence[Spooled], last_count: int, *, ends: bool = True) -> bytes:
    """Return the gzip body of segments, of the last one its first events, under the last one's envelope."""
    pending = [segment.pending for segment in segments]
    activity = max((each.last_activity for each in pending), key=float)
    prefix = body_prefix(ENVELOPES[pending[-1].envelope_id], activity, pending[0].address)
    is_final = ends and pending[-1].is_final and last_count == pending[-1].event_count
    pieces = [segment.part(segment.pending.event_count) for segment in segments[:-1]]
    return assemble(prefix, [*pieces, segments[-1].part(last_count)], body_suffix(is_final=is_final))


def fits(segments: Sequence[Spooled], last_count: int, limits: Limits) -> bool:
    """Return whether the body of segments, of the last one its first events, is within the limits; really made."""
    count = sum(segment.pending.event_count for segment in segments[:-1]) + last_count
    body = assembled(segments, last_count)
    is_small = len(gzip.decompress(body)) <= limits.max_bytes and len(body) <= limits.max_gzip_bytes
    return count <= limits.max_events and is_small


def carry_out(segments: Sequence[Spooled], choice: Cut) -> tuple[int, int]:
    """Return how many segments the spool seals for a cut, and how many events of the last of them."""
    if choice.split_events:
        split = segments[choice.whole]
        assert choice.split_events < len(split.events)
        taken, deflated = take_part(split.events, choice, DEFLATER.deflate)
        assert deflated == (split.part(taken).deflated if taken else b"")
        if taken:
            return choice.whole + 1, taken
    return choice.whole, segments[choice.whole - 1].pending.event_count if choice.whole else 0


ROOM = st.integers(len(body_prefix(ENVELOPE, b"1", 0)) - 5, len(body_prefix(ENVELOPE, b"1", 0)) + 400)


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    """Return limits by JSON, or by the gzip body as well."""
    return Limits(draw(st.integers(1, 30)), draw(ROOM), draw(st.just(inf) | st.integers(150, 500)))


SHORT_PAGE_ONLY = Limits(2, len(body_prefix(ENVELOPE, b"1", 0)) + 10)
"""Room for two events of two bytes under the first page, and for none under a longer one."""


@given(windows(), limits(), st.booleans(), st.booleans())
@example([make_segment(0, [2], 2), make_segment(1, [2], 1)], SHORT_PAGE_ONLY, False, True)
def test_a_batch_is_filled_to_the_limit_exactly(
    segments: list[Spooled], limits: Limits, allow_final: bool, merges_pages: bool
) -> None:
    """The body is within the limits, one more event would not be, and it ends early only where the rule says so.

    A single event that is too large under its own page goes alone, even if the next page would have room for both.
    """
    pending = [segment.pending for segment in segments]
    choice = choose_cut(pending, ENVELOPES.__getitem__, limits, allow_final=allow_final, merges_pages=merges_pages)
    count, last_count = carry_out(segments, choice)
    if not count:
        assert pending[0].is_final
        assert not allow_final
        return
    taken = pending[:count]
    assert not any(segment.is_final for segment in taken[:-1]), "nothing follows a final"
    assert allow_final or not taken[-1].is_final or last_count < taken[-1].event_count
    key = "pageless" if merges_pages else "digest"
    assert len({getattr(segment.likeness, key) for segment in taken}) == 1
    is_within = fits(segments[:count], last_count, limits)
    assert is_within or (count, last_count) == (1, 1), "a single event may be larger"
    for earlier in range(1, count):
        assert fits(segments[:earlier], pending[earlier - 1].event_count, limits), "a part may be over the limit"
    if last_count < taken[-1].event_count:
        assert not fits(segments[:count], last_count + 1, limits)
    elif count < len(segments) and not taken[-1].is_final:
        following = pending[count]
        is_parted = getattr(following.likeness, key) != getattr(taken[0].likeness, key)
        is_barred = following.is_final and not allow_final
        assert is_parted or is_barred or not is_within or not fits(segments[: count + 1], 1, limits)


@given(st.lists(st.integers(2, 3_000), min_size=2, max_size=60), st.integers(1, 4_000), st.booleans())
def test_a_split_by_compressed_size_takes_few_tries(sizes: list[int], room: int, is_alone: bool) -> None:
    """The largest number of events is found that fits and with one more does not, in a few steps of deflating."""
    events = [os.urandom(size // 2).hex().encode() or b"1" for size in sizes]
    tries: list[bytes] = []

    def deflate(run: bytes) -> bytes:
        tries.append(run)
        return DEFLATER.deflate(run)

    cut = Cut(0 if is_alone else 1, len(events) - 1, 10**9, room)
    taken, deflated = take_part(events, cut, deflate)
    fitting = [count for count in range(len(events)) if len(DEFLATER.deflate(b",".join(events[:count]))) <= room]
    assert taken == max([*fitting[1:], int(is_alone)])
    assert deflated == (DEFLATER.deflate(b",".join(events[:taken])) if taken else b"")
    assert len(tries) <= 12


PIECES = st.binary(max_size=1_500)


@given(PIECES, st.lists(st.binary(min_size=1, max_size=200), max_size=6), PIECES)
def test_the_size_of_a_body_is_known_before_it_is_made(prefix: bytes, runs: list[bytes], suffix: bytes) -> None:
    """Frame, segments and commas are the assembled body, to the byte."""
    pieces = [Piece(DEFLATER.deflate(run), crc32(run), len(run)) for run in runs]
    commas = COMMA_BYTES * max(0, len(runs) - 1)
    size = frame_bytes(prefix, suffix) + sum(len(piece.deflated) for piece in pieces) + commas
    assert len(assemble(prefix, pieces, suffix)) == size


def test_limits_by_the_compressed_size_keep_a_bound_on_the_json() -> None:
    """The published number is the gzip body's then, and the JSON may be sixteen times as large."""
    assert make_limits(500, 1_000, "json") == Limits(500, 1_000)
    assert make_limits(500, 1_000, "compressed") == Limits(500, 16_000, 1_000)


def make_pending(count: int, size: int, *, envelope: int = 1, final: bool = False) -> Pending:
    """Return a segment by its measures."""
    return Pending(0, count, size, size // 6, envelope, LIKENESS[envelope], b"1", final)


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
    assert choose_cut(segments, ENVELOPES.__getitem__, Limits(500, 1_048_576), allow_final=allow_final) == choice


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
