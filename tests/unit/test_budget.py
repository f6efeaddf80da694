from __future__ import annotations

import heapq
import random
from itertools import pairwise
from math import inf

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.protocol.budget import WINDOW_SECONDS, Budget
from relay.sandbox.limiter import RequestWindow

STEPS = st.sampled_from([0.0, 0.125, 1.0, 7.5, 29.875, 30.0, 59.875, 60.0, 61.0, 200.0])
"""Seconds between events."""


class Sent(msgspec.Struct):
    """A request, and when upstream may have counted it: any moment from begin to end."""

    begin: float
    end: float = inf


def most_in_a_window(sent: list[Sent]) -> int:
    """Return how many requests some window of 60 s may hold, if each arrived when it hurts most."""
    starts = {request.begin for request in sent} | {request.end for request in sent if request.end < inf}
    return max(
        (sum(one.end >= start and one.begin < start + WINDOW_SECONDS for one in sent) for start in starts), default=0
    )


class BudgetMachine(RuleBasedStateMachine):
    """However requests begin and end, upstream sees no more than the limit, and none waits longer than pacing says."""

    @initialize(limit=st.integers(1, 6), ages=st.lists(st.integers(0, 90), max_size=6))
    def open(self, limit: int, ages: list[int]) -> None:
        """A start, with sends of an earlier run; more than the limit, if that was lowered."""
        self.now = 1_000.0
        self.budget = Budget(limit, 0)
        self.sent = [Sent(self.now - age, self.now - age) for age in sorted(ages, reverse=True)]
        for request in self.sent:
            self.budget.restore(request.end)
        self.earlier = most_in_a_window(self.sent)
        self.begun_at = -inf

    @rule(seconds=STEPS)
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule()
    def begin(self) -> None:
        """A request begins as soon as it may."""
        at = self.budget.ready_at(self.now)
        if at == inf:
            return
        self.now = self.begun_at = at
        self.budget.begin(at)
        self.sent.append(Sent(at))

    def in_flight(self) -> list[Sent]:
        """Return what has begun and not ended."""
        return [request for request in self.sent if request.end == inf]

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """Any request in flight ends."""
        data.draw(st.sampled_from(self.in_flight())).end = self.now
        self.budget.end(self.now)

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        """Any request in flight turns out not to have been sent."""
        self.sent.remove(data.draw(st.sampled_from(self.in_flight())))
        self.budget.abandon()

    @invariant()
    def is_within_the_limit(self) -> None:
        """No window can hold more than the limit, or than an earlier run had sent already."""
        assert most_in_a_window(self.sent) <= max(self.budget.limit, self.earlier)

    @invariant()
    def is_not_a_moment_late(self) -> None:
        """With no slot free, a request may begin when the next comes free; with more than half of them free, now."""
        at = self.budget.ready_at(self.now)
        # In the same words as the budget, since paced moments are no round numbers.
        recent = [request for request in self.sent if request.end + WINDOW_SECONDS > self.now]
        assert (at == inf) == (len(self.in_flight()) >= self.budget.limit)
        if len(recent) < self.budget.limit / 2:
            assert at == self.now
        elif len(recent) < self.budget.limit:
            self._check_pace(at, recent)
        elif at < inf:
            assert sum(request.end + WINDOW_SECONDS > at for request in self.sent) < self.budget.limit
            earlier = at - 1 / 1024
            assert sum(request.end + WINDOW_SECONDS > earlier for request in self.sent) >= self.budget.limit

    def _check_pace(self, at: float, recent: list[Sent]) -> None:
        """A paced request waits for an even distance, or half-way to the next free slot, but no longer."""
        first_end = min(request.end for request in recent)
        # Added up as the budget does: half of a sum is not, to the last digit, a number and half of a difference.
        half_way = self.begun_at + (first_end + WINDOW_SECONDS - self.begun_at) / 2 if first_end < inf else -inf
        even_at = self.begun_at + WINDOW_SECONDS / self.budget.limit
        assert self.now <= at <= max(self.now, even_at, half_way)
        assert at >= self.begun_at + 0.96 * WINDOW_SECONDS / self.budget.limit

    @invariant()
    def counts_what_is_occupied(self) -> None:
        """The slots in use are the requests in flight and those of the last window, no more of these than the limit."""
        assert self.budget.in_flight == len(self.in_flight())
        ended = sum(self.now < request.end + WINDOW_SECONDS < inf for request in self.sent)
        assert self.budget.used(self.now) == min(ended, self.budget.limit) + len(self.in_flight())


