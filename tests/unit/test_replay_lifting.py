"""Events are read in one pass where a guess about a body holds; a wrong guess must never show."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from relay.protocol import replay
from relay.protocol.replay import ClientBatch

EVENTS = [
    {"timestamp": 1, "type": 3, "data": {"positions": [1, 2]}},
    {"timestamp": 2.5, "type": 2, "data": {"events": ["]"]}},
    {"timestamp": 3, "type": 2, "data": None},
]
STAND_IN = json.loads(replay._STAND_IN)
STAND_IN_TEXT = replay._STAND_IN.decode()
LISTS = st.sampled_from([[], EVENTS, STAND_IN, [1]])
FRAGMENTS = [
    *(',"events":[]', f'"events":{STAND_IN_TEXT},', '"events":[', '"\\u0065vents":[],', STAND_IN_TEXT),
    *(',"replay":{"sequence":1,"events":[]}', f',"replay":{{"sequence":1,"events":{STAND_IN_TEXT}}}'),
    *("]", "}", "[", "{", ",", '"', '\\"', " ", '{"timestamp":1,"type":1,"data":0}'),
]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Bodies that hold `events` in many places, in any order, some of them damaged."""
    members: dict[str, Any] = {
        "session": {"id": "s", "windowId": "w", "startedAt": 1, "lastActivityAt": 2, "url": "u"},
        "user": {"anonymousId": "a", "properties": draw(st.none() | st.fixed_dictionaries({"events": LISTS}))},
        "page": {"url": draw(st.sampled_from(["u", '"events":[', "]", STAND_IN_TEXT]))},
        "replay": draw(st.sampled_from([{"events": EVENTS, "sequence": 3}, {"sequence": 3, "events": EVENTS}])),
        "flush": "final",
    }
    if draw(st.booleans()):
        members["metadata"] = {"languages": draw(LISTS)}
    if draw(st.booleans()):
        members["replay"] = {**members["replay"], "events": draw(LISTS)}
    names = draw(st.permutations(list(members)))
    text = json.dumps({name: members[name] for name in names}, separators=(",", ":"), ensure_ascii=False)
    for fragment in draw(st.lists(st.sampled_from(FRAGMENTS), max_size=2)):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + fragment + text[at + draw(st.integers(0, 3)) :]
    return text.encode()


def told(batch: ClientBatch) -> tuple[object, ...]:
    """Return all that a batch says."""
    identity = (batch.session_id, batch.window_id, batch.sequence, batch.is_final, batch.last_activity)
    return (*identity, batch.envelope, bytes(batch.events), batch.event_count)


@given(bodies())
@example(
    b'{"session":{"id":"s","windowId":"w","startedAt":1,"lastActivityAt":2,"url":"u"},"page":{"url":"u"},'
    b'"user":{"anonymousId":"a","properties":{"events":[{"timestamp":1,"type":1,"data":0}]}},'
    b'"replay":{"sequence":0,"events":' + replay._STAND_IN + b"}}"
)
def test_lifting_changes_nothing(body: bytes) -> None:
    """A body that decodes with its events lifted decodes to the same with its events in place."""
    lifted = replay._lift_events(body)
    batch = lifted and replay._decode_plain(*lifted)
    if batch:
        in_place = replay._decode_plain(body, None)
        assert in_place is not None
        assert told(batch) == told(in_place)


def test_sdk_bodies_are_lifted() -> None:
    """A body as the SDK writes it is read in one pass."""
    members = {
        "session": {"id": "s", "windowId": "w", "startedAt": 1, "lastActivityAt": 2, "url": "u"},
        "user": {"anonymousId": "a"},
        "page": {"url": "u"},
        "metadata": {"language": "de"},
        "replay": {"sequence": 3, "events": EVENTS},
        "flush": "final",
    }
    body = json.dumps(members, separators=(",", ":")).encode()
    lifted = replay._lift_events(body)
    assert lifted is not None
    batch = replay._decode_plain(*lifted)
    assert batch is not None
    assert batch.event_count == len(EVENTS)
