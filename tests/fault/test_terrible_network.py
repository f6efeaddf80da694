"""The forwarder, the client and the spool through hours of the worst network, on virtual time."""

from __future__ import annotations

import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from relay.config import Upstream
from relay.http.client import HttpClient, Reply
from relay.http.client_connection import HeaderPairs
from tests.accounting import assert_accounted
from tests.component.batches import make_event
from tests.component.fake_upstream import FakeUpstream, Forwarding, forwarding, make_config
from tests.fault.weather import OUTAGES, Kind, Weather

SEEDS = int(os.environ.get("LUCENT_RELAY_NETWORK_SEEDS", "6"))
"""Networks that are tried; a campaign takes thousands."""

KEYS = ("luc_pk_a", "luc_pk_b")
SESSIONS = 6
BUDGET = 40
"""Requests a minute, few enough to be scarce when an outage ends."""

MAX_PROBES_AN_HOUR = 300
"""Of one key in an outage. Pauses are drawn from up to a minute, so that half of this is to be expected."""

CLEAR_SECONDS = 1_800.0
"""Within which all is to be upstream once the weather is fair. The longest waits on the way there: one `Retry-After`,
one backoff of a minute, and the budget's minutes for what has gathered."""

LIVE_SESSIONS = 150
"""That begin after an outage, one every 4 s: a quarter of what upstream takes."""

HOUR = 3_600.0


class Traffic:
    """Sessions of two keys that send now and then, each window with sequences of its own."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._sequence = 0
        self._sessions = [f"s{number}" for number in range(SESSIONS)]
        self.windows: dict[tuple[str, str, str], list[bytes]] = defaultdict(list)
        """Events by key, session and window, in order."""

    async def send(self, it: Forwarding) -> None:
        """Let some window send a batch."""
        self._sequence += 1
        key = self._dice.choice(KEYS)
        number = self._dice.randrange(SESSIONS)
        place = (self._sessions[number], self._dice.choice("ab"))
        size = self._dice.choice([0, 0, 30_000])
        count = self._dice.choice([1, 3, 20, 600])
        events = [make_event(f"{self._sequence}-{index}", size if index == 0 else 0) for index in range(count)]
        flush = "final" if self._dice.random() < 0.05 else ""
        if flush:  # another session takes its place
            self._sessions[number] += "'"
        page = self._dice.choice(["/x", "/x", "/y"])
        await it.accept(*place, self._sequence, events=events, key=key, page=page, flush=flush)
        self.windows[(key, *place)] += events


def forecast(dice: Random) -> list[tuple[Kind, float]]:
    """Return what weather there will be, and for how long: storms, outages and respites, one outage of hours."""
    kinds: list[Kind] = ["storm", *dice.sample(OUTAGES, 3), "storm", "fair", dice.choice(OUTAGES)]
    dice.shuffle(kinds)
    lengths = [dice.choice([30.0, 300.0, 900.0]) for _ in kinds]
    longest = next(number for number, kind in enumerate(kinds) if kind in OUTAGES)
    lengths[longest] = 1.5 * HOUR
    return list(zip(kinds, lengths, strict=True))


def most_within(times: list[float], seconds: float) -> int:
    """Return the most of `times`, in order, that lie within any stretch of `seconds`."""
    most = start = 0
    for end, at in enumerate(times):
        while at - times[start] >= seconds:
            start += 1
        most = max(most, end - start + 1)
    return most


class Watched:
    """The client as the forwarder sees it, with a note of each attempt."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self.attempts: dict[bytes, list[float]] = defaultdict(list)
        """When each key's requests began."""

    async def request(self, method: str, target: str, headers: HeaderPairs, body: bytes) -> Reply:
        """Send, and note."""
        self.attempts[dict(headers)[b"X-Lucent-Api-Key"]].append(trio.current_time())
        return await self._client.request(method, target, headers, body)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_everything_arrives_once_and_in_order_when_the_weather_clears(
    tmp_path: Path, autojump_clock: MockClock, seed: int
) -> None:
    """Whatever the network does for hours: no event lost, doubled or out of turn, no budget exceeded, no busy loop."""
    dice = Random(seed)
    upstream = FakeUpstream()
    traffic = Traffic(dice)
    async with trio.open_nursery() as network:
        weather = Weather(network, upstream, dice)
        client = HttpClient("http://ingest.example", Upstream(), connect=weather.connect)
        watched = Watched(client)
        config = make_config(requests_per_minute=BUDGET, max_in_flight_per_key=4)
        async with forwarding(tmp_path, upstream, config, client=watched, seed=seed) as it:
            for kind, seconds in forecast(dice):
                weather.turn(kind)
                ends_at = trio.current_time() + seconds
                while trio.current_time() < ends_at:
                    await traffic.send(it)
                    await trio.sleep(min(seconds / 5, dice.expovariate(1 / 20)))
                assert_accounted(await it.spool.account(), accepted=len(it.accepted))
            weather.turn("fair")
            await it.drained(CLEAR_SECONDS)
            assert_accounted(await it.spool.account(), delivered=len(it.accepted), spooled=0)
            assert it.forwarder.statistics().attempt_errors == 0
        statistics = client.statistics()
        assert (statistics.active_connections, statistics.idle_connections) == (0, weather.open_connections)
        await client.aclose()
        assert weather.open_connections == 0
        network.cancel_scope.cancel()
    it.assert_each_once()
    assert_in_order(upstream, traffic)
    for key in KEYS:
        assert most_within(watched.attempts[key.encode()], 60.0) <= BUDGET
        # A request on a connection that was closed meanwhile goes out once more, on a new one (rule 3 of the client).
        assert upstream.peak_requests(key) <= BUDGET + statistics.resent_total


