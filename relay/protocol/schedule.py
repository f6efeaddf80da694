"""The schedule: which session of a key is served next, and when to look again.

A window's pending events form *runs* that may merge: of one envelope, or, where pages are merged, of envelopes that
differ in nothing else. What matters of them is whether the first is *complete*: full to the limits, closed by a changed
envelope behind it, ended by a final, or awaited by a final of its session. A complete run costs its request whenever
it is sent; an open one may still grow, and costs less the longer it waits.

So the order is: sealed batches whose retry is due, in turns with the others (rule 9); complete runs, session by
session; open runs that have lingered, the oldest first. While requests are plentiful nothing of this shows: whatever
is complete or has lingered goes at once. While they are scarce every request that can be full is full, and open runs
share what full ones leave, so each is sent at the latest when it is complete, and no wait grows as long as demand is
within the budget.

Rules:
1. Pure: time is an argument (any monotonic clock, seconds), and nothing is read or sent here.
2. One batch of a session is in flight at a time (law 8): a choice makes its session busy until the caller releases it.
3. Sessions with complete runs stand in line, and each goes back to its end after every batch. All requests cost the
   same, so this is fair queueing: a noisy session delays another by one request a round.
4. There are two lines, for live traffic and for backlog, and while both are occupied they share the requests. Neither
   starves after an outage, nor does a new session have to wait until the backlog is gone. Whoever grows old in the line
   of live traffic changes over to the other. What is sent again counts as backlog, of which an outage leaves much.
5. An open run counts as complete once it is so old that waiting for more saves little. Only where demand has exceeded
   the budget for long does a run get so old; without this rule the last events of a session that fell silent would
   wait until demand sinks.
6. A choice costs O(log n), however the windows are spread over sessions: a session queues its windows, and stands in
   one of the lane's queues with the best of them only. Stale entries are not removed but recognised, by their stamp;
   there is a new entry only where something has changed, so they are a few for each choice. However much falls due
   at a time, a look at it takes a bounded number of steps.
7. A window takes the same room however much of it is pending. What is counted here is an aid to choosing: the cut is
   made by the spool, from what is really there, and after each the spool says what it left.
8. With `batch.merge = "page-when-scarce"` the rule of merging changes with every choice, as the caller says. Sessions
   keep the place that they had by the other rule until they are the first in line: then one with a run that is closed
   no more goes back to the open ones. The other way round it goes by its age, which where requests are plentiful is
   soon enough.
9. No batch keeps others from being sent by failing: whatever is sent again takes turns with what was never tried. So
   upstream is not judged by one batch while it is only probed. Batches that are stuck (`failures.py`) also go one at a
   time, and one in ten seconds.
"""

from __future__ import annotations

import heapq
from collections import deque
from math import inf
from typing import Literal

import msgspec

from relay.protocol.cut import Likeness, Limits, Merge, Parting, parting
from relay.protocol.pending import COMPLETE, NOWHERE, OPEN, RETRY, STUCK, Session, Window

BACKLOG_SECONDS = 600.0
"""Older runs are backlog. In the simulator, quiet readers' runs are sent within 452 s, full or not, while the optimum
needs nine tenths of the budget; those of all others sooner."""

MAX_OPEN_SECONDS = 900.0
"""The age at which an open run counts as complete. In the simulator, with quiet readers who demand 120% of the budget,
it takes 1.022 times the optimum at 300 s, 1.006 at 600, 1.005 at 900 and at 1800."""

_MOST_MOVED = 250
"""Runs that fall due at one look, about 1 ms. Where more are due at a time, as after a restart, the next looks have the
rest: whoever asks has more to do than this, and what is due cannot all be sent at once anyway."""

STUCK_SECONDS = 10.0
"""Between stuck batches, until one is taken: they have a sixteenth of the published budget."""

Reason = Literal["retry", "stuck", "part", "full", "closed", "awaited", "final", "lingered", "aged"]


class Choice(msgspec.Struct, frozen=True):
    """What to do next."""

    session_id: int
    """Busy from now on, until `release`, `retry_at` or `withhold`."""
    window_id: int | None
    """Seal this window's next batch; None to send `batch_id`."""
    batch_id: int | None
    """The sealed batch to send, again or as a part of a refused one."""
    reason: Reason
    """Why it is due."""
    merges_pages: bool = False
    """Whether a changed page does not end the window's batch."""


