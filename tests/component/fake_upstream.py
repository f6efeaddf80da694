"""Upstream's ingest endpoint in place of the HTTP client: takes bodies, keeps what it stored, notes what is wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import msgspec
import trio

from relay.config import Batch, Budget, Config, Forward
from relay.errors import ExchangeFailed
from relay.forward.clocks import Clocks
from relay.forward.exchange import Client
from relay.forward.forwarder import Forwarder
from relay.http.client import Reply
from relay.spool.spool import Run, Spool
from tests.accounting import assert_accounted
from tests.component.batches import UpstreamBatch, make_batch, make_body, read_upstream
from tests.component.spooling import opened_spool, run_inline, wall_clock

OK = Reply(200, {}, b'{"ok":true}')


class Arrival(msgspec.Struct, frozen=True):
    """One request."""

    at: float
    """trio's clock."""
    key: str
    body: bytes
    batch: UpstreamBatch
    attempt: int
    """How often this very body has come, from 1."""


Answer: TypeAlias = Callable[[Arrival], Awaitable[Reply]]
"""Decides on a request; what it answers 2xx is stored."""


async def say_yes(_: Arrival) -> Reply:
    """Take everything, after 50 ms."""
    await trio.sleep(0.05)
    return OK


class FakeUpstream:
    """Stores by (session, sequence) as upstream does, and complains of what a relay must never do.

    Args:
        answer: Decides on each request; may be replaced at any time.
    """

    def __init__(self, answer: Answer = say_yes, *, max_events: int = 500, max_bytes: int = 1_048_576) -> None:
        self.answer = answer
        self.arrivals: list[Arrival] = []
        self.stored: dict[tuple[str, str, int], UpstreamBatch] = {}
        self.order: list[UpstreamBatch] = []
        self.complaints: list[str] = []
        self.in_flight = self.peak_in_flight = 0
        self._limits = (max_events, max_bytes)
        self._busy: set[tuple[str, str]] = set()
        self._bodies: dict[tuple[str, str, int], bytes] = {}

    async def request(self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Reply:
        """Take the place of `HttpClient.request`."""
        values = {name.lower(): value for name, value in headers}
        batch = read_upstream(body)
        key = values[b"x-lucent-api-key"].decode()
        session = (key, batch.session)
        self._expect((method, target) == ("POST", "/api/sdk/replay"), "wrong endpoint")
        self._expect(values[b"content-encoding"] == b"gzip", "not declared as gzip")
        self._expect(session not in self._busy, f"two in flight of {session}")
        self._expect(len(batch.events) <= self._limits[0], "too many events")
        self._expect(batch.size <= self._limits[1] or len(batch.events) == 1, "too many bytes")
        first = self._bodies.setdefault((*session, batch.sequence), body)
        self._expect(first == body, f"another body under {(*session, batch.sequence)}")
        attempt = 1 + sum(arrival.body == body for arrival in self.arrivals)
        arrival = Arrival(trio.current_time(), key, body, batch, attempt)
        self.arrivals.append(arrival)
        self._busy.add(session)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        try:
            reply = await self.answer(arrival)
            if reply.status // 100 == 2:
                self.store(arrival)
            elif reply.status in {400, 413, 422}:  # nothing is stored, so the number is free for a part of the batch
                del self._bodies[(*session, batch.sequence)]
            return reply
        finally:
            self.in_flight -= 1
            self._busy.discard(session)

    def store(self, arrival: Arrival) -> None:
        """Store a batch, unless it was stored before."""
        identity = (arrival.key, arrival.batch.session, arrival.batch.sequence)
        if identity not in self.stored:
            self.stored[identity] = arrival.batch
            self.order.append(arrival.batch)

    async def store_and_hang_up(self, arrival: Arrival) -> Reply:
        """Store a batch, and let the answer be lost."""
        self.store(arrival)
        raise ExchangeFailed("connection reset")

    def forget_bodies(self) -> None:
        """Let what comes next under a number differ from what came before: the disk has damaged it."""
        self._bodies.clear()

    def _expect(self, condition: bool, complaint: str) -> None:
        if not condition:
            self.complaints.append(complaint)

    def events(self, session: str = "") -> list[bytes]:
        """Return the stored events of a session, or of all, in order of storing."""
        return [event for batch in self.order if session in ("", batch.session) for event in batch.events]

    def peak_requests(self, key: str, window_seconds: float = 60.0) -> int:
        """Return the most requests of a key that came within any window."""
        times = [arrival.at for arrival in self.arrivals if arrival.key == key]
        return max((sum(start <= at < start + window_seconds for at in times) for start in times), default=0)


class Forwarding:
    """A spool, a forwarder on it, and upstream."""

    def __init__(self, spool: Spool, forwarder: Forwarder, upstream: FakeUpstream) -> None:
        self.spool = spool
        self.forwarder = forwarder
        self.upstream = upstream
        self.accepted: list[bytes] = []

    async def accept(self, *place: Any, key: str = "luc_pk_test", **members: Any) -> None:
        """Store a client batch as the intake would; takes the arguments of `make_body`."""
        body = make_body(*place, **members)
        batch = make_batch(body, key=key, accepted_at=wall_clock())
        assert (await self.spool.append(batch)).outcome == "stored"
        self.accepted += members.get("events") or [_only_event(body)]

    async def drained(self, patience_seconds: float = 3_600) -> float:
        """Wait until nothing is spooled; returns how long that took."""
        began = trio.current_time()
        with trio.fail_after(patience_seconds):
            while (await self.spool.account()).spooled:  # noqa: ASYNC110 - only the disk knows, and time is virtual
                await trio.sleep(0.1)
        return trio.current_time() - began

    def assert_each_once(self) -> None:
        """Assert that upstream has every accepted event exactly once, byte for byte."""
        assert sorted(self.upstream.events()) == sorted(self.accepted)


def _only_event(body: bytes) -> bytes:
    return body.partition(b'"events":[')[2].partition(b'], "sequence"')[0]


def make_config(*, requests_per_minute: int = 100, **options: Any) -> Config:
    """Return a configuration with the options that forwarding tests vary: of the sections `batch` and `forward`."""
    batch = {name: options.pop(name) for name in Batch.__struct_fields__ if name in options}
    return Config(
        batch=Batch(**batch), budget=Budget(requests_per_minute=requests_per_minute), forward=Forward(**options)
    )


@asynccontextmanager
async def forwarding(
    directory: Path,
    upstream: FakeUpstream,
    config: Config | None = None,
    *,
    client: Client | None = None,
    seed: int = 1,
    run: Run = run_inline,
    **spool: Any,
) -> AsyncIterator[Forwarding]:
    """Run a forwarder; on exit stop it, and check the account and upstream's complaints.

    `client` is what leads to upstream where that does not stand in for it; `spool` are options of that section.
    """
    config = config or make_config()
    clocks = Clocks(trio.current_time, wall_clock, Random(seed).random)
    async with opened_spool(directory, limits=config.batch.limits, run=run, **spool) as opened:
        forwarder = Forwarder(config, opened, client or upstream, clocks)
        it = Forwarding(opened, forwarder, upstream)
        async with trio.open_nursery() as nursery:
            await nursery.start(forwarder.run)
            yield it
            forwarder.stop()
        assert_accounted(await opened.account())
    assert upstream.complaints == []
