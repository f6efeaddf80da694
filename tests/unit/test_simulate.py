"""The simulator's own honesty: its yardstick, its spool, its rivals. What it finds out is in bench/README.md."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulate.figures import Delays, Delivery, Drain, delays, drain
from bench.simulate.forwarding import Forwarding
from bench.simulate.optimum import fewest_requests
from bench.simulate.pile import Pile
from bench.simulate.rivals import forward_one_for_one, send_directly
from bench.simulate.study import BUSY_LOAD, Study
from bench.simulate.traffic import KINDS, SDK_MAX_EVENTS, Arrival, SdkBatch, arrivals
from bench.simulate.upstream import Weather
from relay.config import Batch, Config
from relay.protocol.assemble import Piece, assemble
from relay.protocol.codings import SegmentDeflater, crc32
from relay.protocol.cut import Likeness, Limits, address, body_prefix, body_suffix
from relay.protocol.replay import Envelope

LIMITS = Limits(500, 1_048_576)
SMALL = Limits(7, 200)
MEASURED = Limits(9, 1_600, 260)

ENVELOPES = (
    (Envelope(b'{"a":', b',"page":1,"b":'), Likeness(b"1", b"x")),
    (Envelope(b'{"a":', b',"page":22222222,"b":'), Likeness(b"2", b"x")),
    (Envelope(b'{"aa":', b',"page":1,"bb":'), Likeness(b"3", b"y")),
)
"""Two pages, and something else that is another."""

KIND_NAMES = [*(kind.name for kind in KINDS), "mix"]


def make_batch(envelope: int, sizes: list[int]) -> SdkBatch:
    """Return a client batch of events of these sizes, which hardly deflate: then the size grows with every event."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size + 1)
    digits = Random(str(sizes))
    events = tuple(b"%d" % digits.randrange(10 ** (size - 1), 10**size) for size in sizes)
    deflated = len(SegmentDeflater().deflate(b",".join(events)))
    return SdkBatch(0.0, 0, *ENVELOPES[envelope], events, tuple(offsets), False, deflated)


def make_trace(batches: list[tuple[int, list[int]]], *, is_final: bool = False) -> list[Arrival]:
    """Return a trace of one window."""
    last = len(batches) - 1
    return [
        Arrival(float(index), 1, (1, 0), index, make_batch(*batch), is_final and index == last, False)
        for index, batch in enumerate(batches)
    ]


def count_sealed(trace: list[Arrival], limits: Limits, *, run_bytes: int, merges_pages: bool) -> int:
    """Return the batches that the pile seals when all of a trace lies in it, finals last as the schedule has them."""
    pile = Pile(limits, run_bytes)
    windows = {pile.append(arrival)[0] for arrival in trace}
    requests = 0
    while windows:
        before = requests
        for window in list(windows):
            while (sealed := pile.seal(window, merges_pages=merges_pages)) is not None:
                requests += 1
                pile.settle(sealed)
                if not sealed.left:
                    windows.remove(window)
                    break
        assert requests > before, "windows wait for each other"
    return requests


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("batch", [Batch(), Batch(merge="page"), Batch(merge="page", measure="compressed")])
def test_the_yardstick_is_what_the_real_cut_does_with_everything_at_hand(kind: str, batch: Batch) -> None:
    """On recorded traffic the optimum, counted by a few lines of its own, is what the relay's cut makes of it."""
    trace = arrivals(kind, 6, 1_500, seed=3)
    merges_pages = batch.merge == "page"
    optimum = fewest_requests(trace, batch.limits, merges_pages=merges_pages)
    # A final that has to wait for another window of its session may cost its window one more.
    finals = sum(arrival.is_final for arrival in trace) if kind in ("browsing", "mix") else 0  # the others have one
    drained = count_sealed(trace, batch.limits, run_bytes=batch.max_bytes, merges_pages=merges_pages)
    assert optimum <= drained <= optimum + finals
    assert 0 < optimum < len(trace)


batches = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(1, 90), min_size=1, max_size=9)), min_size=1, max_size=6
)


def fits(run: list[tuple[Arrival, int]], limits: Limits) -> bool:
    """Return whether events, each by its client batch and its index in that, may be one batch; it is really made."""
    if len(run) > limits.max_events:
        return len(run) == 1
    pieces: list[tuple[Arrival, list[int]]] = []
    for arrival, index in run:
        if not pieces or pieces[-1][0] is not arrival:
            pieces.append((arrival, []))
        pieces[-1][1].append(index)
    for count in range(1, len(pieces) + 1):  # with the envelope of each
        last, indexes = pieces[count - 1]
        runs = [b",".join(arrival.batch.events[index] for index in found) for arrival, found in pieces[:count]]
        prefix = body_prefix(last.batch.envelope, b"1700000000000", address(run[0][0].sequence, run[0][1]))
        suffix = body_suffix(is_final=last.is_final and indexes[-1] == len(last.batch.events) - 1)
        body = assemble(prefix, [Piece(SegmentDeflater().deflate(one), crc32(one), len(one)) for one in runs], suffix)
        size = len(prefix) + len(b",".join(runs)) + len(suffix)
        if (size > limits.max_bytes or len(body) > limits.max_gzip_bytes) and len(run) > 1:
            return False
    return True


