"""What upstream has of the crowd, and when it came: the sandbox's listings, read once the relay has stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import orjson

from bench.crowd.scripts import Counts, window_id
from bench.simulate.figures import Delays, delays
from bench.simulate.traffic import Arrival
from relay.config import Upstream
from relay.demo.audit import WindowId
from relay.http.client import HttpClient

_MAX_LISTING_BYTES = 67_108_864
"""Three million events of one session."""


class Stored(msgspec.Struct, frozen=True):
    """A batch that upstream took."""

    order: int
    """The how-manieth, over all sessions."""
    at: float
    """Seconds since the trace began."""
    window: WindowId
    events: int


class Holdings(msgspec.Struct, frozen=True):
    """Everything that upstream has."""

    report: dict[str, Any]
    """The sandbox's."""
    sessions: list[dict[str, Any]]
    """Its listings."""

    def batches(self, began_at: float) -> list[Stored]:
        """Return all batches in the order in which they came.

        Args:
            began_at: When the trace did, by the sandbox's clock.
        """
        found = [
            Stored(batch["order"], batch["at_seconds"] - began_at, (session["id"], batch["window_id"]), batch["events"])
            for session in self.sessions
            for batch in session["stored"]
        ]
        return sorted(found, key=lambda stored: stored.order)


async def get(client: HttpClient, path: str) -> Any:
    """Ask the sandbox for something."""
    return orjson.loads((await client.request("GET", path, (), b"")).body)


async def read_holdings(url: str, names: Iterable[str]) -> Holdings:
    """Read what the sandbox has of sessions."""
    client = HttpClient(url, Upstream(max_response_bytes=_MAX_LISTING_BYTES))
    try:
        found = [await get(client, f"/sandbox/session?id={quote(name)}") for name in names]
        return Holdings(await get(client, "/sandbox/report"), [session for session in found if "stored" in session])
    finally:
        await client.aclose()


def counts(batches: Iterable[Stored]) -> Counts:
    """Return how many events of each window are in batches."""
    found: dict[WindowId, int] = {}
    for batch in batches:
        found[batch.window] = found.get(batch.window, 0) + batch.events
    return found


def delivery_delays(trace: Sequence[Arrival], batches: Sequence[Stored]) -> Delays:
    """Return how long events took from when the client had them ready to upstream's yes; over what is upstream."""
    due: dict[WindowId, list[tuple[float, int]]] = {}
    for arrival in trace:
        due.setdefault(window_id(arrival), []).append((arrival.at, len(arrival.batch.events)))
    position = dict.fromkeys(due, (0, 0))
    found = []
    for batch in batches:
        left = batch.events
        index, used = position[batch.window]
        while left:
            at, events = due[batch.window][index]
            taken = min(left, events - used)
            found.append((batch.at - at, taken))
            left -= taken
            index, used = (index + 1, 0) if used + taken == events else (index, used + taken)
        position[batch.window] = (index, used)
    return delays(found)


def requests_between(batches: Iterable[Stored], begin: float, end: float) -> int:
    """Return how many batches came in a span of the trace."""
    return sum(begin <= batch.at < end for batch in batches)
