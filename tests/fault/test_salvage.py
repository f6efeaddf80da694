"""`lucent-relay spool verify` and `salvage` on spools that are damaged in every way we can think of."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from trio.testing import MockClock

from relay.cli import main
from relay.errors import SpoolError
from relay.exit_codes import ExitCode
from relay.spool import schema
from relay.spool.account import read_account
from relay.spool.salvage import salvage
from relay.spool.store import Store
from relay.spool.values import Load
from relay.spool.verify import verify
from tests.accounting import assert_accounted
from tests.component.batches import KEY, LIMITS, make_batch, make_body, make_event, read_upstream
from tests.component.fake_upstream import FakeUpstream, forwarding, make_config
from tests.fault.test_damage import change, page_of, ruin

SESSIONS = 700
"""So many that every table of events has several pages."""

Command = Callable[..., tuple[int, str, str]]
"""Runs `lucent-relay spool`; returns exit status, standard output and standard error."""


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Store]:
    """Open the spool of a directory, and close it."""
    with contextlib.closing(Store(schema.open_database(directory / schema.DATABASE_NAME, "os"), LIMITS, 10)) as store:
        yield store


def do(store: Store, step: Any) -> Any:
    """Run one step in a transaction and return its result."""
    [result] = store.transact([step])
    if isinstance(result, Exception):
        raise result
    return result


def bury(store: Store, window_id: int) -> None:
    """Let upstream refuse what a window holds, event by event."""
    batches: list[int] = [do(store, lambda: store.seal(window_id, 0.0)).batch.batch_id]
    while batches:
        batch_id = batches.pop()
        refused = do(store, lambda batch_id=batch_id: store.refuse(batch_id, "halves", 413, "", 0.0, 1 << 20))
        batches += refused.parts


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spool of many sessions: some delivered, one purged, one a dead letter, ten sealed, the others pending."""
    path = tmp_path_factory.mktemp("template")
    with opened(path) as store:
        windows = []
        for number in range(SESSIONS):
            events = [make_event(f"s{number}-{index}", 100) for index in range(5)]
            body = make_body(f"s{number}", events=events, flush="final" if number % 2 else "")
            windows.append(do(store, lambda body=body: store.append(make_batch(body))).window_id)
        for window_id in windows[:20]:
            load = do(store, lambda window_id=window_id: store.seal(window_id, 0.0))
            if window_id > 10:
                do(store, lambda load=load: store.settle(load.batch.batch_id))
        for window_id in windows[20:22]:
            bury(store, window_id)
        do(store, lambda: store.dead_letters.purge([1]))
    return path


@pytest.fixture
def directory(tmp_path: Path, template: Path) -> Path:
    """A copy of that spool."""
    return Path(shutil.copytree(template, tmp_path / "spool"))


