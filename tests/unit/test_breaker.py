from __future__ import annotations

from math import inf

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.protocol.breaker import Breaker


def opened(max_failures: int = 3) -> Breaker:
    """Return a breaker that failures have opened, whose probe is due at 10."""
    breaker = Breaker(max_failures)
    for _ in range(max_failures):
        breaker.begin()
        breaker.fail(0.0, 10.0)
        breaker.end()
    return breaker


def test_it_opens_at_the_last_of_a_row_of_failures() -> None:
    """Up to then sends may begin at any time, after it only at the probe's."""
    breaker = Breaker(3)
    for failures in (1, 2, 3):
        assert (breaker.is_open, breaker.ready_at()) == (False, -inf)
        breaker.begin()
        breaker.fail(5.0, 2.0)
        breaker.end()
        assert breaker.failures == failures
    assert (breaker.is_open, breaker.ready_at()) == (True, 7.0)


def test_a_success_between_failures_starts_the_row_anew() -> None:
    """Only failures in a row count."""
    breaker = Breaker(2)
    for _ in range(5):
        breaker.fail(0.0, 1.0)
        breaker.succeed()
    assert (breaker.is_open, breaker.failures) == (False, 0)


def test_probes_go_one_at_a_time() -> None:
    """While a probe is out nothing else may begin; its failure sets the time of the next."""
    breaker = opened()
    assert breaker.ready_at() == 10.0
    breaker.begin()
    assert breaker.ready_at() == inf
    breaker.fail(12.0, 30.0)
    breaker.end()
    assert (breaker.is_open, breaker.ready_at(), breaker.failures) == (True, 42.0, 4)


def test_a_probe_that_succeeds_closes_it() -> None:
    """Then sends may begin again, and the row is forgotten."""
    breaker = opened()
    breaker.begin()
    breaker.succeed()
    breaker.end()
    assert (breaker.is_open, breaker.ready_at(), breaker.failures) == (False, -inf, 0)


def test_a_probe_that_came_to_nothing_may_be_repeated_at_once() -> None:
    """Where there was nothing to send after all, the probe's time has still come."""
    breaker = opened()
    breaker.begin()
    breaker.end()
    assert breaker.ready_at() == 10.0


def test_an_older_send_that_fails_does_not_let_a_second_probe_out() -> None:
    """What was in flight when it opened has to end before the first probe, and ends no probe."""
    breaker = Breaker(1)
    for _ in range(3):
        breaker.begin()
    breaker.fail(0.0, 1.0)
    breaker.end()
    assert breaker.ready_at() == inf
    breaker.fail(5.0, 1.0)
    breaker.end()
    assert breaker.ready_at() == inf
    breaker.end()
    assert breaker.ready_at() == 6.0


def test_an_older_send_that_succeeds_closes_it() -> None:
    """An answer is an answer, whenever its request began."""
    breaker = Breaker(1)
    breaker.begin()
    breaker.begin()
    breaker.fail(0.0, 1.0)
    breaker.end()
    breaker.succeed()
    breaker.end()
    assert breaker.ready_at() == -inf


def test_it_can_be_tripped_at_once() -> None:
    """One answer that concerns the whole key is enough."""
    breaker = Breaker(1_000)
    breaker.begin()
    breaker.trip(1.0, 60.0)
    breaker.end()
    assert (breaker.is_open, breaker.ready_at(), breaker.failures) == (True, 61.0, 1)


def test_a_failing_probe_of_a_tripped_breaker_moves_the_next() -> None:
    """Once it is open, the number of failures no longer matters."""
    breaker = Breaker(1_000)
    breaker.trip(0.0, 60.0)
    breaker.begin()
    breaker.fail(60.0, 5.0)
    breaker.end()
    assert breaker.ready_at() == 65.0


def test_it_returns_gently() -> None:
    """After the probe two may be in flight, and one more with each success, until there is no bound."""
    breaker = opened()
    breaker.begin()
    allowed = []
    for _ in range(8):
        breaker.succeed()
        breaker.end()
        begun = 0
        while breaker.ready_at() == -inf and begun < 100:
            breaker.begin()
            begun += 1
        allowed.append(begun)
        for _ in range(begun - 1):
            breaker.end()
    assert allowed == [2, 3, 4, 5, 6, 7, 100, 100]


def test_a_failure_while_it_returns_opens_it() -> None:
    """Who has only just come back is left alone at the first sign of trouble."""
    breaker = opened(50)
    breaker.begin()
    breaker.succeed()
    breaker.end()
    breaker.begin()
    breaker.fail(20.0, 5.0)
    breaker.end()
    assert (breaker.is_open, breaker.ready_at()) == (True, 25.0)


def test_a_probe_can_be_hurried() -> None:
    """An operator need not wait for it; a closed breaker has none to hurry."""
    breaker = opened()
    breaker.hurry(3.0)
    assert breaker.ready_at() == 3.0
    breaker.begin()
    breaker.succeed()
    breaker.end()
    breaker.hurry(4.0)
    assert breaker.ready_at() == -inf


class BreakerMachine(RuleBasedStateMachine):
    """Against a list of outcomes: open just after enough failures in a row, then one at a time, then gently more."""

    @initialize(max_failures=st.integers(1, 4))
    def make(self, max_failures: int) -> None:
        """A closed breaker."""
        self.max_failures = max_failures
        self.breaker = Breaker(max_failures)
        self.outcomes: list[str] = []
        self.in_flight = 0
        self.now = 0.0
        self.probe_at = -inf

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.now += seconds

    @rule()
    def begin(self) -> None:
        """A send begins, if it may."""
        if self.breaker.ready_at() <= self.now:
            assert not (self.breaker.is_open and self.in_flight)
            self.breaker.begin()
            self.in_flight += 1

    @precondition(lambda self: self.in_flight)
    @rule(outcome=st.sampled_from(["success", "failure", "trip", "nothing"]), delay=st.integers(0, 9))
    def end(self, outcome: str, delay: int) -> None:
        """A send ends."""
        if outcome == "success":
            self.breaker.succeed()
        elif outcome == "failure":
            self.breaker.fail(self.now, delay)
        elif outcome == "trip":
            self.breaker.trip(self.now, delay)
        if outcome in ("failure", "trip"):
            self.probe_at = self.now + delay
        if outcome != "nothing":
            self.outcomes.append(outcome)
        self.breaker.end()
        self.in_flight -= 1

    @invariant()
    def agrees(self) -> None:
        """Open and ready as the outcomes say."""
        row = 0
        is_open = False
        allowed: float = inf
        for outcome in self.outcomes:
            if outcome == "success":
                allowed = 2 if is_open else allowed + 1
                allowed = inf if allowed >= 8 else allowed
                row, is_open = 0, False
            else:
                row += 1
                is_open = is_open or outcome == "trip" or allowed < inf or row >= self.max_failures
        assert (self.breaker.is_open, self.breaker.failures) == (is_open, row)
        if is_open:
            assert self.breaker.ready_at() == (inf if self.in_flight else self.probe_at)
        else:
            assert self.breaker.ready_at() == (-inf if self.in_flight < allowed else inf)


TestBreaker = BreakerMachine.TestCase


@pytest.mark.parametrize("max_failures", [1, 2, 50])
def test_it_stays_closed_one_failure_short(max_failures: int) -> None:
    """The threshold is exact."""
    breaker = Breaker(max_failures)
    for _ in range(max_failures - 1):
        breaker.fail(0.0, 1.0)
    assert not breaker.is_open
    breaker.fail(0.0, 1.0)
    assert breaker.is_open
