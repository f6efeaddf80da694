"""A scripted server over memory streams: the far end of the upstream client's connections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, TypeAlias

import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair

if TYPE_CHECKING:
    from relay.http.connect import Origin

OK = b'HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{"ok":true}'
"""Upstream's answer to a batch that it has stored."""


Stapled: TypeAlias = trio.StapledStream[Any, Any]
"""One end of a memory stream pair."""


class FakeWire(trio.abc.Stream):
    """The client's end of one connection; remembers how it ended."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.is_closed = False
        """The client has closed it."""
        self.is_reset = False
        """The server's end of data is an error, as after a TCP RST."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream's own."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream's own."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream's own, but for a reset."""
        data = await self._stream.receive_some(max_bytes)
        if not data and self.is_reset:
            raise trio.BrokenResourceError("reset by the script")
        return data

    async def aclose(self) -> None:
        """Close and remember."""
        self.is_closed = True
        await self._stream.aclose()


class FakePeer:
    """The server's end of one connection."""

    def __init__(self, stream: Stapled, wire: FakeWire, *, may_break_off: bool = False) -> None:
        self.stream = stream
        self.wire = wire
        self._may_break_off = may_break_off
        self._unread = b""

    async def read_request(self) -> bytes:
        """Return one whole request, as it came; `b""` where the client has closed instead.

        It closes in the middle of one only where it `may_break_off`, for want of patience.
        """
        while b"\r\n\r\n" not in self._unread:
            data = await self.stream.receive_some()
            if not data:
                assert self._may_break_off or not self._unread, "the client closed in the middle of a request"
                return b""
            self._unread += data
        head, _, rest = self._unread.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        while len(rest) < length:
            data = await self.stream.receive_some()
            if not data:
                assert self._may_break_off, "the client closed in the middle of a request"
                return b""
            rest += data
        self._unread = rest[length:]
        return head + b"\r\n\r\n" + rest[:length]

    async def send(self, data: bytes, *, piece_bytes: int = 0) -> None:
        """Send data, in pieces if `piece_bytes` is given."""
        for start in range(0, len(data), piece_bytes or len(data) or 1):
            await self.stream.send_all(data[start : start + (piece_bytes or len(data))])

    async def stop_reading(self) -> None:
        """Take nothing more, so that the client's next send breaks; sending goes on to work."""
        await self.stream.receive_stream.aclose()

    async def wait_closed(self) -> None:
        """Return once the client has closed the connection; what it still sends is thrown away."""
        while await self.stream.receive_some():
            pass


Script: TypeAlias = Callable[[FakePeer], Awaitable[None]]
"""Plays one connection. When it returns, the server closes."""


class FakeOrigin:
    """Accepts connections and plays one script on each, in order.

    Args:
        nursery: Runs the scripts.
        scripts: For the first connection, the second …; a connection more is a failure of the test.
        lockstep: With streams that buffer nothing, so that whoever sends waits for the reader.
    """

    def __init__(self, nursery: trio.Nursery, *scripts: Script, lockstep: bool = False) -> None:
        self._nursery = nursery
        self._scripts = scripts
        self._lockstep = lockstep
        self.wires: list[FakeWire] = []
        """The client's end of every connection, in order."""

    @property
    def open_connections(self) -> int:
        """Connections that the client has not closed."""
        return sum(not wire.is_closed for wire in self.wires)

    async def connect(self, origin: Origin) -> trio.abc.Stream:
        """Stand in for DNS, TCP and TLS."""
        await trio.lowlevel.checkpoint()
        script = self._scripts[len(self.wires)]
        ours, theirs = lockstep_stream_pair() if self._lockstep else memory_stream_pair()
        wire = FakeWire(ours)
        self.wires.append(wire)
        self._nursery.start_soon(self._play, script, FakePeer(theirs, wire))
        return wire

    async def _play(self, script: Script, peer: FakePeer) -> None:
        async with peer.stream:
            # A client may leave while it is being answered; what that means is for the test to say.
            with suppress(trio.BrokenResourceError):
                await script(peer)


def answering(*answers: bytes, piece_bytes: int = 0) -> Script:
    """Return a script that gives each of `answers` in turn, and then the last one for ever."""

    async def script(peer: FakePeer) -> None:
        for answer in chain(answers, repeat(answers[-1])):
            if not await peer.read_request():
                return
            await peer.send(answer, piece_bytes=piece_bytes)

    return script


def answering_then_closing(answer: bytes, *, piece_bytes: int = 0) -> Script:
    """Return a script that answers one request and closes."""

    async def script(peer: FakePeer) -> None:
        await peer.read_request()
        await peer.send(answer, piece_bytes=piece_bytes)

    return script


async def silence(peer: FakePeer) -> None:
    """Read and never answer."""
    await peer.wait_closed()
