"""A disk that is full, broken, read-only or gone, under the real spool and forwarder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from relay.errors import SpoolUnavailable
from relay.http.client import Reply
from relay.spool import schema
from relay.spool.reserve import RESERVE_NAME, Reserve
from relay.spool.spool import Spool
from relay.spool.values import Load, NewBatch
from tests.accounting import assert_accounted
from tests.component.batches import make_batch, make_body
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, forwarding, make_config
from tests.component.faulty_disk import BROKEN, FULL, READ_ONLY, faulty_disk
from tests.component.spooling import opened_spool, wall_clock
from tests.mounting import fill_up, mounted, needs_mount

DISK_BYTES = 50_331_648
"""Of the small file system: room for the reserve twice, and for a backlog beside it."""

RESERVE_BYTES = 8_388_608
"""A log of 4 MiB and the group that fills it."""


def batch_of(session: str, sequence: int = 0, **members: Any) -> NewBatch:
    """Return a client batch of one event, accepted now."""
    return make_batch(make_body(session, sequence=sequence, **members), accepted_at=wall_clock())


def noise(seed: int, size: int = 40_000) -> bytes:
    """Return an event that hardly compresses."""
    return b'{"timestamp":1,"type":3,"data":"%b"}' % Random(seed).randbytes(size // 2).hex().encode()


# -- writes that are refused


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("error", [FULL, BROKEN, READ_ONLY])
async def test_refused_writes_stop_accepting_and_nothing_else(
    tmp_path: Path, autojump_clock: MockClock, error: type[apsw.Error], operation: str
) -> None:
    """While the disk refuses, batches are refused with the reason and upstream is sent nothing twice; then all resumes.

    What upstream takes meanwhile cannot be settled. It is not sent again, but settled once the disk works.
    """
    upstream = FakeUpstream()
    with faulty_disk() as disk:

        async def fail_meanwhile(_: Arrival) -> Reply:
            disk.break_down(error, operation)
            await trio.sleep(30)
            return OK

        async with forwarding(tmp_path, upstream, vfs=disk.name, durability="fsync") as it:
            await it.accept("a", flush="final")
            await it.accept("b")
            upstream.answer = fail_meanwhile
            await trio.sleep(10)
            with pytest.raises(SpoolUnavailable, match="the disk refused a write"):
                await it.spool.append(batch_of("c"))
            assert "the disk refused a write" in it.spool.refusal
            await trio.sleep(300)
            assert (len(upstream.arrivals), len(upstream.order)) == (1, 1)
            assert_accounted(await it.spool.account(), accepted=2, delivered=0)
            upstream.answer = FakeUpstream().answer
            disk.recover()
            await trio.sleep(2)
            assert it.spool.refusal == ""
            await it.accept("c")
            await it.drained()
            assert disk.refused > 100
            it.assert_each_once()
            assert [arrival.attempt for arrival in upstream.arrivals] == [1, 1, 1]


async def test_start_sends_what_a_broken_disk_could_not_settle_as_it_was(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """A batch that upstream took, and a disk that failed until the end could not note, is sent once more unchanged."""
    upstream = FakeUpstream()
    with faulty_disk() as disk:
        async with forwarding(tmp_path, upstream, vfs=disk.name) as it:
            await it.accept("a", flush="final")
            await trio.sleep(0.02)
            disk.break_down(BROKEN)
            with trio.move_on_after(5):
                await it.drained()
            disk.recover()
            await it.drained()
    async with forwarding(tmp_path, upstream) as it:
        await trio.sleep(5)
        assert [arrival.attempt for arrival in upstream.arrivals] == [1]
        assert_accounted(await it.spool.account(), accepted=1, delivered=1)


# -- a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `DISK_BYTES`."""
    with mounted(tmp_path / "disk", DISK_BYTES) as path:
        yield path


async def fill(spool: Spool) -> list[int]:
    """Append batches of ten sessions until the disk refuses one; returns the windows."""
    windows: dict[str, int] = {}
    for sequence in range(10_000):
        session = f"s{sequence % 10}"
        try:
            appended = await spool.append(batch_of(session, sequence, events=[noise(sequence)]))
        except SpoolUnavailable:
            return list(windows.values())
        windows[session] = appended.window_id
    raise AssertionError("the disk takes everything")


async def drain(spool: Spool, windows: list[int]) -> int:
    """Deliver what the windows hold; returns how often the disk refused a step."""
    refused = 0

    async def insist(step: Any) -> Any:
        nonlocal refused
        while True:
            try:
                return await step()
            except SpoolUnavailable:
                refused += 1
                assert refused < 100, "draining stands still"
                await trio.sleep(1)

    for window in windows:

        def seal(window: int = window) -> Any:
            return spool.seal(window, lambda _: None)

        while (load := await insist(seal)) is not None:

            def settle(load: Load = load) -> Any:
                return spool.settle(load.batch.batch_id)

            await insist(settle)
    return refused


