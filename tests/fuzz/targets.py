"""What must hold of any bytes: one function for each place where a stranger's bytes are read.

A function takes an input and returns, or fails by an assertion or by what it did not expect. Its oracles share no code
with what they judge: zlib and zstandard, Python's `json`, the sandbox's reading of the published description.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import zstandard
from msgspec import Raw

from relay.errors import InvalidBatch, TooLarge, UnsupportedCoding
from relay.http.connection import MAX_PIPELINED, Exchange, Limits, RequestParser
from relay.http.message import Request, Response, error_response
from relay.http.router import Route, Router
from relay.protocol import node_json
from relay.protocol.codings import CODINGS, GZIP_MAGIC, ZSTD_MAGIC, ZSTD_MAX_WINDOW_BYTES, inflate
from relay.protocol.cut import body_prefix, body_suffix
from relay.protocol.replay import decode_batch
from relay.protocol.schema import MAX_SAFE_INTEGER, MAX_SEQUENCE
from relay.sandbox.body import parse_json
from relay.sandbox.schema import BatchSchema, as_utf8, load_description

_PUBLISHED = BatchSchema(load_description())

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_NO_JSON = object()
"""What is read from bytes that are no JSON."""

_MAX_DEPTH = 400
"""Values nested more deeply are left to the parity test: Python's own parser gives up soon after."""


# -- the listener


async def _handler(_: Request) -> Response:
    raise AssertionError("nobody calls it")


def _admit(request: Request) -> Response | None:
    return error_response(401, "No") if b"x-refuse" in request.headers else None


_ROUTER = Router([Route("/in", {"POST": _handler}, admit=_admit, max_body_bytes=100), Route("/out", {"GET": _handler})])
_LIMITS = Limits(max_header_bytes=1_048_576, max_headers=10)
"""A head's size is counted by reads, so that what is refused may depend on them; here nothing is large enough."""


def listener(data: bytes) -> None:
    """Any bytes give exchanges, however they arrive; the first byte says in which pieces."""
    size, stream = data[0] % 64 + 1 if data else 1, data[1:]
    whole, pieces = _exchanges(stream, len(stream) or 1), _exchanges(stream, size)
    if len(whole) == MAX_PIPELINED:  # the bound on one read
        whole, pieces = whole[:-1], pieces[: MAX_PIPELINED - 1]
    assert pieces == whole


def _exchanges(stream: bytes, size: int) -> list[tuple[object, ...]]:
    subject = RequestParser(_ROUTER, _LIMITS)
    found: list[Exchange] = []
    for at in range(0, len(stream), size):
        found += subject.feed(stream[at : at + size])
        subject.release()
        if subject.closed:
            break
    assert subject.closed == bool(found and found[-1].close)
    assert not any(exchange.close for exchange in found[:-1])
    assert all(exchange.request.method for exchange in found[:-1])
    return [_summary(exchange) for exchange in found]


def _summary(exchange: Exchange) -> tuple[object, ...]:
    request, status = exchange.request, exchange.response and exchange.response.status
    is_answerable = status is None
    # A refusal carries whatever had been read of the request.
    parts = (request.method, request.path, request.query, request.headers, request.body) if is_answerable else ()
    return (*parts, status, exchange.close)


# -- codings

_CAPS = (10, 1_000, 100_000, 1_000_000)
_HEADERS = (*CODINGS, "", " GZip ", "br", "gzip, gzip")

_INCOMPLETE_CODE = ("distances set", "lengths set", "missing end-of-block")
"""How zlib ends its complaints of Huffman codes with gaps, which no encoder writes. ISA-L reads them."""

_ZSTD_PIECE_BYTES = 32
"""Fed at a time: a few bytes may stand for megabytes, and nothing else bounds what comes out."""


