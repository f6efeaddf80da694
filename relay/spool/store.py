"""The spool's transactions, as plain calls on one connection. Runs in the writer's thread, knows no trio.

Every method is one step of a group that `transact` makes durable: it runs between BEGIN and COMMIT, and counts as
done only when `transact` returns. None of them reads what a rolled-back step left in memory (`_reset`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypeAlias

import apsw

from relay.errors import SpoolUnavailable
from relay.protocol.assemble import Piece, assemble
from relay.protocol.cut import (
    Cut,
    Limits,
    Pending,
    address,
    body_prefix,
    body_suffix,
    choose_cut,
    halve,
    later_activity,
    take,
)
from relay.protocol.replay import Envelope
from relay.spool.dead_letters import DeadLetters
from relay.spool.marks import Marks
from relay.spool.retention import Retention
from relay.spool.schema import free_bytes
from relay.spool.segments import Segments
from relay.spool.values import Appended, Load, NewBatch, PendingWindow, Recut, Refused, SealedBatch

_CACHE_ENTRIES = 5_000
"""Rows of windows remembered, about 500 bytes each; a miss costs a few index look-ups, 5 µs."""

_VACUUM_FLOOR_PAGES = 2_048
"""32 MiB of free pages are kept for the next burst before any is given back to the file system."""

_VACUUM_STEP_PAGES = 256
"""Pages given back with one commit: at most 4 MiB of copying, so no commit is held up for long."""

_MAX_REFUSALS = 10
"""Refusals of a session in a row up to which a refused segment is halved. Ten lead from a merged batch of 500 events
down to any one of them that is bad; and where everything is bad, they are all that is spent on finding that out."""

_DISK_ERRORS = (
    *(apsw.FullError, apsw.IOError, apsw.ReadOnlyError, apsw.CantOpenError, apsw.NoMemError, apsw.CorruptError),
    *(apsw.NotADBError, apsw.PermissionsError, apsw.ProtocolError, apsw.BusyError),
)
"""What is no step's fault and may pass, the last where an operator's tool has the database locked for a moment."""

_SELECT = (
    "SELECT address, events, events_bytes, envelope_id, last_activity, is_final, body_id, accepted_at FROM segment"
)
"""What a cut must know of a segment: the members of `Pending`, and two more."""

Step = Callable[[], Any]

_Rows: TypeAlias = tuple[int, int, int, str, int]
"""Rows of a key, a session and a window, the key, and the window's shift (`Marks`, rule 4)."""


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
        self._segments = Segments(connection)
        self._marks = Marks(connection)
        self.retention = Retention(connection, lambda: self._windows.clear())
        """What is remembered of batches, and for how long."""
        self.dead_letters = DeadLetters(connection, self._segments, self._count)
        """What upstream refuses for good."""
        self._reset()

    def _reset(self) -> None:
        """Forget everything that a rolled-back transaction may have put into memory."""
        self._windows: OrderedDict[tuple[str, str, str], _Rows] = OrderedDict()
        self._segments.reset()
        self.dead_letters.reset()
        self._deltas: dict[str, int] = {}

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
        return free_bytes(self._db)

    # -- accepting

    def append(self, batch: NewBatch) -> Appended:
        """Store a client batch, unless it was stored before."""
        rows = self._window_rows(batch)
        if rows is None:
            return Appended("too_many_keys")
        key_id, session_id, window_id, key, shift = rows
        place = self._marks.find_place(batch, session_id, window_id, shift)
        if place.outcome == "repeated":
            final = self._marks.end_with(place.mark_id) if batch.is_final else "as before"
            return Appended("repeated", *rows[:4], final=final)
        if place.outcome != "new":
            return Appended(place.outcome, earlier=place.earlier)
        self._marks.add(batch, session_id, window_id, place)
        if place.block - batch.sequence > shift:
            self._db.execute("UPDATE window SET shift = ? WHERE id = ?", (place.block - batch.sequence, window_id))
            self._windows.clear()  # a pool's keys may have led to the window several times
        envelope_id = self._segments.keep_envelope(window_id, batch.digest, batch.envelope)
        last = len(batch.segments) - 1
        for position, segment in enumerate(batch.segments):
            body_id = self._segments.add_body(segment.deflated)
            self._segments.add(
                window_id,
                address(place.block, place.first_index + segment.index),
                segment.event_count,
                segment.events_bytes,
                segment.crc,
                envelope_id,
                batch.last_activity,
                batch.is_final and position == last,
                batch.accepted_at,
                None,
                body_id,
            )
        self._count("accepted", batch.event_count)
        return Appended("stored", key_id, session_id, window_id, key)

    def _window_rows(self, batch: NewBatch) -> _Rows | None:
        """Return key, session and window, made where needed; None for a key too many."""
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
            session_id = self._insert("INSERT INTO session VALUES (NULL, ?, ?, 0)", key_id, batch.session_id)
        known = "SELECT id, shift FROM window WHERE session_id = ? AND name = ?"
        window_id, shift = self._db.execute(known, (session_id, batch.window_id)).fetchone() or (None, 0)
        if window_id is None:
            window_id = self._insert("INSERT INTO window VALUES (NULL, ?, ?, 0)", session_id, batch.window_id)
        self._windows[identity] = rows = (key_id, session_id, window_id, key, shift)
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

    def _insert(self, sql: str, *bindings: Any) -> int:
        self._db.execute(sql, bindings)
        return int(self._db.last_insert_rowid())

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
            f"{_SELECT} WHERE window_id = ? AND batch_id IS NULL ORDER BY address LIMIT ?",
            (window_id, self._limits.max_events + 1),
        )
        if not rows:
            return None
        pending = [Pending(*row[:6]) for row in rows]
        for first in range(len(rows)):
            envelope = self._segments.envelope(pending[first].envelope_id)
            choice, is_final = self._choose(session_id, window_id, pending[first:], envelope)
            if choice.whole or choice.split_events:
                break
            # A final that has to wait. The window went on behind it, if at all; that goes first.
        else:
            return None
        end = first + choice.whole
        chosen = rows[first:end]
        if choice.split_events:
            part = self._split(window_id, rows[end], choice)
            if part is not None:
                chosen.append(part)
        left = rows[:first] or rows[end:]
        batch_id = self._add_batch(session_id, window_id, chosen, now, is_final=is_final)
        self._record_attempt(key_id, now)
        next_is_closed = any(row[3] != left[0][3] for row in left)
        return self._load(batch_id, left[0][7] if left else None, next_is_closed=next_is_closed)

    def _add_batch(
        self,
        session_id: int,
        window_id: int,
        chosen: Sequence[tuple[Any, ...]],
        now: float,
        *,
        is_final: bool,
        of_batch: int | None = None,
    ) -> int:
        """Record a cut of segments (`_SELECT`) that are unsealed, or all `of_batch`, and return its row."""
        last_activity = b""
        for row in chosen:
            last_activity = later_activity(last_activity, row[4])
        place = (window_id, chosen[0][0], chosen[-1][0])
        batch_id = self._insert(
            "INSERT INTO batch VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(session_id, *place, chosen[0][3], last_activity, is_final, sum(row[1] for row in chosen), now),
        )
        self._db.execute(
            "UPDATE segment SET batch_id = ? WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id IS ?",
            (batch_id, *place, of_batch),
        )
        return batch_id

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

    def _split(self, window_id: int, row: tuple[Any, ...], choice: Cut) -> tuple[Any, ...] | None:
        """Split a pending segment at an event boundary; returns its first part's row, None where no event fits."""
        start, count, events_bytes, *_ = row
        events = self._segments.events(row[6], events_bytes)
        taken = take(events, 0, choice.split_events, choice.split_bytes)
        if taken == 0 and choice.whole:
            return None
        # Never all of it, though the blanks between events that are dropped here could make it fit: the cut went by the
        # stored size, and by that decided whether this ends the session.
        self._segments.divide(window_id, start, events, min(max(taken, 1), count - 1))
        return self._row(f"{_SELECT} WHERE window_id = ? AND address = ?", (window_id, start))

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
        prefix = body_prefix(self._segments.envelope(envelope_id), last_activity, sealed.sequence)
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
        self._db.execute("UPDATE session SET refusals = 0 WHERE id = ? AND refusals", (sealed.session_id,))
        self._count("delivered", sealed.event_count)
        self._segments.drop_envelope(sealed.window_id, envelope_id)

    # -- what upstream refuses

    def refuse(self, batch_id: int, cut: Recut, status: int, answer: str, now: float, max_dead_bytes: int) -> Refused:
        """Cut a batch that upstream refuses into smaller ones, or make a dead letter of it where that helps no more.

        Nothing of the batch was stored upstream, so its number is free: the first part bears it again, and each other
        the address of its own first event.

        Args:
            batch_id: Row of the batch.
            cut: `alone`: each segment by itself, then halves. `halves`: halves, down to a single event.
            status: Upstream's.
            answer: The beginning of what upstream said.
            now: Wall clock.
            max_dead_bytes: What dead letters may take; the oldest are shed.
        """
        sealed, _, _ = self._sealed(batch_id)
        if cut == "alone":
            self._db.execute("UPDATE session SET refusals = refusals + 1 WHERE id = ?", (sealed.session_id,))
        ends = self._recut(sealed, cut)
        if not ends:
            self._db.execute("DELETE FROM batch WHERE id = ?", (batch_id,))
            self.dead_letters.bury(sealed.window_id, sealed.sequence, status, answer, now)
            return Refused((), sealed.event_count, self.dead_letters.shed(max_dead_bytes))
        rows = self._segments_of(sealed)
        parts = [
            self._add_batch(
                sealed.session_id,
                sealed.window_id,
                rows[start:end],
                now,
                is_final=sealed.is_final and end == len(rows),
                of_batch=batch_id,
            )
            for start, end in pairwise((0, *ends))
        ]
        self._db.execute("DELETE FROM batch WHERE id = ?", (batch_id,))
        return Refused(tuple(parts))

    def _recut(self, sealed: SealedBatch, cut: Recut) -> list[int]:
        """Divide the segment of a batch that has only one, where that may help; returns where parts end, or nothing."""
        rows = self._segments_of(sealed)
        if len(rows) > 1:
            return list(range(1, len(rows) + 1)) if cut == "alone" else [halve([row[2] for row in rows]), len(rows)]
        start, count, events_bytes, _, _, _, body_id, _ = rows[0]
        refusals = self._one("SELECT refusals FROM session WHERE id = ?", (sealed.session_id,))
        if count == 1 or (cut == "alone" and refusals > _MAX_REFUSALS):
            return []
        events = self._segments.events(body_id, events_bytes)
        taken = count // 2 if cut == "alone" else halve([len(event) for event in events])
        self._segments.divide(sealed.window_id, start, events, taken)
        return [1, 2]

    def _segments_of(self, sealed: SealedBatch) -> list[tuple[Any, ...]]:
        """Return the segments of a batch in order."""
        return self._all(
            f"{_SELECT} WHERE window_id = ? AND address >= ? AND batch_id = ? ORDER BY address",
            (sealed.window_id, sealed.sequence, sealed.batch_id),
        )

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
        """Return the batches that were sealed and not settled; those of one session in the order of sending."""
        rows = self._all("SELECT id FROM batch ORDER BY session_id, address")
        return [self._sealed(batch_id)[0] for (batch_id,) in rows]

    def try_disk(self) -> None:
        """Write something that changes nothing: fails where the disk refuses writes."""
        self._db.execute("UPDATE counter SET value = value")
