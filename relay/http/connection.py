"""HTTP/1.1 requests without I/O: bytes of one connection in, exchanges out. The owner of httptools.

llhttp, which httptools wraps, is strict about nearly all of RFC 9112 when no leniency is switched on: bare LF or CR,
folded headers, a space before the colon, repeated or malformed Content-Length, Content-Length beside
Transfer-Encoding, sloppy chunks. What it lets through is refused here; a test holds the sum against the RFC. But for
two things, from which nothing follows: a bare CR or LF before a request line is skipped as an empty line is, and
`RTSP/1.1` is read as `HTTP/1.1`.

Rules:
1. Requests leave in the order in which they came, each with the answer that is already decided or the handler to ask.
2. Once framing cannot be trusted, or a body is refused unread, no later byte is taken for a request: the parser is
   `closed`, and its last exchange closes the connection.
3. A parser holds at most one head of `max_header_bytes`, plus one read, plus bodies within their route's limit.
   `held_bytes` says how much the bodies are.
4. No socket, no clock, no logging. What a route's `admit` raises surfaces when its exchange is answered.

Not here: who waits for whom and for how long (`relay.http.listener`), responses (`relay.http.render`), content
codings.
"""

from __future__ import annotations

import enum
import io
from typing import Final

import httptools
import msgspec

from relay.http.head import (
    Malformed,
    Refused,
    check_transfer_coding,
    check_version_and_host,
    origin_form,
    render_without_upgrade,
)
from relay.http.message import HANG_UP, Handler, HeaderList, Request, Response, error_response
from relay.http.router import Router

MAX_PIPELINED: Final = 64
"""Requests taken from one read; behind the last the connection closes, and the client sends the rest again (RFC
9112, 9.3.2). Browsers do not pipeline at all; without a bound one 64 KiB read could hold 2 500 requests."""

DRAIN_BYTES: Final = 65_536
"""A refused body up to this size is read and dropped, so that the connection survives: one read's worth costs less
than a new connection. A larger one is left unread and the connection closed."""

CHUNK_OVERHEAD: Final = 16
"""Wire bytes that framing may cost for each body byte of a chunked request. One-byte chunks, the worst that a sane
sender does, cost 5 (`1\\r\\n` and `\\r\\n`); endless extensions and padded sizes are an attack (RFC 9112, 7.1.1)."""


class Limits(msgspec.Struct, frozen=True):
    """What one request may be."""

    max_header_bytes: int
    """Request line and headers together; trailers too."""
    max_headers: int
    """Header lines of one request."""


class Progress(enum.Enum):
    """How far into a request a connection is."""

    BOUNDARY = enum.auto()
    """Between requests."""
    HEAD = enum.auto()
    """Some of a request line or of headers is there."""
    BODY = enum.auto()
    """Headers are complete, the body is not."""


async def _hang_up(_: Request) -> Response:
    return HANG_UP


class Exchange(msgspec.Struct, gc=False):
    """One request, and how it is to be answered."""

    request: Request
    """Complete, unless `response` refuses it."""
    response: Response | None = None
    """The answer where it is decided already."""
    handler: Handler = _hang_up
    """To be asked otherwise."""
    route_headers: HeaderList = ()
    """Headers of the route, for every response to this request."""
    close: bool = False
    """True where the connection ends with this exchange."""
    is_http_1_0: bool = False
    """True for a client that must be told that the connection stays open."""
    is_begun: bool = False
    """True once something of a streamed answer may have left."""


class _Complete(Exception):
    """The connection's last request is complete; what follows is not parsed."""


