from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from relay.errors import SpoolDamaged, SpoolLocked, SpoolSchemaMismatch, SpoolUnavailable
from relay.protocol.cut import Limits
from relay.spool import schema
from relay.spool.account import read_account
from relay.spool.store import Store
from relay.spool.values import Appended
from tests.accounting import assert_accounted
from tests.component.batches import KEY, LIMITS, make_batch, make_body, make_event, read_upstream


@contextmanager
def opened(directory: Path, *, limits: Limits = LIMITS, max_keys: int = 10) -> Iterator[Store]:
    """Open a store; on exit check its account, and close it."""
    directory.mkdir(exist_ok=True)
    store = Store(schema.open_database(directory / schema.DATABASE_NAME, "os"), limits, max_keys)
    try:
        yield store
        assert_accounted(read_account(store._db, 0.0))
    finally:
        store.close()


def do(store: Store, step: Any) -> Any:
    """Run one step in a transaction and return its result."""
    [result] = store.transact([step])
    if isinstance(result, Exception):
        raise result
    return result


def append(store: Store, body: bytes, *, key: str = KEY, limits: Limits = LIMITS, at: float = 0.0) -> Appended:
    """Store one client batch."""
    batch = make_batch(body, key=key, limits=limits, accepted_at=at)
    appended = do(store, lambda: store.append(batch))
    assert isinstance(appended, Appended)
    return appended


def seal_all(store: Store, window_id: int) -> list[tuple[int, bool, int]]:
    """Seal and settle until the window gives nothing; returns sequence, final and number of events of each batch."""
    sent = []
    while (load := do(store, lambda: store.seal(window_id, 0.0))) is not None:
        batch = read_upstream(load.body)
        sent.append((batch.sequence, batch.is_final, len(batch.events)))
        do(store, lambda load=load: store.settle(load.batch.batch_id))
    return sent


def count(store: Store, table: str) -> int:
    """Return a table's number of rows."""
    return int(store._db.execute(f"SELECT count(*) FROM {table}").get)  # noqa: S608 - names of our tables


# -- finals


def test_final_waits_for_what_its_window_sent_behind_it(tmp_path: Path) -> None:
    """A page that comes back after its final (back-forward cache) does not block its session, nor lose its final."""
    with opened(tmp_path) as store:
        window = append(store, make_body(sequence=0, flush="final")).window_id
        append(store, make_body(sequence=1))
        assert seal_all(store, window) == [(16_384, False, 1), (0, True, 1)]


def test_of_two_finals_the_last_ends_the_session(tmp_path: Path) -> None:
    """Finals of two windows do not wait for each other."""
    with opened(tmp_path) as store:
        first = append(store, make_body(window="a", sequence=0, flush="final")).window_id
        second = append(store, make_body(window="b", sequence=1, flush="final")).window_id
        assert seal_all(store, second) == []
        assert seal_all(store, first) == [(0, False, 1)]
        assert seal_all(store, second) == [(16_384, True, 1)]


def test_final_waits_for_no_dead_letter(tmp_path: Path) -> None:
    """What upstream refuses for good does not keep the session from ending."""
    with opened(tmp_path) as store:
        window = append(store, make_body(sequence=0)).window_id
        refused = do(store, lambda: store.seal(window, 0.0)).batch
        append(store, make_body(sequence=1, flush="final"))
        assert do(store, lambda: store.seal(window, 0.0)) is None
        assert do(store, lambda: store.refuse(refused.batch_id, "alone", 400, "", 0.0, 1 << 20)).parts == ()
        assert seal_all(store, window) == [(16_384, True, 1)]


def test_blanks_between_events_cost_no_final(tmp_path: Path) -> None:
    """A final segment that would fit without the blanks between its events still ends the session, and last."""
    limits = Limits(500, 1_000)
    events = [make_event("1", 200), b" " * 400 + make_event("2", 200)]
    with opened(tmp_path, limits=limits) as store:
        # Accepted under wider limits than it is sent with, as after a change of batch.max_bytes.
        window = append(store, make_body(events=events, flush="final")).window_id
        assert seal_all(store, window) == [(0, False, 1), (1, True, 1)]


# -- who is remembered


