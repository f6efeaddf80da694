"""Who waits for whom: fairness between sessions, between live traffic and backlog, and against starvation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.cut import Likeness, Limits, Merge, Parting
from relay.protocol.schedule import BACKLOG_SECONDS, MAX_OPEN_SECONDS, Choice, Schedule

LIMITS = Limits(10, 1_000)
LINGER = 5.0
PAGE, NEXT_PAGE = Likeness(b"a1", b"a"), Likeness(b"a2", b"a")
START = 10_000.0
STEP = 0.6
"""Seconds from one choice to the next: a hundred a minute."""


def make_schedule(live_share: float = 0.5, merge: Merge = "strict") -> Schedule:
    """Return an empty schedule."""
    return Schedule(LIMITS, LINGER, live_share, merge)


def add(
    schedule: Schedule, session_id: int, events: int, oldest_at: float, *, window: int = 0, page: Likeness = PAGE
) -> None:
    """Add events in a session's only window, or in another."""
    window_id = session_id * 10 + window
    schedule.add(
        *(session_id, window_id),
        events=events,
        events_bytes=events,
        deflated_bytes=events,
        finals=0,
        oldest_at=oldest_at,
        likeness=page,
    )


def deliver(schedule: Schedule, choice: Choice, *, leaves: int = 0, left_at: float = 0.0) -> None:
    """Seal what was chosen, all but `leaves` events of it, and release its session."""
    assert choice.window_id is not None
    taken = 10 if leaves else 10**6
    left = left_at if leaves else None
    schedule.seal(
        choice.window_id, events=taken, events_bytes=taken, deflated_bytes=taken, finals=0, next_oldest_at=left
    )
    schedule.release(choice.session_id)


@given(
    quiet=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    noisy=st.integers(1, 3),
)
def test_noisy_sessions_cost_a_quiet_one_a_round(quiet: list[int], noisy: int) -> None:
    """However much noisy sessions have, a complete run waits for one batch of each session at most."""
    schedule = make_schedule()
    sessions = noisy + len(quiet)
    for session_id in range(1, noisy + 1):
        add(schedule, session_id, 10_000, START)
    comes_at = {noisy + 1 + place: step for place, step in enumerate(quiet)}
    served: dict[int, int] = {}
    for step in range(31 + sessions):
        now = START + step * STEP
        for session_id, at in comes_at.items():
            if at == step:
                add(schedule, session_id, 10, now)
        choice = schedule.choose(now)
        assert choice is not None
        if choice.session_id > noisy:
            served[choice.session_id] = step
            deliver(schedule, choice)
        else:
            deliver(schedule, choice, leaves=1, left_at=START)
    assert served.keys() == comes_at.keys()
    assert all(served[session_id] - at < sessions for session_id, at in comes_at.items())


@pytest.mark.parametrize("live_share", [0.1, 0.5, 0.75])
def test_live_traffic_and_backlog_share_by_weight(live_share: float) -> None:
    """While both wait, each has its share of any stretch of choices, give or take one."""
    schedule = make_schedule(live_share)
    for session_id in range(1, 11):
        add(schedule, session_id, 10_000, START - BACKLOG_SECONDS - 1)
    for session_id in range(11, 14):
        add(schedule, session_id, 10_000, START)
    live = 0
    for number in range(1, 401):
        choice = schedule.choose(START)
        assert choice is not None
        is_live = choice.session_id > 10
        live += is_live
        deliver(schedule, choice, leaves=1, left_at=START if is_live else START - BACKLOG_SECONDS - 1)
        assert abs(live - live_share * number) <= 1


def test_who_grows_old_in_line_is_backlog() -> None:
    """What stood in line through an outage, though it came as live traffic, keeps no new session from its share."""
    schedule = make_schedule()
    for session_id in range(1, 101):
        add(schedule, session_id, 10, START + session_id)
        assert schedule.ready_at(START + session_id) == START + session_id
    back_at = START + 100 + BACKLOG_SECONDS
    served = []
    for number in range(20):
        add(schedule, 200 + number, 10, back_at)
        for _ in range(2):
            choice = schedule.choose(back_at)
            assert choice is not None
            deliver(schedule, choice)
            served.append(choice.session_id)
    assert sorted(served[::2] + served[1::2]) == [*range(1, 21), *range(200, 220)]


@pytest.mark.parametrize("age", [0.0, BACKLOG_SECONDS])
def test_a_share_that_nobody_needs_is_not_kept_free(age: float) -> None:
    """Live traffic alone, or backlog alone, has every request."""
    schedule = make_schedule()
    for session_id in (1, 2):
        add(schedule, session_id, 10, START - age)
    for _ in (1, 2):
        choice = schedule.choose(START)
        assert choice is not None
        deliver(schedule, choice)
    assert schedule.is_empty


def test_open_runs_have_what_complete_ones_leave_oldest_first() -> None:
    """A run that may still grow waits for every complete one, however young; then the oldest goes first."""
    schedule = make_schedule()
    add(schedule, 1, 1, START - 100)
    add(schedule, 2, 1, START - 200)
    add(schedule, 3, 10, START)
    add(schedule, 4, 1, START)
    add(schedule, 4, 1, START, page=NEXT_PAGE)
    chosen = []
    while (choice := schedule.choose(START)) is not None:
        chosen.append((choice.session_id, choice.reason))
        deliver(schedule, choice)
    assert chosen == [(3, "full"), (4, "closed"), (2, "lingered"), (1, "lingered")]


