"""SIGKILL at any moment, on the installed command: what was acknowledged arrives, once (laws 1, 2, 3 and 5).

The kill spares nothing of the process. What becomes of the disk when the power goes is another test's, over a
simulated disk.
"""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
import trio

from tests.system.daemon import Site
from tests.system.laws import assert_accounted
from tests.system.traffic import make_batch

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("LUCENT_RELAY_KILL_ROUNDS", "8"))
"""Kills under load; one takes about a second. A quarter as many while upstream refuses."""

PLENTY = {"requests_per_minute": 10_000}
"""More than any test sends, and no limit on the requests under way but `forward.max_in_flight_per_key`."""

CLIENTS = 6
"""As many sessions under load, each with two windows."""

OUTCOMES = {"error_rate": 0.1, "error_status": [500, 503, 429], "drop_before_rate": 0.1, "drop_after_rate": 0.1}
"""What an upstream in trouble does to three batches of ten; an answer lost after storing is what makes duplicates."""


async def kill_under_load(site: Site, rounds: int, **outcomes: Any) -> None:
    """Kill the relay so many times among clients that send, every third time while it starts, too."""
    chance = random.Random(8)
    await site.start_sandbox("--seed", "8")
    await site.sandbox.fault(**outcomes, latency_jitter_seconds=0.02)
    await site.start_relay()
    is_over = trio.Event()
    async with trio.open_nursery() as clients:
        for number in range(CLIENTS):
            name = f"s{number}"
            clients.start_soon(site.play_session, name, random.Random(name), is_over)
        for number in range(rounds):
            await site.sent.more(chance.randint(1, 60))
            site.relay.kill()
            if number % 3 == 2:
                start_seconds = site.relay.start_seconds
                relay = site.spawn_relay()
                await relay.logged("starting")
                await trio.sleep(chance.uniform(0, start_seconds))
                relay.kill()
            await site.start_relay()
        is_over.set()


async def test_kill_under_load(site: Site) -> None:
    """Killed again and again among clients and a failing upstream, the relay loses nothing and repeats nothing."""
    await kill_under_load(site, ROUNDS, **OUTCOMES)
    assert (await site.sandbox.report())["injected"]["drop_after"] > 0
    await site.sandbox.fault()
    await assert_accounted(site)


async def test_kill_while_upstream_refuses(site: Site) -> None:
    """Killed among batches that are cut into smaller ones and dead letters that are made, it loses and repeats nothing.

    What is a dead letter at the end is sent again, and arrives.
    """
    await kill_under_load(site, ROUNDS // 4, **{**OUTCOMES, "error_rate": 0.3, "error_status": [400, 413, 422, 500]})
    await site.sandbox.fault(error_rate=1, error_status=[422])
    await site.post(*(make_batch(f"r{number}", 0, 1) for number in range(CLIENTS)))
    await site.relay.until("dead letters", lambda status: status["account"]["dead_letters"] >= CLIENTS)
    site.relay.kill()
    await site.sandbox.fault()
    await site.start_relay()
    await site.relay.drained()
    assert (await site.dead_letters("resend", "--all"))[0] == 0
    await assert_accounted(site, is_ordered=False)


@pytest.mark.parametrize("durability", ["fsync", "os"])
async def test_kill_after_yes(site: Site, durability: str) -> None:
    """A relay that is killed the moment its 200 is on the wire has the batch on disk, however it is synced."""
    await site.start_sandbox()
    await site.start_relay({"batch": {"linger_seconds": 3_600}, "spool": {"durability": durability}})
    for sequence in range(ROUNDS + 2):
        async with site.sdk() as sdk:
            await sdk.post(make_batch("s1", sequence))
            site.relay.kill()
        await site.start_relay()
    assert (await site.sandbox.report())["requests"] == 0
    await site.relay.stop()
    await site.start_relay({"batch": {"linger_seconds": 0}})
    await assert_accounted(site)


async def test_kill_while_starting(site: Site) -> None:
    """A start that is killed at any point of it harms neither the backlog nor the next start."""
    await site.start_sandbox("--latency", "3600")  # an upstream that fails would be probed, and not with all of them
    await site.start_relay({"budget": PLENTY})
    await site.post(*(make_batch(f"s{number}", 0, 600) for number in range(CLIENTS)))
    await site.relay.until("all to be tried", lambda status: status["account"]["sealed"] == CLIENTS * 500)
    site.relay.kill()
    await site.sandbox.go_down()
    for event in ("starting", "relay listening", "admin listening", "attempt failed"):
        relay = site.spawn_relay()
        await relay.logged(event)
        relay.kill()
    await site.sandbox.fault()
    await site.start_relay()
    await assert_accounted(site)


async def test_kill_while_stopping(site: Site) -> None:
    """Killed between SIGTERM and exit, with batches at upstream and a request in hand, the relay sends on later."""
    await site.start_sandbox("--latency", "3600")
    await site.start_relay({"budget": PLENTY})
    await site.post(*(make_batch(f"s{number}", 0) for number in range(CLIENTS)))
    await site.relay.until("all to be in flight", lambda status: status["forward"]["in_flight"] == CLIENTS)
    site.relay.signal(signal.SIGTERM)
    await site.relay.logged("stopping")
    site.relay.kill()
    await site.sandbox.fault()
    await site.start_relay()
    await assert_accounted(site)