def test_marks_go_by_age_once_their_session_is_quiet(tmp_path: Path) -> None:
    """A repeat is recognised until its session is quiet for the retention; then session, window and key go too."""
    with opened(tmp_path) as store:
        first = append(store, make_body(sequence=0), at=10.0)
        append(store, make_body(sequence=1), at=20.0)
        assert do(store, lambda: store.retention.prune(30.0, 1_000)) == 0, "events are spooled"
        seal_all(store, first.window_id)
        assert do(store, lambda: store.retention.prune(15.0, 1_000)) == 0, "the session is live"
        assert append(store, make_body(sequence=0)).outcome == "repeated"
        assert do(store, lambda: store.retention.prune(30.0, 1_000)) == 2
        assert [count(store, table) for table in ("mark", "window", "session", "key", "envelope", "body")] == [0] * 6
        again = append(store, make_body(sequence=0), at=40.0)
        assert again.outcome == "stored"
        assert again.window_id > first.window_id
        assert again.session_id > first.session_id
        assert again.key_id > first.key_id


def test_marks_go_by_number(tmp_path: Path) -> None:
    """However young they are, the oldest marks beyond the bound are forgotten, many steps long."""
    with opened(tmp_path) as store:
        for sequence in range(1_300):
            append(store, make_body(f"s{sequence}"))
        for window_id in range(1, 1_301):
            seal_all(store, window_id)
        assert [do(store, lambda: store.retention.prune(-1.0, 100)) for _ in range(4)] == [500, 500, 200, 0]
        assert count(store, "mark") == count(store, "session") == count(store, "window") == 100
        assert append(store, make_body("s1299")).outcome == "repeated"
        assert append(store, make_body("s0")).outcome == "stored"


def test_pruning_gets_past_marks_that_must_stay(tmp_path: Path) -> None:
    """A step's worth of marks of spooled sessions does not hide the old ones behind them."""
    with opened(tmp_path) as store:
        for sequence in range(600):
            append(store, make_body("spooled", sequence=sequence))
        gone = append(store, make_body("gone"))
        seal_all(store, gone.window_id)
        assert [do(store, lambda: store.retention.prune(1.0, 1_000)) for _ in range(2)] == [0, 1]


@contextmanager
def counted(store: Store) -> Iterator[list[int]]:
    """Count a store's work, in tens of SQLite's instructions."""
    tens = [0]

    def look() -> bool:
        tens[0] += 1
        return False

    store._db.set_progress_handler(look, 10)
    try:
        yield tens
    finally:
        store._db.set_progress_handler(None)


@pytest.mark.parametrize("windows", [1, 1_500], ids=["open for days", "of many windows"])
def test_pruning_looks_at_a_session_once(tmp_path: Path, windows: int) -> None:
    """A session with many marks costs a step about as much as many sessions do: no commit waits for its past."""
    with opened(tmp_path) as store:
        for sequence in range(1_500):
            append(store, make_body(window=f"w{sequence % windows}", sequence=sequence), at=float(sequence))
        for window_id in range(1, windows + 1):
            seal_all(store, window_id)
        with counted(store) as work:
            assert do(store, lambda: store.retention.prune(1_400.0, 10_000)) == 0, "the session is live"
            assert do(store, lambda: store.retention.prune(2_000.0, 10_000)) == 500
    assert work[0] < 20_000, "a look for each mark of a step takes a million"


def test_key_too_many_is_refused_until_another_is_forgotten(tmp_path: Path) -> None:
    """Invented keys cost a bounded number of rows."""
    with opened(tmp_path, max_keys=1) as store:
        first = append(store, make_body(), key="luc_pk_a")
        assert append(store, make_body(), key="luc_pk_b").outcome == "too_many_keys"
        assert append(store, make_body(sequence=1), key="luc_pk_a").outcome == "stored"
        seal_all(store, first.window_id)
        do(store, lambda: store.retention.prune(1.0, 1_000))
        assert append(store, make_body(), key="luc_pk_b").outcome == "stored"


def test_windows_share_a_sequence_up_to_its_addresses(tmp_path: Path) -> None:
    """Windows that use one sequence get different addresses, and what has no room is numbered behind all of them."""
    events = [b'{"timestamp":1,"type":3,"data":0}'] * 16_384
    with opened(tmp_path) as store:
        first = append(store, make_body(window="a", sequence=5, events=events[:-1]))
        second = append(store, make_body(window="b", sequence=5))
        third = append(store, make_body(window="c", sequence=5))
        assert append(store, make_body(window="c", sequence=5)).outcome == "repeated"
        assert append(store, make_body(window="c", sequence=6)).outcome == "stored"
        assert seal_all(store, second.window_id) == [(5 * 16_384 + 16_383, False, 1)]
        assert seal_all(store, third.window_id) == [(6 * 16_384, False, 2)]
        sent = seal_all(store, first.window_id)
        assert [sequence for sequence, _, _ in sent] == [5 * 16_384 + start for start in range(0, 16_383, 500)]
        assert sum(events for _, _, events in sent) == 16_383


