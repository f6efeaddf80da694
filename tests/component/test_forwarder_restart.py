"""The forwarder cut short, at any moment, and started again on the same spool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from relay.http.client import Reply
from relay.spool.spool import Spool
from tests.accounting import assert_accounted
from tests.component import spooling
from tests.component.batches import make_event
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, Forwarding, forwarding, make_config, say_yes


class Countdown(trio.abc.Instrument):
    """Cancels a scope just before the n-th time that any task is run."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._steps = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count."""
        self._steps -= 1
        if self._steps == 0:
            self._scope.cancel()


async def fill(it: Forwarding) -> None:
    """Accept two sessions, one of which needs a split, another window and a final."""
    await it.accept("s", "a", 0, events=[make_event(f"s{number}") for number in range(12)])
    await it.accept("s", "b", 1)
    await it.accept("s", "b", 2, flush="final")
    await it.accept("t", "a", 0, page="/x")
    await it.accept("t", "a", 1, page="/y")


@pytest.mark.parametrize("steps", range(1, 121))
async def test_cancelled_anywhere_everything_is_delivered_once(
    tmp_path: Path, autojump_clock: MockClock, steps: int
) -> None:
    """Cancel everything before the n-th step of any task, of some 110: the next run delivers what is left, once.

    Half of the runs merge pages, and the next ones do not.
    """
    upstream = FakeUpstream(max_events=7)
    config = make_config(max_events=7, linger_seconds=0.2)
    merging = make_config(max_events=7, linger_seconds=0.2, merge="page")
    accepted: list[bytes] = []
    with trio.CancelScope() as scope:
        countdown = Countdown(scope, steps)
        trio.lowlevel.add_instrument(countdown)
        try:
            async with forwarding(tmp_path, upstream, merging if steps % 2 else config) as it:
                accepted = it.accepted
                await fill(it)
                await it.drained()
        finally:
            trio.lowlevel.remove_instrument(countdown)
    async with forwarding(tmp_path, upstream, config) as it:
        await it.drained()
        account = await it.spool.account()
        assert_accounted(account, accepted=account.delivered, spooled=0)
    sent = upstream.events()
    assert len(sent) == len(set(sent)) == account.accepted
    assert set(accepted) <= set(sent), "an acknowledged event is lost"
    finals = [batch for batch in upstream.order if batch.is_final]
    assert [batch.session for batch in finals] in ([], ["s"])


