"""The relay in virtual time: its schedule, budget, breaker, backoff and cut, driven as by `relay.forward.lane`.

Rules:
1. Only what has no policy in it is imitated: the spool by a `Pile`, the HTTP client by an `Upstream`, sleeping by the
   next event.
2. Everything accepted is delivered in the end: a run goes on behind its trace until nothing is left.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from math import inf

import msgspec

from bench.simulate.figures import Delivery, Outcome, delays, drain
from bench.simulate.pile import Pile, Sealed, parting_of
from bench.simulate.traffic import Arrival
from bench.simulate.upstream import Reply, Upstream, Weather
from relay.config import Config
from relay.protocol.backoff import Backoff
from relay.protocol.breaker import Breaker
from relay.protocol.budget import Budget
from relay.protocol.schedule import Schedule
from relay.protocol.verdict import Verdict, classify


class _Exchange(msgspec.Struct, frozen=True, order=True):
    """A request under way; ordered by what happens to it next."""

    at: float
    number: int
    sealed: Sealed
    reply: Reply | None
    """Upstream's, once it has counted the request."""
    ends_at: float


class Forwarding:
    """One run of one trace. In its weather all batches fail alike, so none is ever stuck.

    Args:
        arrivals: The trace, in order of time.
        seconds: Its length.
        weather: Of upstream.
        config: Sections batch, budget and forward.
        seed: Of latencies and jitter.
    """

    def __init__(
        self, arrivals: Sequence[Arrival], seconds: float, weather: Weather, config: Config, seed: int
    ) -> None:
        self._arrivals = arrivals
        self._seconds = seconds
        self._chance = random.Random(seed)
        self._outages = weather.outages
        self._upstream = Upstream(weather, self._chance)
        self._limits = config.batch.limits
        self._pile = Pile(self._limits, config.batch.max_bytes)
        self._schedule = Schedule(
            self._limits, config.batch.linger_seconds, config.forward.live_share, config.batch.merge
        )
        self._budget = Budget(weather.requests_per_minute, config.budget.margin_seconds)
        self._breaker = Breaker(config.forward.breaker_failures)
        self._backoff = Backoff(config.forward.backoff_base_seconds, config.forward.backoff_max_seconds)
        self._max_in_flight = config.forward.max_in_flight_per_key
        self._not_before = -inf
        self._exchanges: list[_Exchange] = []
        self._sealed: dict[int, Sealed] = {}
        """Batches that wait for a retry."""
        self._failures: dict[int, int] = {}
        self._requests = 0
        self._delivered = 0
        self._deliveries: list[Delivery] = []
        self._finals: list[tuple[float, int]] = []
        self._snapshots: list[tuple[float, int]] = []
        self._fullness: list[float] = []
        self._reasons: dict[str, int] = {}
        self.sent_at: list[float] = []
        """When each request began."""

    def run(self) -> Outcome:
        """Play the trace and what is left behind it."""
        now = 0.0
        arrivals = iter(self._arrivals)
        arrival = next(arrivals, None)
        while True:
            ready_at = self._ready_at(now)
            if ready_at <= now:
                self._send(now)
                continue
            arrives_at = arrival.at if arrival is not None else inf
            answers_at = self._exchanges[0].at if self._exchanges else inf
            now = min(ready_at, arrives_at, answers_at)
            if now == inf:
                return self._outcome()
            if now == answers_at:
                self._answer(heapq.heappop(self._exchanges))
            elif now == arrives_at and arrival is not None:
                self._accept(arrival)
                arrival = next(arrivals, None)

    def _ready_at(self, now: float) -> float:
        if len(self._exchanges) >= self._max_in_flight:
            return inf
        return max(self._schedule.ready_at(now), self._budget.ready_at(now), self._breaker.ready_at(), self._not_before)

    def _accept(self, arrival: Arrival) -> None:
        window, added = self._pile.append(arrival)
        self._schedule.add(
            arrival.session,
            window,
            likeness=arrival.batch.likeness,
            events=sum(segment.pending.event_count for segment in added),
            events_bytes=sum(segment.pending.events_bytes for segment in added),
            deflated_bytes=sum(segment.pending.deflated_bytes for segment in added),
            finals=int(arrival.is_final),
            oldest_at=arrival.at,
        )

    def _send(self, now: float) -> None:
        choice = self._schedule.choose(now, is_scarce=self._budget.is_scarce(now))
        if choice is None:
            return
        if choice.batch_id is not None:
            sealed: Sealed | None = self._sealed.pop(choice.batch_id)
        else:
            assert choice.window_id is not None
            sealed = self._pile.seal(choice.window_id, merges_pages=choice.merges_pages)
            if sealed is None:
                self._schedule.withhold(choice.session_id, choice.window_id)
                return
            self._note_sealed(sealed)
            self._reasons[choice.reason] = self._reasons.get(choice.reason, 0) + 1
        assert sealed is not None
        self._budget.begin(now)
        self._breaker.begin()
        self._requests += 1
        self.sent_at.append(now)
        latency = self._upstream.latency_seconds()
        heapq.heappush(self._exchanges, _Exchange(now + latency / 2, self._requests, sealed, None, now + latency))

    def _note_sealed(self, sealed: Sealed) -> None:
        self._schedule.seal(
            sealed.window,
            events=sealed.events,
            events_bytes=sealed.events_bytes,
            deflated_bytes=sealed.deflated_bytes,
            finals=sealed.finals,
            next_oldest_at=sealed.left[0].arrival.at if sealed.left else None,
            next_parting=parting_of(sealed.left),
        )
        self._fullness.append(self._limits.fullness(sealed.events, sealed.events_bytes, sealed.deflated_bytes))

    def _answer(self, exchange: _Exchange) -> None:
        now, sealed = exchange.at, exchange.sealed
        if exchange.reply is None:
            reply = self._upstream.answer(now)
            heapq.heappush(
                self._exchanges, _Exchange(exchange.ends_at, exchange.number, sealed, reply, exchange.ends_at)
            )
            return
        self._budget.end(now)
        self._breaker.end()
        verdict = classify(exchange.reply.status)
        if verdict is Verdict.DELIVERED:
            self._breaker.succeed()
            self._failures.pop(sealed.number, None)
            self._deliver(sealed, now)
            return
        failures = self._failures[sealed.number] = self._failures.get(sealed.number, 0) + 1
        delay = self._backoff.delay_seconds(failures, self._chance.random)
        if verdict is Verdict.LIMITED:
            self._breaker.succeed()
            self._not_before = max(self._not_before, now + exchange.reply.retry_after)
            delay = max(delay, exchange.reply.retry_after)
        else:
            self._breaker.fail(now, self._backoff.delay_seconds(self._breaker.failures + 1, self._chance.random))
        self._sealed[sealed.number] = sealed
        self._schedule.retry_at(sealed.session, sealed.number, now + delay)

    def _deliver(self, sealed: Sealed, now: float) -> None:
        self._pile.settle(sealed)
        self._schedule.release(sealed.session)
        if now <= self._seconds:
            self._delivered += sealed.events
        for segment in sealed.segments:
            delivery = Delivery(sealed.session, segment.arrival.at, now, segment.end - segment.start)
            self._deliveries.append(delivery)
            if segment.arrival.is_final:
                self._finals.append(delivery.waited)
            if segment.arrival.is_first_snapshot:
                self._snapshots.append(delivery.waited)

    def _outcome(self) -> Outcome:
        events = sum(len(arrival.batch.events) for arrival in self._arrivals)
        found = delays(delivery.waited for delivery in self._deliveries)
        return Outcome(
            seconds=self._seconds,
            events=events,
            delivered=self._delivered,
            lost=events - found.count,
            ruined=0,
            requests=self._requests,
            limited=self._upstream.limited,
            fullness=sum(self._fullness) / max(1, len(self._fullness)),
            all=found,
            finals=delays(self._finals),
            snapshots=delays(self._snapshots),
            by_reason=dict(sorted(self._reasons.items())),
            drains=tuple(drain(self._deliveries, ended_at) for _, ended_at in self._outages),
        )
