from __future__ import annotations

import pytest

from tests.system.daemon import Site
from tests.system.laws import assert_accounted
from tests.system.traffic import make_batch

pytestmark = pytest.mark.slow


async def test_restart_amid_outage(site: Site) -> None:
    """A restart keeps what is pending, what is sealed, and which batches it knows; upstream gets each once."""
    await site.start_sandbox()
    await site.sandbox.go_down()
    await site.start_relay()
    tried = [make_batch("s1", sequence, 200, window=f"w{sequence % 2}") for sequence in range(6)]
    async with site.sdk() as sdk:
        for batch in tried:
            await sdk.post(batch)
    await site.relay.until("a cut to be made", lambda status: status["account"]["sealed"])
    await site.relay.stop()

    await site.start_relay({"batch": {"linger_seconds": 3_600}})
    waiting = [make_batch("s2", sequence, is_final=sequence == 2) for sequence in range(3)]
    async with site.sdk() as sdk:
        for batch in [*tried, *waiting, *waiting]:
            await sdk.post(batch)
    status = await site.relay.status()
    assert status["intake"]["batches_repeated"] == len(tried) + len(waiting)
    assert status["account"]["accepted"] == site.sent.events
    assert (await site.sandbox.report())["stored_batches"] == 0
    await site.relay.stop()

    await site.start_relay({"batch": {"linger_seconds": 0}})
    await site.sandbox.fault()
    await assert_accounted(site)
    await site.post(*tried, *waiting)
    await assert_accounted(site)
    assert (await site.sandbox.report())["repeated_batches"] == 0


async def test_restart_with_other_limits(site: Site) -> None:
    """What was accepted under greater limits is cut anew under smaller ones; what was sealed is sent as it was."""
    await site.start_sandbox()
    await site.sandbox.go_down()
    await site.start_relay()
    await site.post(make_batch("s1", 0, 700))
    await site.relay.until("a cut to be made", lambda status: status["account"]["sealed"] == 500)
    await site.relay.stop()
    await site.sandbox.fault()
    await site.start_relay({"batch": {"max_events": 60}})
    await assert_accounted(site)
    sizes = [batch["events"] for batch in (await site.sandbox.session("s1"))["stored"]]
    assert sizes == [500, 60, 60, 60, 20]
