"""An outage of every kind on real sockets, and the hours after it in short: the backlog goes, live traffic with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pytest
import trio

from tests.system.daemon import Site, eventually
from tests.system.hostile import MOODS, HostileProxy, Mood, hostile_proxy
from tests.system.laws import assert_accounted
from tests.system.traffic import TARGET, make_batch
from tests.system.wire import connect

pytestmark = pytest.mark.slow

BACKLOG_SESSIONS = 150
BACKLOG_BATCHES = 3
"""Of each session."""

MIN_LIVE_BATCHES = 50
"""Sent while the backlog drains, so that there is something to be harmed."""

MOODS_SECONDS = 300.0
"""For each to be drawn and met twice. Probes go one at a time, some of them hang: ten to thirty seconds as a rule."""

CLIENT_SECONDS = 10.0
"""What a client gives the relay for an answer; a browser gives minutes."""

PATIENCE = {"connect_seconds": 0.5, "write_seconds": 0.5, "first_byte_seconds": 0.5, "response_seconds": 1.0}
"""The relay's with upstream: short, so that all that hangs is seen many times."""

HEADERS = (("X-Lucent-Api-Key", "luc_pk_test"),)


async def send_live(site: Site, name: str, stop: trio.Event) -> None:
    """Send batch after batch on one connection, each of which must be taken at the first try, until `stop`."""
    async with await connect(site.relay.url) as connection:
        for sequence in count():
            batch = make_batch(f"live-{name}", sequence, 20, is_final=stop.is_set())
            with trio.fail_after(CLIENT_SECONDS):
                answer = await connection.request("POST", TARGET, HEADERS, batch.body)
            assert answer.status == 200, answer
            site.sent.add(batch)
            if batch.is_final:
                break
            await trio.sleep(0.02)


async def have_outage(proxy: HostileProxy, moods: Sequence[Mood]) -> None:
    """Let each of the moods be met by the relay several times."""
    proxy.change(*moods)
    before = proxy.seen.copy()

    async def met() -> bool:
        return all(proxy.seen[mood] - before[mood] >= 2 for mood in moods)

    await eventually("every mood to be met", met, MOODS_SECONDS)


async def test_backlog_drains_beside_live_traffic_after_an_outage_of_every_kind(site: Site) -> None:
    """Through resets, hangs, lost answers and garbage nothing is lost, and when they end all goes without a restart."""
    sandbox = await site.start_sandbox("--latency", "0.02")
    async with hostile_proxy(sandbox.url) as proxy:
        relay = await site.start_relay({"upstream": {"ingest_url": proxy.url, **PATIENCE}})
        await site.post(make_batch("before", 0, is_final=True))
        await relay.drained()
        proxy.change(*MOODS)
        for sequence in range(BACKLOG_BATCHES):
            await site.post(*(make_batch(f"s{number}", sequence) for number in range(BACKLOG_SESSIONS)))
        await have_outage(proxy, MOODS)
        assert (await relay.status())["ready"]
        await assert_accounted(site, is_drained=False)
        proxy.change("pass")
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(send_live, site, name, stop)
            await relay.until("the backlog to be gone", lambda status: status["account"]["lag_seconds"] < 1)
            await site.sent.more(MIN_LIVE_BATCHES)
            stop.set()
        await assert_accounted(site)
        assert (await relay.status())["forward"]["attempt_errors"] == 0
