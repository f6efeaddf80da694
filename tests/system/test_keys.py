"""Upstream keys that share the sessions of one client key, and client keys that are not taken."""

from __future__ import annotations

import hashlib

import pytest

from tests.system.daemon import Site
from tests.system.laws import assert_accounted
from tests.system.traffic import KEY, TARGET, make_batch
from tests.system.wire import ask

pytestmark = pytest.mark.slow

POOL = ("luc_pk_pool_one", "luc_pk_pool_two")

KEY_LIMIT = 60
"""Requests a minute that upstream allows each key."""

SESSIONS = 62
"""One batch each: more than one key may deliver in a minute, and hardly more than two do without pacing."""


def name_of(key: str) -> str:
    """Return the name under which a key is shown."""
    return f"key-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


async def test_pool_shares_the_load(site: Site) -> None:
    """Two upstream keys deliver what is too much for one within a minute; each stays within its own limit."""
    await site.start_sandbox("--requests-per-minute", str(KEY_LIMIT))
    relay = await site.start_relay(
        {
            "budget": {"requests_per_minute": KEY_LIMIT},
            "keys": {"accept": "listed"},
            "keys.pools": {KEY: list(POOL)},
        }
    )
    await site.post(*(make_batch(f"visit-{number}", 0, is_final=True) for number in range(SESSIONS)))
    status = await relay.drained()
    assert {lane["key"] for lane in status["forward"]["lanes"]} == {name_of(key) for key in POOL}
    keys = (await site.sandbox.report())["keys"]
    assert set(keys) == {name_of(key) for key in POOL}
    assert sum(key["counted"] for key in keys.values()) == SESSIONS
    for key in keys.values():
        assert SESSIONS / 3 < key["counted"] <= key["peak_requests_per_minute"] <= KEY_LIMIT
    # After a restart sessions are where they were, and what a client repeats is recognised.
    await relay.stop()
    relay = await site.start_relay()
    await site.post(*(make_batch(f"visit-{number}", 0, is_final=True) for number in range(SESSIONS)))
    assert (await relay.status())["intake"]["batches_repeated"] == SESSIONS
    stranger = make_batch("stranger", 0)
    for key in ("luc_pk_stranger", POOL[0]):
        answer = await ask(f"{relay.url}{TARGET}", "POST", (("X-Lucent-Api-Key", key),), stranger.body)
        assert (answer.status, answer.json()) == (401, {"error": "Invalid or revoked API key"})
    await assert_accounted(site)
    assert (await site.sandbox.report())["rate_limited"] == 0


async def test_strict_limit_is_learned(site: Site) -> None:
    """A relay that is to learn its limit shows what it has learned, and loses nothing on the way."""
    await site.start_sandbox("--requests-per-minute", "20")
    relay = await site.start_relay({"budget": {"requests_per_minute": "auto"}})
    await site.post(*(make_batch(f"s{number}", 0) for number in range(24)))
    await relay.until("a lower limit", lambda status: 20 <= status["forward"]["lanes"][0]["budget_limit"] < 40)
    await assert_accounted(site, is_drained=False)
