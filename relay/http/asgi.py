"""The second engine: the same router and handlers as an ASGI application, served by Hypercorn. The owner of hypercorn.

It carries what is not hot: health, metrics, status. A contract test holds its answers against the listener's.

Rules:
1. An answer's status, body and headers are those of the listener; only `date`, `connection` and their order are the
   engine's.
2. A body is bounded in size by its route and in time by `BODY_SECONDS`; Hypercorn bounds neither.
3. What goes wrong in Hypercorn ends one connection. Its own `serve` would end with it: in 0.18 a client that leaves
   while its body is refused makes two of a connection's tasks send at once (`BusyResourceError`). So connections are
   accepted, bounded and contained here, and Hypercorn gets them one by one.
4. Hypercorn says nothing on its own: no access log, no banner. Its warnings and errors go where ours go.

Not here: a rate for slow clients, or a bound on what a client leaves unread. So this engine belongs on an address that
only operators reach.
"""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeAlias, cast

import structlog
import trio
from hypercorn.config import Config
from hypercorn.logging import Logger
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, Framework
from hypercorn.utils import wrap_app

from relay.http.connection import body_too_large
from relay.http.listener import open_listeners
from relay.http.message import HANG_UP, HeaderList, Request, Response, Streamed, error_response
from relay.http.router import Match, Router

log = structlog.get_logger()

Message: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]
"""An ASGI 3 application."""

BODY_SECONDS: Final = 30.0
"""Time for a whole request body; what is sent here is smaller than the listener's bodies, which have a rate."""

KEEP_ALIVE_SECONDS: Final = 5.0
"""Idle connections. Short, because Hypercorn keeps a connection that its client closed for as long."""

GRACEFUL_SECONDS: Final = 2.0
"""Time for requests in hand at shutdown. Hypercorn shields its writes, so the process has a deadline of its own."""

READ_SECONDS: Final = 60.0
"""Longest silence of a client, the time its answer takes included; above both of the former."""

MAX_CONNECTIONS: Final = 256
"""Open connections; a further one is closed. With the above, probes may come 50 times a second, each on its own."""

MAX_HEADER_BYTES: Final = 16_384
"""Request line and headers; half of the listener's, since nobody sends cookies of an application here."""


def asgi_app(router: Router) -> AsgiApp:
    """Return an ASGI application that answers like the listener does.

    `HANG_UP` has no word in ASGI: the server makes a 500 of it.
    """

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = _request_of(scope)
            found = router.match(request)
            response = await _respond(request, found, receive)
            writer = _Writer(request, found, send)
            if isinstance(response, Streamed):
                await _stream(response, writer, receive)
            elif response.status:
                has_body = response.status not in {204, 304}  # these have no length either (RFC 9110, 8.6)
                closing = ((b"connection", b"close"),) if response.close else ()
                writer.start(response.status, (*response.headers, *closing), len(response.body) if has_body else None)
                await writer.send(response.body)
                await writer.finish()
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        else:  # a websocket, refused before it is opened
            await send({"type": f"{scope['type']}.close"})

    return app


