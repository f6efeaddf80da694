"""The simulator's own honesty: its yardstick, its spool, its rivals. What it finds out is in bench/README.md."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulate.figures import delays
from bench.simulate.forwarding import Forwarding
from bench.simulate.optimum import fewest_requests
from bench.simulate.pile import Pile
from bench.simulate.rivals import forward_one_for_one, send_directly
from bench.simulate.study import BUSY_LOAD, Study
from bench.simulate.traffic import KINDS, SDK_MAX_EVENTS, Arrival, SdkBatch, arrivals
from bench.simulate.upstream import Weather
from relay.config import Config
from relay.protocol.cut import Limits, overhead_bytes
from relay.protocol.replay import Envelope

LIMITS = Limits(500, 1_048_576)
SMALL = Limits(7, 200)
ENVELOPES = (Envelope(b'{"a":', b',"b":'), Envelope(b'{"aa":', b',"bb":'))
KIND_NAMES = [*(kind.name for kind in KINDS), "mix"]


def make_batch(envelope: int, sizes: list[int]) -> SdkBatch:
    """Return a client batch of events of these sizes."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size + 1)
    events = tuple(b"1" * size for size in sizes)
    return SdkBatch(0.0, 0, ENVELOPES[envelope], envelope, events, tuple(offsets), False)


def make_trace(batches: list[tuple[int, list[int]]], *, is_final: bool = False) -> list[Arrival]:
    """Return a trace of one window."""
    last = len(batches) - 1
    return [
        Arrival(float(index), 1, (1, 0), index, make_batch(*batch), is_final and index == last, False)
        for index, batch in enumerate(batches)
    ]


def drain(trace: list[Arrival], limits: Limits) -> int:
    """Return the batches that the pile seals when all of a trace lies in it, finals last as the schedule has them."""
    pile = Pile(limits)
    windows = {pile.append(arrival)[0] for arrival in trace}
    requests = 0
    while windows:
        before = requests
        for window in list(windows):
            while (sealed := pile.seal(window)) is not None:
                requests += 1
                pile.settle(sealed)
                if not sealed.left:
                    windows.remove(window)
                    break
        assert requests > before, "windows wait for each other"
    return requests


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_the_yardstick_is_what_the_real_cut_does_with_everything_at_hand(kind: str) -> None:
    """On recorded traffic the optimum, counted by a few lines of its own, is what the relay's cut makes of it."""
    trace = arrivals(kind, 6, 1_500, seed=3)
    optimum = fewest_requests(trace, LIMITS)
    # A final that has to wait for another window of its session may cost its window one more.
    finals = sum(arrival.is_final for arrival in trace) if kind in ("browsing", "mix") else 0  # the others have one
    assert optimum <= drain(trace, LIMITS) <= optimum + finals
    assert 0 < optimum < len(trace)


batches = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(1, 90), min_size=1, max_size=9)), min_size=1, max_size=6
)


def fewest_by_search(trace: list[Arrival]) -> int:
    """Return the fewest batches by trying every place to end each: exponential, and beyond doubt."""
    events = [
        (arrival.batch.envelope, len(event), arrival.is_final and index == len(arrival.batch.events) - 1)
        for arrival in trace
        for index, event in enumerate(arrival.batch.events)
    ]
    fewest = [0]
    for end in range(1, len(events) + 1):
        options = []
        for start in range(end):
            run = events[start:end]
            fixed = overhead_bytes(run[0][0]) if end - start > 1 else 0
            size = sum(size for _, size, _ in run) + len(run) - 1
            fits = end - start == 1 or (len(run) <= SMALL.max_events and fixed + size <= SMALL.max_bytes)
            if fits and all(one[0] == other[0] for one, other in pairwise(run)):
                options.append(fewest[start] + 1)
        fewest.append(min(options))
    return fewest[-1]


@given(batches=batches)
def test_nothing_beats_the_yardstick(batches: list[tuple[int, list[int]]]) -> None:
    """No other choice of batches delivers a window with fewer requests."""
    trace = make_trace(batches)
    assert fewest_requests(trace, SMALL) <= fewest_by_search(trace)


