"""The account of the demo: what the clients sent against what upstream holds, event by event.

Rules:
1. The comparison uses the player's ledger and the sandbox's store alone. The relay's own account is only held
   against them, as one more witness.
2. An event is its bytes and its envelope, in a session and window. Equal ones are told apart by their number:
   the second of two that were sent is matched by the second that is held.
3. Everything that is wrong is a line of plain English; exactly once means that there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from relay.sandbox.service import MAX_PAGE, Sandbox
from relay.spool.values import Account

WindowId: TypeAlias = tuple[str, str]
"""`session.id` and `session.windowId`."""

Events: TypeAlias = Mapping[WindowId, Sequence[bytes]]
"""Identities of events (`session.event_identities`) in order, by window."""


class Comparison(msgspec.Struct, frozen=True):
    """Sent against held, in events."""

    sent: int = 0
    """What clients sent, repeats apart."""
    lost: int = 0
    """Sent, and not held."""
    duplicated: int = 0
    """Held more often than sent."""
    foreign: int = 0
    """Held where nothing like it was sent: changed on the way, or in a wrong session, window or envelope."""
    misordered: int = 0
    """Held after an event of its window that was sent later."""


class Played(msgspec.Struct, frozen=True):
    """What the player did."""

    sessions: int
    """Sessions played."""
    batches: int
    """Client batches there are to send."""
    batches_accepted: int
    """Those answered 200."""
    batches_refused: int
    """Those the relay said no to for good."""
    requests: int
    """Requests made: one a batch, and one more for every time a client had to come again."""
    events_accepted: int
    """Events of the accepted batches."""
    wire_bytes: int
    """Bodies of all requests, gzip."""
    json_bytes: int
    """The same uncompressed."""
    recorded_batches: int
    """Batches in which the SDK sent the same sessions."""
    trouble: str
    """The last answer that was not a 200, or error; empty without any."""


class Reads(msgspec.Struct, frozen=True):
    """What the readers of the data API got."""

    readers: int = 0
    """Readers that asked, at the same time."""
    answered: int = 0
    """Those that were answered with the page, all with the same."""
    newest_issue: str = ""
    """The title of the first issue on it."""


class Result(msgspec.Struct, frozen=True):
    """The demo's outcome; its fields are those of `--json`."""

    exactly_once: bool
    """Whether everything arrived once, whole and in order, and all accounts agree."""
    problems: list[str]
    """Why not, one sentence each."""
    sessions: int
    """Sessions played."""
    recorded_batches: int
    """Batches in which the SDK sent them when they were recorded."""
    events_accepted: int
    """Events answered 200."""
    events_delivered: int
    """Events sent that the sandbox holds."""
    events_lost: int
    """See `Comparison.lost`."""
    events_duplicated: int
    """See `Comparison.duplicated`."""
    events_foreign: int
    """See `Comparison.foreign`."""
    events_misordered: int
    """See `Comparison.misordered`."""
    client_requests: int
    """Requests of clients to the relay."""
    upstream_requests: int
    """Requests of the relay to the sandbox."""
    rate_limited: int
    """Those among them that the sandbox answered 429."""
    bytes_in_wire: int
    """Clients' bodies, gzip."""
    bytes_in_json: int
    """Clients' bodies, uncompressed."""
    bytes_out: int
    """Upstream bodies, gzip."""
    bytes_out_json: int
    """Upstream bodies, uncompressed."""
    budget_minutes_direct: float
    """Minutes of one key's budget that the clients' requests would have cost upstream."""
    budget_minutes_relay: float
    """Minutes of one key's budget that the relay's requests cost."""
    seconds: float
    """From the first batch to the last delivery."""
    data_readers: int
    """Readers that asked the relay for the same page of the data API at once."""
    data_answers: int
    """Those that were answered with it."""
    data_upstream_requests: int
    """Requests of the relay to the sandbox's data API."""
    newest_issue: str
    """The title of the first issue on the page."""


def compare(sent: Events, held: Events) -> Comparison:
    """Compare what was sent with what is held."""
    lost = duplicated = foreign = misordered = 0
    for window in {**sent, **held}:
        places: dict[bytes, deque[int]] = {}
        for index, event in enumerate(sent.get(window, ())):
            places.setdefault(event, deque()).append(index)
        furthest = -1
        for event in held.get(window, ()):
            expected = places.get(event)
            if expected is None:
                foreign += 1
            elif not expected:
                duplicated += 1
            else:
                place = expected.popleft()
                misordered += place < furthest
                furthest = max(furthest, place)
        lost += sum(map(len, places.values()))
    return Comparison(sum(map(len, sent.values())), lost, duplicated, foreign, misordered)


