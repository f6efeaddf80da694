"""An origin of the data API for the benchmark: a page of issues, a large answer, and a count of what it was asked.

As a command, `python -m bench.data_origin`. It prints its address as its one line.
"""

from __future__ import annotations

import json
from uuid import UUID

import trio

from relay.config import Listen
from relay.http.listener import HttpListener, open_listeners
from relay.http.message import JSON, Request, Response, Streamed, Writer, json_response
from relay.http.router import Route, Router

PAGE_ISSUES = 25
"""Upstream's default `limit`."""

LARGE_BYTES = 100_000_000
"""Of the large answer."""

_PIECE = b"x" * 65_536


def make_page() -> bytes:
    """Return a page as upstream's are, about 25 KB."""
    issues = [
        {
            "id": str(UUID(int=number)),
            "title": f"Checkout button does nothing on the {number}th page",
            "description": "After the second click the page neither moves on nor says why. " * 12,
            "status": "unresolved",
            "createdAt": "2026-11-01T00:00:00.000Z",
        }
        for number in range(PAGE_ISSUES)
    ]
    return json.dumps({"issues": issues, "nextCursor": "x"}).encode()


async def main() -> None:
    """Serve until killed."""
    page = make_page()
    asked = 0

    async def issues(_: Request) -> Response:
        nonlocal asked
        asked += 1
        return Response(200, page, (JSON, (b"etag", b'"page"')))

    async def large(_: Request) -> Streamed:
        async def write(writer: Writer) -> None:
            writer.start(200, (JSON,), LARGE_BYTES)
            left = LARGE_BYTES
            while left:
                piece = _PIECE[: min(left, len(_PIECE))]
                await writer.send(piece)
                left -= len(piece)

        return Streamed(write)

    async def count(_: Request) -> Response:
        return json_response(200, {"asked": asked})

    routes = [
        Route("/api/v1/issues", {"GET": issues}),
        Route("/api/v1/insights", {"GET": large}),
        Route("/count", {"GET": count}),
    ]
    listeners = await open_listeners("127.0.0.1:0")
    print("http://{}:{}".format(*listeners[0].socket.getsockname()[:2]), flush=True)
    await HttpListener(Router(routes), Listen()).run(listeners)


if __name__ == "__main__":
    trio.run(main)
