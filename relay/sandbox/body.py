"""Reads a batch's body: its value, and the exact bytes of each event.

Rules:
1. What Node's `JSON.parse` accepts is accepted: invalid UTF-8 becomes U+FFFD, lone surrogate escapes stay.
   What it refuses (NaN, Infinity, a byte order mark, trailing data) is refused.
2. None of the relay's own parsing is used, decompression apart: what checks the relay must not share its
   mistakes.
3. The fast path (orjson, msgspec) accepts a subset of what the slow one (json) accepts, and means the same.

Unlike Node, nesting deeper than about 1 000 levels is refused, and integers lose their last digits above
2**64, not above 2**53.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from relay.errors import InvalidBatch, TooLarge, UnsupportedCoding
from relay.protocol.codings import GZIP_MAGIC, inflate

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DECODED_BYTES = 134_217_728
"""Twice the largest body that a relay accepts by default: no event it lets in can fail here for its size."""

_MAX_INT_CHARACTERS = 20
"""Of an integer of 64 bits, its sign included. Larger ones are doubles, as every number is in JavaScript."""

_WHITESPACE = re.compile(r"[ \t\n\r]*")
"""RFC 8259, 2."""


class _Replay(msgspec.Struct):
    events: msgspec.Raw


class _Batch(msgspec.Struct):
    replay: _Replay


def decode_body(body: bytes, coding: str) -> bytes:
    """Return the JSON of a request body.

    Args:
        body: As it came over the wire.
        coding: The `Content-Encoding` value; empty where there was none.

    Raises:
        UnsupportedCoding: Neither identity nor gzip.
        InvalidBatch: Not gzip although the header says so, or damaged.
        TooLarge: More than `MAX_DECODED_BYTES`.
    """
    name = coding.strip().lower() or "identity"
    if name not in ("identity", "gzip"):
        raise UnsupportedCoding("Unsupported content encoding")
    if name == "gzip":
        # inflate() lets plain JSON under a gzip header pass, for proxies that inflate on the way to a relay.
        # Upstream would not.
        if not body.startswith(GZIP_MAGIC):
            raise InvalidBatch("Invalid gzip body")
        return inflate(body, "gzip", MAX_DECODED_BYTES)
    if len(body) > MAX_DECODED_BYTES:
        raise TooLarge("Payload too large")
    return body


def parse_json(text: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        InvalidBatch: Not JSON, or nested too deeply.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text.decode("utf-8", "replace"), parse_constant=_refuse, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise InvalidBatch("Invalid JSON") from error


def split_events(text: bytes) -> list[bytes]:
    """Return the bytes of every event of a valid batch, exactly as they stand in `text`."""
    try:
        events = msgspec.json.decode(text, type=_Batch).replay.events
        return [bytes(event) for event in msgspec.json.decode(events, type=list[msgspec.Raw])]
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return list(_walk_events(text))


def _walk_events(text: bytes) -> Iterator[bytes]:
    """Slice the events where msgspec refuses the text: lone surrogates, or bytes that are not UTF-8."""
    # surrogateescape is the one error handler that gives back the same bytes on encoding.
    characters = text.decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder()

    def skip(index: int) -> int:
        found = _WHITESPACE.match(characters, index)
        return found.end() if found else index

    def members(index: int) -> Iterator[tuple[str, int, int]]:
        """Yield name, start and end of each value of the object at `index`."""
        index = skip(index + 1)
        while characters[index] != "}":
            name, index = decoder.raw_decode(characters, index)
            start = skip(skip(index) + 1)
            _, end = decoder.raw_decode(characters, start)
            yield name, start, end
            index = skip(end)
            if characters[index] == ",":
                index = skip(index + 1)

    # A repeated name counts last, as in every parser here.
    top = {name: start for name, start, _ in members(skip(0))}
    replay = {name: start for name, start, _ in members(top["replay"])}
    index = skip(replay["events"] + 1)
    while characters[index] != "]":
        _, end = decoder.raw_decode(characters, index)
        yield characters[index:end].encode("utf-8", "surrogateescape")
        index = skip(end)
        if characters[index] == ",":
            index = skip(index + 1)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _parse_int(text: str) -> int | float:
    """Read an integer as orjson does: one of 64 bits, else a double."""
    if len(text) <= _MAX_INT_CHARACTERS and -(2**63) <= (number := int(text)) < 2**64:
        return number
    return float(text)
