"""A listener without a network, and a client that speaks raw bytes to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from relay.config import Listen
from relay.http.listener import HttpListener
from relay.http.message import JSON, Request, Response
from relay.http.router import Route, Router

OK = Response(200, b'{"ok":true}', (JSON,))
CORS = (b"access-control-allow-origin", b"*")

Answer = tuple[int, dict[bytes, bytes], bytes]


class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    """Accepts connections that a test makes with `connect`, whose `servers` it keeps; `failures` are raised first."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](1_000)
        self.failures: list[OSError] = []
        self.servers: list[trio.abc.Stream] = []

    async def accept(self) -> trio.abc.Stream:
        """Return the next connection's server side."""
        if self.failures:
            await trio.lowlevel.checkpoint()
            raise self.failures.pop()
        return await self._receive.receive()

    async def aclose(self) -> None:
        """Refuse further connections."""
        self._receive.close()
        await trio.lowlevel.checkpoint()

    def connect(self, *, is_lockstep: bool = False) -> RawClient:
        """Return a connected client; in lockstep every write waits until the other side has read it."""
        pair = trio.testing.lockstep_stream_pair if is_lockstep else trio.testing.memory_stream_pair
        client, server = pair()
        self.servers.append(server)
        self._send.send_nowait(server)
        return RawClient(client)


class RawClient(trio.abc.AsyncResource):
    """One connection; reads responses by their framing."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def aclose(self) -> None:
        """Close the connection."""
        await self.stream.aclose()

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send_all(data)

    async def read_head(self) -> tuple[int, dict[bytes, bytes]]:
        """Read a response's status and headers."""
        while b"\r\n\r\n" not in self._buffer:
            data = await self.stream.receive_some(65_536)
            assert data, f"closed amid a head: {bytes(self._buffer)!r}"
            self._buffer += data
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        status_line, *lines = head.split(b"\r\n")
        fields = [line.split(b": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in fields}
        assert len(headers) == len(lines), "a header was sent twice"
        return int(status_line.split()[1]), headers

    async def read(self, *, has_body: bool = True) -> Answer:
        """Read one response."""
        status, headers = await self.read_head()
        length = int(headers.get(b"content-length", b"0")) if has_body else 0
        while len(self._buffer) < length:
            data = await self.stream.receive_some(65_536)
            assert data, "closed amid a body"
            self._buffer += data
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return status, headers, body

    async def ask(self, data: bytes) -> Answer:
        """Send bytes and read one response."""
        await self.send(data)
        return await self.read()

    async def read_to_end(self) -> bytes:
        """Read what comes until the server closes, whether it closes or resets."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        try:
            while data := await self.stream.receive_some(65_536):
                rest += data
        except trio.BrokenResourceError:
            pass
        return rest


class Recorder:
    """A handler that keeps the requests and answers `response`, after `gate` where there is one."""

    def __init__(self, response: Response = OK) -> None:
        self.response = response
        self.requests: list[Request] = []
        self.gate: trio.Event | None = None

    async def __call__(self, request: Request) -> Response:
        """Record and answer."""
        self.requests.append(request)
        if self.gate is not None:
            await self.gate.wait()
        return self.response


def route_to(recorder: Recorder, *, max_body_bytes: int = 1_000) -> Router:
    """Return a router with the recorder at `/in` (POST) and `/out` (GET)."""
    return Router(
        [
            Route("/in", {"POST": recorder}, max_body_bytes=max_body_bytes, headers=(CORS,)),
            Route("/out", {"GET": recorder}),
        ]
    )


class Serving:
    """A running listener with what a test needs of it."""

    def __init__(self, listener: HttpListener, memory: MemoryListener, recorder: Recorder) -> None:
        self.listener = listener
        self.memory = memory
        self.recorder = recorder
        self.connect = memory.connect
        self.stopped = trio.Event()


@asynccontextmanager
async def serving(
    settings: Listen | None = None, *, recorder: Recorder | None = None, router: Router | None = None
) -> AsyncIterator[Serving]:
    """Run a listener; on exit stop it, and check that it gave everything back."""
    recorder = recorder or Recorder()
    listener = HttpListener(
        router or route_to(recorder), settings or Listen(), retry_after_seconds=7, wall_clock=lambda: 0.0
    )
    memory = MemoryListener()
    it = Serving(listener, memory, recorder)

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await listener.run([memory], task_status=task_status)
        it.stopped.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield it
        listener.stop()
    statistics = listener.statistics()
    assert (statistics.open_connections, statistics.buffered_bytes) == (0, 0)
