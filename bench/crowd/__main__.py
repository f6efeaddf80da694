"""The whole relay, installed and in real time, on one key that is too small for its crowd.

    python -m bench.crowd [--sessions 100] [--seconds 600] [--requests-per-minute 100] [--seed 1] [--json]

Clients play sessions made of the recorded ones over HTTP, at life's pace, to `lucent-relay run` before a strict
`lucent-relay sandbox`. When the time is up the relay is stopped in order, and started once more without its upstream
to say what is on its disk. Exit status 0 if every target holds. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson
import trio

from bench import servers
from bench.crowd.scripts import Scripts, excerpt
from bench.crowd.upstream import Holdings, Stored, counts, delivery_delays, get, read_holdings, requests_between
from bench.simulate.figures import Delays
from bench.simulate.optimum import fewest_requests
from bench.simulate.traffic import arrivals
from relay.config import Batch, Upstream
from relay.demo.audit import Result, compare, holdings, judge
from relay.demo.player import Player
from relay.http.client import HttpClient
from relay.ops.inquiry import Unreachable, ask
from relay.protocol.cut import Limits
from relay.spool.values import Account

MAX_RATIO = 1.05
"""Requests of a saturated relay / the fewest that could carry the same events."""

MIN_ALLOWANCE_SHARE = 0.97
"""Of the requests that a saturated key allows."""

_BURST_SHARE = 0.5
"""Of a minute's requests: what a key that was idle spends on whatever there is, before requests become scarce."""

_SETTLE_SECONDS = 60.0
"""After these a saturated key's window is full; and as long at least the share of the allowance is measured."""

_GRACE_SECONDS = 30.0
"""For clients to be through with what was due, on a busy machine."""


class Report(msgspec.Struct, frozen=True):
    """What a run found."""

    problems: list[str]
    """What is not as promised, one sentence each."""
    sessions: int
    """At a time; where one ends the next begins."""
    seconds: float
    requests_per_minute: int
    result: Result
    """The audit: what clients sent against what upstream holds and the spool keeps."""
    account: Account
    """The relay's, read from its disk by a second relay."""
    fewest_of_all: int
    """The fewest requests that could have carried everything that was sent."""
    fewest: int
    """The fewest that could carry what is upstream."""
    ratio: float
    """Requests used / `fewest`."""
    saturated_requests: int
    """Requests after the first burst."""
    saturated_fewest: int
    """The fewest that could carry what these did."""
    saturated_ratio: float
    allowance_share: float | None
    """Of the key's requests, used after the first minute; None where the time is too short to say."""
    delays: Delays
    """From when a client had an event ready to upstream's yes; over the events upstream."""
    forward: dict[str, Any]
    """What the relay said of it: `batches_by_reason`, `wait_seconds`, `fullness_ratio`, `delivery_seconds`."""
    resident_peak_megabytes: float
    """The most memory that the relay ever had."""
    cpu_share: float
    """Of one core, the relay's."""


def measure(options: argparse.Namespace) -> Report:
    """Run the crowd."""
    scripts = Scripts(arrivals("mix", options.sessions, options.seconds, options.seed))
    player = Player(scripts.recordings, len(scripts.recordings), speed=1.0, connections=options.sessions)
    budget = options.requests_per_minute
    with (
        tempfile.TemporaryDirectory(prefix="relay-bench-", dir=options.directory) as folder,
        servers.sandbox_server(None, budget) as upstream,
    ):
        with servers.relay_server(None, Path(folder), "fsync", upstream, budget) as relay:
            began_at = trio.run(_play, player, relay, upstream, options)
            forward = _status(relay)["forward"]
            usage = relay.usage()
        with servers.relay_server(None, Path(folder), "fsync", None) as relay:
            account = msgspec.convert(_status(relay)["account"], Account)
        names = [recording.session_id for recording in scripts.recordings]
        held = trio.run(read_holdings, upstream, names)
    result = judge(
        player.played(),
        compare(player.ledger, holdings(held.sessions)),
        held.report,
        account,
        requests_per_minute=budget,
        seconds=options.seconds,
        is_drained=False,
    )
    return _report(options, scripts, held, began_at, result, account, forward, usage)


async def _play(player: Player, relay: servers.Server, upstream: str, options: argparse.Namespace) -> float:
    """Play for as long as asked; returns when that began, by the sandbox's clock."""
    sandbox = HttpClient(upstream, Upstream())
    client = HttpClient("http://{}:{}".format(*relay.address), Upstream(max_idle_connections=options.sessions))
    try:
        began_at: float = (await get(sandbox, "/sandbox/report"))["elapsed_seconds"]
        ends_at = trio.current_time() + options.seconds
        with trio.move_on_at(ends_at + _GRACE_SECONDS):
            await player.run(client)
            await trio.sleep_until(ends_at)
    finally:
        await client.aclose()
        await sandbox.aclose()
    return began_at


def _status(relay: servers.Server) -> dict[str, Any]:
    answer = ask(relay.admin)
    if isinstance(answer, Unreachable):
        raise ConnectionError(answer.reason)
    status: dict[str, Any] = orjson.loads(answer.status)
    return status