@pytest.fixture
def command(directory: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `spool` on that spool."""

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["spool", *words, "--set", f"spool.directory={directory}"])
        return int(status), *capfd.readouterr()

    return run


def account_of(directory: Path) -> Any:
    """Return a closed spool's account."""
    with contextlib.closing(schema.open_reader(directory / schema.DATABASE_NAME)) as reader:
        return read_account(reader, 0.0)


def bodies_of(directory: Path) -> dict[int, bytes]:
    """Return the JSON of every sealed batch by its number, as a copy of the spool would send it."""
    copy = directory.parent / f"{directory.name}-copy"
    shutil.copytree(directory, copy)
    with opened(copy) as store:
        batches = do(store, store.leftovers.sealed_batches)
        loads = [do(store, lambda batch=batch: store.load(batch.batch_id, 0.0)) for batch in batches]
    shutil.rmtree(copy)
    return {load.batch.batch_id: load.body for load in loads}


def aside(directory: Path) -> list[Path]:
    """Return the databases that were set aside."""
    return sorted(path for path in directory.glob("*.damaged-*") if not path.name.endswith("-wal"))


# -- verify


def test_nothing_is_wrong_with_a_sound_spool(command: Command, directory: Path) -> None:
    """`verify` looks at every event, changes nothing and ends with 0."""
    before = (directory / schema.DATABASE_NAME).read_bytes()
    account = account_of(directory)
    assert command("verify") == (
        0,
        f"nothing is wrong: {account.segments + account.dead_letters} segments with"
        f" {account.spooled + account.dead_lettered} events looked at\n",
        "",
    )
    assert (directory / schema.DATABASE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("UPDATE body SET deflated = zeroblob(9) WHERE id = 40", "does not have"),
        ("DELETE FROM body WHERE id = 40", "1 segments without their bytes"),
        ("DELETE FROM envelope WHERE window_id = 40", "1 segments without their envelope"),
        ("DELETE FROM window WHERE id = 40", "1 segments without their window"),
        ("UPDATE segment SET crc = crc + 1 WHERE window_id = 40", "its events do not have the checksum"),
        ("UPDATE segment SET events_bytes = 7 WHERE window_id = 40", "not 7"),
        ("UPDATE segment SET events = 4 WHERE window_id = 40", "it has 5 events, not 4"),
        ("DELETE FROM segment WHERE window_id = 3", "batches that have not the events of their segments"),
        ("DELETE FROM batch WHERE id = 3", "1 segments of a batch that is not there"),
        ("UPDATE counter SET value = value + 1 WHERE name = 'accepted'", "the account does not add up"),
        ("DELETE FROM mark WHERE window_id = 40", "1 sessions without a mark"),
    ],
)
def test_what_is_wrong_is_found(command: Command, directory: Path, damage: str, finding: str) -> None:
    """Each kind of damage to rows is a line of its own, and ends `verify` with 1."""
    change(directory, damage)
    status, out, problem = command("verify")
    assert status == 1
    assert finding.replace("does not have", "its bytes do not have the checksum") in out
    assert problem.startswith("the spool is damaged, ")


@pytest.mark.parametrize("table", ["segment", "body", "mark", "envelope", "sqlite_autoindex_session_1", "window"])
def test_damaged_page_is_found(command: Command, directory: Path, table: str) -> None:
    """A page that cannot be read is found, whatever is on it; the rest is looked at."""
    database = directory / schema.DATABASE_NAME
    ruin(database, leaf_of(database, table))
    status, out, _ = command("verify")
    assert status == 1
    assert "SQLite: " in out or "cannot be read" in out


def test_what_is_no_database_is_told_what_to_do(command: Command, directory: Path) -> None:
    """Where not even the first page can be read, `verify` names the command that saves the rest."""
    ruin(directory / schema.DATABASE_NAME, 1)
    status, _, problem = command("verify")
    assert status == ExitCode.SPOOL
    assert "cannot be read" in problem
    assert "`lucent-relay spool salvage`" in problem


def leaf_of(database: Path, table: str) -> int:
    """Return the second leaf page of a table, or its only one."""
    try:
        return page_of(database, table, 1)
    except IndexError:
        return page_of(database, table, 0)


# -- salvage


def test_sound_spool_is_salvaged_whole(command: Command, directory: Path) -> None:
    """Nothing is missing, nothing is numbered anew, and the old database is set aside as it was."""
    before, old, sealed = account_of(directory), (directory / schema.DATABASE_NAME).read_bytes(), bodies_of(directory)
    status, out, _ = command("salvage")
    assert status == 0
    assert out.startswith(f"{before.spooled + before.dead_lettered} events saved, 0 of them found damaged before\n")
    assert account_of(directory) == before
    assert bodies_of(directory) == sealed
    [kept] = aside(directory)
    assert kept.read_bytes() == old
    assert str(kept) in out
    assert command("verify")[0] == 0


