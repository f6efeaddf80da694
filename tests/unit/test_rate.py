"""What a token may still ask, by upstream's word and by our own count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.rate import MAX_WAIT_SECONDS, WINDOW_SECONDS, Rate
from tests.unit.test_caching import fields

WALL = 1_800_000_000.0


def said(limit: int, left: int, reset: float) -> tuple[tuple[bytes, bytes], ...]:
    """Return what upstream says of a window."""
    return fields(f"x-ratelimit-limit: {limit}", f"x-ratelimit-remaining: {left}", f"x-ratelimit-reset: {reset:.0f}")


def test_our_own_count_is_a_sliding_minute() -> None:
    """Until upstream says anything, a minute holds the published number, and the wait is until the oldest leaves."""
    rate = Rate(3)
    for at in (0.0, 10.0, 20.0):
        assert rate.spent(at) is None
        rate.begin(at)
    spent = rate.spent(30.0)
    assert spent is not None
    assert (spent.wait_seconds, spent.limit) == (30.0, 3)
    assert spent.fields(WALL) == fields(
        *("retry-after: 30", "x-ratelimit-limit: 3", "x-ratelimit-remaining: 0", f"x-ratelimit-reset: {WALL + 30:.0f}")
    )
    assert rate.remaining(60.0) == 1
    assert rate.remaining(200.0) == 3


@pytest.mark.parametrize("limit", [1_000, 1_001, 20_000])
def test_our_own_count_holds_at_any_limit(limit: int) -> None:
    """What the operator says a minute holds is what it holds, however much that is."""
    rate = Rate(limit)
    for _ in range(limit):
        assert rate.spent(0.0) is None
        rate.begin(0.0)
    assert rate.spent(0.0) is not None


def test_upstreams_word_counts_more_than_ours() -> None:
    """A request that upstream says it would take is never refused, whatever we have counted."""
    rate = Rate(2)
    for at in (0.0, 1.0, 2.0):
        rate.begin(at)
    assert rate.spent(2.0) is not None
    rate.learn(200, said(100, 97, WALL + 50), begun_at=2.0, now=3.0, wall_now=WALL)
    assert (rate.spent(3.0), rate.remaining(3.0), rate.limit) == (None, 97, 100)


def test_what_was_begun_since_is_taken_off() -> None:
    """An answer does not know of the requests behind its own."""
    rate = Rate(300)
    rate.begin(0.0)
    rate.begin(1.0)
    rate.begin(2.0)
    rate.learn(200, said(300, 5, WALL + 50), begun_at=0.0, now=3.0, wall_now=WALL)
    assert rate.remaining(3.0) == 3
    rate.begin(4.0)
    assert rate.remaining(4.0) == 2


def test_the_lowest_word_of_a_window_counts() -> None:
    """Answers that overtake one another do not give anything back; a new window does."""
    rate = Rate(300)
    rate.begin(0.0)
    rate.begin(1.0)
    rate.learn(200, said(300, 3, WALL + 50), begun_at=1.0, now=2.0, wall_now=WALL)
    rate.learn(200, said(300, 4, WALL + 50), begun_at=0.0, now=3.0, wall_now=WALL + 1)
    assert rate.remaining(3.0) == 3
    rate.begin(60.0)
    rate.learn(200, said(300, 299, WALL + 110), begun_at=60.0, now=60.5, wall_now=WALL + 58.5)
    assert rate.remaining(61.0) == 299


def test_what_was_never_sent_is_given_back() -> None:
    """A request that was not sent after all costs neither our count nor what upstream said is left."""
    rate = Rate(2)
    rate.begin(0.0)
    rate.begin(1.0)
    assert rate.spent(1.0) is not None
    rate.take_back(0.0)
    assert rate.remaining(1.0) == 1
    rate.begin(2.0)
    rate.learn(200, said(300, 5, WALL + 50), begun_at=1.0, now=3.0, wall_now=WALL)
    assert rate.remaining(3.0) == 4
    rate.take_back(2.0)
    assert rate.remaining(3.0) == 5
    rate.take_back(1.0)  # upstream has counted others only, and its figure stands
    rate.take_back(9.0)
    assert rate.remaining(3.0) == 5


def test_a_spent_window_opens_at_its_reset() -> None:
    """At nothing left the wait is until the reset; after it requests go out again."""
    rate = Rate(300)
    rate.begin(0.0)
    rate.learn(200, said(300, 0, WALL + 20), begun_at=0.0, now=0.0, wall_now=WALL)
    spent = rate.spent(5.0)
    assert spent is not None
    assert spent.wait_seconds == 15.0
    assert rate.spent(20.0) is None


def test_no_clock_has_to_agree() -> None:
    """A reset is read against upstream's own date, however wrong the clocks are."""
    rate = Rate(300)
    rate.begin(0.0)
    news = (*said(300, 0, 1_000), *fields("date: Thu, 01 Jan 1970 00:16:20 GMT"))
    rate.learn(200, news, begun_at=0.0, now=0.0, wall_now=WALL)
    spent = rate.spent(0.0)
    assert spent is not None
    assert spent.wait_seconds == 20.0


