from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from relay.demo.audit import Comparison, Played, Reads, compare, holdings, judge, listings
from relay.demo.session import encode_batch, event_identities, recut
from relay.http.message import Request
from relay.sandbox.report import Report
from relay.sandbox.service import REPLAY_PATH, Sandbox, SandboxSettings
from relay.spool.values import Account
from tests.component.test_demo_session import recorded

W = ("s", "w")
OTHER = ("s", "other")

PLAYED = Played(
    sessions=1,
    batches=4,
    batches_accepted=4,
    batches_refused=0,
    requests=4,
    events_accepted=20,
    wire_bytes=100,
    json_bytes=1_000,
    recorded_batches=1,
    trouble="",
)
ACCOUNT = Account(
    accepted=20,
    delivered=20,
    dead_lettered=0,
    damaged=0,
    purged=0,
    shed=0,
    shed_by_reason={},
    pending=0,
    sealed=0,
    segments=0,
    dead_letters=0,
    dead_letter_bytes=0,
    lag_seconds=0.0,
    spooled=0,
    is_balanced=True,
)
REPORT = msgspec.to_builtins(Report(requests=2, events=20, wire_bytes=60, decoded_bytes=900))
CLEAN = Comparison(sent=20)

events = st.lists(st.integers(0, 5).map(lambda number: bytes([number])), max_size=12)


@given(events)
def test_what_arrived_as_sent_is_clean(sent: list[bytes]) -> None:
    """Nothing is wrong with equal lists, also where equal events repeat."""
    assert compare({W: sent}, {W: sent} if sent else {}) == Comparison(len(sent))


@given(events, events)
def test_events_are_conserved(sent: list[bytes], held: list[bytes]) -> None:
    """Whatever is held: held = sent - lost + duplicated + foreign."""
    found = compare({W: sent}, {W: held})
    assert len(held) == len(sent) - found.lost + found.duplicated + found.foreign


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({W: [b"a", b"c"]}, Comparison(3, lost=1)),
        ({}, Comparison(3, lost=3)),
        ({W: [b"a", b"b", b"b", b"c"]}, Comparison(3, duplicated=1)),
        ({W: [b"a", b"b", b"c", b"a"]}, Comparison(3, duplicated=1)),
        ({W: [b"a", b"c", b"b"]}, Comparison(3, misordered=1)),
        ({W: [b"c", b"a", b"b"]}, Comparison(3, misordered=2)),
        ({W: [b"a", b"B", b"c"]}, Comparison(3, lost=1, foreign=1)),
        ({W: [b"a", b"b"], OTHER: [b"c"]}, Comparison(3, lost=1, foreign=1)),
    ],
    ids=["lost", "all lost", "twice", "twice and late", "swapped", "moved", "changed", "elsewhere"],
)
def test_each_fault_is_found(held: dict[tuple[str, str], list[bytes]], expected: Comparison) -> None:
    """A lost, a repeated, a misplaced and a changed event are each found, and found for what they are."""
    assert compare({W: [b"a", b"b", b"c"]}, held) == expected


@given(st.permutations(range(8)))
def test_order_is_clean_only_in_order(places: list[int]) -> None:
    """Every order but the one that was sent counts as misordered."""
    sent = [bytes([place]) for place in range(8)]
    found = compare({W: sent}, {W: [bytes([place]) for place in places]})
    assert (found.misordered == 0) == (places == sorted(places))
    assert (found.lost, found.duplicated, found.foreign) == (0, 0, 0)


async def test_holdings_are_what_was_sent() -> None:
    """What a sandbox was sent is found in it in order of sequence, whatever the order of arrival."""
    sandbox = Sandbox(SandboxSettings(), now=trio.current_time, random=random.Random(0))
    recording = recut([recorded("w1", [(1, 0)] * 30), recorded("w2", [(2, 0)] * 3)])
    ledger: dict[tuple[str, str], list[bytes]] = {}
    numbered = list(enumerate(recording.batches))
    for _, batch in numbered:
        ledger.setdefault(("s", batch.window_id), []).extend(event_identities(batch, "s"))
    for sequence, batch in reversed(numbered):
        headers = {b"x-lucent-api-key": b"luc_pk_x"}
        request = Request("POST", REPLAY_PATH, b"", headers, encode_batch(batch, "s", sequence))
        assert (await sandbox.replay(request)).status == 200
    held = holdings(listings(sandbox))
    assert held == ledger
    assert compare(ledger, held) == Comparison(33)


