from __future__ import annotations

import heapq
import sys
from collections.abc import Sized
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.protocol.cut import Likeness, Limits, Merge, Parting, parting
from relay.protocol.schedule import MAX_OPEN_SECONDS, STUCK_SECONDS, Choice, Schedule

LIMITS = Limits(10, 1_000)
LINGER = 5.0
LIVE_SHARE = 0.5
PAGES = (Likeness(b"a1", b"a"), Likeness(b"a2", b"a"), Likeness(b"b", b"b"))
"""Two pages of one envelope, and another envelope."""


class FakeWindow(msgspec.Struct):
    """A window as the model knows it."""

    session_id: int
    oldest_at: float
    pages: list[Likeness]
    """Of its runs, in order."""
    merges_pages: bool
    events: int = 0
    events_bytes: int = 0
    finals: int = 0
    is_withheld: bool = False

    def standing(self) -> str | None:
        """Return why its first run is complete by itself, None for an open run or a final."""
        more = bool(self.finals)  # a full batch that the final is in would be two, if the final has to wait
        if self.events >= LIMITS.max_events + more or self.events_bytes >= LIMITS.max_bytes + more:
            return "full"
        return "closed" if self.parting().parts(merges_pages=self.merges_pages) else None

    def parting(self) -> Parting:
        """Return what parts its runs."""
        return max(parting(self.pages[0], page) for page in self.pages)

    def turn_at(self) -> float:
        """Return what its session orders it by."""
        if self.standing():
            return self.oldest_at
        return inf if self.finals else self.oldest_at + MAX_OPEN_SECONDS


class FakeSession(msgspec.Struct):
    """A session as the model knows it."""

    choice: Choice | None = None
    batch_id: int | None = None
    retry_at: float = inf
    is_stuck: bool = False
    passed_over: int = 0
    """Complete runs of other sessions sent while it stood in line."""


class Candidate(msgspec.Struct, frozen=True):
    """What may be sent of a session, now or later."""

    session_id: int
    reasons: dict[int | None, str]
    """Any of these windows, with why; None for a sealed batch."""
    rank: int
    """0 a retry, 1 a complete run, 2 an open run, 3 a stuck batch."""
    due_at: float
    age: float
    """When the batch may be sent again, or when the run's oldest event was accepted."""


class Model:
    """The schedule as plain lists that are looked through every time."""

    def __init__(self) -> None:
        self.merges_pages = False
        self.windows: dict[int, FakeWindow] = {}
        self.sessions: dict[int, FakeSession] = {}
        self.stuck_not_before = -inf
        self.in_a_row = {False: 0, True: 0}
        """Choices of what was never sent, and of what is sent again, while the other waited."""

    def may_be(self, due: list[Candidate]) -> set[int]:
        """Return of which ranks the next choice may be, where something is due."""
        ranks = {found.rank for found in due}
        return {min(side) for side in (ranks & {1, 2}, ranks & {0, 3}) if side}

    def take_turns(self, ranks: set[int], rank: int) -> None:
        """Note a choice; with equal shares neither side waits for long (live, again, live, backlog, live, again, …)."""
        is_again = rank in {0, 3}
        self.in_a_row[is_again] = self.in_a_row[is_again] + 1 if len(ranks) == 2 else 0
        self.in_a_row[not is_again] = 0
        assert self.in_a_row[True] <= 2
        assert self.in_a_row[False] <= 4

    def candidates(self, now: float, *, may_be_stuck: bool) -> list[Candidate]:
        """Return what may be sent at some time, one a session."""
        return [
            found
            for session_id, session in self.sessions.items()
            if session.choice is None
            and (may_be_stuck or not session.is_stuck)
            and (found := self._candidate(session_id, session, now)) is not None
        ]

    def _candidate(self, session_id: int, session: FakeSession, now: float) -> Candidate | None:
        if session.batch_id is not None:
            due_at = max(session.retry_at, self.stuck_not_before) if session.is_stuck else session.retry_at
            reason, rank = ("stuck", 3) if session.is_stuck else ("retry", 0)
            return Candidate(session_id, {None: reason}, rank, due_at, session.retry_at)
        mine = {number: window for number, window in self.windows.items() if window.session_id == session_id}
        free = {number: window for number, window in mine.items() if not window.is_withheld}
        if not free:
            return None
        turn_at = min(window.turn_at() for window in free.values())
        firsts = {number: window for number, window in free.items() if window.turn_at() == turn_at}
        oldest_at = min(window.oldest_at for window in firsts.values())
        has_final = any(window.finals for window in mine.values())
        is_aged = oldest_at + MAX_OPEN_SECONDS <= now
        reasons: dict[int | None, str] = {
            number: window.standing()
            or ("final" if window.finals else "awaited" if has_final else "aged" if is_aged else "lingered")
            for number, window in firsts.items()
        }
        is_open = "lingered" in reasons.values()  # then all of them are: they are of one age
        return Candidate(session_id, reasons, 1 + is_open, oldest_at + LINGER if is_open else -inf, oldest_at)


class ScheduleMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the schedule answers as the model does."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule(LIMITS, LINGER, LIVE_SHARE)
        self.model = Model()
        self.now = 100.0
        self.batches = 0
        self.changes = 0

    @initialize(
        found=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 8)), max_size=3, unique_by=lambda pair: pair[0]),
        merge=st.sampled_from(["strict", "page"]),
    )
    def restore(self, found: list[tuple[int, int]], merge: Merge) -> None:
        """Sealed batches of an earlier run, one a session."""
        self.schedule = Schedule(LIMITS, LINGER, LIVE_SHARE, merge)
        self.model.merges_pages = merge == "page"
        for session_id, delay in found:
            self.batches += 1
            self.schedule.retry_at(session_id, self.batches, self.now + delay)
            self.model.sessions[session_id] = FakeSession(None, self.batches, self.now + delay)

    @rule(
        session_id=st.integers(1, 3),
        number=st.integers(1, 3),
        events=st.sampled_from([1, 1, 3, 9, 10]),
        events_bytes=st.sampled_from([1, 10, 999, 1_000]),
        finals=st.sampled_from([0, 0, 0, 1]),
        age=st.sampled_from([0, 0, 1, 7]),
        page=st.sampled_from(PAGES),
    )
    def add(
        self, session_id: int, number: int, events: int, events_bytes: int, finals: int, age: int, page: Likeness
    ) -> None:
        """Segments accepted, now or before a restart."""
        window_id = 10 * session_id + number
        self.changes += 1
        counts: dict[str, Any] = {"events": events, "events_bytes": events_bytes, "deflated_bytes": 1, "finals": finals}
        self.schedule.add(session_id, window_id, **counts, oldest_at=self.now - age, likeness=page)
        self.model.sessions.setdefault(session_id, FakeSession())
        window = self.model.windows.setdefault(
            window_id, FakeWindow(session_id, self.now - age, [page], self.model.merges_pages)
        )
        window.events += events
        window.events_bytes += events_bytes
        window.finals += finals
        if window.pages[-1] != page:
            window.pages.append(page)
        self._let_go(session_id)

    @rule(seconds=st.sampled_from([0.5, 1, 4, 5, 20, 701.25, 1_000]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule(may_be_stuck=st.booleans())
    def choose(self, may_be_stuck: bool) -> None:
        """Something is chosen just when something is due, and nothing of a better rank, or older, is passed over."""
        candidates = self.model.candidates(self.now, may_be_stuck=may_be_stuck)
        due = [found for found in candidates if found.due_at <= self.now]
        choice = self.schedule.choose(self.now, may_be_stuck=may_be_stuck)
        if not due:
            assert choice is None
            return
        assert choice is not None
        session = self.model.sessions[choice.session_id]
        assert session.choice is None
        (chosen,) = (found for found in due if found.session_id == choice.session_id)
        assert chosen.rank in self.model.may_be(due)
        self.model.take_turns(self.model.may_be(due), chosen.rank)
        if chosen.rank == 3:
            self.model.stuck_not_before = self.now + STUCK_SECONDS
        if chosen.rank != 1:
            assert chosen.age == min(found.age for found in due if found.rank == chosen.rank)
        assert choice.reason == chosen.reasons[choice.window_id]
        assert choice.batch_id == (None if choice.window_id else session.batch_id)
        assert choice.merges_pages == (self.model.merges_pages and choice.window_id is not None)
        session.choice = choice
        self._check_line(chosen, due)

    def _check_line(self, chosen: Candidate, due: list[Candidate]) -> None:
        """Nobody stands in line for more than two rounds of each of the two lines."""
        session_ids = {found.session_id for found in due if found.rank == 1} - {chosen.session_id}
        for session_id, session in self.model.sessions.items():
            session.passed_over = session.passed_over + (chosen.rank == 1) if session_id in session_ids else 0
            # Two rounds: who has come into line by age alone goes to its end when the run is complete by itself.
            assert session.passed_over <= 4 * len(self.model.sessions)

    def in_flight(self) -> list[int]:
        """Return the sessions that are busy."""
        return [session_id for session_id, session in self.model.sessions.items() if session.choice]

    @precondition(lambda self: self.in_flight())
    @rule(
        data=st.data(),
        ending=st.sampled_from(["delivered", "delivered", "retry", "stuck", "untouched", "withheld"]),
        share=st.sampled_from([1.0, 0.5]),
        delay=st.integers(0, 9),
    )
    def finish(self, data: st.DataObject, ending: str, share: float, delay: int) -> None:
        """What is in flight is sealed or not, and settled, sent again later, given up, or withheld."""
        session_id = data.draw(st.sampled_from(self.in_flight()))
        session = self.model.sessions[session_id]
        assert session.choice is not None
        window_id = session.choice.window_id
        session.choice = None
        self.changes += 1
        if window_id is not None and ending == "withheld":
            self.schedule.withhold(session_id, window_id)
            self.model.windows[window_id].is_withheld = True
            return
        if window_id is not None and ending != "untouched":
            self._seal(window_id, share)
        if ending in {"retry", "stuck"}:
            self.batches += 1
            session.batch_id = session.batch_id or self.batches
            session.retry_at = self.now + delay
            session.is_stuck = ending == "stuck"
            self.schedule.retry_at(session_id, session.batch_id, session.retry_at, is_stuck=session.is_stuck)
            return
        self.schedule.release(session_id)
        session.batch_id = None
        if session.is_stuck:
            session.is_stuck = False
            self.model.stuck_not_before = -inf
        self._let_go(session_id)
        if not any(window.session_id == session_id for window in self.model.windows.values()):
            del self.model.sessions[session_id]

    def _seal(self, window_id: int, share: float) -> None:
        window = self.model.windows[window_id]
        events = max(1, int(window.events * share))
        taken_bytes = int(window.events_bytes * share)
        leaves = events < window.events
        finals = 0 if leaves else window.finals
        left_at = window.oldest_at + 1 if leaves else None
        window.pages = window.pages[1:] or window.pages
        left = window.parting() if leaves else Parting.NOTHING
        counts: dict[str, Any] = {"events": events, "events_bytes": taken_bytes, "deflated_bytes": 0, "finals": finals}
        self.schedule.seal(window_id, **counts, next_oldest_at=left_at, next_parting=left)
        if left_at is None:
            del self.model.windows[window_id]
            return
        window.events -= events
        window.events_bytes -= taken_bytes
        window.finals -= finals
        window.oldest_at = left_at

    def _let_go(self, session_id: int) -> None:
        for window in self.model.windows.values():
            if window.session_id == session_id:
                window.is_withheld = False

    @invariant()
    def wakes_up_in_time(self) -> None:
        """The next moment to look is the moment when the next thing is due: neither later nor for nothing."""
        for may_be_stuck in (False, True):
            candidates = self.model.candidates(self.now, may_be_stuck=may_be_stuck)
            due_at = min((found.due_at for found in candidates), default=inf)
            assert self.schedule.ready_at(self.now, may_be_stuck=may_be_stuck) == max(due_at, self.now)

    @invariant()
    def knows_what_is_pending(self) -> None:
        """Windows and sessions are those of the model."""
        assert len(self.schedule) == len(self.model.windows)
        assert all(self.schedule.has_window(window_id) for window_id in self.model.windows)
        assert not self.schedule.has_window(99)
        assert self.schedule.is_empty == (not self.model.sessions)

    @invariant()
    def keeps_little(self) -> None:
        """Entries are at most one for each session, and stale ones a few for each change since."""
        assert count_entries(self.schedule) <= len(self.model.sessions) + self.changes
        assert sum(len(session.queue) for session in self.schedule._sessions.values()) <= 3 * self.changes

    def teardown(self) -> None:
        """Nothing is forgotten: with upstream well, all that is pending is chosen within the linger time."""
        for session_id in self.in_flight():
            self.schedule.release(session_id)
        for window_id, window in self.model.windows.items():
            counts: dict[str, Any] = {"events": 1, "events_bytes": 1, "deflated_bytes": 1, "finals": 0}
            self.schedule.add(window.session_id, window_id, **counts, oldest_at=self.now, likeness=PAGES[0])
        left = set(self.model.windows)
        self.now += 100
        while (choice := self.schedule.choose(self.now)) is not None:
            if choice.window_id is not None:
                left.remove(choice.window_id)
                counts = {
                    "events": 10**9,
                    "events_bytes": 0,
                    "deflated_bytes": 0,
                    "finals": self.model.windows[choice.window_id].finals,
                }
                self.schedule.seal(choice.window_id, **counts, next_oldest_at=None)
            self.schedule.release(choice.session_id)
        assert not left
        assert self.schedule.is_empty
        assert self.schedule.ready_at(self.now) == inf


TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def count_entries(schedule: Schedule) -> int:
    """Return how many entries the lane's queues hold, stale ones included."""
    queues: tuple[Sized, ...] = (
        *(schedule._waiting, schedule._retries, schedule._stuck, schedule._open),
        *(schedule._live, schedule._backlog),
    )
    return sum(len(queue) for queue in queues)


def make_schedule(windows: int, per_session: int, events: int = 1) -> Schedule:
    """Return a schedule of windows, evenly spread over sessions, that linger or, with 10 events, are full."""
    schedule = Schedule(LIMITS, LINGER, LIVE_SHARE)
    for number in range(windows):
        counts: dict[str, Any] = {"events": events, "events_bytes": 10, "deflated_bytes": 1, "finals": 0}
        schedule.add(1 + number // per_session, 1 + number, **counts, oldest_at=number / windows, likeness=PAGES[0])
    return schedule


def count_heap_steps(call: Any) -> int:
    """Return how many entries are pushed or popped while a function runs."""
    steps = 0

    def note(_frame: object, event: str, what: object) -> None:
        nonlocal steps
        steps += event == "c_call" and what in (heapq.heappush, heapq.heappop)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return steps


def serve(schedule: Schedule, now: float) -> bool:
    """Deliver one window; returns whether there was one."""
    schedule.ready_at(now)
    choice = schedule.choose(now)
    if choice is None:
        return False
    assert choice.window_id is not None
    schedule.seal(choice.window_id, events=10, events_bytes=10, deflated_bytes=1, finals=0, next_oldest_at=None)
    schedule.ready_at(now)
    schedule.release(choice.session_id)
    return True


@pytest.mark.parametrize("now", [100.0, 2_000.0])
@pytest.mark.parametrize("events", [1, 10])
@pytest.mark.parametrize("per_session", [1, 10, 20_000])
def test_a_delivery_costs_a_few_heap_steps_however_much_is_pending(per_session: int, events: int, now: float) -> None:
    """With 20 000 windows due, lingering, full or aged, in one session or in as many, each costs a constant."""
    windows = 20_000
    schedule = make_schedule(windows, per_session, events)
    # Of what has become due at once each look moves a bounded part, and by age once more.
    assert count_heap_steps(lambda: schedule.ready_at(now)) <= 3 * 250
    served = 0

    def serve_all() -> None:
        nonlocal served
        while serve(schedule, now):
            served += 1

    assert count_heap_steps(serve_all) <= 6 * windows
    assert served == windows


def test_waiting_costs_nothing() -> None:
    """Asking again while nothing is due moves no entry."""
    schedule = make_schedule(5_000, 1)
    assert count_heap_steps(lambda: [schedule.ready_at(1.0) for _ in range(100)]) == 0
    assert schedule.ready_at(1.0) == LINGER


def test_batches_behind_a_pending_final_leave_no_entries() -> None:
    """While nothing can be sent, a session that goes on after its final takes no more room."""
    schedule = Schedule(LIMITS, LINGER, LIVE_SHARE)
    schedule.add(1, 1, events=1, events_bytes=1, deflated_bytes=1, finals=1, oldest_at=0, likeness=PAGES[0])
    for number in range(1_000):
        schedule.add(
            1,
            2,
            events=1,
            events_bytes=1,
            deflated_bytes=1,
            finals=number % 2,
            oldest_at=number,
            likeness=PAGES[number % 2],
        )
        assert schedule.ready_at(number) == number
    assert count_entries(schedule) < 10
    assert len(schedule._sessions[1].queue) < 10


def test_a_seal_that_left_more_than_was_counted_is_believed() -> None:
    """The spool knows better: what it says is left stays scheduled, whatever the count says."""
    schedule = Schedule(LIMITS, LINGER, LIVE_SHARE)
    schedule.add(1, 1, events=10, events_bytes=1, deflated_bytes=1, finals=0, oldest_at=0, likeness=PAGES[0])
    choice = schedule.choose(0)
    assert choice == Choice(1, 1, None, "full")
    schedule.seal(1, events=10, events_bytes=1, deflated_bytes=1, finals=0, next_oldest_at=3)
    schedule.release(1)
    assert schedule.ready_at(0) == 3 + LINGER
    assert schedule.choose(3 + LINGER) == Choice(1, 1, None, "lingered")


def test_a_forgotten_session_leaves_nothing_behind() -> None:
    """Whether it waits, is withheld or is being asked for, its windows are gone; what comes later is served."""
    schedule = make_schedule(6, 2)
    schedule.forget(1)
    schedule.forget(9)
    now = LINGER + 2
    for _ in range(2):
        choice = schedule.choose(now)
        assert choice is not None
        assert choice.window_id is not None
        assert choice.session_id in (2, 3)
        if choice.session_id == 2:
            schedule.withhold(2, choice.window_id)
            schedule.forget(2)
        else:
            schedule.forget(3)
            schedule.withhold(3, choice.window_id)
    assert (len(schedule), schedule.is_empty, schedule.choose(now)) == (0, True, None)
    schedule.add(3, 5, events=1, events_bytes=10, deflated_bytes=10, finals=0, oldest_at=now, likeness=PAGES[0])
    assert schedule.choose(now) is None
    later = schedule.choose(now + LINGER)
    assert later is not None
    assert later.window_id == 5
