"""HTTP/1.1 responses to bytes.

Rules:
1. A whole response is one piece of bytes, so that it costs one write. Only what is streamed may come in chunks.
2. No header can smuggle in another one: line breaks in a header are an error of the handler.
3. No clock: the owner says what time it is about once a second.
"""

from __future__ import annotations

from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from relay.http.connection import Exchange
from relay.http.message import HeaderList, Response

MAX_CACHED_HEADS: Final = 256
"""Rendered response heads kept. A relay answers with a few dozen; varying headers make it start over."""

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Tells a client that waits with its body to send it (RFC 9110, 10.1.1)."""

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class ResponseRenderer:
    """Turns responses to bytes; one for all connections, since heads repeat."""

    def __init__(self, now: float) -> None:
        """Args: now: Seconds since the Unix epoch."""
        self._heads: dict[tuple[int, HeaderList, HeaderList, bytes], bytes] = {}
        self._date = b""
        self.set_time(now)

    def set_time(self, now: float) -> None:
        """Set the `date` of responses to come; call about once a second.

        Args:
            now: Seconds since the Unix epoch.
        """
        self._date = b"date: %b\r\n\r\n" % formatdate(now, usegmt=True).encode()

    def render(self, exchange: Exchange, response: Response) -> bytes:
        """Return a response's bytes, head and body.

        Raises:
            ValueError: A header holds a line break; it would smuggle in further headers.
        """
        connection = b"connection: close\r\n" if response.close else _connection_line(exchange)
        status, body = response.status, response.body
        key = (status, response.headers, exchange.route_headers, connection)
        head = self._heads.get(key)
        if head is None:
            head = _render_head(*key)
            if len(self._heads) == MAX_CACHED_HEADS:
                self._heads.clear()
            self._heads[key] = head
        if status == 204 or status == 304:  # no body, so no length either (RFC 9110, 8.6)
            return head + self._date
        if exchange.request.method == "HEAD":
            return b"%bcontent-length: %d\r\n%b" % (head, len(body), self._date)
        return b"%bcontent-length: %d\r\n%b%b" % (head, len(body), self._date, body)

    def render_start(self, exchange: Exchange, status: int, headers: HeaderList, framing: bytes) -> bytes:
        """Return the head of a streamed response, which seldom repeats.

        Args:
            exchange: What is answered.
            status: HTTP status code.
            headers: With a `date` of their own, they have none of ours.
            framing: The line that says where the body ends; empty where it has none, or the connection ends it.

        Raises:
            ValueError: A header holds a line break.
        """
        date = b"\r\n" if any(name == b"date" for name, _ in headers) else self._date
        return _render_head(status, headers, exchange.route_headers, _connection_line(exchange)) + framing + date


def _connection_line(exchange: Exchange) -> bytes:
    """Return what a client has to be told of its connection."""
    if exchange.close:
        return b"connection: close\r\n"
    return b"connection: keep-alive\r\n" if exchange.is_http_1_0 else b""


def _render_head(status: int, headers: HeaderList, route_headers: HeaderList, connection: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Unknown"))]
    for name, value in (*headers, *route_headers):
        if b"\r" in name + value or b"\n" in name + value:
            raise ValueError(f"header {name!r} holds a line break: {value!r}")
        lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines) + connection
