"""The upstream client: HTTP/1.1 by h11 over trio streams, with a small pool of keep-alive connections.

Rules:
1. A connection carries one request at a time. It goes back to the pool only when its request was sent to
   the last byte, its answer was read to the last byte, and nothing followed. In every other case (error,
   timeout, cancellation) it is closed hard, which never waits.
2. The pool is last in, first out: the connection used most recently is the one least likely to have been
   closed by the server. Idle connections are looked at when the pool is touched; there is no background
   task.
3. A request is sent a second time in one case only: on a *re-used* connection that ended before a byte of
   an answer. That is what a server's idle timer looks like that fired while the request was on its way. It
   is safe, because all that goes through here is idempotent upstream: ingest by session and sequence, the
   data API because it reads, or sets a value. And it does not spend the budget twice: a server that closed
   an idle connection has not read what came after. (One that took the request and then died may have
   counted it; such resends are bounded by the connections that were open to it, and `resent_total` counts
   them.) What happens on a fresh connection is the caller's to judge, and to retry out of its budget.
4. Foreign errors (trio, ssl, h11, OSError) end here: callers see `UpstreamError` and its kinds, nothing
   else.

It does not follow redirects, decode content codings (it asks for none), keep cookies, use proxies, or retry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import h11
import msgspec
import trio

from relay import __version__
from relay.errors import ConnectFailed, ExchangeFailed, ExchangeTimedOut, ReplyInvalid
from relay.http.connect import Origin, describe_connect_failure, open_stream, parse_base_url, tls_context

if TYPE_CHECKING:
    from relay.config import Upstream

RECEIVE_BYTES = 16_384
"""One read: a full TLS record (RFC 8446, 5.1), and so as large as decryption returns at once."""

MAX_HEAD_BYTES = 16_384
"""Status line and headers of an answer, each chunk header, the trailer. The limit of h11, Node and IIS."""

MAX_INFORMATIONAL = 8
"""1xx answers before the final one. A server has use for one each of 100 and 103, and for a few of 102."""

EARLY_ANSWER_SECONDS = 5.0
"""How long to look for an answer after the server has stopped taking the request. Such an answer was sent
before the break, so it is at most a few TCP retransmissions (0.2, 0.4, 0.8 … s) away."""

PROBE_CHECKPOINTS = 8
"""Scheduler passes that a pooled connection gets to show that it is dead. Measured: TCP needs 2, TLS 3 with a
close_notify and 5 without, trio's memory stream 5. All eight take 75 µs."""

MAX_QUOTED_CHARACTERS = 200
"""Of a broken answer in an error message; enough to recognise a proxy's error page."""

OWN_HEADERS = frozenset({b"host", b"content-length", b"transfer-encoding", b"upgrade"})
"""Not a caller's to set: with them two ends could disagree on where a request ends or who it is for."""

