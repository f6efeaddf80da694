"""A relay under every attack of the benchmark, one after the other: a good client is served, and memory is bounded."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.attackers import ATTACKS, IDLE_CONNECTIONS, bombs
from bench.attacks import attacking
from tests.system.daemon import Relay, Site
from tests.system.laws import assert_accounted
from tests.system.traffic import KEY, TARGET, make_batch
from tests.system.wire import connect

pytestmark = pytest.mark.slow

BATCHES = 20
"""Of the good client, under each attack."""

PAUSE_SECONDS = 0.05
"""Between two of them."""

CLIENT_SECONDS = 20.0
"""What it gives the relay for an answer; a browser gives minutes."""

ATTACKERS_SECONDS = 300.0
"""For all of an attack to be there: thousands of connections, made in a second where nobody else is at work."""

MIB = 1_048_576

BOUNDS = {
    "listen": {"max_buffered_bytes": 32 * MIB},
    "intake": {"max_body_bytes": 16 * MIB, "max_decoded_bytes": 16 * MIB, "max_decodes": 2},
}

MAX_RESIDENT_BYTES = (100 + 32 + 2 * 5 * 16) * MIB
"""The relay at work, all that may be received, and for each body being decoded what comes out of it a few times over:
in pieces, joined, as text for the lenient path, and what Python's allocator has not given back."""


def peak_resident_bytes(relay: Relay) -> int:
    """Return the most memory that a relay ever had."""
    status = Path(f"/proc/{relay.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def has_seen(connections: int, status: dict[str, Any]) -> bool:
    """Return whether a relay has had so many connections."""
    return bool(status["listener"]["connections_total"] >= connections)


async def post_steadily(site: Site, name: str) -> None:
    """Send batches on one connection, each of which must be taken at the first try, on time."""
    async with await connect(site.relay.url) as connection:
        for sequence in range(BATCHES):
            batch = make_batch(name, sequence, 50, is_final=sequence == BATCHES - 1)
            with trio.fail_after(CLIENT_SECONDS):
                answer = await connection.request("POST", TARGET, (("X-Lucent-Api-Key", KEY),), batch.body)
            assert answer.status == 200, (name, answer)
            site.sent.add(batch)
            await trio.sleep(PAUSE_SECONDS)


async def test_a_good_client_is_served_under_every_attack(site: Site) -> None:
    """While thousands of connections idle, stall, flood, lie and explode, a good client's batches are taken at once."""
    await site.start_sandbox()
    relay = await site.start_relay(BOUNDS)
    for name in ATTACKS:
        before = (await relay.status())["listener"]["connections_total"]
        with attacking(name, relay.address):
            expected = before + (IDLE_CONNECTIONS if name == "idle connections" else 20)
            await relay.until(name, partial(has_seen, expected), ATTACKERS_SECONDS)
            await post_steadily(site, name)
    await relay.until("the attackers to be forgotten", lambda status: status["listener"]["open_connections"] == 0)
    status = await relay.status()
    assert status["listener"]["buffered_bytes"] == 0
    assert status["listener"]["handler_errors_total"] == 0
    assert peak_resident_bytes(relay) < MAX_RESIDENT_BYTES
    await assert_accounted(site)


async def test_each_bomb_gets_the_answer_that_it_deserves(site: Site) -> None:
    """Bombs of every coding, nested, stacked and in a million members, are refused by what they are."""
    await site.start_sandbox()
    relay = await site.start_relay()
    for name, (request, status) in bombs().items():
        async with await connect(relay.url) as connection:
            await connection.stream.send_all(request)
            with trio.fail_after(CLIENT_SECONDS):
                answer = await connection.stream.receive_some()
            assert answer.startswith(b"HTTP/1.1 %d " % status), (name, answer)
    await site.post(make_batch("s1", 0, is_final=True))
    await assert_accounted(site)
