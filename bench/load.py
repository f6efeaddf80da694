"""The load: requests over many keep-alive connections from one thread, each connection with one request under way.

A closed loop: a connection sends its next request when the answer to the last one is there. So latency at saturation
is connections / rate, and says how even the server is rather than how fast.

Rules:
1. Requests are rendered before the clock runs, as far as memory allows; the loop only sends, receives and counts.
2. Nothing is parsed that is not needed: an answer's status and its length.
3. The load measures itself: `busy_share` near 1 means that it was the bottleneck, not the server.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec

from bench.bodies import Body

_MAX_PREPARED_BYTES = 268_435_456
"""Of requests rendered ahead; what a run needs beyond them is rendered as it goes, in 14 µs a small one."""

_READ_BYTES = 65_536
_ANSWER_SECONDS = 30.0
"""Without any answer for so long the server hangs."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request as bytes."""

    wire: bytes
    """Head and body."""
    json_bytes: int
    """Its body inflated."""


class Measured(msgspec.Struct, frozen=True):
    """What one run of the load saw."""

    seconds: float
    """From the first send to the last answer."""
    answers_by_status: dict[int, int]
    """Answers received."""
    json_bytes: int
    """JSON in the requests that were answered 200."""
    wire_bytes: int
    """The same as it went over the wire, heads included."""
    latencies: list[float]
    """Seconds from send to answer, of every request, sorted."""
    busy_share: float
    """CPU time of the load by wall time: 1 is all that one core can do."""

    def latency(self, share: float) -> float:
        """Return a percentile of the latencies, such as 0.99; 0 where nothing was answered."""
        return self.latencies[int(share * (len(self.latencies) - 1))] if self.latencies else 0.0


def render(body: Body, host: str) -> Request:
    """Return the request that an SDK would send with `body`."""
    head = (
        f"POST /api/sdk/replay HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Encoding: gzip\r\nX-Lucent-Api-Key: luc_pk_benchmark\r\n"
        f"Content-Length: {len(body.gzip)}\r\n\r\n"
    )
    return Request(head.encode() + body.gzip, body.json_bytes)


class Fresh:
    """Requests that never repeat."""

    def __init__(self, next_body: Callable[[], Body], host: str) -> None:
        self._next_body = next_body
        self._host = host
        self._ready: deque[Request] = deque()

    def prepare(self, count: int) -> None:
        """Render up to `count` requests ahead."""
        size = sum(len(request.wire) for request in self._ready)
        while len(self._ready) < count and size < _MAX_PREPARED_BYTES:
            request = render(self._next_body(), self._host)
            self._ready.append(request)
            size += len(request.wire)

    def __call__(self) -> Request:
        """Return the next request."""
        return self._ready.popleft() if self._ready else render(self._next_body(), self._host)


class Recurring:
    """A few thousand requests over and over, for a server that does not look at them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._next = 0

    def __call__(self) -> Request:
        """Return the next request."""
        self._next = (self._next + 1) % len(self._requests)
        return self._requests[self._next]


class _Connection:
    """One connection and the request on its way."""

    __slots__ = ("answer", "request", "sent_at", "socket", "unsent")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=_ANSWER_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.request = Request(b"", 0)
        self.answer = b""
        self.sent_at = 0.0
        self.unsent = memoryview(b"")


class Load:
    """Connections to one server."""

    def __init__(self, address: tuple[str, int], connections: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._connections = [_Connection(address) for _ in range(connections)]
        for connection in self._connections:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.socket.close()
        self._selector.close()

    def run(self, next_request: Callable[[], Request], seconds: float) -> Measured:
        """Send for `seconds`, then wait for the answers under way."""
        statuses: Counter[int] = Counter()
        latencies: list[float] = []
        json_bytes = wire_bytes = 0
        clock, select = time.perf_counter, self._selector.select
        cpu_began, began = time.process_time(), clock()
        ends_at = began + seconds
        for connection in self._connections:
            self._send(connection, next_request(), began)
        under_way = len(self._connections)
        while under_way:
            ready = select(_ANSWER_SECONDS)
            if not ready:
                raise TimeoutError(f"no answer to {under_way} requests for {_ANSWER_SECONDS} s")
            for selected, mask in ready:
                connection = selected.data
                if mask & selectors.EVENT_WRITE:
                    self._send_rest(connection)
                    continue
                status = _receive(connection)
                if status is None:
                    continue
                now = clock()
                statuses[status] += 1
                latencies.append(now - connection.sent_at)
                if status == 200:
                    json_bytes += connection.request.json_bytes
                    wire_bytes += len(connection.request.wire)
                if now < ends_at:
                    self._send(connection, next_request(), now)
                else:
                    under_way -= 1
        elapsed = clock() - began
        busy = (time.process_time() - cpu_began) / elapsed
        latencies.sort()
        return Measured(elapsed, dict(statuses), json_bytes, wire_bytes, latencies, busy)

    def _send(self, connection: _Connection, request: Request, now: float) -> None:
        connection.request = request
        connection.sent_at = now
        sent = connection.socket.send(request.wire)
        if sent < len(request.wire):
            connection.unsent = memoryview(request.wire)[sent:]
            self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)

    def _send_rest(self, connection: _Connection) -> None:
        sent = connection.socket.send(connection.unsent)
        connection.unsent = connection.unsent[sent:]
        if not connection.unsent:
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)


def _receive(connection: _Connection) -> int | None:
    """Take what is there; returns the status of a complete answer."""
    data = connection.socket.recv(_READ_BYTES)
    if not data:
        raise ConnectionError("the server closed a connection")
    answer = connection.answer + data
    head_bytes = answer.find(b"\r\n\r\n") + 4
    length_at = answer.find(b"content-length: ") + 16
    if head_bytes < 4 or len(answer) < head_bytes + int(answer[length_at : answer.find(b"\r", length_at)]):
        connection.answer = answer
        return None
    connection.answer = b""
    return int(answer[9:12])
