"""Streamed answers over memory streams and virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from relay.config import Listen
from relay.http.listener import HttpListener, open_listeners
from relay.http.message import HeaderList, Request, Streamed, Writer
from relay.http.patience import REAP_SECONDS
from relay.http.router import Route, Router
from relay.http.streaming import AHEAD_BYTES
from tests.component.memory_listener import Recorder, Serving, serving

GET = b"GET /streamed HTTP/1.1\r\nHost: relay.test\r\n\r\n"
OLD_GET = b"GET /streamed HTTP/1.0\r\n\r\n"
DATED: HeaderList = ((b"date", b"then"), (b"x-twice", b"1"), (b"x-twice", b"2"))
PIECES = (b"one", b"", b"three")

Write = Callable[[Writer], Awaitable[None]]


@asynccontextmanager
async def streaming(write: Write, settings: Listen | None = None) -> AsyncIterator[Serving]:
    """Run a listener that has `write` at `/streamed` and a whole answer at `/out`."""

    async def handle(_: Request) -> Streamed:
        return Streamed(write)

    recorder = Recorder()
    routes = [Route("/streamed", {"GET": handle}), Route("/out", {"GET": recorder})]
    async with serving(settings, recorder=recorder, router=Router(routes)) as it:
        yield it


def writing(pieces: tuple[bytes, ...], length: int | None, *, status: int = 200, is_cut: bool = False) -> Write:
    """Return what writes pieces under `DATED`."""

    async def write(writer: Writer) -> None:
        writer.start(status, DATED, length)
        for piece in pieces:
            await writer.send(piece)
        if is_cut:
            writer.cut()

    return write


HEAD_LINES = b"date: then\r\nx-twice: 1\r\nx-twice: 2\r\n"

ANSWERS: dict[str, tuple[bytes, Write, bytes]] = {
    "of a length": (GET, writing(PIECES, 8), HEAD_LINES + b"content-length: 8\r\n\r\nonethree"),
    "in chunks": (
        GET,
        writing(PIECES, None),
        HEAD_LINES + b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n5\r\nthree\r\n0\r\n\r\n",
    ),
    "empty, of a length": (GET, writing((), 0), HEAD_LINES + b"content-length: 0\r\n\r\n"),
    "empty, in chunks": (GET, writing((), None), HEAD_LINES + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "HEAD": (GET.replace(b"GET", b"HEAD"), writing(PIECES, 8), HEAD_LINES + b"content-length: 8\r\n\r\n"),
    "HEAD of no length": (GET.replace(b"GET", b"HEAD"), writing(PIECES, None), HEAD_LINES + b"\r\n"),
    "304 with the length of what it stands for": (
        GET,
        writing((), 8, status=304),
        HEAD_LINES + b"content-length: 8\r\n\r\n",
    ),
    "204": (GET, writing((), 0, status=204), HEAD_LINES + b"\r\n"),
}


@pytest.mark.parametrize(("request_", "write", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_an_answer_on_the_wire_is_exactly_this(request_: bytes, write: Write, expected: bytes) -> None:
    """Headers keep their order and repeats, a date is not given twice, and the connection carries the next request."""
    async with streaming(write) as it:
        client = it.connect()
        await client.send(request_ + GET.replace(b"/streamed", b"/out"))
        status_line, _, rest = (await read_until(client.stream, b'{"ok":true}')).partition(b"\r\n")
        assert status_line.startswith(b"HTTP/1.1 ")
        assert rest.startswith(expected + b"HTTP/1.1 200 OK")


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    """Read until something has come."""
    data = b""
    while end not in data:
        piece = await stream.receive_some(65_536)
        assert piece, data
        data += piece
    return data


async def test_a_client_of_http_1_0_reads_to_the_end() -> None:
    """Without a length and without chunks the connection's end is the body's, also where it was to be kept."""
    async with streaming(writing(PIECES, None)) as it:
        client = it.connect()
        await client.send(OLD_GET.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"))
        head, _, body = (await client.read_to_end()).partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert body == b"onethree"


CUTS = {
    "short of its length": writing(PIECES, 9),
    "cut, of a length": writing(PIECES, 9, is_cut=True),
    "cut amid chunks": writing(PIECES, None, is_cut=True),
}


@pytest.mark.parametrize("write", CUTS.values(), ids=CUTS.keys())
async def test_a_cut_answer_ends_the_connection(write: Write) -> None:
    """What is not whole never looks whole: bytes or the last chunk are missing, and nothing follows."""
    async with streaming(write) as it:
        client = it.connect()
        await client.send(GET + GET)
        data = await client.read_to_end()
        assert data.count(b"HTTP/1.1 200") == 1
        assert not data.endswith(b"0\r\n\r\n")


async def test_a_failing_handler_is_500_until_it_has_begun() -> None:
    """A handler that fails before its first byte is answered 500; after it the answer is cut, and both are logged."""
    is_late = False

    async def write(writer: Writer) -> None:
        writer.start(200, (), 100)
        if is_late:
            await writer.send(b"abc")
        raise RuntimeError("handler failed")

    with capture_logs() as logs:
        async with streaming(write) as it:
            client = it.connect()
            assert (await client.ask(GET))[0] == 500
            is_late = True
            await client.send(GET)
            assert (await client.read_to_end()).endswith(b"\r\n\r\nabc")
            assert it.listener.statistics().handler_errors_total == 2
    assert [entry["event"] for entry in logs] == ["handler failed"] * 2


async def test_more_than_the_length_is_never_sent() -> None:
    """Bytes beyond the length would be taken for the next answer; the connection ends without them."""
    with capture_logs() as logs:
        async with streaming(writing((b"abc", b"def"), 5)) as it:
            client = it.connect()
            await client.send(GET)
            assert (await client.read_to_end()).endswith(b"\r\n\r\nabc")
    assert [entry["event"] for entry in logs] == ["handler failed"]


async def test_a_slow_reader_sets_the_pace(autojump_clock: trio.testing.MockClock) -> None:
    """No piece is asked for before the client has taken the one before; it may take longer than any single limit."""
    asked = 0

    async def write(writer: Writer) -> None:
        nonlocal asked
        writer.start(200, (), 20)
        for _ in range(20):
            asked += 1
            await writer.send(b"x")

    async with streaming(write, Listen(write_seconds=10)) as it:
        client = it.memory.connect(is_lockstep=True)
        await client.send(GET)
        received = b""
        for taken in range(20):
            await trio.sleep(5)
            assert asked <= taken + 1
            received += await client.stream.receive_some(65_536)
        assert received.endswith(b"\r\n\r\n" + b"x" * 20)
        await client.aclose()


async def test_a_reader_that_stops_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """A client that takes nothing for `write_seconds` ends its handler."""
    ended = trio.Event()

    async def write(writer: Writer) -> None:
        writer.start(200, (), None)
        try:
            while True:
                await writer.send(b"x")
        finally:
            ended.set()

    async with streaming(write, Listen(write_seconds=10)) as it:
        client = it.memory.connect(is_lockstep=True)
        await client.send(GET)
        with trio.fail_after(10 + 2 * REAP_SECONDS):
            await ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert it.listener.statistics().timeouts_total["write"] == 1


@pytest.mark.parametrize("begins", [False, True], ids=["before the answer", "amid the answer"])
@pytest.mark.parametrize("more", [(), (b"\r\n",), (GET[:9], GET[9:])], ids=["silent", "empty line", "another request"])
async def test_a_client_that_leaves_cancels_its_handler(
    begins: bool, more: tuple[bytes, ...], autojump_clock: trio.testing.MockClock
) -> None:
    """A handler that waits is cancelled as soon as its client is gone, whatever it sent before; nobody is blamed."""
    ended = trio.Event()

    async def write(writer: Writer) -> None:
        if begins:
            writer.start(200, (), None)
            await writer.send(b"abc")
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    with capture_logs() as logs:
        async with streaming(write) as it:
            client = it.connect()
            await client.send(GET)
            await trio.sleep(1)
            assert not ended.is_set()
            for data in more:
                await client.send(data)
                await trio.sleep(1)
            await client.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert ended.is_set()
            assert it.listener.statistics().open_connections == 0
    assert logs == []


async def test_what_a_client_sends_meanwhile_waits() -> None:
    """A request that comes while an answer is streamed is answered after it; more than one read of it is not taken."""
    gate = trio.Event()

    async def write(writer: Writer) -> None:
        await gate.wait()
        writer.start(200, (), 3)
        await writer.send(b"abc")

    async with streaming(write) as it:
        client = it.connect()
        await client.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(GET.replace(b"/streamed", b"/out"))
        await trio.testing.wait_all_tasks_blocked()
        assert it.recorder.requests == []
        gate.set()
        assert (await client.read())[2] == b"abc"
        assert (await client.read())[2] == b'{"ok":true}'


async def test_little_is_taken_of_what_a_client_sends_meanwhile() -> None:
    """A client that goes on sending while it waits for a streamed answer costs a kilobyte of memory, not a read."""
    gate = trio.Event()

    async def write(writer: Writer) -> None:
        await gate.wait()
        writer.start(200, (), 0)

    async with streaming(write) as it:
        client = it.connect()
        await client.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"x" * 200_000)
        await trio.testing.wait_all_tasks_blocked()
        left = await it.memory.servers[0].receive_some(1_000_000)
        assert 200_000 - len(left) == AHEAD_BYTES
        gate.set()
        assert (await client.read())[0] == 200
        assert (await client.read())[0] == 400
        await client.aclose()


async def test_what_a_client_sends_meanwhile_survives_further_answers(autojump_clock: trio.testing.MockClock) -> None:
    """Of pipelined requests with streamed answers, one that comes amid the first is answered after the last."""
    gate = trio.Event()
    asked: list[bytes] = []

    async def handle(request: Request) -> Streamed:
        asked.append(request.query)

        async def write(writer: Writer) -> None:
            await gate.wait()
            writer.start(200, (), 1)
            await writer.send(request.query)

        return Streamed(write)

    def numbered(number: int) -> bytes:
        return GET.replace(b"/streamed", b"/streamed?%d" % number)

    async with serving(router=Router([Route("/streamed", {"GET": handle})])) as it:
        client = it.connect()
        await client.send(numbered(1) + numbered(2))
        await trio.testing.wait_all_tasks_blocked()
        await client.send(numbered(3) + numbered(4)[:10])
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
        with trio.fail_after(60):
            assert [(await client.read())[2] for _ in range(3)] == [b"1", b"2", b"3"]
            await client.send(numbered(4)[10:])
            assert (await client.read())[2] == b"4"
        await client.aclose()
    assert asked == [b"1", b"2", b"3", b"4"]


async def test_what_a_client_sends_meanwhile_survives_a_failure(autojump_clock: trio.testing.MockClock) -> None:
    """A request that comes while a handler fails is answered behind the 500, whole."""
    gate = trio.Event()

    async def write(_: Writer) -> None:
        await gate.wait()
        raise RuntimeError

    with capture_logs():
        async with streaming(write) as it:
            client = it.connect()
            await client.send(GET)
            await trio.sleep(1)
            await client.send(GET.replace(b"/streamed", b"/out"))
            await trio.sleep(1)
            gate.set()
            with trio.fail_after(60):
                assert ((await client.read())[0], (await client.read())[0]) == (500, 200)
            await client.aclose()


async def test_a_cut_answer_resets_where_only_the_end_could_tell() -> None:
    """A client of HTTP/1.0 gets an error, not an end, where its answer is cut."""

    async def handle(_: Request) -> Streamed:
        return Streamed(writing((b"abc",), None, is_cut=True))

    listeners = await open_listeners("127.0.0.1:0")
    listener = HttpListener(Router([Route("/streamed", {"GET": handle})]), Listen())
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run, listeners)
        stream = await trio.open_tcp_stream(*listeners[0].socket.getsockname()[:2])
        async with stream:
            await stream.send_all(OLD_GET)
            with pytest.raises(trio.BrokenResourceError):
                await read_until(stream, b"never")
        listener.stop()
