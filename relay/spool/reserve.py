"""The reserve: room on the disk that is kept for draining, so that a full disk can be emptied.

SQLite needs room to make room. A commit appends pages to the log, and the log can be used anew only once its pages are
in the database, which may have to grow for that. On a disk that is full to the last byte neither can happen, so nothing
could be settled, and what upstream takes would stay.

Rules:
1. The reserve is a file of really allocated bytes beside the database. It is given up when the disk refuses a write,
   and taken again when there is room for it twice: once for itself, once for what comes in then.
2. While it is not held, nothing is accepted. What room there is belongs to what makes more of it.
3. It is as large as what can be needed at once. The log is carried over (checkpointed) when it has half the reserve, by
   the group of steps that fills it to there, and a group takes less than the other half: 8 MiB of segments and some
   rows. Whatever of the log is new pages, the database grows by as much when it is carried over; and a log that is
   empty, as after a start, grows as far itself before it can be used anew.
4. It stays when the relay stops, since the next start may meet a full disk too.

On file systems that compress, deduplicate or copy on write, an allocated file promises less; there
`spool.min_free_bytes` has to be the reserve.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import apsw

RESERVE_NAME = "reserve"

_VACUUM_STEP_PAGES = 256
"""Pages given back at a time: at most 4 MiB of copying, which is what the log takes of the room that there is."""


class Reserve:
    """The reserve of one spool directory. One of 0 bytes is always held, and never there.

    Concurrency: the writer's thread, once the spool is open.

    Args:
        directory: Of the spool.
        size_bytes: Of the reserve.
    """

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._path = directory / RESERVE_NAME
        self._size_bytes = size_bytes
        self.is_held = self._is_allocated()
        """Whether the room is there. What an earlier run left counts."""
        if not self.is_held:
            self.give_up()

    def _is_allocated(self) -> bool:
        with suppress(OSError):
            status = self._path.stat()
            return status.st_size == self._size_bytes and status.st_blocks * 512 >= self._size_bytes
        return False

    def take(self) -> bool:
        """Allocate it, if there is room for it twice; returns whether it is held."""
        if self.is_held:
            return True
        with suppress(OSError):
            disk = os.statvfs(self._path.parent)
            if disk.f_bavail * disk.f_frsize < 2 * self._size_bytes:
                return False
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._size_bytes)
                self.is_held = True
            finally:
                os.close(descriptor)
                if not self.is_held:
                    self.give_up()
        return self.is_held

    def give_up(self) -> bool:
        """Give the room back to the file system; returns whether there was any to give."""
        had_any, self.is_held = self.is_held and self._size_bytes > 0, self._size_bytes == 0
        with suppress(OSError):
            self._path.unlink()
        return had_any

    def make_room(self, connection: apsw.Connection) -> None:
        """Give the log's room and free pages back to the file system, as far as they can be, and take the reserve.

        Args:
            connection: The writer's, between transactions.
        """
        if carry_over(connection) and connection.pragma("freelist_count"):
            with suppress(apsw.Error):  # there is a next time
                connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_STEP_PAGES})").fetchall()
            carry_over(connection)
        self.take()


def carry_over(connection: apsw.Connection) -> bool:
    """Bring the log into the database and cut both files to what they need; returns whether that could be done now.

    It cannot while there is no room even for that, or while somebody is reading.
    """
    try:
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.Error:
        return False
    return True
