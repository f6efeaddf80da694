"""The figures of a run, and how they are summed up."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Delays(msgspec.Struct, frozen=True):
    """Seconds from the relay's yes to upstream's, over events."""

    p50: float
    p95: float
    max: float
    count: int
    """Events."""


def delays(found: Iterable[tuple[float, int]]) -> Delays:
    """Sum up delays with their numbers of events."""
    ordered = sorted(found)
    total = sum(count for _, count in ordered)
    if not total:
        return Delays(0.0, 0.0, 0.0, 0)
    return Delays(_quantile(ordered, total * 0.5), _quantile(ordered, total * 0.95), ordered[-1][0], total)


def _quantile(ordered: list[tuple[float, int]], rank: float) -> float:
    seen = 0
    for delay, count in ordered:
        seen += count
        if seen >= rank:
            return delay
    return ordered[-1][0]


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """Events of one client batch that got upstream together."""

    session: int
    accepted_at: float
    delivered_at: float
    events: int

    @property
    def waited(self) -> tuple[float, int]:
        """Delay and events."""
        return self.delivered_at - self.accepted_at, self.events


class Drain(msgspec.Struct, frozen=True):
    """What came behind an outage."""

    backlog: int
    """Events that were accepted and not upstream when it ended."""
    seconds: float
    """From its end until the last of them was upstream."""
    waiting: Delays
    """Of the events accepted in that time of sessions that had some in the backlog, behind which they must wait."""
    live: Delays
    """Of those accepted in that time of all other sessions."""


def drain(deliveries: Iterable[Delivery], ended_at: float) -> Drain:
    """Return what came behind an outage that ended at `ended_at`."""
    later = [each for each in deliveries if each.delivered_at > ended_at]
    backlog = [each for each in later if each.accepted_at <= ended_at]
    until = max((each.delivered_at for each in backlog), default=ended_at)
    behind = {each.session for each in backlog}
    meanwhile = [each for each in later if ended_at < each.accepted_at <= until]
    waiting = delays(each.waited for each in meanwhile if each.session in behind)
    live = delays(each.waited for each in meanwhile if each.session not in behind)
    return Drain(sum(each.events for each in backlog), until - ended_at, waiting, live)


class Outcome(msgspec.Struct, frozen=True):
    """What came of a trace, sent in one way."""

    seconds: float
    """Length of the trace; sending goes on behind it until all is delivered."""
    events: int
    """Of the trace."""
    delivered: int
    """Events upstream at the end of the trace."""
    lost: int
    """Events that never get there."""
    ruined: int
    """Events that got there, but cannot be replayed for lack of an earlier one."""
    requests: int
    """All, with those behind the trace."""
    limited: int
    """429s brought upon itself."""
    fullness: float
    """Mean over the upstream batches: the share of the nearer limit that is used."""
    all: Delays
    finals: Delays
    """Events of batches that end a session."""
    snapshots: Delays
    """First full snapshots."""
    by_reason: dict[str, int]
    """Upstream batches by why they were sent."""
    drains: tuple[Drain, ...] = ()
    """Behind each outage."""

    @property
    def delivered_share(self) -> float:
        """Share of the events upstream at the end of the trace and fit for replay."""
        return (self.delivered - self.ruined) / self.events if self.events else 1.0