@pytest.mark.parametrize(
    "table", ["key", "session", "window", "envelope", "mark", "segment", "body", "batch", "dead_letter", "counter"]
)
def test_every_page_may_be_lost(directory: Path, autojump_clock: MockClock, table: str) -> None:
    """Whatever page is lost, what can be read is saved, the account adds up, and no sealed batch is cut anew."""
    database = directory / schema.DATABASE_NAME
    before, sealed = account_of(directory), bodies_of(directory)
    ruin(database, leaf_of(database, table))
    saved = salvage(directory, "now", 0.0)
    after = account_of(directory)
    assert_accounted(after)
    assert saved.events == after.spooled + after.dead_lettered
    if saved.has_counters:
        assert after.accepted == before.accepted
        assert after.purged == before.purged + saved.missing
        assert before.spooled + before.dead_lettered == saved.events + saved.missing
    else:
        assert (table, after.accepted) == ("counter", saved.events)
    if table in ("counter", "mark", "batch", "body", "dead_letter", "envelope"):
        assert after.spooled == before.spooled, "descriptions were not on that page"
    if table in ("counter", "mark", "dead_letter"):
        assert bodies_of(directory) == sealed
    with contextlib.closing(schema.open_reader(database)) as reader:
        findings = [line for line in verify(reader, 0.0).findings if "checksum" not in line]
    assert [line for line in findings if "without their" not in line] == []


async def test_relay_delivers_what_was_salvaged(directory: Path, autojump_clock: MockClock) -> None:
    """A relay that starts on the new database delivers all of it, and what it meets of the damage it sets aside."""
    database = directory / schema.DATABASE_NAME
    ruin(database, page_of(database, "body", 1))
    salvage(directory, "now", 0.0)
    upstream = FakeUpstream()
    async with forwarding(directory, upstream, make_config(requests_per_minute=0)) as it:
        await it.drained(60)
        account = await it.spool.account()
        assert account.damaged > 0
        assert len(set(upstream.events())) == len(upstream.events()) > 0
        assert_accounted(account, spooled=0)


def test_lost_batch_rows_are_made_anew(directory: Path) -> None:
    """A cut whose row is lost is what its segments say: the same events under the same number."""
    before = {number: read_upstream(body) for number, body in bodies_of(directory).items()}
    change(directory, "DELETE FROM batch")
    salvage(directory, "now", 0.0)
    after = {number: read_upstream(body) for number, body in bodies_of(directory).items()}
    assert after == before


@pytest.mark.parametrize("is_stopped", [True, False])
def test_lost_first_page_is_replaced(command: Command, directory: Path, is_stopped: bool) -> None:
    """A database that SQLite cannot even open is saved whole, log included, since its first page is known."""
    database = directory / schema.DATABASE_NAME
    before = account_of(directory)
    if not is_stopped:  # leave a log behind, as a power cut does
        change(directory, "PRAGMA wal_autocheckpoint = 0")
        connection = apsw.Connection(str(database))
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.execute("UPDATE envelope SET tail = tail")
        connection.close()
    ruin(database, 1)
    with pytest.raises(SpoolError, match="lucent-relay spool salvage"):
        schema.open_database(database, "os")
    assert command("salvage")[0] == 0
    assert account_of(directory) == before
    assert command("verify")[0] == 0


def test_interrupted_salvage_is_finished(command: Command, directory: Path) -> None:
    """Between its two databases no relay starts, and the next salvage goes on."""
    database, before = directory / schema.DATABASE_NAME, account_of(directory)
    salvage(directory, "first", 0.0)
    database.rename(directory / schema.SALVAGED_NAME)
    with pytest.raises(SpoolError, match="interrupted"):
        schema.open_database(database, "os")
    assert not database.exists()
    assert command("salvage")[0] == 0
    assert account_of(directory) == before


def test_salvage_needs_the_spool_for_itself(command: Command, directory: Path, tmp_path: Path) -> None:
    """While a relay has the directory, and where there is no spool, nothing is touched."""
    lock = schema.lock_directory(directory)
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(shutil.os.close, lock)  # type: ignore[attr-defined]
        assert command("salvage")[0] == 73
    assert aside(directory) == []
    assert main(["spool", "salvage", "--set", f"spool.directory={tmp_path / 'nowhere'}"]) == 73


def test_numbers_are_not_given_out_again(directory: Path) -> None:
    """A session whose mark is lost goes on behind what is spooled of it."""
    change(directory, "DELETE FROM mark WHERE window_id = 100")
    salvage(directory, "now", 0.0)
    with opened(directory) as store:
        body = make_body("s99", "other", events=[make_event("new")])
        appended = do(store, lambda: store.append(make_batch(body, key=KEY)))
        load = do(store, lambda: store.seal(appended.window_id, 0.0))
        assert isinstance(load, Load)
        assert read_upstream(load.body).sequence == 5
