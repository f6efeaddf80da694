from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.errors import InvalidBatch, TooLarge, UnsupportedCoding
from relay.sandbox import body as subject
from relay.sandbox.body import decode_body, parse_json, split_events

SPACE = st.text(alphabet=" \t\r\n", max_size=2).map(str.encode)
EVENTS = st.lists(
    st.sampled_from(
        [
            rb'{"timestamp":1,"type":3,"data":{"x":[1,2,{"y":"]}"}]}}',
            rb'{ "type" : 2.0 , "timestamp" : 1e2 , "data" : null }',
            rb'{"timestamp":1,"type":3,"data":"cut \ud83d"}',
            rb'{"timestamp":1,"type":3,"data":"\\ud83d \"events\":[ \\"}',
            b'{"timestamp":1,"type":3,"data":"not UTF-8: \xff\xed\xa0\x80"}',
            '{"timestamp":1,"type":3,"data":"ünïcödé 😀"}'.encode(),
        ]
    ),
    min_size=1,
    max_size=6,
)


@given(EVENTS, SPACE, SPACE)
def test_events_are_sliced_as_they_stand(events: list[bytes], before: bytes, after: bytes) -> None:
    """Whatever the white space and however odd the strings, each event comes out with its own bytes."""
    array = (before + b"," + after).join(events)
    replay = b'"replay"%b:{"other":[{}],%b"events":[%b%b%b],"sequence":0}' % (
        after,
        before,
        after,
        array,
        before,
    )
    text = before + b'{"events":[1,2],"page":{"replay":{"events":[]}},%b}' % replay + after
    assert split_events(text) == events


def test_the_walker_agrees_with_msgspec_where_both_can_read() -> None:
    """The slow path slices an ordinary batch like the fast one, the last of repeated names included."""
    text = b'{"replay":{"events":[0]},"re\\u0070lay":{"events":[9],"sequence":1, "events" : [ {} ,{"a":[]}]}}'
    assert list(subject._walk_events(text)) == split_events(text) == [b"{}", b'{"a":[]}']


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"\\ud83d"', "\ud83d"),
        (b'"\\ud83d\\ude00"', "😀"),
        (b'"a\xffb"', "a\ufffdb"),
        (b"1e999", float("inf")),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b" \t\r\n[] \n", []),
        (b'["\\ud83d",3.0,3,-0.0]', ["\ud83d", 3.0, 3, -0.0]),
        (b'["\\ud83d",' + b"9" * 5_000 + b"]", ["\ud83d", float("inf")]),
    ],
)
def test_what_node_accepts_is_accepted(text: bytes, value: Any) -> None:
    """Lone surrogates, invalid UTF-8, repeated names and huge numbers are no errors."""
    assert parse_json(text) == value


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{} {}",
        b"[1,]",
        b"{'a':1}",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"01",
        b"+1",
        b'"\n"',
        b'"\\x41"',
        b"\xef\xbb\xbf{}",
        "\N{NO-BREAK SPACE}1".encode(),
        b"[" * 100_000,
    ],
)
def test_what_node_refuses_is_refused(text: bytes) -> None:
    """Only JSON is JSON."""
    with pytest.raises(InvalidBatch):
        parse_json(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
@example(-1_000_000_000_000_000_001)
def test_both_parsers_mean_the_same(value: Any) -> None:
    """A text means the same on the fast path as beside a lone surrogate, which forces the slow one."""
    text = json.dumps(value).encode()
    assert parse_json(b'["\\ud83d",%b]' % text) == ["\ud83d", parse_json(text)]


def test_gzip_and_identity_are_read() -> None:
    """The two published codings give back the JSON, whatever the case of the header."""
    for coding in ("gzip", " GZIP "):
        assert decode_body(gzip.compress(b"{}"), coding) == b"{}"
    for coding in ("", "identity"):
        assert decode_body(b"{}", coding) == b"{}"


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "x-gzip"])
def test_other_codings_are_refused(coding: str) -> None:
    """Upstream publishes gzip only."""
    with pytest.raises(UnsupportedCoding):
        decode_body(b"{}", coding)


@pytest.mark.parametrize(
    "body", [b"{}", b"", gzip.compress(b"{}" * 100)[:-9], b"\x1f\x8bnonsense", zlib.compress(b"{}")]
)
def test_a_gzip_header_is_taken_at_its_word(body: bytes) -> None:
    """What is not a whole gzip stream is refused under a gzip header, plain JSON too."""
    with pytest.raises(InvalidBatch):
        decode_body(body, "gzip")


def test_inflating_is_bounded() -> None:
    """A decompression bomb is refused."""
    with pytest.raises(TooLarge):
        decode_body(gzip.compress(bytes(subject.MAX_DECODED_BYTES + 1), 1), "gzip")


def test_plain_bodies_are_bounded_too() -> None:
    """The bound is on the decoded size, whatever the coding."""
    with pytest.raises(TooLarge):
        decode_body(bytes(subject.MAX_DECODED_BYTES + 1), "")
