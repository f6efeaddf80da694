"""HTTP/1.1 for tests that stand where clients stand: whole answers, one request at a time, on a connection that stays.

h11 frames, trio carries; nothing of the relay's own is used, so that both cannot be wrong in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import h11
import trio

Headers = Sequence[tuple[str, str]]


class Lost(Exception):
    """The connection could not be made, or ended before the answer did."""


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


class Connection:
    """One connection to a server, from `connect`."""

    def __init__(self, stream: trio.SocketStream, host: str) -> None:
        self.stream = stream
        self._host = host
        self._http = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> Self:
        """Return the connection."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        await trio.aclose_forcefully(self.stream)

    @property
    def is_over(self) -> bool:
        """Whether the server said that the last answer was this connection's last."""
        return self._http.our_state is h11.MUST_CLOSE

    async def request(self, method: str, target: str, headers: Headers = (), body: bytes = b"") -> Answer:
        """Send a request and return its answer.

        Raises:
            Lost: The connection ended first. The server may have done what it was asked.
        """
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        lines = [("Host", self._host), ("Content-Length", str(len(body))), *headers]
        head = self._http.send(h11.Request(method=method, target=target, headers=lines))
        end = self._http.send(h11.Data(data=body)), self._http.send(h11.EndOfMessage())
        try:
            await self.stream.send_all(b"".join((head or b"", *(piece or b"" for piece in end))))
            return await self.read_answer()
        except (trio.BrokenResourceError, OSError, h11.RemoteProtocolError) as error:
            raise Lost(str(error)) from error

    async def read_answer(self) -> Answer:
        """Return the answer to what was sent."""
        status, headers, body = 0, {}, bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self.stream.receive_some())
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, headers, bytes(body))
            elif isinstance(event, h11.ConnectionClosed):
                raise Lost("closed before an answer")


async def connect(url: str) -> Connection:
    """Return a connection to the server at a base URL.

    Raises:
        Lost: There is none.
    """
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise Lost("no address yet")
    try:
        stream = await trio.open_tcp_stream(parts.hostname, parts.port)
    except OSError as error:
        raise Lost(str(error)) from error
    return Connection(stream, parts.netloc)


async def ask(url: str, method: str = "GET", headers: Headers = (), body: bytes = b"") -> Answer:
    """Send one request on a connection of its own.

    Raises:
        Lost: There is no answer.
    """
    parts = urlsplit(url)
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    async with await connect(f"{parts.scheme}://{parts.netloc}") as connection:
        return await connection.request(method, target, headers, body)
