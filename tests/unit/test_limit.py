from __future__ import annotations

import heapq
import math
from itertools import count, pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.budget import Budget
from relay.protocol.limit import INITIAL_LIMIT, MAX_LIMIT, LearnedLimit
from relay.sandbox.limiter import RequestWindow

MAX_IN_FLIGHT = 32
MARGIN_SECONDS = 0.25
HOUR = 3_600.0


class Change(msgspec.Struct, frozen=True):
    """A limit, and from when on."""

    at: float
    limit: int


class SaturatedKey:
    """A key that always has something to send, against an exact sliding window: the lane's part, on virtual time."""

    def __init__(self, upstream_limit: int, latency_seconds: float = 0.2) -> None:
        self.now = 0.0
        self.learned = LearnedLimit()
        self.changes = [Change(0.0, INITIAL_LIMIT)]
        self.refusals: list[float] = []
        self.taken: list[float] = []
        self._budget = Budget(self.learned.limit, MARGIN_SECONDS)
        self._latency = latency_seconds
        self._numbers = count()
        self._not_before = 0.0
        self._under_way: list[tuple[float, int, float, float | None]] = []
        """(time, number, began_at, what upstream said); None on the way there"""
        self.upstream = RequestWindow(upstream_limit)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self.now < end:
            is_free = self._budget.in_flight < MAX_IN_FLIGHT and self._not_before <= self.now
            if is_free and self._budget.ready_at(self.now) > self.now:
                self.learned.note_waiting(self.now)
                self._resize()
            if is_free and self._budget.ready_at(self.now) <= self.now:
                self._budget.begin(self.now)
                self._move(next(self._numbers), self.now, None)
                continue
            ready_at = max(self._not_before, self._budget.ready_at(self.now)) if is_free else self._not_before
            if not self._under_way or self.now < ready_at < self._under_way[0][0]:
                self.now = ready_at
                continue
            at, number, began_at, wait = heapq.heappop(self._under_way)
            self.now = max(self.now, at)
            if wait is None:
                self._move(number, began_at, self.upstream.admit(self.now))
            else:
                self._answer(began_at, wait)

    def _move(self, number: int, began_at: float, wait: float | None) -> None:
        heapq.heappush(self._under_way, (self.now + self._latency / 2, number, began_at, wait))

    def _answer(self, began_at: float, wait: float) -> None:
        self._budget.end(self.now)
        if wait:
            self._not_before = max(self._not_before, self.now + math.ceil(wait))
            self.learned.note_refused(began_at, self.now, self._budget.in_flight)
            self.refusals.append(self.now)
            self._resize()
        else:
            self.learned.note_taken(began_at)
            self.taken.append(self.now)

    def _resize(self) -> None:
        if self.learned.limit != self.changes[-1].limit:
            self.changes.append(Change(self.now, self.learned.limit))
            self._budget.resize(self.learned.limit)

    def occasions(self) -> int:
        """Return how many minutes apart refusals came in."""
        return 1 + sum(later - earlier > 60 for earlier, later in pairwise(self.refusals)) if self.refusals else 0


@pytest.mark.parametrize("latency_seconds", [0.05, 1.0])
@pytest.mark.parametrize("upstream_limit", [20, 60, 100, 300, 1_000])
def test_limit_is_found_and_kept(upstream_limit: int, latency_seconds: float) -> None:
    """Within minutes the limit is upstream's or a few percent less, and stays so; refusals are few and become rare."""
    key = SaturatedKey(upstream_limit, latency_seconds)
    key.run(15 * 60)
    assert 0.96 * upstream_limit <= key.learned.limit <= upstream_limit
    found_at = next(change.at for change in key.changes if 0.96 * upstream_limit <= change.limit <= upstream_limit)
    assert found_at < 7 * 60
    assert key.occasions() <= 2
    key.run(3 * HOUR - key.now)
    # A raise that is refused lasts seconds; but for those the limit stands still.
    settled = [change.limit for change in key.changes if change.at > 15 * 60]
    assert all(0.96 * upstream_limit <= limit <= 1.05 * upstream_limit for limit in settled)
    assert key.occasions() <= 7
    assert len(key.refusals) < 0.01 * len(key.taken) + MAX_IN_FLIGHT
    assert len([at for at in key.taken if at > 2 * HOUR]) >= 0.94 * upstream_limit * 60


