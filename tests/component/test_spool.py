from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.errors import SpoolLocked, SpoolUnavailable
from relay.protocol.replay import decode_batch
from relay.protocol.reuse import Known, Stored, find_known
from relay.spool.spool import Spool, run_in_thread
from relay.spool.values import Appended, Load, NewBatch
from tests.accounting import assert_accounted
from tests.component.batches import make_batch, make_body
from tests.component.spooling import GatedRun, opened_spool, wall_clock


def batch_of(session: str, sequence: int = 0, **members: Any) -> NewBatch:
    """Return a client batch of one event, accepted now."""
    return make_batch(make_body(session, sequence=sequence, **members), accepted_at=wall_clock())


def ignore(_: Any) -> None:
    """Hear an announcement."""


def fill_disk(spool: Spool) -> None:
    """Let the database not grow by another page."""
    spool._store._db.pragma("max_page_count", int(spool._store._db.pragma("page_count")))


def empty_disk(spool: Spool) -> None:
    """Let it grow again."""
    spool._store._db.pragma("max_page_count", 1_000_000)


def large_event(number: int) -> bytes:
    """Return an event that hardly compresses."""
    noise = "".join(chr(0x4E00 + (number * 31 + index * 7_919) % 20_000) for index in range(60_000))
    return f'{{"timestamp":1,"type":3,"data":"{noise}"}}'.encode()


def large(session: str) -> NewBatch:
    """Return a batch that needs further pages."""
    return batch_of(session, events=[large_event(0)])


# -- group commit


async def test_appends_share_commits(tmp_path: Path, autojump_clock: MockClock) -> None:
    """While one group is being committed all further appends gather in the next."""
    run = GatedRun()
    async with opened_spool(tmp_path, run=run) as spool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spool.append, batch_of("first"))
            await wait_all_tasks_blocked()
            for number in range(200):
                nursery.start_soon(spool.append, batch_of(f"s{number}"))
            await wait_all_tasks_blocked()
            assert run.began == 1
            run.gate.set()
        assert (spool.statistics().commits, spool.statistics().steps) == (2, 201)
        assert_accounted(await spool.account(), accepted=201, pending=201)


