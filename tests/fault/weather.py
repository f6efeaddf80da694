"""The network between the relay and upstream, as bad as it gets, from one seed: the far end of every connection.

There is weather, which lasts for minutes or hours, and there is chance, which draws what becomes of each connection,
each request and each answer. Upstream itself is a `FakeUpstream`: it stores what reaches it whole, and complains.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import Literal, TypeAlias

import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair

from relay.http.client import Reply
from relay.http.connect import Origin
from tests.component.fake_origin import FakePeer, FakeWire
from tests.component.fake_upstream import OK, Arrival, FakeUpstream

Kind: TypeAlias = Literal["fair", "storm", "refusing", "nameless", "forged", "black hole", "silent", "failing"]
"""`fair`: all is well. `storm`: anything may happen to anything. The others are outages, each of one sort: connections
refused, no DNS, wrong certificates, connections that never open, requests that are never answered, a gateway's 502."""

OUTAGES: tuple[Kind, ...] = ("refusing", "nameless", "forged", "black hole", "silent", "failing")

GARBAGE = (
    b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x46",
    b"HTTP/1.1 200\0OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    b"<html>504 Gateway Time-out</html>\r\n\r\n",
)

STATUSES = (302, 404, 408, 425, 429, 500, 502, 503, 504, 599)
"""What passes by itself. 400, 401, 413 and 422 are upstream's own judgement, which no network makes."""


def forged_certificate() -> ssl.SSLCertVerificationError:
    """Return what OpenSSL says of one; tests of TLS itself are in component/test_client_tls.py."""
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = 62, "Hostname mismatch"
    return error


