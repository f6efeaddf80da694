"""What the disk has room for: the caps, the reserve, and what is wrong with it.

Rules:
1. The disk is looked at after commits, by the thread that makes them; what was seen last decides whether batches are
   accepted, and no batch waits for a look.
2. Only accepting stops. Whatever the spool holds may be sealed, sent and settled as long as the disk lets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import apsw
import msgspec
import structlog

from relay.config import Spool as SpoolSettings
from relay.errors import SpoolUnavailable
from relay.spool import schema
from relay.spool.reserve import Reserve
from relay.spool.transactions import Step, Transactions

_BUSY_STEPS = 16
"""Groups larger than this come one after the other."""

_MEASURE_COMMITS = 8
"""Of such groups every eighth measures the disk, which costs as much as two batches. Eight hold 64 MiB at most."""

_TIGHT_SHARE = 20
"""A cap is near within a twentieth of it: of 10 GiB 512 MiB, which full load takes some ten seconds to fill."""

log = structlog.get_logger()


class Disk(msgspec.Struct, frozen=True, gc=False):
    """The disk, as it was when it was last looked at."""

    used_bytes: int
    """Pages in use."""
    free_bytes: int
    """Left on the file system, and in pages that wait for re-use."""
    has_reserve: bool
    """Whether there is room for more than draining."""
    is_gone: bool
    """Whether the path leads to another database than the open one, or to none."""


class Capacity:
    """The disk's room, and whether it works.

    Concurrency: trio's thread, but for `commit`, which runs in the writer's, one at a time.

    Args:
        store: Whose disk it is.
        settings: Its caps.
        reserve: Kept for draining.
    """

    def __init__(self, store: Transactions, settings: SpoolSettings, reserve: Reserve) -> None:
        self._store = store
        self._settings = settings
        self._reserve = reserve
        self._file = schema.file_identity(store.path)
        self._commits = 0
        self.failure = ""
        """Why the last commit failed, if it did."""
        self._told: Literal["", "full", "trouble"] = ""
        """What keeps batches out, as the log has it."""
        self.disk = Disk(0, 0, has_reserve=True, is_gone=False)
        self.disk = self._look()

    @property
    def has_reserve(self) -> bool:
        """Whether there is room for more than draining, as the writer's thread knows it."""
        return self._reserve.is_held

    @property
    def refusal(self) -> str:
        """Why new batches are refused now, for people; empty while they are accepted."""
        disk, max_bytes, floor = self.disk, self._settings.max_bytes, self._settings.min_free_bytes
        if self._trouble:
            return self._trouble
        if disk.used_bytes >= max_bytes:
            return f"spool is full: {disk.used_bytes} of {max_bytes} bytes (spool.max_bytes)"
        if disk.free_bytes < floor:
            return f"disk is low: {disk.free_bytes} bytes free, under {floor} (spool.min_free_bytes)"
        return ""

    @property
    def is_tight(self) -> bool:
        """Whether a cap is so near that sessions have to go, where the operator wants that."""
        return self._settings.overflow == "shed-sessions" and not self._trouble and self._is_near_cap

    @property
    def _is_near_cap(self) -> bool:
        max_bytes, floor = self._settings.max_bytes, self._settings.min_free_bytes
        return (
            self.disk.used_bytes >= max_bytes - max_bytes // _TIGHT_SHARE
            or self.disk.free_bytes < floor + floor // _TIGHT_SHARE
        )

    @property
    def _trouble(self) -> str:
        """What is wrong with the disk beyond its being full as foreseen."""
        if self.disk.is_gone:
            return (
                "spool directory was removed or replaced: what this relay still has open is delivered, and is lost "
                "when it ends; it accepts nothing before the same directory is back, or it is started again"
            )
        if self.failure:
            return self.failure
        if not self.disk.has_reserve:
            reserve = self._settings.reserve_bytes
            return (
                f"disk is full: the {reserve} bytes kept for draining (spool.reserve_bytes) are given up until twice "
                "as much is free"
            )
        return ""

    def commit(self, steps: Sequence[Step]) -> tuple[list[Any], Disk]:
        """Commit steps and look at the disk; where that is full, give up the reserve and try again.

        Raises:
            SpoolUnavailable: The disk refused; nothing is stored.
        """
        try:
            results = self._store.transact(steps)
        except SpoolUnavailable as error:
            if not isinstance(error.__cause__, apsw.FullError | apsw.IOError) or not self._reserve.give_up():
                raise
            self._store.make_room(self._reserve)
            results = self._store.transact(steps)  # but for batches: they find the reserve given up
        self._commits += 1
        if not self._reserve.is_held:
            self._store.make_room(self._reserve)
        elif len(steps) > _BUSY_STEPS and self._commits % _MEASURE_COMMITS:
            return results, self.disk
        return results, self._look()

    def _look(self) -> Disk:
        has_reserve, is_gone = self._reserve.is_held, schema.file_identity(self._store.path) != self._file
        try:
            return Disk(self._store.used_bytes(), self._store.free_bytes(), has_reserve, is_gone)
        except (apsw.Error, OSError):  # a disk that cannot say takes nothing more
            return Disk(self.disk.used_bytes, 0, has_reserve, is_gone)

    def note_commit(self, disk: Disk) -> None:
        """Take notice of a commit, and of the disk after it."""
        self.disk, self.failure = disk, ""
        self._tell()

    def note_failure(self, reason: str) -> None:
        """Take notice of a commit that the disk refused."""
        self.failure = reason
        self._tell()

    def _tell(self) -> None:
        """Say in the log when batches are refused, and when that is over: of a full spool, once it has some room."""
        refusal = self.refusal
        now: Literal["", "full", "trouble"] = "trouble" if self._trouble else "full" if refusal else ""
        if now == self._told or (self._told == "full" and not refusal and self._is_near_cap):
            return
        self._told = now
        if refusal:
            log.error("spool refuses batches", reason=refusal)
        else:
            log.warning("spool accepts batches again")


def open_database(path: Path, settings: SpoolSettings, vfs: str | None, reserve: Reserve) -> apsw.Connection:
    """Open the database; where the disk has no room even for that, by giving up the reserve.

    Raises:
        SpoolSchemaMismatch: See `schema.open_database`.
        SpoolUnavailable: See `schema.open_database`.
    """
    arguments = (path, settings.durability, vfs, settings.reserve_bytes)
    try:
        connection = schema.open_database(*arguments)
    except SpoolUnavailable:
        if not reserve.give_up():
            raise
        return schema.open_database(*arguments)
    reserve.take()
    return connection
