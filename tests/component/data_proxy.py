"""The data API's proxy between clients and a scripted origin, over memory streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from relay.app import data_upstream
from relay.config import Config, Listen
from relay.config import DataApi as Settings
from relay.data_api.proxy import DataApi
from relay.http.client import HttpClient
from relay.http.router import Router
from tests.component.fake_origin import FakeOrigin, FakePeer, Script
from tests.component.memory_listener import RawClient, serving

TOKEN = "luc_api_test"  # noqa: S105 - of nobody
ISSUES = "/api/v1/issues"
ISSUE = ISSUES + "/87b3a6b6-5af5-438b-a39c-eff148a68ccb"

Respond = Callable[[bytes], bytes | None]
"""Returns the answer to a request; None to close without one."""


def get(target: str = ISSUES, *lines: str, by: str = TOKEN, method: str = "GET", body: bytes = b"") -> bytes:
    """Return the request of a client with some token, or none."""
    head = [f"{method} {target} HTTP/1.1", "Host: relay.test", *lines]
    if by:
        head.append(f"Authorization: Bearer {by}")
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "\r\n"]).encode() + body


def patch(target: str = ISSUE, status: str = "resolved", **rest: Any) -> bytes:
    """Return a client's change of an issue."""
    body = b'{"status":"%b"}' % status.encode()
    return get(target, "Content-Type: application/json", method="PATCH", body=body, **rest)


def answer(body: bytes = b'{"issues":[]}', *lines: str, status: str = "200 OK") -> bytes:
    """Return an origin's answer."""
    head = [f"HTTP/1.1 {status}", "content-type: application/json", *lines, f"content-length: {len(body)}"]
    return "\r\n".join([*head, "\r\n"]).encode() + body


class Origin(FakeOrigin):
    """An origin that keeps what it is asked, and answers every connection alike.

    Args:
        nursery: Runs the connections.
        respond: Answers.
    """

    def __init__(self, nursery: trio.Nursery, respond: Respond, **options: Any) -> None:
        super().__init__(nursery, *[self._talk] * 1_000, **options)
        self.respond = respond
        self.asked: list[bytes] = []
        self.gate: trio.Event | None = None

    async def _talk(self, peer: FakePeer) -> None:
        while request := await peer.read_request():
            self.asked.append(request)
            if self.gate is not None:
                await self.gate.wait()
            data = self.respond(request)
            if data is None:
                return
            await peer.send(data)


class Proxying:
    """A proxy that runs."""

    def __init__(self, data_api: DataApi, origin: FakeOrigin, connect: Callable[..., RawClient]) -> None:
        self.data_api = data_api
        self.origin = origin
        self.connect = connect
        self.wall_now = 1_800_000_000.0

    @property
    def asked(self) -> list[bytes]:
        """Requests that the origin got."""
        assert isinstance(self.origin, Origin)
        return self.origin.asked

    async def ask(self, request: bytes, **options: Any) -> tuple[int, dict[bytes, bytes], bytes]:
        """Send a request on a connection of its own; returns the answer."""
        async with self.connect() as client:
            await client.send(request)
            return await client.read(**options)


@asynccontextmanager
async def proxying(
    respond: Respond | None = None,
    *scripts: Script,
    listen: Listen | None = None,
    lockstep: bool = False,
    read_file: Callable[[Path], bytes] | None = None,
    **settings: Any,
) -> AsyncIterator[Proxying]:
    """Run a proxy; on exit check that nothing is under way."""
    chosen = Settings(**settings)

    async def read(path: Path) -> bytes:
        await trio.lowlevel.checkpoint()
        assert read_file is not None
        return read_file(path)

    async with trio.open_nursery() as nursery:
        origin = (
            Origin(nursery, respond, lockstep=lockstep)
            if respond is not None
            else FakeOrigin(nursery, *scripts, lockstep=lockstep)
        )
        client = HttpClient("http://data.example/base", data_upstream(Config(data_api=chosen)), connect=origin.connect)
        data_api = DataApi(
            chosen,
            client,
            monotonic=trio.current_time,
            wall=lambda: it.wall_now,
            salt=b"salt",
            read_file=read,
        )
        await nursery.start(data_api.run)
        async with serving(listen, router=Router(data_api.routes())) as served:
            it = Proxying(data_api, origin, served.memory.connect)
            yield it
        await trio.testing.wait_all_tasks_blocked()
        assert data_api.statistics().in_flight == 0
        data_api.stop()
        await client.aclose()
        nursery.cancel_scope.cancel()