async def test_sealed_batch_is_sent_verbatim_by_the_next_run(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What was in flight when the relay died is sent again as it was, before anything else of its session."""

    async def hang(arrival: Arrival) -> Reply:
        await trio.sleep_forever()
        raise AssertionError

    upstream = FakeUpstream(hang)
    with trio.move_on_after(10):
        async with forwarding(tmp_path, upstream) as it:
            await it.accept("s", "w", 1, events=[make_event("first")])
            await trio.sleep(7)
            await it.accept("s", "w", 0, events=[make_event("late")])
            await it.accept("s", "w", 2, events=[make_event("last")], flush="final")
            await trio.sleep_forever()
    upstream.answer = say_yes
    async with forwarding(tmp_path, upstream) as it:
        await it.drained()
    first, again, *_ = upstream.arrivals
    assert again.body == first.body
    assert upstream.events() == [make_event("first"), make_event("late"), make_event("last")]


async def test_budget_of_the_last_minute_survives_a_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Restarts do not let a key send more than its requests in any minute."""
    upstream = FakeUpstream()
    config = make_config(requests_per_minute=10)
    for run in range(6):
        async with forwarding(tmp_path, upstream, config) as it:
            for number in range(8):
                await it.accept(f"s{run}-{number}", flush="final")
            await trio.sleep(5)
    async with forwarding(tmp_path, upstream, config) as it:
        await it.drained()
        assert_accounted(await it.spool.account(), accepted=48, delivered=48)
    assert upstream.peak_requests("luc_pk_test") == 10


async def test_retry_after_survives_a_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    """However often the relay is started again, upstream hears nothing of the key before it wants to, and then it does.

    Another key is not held up by that.
    """

    async def limit(arrival: Arrival) -> Reply:
        if arrival.key == "luc_pk_test" and trio.current_time() < began_at + 300:
            return Reply(429, {b"retry-after": b"300"}, b"")
        return OK

    upstream = FakeUpstream(limit)
    began_at = trio.current_time()
    for run in range(6):
        async with forwarding(tmp_path, upstream) as it:
            await it.accept(f"s{run}", flush="final")
            await it.accept(f"s{run}", flush="final", key="luc_pk_other")
            await trio.sleep(30)
            assert {lane.state for lane in it.forwarder.statistics().lanes} == {"limited", "open"}
    async with forwarding(tmp_path, upstream) as it:
        await it.drained()
        assert_accounted(await it.spool.account(), accepted=12, delivered=12)
    times = [arrival.at - began_at for arrival in upstream.arrivals if arrival.key == "luc_pk_test"]
    assert times[0] < 1
    assert 300 <= min(times[1:]) < 302


@pytest.mark.parametrize("leap", [-100_000.0, 100_000.0])
async def test_a_pause_is_no_longer_than_an_operator_allows(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, leap: float
) -> None:
    """A wall clock that is set while the relay is down neither holds a key for ever nor breaks anything."""

    async def limit(_: Arrival) -> Reply:
        return Reply(429, {b"retry-after": b"60"}, b"")

    upstream = FakeUpstream(limit)
    async with forwarding(tmp_path, upstream) as it:
        await it.accept("s", flush="final")
        await trio.sleep(10)
    upstream.answer = say_yes
    monkeypatch.setattr(spooling, "EPOCH", spooling.EPOCH + leap)
    async with forwarding(tmp_path, upstream) as it:
        assert await it.drained(100_000) <= make_config().forward.retry_after_max_seconds + 1


async def test_stopping_finishes_what_is_in_flight_and_nothing_else(tmp_path: Path, autojump_clock: MockClock) -> None:
    """`stop` lets deliveries in flight end and be recorded; the backlog stays for the next run."""
    release = trio.Event()

    async def wait(arrival: Arrival) -> Reply:
        await release.wait()
        return OK

    upstream = FakeUpstream(wait)
    async with forwarding(tmp_path, upstream, make_config(max_in_flight_per_key=2)) as it:
        for number in range(6):
            await it.accept(f"s{number}", flush="final")
        await trio.sleep(1)
        it.forwarder.stop()
        await trio.sleep(100)
        assert it.forwarder.statistics().in_flight == 2
        release.set()
        await trio.sleep(100)
        assert_accounted(await it.spool.account(), accepted=6, delivered=2, pending=4)
        await it.accept("after", key="luc_pk_new")  # is for the next run, and disturbs nobody
    async with forwarding(tmp_path, upstream) as it:
        await it.drained()
        assert_accounted(await it.spool.account(), delivered=7)


class RefusingDisk:
    """Lets chosen steps of a spool fail, a number of times each."""

    def __init__(self, spool: Spool, **failures: int) -> None:
        self.failures = failures
        for name in failures:
            setattr(spool._store, name, self._failing(name, getattr(spool._store, name)))

    def _failing(self, name: str, step: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            if self.failures[name]:
                self.failures[name] -= 1
                raise apsw.FullError("database or disk is full")
            return step(*arguments, **options)

        return run


@pytest.mark.parametrize("step", ["seal", "load", "settle", "refuse"])
async def test_disk_that_refuses_a_step_delays_it(tmp_path: Path, autojump_clock: MockClock, step: str) -> None:
    """A step that the disk refuses is asked for again; an outcome is recorded without sending again."""
    answers = {"load": [503], "refuse": [400]}.get(step, [])

    async def answer(arrival: Arrival) -> Reply:
        return Reply(answers.pop(0), {}, b"") if answers else OK

    upstream = FakeUpstream(answer)
    async with forwarding(tmp_path, upstream) as it:
        disk = RefusingDisk(it.spool, **{step: 3})
        await it.accept("s", "w", 0, events=[make_event(str(number)) for number in range(500)])
        await trio.sleep(60)
        assert disk.failures == {step: 0}
        assert len(upstream.arrivals) == {"load": 2, "refuse": 3}.get(step, 1)
        assert_accounted(await it.spool.account(), accepted=500, delivered=500)
        assert it.forwarder.statistics().attempt_errors == 0
