"""What a key's requests bring without the relay: sent directly, or forwarded one for one.

Rules:
1. Both are treated well: no network of theirs fails, and no request is wasted on a retry.
2. Direct sending knows no waiting. A batch beyond the limit is answered 429 and lost, as with a page that is closing
   or an SDK whose buffer has gone on; so is one that meets an outage. What follows it in its tab is ruined up to the
   next full snapshot: mutations of a document that the player does not have.
3. One-for-one forwarding has an endless queue, first come, first served, and the relay's budget. It is spared outages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

from bench.simulate.figures import Delays, Outcome, delays
from bench.simulate.traffic import Arrival
from bench.simulate.upstream import Upstream, Weather
from relay.config import Config
from relay.protocol.budget import WINDOW_SECONDS

_NO_DELAYS = Delays(0.0, 0.0, 0.0, 0)


def send_directly(
    arrivals: Sequence[Arrival], seconds: float, weather: Weather, config: Config, seed: int = 0
) -> Outcome:
    """Send every client batch as it comes."""
    upstream = Upstream(weather, Random(seed))
    broken: set[tuple[int, int]] = set()
    delivered = lost = ruined = requests = 0
    for arrival in arrivals:
        count = len(arrival.batch.events)
        requests += 1
        if upstream.answer(arrival.at).status != 200:
            lost += count
            broken.add(arrival.window)
            continue
        delivered += count
        if arrival.batch.has_snapshot:
            broken.discard(arrival.window)
        elif arrival.window in broken:
            ruined += count
    return Outcome(
        seconds=seconds,
        events=delivered + lost,
        delivered=delivered,
        lost=lost,
        ruined=ruined,
        requests=requests,
        limited=upstream.limited,
        fullness=_mean_fullness(arrivals, config),
        all=_NO_DELAYS,
        finals=_NO_DELAYS,
        snapshots=_NO_DELAYS,
        by_reason={},
    )


def forward_one_for_one(arrivals: Sequence[Arrival], seconds: float, weather: Weather, config: Config) -> Outcome:
    """Queue every client batch, and send each as a request as the budget allows."""
    exchange = sum(weather.latency_seconds) / 2
    slot = WINDOW_SECONDS + config.budget.margin_seconds + exchange
    recent: deque[float] = deque(maxlen=weather.requests_per_minute or 1)
    found: list[tuple[float, int]] = []
    finals: list[tuple[float, int]] = []
    snapshots: list[tuple[float, int]] = []
    delivered = 0
    for arrival in arrivals:
        is_spent = weather.requests_per_minute and len(recent) == weather.requests_per_minute
        sent_at = max(arrival.at, recent[0] + slot) if is_spent else arrival.at
        recent.append(sent_at)
        waited = (sent_at + exchange - arrival.at, len(arrival.batch.events))
        found.append(waited)
        if sent_at + exchange <= seconds:
            delivered += waited[1]
        if arrival.is_final:
            finals.append(waited)
        if arrival.is_first_snapshot:
            snapshots.append(waited)
    return Outcome(
        seconds=seconds,
        events=sum(count for _, count in found),
        delivered=delivered,
        lost=0,
        ruined=0,
        requests=len(found),
        limited=0,
        fullness=_mean_fullness(arrivals, config),
        all=delays(found),
        finals=delays(finals),
        snapshots=delays(snapshots),
        by_reason={},
    )


def _mean_fullness(arrivals: Sequence[Arrival], config: Config) -> float:
    limits = config.batch.limits
    shares = [
        limits.fullness(len(batch.events), batch.offsets[-1], batch.whole_deflated_bytes)
        for batch in (arrival.batch for arrival in arrivals)
    ]
    return sum(shares) / max(1, len(shares))
