"""Answers that are written while they come, over HTTP/1.1.

Rules:
1. A piece is on its way before the next is asked for, so what an answer holds here is one piece.
2. Where the body has a length, exactly that many bytes are sent or the connection ends; where it has none it is
   chunked, and for a client of HTTP/1.0 the connection's end is the body's.
3. An answer that stops early is never mistaken for a whole one: it lacks bytes or its last chunk, and where only the
   connection's end could tell, that is a reset.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from relay.http.connection import Exchange
from relay.http.message import HeaderList, Streamed
from relay.http.render import ResponseRenderer

PIECE_BYTES: Final = 65_536
"""Sent at most within one `listen.write_seconds`, so that a slow reader of much is told from one that has stopped."""

AHEAD_BYTES: Final = 1_024
"""Taken of a client's next request while an answer is streamed to it, which may be waiting for as long as a handler
likes: on 10 000 connections 10 MB, where a full read of each would be 650."""

_NO_LINGER = struct.pack("ii", 1, 0)


class ClientGone(Exception):
    """The client has left, or takes nothing any more. How connections end; nobody's fault."""


class StreamWriter:
    """Writes one answer; a `relay.http.message.Writer`.

    Args:
        exchange: What is answered.
        renderer: Of heads.
        send: Sends bytes to the client, within its patience.

    Attributes:
        is_begun: Something of the answer may have left.
        is_complete: All of it has.
    """

    def __init__(
        self, exchange: Exchange, renderer: ResponseRenderer, send: Callable[[bytes | memoryview], Awaitable[None]]
    ) -> None:
        self._exchange = exchange
        self._renderer = renderer
        self._send = send
        self._head = b""  # until the first piece takes it along
        self._has_body = True
        self._is_chunked = False
        self._left: int | None = None
        self._is_cut = False
        self.is_begun = False
        self.is_complete = False

    def start(self, status: int, headers: HeaderList, length: int | None) -> None:
        """Set status and headers."""
        exchange = self._exchange
        self._has_body = exchange.request.method != "HEAD" and status not in {204, 304}
        framing = b""
        if length is not None and status != 204:  # which has no length either (RFC 9110, 8.6)
            framing = b"content-length: %d\r\n" % length
        elif self._has_body and exchange.is_http_1_0:
            exchange.close = True
        elif self._has_body:
            self._is_chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        self._left = length if self._has_body else 0
        self._head = self._renderer.render_start(exchange, status, headers, framing)

    async def send(self, piece: bytes) -> None:
        """Send a piece of the body.

        Raises:
            ClientGone: The client has left.
            ValueError: More than the length that was said. The handler's mistake.
        """
        if not piece or not self._has_body:
            return
        if self._left is not None:
            self._left -= len(piece)
            if self._left < 0:
                raise ValueError(f"{-self._left} bytes more than the answer's length")
        for start in range(0, len(piece), PIECE_BYTES):
            part = piece if len(piece) <= PIECE_BYTES else memoryview(piece)[start : start + PIECE_BYTES]
            if self._is_chunked:
                await self._flush(b"%x\r\n%b\r\n" % (len(part), bytes(part)))
            else:
                await self._flush(part)

    def cut(self) -> None:
        """Give the answer up."""
        self._is_cut = True

    async def finish(self) -> None:
        """End the answer, once the handler has returned."""
        if not self._is_cut and not self._left:
            await self._flush(b"0\r\n\r\n" if self._is_chunked else b"")
            self.is_complete = True

    def reset(self, stream: trio.abc.Stream) -> None:
        """See that the end of a cut answer's connection is not taken for the end of its body."""
        if self.is_begun and self._left is None and not self._is_chunked and isinstance(stream, trio.SocketStream):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)

    async def _flush(self, part: bytes | memoryview) -> None:
        if self._head:
            head, self._head = self._head, b""
            part = head + bytes(part)
        if part:
            self.is_begun = True
            try:
                await self._send(part)
            except (trio.BrokenResourceError, OSError) as error:
                raise ClientGone from error


async def write_watched(
    streamed: Streamed,
    writer: StreamWriter,
    receive: Callable[[int], Awaitable[bytes | bytearray]],
    ahead: bytearray,
) -> None:
    """Let a handler write its answer while its client is watched, and cancel it if the client leaves.

    Args:
        streamed: The handler's.
        writer: To the client.
        receive: From the client.
        ahead: What the client sends meanwhile is added here, up to `AHEAD_BYTES`. With as much as that it is not read
            from, and so not watched: more would have to be held, or lost.
    """

    async def watch() -> None:
        while len(ahead) < AHEAD_BYTES:
            data: bytes | bytearray = b""
            with suppress(trio.BrokenResourceError, OSError):
                data = await receive(AHEAD_BYTES - len(ahead))
            if not data:
                nursery.cancel_scope.cancel()
                return
            ahead.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        with suppress(ClientGone):
            await streamed.write(writer)
            await writer.finish()
        nursery.cancel_scope.cancel()
