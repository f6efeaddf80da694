"""The schedule: which session of a key is served next, and when to look again.

A window is *due* when it is full, when its session has a final, or when its oldest event has lingered long enough.
Among what is due the order is: sealed batches whose retry is due; full windows; windows that a final waits for; the
rest by age. One batch of a session is in flight at a time (law 8), so a choice makes its session busy until the
caller releases it.

Rules:
1. Pure: time is an argument (any monotonic clock, seconds), and nothing is read or sent here.
2. A choice costs O(log n), however the windows are spread over sessions: a session queues its windows, and stands in
   the lane's two heaps with the best of them only.
3. Entries of the heaps are never removed when they become stale, only recognised, by their stamp. There is a new
   entry only where something has changed, so stale ones are a few for each choice.
4. What is counted here is an aid to choosing. The cut is made by the spool, from what is really there.
"""

from __future__ import annotations

import heapq
from math import inf
from typing import Literal

import msgspec

from relay.protocol.cut import Limits

_RETRY, _FULL, _AWAITED, _FINAL, _LINGERED = range(5)

Reason = Literal["retry", "full", "awaited", "final", "lingered"]
_REASONS: tuple[Reason, ...] = ("retry", "full", "awaited", "final", "lingered")

_IS_FULL, _IS_FILLING, _HAS_FINAL = range(3)
"""A window's standing in its session's queue: a final goes last, being the one that waits for the others."""

_NOWHERE = (inf, _LINGERED, inf)
"""The place of a session that has nothing to send."""


class Choice(msgspec.Struct, frozen=True):
    """What to do next."""

    session_id: int
    """Busy from now on, until `release`, `retry_at` or `withhold`."""
    window_id: int | None
    """Seal this window's next batch; None to send `batch_id` again."""
    batch_id: int | None
    """The sealed batch to send again."""
    reason: Reason
    """Why it is due."""


class _Window:
    __slots__ = ("events", "events_bytes", "finals", "oldest_at", "session", "stamp", "window_id")

    def __init__(self, window_id: int, session: _Session, oldest_at: float) -> None:
        self.window_id = window_id
        self.session = session
        self.oldest_at = oldest_at
        self.events = 0
        self.events_bytes = 0
        self.finals = 0
        self.stamp = 0
        """Of its entry in the session's queue; 0 while it has none."""


class _Session:
    __slots__ = (
        "batch_id",
        "finals",
        "is_busy",
        "place",
        "queue",
        "retry_at",
        "session_id",
        "stamp",
        "windows",
        "withheld",
    )

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.windows: dict[int, _Window] = {}
        self.queue: list[tuple[int, float, int, int]] = []
        """(standing, oldest_at, stamp, window_id)"""
        self.withheld: list[int] = []
        """Windows that are not in the queue until something happens to the session; few, and a list is small."""
        self.finals = 0
        self.is_busy = False
        self.batch_id: int | None = None
        self.retry_at = inf
        self.place: tuple[float, int, float] = _NOWHERE
        """(due_at, rank, age) by which it stands in the lane's heaps."""
        self.stamp = 0
        """Of its entry there."""


