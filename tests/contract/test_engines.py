"""The seam between engines and handlers: the listener and Hypercorn give the same answers over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from relay.config import Listen
from relay.errors import ConfigError
from relay.http.asgi import MAX_CONNECTIONS, serve_asgi
from relay.http.listener import HttpListener, open_listeners
from relay.http.message import JSON, Request, Response, Streamed, Writer, error_response, json_response
from relay.http.router import Route, Router
from tests.component.memory_listener import Answer, RawClient

HOST = b"Host: relay.test\r\n"
ENGINE_HEADERS = {b"date", b"connection"}

Serve = Callable[[Router], Awaitable[int]]


async def echo(request: Request) -> Response:
    """Say what was understood of the request."""
    seen = {
        "method": request.method,
        "path": request.path,
        "query": request.query.decode(),
        "body": request.body.decode(),
        "x": request.header(b"x-test").decode(),
        "peer": request.peer,
    }
    return json_response(200, seen, ((b"x-answer", b"yes"),))


async def fail(_: Request) -> Response:
    """Fail."""
    raise RuntimeError("handler failed")


async def empty(_: Request) -> Response:
    """Answer 204."""
    return Response(204)


async def last(_: Request) -> Response:
    """Answer and close."""
    return Response(200, b"bye", (JSON,), close=True)


async def streamed(request: Request) -> Streamed:
    """Answer in three pieces, of a length that is known."""

    async def write(writer: Writer) -> None:
        writer.start(200, ((b"x-many", b"1"), (b"date", b"Thu, 01 Jan 1970 00:00:00 GMT")), 9)
        for piece in (b"one", b"two", b"six"):
            await writer.send(piece)

    return Streamed(write)


def admit(request: Request) -> Response | None:
    """Refuse who has no key."""
    return None if b"x-key" in request.headers else error_response(401, "Missing API key")


ROUTES = [
    Route("/echo", {"GET": echo, "POST": echo}, max_body_bytes=10, headers=((b"x-route", b"echo"),)),
    Route("/keyed", {"POST": echo}, admit=admit, max_body_bytes=10, headers=((b"x-route", b"keyed"),)),
    Route("/fail", {"GET": fail}, headers=((b"x-route", b"fail"),)),
    Route("/empty", {"GET": empty}),
    Route("/last", {"GET": last}),
    Route("/streamed", {"GET": streamed}, headers=((b"x-route", b"streamed"),)),
    Route("/one/*", {"GET": echo}, has_options=False),
]


async def serve_listener(nursery: trio.Nursery) -> int:
    """Start the listener; return its port."""
    listeners = await open_listeners("127.0.0.1:0")
    await nursery.start(HttpListener(Router(ROUTES), Listen()).run, listeners)
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def serve_hypercorn(nursery: trio.Nursery) -> int:
    """Start Hypercorn; return its port."""

    async def serve(task_status: trio.TaskStatus[list[str]]) -> None:
        await serve_asgi(Router(ROUTES), "127.0.0.1:0", shutdown=trio.Event(), task_status=task_status)

    (url,) = await nursery.start(serve)
    assert url.startswith("http://127.0.0.1:")
    return int(url.rpartition(":")[2])


async def connect(port: int) -> RawClient:
    """Return a client of the port."""
    return RawClient(await trio.open_tcp_stream("127.0.0.1", port))


@asynccontextmanager
async def both_engines() -> AsyncIterator[list[RawClient]]:
    """Run both engines; give a connection to each."""
    async with trio.open_nursery() as nursery:
        ports = [await serve_listener(nursery), await serve_hypercorn(nursery)]
        async with await connect(ports[0]) as first, await connect(ports[1]) as second:
            yield [first, second]
        nursery.cancel_scope.cancel()


def comparable(answer: Answer) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return an answer without what is the engine's own."""
    status, headers, body = answer
    return status, sorted(header for header in headers.items() if header[0] not in ENGINE_HEADERS), body


