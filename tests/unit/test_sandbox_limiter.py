from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from relay.sandbox.limiter import WINDOW_SECONDS, RequestWindow

# Eighths of a second are exact in binary, so the oracle's arithmetic and the window's cannot round apart.
GAPS = st.lists(st.integers(0, 400).map(lambda eighths: eighths / 8), max_size=200)


@given(GAPS, st.integers(1, 8))
@example([0.0, 60.0], 1)
@example([0.0, 59.875, 0.125], 1)
def test_counts_a_request_exactly_when_fewer_than_the_limit_were_counted_in_the_last_minute(
    gaps: list[float], limit: int
) -> None:
    """The window agrees with a list of all counted requests, for any arrival times."""
    window = RequestWindow(limit)
    counted: list[float] = []
    now = 0.0
    for gap in gaps:
        now += gap
        recent = [at for at in counted if at > now - WINDOW_SECONDS]
        wait = window.admit(now)
        assert (wait == 0) == (len(recent) < limit)
        if wait == 0:
            counted.append(now)
    peak = max((sum(at - WINDOW_SECONDS < earlier <= at for earlier in counted) for at in counted), default=0)
    assert (window.counted, window.peak) == (len(counted), peak)


@given(GAPS, st.integers(1, 8))
def test_the_wait_it_names_is_the_shortest_that_helps(gaps: list[float], limit: int) -> None:
    """A refused request would be counted after the wait, and not an eighth of a second sooner."""
    window = RequestWindow(limit)
    now = 0.0
    for gap in gaps:
        now += gap
        wait = window.admit(now)
        if wait > 0:
            if wait > 0.125:
                assert window.admit(now + wait - 0.125) == 0.125
            assert window.admit(now + wait) == 0
            return


def test_zero_is_unlimited_and_still_measured() -> None:
    """Without a limit every request is counted, and the peak says how many came within a minute."""
    window = RequestWindow(0)
    assert [window.admit(at) for at in (0.0, 1.0, 2.0, 60.5)] == [0.0] * 4
    assert (window.counted, window.peak) == (4, 3)
