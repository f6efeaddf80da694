"""The crowd's own honesty: what it sends is what its optimum is counted over. What it finds is in bench/README.md."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from bench.crowd.scripts import Scripts, excerpt, window_id
from bench.crowd.upstream import Stored, counts, delivery_delays
from bench.simulate.figures import Delays
from bench.simulate.optimum import fewest_requests
from bench.simulate.traffic import Arrival, arrivals
from relay.demo.audit import WindowId
from relay.demo.session import encode_batch
from relay.protocol.cut import Limits
from relay.protocol.replay import decode_batch

SCRIPTS = Scripts(arrivals("mix", 10, 60.0, seed=1))
TOTALS = counts(Stored(0, 0.0, window_id(arrival), len(arrival.batch.events)) for arrival in SCRIPTS.trace)


def events_of(trace: list[Arrival]) -> dict[WindowId, list[bytes]]:
    """Return a trace's events by window, in order."""
    found: dict[WindowId, list[bytes]] = {}
    for arrival in trace:
        found.setdefault(window_id(arrival), []).extend(arrival.batch.events)
    return found


def test_scripts_say_what_the_trace_says() -> None:
    """Every batch that is played is the trace's, as the relay reads it: names, number, envelope, events and end."""
    played = {recording.session_id: recording for recording in SCRIPTS.recordings}
    assert len(SCRIPTS.trace) == sum(len(recording.batches) for recording in SCRIPTS.recordings)
    for arrival in SCRIPTS.trace:
        session, window = window_id(arrival)
        small = played[session].batches[arrival.sequence]
        assert small.due_seconds == arrival.at
        sent = decode_batch(encode_batch(small, session, arrival.sequence), 1_000_000)
        assert (sent.session_id, sent.window_id, sent.sequence) == (session, window, arrival.sequence)
        assert (sent.envelope, sent.is_final) == (arrival.batch.envelope, arrival.is_final)
        assert int.from_bytes(sent.envelope.digest) == arrival.batch.envelope_id
        assert bytes(sent.events) == b",".join(arrival.batch.events)


@given(st.fixed_dictionaries({window: st.integers(0, total) for window, total in TOTALS.items()}))
def test_excerpts_add_up(middle: dict[WindowId, int]) -> None:
    """Two excerpts that meet have each event once, and together need no fewer requests than the whole."""
    first, second = excerpt(SCRIPTS.trace, {}, middle), excerpt(SCRIPTS.trace, middle, TOTALS)
    whole, head, tail = events_of(SCRIPTS.trace), events_of(first), events_of(second)
    assert {window: head.get(window, []) + tail.get(window, []) for window in whole} == whole
    assert all(len(head.get(window, [])) == count for window, count in middle.items())
    limits = Limits(500, 1_048_576)
    needed = fewest_requests(SCRIPTS.trace, limits)
    assert needed <= fewest_requests(first, limits) + fewest_requests(second, limits)
    assert fewest_requests(first, limits) <= needed


def test_delays_count_from_when_an_event_was_due() -> None:
    """Whatever the cuts, each event has the delay from its own client batch to the upstream batch that carries it."""
    first = SCRIPTS.trace[0]
    events = len(first.batch.events)
    window = window_id(first)
    later = msgspec.structs.replace(first, at=first.at + 10)
    merged = [Stored(1, first.at + 15, window, events + 1), Stored(2, first.at + 100, window, events - 1)]
    found = delivery_delays([first, later], merged)
    assert (found.count, found.max) == (2 * events, 90.0)
    assert delivery_delays([first, later], merged[:1]) == Delays(15.0, 15.0, 15.0, events + 1)