REQUESTS = {
    "GET": b"GET /echo?a=b%20c HTTP/1.1\r\n" + HOST + b"X-Test: 1\r\nX-Test: 2\r\n\r\n",
    "HEAD": b"HEAD /echo HTTP/1.1\r\n" + HOST + b"\r\n",
    "POST": b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc",
    "POST in chunks": b"POST /echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",
    "OPTIONS": b"OPTIONS /echo HTTP/1.1\r\n" + HOST + b"\r\n",
    "streamed": b"GET /streamed HTTP/1.1\r\n" + HOST + b"\r\n",
    "streamed, HEAD": b"HEAD /streamed HTTP/1.1\r\n" + HOST + b"\r\n",
    "last segment": b"GET /one/of%2Fmany HTTP/1.1\r\n" + HOST + b"\r\n",
    "last segment, empty": b"GET /one/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "one segment too many": b"GET /one/two/three HTTP/1.1\r\n" + HOST + b"\r\n",
    "OPTIONS where it is not answered": b"OPTIONS /one/two HTTP/1.1\r\n" + HOST + b"\r\n",
    "unknown path": b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n",
    "encoded path": b"GET /ech%6f HTTP/1.1\r\n" + HOST + b"\r\n",
    "unknown path, HEAD": b"HEAD /nowhere HTTP/1.1\r\n" + HOST + b"\r\n",
    "unknown method": b"PUT /echo HTTP/1.1\r\n" + HOST + b"\r\n",
    "admitted": b"POST /keyed HTTP/1.1\r\n" + HOST + b"X-Key: k\r\nContent-Length: 3\r\n\r\nabc",
    "refused": b"POST /keyed HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc",
    "too large": b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 11\r\n\r\nabcdefghijk",
    "too large in chunks": b"POST /echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    b"b\r\nabcdefghijk\r\n0\r\n\r\n",
    "body where none belongs": b"GET /empty HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\n\r\na",
    "failing": b"GET /fail HTTP/1.1\r\n" + HOST + b"\r\n",
    "no content": b"GET /empty HTTP/1.1\r\n" + HOST + b"\r\n",
    "closing": b"GET /last HTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/1.0": b"GET /echo HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize("data", REQUESTS.values(), ids=REQUESTS.keys())
async def test_both_engines_give_the_same_answer(data: bytes) -> None:
    """Status, headers and body do not depend on the engine."""
    answers = []
    with capture_logs():
        async with both_engines() as clients:
            for client in clients:
                await client.send(data)
                with trio.fail_after(30):
                    answers.append(await client.read(has_body=not data.startswith(b"HEAD")))
    assert comparable(answers[0]) == comparable(answers[1])
    assert answers[0][0] != 500 or b"/fail" in data


async def test_hypercorn_survives_what_it_does_not_understand() -> None:
    """Broken bytes and websockets cost their connection only."""
    broken = [
        b"\x16\x03\x01\x02\x00",
        b"nonsense\r\n\r\n",
        b"GET /echo HTTP/1.1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n",
        b"POST /echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nz\r\n",
        b"GET /" + b"a" * 70_000,
        b"GET /echo HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    ]
    with capture_logs():
        async with trio.open_nursery() as nursery:
            port = await serve_hypercorn(nursery)
            for data in broken:
                async with await connect(port) as client:
                    await client.send(data)
                    if not data.startswith(b"\x16"):
                        status, _ = await client.read_head()
                        assert 400 <= status < 500
            for data in REQUESTS.values():  # gone before, amid or behind the answer
                for length in (10, len(data) - 1, len(data)):
                    async with await connect(port) as client:
                        await client.send(data[:length])
            async with await connect(port) as client:
                assert (await client.ask(REQUESTS["GET"]))[0] == 200
            nursery.cancel_scope.cancel()


async def test_hypercorn_ends_when_it_is_told_to() -> None:
    """Setting the event ends the server, and its port is free again."""
    shutdown = trio.Event()

    async def serve(task_status: trio.TaskStatus[list[str]]) -> None:
        await serve_asgi(Router(ROUTES), "127.0.0.1:0", shutdown=shutdown, task_status=task_status)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(serve)
            shutdown.set()
    for listener in await open_listeners(url.removeprefix("http://")):
        await listener.aclose()


async def test_hypercorn_connections_are_bounded(mock_clock: trio.testing.MockClock) -> None:
    """A connection beyond `MAX_CONNECTIONS` is closed, and costs the others nothing.

    Time stands still, so that none of them has been idle for too long.
    """
    async with trio.open_nursery() as nursery:
        port = await serve_hypercorn(nursery)
        async with AsyncExitStack() as open_ones:
            clients = [await open_ones.enter_async_context(await connect(port)) for _ in range(MAX_CONNECTIONS)]
            assert (await clients[-1].ask(REQUESTS["GET"]))[0] == 200
            async with await connect(port) as refused:
                assert await refused.read_to_end() == b""
            assert (await clients[0].ask(REQUESTS["GET"]))[0] == 200
        nursery.cancel_scope.cancel()


async def test_both_engines_refuse_bad_addresses_alike() -> None:
    """An address that cannot be read is a configuration error before anything is served."""
    with pytest.raises(ConfigError, match="nonsense"):
        await serve_asgi(Router(ROUTES), "nonsense", shutdown=trio.Event())
