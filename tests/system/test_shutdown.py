"""How a relay ends: in order, in time, and with nothing lost."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio

from tests.system.daemon import DEADLINE_SECONDS, Relay, Site
from tests.system.hostile import hostile_proxy
from tests.system.laws import assert_accounted
from tests.system.traffic import KEY, TARGET, make_batch
from tests.system.wire import ask, connect

pytestmark = pytest.mark.slow

SESSIONS = 6

STARTS = 6
"""Of relays that are ended again: at once, and at moments spread over the time that a start takes."""

NOISE_BYTES = 30_000
"""Of an event, before hexadecimal doubles it; a commit of some such batches takes the disk a while."""

AT_DEADLINE = "stopped at the deadline; what was accepted is in the spool"

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


@BOTH
async def test_request_in_hand_is_finished(site: Site, number: signal.Signals) -> None:
    """A request that lacks one byte when the signal comes is answered once it is whole, and is there after a restart.

    Until then the relay says that it is not ready, has closed connections without a request, and opens no others.
    """
    await site.start_sandbox()
    relay = await site.start_relay({"batch": {"linger_seconds": 3_600}})
    batch = make_batch("s1", 0)
    head = (
        f"POST {TARGET} HTTP/1.1\r\nHost: relay\r\nX-Lucent-Api-Key: {KEY}\r\nContent-Length: {len(batch.body)}\r\n\r\n"
    )
    async with await connect(relay.url) as busy, await connect(relay.url) as idle:
        await busy.stream.send_all(head.encode() + batch.body[:-1])
        await relay.until("all but a byte to arrive", lambda status: status["listener"]["buffered_bytes"])
        relay.signal(number)
        await relay.logged("stopping")
        with trio.fail_after(DEADLINE_SECONDS):
            assert await idle.stream.receive_some() == b""
        with pytest.raises(OSError, match="connect"):  # whoever is hung up on finds nobody
            await trio.open_tcp_stream(*relay.address)
        ready = await ask(f"{relay.admin}/readyz")
        assert (ready.status, ready.json()["reasons"]) == (503, ["the relay is stopping"])
        await busy.stream.send_all(batch.body[-1:])
        reply = bytes(await busy.stream.receive_some())
    assert reply.startswith(b"HTTP/1.1 200 ")
    site.sent.add(batch)
    assert await relay.wait() == 0
    await site.start_relay({"batch": {"linger_seconds": 0}})
    await assert_accounted(site)


async def test_delivery_in_flight_is_finished(site: Site) -> None:
    """What is at upstream when the signal comes is settled; the backlog behind it is left for the next start."""
    await site.start_sandbox()
    async with hostile_proxy(site.sandbox.url) as proxy:
        proxy.hold()
        relay = await site.start_relay({"upstream": {"ingest_url": proxy.url}, "forward": {"max_in_flight": 1}})
        await site.post(make_batch("s1", 0), make_batch("s2", 0))
        await relay.until("a delivery", lambda status: status["forward"]["in_flight"])
        relay.signal(signal.SIGTERM)
        await relay.logged("stopping")
        proxy.let_go()
        assert await relay.wait() == 0
        report = await site.sandbox.report()
        assert report["stored_batches"] == 1
        await site.start_relay()
        await assert_accounted(site)
        assert (await site.sandbox.report())["repeated_batches"] == 0


async def test_deadline_holds_while_upstream_hangs(site: Site) -> None:
    """An upstream that does not answer delays the end until the deadline, which is an orderly end."""
    await site.start_sandbox("--latency", "3600")
    relay = await site.start_relay({"shutdown": {"deadline_seconds": 1}})
    await site.post(make_batch("s1", 0))
    await relay.until("a delivery", lambda status: status["forward"]["in_flight"])
    relay.signal(signal.SIGTERM)
    assert await relay.wait(seconds=10) == 0
    await site.sandbox.fault()
    await site.start_relay()
    await assert_accounted(site)


async def connect_deaf(url: str) -> trio.SocketStream:
    """Return a connection whose receiving end holds next to nothing."""
    parts = urlsplit(url)
    deaf = trio.socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    await deaf.connect((parts.hostname, parts.port))
    return trio.SocketStream(deaf)


async def fill_relay(relay: Relay, stream: trio.SocketStream) -> None:
    """Send requests until the relay answers no more, in handfuls: it ends connections that ask for much at once."""
    asked = 0
    while True:
        await stream.send_all(f"OPTIONS {TARGET} HTTP/1.1\r\nHost: relay\r\n\r\n".encode() * 50)
        asked += 50
        served = partial(_has_served, requests=asked)
        with trio.move_on_after(1) as patience:
            await relay.until("an answer", served)
        if patience.cancelled_caught:
            return


def _has_served(status: dict[str, Any], requests: int) -> bool:
    return bool(status["listener"]["requests_total"] >= requests)


async def fill_admin(_relay: Relay, stream: trio.SocketStream) -> None:
    """Send requests until the admin listener reads no more."""
    while True:
        with trio.move_on_after(1) as patience:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: relay\r\n\r\n" * 100)
        if patience.cancelled_caught:
            return


@pytest.mark.parametrize(("fill", "ending"), [(fill_relay, "stopped"), (fill_admin, AT_DEADLINE)])
async def test_deadline_holds_while_a_client_does_not_read(
    site: Site, fill: Callable[[Relay, trio.SocketStream], Awaitable[None]], ending: str
) -> None:
    """A client that asks and asks and never reads an answer cannot keep the relay from ending.

    The admin listener's library shields what it sends, and would wait for such a client for ever.
    """
    relay = await site.start_relay({"shutdown": {"deadline_seconds": 1}})
    async with await connect_deaf(relay.url if fill is fill_relay else relay.admin) as stream:
        await fill(relay, stream)
        relay.signal(signal.SIGTERM)
        assert await relay.wait(seconds=10) == 0
    assert [line["event"] for line in relay.lines()][-1] == ending


async def test_deadline_holds_while_nobody_reads_the_log(site: Site) -> None:
    """A relay that waits for the reader of its log, which may have gone, still ends when it is asked to."""
    reading, writing = os.pipe()
    relay = site.spawn_relay({"shutdown": {"deadline_seconds": 1}}, log=writing)
    try:
        async with trio.lowlevel.FdStream(reading) as stream:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay.keep_log, stream)
                await relay.started()
                nursery.cancel_scope.cancel()
            fill_pipe(writing)
            relay.signal(signal.SIGTERM)
            assert await relay.wait(seconds=10) == 0
    finally:
        os.close(writing)


def fill_pipe(writing: int) -> None:
    """Leave no room in a pipe, so that whoever writes to it waits."""
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, b"." * 4_096):
            pass
    os.set_blocking(writing, True)


@BOTH
async def test_second_signal_ends_at_once(site: Site, number: signal.Signals) -> None:
    """Who asks twice does not wait: the relay ends, by 0, since what it accepted is on disk."""
    await site.start_sandbox("--latency", "3600")
    relay = await site.start_relay({"shutdown": {"deadline_seconds": 3_600}})
    await site.post(make_batch("s1", 0))
    await relay.until("a delivery", lambda status: status["forward"]["in_flight"])
    relay.signal(number)
    await relay.logged("stopping")
    relay.signal(number)
    assert await relay.wait() == 0
    await site.sandbox.fault()
    await site.start_relay()
    await assert_accounted(site)


async def test_signal_while_starting(site: Site) -> None:
    """A relay that is asked to end while it starts, once or twice, ends by 0, and its backlog is there later."""
    chance = random.Random(4)
    await site.start_sandbox()
    await site.sandbox.go_down()
    relay = await site.start_relay()
    await site.post(*(make_batch(f"s{number}", 0, 600) for number in range(SESSIONS)))
    await relay.until("some to be tried", lambda status: status["account"]["sealed"])
    relay.kill()
    start_seconds = relay.start_seconds
    for number in range(STARTS):
        relay = site.spawn_relay()
        await relay.logged("starting")
        if number > 1:
            await trio.sleep(chance.uniform(0, start_seconds))
        for _ in range(1 + number % 2):
            relay.signal(signal.SIGTERM)
        assert await relay.wait() == 0
    await site.sandbox.fault()
    await site.start_relay()
    await assert_accounted(site)


async def test_signal_amid_commits(site: Site) -> None:
    """Whoever is answered 200 while the relay ends has a batch that is on disk; the others have none, and try again."""
    chance = random.Random(5)
    await site.start_sandbox()
    await site.start_relay({"batch": {"linger_seconds": 3_600}})
    is_over = trio.Event()

    async def play(session: str) -> None:
        async with site.sdk() as sdk:
            for sequence in count():
                noise = [chance.randbytes(NOISE_BYTES).hex() for _ in range(10)]
                events = [b'{"timestamp":1,"type":3,"data":"%b"}' % text.encode() for text in noise]
                await sdk.post(make_batch(session, sequence, events))
                if is_over.is_set():
                    return

    async with trio.open_nursery() as clients:
        for number in range(SESSIONS):
            clients.start_soon(play, f"s{number}")
        for _ in range(STARTS):
            await site.sent.more(chance.randint(SESSIONS, 3 * SESSIONS))
            await site.relay.stop()
            await site.start_relay()
        is_over.set()
    await site.relay.stop()
    await site.start_relay({"batch": {"linger_seconds": 0}})
    await assert_accounted(site)
