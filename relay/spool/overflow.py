"""What goes when the spool is full and its operator prefers new sessions to old ones (`spool.overflow`).

Rules:
1. Whole sessions go, by the age of their oldest spooled event: a replay with a hole in it shows nothing right behind
   the hole. What of a session is upstream stays there.
2. A session with a sealed batch stays: that batch may be upstream already, and must not be counted twice.
3. Marks stay. So a client's retry of what was shed stores nothing anew, and no number is given out twice. What a
   session sends later is taken like anybody's: from its next full snapshot on, which every page begins with, it can be
   watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw

from relay.spool.segments import Segments
from relay.spool.values import Shed

_OLDEST = (
    "SELECT session_id FROM segment JOIN window ON window.id = window_id"
    " WHERE session_id NOT IN (SELECT session_id FROM batch)"
    " GROUP BY session_id ORDER BY min(accepted_at), session_id LIMIT ?"
)


def oldest_sessions(reader: apsw.Connection, max_sessions: int) -> list[int]:
    """Return the sessions that go first. On a connection of the reader's own: it looks at every segment."""
    return [session_id for (session_id,) in reader.execute(_OLDEST, (max_sessions,))]


class Overflow:
    """Drops sessions of one spool database. Steps of a group, like those of `Store`.

    Args:
        connection: The store's.
        segments: Of it.
        count: Adds events to a counter of the account.
    """

    def __init__(self, connection: apsw.Connection, segments: Segments, count: Callable[[str, int], None]) -> None:
        self._db = connection
        self._segments = segments
        self._count = count

    def shed(self, session_id: int) -> Shed | None:
        """Drop what is spooled of a session; None where there is nothing, or it must stay (rule 2)."""
        if self._db.execute("SELECT 1 FROM batch WHERE session_id = ? LIMIT 1", (session_id,)).fetchone():
            return None
        events = 0
        windows: Any = self._db.execute("SELECT id FROM window WHERE session_id = ?", (session_id,)).fetchall()
        for (window_id,) in windows:
            rows: Any = self._db.execute(
                "DELETE FROM segment WHERE window_id = ? RETURNING body_id, envelope_id, events", (window_id,)
            ).fetchall()
            self._db.executemany("DELETE FROM body WHERE id = ?", [(body_id,) for body_id, _, _ in rows])
            for envelope_id in {envelope_id for _, envelope_id, _ in rows}:
                self._segments.drop_envelope(window_id, envelope_id)
            events += sum(row[2] for row in rows)
        if not events:
            return None
        self._count("shed_sessions", events)
        key_id: Any = self._db.execute("SELECT key_id FROM session WHERE id = ?", (session_id,)).get
        return Shed(key_id, session_id, events)