@pytest.mark.parametrize(("before", "after"), [(60, 300), (300, 60), (100, 1_000), (1_000, 20)])
def test_change_of_limit_is_followed(before: int, after: int) -> None:
    """A better tier is found within its memory of refusals and a few minutes; a worse one at the first refusal."""
    key = SaturatedKey(before)
    key.run(20 * 60)
    key.upstream = RequestWindow(after)
    key.run(60 * 60)
    assert 0.95 * after <= key.learned.limit <= after


def test_limit_is_not_raised_without_need() -> None:
    """A key that sends what it has, and waits for no slot, stays at the published limit for ever."""
    learned = LearnedLimit()
    for minute in range(600):
        for second in range(0, 60, 10):
            learned.note_taken(minute * 60.0 + second)
    assert learned.limit == INITIAL_LIMIT
    assert len(learned._taken) <= 7
    assert not learned.is_worth_keeping(0.0)


def test_limit_is_not_raised_without_proof() -> None:
    """Waiting alone raises nothing: a window nearly full must have been taken first."""
    learned = LearnedLimit()
    for number in range(80):
        learned.note_taken(number * 0.5)
        learned.note_waiting(number * 0.5)
    assert learned.limit == INITIAL_LIMIT
    for number in range(80, 120):
        learned.note_taken(number * 0.5)
        learned.note_waiting(number * 0.5)
    assert learned.limit == INITIAL_LIMIT * 3 // 2
    assert learned.is_worth_keeping(60.0)
    assert not learned.is_worth_keeping(2 * HOUR)


def test_refusals_without_traffic_lower_nothing() -> None:
    """A quota by the hour or day refuses the first request there is; that is no limit by the minute."""
    learned = LearnedLimit()
    for hour in range(100):
        learned.note_refused(hour * HOUR, hour * HOUR + 0.1, 0)
    assert learned.limit == INITIAL_LIMIT


def test_refusals_of_one_occasion_lower_once() -> None:
    """Requests that were under way at a refusal are refused for the same reason."""
    learned = LearnedLimit()
    for number in range(60):
        learned.note_taken(number * 0.5)
    for in_flight in range(7, -1, -1):
        learned.note_refused(30.0, 30.5, in_flight)
    assert learned.limit == 60
    learned.note_refused(75.0, 75.25, 0)  # what was taken until 15.25 is no evidence any more
    assert learned.limit == 29


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "refuse", "wait"]),
            st.floats(0, 100) | st.sampled_from([0.0, 0.25, 60.0, 300.0]),
            st.integers(1, 200),
        ),
        max_size=60,
    )
)
def test_limit_is_always_sane(steps: list[tuple[str, float, int]]) -> None:
    """Within bounds; lowered by refusals only, three quarters at most; raised by half at most, not soon after them."""
    learned = LearnedLimit()
    now, quiet_until = 0.0, 0.0
    for what, seconds, number in steps:
        now += seconds
        before = learned.limit
        if what == "take":
            for _ in range(number):
                learned.note_taken(now)
            assert learned.limit == before
        elif what == "refuse":
            learned.note_refused(now, now, number % 8)
            assert max(1, before // 4) <= learned.limit <= before
            if learned.limit < before:
                quiet_until = now + 300
        else:
            learned.note_waiting(now)
            assert before <= learned.limit <= before * 3 // 2 + 1
            assert learned.limit == before or now >= quiet_until
        assert 1 <= learned.limit <= MAX_LIMIT


def test_limit_ends_somewhere() -> None:
    """Where nothing is ever refused, the limit stops at a value that has its reason."""
    key = SaturatedKey(0, 0.001)
    key.run(20 * 60)
    assert key.learned.limit == MAX_LIMIT
