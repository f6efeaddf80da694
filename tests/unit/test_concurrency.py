from __future__ import annotations

import heapq
from collections import deque
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.concurrency import MIN_LIMIT, ConcurrencyLimit


class Upstream:
    """Serves so many requests side by side, and lets others queue; its client always has another one."""

    def __init__(self, limit: ConcurrencyLimit, servers: int, service_seconds: float, spread: float = 0.3) -> None:
        self.limit = limit
        self.servers = servers
        self.service_seconds = service_seconds
        self.now = 0.0
        self.latencies: list[float] = []
        self.limits: list[int] = []
        self._spread = spread
        self._random = Random(5)
        self._serving: list[tuple[float, float, int]] = []
        """(ends_at, began_at, round)"""
        self._queue: deque[tuple[float, int]] = deque()

    def run(self, requests: int, demand: int = 10_000) -> None:
        """Serve requests, as many at once as the limit and the demand allow; keep what the last of them were like."""
        self.latencies, self.limits = [], []
        began = self.now
        for _ in range(requests):
            while len(self._serving) + len(self._queue) < min(self.limit.limit, demand):
                self._queue.append((self.now, self.limit.begin()))
            while self._queue and len(self._serving) < self.servers:
                began_at, number = self._queue.popleft()
                seconds = self.service_seconds * (1 + self._spread * (2 * self._random.random() - 1))
                heapq.heappush(self._serving, (self.now + seconds, began_at, number))
            self.now, began_at, number = heapq.heappop(self._serving)
            self.limit.end(number, self.now - began_at, is_ok=True)
            self.latencies.append(self.now - began_at)
            self.limits.append(self.limit.limit)
        self.per_second = requests / (self.now - began)

    def assert_settled(self) -> None:
        """Assert that it is kept busy, and that little queues."""
        assert self.per_second >= 0.93 * self.servers / self.service_seconds
        assert sum(self.latencies) / len(self.latencies) <= self.service_seconds * (1.6 + 4 / self.servers)
        assert max(self.limits) <= 2 * self.servers + 8


@pytest.mark.parametrize("servers", [1, 4, 20, 60])
def test_limit_settles_at_the_knee(servers: int) -> None:
    """Upstream is kept busy, and requests hardly queue, however many it serves at once."""
    upstream = Upstream(ConcurrencyLimit(500), servers, 0.2)
    upstream.run(4_000)
    upstream.run(20_000)
    upstream.assert_settled()


def test_limit_is_found_soon() -> None:
    """Twenty servers are all at work within ten seconds of a first request."""
    upstream = Upstream(ConcurrencyLimit(500), 20, 0.2)
    while upstream.now < 10:
        upstream.run(1)
    assert upstream.limit.limit >= 20


@pytest.mark.parametrize(("servers", "service_seconds"), [(5, 0.2), (80, 0.2), (20, 1.0), (20, 0.02)])
def test_change_of_upstream_is_followed(servers: int, service_seconds: float) -> None:
    """An upstream that becomes smaller, larger, slower or faster is served as well as before."""
    upstream = Upstream(ConcurrencyLimit(500), 20, 0.2)
    upstream.run(10_000)
    upstream.servers, upstream.service_seconds = servers, service_seconds
    upstream.run(20_000)
    upstream.run(20_000)
    upstream.assert_settled()


def test_limit_is_bounded() -> None:
    """Where upstream never becomes slower, the limit is what memory allows; one is possible."""
    for max_limit in (1, 2, 64):
        upstream = Upstream(ConcurrencyLimit(max_limit), 10_000, 0.2)
        upstream.run(5_000)
        assert upstream.limit.limit == max_limit


def test_limit_that_is_not_used_does_not_grow() -> None:
    """Three at a time prove nothing for thirty."""
    upstream = Upstream(ConcurrencyLimit(500), 10_000, 0.2)
    upstream.run(5_000, demand=3)
    assert upstream.limit.limit <= 8


def test_failures_shrink_it_once_a_round() -> None:
    """All that was under way at a failure fails for the same reason; what fails later shrinks it again."""
    limit = ConcurrencyLimit(100)
    upstream = Upstream(limit, 10_000, 0.2)
    upstream.run(5_000)
    assert limit.limit == 100
    rounds = [limit.begin() for _ in range(50)]
    for number in rounds:
        limit.end(number, 9.0, is_ok=False)
    assert limit.limit == 70
    for _ in range(20):
        limit.end(limit.begin(), 9.0, is_ok=False)
    assert limit.limit == MIN_LIMIT


def test_answers_that_say_nothing_change_nothing() -> None:
    """A refused key or batch is answered fast, which is not upstream's speed."""
    limit = ConcurrencyLimit(100)
    for _ in range(1_000):
        limit.end(limit.begin(), 0.001, is_ok=None)
    assert limit.limit == MIN_LIMIT


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.floats(0, 100), st.sampled_from([True, True, True, False, None])), max_size=300),
    st.randoms(),
)
def test_limit_is_always_sane(max_limit: int, requests: list[tuple[float, bool | None]], random: Random) -> None:
    """Whatever upstream does, and in whatever order, the limit is within its bounds."""
    limit = ConcurrencyLimit(max_limit)
    under_way: list[int] = []
    for seconds, is_ok in requests:
        under_way.append(limit.begin())
        if random.random() < 0.7:
            limit.end(under_way.pop(random.randrange(len(under_way))), seconds, is_ok=is_ok)
        assert min(MIN_LIMIT, max_limit) <= limit.limit <= max_limit