class Schedule:
    """The pending windows and sealed batches of one upstream key.

    Args:
        limits: Of an upstream batch; a window that reaches one of them is full.
        linger_seconds: How long a window's oldest event may wait for company.
    """

    def __init__(self, limits: Limits, linger_seconds: float) -> None:
        self._limits = limits
        self._linger = linger_seconds
        self._sessions: dict[int, _Session] = {}
        self._windows: dict[int, _Window] = {}
        self._waiting: list[tuple[float, int, int]] = []
        """(due_at, stamp, session_id)"""
        self._ready: list[tuple[int, float, int, int]] = []
        """(rank, age, stamp, session_id)"""
        self._stamp = 0

    def __len__(self) -> int:
        """Return the number of windows with pending events."""
        return len(self._windows)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send, now or later."""
        return not self._sessions

    def has_window(self, window_id: int) -> bool:
        """Return whether the window is known to have pending events."""
        return window_id in self._windows

    # -- what happens

    def add(
        self, session_id: int, window_id: int, *, events: int, events_bytes: int, finals: int, oldest_at: float
    ) -> None:
        """Note that segments were accepted in a window."""
        session = self._session(session_id)
        window = self._windows.get(window_id)
        if window is None:
            window = self._windows[window_id] = session.windows[window_id] = _Window(window_id, session, oldest_at)
        standing = self._standing(window)
        window.events += events
        window.events_bytes += events_bytes
        window.finals += finals
        session.finals += finals
        if window_id not in session.withheld and (not window.stamp or self._standing(window) != standing):
            self._queue(window)
        self._queue_withheld(session)
        self._place(session)

    def seal(
        self, window_id: int, *, events: int, events_bytes: int, finals: int, next_oldest_at: float | None
    ) -> None:
        """Note that a batch was sealed from a window; `next_oldest_at` is the age of what it left, None for nothing."""
        window = self._windows[window_id]
        session = window.session
        window.events -= events
        window.events_bytes -= events_bytes
        window.finals -= finals
        session.finals -= finals
        if next_oldest_at is not None:
            window.oldest_at = next_oldest_at
            window.events = max(window.events, 1)  # the spool knows better than the count
        if window.events > 0:
            self._queue(window)
        else:
            del self._windows[window_id], session.windows[window_id]

    def retry_at(self, session_id: int, batch_id: int, at: float) -> None:
        """Let a sealed batch be sent again from `at` on; nothing else of its session goes before."""
        session = self._session(session_id)
        session.is_busy = False
        session.batch_id = batch_id
        session.retry_at = at
        self._place(session)

    def release(self, session_id: int) -> None:
        """Note that a session's batch in flight is settled or parked."""
        session = self._sessions[session_id]
        session.is_busy = False
        session.batch_id = None
        self._queue_withheld(session)
        if session.windows:
            self._place(session)
        else:
            del self._sessions[session_id]

    def withhold(self, session_id: int, window_id: int) -> None:
        """Note that nothing of the window may be sent until something else happens to its session."""
        session = self._sessions[session_id]
        session.is_busy = False
        session.withheld.append(window_id)
        self._windows[window_id].stamp = 0
        self._place(session)

    # -- what to do

    def ready_at(self, now: float) -> float:
        """Return when there may be something to send: `now`, later, or inf."""
        self._ripen(now)
        if self._ready:
            return now
        return self._waiting[0][0] if self._waiting else inf

    def choose(self, now: float) -> Choice | None:
        """Choose what to send and make its session busy; None where nothing is due."""
        self._ripen(now)
        if not self._ready:
            return None
        rank, _, _, session_id = heapq.heappop(self._ready)
        session = self._sessions[session_id]
        session.is_busy = True
        session.place = _NOWHERE
        window_id = None if rank == _RETRY else session.queue[0][-1]
        return Choice(session_id, window_id, session.batch_id, _REASONS[rank])

    # -- a session's queue

    def _session(self, session_id: int) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = _Session(session_id)
        return session

    def _standing(self, window: _Window) -> int:
        if window.finals:
            return _HAS_FINAL
        is_full = window.events >= self._limits.max_events or window.events_bytes >= self._limits.max_bytes
        return _IS_FULL if is_full else _IS_FILLING

    def _queue(self, window: _Window) -> None:
        """Give a window a new entry in its session's queue."""
        self._stamp += 1
        window.stamp = self._stamp
        heapq.heappush(window.session.queue, (self._standing(window), window.oldest_at, window.stamp, window.window_id))

    def _queue_withheld(self, session: _Session) -> None:
        while session.withheld:
            self._queue(self._windows[session.withheld.pop()])

    def _first(self, session: _Session) -> _Window | None:
        """Return the window to serve first, and clear the top of the queue up to it."""
        while session.queue:
            window = self._windows.get(session.queue[0][-1])
            if window is not None and window.stamp == session.queue[0][2]:
                return window
            heapq.heappop(session.queue)
        return None

    # -- the lane's heaps

    def _place(self, session: _Session) -> None:
        """Give a session its place in the heaps, if that has changed."""
        if session.is_busy:
            return
        place = self._place_of(session)
        if place == session.place:
            return
        session.place = place
        self._stamp += 1
        session.stamp = self._stamp
        heapq.heappush(self._waiting, (place[0], session.stamp, session.session_id))

    def _place_of(self, session: _Session) -> tuple[float, int, float]:
        if session.batch_id is not None:
            return session.retry_at, _RETRY, session.retry_at
        window = self._first(session)
        if window is None:
            return _NOWHERE
        oldest_at = window.oldest_at
        standing = self._standing(window)
        if standing == _IS_FULL:
            return -inf, _FULL, oldest_at
        if session.finals:
            return -inf, _FINAL if standing == _HAS_FINAL else _AWAITED, oldest_at
        return oldest_at + self._linger, _LINGERED, oldest_at

    def _is_current(self, stamp: int, session_id: int) -> bool:
        session = self._sessions.get(session_id)
        return session is not None and session.stamp == stamp

    def _ripen(self, now: float) -> None:
        """Move what is due from the waiting to the ready, and drop stale entries from both tops."""
        while self._waiting:
            due_at, stamp, session_id = self._waiting[0]
            is_current = self._is_current(stamp, session_id)
            if is_current and due_at > now:
                break
            heapq.heappop(self._waiting)
            if is_current:
                _, rank, age = self._sessions[session_id].place
                heapq.heappush(self._ready, (rank, age, stamp, session_id))
        while self._ready and not self._is_current(*self._ready[0][2:]):
            heapq.heappop(self._ready)
