"""The spool's database: its tables, its settings, its version, and who may open it.

On disk, in the spool directory (0700):

    spool.sqlite3   the database (0600), beside it SQLite's -wal and -shm
    lock            held by the relay that owns the directory
    reserve         room kept for draining (`reserve.py`)

Rules:
1. A segment's description and its bytes are two rows: descriptions are small and lie in the order of their window, so
   that the cut and a restart read them without touching a byte of events.
2. `segment.batch_id` is null while the segment is pending. It is set when a cut is sealed, and changed only when
   upstream has refused that batch and it is cut into smaller ones.
3. `counter` holds what cannot be recomputed (events accepted, delivered, …); what lies in the spool is counted there.
4. `mark` remembers client batches for longer than their events are kept. Row ids grow with time, so old marks are
   found without an index. `block` is where a batch's events are numbered, its sequence but for clients that reuse one;
   only these have an entry in the second index.
5. Row ids that live in memory too (key, session, window, batch), or that an operator has seen (dead letter), are never
   used twice.
6. `attempt` remembers the sends of the last minute, so that a restart spends no budget twice; `key.paused_until` what
   upstream said in `Retry-After`, so that a restart does not ask sooner.
7. `session.refusals` counts the batches of the session that upstream called invalid since it last took one.
8. A dead letter's row is its segment's, moved; its body and envelope stay where they are.
9. `segment.crc` is of the events, for the upstream body; `body.crc` is of the bytes as they lie on the disk, and held
   against them whenever they are read.
10. A batch bears the envelope of its last segment, whatever `batch.merge` says when it is sent. `envelope.pageless` is
    the digest of all but the page; envelopes that agree in it may share a batch where pages are merged.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

import apsw

from relay.errors import SpoolLocked, SpoolSchemaMismatch, SpoolUnavailable

SCHEMA_VERSION = 3
"""Kept in `user_version`. A change of any table below is a new version."""

APPLICATION_ID = 0x4C52_6C79
"""`LRly`: tells `file` and us whose database it is."""

DATABASE_NAME = "spool.sqlite3"
LOCK_NAME = "lock"
SALVAGED_NAME = "spool.sqlite3.salvaged"
"""What a salvage has saved, until it is in its place (`salvage.py`)."""

_PAGE_BYTES = 16_384
"""A compressed segment of 1 to 5 KB lies on one page with others instead of on a chain of overflow pages."""

_CACHE_KIB = 8_192
"""The pages that 1 000 sessions at a time write to, with room; 16 MiB are no faster. Bounds SQLite's memory."""

_WAL_LIMIT_BYTES = 67_108_864
"""To this size the log is cut back after a checkpoint, once a burst has made it longer."""

