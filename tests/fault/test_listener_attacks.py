"""Clients that vanish, reset, flood or are cancelled at the worst moment, and what they cost: themselves."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from relay.config import Listen
from relay.errors import ConfigError
from relay.http.listener import HttpListener, open_listeners
from relay.http.message import Request, Response
from relay.http.patience import LINGER_SECONDS
from relay.http.router import Route, Router
from tests.component.memory_listener import OK, MemoryListener, RawClient, Recorder, route_to, serving
from tests.loopback import has_v6_loopback

HOST = b"Host: relay.test\r\n"
POST = b"POST /in HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
CONVERSATION = POST + b"Content-Length: 3\r\n\r\nabc" + CHUNKED + b"GET /out HTTP/1.1\r\n" + HOST + b"\r\n"

MAX_CHECKPOINTS = 200
"""More than a conversation of this file has; the test that counts them fails if it does not get to the end."""


class CancelAtStep(trio.abc.Instrument):
    """Cancels `scope` right before the n-th step of the connection's task."""

    def __init__(self, step: int, scope: trio.CancelScope) -> None:
        self.remaining = step
        self._scope = scope

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count the steps of `HttpListener._serve`."""
        if task.name.endswith("HttpListener._serve"):
            self.remaining -= 1
            if self.remaining == 0:
                self._scope.cancel()


async def converse_until_cancelled(step: int) -> tuple[HttpListener, bool]:
    """Run a conversation and cancel the listener at a step; return it, and whether the step was reached."""

    async def handler(_: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return OK

    routes = [Route("/in", {"POST": handler}, max_body_bytes=10), Route("/out", {"GET": handler})]
    listener = HttpListener(Router(routes), Listen())
    memory = MemoryListener()
    instrument = CancelAtStep(step, scope := trio.CancelScope())
    trio.lowlevel.add_instrument(instrument)
    try:
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(listener.run, [memory])
                client = memory.connect()
                for index in range(0, len(CONVERSATION), 40):
                    await client.send(CONVERSATION[index : index + 40])
                    await trio.testing.wait_all_tasks_blocked()
                await client.send(b"nonsense\r\n\r\n")
                await client.read_to_end()
                listener.stop()
    except* trio.BrokenResourceError:
        pass  # the client's own end, closed under it
    finally:
        trio.lowlevel.remove_instrument(instrument)
    return listener, instrument.remaining <= 0


async def test_cancelling_a_connection_at_any_checkpoint_leaks_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Wherever a connection's task is cancelled, the connection and its bytes are given back."""
    reached = 0
    for step in range(1, MAX_CHECKPOINTS):
        listener, was_reached = await converse_until_cancelled(step)
        statistics = listener.statistics()
        assert (statistics.open_connections, statistics.buffered_bytes) == (0, 0)
        if not was_reached:
            break
        reached = step
    assert 20 < reached < MAX_CHECKPOINTS - 1


@pytest.mark.parametrize("is_lockstep", [False, True])
async def test_a_client_may_vanish_after_any_byte(is_lockstep: bool, autojump_clock: trio.testing.MockClock) -> None:
    """A connection that ends after any number of bytes is forgotten, and the next one is served."""
    async with serving() as it:
        for length in range(len(CONVERSATION) + 1):
            client = it.connect(is_lockstep=is_lockstep)
            with trio.move_on_after(1):
                await client.send(CONVERSATION[:length])
            await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        statistics = it.listener.statistics()
        assert (statistics.open_connections, statistics.buffered_bytes) == (0, 0)
        assert statistics.handler_errors_total == 0
        assert (await it.connect().ask(CONVERSATION))[0] == 200


