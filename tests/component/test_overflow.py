"""`spool.overflow = "shed-sessions"`: what goes when there is no room, and what stays."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import Any

import structlog
import trio
from trio.testing import MockClock

from relay.http.client import Reply
from tests.accounting import assert_accounted
from tests.component.batches import make_batch, make_body
from tests.component.fake_upstream import Arrival, FakeUpstream, Forwarding, forwarding, make_config
from tests.component.spooling import wall_clock

SHEDDING: dict[str, Any] = {"overflow": "shed-sessions", "max_bytes": 2_097_152, "min_free_bytes": 0}


def noise(seed: int) -> bytes:
    """Return an event of 40 KB that hardly compresses."""
    return b'{"timestamp":%d,"type":3,"data":"%b"}' % (seed, Random(seed).randbytes(20_000).hex().encode())


async def unavailable(_: Arrival) -> Reply:
    """Fail."""
    return Reply(503, {}, b"")


async def fill(it: Forwarding, sessions: int, batches: int = 3) -> set[str]:
    """Accept sessions one after the other, a batch a second; returns what the spool said for a refusal meanwhile."""
    refusals = set()
    for session in range(sessions):
        for sequence in range(batches):
            await it.accept(f"s{session:03}", "w", sequence, events=[noise(session * batches + sequence)])
            await trio.sleep(1)
            refusals.add(it.spool.refusal)
    return refusals


async def test_oldest_sessions_go_whole(tmp_path: Path, autojump_clock: MockClock) -> None:
    """No batch is refused; the oldest sessions are gone whole, the youngest arrive whole; all is accounted for."""
    with structlog.testing.capture_logs() as lines:
        config = make_config(linger_seconds=100_000, requests_per_minute=0)
        async with forwarding(tmp_path, FakeUpstream(), config, **SHEDDING) as it:
            assert await fill(it, 60) == {""}
            account = await it.spool.account()
            assert_accounted(account, accepted=180, delivered=0)
            assert account.shed_by_reason == {"dead_letters": 0, "sessions": account.shed}
            assert 60 < account.shed < 180
            for session in range(60):  # their ends, for those that are left
                await it.accept(f"s{session:03}", "w", 9, flush="final")
            await trio.sleep(60)
        arrived = {batch.session for batch in it.upstream.order if len(batch.events) > 1}
        assert arrived == {f"s{session:03}" for session in range(60 - len(arrived), 60)}
        assert {len(it.upstream.events(name)) for name in arrived} == {4}
    assert any(line["log_level"] == "error" and line["event"].startswith("sessions shed") for line in lines)


async def test_room_is_made_at_once(tmp_path: Path) -> None:
    """A burst that is worth many times the twentieth which is kept free is taken without a pause."""
    async with forwarding(tmp_path, FakeUpstream(), make_config(linger_seconds=100_000), **SHEDDING) as it:
        for session in range(150):
            await it.accept(f"s{session:03}", events=[noise(session)])
            assert it.spool.refusal == ""
        account = await it.spool.account()
        assert_accounted(account, accepted=150, delivered=0, shed=account.shed)
        assert 50 < account.shed < 100


async def test_sealed_sessions_stay(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A session whose batch may be upstream already is not shed, and arrives once upstream does."""
    upstream = FakeUpstream(unavailable)
    async with forwarding(tmp_path, upstream, make_config(linger_seconds=0.5), **SHEDDING) as it:
        await it.accept("first", events=[noise(1_000)])
        await trio.sleep(5)
        assert_accounted(await it.spool.account(), sealed=1)
        await fill(it, 40)
        assert (await it.spool.account()).shed > 0
        upstream.answer = FakeUpstream().answer
        await it.drained(36_000)
        assert upstream.events("first") == [noise(1_000)]
        account = await it.spool.account()
        assert_accounted(account, spooled=0, delivered=121 - account.shed)
        assert len(upstream.events()) == account.delivered


async def test_retry_of_what_was_shed_stores_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    """It is answered as a repeat; what the session sends later is taken, under numbers of its own."""
    config = make_config(linger_seconds=100_000)
    async with forwarding(tmp_path, FakeUpstream(), config, **SHEDDING) as it:
        await fill(it, 40)
        body = make_body("s000", "w", 0, events=[noise(0)])
        assert (await it.spool.append(make_batch(body, accepted_at=wall_clock()))).outcome == "repeated"
        shed = (await it.spool.account()).shed
        await it.accept("s000", "w", 5, flush="final")
        await trio.sleep(5)
        assert [(batch.sequence, len(batch.events)) for batch in it.upstream.order] == [(5 * 16_384, 1)]
        assert_accounted(await it.spool.account(), accepted=121, delivered=1, shed=shed)


async def test_rejecting_loses_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    """By default it is the new that has to wait: at the cap batches are refused, and nothing is shed.

    The log says so once, however often a batch that leaves makes room for one that comes, and once that it is over.
    """
    options = {**SHEDDING, "overflow": "reject"}
    config = make_config(linger_seconds=600, requests_per_minute=20)
    with structlog.testing.capture_logs() as lines:
        async with forwarding(tmp_path, FakeUpstream(), config, **options) as it:
            await fill(it, 40)
            assert "spool.max_bytes" in it.spool.refusal
            assert_accounted(await it.spool.account(), shed=0)
            waits = []
            for number in range(2_400):
                waits.append(bool(it.spool.refusal))
                if not waits[-1]:
                    await it.accept(f"late{number}", events=[noise(number)])
                await trio.sleep(1)
            assert sum(before < now for before, now in itertools.pairwise(waits)) > 10
            await it.drained(36_000)
            assert_accounted(await it.spool.account(), shed=0, spooled=0)
    said = [(line["event"], line["log_level"]) for line in lines if line["event"].startswith("spool")]
    assert said == [("spool refuses batches", "error"), ("spool accepts batches again", "warning")]
