"""What the listener holds of bodies, and who has to go when that is too much."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from relay.config import Listen
from relay.http.message import Request, Streamed, Writer
from relay.http.router import Route, Router
from tests.component.memory_listener import Recorder, route_to, serving
from tests.component.test_listener import post


@pytest.mark.parametrize("is_complete", [False, True])
async def test_buffered_bodies_are_bounded(is_complete: bool) -> None:
    """Who sends beyond `max_buffered_bytes` gets 503 with Retry-After; the others keep what they have."""
    recorder = Recorder()
    recorder.gate = trio.Event()
    settings = Listen(max_buffered_bytes=1_048_576)
    router = route_to(recorder, max_body_bytes=2_000_000)
    async with serving(settings, recorder=recorder, router=router) as it:
        first, second = it.connect(), it.connect()
        await first.send(post(b"x" * 1_000_000))
        await trio.testing.wait_all_tasks_blocked()
        assert it.listener.statistics().buffered_bytes == 1_000_000
        refused = post(b"y" * 50_000)
        await second.send(refused if is_complete else refused[:-1])
        status, headers, _ = await second.read()
        assert (status, headers[b"retry-after"], headers[b"connection"]) == (503, b"7", b"close")
        recorder.gate.set()
        assert (await first.read())[0] == 200
        assert [len(request.body) for request in recorder.requests] == [1_000_000]
        assert it.listener.statistics().overloads_total == 1
        await second.aclose()


@pytest.mark.parametrize("is_its_own", [True, False])
async def test_streamed_answers_leave_room_for_others(is_its_own: bool) -> None:
    """Bodies behind answers that take their time hold a quarter of the bytes at most: who is answered at once has room.

    It does not matter whether the body is the slow request's own or comes behind it in the same read. One alone is
    always let through.
    """
    gate = trio.Event()

    async def change(_: Request) -> Streamed:
        async def write(writer: Writer) -> None:
            await gate.wait()
            writer.start(200, (), 0)

        return Streamed(write)

    slow = Route("/slow", {"POST": change, "GET": change}, max_body_bytes=2_000_000)
    body = b"x" * 50_000
    request = post(body).replace(b"/in", b"/slow")
    if not is_its_own:
        request = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" + post(body)
    router = Router([slow, Route("/in", {"POST": Recorder()}, max_body_bytes=2_000_000)])
    async with serving(Listen(max_buffered_bytes=1_048_576), router=router) as it:
        large = it.connect()
        await large.send(post(b"y" * 400_000).replace(b"/in", b"/slow"))
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
        assert (await large.read())[0] == 200
        gate = trio.Event()
        holders = [it.connect() for _ in range(25)]
        for holder in holders:
            await holder.send(request)
            await trio.testing.wait_all_tasks_blocked()
        assert it.listener.statistics().buffered_bytes == 5 * len(body)
        assert (await it.connect().ask(post(b"z" * 700_000)))[0] == 200
        gate.set()
        answers = [await holder.read() for holder in holders]
        assert [status for status, _, _ in answers] == [200] * 5 + [503] * 20
        assert answers[-1][1][b"retry-after"] == b"7"
        for holder in holders:
            await holder.send(request)  # who is refused amid sending on can read why, before the connection ends
        assert it.listener.statistics().overloads_total == 20
        for client in (large, *holders):
            await client.aclose()


async def test_those_who_hoard_make_room(autojump_clock: trio.testing.MockClock) -> None:
    """Where bodies that stall take all memory, who has held most for longest is told 503, and good clients get theirs.

    Byte by byte it may go on for ever at next to no cost, so whoever came last must not be the one to go.
    """
    recorder = Recorder()
    settings = Listen(max_buffered_bytes=1_048_576)
    router = route_to(recorder, max_body_bytes=2_000_000)
    async with serving(settings, recorder=recorder, router=router) as it:
        hoarders = [it.connect() for _ in range(10)]
        for number, hoarder in enumerate(hoarders):
            await hoarder.send(post(b"x" * 200_000)[: 104_000 - number])
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.1)
        held_bytes = it.listener.statistics().buffered_bytes
        assert held_bytes > 1_000_000
        for _ in range(20):
            assert (await it.connect().ask(post(b"y" * 50_000)))[0] == 200
        status, headers, _ = await hoarders[0].read()
        assert (status, headers[b"retry-after"], headers[b"connection"]) == (503, b"7", b"close")
        statistics = it.listener.statistics()
        assert (statistics.overloads_total, sum(statistics.timeouts_total.values())) == (1, 0)
        assert statistics.buffered_bytes < held_bytes - 100_000
        for hoarder in hoarders[1:]:
            assert (await hoarder.read())[0] == 408
        assert [len(request.body) for request in recorder.requests] == [50_000] * 20
