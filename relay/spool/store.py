"""What the spool does with batches, as plain calls on one connection. Runs in the writer's thread, knows no trio.

Every method is one step of a group that `transact` makes durable: it runs between BEGIN and COMMIT, and counts as
done only when `transact` returns. None of them reads what a rolled-back step left in memory (`_reset`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import apsw

from relay.protocol.assemble import Piece, assemble
from relay.protocol.cut import (
    Cut,
    Limits,
    Parting,
    Pending,
    address,
    body_prefix,
    body_suffix,
    choose_cut,
    halve,
    later_activity,
    parting,
)
from relay.protocol.replay import Envelope
from relay.spool.dead_letters import DeadLetters
from relay.spool.leftovers import Leftovers
from relay.spool.marks import Marks
from relay.spool.overflow import Overflow
from relay.spool.quarantine import Quarantine, Unreadable, read_pieces
from relay.spool.retention import Retention
from relay.spool.segments import Segments
from relay.spool.transactions import Transactions
from relay.spool.values import Appended, Load, NewBatch, Recut, Refused, SealedBatch

_CACHE_ENTRIES = 5_000
"""Rows of windows remembered, about 500 bytes each; a miss costs a few index look-ups, 5 µs."""

_MAX_REFUSALS = 10
"""Refusals of a session in a row up to which a refused segment is halved. Ten lead from a merged batch of 500 events
down to any one of them that is bad; and where everything is bad, they are all that is spent on finding that out."""

_SELECT = (
    "SELECT address, events, events_bytes, envelope_id, last_activity, is_final, body_id, accepted_at, deflated_bytes"
    " FROM segment"
)
"""What a cut must know of a segment."""

_Rows: TypeAlias = tuple[int, int, int, str, int]
"""Rows of a key, a session and a window, the key, and the window's shift (`Marks`, rule 4)."""