def test_what_a_seal_leaves_is_closed_if_the_spool_says_so() -> None:
    """Of three pages, the first two are complete, one after the other; the third may still grow."""
    schedule = make_schedule()
    for page in (PAGE, NEXT_PAGE, PAGE):
        add(schedule, 1, 2, START, page=page)
    for left in (Parting.PAGE, Parting.NOTHING):
        choice = schedule.choose(START)
        assert choice is not None
        assert (choice.window_id, choice.reason) == (10, "closed")
        sizes: dict[str, Any] = {"events": 2, "events_bytes": 2, "deflated_bytes": 2}
        schedule.seal(10, **sizes, finals=0, next_oldest_at=START, next_parting=left)
        schedule.release(1)
    assert schedule.choose(START) is None
    assert schedule.ready_at(START) == START + LINGER


def test_a_changed_page_closes_no_run_where_pages_merge() -> None:
    """It waits for company as an open run does, and a final behind it is what completes it."""
    schedule = make_schedule(merge="page")
    add(schedule, 1, 1, START)
    add(schedule, 1, 1, START + 1, page=NEXT_PAGE)
    assert schedule.choose(START + 1) is None
    assert schedule.choose(START + LINGER) == Choice(1, 10, None, "lingered", merges_pages=True)


def test_a_changed_page_closes_a_run_unless_requests_are_scarce() -> None:
    """In line by the one rule, a session goes back to the open runs by the other, and is sent by its age then."""
    schedule = make_schedule(merge="page-when-scarce")
    for session_id in (1, 2):
        add(schedule, session_id, 1, START)
        add(schedule, session_id, 1, START, page=NEXT_PAGE)
    assert schedule.choose(START, is_scarce=False) == Choice(1, 10, None, "closed", merges_pages=False)
    assert schedule.choose(START, is_scarce=True) is None
    assert schedule.ready_at(START) == START + LINGER
    add(schedule, 3, 10, START + LINGER)
    assert schedule.choose(START + LINGER, is_scarce=True) == Choice(3, 30, None, "full", merges_pages=True)
    assert schedule.choose(START + LINGER, is_scarce=True) == Choice(2, 20, None, "lingered", merges_pages=True)
    add(schedule, 4, 1, START + LINGER)
    add(schedule, 4, 1, START + LINGER, page=NEXT_PAGE)  # taken for open, being added while requests are scarce
    assert schedule.choose(START + LINGER, is_scarce=False) is None
    assert schedule.choose(START + 2 * LINGER, is_scarce=False) == Choice(4, 40, None, "closed", merges_pages=False)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 3)), max_size=60))
def test_nothing_is_forgotten_however_scarcity_comes_and_goes(steps: list[tuple[int, bool, bool, int]]) -> None:
    """Each window is chosen in the end, no session twice at a time, and merging is what the rule of the moment says."""
    schedule = make_schedule(merge="page-when-scarce")
    now = START
    pending: set[int] = set()
    for session_id, is_next_page, is_scarce, seconds in steps:
        now += seconds
        add(schedule, session_id, 1, now, page=NEXT_PAGE if is_next_page else PAGE)
        pending.add(session_id)
        choice = schedule.choose(now, is_scarce=is_scarce)
        if choice is not None:
            assert choice.merges_pages == is_scarce
            pending.remove(choice.session_id)
            deliver(schedule, choice)
    while pending:
        now = max(now, schedule.ready_at(now))
        choice = schedule.choose(now, is_scarce=bool(len(pending) % 2))
        if choice is not None:
            pending.remove(choice.session_id)
            deliver(schedule, choice)
    assert schedule.is_empty


def wait_under_overload(schedule: Schedule, busy: int, window_id: int) -> float:
    """Keep `busy` sessions, from 1 on, supplied with complete runs; return when the window is chosen."""
    for session_id in range(1, busy + 1):
        add(schedule, session_id, 10, START)
    now = START
    while now < START + 2 * MAX_OPEN_SECONDS:
        choice = schedule.choose(now)
        assert choice is not None
        if choice.window_id == window_id:
            assert choice.reason == "aged"
            return now
        deliver(schedule, choice)
        add(schedule, choice.session_id, 10, now)
        now += STEP
    raise AssertionError("never chosen")


def test_overload_does_not_starve_an_open_run() -> None:
    """Where complete runs never end, an open one is sent a round after it has come of age."""
    schedule = make_schedule()
    add(schedule, 50, 1, START)
    at = wait_under_overload(schedule, busy=20, window_id=500)
    assert START + MAX_OPEN_SECONDS <= at <= START + MAX_OPEN_SECONDS + 2 * 20 * STEP


def test_a_busy_tab_does_not_starve_the_one_beside_it() -> None:
    """The same within a session: its window that is always full does not keep the other for ever."""
    schedule = make_schedule()
    add(schedule, 1, 1, START, window=1)
    at = wait_under_overload(schedule, busy=5, window_id=11)
    assert START + MAX_OPEN_SECONDS <= at <= START + MAX_OPEN_SECONDS + 2 * 5 * STEP


def test_entries_do_not_pile_up_while_open_runs_starve() -> None:
    """Sessions that turn open and complete over and over leave no more entries than choices in the age of a run."""
    schedule = make_schedule()
    for session_id in range(1, 101):
        add(schedule, session_id, 10, START)
    most = 0
    for number in range(20_000):
        now = START + number * STEP
        choice = schedule.choose(now)
        assert choice is not None
        deliver(schedule, choice)
        add(schedule, choice.session_id, 1, now - LINGER)  # open and due at once, never served: others are complete
        schedule.ready_at(now)
        add(schedule, choice.session_id, 9, now)
        most = max(most, len(schedule._open))
    assert most <= MAX_OPEN_SECONDS / STEP + 100