def _report(
    options: argparse.Namespace,
    scripts: Scripts,
    held: Holdings,
    began_at: float,
    result: Result,
    account: Account,
    forward: dict[str, Any],
    usage: servers.Usage,
) -> Report:
    limits = Limits(Batch().max_events, Batch().max_bytes)
    budget = options.requests_per_minute
    batches = held.batches(began_at)
    burst = [batch for batch in batches if batch.order <= budget * _BURST_SHARE]
    wasted = result.upstream_requests - len(batches)
    fewest = fewest_requests(excerpt(scripts.trace, {}, counts(batches)), limits)
    after_burst = fewest_requests(excerpt(scripts.trace, counts(burst), counts(batches)), limits)
    requests = len(batches) - len(burst) + wasted
    names = ("batches_by_reason", "wait_seconds", "fullness_ratio", "delivery_seconds")
    found = Report(
        problems=list(result.problems),
        sessions=options.sessions,
        seconds=options.seconds,
        requests_per_minute=budget,
        result=result,
        account=account,
        fewest_of_all=fewest_requests(scripts.trace, limits),
        fewest=fewest,
        ratio=result.upstream_requests / max(1, fewest),
        saturated_requests=requests,
        saturated_fewest=after_burst,
        saturated_ratio=requests / max(1, after_burst),
        allowance_share=_allowance_share(batches, budget, options.seconds),
        delays=delivery_delays(scripts.trace, batches),
        forward={name: forward[name] for name in names},
        resident_peak_megabytes=usage.peak_resident_bytes / 1e6,
        cpu_share=usage.cpu_seconds / options.seconds,
    )
    found.problems.extend(_missed_targets(found))
    return found


def _allowance_share(batches: list[Stored], budget: int, seconds: float) -> float | None:
    if seconds < 2 * _SETTLE_SECONDS:
        return None
    allowed = budget * (seconds - _SETTLE_SECONDS) / 60
    return requests_between(batches, _SETTLE_SECONDS, seconds) / allowed


def _missed_targets(report: Report) -> Iterator[str]:
    if report.result.rate_limited:
        yield f"{report.result.rate_limited} requests were answered 429"
    if report.fewest_of_all <= report.requests_per_minute * report.seconds / 60:
        return  # a key with room to spare is in no need of saving
    if report.saturated_ratio > MAX_RATIO:
        yield f"{report.saturated_ratio:.3f} times the optimum's requests, more than {MAX_RATIO}"
    if report.allowance_share is not None and report.allowance_share < MIN_ALLOWANCE_SHARE:
        yield f"{report.allowance_share:.1%} of the allowance used, less than {MIN_ALLOWANCE_SHARE:.0%}"


def lines_of(report: Report) -> Iterator[str]:
    """Yield the report for people, a Markdown table."""
    result, account = report.result, report.account
    share = "too short to say" if report.allowance_share is None else f"{report.allowance_share:.1%}"
    yield "| figure | |"
    yield "|---|---:|"
    rows = {
        "sessions at a time, of all": f"{report.sessions}, {result.sessions}",
        "client batches": f"{result.client_requests:,}",
        "requests allowed": f"{report.requests_per_minute * report.seconds / 60:,.0f}",
        "requests that everything would need at least": f"{report.fewest_of_all:,}",
        "requests used": f"{result.upstream_requests:,}",
        "answered 429": f"{result.rate_limited}",
        "requests / optimum, saturated": f"{report.saturated_ratio:.3f}",
        "requests / optimum, with the first burst": f"{report.ratio:.3f}",
        "of the allowance, after the first minute": share,
        "events accepted": f"{account.accepted:,}",
        "delivered": f"{account.delivered:,}",
        "spooled": f"{account.spooled:,}",
        "lost, duplicated, changed, out of order": (
            f"{result.events_lost}, {result.events_duplicated}, {result.events_foreign}, {result.events_misordered}"
        ),
        "delay p50, p95, max of what is upstream, s": (
            f"{report.delays.p50:.0f}, {report.delays.p95:.0f}, {report.delays.max:.0f}"
        ),
        "mean fullness": f"{report.forward['fullness_ratio']['mean']:.0%}",
        "why sent": ", ".join(f"{name} {count}" for name, count in sorted(report.forward["batches_by_reason"].items())),
        "resident at most, MB": f"{report.resident_peak_megabytes:.0f}",
        "CPU, of one core": f"{report.cpu_share:.1%}",
    }
    for name, text in rows.items():
        yield f"| {name} | {text} |"


def main() -> int:
    """Run the crowd that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.crowd", description="The whole relay under a crowd.")
    parser.add_argument("--sessions", type=int, default=100, help="at a time (100)")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long they play (600)")
    parser.add_argument("--requests-per-minute", type=int, default=100, help="upstream's limit and the budget (100)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (1)")
    parser.add_argument("--directory", default=None, help="where the spool is made (the system's for temporary files)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    if min(options.sessions, options.seconds, options.requests_per_minute) < 1:
        parser.error("there is nothing to see without a session, a second and a limit")
    report = measure(options)
    if options.json:
        print(msgspec.json.encode(report).decode())
    else:
        print("\n".join(lines_of(report)))
    for problem in report.problems:
        print(problem, file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
