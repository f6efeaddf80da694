"""The laws, held against the daemon's account, the sandbox's memory and the clients' record."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import trio

from tests.system.daemon import Relay, Sandbox, Site
from tests.system.traffic import Sent
from tests.system.wire import ask

CONCURRENT_QUESTIONS = 8
"""Sessions asked of the sandbox at a time."""


async def assert_accounted(
    site: Site, *, is_drained: bool = True, is_ordered: bool = True, seconds: float = 30.0
) -> None:
    """Assert that every event is where the account says, and nowhere twice.

    Args:
        site: With a relay that runs.
        is_drained: Wait until nothing is spooled, then expect all events upstream; else what is upstream may be any
            beginning of each window, and more may come while it is looked at.
        is_ordered: Expect them in order, and finals last; but what was a dead letter comes behind what went meanwhile.
        seconds: Patience with the draining.
    """
    status = await (site.relay.drained(seconds) if is_drained else site.relay.status())
    account = status["account"]
    gone = account["delivered"] + account["dead_lettered"] + account["purged"] + account["shed"]
    assert account["accepted"] == gone + account["spooled"], account
    assert account["is_balanced"], account
    assert account["accepted"] == site.sent.events, account
    await assert_metrics(site.relay)
    assert (account["dead_lettered"], account["purged"], account["shed"]) == (0, 0, 0), account
    report = await site.sandbox.report()
    assert_unspoiled(report if is_ordered else {**report, "after_final_batches": 0})
    if is_drained:
        assert (account["delivered"], report["events"]) == (site.sent.events, site.sent.events)
    # What was delivered before is upstream, and what is upstream was cut before: the account later on has it.
    later = (await site.relay.status())["account"]
    assert account["delivered"] <= report["events"] <= later["delivered"] + later["sealed"], (account, report, later)
    await assert_content(site.sandbox, site.sent, is_complete=is_drained, is_ordered=is_ordered)


async def assert_metrics(relay: Relay) -> None:
    """Assert that one scrape has the account in it, adding up, and that no figure is below zero."""
    totals: dict[str, float] = defaultdict(float)
    for line in (await ask(f"{relay.admin}/metrics")).body.decode().splitlines():
        if not line.startswith("#"):
            sample, value = line.rsplit(maxsplit=1)
            assert float(value) >= 0, line
            totals[sample.partition("{")[0].removeprefix("lucent_relay_")] += float(value)
    gone = [f"events_{term}_total" for term in ("delivered", "purged", "shed")]
    there = ["spool_pending_events", "spool_sealed_events", "dead_letter_events"]
    assert totals["events_accepted_total"] == sum(totals[name] for name in gone + there), totals


def assert_unspoiled(report: dict[str, Any]) -> None:
    """Assert that upstream was given nothing that it would refuse, contradict or come too late for."""
    assert set(report["violations"].values()) == {0}, report
    assert (report["conflicting_batches"], report["after_final_batches"]) == (0, 0), report


async def assert_content(sandbox: Sandbox, sent: Sent, *, is_complete: bool, is_ordered: bool = True) -> None:
    """Assert that each window upstream has the events that were sent, byte for byte, in order, under their envelope."""
    sessions = {session for session, _ in sent.windows}
    arrived: dict[str, dict[str, Any]] = {}
    limiter = trio.CapacityLimiter(CONCURRENT_QUESTIONS)

    async def learn(session: str) -> None:
        async with limiter:
            arrived[session] = await sandbox.session(session)

    async with trio.open_nursery() as nursery:
        known = sessions if is_complete else {session["id"] for session in await sandbox.sessions()}
        for session in known:
            nursery.start_soon(learn, session)
    for session, found in arrived.items():
        if is_ordered:
            _assert_order(found["stored"])
        windows: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for batch in found["stored"]:
            windows[batch["window_id"]] += [(batch["envelope"], digest) for digest in batch["digests"]]
        for name in {window for owner, window in sent.windows if owner == session} | windows.keys():
            expected = expected_events(sent, session, name)
            if not is_complete:
                expected = expected[: len(windows[name])]
            if not is_ordered:
                expected, windows[name] = sorted(expected), sorted(windows[name])
            assert windows[name] == expected, (session, name, len(windows[name]), len(expected))
        if is_complete:
            is_final = any(
                batch.is_final
                for (owner, _), batches in sent.windows.items()
                if owner == session
                for batch in batches.values()
            )
            assert found["final"] == is_final, session


def expected_events(sent: Sent, session: str, window: str) -> list[tuple[str, str]]:
    """Return envelope and digest of each event of a window, in order."""
    batches = sent.windows.get((session, window), {})
    return [entry for _, batch in sorted(batches.items()) for entry in batch.digests()]


def _assert_order(stored: list[dict[str, Any]]) -> None:
    """Assert that each window's batches arrived in order of their numbers, and a final after everything."""
    last: dict[str, int] = {}
    for batch in stored:
        assert batch["order"] > last.get(batch["window_id"], 0), stored
        last[batch["window_id"]] = batch["order"]
    latest = max(batch["order"] for batch in stored)
    assert [batch["order"] for batch in stored if batch["flush"] == "final"] in ([], [latest])
