"""Request and response values: what a handler sees, whichever engine carries it.

Rules:
1. Nothing here knows an engine, a socket or trio. The httptools listener and the ASGI adapter build the same
   `Request` and render the same `Response`.
2. Header names are lower-case bytes. A header that a request repeats is joined with `, ` (RFC 9110, 5.3).
3. A handler answers with a whole `Response`, or with `Streamed`, which writes while the client is watched. Nothing is
   held between the two: what a streamed answer opens, it opens and closes while it writes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeAlias

import msgspec
import orjson

HeaderList: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Response headers in order; names lower-case."""


class Request(msgspec.Struct, gc=False):
    """One HTTP request; `body` is empty while a route's `admit` looks at it."""

    method: str
    """Upper-case method token."""
    path: str
    """Path without the query, percent-encoding untouched."""
    query: bytes
    """What follows `?`, undecoded; empty without one."""
    headers: dict[bytes, bytes]
    """Names lower-case; repeated headers joined with `, `."""
    body: bytes = b""
    """The whole body with transfer codings removed and content codings in place."""
    peer: str = ""
    """The client's address for logs; empty where there is none."""

    def header(self, name: bytes, default: bytes = b"") -> bytes:
        """Return a header's value, or `default` without it. `name` is lower-case."""
        return self.headers.get(name, default)


class Response(msgspec.Struct, gc=False):
    """One HTTP response. The engine adds `date`, `content-length` and `connection`."""

    status: int
    """HTTP status code."""
    body: bytes = b""
    """The whole body; left out on HEAD, 204 and 304 by the engine."""
    headers: HeaderList = ()
    """Names lower-case."""
    close: bool = False
    """True where the connection cannot be used for another request."""


class Writer(Protocol):
    """The client's side of an answer that is written while it comes."""

    def start(self, status: int, headers: HeaderList, length: int | None) -> None:
        """Set status and headers; called once, before anything is sent.

        Args:
            status: HTTP status code.
            headers: Names lower-case, without framing. A `date` among them takes the place of the engine's own.
            length: Of the body; None where its end decides. A HEAD or a 304 has the length of what it stands for.
        """

    async def send(self, piece: bytes) -> None:
        """Send a piece of the body; nothing on HEAD, 204 and 304.

        Cancellation: The answer is cut: the connection ends without the rest.
        """

    def cut(self) -> None:
        """Give the answer up after it began: the connection ends such that the client can tell."""


class Streamed(msgspec.Struct, gc=False):
    """An answer that is written while it comes: of any size, and at the client's pace."""

    write: Callable[[Writer], Awaitable[None]]
    """Writes it. Cancelled where the client leaves; what it opened is closed by then."""


Handler: TypeAlias = Callable[[Request], Awaitable[Response | Streamed]]
"""Answers one request whose body is complete."""

Admit: TypeAlias = Callable[[Request], Response | None]
"""Looks at a request's headers before its body is read; a Response refuses it."""

JSON = (b"content-type", b"application/json")
"""The content type of everything that we answer."""


def json_response(status: int, value: Any, headers: HeaderList = (), *, close: bool = False) -> Response:
    """Return `value` as a JSON response."""
    return Response(status, orjson.dumps(value), (JSON, *headers), close)


def error_response(
    status: int,
    message: str,
    details: list[dict[str, Any]] | None = None,
    headers: HeaderList = (),
    *,
    close: bool = False,
) -> Response:
    """Return an error in upstream's shape: `{"error": message}`, with `details` where there are any."""
    value: dict[str, Any] = {"error": message}
    if details:
        value["details"] = details
    return json_response(status, value, headers, close=close)


HANG_UP = Response(0, close=True)
"""Ends the connection without an answer; for a stand-in that plays a broken peer."""
