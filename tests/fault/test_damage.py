"""What the disk gives back otherwise than it was stored: only that is missing upstream, and nothing quietly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest
import structlog
import trio
from trio.testing import MockClock

from relay.cli import main
from relay.errors import SpoolDamaged, SpoolError
from relay.http.client import Reply
from relay.spool import schema
from relay.spool.dead_letters import DeadLetters
from relay.spool.quarantine import Unreadable
from relay.spool.store import Store
from relay.spool.values import Moved, NewBatch
from tests.accounting import assert_accounted
from tests.component.batches import LIMITS, make_batch, make_body, make_event
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, Forwarding, forwarding, make_config
from tests.component.faulty_disk import faulty_disk
from tests.component.spooling import opened_spool, wall_clock

PAGE_BYTES = 16_384

SQL = {
    "body changed": "UPDATE body SET deflated = zeroblob(length(deflated)) WHERE id = {body}",
    "body cut short": "UPDATE body SET deflated = substr(deflated, 1, 9) WHERE id = {body}",
    "body of another type": "UPDATE body SET deflated = 'text' WHERE id = {body}",
    "body missing": "DELETE FROM body WHERE id = {body}",
}
"""Damage to one segment, as SQL where the disk does the same without."""


def change(directory: Path, sql: str) -> None:
    """Change the database behind the relay's back."""
    connection = apsw.Connection(str(directory / schema.DATABASE_NAME))
    connection.set_busy_timeout(5_000)
    connection.execute(sql)
    connection.close()


def batch_of(session: str, at: float | None = None) -> NewBatch:
    """Return a client batch of one event."""
    return make_batch(make_body(session), accepted_at=wall_clock() if at is None else at)


def events_of(name: str, count: int = 3) -> list[bytes]:
    """Return events that no other call returns."""
    return [make_event(f"{name}-{number}", 80) for number in range(count)]


SHEDDING: dict[str, Any] = {"overflow": "shed-sessions", "max_bytes": 2_097_152, "min_free_bytes": 0}
"""With a cap that a fraction of what is spooled by then fills."""


def noise(seed: int) -> bytes:
    """Return an event of 4 KB that hardly compresses."""
    return make_event(Random(seed).randbytes(2_000).hex())


async def fill(it: Forwarding) -> None:
    """Accept 1 500 sessions of one such event each, 6 MB."""
    for number in range(1_500):
        await it.accept(f"s{number}", events=[noise(number)])


@asynccontextmanager
async def filled(directory: Path, upstream: FakeUpstream, **options: Any) -> AsyncIterator[Forwarding]:
    """Forward what two sessions have sent and nobody has asked for yet: three batches each, the last one final."""
    async with forwarding(directory, upstream, make_config(linger_seconds=100, **options)) as it:
        for session in ("a", "b"):
            for sequence in range(3):
                await it.accept(session, "w", sequence, events=events_of(f"{session}{sequence}"))
        yield it


async def let_end(it: Forwarding) -> None:
    """Accept the sessions' finals, and wait until all that can be delivered is."""
    for session in ("a", "b"):
        await it.accept(session, "w", 9, events=events_of(f"{session}9"), flush="final")
    await it.drained(600)


@pytest.fixture
def errors() -> Iterator[Callable[[str], bool]]:
    """Whether the log has an ERROR line of an event."""
    with structlog.testing.capture_logs() as lines:
        yield lambda event: any(line["event"] == event and line["log_level"] == "error" for line in lines)


@pytest.mark.parametrize("damage", SQL.values(), ids=SQL)
async def test_damaged_segment_is_set_aside_alone(
    tmp_path: Path, autojump_clock: MockClock, errors: Callable[[str], bool], damage: str
) -> None:
    """It becomes a dead letter of the relay's own, counted and logged; the rest of its session arrives, final last."""
    upstream = FakeUpstream()
    async with filled(tmp_path, upstream) as it:
        change(tmp_path, damage.format(body=2))
        await let_end(it)
        expected = [event for event in it.accepted if b"a1-" not in event]
        assert sorted(upstream.events()) == sorted(expected)
        assert [batch.is_final for batch in upstream.order if batch.session == "a"][-1]
        assert_accounted(
            await it.spool.account(), accepted=24, delivered=21, dead_lettered=3, damaged=3, dead_letters=1
        )
        assert it.spool.statistics().segments_quarantined == 1
        assert errors("damaged segments set aside")


