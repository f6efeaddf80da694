from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.protocol.backoff import Backoff

BASES = st.floats(0.001, 600)
CAPS = st.floats(0.001, 86_400)
ALMOST_ONE = math.nextafter(1.0, 0.0)


@given(BASES, CAPS, st.integers(1, 10**9), st.floats(0, ALMOST_ONE))
@example(1.0, 300.0, 10**300, ALMOST_ONE)
@example(0.001, 86_400.0, 33, ALMOST_ONE)
def test_a_delay_is_a_share_of_its_ceiling(base: float, cap: float, failures: int, share: float) -> None:
    """From zero to the ceiling, whatever the number of failures, and never beyond the cap."""
    delay = Backoff(base, cap).delay_seconds(failures, lambda: share)
    assert 0 <= delay <= cap
    assert delay == pytest.approx(share * min(cap, base * 2.0 ** min(failures - 1, 64)))


def test_ceilings_double_up_to_the_cap() -> None:
    """The first is the base."""
    backoff = Backoff(0.5, 60.0)
    ceilings = [backoff.delay_seconds(failures, lambda: 1.0) for failures in range(1, 11)]
    assert ceilings == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


@given(st.integers(1, 1_000), st.integers(1, 1_000))
def test_more_failures_never_mean_a_lower_ceiling(first: int, more: int) -> None:
    """The ceiling grows or stays."""
    backoff = Backoff(1.0, 3_600.0)
    assert backoff.delay_seconds(first, lambda: 1.0) <= backoff.delay_seconds(first + more, lambda: 1.0)


def test_each_delay_is_drawn_anew() -> None:
    """The policy holds no state: the generator alone makes delays differ."""
    numbers = iter([0.0, 0.25, 0.5])
    backoff = Backoff(4.0, 60.0)
    assert [backoff.delay_seconds(1, lambda: next(numbers)) for _ in range(3)] == [0.0, 1.0, 2.0]
