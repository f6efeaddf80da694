"""What a schedule knows of a window with pending events, and of its session."""

from __future__ import annotations

from math import inf

from relay.protocol.cut import Likeness, Parting

RETRY, STUCK, COMPLETE, OPEN = range(4)
"""Ranks: a sealed batch to be sent again, one that has to stand back, a complete run, an open one."""

NOWHERE = (inf, OPEN, inf)
"""The place of a session of which nothing may be sent."""


class Window:
    """The pending events of a window, in sums.

    Args:
        window_id: Its row.
        session: It is one of.
        likeness: Of what is added.
        oldest_at: When the oldest of it was accepted.
    """

    __slots__ = (
        *("deflated_bytes", "events", "events_bytes", "finals", "likeness"),
        *("oldest_at", "parting", "session", "stamp", "window_id"),
    )

    def __init__(self, window_id: int, session: Session, likeness: Likeness, oldest_at: float) -> None:
        self.window_id = window_id
        self.session = session
        self.likeness = likeness
        """Of what was added last."""
        self.parting = Parting.NOTHING
        """What parts the first run from what is behind it."""
        self.oldest_at = oldest_at
        self.events = 0
        self.events_bytes = 0
        self.deflated_bytes = 0
        self.finals = 0
        self.stamp = 0
        """Of its entry in the session's queue; 0 while it has none."""


class Session:
    """The windows of a session, its sealed batch that was not taken, and its place among others.

    Args:
        session_id: Its row.
    """

    __slots__ = (
        *("batch_id", "finals", "is_busy", "is_part", "is_stuck", "place", "queue"),
        *("retry_at", "session_id", "stamp", "windows", "withheld"),
    )

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.windows: dict[int, Window] = {}
        self.queue: list[tuple[float, int, int]] = []
        """(turn_at, stamp, window_id)"""
        self.withheld: list[int] = []
        """Windows that are not in the queue until something happens to the session; few, and a list is small."""
        self.finals = 0
        self.is_busy = False
        self.batch_id: int | None = None
        self.is_part = False
        """Whether that batch is sent in the session's turn rather than at `retry_at`."""
        self.is_stuck = False
        """Whether that batch stands back."""
        self.retry_at = inf
        self.place: tuple[float, int, float] = NOWHERE
        """(due_at, rank, oldest_at) by which it stands in the lane's queues."""
        self.stamp = 0
        """Of its entry there."""
