"""One answer and its readers, on virtual time."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from relay.data_api.flight import Flight, Head
from relay.errors import ExchangeFailed

PIECE = 10
WINDOW = 30
HEAD = Head(200, (), None, 200)


async def fetch(flight: Flight, pieces: int, held: list[int]) -> None:
    """Put numbered pieces, and note how much is held."""
    with flight.scope:
        flight.begin(HEAD)
        for number in range(pieces):
            await flight.put(b"%010d" % number)
            held.append(flight._held_bytes)
        await flight.finish()


@pytest.mark.parametrize("seed", range(20))
async def test_every_reader_gets_all_of_it_in_bounded_memory(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    """Readers of any pace, some of whom leave, get what was put, in order; never is more held than the window."""
    chance = random.Random(seed)
    flight, held = Flight(WINDOW), list[int]()
    pieces = chance.randrange(1, 40)
    whole = b"".join(b"%010d" % number for number in range(pieces))
    stayed = 0

    async def read() -> None:
        nonlocal stayed
        pace, leaves_after = chance.choice([0.0, 0.5, 3.0]), chance.choice([2, 1_000, 1_000])
        received = b""
        with flight.join() as reader:
            assert (await reader.head()) == HEAD
            while piece := await reader.receive():
                received += piece
                if len(received) > leaves_after * PIECE:
                    return
                await trio.sleep(pace)
        assert received == whole
        stayed += 1

    async with trio.open_nursery() as nursery:
        for _ in range(chance.randrange(1, 5)):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(fetch, flight, pieces, held)
    assert max(held, default=0) <= WINDOW
    assert stayed or flight.scope.cancelled_caught or len(held) == pieces


async def test_a_late_reader_needs_the_beginning(autojump_clock: trio.testing.MockClock) -> None:
    """A flight can be joined until the first of its pieces is let go, or it has failed or been left."""
    flight, held = Flight(WINDOW), list[int]()
    open_then = [flight.is_open]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, flight, 5, held)
        with flight.join() as reader:
            for _ in range(2):
                await reader.receive()
            await trio.testing.wait_all_tasks_blocked()
            open_then.append(flight.is_open)
            assert flight.whole_body() is None
    failed = Flight(WINDOW)
    failed.fail(ExchangeFailed("broken"))
    left = Flight(WINDOW)
    with left.join():
        open_then.append(left.is_open)
    assert left.scope.cancel_called
    assert [*open_then, failed.is_open, left.is_open] == [True, False, True, False, False]


async def test_a_failure_reaches_every_reader(autojump_clock: trio.testing.MockClock) -> None:
    """What was put before a failure is read first; then each reader is told."""
    flight = Flight(WINDOW)
    heard = []

    async def read() -> None:
        with flight.join() as reader:
            await reader.head()
            heard.append(await reader.receive())
            with pytest.raises(ExchangeFailed, match="broken"):
                await reader.receive()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        flight.begin(HEAD)
        await flight.put(b"abc")
        flight.fail(ExchangeFailed("broken"))
    assert heard == [b"abc"] * 3