class Weather:
    """Connects the client to upstream, or does not.

    Args:
        nursery: Runs the far ends.
        upstream: Gets what arrives; its `answer` is taken over.
        dice: All chance.
    """

    def __init__(self, nursery: trio.Nursery, upstream: FakeUpstream, dice: Random) -> None:
        self.kind: Kind = "fair"
        self.wires: list[FakeWire] = []
        """The client's end of every connection, in order."""
        self._nursery = nursery
        self._upstream = upstream
        self._dice = dice
        self._scopes: set[trio.CancelScope] = set()
        upstream.answer = self._answer

    @property
    def open_connections(self) -> int:
        """Connections that the client has not closed."""
        return sum(not wire.is_closed for wire in self.wires)

    def turn(self, kind: Kind) -> None:
        """Change the weather. Outages end the connections that there are, but for those that only fall silent."""
        self.kind = kind
        if kind in OUTAGES and kind != "silent":
            for scope in self._scopes:
                scope.cancel()

    async def connect(self, _origin: Origin) -> trio.abc.Stream:
        """Stand in for DNS, TCP and TLS."""
        kind = self.kind
        if kind == "storm" and self._dice.random() < 0.2:
            kind = self._dice.choice(OUTAGES)
        await trio.sleep(self._dice.choice([0.01, 0.01, 0.3]))
        if kind == "refusing":
            raise OSError(errno.ECONNREFUSED, "Connection refused")
        if kind == "nameless":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if kind == "forged":
            raise trio.BrokenResourceError from forged_certificate()
        if kind == "black hole":
            await trio.sleep_forever()
        ours, theirs = lockstep_stream_pair() if self._dice.random() < 0.5 else memory_stream_pair()
        wire = FakeWire(ours)
        self.wires.append(wire)
        self._nursery.start_soon(self._serve, FakePeer(theirs, wire, may_break_off=True))
        return wire

    async def _serve(self, peer: FakePeer) -> None:
        """Play one connection to its end."""
        # A stream breaks where the client has run out of patience.
        with suppress(trio.BrokenResourceError), trio.CancelScope() as scope:
            self._scopes.add(scope)
            await self._converse(peer)
        self._scopes.discard(scope)
        peer.wire.is_reset = self._dice.random() < 0.5
        await trio.aclose_forcefully(peer.stream)

    async def _converse(self, peer: FakePeer) -> None:
        while True:
            if self._is_struck(0.1):  # idle connections end, noticed or not; so do those within a request
                await trio.sleep(self._dice.choice([0.0, 1.0, 30.0]))
                if self._dice.random() < 0.5:
                    await peer.stream.receive_some(self._dice.randrange(1, 400))
                return
            request = await peer.read_request()
            if not request:
                return
            if self.kind == "silent" or self._is_struck(0.05):
                await peer.wait_closed()
                return
            if self._is_struck(0.05):
                await peer.send(self._dice.choice(GARBAGE), piece_bytes=self._dice.choice([0, 1]))
                return
            reply = await self._ask(peer, request)
            if reply is None or not await self._say(peer, reply):
                return

    def _is_struck(self, share: float) -> bool:
        return self.kind == "storm" and self._dice.random() < share

    # -- what upstream does with a request

    async def _ask(self, peer: FakePeer, request: bytes) -> Reply | None:
        """Hand a request to upstream; None where the client leaves before there is an answer."""
        head, _, body = request.partition(b"\r\n\r\n")
        request_line, *lines = head.split(b"\r\n")
        method, target, _ = request_line.decode().split(" ")
        headers = [(name.lower(), value) for name, _, value in (line.partition(b": ") for line in lines)]
        reply: Reply | None = None
        async with trio.open_nursery() as nursery:

            async def leave() -> None:
                await peer.wait_closed()
                nursery.cancel_scope.cancel()

            nursery.start_soon(leave)
            reply = await self._upstream.request(method, target, headers, body)
            nursery.cancel_scope.cancel()
        return reply

    async def _answer(self, arrival: Arrival) -> Reply:
        """Decide on a whole request."""
        if self.kind == "failing":
            return Reply(502, {}, b"<html>Bad Gateway</html>")
        await trio.sleep(self._dice.choice([0.05, 0.2, 0.2, 2.0]))
        if self._is_struck(0.05):
            self._upstream.store(arrival)
            await trio.sleep_forever()  # the client will leave, and never know
        if self._is_struck(0.05):
            await trio.sleep(50)  # a sleeping instance wakes: within the client's patience
        if self._is_struck(0.15):
            status = self._dice.choice(STATUSES)
            wait = {b"retry-after": b"%d" % self._dice.choice([0, 1, 20])} if status in {429, 503} else {}
            return Reply(status, wait, b"no")
        return OK

    # -- what becomes of its answer

    async def _say(self, peer: FakePeer, reply: Reply) -> bool:
        """Send an answer; False where the connection ends with it."""
        headers = b"".join(b"%b: %b\r\n" % header for header in reply.headers.items())
        head = b"HTTP/1.1 %d Whatever\r\n%b" % (reply.status, headers)
        answer = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(reply.body), reply.body)
        ways: list[Callable[[FakePeer, bytes, bytes], Awaitable[bool]]]
        ways = [self._cut, self._half_close, self._drip, self._go_on_for_ever, self._hint, self._close_soon]
        if self._is_struck(0.3):
            return await self._dice.choice(ways)(peer, head, answer)
        await peer.send(answer, piece_bytes=self._dice.choice([0, 0, 1, 10]))
        return True

    async def _cut(self, peer: FakePeer, _head: bytes, answer: bytes) -> bool:
        await peer.send(answer[: self._dice.randrange(len(answer))])
        return False

    async def _half_close(self, peer: FakePeer, _head: bytes, answer: bytes) -> bool:
        await peer.send(answer[: self._dice.choice([0, 20, len(answer)])])
        await peer.stream.send_eof()
        await peer.wait_closed()
        return False

    async def _drip(self, peer: FakePeer, _head: bytes, answer: bytes) -> bool:
        for start in range(len(answer)):
            await peer.send(answer[start : start + 1])
            await trio.sleep(self._dice.choice([0.5, 5.0]))
        return True

    async def _go_on_for_ever(self, peer: FakePeer, head: bytes, _answer: bytes) -> bool:
        await peer.send(head + b"transfer-encoding: chunked\r\n\r\n")
        while True:
            await peer.send(b"400\r\n%b\r\n" % bytes(1_024))
            await trio.sleep(self._dice.choice([0.0, 0.1, 10.0]))

    async def _hint(self, peer: FakePeer, _head: bytes, answer: bytes) -> bool:
        for _ in range(self._dice.choice([3, 20])):
            await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await peer.send(answer)
        return True

    async def _close_soon(self, peer: FakePeer, _head: bytes, answer: bytes) -> bool:
        await peer.send(answer)
        await trio.sleep(self._dice.choice([0.0, 0.3, 10.0]))
        return False
