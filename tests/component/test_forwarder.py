from __future__ import annotations

from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from relay.errors import ConnectFailed, ExchangeFailed
from relay.forward.lane import Lane
from relay.http.client import Reply
from tests.accounting import assert_accounted
from tests.component.batches import KEY, make_batch, make_body, make_event
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, forwarding, make_config, say_yes
from tests.component.spooling import wall_clock


def answering(*statuses: int, headers: dict[bytes, bytes] | None = None) -> FakeUpstream:
    """Return an upstream that gives each status in turn to one key, and takes everything else."""
    left = list(statuses)

    async def answer(arrival: Arrival) -> Reply:
        await trio.sleep(0.01)
        return Reply(left.pop(0), headers or {}, b"says the test") if left and arrival.key == KEY else OK

    return FakeUpstream(answer)


def events_of(name: str, count: int, size: int = 0) -> list[bytes]:
    """Return events that no other call returns."""
    return [make_event(f"{name}-{number}", size) for number in range(count)]


# -- when a window is sent


async def test_window_lingers_to_gather(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Small batches of one window wait `linger_seconds` for one another, then travel as one."""
    async with forwarding(tmp_path, FakeUpstream()) as it:
        for sequence in range(4):
            await it.accept("s", "w", sequence)
            await trio.sleep(1)
        await it.drained()
        [arrival] = it.upstream.arrivals
        assert arrival.at == pytest.approx(5.0, abs=0.01)
        assert len(arrival.batch.events) == 4
        it.assert_each_once()


@pytest.mark.parametrize(("count", "flush"), [(500, ""), (1, "final")])
async def test_full_and_final_do_not_linger(tmp_path: Path, autojump_clock: MockClock, count: int, flush: str) -> None:
    """A full window, and a session that has ended, are sent at once."""
    async with forwarding(tmp_path, FakeUpstream()) as it:
        await it.accept("s", "w", 0, events=events_of("e", count), flush=flush)
        assert await it.drained() < 0.5
        assert [len(arrival.batch.events) for arrival in it.upstream.arrivals] == [count]


async def test_scarcity_is_visible(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Each batch is counted by why it was sent, how long its oldest event waited for that, and how full it was."""
    async with forwarding(tmp_path, answering(500)) as it:
        await it.accept("s", "w", 0, events=events_of("a", 50))
        await trio.sleep(2)
        await it.accept("s", "w", 1, events=events_of("b", 50))
        await it.drained()
        await it.accept("t", "w", 0, events=events_of("c", 500))
        await it.drained()
        statistics = it.forwarder.statistics()
        assert statistics.batches_by_reason == {"lingered": 1, "full": 1}
        assert statistics.wait_seconds.summary().count == 2
        assert statistics.wait_seconds.sum == pytest.approx(5.0, abs=0.1)
        assert (statistics.fullness_ratio.counts[1], statistics.fullness_ratio.counts[-2]) == (1, 1)
        assert statistics.fullness_ratio.sum == pytest.approx(0.2 + 1.0)
        # The first was refused with a 500 and sent again: that is no further cut, but a longer way upstream.
        assert statistics.delivery_seconds.summary().count == 2
        assert statistics.delivery_seconds.sum > statistics.wait_seconds.sum
        it.assert_each_once()


async def test_one_in_flight_per_session(tmp_path: Path, autojump_clock: MockClock) -> None:
    """However much is pending, a session's batches go one after the other (upstream complains of two at once)."""
    async with forwarding(tmp_path, FakeUpstream()) as it:
        for window in ("a", "b"):
            for sequence in range(3):
                await it.accept("s", window, sequence, events=events_of(f"{window}{sequence}", 500))
        await it.drained()
        assert it.upstream.peak_in_flight == 1
        assert len(it.upstream.arrivals) == 6
        it.assert_each_once()


async def test_sessions_go_side_by_side(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Parallelism is across sessions, up to `max_in_flight_per_key` of each key and `max_in_flight` of all."""
    config = make_config(max_in_flight_per_key=3, max_in_flight=5)
    async with forwarding(tmp_path, FakeUpstream(), config) as it:
        for number in range(30):
            await it.accept(f"s{number}", flush="final", key=f"luc_pk_{number % 2}")
        await it.drained()
        assert it.upstream.peak_in_flight == 5
        it.assert_each_once()


# -- finals


async def test_final_goes_last(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A final waits for all windows of its session, for what comes late and out of order too."""
    async with forwarding(tmp_path, answering(503, 503, 503)) as it:
        await it.accept("s", "a", 1)
        await it.accept("s", "b", 2)
        await it.accept("s", "a", 3, flush="final")
        await trio.sleep(0.02)
        await it.accept("s", "b", 0)
        await it.drained()
        assert [batch.is_final for batch in it.upstream.order][-1]
        assert sum(batch.is_final for batch in it.upstream.order) == 1
        it.assert_each_once()


async def test_session_that_goes_on_after_its_final_is_delivered(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A final and what its window sent afterwards do not wait for each other."""
    async with forwarding(tmp_path, FakeUpstream()) as it:
        await it.accept("s", "w", 0, events=events_of("e", 500))  # in flight while the others arrive
        await it.accept("s", "w", 1, flush="final")
        await it.accept("s", "w", 2)
        assert await it.drained() < 10
        it.assert_each_once()


async def test_final_said_by_a_retry_does_not_linger(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A batch that is the session's last only when its client sends it again goes at once, as the final."""
    async with forwarding(tmp_path, FakeUpstream(), make_config(linger_seconds=600)) as it:
        await it.accept("s", "a", 0)
        await it.accept("s", "b", 1)
        await trio.sleep(10)
        await it.spool.append(make_batch(make_body("s", "a", 0, flush="final")))
        assert await it.drained() < 1
        assert [(batch.window, batch.is_final) for batch in it.upstream.order] == [("b", False), ("a", True)]


async def test_two_finals_end_the_session_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Of the finals of two windows, pending together, the later ends the session."""
    upstream = FakeUpstream()
    async with forwarding(tmp_path, upstream, make_config(max_in_flight_per_key=1)) as it:
        await it.accept("s", "a", 0)
        await trio.sleep(5.01)  # the first is in flight
        await it.accept("s", "a", 1, flush="final")
        await it.accept("s", "b", 2, flush="final")
        await it.drained()
        assert [(batch.window, batch.is_final) for batch in upstream.order] == [("a", False), ("a", False), ("b", True)]


# -- what answers mean


@pytest.mark.parametrize("status", [302, 404, 405, 410, 418, 500, 502, 599, 408, 425])
async def test_failed_batch_is_sent_again_as_it_was(tmp_path: Path, autojump_clock: MockClock, status: int) -> None:
    """A retry has the same bytes, within the backoff's bounds; what was pending meanwhile comes later."""
    async with forwarding(tmp_path, answering(status, status, status)) as it:
        await it.accept("s", "w", 0, events=events_of("e", 500))
        await it.accept("s", "w", 1, flush="final")
        await it.drained()
        arrivals = it.upstream.arrivals
        assert [arrival.attempt for arrival in arrivals] == [1, 2, 3, 4, 1]
        waits = [later.at - earlier.at for earlier, later in pairwise(arrivals[:4])]
        assert all(wait <= 0.02 + 2**exponent for exponent, wait in enumerate(waits))
        it.assert_each_once()


@pytest.mark.parametrize("error", [ConnectFailed("refused"), ExchangeFailed("reset")])
async def test_lost_answers_deliver_once(tmp_path: Path, autojump_clock: MockClock, error: Exception) -> None:
    """A batch that was stored though its answer was lost is sent again, and is there once."""
    upstream = FakeUpstream()

    async def lose(arrival: Arrival) -> Reply:
        if arrival.attempt < 3:
            upstream.store(arrival)
            raise error
        return OK

    upstream.answer = lose
    async with forwarding(tmp_path, upstream) as it:
        await it.accept("s", flush="final")
        await it.drained()
        it.assert_each_once()


async def test_breaker_sends_single_probes(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After a run of failures one request at a time asks whether upstream is back; then everything flows."""
    is_down = True

    async def answer(arrival: Arrival) -> Reply:
        await trio.sleep(0.5)
        return Reply(503, {}, b"") if is_down else OK

    upstream = FakeUpstream(answer)
    async with forwarding(tmp_path, upstream, make_config(requests_per_minute=0, breaker_failures=3)) as it:
        for number in range(20):
            await it.accept(f"s{number}", flush="final")
        await trio.sleep(2)
        upstream.peak_in_flight = 0
        before = len(upstream.arrivals)
        await trio.sleep(600)
        assert upstream.peak_in_flight == 1
        assert 5 < len(upstream.arrivals) - before < 100
        is_down = False
        assert await it.drained() < 120
        assert upstream.peak_in_flight > 1
        it.assert_each_once()


@pytest.mark.parametrize("as_date", [False, True])
async def test_retry_after_holds_the_whole_key(tmp_path: Path, autojump_clock: MockClock, as_date: bool) -> None:
    """After a 429 nothing of that key is sent before `Retry-After`; another key goes on."""
    value = formatdate(wall_clock() + 37, usegmt=True) if as_date else "37"
    async with forwarding(tmp_path, answering(429, headers={b"retry-after": value.encode()})) as it:
        await it.accept("limited", flush="final")
        await trio.sleep(0.1)
        for number in range(5):
            await it.accept(f"s{number}", flush="final")
        await it.accept("free", flush="final", key="luc_pk_other")
        assert it.forwarder.statistics().lanes[0].state == "limited"
        await it.drained()
        held = [arrival.at for arrival in it.upstream.arrivals[1:] if arrival.key == "luc_pk_test"]
        [free] = [arrival.at for arrival in it.upstream.arrivals if arrival.key == "luc_pk_other"]
        assert free < 1
        assert 36 < min(held) < 38
        it.assert_each_once()


async def test_retry_after_of_zero_is_no_tight_loop(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Upstream that says `Retry-After: 0` for ever is asked as seldom as one that fails."""

    async def answer(arrival: Arrival) -> Reply:
        return Reply(429, {b"retry-after": b"0"}, b"")

    upstream = FakeUpstream(answer)
    async with forwarding(tmp_path, upstream, make_config(requests_per_minute=0)) as it:
        await it.accept("s", flush="final")
        await trio.sleep(600)
        assert len(upstream.arrivals) < 60
        upstream.answer = say_yes
        await it.drained()


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_key_is_held_and_probed(tmp_path: Path, autojump_clock: MockClock, status: int) -> None:
    """A refused key is asked again soon, then every `hold_seconds`, and flows again once a probe passes."""
    async with forwarding(tmp_path, answering(status, status), make_config(hold_seconds=100)) as it:
        await it.accept("s0", flush="final")
        await trio.sleep(0.1)
        for number in range(1, 4):
            await it.accept(f"s{number}", flush="final")
        await it.accept("free", flush="final", key="luc_pk_other")
        await trio.sleep(50)
        assert {lane.state for lane in it.forwarder.statistics().lanes} == {"held", "open"}
        assert_accounted(await it.spool.account(), accepted=5, delivered=1)
        await it.drained()
        times = [round(arrival.at) for arrival in it.upstream.arrivals if arrival.key == "luc_pk_test"]
        assert times[:3] == [0, 10, 110]
        assert set(times[3:]) == {110}
        it.assert_each_once()


async def test_unexpected_exception_costs_one_session(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A defect met while a batch is sent is logged and counted; others are delivered, and the batch once it works."""

    async def answer(arrival: Arrival) -> Reply:
        if arrival.batch.session == "cursed":
            raise ZeroDivisionError("a defect")
        return await say_yes(arrival)

    upstream = FakeUpstream(answer)
    async with forwarding(tmp_path, upstream) as it:
        for session in ("a", "cursed", "b"):
            await it.accept(session, flush="final")
        await trio.sleep(60)
        assert it.forwarder.statistics().attempt_errors > 1
        assert_accounted(await it.spool.account(), accepted=3, delivered=2, sealed=1)
        upstream.answer = say_yes
        await it.drained()
        assert len(upstream.events()) == 3
        assert_accounted(await it.spool.account(), delivered=3)


async def test_unexpected_exception_at_the_disk_is_left_to_the_next_run(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What became of the batch is not known then, so nothing of its session is sent before the disk is read again."""
    upstream = FakeUpstream()
    async with forwarding(tmp_path, upstream) as it:
        settle = it.spool.settle

        async def settle_others(batch_id: int) -> None:
            if it.forwarder.statistics().attempt_errors == 0:
                raise ZeroDivisionError("a defect")
            await settle(batch_id)

        monkeypatch.setattr(it.spool, "settle", settle_others)
        await it.accept("cursed")
        await trio.sleep(60)
        for session in ("a", "cursed", "b"):
            await it.accept(session, sequence=1, flush="final")
        await trio.sleep(600)
        assert it.forwarder.statistics().attempt_errors == 1
        assert_accounted(await it.spool.account(), accepted=4, delivered=2, sealed=1, pending=1)
    async with forwarding(tmp_path, upstream) as it:
        await it.drained()
        assert len(upstream.events()) == 4
        assert_accounted(await it.spool.account(), delivered=4)


# -- over long and over many


async def test_budget_is_never_exceeded(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Forty sessions, six batches a minute each and a failing upstream stay within every 60 s window of a key."""
    random = Random(7)

    async def answer(arrival: Arrival) -> Reply:
        await trio.sleep(random.uniform(0.02, 1.5))
        return Reply(503, {}, b"") if random.random() < 0.1 else OK

    upstream = FakeUpstream(answer)
    async with forwarding(tmp_path, upstream, make_config(requests_per_minute=50, breaker_failures=50)) as it:
        for sequence in range(24):
            for number in range(40):
                await it.accept(f"s{number}", "w", sequence, events=events_of(f"{number}/{sequence}", 3))
                await trio.sleep(0.25)
        await it.drained()
        assert upstream.peak_requests("luc_pk_test") == 50
        assert len(upstream.arrivals) < 40 * 24 / 2
        it.assert_each_once()


async def test_more_windows_than_memory_holds(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Beyond `max_windows` windows wait on disk, and all are delivered in their turn."""
    config = make_config(requests_per_minute=0, max_windows=100, linger_seconds=0.5)
    held = []
    async with forwarding(tmp_path, FakeUpstream(), config) as it:
        for number in range(450):
            await it.accept(f"s{number}")
            held.append(it.forwarder.statistics().pending_windows)
        for number in range(0, 450, 7):
            await it.accept(f"s{number}", "w", 1, flush="final")
        assert it.forwarder.statistics().has_more_on_disk
        await it.drained()
        it.assert_each_once()
    assert max(held) == 100


async def test_other_keys_make_no_batch_dearer(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there is room for a window is seen at its own lane, not at all others, as long as they hold little."""
    looks = 0

    def look(lane: Lane) -> int:
        nonlocal looks
        looks += 1
        return len(lane._schedule)

    async with forwarding(tmp_path, FakeUpstream(), make_config(linger_seconds=100)) as it:
        for number in range(50):
            await it.accept(f"s{number}", key=f"luc_pk_{number}")
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "pending_windows", property(look))
            await it.accept("another", key="luc_pk_0")
        assert looks == 1
        await it.drained(600)


async def test_stuck_key_leaves_memory_to_the_others(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A refused key with more windows than memory holds keeps no other key waiting."""

    async def answer(arrival: Arrival) -> Reply:
        if arrival.key == "luc_pk_bad":
            return Reply(401, {}, b"")
        return OK

    upstream = FakeUpstream(answer)
    config = make_config(requests_per_minute=0, max_windows=100, linger_seconds=0.5)
    async with forwarding(tmp_path, upstream, config) as it:
        for number in range(150):
            await it.accept(f"bad{number}", key="luc_pk_bad")
        for number in range(120):
            await it.accept(f"good{number}", key="luc_pk_good")
        await trio.sleep(200)
        assert {arrival.batch.session for arrival in upstream.arrivals if arrival.key == "luc_pk_good"} == {
            f"good{number}" for number in range(120)
        }
        assert it.forwarder.statistics().pending_windows <= 200
        assert_accounted(await it.spool.account(), accepted=270, delivered=120)


async def test_other_keys_are_not_behind_a_stuck_one_on_the_disk(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After a start a key's backlog is found soon, though pages of what a refused key has lie before it."""

    async def answer(arrival: Arrival) -> Reply:
        return Reply(401, {}, b"") if arrival.key == "luc_pk_bad" else OK

    config = make_config(requests_per_minute=0, max_windows=100, linger_seconds=100)
    async with forwarding(tmp_path, FakeUpstream(answer), config) as it:
        for number in range(8_000):
            await it.accept(f"bad{number}", key="luc_pk_bad")
        for number in range(10):
            await it.accept(f"good{number}", key="luc_pk_good")
    upstream = FakeUpstream(answer)
    config = make_config(requests_per_minute=0, max_windows=100, linger_seconds=0.5)
    async with forwarding(tmp_path, upstream, config) as later:
        await trio.sleep(30)
        assert sum(batch.session.startswith("good") for batch in upstream.order) == 10
        assert later.forwarder.statistics().pending_windows <= 200


@pytest.mark.parametrize("seed", range(4))
async def test_erratic_upstream_gets_each_event_once(tmp_path: Path, autojump_clock: MockClock, seed: int) -> None:
    """Through errors, lost answers, limits and restarts, upstream has every event once, and the account says so."""
    random = Random(seed)
    upstream = FakeUpstream()

    async def answer(arrival: Arrival) -> Reply:
        await trio.sleep(random.choice([0.01, 0.1, 2.0]))
        draw = random.random()
        if draw < 0.1:
            return await upstream.store_and_hang_up(arrival)
        if draw < 0.2:
            raise ConnectFailed("refused")
        if draw < 0.3:
            return Reply(random.choice([500, 502, 404, 408, 429, 302]), {b"retry-after": b"2"}, b"")
        return OK

    upstream.answer = answer
    config = make_config(requests_per_minute=0, linger_seconds=1.0)
    accepted: list[bytes] = []
    sequence = 0
    for _ in range(3):
        async with forwarding(tmp_path, upstream, config, seed=seed) as it:
            for _ in range(80):
                sequence += 1
                place = (f"s{random.randrange(12)}", random.choice("ab"), sequence)
                events = events_of(str(sequence), random.choice([1, 3, 40, 700]))
                key = random.choice(["luc_pk_a", "luc_pk_b"])
                await it.accept(*place, events=events, key=key, page=random.choice(["/x", "/x", "/y"]))
                accepted += events
                await trio.sleep(random.random() / 4)
    async with forwarding(tmp_path, upstream, config, seed=seed) as it:
        await it.drained()
        assert_accounted(await it.spool.account(), accepted=len(accepted), delivered=len(accepted), spooled=0)
    assert sorted(upstream.events()) == sorted(accepted)