def codings(data: bytes) -> None:
    """Any bytes under any header are a body within the cap, the one that the libraries read, or refused.

    The first byte chooses the header and the cap.
    """
    choice, body = data[0] if data else 0, data[1:]
    coding, cap = _HEADERS[choice % len(_HEADERS)], _CAPS[choice // len(_HEADERS) % len(_CAPS)]
    try:
        decoded: bytes | None = inflate(body, coding, cap)
    except UnsupportedCoding:
        assert coding.strip().lower() not in CODINGS
        return
    except (InvalidBatch, TooLarge):
        decoded = None
    assert decoded is None or len(decoded) <= cap
    try:
        expected = _reference(body, coding, cap)
    except zstandard.ZstdError:
        expected = None
    except zlib.error as error:
        if str(error).endswith(_INCOMPLETE_CODE):
            return
        expected = None
    if decoded is None:  # one library may find the damage first, and the other the cap
        assert expected is None or len(expected) > cap
    else:
        assert decoded == expected


def _reference(body: bytes, coding: str, cap: int) -> bytes | None:
    """Return what the libraries make of a body, or as much as shows that it is over the cap; None if it ends early."""
    if body.startswith(GZIP_MAGIC):
        return _inflate_members(body, 31, cap)
    if body.startswith(ZSTD_MAGIC):
        return _decompress_frames(body, cap)
    if coding == "deflate" and not body.lstrip(_BYTE_ORDER_MARK + b" \t\r\n").startswith(b"{"):
        has_header = len(body) >= 2 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
        return _inflate_members(body, 15 if has_header else -15, cap)
    return body


def _inflate_members(body: bytes, window_bits: int, cap: int) -> bytes | None:
    decoded = b""
    while True:
        decoder = zlib.decompressobj(window_bits)
        decoded += decoder.decompress(body, cap + 1 - len(decoded))
        if len(decoded) > cap:
            return decoded
        if not decoder.eof:
            return None
        body = decoder.unused_data
        if window_bits != 31 or not body.startswith(GZIP_MAGIC):
            return decoded


def _decompress_frames(body: bytes, cap: int) -> bytes | None:
    decoded = b""
    while body:
        decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES).decompressobj()
        while body and not decoder.eof:
            decoded += decoder.decompress(body[:_ZSTD_PIECE_BYTES])
            body = decoder.unused_data + body[_ZSTD_PIECE_BYTES:]
            if len(decoded) > cap:
                return decoded
        if not decoder.eof:
            return None
    return decoded


# -- JSON


def decoder(data: bytes) -> None:
    """Any bytes are a batch by the published description, read as Python reads them, or refused with the places."""
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH:
        return
    expected: Any = None
    is_batch = False
    with suppress(InvalidBatch):
        expected = parse_json(data.removeprefix(_BYTE_ORDER_MARK))
        is_batch = not _PUBLISHED.issues(expected) and _has_safe_integers(expected["replay"])
    batch, issues = None, []
    try:
        batch = decode_batch(data, max_envelope_bytes=len(data) + 1_000)
    except InvalidBatch as refusal:
        issues = refusal.details
    if batch is None:
        assert issues
        assert not is_batch
        return
    assert is_batch
    session, replay = expected["session"], expected["replay"]
    assert batch.event_count == len(replay["events"])
    assert batch.sequence == replay["sequence"]
    assert batch.is_final == (expected.setdefault("flush", "normal") == "final")
    assert batch.session_id == session["id"] or session["id"] != as_utf8(session["id"])
    assert batch.window_id == session["windowId"] or session["windowId"] != as_utf8(session["windowId"])
    prefix = body_prefix(batch.envelope, batch.last_activity, batch.sequence)
    sent = parse_json(prefix + bytes(batch.events) + body_suffix(is_final=batch.is_final))
    sent.setdefault("flush", "normal")
    assert sent == expected
    assert [parse_json(event) for event in node_json.split_events(bytes(batch.events))] == replay["events"]


def _has_safe_integers(replay: Any) -> bool:
    types = [event["type"] for event in replay["events"]]
    return replay["sequence"] <= MAX_SEQUENCE and all(abs(value) <= MAX_SAFE_INTEGER for value in types)


def lenient(data: bytes) -> None:
    """Any bytes, protected, are JSON exactly where Node would say so, and restored they mean what they meant."""
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH:
        return
    protected = node_json.protect(data)
    restored = node_json.restore(protected)
    assert node_json.is_utf8(restored)
    expected: Any = _NO_JSON
    with suppress(InvalidBatch):
        expected = parse_json(data.removeprefix(_BYTE_ORDER_MARK))
    try:
        value = msgspec.json.decode(protected, type=Raw)
    except msgspec.DecodeError:
        assert expected is _NO_JSON
        return
    assert parse_json(restored) == expected
    if isinstance(expected, list) and expected:
        run = node_json.restore(bytes(value)[1:-1])
        for split in (node_json.split_events, node_json.walk_items):
            assert [parse_json(item) for item in split(run)] == expected


Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {target.__name__: target for target in (listener, codings, decoder, lenient)}
"""By name: what may be fuzzed."""
