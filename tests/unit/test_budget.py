from __future__ import annotations

from math import inf

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.protocol.budget import WINDOW_SECONDS, Budget

STEPS = st.sampled_from([0.0, 0.125, 1.0, 7.5, 29.875, 30.0, 59.875, 60.0, 61.0, 200.0])
"""Seconds between events; eighths, so that sums are exact."""


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
    """However requests begin and end, upstream sees no more than the limit, and not one is withheld for nothing."""

    @initialize(limit=st.integers(1, 4), ages=st.lists(st.integers(0, 90), max_size=6))
    def open(self, limit: int, ages: list[int]) -> None:
        """A start, with sends of an earlier run; more than the limit, if that was lowered."""
        self.now = 1_000.0
        self.budget = Budget(limit, 0)
        self.sent = [Sent(self.now - age, self.now - age) for age in sorted(ages, reverse=True)]
        for request in self.sent:
            self.budget.restore(request.end)
        self.earlier = most_in_a_window(self.sent)

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
        self.now = at
        self.budget.begin()
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
        """A request may begin at the time said, and at none before."""
        at = self.budget.ready_at(self.now)
        recent = [request for request in self.sent if request.end > self.now - WINDOW_SECONDS]
        assert (at == self.now) == (len(recent) < self.budget.limit)
        assert (at == inf) == (len(self.in_flight()) >= self.budget.limit)
        if self.now < at < inf:
            assert sum(request.end > at - WINDOW_SECONDS for request in self.sent) < self.budget.limit
            earlier = at - 1 / 1024
            assert sum(request.end > earlier - WINDOW_SECONDS for request in self.sent) >= self.budget.limit

    @invariant()
    def counts_what_is_occupied(self) -> None:
        """The slots in use are the requests in flight and those of the last window, no more of these than the limit."""
        assert self.budget.in_flight == len(self.in_flight())
        ended = sum(self.now - WINDOW_SECONDS < request.end < inf for request in self.sent)
        assert self.budget.used(self.now) == min(ended, self.budget.limit) + len(self.in_flight())


TestBudget = BudgetMachine.TestCase


@given(st.floats(0, 30), st.floats(0, 1e9))
@example(0.0, 0.0)
def test_a_slot_is_free_a_window_and_a_margin_after_the_end(margin: float, end: float) -> None:
    """The time that is named is the time at which it holds, in floating point too."""
    budget = Budget(1, margin)
    budget.begin()
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
        budget.begin()
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


@pytest.mark.parametrize("limit", [1, 100])
def test_a_minute_of_full_speed_spends_the_limit_exactly(limit: int) -> None:
    """Requests that take no time fill a window to the limit, then begin again with the next."""
    budget = Budget(limit, 0)
    now, begun = 0.0, []
    while now < 2 * WINDOW_SECONDS:
        now = budget.ready_at(now)
        budget.begin()
        budget.end(now)
        begun.append(now)
    assert begun == [0.0] * limit + [WINDOW_SECONDS] * limit + [2 * WINDOW_SECONDS]
