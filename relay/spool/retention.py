"""What the spool remembers of what it no longer holds, and how long: client batches, sends, sessions, keys.

Steps of a group, like those of `Store`. Each call does a bounded amount of work, so no commit is held up for long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import apsw

from relay.spool.rows import first_value
from relay.spool.values import Paused, Recent

_PRUNE_STEP = 500
"""Marks looked at by one call of `prune`."""


class Retention:
    """The memory of one spool database.

    Args:
        connection: The store's.
        on_forgotten: Called when a session is forgotten: rows known from earlier steps may be gone.
    """

    def __init__(self, connection: apsw.Connection, on_forgotten: Callable[[], None]) -> None:
        self._db = connection
        self._one = partial(first_value, connection)
        self._on_forgotten = on_forgotten
        self._prune_after = 0
        """Row of the mark at which the next call goes on."""

    @property
    def is_behind(self) -> bool:
        """Whether the last call of `prune` did its step's worth, and there may be more."""
        return self._prune_after > 0

    def recent_attempts(self, since: float) -> list[Recent]:
        """Return the sends that began after `since`, and forget the others."""
        self._db.execute("DELETE FROM attempt WHERE at <= ?", (since,))
        rows: Any = self._db.execute("SELECT key_id, at FROM attempt ORDER BY at")
        return [Recent(*row) for row in rows]

    def pause_key(self, key_id: int, until: float) -> None:
        """Remember that upstream wants nothing of a key before `until`."""
        self._db.execute("UPDATE key SET paused_until = ? WHERE id = ?", (until, key_id))

    def paused_keys(self, now: float) -> list[Paused]:
        """Return the keys of which upstream wants nothing yet."""
        rows: Any = self._db.execute("SELECT id, paused_until FROM key WHERE paused_until > ?", (now,))
        return [Paused(*row) for row in rows]

    def forget_attempts(self, before: float) -> None:
        """Forget the sends that began earlier than `before` (wall clock)."""
        self._db.execute("DELETE FROM attempt WHERE at < ?", (before,))

    def prune(self, before: float, max_marks: int) -> int:
        """Forget a step's worth of old marks, and sessions of which nothing is left.

        Args:
            before: Marks accepted earlier than this (wall clock) go.
            max_marks: Marks beyond this number go too, the oldest first.

        Returns:
            The number of marks forgotten. By age a session's marks go together, once it is quiet: as long as it sends,
            another of its windows may use an old sequence, whose addresses must not be given out twice. Marks of a
            session with events in the spool, or among the dead letters, stay.
        """
        beyond = self._one("SELECT coalesce(max(id), 0) FROM mark") - max_marks
        rows: Any = self._db.execute(
            "SELECT id, session_id, accepted_at FROM mark WHERE id > ? ORDER BY id LIMIT ?",
            (self._prune_after, _PRUNE_STEP),
        ).fetchall()
        old = [row for row in rows if row[2] < before or row[0] <= beyond]
        self._prune_after = old[-1][0] if len(old) == _PRUNE_STEP else 0
        # Once a session, though it has many marks: each look may go through all that there is of it.
        sessions = {session_id for _, session_id, _ in old}
        is_live = {session_id: self._is_live(session_id, before) for session_id in sessions}
        is_spooled = {session_id: self._is_spooled(session_id) for session_id in sessions}
        forgotten = 0
        for mark_id, session_id, _ in old:
            if is_spooled[session_id] or (is_live[session_id] and mark_id > beyond):
                continue
            self._db.execute("DELETE FROM mark WHERE id = ?", (mark_id,))
            forgotten += 1
            if self._one("SELECT 1 FROM mark WHERE session_id = ? LIMIT 1", (session_id,)) is None:
                self._forget_session(session_id)
        return forgotten

    def _is_live(self, session_id: int, since: float) -> bool:
        """Return whether anything of the session was accepted since then."""
        # Clients count up, so what came last is found at the end; from the beginning on, a session that is open for
        # days has all its old marks in the way.
        found = self._one(
            "SELECT 1 FROM mark WHERE session_id = ? AND accepted_at >= ? ORDER BY block DESC LIMIT 1",
            (session_id, since),
        )
        return found is not None

    def _is_spooled(self, session_id: int) -> bool:
        return any(
            self._one(
                f"SELECT 1 FROM window JOIN {table} ON window_id = window.id WHERE session_id = ? LIMIT 1",  # noqa: S608
                (session_id,),
            )
            for table in ("segment", "dead_letter")
        )

    def _forget_session(self, session_id: int) -> None:
        self._on_forgotten()
        self._db.execute("DELETE FROM window WHERE session_id = ?", (session_id,))
        key_id = self._one("DELETE FROM session WHERE id = ? RETURNING key_id", (session_id,))
        if self._one("SELECT 1 FROM session WHERE key_id = ? LIMIT 1", (key_id,)) is None:
            self._db.execute("DELETE FROM key WHERE id = ?", (key_id,))
