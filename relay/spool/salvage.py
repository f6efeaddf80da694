"""Saves what can be read of a damaged database into a new one, and sets the damaged one aside whole.

Rules:
1. Rows keep their ids, addresses and batches, so cuts, numbers and marks are what they were. What is damaged within a
   row that can be read is left to the relay, which sets it aside when it meets it.
2. The damaged database is renamed, never changed and never removed.
3. The new one's account adds up. What was accepted and is in no row that could be read has left the spool at an
   operator's order: it counts as purged, and is told. Where the counters themselves are lost they begin with what was
   saved.
4. A salvage that is interrupted is begun again, or finished, by the next one; no relay starts in between.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import apsw
import msgspec

from relay.errors import SpoolUnavailable
from relay.protocol.cut import later_activity
from relay.spool import schema
from relay.spool.account import read_account

_TABLES = ("key", "session", "window", "envelope", "mark", "body", "batch", "dead_letter")
"""Tables with a row id; `segment` goes by window, the others are small."""

_LAST = 1 << 62
"""Beyond every id and address."""

_ROWS_AT_A_TIME = 500

_SPAN = 20_000
"""Ids looked at behind a damaged page, where that is the last and so hides how far they go."""

_MAX_FAILURES, _MAX_WINDOW_FAILURES = 200_000, 500
"""Reads of one table, and of one window, that may fail, at some 20 µs each. Wide ranges are tried first."""

_MEND = (
    # What belongs to nobody any more cannot be sent.
    "DELETE FROM session WHERE key_id NOT IN (SELECT id FROM key)",
    "DELETE FROM window WHERE session_id NOT IN (SELECT id FROM session)",
    "DELETE FROM segment WHERE window_id NOT IN (SELECT id FROM window)",
    "DELETE FROM dead_letter WHERE window_id NOT IN (SELECT id FROM window)",
    "DELETE FROM mark WHERE window_id NOT IN (SELECT id FROM window)",
    "DELETE FROM body WHERE id NOT IN (SELECT body_id FROM segment UNION ALL SELECT body_id FROM dead_letter)",
    # A batch has what is left of it; its number and its JSON beside the events are what they were.
    "CREATE TEMP TABLE left_of AS SELECT batch_id, sum(events) events FROM segment"
    " WHERE batch_id IS NOT NULL GROUP BY batch_id",
    "DELETE FROM batch WHERE id NOT IN (SELECT batch_id FROM left_of)",
    "DELETE FROM envelope WHERE id NOT IN (SELECT envelope_id FROM segment"
    " UNION ALL SELECT envelope_id FROM dead_letter UNION ALL SELECT envelope_id FROM batch)",
    "UPDATE batch SET events = (SELECT events FROM left_of WHERE batch_id = batch.id)"
    " WHERE id IN (SELECT batch_id FROM left_of)",
    # What is spooled has a mark, so that its numbers are not given out again.
    "CREATE TEMP TABLE kept AS SELECT window_id, address / 16384 block, address % 16384 first, events, accepted_at"
    " FROM (SELECT window_id, address, events, accepted_at FROM segment"
    " UNION ALL SELECT window_id, address, events, accepted_at FROM dead_letter)",
    "INSERT OR IGNORE INTO mark"
    " SELECT NULL, session_id, block, window_id, min(first), max(first + events) - min(first), block, 0, 0, 0, 0, 0,"
    " min(accepted_at) FROM kept JOIN window ON window.id = window_id"
    " WHERE NOT EXISTS (SELECT 1 FROM mark WHERE mark.session_id = window.session_id AND mark.block = kept.block"
    " AND mark.window_id = kept.window_id) GROUP BY window_id, block",
    "DELETE FROM session WHERE id NOT IN (SELECT session_id FROM mark)",
    "DELETE FROM window WHERE session_id NOT IN (SELECT id FROM session)",
    "DELETE FROM key WHERE id NOT IN (SELECT key_id FROM session)",
)


class Salvaged(msgspec.Struct, frozen=True):
    """What a salvage has saved."""

    events: int
    """Spooled, or in dead letters."""
    damaged: int
    """Of these, found damaged before."""
    missing: int
    """Accepted, and neither gone nor saved: they could not be read, and count as purged."""
    has_counters: bool
    """Whether the counters could be read."""
    aside: Path
    """The damaged database."""


def salvage(directory: Path, stamp: str, now: float) -> Salvaged:
    """Replace a spool's database by a new one with what can be read of it.

    Args:
        directory: Of the spool, which no relay has open.
        stamp: Ends the damaged database's new name.
        now: Wall clock.

    Raises:
        SpoolLocked: A relay has it open.
        SpoolUnavailable: There is no database, or the disk refuses.
    """
    path = directory / schema.DATABASE_NAME
    finished = directory / schema.SALVAGED_NAME
    if not path.is_file() and not finished.is_file():
        raise SpoolUnavailable(f"there is no spool in {directory} (spool.directory)")
    lock = schema.lock_directory(directory)
    try:
        missing, has_counters = 0, True
        if not finished.is_file():
            missing, has_counters = _build(path, finished, now)
        aside = directory / f"{schema.DATABASE_NAME}.damaged-{stamp}"
        _exchange(path, finished, aside)
        with closing(schema.open_reader(path)) as reader:
            account = read_account(reader, now)
        return Salvaged(account.spooled + account.dead_lettered, account.damaged, missing, has_counters, aside)
    except (apsw.Error, OSError) as error:
        raise SpoolUnavailable(f"the spool cannot be salvaged: {error}") from error
    finally:
        os.close(lock)


def _build(path: Path, finished: Path, now: float) -> tuple[int, bool]:
    """Make the new database beside the damaged one; returns how many events are missing, and if counters are known."""
    building, mended = Path(f"{path}.building"), Path(f"{path}.mended")
    for name in (building, mended):
        _remove(name)
    target = schema.open_database(building, "os")
    try:
        target.pragma("journal_mode", "OFF")  # what is interrupted is begun again, and needs no way back
        with closing(_open_damaged(path, mended, building)) as source, target:
            for table in _TABLES:
                _copy(source, target, table)
            _copy_segments(source, target)
            with suppress(apsw.Error):
                attempts = source.execute("SELECT * FROM attempt").fetchall()
                target.executemany("INSERT INTO attempt VALUES (?, ?)", attempts)
            for sql in _MEND:
                target.execute(sql)
            _rebuild_batches(target, now)
            _restore_sequences(source, target)
            missing, has_counters = _balance(source, target, now)
        target.pragma("journal_mode", "WAL")
    finally:
        target.close()
        _remove(mended)
    _sync(building)
    building.rename(finished)
    _sync(path.parent)
    return missing, has_counters


def _open_damaged(path: Path, mended: Path, fresh: Path) -> apsw.Connection:
    """Open a damaged database such that it is not changed; where its first page is lost, a copy with another one.

    The first page says how long the database is and where its tables begin. All spools have their tables in the same
    places, since they are made in the same order.
    """
    try:
        return _connect(path)
    except apsw.Error:
        pass
    for suffix in ("", "-wal"):
        if Path(f"{path}{suffix}").exists():
            shutil.copyfile(f"{path}{suffix}", f"{mended}{suffix}")
    with closing(schema.open_reader(fresh)) as reader:
        page_bytes = reader.pragma("page_size")
    page = bytearray(fresh.read_bytes()[:page_bytes])
    pages = mended.stat().st_size // page_bytes
    page[28:32] = pages.to_bytes(4, "big")  # the length of the database (fileformat2, 1.3.7)
    page[32:40] = bytes(8)  # no free pages that anybody would use
    with mended.open("r+b") as file:
        file.write(page)
    return _connect(mended)


def _connect(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        schema.check_version(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


# -- reading around what cannot be read


def _rows(
    source: apsw.Connection, sql: str, bindings: tuple[Any, ...], key: int, max_failures: int
) -> Iterator[tuple[Any, ...]]:
    """Yield what can be read of rows, in no order: from both ends, then around whatever is damaged between.

    Args:
        source: The damaged database.
        sql: Selects rows by `bindings` and the bounds of a key, in an order of it that is filled in, with a limit.
        bindings: Go before these.
        key: The key's column.
        max_failures: Reads that may fail.
    """
    low, high = -1, _LAST
    for order, side in (("ASC", 1), ("DESC", -1)):
        with suppress(apsw.Error):
            while True:
                bounds = (low + 1, high - 1, _ROWS_AT_A_TIME)
                rows: Any = source.execute(sql.format(order), (*bindings, *bounds)).fetchall()
                yield from rows
                if len(rows) < _ROWS_AT_A_TIME:
                    return
                if side > 0:
                    low = rows[-1][key]
                else:
                    high = rows[-1][key]
    ranges = deque([(low + 1, (low + _SPAN if high == _LAST else high) - 1)])
    while ranges and max_failures:
        first, last = ranges.popleft()
        try:
            rows = source.execute(sql.format("ASC"), (*bindings, first, last, _ROWS_AT_A_TIME)).fetchall()
        except apsw.Error:
            max_failures -= 1
            if first < last:
                middle = (first + last) // 2
                ranges += [(first, middle), (middle + 1, last)]
            continue
        yield from rows
        if len(rows) == _ROWS_AT_A_TIME and rows[-1][key] < last:
            ranges.append((rows[-1][key] + 1, last))


def _copy(source: apsw.Connection, target: apsw.Connection, table: str) -> None:
    sql = f"SELECT * FROM {table} WHERE id BETWEEN ? AND ? ORDER BY id {{}} LIMIT ?"  # noqa: S608 - our tables
    for row in _rows(source, sql, (), 0, _MAX_FAILURES):
        _insert(target, table, row)


def _copy_segments(source: apsw.Connection, target: apsw.Connection) -> None:
    sql = "SELECT * FROM segment WHERE window_id = ? AND address BETWEEN ? AND ? ORDER BY address {} LIMIT ?"
    for (window_id,) in target.execute("SELECT id FROM window").fetchall():
        for row in _rows(source, sql, (window_id,), 1, _MAX_WINDOW_FAILURES):
            _insert(target, "segment", row)


def _insert(target: apsw.Connection, table: str, row: tuple[Any, ...]) -> None:
    """Take a row over, unless it has become one that no such table can have."""
    with suppress(apsw.ConstraintError):
        target.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608


# -- what follows from what is missing


def _rebuild_batches(target: apsw.Connection, now: float) -> None:
    """Make the batches anew whose row is lost, from their segments: the first has the number, the last the envelope."""
    lost: Any = target.execute(
        "SELECT batch_id, session_id, segment.window_id, address, envelope_id, last_activity, is_final, events"
        " FROM segment JOIN window ON window.id = segment.window_id"
        " WHERE batch_id IS NOT NULL AND batch_id NOT IN (SELECT id FROM batch) ORDER BY batch_id, address"
    ).fetchall()
    batches: dict[int, list[Any]] = {}
    for batch_id, session_id, window_id, address, envelope_id, activity, is_final, events in lost:
        batch = batches.setdefault(
            batch_id, [batch_id, session_id, window_id, address, address, envelope_id, b"", 0, 0, now]
        )
        batch[4], batch[5] = address, envelope_id
        batch[6] = later_activity(batch[6], activity)
        batch[7] = is_final
        batch[8] += events
    for batch in batches.values():
        _insert(target, "batch", tuple(batch))


def _restore_sequences(source: apsw.Connection, target: apsw.Connection) -> None:
    """Keep ids that were used, and are gone, from being used again."""
    with suppress(apsw.Error):
        for name, last in source.execute("SELECT name, seq FROM sqlite_sequence").fetchall():
            target.execute("DELETE FROM sqlite_sequence WHERE name = ? AND seq < ?", (name, last))
            target.execute(
                "INSERT INTO sqlite_sequence SELECT ?1, ?2"
                " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?1)",
                (name, last),
            )


def _balance(source: apsw.Connection, target: apsw.Connection, now: float) -> tuple[int, bool]:
    """Set the counters (rule 3); returns how many events are missing, and if the counters could be read."""
    counters: dict[str, int] = dict.fromkeys(schema.COUNTERS, 0)
    try:
        counters |= {str(name): int(value) for name, value in source.execute("SELECT name, value FROM counter")}
        has_counters = True
    except (apsw.Error, TypeError, ValueError):
        has_counters = False
    for counter, value in counters.items():
        target.execute("UPDATE counter SET value = ? WHERE name = ?", (value, counter))
    account = read_account(target, now)
    gone = account.delivered + account.purged + account.shed
    missing = account.accepted - gone - account.spooled - account.dead_lettered
    name = "purged" if missing > 0 else "accepted"
    target.execute("UPDATE counter SET value = value + ? WHERE name = ?", (abs(missing), name))
    return max(missing, 0), has_counters


# -- files


def _exchange(path: Path, finished: Path, aside: Path) -> None:
    """Put the new database in the place of the damaged one. Until the last step no relay starts on either."""
    for suffix in ("-wal", ""):  # the log first: without its database nobody takes it for another's
        old = Path(f"{path}{suffix}")
        if old.exists():
            old.rename(f"{aside}{suffix}")
    _remove(path)
    finished.rename(path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    """Remove a database of ours that is in the way, with what SQLite has beside it."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
