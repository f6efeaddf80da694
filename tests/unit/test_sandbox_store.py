from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.sandbox.store import Outcome, Store, StoredBatch, envelope_digest, event_digest


def make_batch(sequence: int = 0, **changes: Any) -> StoredBatch:
    """Return a stored batch of two events."""
    values: dict[str, Any] = {
        "sequence": sequence,
        "window_id": "w",
        "flush": "normal",
        "decoded_bytes": 100,
        "envelope": b"envelope",
        "digests": event_digest(b"1") + event_digest(b"2"),
        **changes,
    }
    return StoredBatch(**values)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.sampled_from([b"1", b"2"]))))
def test_the_first_of_each_number_is_kept(arrivals: list[tuple[str, int, bytes]]) -> None:
    """The store agrees with a dictionary that never overwrites."""
    store = Store()
    kept: dict[tuple[str, int], bytes] = {}
    for session_id, sequence, event in arrivals:
        outcome = store.add(session_id, make_batch(sequence, digests=event_digest(event)))
        first = kept.setdefault((session_id, sequence), event)
        assert outcome in (Outcome.STORED, Outcome.REPEATED, Outcome.CONFLICTING)
        assert (outcome is Outcome.CONFLICTING) == (first != event)
    held = {
        (session_id, batch["sequence"]): batch["digests"]
        for session_id, session in store.sessions.items()
        for batch in session.listing()["stored"]
    }
    assert held == {number: [event_digest(event).hex()] for number, event in kept.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"digests": event_digest(b"1")},
        {"digests": event_digest(b"2") + event_digest(b"1")},
        {"flush": "final"},
        {"window_id": "other"},
        {"envelope": b"changed"},
    ],
)
def test_a_repeat_that_says_something_else_is_a_conflict(change: dict[str, Any]) -> None:
    """Other events, another order, window, flush or envelope: keeping only the first loses something."""
    store = Store()
    assert store.add("s", make_batch()) is Outcome.STORED
    assert store.add("s", make_batch(**change)) is Outcome.CONFLICTING
    assert store.add("s", make_batch()) is Outcome.REPEATED
    assert not store.is_final("s")


def test_a_listing_is_in_sequence_order_and_tells_the_order_of_arrival() -> None:
    """Batches are listed by sequence; `order` counts stored batches over all sessions."""
    store = Store()
    store.add("s", make_batch(5, flush="final"))
    store.add("t", make_batch(1, window_id="v"))
    store.add("s", make_batch(2, window_id="v"))
    listing = store.sessions["s"].listing()
    assert [(batch["sequence"], batch["order"]) for batch in listing["stored"]] == [(2, 3), (5, 1)]
    del listing["stored"]
    assert listing == {"id": "s", "windows": 2, "batches": 2, "events": 4, "bytes": 200, "final": True}
    assert (store.is_final("s"), store.is_final("t"), store.is_final("u")) == (True, False, False)


BATCH: dict[str, Any] = {
    "session": {"id": "s", "lastActivityAt": 1, "x": "\ud83d"},
    "user": {"anonymousId": "a", "id": None},
    "page": {"url": "p"},
    "replay": {"events": [{}], "sequence": 1},
    "flush": "normal",
}


@pytest.mark.parametrize(
    "same",
    [
        {"flush": "final"},
        {"session": {"x": "\ud83d", "id": "s", "lastActivityAt": 9}},
        {"replay": {"sequence": 7, "events": []}},
    ],
)
def test_what_may_differ_between_batches_is_no_part_of_the_envelope(same: dict[str, Any]) -> None:
    """Flush, lastActivityAt, events, sequence and the order of members do not change the digest."""
    assert envelope_digest({**BATCH, **same}) == envelope_digest(BATCH)


@pytest.mark.parametrize(
    "other",
    [
        {"session": {"id": "s", "lastActivityAt": 1, "x": "\ud83e"}},
        {"user": {"anonymousId": "a"}},
        {"page": {"url": "q"}},
        {"metadata": None},
        {"unknown": 1},
        {"replay": {"events": [{}], "sequence": 1, "unknown": 1}},
    ],
)
def test_everything_else_is(other: dict[str, Any]) -> None:
    """Any other difference, in unknown members too, changes the digest."""
    assert envelope_digest({**BATCH, **other}) != envelope_digest(BATCH)
