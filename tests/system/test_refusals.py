"""What an operator does about what upstream refuses: the commands, on a relay that runs."""

from __future__ import annotations

import json
from functools import partial

import pytest

from relay.protocol.codings import zstd_decompress
from tests.system.daemon import Relay, Site, eventually
from tests.system.laws import assert_accounted
from tests.system.traffic import make_batch
from tests.system.wire import ask

pytestmark = pytest.mark.slow

SESSIONS = 3


async def test_dead_letters_beside_a_running_relay(site: Site) -> None:
    """They are listed, exported and sent again while the relay runs, and then upstream has everything once."""
    await site.start_sandbox()
    await site.sandbox.fault(error_rate=1, error_status=[422])
    relay = await site.start_relay()
    await site.post(*(make_batch(f"s{number}", 0, 1, is_final=True) for number in range(SESSIONS)))
    status = await relay.until("dead letters", lambda status: status["account"]["dead_letters"] == SESSIONS)
    assert f"upstream refused {SESSIONS} events for good" in status["warnings"][0]
    code, text = await site.dead_letters("list")
    assert (code, text.splitlines()[-1]) == (0, f"{SESSIONS} dead letters, {SESSIONS} events")
    assert (await site.dead_letters("export", "letters.zst"))[0] == 0
    records = [json.loads(line) for line in zstd_decompress((site.directory / "letters.zst").read_bytes()).splitlines()]
    assert {(record["status"], record["batch"]["session"]["id"]) for record in records} == {
        (422, f"s{number}") for number in range(SESSIONS)
    }
    await site.sandbox.fault()
    assert await site.dead_letters("resend", "1") == (0, "1 dead letters, 1 events to be sent again\n")
    code, text = await site.dead_letters("resend", "1", "999")
    assert (code, text) == (1, "0 of 2 moved: the others are no dead letters, no longer, or damaged\n")
    assert (await site.dead_letters("resend", "--all"))[0] == 0
    await assert_accounted(site)


async def test_dead_letters_are_purged_by_the_relay(site: Site) -> None:
    """What is purged is counted, and the account stays balanced."""
    await site.start_sandbox()
    await site.sandbox.fault(error_rate=1, error_status=[400])
    relay = await site.start_relay()
    await site.post(*(make_batch(f"s{number}", 0, 1) for number in range(SESSIONS)))
    await relay.until("dead letters", lambda status: status["account"]["dead_letters"] == SESSIONS)
    assert await site.dead_letters("purge", "--all") == (0, f"{SESSIONS} dead letters, {SESSIONS} events purged\n")
    account = (await relay.status())["account"]
    assert (account["purged"], account["dead_lettered"], account["is_balanced"]) == (SESSIONS, 0, True)


async def is_held_for_certain(relay: Relay) -> bool:
    """Return whether a relay's next probe is an hour away."""
    return any(
        line["event"] == "upstream refuses the key, its batches wait" and line["certain"] for line in relay.lines()
    )


async def test_held_key_is_released(site: Site) -> None:
    """A refused key waits for its probe, unless an operator has it tried at once."""
    await site.start_sandbox()
    await site.sandbox.fault(error_rate=1, error_status=[401])
    relay = await site.start_relay({"forward": {"hold_seconds": 3_600.0}})
    await site.post(make_batch("s", 0, is_final=True))
    # The first refusal may be a hiccup, so the next probe is soon, and could release the key by itself.
    await eventually("the key to be known as bad", partial(is_held_for_certain, relay))
    await site.sandbox.fault()
    [lane] = (await relay.status())["forward"]["lanes"]
    admin = ("--set", f"listen.admin={relay.admin.removeprefix('http://')}")
    unknown = await site.run("keys", "release", "key-00000000", *admin)
    assert unknown.returncode == 1
    assert unknown.stderr.decode().startswith("No key key-00000000 is held. Held keys have names like key-")
    released = await site.run("keys", "release", lane["key"], *admin)
    assert (released.returncode, released.stdout.decode()) == (0, f"{lane['key']} is tried now\n")
    await assert_accounted(site)


@pytest.mark.parametrize("path", ["/dead-letters/resend", "/dead-letters/purge", "/keys/release"])
async def test_orders_come_from_no_web_page(site: Site, path: str) -> None:
    """A body that a page could send unasked is refused, and so is one that says something else."""
    await site.start_sandbox()
    relay = await site.start_relay()
    json_type = (("Content-Type", "application/json"),)
    assert (await ask(f"{relay.admin}{path}", "POST", body=b'{"ids":null}')).status == 415
    for body in (b"", b"[]", b'{"ids":"all"}', b'{"all":true}', b'{"ids":[9223372036854775808]}'):
        assert (await ask(f"{relay.admin}{path}", "POST", json_type, body)).status == 400