class Schedule:
    """The pending windows and sealed batches of one upstream key.

    Args:
        limits: Of an upstream batch; a window that reaches one of them is full.
        linger_seconds: How long an open run may wait for company while requests are plentiful.
        live_share: Share of the requests for live traffic, above 0 and below 1, while it and backlog both wait.
        merge: Whether a changed page closes a run.
    """

    def __init__(self, limits: Limits, linger_seconds: float, live_share: float, merge: Merge = "strict") -> None:
        self._limits = limits
        self._merge = merge
        self._merges_pages = merge == "page"
        self._linger = linger_seconds
        self._live_share = live_share
        self._live_credit = 0.0
        self._sessions: dict[int, Session] = {}
        self._windows: dict[int, Window] = {}
        self._waiting: list[tuple[float, int, int]] = []
        """(due_at, stamp, session_id) of sessions with runs that are not looked at yet"""
        self._retries: list[tuple[float, int, int]] = []
        """(retry_at, stamp, session_id)"""
        self._stuck: list[tuple[float, int, int]] = []
        """(retry_at, stamp, session_id)"""
        self._stuck_not_before = -inf
        self._was_again = False
        """Whether the last choice, but for live traffic, was a batch that had been sent before."""
        self._live: deque[tuple[int, int]] = deque()
        self._backlog: deque[tuple[int, int]] = deque()
        """(stamp, session_id) of sessions with complete runs, in line"""
        self._open: list[tuple[float, int, int]] = []
        """(oldest_at, stamp, session_id)"""
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
        self,
        session_id: int,
        window_id: int,
        *,
        likeness: Likeness,
        events: int,
        events_bytes: int,
        deflated_bytes: int,
        finals: int,
        oldest_at: float,
        inner: Parting = Parting.NOTHING,
    ) -> None:
        """Note that segments were accepted in a window.

        Args:
            session_id: The window's session.
            window_id: The window.
            likeness: Of the last segment.
            events: Their events.
            events_bytes: Uncompressed.
            deflated_bytes: As they are sent.
            finals: Segments that end the session.
            oldest_at: When the first of them was accepted.
            inner: What parts them from one another.
        """
        session = self._session(session_id)
        window = self._windows.get(window_id)
        if window is None:
            window = Window(window_id, session, likeness, oldest_at)
            self._windows[window_id] = session.windows[window_id] = window
        turn_at = self._turn_at(window)
        window.parting = max(window.parting, inner, parting(window.likeness, likeness))
        window.likeness = likeness
        window.events += events
        window.events_bytes += events_bytes
        window.deflated_bytes += deflated_bytes
        window.finals += finals
        session.finals += finals
        if window_id not in session.withheld and (not window.stamp or self._turn_at(window) != turn_at):
            self._queue(window)
        self._queue_withheld(session)
        self._place(session)

    def seal(
        self,
        window_id: int,
        *,
        events: int,
        events_bytes: int,
        deflated_bytes: int,
        finals: int,
        next_oldest_at: float | None,
        next_parting: Parting = Parting.NOTHING,
    ) -> None:
        """Note that a batch was sealed from a window.

        Args:
            window_id: The window.
            events: Events in the batch.
            events_bytes: Uncompressed.
            deflated_bytes: As they are sent.
            finals: Final segments in it.
            next_oldest_at: When the oldest segment that it left was accepted; None where it left nothing.
            next_parting: What parts the first run of what it left from the rest.
        """
        window = self._windows[window_id]
        session = window.session
        window.events -= events
        window.events_bytes -= events_bytes
        window.deflated_bytes -= deflated_bytes
        window.finals -= finals
        session.finals -= finals
        window.parting = next_parting
        if next_oldest_at is not None:
            window.oldest_at = next_oldest_at
            window.events = max(window.events, 1)  # the spool knows better than the count
        if window.events > 0:
            self._queue(window)
        else:
            del self._windows[window_id], session.windows[window_id]

    def retry_at(self, session_id: int, batch_id: int, at: float, *, is_stuck: bool = False) -> None:
        """Let a sealed batch be sent again from `at` on, nothing of its session before it; stuck, it stands back."""
        session = self._session(session_id)
        session.is_busy = False
        session.batch_id = batch_id
        session.is_part = False
        session.is_stuck = is_stuck
        session.retry_at = at
        self._place(session)

    def queue_part(self, session_id: int, batch_id: int) -> None:
        """Let a part of a refused batch be sent in the session's turn (rule 3); nothing else of the session before it.

        It is no retry, which would go before everybody: to find one bad event takes many requests.
        """
        session = self._session(session_id)
        self._end_sending(session)
        session.batch_id = batch_id
        session.is_part = True
        self._place(session)

    def release(self, session_id: int) -> None:
        """Note that a session's batch in flight is settled."""
        session = self._sessions[session_id]
        self._end_sending(session)
        session.batch_id = None
        self._queue_withheld(session)
        if session.windows:
            self._place(session)
        else:
            del self._sessions[session_id]

    def _end_sending(self, session: Session) -> None:
        session.is_busy = False
        if session.is_stuck:
            session.is_stuck = False
            self._stuck_not_before = -inf  # the others may be taken, too

    def forget(self, session_id: int) -> None:
        """Note that nothing of a session is pending any more, though none of it was sent."""
        session = self._sessions.pop(session_id, None)
        for window_id in session.windows if session else ():
            del self._windows[window_id]
        if session and session.is_busy:  # something of it was asked for, to no avail
            self._session(session_id).is_busy = True

    def withhold(self, session_id: int, window_id: int) -> None:
        """Note that nothing of the window may be sent until something else happens to its session."""
        if window_id not in self._windows:  # forgotten, while it was asked for
            self.release(session_id)
            return
        session = self._sessions[session_id]
        session.is_busy = False
        session.withheld.append(window_id)
        self._windows[window_id].stamp = 0
        self._place(session)

    # -- what to do

    def ready_at(self, now: float, *, may_be_stuck: bool = True) -> float:
        """Return when there may be something to send: `now`, later, or inf; `may_be_stuck` as `choose`."""
        self._ripen(now)
        if self._live or self._backlog or self._open:
            return now
        waiting = (queue[0][0] for queue in (self._retries, self._waiting) if queue)
        return max(now, min(*waiting, self._stuck_ready_at() if may_be_stuck else inf, inf))

    def _stuck_ready_at(self) -> float:
        return max(self._stuck[0][0], self._stuck_not_before) if self._stuck else inf

    def choose(self, now: float, *, is_scarce: bool = False, may_be_stuck: bool = True) -> Choice | None:
        """Choose what to send and make its session busy; None where nothing is due.

        Args:
            now: Any monotonic clock, seconds.
            is_scarce: Whether requests are scarce, as `Budget.is_scarce` has it.
            may_be_stuck: Whether a stuck batch may be sent, that is, no other is under way.
        """
        self._merges_pages = self._merge == "page" or (self._merge == "page-when-scarce" and is_scarce)
        self._ripen(now)
        again = self._next_again(now, may_be_stuck=may_be_stuck)
        if self._live and self._is_turn_of_live(has_rest=again is not None or bool(self._backlog)):
            session_id = self._live.popleft()[-1]
        elif again is not None and not (self._was_again and (self._backlog or (self._open and not self._live))):
            session_id = heapq.heappop(again)[-1]
            self._was_again = True
            if again is self._stuck:
                self._stuck_not_before = now + STUCK_SECONDS
        elif self._backlog or self._open:
            session_id = self._backlog.popleft()[-1] if self._backlog else heapq.heappop(self._open)[-1]
            self._was_again = False
        else:
            return None
        session = self._sessions[session_id]
        session.is_busy = True
        session.place = NOWHERE
        if session.batch_id is not None:
            reason: Reason = "part" if session.is_part else "stuck" if session.is_stuck else "retry"
            return Choice(session_id, None, session.batch_id, reason)
        window = self._windows[session.queue[0][-1]]
        return Choice(session_id, window.window_id, None, self._reason(window, now), self._merges_pages)

    def _next_again(self, now: float, *, may_be_stuck: bool) -> list[tuple[float, int, int]] | None:
        """Return the queue whose first batch is due to be sent again."""
        if self._retries and self._retries[0][0] <= now:
            return self._retries
        return self._stuck if may_be_stuck and self._stuck_ready_at() <= now else None

    def _is_turn_of_live(self, *, has_rest: bool) -> bool:
        if not has_rest:
            return True
        self._live_credit += self._live_share
        if self._live_credit < 1:
            return False
        self._live_credit -= 1
        return True

    # -- a session's queue

    def _session(self, session_id: int) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = Session(session_id)
        return session

    def _is_full(self, window: Window) -> bool:
        # With a final, more than full: a final that fits in would be cut off and sent alone, if it has to wait.
        spare = 1 if window.finals else 0
        return (
            window.events >= self._limits.max_events + spare
            or window.events_bytes >= self._limits.max_bytes + spare
            or window.deflated_bytes >= self._limits.max_gzip_bytes + spare
        )

    def _is_closed(self, window: Window) -> bool:
        return window.parting.parts(merges_pages=self._merges_pages)

    def _is_complete(self, window: Window) -> bool:
        return self._is_closed(window) or self._is_full(window)

    def _turn_at(self, window: Window) -> float:
        """Return what orders the windows of a session: an open run counts from when it will be complete by age."""
        if self._is_complete(window):
            return window.oldest_at
        # A final goes last, being the one that waits for the others.
        return inf if window.finals else window.oldest_at + MAX_OPEN_SECONDS

    def _reason(self, window: Window, now: float) -> Reason:
        if self._is_full(window):
            return "full"
        if self._is_closed(window):
            return "closed"
        if window.session.finals:
            return "final" if window.finals else "awaited"
        return "aged" if window.oldest_at + MAX_OPEN_SECONDS <= now else "lingered"

    def _queue(self, window: Window) -> None:
        """Give a window a new entry in its session's queue."""
        self._stamp += 1
        window.stamp = self._stamp
        heapq.heappush(window.session.queue, (self._turn_at(window), window.stamp, window.window_id))

    def _queue_withheld(self, session: Session) -> None:
        while session.withheld:
            self._queue(self._windows[session.withheld.pop()])

    def _first(self, session: Session) -> Window | None:
        """Return the window to serve first, and clear the top of the queue up to it."""
        while session.queue:
            window = self._windows.get(session.queue[0][-1])
            if window is not None and window.stamp == session.queue[0][1]:
                return window
            heapq.heappop(session.queue)
        return None

    # -- the lane's queues

    def _place(self, session: Session) -> None:
        """Give a session its place in the queues, if that has changed."""
        if session.is_busy:
            return
        place = self._place_of(session)
        if place == session.place:
            return
        session.place = place
        self._stamp += 1
        session.stamp = self._stamp
        queue = {RETRY: self._retries, STUCK: self._stuck}.get(place[1], self._waiting)
        heapq.heappush(queue, (place[0], session.stamp, session.session_id))

    def _place_of(self, session: Session) -> tuple[float, int, float]:
        if session.batch_id is not None:
            if session.is_part:
                return -inf, COMPLETE, 0.0
            return session.retry_at, STUCK if session.is_stuck else RETRY, session.retry_at
        window = self._first(session)
        if window is None:
            return NOWHERE
        if self._is_complete(window) or session.finals:
            return -inf, COMPLETE, 0.0  # in line it keeps its place, whichever of its windows is the first
        return window.oldest_at + self._linger, OPEN, window.oldest_at

    def _is_current(self, stamp: int, session_id: int) -> bool:
        session = self._sessions.get(session_id)
        return session is not None and session.stamp == stamp

    def _ripen(self, now: float) -> None:
        """Move what is due from the waiting to the ready, up to a bound, and drop stale entries from all heads."""
        for queue in (self._waiting, self._retries, self._stuck, self._open):
            self._drop_stale(queue)
        for _ in range(_MOST_MOVED):
            if not self._waiting or self._waiting[0][0] > now:
                break
            self._ready(self._sessions[heapq.heappop(self._waiting)[-1]], now)
            self._drop_stale(self._waiting)
        for _ in range(_MOST_MOVED):
            if not self._open or self._open[0][0] + MAX_OPEN_SECONDS > now:
                break
            self._backlog.append(heapq.heappop(self._open)[1:])
            self._drop_stale(self._open)
        self._leave_line(self._live)
        for _ in range(_MOST_MOVED):
            if not self._live or not self._is_backlog(self._sessions[self._live[0][-1]], now):
                break
            self._backlog.append(self._live.popleft())  # it grew old in line, as all do while upstream is away
            self._leave_line(self._live)
        self._leave_line(self._backlog)

    def _is_backlog(self, session: Session, now: float) -> bool:
        first = self._first(session)
        return first is not None and first.oldest_at + BACKLOG_SECONDS <= now

    def _drop_stale(self, queue: list[tuple[float, int, int]]) -> None:
        while queue and not self._is_current(*queue[0][1:]):
            heapq.heappop(queue)

    def _leave_line(self, line: deque[tuple[int, int]]) -> None:
        """Let those at the head of a line go who do not belong there any more."""
        while line and not self._stays_in_line(*line[0]):
            line.popleft()

    def _stays_in_line(self, stamp: int, session_id: int) -> bool:
        if self._is_current(stamp, session_id) and self._merge == "page-when-scarce":
            self._place(self._sessions[session_id])  # which leaves the line if its place is another now
        return self._is_current(stamp, session_id)

    def _ready(self, session: Session, now: float) -> None:
        _, rank, oldest_at = session.place
        if rank == COMPLETE:
            line = self._backlog if self._is_backlog(session, now) else self._live
            line.append((session.stamp, session.session_id))
        else:
            heapq.heappush(self._open, (oldest_at, session.stamp, session.session_id))