_TABLES = """
CREATE TABLE key (id INTEGER PRIMARY KEY AUTOINCREMENT, secret TEXT NOT NULL UNIQUE, paused_until REAL NOT NULL);
CREATE TABLE session (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key_id INTEGER NOT NULL, name TEXT NOT NULL, refusals INTEGER NOT NULL,
    UNIQUE (key_id, name));
CREATE TABLE window (
    id INTEGER PRIMARY KEY AUTOINCREMENT, session_id INTEGER NOT NULL, name TEXT NOT NULL, shift INTEGER NOT NULL,
    UNIQUE (session_id, name));
CREATE TABLE envelope (
    id INTEGER PRIMARY KEY, window_id INTEGER NOT NULL, digest BLOB NOT NULL, pageless BLOB NOT NULL,
    head BLOB NOT NULL, tail BLOB NOT NULL, UNIQUE (window_id, digest));
CREATE TABLE mark (
    id INTEGER PRIMARY KEY, session_id INTEGER NOT NULL, block INTEGER NOT NULL, window_id INTEGER NOT NULL,
    first_index INTEGER NOT NULL, events INTEGER NOT NULL, sequence INTEGER NOT NULL, known_events INTEGER NOT NULL,
    known_in INTEGER NOT NULL, events_bytes INTEGER NOT NULL, crc INTEGER NOT NULL, is_final INTEGER NOT NULL,
    accepted_at REAL NOT NULL);
CREATE UNIQUE INDEX mark_block ON mark (session_id, block, window_id, first_index, events);
CREATE INDEX mark_moved ON mark (window_id, sequence) WHERE block <> sequence;
CREATE TABLE segment (
    window_id INTEGER NOT NULL, address INTEGER NOT NULL, events INTEGER NOT NULL, events_bytes INTEGER NOT NULL,
    deflated_bytes INTEGER NOT NULL, crc INTEGER NOT NULL, envelope_id INTEGER NOT NULL, last_activity BLOB NOT NULL,
    is_final INTEGER NOT NULL, accepted_at REAL NOT NULL, batch_id INTEGER, body_id INTEGER NOT NULL,
    PRIMARY KEY (window_id, address)) WITHOUT ROWID;
CREATE TABLE body (id INTEGER PRIMARY KEY, crc INTEGER NOT NULL, deflated BLOB NOT NULL);
CREATE TABLE batch (
    id INTEGER PRIMARY KEY AUTOINCREMENT, session_id INTEGER NOT NULL, window_id INTEGER NOT NULL,
    address INTEGER NOT NULL, last_address INTEGER NOT NULL, envelope_id INTEGER NOT NULL, last_activity BLOB NOT NULL,
    is_final INTEGER NOT NULL, events INTEGER NOT NULL, sealed_at REAL NOT NULL);
CREATE INDEX batch_session ON batch (session_id);
CREATE TABLE dead_letter (
    id INTEGER PRIMARY KEY AUTOINCREMENT, window_id INTEGER NOT NULL, address INTEGER NOT NULL,
    events INTEGER NOT NULL, events_bytes INTEGER NOT NULL, deflated_bytes INTEGER NOT NULL, crc INTEGER NOT NULL,
    envelope_id INTEGER NOT NULL, last_activity BLOB NOT NULL, is_final INTEGER NOT NULL, accepted_at REAL NOT NULL,
    body_id INTEGER NOT NULL, bytes INTEGER NOT NULL, status INTEGER NOT NULL, answer TEXT NOT NULL,
    died_at REAL NOT NULL);
CREATE INDEX dead_letter_window ON dead_letter (window_id, envelope_id);
CREATE TABLE attempt (key_id INTEGER NOT NULL, at REAL NOT NULL);
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""

COUNTERS = ("accepted", "delivered", "purged", "shed_dead_letters", "shed_sessions")
"""The events of law 2, but for those that are on the disk: spooled or dead letters."""

_LOG_PAGES = 1_000
"""Of the log, at which it is carried over into the database: SQLite's own default, 16 MiB. Fewer cost throughput."""


