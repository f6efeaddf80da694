from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from relay.telemetry import Histogram, Summary

BOUNDS = (1.0, 5.0, 20.0)

VALUES = st.lists(st.floats(0, 30), min_size=1, max_size=50)


def observed(values: list[float]) -> Histogram:
    """Return a histogram of values."""
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    return histogram


@given(VALUES)
def test_buckets_count_what_does_not_exceed_their_bound(values: list[float]) -> None:
    """Each bound has the number of values up to and with it, the last has all, and the sum is exact."""
    histogram = observed(values)
    expected = [(str(bound), sum(value <= bound for value in values)) for bound in BOUNDS]
    assert histogram.cumulative() == [*expected, ("+Inf", len(values))]
    assert histogram.sum == sum(values)


@given(VALUES, st.sampled_from([0.01, 0.5, 0.95, 1.0]))
def test_quantile_is_in_the_right_bucket(values: list[float], share: float) -> None:
    """The quantile lies in the bucket of the true one; beyond the highest bound it is that bound."""
    true = next(v for number, v in enumerate(sorted(values), 1) if number >= share * len(values))
    bucket = bisect_left(BOUNDS, true)
    lower, upper = (0.0, *BOUNDS)[bucket], (*BOUNDS, BOUNDS[-1])[bucket]
    assert lower <= observed(values).quantile(share) <= upper


def test_nothing_observed_is_nothing() -> None:
    """Without observations all figures are 0."""
    assert Histogram(BOUNDS).summary() == Summary(0, 0.0, 0.0, 0.0)


def test_copy_stays_as_it_is() -> None:
    """What is observed after a copy was taken is not in the copy."""
    histogram = observed([3.0])
    copied = histogram.copy()
    histogram.observe(7.0)
    assert (copied.counts, copied.sum) == ([0, 1, 0, 0], 3.0)
    assert (histogram.counts, histogram.sum) == ([0, 1, 1, 0], 10.0)
