"""The HTTP/1.1 listener: who waits for whom, and for how long.

One task a connection reads, asks the handler, writes. One reaper for all of them compares deadlines and cancels the
overdue, so that a request sets a number where it would otherwise enter a cancel scope.

Rules:
1. Every wait for a client has a deadline (`relay.http.patience`). Only a handler may take as long as it likes; it
   bounds itself.
2. Nothing is read from a connection while a request of it is unanswered, so answers keep their order and one client
   has one read, one head and one body here at a time. While an answer is streamed its client is watched: if it leaves
   (or shuts its sending side, which cannot be told apart) the handler is cancelled; what it sends meanwhile, at most
   `streaming.AHEAD_BYTES` of it, waits for its turn.
3. A client costs a connection out of `max_connections` and body bytes out of `max_buffered_bytes`, and both are given
   back however its task ends. Where the bytes run out, who has held most for longest goes first, so that nobody who
   sends at once what he has to say is kept out by those who hoard.
4. Before a connection is closed on a client that may still be sending, it lingers: the write side is shut, and what
   comes is dropped for a while. A close with unread bytes would reset the connection and destroy the answer.
5. What clients do (vanish, reset, stall, talk nonsense) is counted, never logged, and ends in their own task.

Not here: how requests are parsed (`relay.http.connection`) and responses rendered (`relay.http.render`); TLS.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Final, TypeAlias

import structlog
import trio

from relay.clock import wall_clock as system_wall_clock
from relay.config import Listen
from relay.errors import ConfigError
from relay.http.connection import Exchange, Limits, Progress, RequestParser
from relay.http.message import HANG_UP, Request, Response, Streamed, error_response
from relay.http.patience import LINGER_SECONDS, Patience, Phase, reap_interval
from relay.http.render import CONTINUE, ResponseRenderer
from relay.http.router import Router
from relay.http.statistics import ListenerStatistics
from relay.http.streaming import StreamWriter, write_watched

log = structlog.get_logger()

READ_BYTES: Final = 65_536
"""One read. trio's own default; a larger one gains nothing, since the kernel rarely has more ready."""

STREAMED_SHARE: Final = 0.25
"""Of `max_buffered_bytes`, what may wait behind streamed answers, which take as long as a handler likes: so those who
are answered at once, ingest above all, keep the rest. With the defaults 256 changes of the data API."""

LINGER_BYTES: Final = 67_108_864
"""What is dropped meanwhile at most: clients that read no answer before they sent everything get through twice the
default body limit. Dropping costs 0.1 ms a megabyte and no memory."""

MAX_REFUSALS: Final = 128
"""Connections beyond `max_connections` that are being told so. Beyond these, too, they are closed without a word."""

ACCEPT_PAUSE_SECONDS: Final = 0.1
"""Pause when the system has no file descriptors or buffers left; trio.serve_listeners takes the same."""

ACCEPT_LOG_SECONDS: Final = 10.0
"""At most one log line about failing accepts in this time."""

_CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


_Receive: TypeAlias = Callable[[int], Awaitable[bytes | bytearray]]
_Send: TypeAlias = Callable[[bytes | memoryview], Awaitable[int | None]]


class _Client:
    """One connection, as its task and the reaper share it."""

    __slots__ = (
        "ahead",
        "cancelled_in",
        "charged_bytes",
        "last",
        "parser",
        "patience",
        "receive",
        "scope",
        "send",
        "stream",
    )

    def __init__(self, stream: trio.abc.Stream, parser: RequestParser, patience: Patience) -> None:
        self.stream = stream
        self.parser = parser
        self.patience = patience
        self.receive: _Receive = stream.receive_some
        self.send: _Send = stream.send_all
        if isinstance(stream, trio.SocketStream):
            # Straight on the socket: trio's stream around it costs 3.5 µs a request, a sixth of all.
            self.receive, self.send = stream.socket.recv, stream.socket.send
        self.scope = trio.CancelScope()
        self.cancelled_in: Phase | None = None
        self.charged_bytes = 0  # its share of the listener's buffered bytes
        self.last: Exchange | None = None  # what is left to be said, where it was cancelled for want of room
        self.ahead = bytearray()  # a little, read while an answer was streamed

    def cancel(self) -> None:
        """End what the connection waits for."""
        self.cancelled_in = self.patience.phase
        self.scope.cancel()


