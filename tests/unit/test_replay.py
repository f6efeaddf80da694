from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from relay.errors import InvalidBatch, TooLarge
from relay.protocol import replay
from relay.protocol.codings import zstd_decompress
from relay.protocol.cut import body_prefix, body_suffix
from relay.protocol.node_json import split_events
from relay.protocol.replay import ClientBatch, decode_batch
from relay.protocol.schema import MAX_BATCH_EVENTS, MAX_SEQUENCE
from tests.unit.batches import changed, encode, make_batch, spelled

MAX_ENVELOPE_BYTES = 262_144


def decode(body: bytes) -> ClientBatch:
    """Return a body's batch under the default bound."""
    return decode_batch(body, MAX_ENVELOPE_BYTES)


def sent_again(batch: ClientBatch) -> bytes:
    """Return the upstream body that carries a whole client batch."""
    prefix = body_prefix(batch.envelope, batch.last_activity, batch.sequence)
    return prefix + bytes(batch.events) + body_suffix(is_final=batch.is_final)


def read(body: bytes) -> Any:
    """Return a body's value, without the default of flush."""
    value = json.loads(body.decode("utf-8", "replace").removeprefix("\ufeff"))
    if value.get("flush") == "normal":
        del value["flush"]
    return value


def fields(batch: ClientBatch | None) -> tuple[Any, ...]:
    """Return what a batch holds, comparable."""
    assert batch is not None
    identity = (batch.session_id, batch.window_id, batch.sequence, batch.is_final, batch.last_activity)
    return (*identity, batch.envelope, bytes(batch.events), batch.event_count)


def recorded_bodies() -> list[bytes]:
    """Return every client batch of the shipped recordings."""
    folder = resources.files("relay.demo").joinpath("recordings")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    texts = [zstd_decompress(file.read_bytes()) for file in files if file.name.endswith(".zst")]
    return [line for text in texts for line in text.splitlines() if line]


# -- what is kept


def test_recordings_come_through_both_paths_alike() -> None:
    """Every recorded batch is decoded without a second look, to the same result as with one, and nothing is lost."""
    bodies = recorded_bodies()
    assert len(bodies) > 100
    for body in bodies:
        fast = replay._decode_fast(body)
        assert fields(fast) == fields(replay._decode_leniently(body))
        assert fast is not None
        events = split_events(bytes(fast.events))
        assert len(events) == fast.event_count
        assert all(event in body for event in events)
        assert read(sent_again(fast)) == read(body)