def test_windows_beyond_number_cost_no_more_each(tmp_path: Path) -> None:
    """A client that names a new window for every batch gets addresses of their own all the same, at a steady cost."""
    with opened(tmp_path) as store:
        costs = []
        for window in range(2_001):
            batch = make_batch(make_body(window=f"w{window}"))
            with counted(store) as work:
                assert do(store, lambda batch=batch: store.append(batch)).outcome == "stored"
            costs.append(work[0])
        assert max(costs[1_000:]) < 1.5 * max(costs[:500])
        for window in (0, 300, 2_000):
            assert append(store, make_body(window=f"w{window}")).outcome == "repeated"
        assert append(store, make_body(window="w2000", sequence=1)).outcome == "stored"
        sent = [sequence for window_id in range(1, 2_002) for sequence, _, _ in seal_all(store, window_id)]
        assert len(set(sent)) == len(sent) == 2_001


def test_settling_costs_what_the_batch_has(tmp_path: Path) -> None:
    """However much of a window is pending behind a batch, removing that costs no more."""
    with opened(tmp_path, limits=Limits(2, 1_048_576)) as store:
        costs = []
        for sequence in range(0, 1_000, 100):
            for later in range(sequence, sequence + 100):
                window = append(store, make_body(sequence=later)).window_id
            load = do(store, lambda window=window: store.seal(window, 0.0))
            with counted(store) as work:
                do(store, lambda load=load: store.settle(load.batch.batch_id))
            costs.append(work[0])
        assert costs[-1] < 1.5 * costs[0]


# -- a disk that refuses


def test_step_that_raises_spoils_neither_neighbours_nor_memory(tmp_path: Path) -> None:
    """What a rolled-back step had put into the caches is not believed afterwards."""
    batch = make_batch(make_body())

    with opened(tmp_path) as store:

        def fail() -> None:
            store.append(batch)
            raise ValueError("mine")

        results = store.transact([fail, lambda: store.append(make_batch(make_body("other"))), fail])
        assert [type(result) for result in results] == [ValueError, Appended, ValueError]
        assert count(store, "segment") == count(store, "session") == 1
        assert do(store, lambda: store.append(batch)).outcome == "stored"


def test_disk_that_fails_between_single_steps_fails_those_only(tmp_path: Path) -> None:
    """After a rollback each step has a commit of its own: one that is on disk is never called refused."""
    with opened(tmp_path) as store:

        def fail() -> None:
            raise ValueError("mine")

        def refuse() -> None:
            if count(store, "mark"):  # only once the first step is committed, so not in the shared commit
                raise apsw.IOError("gone")

        batch = make_batch(make_body())
        stored, failed, refused = store.transact([lambda: store.append(batch), fail, refuse])
        assert isinstance(stored, Appended)
        assert isinstance(failed, ValueError)
        assert isinstance(refused, SpoolUnavailable)


def test_place_that_cannot_be_read_is_damage_on_a_disk_that_works(tmp_path: Path) -> None:
    """It fails the step that needs it where the disk takes writes; where it takes none, the group is to come again."""

    def read() -> None:
        raise apsw.exception_for(apsw.SQLITE_IOERR_CORRUPTFS)

    with opened(tmp_path) as store, pytest.MonkeyPatch.context() as patch:
        stored, failed = store.transact([lambda: store.append(make_batch(make_body())), read])
        assert isinstance(stored, Appended)
        assert isinstance(failed, SpoolDamaged)
        patch.setattr(store, "try_disk", read)
        with pytest.raises(SpoolUnavailable) as refused:
            store.transact([lambda: store.append(make_batch(make_body("other"))), read])
        assert not isinstance(refused.value, SpoolDamaged)
        assert count(store, "segment") == 1


def test_full_disk_refuses_the_whole_group_and_recovers(tmp_path: Path) -> None:
    """Nothing of a group that does not fit is stored, and the next that fits is."""
    event = b'{"timestamp":1,"type":3,"data":"%b"}' % os.urandom(200_000).hex().encode()
    large = make_batch(make_body(sequence=1, events=[event]))
    with opened(tmp_path) as store:
        pages = int(store._db.pragma("page_count"))
        store._db.pragma("max_page_count", pages + 1)
        with pytest.raises(SpoolUnavailable, match="the disk refused a write"):
            store.transact([lambda: store.append(make_batch(make_body())), lambda: store.append(large)])
        assert count(store, "mark") == count(store, "body") == 0
        store._db.pragma("max_page_count", 1_000_000)
        assert do(store, lambda: store.append(large)).outcome == "stored"