@pytest.mark.parametrize("skew", [-3_600.0, 0.0, 3_600.0])
def test_a_retry_after_that_is_a_date_needs_no_clock_to_agree(skew: float) -> None:
    """The date of a `Retry-After` is upstream's, and read against upstream's own like a reset."""
    rate = Rate(300)
    rate.begin(0.0)
    news = fields("retry-after: Thu, 01 Jan 1970 00:17:00 GMT", "date: Thu, 01 Jan 1970 00:16:40 GMT")
    rate.learn(429, news, begun_at=0.0, now=0.0, wall_now=1_000.0 + skew)
    spent = rate.spent(0.0)
    assert spent is not None
    assert spent.wait_seconds == 20.0


def test_a_429_blocks_as_long_as_it_says() -> None:
    """`Retry-After` counts before the reset, and a 429 that says nothing blocks nothing."""
    rate = Rate(300)
    rate.begin(0.0)
    rate.learn(429, (*said(300, 0, WALL + 50), *fields("retry-after: 3")), begun_at=0.0, now=0.0, wall_now=WALL)
    assert rate.spent(2.9) is not None
    assert rate.spent(3.0) is None
    silent = Rate(300)
    silent.begin(0.0)
    silent.learn(429, (), begun_at=0.0, now=0.0, wall_now=WALL)
    assert silent.spent(0.0) is None


def test_a_long_wait_is_clamped() -> None:
    """Neither an absurd `Retry-After` nor an absurd reset closes a token for long."""
    for news in (fields("retry-after: 999999"), said(300, 0, WALL + 999_999)):
        rate = Rate(300)
        rate.begin(0.0)
        rate.learn(429, news, begun_at=0.0, now=0.0, wall_now=WALL)
        assert rate.spent(MAX_WAIT_SECONDS - 1) is not None
        assert rate.spent(MAX_WAIT_SECONDS) is None


def test_without_a_published_limit_only_upstream_counts() -> None:
    """With 0 nothing is refused that upstream has not refused."""
    rate = Rate(0)
    for _ in range(5_000):
        rate.begin(0.0)
    assert (rate.remaining(0.0), rate.spent(0.0)) == (None, None)
    rate.learn(200, said(10, 0, WALL + 20), begun_at=0.0, now=0.0, wall_now=WALL)
    assert rate.spent(0.0) is not None


@given(st.integers(1, 20), st.lists(st.integers(0, 40), max_size=60), st.sampled_from(["sliding", "fixed"]))
def test_against_an_upstream_that_reports(limit: int, pauses: list[int], kind: str) -> None:
    """With an upstream that reports its window, exactly what it would take is sent.

    A sliding window reports when its oldest request leaves, a fixed one when it ends.
    """
    rate = Rate(limit)
    taken: list[float] = []
    now = 0.0
    for pause in pauses:
        now += pause
        began = now - now % WINDOW_SECONDS if kind == "fixed" else now - WINDOW_SECONDS
        window = [at for at in taken if at > began or (kind == "fixed" and at == began)]
        reset = (window[0] if kind == "sliding" and window else began if kind == "fixed" else now) + WINDOW_SECONDS
        assert (rate.spent(now) is None) is (len(window) < limit)
        if len(window) < limit:
            rate.begin(now)
            taken.append(now)
            news = said(limit, limit - len(window) - 1, WALL + reset)
            rate.learn(200, news, begun_at=now, now=now, wall_now=WALL + now)