def lock_directory(directory: Path) -> int:
    """Create the spool directory where needed and take its lock; returns the lock's file descriptor.

    The kernel gives the lock up with the process, so a crash leaves nothing to clean.

    Durability: A directory that is made here is there after a power cut.

    Raises:
        SpoolLocked: Another process has it.
        SpoolUnavailable: The directory cannot be made or written.
    """
    try:
        missing = [place for place in (directory, *directory.parents) if not place.exists()]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for made in reversed(missing):
            _sync_directory(made.parent)
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SpoolUnavailable(f"spool directory {directory} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise SpoolLocked(
            f"spool directory {directory} is in use by another relay (process {owner or 'unknown'}): "
            "stop it, or give this one another spool.directory"
        ) from error
    with suppress(OSError):  # whose it is, for people: a full disk has no room for that, and must not matter here
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _sync_directory(directory: Path) -> None:
    """Make durable which names a directory has: syncing a file keeps its content, not the way to it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_database(
    path: Path, durability: Literal["fsync", "os"], vfs: str | None = None, reserve_bytes: int = 0
) -> apsw.Connection:
    """Open the database for writing, making its tables where it is new.

    Args:
        path: The database file; made with mode 0600.
        durability: `fsync` syncs every commit; `os` leaves commits to the operating system's cache.
        vfs: Name of a SQLite VFS, for tests that simulate failing disks.
        reserve_bytes: Half of this the log may take before it is carried over (`reserve.py`, 3); 0: what SQLite thinks.

    Durability: A database that is made here is there after a power cut; its log, too, once something is committed.

    Raises:
        SpoolSchemaMismatch: It holds another version's tables, or is no spool.
        SpoolUnavailable: It cannot be read or written.
    """
    if path.with_name(SALVAGED_NAME).exists():
        raise SpoolUnavailable(f"the salvage of {path} was interrupted: run `lucent-relay spool salvage` once more")
    try:
        if vfs is None:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = apsw.Connection(str(path), vfs=vfs)
        is_new = _is_new(connection, path)  # before the pragmas, which change what is not ours too
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if durability == 'fsync' else 'NORMAL'}")
        for pragma in ("fullfsync", "checkpoint_fullfsync"):  # else macOS leaves it in the drive's cache
            connection.execute(f"PRAGMA {pragma} = {durability == 'fsync'}")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
        log_pages = min(_LOG_PAGES, reserve_bytes // 2 // _PAGE_BYTES) or _LOG_PAGES
        connection.execute(f"PRAGMA wal_autocheckpoint = {log_pages}")
        if is_new:
            _create_tables(connection)
            _sync_directory(path.parent)
    except OSError as error:
        raise SpoolUnavailable(f"spool database {path} cannot be opened: {error.strerror}") from error
    except apsw.NotADBError as error:
        raise SpoolSchemaMismatch(
            f"{path} is not a spool database: if it was one, `lucent-relay spool salvage` saves what can be read; if "
            "not, move it away, or give the relay another spool.directory"
        ) from error
    except apsw.CorruptError as error:
        raise SpoolUnavailable(
            f"spool database {path} is damaged, it cannot be opened ({error}): `lucent-relay spool salvage` saves what "
            "can be read"
        ) from error
    except apsw.Error as error:
        raise SpoolUnavailable(f"spool database {path} cannot be opened: {error}") from error
    return connection


def _is_new(connection: apsw.Connection, path: Path) -> bool:
    """Return whether the database has no tables yet; changes nothing.

    Raises:
        SpoolSchemaMismatch: It has some that are not ours.
    """
    version = connection.pragma("user_version")
    owner = connection.pragma("application_id")
    if version == 0 and owner == 0 and not connection.execute("SELECT 1 FROM sqlite_schema").fetchall():
        return True
    if owner != APPLICATION_ID:
        raise SpoolSchemaMismatch(f"{path} is the database of another program: give the relay another spool.directory")
    if version != SCHEMA_VERSION:
        raise SpoolSchemaMismatch(
            f"{path} has schema version {version}, this relay writes version {SCHEMA_VERSION}: run the release that "
            "wrote it until `lucent-relay status` shows nothing spooled, or give this one another spool.directory"
        )
    return False


def check_version(connection: apsw.Connection, path: Path) -> None:
    """See that a database has our tables.

    Raises:
        SpoolSchemaMismatch: It has others.
        SpoolUnavailable: It has none yet.
    """
    if _is_new(connection, path):
        raise SpoolUnavailable(f"{path} is empty")


def _create_tables(connection: apsw.Connection) -> None:
    with connection:
        connection.execute(_TABLES)
        connection.executemany("INSERT INTO counter VALUES (?, 0)", [(name,) for name in COUNTERS])
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", SCHEMA_VERSION)


def open_reader(path: Path, vfs: str | None = None) -> apsw.Connection:
    """Open a second connection that only reads, beside the writer's."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs=vfs)
    connection.set_busy_timeout(1_000)
    connection.pragma("user_version")  # opens the log by its name now, while that leads to the same database
    return connection


def free_bytes(connection: apsw.Connection) -> int:
    """Return what the file system has left for a database, its pages that wait for re-use included."""
    directory = Path(connection.filename).parent
    if not directory.is_dir():
        return 0
    status = os.statvfs(directory)
    reusable: int = connection.pragma("freelist_count") * connection.pragma("page_size")
    return status.f_bavail * status.f_frsize + reusable


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file; None where there is none, or the disk cannot say."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