def assert_in_order(upstream: FakeUpstream, traffic: Traffic) -> None:
    """Assert that each window's events came to upstream in the order in which they were accepted."""
    arrived: dict[tuple[str, str, str], list[bytes]] = defaultdict(list)
    for (key, _, _), batch in upstream.stored.items():
        arrived[key, batch.session, batch.window] += batch.events
    assert arrived == traffic.windows


@pytest.mark.slow
@pytest.mark.parametrize("kind", OUTAGES)
async def test_an_outage_of_hours_is_asked_about_now_and_then(
    tmp_path: Path, autojump_clock: MockClock, kind: Kind
) -> None:
    """In an outage of any sort a key sends single probes, no nearer than they must be; then all goes at once."""
    upstream = FakeUpstream()
    traffic = Traffic(dice := Random(1))
    async with trio.open_nursery() as network:
        weather = Weather(network, upstream, dice)
        weather.turn(kind)
        client = HttpClient("http://ingest.example", Upstream(), connect=weather.connect)
        watched = Watched(client)
        async with forwarding(tmp_path, upstream, make_config(requests_per_minute=0), client=watched) as it:
            for _ in range(100):
                await traffic.send(it)
            await trio.sleep(HOUR / 10)
            assert all(lane.state == "probing" for lane in it.forwarder.statistics().lanes)
            await trio.sleep(2 * HOUR)
            assert_accounted(await it.spool.account(), accepted=len(it.accepted), delivered=0)
            for times in watched.attempts.values():
                assert 0 < most_within(times, HOUR) <= MAX_PROBES_AN_HOUR
                assert max(later - earlier for earlier, later in pairwise(times)) < 200
            weather.turn("fair")
            await it.drained(300)
        await client.aclose()
        network.cancel_scope.cancel()
    it.assert_each_once()
    assert_in_order(upstream, traffic)


@pytest.mark.slow
async def test_live_traffic_goes_beside_what_an_outage_left(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After hours of outage new sessions are upstream as soon as ever, while the backlog has its share and goes."""
    upstream = FakeUpstream()
    async with trio.open_nursery() as network:
        weather = Weather(network, upstream, Random(1))
        client = HttpClient("http://ingest.example", Upstream(), connect=weather.connect)
        async with forwarding(tmp_path, upstream, make_config(requests_per_minute=60), client=client) as it:
            weather.turn("refusing")
            for number in range(600):
                await it.accept(f"old{number}", flush="final")
                await trio.sleep(2 * HOUR / 600)
            weather.turn("fair")
            accepted_at = {}
            for number in range(LIVE_SESSIONS):
                accepted_at[f"new{number}"] = trio.current_time()
                await it.accept(f"new{number}", flush="final")
                await trio.sleep(4)
            took = {
                arrival.batch.session: arrival.at - accepted_at[arrival.batch.session]
                for arrival in upstream.arrivals
                if arrival.batch.session in accepted_at
            }
            old_delivered = len(upstream.events()) - len(took)
            assert len(took) >= LIVE_SESSIONS - 5
            # What the last ten minutes of the outage left counts as live too, and goes before them.
            assert max(took.values()) < 180
            assert max(took[f"new{number}"] for number in range(LIVE_SESSIONS // 2, LIVE_SESSIONS - 5)) < 30
            assert old_delivered >= LIVE_SESSIONS
            await it.drained(HOUR)
        await client.aclose()
        network.cancel_scope.cancel()
    it.assert_each_once()