TestBudget = BudgetMachine.TestCase


@given(st.floats(0, 30), st.floats(0, 1e9))
@example(0.0, 0.0)
def test_a_slot_is_free_a_window_and_a_margin_after_the_end(margin: float, end: float) -> None:
    """The time that is named is the time at which it holds, in floating point too."""
    budget = Budget(1, margin)
    budget.begin(end)
    assert budget.ready_at(end) == inf
    budget.end(end)
    at = budget.ready_at(end)
    assert at == end + (WINDOW_SECONDS + margin)
    assert budget.ready_at(at) == at
    assert budget.used(at) == 0


def test_zero_is_unlimited() -> None:
    """Without a limit every request may begin at once, and nothing is remembered."""
    budget = Budget(0, 1.0)
    for _ in range(1_000):
        assert budget.ready_at(5.0) == 5.0
        budget.begin(5.0)
    assert (budget.limit, budget.in_flight, budget.used(5.0)) == (0, 1_000, 1_000)
    for _ in range(1_000):
        budget.end(5.0)
    budget.restore(5.0)
    assert budget.used(5.0) == 0


def test_memory_is_bounded_by_the_limit() -> None:
    """Of a long past only a window's worth is kept."""
    budget = Budget(3, 0)
    for at in range(10_000):
        budget.restore(float(at))
    assert len(budget._ends) == 3
    assert budget.ready_at(9_999.0) == 9_997 + WINDOW_SECONDS


class Spender:
    """Spends a budget as fast as it allows, against a strict upstream. Exchanges take a random time each."""

    def __init__(self, budget: Budget, longest_seconds: float) -> None:
        self.begun: list[float] = []
        self.counted = RequestWindow(budget.limit)
        self.refused = 0
        self._budget = budget
        self._longest = longest_seconds
        self._chance = random.Random(7)
        self._coming: list[tuple[float, bool]] = []
        """(time, whether it is the end of an exchange, and not the moment when upstream counts it)"""

    def spend(self, until: float) -> None:
        """Send from the time 0 on."""
        now = 0.0
        while now < until:
            at = self._budget.ready_at(now)
            if at <= now:
                self._budget.begin(now)
                self.begun.append(now)
                length = self._chance.uniform(0, self._longest)
                heapq.heappush(self._coming, (now + length * self._chance.random(), False))
                heapq.heappush(self._coming, (now + length, True))
            elif self._coming and self._coming[0][0] <= at:
                now, is_end = heapq.heappop(self._coming)
                if is_end:
                    self._budget.end(now)
                else:
                    self.refused += self.counted.admit(now) > 0
            else:
                now = at

    def gaps(self, since: float) -> list[float]:
        """Return the seconds between one request and the next, from a time on."""
        return [after - before for before, after in pairwise(at for at in self.begun if at >= since)]


@pytest.mark.parametrize("longest_seconds", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("limit", [1, 10, 100, 1_000])
def test_full_speed_uses_the_allowance_evenly_and_is_never_refused(limit: int, longest_seconds: float) -> None:
    """From the first minute on 97% of the allowance are used, no window has more, and no wait is a multiple of even."""
    spender = Spender(Budget(limit, 0.25), longest_seconds)
    spender.spend(20 * WINDOW_SECONDS)
    assert spender.refused == 0
    assert spender.counted.peak <= limit
    assert len(spender.begun) >= 0.97 * 20 * limit
    even = WINDOW_SECONDS / limit
    assert max(spender.gaps(0)) <= 2.1 * even + longest_seconds
    assert spender.begun[: -(-limit // 2)] == [0.0] * -(-limit // 2)  # half of it is there at once


def test_a_burst_after_an_outage_does_not_come_back() -> None:
    """With slots spent in two bursts, the third minute is even already."""
    budget = Budget(100, 0)
    for number in range(100):
        budget.restore(-50.0 if number < 50 else -10.0)
    spender = Spender(budget, 0.0)
    spender.spend(10 * WINDOW_SECONDS)
    assert max(spender.gaps(120)) <= 2.1 * WINDOW_SECONDS / 100