@given(batches=batches, is_final=st.booleans())
def test_the_real_cut_reaches_the_yardstick(batches: list[tuple[int, list[int]]], is_final: bool) -> None:
    """Whatever the sizes, envelopes and limits, a drained window costs the optimum exactly."""
    trace = make_trace(batches, is_final=is_final)
    assert drain(trace, SMALL) == fewest_requests(trace, SMALL)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_traffic_is_such_as_an_sdk_sends(kind: str) -> None:
    """Batches keep to the SDK's limits but for single events, come in order, and one final ends a session."""
    trace = arrivals(kind, 4, 2_000, seed=5)
    assert trace == arrivals(kind, 4, 2_000, seed=5)
    assert all(one.at <= other.at for one, other in pairwise(trace))
    last: dict[int, Arrival] = {}
    for arrival in trace:
        count = len(arrival.batch.events)
        assert 0 < count <= SDK_MAX_EVENTS
        assert count == 1 or arrival.batch.offsets[-1] <= LIMITS.max_bytes + 1
        if arrival.session in last:
            assert last[arrival.session].sequence < arrival.sequence
            assert not last[arrival.session].is_final
        last[arrival.session] = arrival
    assert any(arrival.is_final for arrival in last.values())


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("weather", [Weather(), Weather(outages=((300.0, 700.0),), refused_share=0.01)])
def test_the_relay_delivers_every_event_and_brings_no_429_upon_itself(kind: str, weather: Weather) -> None:
    """Whatever the traffic and the weather, with more sessions than direct sending carries."""
    trace = arrivals(kind, 24, 1_200, seed=2)
    outcome = Forwarding(trace, 1_200, weather, Config(), seed=2).run()
    assert (outcome.lost, outcome.limited) == (0, 0)
    assert outcome.all.count == sum(len(arrival.batch.events) for arrival in trace)
    assert send_directly(trace, 1_200, weather, Config()).lost > 0


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_saturated_relay_spends_hardly_more_than_the_optimum(kind: str) -> None:
    """With always more to send than may be sent, requests are within 1.05 of the fewest there can be."""
    study = Study(1_800.0, Weather(requests_per_minute=30), Config(), seed=4)
    run = study.run(kind, study.demand(kind).sessions_at(1.3, 30))
    assert run.ratio <= 1.05
    assert (run.relay.lost, run.relay.limited) == (0, 0)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_delays_are_bounded_while_the_optimum_leaves_a_tenth(kind: str) -> None:
    """Nothing is lost, and no wait comes near the length of the trace; finals and snapshots fare better still."""
    study = Study(3_600.0, Weather(), Config(), seed=4)
    run = study.run(kind, study.demand(kind).sessions_at(BUSY_LOAD, 100))
    assert (run.relay.lost, run.relay.limited) == (0, 0)
    assert run.relay.all.p95 < 600
    assert run.relay.all.max < 1_500
    assert run.relay.finals.p95 < 180
    assert run.direct.lost > 0


def test_rivals_are_counted_by_hand() -> None:
    """Of three batches in a minute that allows two, direct sending loses one; a queue delays it by a minute."""
    weather = Weather(requests_per_minute=2, latency_seconds=(0.5, 0.5))
    trace = make_trace([(0, [1] * 4), (0, [1] * 5), (0, [1] * 6)])
    direct = send_directly(trace, 100.0, weather, Config())
    assert (direct.delivered, direct.lost, direct.ruined, direct.limited) == (9, 6, 0, 1)
    queued = forward_one_for_one(trace, 100.0, weather, Config())
    assert (queued.delivered, queued.lost, queued.all.max) == (15, 0, 60.25 + 0.5 - 2.0 + 0.5)


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 5)), min_size=1))
def test_quantiles_are_those_of_the_single_events(found: list[tuple[float, int]]) -> None:
    """Summing up by counts gives what a list of every event's delay gives."""
    single = sorted(delay for delay, count in found for _ in range(count))
    summed = delays(found)
    assert summed.p50 == single[(len(single) + 1) // 2 - 1]
    assert summed.p95 == single[-(-95 * len(single) // 100) - 1]
    assert (summed.max, summed.count) == (single[-1], len(single))