def test_database_locked_by_a_tool_is_unavailable_not_broken(tmp_path: Path) -> None:
    """While somebody else writes to the database, steps are refused as for a full disk; then they work."""
    with opened(tmp_path) as store:
        tool = apsw.Connection(str(tmp_path / schema.DATABASE_NAME))
        tool.execute("BEGIN IMMEDIATE")
        with pytest.raises(SpoolUnavailable):
            store.transact([lambda: store.append(make_batch(make_body()))])
        tool.close()
        assert append(store, make_body()).outcome == "stored"


# -- opening


def test_lock_names_its_owner(tmp_path: Path) -> None:
    """A directory has one relay; a second is told which process has it."""
    lock = schema.lock_directory(tmp_path / "deep" / "spool")
    with pytest.raises(SpoolLocked, match=rf"in use by another relay \(process {os.getpid()}\): stop it"):
        schema.lock_directory(tmp_path / "deep" / "spool")
    os.close(lock)
    os.close(schema.lock_directory(tmp_path / "deep" / "spool"))


def test_spool_is_its_owners_alone(tmp_path: Path) -> None:
    """Directory 0700; database, log, index and lock 0600, under any umask (law 11)."""
    old = os.umask(0)
    try:
        directory = tmp_path / "spool"
        lock = schema.lock_directory(directory)
        with opened(directory) as store:
            append(store, make_body())
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
        os.close(lock)
    finally:
        os.umask(old)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert modes == dict.fromkeys(("spool.sqlite3", "spool.sqlite3-wal", "spool.sqlite3-shm", "lock"), 0o600)


def test_other_schema_version_says_what_to_do(tmp_path: Path) -> None:
    """A database of another version is left alone, with advice."""
    path = tmp_path / schema.DATABASE_NAME
    connection = schema.open_database(path, "os")
    connection.pragma("user_version", 99)
    connection.close()
    advice = f"schema version 99, .* version {schema.SCHEMA_VERSION}: run the release that wrote it"
    with pytest.raises(SpoolSchemaMismatch, match=advice):
        schema.open_database(path, "os")


def test_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """Tables that are not ours are not touched."""
    path = tmp_path / schema.DATABASE_NAME
    other = apsw.Connection(str(path))
    other.execute("CREATE TABLE theirs (a)")
    other.close()
    with pytest.raises(SpoolSchemaMismatch, match="another program"):
        schema.open_database(path, "os")


def test_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    """A file by our database's name that is none is not overwritten."""
    path = tmp_path / schema.DATABASE_NAME
    path.write_bytes(b"precious" * 1_000)
    with pytest.raises(SpoolSchemaMismatch, match="not a spool database: if it was one, `lucent-relay spool salvage`"):
        schema.open_database(path, "os")
    assert path.read_bytes() == b"precious" * 1_000


def test_durability_is_what_was_asked_for(tmp_path: Path) -> None:
    """`fsync` opens with synchronous=FULL, and on macOS all the way; `os` with NORMAL; both with a write-ahead log."""
    for durability, synchronous in (("fsync", 2), ("os", 1)):
        connection = schema.open_database(tmp_path / durability, durability)  # type: ignore[arg-type]
        found = [connection.pragma(name) for name in ("synchronous", "journal_mode", "page_size", "auto_vacuum")]
        assert found == [synchronous, "wal", 16_384, 2]
        assert connection.pragma("fullfsync") == connection.pragma("checkpoint_fullfsync") == (durability == "fsync")
        connection.close()


def test_space_is_given_back(tmp_path: Path) -> None:
    """After a burst the file shrinks, commit by commit, and what stays free is not counted as used."""
    text = os.urandom(500_000).hex()
    event = b'{"timestamp":1,"type":3,"data":"%b"}' % text.encode()
    with opened(tmp_path) as store:
        empty = store.used_bytes()
        windows = [append(store, make_body(f"s{n}", events=[event])).window_id for n in range(80)]
        full = store.used_bytes()
        assert full > 80 * 500_000
        for window_id in windows:
            seal_all(store, window_id)
        for _ in range(10):
            do(store, lambda: None)
        assert store.used_bytes() - empty < 1_000_000
        assert int(store._db.pragma("page_count")) * 16_384 < full
        assert int(store._db.pragma("freelist_count")) * 16_384 <= 40_000_000