class Store(Transactions):
    """One spool database and what is remembered of it in memory.

    Args:
        connection: From `schema.open_database`.
        limits: Of an upstream batch.
        max_keys: Distinct keys kept at a time.
    """

    def __init__(self, connection: apsw.Connection, limits: Limits, max_keys: int) -> None:
        super().__init__(connection)
        self._limits = limits
        self._max_keys = max_keys
        self._segments = Segments(connection)
        self._marks = Marks(connection)
        self.retention = Retention(connection, lambda: self._windows.clear())
        """What is remembered of batches, and for how long."""
        self.dead_letters = DeadLetters(connection, self._segments, self._count)
        """What upstream refuses for good."""
        self.quarantine = Quarantine(connection, self.dead_letters)
        """Where damaged segments are set aside."""
        self.overflow = Overflow(connection, self._segments, self._count)
        """What goes when there is no room."""
        self.leftovers = Leftovers(connection)
        """What there is to send."""
        self._reset()

    def _reset(self) -> None:
        """Forget everything that a rolled-back transaction may have put into memory."""
        self._windows: OrderedDict[tuple[str, str, str], _Rows] = OrderedDict()
        self._segments.reset()
        self.dead_letters.reset()
        super()._reset()

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
        envelope_id, likeness = self._segments.keep_envelope(window_id, batch.digest, batch.envelope)
        last = len(batch.segments) - 1
        for position, segment in enumerate(batch.segments):
            body_id = self._segments.add_body(segment.deflated)
            self._segments.add(
                window_id,
                address(place.block, place.first_index + segment.index),
                segment.event_count,
                segment.events_bytes,
                len(segment.deflated),
                segment.crc,
                envelope_id,
                batch.last_activity,
                batch.is_final and position == last,
                batch.accepted_at,
                None,
                body_id,
            )
        self._count("accepted", batch.event_count)
        return Appended("stored", key_id, session_id, window_id, key, likeness)

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
            key_id = self._insert("INSERT INTO key VALUES (NULL, ?, 0)", key)
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

    def seal(self, window_id: int, now: float, *, merges_pages: bool = False) -> Load | None:
        """Cut the window's next upstream batch, record the cut and the attempt, and return it.

        Args:
            window_id: Row of the window.
            now: Wall clock.
            merges_pages: Whether a changed page does not end the batch.

        Returns:
            None where nothing may be sent now: nothing is pending, or a final waits for the rest of its session.

        Raises:
            Unreadable: What would be sent is damaged: that has to be set aside first.
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
        likeness = {envelope_id: self._segments.likeness(envelope_id) for envelope_id in {row[3] for row in rows}}
        pending = [
            Pending(start, events, events_bytes, deflated_bytes, envelope_id, likeness[envelope_id], activity, ends)
            for start, events, events_bytes, envelope_id, activity, ends, _, _, deflated_bytes in rows
        ]
        envelope = partial(self._envelope, window_id=window_id, segments=[(row[0], row[3]) for row in rows])
        for first in range(len(rows)):
            choice, is_final = self._choose(session_id, window_id, pending[first:], envelope, merges_pages=merges_pages)
            if choice.whole or choice.split_events:
                break
            # A final that has to wait. The window went on behind it, if at all; that goes first.
        else:
            return None
        end = first + choice.whole
        chosen = rows[first:end]
        if choice.split_events:
            # Never all of it, though the blanks between events that are dropped here could make it fit: the cut went by
            # the stored size, and by that decided whether this ends the session.
            start, _, events_bytes, *_ = rows[end]
            try:
                events = self._segments.events(rows[end][6], events_bytes)
            except (LookupError, apsw.CorruptError) as error:
                raise Unreadable(window_id, [start], str(error), has_bytes=isinstance(error, LookupError)) from error
            if self._segments.split(window_id, start, events, choice):
                chosen.append(self._row(f"{_SELECT} WHERE window_id = ? AND address = ?", (window_id, start)))
        left = rows[:first] or rows[end:]
        pieces = read_pieces(self._db, window_id, [row[0] for row in chosen], None)
        batch_id = self._add_batch(session_id, window_id, chosen, now, is_final=is_final)
        self._record_attempt(key_id, now)
        if not left:
            return self._load(batch_id, pieces)
        next_parting = max(parting(likeness[left[0][3]], likeness[row[3]]) for row in left)
        return self._load(batch_id, pieces, left[0][7], next_parting)

    def _envelope(
        self, envelope_id: int, window_id: int, segments: Sequence[tuple[int, int]], batch_id: int | None = None
    ) -> Envelope:
        """Return the envelope of segments (address, envelope), some of a window's pending ones or all of a batch.

        Raises:
            Unreadable: It is missing, so they cannot be sent.
        """
        try:
            return self._segments.envelope(envelope_id)
        except LookupError as error:
            orphans = [address for address, its_envelope in segments if its_envelope == envelope_id or batch_id]
            raise Unreadable(window_id, orphans, str(error), batch_id=batch_id) from error

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
        """Record a cut of segments (`_SELECT`) that are unsealed, or all `of_batch`, and return its row.

        It bears the last one's envelope.
        """
        last_activity = b""
        for row in chosen:
            last_activity = later_activity(last_activity, row[4])
        place = (window_id, chosen[0][0], chosen[-1][0])
        batch_id = self._insert(
            "INSERT INTO batch VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(session_id, *place, chosen[-1][3], last_activity, is_final, sum(row[1] for row in chosen), now),
        )
        self._db.execute(
            "UPDATE segment SET batch_id = ? WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id IS ?",
            (batch_id, *place, of_batch),
        )
        return batch_id

    def _choose(
        self,
        session_id: int,
        window_id: int,
        pending: list[Pending],
        envelope: Callable[[int], Envelope],
        *,
        merges_pages: bool,
    ) -> tuple[Cut, bool]:
        """Choose the cut, and whether it is sent as the final of its session.

        A final waits until it is all that the session has left. If another final of the session is pending behind it,
        that one will end the session, and this one goes as a normal batch: they would wait for each other.
        """
        choose = partial(choose_cut, pending, envelope, self._limits, merges_pages=merges_pages)
        choice = choose(allow_final=True)
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
        return choose(allow_final=False), False

    def load(self, batch_id: int, now: float) -> Load:
        """Return a sealed batch to be sent again, and record the attempt.

        Raises:
            Unreadable: Some of it is damaged: that has to be set aside first.
        """
        sealed, envelope_id, _ = self.leftovers.sealed(batch_id)
        rows = self._segments_of(sealed)
        self._envelope(envelope_id, sealed.window_id, [(row[0], row[3]) for row in rows], batch_id)
        pieces = read_pieces(self._db, sealed.window_id, [row[0] for row in rows], batch_id)
        self._record_attempt(sealed.key_id, now)
        return self._load(batch_id, pieces)

    def _load(
        self,
        batch_id: int,
        pieces: Sequence[Piece],
        next_oldest_at: float | None = None,
        next_parting: Parting = Parting.NOTHING,
    ) -> Load:
        sealed, envelope_id, last_activity = self.leftovers.sealed(batch_id)
        prefix = body_prefix(self._segments.envelope(envelope_id), last_activity, sealed.sequence)
        body = assemble(prefix, pieces, body_suffix(is_final=sealed.is_final))
        return Load(sealed, body, next_oldest_at, next_parting)

    def _record_attempt(self, key_id: int, now: float) -> None:
        self._db.execute("INSERT INTO attempt VALUES (?, ?)", (key_id, now))

    def settle(self, batch_id: int, *, keeps_bodies: bool = False) -> None:
        """Remove a batch that upstream has taken, with its segments and those envelopes that nothing else needs.

        Args:
            batch_id: Row of the batch.
            keeps_bodies: Leave the bytes where they are, since a damaged page beside them does not let them go.
        """
        sealed, envelope_id, _ = self.leftovers.sealed(batch_id)
        # Within bounds: the window may hold far more.
        mine = (sealed.window_id, sealed.sequence, sealed.last_address, batch_id)
        if not keeps_bodies:
            self._db.execute(
                "DELETE FROM body WHERE id IN (SELECT body_id FROM segment"
                " WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id = ?)",
                mine,
            )
        deleted = self._all(
            "DELETE FROM segment WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id = ?"
            " RETURNING envelope_id",
            mine,
        )
        self._db.execute("DELETE FROM batch WHERE id = ?", (batch_id,))
        self._db.execute("UPDATE session SET refusals = 0 WHERE id = ? AND refusals", (sealed.session_id,))
        self._count("delivered", sealed.event_count)
        for needless in {envelope_id, *(row[0] for row in deleted)}:
            self._segments.drop_envelope(sealed.window_id, needless)

    # -- what upstream refuses

    def refuse(self, batch_id: int, cut: Recut, status: int, answer: str, now: float, max_dead_bytes: float) -> Refused:
        """Cut a batch that upstream refuses into smaller ones, or make a dead letter of it where that helps no more.

        Nothing of the batch was stored upstream, so its number is free: the first part bears it again, and each other
        the address of its own first event.

        Args:
            batch_id: Row of the batch.
            cut: `alone`: each segment by itself, then halves. `halves`: halves, down to a single event.
            status: Upstream's.
            answer: The beginning of what upstream said.
            now: Wall clock.
            max_dead_bytes: What dead letters may take; beyond it the oldest are shed. inf: nothing is.
        """
        sealed, _, _ = self.leftovers.sealed(batch_id)
        if cut == "alone":
            self._db.execute("UPDATE session SET refusals = refusals + 1 WHERE id = ?", (sealed.session_id,))
        ends = self._recut(sealed, cut)
        if not ends:
            # Not at the batch's number: what had that address may have been set aside as damaged.
            [(start, *_)] = self._segments_of(sealed)
            self._db.execute("DELETE FROM batch WHERE id = ?", (batch_id,))
            self.dead_letters.bury(sealed.window_id, start, status, answer, now)
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
        start, count, events_bytes, _, _, _, body_id, *_ = rows[0]
        refusals = self._one("SELECT refusals FROM session WHERE id = ?", (sealed.session_id,))
        if count == 1 or (cut == "alone" and refusals > _MAX_REFUSALS):
            return []
        try:
            events = self._segments.events(body_id, events_bytes)
        except LookupError:  # what is damaged cannot be divided
            return []
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
