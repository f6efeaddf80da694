from __future__ import annotations

import base64
import random
import shutil

import pytest

from tests.mounting import mounted, needs_mount
from tests.system.daemon import Relay, Site
from tests.system.laws import assert_accounted
from tests.system.traffic import KEY, TARGET, Batch, make_batch
from tests.system.wire import Answer, ask, connect

pytestmark = pytest.mark.slow

MAX_BATCHES = 2_000
"""Far more than fit into the smallest spool, and on the small disk."""

DISK_BYTES, RESERVE_BYTES = 50_331_648, 8_388_608
"""A disk with room for the reserve twice, and for a backlog beside it."""

KEY_HEADERS = (("X-Lucent-Api-Key", KEY),)


def make_dense_batch(sequence: int) -> Batch:
    """Return a batch that hardly compresses."""
    noise = base64.b64encode(random.Random(sequence).randbytes(60_000))
    return make_batch("s1", sequence, [b'{"timestamp":%d,"type":3,"data":"%b"}' % (sequence, noise)])


async def fill(site: Site, relay: Relay) -> tuple[Batch, Answer]:
    """Send batches until one is refused; returns that one, and the answer to it."""
    async with await connect(relay.url) as connection:
        while site.sent.batches < MAX_BATCHES:
            batch = make_dense_batch(site.sent.batches)
            answer = await connection.request("POST", TARGET, KEY_HEADERS, batch.body)
            if answer.status != 200:
                return batch, answer
            site.sent.add(batch)
    raise AssertionError("the disk takes everything")


async def reasons(relay: Relay) -> str:
    """Return why a relay is not ready; it is alive all the same."""
    ready = await ask(f"{relay.admin}/readyz")
    assert (ready.status, ready.json()["ready"]) == (503, False)
    assert (await ask(f"{relay.admin}/livez")).status == 200
    return "; ".join(ready.json()["reasons"])


async def test_full_spool_refuses_and_recovers(site: Site) -> None:
    """At its cap a spool says come again and drains on; once there is room it takes batches, without a restart."""
    await site.start_sandbox()
    await site.sandbox.go_down()
    relay = await site.start_relay({"spool": {"max_bytes": 1_048_576}})
    batch, answer = await fill(site, relay)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "spool is full" in answer.json()["error"]
    assert "spool.max_bytes" in await reasons(relay)
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


@needs_mount
async def test_full_disk_refuses_and_recovers(site: Site) -> None:
    """On a disk without a free byte the same holds: for draining there is the reserve, and accepting resumes."""
    with mounted(site.directory / "disk", DISK_BYTES) as disk:
        await site.start_sandbox()
        await site.sandbox.go_down()
        settings = {"directory": str(disk / "spool"), "min_free_bytes": 0, "reserve_bytes": RESERVE_BYTES}
        relay = await site.start_relay({"spool": settings})
        batch, answer = await fill(site, relay)
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert "full" in answer.json()["error"]
        await relay.logged("spool refuses batches")
        await relay.until("the reserve to be why", lambda status: "spool.reserve_bytes" in " ".join(status["reasons"]))
        assert "spool.reserve_bytes" in await reasons(relay)
        await assert_accounted(site, is_drained=False)

        await site.sandbox.fault()
        await relay.drained()
        await relay.until("room", lambda status: status["ready"])
        await relay.logged("spool accepts batches again")
        await site.post(batch)
        await assert_accounted(site)
        await relay.stop()


async def test_removed_directory_is_noticed(site: Site) -> None:
    """What a relay holds when its spool is removed is delivered; it says why it takes nothing, and makes no new one."""
    await site.start_sandbox()
    await site.sandbox.go_down()
    relay = await site.start_relay()
    await site.post(*(make_dense_batch(number) for number in range(5)))
    shutil.rmtree(site.directory / "spool")
    await relay.until("it to be noticed", lambda status: not status["ready"])
    assert "removed or replaced" in await reasons(relay)
    _, answer = await fill(site, relay)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")

    await site.sandbox.fault()
    await assert_accounted(site)
    await relay.stop()
    assert not (site.directory / "spool").exists()