async def test_groups_are_bounded(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A commit has at most 256 steps and some 8 MiB, however many wait."""
    run = GatedRun()
    async with opened_spool(tmp_path, run=run) as spool:
        async with trio.open_nursery() as nursery:
            for number in range(600):
                nursery.start_soon(spool.append, batch_of(f"s{number}"))
            await wait_all_tasks_blocked()
            run.gate.set()
        assert spool.statistics().commits == 3
        assert_accounted(await spool.account(), accepted=600)


async def test_results_go_to_whoever_asked(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Every waiter of a group gets its own step's result, in order of submission."""
    async with opened_spool(tmp_path) as spool:
        results: list[tuple[int, int]] = []

        async def ask(number: int) -> None:
            results.append((number, await spool._step(lambda: number * 2)))

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(ask, number)
        assert sorted(results) == [(number, number * 2) for number in range(50)]


async def test_no_waiter_resumes_before_its_commit(tmp_path: Path, autojump_clock: MockClock) -> None:
    """An append returns when its commit has returned, and not before (law 1)."""
    run = GatedRun()
    async with opened_spool(tmp_path, run=run) as spool, trio.open_nursery() as nursery:
        done: list[Appended] = []

        async def append() -> None:
            done.append(await spool.append(batch_of("s")))

        nursery.start_soon(append)
        await trio.sleep(3_600)
        assert done == []
        run.gate.set()
        await wait_all_tasks_blocked()
        assert [appended.outcome for appended in done] == ["stored"]


async def test_cancelled_waiter_leaves_its_batch(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Cancelling who waits for a commit cancels neither the write nor the announcement."""
    run = GatedRun()
    announced: list[str] = []
    async with opened_spool(tmp_path, run=run) as spool:
        spool.on_appended = lambda _, batch: announced.append(batch.session_id)
        with trio.move_on_after(1) as scope:
            await spool.append(batch_of("s"))
        assert scope.cancelled_caught
        run.gate.set()
        assert (await spool.append(batch_of("s"))).outcome == "repeated"
        assert announced == ["s"]
        assert_accounted(await spool.account(), accepted=1, pending=1)


async def test_batches_are_announced_in_order_before_waiters_resume(tmp_path: Path, autojump_clock: MockClock) -> None:
    """`on_appended` hears of stored batches only, in order of commit, before anybody has an answer."""
    run = GatedRun()
    heard: list[str] = []
    async with opened_spool(tmp_path, run=run) as spool:
        spool.on_appended = lambda appended, batch: heard.append(f"stored {batch.session_id} {appended.session_id}")

        async def append(session: str) -> None:
            await spool.append(batch_of(session))
            heard.append("answered")

        async with trio.open_nursery() as nursery:
            for session in ("a", "b", "a", "c"):
                nursery.start_soon(append, session)
                await wait_all_tasks_blocked()
            run.gate.set()
        assert heard[0] == "stored a 1"
        assert [entry for entry in heard if entry != "answered"] == ["stored a 1", "stored b 2", "stored c 3"]
        assert heard.index("stored c 3") == heard.index("stored b 2") + 1
        assert heard[-3:] == ["answered"] * 3


async def test_raising_step_spoils_only_itself(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Neighbours of a step that raises are committed; its own waiter gets the exception."""
    run = GatedRun()
    async with opened_spool(tmp_path, run=run) as spool:

        def fail() -> None:
            raise KeyError("mine")

        async def ask_in_vain() -> None:
            with pytest.raises(KeyError, match="mine"):
                await spool._step(fail)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(spool.append, batch_of("a"))
            nursery.start_soon(ask_in_vain)
            nursery.start_soon(spool.append, batch_of("b"))
            await wait_all_tasks_blocked()
            run.gate.set()
        assert_accounted(await spool.account(), accepted=2)
        assert spool.refusal == ""


# -- a disk that refuses


async def test_full_disk_refuses_until_it_works_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    """All of a group that the disk refuses learn it, nothing is stored, and accepting resumes by itself."""
    run = GatedRun()
    async with opened_spool(tmp_path, run=run) as spool:
        failures = []

        async def append(batch: NewBatch) -> None:
            try:
                await spool.append(batch)
            except SpoolUnavailable as error:
                failures.append(str(error))

        fill_disk(spool)
        async with trio.open_nursery() as nursery:
            for batch in (batch_of("a"), large("b"), batch_of("c")):
                nursery.start_soon(append, batch)
            await wait_all_tasks_blocked()
            run.gate.set()
        assert failures == [spool.refusal] * 3
        assert "full" in spool.refusal
        assert spool.statistics().is_refusing
        assert spool.statistics().failed_commits == 1
        assert_accounted(await spool.account(), accepted=0)
        empty_disk(spool)
        await trio.sleep(1.5)
        assert spool.refusal == ""
        assert (await spool.append(large("b"))).outcome == "stored"
        assert_accounted(await spool.account(), accepted=1)


async def test_byte_cap_refuses_and_draining_lifts_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    """At `spool.max_bytes` batches are refused with a reason; delivering what is there makes room."""
    async with opened_spool(tmp_path, max_bytes=600_000) as spool:
        appended = await spool.append(large("s"))
        sequence = 0
        while not spool.refusal:
            sequence += 1
            await spool.append(batch_of("s", sequence, events=[large_event(sequence)]))
        assert "(spool.max_bytes)" in spool.refusal
        while isinstance(load := await spool.seal(appended.window_id, ignore), Load):
            await spool.settle(load.batch.batch_id)
        assert spool.refusal == ""
        assert_accounted(await spool.account(), delivered=sequence + 1, spooled=0)


async def test_free_space_floor_refuses(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Below `spool.min_free_bytes` batches are refused, so that the disk is left to others."""
    async with opened_spool(tmp_path, min_free_bytes=1 << 64) as spool:
        assert "(spool.min_free_bytes)" in spool.refusal


# -- reading, opening, closing


async def test_comparing_batches_holds_up_no_commit(tmp_path: Path) -> None:
    """However long it takes to compare a batch with those stored before it, others are committed meanwhile."""
    is_compared = threading.Event()
    async with opened_spool(tmp_path, run=run_in_thread, now=lambda: 0.0) as spool:
        await spool.append(batch_of("s", events=[large_event(1)]))
        changed = make_body("s", events=[large_event(1), large_event(2)])
        differs = await spool.append(make_batch(changed))
        assert differs.outcome == "differs"

        def compare(stored: Stored) -> Known:
            assert list(stored(differs.earlier[0])) == [large_event(1)]
            assert is_compared.wait(60), "nobody else was committed meanwhile"
            return find_known(decode_batch(changed, 262_144), differs.earlier, stored)

        async def accept_others() -> None:
            for sequence in range(1, 4):
                assert (await spool.append(batch_of("s", sequence))).outcome == "stored"
            is_compared.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_others)
            known = await spool.read_stored(compare)
        assert (await spool.append(make_batch(changed, known=known))).outcome == "stored"
        assert_accounted(await spool.account(), accepted=5, pending=5)


async def test_accounts_may_be_asked_for_at_once(tmp_path: Path) -> None:
    """A scrape beside a status request reads one instant each, in real threads, while the writer writes."""
    async with opened_spool(tmp_path, run=run_in_thread, now=lambda: 0.0) as spool:

        async def ask() -> None:
            for _ in range(10):
                assert_accounted(await spool.account())

        async def write(session: str) -> None:
            for sequence in range(10):
                await spool.append(batch_of(session, sequence))

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(ask)
                nursery.start_soon(write, f"s{number}")
        assert_accounted(await spool.account(), accepted=80)


async def test_directory_has_one_spool(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A second spool on a directory is refused while the first is open, and can be had afterwards."""
    async with opened_spool(tmp_path) as spool:
        with pytest.RaisesGroup(SpoolLocked, allow_unwrapped=True, flatten_subgroups=True):
            async with opened_spool(tmp_path):
                raise AssertionError("two spools on one directory")
        await spool.append(batch_of("s"))
    async with opened_spool(tmp_path) as spool:
        assert_accounted(await spool.account(), accepted=1, pending=1)


async def test_closing_commits_what_was_submitted(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What was submitted before the end is on disk after it, though its waiters were cancelled from outside."""
    run = GatedRun()
    run.gate.set()
    with trio.CancelScope() as scope:
        async with opened_spool(tmp_path, run=run) as spool, trio.open_nursery() as nursery:
            run.gate = trio.Event()
            for number in range(5):
                nursery.start_soon(spool.append, batch_of(f"s{number}"))
                await wait_all_tasks_blocked()
            run.gate.set()
            scope.cancel()
    async with opened_spool(tmp_path) as spool:
        assert_accounted(await spool.account(), accepted=5, pending=5)


async def test_closed_spool_refuses(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Whoever comes after the end is told so instead of waiting for ever."""
    async with opened_spool(tmp_path) as spool:
        pass
    with pytest.raises(SpoolUnavailable, match="the spool is closed"):
        await spool.append(batch_of("s"))


async def test_housekeeping_forgets_by_itself(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After the retention a delivered session is forgotten without anybody asking."""
    async with opened_spool(tmp_path, dedupe_seconds=60) as spool:
        appended = await spool.append(batch_of("s"))
        load = await spool.seal(appended.window_id, ignore)
        assert isinstance(load, Load)
        await spool.settle(load.batch.batch_id)
        await trio.sleep(58)
        assert (await spool.append(batch_of("s"))).outcome == "repeated"
        await trio.sleep(4)
        assert spool.statistics().marks_forgotten == 1
        assert (await spool.append(batch_of("s"))).outcome == "stored"
        assert_accounted(await spool.account(), accepted=2, delivered=1)


async def test_marks_keep_to_their_number_however_many_come(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Far more batches in a second than one step of forgetting takes leave no more marks than there may be."""
    async with opened_spool(tmp_path, dedupe_max_marks=100) as spool:
        async with trio.open_nursery() as nursery:
            for sequence in range(2_500):
                batch = make_batch(make_body(sequence=sequence), accepted_at=wall_clock())
                nursery.start_soon(spool.append, batch)
        while isinstance(load := await spool.seal(1, ignore), Load):
            await spool.settle(load.batch.batch_id)
        assert spool.statistics().marks_forgotten == 0
        await trio.sleep(1.5)
        assert spool.statistics().marks_forgotten == 2_400


async def test_clock_that_is_put_forward_gives_no_number_out_twice(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What a session has sent a moment ago is remembered, whatever the wall clock calls it; later it is forgotten."""
    ahead = 0.0

    def clock() -> float:
        return wall_clock() + ahead

    async def send(spool: Spool, window: str, sequence: int = 0) -> int | None:
        appended = await spool.append(make_batch(make_body("s", window, sequence), accepted_at=clock()))
        if appended.outcome == "repeated":
            return None
        load = await spool.seal(appended.window_id, ignore)
        assert isinstance(load, Load)
        await spool.settle(load.batch.batch_id)
        return load.batch.sequence

    async with opened_spool(tmp_path, now=clock, dedupe_seconds=3_600) as spool:
        await trio.sleep(10)
        assert await send(spool, "a") == 0
        ahead = 5_000_000.0
        await trio.sleep(10)
        assert await send(spool, "a") is None, "it is a retry"
        assert await send(spool, "b") == 1, "and 0 is upstream already"
        ahead = 0.0
        await trio.sleep(10)
        assert await send(spool, "c") == 2
        assert spool.statistics().marks_forgotten == 0
        ahead = 5_000_000.0
        await trio.sleep(3_590)
        assert spool.statistics().marks_forgotten == 0
        await trio.sleep(3_700)
        assert spool.statistics().marks_forgotten == 3


async def test_recent_sends_are_remembered_for_the_budget(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Every send, first or repeated, is remembered over a restart for two of upstream's windows."""
    async with opened_spool(tmp_path) as spool:
        appended = await spool.append(batch_of("s"))
        load = await spool.seal(appended.window_id, ignore)
        assert isinstance(load, Load)
        await trio.sleep(100)
        again = await spool.load(load.batch.batch_id)
        assert isinstance(again, Load)
        assert again.body == load.body
        await trio.sleep(30)
    async with opened_spool(tmp_path) as spool:
        [recent] = await spool.recent_attempts()
        assert wall_clock() - recent.at == pytest.approx(30)
        assert [batch.batch_id for batch in await spool.sealed_batches()] == [load.batch.batch_id]
        await spool.read_pending(0, 10, lambda windows: ignore(pytest.fail("pending") if windows else None))
        assert_accounted(await spool.account(), accepted=1, sealed=1)
