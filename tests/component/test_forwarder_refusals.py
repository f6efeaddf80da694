"""What the forwarder makes of answers that no retry can better: 400, 413, 422, 401, 403."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from relay.http.client import Reply
from relay.protocol.fingerprint import fingerprint
from relay.protocol.verdict import STATUS_VERDICTS, Verdict, classify
from tests.accounting import assert_accounted
from tests.component.batches import make_event
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, Forwarding, forwarding, make_config, say_yes


def events_of(name: str, count: int, bad: tuple[int, ...] = (), size: int = 0) -> list[bytes]:
    """Return events that no other call returns; the bad ones are called so."""
    return [make_event(f"{name}-{'bad' if at in bad else 'good'}-{at}", size) for at in range(count)]


def judging(status: int = 400, max_bytes: int = 1_048_576) -> FakeUpstream:
    """Return an upstream that refuses batches with a bad event in them, or with more than `max_bytes`."""

    async def answer(arrival: Arrival) -> Reply:
        await trio.sleep(0.01)
        if any(b"-bad-" in event for event in arrival.batch.events):
            return Reply(status, {}, b'{"error":"Invalid payload"}')
        return Reply(413, {}, b"") if arrival.batch.size > max_bytes else OK

    return FakeUpstream(answer)


def assert_rest_delivered(it: Forwarding, *missing: bytes) -> None:
    """Assert that upstream has everything accepted but these, once, and each session in order."""
    assert sorted(it.upstream.events()) == sorted(event for event in it.accepted if event not in missing)
    for session in {batch.session for batch in it.upstream.order}:
        sequences = [batch.sequence for batch in it.upstream.order if batch.session == session]
        assert sequences == sorted(sequences)


UNNAMED = (200, 201, 204, 299, 300, 302, 304, 399, 402, 404, 405, 409, 410, 418, 499, 500, 502, 503, 504, 599)
"""Statuses that belong to their class's row of the table, both ends of each class among them."""


@pytest.mark.parametrize("status", sorted({*STATUS_VERDICTS, *UNNAMED}))
async def test_every_status_ends_well(tmp_path: Path, autojump_clock: MockClock, status: int) -> None:
    """Whatever a batch is answered once, its events are delivered or dead, and the session's final follows."""
    left = [status]

    async def answer(arrival: Arrival) -> Reply:
        return Reply(left.pop(), {}, b"") if left else OK

    async with forwarding(tmp_path, FakeUpstream(answer)) as it:
        await it.accept("s", "w", 0)
        await trio.sleep(5.1)
        await it.accept("s", "w", 1, flush="final")
        await it.drained()
        is_dead = classify(status) in (Verdict.POISON, Verdict.TOO_LARGE)
        assert_accounted(await it.spool.account(), accepted=2, delivered=2 - is_dead, dead_letters=int(is_dead))
        assert it.upstream.order[-1].is_final


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("bad", [0, 1, 137, 250, 498, 499])
async def test_one_bad_event_takes_no_other_with_it(
    tmp_path: Path, autojump_clock: MockClock, status: int, bad: int
) -> None:
    """Of a full batch all but the bad event is delivered, at the price of some twenty requests."""
    async with forwarding(tmp_path, judging(status)) as it:
        await it.accept("s", "w", 0, events=events_of("a", 500, bad=(bad,)))
        await it.accept("s", "w", 1, events=events_of("b", 3), flush="final")
        await it.drained()
        assert_rest_delivered(it, make_event(f"a-bad-{bad}"))
        assert_accounted(await it.spool.account(), accepted=503, delivered=502, dead_lettered=1)
        assert it.upstream.order[-1].is_final
        assert len(it.upstream.arrivals) <= 21


