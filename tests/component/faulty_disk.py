"""A disk that refuses what it is told to refuse, as a SQLite VFS over the real one."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import apsw

_NUMBERS = itertools.count(1)

FULL = apsw.FullError
"""ENOSPC, as SQLite reports it."""

BROKEN = apsw.IOError
"""EIO."""

READ_ONLY = apsw.ReadOnlyError
"""A file system that was mounted again, read-only."""


class FaultyDisk(apsw.VFS):
    """The real disk, until told otherwise. Open a database on it by its `name`."""

    def __init__(self) -> None:
        self.name = f"faulty-{next(_NUMBERS)}"
        self._refusals: dict[str, type[apsw.Error]] = {}
        self.refused = 0
        """Operations."""
        self.unreadable = range(0)
        """Places in a database that cannot be read any more, as one with a bad sector."""
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> _File:  # noqa: N802 - SQLite's
        """Open a file on it."""
        return _File(self, name, flags)

    def break_down(self, error: type[apsw.Error], *operations: str) -> None:
        """Refuse operations from now on: all that change something, or some of `write`, `sync` and `truncate`."""
        self._refusals = dict.fromkeys(operations or ("write", "sync", "truncate"), error)

    def recover(self) -> None:
        """Be the real disk again."""
        self._refusals = {}

    def admit(self, operation: str) -> None:
        """Raise what the operation is refused with, if it is."""
        error = self._refusals.get(operation)
        if error is not None:
            self.refused += 1
            raise error(errno.errorcode[errno.ENOSPC if error is FULL else errno.EIO])


class _File(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._is_database = bool(flags[0] & apsw.SQLITE_OPEN_MAIN_DB)
        super().__init__("", name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802 - SQLite's
        if self._is_database and offset in self._disk.unreadable:
            self._disk.refused += 1
            raise apsw.exception_for(apsw.SQLITE_IOERR_CORRUPTFS)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - SQLite's
        self._disk.admit("write")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's
        self._disk.admit("sync")
        super().xSync(flags)

    def xTruncate(self, size: int) -> None:  # noqa: N802 - SQLite's
        self._disk.admit("truncate")
        super().xTruncate(size)


@contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    """Register a disk for as long as something is open on it."""
    disk = FaultyDisk()
    try:
        yield disk
    finally:
        disk.recover()
        disk.unregister()
