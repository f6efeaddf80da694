"""Batches that upstream stumbles over, while it takes all others: they hold up their own sessions and nobody else.

A 5xx or a timeout does not tell such a batch from an outage; what becomes of the others does.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from relay.errors import ExchangeTimedOut
from relay.http.client import Reply
from tests.accounting import assert_accounted
from tests.component.fake_upstream import (
    OK,
    Answer,
    Arrival,
    FakeUpstream,
    Forwarding,
    forwarding,
    make_config,
    say_yes,
)

TIMEOUT_SECONDS = 30.0
"""Of an exchange, by default."""


def stumble(*, times_out: bool = False) -> Answer:
    """Return an upstream that cannot digest sessions whose names begin with "bad"."""

    async def answer(arrival: Arrival) -> Reply:
        if not arrival.batch.session.startswith("bad"):
            await trio.sleep(0.05)
            return OK
        if times_out:
            await trio.sleep(TIMEOUT_SECONDS)
            raise ExchangeTimedOut("no answer")
        await trio.sleep(0.05)
        return Reply(500, {}, b"cannot digest that")

    return answer


def stuck(it: Forwarding) -> int:
    """Return the batches that are stuck."""
    return sum(lane.stuck for lane in it.forwarder.statistics().lanes)


def state(it: Forwarding) -> str:
    """Return the state of the one lane."""
    (lane,) = it.forwarder.statistics().lanes
    return lane.state


async def waits(it: Forwarding, name: str, patience_seconds: float) -> float:
    """Accept a session of one batch, and return how long it took to be upstream."""
    began_at = trio.current_time()
    await it.accept(name, flush="final")
    with trio.fail_after(patience_seconds):
        while not it.upstream.events(name):  # noqa: ASYNC110 - virtual time
            await trio.sleep(0.1)
    return trio.current_time() - began_at


@pytest.mark.parametrize("times_out", [False, True])
@pytest.mark.parametrize("bad", [1, 4, 20])
async def test_it_holds_up_nobody_else(tmp_path: Path, autojump_clock: MockClock, bad: int, times_out: bool) -> None:
    """Though nothing but such batches was ever sent, others get through, and once they have, no other waits any more.

    At first it looks like an outage. But every second probe is a batch that was never tried, in order; so one of the
    others is taken, with it the lane opens, and what fails all the same is soon known.
    """
    random, config = Random(3), make_config(requests_per_minute=0)
    longest_probe = config.forward.backoff_max_seconds + TIMEOUT_SECONDS
    async with forwarding(tmp_path, FakeUpstream(stumble(times_out=times_out)), config) as it:
        for number in range(bad):
            await it.accept(f"bad{number}", flush="final")
        await trio.sleep(300)
        assert state(it) == "probing"
        await waits(it, "first", 2 * (bad + 1) * longest_probe)
        good = 1
        while stuck(it) < bad:
            await waits(it, f"early{good}", 2 * (bad + 1) * longest_probe)
            await trio.sleep(20)
            good += 1
        for number in range(100):
            assert await waits(it, f"late{number}", 60) < 0.2
            await trio.sleep(random.uniform(0, 20))
            assert (state(it), stuck(it)) == ("open", bad)
        assert_accounted(await it.spool.account(), accepted=good + 100 + bad, delivered=good + 100, sealed=bad)
        it.upstream.answer = say_yes
        await it.drained()
        assert stuck(it) == 0
        it.assert_each_once()


async def test_it_takes_little_of_the_budget(tmp_path: Path, autojump_clock: MockClock) -> None:
    """However many there are, they have a sixteenth of the requests once they are known, and others the rest."""
    async with forwarding(tmp_path, FakeUpstream(stumble()), make_config(requests_per_minute=100)) as it:
        for number in range(3_000):  # nearly twice what the budget is good for
            await it.accept(f"{'bad' if number < 500 and number % 5 == 0 else 'good'}{number}", flush="final")
            await trio.sleep(0.3)
        assert stuck(it) == 100
        recent = [arrival for arrival in it.upstream.arrivals if arrival.at > trio.current_time() - 180]
        assert len(recent) > 290
        assert sum(arrival.batch.session.startswith("bad") for arrival in recent) <= 20
        assert state(it) == "open"
        it.upstream.answer = say_yes
        await it.drained(36_000)
        it.assert_each_once()


async def test_they_are_bounded_over_all_keys(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Of a hundred keys each has a batch that hangs: what is under way at once stays within its bound, others go."""
    config = make_config(requests_per_minute=0, max_in_flight=16)
    async with forwarding(tmp_path, FakeUpstream(stumble(times_out=True)), config) as it:
        for key in range(100):
            await it.accept("bad", flush="final", key=f"luc_pk_{key}")
        good = 0
        while stuck(it) < 100:
            for key in range(100):
                await it.accept(f"good{good}", flush="final", key=f"luc_pk_{key}")
            good += 1
            await trio.sleep(120)
        it.upstream.peak_in_flight = 0
        for number in range(30):
            await it.accept(f"late{number}", flush="final", key=f"luc_pk_{number}")
            await trio.sleep(20)
            assert it.upstream.events(f"late{number}")
            assert it.forwarder.statistics().in_flight <= 2
        assert it.upstream.peak_in_flight <= 3
        tried = {arrival.key for arrival in it.upstream.arrivals if arrival.batch.session == "bad"}
        it.upstream.arrivals.clear()
        await trio.sleep(10_000)
        assert {arrival.key for arrival in it.upstream.arrivals} == tried
        it.upstream.answer = say_yes
        await it.drained(36_000)
        it.assert_each_once()


async def test_a_mended_upstream_has_them_at_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    """They stand back only as long as they fail: once one is taken, the rest follows without a pause."""
    async with forwarding(tmp_path, FakeUpstream(stumble()), make_config(requests_per_minute=0)) as it:
        for number in range(100):
            await it.accept(f"{'good' if number % 2 else 'bad'}{number}", flush="final")
        while stuck(it) < 50:
            await waits(it, f"good{trio.current_time()}", 3_600)
            await trio.sleep(5)
        it.upstream.answer = say_yes
        assert await it.drained() < 120


async def test_an_outage_makes_none(tmp_path: Path, autojump_clock: MockClock) -> None:
    """However long it is, and however often upstream is in trouble: what fails as others do is not stuck."""
    random = Random(3)

    async def fail(_: Arrival) -> Reply:
        return Reply(503, {}, b"")

    async def flicker(_: Arrival) -> Reply:
        await trio.sleep(random.uniform(0.02, 0.5))
        return Reply(503, {}, b"") if random.random() < 0.1 else OK

    async with forwarding(tmp_path, FakeUpstream(fail), make_config()) as it:
        for number in range(100):
            await it.accept(f"a{number}", flush="final")
        await trio.sleep(36_000)
        assert (state(it), stuck(it)) == ("probing", 0)
        it.upstream.answer = flicker
        await it.drained(36_000)
        for number in range(1_000):
            await it.accept(f"b{number}", flush="final")
            await trio.sleep(1)
            assert stuck(it) == 0
        await it.drained(36_000)
        it.assert_each_once()
