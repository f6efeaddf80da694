"""Marks: what is remembered of client batches, and where the events of the next one are numbered.

A batch's events lie in a *block* of 16 384 addresses. Nearly always that is the block of its sequence.

Rules:
1. A mark knows the batch as it was sent, by its number of events, its bytes and their CRC. A batch that is the same in
   all three as one of its session, window and sequence is a retry. One that is not is compared with those batches
   (`protocol/reuse.py`), outside the transaction; here it is only seen to that none has come since.
2. Events take the next free addresses of their block, whichever window or batch has the others. So no address is given
   out twice, however sequences are reused.
3. What is new in a batch that begins like an earlier one follows in that one's block, before the next sequence.
4. A batch that begins like none starts its window's counter anew: it takes the block behind the highest of the session,
   and the window's later sequences are shifted with it (`window.shift`, which lasts as long as a mark of the session).
   Upstream orders a session by its numbers, so what a page sends after a reload comes after all that went before. So
   does what finds no room in its block, where that is full or has very many batches.
5. A shift changes where a sequence is numbered, not what it is. A late retry from before the reload is recognised,
   since batches are compared with those of their sequence in every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import apsw
import msgspec

from relay.protocol.codings import inflate_segment
from relay.protocol.cut import Likeness, Parting, address
from relay.protocol.node_json import split_events
from relay.protocol.reuse import Earlier
from relay.protocol.schema import MAX_BATCH_EVENTS, MAX_SEQUENCE
from relay.spool.segments import is_intact
from relay.spool.values import NewBatch, PendingWindow

_MAX_EARLIER = 16
"""Batches of one session, window and sequence that another is compared with, the latest. A client that never counts
uses a single sequence for everything; it must not cost more with every batch."""

_MAX_IN_BLOCK = 256
"""Batches in one block, looked through in 0.1 ms, before others are numbered behind the session. Each tab of a session
has its own batch in a block; a client that names a new window for each batch has all of them in one, and must not cost
more with every batch either."""

_IN_BLOCK = (
    "SELECT window_id, first_index, events FROM mark WHERE session_id = ? AND block = ?"  # noqa: S608 - our number
    f" LIMIT {_MAX_IN_BLOCK}"
)
"""Its limit is no binding, which makes a look that finds nothing, as nearly all do, four times as slow."""

_EARLIER = (
    "SELECT id, window_id, block, first_index, known_events + events, events_bytes, crc, known_events, known_in"
    " FROM mark"
)
"""The members of `Earlier`."""


class Place(msgspec.Struct, frozen=True, gc=False):
    """What becomes of a batch."""

    outcome: Literal["new", "repeated", "differs", "numbers_used_up"]
    """`differs`: it has to be compared with the `earlier` ones first. `numbers_used_up`: there is no block behind the
    highest."""
    block: int = 0
    """Of a new one: where its new events are numbered."""
    first_index: int = 0
    """Of the first of them."""
    earlier: tuple[Earlier, ...] = ()
    """What it differs from, in the order of the marks."""
    mark_id: int = 0
    """What it repeats."""


class Marks:
    """The marks of one spool database. Its methods are steps of a group, like those of `Store`.

    Args:
        connection: The store's.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._db = connection

    def find_place(self, batch: NewBatch, session_id: int, window_id: int, shift: int) -> Place:
        """Decide whether a batch is new, and where its new events are numbered; changes nothing.

        Args:
            batch: As it was sent, or what is new in it.
            session_id: Its session.
            window_id: Its window.
            shift: The window's.
        """
        if batch.known and not batch.event_count:
            return Place("repeated", mark_id=batch.known.mark_id)
        block = batch.sequence + shift
        first_index = 0 if block <= MAX_SEQUENCE else MAX_BATCH_EVENTS
        is_reused = shift != 0
        found = 0
        for other, first, events in self._db.execute(_IN_BLOCK, (session_id, block)):
            found += 1
            is_reused |= other == window_id
            first_index = max(first_index, first + events)
        if found == _MAX_IN_BLOCK:  # and perhaps more, so neither is known
            is_reused = is_reused or self._is_used(session_id, block, window_id)
            first_index = MAX_BATCH_EVENTS
        if is_reused:
            return self._find_place_again(batch, session_id, window_id, block, first_index)
        if first_index + batch.event_count <= MAX_BATCH_EVENTS:
            return Place("new", block, first_index)
        return self._place_behind(session_id)

    def _find_place_again(
        self, batch: NewBatch, session_id: int, window_id: int, block: int, first_index: int
    ) -> Place:
        """Decide on a batch whose window had its sequence before, or has been shifted."""
        sent = (batch.sent_events, batch.sent_bytes, batch.sent_crc)
        retried = self._db.execute(
            "SELECT id FROM mark WHERE session_id = ? AND block = ? AND window_id = ? AND sequence = ?"
            " AND known_events + events = ? AND events_bytes = ? AND crc = ?",
            (session_id, block, window_id, batch.sequence, *sent),
        ).fetchone()
        if retried:  # nearly always; what follows costs five times as much
            return Place("repeated", mark_id=retried[0])
        if earlier := self._earlier(session_id, window_id, batch.sequence):
            for each in earlier:
                if (each.event_count, each.events_bytes, each.crc) == sent:
                    return Place("repeated", mark_id=each.mark_id)
            known = batch.known
            if known is None or known.latest_id < earlier[-1].mark_id:
                return Place("differs", earlier=earlier)
            blocks = {each.mark_id: each.block for each in earlier}
            if known.mark_id in blocks:
                block = blocks[known.mark_id]
                first_index = self._next_index(session_id, block)
            elif block in blocks.values():
                first_index = MAX_BATCH_EVENTS  # rule 4
        if first_index + batch.event_count <= MAX_BATCH_EVENTS:
            return Place("new", block, first_index)
        return self._place_behind(session_id)

    def _place_behind(self, session_id: int) -> Place:
        """Return the block behind the highest of a session (rule 4)."""
        highest = "SELECT coalesce(max(block), -1) FROM mark WHERE session_id = ?"
        block = 1 + self._db.execute(highest, (session_id,)).get
        return Place("new", block, 0) if block <= MAX_SEQUENCE else Place("numbers_used_up")

    def _earlier(self, session_id: int, window_id: int, sequence: int) -> tuple[Earlier, ...]:
        """Return the latest batches of a sequence, in the order of their marks."""
        rows: list[Any] = self._db.execute(
            f"{_EARLIER} WHERE session_id = ? AND block = ? AND window_id = ? AND sequence = block"
            " ORDER BY first_index DESC LIMIT ?",
            (session_id, sequence, window_id, _MAX_EARLIER),
        ).fetchall()
        rows += self._db.execute(
            f"{_EARLIER} WHERE window_id = ? AND sequence = ? AND block <> sequence ORDER BY id DESC LIMIT ?",
            (window_id, sequence, _MAX_EARLIER),
        ).fetchall()
        return tuple(Earlier(*row) for row in sorted(rows)[-_MAX_EARLIER:])

    def _next_index(self, session_id: int, block: int) -> int:
        """Return the first free index of a block; that of none where there are too many batches to look through."""
        others: list[Any] = self._db.execute(_IN_BLOCK, (session_id, block)).fetchall()
        return max(first + events for _, first, events in others) if len(others) < _MAX_IN_BLOCK else MAX_BATCH_EVENTS

    def _is_used(self, session_id: int, block: int, window_id: int) -> bool:
        """Return whether a window has a batch in a block."""
        used = "SELECT 1 FROM mark WHERE session_id = ? AND block = ? AND window_id = ? LIMIT 1"
        return self._db.execute(used, (session_id, block, window_id)).fetchone() is not None

    def add(self, batch: NewBatch, session_id: int, window_id: int, place: Place) -> None:
        """Remember a batch."""
        known_events, known_in = (batch.known.event_count, batch.known.mark_id) if batch.known else (0, 0)
        self._db.execute(
            "INSERT INTO mark VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(session_id, place.block, window_id, place.first_index, batch.event_count, batch.sequence),
                *(known_events, known_in, batch.sent_bytes, batch.sent_crc, batch.is_final, batch.accepted_at),
            ),
        )

    def end_with(self, mark_id: int) -> PendingWindow | Literal["as before", "too late"]:
        """Let a batch end its session, as its client said only when it sent it again.

        Returns:
            What changed: the batch's window has a final more. `as before`: it ended its session already. `too late`:
            it is sealed, upstream, or a dead letter.
        """
        row = self._db.execute(
            "UPDATE mark SET is_final = 1 WHERE id = ? AND NOT is_final"
            " RETURNING window_id, block, first_index + events",
            (mark_id,),
        ).fetchone()
        if row is None:
            return "as before"
        window_id, block, end = row
        changed: Any = self._db.execute(
            "UPDATE segment SET is_final = 1 WHERE window_id = ?1 AND batch_id IS NULL AND address + events = ?2"
            " AND address = (SELECT max(address) FROM segment WHERE window_id = ?1 AND address < ?2)"
            " RETURNING envelope_id, accepted_at",
            (window_id, address(block, end)),
        ).fetchone()
        if changed is None:
            return "too late"
        envelope_id, accepted_at = changed
        found: Any = self._db.execute(
            "SELECT key_id, secret, session_id, digest, pageless FROM window JOIN session ON session.id = session_id"
            " JOIN key ON key.id = key_id JOIN envelope ON envelope.id = ? WHERE window.id = ?",
            (envelope_id, window_id),
        ).fetchone()
        key_id, key, owner_id, *digests = found
        shape = (0, 0, 0, accepted_at, 1, Likeness(*digests), Parting.NOTHING)
        return PendingWindow(key_id, key, owner_id, window_id, *shape)


def read_events(reader: apsw.Connection, earlier: Earlier) -> Iterator[bytes]:
    """Yield the new events of an earlier batch from the first on, as far as they are still segments.

    On a connection of the reader's own.
    """
    start = address(earlier.block, earlier.first_index)
    end = start + earlier.event_count - earlier.known_events
    while start < end:
        row = reader.execute(
            "SELECT events, events_bytes, body.crc, deflated FROM segment JOIN body ON body.id = body_id"
            " WHERE window_id = ? AND address = ?",
            (earlier.window_id, start),
        ).fetchone()
        if row is None:
            return
        events, events_bytes, crc, deflated = row
        if not is_intact(deflated, crc):  # so there is nothing to compare with; whoever sends it says so
            return
        yield from split_events(inflate_segment(deflated, events_bytes))
        start += events