def verdict(
    played: Played = PLAYED, comparison: Comparison = CLEAN, account: Account = ACCOUNT, **report: Any
) -> list[str]:
    """Return the problems of a run that is clean but for what is given."""
    result = judge(played, comparison, {**REPORT, **report}, account, requests_per_minute=100, seconds=1.0)
    assert result.exactly_once == (not result.problems)
    return result.problems


def test_a_clean_run_adds_up() -> None:
    """Without a fault the verdict is yes, and the figures are those of the witnesses."""
    result = judge(PLAYED, CLEAN, REPORT, ACCOUNT, requests_per_minute=100, seconds=1.23456)
    assert result.exactly_once
    assert (result.events_accepted, result.events_delivered, result.events_lost) == (20, 20, 0)
    assert (result.client_requests, result.upstream_requests) == (4, 2)
    assert (result.budget_minutes_direct, result.budget_minutes_relay) == (0.04, 0.02)
    assert (result.bytes_in_wire, result.bytes_in_json, result.bytes_out, result.bytes_out_json) == (100, 1000, 60, 900)


def test_a_page_that_is_not_read_is_a_no() -> None:
    """A reader who does not get the page makes the verdict no, and says how many there were."""
    reads = Reads(readers=10, answered=9)
    result = judge(PLAYED, CLEAN, REPORT, ACCOUNT, requests_per_minute=100, seconds=1.0, reads=reads)
    assert result.problems == ["1 of 10 readers of the data API did not get the page"]


@pytest.mark.parametrize("fault", ["lost", "duplicated", "foreign", "misordered"])
def test_one_event_is_enough_for_a_no(fault: str) -> None:
    """A single event that is not as sent makes the verdict no."""
    assert len(verdict(comparison=msgspec.structs.replace(CLEAN, **{fault: 1}))) == 1


def test_every_witness_can_say_no() -> None:
    """The relay's account, the sandbox's report and the clients each make the verdict no by themselves."""
    replace = msgspec.structs.replace
    assert verdict(account=replace(ACCOUNT, is_balanced=False)) == ["the relay's account does not balance"]
    assert "accepted 21 events; clients were told 20" in verdict(account=replace(ACCOUNT, accepted=21))[0]
    assert "delivered 19 events; upstream holds 20" in verdict(account=replace(ACCOUNT, delivered=19))[0]
    assert "still in the relay's spool" in verdict(account=replace(ACCOUNT, delivered=18, spooled=2))[0]
    assert verdict(violations={"invalid": 3}) == ["3 upstream batches broke upstream's rules"]
    assert len(verdict(conflicting_batches=1)) == 1
    assert len(verdict(after_final_batches=1)) == 1
    assert verdict(replace(PLAYED, batches_accepted=3, batches_refused=1, trouble="last: 400")) == [
        "1 client batches were refused by the relay (last: 400)"
    ]


def test_a_backlog_on_disk_is_no_loss() -> None:
    """Of a relay that was stopped before it was done, only what is neither upstream nor spooled is lost."""
    replace = msgspec.structs.replace
    account, report = replace(ACCOUNT, delivered=15, pending=5, spooled=5), {**REPORT, "events": 15}
    for missing, lost in ((5, 0), (6, 1)):
        comparison = replace(CLEAN, lost=missing)
        result = judge(PLAYED, comparison, report, account, requests_per_minute=100, seconds=1.0, is_drained=False)
        assert (result.events_lost, result.events_delivered) == (lost, 20 - missing)
        assert result.problems == ["1 events that were sent are not upstream"] * lost


def test_time_that_is_up_is_no_contradiction() -> None:
    """Where deliveries are in flight and answers outstanding, only what is missing is named."""
    replace = msgspec.structs.replace
    problems = verdict(
        replace(PLAYED, batches_accepted=3, events_accepted=15),
        replace(CLEAN, lost=3),
        replace(ACCOUNT, accepted=20, delivered=12, sealed=8, spooled=8),
        events=17,
    )
    assert problems == [
        "1 of 4 client batches were not accepted in time",
        "8 accepted events are still in the relay's spool",
        "3 events that were sent are not upstream",
    ]
