"""The schedule: which session of a key is served next, and when to look again.

A window is *due* when it is full, when its session has a final, or when its oldest event has lingered long enough.
Among what is due the order is: sealed batches whose retry is due; full windows; windows that a final waits for; the
rest by age. One batch of a session is in flight at a time (law 8), so a choice makes its session busy until the
caller releases it.

Rules:
1. Pure: time is an argument (any monotonic clock, seconds), and nothing is read or sent here.
2. A choice costs O(log n) in the number of windows. Entries of the heaps are never removed when they become stale,
   only recognised: each bears its owner's stamp.
3. What is counted here is an aid to choosing. The cut is made by the spool, from what is really there.
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


class _Session:
    __slots__ = ("batch_id", "finals", "is_busy", "retry_at", "session_id", "stamp", "windows", "withheld")

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.windows: dict[int, _Window] = {}
        self.finals = 0
        self.is_busy = False
        self.batch_id: int | None = None
        self.retry_at = inf
        self.withheld: set[int] = set()
        self.stamp = 0


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
        self._waiting: list[tuple[float, int, int, int]] = []
        """(due_at, stamp, window_id or 0, session_id)"""
        self._ready: list[tuple[int, float, int, int, int]] = []
        """(rank, age, stamp, window_id or 0, session_id)"""
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
        was_full, had_finals = self._is_full(window), session.finals
        is_new = not window.events
        window.events += events
        window.events_bytes += events_bytes
        window.finals += finals
        session.finals += finals
        had_withheld = bool(session.withheld)
        session.withheld.clear()
        if session.is_busy:
            return
        if had_withheld or (session.finals and not had_finals):
            self._place_all(session)  # something has changed for every window of the session
        elif is_new or (self._is_full(window) and not was_full) or session.finals:
            self._place(window)

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
        elif window.events <= 0:
            del self._windows[window_id], session.windows[window_id]

    def retry_at(self, session_id: int, batch_id: int, at: float) -> None:
        """Let a sealed batch be sent again from `at` on; nothing else of its session goes before."""
        session = self._session(session_id)
        session.is_busy = False
        session.batch_id = batch_id
        session.retry_at = at
        self._place_all(session)

    def release(self, session_id: int) -> None:
        """Note that a session's batch in flight is settled or parked."""
        session = self._sessions[session_id]
        session.is_busy = False
        session.batch_id = None
        session.retry_at = inf
        session.withheld.clear()
        if session.windows:
            self._place_all(session)
        else:
            del self._sessions[session_id]

    def withhold(self, session_id: int, window_id: int) -> None:
        """Note that nothing of the window may be sent until something else happens to its session."""
        session = self._sessions[session_id]
        session.withheld.add(window_id)
        session.is_busy = False
        self._place_all(session)

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
        rank, _, _, window_id, session_id = heapq.heappop(self._ready)
        session = self._sessions[session_id]
        session.is_busy = True
        return Choice(session_id, window_id or None, None if window_id else session.batch_id, _REASONS[rank])

    # -- the heaps

    def _session(self, session_id: int) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = _Session(session_id)
        return session

    def _is_full(self, window: _Window) -> bool:
        return window.events >= self._limits.max_events or window.events_bytes >= self._limits.max_bytes

    def _place_all(self, session: _Session) -> None:
        """Give a session's entries new places, now that something has changed for all of them."""
        if session.batch_id is not None:
            self._stamp += 1
            session.stamp = self._stamp
            heapq.heappush(self._waiting, (session.retry_at, self._stamp, 0, session.session_id))
            return
        for window in session.windows.values():
            self._place(window)

    def _place(self, window: _Window) -> None:
        session = window.session
        if window.window_id in session.withheld:
            return
        self._stamp += 1
        window.stamp = self._stamp
        due_at = -inf if self._is_full(window) or session.finals else window.oldest_at + self._linger
        heapq.heappush(self._waiting, (due_at, self._stamp, window.window_id, session.session_id))

    def _is_current(self, stamp: int, window_id: int, session_id: int) -> bool:
        session = self._sessions.get(session_id)
        if session is None or session.is_busy:
            return False
        if not window_id:
            return session.batch_id is not None and session.stamp == stamp
        window = self._windows.get(window_id)
        return session.batch_id is None and window is not None and window.stamp == stamp

    def _ripen(self, now: float) -> None:
        """Move what is due from the waiting to the ready, and drop stale entries from both tops."""
        while self._waiting:
            due_at, stamp, window_id, session_id = self._waiting[0]
            if due_at > now and self._is_current(stamp, window_id, session_id):
                break
            heapq.heappop(self._waiting)
            if self._is_current(stamp, window_id, session_id):
                rank, age = self._rank(window_id, session_id)
                heapq.heappush(self._ready, (rank, age, stamp, window_id, session_id))
        while self._ready and not self._is_current(*self._ready[0][2:]):
            heapq.heappop(self._ready)

    def _rank(self, window_id: int, session_id: int) -> tuple[int, float]:
        if not window_id:
            return _RETRY, self._sessions[session_id].retry_at
        window = self._windows[window_id]
        if window.finals:
            return _FINAL, window.oldest_at
        if self._is_full(window):
            return _FULL, window.oldest_at
        return (_AWAITED if window.session.finals else _LINGERED), window.oldest_at