def test_a_batch_is_taken_apart() -> None:
    """Identity, flags and pieces are what the body says."""
    batch = decode(encode(make_batch()))
    assert (batch.session_id, batch.window_id, batch.sequence, batch.is_final) == ("s", "w", 7, True)
    assert (batch.last_activity, batch.event_count) == (b"2.5", 2)
    assert bytes(batch.events) == b'{"timestamp":1,"type":2,"data":{}},{"timestamp":2,"type":3,"data":[1]}'
    assert sent_again(batch) == (
        b'{"session":{"id":"s","windowId":"w","startedAt":1,"url":"https://shop.example/","lastActivityAt":2.5},'
        b'"user":{"id":"u","anonymousId":"a","properties":{"email":"a@example.com"}},'
        b'"page":{"url":"https://shop.example/","referrer":"","viewport":{"width":1280,"height":720}},'
        b'"metadata":{"userAgent":"x","language":"en"},"replay":{"sequence":7,"events":['
        b'{"timestamp":1,"type":2,"data":{}},{"timestamp":2,"type":3,"data":[1]}]},"flush":"final"}'
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
WITH_SURROGATES = st.sampled_from(["\ud83d", "\udc00 \\ud83d", "\ufdd0\ue000", "\ufdd0\ud800\ue040", "\\", '"', "\x00"])
UNKNOWN = st.dictionaries(st.text(max_size=4) | WITH_SURROGATES, JSON | WITH_SURROGATES, max_size=3)
LEVELS = ("session", "user", "user.properties", "page", "page.viewport", "replay", "replay.events.0", "metadata", "")


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Return a valid batch with unknown members anywhere, odd texts, and optional members absent or null."""
    batch = make_batch()
    for level in draw(st.sets(st.sampled_from(LEVELS))):
        target: Any = batch
        for name in filter(None, level.split(".")):
            target = target[int(name)] if name.isdigit() else target[name]
        target |= {name: value for name, value in draw(UNKNOWN).items() if name not in target}
    batch["session"]["id"] = draw(st.text(min_size=1) | WITH_SURROGATES)
    batch["session"]["lastActivityAt"] = draw(st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 2**60))
    batch["replay"]["sequence"] = draw(st.integers(0, MAX_SEQUENCE))
    for name in draw(st.sets(st.sampled_from(("metadata", "flush")))):
        del batch[name]
    for parent, name in draw(st.sets(st.sampled_from((("user", "id"), ("user", "properties"), ("page", "viewport"))))):
        batch[parent][name] = None
    for event in batch["replay"]["events"]:
        event["data"] = draw(JSON | WITH_SURROGATES)
    return batch


@given(batches(), st.booleans(), st.sampled_from([None, 1]), st.sampled_from([b"", b"\xef\xbb\xbf", b" \r\n"]))
def test_nothing_of_a_batch_is_lost(batch: dict[str, Any], ascii_only: bool, indent: int | None, mark: bytes) -> None:
    """Unknown members at every level, odd names, blanks and all: what would go upstream equals what came."""
    body = mark + json.dumps(batch, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    decoded = decode(body)
    assert read(sent_again(decoded)) == read(body)
    assert decoded.event_count == len(split_events(bytes(decoded.events))) == 2


@given(batches(), st.booleans())
def test_the_fast_path_says_only_what_the_slow_path_says(batch: dict[str, Any], ascii_only: bool) -> None:
    """Where both paths take a batch, they make the same of it, byte for byte."""
    body = json.dumps(batch, ensure_ascii=ascii_only).encode("utf-8", "replace")
    assume(b"\\ufd" not in body)  # which the slow path writes as the character it stands for
    fast = replay._decode_fast(body)
    if fast is not None:
        assert fields(fast) == fields(replay._decode_leniently(body))


SPLICES = [
    *(b"", b"0", b"-", b".5", b"e9", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"null", b"true"),
    *(
        b"1e999",
        rb"\ud83d",
        rb"\u0061",
        b"\xff",
        b"\xef\xbb\xbf",
        b'"events":[1],',
        b'"session":{},',
        b'"flush":"final",',
    ),
    *(
        b'"replay":{"sequence":1,"events":[{"type":1,"timestamp":1,"data":1}]},',
        b'"sequence":2,',
        b'"lastActivityAt":9,',
    ),
]


@given(st.integers(0, 10_000), st.integers(0, 6), st.sampled_from(SPLICES), st.booleans())
@example(1, 0, b'"session":{},', False)
def test_on_a_damaged_batch_the_paths_never_disagree(at: int, length: int, splice: bytes, lone: bool) -> None:
    """Where the fast path says yes to a batch that was cut about, the slow path does, and means the same."""
    body = encode(changed("metadata.language", "\ud83d" if lone else "en"))
    at %= len(body)
    body = body[:at] + splice + body[at + length :]
    fast = replay._decode_fast(body)
    try:
        slow = replay._decode_leniently(body)
    except InvalidBatch:
        assert fast is None
        return
    assert fast is None or fields(fast) == fields(slow)
    assert read(sent_again(slow)) == read(body)


def test_of_repeated_members_the_last_counts() -> None:
    """As in JavaScript, on both paths, whether or not the earlier one was valid."""
    body = encode(make_batch())
    for earlier in (b'{"session":{},', b'{"session":{"id":"other"},"replay":1,'):
        assert fields(decode(body.replace(b"{", earlier, 1))) == fields(decode(body))
    twice = body.replace(b'"sequence":7', b'"sequence":1,"sequence":7').replace(b'"id":"s"', b'"id":"x","id":"s"')
    assert fields(decode(twice)) == fields(decode(body))


def test_names_may_be_escaped() -> None:
    """A member is known by its name, however that is spelled."""
    body = encode(make_batch()).replace(b'"session"', rb'"sess\u0069on"').replace(b'"windowId"', rb'"\u0077indowId"')
    assert fields(decode(body)) == fields(decode(encode(make_batch())))


# -- identity


@pytest.mark.parametrize("name", ["\ufdd0", "\ufdd0\ue040", "\ufdd0\ue000", "é😀", "\x00", "a" * 10_000])
def test_a_session_has_one_name_on_both_paths(name: str) -> None:
    """Whether or not an event elsewhere holds half an emoji, the session is the same session."""
    plain = changed("session.id", name)
    odd = changed("session.id", name)
    odd["replay"]["events"][0]["data"] = "\ud83d"
    assert decode(encode(plain)).session_id == decode(encode(odd)).session_id == name


def test_names_with_lone_surrogates_can_be_stored_and_told_apart() -> None:
    """Such a name becomes one that UTF-8 can hold, by its own, in any case of its digits."""
    names = {decode(spelled("session.id", text)).session_id for text in (rb'"\ud83d"', rb'"\ud83e"', rb'"\ude00"')}
    assert len({name.encode() for name in names}) == 3
    assert decode(spelled("session.id", rb'"\uD83D"')).session_id in names


def test_only_numbers_flags_and_events_may_differ_in_one_envelope() -> None:
    """Sequence, flush, activity and events may differ in one envelope; nothing else may."""
    envelope = decode(encode(make_batch())).envelope
    for path, value in (
        ("replay.sequence", 8),
        ("flush", ...),
        ("session.lastActivityAt", 9),
        ("replay.events.0.type", 5),
    ):
        other = decode(encode(changed(path, value))).envelope
        assert (other, other.digest) == (envelope, envelope.digest)
    lasting: list[tuple[str, Any]] = [
        ("session.url", ""),
        ("user.id", None),
        ("page.extra", 1),
        ("metadata", ...),
        ("replay.x", 1),
    ]
    for path, value in lasting:
        other = decode(encode(changed(path, value))).envelope
        assert other != envelope
        assert other.digest != envelope.digest


@pytest.mark.parametrize("odd", [False, True])
def test_an_envelope_is_known_without_its_page(odd: bool) -> None:
    """On both paths: whatever the page says, the rest is the same; any other difference, however named, is one."""

    def envelope(path: str, value: Any) -> replay.Envelope:
        batch = changed(path, value)
        if odd:
            batch["replay"]["events"][0]["data"] = "\ud83d"
        return decode(encode(batch)).envelope

    first = envelope("page.url", "https://a.example/")
    assert first.tail[first.page_start : first.page_end] == encode(changed("page.url", "https://a.example/")["page"])
    pages: list[tuple[str, Any]] = [
        *(("page.url", ""), ("page.x", "\ud83d"), ("page.referrer", "b")),
        ("page", {"url": '"},"page":{"'}),
    ]
    for path, value in pages:
        other = envelope(path, value)
        assert other.pageless_digest == first.pageless_digest
        assert other.digest != first.digest
    others: list[tuple[str, Any]] = [
        *(("user.page", {}), ("metadata.page", 1), ("page2", {}), ("replay.page", 1), ("session.url", "")),
    ]
    for path, value in others:
        assert envelope(path, value).pageless_digest != first.pageless_digest


def test_an_envelope_whose_page_nobody_has_looked_for_is_like_no_other() -> None:
    """Out of the spool, without the page's place, all of it counts."""
    envelope = decode(encode(make_batch())).envelope
    kept = replay.Envelope(envelope.head, envelope.tail)
    assert kept.pageless_digest == kept.digest == envelope.digest != envelope.pageless_digest


def test_a_digest_knows_where_the_head_ends() -> None:
    """Bytes that move from one piece to the other change the digest."""
    assert replay.Envelope(b"ab", b"c").digest != replay.Envelope(b"a", b"bc").digest


# -- bounds


def test_a_batch_has_as_many_events_as_addresses() -> None:
    """16 384 events are the most, on both paths."""
    event = b'{"timestamp":1,"type":3,"data":0}'
    for first in (event, event.replace(b"3", b"3.0")):
        full = spelled("replay.events", b"[%b%b]" % (first, b"," + b",".join([event] * (MAX_BATCH_EVENTS - 1))))
        assert decode(full).event_count == MAX_BATCH_EVENTS
        for more in (1, 1_000):
            with pytest.raises(TooLarge, match="more than 16384: send them as several batches"):
                decode(full.replace(b"[{", b"[" + (event + b",") * more + b"{", 1))


def test_an_envelope_has_a_bound() -> None:
    """What travels with every upstream batch is refused from one byte over the limit, with both sizes named."""
    batch = decode(encode(make_batch()))
    size = len(batch.envelope.head) + len(batch.envelope.tail)
    assert decode_batch(encode(make_batch()), size).envelope == batch.envelope
    with pytest.raises(TooLarge, match=f"take {size} bytes, more than {size - 1}"):
        decode_batch(encode(make_batch()), size - 1)


@pytest.mark.parametrize("text", [b"1." + b"0" * 1_000, b"1" * 300, b"0." + b"1" * 5_000, b"-1e" + b"0" * 100 + b"3"])
def test_a_long_activity_time_is_written_anew(text: bytes) -> None:
    """A number of any length stays the number it was, in at most 32 bytes."""
    batch = decode(spelled("session.lastActivityAt", text))
    assert len(batch.last_activity) <= 32
    assert float(batch.last_activity) == float(text)
    assert read(sent_again(batch)) == read(spelled("session.lastActivityAt", batch.last_activity))


def test_events_are_slices_of_the_body() -> None:
    """The fast path copies no event."""
    body = encode(make_batch())
    events = decode(body).events
    assert isinstance(events, memoryview)
    assert body.find(events) > 0