async def serve_asgi(
    router: Router,
    address: str,
    *,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a router by Hypercorn until `shutdown` is set.

    Args:
        router: Resolves requests.
        address: `host:port` or `[v6]:port`; port 0 takes a free one.
        shutdown: Ends serving; requests in hand get `GRACEFUL_SECONDS`.
        task_status: Started with the base URLs, such as `["http://127.0.0.1:8788"]`, once connections are accepted.

    Raises:
        ConfigError: The address cannot be read.
        OSError: It cannot be listened on; the message names it.
    """
    listeners = await open_listeners(address)
    app = wrap_app(cast(Framework, asgi_app(router)), 0, "asgi")
    config = _config()
    context = WorkerContext(None)
    open_connections = 0

    async def serve_connection(stream: trio.SocketStream) -> None:
        nonlocal open_connections
        if open_connections >= MAX_CONNECTIONS:
            return  # trio closes it
        open_connections += 1
        try:
            # It runs when awaited; its type knows SSL streams only.
            await TCPServer(app, config, context, ConnectionState({}), cast(Any, stream))
        except BaseExceptionGroup as failure:  # what its nursery makes of any
            _, cancelled = failure.split(Exception)
            if cancelled is not None:
                raise cancelled from None
            log.warning("hypercorn failed on a connection", exc_info=True)
        finally:
            open_connections -= 1

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(
                partial(trio.serve_listeners, serve_connection, listeners, handler_nursery=connections)
            )
            task_status.started([_url_of(listener) for listener in listeners])
            await shutdown.wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + GRACEFUL_SECONDS


def _config() -> Config:
    config = Config()
    config.logger_class = HypercornLogger
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.read_timeout = int(READ_SECONDS)
    config.h11_max_incomplete_size = config.h2_max_header_list_size = MAX_HEADER_BYTES
    return config


def _url_of(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HypercornLogger(Logger):
    """Hands Hypercorn's warnings and errors to structlog, and nothing else to anybody."""

    async def access(self, *_: object) -> None:
        """Say nothing of requests."""

    async def debug(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""

    async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Say nothing: who serves says where."""

    async def warning(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log a warning."""
        log.warning("hypercorn", message=message % args)

    async def error(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log an error."""
        log.error("hypercorn", message=message % args)

    async def critical(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log an error."""
        log.error("hypercorn", message=message % args)

    async def exception(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log an error with the traceback at hand."""
        log.exception("hypercorn", message=message % args)


async def _live(receive: Receive, send: Send) -> None:
    """Take part in the lifespan protocol; there is nothing to start or stop."""
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


def _request_of(scope: Message) -> Request:
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers[name] = headers[name] + b", " + value if name in headers else value
    path = scope.get("raw_path") or scope["path"].encode()
    client = scope.get("client")
    return Request(
        scope["method"],
        path.decode("latin-1"),
        scope["query_string"],
        headers,
        peer=str(client[0]) if client else "",
    )


async def _respond(request: Request, found: Match | Response, receive: Receive) -> Response | Streamed:
    """Return the answer; `HANG_UP` where the client is gone."""
    if isinstance(found, Response):
        return found
    try:
        if found.route.admit is not None and request.method != "OPTIONS":
            refusal = found.route.admit(request)
            if refusal is not None:
                return refusal
        refusal = error_response(408, "The body took too long", close=True)  # unless told otherwise in time
        with trio.move_on_after(BODY_SECONDS):
            refusal = await _read_body(request, found.route.max_body_bytes, receive)
        if refusal is not None:
            return refusal
        return await found.handler(request)
    except Exception:
        log.exception("handler failed", method=request.method, path=request.path)
        return error_response(500, "Internal error")


async def _read_body(request: Request, max_body_bytes: int, receive: Receive) -> Response | None:
    """Read the body into the request; a Response refuses it, `HANG_UP` where the client is gone."""
    body = io.BytesIO()
    is_too_large = int(request.header(b"content-length", b"0")) > max_body_bytes
    while not is_too_large:
        message = await receive()
        if message["type"] == "http.disconnect":
            return HANG_UP
        body.write(message["body"])
        is_too_large = body.tell() > max_body_bytes
        if not message["more_body"]:
            request.body = body.getvalue()
            break
    return body_too_large(max_body_bytes) if is_too_large else None


class _Writer:
    """Writes one answer; a `relay.http.message.Writer`. Its framing and its back-pressure are Hypercorn's."""

    def __init__(self, request: Request, found: Match | Response, send: Send) -> None:
        self._is_head = request.method == "HEAD"
        self._route_headers = found.route.headers if isinstance(found, Match) else ()
        self._send = send
        self._start: Message | None = None
        self._has_body = True
        self._is_cut = False

    def start(self, status: int, headers: HeaderList, length: int | None) -> None:
        """Set status and headers."""
        self._has_body = not self._is_head and status not in {204, 304}
        lines = [*(header for header in headers if header[0] != b"date"), *self._route_headers]  # it has its own
        if length is not None:
            lines.append((b"content-length", b"%d" % length))
        self._start = {"type": "http.response.start", "status": status, "headers": lines}

    async def send(self, piece: bytes) -> None:
        """Send a piece of the body."""
        if piece and self._has_body:
            await self._flush(piece, more_body=True)

    def cut(self) -> None:
        """Give the answer up."""
        self._is_cut = True

    async def finish(self) -> None:
        """End the answer."""
        if self._is_cut:
            raise ConnectionAbortedError("the answer was cut")  # which ends the connection
        await self._flush(b"", more_body=False)

    async def _flush(self, piece: bytes, *, more_body: bool) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        await self._send({"type": "http.response.body", "body": piece, "more_body": more_body})


async def _stream(streamed: Streamed, writer: _Writer, receive: Receive) -> None:
    """Let a handler write its answer while the client is watched."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await streamed.write(writer)
        await writer.finish()
        nursery.cancel_scope.cancel()
