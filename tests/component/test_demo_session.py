from __future__ import annotations

from importlib import resources
from typing import Any

import msgspec
import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from relay.demo.player import choose_sessions
from relay.demo.session import MAX_BYTES, MAX_EVENTS, encode_batch, event_identities, load_recordings, recut
from relay.protocol.replay import decode_batch
from relay.sandbox.schema import BatchSchema, load_description
from relay.sandbox.store import envelope_digest, event_digest

FOLDER = resources.files("relay") / "demo" / "recordings"
NAMES = sorted(entry.name for entry in FOLDER.iterdir())


def read_lines(name: str) -> list[bytes]:
    """Return the batches of a recording."""
    return zstandard.ZstdDecompressor().stream_reader((FOLDER / name).read_bytes()).read().splitlines()


def split(batch: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return a batch without its events, and the events' bytes, by a parser that the demo does not use."""
    value = orjson.loads(batch)
    del value["replay"]["events"]
    replay = msgspec.json.decode(batch, type=dict[str, msgspec.Raw])["replay"]
    events = msgspec.json.decode(replay, type=dict[str, msgspec.Raw])["events"]
    return value, [bytes(event) for event in msgspec.json.decode(events, type=list[msgspec.Raw])]


def contents(batches: list[bytes]) -> list[tuple[str, bytes, bytes]]:
    """Return every event in order, each with its window and envelope."""
    found = []
    for batch in batches:
        value, events = split(batch)
        found += [(value["session"]["windowId"], envelope_digest(value), event) for event in events]
    return found


def recorded(window: str, events: list[tuple[int, int]], *, flush: str = "normal") -> bytes:
    """Return a recorded batch; an event is its timestamp and the length of its data."""
    return orjson.dumps(
        {
            "session": {"id": "s", "windowId": window, "startedAt": 1, "lastActivityAt": 2, "url": "u"},
            "user": {"anonymousId": "a"},
            "page": {"url": "u"},
            "replay": {
                "kept": True,
                "events": [{"timestamp": at, "type": 3, "data": "x" * size} for at, size in events],
                "sequence": 0,
            },
            "flush": flush,
        }
    )


@pytest.mark.parametrize("name", NAMES)
def test_recutting_keeps_every_event_of_the_recordings(name: str) -> None:
    """Each event keeps its bytes, its place among all others, its window and its envelope."""
    lines = read_lines(name)
    recording = recut(lines)
    sent = [encode_batch(batch, recording.session_id, index) for index, batch in enumerate(recording.batches)]
    assert contents(sent) == contents(lines)


@pytest.mark.parametrize("name", NAMES)
def test_recut_recordings_are_batches_of_a_chatty_client(name: str) -> None:
    """Each batch is valid, small unless it is one large event, numbered in order, and final where its session is."""
    schema = BatchSchema(load_description())
    lines = read_lines(name)
    recording = recut(lines)
    for sequence, batch in enumerate(recording.batches):
        text = encode_batch(batch, "fresh", sequence)
        assert schema.issues(orjson.loads(text)) == []
        decoded = decode_batch(text, 262_144)
        assert (decoded.session_id, decoded.window_id, decoded.sequence) == ("fresh", batch.window_id, sequence)
        assert decoded.event_count == len(batch.events) <= MAX_EVENTS
        assert len(batch.events) == 1 or sum(map(len, batch.events)) <= MAX_BYTES
    finals = [batch.is_final for batch in recording.batches]
    assert finals == [False] * (len(finals) - 1) + [orjson.loads(lines[-1]).get("flush") == "final"]
    due = [batch.due_seconds for batch in recording.batches]
    assert due == sorted(due)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["w1", "w2"]),
            st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([0, 9_000, MAX_BYTES])), min_size=1, max_size=50),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_recutting_keeps_every_event(batches: list[tuple[str, list[tuple[int, int]]]]) -> None:
    """Whatever the sizes, windows and clocks: nothing is lost, moved or due before what went before it."""
    lines = [recorded(window, events) for window, events in batches]
    recording = recut(lines)
    sent = [encode_batch(batch, "s", index) for index, batch in enumerate(recording.batches)]
    assert contents(sent) == contents(lines)
    assert all(len(batch.events) == 1 or sum(map(len, batch.events)) <= MAX_BYTES for batch in recording.batches)
    due = [batch.due_seconds for batch in recording.batches]
    assert due == sorted(due)


def test_only_the_last_piece_of_a_final_is_final() -> None:
    """A final batch that is cut stays final at its end alone."""
    recording = recut([recorded("w", [(1, 0)] * 41, flush="final")])
    assert [(len(batch.events), batch.is_final) for batch in recording.batches] == [(20, False), (20, False), (1, True)]


def test_a_large_event_travels_alone() -> None:
    """A snapshot is neither held back nor joined by its neighbours."""
    recording = recut([recorded("w", [(1, 0), (2, MAX_BYTES), (3, 0), (1_003, 0)])])
    assert [(len(batch.events), batch.due_seconds) for batch in recording.batches] == [(1, 0), (1, 0.001), (2, 1.002)]


def test_a_lone_surrogate_survives() -> None:
    """An envelope that no UTF-8 can hold is sent as it can be written, and the event's bytes as they are."""
    line = recorded("w", [(1, 1)]).replace(b'"a"', rb'"\ud83d"').replace(b'"x"', rb'"\ud83d"')
    recording = recut([line])
    text = encode_batch(recording.batches[0], "s", 0)
    assert rb'"anonymousId":"\ud83d"' in text
    assert text.endswith(rb'"events":[{"timestamp":1,"type":3,"data":"\ud83d"}]}}')


def test_identities_are_what_upstream_will_say() -> None:
    """An event is recognised by the digests that the sandbox keeps of its envelope and of its bytes."""
    batch = recut([recorded("w", [(1, 1), (2, 2)])]).batches[0]
    value = orjson.loads(encode_batch(batch, "other", 7))
    envelope = envelope_digest(value)
    assert event_identities(batch, "other") == [envelope + event_digest(event) for event in batch.events]


def test_sessions_repeat_under_other_names() -> None:
    """Beyond the recordings they are played again, never twice under one session id."""
    recordings = load_recordings()
    chosen = list(choose_sessions(recordings, 40))
    assert len(recordings) == 17
    assert len({session_id for session_id, _ in chosen}) == 40
    assert [session_id for session_id, _ in chosen[:17]] == [recording.session_id for recording in recordings]
    assert chosen[39][1] is recordings[5]
