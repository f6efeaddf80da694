"""Header fields through a proxy, by RFC 9110."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.fields import (
    end_to_end,
    find_field,
    is_not_modified,
    list_members,
    parse_date,
    parse_directives,
    parse_seconds,
)
from tests.unit.test_caching import fields

ETAG = 'etag: "a"'
WEAK = 'etag: W/"a"'
CHANGED = "last-modified: Thu, 01 Jan 1970 00:01:00 GMT"

CONDITIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "the tag": (('if-none-match: "a"',), (ETAG,), True),
    "another tag": (('if-none-match: "b"',), (ETAG,), False),
    "one of several": (('if-none-match: "b", "a"',), (ETAG,), True),
    "one of several, with a comma within": (('if-none-match: "b, c", "a"',), (ETAG,), True),
    "several lines": (('if-none-match: "b"', 'if-none-match: "a"'), (ETAG,), True),
    "weak for strong (8.8.3.2)": (('if-none-match: W/"a"',), (ETAG,), True),
    "strong for weak": (('if-none-match: "a"',), (WEAK,), True),
    "anything": (("if-none-match: *",), (ETAG,), True),
    "a tag without quotes is none": (("if-none-match: a",), (ETAG,), False),
    "no tag to compare with": (('if-none-match: "a"',), (), False),
    "the date": (("if-modified-since: Thu, 01 Jan 1970 00:01:00 GMT",), (CHANGED,), True),
    "an earlier date": (("if-modified-since: Thu, 01 Jan 1970 00:00:59 GMT",), (CHANGED,), False),
    "a date that is none": (("if-modified-since: yesterday",), (CHANGED,), False),
    "a date beside a tag does not count (13.1.3)": (
        ('if-none-match: "b"', "if-modified-since: Thu, 01 Jan 1970 00:01:00 GMT"),
        (ETAG, CHANGED),
        False,
    ),
    "no condition": ((), (ETAG, CHANGED), False),
}


@pytest.mark.parametrize(("request_", "answer", "expected"), CONDITIONS.values(), ids=CONDITIONS.keys())
def test_when_a_client_has_it_already(request_: tuple[str, ...], answer: tuple[str, ...], expected: bool) -> None:
    """A condition is compared as RFC 9110, 13.1 has it."""
    assert is_not_modified(fields(*request_), fields(*answer)) is expected


def test_fields_of_one_connection_end_here() -> None:
    """Hop-by-hop fields, and what Connection names, do not pass; the rest does, in order (RFC 9110, 7.6.1).

    `proxy-status` is for the other end (RFC 9209, 2).
    """
    passing = fields("x-b: 1", "x-a: 2", "x-b: 3", "cache-control: no-store", "te-x: 1", "proxy-status: edge; error=x")
    dropped = fields(
        *("connection: close, X-Named", "connection: x-also", "x-named: 1", "x-also: 1", "keep-alive: timeout=5"),
        *("proxy-authorization: x", "proxy-authenticate: x", "proxy-connection: x", "proxy-authentication-info: x"),
        *("te: trailers", "trailer: x", "transfer-encoding: chunked", "upgrade: h2c"),
    )
    mixed = tuple(each for pair in zip(dropped[: len(passing)], passing, strict=True) for each in pair)
    assert end_to_end((*mixed, *dropped[len(passing) :])) == passing


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"connection"]), st.sampled_from([b"a", b"b", b"x, a", b""]))))
def test_what_passes_keeps_its_order_and_repeats(lines: list[tuple[bytes, bytes]]) -> None:
    """Whatever Connection names, the others are an unchanged part of what came."""
    named = {member for name, value in lines if name == b"connection" for member in list_members(value)}
    assert list(end_to_end(lines)) == [each for each in lines if each[0] != b"connection" and each[0] not in named]


def test_lists_directives_and_numbers() -> None:
    """Lists have their blanks and empty members taken off, directives their quotes; odd numbers are none."""
    assert find_field(fields("a: 1", "b: 2", "a: 3"), b"a") == b"1, 3"
    assert find_field((), b"a") is None
    assert list_members(b" A,, b ,") == [b"a", b"b"]
    assert parse_directives(b'a, B=1, c = "x, y", d="\\"", b=2') == {
        b"a": b"",
        b"b": b"1",
        b"c": b"x, y",
        b"d": b'\\"',
    }
    for text in (b"", b"-1", b"+1", b"1.5", b"0x1", "\u0661".encode(), b"1 2"):
        assert parse_seconds(text) is None
    assert parse_seconds(b"9" * 400) == 2**31
    assert parse_date(b"Thu, 01 Jan 1970 00:01:00 GMT") == 60
    assert parse_date(b"Thu, 99 Jan 9999999999 00:01:00 GMT") is None
    assert parse_date(b"0") is None


@given(st.binary(max_size=200))
def test_no_header_breaks_the_reader(value: bytes) -> None:
    """Whatever a header holds, reading it ends and raises nothing."""
    lines = ((b"if-none-match", value), (b"if-modified-since", value), (b"connection", value), (b"a", value))
    end_to_end(lines)
    is_not_modified(lines, ((b"etag", value), (b"last-modified", value)))
    parse_directives(value)