def fewest_by_search(trace: list[Arrival], limits: Limits, *, merges_pages: bool) -> int:
    """Return the fewest batches by trying every place to end each: exponential, and beyond doubt."""
    events = [(arrival, index) for arrival in trace for index in range(len(arrival.batch.events))]
    fewest = [0]
    for end in range(1, len(events) + 1):
        options = []
        for start in range(max(0, end - limits.max_events), end):
            run = events[start:end]
            likenesses = [arrival.batch.likeness for arrival, _ in run]
            may_merge = len({each.pageless if merges_pages else each.digest for each in likenesses}) == 1
            if may_merge and fits(run, limits):
                options.append(fewest[start] + 1)
        fewest.append(min(options))
    return fewest[-1]


@given(batches=batches, is_final=st.booleans(), limits=st.sampled_from([SMALL, MEASURED]), merges_pages=st.booleans())
def test_nothing_beats_the_yardstick(
    batches: list[tuple[int, list[int]]], is_final: bool, limits: Limits, merges_pages: bool
) -> None:
    """No other choice of batches delivers a window with fewer requests, and the yardstick's is one."""
    trace = make_trace(batches, is_final=is_final)
    optimum = fewest_requests(trace, limits, merges_pages=merges_pages)
    assert optimum == fewest_by_search(trace, limits, merges_pages=merges_pages)


@given(batches=batches, is_final=st.booleans(), limits=st.sampled_from([SMALL, MEASURED]), merges_pages=st.booleans())
def test_the_real_cut_reaches_the_yardstick(
    batches: list[tuple[int, list[int]]], is_final: bool, limits: Limits, merges_pages: bool
) -> None:
    """Whatever the sizes, envelopes and limits, a drained window costs the optimum exactly."""
    trace = make_trace(batches, is_final=is_final)
    run_bytes = SMALL.max_bytes if limits == SMALL else 10_000
    optimum = fewest_requests(trace, limits, merges_pages=merges_pages)
    assert count_sealed(trace, limits, run_bytes=run_bytes, merges_pages=merges_pages) == optimum


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


STORM = Weather(outages=((300.0, 700.0),), refused_share=0.01)
WIDE = Batch(merge="page-when-scarce", measure="compressed")


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize(("weather", "batch"), [(Weather(), Batch()), (STORM, Batch()), (STORM, WIDE)])
def test_the_relay_delivers_every_event_and_brings_no_429_upon_itself(
    kind: str, weather: Weather, batch: Batch
) -> None:
    """Whatever the traffic, the weather and the options, with more sessions than direct sending carries."""
    trace = arrivals(kind, 24, 1_200, seed=2)
    outcome = Forwarding(trace, 1_200, weather, Config(batch=batch), seed=2).run()
    assert (outcome.lost, outcome.limited) == (0, 0)
    assert outcome.all.count == sum(len(arrival.batch.events) for arrival in trace)
    assert [behind.backlog > 0 for behind in outcome.drains] == [True] * len(weather.outages)
    assert send_directly(trace, 1_200, weather, Config()).lost > 0


@pytest.mark.parametrize(
    ("kind", "batch"), [*((kind, Batch()) for kind in KIND_NAMES), ("browsing", WIDE), ("mix", WIDE)]
)
def test_a_saturated_relay_spends_hardly_more_than_the_optimum(kind: str, batch: Batch) -> None:
    """With always more to send than may be sent, requests are within 1.05 of the fewest there can be."""
    study = Study(1_800.0, Weather(requests_per_minute=30), Config(batch=batch), seed=4)
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


def test_direct_sending_loses_what_meets_an_outage() -> None:
    """And with it what follows in its tab, for lack of a snapshot."""
    trace = make_trace([(0, [1] * 4), (0, [1] * 5), (0, [1] * 6)])
    direct = send_directly(trace, 100.0, Weather(outages=((0.5, 1.5),)), Config())
    assert (direct.delivered, direct.lost, direct.ruined, direct.limited) == (10, 5, 6, 0)


def test_a_drain_is_counted_by_hand() -> None:
    """What was waiting at the outage's end, until when, and who came meanwhile: behind its own backlog or not."""
    deliveries = [
        *(Delivery(1, 10, 20, 100), Delivery(1, 30, 70, 5), Delivery(2, 49, 90, 7)),
        *(Delivery(1, 60, 75, 1), Delivery(3, 60, 62, 2), Delivery(3, 95, 99, 3)),
    ]
    assert drain(deliveries, 50) == Drain(12, 40, Delays(15, 15, 15, 1), Delays(2, 2, 2, 2))
    assert drain(deliveries, 100) == Drain(0, 0, Delays(0, 0, 0, 0), Delays(0, 0, 0, 0))


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 5)), min_size=1))
def test_quantiles_are_those_of_the_single_events(found: list[tuple[float, int]]) -> None:
    """Summing up by counts gives what a list of every event's delay gives."""
    single = sorted(delay for delay, count in found for _ in range(count))
    summed = delays(found)
    assert summed.p50 == single[(len(single) + 1) // 2 - 1]
    assert summed.p95 == single[-(-95 * len(single) // 100) - 1]
    assert (summed.max, summed.count) == (single[-1], len(single))
