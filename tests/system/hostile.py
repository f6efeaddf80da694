"""A TCP proxy between the relay and the sandbox that is in the mood for anything, on real sockets."""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from random import Random
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import trio

Mood: TypeAlias = Literal[
    "pass", "reset", "hang", "swallow", "cut request", "cut answer", "half-close", "garbage", "endless", "crawl"
]
"""What becomes of a connection: `swallow` takes the answer of a request that has reached upstream."""

MOODS: tuple[Mood, ...] = (
    *("reset", "hang", "swallow", "cut request", "cut answer"),
    *("half-close", "garbage", "endless", "crawl"),
)


class HostileProxy:
    """Draws a mood for each connection, of those that are allowed now.

    Args:
        target: Base URL of who stands behind.
        seed: Of the draw.
    """

    def __init__(self, target: str, seed: int) -> None:
        parts = urlsplit(target)
        self._target = (str(parts.hostname), int(parts.port or 0))
        self._dice = Random(seed)
        self._scopes: set[trio.CancelScope] = set()
        self._gate = trio.Event()
        self._gate.set()
        self.moods: Sequence[Mood] = ("pass",)
        self.seen: Counter[Mood] = Counter()
        """Connections by what became of them."""
        self.url = ""

    def change(self, *moods: Mood) -> None:
        """Draw from other moods from now on, and reset every connection there is."""
        self.moods = moods
        for scope in self._scopes:
            scope.cancel()

    def hold(self) -> None:
        """Pass on no request of connections that are made from now on, until `let_go`."""
        self._gate = trio.Event()

    def let_go(self) -> None:
        """Pass on what was held, and everything from now on."""
        self._gate.set()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, self._serve, 0, host="127.0.0.1"))
            self.url = "http://127.0.0.1:{1}".format(*listeners[0].socket.getsockname())
            task_status.started()

    async def _serve(self, near: trio.SocketStream) -> None:
        mood = self._dice.choice(self.moods)
        self.seen[mood] += 1
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await self._play(mood, near)
            except* (OSError, trio.BrokenResourceError):
                pass  # the relay has had enough
        self._scopes.discard(scope)
        if scope.cancelled_caught or mood == "reset":  # a close without lingering is a RST
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(near)

    async def _play(self, mood: Mood, near: trio.SocketStream) -> None:
        if mood == "reset":
            await near.receive_some(1)
        elif mood == "hang":
            await trio.sleep_forever()
        elif mood == "cut request":
            await near.receive_some(100)
        elif mood == "garbage":
            await near.receive_some()
            await near.send_all(self._dice.randbytes(500))
        elif mood == "endless":
            await near.receive_some()
            await near.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                await near.send_all(b"1000\r\n%b\r\n" % bytes(0x1000))
        else:
            async with await trio.open_tcp_stream(*self._target) as far, trio.open_nursery() as nursery:
                nursery.start_soon(self._bring, near, far)
                await self._bring_back(mood, far, near)
                nursery.cancel_scope.cancel()

    async def _bring(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        """Bring requests."""
        await self._gate.wait()
        await self._pump(near, far)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with suppress(OSError, trio.BrokenResourceError):
            while data := await source.receive_some():
                await sink.send_all(data)

    async def _bring_back(self, mood: Mood, far: trio.SocketStream, near: trio.SocketStream) -> None:
        """Hand answers back as the mood will have it; all but `pass` end with the first."""
        if mood == "pass":
            await self._pump(far, near)
            return
        answer = await far.receive_some()
        if mood == "cut answer":
            await near.send_all(answer[: self._dice.randrange(1, len(answer) - 1)])
        elif mood == "half-close":
            await near.send_eof()
            await trio.sleep_forever()
        elif mood == "crawl":
            for start in range(len(answer)):
                await near.send_all(answer[start : start + 1])
                await trio.sleep(self._dice.random() / 100)


@asynccontextmanager
async def hostile_proxy(target: str, seed: int = 1) -> AsyncIterator[HostileProxy]:
    """Run a proxy."""
    async with trio.open_nursery() as nursery:
        proxy = HostileProxy(target, seed)
        await nursery.start(proxy.run)
        yield proxy
        nursery.cancel_scope.cancel()