class RequestParser:
    """Turns one connection's bytes into exchanges.

    Attributes:
        progress: How far into a request the bytes fed so far reach.
        closed: True once no more bytes may be fed; the last exchange returned closes the connection.
        is_unread: True where the client may still be sending what nobody will parse.
        is_malformed: True where the last exchange is for a request that could not be read.
        held_bytes: Body bytes held: of the exchanges returned since `release`, and of an incomplete request.
        expects_continue: True while the client waits for `CONTINUE`; the caller clears it when it is sent.
    """

    __slots__ = (
        "_carried_bytes",
        "_discards",
        "_exchange",
        "_feed_bytes",
        "_first",
        "_headers",
        "_host",
        "_is_chunked",
        "_limits",
        "_max_body_bytes",
        "_parser",
        "_peer",
        "_ready",
        "_repeats",
        "_rest",
        "_router",
        "_size",
        "_url",
        "_wire_bytes",
        "_without_upgrade",
        "closed",
        "expects_continue",
        "held_bytes",
        "is_malformed",
        "is_unread",
        "progress",
    )

    def __init__(self, router: Router, limits: Limits, peer: str = "") -> None:
        self._router = router
        self._limits = limits
        self._peer = peer
        self._parser = httptools.HttpRequestParser(self)
        self._ready: list[Exchange] = []
        # The head being read.
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._repeats = 0
        self._feed_bytes = 0  # of the current read
        self._carried_bytes = 0  # of the incomplete head, from earlier reads
        self._without_upgrade = b""
        self._host = b" "  # the last that was found valid; clients repeat themselves
        # The body being read.
        self._exchange: Exchange | None = None
        self._max_body_bytes = 0
        self._is_chunked = False
        self._discards = False
        self._size = 0
        self._wire_bytes = 0  # framing included, from the second read on
        self._first = b""
        self._rest: io.BytesIO | None = None
        self.progress = Progress.BOUNDARY
        self.closed = False
        self.is_unread = False
        self.is_malformed = False
        self.held_bytes = 0
        self.expects_continue = False

    def feed(self, data: bytes | bytearray) -> list[Exchange]:
        """Take bytes from the wire.

        Args:
            data: What was received; not empty. Must not be called once `closed`.

        Returns:
            The exchanges that can be answered now, in order; empty where a request is still incomplete. The last has
            `close` set where the parser is now `closed`.
        """
        self._ready = ready = []
        self._feed_bytes = len(data)
        before = self._exchange
        try:
            unparsed = self._parse(data)
            if unparsed is not None:
                # An upgrade is declined by not answering it (RFC 9110, 7.8), but llhttp takes what follows for another
                # protocol: so the head is read once more, without its upgrade and as the connection's last.
                replayed = self._without_upgrade + unparsed
                self._feed_bytes = len(replayed)
                self._parser = httptools.HttpRequestParser(self)
                self._parse(replayed)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if isinstance(cause, Refused):
                self.is_malformed = isinstance(cause, Malformed)
                ready.append(self.abandon(cause.response))
            elif not isinstance(cause, _Complete):
                ready.append(self._fail(cause or error))
        except httptools.HttpParserError as error:
            ready.append(self._distrust(Malformed(str(error))))
        if self.closed:
            return ready
        if self._exchange is not None:
            self.progress = Progress.BODY
            self._carried_bytes = 0
            if self._is_chunked and self._exchange is before:
                self._wire_bytes += len(data)
                if self._wire_bytes > self._limits.max_header_bytes + (CHUNK_OVERHEAD + 1) * self._size:
                    ready.append(self._distrust(Malformed("more chunk framing than body")))
        elif self._url or self._headers or not ready:
            self.progress = Progress.HEAD
            # Of a head that began amid this read the share is unknown: it is counted from the next read on.
            self._carried_bytes = self._carried_bytes + len(data) if before is None and not ready else 0
            if self._carried_bytes > self._limits.max_header_bytes:
                ready.append(self._distrust(self._head_too_large()))
        else:
            self._carried_bytes = 0
        return ready

    def release(self) -> None:
        """Forget the exchanges returned so far, their list included; they are answered."""
        self._ready.clear()
        self.held_bytes = 0 if self._discards else self._size

    def abandon(self, response: Response) -> Exchange:
        """Give up on the request that is incomplete.

        Args:
            response: What to say, unless the request was refused already and only its body was awaited.

        Returns:
            The last exchange of this connection; the parser is `closed`.
        """
        exchange = self._exchange or Exchange(Request("", "", b"", {}))
        if exchange.response is None:
            exchange.response = response
        exchange.close = True
        self.closed = self.is_unread = True
        self._first = b""
        self._rest = None
        self._size = 0
        return exchange

    def discard(self) -> None:
        """Let go of llhttp's object, which refers back here, so that no garbage collector has to find the two."""
        self.closed = True
        del self._parser

    def _distrust(self, reason: Malformed) -> Exchange:
        self.is_malformed = True
        return self.abandon(reason.response)

    def _fail(self, cause: BaseException) -> Exchange:
        """Let an exception of `match` or `admit` surface where handlers' exceptions do."""

        async def fail(_: Request) -> Response:
            raise cause

        exchange = self.abandon(HANG_UP)
        exchange.response = None
        exchange.handler = fail
        return exchange

    def _parse(self, data: bytes | bytearray) -> bytes | bytearray | None:
        """Feed llhttp; return what it left because the client asked for an upgrade."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return data[upgrade.args[0] :]
        return None

    # Callbacks of httptools, in the order of a request.

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header line, or a trailer (which nobody reads: `_headers` is a fresh dict by then)."""
        name = name.lower()
        headers = self._headers
        if name in headers:
            self._repeat(name, value)
        else:
            # llhttp leaves trailing whitespace, which is no part of the value (RFC 9112, 5.1).
            headers[name] = value.rstrip()

    def on_headers_complete(self) -> None:
        """Check the head, find its route and decide what becomes of the body."""
        parser, limits = self._parser, self._limits
        headers, self._headers = self._headers, {}
        url, self._url = self._url, b""
        if len(headers) + self._repeats > limits.max_headers:
            raise Malformed(f"more than {limits.max_headers} headers", 431)
        self._repeats = 0
        method: bytes = parser.get_method()
        # First an upper bound that nearly always does; only beyond it is it worth adding up.
        if self._carried_bytes + self._feed_bytes > limits.max_header_bytes:
            lines = sum(len(name) + len(value) + 4 for name, value in headers.items())
            if len(method) + len(url) + len("  HTTP/1.1\r\n\r\n") + lines > limits.max_header_bytes:
                raise self._head_too_large()
        version: str = parser.get_http_version()
        is_http_1_0 = version != "1.1"
        host = headers.get(b"host")
        if host is None or host != self._host or is_http_1_0:
            check_version_and_host(version, host)
            self._host = host or b" "
        if url[:1] != b"/":
            url = origin_form(method, url)
        if b"#" in url:
            raise Malformed("fragment in the request target")
        self._is_chunked = b"transfer-encoding" in headers
        if self._is_chunked:
            check_transfer_coding(headers[b"transfer-encoding"], version)
        if parser.should_upgrade():
            self._without_upgrade = render_without_upgrade(method, url, version, headers)
            return
        path, _, query = url.partition(b"?")
        self._exchange = exchange = Exchange(
            Request(method.decode(), path.decode(), query, headers, b"", self._peer),
            close=not parser.should_keep_alive(),
            is_http_1_0=is_http_1_0,
        )
        self._decide(exchange, int(headers.get(b"content-length", b"0")))

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        size = self._size + len(piece)
        if size > self._max_body_bytes:
            raise Refused(body_too_large(self._max_body_bytes))
        self._size = size
        if self._discards:
            return
        self.held_bytes += len(piece)
        if not self._first:
            self._first = piece
        elif self._rest is None:
            # Gathered in one growing buffer: a list of tiny pieces would take many times their size.
            self._rest = io.BytesIO()
            self._rest.write(self._first)
            self._rest.write(piece)
        else:
            self._rest.write(piece)

    def on_message_complete(self) -> None:
        """Hand the request out."""
        exchange = self._exchange
        if exchange is None:  # its head is about to be replayed without an upgrade
            return
        if self._headers:
            if len(self._headers) + self._repeats > self._limits.max_headers:
                raise Malformed(f"more than {self._limits.max_headers} trailers", 431)
            self._headers = {}
            self._repeats = 0
        if self._first:
            exchange.request.body = self._first if self._rest is None else self._rest.getvalue()
            self._first = b""
            self._rest = None
        self._exchange = None
        self.progress = Progress.BOUNDARY
        self._size = 0
        self._discards = self.expects_continue = False
        self._ready.append(exchange)
        if exchange.close:
            self.closed = True
            raise _Complete
        if len(self._ready) == MAX_PIPELINED:
            exchange.close = self.closed = self.is_unread = True
            raise _Complete

    # Decisions.

    def _repeat(self, name: bytes, value: bytes) -> None:
        """Join a header that came before with what it says now."""
        self._repeats += 1
        if name == b"host":
            raise Malformed("more than one Host header")
        if self._repeats > self._limits.max_headers:
            raise Malformed(f"more than {self._limits.max_headers} headers", 431)
        self._headers[name] += b", " + value.rstrip()

    def _decide(self, exchange: Exchange, content_length: int) -> None:
        """Find the route, admit or refuse on headers alone, and settle what becomes of the body."""
        request = exchange.request
        found = self._router.match(request)
        if isinstance(found, Response):
            exchange.response = found
        else:
            route = found.route
            exchange.route_headers = route.headers
            self._max_body_bytes = route.max_body_bytes
            if route.admit is not None and request.method != "OPTIONS":
                exchange.response = route.admit(request)
            if exchange.response is None:
                if content_length > route.max_body_bytes:
                    exchange.response = body_too_large(route.max_body_bytes)
                else:
                    exchange.handler = found.handler
        if not content_length and not self._is_chunked:
            return
        self._wire_bytes = 0
        expects_continue = (
            b"expect" in request.headers
            and request.headers[b"expect"].lower() == b"100-continue"
            and not exchange.is_http_1_0
        )
        if exchange.response is None:
            self.expects_continue = expects_continue
        elif content_length > DRAIN_BYTES or expects_continue:
            # Whether a client that was told to wait sends its body or another request now, nobody can tell.
            raise Refused(exchange.response)
        else:
            self._discards = True
            self._max_body_bytes = DRAIN_BYTES

    def _head_too_large(self) -> Malformed:
        return Malformed(f"head over {self._limits.max_header_bytes} bytes", 431)


def body_too_large(max_body_bytes: int) -> Response:
    """Return the answer to a body over its route's limit."""
    return error_response(413, f"Request body is over {max_body_bytes} bytes")