HeaderPairs: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Header names, lower-case, and values."""

Connect: TypeAlias = Callable[[Origin], Awaitable[trio.abc.Stream]]
"""Opens a stream to an origin; raises OSError or trio.BrokenResourceError where it cannot."""


class Reply(msgspec.Struct, frozen=True):
    """Upstream's answer, complete and well-formed; whether it is good news is the caller's to judge."""

    status: int
    """Final status code, 200 to 999."""
    headers: dict[bytes, bytes]
    """Names lower-case; repeated headers joined with `, `."""
    body: bytes
    """Whole body without transfer coding. A content coding applied unasked is still in place."""


class ClientStatistics(msgspec.Struct, frozen=True):
    """What a client holds and has done since it was made."""

    idle_connections: int
    """Connections in the pool, ready for re-use."""
    active_connections: int
    """Connections carrying a request now."""
    connections_opened_total: int
    """Connections made, TLS handshake included."""
    connect_failures_total: int
    """Attempts to connect that failed or timed out."""
    requests_total: int
    """Requests asked of the client, whatever became of them."""
    reused_total: int
    """Requests sent on a pooled connection."""
    stale_total: int
    """Pooled connections that the server had closed, found before a request was sent or by its failure."""
    resent_total: int
    """Requests sent a second time, on a fresh connection, because the pooled one was stale."""


class HttpClient:
    """Sends requests to one origin.

    Args:
        base_url: `https://host[:port][/prefix]`; `http` is allowed.
        settings: Timeouts, limits and the further trusted authorities.
        connect: Opens streams in place of DNS, TCP and TLS; for tests.

    Raises:
        ConfigError: The URL or `settings.ca_file` cannot be used.

    Concurrency: One trio thread, any number of tasks; each request under way has a connection of its own.
    """

    def __init__(self, base_url: str, settings: Upstream, *, connect: Connect | None = None) -> None:
        self.origin, self._prefix = parse_base_url(base_url)
        if connect is None:
            tls = tls_context(settings.ca_file) if self.origin.scheme == "https" else None
            connect = partial(open_stream, tls=tls)
        self._connect = connect
        self._settings = settings
        self._closed = False
        # Oldest first, by the time each became idle.
        self._idle: list[_Connection] = []
        self._active = 0
        self._opened_total = 0
        self._connect_failures_total = 0
        self._requests_total = 0
        self._reused_total = 0
        self._stale_total = 0
        self._resent_total = 0

    async def request(self, method: str, target: str, headers: HeaderPairs, body: bytes) -> Reply:
        """Send a request and return its answer.

        Args:
            method: Upper-case token.
            target: Path and query below the base URL's prefix, with its leading slash.
            headers: All but `host`, `content-length`, `user-agent`, `accept` and `accept-encoding`.
            body: The whole body, content coding applied.

        Returns:
            The final answer, whatever its status. It may have come before upstream read the whole request.

        Raises:
            ConnectFailed: DNS, TCP or TLS; nothing was sent. Safe to retry.
            ExchangeFailed: The connection ended without a whole answer. Upstream may have acted; see rule 3.
            ExchangeTimedOut: A timeout of the settings passed. Upstream may have acted.
            ReplyInvalid: The answer is not HTTP or exceeds a limit. Upstream has probably acted.
            ValueError: Method, target or a header is not for HTTP. The caller's fault; nothing was sent.
            trio.ClosedResourceError: The client was closed. The caller's fault.

        Cancellation: The connection in use is closed at once and never pooled; upstream may have acted.
        """
        if self._closed:
            raise trio.ClosedResourceError("this client was closed")
        message = self._compose(method, target, headers, body)
        self._requests_total += 1
        connection = await self._take_idle()
        stale: ExchangeFailed | None = None
        if connection is not None:
            self._reused_total += 1
            try:
                return await self._exchange(connection, message, body)
            except ExchangeFailed as error:
                if connection.heard:
                    raise
                stale = error
                self._stale_total += 1
        try:
            connection = await self._open()
        except ConnectFailed as error:
            if stale is None:
                raise
            # ConnectFailed promises that nothing was sent, which the first attempt makes untrue.
            raise ExchangeFailed(f"{stale}; then {error}") from error
        if stale is not None:
            self._resent_total += 1
        return await self._exchange(connection, message, body)

    def statistics(self) -> ClientStatistics:
        """Return the present figures."""
        return ClientStatistics(
            idle_connections=len(self._idle),
            active_connections=self._active,
            connections_opened_total=self._opened_total,
            connect_failures_total=self._connect_failures_total,
            requests_total=self._requests_total,
            reused_total=self._reused_total,
            stale_total=self._stale_total,
            resent_total=self._resent_total,
        )

    async def aclose(self) -> None:
        """Close the pool. Requests under way finish, and close their connections; further ones are refused.

        Cancellation: Connections that are still pooled stay so; call it again.
        """
        self._closed = True
        while self._idle:
            await trio.aclose_forcefully(self._idle.pop().stream)
        await trio.lowlevel.checkpoint()

    def _compose(self, method: str, target: str, headers: HeaderPairs, body: bytes) -> h11.Request:
        if method == "CONNECT" or not target.startswith("/"):
            raise ValueError("a request needs a target that starts with a slash, and CONNECT has none")
        if any(name.lower() in OWN_HEADERS for name, _ in headers):
            raise ValueError("a request's framing, host and protocol are the client's own business")
        try:
            return h11.Request(
                method=method,
                target=self._prefix + target,
                headers=[
                    (b"host", self.origin.authority.encode()),
                    (b"user-agent", f"lucent-relay/{__version__}".encode()),
                    (b"accept", b"*/*"),
                    (b"accept-encoding", b"identity"),
                    (b"content-length", b"%d" % len(body)),
                    *headers,
                ],
            )
        except (h11.LocalProtocolError, UnicodeError):
            # Without the cause, because h11 quotes the offending value, and that may be a key.
            raise ValueError("the method, the target or a header cannot be written as HTTP/1.1") from None

    async def _take_idle(self) -> _Connection | None:
        """Take the most recent connection that is still good out of the pool; close those that are not."""
        expired_at = trio.current_time() - self._settings.idle_seconds
        while self._idle and self._idle[0].idle_since <= expired_at:
            await trio.aclose_forcefully(self._idle.pop(0).stream)
        while self._idle:
            connection = self._idle.pop()
            quiet = False
            try:
                quiet = await connection.is_quiet()
            finally:
                if not quiet:
                    await trio.aclose_forcefully(connection.stream)
            if quiet:
                return connection
            self._stale_total += 1
        return None

    async def _open(self) -> _Connection:
        limit = self._settings.connect_seconds
        try:
            with trio.fail_after(limit):
                stream = await self._connect(self.origin)
        except trio.TooSlowError as error:
            self._connect_failures_total += 1
            raise ConnectFailed(f"{self.origin}: no connection within connect_seconds = {limit:g}") from error
        except (OSError, trio.BrokenResourceError) as error:
            self._connect_failures_total += 1
            raise ConnectFailed(f"{self.origin}: {describe_connect_failure(error)}") from error
        self._opened_total += 1
        return _Connection(stream, str(self.origin), self._settings)

    async def _exchange(self, connection: _Connection, message: h11.Request, body: bytes) -> Reply:
        """Run one exchange and decide what becomes of the connection."""
        reusable = False
        self._active += 1
        try:
            reply = await connection.exchange(message, body)
            reusable = connection.is_reusable() and not self._closed
        finally:
            self._active -= 1
            if not reusable:
                await trio.aclose_forcefully(connection.stream)
        if reusable:
            connection.idle_since = trio.current_time()
            self._idle.append(connection)
            while len(self._idle) > self._settings.max_idle_connections:
                await trio.aclose_forcefully(self._idle.pop(0).stream)
        return reply


class _Connection:
    """One connection: its stream, its HTTP state, and the exchange under way."""

    def __init__(self, stream: trio.abc.Stream, name: str, settings: Upstream) -> None:
        self.stream = stream
        # When the connection joined the pool, by trio's clock.
        self.idle_since = 0.0
        # Whether a byte of the present answer has arrived.
        self.heard = False
        self._name = name
        self._settings = settings
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        # When the present request had been sent to the last byte, or why it could not be.
        self._sent_at: float | None = None
        self._send_error: trio.BrokenResourceError | None = None
        # The one deadline of the exchange. It moves on from phase to phase, and `_limit` says which it is.
        self._patience = trio.CancelScope()
        self._limit = ""

    def is_reusable(self) -> bool:
        """Return whether another request may follow: this one is complete, and so is its answer."""
        return (
            self._sent_at is not None
            and self._http.our_state is h11.DONE
            and self._http.their_state is h11.DONE
            and self._http.trailing_data == (b"", False)
        )

    async def is_quiet(self) -> bool:
        """Return whether an idle connection has stayed silent, as it must: no byte, no end, no error.

        A receive that would block is given up after a few scheduler passes; trio's streams lose nothing by
        that. So it works on every stream (socket, TLS, memory) and waits for nothing.
        """
        quiet = True

        async def listen() -> None:
            nonlocal quiet
            with suppress(trio.BrokenResourceError):
                await self.stream.receive_some(1)
            quiet = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            for _ in range(PROBE_CHECKPOINTS):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        return quiet

    async def exchange(self, message: h11.Request, body: bytes) -> Reply:
        """Send a request and, at the same time, read its answer: it may come early and be all there is.

        Over TLS, an early answer of several records can still be lost where the server closes without reading on:
        trio's TLS stream ends as a whole with its sending side. Then the exchange has failed, and a retry decides.

        Raises:
            ExchangeFailed, ExchangeTimedOut, ReplyInvalid: As `HttpClient.request`.
        """
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        wire = b"".join(self._http.send(event) for event in (message, h11.Data(body), h11.EndOfMessage()))
        self.heard = False
        self._sent_at = self._send_error = None
        outcome: Reply | ExchangeFailed | ReplyInvalid | None = None
        with trio.CancelScope() as self._patience:
            self._wait_for("write_seconds", self._settings.write_seconds)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, wire)
                try:
                    outcome = await self._receive()
                except (ExchangeFailed, ReplyInvalid) as error:
                    # Raised below, because the nursery would wrap it in a group.
                    outcome = error
                nursery.cancel_scope.cancel()
        if isinstance(outcome, Reply):
            return outcome
        if outcome is not None:
            raise outcome
        if self._send_error is not None:
            raise self._broken() from self._send_error
        raise ExchangeTimedOut(f"{self._name}: {self._limit} passed {self._progress()}")

    async def _send(self, wire: bytes) -> None:
        try:
            await self.stream.send_all(wire)
        except trio.BrokenResourceError as error:
            self._send_error = error
            self._wait_for("", EARLY_ANSWER_SECONDS)
        else:
            self._sent_at = trio.current_time()
            self._wait_for_answer(self._sent_at)

    async def _receive(self) -> Reply:
        status = informational = 0
        headers: dict[bytes, bytes] = {}
        body = bytearray()
        limit = self._settings.max_response_bytes
        while not isinstance(event := await self._next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                body += event.data
                if len(body) > limit:
                    raise ReplyInvalid(f"{self._name}: the answer is over max_response_bytes = {limit}")
            elif isinstance(event, h11.Response):
                status = event.status_code
                for name, value in event.headers:
                    headers[name] = headers[name] + b", " + value if name in headers else value
            else:
                informational += 1
                if informational > MAX_INFORMATIONAL:
                    raise ReplyInvalid(f"{self._name}: more than {MAX_INFORMATIONAL} informational answers")
        if self._sent_at is None:
            # Both ends can be done while the sending task has yet to run its last step.
            await trio.lowlevel.checkpoint()
        return Reply(status, headers, bytes(body))

    async def _next_event(self) -> h11.Event:
        """Return the next part of the answer, receiving as needed. Foreign errors of an exchange end here."""
        ended = False
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Event):
                    return event
                data = await self.stream.receive_some(RECEIVE_BYTES)
                ended = not data
                if data and not self.heard:
                    self.heard = True
                    if self._sent_at is not None:
                        self._wait_for_answer(self._sent_at)
                self._http.receive_data(bytes(data))
        except trio.BrokenResourceError as error:
            raise self._broken() from error
        except h11.RemoteProtocolError as error:
            if ended:
                raise self._broken() from error
            raise ReplyInvalid(f"{self._name}: not HTTP: {str(error)[:MAX_QUOTED_CHARACTERS]}") from error

    def _wait_for_answer(self, sent_at: float) -> None:
        """Set the deadline of an answer whose request is sent."""
        first_byte, response = self._settings.first_byte_seconds, self._settings.response_seconds
        if self.heard or response <= first_byte:
            self._wait_for("response_seconds", response, sent_at)
        else:
            self._wait_for("first_byte_seconds", first_byte, sent_at)

    def _wait_for(self, option: str, seconds: float, since: float | None = None) -> None:
        self._limit = f"{option} = {seconds:g}"
        self._patience.deadline = (trio.current_time() if since is None else since) + seconds

    def _broken(self) -> ExchangeFailed:
        return ExchangeFailed(f"{self._name}: the connection ended {self._progress()}")

    def _progress(self) -> str:
        """Return how far the exchange got, for messages."""
        if self.heard:
            return "in the middle of the answer"
        return "before the request was sent" if self._sent_at is None else "before a byte of the answer"