class HttpListener:
    """Serves a router's handlers over HTTP/1.1."""

    def __init__(
        self,
        router: Router,
        settings: Listen,
        *,
        retry_after_seconds: int = 5,
        wall_clock: Callable[[], float] = system_wall_clock,
    ) -> None:
        """Prepare a listener; nothing is opened.

        Args:
            router: Resolves requests.
            settings: Limits; its addresses are not read here.
            retry_after_seconds: `retry-after` of the listener's own 503s.
            wall_clock: Seconds since the Unix epoch, for the `date` header.
        """
        self._router = router
        self._settings = settings
        self._limits = Limits(settings.max_header_bytes, settings.max_headers)
        self._wall_clock = wall_clock
        self._renderer = ResponseRenderer(wall_clock())
        self._overloaded = error_response(
            503,
            "The relay is busy, try again later",
            headers=((b"retry-after", b"%d" % retry_after_seconds),),
            close=True,
        )
        self._clients: set[_Client] = set()
        self._accepting = trio.CancelScope()
        self._is_stopping = False
        self._refusals = 0
        self._accept_log_at = -math.inf
        self._connections_total = 0
        self._refused_connections_total = 0
        self._accept_errors_total = 0
        self._requests_total = 0
        self._buffered_bytes = 0
        self._streamed_bytes = 0  # of these, what waits behind streamed answers
        self._overloads_total = 0
        self._bad_requests_total = 0
        self._handler_errors_total = 0
        self._timeouts_total = {phase.value: 0 for phase in Phase if phase is not Phase.HANDLING}

    async def run(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`; then finish the requests in hand. Runs once.

        Args:
            listeners: Accept connections; closed on return.
            task_status: Started once connections are accepted.

        Raises:
            OSError: Accepting failed for another reason than a want of file descriptors or memory.

        Cancellation: Connections are closed where they are; a handler in hand is cancelled. The caller bounds the
        stop with a deadline.
        """
        async with trio.open_nursery() as background:
            background.start_soon(self._reap)
            async with trio.open_nursery() as connections:
                async with AsyncExitStack() as closing:
                    for listener in listeners:
                        await closing.enter_async_context(listener)
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for listener in listeners:
                                acceptors.start_soon(self._accept, listener, connections)
                            task_status.started()
                self._end_idle()  # only now, since who is hung up on may come again at once
            background.cancel_scope.cancel()

    def stop(self) -> None:
        """Stop accepting, then close idle connections, let `run` return once the requests in hand are answered."""
        self._is_stopping = True
        self._accepting.cancel()

    def _end_idle(self) -> None:
        for client in self._clients:
            if client.patience.phase is Phase.IDLE:
                client.cancel()

    def statistics(self) -> ListenerStatistics:
        """Return what has been counted until now."""
        return ListenerStatistics(
            open_connections=len(self._clients),
            connections_total=self._connections_total,
            refused_connections_total=self._refused_connections_total,
            accept_errors_total=self._accept_errors_total,
            requests_total=self._requests_total,
            buffered_bytes=self._buffered_bytes,
            overloads_total=self._overloads_total,
            bad_requests_total=self._bad_requests_total,
            handler_errors_total=self._handler_errors_total,
            timeouts_total=dict(self._timeouts_total),
        )

    async def _reap(self) -> None:
        """Cancel what is overdue, and keep the renderer's time."""
        pause = reap_interval(self._settings)
        while True:
            await trio.sleep(pause)
            self._renderer.set_time(self._wall_clock())
            now = trio.current_time()
            for client in self._clients:
                if client.patience.deadline <= now and client.cancelled_in is None:
                    client.cancel()

    async def _accept(self, listener: trio.abc.Listener[trio.abc.Stream], connections: trio.Nursery) -> None:
        """Accept connections until cancelled."""
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _CAPACITY_ERRNOS:
                    raise
                self._accept_failed(error)
                await trio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            if len(self._clients) < self._settings.max_connections:
                parser = RequestParser(self._router, self._limits, _peer_of(stream))
                client = _Client(stream, parser, Patience(self._settings, trio.current_time()))
                self._clients.add(client)
                self._connections_total += 1
                connections.start_soon(self._serve, client)
            else:
                self._refused_connections_total += 1
                if self._refusals < MAX_REFUSALS:
                    self._refusals += 1
                    connections.start_soon(self._refuse, stream)
                else:
                    await trio.aclose_forcefully(stream)

    def _accept_failed(self, error: OSError) -> None:
        self._accept_errors_total += 1
        now = trio.current_time()
        if now >= self._accept_log_at:
            self._accept_log_at = now + ACCEPT_LOG_SECONDS
            log.error("accept failed", reason=error.strerror, failures_total=self._accept_errors_total)

    async def _refuse(self, stream: trio.abc.Stream) -> None:
        """Tell a connection too many that it is one."""
        try:
            with trio.move_on_after(LINGER_SECONDS):
                await stream.send_all(self._renderer.render(Exchange(Request("", "", b"", {})), self._overloaded))
                await _drop_input(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._refusals -= 1
            await trio.aclose_forcefully(stream)

    async def _serve(self, client: _Client) -> None:
        """Serve one connection to its end."""
        try:
            with client.scope:
                await self._converse(client)
            if client.cancelled_in is not None:
                await self._end_overdue(client, client.cancelled_in)
        except (trio.BrokenResourceError, OSError):
            pass  # the client is gone, which is how connections end
        finally:
            self._clients.discard(client)
            self._buffered_bytes -= client.charged_bytes
            client.parser.discard()
            await trio.aclose_forcefully(client.stream)

    async def _converse(self, client: _Client) -> None:
        """Read requests and answer them until one side is done."""
        parser, patience, receive = client.parser, client.patience, client.receive
        data: bytes | bytearray
        while True:
            if client.ahead:
                data, client.ahead = client.ahead, bytearray()
            else:
                data = await receive(READ_BYTES)
            if not data or client.cancelled_in is not None:
                return
            patience.handle()
            exchanges = parser.feed(data)
            received_bytes = len(data)
            del data  # nobody shall hold it while the connection waits
            if parser.held_bytes:
                exchanges = self._charge(client, exchanges)
            if exchanges and await self._answer(client, exchanges):
                break
            if parser.progress is Progress.BOUNDARY:
                if self._is_stopping:  # since the last answer was made
                    return
                patience.wait_for_request(trio.current_time())
            else:
                if parser.expects_continue:
                    parser.expects_continue = False
                    await self._send(client, CONTINUE)
                phase = Phase.HEADER if parser.progress is Progress.HEAD else Phase.BODY
                patience.wait_for_more(phase, received_bytes, trio.current_time())
        if parser.is_unread or parser.progress is not Progress.BOUNDARY:
            patience.linger(trio.current_time())
            await _drop_input(client.stream)

    async def _answer(self, client: _Client, exchanges: list[Exchange]) -> bool:
        """Answer the requests of one read; True where the connection ends with them."""
        answers: list[bytes] = []
        closes = False
        for exchange in exchanges:
            if exchange.response is None and answers:
                await self._send(client, b"".join(answers))  # who waits for them need not wait for this handler
                answers.clear()
                client.patience.handle()
            try:
                response = exchange.response or await exchange.handler(exchange.request)
                if isinstance(response, Streamed):
                    response = await self._stream(client, exchange, response)
                if self._is_stopping and exchange is exchanges[-1]:
                    exchange.close = True
                answer = self._renderer.render(exchange, response)
            except Exception:
                self._handler_errors_total += 1
                log.exception("handler failed", method=exchange.request.method, path=exchange.request.path)
                response = HANG_UP if exchange.is_begun else error_response(500, "Internal error")
                answer = self._renderer.render(exchange, response)
            self._requests_total += 1
            closes = exchange.close or response.close
            if response.status:
                answers.append(answer)
            if closes:
                break
        parser = client.parser
        if parser.is_malformed:
            self._bad_requests_total += 1
        parser.release()
        if client.charged_bytes:
            self._buffered_bytes += parser.held_bytes - client.charged_bytes
            client.charged_bytes = parser.held_bytes
        client.patience.answered()
        if answers:
            await self._send(client, answers[0] if len(answers) == 1 else b"".join(answers))
        return closes

    async def _stream(self, client: _Client, exchange: Exchange, streamed: Streamed) -> Response:
        """Let a handler write its answer while the client is watched; returns what is left to say.

        What the connection holds meanwhile is out of reach of whoever needs room, so there is a bound of its own on it.
        One alone is always let through, so that none is too large for ever.
        """
        held_bytes = client.charged_bytes
        room = self._settings.max_buffered_bytes * STREAMED_SHARE
        if held_bytes and self._streamed_bytes and self._streamed_bytes + held_bytes > room:
            self._overloads_total += 1
            client.parser.is_unread = True  # it may be sending still
            return self._overloaded
        self._streamed_bytes += held_bytes
        writer = StreamWriter(exchange, self._renderer, partial(self._send_piece, client))
        try:
            await write_watched(streamed, writer, client.receive, client.ahead)
        finally:
            self._streamed_bytes -= held_bytes
            exchange.is_begun = writer.is_begun
            if not writer.is_complete:
                writer.reset(client.stream)
        return Response(0, close=exchange.close) if writer.is_complete else HANG_UP

    async def _send_piece(self, client: _Client, data: bytes | memoryview) -> None:
        """Send a piece of an answer, within a patience of its own."""
        await self._send(client, data)
        client.patience.handle()

    async def _send(self, client: _Client, data: bytes | memoryview) -> None:
        """Send all of `data` within `write_seconds`."""
        client.patience.write(trio.current_time())
        sent_bytes = await client.send(data)
        if sent_bytes is not None and sent_bytes < len(data):
            await client.stream.send_all(data[sent_bytes:])

    def _charge(self, client: _Client, exchanges: list[Exchange]) -> list[Exchange]:
        """Charge the connection for the bodies that it holds; make room where that is over `max_buffered_bytes`."""
        parser = client.parser
        self._buffered_bytes += parser.held_bytes - client.charged_bytes
        client.charged_bytes = parser.held_bytes
        while self._buffered_bytes > self._settings.max_buffered_bytes:
            hoarder = self._worst_hoarder()
            if hoarder is None:  # all that is held is complete, but for this
                return self._refuse_for_room(client, exchanges)
            self._overloads_total += 1
            self._buffered_bytes -= hoarder.charged_bytes
            hoarder.charged_bytes = 0
            hoarder.last = hoarder.parser.abandon(self._overloaded)
            hoarder.cancel()
        return exchanges

    def _worst_hoarder(self) -> _Client | None:
        """Return whose incomplete body has taken most memory for longest, of those that are being waited for."""
        now = trio.current_time()
        worst, most = None, 0.0
        for client in self._clients:
            if client.charged_bytes and client.patience.phase is Phase.BODY and client.cancelled_in is None:
                held = client.charged_bytes * client.patience.spent_seconds(now)
                if worst is None or held > most:
                    worst, most = client, held
        return worst

    def _refuse_for_room(self, client: _Client, exchanges: list[Exchange]) -> list[Exchange]:
        """Refuse what was received last; returns what is to be answered."""
        self._overloads_total += 1
        incomplete = client.parser.abandon(self._overloaded)
        if not exchanges:
            return [incomplete]
        first = exchanges[0]
        first.response = self._overloaded
        return [first]

    async def _end_overdue(self, client: _Client, phase: Phase) -> None:
        """Say why, where something was incomplete, and end the connection; whoever was in the way likewise."""
        if phase is Phase.IDLE and self._is_stopping:
            return
        exchange = client.last
        if exchange is None:
            self._timeouts_total[phase.value] += 1
            if phase is not Phase.HEADER and phase is not Phase.BODY:
                return
            exchange = client.parser.abandon(error_response(408, f"The {phase.value} took too long"))
        assert exchange.response is not None  # noqa: S101 - that is what abandoning decides
        self._requests_total += 1
        client.scope = trio.CancelScope()
        client.cancelled_in = None
        client.patience.linger(trio.current_time())
        with client.scope:
            await client.stream.send_all(self._renderer.render(exchange, exchange.response))
            await _drop_input(client.stream)


def _peer_of(stream: trio.abc.Stream) -> str:
    """Return the client's address, empty where there is none."""
    if not isinstance(stream, trio.SocketStream):
        return ""
    try:
        name = stream.socket.getpeername()
    except OSError:
        return ""
    return str(name[0]) if isinstance(name, tuple) else ""


async def _drop_input(stream: trio.abc.Stream) -> None:
    """Shut the write side and drop what comes, until the client closes too or has sent `LINGER_BYTES`."""
    if isinstance(stream, trio.abc.HalfCloseableStream):
        await stream.send_eof()
    dropped_bytes = 0
    while dropped_bytes < LINGER_BYTES:
        data = await stream.receive_some(READ_BYTES)
        if not data:
            return
        dropped_bytes += len(data)


async def open_listeners(address: str) -> list[trio.SocketListener]:
    """Listen on an address.

    Args:
        address: `host:port` or `[v6]:port`; port 0 takes a free one. A name listens on each of its addresses.

    Returns:
        One listener an address, with the longest backlog that the system allows, so that bursts are not refused.

    Raises:
        ConfigError: The address cannot be read.
        OSError: It cannot be listened on: taken, not ours, or not allowed. The message names it.
    """
    host, separator, port = address.rpartition(":")
    is_bracketed = host[:1] == "[" and host[-1:] == "]"
    if is_bracketed:
        host = host[1:-1]
    is_port = port.isascii() and port.isdigit() and int(port) <= 65_535
    if not separator or not host or not is_port or (":" in host and not is_bracketed):
        raise ConfigError([f'cannot listen on "{address}": expected host:port or [v6]:port, port at most 65535'])
    try:
        return await trio.open_tcp_listeners(int(port), host=host)
    except OSError as error:
        raise OSError(f"cannot listen on {address}: {error.strerror or error}") from error
