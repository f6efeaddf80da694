"""Groups of steps that share a transaction, and what a transaction does for the disk besides.

Runs in the writer's thread, knows no trio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import apsw

from relay.errors import SpoolDamaged, SpoolUnavailable
from relay.spool.reserve import Reserve, carry_over
from relay.spool.rows import first_value
from relay.spool.schema import free_bytes

_VACUUM_FLOOR_PAGES = 2_048
"""32 MiB of free pages are kept for the next burst before any is given back to the file system."""

_VACUUM_STEP_PAGES = 256
"""Pages given back with one commit: at most 4 MiB of copying, so no commit is held up for long."""

_DISK_ERRORS = (
    *(apsw.FullError, apsw.IOError, apsw.ReadOnlyError, apsw.CantOpenError, apsw.NoMemError),
    *(apsw.PermissionsError, apsw.ProtocolError, apsw.BusyError),
)
"""What is no step's fault and may pass, the last where an operator's tool has the database locked for a moment."""

_UNREADABLE = (apsw.SQLITE_IOERR_READ, apsw.SQLITE_IOERR_CORRUPTFS, apsw.SQLITE_IOERR_DATA)
"""Kinds of `IOError` that a place which the disk cannot read any more leads to, whatever else still works."""

DAMAGE = (apsw.CorruptError, apsw.NotADBError)
"""What does not pass, and is met only by steps that need the damaged page."""

T = TypeVar("T")

Step = Callable[[], Any]


class _CannotShrink(Exception):
    """A page that would have to be moved, for others to be given back, is damaged."""


class Transactions:
    """The writer's connection.

    Args:
        connection: From `schema.open_database`.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._db = connection
        self._one = partial(first_value, connection)
        self.path = Path(connection.filename)
        """Of the database."""
        self._deltas: dict[str, int] = {}
        """Of the counters, by this transaction."""
        self._has_shrunk = False
        """Whether pages were given back that the file still has."""
        self._may_shrink = True
        self.shrink_damage: SpoolDamaged | None = None
        """Why no pages are given back any more, until somebody takes note of it and sets it to None."""

    def _reset(self) -> None:
        """Forget everything that a rolled-back transaction may have put into memory."""
        self._deltas.clear()

    def _all(self, sql: str, bindings: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self._db.execute(sql, bindings).fetchall()

    def _row(self, sql: str, bindings: tuple[Any, ...]) -> tuple[Any, ...]:
        row: tuple[Any, ...]
        (row,) = self._db.execute(sql, bindings)
        return row

    def close(self) -> None:
        """Close the connection; SQLite checkpoints its log."""
        self._db.close()

    def transact(self, steps: Sequence[Step]) -> list[Any]:
        """Run steps in one transaction.

        Returns:
            A result a step: what it returned, or the exception that it raised, `SpoolDamaged` where it needs what
            the disk cannot give. Where a step raises, the group is rolled back and each step run in a transaction of
            its own, so that one cannot spoil its neighbours; what the disk refuses then is a result too, since other
            steps are on disk already.

        Durability: on return, every step without an exception is on disk as `spool.durability` says.

        Raises:
            SpoolUnavailable: The disk refused; nothing of the group is stored.
        """
        try:
            return self._commit(steps)
        except _DISK_ERRORS as error:
            self._undo()
            if not _is_unreadable(error) or not self._takes_writes():
                raise SpoolUnavailable(f"the disk refused a write: {error}") from error
            # A disk that works, but for a place that one of the steps needs: that one fails every time, as by damage.
            # What it needs is not set aside for that, since one day it may be read again.
            if len(steps) == 1:
                return [_damaged(error)]
        except _CannotShrink as error:  # which is no step's fault, and must not keep them from being committed
            self._undo()
            self._may_shrink, self.shrink_damage = False, _damaged(error)
            return self.transact(steps)
        except Exception as error:  # noqa: BLE001 - whatever a step raises is that step's result
            self._undo()
            if len(steps) == 1:
                return [_damaged(error) if isinstance(error, DAMAGE) else error]
        return [self._alone(step) for step in steps]

    def _takes_writes(self) -> bool:
        """Return whether the disk takes a transaction that changes nothing."""
        try:
            with self._db:
                self.try_disk()
        except apsw.Error:
            self._undo()
            return False
        return True

    def _alone(self, step: Step) -> Any:
        """Run one step of a group that was rolled back; returns its result or its exception."""
        try:
            return self.transact([step])[0]
        except SpoolUnavailable as error:
            return error

    def _commit(self, steps: Sequence[Step]) -> list[Any]:
        self._db.execute("BEGIN IMMEDIATE")
        changes = self._db.total_changes()
        results = [step() for step in steps]
        for name, delta in self._deltas.items():
            self._db.execute("UPDATE counter SET value = value + ? WHERE name = ?", (delta, name))
        free = self._db.pragma("freelist_count")
        is_shrinking = self._may_shrink and free > _VACUUM_FLOOR_PAGES and free > self._db.pragma("page_count") // 4
        if is_shrinking:
            try:
                self._db.execute(f"PRAGMA incremental_vacuum({_VACUUM_STEP_PAGES})").fetchall()
            except apsw.CorruptError as error:
                raise _CannotShrink(str(error)) from error
        try:
            self._db.execute("COMMIT")
        except apsw.CorruptError:  # SQLite has rolled back
            if self._db.total_changes() != changes:
                raise
            # The steps have only read, around a damaged page: their results hold.
        self._deltas.clear()
        # The file is cut only when the log is carried over, which could otherwise be hours away.
        self._has_shrunk = is_shrinking or (self._has_shrunk and not carry_over(self._db))
        return results

    def _undo(self) -> None:
        self._reset()
        if self._db.in_transaction:
            # A disk that refuses this too leaves the transaction to the next BEGIN, which fails and comes here again.
            with suppress(apsw.Error):
                self._db.execute("ROLLBACK")

    def _count(self, name: str, events: int) -> None:
        self._deltas[name] = self._deltas.get(name, 0) + events

    def used_bytes(self) -> int:
        """Return the bytes of pages in use; those of the file that wait for re-use are not counted."""
        pages: int = self._db.pragma("page_count") - self._db.pragma("freelist_count")
        return pages * int(self._db.pragma("page_size"))

    def free_bytes(self) -> int:
        """Return what the file system has left for us, pages waiting for re-use included."""
        return free_bytes(self._db)

    def make_room(self, reserve: Reserve) -> None:
        """Give back to the file system what can be, and take the reserve."""
        reserve.make_room(self._db)

    def try_disk(self) -> None:
        """Write something that changes nothing: fails where the disk refuses writes."""
        self._db.execute("UPDATE counter SET value = value")


def _is_unreadable(error: Exception) -> bool:
    """Return whether an error is about one place that the disk cannot read."""
    return isinstance(error, apsw.IOError) and getattr(error, "extendedresult", 0) in _UNREADABLE


def read(call: Callable[[], T]) -> T:
    """Return what a call on a reading connection returns.

    Raises:
        SpoolDamaged: What it needs lies on a damaged page, or where the disk cannot read.
        SpoolUnavailable: The disk refused.
    """
    try:
        return call()
    except DAMAGE as error:
        raise _damaged(error) from error
    except apsw.Error as error:
        kind = SpoolDamaged if _is_unreadable(error) else SpoolUnavailable
        raise kind(f"the disk refused a read: {error}") from error


def _damaged(error: Exception) -> SpoolDamaged:
    damaged = SpoolDamaged(f"the spool is damaged: {error}")
    damaged.__cause__ = error
    return damaged