@needs_mount
async def test_full_disk_drains_and_accepts_again(small_disk: Path, autojump_clock: MockClock) -> None:
    """On a disk without a free byte everything can still be delivered, and then there is room; no restart.

    While the reserve is given up nothing is accepted, whatever draining has made room for.
    """
    settings: dict[str, Any] = {"min_free_bytes": 0, "reserve_bytes": RESERVE_BYTES, "durability": "fsync"}
    async with opened_spool(small_disk / "spool", **settings) as spool:
        assert (small_disk / "spool" / RESERVE_NAME).stat().st_size == RESERVE_BYTES
        windows = await fill(spool)
        accepted = (await spool.account()).accepted
        assert accepted > 500
        await trio.sleep(1.5)
        assert "spool.reserve_bytes" in spool.refusal
        with pytest.raises(SpoolUnavailable, match=r"spool\.reserve_bytes"):
            await spool.append(batch_of("small"))
        assert await drain(spool, windows) == 0
        await trio.sleep(15)
        assert spool.refusal == ""
        assert (await spool.append(batch_of("small"))).outcome == "stored"
        assert_accounted(await spool.account(), accepted=accepted + 1, delivered=accepted)
        assert Reserve(small_disk / "spool", RESERVE_BYTES).is_held


@needs_mount
async def test_start_on_a_full_disk_drains(small_disk: Path, autojump_clock: MockClock) -> None:
    """A relay that starts on a disk that others have filled delivers what it holds, and says why it takes nothing."""
    settings: dict[str, Any] = {"min_free_bytes": 0, "reserve_bytes": RESERVE_BYTES, "durability": "fsync"}
    async with opened_spool(small_disk / "spool", **settings) as spool:
        windows = []
        for number in range(100):
            appended = await spool.append(batch_of("s", number, events=[noise(number)]))
            windows = [appended.window_id]
    fill_up(small_disk / "others")
    async with opened_spool(small_disk / "spool", **settings) as spool:
        assert await drain(spool, windows) == 0
        await trio.sleep(10)
        assert_accounted(await spool.account(), accepted=100, delivered=100)
        assert "spool.reserve_bytes" in spool.refusal
        (small_disk / "others").unlink()
        await trio.sleep(1.5)
        assert spool.refusal == ""


async def test_space_goes_back_to_the_file_system(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After a backlog has drained, the database shrinks to the 32 MiB that are kept, by housekeeping alone."""
    async with opened_spool(tmp_path) as spool:
        windows = set()
        for number in range(1_600):
            appended = await spool.append(batch_of(f"s{number % 10}", number, events=[noise(number, 100_000)]))
            windows.add(appended.window_id)
        database = tmp_path / schema.DATABASE_NAME
        full = database.stat().st_size
        assert full > 70_000_000
        assert await drain(spool, sorted(windows)) == 0
        await trio.sleep(120)
        assert database.stat().st_size < 40_000_000
        assert (tmp_path / f"{schema.DATABASE_NAME}-wal").stat().st_size < 4_000_000
        assert_accounted(await spool.account(), delivered=1_600)


async def test_reserve_is_taken_where_there_is_room_for_it_twice(tmp_path: Path) -> None:
    """It is really allocated, given up whole, and found again by the next run; one that is cut short is none."""
    reserve = Reserve(tmp_path, 1_048_576)
    assert (reserve.is_held, reserve.take()) == (False, True)
    assert (tmp_path / RESERVE_NAME).stat().st_blocks * 512 >= 1_048_576
    assert Reserve(tmp_path, 1_048_576).is_held
    os.truncate(tmp_path / RESERVE_NAME, 1_000)
    assert not Reserve(tmp_path, 1_048_576).is_held
    assert reserve.take()
    reserve.give_up()
    assert not reserve.is_held
    assert not (tmp_path / RESERVE_NAME).exists()
    assert not Reserve(tmp_path, 1 << 62).take()
    assert Reserve(tmp_path, 0).is_held


# -- a directory that is gone


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_removed_directory_delivers_what_is_open_and_accepts_nothing(
    tmp_path: Path, autojump_clock: MockClock, is_replaced: bool
) -> None:
    """What was accepted before is delivered from the open files; no batch is answered yes; no database is made."""
    directory = tmp_path / "spool"
    async with forwarding(directory, FakeUpstream(), make_config(linger_seconds=60)) as it:
        for number in range(20):
            await it.accept(f"s{number}", events=[noise(number)])
        shutil.rmtree(directory)
        if is_replaced:
            directory.mkdir()
            schema.open_database(directory / schema.DATABASE_NAME, "os").close()
        with pytest.raises(SpoolUnavailable, match="spool directory was removed or replaced"):
            await it.spool.append(batch_of("late"))
        assert "removed or replaced" in it.spool.refusal
        assert (await it.spool.account()).accepted == 21, "it is stored where it will be lost, so nobody is told yes"
        await it.drained()
        assert len(it.upstream.events()) == 21
        assert directory.exists() == is_replaced
        if is_replaced:
            reader = schema.open_reader(directory / schema.DATABASE_NAME)
            assert reader.execute("SELECT value FROM counter WHERE name = 'accepted'").get == 0
            reader.close()


async def test_directory_that_comes_back_is_used_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A directory that was moved away and back is the same: accepting resumes by itself."""
    async with opened_spool(tmp_path / "spool") as spool:
        await spool.append(batch_of("a"))
        (tmp_path / "spool").rename(tmp_path / "elsewhere")
        await trio.sleep(1.5)
        assert "removed or replaced" in spool.refusal
        (tmp_path / "elsewhere").rename(tmp_path / "spool")
        await trio.sleep(1.5)
        assert spool.refusal == ""
        await spool.append(batch_of("b"))
        assert_accounted(await spool.account(), accepted=2)