async def test_damaged_segment_that_would_be_split_is_set_aside(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A cut that would need a part of a damaged segment goes on without it."""
    upstream = FakeUpstream()
    async with filled(tmp_path, upstream) as it:
        sent = list(it.accepted)
    upstream = FakeUpstream(max_events=4)
    change(tmp_path, SQL["body missing"].format(body=2))
    async with forwarding(tmp_path, upstream, make_config(max_events=4)) as later:
        await later.drained(600)
        assert sorted(upstream.events()) == sorted(event for event in sent if b"a1-" not in event)
        assert_accounted(await later.spool.account(), accepted=18, delivered=15, damaged=3)


async def test_missing_envelope_takes_its_segments_along(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Without its envelope an event cannot be sent; those of others can."""
    upstream = FakeUpstream()
    async with filled(tmp_path, upstream) as it:
        change(tmp_path, "DELETE FROM envelope WHERE window_id = 1")
        await it.drained(600)
        assert sorted(upstream.events()) == sorted(event for event in it.accepted if b'"b' in event)
        assert_accounted(await it.spool.account(), accepted=18, delivered=9, damaged=9, dead_letters=3)


@pytest.mark.parametrize("is_stored", [True, False])
async def test_sealed_batch_goes_on_under_its_number_without_what_is_damaged(
    tmp_path: Path, autojump_clock: MockClock, is_stored: bool
) -> None:
    """Whether upstream has the batch already or not, each intact event is there once."""
    upstream = FakeUpstream()

    async def lose_answer(arrival: Arrival) -> Reply:
        return await upstream.store_and_hang_up(arrival) if is_stored else Reply(503, {}, b"")

    upstream.answer = lose_answer
    async with filled(tmp_path, upstream, backoff_base_seconds=1_000.0, backoff_max_seconds=1_000.0) as it:
        await it.accept("a", "w", 9, events=events_of("a9"), flush="final")
        await trio.sleep(1)
        assert len(upstream.arrivals) == 1
        change(tmp_path, SQL["body changed"].format(body=1))
    upstream.forget_bodies()

    async def take(_: Arrival) -> Reply:
        return OK

    upstream.answer = take
    async with forwarding(tmp_path, upstream, make_config()) as later:
        await later.drained(600)
        events = upstream.events("a")
        missing = [] if is_stored else events_of("a0")
        assert events == [event for event in it.accepted if b'"a' in event and event not in missing]
        assert {batch.sequence for batch in upstream.order if batch.session == "a"} == {0}
        assert_accounted(await later.spool.account(), accepted=21, delivered=18, damaged=3)


async def test_wholly_damaged_sealed_batch_holds_nothing_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A batch of which nothing is left is gone; its session goes on."""
    upstream = FakeUpstream(_unavailable)
    async with filled(tmp_path, upstream) as it:
        await trio.sleep(101)
        change(tmp_path, "DELETE FROM body WHERE id <= 3")
    upstream.answer = FakeUpstream().answer
    async with forwarding(tmp_path, upstream, make_config()) as later:
        await later.accept("a", "w", 9, events=events_of("a9"), flush="final")
        await later.drained(600)
        assert upstream.events("a") == events_of("a9")
        assert_accounted(await later.spool.account(), accepted=21, delivered=12, damaged=9)
        assert len(it.accepted) == 18


async def test_key_of_which_nothing_is_left_is_refused_no_more(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Where damage takes the last batch of a held key, nothing is left to probe with: its clients are let in again."""

    async def refuse(_: Arrival) -> Reply:
        return Reply(401, {}, b"")

    upstream = FakeUpstream(refuse)
    async with forwarding(tmp_path, upstream, make_config()) as it:
        await it.accept("a")
        await trio.sleep(60)
        assert it.forwarder.is_refused("luc_pk_test")
        change(tmp_path, SQL["body missing"].format(body=1))
        upstream.answer = FakeUpstream().answer
        await trio.sleep(600)
        assert not it.forwarder.is_refused("luc_pk_test")
        await it.accept("b")
        await it.drained(600)
        assert_accounted(await it.spool.account(), accepted=2, delivered=1, damaged=1)


async def _unavailable(_: Arrival) -> Reply:
    return Reply(503, {}, b"")


@pytest.mark.parametrize("status", [400, 413])
async def test_what_damage_left_of_a_batch_may_be_refused_too(
    tmp_path: Path, autojump_clock: MockClock, status: int
) -> None:
    """A batch whose first segment was set aside ends as any other that upstream refuses; its session goes on."""
    upstream = FakeUpstream(_unavailable)
    async with forwarding(tmp_path, upstream, make_config(linger_seconds=10)) as it:
        for sequence in range(2):
            await it.accept("a", "w", sequence)
        await trio.sleep(11)
        assert len(upstream.arrivals[0].batch.events) == 2
        change(tmp_path, SQL["body changed"].format(body=1))
    upstream.forget_bodies()

    async def refuse(arrival: Arrival) -> Reply:
        return Reply(status, {}, b"") if arrival.batch.sequence < 2 * 16_384 else OK

    upstream.answer = refuse
    async with forwarding(tmp_path, upstream, make_config()) as later:
        await later.accept("a", "w", 2, flush="final")
        await later.drained(600)
        assert [(batch.sequence, batch.is_final) for batch in upstream.order] == [(2 * 16_384, True)]
        assert_accounted(await later.spool.account(), accepted=3, delivered=1, dead_lettered=2, damaged=1)


async def test_disk_that_refuses_amid_setting_aside_parks_nothing(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a damaged batch is set aside, and the disk then refuses to make room for it, its session goes on."""
    upstream = FakeUpstream(_unavailable)
    async with forwarding(tmp_path, upstream, make_config(linger_seconds=0)) as it:
        await it.accept("a")
        await trio.sleep(1)
    change(tmp_path, SQL["body missing"].format(body=1))
    shed, refusals = DeadLetters.shed, [apsw.FullError("disk is full")]

    def refuse(letters: DeadLetters, max_bytes: float) -> Moved:
        if refusals:
            raise refusals.pop()
        return shed(letters, max_bytes)

    monkeypatch.setattr(DeadLetters, "shed", refuse)
    async with forwarding(tmp_path, FakeUpstream(), make_config()) as later:
        await trio.sleep(5)
        assert not refusals
        await later.accept("a", "w", 1)
        await later.drained(600)
        assert later.forwarder.statistics().attempt_errors == 0
        assert_accounted(await later.spool.account(), accepted=2, delivered=1, damaged=1)


async def test_damaged_letter_that_cannot_go_parks_no_session(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Where the oldest dead letters, on a damaged page, cannot make room for others, these are kept all the same."""
    database = tmp_path / schema.DATABASE_NAME

    async def refuse(_: Arrival) -> Reply:
        return Reply(400, {}, b"")

    config = make_config(requests_per_minute=0)
    async with forwarding(tmp_path, FakeUpstream(refuse), config) as it:
        for number in range(40):
            await it.accept(f"s{number}", events=[noise(number)])
        await it.drained(600)
    ruin(database, page_of(database, "body", 0))
    async with forwarding(tmp_path, FakeUpstream(refuse), config, dead_letter_max_bytes=1_000) as later:
        await later.accept("new", events=[noise(50)])
        await later.drained(60)
        assert later.forwarder.statistics().sessions_set_aside == 0
        assert_accounted(await later.spool.account(), accepted=41, delivered=0, dead_letters=41)


async def test_damaged_letters_keep_to_the_bound(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Damage has no more room than other dead letters: beyond `spool.dead_letter_max_bytes` the oldest are shed."""
    async with forwarding(tmp_path, FakeUpstream(), make_config(), dead_letter_max_bytes=0) as it:
        await it.accept("a", events=events_of("a"))
        change(tmp_path, SQL["body changed"].format(body=1))
        await it.drained(600)
        account = await it.spool.account()
        assert_accounted(account, accepted=3, dead_lettered=0, shed=3)
        assert account.shed_by_reason == {"dead_letters": 3, "sessions": 0}


# -- pages


def ruin(path: Path, page: int) -> None:
    """Overwrite a page of a closed database with what no page is."""
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE_BYTES)
        file.write(b"\xa5" * PAGE_BYTES)


def page_of(path: Path, table: str, number: int) -> int:
    """Return the `number`-th leaf page of a table, from its root on."""
    connection = apsw.Connection(str(path))
    try:
        root = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).get
    finally:
        connection.close()
    raw = path.read_bytes()[(root - 1) * PAGE_BYTES : root * PAGE_BYTES]
    if raw[0] in (0x0A, 0x0D):  # a leaf
        return int(root)
    cells = int.from_bytes(raw[3:5], "big")
    offsets = [int.from_bytes(raw[12 + 2 * cell : 14 + 2 * cell], "big") for cell in range(cells)]
    return [int.from_bytes(raw[offset : offset + 4], "big") for offset in offsets][number]


async def test_page_of_bodies_costs_what_was_on_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A page of bodies that SQLite cannot read costs those bodies; no session stands still."""
    database = tmp_path / schema.DATABASE_NAME
    async with forwarding(tmp_path, FakeUpstream(_unavailable), make_config(linger_seconds=1_000)) as it:
        for number in range(400):
            await it.accept(f"s{number}", events=events_of(f"s{number}", 20))
    ruin(database, page_of(database, "body", 1))
    async with forwarding(tmp_path, FakeUpstream(), make_config(requests_per_minute=0)) as later:
        await later.drained(600)
        account = await later.spool.account()
        assert 0 < account.damaged < 4_000
        assert account.damaged % 20 == 0
        assert_accounted(account, accepted=8_000, delivered=8_000 - account.damaged)
        assert len(later.upstream.events()) == account.delivered
        assert set(later.upstream.events()) < set(it.accepted)
        await later.accept("s1", "w", 5)
        await later.drained(600)


async def test_page_that_would_have_to_be_moved_stays_where_it_is(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, errors: Callable[[str], bool]
) -> None:
    """A damaged page at the end of the file keeps it from getting shorter, and nothing else: all is taken and sent."""
    monkeypatch.setitem(Store._commit.__globals__, "_VACUUM_FLOOR_PAGES", 16)
    database = tmp_path / schema.DATABASE_NAME
    async with forwarding(tmp_path, FakeUpstream(_unavailable), make_config(linger_seconds=1_000)) as it:
        for number in range(400):
            await it.accept(f"s{number}", events=[noise(number)])
    ruin(database, page_of(database, "body", -2))
    async with forwarding(tmp_path, FakeUpstream(), make_config(requests_per_minute=0)) as later:
        await later.drained(600)
        for number in range(10):
            await later.accept(f"new{number}")
        await later.drained(600)
        account = await later.spool.account()
        assert 0 < account.damaged < 10
        assert_accounted(account, accepted=410, delivered=410 - account.damaged)
        assert later.forwarder.statistics().sessions_set_aside == 0
        assert "malformed" in later.spool.statistics().damage
        assert errors("spool is damaged: run lucent-relay spool verify")


async def test_bad_sector_costs_what_was_on_it(
    tmp_path: Path, autojump_clock: MockClock, errors: Callable[[str], bool]
) -> None:
    """Where the disk cannot read a place, sessions that need it are set aside; nobody else is refused or waits."""
    database = tmp_path / schema.DATABASE_NAME
    with faulty_disk() as disk:
        upstream = FakeUpstream(_unavailable)
        async with forwarding(tmp_path, upstream, make_config(linger_seconds=1_000), vfs=disk.name) as it:
            for number in range(400):
                await it.accept(f"s{number}", events=events_of(f"s{number}", 20))
        start = (page_of(database, "body", 1) - 1) * PAGE_BYTES
        disk.unreadable = range(start, start + PAGE_BYTES)
        config = make_config(requests_per_minute=0)
        try:
            async with forwarding(tmp_path, FakeUpstream(), config, vfs=disk.name) as later:
                await trio.sleep(60)
                delivered, aside = len(later.upstream.events()), later.forwarder.statistics().sessions_set_aside
                assert 0 < aside < 200
                assert delivered == 8_000 - 20 * aside
                assert disk.refused
                assert later.spool.statistics().failed_commits == 0
                assert later.spool.refusal == ""
                await later.accept("new")
                await trio.sleep(60)
                assert len(later.upstream.events()) == delivered + 1
                assert (await later.spool.account()).damaged == 0, "one day it may be read again"
        finally:
            disk.unreadable = range(0)
        assert errors("spool is damaged: run lucent-relay spool verify")
        async with forwarding(tmp_path, FakeUpstream(), config, vfs=disk.name) as again:
            await again.drained(600)
            assert len(again.upstream.events()) == 20 * aside


async def test_account_on_a_bad_sector_is_said_to_be_damaged(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Where it cannot be read that is told as of a damaged page, beside which all other figures are shown."""
    with faulty_disk() as disk:
        async with opened_spool(tmp_path, vfs=disk.name) as spool:
            for number in range(400):
                await spool.append(batch_of(f"s{number}"))
        start = (page_of(tmp_path / schema.DATABASE_NAME, "segment", 1) - 1) * PAGE_BYTES
        async with opened_spool(tmp_path, vfs=disk.name) as spool:
            disk.unreadable = range(start, start + PAGE_BYTES)
            with pytest.raises(SpoolDamaged, match="refused a read"):
                await spool.account()
            assert spool.statistics().damage


async def test_page_of_segments_sets_its_sessions_aside(
    tmp_path: Path, autojump_clock: MockClock, errors: Callable[[str], bool]
) -> None:
    """What lies on such a page is not sent, and said to be damaged; everybody else's is delivered, after a start."""
    database = tmp_path / schema.DATABASE_NAME
    async with forwarding(tmp_path, FakeUpstream(_unavailable), make_config(linger_seconds=1_000)) as it:
        for number in range(1_000):
            await it.accept(f"s{number}", events=events_of(f"s{number}", 1))
    ruin(database, page_of(database, "segment", 1))
    upstream = FakeUpstream()
    try:
        async with forwarding(tmp_path, upstream, make_config(requests_per_minute=0)) as later:
            await trio.sleep(60)
            delivered = len(upstream.events())
            assert 500 < delivered < 1_000
            assert set(upstream.events()) < set(it.accepted)
            assert later.spool.statistics().damage
            assert later.spool.refusal == ""
            await later.accept("new")
            await trio.sleep(60)
            assert len(upstream.events()) == delivered + 1
            raise Unaccountable
    except* Unaccountable:
        assert errors("spool is damaged: run lucent-relay spool verify")


async def test_sessions_on_a_damaged_page_keep_no_other_from_being_shed(
    tmp_path: Path, autojump_clock: MockClock, errors: Callable[[str], bool]
) -> None:
    """Where the oldest sessions cannot be dropped, those behind them are, counted and logged; there is room again."""
    database = tmp_path / schema.DATABASE_NAME
    config = make_config(linger_seconds=100_000)
    async with forwarding(tmp_path, FakeUpstream(), config) as it:
        await fill(it)
    ruin(database, page_of(database, "body", 0))
    async with forwarding(tmp_path, FakeUpstream(), config, **SHEDDING) as later:
        assert "spool.max_bytes" in later.spool.refusal
        await trio.sleep(5)
        assert later.spool.refusal == ""
        account = await later.spool.account()
        assert_accounted(account, accepted=1_500, delivered=0)
        assert account.shed_by_reason == {"dead_letters": 0, "sessions": account.shed}
        assert 100 < account.shed < 1_400
        assert errors("sessions shed, there is no room for them")
        assert later.spool.statistics().damage


async def test_damaged_marks_keep_neither_room_from_being_made_nor_sends_from_being_forgotten(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Housekeeping that meets a damaged page leaves out what needs it, and nothing else."""
    database = tmp_path / schema.DATABASE_NAME
    config = make_config(linger_seconds=100_000)
    async with forwarding(tmp_path, FakeUpstream(), config) as it:
        await it.accept("gone", flush="final")
        await trio.sleep(1)
        await fill(it)
    ruin(database, page_of(database, "mark", 0))
    async with forwarding(tmp_path, FakeUpstream(), config, **SHEDDING) as later:
        assert "spool.max_bytes" in later.spool.refusal
        await trio.sleep(200)
        assert later.spool.refusal == ""
        assert later.spool.statistics().damage
        assert later.spool._store._one("SELECT count(*) FROM attempt") == 0


async def test_page_that_appends_need_refuses_those_and_says_so(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Batches that need a damaged page are refused with the reason, which readiness tells; the relay goes on."""
    database = tmp_path / schema.DATABASE_NAME
    async with opened_spool(tmp_path) as spool:
        for number in range(400):
            await spool.append(batch_of(f"{number:0100}"))
    ruin(database, page_of(database, "sqlite_autoindex_session_1", 1))
    async with opened_spool(tmp_path) as spool:
        outcomes: set[str] = set()
        for number in range(400):
            try:
                outcomes.add((await spool.append(batch_of(f"{number:0100}"))).outcome)
            except SpoolDamaged as error:
                outcomes.add("damaged" if spool.append_damage == str(error) else "damaged, and readiness does not say")
            else:
                assert spool.append_damage == ""
            assert spool.refusal == "", "others may be stored"
        assert outcomes == {"repeated", "damaged"}
        assert_accounted(await spool.account(), accepted=400, pending=400)


async def test_database_that_cannot_be_opened_stays_where_it_is(tmp_path: Path) -> None:
    """It is left alone, and the message says what can be done."""
    database = tmp_path / schema.DATABASE_NAME
    schema.open_database(database, "os").close()
    ruin(database, 1)
    before = database.read_bytes()
    with pytest.raises(SpoolError, match="lucent-relay spool salvage"):
        schema.open_database(database, "os")
    assert database.read_bytes() == before


def test_damaged_letters_are_shown_and_not_sent_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is left of their bytes can be exported; nothing of them can be resent."""
    with contextlib.closing(Store(schema.open_database(tmp_path / schema.DATABASE_NAME, "os"), LIMITS, 10)) as store:
        [appended] = store.transact([lambda: store.append(batch_of("s", at=0.0))])
        change(tmp_path, "UPDATE body SET deflated = x'0102'")
        [found] = store.transact([lambda: store.seal(appended.window_id, 0.0)])
        assert isinstance(found, Unreadable)
        store.transact([lambda: store.quarantine.take(found, 0.0)])
        assert store.transact([lambda: store.seal(appended.window_id, 0.0)]) == [None]

    def run(*words: str) -> tuple[int, str]:
        status = main(["spool", "dead-letters", *words, "--set", f"spool.directory={tmp_path}"])
        return int(status), capfd.readouterr().out

    record = json.loads(run("show", "1")[1])
    assert (record["status"], record["deflated"]) == (0, "AQI=")
    assert record["answer"] == "damaged on the disk: its bytes do not have the checksum that they were stored with"
    assert run("resend", "1")[0] == 1
    assert run("resend", "--all") == (0, "0 dead letters, 0 events to be sent again\n")
    assert run("purge", "--all") == (0, "1 dead letters, 1 events purged\n")


class Unaccountable(Exception):
    """The account is on the damaged page, so it cannot be asserted."""
