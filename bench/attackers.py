"""Clients that mean ill: each attack is a task that runs until it is cancelled, over as many connections as it likes.

As a command, `python -m bench.attackers NAME HOST PORT`, it is one attack until it is terminated: in a process of its
own, so that a good client's times are not its doing.
"""

from __future__ import annotations

import functools
import gzip
import resource
import socket
import struct
import sys
import zlib
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import trio
import zstandard

Address: TypeAlias = tuple[str, int]
Attack: TypeAlias = Callable[[Address], Awaitable[None]]

IDLE_CONNECTIONS = 5_000
SLOW_CONNECTIONS = 500
"""Of each kind of slowloris."""

_PAUSE_SECONDS = 0.02
"""Before a connection that was ended is made anew."""

_HEAD = b"POST /api/sdk/replay HTTP/1.1\r\nHost: relay\r\nX-Lucent-Api-Key: luc_pk_hostile\r\n"
_GET = b"GET /api/sdk/replay?" + b"x" * 100 + b" HTTP/1.1\r\nHost: relay\r\n\r\n"

_BOMB_BYTES = 100_000_000
"""Inflated; a relay takes two thirds of it by default."""


def post(body: bytes, coding: str = "") -> bytes:
    """Return a whole request."""
    named = f"Content-Encoding: {coding}\r\n".encode() if coding else b""
    return _HEAD + named + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def _repeat(address: Address, connections: int, converse: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    """Keep up connections, and begin anew on each that ends."""

    async def keep() -> None:
        while True:
            try:
                async with await trio.open_tcp_stream(*address) as stream:
                    await converse(stream)
            except* (OSError, trio.BrokenResourceError):
                pass  # the relay has ended it, as it should
            await trio.sleep(_PAUSE_SECONDS)

    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(keep)


async def _read_on(stream: trio.SocketStream) -> None:
    while await stream.receive_some(65_536):
        pass


def _trickling(start: bytes) -> Attack:
    """Return slowloris: connections that begin a request and go on by a byte a second."""

    async def converse(stream: trio.SocketStream) -> None:
        await stream.send_all(start)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_on, stream)
            while True:
                await trio.sleep(1)
                await stream.send_all(b"x")

    return functools.partial(_attack, SLOW_CONNECTIONS, converse)


async def _attack(connections: int, converse: Callable[[trio.SocketStream], Awaitable[None]], address: Address) -> None:
    await _repeat(address, connections, converse)


async def idle(address: Address) -> None:
    """Open connections, and say nothing."""
    await _repeat(address, IDLE_CONNECTIONS, _read_on)


async def deaf(address: Address) -> None:
    """Ask for ever, and read no answer."""

    async def converse(stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        while True:
            await stream.send_all(_GET * 50)

    await _repeat(address, 200, converse)


async def aborting(address: Address) -> None:
    """Begin uploads of the largest size, and reset the connection in the middle."""

    async def converse(stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.send_all(_HEAD + b"Content-Length: 33000000\r\n\r\n" + bytes(1_000_000))

    await _repeat(address, 20, converse)


async def flooding(address: Address) -> None:
    """Pipeline small requests as fast as they are read, and read what comes."""

    async def converse(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_on, stream)
            while True:
                await stream.send_all(_GET * 60)

    await _repeat(address, 20, converse)


async def churning(address: Address) -> None:
    """Connect and leave."""

    async def converse(stream: trio.SocketStream) -> None:
        await stream.send_all(_GET[:20])

    await _repeat(address, 100, converse)


@functools.cache
def bombs() -> dict[str, tuple[bytes, int]]:
    """Return requests that inflate to far more than they are, by name, each with the status that it deserves."""
    blanks = bytes(_BOMB_BYTES)
    gzipped = gzip.compress(blanks, 9)
    wide = zstandard.ZstdCompressionParameters(window_log=27)
    frame = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return {
        "gzip": (post(gzipped, "gzip"), 413),
        "gzip, not said": (post(gzipped), 413),
        "gzip in gzip": (post(gzip.compress(gzipped), "gzip"), 400),
        "two codings": (post(gzip.compress(gzipped), "gzip, gzip"), 415),
        "a million members": (post(gzip.compress(b"") * 1_000_000, "gzip"), 400),
        "deflate": (post(zlib.compress(blanks, 9), "deflate"), 413),
        "zstd": (post(zstandard.compress(blanks), "zstd"), 413),
        "zstd frames": (post(zstandard.compress(bytes(1_000_000)) * 100, "zstd"), 413),
        "zstd with a window of 128 MiB": (post(frame.compress(blanks) + frame.flush(), "zstd"), 400),
        "nesting": (post(gzip.compress(b"[" * 60_000_000), "gzip"), 400),
    }


async def bombing(address: Address) -> None:
    """Send every bomb, again and again."""
    waiting = list(bombs().values())

    async def converse(stream: trio.SocketStream) -> None:
        request, _ = waiting.pop(0)
        waiting.append((request, 0))
        await stream.send_all(request)
        await stream.receive_some()

    await _repeat(address, 8, converse)


OVERSIZED = (
    b"GET /" + b"x" * 200_000,
    _HEAD + b"X: " + b"y" * 200_000,
    _HEAD + b"X: y\r\n" * 20_000 + b"\r\n",
    _HEAD + b"Content-Length: 40000000\r\n\r\n" + bytes(1_000_000),
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"100000\r\n%b\r\n" % bytes(0x100000) * 40,
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 200_000,
)

MALFORMED = (
    _HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _GET,
    _HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc" + _GET,
    _HEAD + b"X: a\r\n folded\r\n\r\n" + _GET,
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + _GET,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


def _cycling(requests: tuple[bytes, ...], connections: int) -> Attack:
    """Return an attack that sends one request a connection and reads until it is ended."""

    async def attack(address: Address) -> None:
        turn = 0

        async def converse(stream: trio.SocketStream) -> None:
            nonlocal turn
            turn += 1
            request = requests[turn % len(requests)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, request)
                await _read_on(stream)
                nursery.cancel_scope.cancel()

        await _repeat(address, connections, converse)

    return attack


ATTACKS: dict[str, Attack] = {
    "slow headers": _trickling(_HEAD + b"X: "),
    "slow bodies": _trickling(_HEAD + b"Content-Length: 1000000\r\n\r\n"),
    "idle connections": idle,
    "readers that never read": deaf,
    "aborted uploads": aborting,
    "pipelined floods": flooding,
    "connect and leave": churning,
    "bombs": bombing,
    "oversized requests": _cycling(OVERSIZED, 20),
    "invalid framing": _cycling(MALFORMED, 20),
}
"""By name."""


def allow_connections() -> None:
    """Let this process have as many open files as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Run one attack until the process is terminated."""
    name, host, port = sys.argv[1:]
    allow_connections()
    if name == "bombs":
        bombs()
    print("attacking", flush=True)
    trio.run(ATTACKS[name], (host, int(port)))


if __name__ == "__main__":
    main()