@pytest.mark.parametrize("seed", range(20))
async def test_stalling_clients_cost_nobody_else_any_time(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    """With many clients stalled anywhere in a request, another one's requests take no virtual time at all."""
    source = random.Random(seed)
    async with serving(Listen(max_connections=60)) as it:
        for _ in range(50):
            await it.connect().send(CONVERSATION[: source.randrange(1, len(CONVERSATION))])
        client = it.connect()
        began = trio.current_time()
        for _ in range(20):
            assert (await client.ask(POST + b"Content-Length: 3\r\n\r\nabc"))[0] == 200
        assert trio.current_time() == began
        await trio.sleep(100)
        assert it.listener.statistics().open_connections == 0


@pytest.mark.parametrize("seed", range(20))
async def test_garbage_is_answered_or_cut_off(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    """A valid conversation with bytes changed, dropped or repeated never breaks the listener or a handler."""
    source = random.Random(seed)
    async with serving() as it:
        for _ in range(50):
            broken = bytearray(CONVERSATION)
            for _ in range(source.randrange(1, 4)):
                at = source.randrange(len(broken))
                broken[at : at + source.randrange(3)] = source.randbytes(source.randrange(3))
            client = it.connect()
            await client.send(bytes(broken))
            with trio.fail_after(200):
                await client.read_to_end()
            await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        statistics = it.listener.statistics()
        assert (statistics.open_connections, statistics.handler_errors_total) == (0, 0)


# Over loopback: what memory streams cannot show.


@asynccontextmanager
async def on_loopback(settings: Listen | None = None) -> AsyncIterator[tuple[HttpListener, int]]:
    """Run a listener on a free port."""
    listener = HttpListener(route_to(Recorder(), max_body_bytes=10_000_000), settings or Listen())
    listeners = await open_listeners("127.0.0.1:0")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run, listeners)
        yield listener, port
        listener.stop()
    statistics = listener.statistics()
    assert (statistics.open_connections, statistics.buffered_bytes) == (0, 0)


async def connect(port: int) -> RawClient:
    """Return a client of the port."""
    return RawClient(await trio.open_tcp_stream("127.0.0.1", port))


async def test_a_large_body_and_its_answer_pass_through_sockets() -> None:
    """A body of many reads arrives whole, and an answer larger than the socket's buffer leaves whole."""

    async def echo(request: Request) -> Response:
        return Response(200, request.body)

    body = random.Random(0).randbytes(9_000_000)
    listener = HttpListener(Router([Route("/in", {"POST": echo}, max_body_bytes=len(body))]), Listen())
    listeners = await open_listeners("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run, listeners)
        async with await connect(listeners[0].socket.getsockname()[1]) as client:
            await client.send(POST + b"Content-Length: %d\r\n\r\n" % len(body))
            assert (await client.ask(body))[2] == body
            assert listener.statistics().buffered_bytes == 0
            listener.stop()


async def test_a_client_that_reads_only_after_sending_everything_gets_its_refusal(
    mock_clock: trio.testing.MockClock,
) -> None:
    """The answer to an oversized body survives the megabytes that are still on their way.

    Time stands still meanwhile: how long they may be on their way is a matter of `LINGER_SECONDS`, and not of this.
    """
    async with on_loopback() as (_, port), await connect(port) as client:
        await client.send(POST + b"Content-Length: 20000000\r\n\r\n")
        for _ in range(20):
            await client.send(b"x" * 1_000_000)
        assert (await client.read())[0] == 413
        mock_clock.jump(2 * LINGER_SECONDS)
        assert await client.read_to_end() == b""


async def test_resets_anywhere_are_survived() -> None:
    """A TCP reset in the midst of a head, a body, an answer or behind them costs its connection only."""
    async with on_loopback() as (listener, port):
        for length in range(1, len(CONVERSATION) + 1, 7):
            async with await connect(port) as client:
                await client.send(CONVERSATION[:length])
                assert isinstance(client.stream, trio.SocketStream)
                client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with await connect(port) as survivor:
            assert (await survivor.ask(CONVERSATION))[0] == 200
            assert listener.statistics().handler_errors_total == 0


async def test_half_closed_clients_are_answered() -> None:
    """A client that shuts its write side behind the request still gets the answer."""
    async with on_loopback() as (_, port), await connect(port) as client:
        await client.send(POST + b"Content-Length: 3\r\n\r\nabc")
        assert isinstance(client.stream, trio.SocketStream)
        await client.stream.send_eof()
        assert (await client.read())[0] == 200
        assert await client.read_to_end() == b""


@pytest.mark.parametrize(
    "address", ["", "8787", "localhost", ":8787", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", "::1:8787"]
)
async def test_unreadable_addresses_are_configuration_errors(address: str) -> None:
    """An address that is not host:port is refused with its text in the message."""
    with pytest.raises(ConfigError, match=f'cannot listen on "{address}"'):
        await open_listeners(address)


async def test_a_taken_address_is_named() -> None:
    """Listening where somebody listens fails with the address in the message."""
    (listener,) = await open_listeners("127.0.0.1:0")
    async with listener:
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {address}"):
            await open_listeners(address)


async def test_names_and_v6_addresses_can_be_listened_on() -> None:
    """A name listens on each of its addresses; brackets mark a v6 address."""
    for address in ["localhost:0", *["[::1]:0"] * has_v6_loopback()]:
        for listener in await open_listeners(address):
            await listener.aclose()
