"""Requests by the bytes: what is read, what is refused, and that it does not depend on how the bytes arrive."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.http.connection import (
    DRAIN_BYTES,
    MAX_PIPELINED,
    Exchange,
    Limits,
    Progress,
    RequestParser,
)
from relay.http.message import Request, Response, error_response
from relay.http.router import Route, Router
from tests.unit.malformed import CHUNKED, HOST, MALFORMED, OTHER_CODINGS, POST

LIMITS = Limits(max_header_bytes=1_024, max_headers=10)
GET = b"GET /out HTTP/1.1\r\n" + HOST + b"\r\n"


async def handler(_: Request) -> Response:
    """Never called here."""
    raise AssertionError


def admit(request: Request) -> Response | None:
    """Refuse who says so."""
    if b"x-explode" in request.headers:
        raise RuntimeError("admit failed")
    return error_response(401, "No") if b"x-refuse" in request.headers else None


def parser() -> RequestParser:
    """Return a parser for two routes."""
    routes = [
        Route("/in", {"POST": handler}, admit=admit, max_body_bytes=100),
        Route("/big", {"POST": handler}, admit=admit, max_body_bytes=1_000_000),
        Route("/out", {"GET": handler}),
    ]
    return RequestParser(Router(routes), LIMITS)


def whole(data: bytes) -> Iterator[bytes]:
    """Return the data as one read."""
    yield data


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    """Return the data as reads of one byte."""
    for index in range(len(data)):
        yield data[index : index + 1]


def feed(data: bytes, split: object = whole) -> tuple[list[Exchange], RequestParser]:
    """Return what comes of the data, stopping where the parser closes."""
    assert callable(split)
    subject = parser()
    exchanges: list[Exchange] = []
    for piece in split(data):
        exchanges += subject.feed(piece)
        subject.release()
        if subject.closed:
            break
    return exchanges, subject


def summary(exchange: Exchange) -> tuple[object, ...]:
    """Return what matters of an exchange."""
    request = exchange.request
    status = exchange.response.status if exchange.response else None
    return request.method, request.path, request.query, request.headers, request.body, status, exchange.close


SPLITS = pytest.mark.parametrize("split", [whole, byte_by_byte])

READ = {
    "plain": (GET, ("GET", "/out", b"", {b"host": b"relay.test"}, b"", None, False)),
    "query": (
        b"GET /out?a=b?c HTTP/1.1\r\n" + HOST + b"\r\n",
        ("GET", "/out", b"a=b?c", {b"host": b"relay.test"}, b"", None, False),
    ),
    "absolute form": (
        b"GET HTTP://other.test/out HTTP/1.1\r\n" + HOST + b"\r\n",
        ("GET", "/out", b"", {b"host": b"relay.test"}, b"", None, False),
    ),
    "absolute form without a path": (
        b"GET http://other.test?q HTTP/1.1\r\n" + HOST + b"\r\n",
        ("GET", "/", b"q", {b"host": b"relay.test"}, b"", 404, False),
    ),
    "empty lines before": (
        b"\r\n\r\n" + GET,
        ("GET", "/out", b"", {b"host": b"relay.test"}, b"", None, False),
    ),
    "repeated and padded headers": (
        b"GET /out HTTP/1.1\r\n" + HOST + b"A: 1 \r\nB:\r\na: \t2\t\r\n\r\n",
        (
            "GET",
            "/out",
            b"",
            {b"host": b"relay.test", b"a": b"1, 2", b"b": b""},
            b"",
            None,
            False,
        ),
    ),
    "body": (
        POST + b"Content-Length: 3\r\n\r\nabc",
        ("POST", "/in", b"", {b"host": b"relay.test", b"content-length": b"3"}, b"abc", None, False),
    ),
    "chunks, extensions and trailers": (
        CHUNKED + b'2;a=b;c="d"\r\nab\r\n01\r\nc\r\n0\r\nHost: evil\r\nX: y\r\n\r\n',
        (
            "POST",
            "/in",
            b"",
            {b"host": b"relay.test", b"transfer-encoding": b"chunked"},
            b"abc",
            None,
            False,
        ),
    ),
    "close": (
        b"GET /out HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n",
        ("GET", "/out", b"", {b"host": b"relay.test", b"connection": b"close"}, b"", None, True),
    ),
    "HTTP/1.0": (b"GET /out HTTP/1.0\r\n\r\n", ("GET", "/out", b"", {}, b"", None, True)),
    "HTTP/1.0 kept alive": (
        b"GET /out HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        ("GET", "/out", b"", {b"connection": b"keep-alive"}, b"", None, False),
    ),
    "upgrade declined": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
        (
            "POST",
            "/in",
            b"",
            {b"host": b"relay.test", b"content-length": b"3", b"connection": b"close"},
            b"abc",
            None,
            True,
        ),
    ),
    "upgrade declined, chunked": (
        POST + b"Upgrade: websocket\r\nConnection: Upgrade\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        (
            "POST",
            "/in",
            b"",
            {b"host": b"relay.test", b"transfer-encoding": b"chunked", b"connection": b"close"},
            b"abc",
            None,
            True,
        ),
    ),
    "refused with its body read": (
        POST + b"X-Refuse: 1\r\nContent-Length: 3\r\n\r\nabc",
        (
            "POST",
            "/in",
            b"",
            {b"host": b"relay.test", b"x-refuse": b"1", b"content-length": b"3"},
            b"",
            401,
            False,
        ),
    ),
}


@SPLITS
@pytest.mark.parametrize(("data", "expected"), READ.values(), ids=READ.keys())
def test_a_request_is_read_however_its_bytes_arrive(data: bytes, expected: tuple[object, ...], split: object) -> None:
    """A valid request gives the same exchange whole and byte by byte."""
    exchanges, subject = feed(data, split)
    assert [summary(exchange) for exchange in exchanges] == [expected]
    assert subject.held_bytes == 0


@SPLITS
def test_what_follows_a_request_is_the_next_one_unless_it_was_the_last(split: object) -> None:
    """Trailing data is a pipelined request on a kept connection and dropped behind a closing one."""
    for data, expected in READ.values():
        exchanges, _ = feed(data + GET, split)
        assert len(exchanges) == (1 if expected[-1] else 2)
        assert summary(exchanges[0]) == expected


@SPLITS
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_bad_framing_is_refused_and_ends_the_connection(data: bytes, split: object) -> None:
    """What RFC 9112 forbids is one 400, and nothing behind it is taken for a request."""
    exchanges, subject = feed(data + GET, split)
    assert [exchange.response.status for exchange in exchanges if exchange.response] == [400]
    assert exchanges[-1].close
    assert (subject.closed, subject.is_unread, subject.is_malformed) == (True, True, True)


@SPLITS
@pytest.mark.parametrize("data", OTHER_CODINGS.values(), ids=OTHER_CODINGS.keys())
def test_transfer_codings_but_chunked_are_refused(data: bytes, split: object) -> None:
    """A transfer coding that is not `chunked` alone is 501 and ends the connection."""
    exchanges, subject = feed(data + GET, split)
    assert [exchange.response.status for exchange in exchanges if exchange.response] == [501]
    assert subject.closed


@SPLITS
def test_good_requests_before_a_bad_one_are_kept(split: object) -> None:
    """A request before broken bytes is still handed out, ahead of the 400."""
    exchanges, _ = feed(GET + b"nonsense\r\n\r\n", split)
    assert [exchange.response and exchange.response.status for exchange in exchanges] == [None, 400]


def head_of(size: int) -> bytes:
    """Return a GET whose head has exactly `size` bytes."""
    start = b"GET /out HTTP/1.1\r\n" + HOST + b"X: "
    return start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"


@SPLITS
@pytest.mark.parametrize(("size", "status"), [(1_024, None), (1_025, 431)])
def test_head_size_is_exact(size: int, status: int | None, split: object) -> None:
    """A head of `max_header_bytes` is read, one byte more is 431, also behind another request."""
    for before in [b"", GET]:
        exchanges, subject = feed(before + head_of(size), split)
        last = exchanges[-1]
        assert (last.response.status if last.response else None) == status
        assert subject.closed == (status is not None)


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /" + b"a" * 2_000,
        b"GET /out HTTP/1.1\r\nX: " + b"a" * 2_000,
        b"GET /out HTTP/1.1\r\n" + b"X" * 2_000,
        b"\r\n" * 1_000,
        b"GET " + b" " * 2_000,
    ],
    ids=["target", "value", "name", "empty lines", "spaces"],
)
def test_an_endless_head_is_refused_before_it_is_complete(endless: bytes) -> None:
    """Bytes of an incomplete head are counted as they come, whatever llhttp buffers."""
    exchanges, subject = feed(endless, byte_by_byte)
    assert [exchange.response.status for exchange in exchanges if exchange.response] == [431]
    assert subject.closed


@SPLITS
def test_header_count_is_bounded(split: object) -> None:
    """A header more than `max_headers` is 431, whether they differ or repeat."""
    for name in [b"X-%d", b"X%.0d"]:
        lines = b"".join(name % index + b": 1\r\n" for index in range(10))
        exchanges, _ = feed(b"GET /out HTTP/1.1\r\n" + HOST + lines + b"\r\n", split)
        assert [exchange.response.status for exchange in exchanges if exchange.response] == [431]


@SPLITS
def test_trailer_count_is_bounded(split: object) -> None:
    """More trailers than `max_headers` are 431."""
    lines = b"".join(b"X-%d: 1\r\n" % index for index in range(11))
    exchanges, subject = feed(CHUNKED + b"0\r\n" + lines + b"\r\n", split)
    assert [exchange.response.status for exchange in exchanges if exchange.response] == [431]
    assert subject.closed


@SPLITS
@pytest.mark.parametrize(("size", "status"), [(100, None), (101, 413)])
def test_chunked_body_size_is_exact(size: int, status: int | None, split: object) -> None:
    """A chunked body of `max_body_bytes` is read; a byte more is 413 at once and ends the connection."""
    data = CHUNKED + b"1\r\nx\r\n" * size
    exchanges, subject = feed(data + (b"0\r\n\r\n" if status is None else b""), split)
    assert [exchange.response and exchange.response.status for exchange in exchanges] == [status]
    assert exchanges[0].request.body == (b"x" * size if status is None else b"")
    assert subject.closed == (status is not None)
    assert subject.held_bytes == 0


def test_a_declared_body_over_the_limit_is_refused_at_once() -> None:
    """A large Content-Length is 413 before any of the body, and closes; a small one is drained."""
    exchanges, subject = feed(POST + b"Content-Length: %d\r\n\r\n" % (DRAIN_BYTES + 1))
    assert summary(exchanges[0])[-2:] == (413, True)
    assert subject.is_unread
    exchanges, subject = feed(POST + b"Content-Length: 101\r\n\r\n" + b"x" * 101 + GET)
    assert [summary(exchange)[-2:] for exchange in exchanges] == [(413, False), (None, False)]


def test_a_drained_chunked_body_is_bounded() -> None:
    """A refused chunked body is drained up to `DRAIN_BYTES` and then cut off with the refusal."""
    exchanges, subject = feed(POST + b"X-Refuse: 1\r\nTransfer-Encoding: chunked\r\n\r\n20000\r\n" + b"x" * 70_000)
    assert summary(exchanges[0])[-2:] == (401, True)
    assert subject.closed


@pytest.mark.parametrize(
    "framing",
    [b"1;" + b"x" * 3_000, b"0" * 3_000 + b"1", b"0\r\nX: " + b"y" * 3_000],
    ids=["extension", "size", "trailer"],
)
def test_chunk_framing_is_bounded(framing: bytes) -> None:
    """Endless framing around no body is refused although the body stays within its limit."""
    exchanges, subject = feed(CHUNKED + framing, byte_by_byte)
    assert [exchange.response.status for exchange in exchanges if exchange.response] == [400]
    assert subject.closed


def test_expectation_is_seen_where_the_body_is_wanted() -> None:
    """A client that waits is to be told to go on; refused, it gets the answer and the connection ends."""
    _, subject = feed(POST + b"Expect: 100-Continue\r\nContent-Length: 3\r\n\r\n")
    assert (subject.progress, subject.expects_continue) == (Progress.BODY, True)
    subject.feed(b"abc")
    assert not subject.expects_continue
    exchanges, subject = feed(POST + b"X-Refuse: 1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert summary(exchanges[0])[-2:] == (401, True)
    assert not subject.expects_continue


def test_pipelining_is_bounded() -> None:
    """One read gives `MAX_PIPELINED` requests at most; the connection ends behind them."""
    exchanges, subject = feed(GET * (MAX_PIPELINED + 10))
    assert len(exchanges) == MAX_PIPELINED
    assert exchanges[-1].close
    assert (subject.closed, subject.is_unread) == (True, True)


async def test_what_admit_raises_surfaces_when_the_exchange_is_answered() -> None:
    """An exception of `admit` neither escapes `feed` nor hides; the exchanges before it are kept."""
    exchanges, subject = feed(GET + POST + b"X-Explode: 1\r\n\r\n")
    assert len(exchanges) == 2
    assert subject.closed
    with pytest.raises(RuntimeError, match="admit failed"):
        await exchanges[1].handler(exchanges[1].request)


def test_held_bytes_follow_the_bodies() -> None:
    """Bodies count from their first byte until `release`; an incomplete one stays counted."""
    subject = parser()
    subject.feed(POST + b"Content-Length: 5\r\n\r\nab")
    assert subject.held_bytes == 2
    subject.release()
    assert subject.held_bytes == 2
    subject.feed(b"cde" + POST + b"Content-Length: 5\r\n\r\nx")
    assert subject.held_bytes == 6
    subject.release()
    assert subject.held_bytes == 1
    subject.abandon(error_response(408, "Late"))
    subject.release()
    assert subject.held_bytes == 0


VALID = [data for data, _ in READ.values()] + [GET, CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"]


@given(data=st.data(), pieces=st.lists(st.sampled_from(VALID), min_size=1, max_size=6))
def test_exchanges_do_not_depend_on_how_a_stream_is_cut(data: st.DataObject, pieces: list[bytes]) -> None:
    """Any cut of a stream of requests into reads gives the same exchanges."""
    stream = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    reads = [stream[start:end] for start, end in pairwise(edges) if start < end]
    exchanges, _ = feed(stream, lambda _: iter(reads))
    expected, _ = feed(stream)
    assert [summary(exchange) for exchange in exchanges] == [summary(exchange) for exchange in expected]


@given(
    junk=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([*VALID, b"\r\n", b"0\r\n\r\n", b"Content-Length: 3\r\n", b"POST /in HTTP/1.1\r\n"]),
        ),
        max_size=12,
    )
)
@example(junk=[b"POST /in HTTP/1.1\r\n", b"Content-Length: 3\r\n", b"\r\n"])
def test_any_bytes_give_exchanges_and_nothing_else(junk: list[bytes]) -> None:
    """No bytes make the parser raise, and a closed parser has said so by its last exchange."""
    exchanges, subject = feed(b"".join(junk), lambda _: (piece for piece in junk if piece))
    assert subject.closed == bool(exchanges and exchanges[-1].close)
    assert all(not exchange.close for exchange in exchanges[:-1])
