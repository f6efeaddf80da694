"""Clients that use a sequence again, against an upstream that takes notice of every conflict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.system.daemon import Site
from tests.system.laws import assert_accounted
from tests.system.traffic import Batch, Sdk, Sent, make_batch, make_events

pytestmark = pytest.mark.slow


async def send(site: Site, batch: Batch, *, place: int, new: int) -> None:
    """Send a batch of which the last `new` events are new, and note these as the window's batch at `place`."""
    async with Sdk(lambda: site.relay.url, Sent()) as sdk:
        await sdk.post(batch)
    if new:
        site.sent.add(replace(batch, sequence=place, events=batch.events[-new:]))


async def test_batch_that_grows_arrives_once(site: Site) -> None:
    """A client without answers sends its batch again with what came since: during an outage, after a restart, later."""
    events = make_events("s1", 2_000)
    await site.start_sandbox()
    await site.sandbox.go_down()
    await site.start_relay()
    await send(site, make_batch("s1", 0, events[:300]), place=0, new=300)
    await send(site, make_batch("s1", 0, events[:700]), place=1, new=400)
    await site.relay.stop()
    await site.start_relay()
    await send(site, make_batch("s1", 0, events[:900]), place=2, new=200)
    await site.sandbox.fault()
    await assert_accounted(site)
    await send(site, make_batch("s1", 0, events[:1_500]), place=3, new=600)
    await send(site, make_batch("s1", 1, events[1_500:], is_final=True), place=4, new=500)
    await assert_accounted(site)
    assert (await site.relay.status())["intake"]["batches_reused"] == {"grown": 2, "other": 0}


async def test_reload_arrives_behind_what_was_there(site: Site) -> None:
    """Tabs that are reloaded, and count from 0 each time, lose and repeat nothing, whatever upstream has by then."""
    await site.start_sandbox()
    await site.start_relay()
    for load in range(3):
        for sequence in range(4):
            for window in ("w1", "w2"):
                events = make_events(f"{window}/{load}/{sequence}", 40)
                await send(site, make_batch("s1", sequence, events, window=window), place=10 * load + sequence, new=40)
        if load == 0:
            await assert_accounted(site)
        site.relay.kill()
        await site.start_relay()
    late = make_batch("s1", 3, make_events("w1/0/3", 40))
    await send(site, late, place=3, new=0)
    await assert_accounted(site)
    assert (await site.relay.status())["intake"]["batches_repeated"] == 1
