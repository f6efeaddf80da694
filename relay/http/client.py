"""The upstream client: HTTP/1.1 over trio streams, with a small pool of keep-alive connections.

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
   them.) What happens on a fresh connection is the caller's to judge, and to retry out of its budget; so is
   all that happens to a streamed answer.
4. Foreign errors (trio, ssl, h11, OSError) end here: callers see `UpstreamError` and its kinds, nothing
   else.

It does not follow redirects, decode content codings (it asks for none), keep cookies, use proxies, or retry.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import trio

from relay import __version__
from relay.errors import ConnectFailed, ExchangeFailed, Unanswered
from relay.http.client_connection import Connection, Head, HeaderPairs, Message, compose
from relay.http.connect import Origin, describe_connect_failure, open_stream, parse_base_url, tls_context

if TYPE_CHECKING:
    from relay.config import Upstream

_DEFAULTS: HeaderPairs = (
    (b"user-agent", f"lucent-relay/{__version__}".encode()),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"identity"),
)

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


class StreamedReply:
    """Upstream's answer whose body is still to come.

    Attributes:
        status: Final status code, 200 to 999.
        headers: As they came: every line, in order; names lower-case.
        length: Of the body as announced; None where its end decides.
        is_delimited: Whether a body that was cut can be told from a whole one.
    """

    def __init__(self, head: Head, connection: Connection, stall_seconds: float) -> None:
        self.status: int = head.status_code
        self.headers = tuple((bytes(name), bytes(value)) for name, value in head.headers)
        fields = dict(self.headers)
        is_chunked = b"transfer-encoding" in fields
        self.length = None if is_chunked or b"content-length" not in fields else int(fields[b"content-length"])
        self.is_delimited = is_chunked or self.length is not None
        self._connection = connection
        self._stall_seconds = stall_seconds

    async def receive(self) -> bytes:
        """Return the next piece of the body; empty at its end.

        Raises:
            ExchangeFailed: The connection ended amid it.
            ExchangeTimedOut: Nothing came for `stall_seconds`.
            ReplyInvalid: Its framing is broken.
        """
        return await self._connection.receive_piece(self._stall_seconds)


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
        self._idle: list[Connection] = []
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
        message = self._compose(method, target, (*_DEFAULTS, (b"content-length", b"%d" % len(body))), headers)
        self._requests_total += 1
        connection = await self._take_idle()
        stale: Unanswered | None = None
        if connection is not None:
            self._reused_total += 1
            try:
                return await self._exchange(connection, message, body)
            except Unanswered as error:
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

    @asynccontextmanager
    async def stream(
        self, method: str, target: str, headers: HeaderPairs, body: bytes, stall_seconds: float, *, is_fresh: bool
    ) -> AsyncIterator[StreamedReply]:
        """Send a request once, and read its answer while it comes.

        Args:
            method: Upper-case token.
            target: As `request`.
            headers: All but `host` and `content-length`.
            body: The whole body; small, since it is sent before the answer is looked for.
            stall_seconds: How long the answer's body may pause.
            is_fresh: On a connection of its own, as after one that died.

        Raises:
            ConnectFailed, ExchangeTimedOut, ReplyInvalid, ValueError, trio.ClosedResourceError: As `request`.
            Unanswered: The connection ended before a byte of the answer. Upstream may have acted.
            ExchangeFailed: It ended amid the answer's head.

        Cancellation: As `request`. So is the connection closed where the block is left before the body's end.
        """
        if self._closed:
            raise trio.ClosedResourceError("this client was closed")
        framing = [(b"content-length", b"%d" % len(body))] if body or method not in {"GET", "HEAD"} else []
        message = self._compose(method, target, framing, headers)
        self._requests_total += 1
        connection = None if is_fresh else await self._take_idle()
        self._reused_total += connection is not None
        self._resent_total += is_fresh
        is_reusable = False
        connection = connection or await self._open()
        self._active += 1
        try:
            yield StreamedReply(await connection.begin(message, body), connection, stall_seconds)
            is_reusable = connection.is_reusable() and not self._closed
        finally:
            self._active -= 1
            if not is_reusable:
                await trio.aclose_forcefully(connection.stream)
        if is_reusable:
            await self._keep(connection)

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

    def _compose(self, method: str, target: str, own: HeaderPairs, headers: HeaderPairs) -> Message:
        if not target.startswith("/"):
            raise ValueError("a request's target starts with a slash")
        return compose(self.origin, method, self._prefix + target, own, headers)

    async def _take_idle(self) -> Connection | None:
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

    async def _open(self) -> Connection:
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
        return Connection(stream, str(self.origin), self._settings)

    async def _exchange(self, connection: Connection, message: Message, body: bytes) -> Reply:
        """Run one exchange and decide what becomes of the connection."""
        reusable = False
        self._active += 1
        try:
            head, body = await connection.exchange(message, body)
            reusable = connection.is_reusable() and not self._closed
        finally:
            self._active -= 1
            if not reusable:
                await trio.aclose_forcefully(connection.stream)
        if reusable:
            await self._keep(connection)
        headers: dict[bytes, bytes] = {}
        for name, value in head.headers:
            headers[name] = headers[name] + b", " + value if name in headers else value
        return Reply(head.status_code, headers, body)

    async def _keep(self, connection: Connection) -> None:
        """Put a connection back into the pool."""
        connection.idle_since = trio.current_time()
        self._idle.append(connection)
        while len(self._idle) > self._settings.max_idle_connections:
            await trio.aclose_forcefully(self._idle.pop(0).stream)
