"""What the disk gives back otherwise than it was stored: kept aside as dead letters of the relay's own.

Rules:
1. Damage costs what is damaged. The rest of the window and of its session goes on as if a batch had been refused: a
   damaged segment leaves the queue, so it delays nothing, the session's final included.
2. A damaged segment is a dead letter with the status `DAMAGED` and a reason instead of upstream's answer. Whatever
   bytes are left of it can be exported. It cannot be sent again.
3. A sealed batch may be upstream already, with its answer lost. So what is left of it is sent under its own number:
   then upstream, which has that number, stores nothing of it twice; and if it does not have it, it gets what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

from relay.protocol.assemble import Piece
from relay.spool.dead_letters import DeadLetters
from relay.spool.segments import is_intact, parting_within
from relay.spool.values import Quarantined

_PIECES = (
    "SELECT address, body.crc, deflated, segment.crc, events_bytes FROM segment LEFT JOIN body ON body.id = body_id"
    " WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id IS ?"
)


class Unreadable(Exception):
    """Segments cannot be had as they were stored. The step that met them is undone; `Quarantine.take` is a second one.

    It has to be: once SQLite has met a damaged page, it lets the transaction write nothing more.

    Attributes:
        window_id: Of the segments.
        addresses: Of the segments.
        batch_id: The sealed batch that they are part of; None while they are pending.
        reason: For people.
        has_bytes: Whether the disk gives bytes at all.
    """

    def __init__(
        self,
        window_id: int,
        addresses: Sequence[int],
        reason: str,
        *,
        batch_id: int | None = None,
        has_bytes: bool = True,
    ) -> None:
        self.window_id = window_id
        self.addresses = addresses
        self.batch_id = batch_id
        self.reason = reason
        self.has_bytes = has_bytes
        super().__init__(reason)


def read_pieces(
    connection: apsw.Connection, window_id: int, addresses: Sequence[int], batch_id: int | None
) -> list[Piece]:
    """Return segments of a window, held against their checksums.

    Args:
        connection: The store's.
        window_id: Of the segments.
        addresses: Of the segments, in order.
        batch_id: Their batch; None while they are pending.

    Raises:
        Unreadable: Some of them are damaged.
    """
    rows: list[Any]
    try:
        rows = connection.execute(_PIECES, (window_id, addresses[0], addresses[-1], batch_id)).fetchall()
    except apsw.CorruptError:
        rows, unreachable = [], []
        for address in addresses:
            try:
                rows += connection.execute(_PIECES, (window_id, address, address, batch_id)).fetchall()
            except apsw.CorruptError:
                unreachable.append(address)
        if unreachable:
            reason = "the page of its bytes cannot be read"
            raise Unreadable(window_id, unreachable, reason, batch_id=batch_id, has_bytes=False) from None
    intact = {address: Piece(*piece) for address, crc, *piece in rows if is_intact(piece[0], crc)}
    damaged = [address for address in addresses if address not in intact]
    if damaged:
        reason = "its bytes do not have the checksum that they were stored with"
        raise Unreadable(window_id, damaged, reason, batch_id=batch_id)
    return [intact[address] for address in addresses]


class Quarantine:
    """Takes damaged segments out of the queue. Steps of a group, like those of `Store`.

    Args:
        connection: The store's.
        dead_letters: Where they go.
    """

    def __init__(self, connection: apsw.Connection, dead_letters: DeadLetters) -> None:
        self._db = connection
        self._dead_letters = dead_letters

    def take(self, found: Unreadable, now: float) -> Quarantined:
        """Set segments aside. The batch that they are part of, if any, goes on without them, or goes with the last."""
        shapes = []
        for address in found.addresses:
            shapes += self._db.execute(
                "SELECT events, events_bytes, deflated_bytes, is_final FROM segment"
                " WHERE window_id = ? AND address = ?",
                (found.window_id, address),
            ).fetchall()
            self._dead_letters.bury_damaged(found.window_id, address, found.reason, now, has_bytes=found.has_bytes)
        events, run, deflated, finals = (sum(column) for column in zip(*shapes, strict=True))
        if found.batch_id is not None:
            self._db.execute("UPDATE batch SET events = events - ? WHERE id = ?", (events, found.batch_id))
            self._db.execute("DELETE FROM batch WHERE id = ? AND events <= 0", (found.batch_id,))
        [(oldest_at,)] = self._db.execute(
            "SELECT min(accepted_at) FROM segment WHERE window_id = ? AND batch_id IS NULL", (found.window_id,)
        )
        left = self._db.execute("SELECT 1 FROM batch WHERE id = ?", (found.batch_id,)).fetchone()
        within = parting_within(self._db, found.window_id)
        return Quarantined(len(shapes), events, run, deflated, finals, left is not None, oldest_at, within)
