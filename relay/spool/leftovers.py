"""What lies in the spool to be sent: read at the start, and page by page later.

A damaged page hides what is on it and nothing else: the readings go around it, and tell what they found besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import apsw

from relay.protocol.cut import Likeness, Parting
from relay.spool.segments import parting_within
from relay.spool.values import PendingWindow, SealedBatch

_PENDING = (
    "SELECT key_id, secret, session_id, found.window_id, events, bytes, deflated, oldest, finals,"
    " coalesce(digest, x''), coalesce(pageless, x''), envelopes FROM (SELECT window_id, sum(events) events,"
    " sum(events_bytes) bytes, sum(deflated_bytes) deflated, min(accepted_at) oldest, sum(is_final) finals,"
    " max(envelope_id) newest, count(DISTINCT envelope_id) envelopes FROM segment"
    " WHERE window_id {} AND batch_id IS NULL GROUP BY window_id ORDER BY window_id LIMIT ?) found"
    " JOIN window ON window.id = found.window_id JOIN session ON session.id = session_id"
    " JOIN key ON key.id = key_id LEFT JOIN envelope ON envelope.id = newest ORDER BY found.window_id"
)

_WINDOWS_AT_A_TIME = 500
"""Window rows looked at by one statement, where each has to be tried by itself."""


class Leftovers:
    """Pending windows and sealed batches of one spool database. Steps of a group, like those of `Store`.

    Args:
        connection: The store's.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._db = connection

    def pending_windows(self, after: int, max_windows: int) -> list[PendingWindow]:
        """Return windows that have unsealed segments: the first `max_windows` by row after the row `after`."""
        try:
            rows: Any = self._db.execute(_PENDING.format("> ?"), (after, max_windows)).fetchall()
        except apsw.CorruptError:
            return self._reachable_windows(after, max_windows)
        return [self._window(*row) for row in rows]

    def _window(self, *row: Any) -> PendingWindow:
        *columns, digest, pageless, envelopes = row
        window_id = columns[3]
        within = parting_within(self._db, window_id) if envelopes > 1 else Parting.NOTHING
        whole = (*columns, Likeness(digest, pageless), within)
        return PendingWindow(*whole)

    def _reachable_windows(self, after: int, max_windows: int) -> list[PendingWindow]:
        found: list[PendingWindow] = []
        for window_id in self._window_ids(after):
            with suppress(apsw.CorruptError):
                rows: Any = self._db.execute(_PENDING.format("= ?"), (window_id, 1)).fetchall()
                found += [self._window(*row) for row in rows]
            if len(found) == max_windows:
                break
        return found

    def _window_ids(self, after: int) -> Iterator[int]:
        while True:
            rows: Any = self._db.execute(
                "SELECT id FROM window WHERE id > ? ORDER BY id LIMIT ?", (after, _WINDOWS_AT_A_TIME)
            ).fetchall()
            if not rows:
                return
            for (window_id,) in rows:
                yield window_id
            after = rows[-1][0]

    def sealed_batches(self) -> list[SealedBatch]:
        """Return the batches that were sealed and not settled; those of one session in the order of sending."""
        rows: Any = self._db.execute("SELECT id FROM batch ORDER BY session_id, address").fetchall()
        found = []
        for (batch_id,) in rows:
            with suppress(apsw.CorruptError, LookupError):
                found.append(self.sealed(batch_id)[0])
        return found

    def sealed(self, batch_id: int) -> tuple[SealedBatch, int, bytes]:
        """Return a sealed batch, the row of its envelope, and its `lastActivityAt`.

        Raises:
            LookupError: Rows of it are missing.
        """
        batch: Any = self._db.execute(
            "SELECT key_id, session_id, window_id, address, last_address, events, envelope_id, last_activity, is_final"
            " FROM batch JOIN session ON session.id = session_id WHERE batch.id = ?",
            (batch_id,),
        ).fetchone()
        if batch is None:
            raise LookupError(f"batch {batch_id} is not there")
        *place, events, envelope_id, last_activity, is_final = batch
        sums: Any = self._db.execute(
            "SELECT count(*), count(DISTINCT envelope_id), sum(events_bytes), sum(deflated_bytes), sum(is_final),"
            " min(accepted_at) FROM segment WHERE window_id = ? AND address BETWEEN ? AND ? AND batch_id = ?",
            (*place[2:], batch_id),
        ).fetchone()
        if sums[0] == 0:
            raise LookupError(f"the segments of batch {batch_id} are not there")
        *sizes, finals, oldest_at = sums
        sealed = SealedBatch(*(batch_id, *place, events, *sizes, finals, bool(is_final), oldest_at))
        return sealed, envelope_id, last_activity
