"""Upstream's true limit: learned where it is to be learned, and where there is none, latency in its place."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import trio
from trio.testing import MockClock

from relay.config import Budget
from relay.http.client import Reply
from relay.sandbox.limiter import RequestWindow
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, forwarding, make_config

LEARNING = msgspec.structs.replace(make_config(linger_seconds=1.0), budget=Budget(requests_per_minute="auto"))


class StrictUpstream(FakeUpstream):
    """Allows each key so many requests in any 60 s, and no more."""

    def __init__(self, limit: int) -> None:
        super().__init__(self._judge)
        self.limit = limit
        self.windows: dict[str, RequestWindow] = {}
        self.refused_at: list[float] = []

    async def _judge(self, arrival: Arrival) -> Reply:
        await trio.sleep(0.05)
        window = self.windows.setdefault(arrival.key, RequestWindow(self.limit))
        wait = window.admit(trio.current_time())
        await trio.sleep(0.05)
        if not wait:
            return OK
        self.refused_at.append(trio.current_time())
        return Reply(429, {b"retry-after": b"%d" % math.ceil(wait)}, b'{"error":"Rate limit exceeded"}')


async def test_stricter_limit_is_learned(tmp_path: Path, autojump_clock: MockClock) -> None:
    """An upstream that allows 30 refuses what was under way once; from then on the relay spends 30 and no more."""
    upstream = StrictUpstream(30)
    async with forwarding(tmp_path, upstream, LEARNING) as it:
        for number in range(200):
            await it.accept(f"s{number}", flush="final")
        assert await it.drained() < 60 * (200 / 30 + 2)
        [lane] = it.forwarder.statistics().lanes
        assert 28 <= lane.budget_limit <= 32
        assert it.forwarder.statistics().budget_limit_by_key == {lane.key: lane.budget_limit}
        assert len(upstream.refused_at) <= LEARNING.forward.max_in_flight_per_key + 2
        it.assert_each_once()


async def test_generous_limit_is_learned_key_by_key(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A key that is short of requests finds that it may spend three times as many; another stays as it was."""
    upstream = StrictUpstream(300)
    async with forwarding(tmp_path, upstream, LEARNING) as it:
        for number in range(1_200):
            await it.accept(f"s{number}", flush="final")
        await it.accept("quiet", key="luc_pk_quiet")
        await trio.sleep(30)
        quiet, busy = sorted(lane.budget_limit for lane in it.forwarder.statistics().lanes)
        assert (quiet, busy) == (100, 100)
        assert await it.drained() < 8 * 60
        [limit] = [lane.budget_limit for lane in it.forwarder.statistics().lanes if lane.budget_limit != 100]
        assert 200 < limit <= 315
        assert len(upstream.refused_at) <= 8
        it.assert_each_once()


async def test_what_was_learned_outlives_a_pause(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A key that pauses for minutes is refused once more at most; one that pauses for hours begins again."""
    upstream = StrictUpstream(20)
    async with forwarding(tmp_path, upstream, LEARNING) as it:
        for hour, is_known in ((0.0, False), (0.25, True), (3.0, False)):
            await trio.sleep(max(0.0, hour * 3_600 - trio.current_time()))
            before = len(upstream.refused_at)
            for number in range(35):
                await it.accept(f"{hour}-{number}", flush="final")
            await it.drained()
            assert (len(upstream.refused_at) <= before + 1) == is_known
        it.assert_each_once()


async def test_latency_bounds_what_no_budget_does(tmp_path: Path, autojump_clock: MockClock) -> None:
    """An upstream that serves six at once is kept busy by a few more, over all keys, though 64 would be allowed."""
    servers = trio.Semaphore(6)

    async def serve(_: Arrival) -> Reply:
        async with servers:
            await trio.sleep(0.5)
        return OK

    upstream = FakeUpstream(serve)
    async with forwarding(tmp_path, upstream, make_config(requests_per_minute=0)) as it:
        for number in range(400):
            await it.accept(f"s{number}", flush="final", key=f"luc_pk_{number % 3}")
        assert await it.drained() < 1.15 * 400 * 0.5 / 6
        assert 6 < upstream.peak_in_flight <= 18
        assert it.forwarder.statistics().in_flight_limit <= 18
        it.assert_each_once()


async def test_one_key_without_budget_may_use_all_slots(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Where upstream does not become slower, a single key gets up to `max_in_flight`."""
    config = make_config(requests_per_minute=0, max_in_flight=24)
    async with forwarding(tmp_path, FakeUpstream(), config) as it:
        for number in range(600):
            await it.accept(f"s{number}", flush="final")
        await it.drained()
        assert it.upstream.peak_in_flight == 24
        it.assert_each_once()