async def test_merged_batch_is_taken_apart(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Client batches that were merged with a bad one are sent alone, under numbers of their own."""
    async with forwarding(tmp_path, judging()) as it:
        for sequence in range(4):
            await it.accept("s", "w", sequence, events=events_of(f"e{sequence}", 1, bad=(0,) if sequence == 2 else ()))
        await it.drained()
        assert_rest_delivered(it, make_event("e2-bad-0"))
        assert [len(arrival.batch.events) for arrival in it.upstream.arrivals] == [4, 1, 1, 1, 1]
        assert it.forwarder.statistics().batches_recut == 1
        assert it.forwarder.statistics().batches_dead_lettered == 1


async def test_late_batch_does_not_slip_into_a_cut(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What comes late, with an address between those of a refused batch, is not taken for a part of it."""
    async with forwarding(tmp_path, judging()) as it:
        await it.accept("s", "w", 0, events=events_of("e0", 1))
        await it.accept("s", "w", 2, events=events_of("e2", 1, bad=(0,)))
        await trio.sleep(5.005)  # it is on its way
        await it.accept("s", "w", 1, events=events_of("e1", 1))
        await it.drained()
        assert_accounted(await it.spool.account(), accepted=3, delivered=2, dead_lettered=1)
        assert sorted(it.upstream.events()) == [make_event("e0-good-0"), make_event("e1-good-0")]


async def test_all_bad_is_found_out_soon(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A session of which every event is refused costs some thirty requests, not two for each event."""
    async with forwarding(tmp_path, judging()) as it:
        for sequence in range(3):
            await it.accept("s", "w", sequence, events=events_of(str(sequence), 500, bad=tuple(range(500))))
        await it.drained()
        assert_accounted(await it.spool.account(), accepted=1_500, dead_lettered=1_500)
        assert len(it.upstream.arrivals) <= 30


async def test_too_large_is_halved_down_to_one_event(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Whatever size upstream takes, what can be cut small enough is delivered, and an event that cannot is dead."""
    huge = make_event("huge", 20_000)
    events = [*events_of("a", 70, size=500), huge, *events_of("b", 30, size=500)]
    async with forwarding(tmp_path, judging(max_bytes=4_000)) as it:
        await it.accept("s", "w", 0, events=events)
        await it.accept("s", "w", 1, events=events_of("c", 9, size=500), flush="final")
        await it.drained()
        assert_rest_delivered(it, huge)
        assert_accounted(await it.spool.account(), accepted=110, delivered=109, dead_lettered=1)
        assert it.upstream.order[-1].is_final
        assert all(len(batch.events) > 1 for batch in it.upstream.order[:-1])


async def test_other_sessions_do_not_wait_for_an_isolation(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Requests for the parts of one session's batch go beside those of others, within one budget."""
    async with forwarding(tmp_path, judging(), make_config(requests_per_minute=30)) as it:
        await it.accept("s", "w", 0, events=events_of("e", 500, bad=tuple(range(0, 500, 50))))
        await trio.sleep(1)
        for number in range(5):
            await it.accept(f"t{number}", flush="final")
        await trio.sleep(120)
        assert {f"t{number}" for number in range(5)} <= {batch.session for batch in it.upstream.order}
        await it.drained()
        assert it.upstream.peak_requests("luc_pk_test") <= 30
        assert_accounted(await it.spool.account(), accepted=505, delivered=495, dead_lettered=10)


@pytest.mark.parametrize("cut", [400, 413])
@pytest.mark.parametrize("requests", range(1, 14))
async def test_restart_in_the_middle_of_a_cut(
    tmp_path: Path, autojump_clock: MockClock, cut: int, requests: int
) -> None:
    """Wherever the relay dies, the next goes on with the parts in order: all but the bad event arrives once."""
    upstream = judging(cut)
    judge = upstream.answer

    async def hang_after(arrival: Arrival) -> Reply:
        if len(upstream.arrivals) > requests:
            await trio.sleep_forever()
        return await judge(arrival)

    upstream.answer = hang_after
    events = events_of("e", 40, bad=(13,))
    with trio.move_on_after(60):
        async with forwarding(tmp_path, upstream) as it:
            for sequence in range(4):
                await it.accept("s", "w", sequence, events=events[sequence * 10 : sequence * 10 + 10])
            await it.accept("s", "w", 4, flush="final")
            await trio.sleep_forever()
    upstream.answer = judge
    async with forwarding(tmp_path, upstream) as it:
        await it.drained()
        assert_accounted(await it.spool.account(), accepted=41, delivered=40, dead_lettered=1)
    sent = upstream.events("s")
    assert sent[:-1] == [event for event in events if b"-bad-" not in event]
    assert upstream.order[-1].is_final


async def test_dead_letters_are_sent_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Once upstream takes what it refused, a resend delivers it, and what it still refuses is dead again."""
    upstream = judging()
    async with forwarding(tmp_path, upstream) as it:
        for number in range(3):
            await it.accept(f"s{number}", "w", 0, events=events_of(str(number), 40, bad=(7,)), flush="final")
        await it.drained()
        assert_accounted(await it.spool.account(), delivered=117, dead_letters=3)
        moved = await it.spool.resend_dead_letters([1])
        assert (moved.letters, moved.events) == (1, 1)
        await it.drained()
        assert_accounted(await it.spool.account(), delivered=117, dead_letters=3)
        upstream.answer = say_yes
        assert (await it.spool.resend_dead_letters(None)).letters == 3
        await it.drained()
        it.assert_each_once()
        assert_accounted(await it.spool.account(), accepted=120, delivered=120, dead_letters=0)


async def test_dead_letters_are_bounded(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Beyond their bound the oldest dead letters are dropped, counted as shed with the reason, and logged."""
    async with forwarding(tmp_path, judging(), dead_letter_max_bytes=10_000) as it:
        with capture_logs() as lines:
            for number in range(60):
                await it.accept(f"s{number}", events=events_of(str(number), 1, bad=(0,)), flush="final")
            await it.drained()
        account = await it.spool.account()
        assert_accounted(account, accepted=60, delivered=0)
        assert account.shed > 30
        assert account.shed_by_reason == {"dead_letters": account.shed, "sessions": 0}
        dropped = [line for line in lines if line["event"].startswith("dead letters dropped")]
        assert sum(line["events"] for line in dropped) == account.shed
        assert 8_000 < account.dead_letter_bytes <= 10_000
        assert (await it.spool.purge_dead_letters(None)).letters == account.dead_letters
        assert_accounted(await it.spool.account(), dead_letters=0, purged=60 - account.shed)


async def test_refused_key_is_known_once_a_probe_is_refused_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    """One refusal may be a hiccup; after a second the key is bad, until a probe passes."""
    left = [401, 403]

    async def answer(arrival: Arrival) -> Reply:
        return Reply(left.pop(0), {}, b"") if left else OK

    async with forwarding(tmp_path, FakeUpstream(answer), make_config(hold_seconds=100)) as it:
        await it.accept("s", flush="final")
        await trio.sleep(5)
        assert not it.forwarder.is_refused("luc_pk_test")
        await trio.sleep(10)
        assert it.forwarder.is_refused("luc_pk_test")
        assert not it.forwarder.is_refused("luc_pk_other")
        await it.drained()
        assert not it.forwarder.is_refused("luc_pk_test")
        it.assert_each_once()


async def test_refusals_of_what_was_in_flight_together_are_one(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Several sends refused at the same moment do not make a hiccup a certainty."""

    async def answer(arrival: Arrival) -> Reply:
        await trio.sleep(0.5)
        return Reply(401, {}, b"") if trio.current_time() < 5 else OK

    async with forwarding(tmp_path, FakeUpstream(answer)) as it:
        for number in range(6):
            await it.accept(f"s{number}", flush="final")
        await trio.sleep(5)
        assert len(it.upstream.arrivals) == 6
        assert not it.forwarder.is_refused("luc_pk_test")
        await it.drained()
        it.assert_each_once()


async def test_operator_releases_a_key(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A held key that is said to be good again is tried at once, and its clients are let in."""
    upstream = FakeUpstream()

    async def refuse(_: Arrival) -> Reply:
        return Reply(401, {}, b"")

    upstream.answer = refuse
    async with forwarding(tmp_path, upstream, make_config(hold_seconds=10_000)) as it:
        await it.accept("s", flush="final")
        await trio.sleep(100)
        assert it.forwarder.is_refused("luc_pk_test")
        upstream.answer = say_yes
        [lane] = it.forwarder.statistics().lanes
        assert not it.forwarder.release_key("key-00000000")
        assert it.forwarder.release_key(lane.key)
        assert not it.forwarder.is_refused("luc_pk_test")
        assert await it.drained() < 1
        assert not it.forwarder.release_key(lane.key), "it is not held"


@pytest.mark.parametrize("key", ["luc_pk_test", "one.of-another/kind:0123456789"])
@pytest.mark.parametrize("status", [400, 401, 404, 413])
async def test_key_that_an_answer_repeats_is_not_shown(
    tmp_path: Path, autojump_clock: MockClock, key: str, status: int
) -> None:
    """What upstream says of the request is logged, and kept with dead letters, without the key, or a part of it."""
    upstream = FakeUpstream()

    async def repeat(arrival: Arrival) -> Reply:
        upstream.answer = say_yes
        return Reply(status, {}, b"%b: %b %b" % (b"x" * 270, arrival.key.encode(), arrival.key.encode()))

    upstream.answer = repeat
    with capture_logs() as lines:
        async with forwarding(tmp_path, upstream, make_config()) as it:
            await it.accept("a", key=key)
            await it.drained(600)
            letters = it.spool._store._all("SELECT answer FROM dead_letter")
    shown = f"{lines} {letters}"
    assert "xxx" in shown
    assert fingerprint(key) in shown
    assert key not in shown
    assert key[:12] not in shown
