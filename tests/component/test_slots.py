from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from relay.forward.slots import Slots


async def take(slots: Slots, name: str, order: list[str]) -> None:
    """Take a slot and keep it."""
    await slots.acquire()
    order.append(name)


async def test_slots_are_given_in_order() -> None:
    """Whoever asked first gets the next slot, also before one who asks when it comes free."""
    slots, order = Slots(1, is_adaptive=False), list[str]()
    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "c"):
            nursery.start_soon(take, slots, name, order)
            await wait_all_tasks_blocked()
        assert order == ["a"]
        slots.release()
        nursery.start_soon(take, slots, "d", order)
        await wait_all_tasks_blocked()
        assert order == ["a", "b"]
        for _ in range(2):
            slots.release()
            await wait_all_tasks_blocked()
    assert order == ["a", "b", "c", "d"]


async def test_slot_of_one_who_left_goes_on() -> None:
    """One who is cancelled while waiting takes no slot, nor a place in the queue."""
    slots, order = Slots(1, is_adaptive=False), list[str]()
    await slots.acquire()
    with trio.CancelScope() as scope:
        scope.cancel()
        await slots.acquire()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, slots, "gone", order)
            await wait_all_tasks_blocked()
            scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, slots, "stays", order)
        await wait_all_tasks_blocked()
        slots.release()
    assert order == ["stays"]


async def test_adaptive_limit_opens_and_closes() -> None:
    """Whoever waits is let in as the limit grows; as it shrinks, slots that come free are not given again."""
    slots, order = Slots(10, is_adaptive=True), list[str]()
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(take, slots, str(number), order)
        await wait_all_tasks_blocked()
        assert len(order) == slots.limit == 2
        while slots.limit < 6:
            for began_in in [slots.begin() for _ in range(10)]:
                slots.end(began_in, 0.1, is_ok=True)
        await wait_all_tasks_blocked()
        assert len(order) == slots.limit
        while slots.limit > 2:
            slots.end(slots.begin(), 9.0, is_ok=False)
        slots.release()
        await wait_all_tasks_blocked()
        assert len(order) < 8
        for _ in range(len(order) - 1):
            slots.release()
        await wait_all_tasks_blocked()
        while len(order) < 8:
            slots.release()
            await wait_all_tasks_blocked()