def listings(sandbox: Sandbox) -> Iterator[Mapping[str, Any]]:
    """Yield all sessions of a sandbox with their batches, as `GET /sandbox/session` answers."""
    for offset in range(0, sandbox.report()["sessions"], MAX_PAGE):
        for summary in sandbox.sessions(offset, MAX_PAGE):
            session = sandbox.session(summary["id"])
            if session is not None:
                yield session


def holdings(sessions: Iterable[Mapping[str, Any]]) -> dict[WindowId, list[bytes]]:
    """Return the events that a sandbox holds, in the order in which they would be replayed.

    Args:
        sessions: Its listings.
    """
    held: dict[WindowId, list[bytes]] = {}
    for session in sessions:
        for batch in session["stored"]:
            envelope = bytes.fromhex(batch["envelope"])
            events = held.setdefault((session["id"], batch["window_id"]), [])
            events += [envelope + bytes.fromhex(digest) for digest in batch["digests"]]
    return held


def judge(
    played: Played,
    comparison: Comparison,
    report: Mapping[str, Any],
    account: Account,
    *,
    requests_per_minute: int,
    seconds: float,
    is_drained: bool = True,
    reads: Reads | None = None,
) -> Result:
    """Add up.

    Args:
        played: What the clients did.
        comparison: Of the ledger with the sandbox's store.
        report: The sandbox's.
        account: The relay's, taken before the report.
        requests_per_minute: A key's budget.
        seconds: How long it took.
        is_drained: Whether the relay had the time to deliver everything. If not, it was stopped in order, and what is
            neither upstream nor spooled is lost.
        reads: Of the data API, where any were made.
    """
    reads = reads or Reads()
    backlog = 0 if is_drained else account.spooled
    comparison = msgspec.structs.replace(comparison, lost=comparison.lost - backlog)
    problems = _problems(played, comparison, report, account, backlog)
    unread = reads.readers - reads.answered
    if unread:
        problems.append(f"{unread} of {reads.readers} readers of the data API did not get the page")
    return Result(
        exactly_once=not problems,
        problems=problems,
        sessions=played.sessions,
        recorded_batches=played.recorded_batches,
        events_accepted=played.events_accepted,
        events_delivered=comparison.sent - comparison.lost - backlog,
        events_lost=comparison.lost,
        events_duplicated=comparison.duplicated,
        events_foreign=comparison.foreign,
        events_misordered=comparison.misordered,
        client_requests=played.requests,
        upstream_requests=report["requests"],
        rate_limited=report["rate_limited"],
        bytes_in_wire=played.wire_bytes,
        bytes_in_json=played.json_bytes,
        bytes_out=report["wire_bytes"],
        bytes_out_json=report["decoded_bytes"],
        budget_minutes_direct=played.requests / requests_per_minute,
        budget_minutes_relay=report["requests"] / requests_per_minute,
        seconds=round(seconds, 3),
        data_readers=reads.readers,
        data_answers=reads.answered,
        data_upstream_requests=report["data_api"]["reads"],
        newest_issue=reads.newest_issue,
    )


def _problems(
    played: Played, comparison: Comparison, report: Mapping[str, Any], account: Account, backlog: int
) -> list[str]:
    """Return everything that is wrong, causes before their consequences; `backlog` events may be spooled."""
    unsent = played.batches - played.batches_accepted - played.batches_refused
    violations = sum(report["violations"].values())
    trouble = f" ({played.trouble})" if played.trouble else ""
    found = [
        (unsent, f"{unsent:,} of {played.batches:,} client batches were not accepted in time{trouble}"),
        (played.batches_refused, f"{played.batches_refused:,} client batches were refused by the relay{trouble}"),
        (account.spooled - backlog, f"{account.spooled:,} accepted events are still in the relay's spool"),
        (violations, f"{violations:,} upstream batches broke upstream's rules"),
        (report["conflicting_batches"], "two upstream batches bore the same number and said different things"),
        (report["after_final_batches"], "a session went on upstream after its final batch"),
        (comparison.lost, f"{comparison.lost:,} events that were sent are not upstream"),
        (comparison.duplicated, f"{comparison.duplicated:,} events are upstream more often than they were sent"),
        (comparison.foreign, f"{comparison.foreign:,} events are upstream that nobody sent like that"),
        (comparison.misordered, f"{comparison.misordered:,} events are upstream out of order"),
        (not account.is_balanced, "the relay's account does not balance"),
        # What a client was told too late, and what is in flight, leave room between the witnesses; where all is
        # told and nothing is in flight, there is none.
        (
            not played.events_accepted <= account.accepted <= comparison.sent,
            f"the relay says it accepted {account.accepted:,} events; clients were told {played.events_accepted:,}",
        ),
        (
            not account.delivered <= report["events"] <= account.delivered + account.spooled,
            f"the relay says it delivered {account.delivered:,} events; upstream holds {report['events']:,}",
        ),
    ]
    return [problem for is_wrong, problem in found if is_wrong]
