from __future__ import annotations

import stat

import pytest

from tests.system.daemon import Site
from tests.system.laws import assert_accounted
from tests.system.traffic import TARGET, make_batch
from tests.system.wire import ask

pytestmark = pytest.mark.slow

DEFAULT, IN_HEADER, IN_QUERY, REJECTED = (f"luc_pk_{name}" for name in ("default", "header", "query", "rejected"))


async def test_keys_stay_inside(site: Site) -> None:
    """No key is in a log, a metric, or the status, whichever way it came, not even one that upstream refuses."""
    await site.start_sandbox("--reject-key", REJECTED)
    relay = await site.start_relay({"log": {"level": "debug"}, "keys": {"default": DEFAULT}})
    for name, headers, query in (
        ("default", (), ""),
        ("header", (("X-Lucent-Api-Key", IN_HEADER),), ""),
        ("query", (), f"?api_key={IN_QUERY}"),
    ):
        batch = make_batch(name, 0)
        assert (await ask(f"{relay.url}{TARGET}{query}", "POST", headers, batch.body)).status == 200
        site.sent.add(batch)
    await assert_accounted(site)
    rejected = make_batch("rejected", 0)
    assert (await ask(f"{relay.url}{TARGET}?api_key={REJECTED}", "POST", (), rejected.body)).status == 200
    site.sent.add(rejected)
    status = await relay.until("the key to be held", lambda status: status["warnings"])
    assert "refuses key-" in status["warnings"][0]
    # What is wrong about a request is said without repeating what it bore.
    for path in (f"{TARGET}x?api_key={IN_QUERY}", f"/{IN_QUERY}"):
        assert IN_QUERY not in (await ask(f"{relay.url}{path}")).body.decode()
    said = [(await ask(f"{relay.admin}{path}")).body.decode() for path in ("/status", "/metrics", "/readyz")]
    await assert_accounted(site, is_drained=False)
    await relay.stop()
    for text in (relay.log, relay.output, *said):
        assert "luc_pk_" not in text


async def test_spool_is_nobody_elses(site: Site) -> None:
    """The spool's directory and every file in it are the relay's user's alone, whatever the umask."""
    await site.start_sandbox()
    await site.start_relay({"batch": {"linger_seconds": 3_600}})
    await site.post(make_batch("s1", 0))
    spool = site.directory / "spool"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (spool, *spool.iterdir())}
    assert {"spool", "lock", "spool.sqlite3", "spool.sqlite3-wal"} <= modes.keys()
    assert modes.pop("spool") == 0o700
    assert set(modes.values()) == {0o600}
    await assert_accounted(site, is_drained=False)
