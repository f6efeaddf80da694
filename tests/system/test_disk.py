from __future__ import annotations

import base64
import random

import pytest

from tests.system.daemon import Site
from tests.system.laws import assert_accounted
from tests.system.traffic import KEY, TARGET, Batch, make_batch
from tests.system.wire import ask, connect

pytestmark = pytest.mark.slow

MAX_BATCHES = 100
"""Far more than fit into the smallest spool."""

KEY_HEADERS = (("X-Lucent-Api-Key", KEY),)


def make_dense_batch(sequence: int) -> Batch:
    """Return a batch that hardly compresses."""
    noise = base64.b64encode(random.Random(sequence).randbytes(60_000))
    return make_batch("s1", sequence, [b'{"timestamp":%d,"type":3,"data":"%b"}' % (sequence, noise)])


async def test_full_spool_refuses_and_recovers(site: Site) -> None:
    """At its cap a spool says come again and drains on; once there is room it takes batches, without a restart."""
    await site.start_sandbox()
    await site.sandbox.go_down()
    relay = await site.start_relay({"spool": {"max_bytes": 1_048_576}})
    async with await connect(relay.url) as connection:
        batch = make_dense_batch(0)
        answer = await connection.request("POST", TARGET, KEY_HEADERS, batch.body)
        while answer.status == 200:
            site.sent.add(batch)
            assert site.sent.batches < MAX_BATCHES
            batch = make_dense_batch(site.sent.batches)
            answer = await connection.request("POST", TARGET, KEY_HEADERS, batch.body)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "spool is full" in answer.json()["error"]
    ready = await ask(f"{relay.admin}/readyz")
    assert (ready.status, ready.json()["ready"]) == (503, False)
    assert "spool.max_bytes" in ready.json()["reasons"][0]
    assert (await ask(f"{relay.admin}/livez")).status == 200
    await assert_accounted(site, is_drained=False)

    await site.sandbox.fault()
    await relay.until("room", lambda status: status["ready"])
    await site.post(batch)
    await assert_accounted(site)
    assert (await ask(f"{relay.admin}/readyz")).status == 200


async def test_spool_that_is_full_at_the_start_drains(site: Site) -> None:
    """A relay that starts far over its cap says no, needs no room to deliver what is there, and says yes again."""
    await site.start_sandbox()
    await site.sandbox.go_down()
    await site.start_relay()
    async with site.sdk() as sdk:
        for sequence in range(60):
            await sdk.post(make_dense_batch(sequence))
    site.relay.kill()
    relay = await site.start_relay({"spool": {"max_bytes": 1_048_576}})
    status = await relay.status()
    assert (status["ready"], status["spool"]["used_bytes"] > 2 * 1_048_576) == (False, True)
    await site.sandbox.fault()
    await relay.until("room", lambda status: status["ready"])
    await site.post(make_dense_batch(60))
    await assert_accounted(site)
