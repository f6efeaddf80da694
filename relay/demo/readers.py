"""The demo's readers: dashboards that ask for the same page of the data API at once, through the relay."""

from __future__ import annotations

import orjson
import trio

from relay.demo.audit import Reads
from relay.errors import UpstreamError
from relay.forward.exchange import Client

READERS = 10
"""As many dashboards open in one team; without a relay each of them takes a read of the token's budget."""

PAGE = "/api/v1/issues?limit=3"
"""What they ask for."""

_HEADERS = ((b"authorization", b"Bearer luc_api_demo"),)
"""The sandbox takes every token with a published prefix."""


async def read_page(client: Client) -> Reads:
    """Let all readers ask at once.

    Args:
        client: To the relay.
    """
    pages: list[bytes] = []

    async def read() -> None:
        try:
            reply = await client.request("GET", PAGE, _HEADERS, b"")
        except UpstreamError:
            return
        if reply.status == 200:
            pages.append(reply.body)

    async with trio.open_nursery() as nursery:
        for _ in range(READERS):
            nursery.start_soon(read)
    if not pages:
        return Reads(READERS)
    return Reads(READERS, pages.count(pages[0]), orjson.loads(pages[0])["issues"][0]["title"])
