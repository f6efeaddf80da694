"""The spool's transactions, as plain calls on one connection. Runs in the writer's thread, knows no trio.

Every method is one step of a group that `transact` makes durable: it runs between BEGIN and COMMIT, and counts as
done only when `transact` returns. None of them reads what a rolled-back step left in memory (`_reset`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw

from relay.errors import SpoolUnavailable
from relay.protocol.assemble import Piece, assemble
from relay.protocol.codings import SegmentDeflater, crc32, inflate_segment
from relay.protocol.cut import Cut, Limits, Pending, address, body_prefix, body_suffix, choose_cut, later_activity, take
from relay.protocol.node_json import split_events
from relay.protocol.replay import Envelope
from relay.protocol.schema import MAX_BATCH_EVENTS
from relay.spool.retention import Retention
from relay.spool.values import Appended, Load, NewBatch, PendingWindow, SealedBatch

_CACHE_ENTRIES = 5_000
"""Rows of windows and of envelopes remembered, about 500 bytes each; a miss costs a few index look-ups, 5 µs."""

_VACUUM_FLOOR_PAGES = 2_048
"""32 MiB of free pages are kept for the next burst before any is given back to the file system."""

_VACUUM_STEP_PAGES = 256
"""Pages given back with one commit: at most 4 MiB of copying, so no commit is held up for long."""

_DISK_ERRORS = (
    *(apsw.FullError, apsw.IOError, apsw.ReadOnlyError, apsw.CantOpenError, apsw.NoMemError, apsw.CorruptError),
    *(apsw.NotADBError, apsw.PermissionsError, apsw.ProtocolError, apsw.BusyError),
)
"""What is no step's fault and may pass, the last where an operator's tool has the database locked for a moment."""

Step = Callable[[], Any]


class Store:
    """One spool database and what is remembered of it in memory.

    Args:
        connection: From `schema.open_database`.
        limits: Of an upstream batch.
        max_keys: Distinct keys kept at a time.
    """

    def __init__(self, connection: apsw.Connection, limits: Limits, max_keys: int) -> None:
        self._db = connection
        self._limits = limits
        self._max_keys = max_keys
        self._deflater = SegmentDeflater()
        self.retention = Retention(connection, lambda: self._windows.clear())
        """What is remembered of batches, and for how long."""
        self._reset()

    def _reset(self) -> None:
        """Forget everything that a rolled-back transaction may have put into memory."""
        self._windows: OrderedDict[tuple[str, str, str], tuple[int, int, int, str]] = OrderedDict()
        self._envelopes: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        self._deltas: dict[str, int] = {}
        self._next_body = 0
        """Row of the next body; 0 where the disk has to be asked."""

    def _all(self, sql: str, bindings: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self._db.execute(sql, bindings).fetchall()

    def _row(self, sql: str, bindings: tuple[Any, ...]) -> tuple[Any, ...]:
        row: tuple[Any, ...]
        (row,) = self._db.execute(sql, bindings)
        return row

    def _one(self, sql: str, bindings: tuple[Any, ...] = ()) -> Any:
        """Return the first column of the first row, None where there is no row."""
        row = self._db.execute(sql, bindings).fetchone()
        return None if row is None else row[0]

    def close(self) -> None:
        """Close the connection; SQLite checkpoints its log."""
        self._db.close()

    # -- one group, one commit

    def transact(self, steps: Sequence[Step]) -> list[Any]:
        """Run steps in one transaction.

        Returns:
            A result a step: what it returned, or the exception that it raised. Where a step raises, the group is
            rolled back and each step run in a transaction of its own, so that one cannot spoil its neighbours; what
            the disk refuses then is a result too, since other steps are on disk already.

        Durability: on return, every step without an exception is on disk as `spool.durability` says.

        Raises:
            SpoolUnavailable: The disk refused; nothing of the group is stored.
        """
        try:
            return self._commit(steps)
        except _DISK_ERRORS as error:
            self._undo()
            raise SpoolUnavailable(f"the disk refused a write: {error}") from error
        except Exception as error:  # noqa: BLE001 - whatever a step raises is that step's result
            self._undo()
            if len(steps) == 1:
                return [error]
        return [self._alone(step) for step in steps]

    def _alone(self, step: Step) -> Any:
        """Run one step of a group that was rolled back; returns its result or its exception."""
        try:
            return self.transact([step])[0]
        except SpoolUnavailable as error:
            return error

    def _commit(self, steps: Sequence[Step]) -> list[Any]:
        self._db.execute("BEGIN IMMEDIATE")
        results = [step() for step in steps]
        for name, delta in self._deltas.items():
            self._db.execute("UPDATE counter SET value = value + ? WHERE name = ?", (delta, name))
        free = self._db.pragma("freelist_count")
        if free > _VACUUM_FLOOR_PAGES and free > self._db.pragma("page_count") // 4:
            self._db.execute(f"PRAGMA incremental_vacuum({_VACUUM_STEP_PAGES})").fetchall()
        self._db.execute("COMMIT")
        self._deltas.clear()
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
        path = Path(self._db.filename)
        if not path.parent.is_dir():
            return 0
        status = os.statvfs(path.parent)
        reusable: int = self._db.pragma("freelist_count") * self._db.pragma("page_size")
        return status.f_bavail * status.f_frsize + reusable

    # -- accepting

    def append(self, batch: NewBatch) -> Appended:
        """Store a client batch, unless it was stored before."""
        rows = self._window_rows(batch)
        if rows is None:
            return Appended("too_many_keys")
        key_id, session_id, window_id, key = rows
        first_index = 0
        for other, first, events in self._all(
            "SELECT window_id, first_index, events FROM mark WHERE session_id = ? AND sequence = ?",
            (session_id, batch.sequence),
        ):
            if other == window_id:
                return Appended("repeated", key_id, session_id, window_id, key)
            first_index = max(first_index, first + events)
        if first_index + batch.event_count > MAX_BATCH_EVENTS:
            return Appended("sequence_full")
        self._db.execute(
            "INSERT INTO mark VALUES (NULL, ?, ?, ?, ?, ?, ?)",
            (session_id, batch.sequence, window_id, first_index, batch.event_count, batch.accepted_at),
        )
        envelope_id = self._envelope_row(window_id, batch)
        last = len(batch.segments) - 1
        for position, segment in enumerate(batch.segments):
            body_id = self._add_body(segment.deflated)
            self._add_segment(
                window_id,
                address(batch.sequence, first_index + segment.index),
                segment.event_count,
                segment.events_bytes,
                segment.crc,
                envelope_id,
                batch.last_activity,
                batch.is_final and position == last,
                batch.accepted_at,
                body_id,
            )
        self._count("accepted", batch.event_count)
        return Appended("stored", key_id, session_id, window_id, key)

    def _window_rows(self, batch: NewBatch) -> tuple[int, int, int, str] | None:
        """Return the rows of key, session and window, made where needed, and the key; None for a key too many."""
        identity = (batch.key, batch.session_id, batch.window_id)
        rows = self._windows.get(identity)
        if rows is not None:
            self._windows.move_to_end(identity)
            return rows
        key = self._known_key(batch)
        key_id = self._one("SELECT id FROM key WHERE secret = ?", (key,))
        if key_id is None:
            if self._one("SELECT count(*) FROM key") >= self._max_keys:
                return None
            key_id = self._insert("INSERT INTO key VALUES (NULL, ?)", key)
        session_id = self._one("SELECT id FROM session WHERE key_id = ? AND name = ?", (key_id, batch.session_id))
        if session_id is None:
            session_id = self._insert("INSERT INTO session VALUES (NULL, ?, ?)", key_id, batch.session_id)
        window_id = self._one("SELECT id FROM window WHERE session_id = ? AND name = ?", (session_id, batch.window_id))
        if window_id is None:
            window_id = self._insert("INSERT INTO window VALUES (NULL, ?, ?)", session_id, batch.window_id)
        self._windows[identity] = rows = (key_id, session_id, window_id, key)
        if len(self._windows) > _CACHE_ENTRIES:
            self._windows.popitem(last=False)
        return rows

    def _known_key(self, batch: NewBatch) -> str:
        """Return the key of its pool under which a batch's session is known; the batch's own where it is new."""
        for key in (batch.key, *batch.other_keys) if batch.other_keys else ():
            known = "SELECT 1 FROM session JOIN key ON key.id = key_id WHERE secret = ? AND session.name = ?"
            if self._one(known, (key, batch.session_id)):
                return key
        return batch.key

    def _envelope_row(self, window_id: int, batch: NewBatch) -> int:
        identity = (window_id, batch.digest)
        envelope_id = self._envelopes.get(identity)
        if envelope_id is not None:
            return envelope_id
        envelope_id = self._one("SELECT id FROM envelope WHERE window_id = ? AND digest = ?", identity)
        if envelope_id is None:
            envelope_id = self._insert(
                "INSERT INTO envelope VALUES (NULL, ?, ?, ?, ?)", *identity, batch.envelope.head, batch.envelope.tail
            )
        self._envelopes[identity] = envelope_id
        if len(self._envelopes) > _CACHE_ENTRIES:
            self._envelopes.popitem(last=False)
        return envelope_id

    def _insert(self, sql: str, *bindings: Any) -> int:
        self._db.execute(sql, bindings)
        return int(self._db.last_insert_rowid())

    def _add_body(self, deflated: bytes) -> int:
        body_id: int = self._next_body or self._one("SELECT coalesce(max(id), 0) + 1 FROM body")
        self._next_body = body_id + 1
        self._db.execute("INSERT INTO body VALUES (?, ?)", (body_id, deflated))
        return body_id

    def _add_segment(self, *columns: Any) -> None:
        self._db.execute("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?)", columns)

    # -- cutting and sending

    def seal(self, window_id: int, now: float) -> Load | None:
        """Cut the window's next upstream batch, record the cut and the attempt, and return it.

        Args:
            window_id: Row of the window.
            now: Wall clock.

        Returns:
            None where nothing may be sent now: nothing is pending, or a final waits for the rest of its session.
        """
        session_id, key_id = self._row(
            "SELECT session.id, key_id FROM window JOIN session ON session.id = session_id WHERE window.id = ?",
            (window_id,),
        )
        rows = self._all(
            "SELECT address, events, events_bytes, envelope_id, last_activity, is_final, crc, body_id, accepted_at"
            " FROM segment WHERE window_id = ? AND batch_id IS NULL ORDER BY address LIMIT ?",
            (window_id, self._limits.max_events + 1),
        )
        if not rows:
            return None
        pending = [Pending(*row[:6]) for row in rows]
        for first in range(len(rows)):
            envelope = self._envelope(pending[first].envelope_id)
            choice, is_final = self._choose(session_id, window_id, pending[first:], envelope)
            if choice.whole or choice.split_events:
                break
            # A final that has to wait. The window went on behind it, if at all; that goes first.
        else:
            return None
        end = first + choice.whole
        chosen = rows[first:end]
        if choice.split_events:
            part = self._split(window_id, rows[end], choice, envelope)
            if part is not None:
                chosen.append(part)
        left = rows[:first] or rows[end:]
        last_activity = b""
        for row in chosen:
            last_activity = later_activity(last_activity, row[4])
        sequence, last_address = chosen[0][0], chosen[-1][0]
        events = sum(row[1] for row in chosen)
        batch_id = self._insert(
            "INSERT INTO batch VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            *(session_id, window_id, sequence, last_address, pending[first].envelope_id),
            *(last_activity, is_final, events, now),
        )
        self._db.execute(
            "UPDATE segment SET batch_id = ? WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id IS NULL",
            (batch_id, window_id, sequence, last_address),
        )
        self._record_attempt(key_id, now)
        next_is_closed = any(row[3] != left[0][3] for row in left)
        return self._load(batch_id, left[0][8] if left else None, next_is_closed=next_is_closed)

    def _choose(self, session_id: int, window_id: int, pending: list[Pending], envelope: Envelope) -> tuple[Cut, bool]:
        """Choose the cut, and whether it is sent as the final of its session.

        A final waits until it is all that the session has left. If another final of the session is pending behind it,
        that one will end the session, and this one goes as a normal batch: they would wait for each other.
        """
        choice = choose_cut(pending, envelope, self._limits, allow_final=True)
        if choice.whole == 0 or not pending[choice.whole - 1].is_final:
            return choice, False
        in_session = self._one(
            "SELECT count(*) FROM (SELECT 1 FROM window JOIN segment ON segment.window_id = window.id"
            " WHERE window.session_id = ? LIMIT ?)",
            (session_id, choice.whole + 1),
        )
        if in_session == choice.whole:
            return choice, True
        later_final = self._one(
            "SELECT 1 FROM window JOIN segment ON segment.window_id = window.id WHERE window.session_id = ?"
            " AND batch_id IS NULL AND is_final AND (address, window.id) > (?, ?) LIMIT 1",
            (session_id, pending[choice.whole - 1].address, window_id),
        )
        if later_final:
            return choice, False
        return choose_cut(pending, envelope, self._limits, allow_final=False), False

    def _split(self, window_id: int, row: tuple[Any, ...], choice: Cut, envelope: Envelope) -> tuple[Any, ...] | None:
        """Split a pending segment at an event boundary; returns its first part's row, None where no event fits."""
        start, count, events_bytes, envelope_id, last_activity, is_final, _, body_id, accepted_at = row
        run = inflate_segment(self._one("SELECT deflated FROM body WHERE id = ?", (body_id,)), events_bytes)
        events = split_events(run)
        taken = take(events, 0, choice.split_events, choice.split_bytes)
        if taken == 0 and choice.whole:
            return None
        # Never all of it, though the blanks between events that are dropped here could make it fit: the cut went by the
        # stored size, and by that decided whether this ends the session.
        taken = min(max(taken, 1), count - 1)
        self._db.execute("DELETE FROM segment WHERE window_id = ? AND address = ?", (window_id, start))
        self._db.execute("DELETE FROM body WHERE id = ?", (body_id,))
        parts = []
        for first, part in ((0, events[:taken]), (taken, events[taken:])):
            part_run = b",".join(part)
            ends = bool(is_final) and first > 0
            columns = (start + first, len(part), len(part_run), crc32(part_run), envelope_id, last_activity)
            part_body = self._add_body(self._deflater.deflate(part_run))
            self._add_segment(window_id, *columns, ends, accepted_at, part_body)
            parts.append((*columns[:3], envelope_id, last_activity, ends, columns[3], part_body, accepted_at))
        return parts[0]

    def _envelope(self, envelope_id: int) -> Envelope:
        return Envelope(*self._row("SELECT head, tail FROM envelope WHERE id = ?", (envelope_id,)))

    def load(self, batch_id: int, now: float) -> Load:
        """Return a sealed batch to be sent again, and record the attempt."""
        load = self._load(batch_id)
        self._record_attempt(load.batch.key_id, now)
        return load

    def _load(self, batch_id: int, next_oldest_at: float | None = None, *, next_is_closed: bool = False) -> Load:
        sealed, envelope_id, last_activity = self._sealed(batch_id)
        pieces = [
            Piece(*row)
            for row in self._all(
                "SELECT deflated, crc, events_bytes FROM segment JOIN body ON body.id = body_id"
                " WHERE window_id = ? AND batch_id = ? ORDER BY address",
                (sealed.window_id, batch_id),
            )
        ]
        prefix = body_prefix(self._envelope(envelope_id), last_activity, sealed.sequence)
        body = assemble(prefix, pieces, body_suffix(is_final=sealed.is_final))
        return Load(sealed, body, next_oldest_at, next_is_closed)

    def _sealed(self, batch_id: int) -> tuple[SealedBatch, int, bytes]:
        key_id, session_id, window_id, sequence, envelope_id, last_activity, is_final, events, last = self._row(
            "SELECT key_id, session_id, window_id, address, envelope_id, last_activity, is_final, events, last_address"
            " FROM batch JOIN session ON session.id = session_id WHERE batch.id = ?",
            (batch_id,),
        )
        segments, events_bytes, finals, oldest_at = self._row(
            "SELECT count(*), sum(events_bytes), sum(is_final), min(accepted_at) FROM segment"
            " WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id = ?",
            (window_id, sequence, last, batch_id),
        )
        sealed = SealedBatch(
            *(batch_id, key_id, session_id, window_id, sequence, events, segments, events_bytes),
            *(finals, bool(is_final), oldest_at),
        )
        return sealed, envelope_id, last_activity

    def _record_attempt(self, key_id: int, now: float) -> None:
        self._db.execute("INSERT INTO attempt VALUES (?, ?)", (key_id, now))

    def settle(self, batch_id: int) -> None:
        """Remove a batch that upstream has taken, with its segments and, where nothing else needs it, its envelope."""
        sealed, envelope_id, _ = self._sealed(batch_id)
        mine = (sealed.window_id, batch_id)
        self._db.execute(
            "DELETE FROM body WHERE id IN (SELECT body_id FROM segment WHERE window_id = ? AND batch_id = ?)", mine
        )
        self._db.execute("DELETE FROM segment WHERE window_id = ? AND batch_id = ?", mine)
        self._db.execute("DELETE FROM batch WHERE id = ?", (batch_id,))
        self._count("delivered", sealed.event_count)
        self._drop_envelope(sealed.window_id, envelope_id)

    def _drop_envelope(self, window_id: int, envelope_id: int) -> None:
        in_use = self._one(
            "SELECT 1 FROM segment WHERE window_id = ? AND envelope_id = ? LIMIT 1", (window_id, envelope_id)
        )
        if in_use is None:
            digest = self._one("DELETE FROM envelope WHERE id = ? RETURNING digest", (envelope_id,))
            self._envelopes.pop((window_id, digest), None)

    def park(self, batch_id: int, reason: str) -> None:
        """Leave a sealed batch in the spool, not to be sent as it is."""
        self._db.execute("UPDATE batch SET parked = ? WHERE id = ?", (reason, batch_id))

    # -- starting, and keeping house

    def key(self, key_id: int) -> str:
        """Return a key's secret."""
        return str(self._one("SELECT secret FROM key WHERE id = ?", (key_id,)))

    def pending_windows(self, after: int, max_windows: int) -> list[PendingWindow]:
        """Return windows that have unsealed segments: the first `max_windows` by row after the row `after`."""
        rows = self._all(
            "SELECT key_id, secret, session_id, found.window_id, events, bytes, oldest, finals, digest, envelopes FROM"
            " (SELECT window_id, sum(events) events, sum(events_bytes) bytes, min(accepted_at) oldest,"
            " sum(is_final) finals, max(envelope_id) newest, count(DISTINCT envelope_id) envelopes"
            " FROM segment WHERE window_id > ? AND batch_id IS NULL"
            " GROUP BY window_id ORDER BY window_id LIMIT ?) found"
            " JOIN window ON window.id = found.window_id JOIN session ON session.id = session_id"
            " JOIN key ON key.id = key_id JOIN envelope ON envelope.id = newest ORDER BY found.window_id",
            (after, max_windows),
        )
        return [PendingWindow(*row) for row in rows]

    def sealed_batches(self) -> list[SealedBatch]:
        """Return the batches that were sealed and neither settled nor parked."""
        rows = self._all("SELECT id FROM batch WHERE parked IS NULL ORDER BY id")
        return [self._sealed(batch_id)[0] for (batch_id,) in rows]

    def try_disk(self) -> None:
        """Write something that changes nothing: fails where the disk refuses writes."""
        self._db.execute("UPDATE counter SET value = value")
