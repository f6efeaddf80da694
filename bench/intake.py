"""How fast the relay says yes, beside the fastest yes that its listener could say.

    python -m bench.intake [--size small|medium|large|all] [--seconds S] [--rounds N] [--json]

Two servers share one core and take turns under the same load from another core: the no-op, which is the relay's
listener with a handler that only answers, and the relay itself, which answers once a batch is checked, cut,
compressed, committed and synced to the disk. What the relay adds is the quotient of the two, round by round, so that
a machine that is faster today than yesterday changes little.

README.md says what is in the load, and what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench import servers
from bench.bodies import SIZES, Sessions, cut_slices
from bench.load import Fresh, Load, Measured, Recurring, Request
from bench.report import show

CONNECTIONS = 64
"""Clients at a time: some hundred browsers behind their keep-alive, or a load balancer's pool."""

_WARM_UP_SECONDS = 1.0
"""Before the first round of each size: caches, the first checkpoint, imports made late."""

_PREPARED = 2_000
"""Requests that the no-op's rounds go through; the relay's first round has no rate to go by, so it has as many."""

_SYNCS = 100
"""Syncs of the probe, a few hundredths of a second."""

_PAGE_BYTES = 16_384
"""The spool's page, so what a small commit writes."""

_COLUMNS = (
    "requests/s",
    "MB/s of JSON",
    "CPU s/GB",
    "CPU µs each",
    "CPU",
    "p50 ms",
    "p99 ms",
    "resident MB",
    "refused",
    "load",
)


class Round(msgspec.Struct, frozen=True):
    """One server under the load for a while."""

    requests_per_second: float
    json_megabytes_per_second: float
    cpu_seconds_per_gigabyte: float
    """Of the server, a GB of JSON; 0 where the system does not say."""
    cpu_us_per_request: float
    """Of the server; unlike the rate, hardly touched by whatever else runs on the machine."""
    cpu_share: float
    """Of the server's core; well under 1 where the server waited, or something else took its core."""
    p50_ms: float
    """Median time from send to answer."""
    p99_ms: float
    resident_megabytes: float
    """Of the server, when the round was over."""
    refused: int
    """Answers other than 200."""
    load_share: float
    """Of the load's core; near 1 it would be the load that is measured."""


class SizeReport(msgspec.Struct, frozen=True):
    """All rounds of one size."""

    json_bytes: int
    """Mean JSON of a body."""
    wire_bytes: int
    """Mean request, head included."""
    noop: list[Round]
    relay: list[Round]
    ratios: list[float]
    """Requests a second, relay by no-op, round by round."""
    resident_start_megabytes: float
    """The relay's, before the first request."""
    resident_peak_megabytes: float
    """The most that the relay ever had."""
    spool_megabytes: float
    """What the spool had grown to."""


class Report(msgspec.Struct, frozen=True):
    """What a run found."""

    durability: str
    upstream: str
    is_pinned: bool
    """Whether server and load had a core each."""
    sync_ms: float
    """What this disk takes to write a page and sync it, on its own."""
    connections: int
    seconds: float
    """Of each round."""
    sizes: dict[str, SizeReport]


def measure_sync(folder: Path) -> float:
    """Return the mean seconds of writing one page and syncing it, on the disk of `folder`."""
    with tempfile.TemporaryFile(dir=folder) as file:
        page = os.urandom(_PAGE_BYTES)
        began = time.perf_counter()
        for number in range(_SYNCS):
            os.pwrite(file.fileno(), page, number * _PAGE_BYTES)
            os.fsync(file.fileno())
        return (time.perf_counter() - began) / _SYNCS


def measure_size(
    size: str, arguments: argparse.Namespace, core: int | None, upstream: str | None, seed: int
) -> SizeReport:
    """Run the rounds of one size, no-op and relay by turns."""
    fresh = Fresh(Sessions(cut_slices(SIZES[size]), seed).next_body, "127.0.0.1")
    fresh.prepare(_PREPARED)
    recurring = Recurring([fresh() for _ in range(_PREPARED)])
    with contextlib.ExitStack() as stack:
        noop = stack.enter_context(servers.noop_server(core))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-", dir=arguments.directory))
        relay = stack.enter_context(servers.relay_server(core, Path(folder), arguments.durability, upstream))
        resident_start = relay.usage().resident_bytes
        rate = 0.0
        noop_rounds, relay_rounds = [], []
        json_bytes = wire_bytes = answered = 0
        for number in range(arguments.rounds + 1):  # the first is to warm up
            seconds = arguments.seconds if number else _WARM_UP_SECONDS
            fresh.prepare(int(rate * seconds * 1.25))
            noop_round, _ = _measure(noop, recurring, arguments.connections, seconds)
            relay_round, measured = _measure(relay, fresh, arguments.connections, seconds)
            rate = relay_round.requests_per_second
            if number:
                noop_rounds.append(noop_round)
                relay_rounds.append(relay_round)
                json_bytes += measured.json_bytes
                wire_bytes += measured.wire_bytes
                answered += measured.answers_by_status.get(200, 0)
        return SizeReport(
            json_bytes // max(answered, 1),
            wire_bytes // max(answered, 1),
            noop_rounds,
            relay_rounds,
            [
                ours.requests_per_second / theirs.requests_per_second
                for ours, theirs in zip(relay_rounds, noop_rounds, strict=True)
            ],
            resident_start / 1e6,
            relay.usage().peak_resident_bytes / 1e6,
            sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6,
        )


def _measure(
    server: servers.Server, next_request: Callable[[], Request], connections: int, seconds: float
) -> tuple[Round, Measured]:
    """Put a server under the load once; connections are new, since a server closes those that were long idle."""
    with contextlib.closing(Load(server.address, connections)) as load:
        before = server.usage()
        measured = load.run(next_request, seconds)
        after = server.usage()
    cpu = after.cpu_seconds - before.cpu_seconds
    accepted = measured.answers_by_status.get(200, 0)
    found = Round(
        requests_per_second=accepted / measured.seconds,
        json_megabytes_per_second=measured.json_bytes / measured.seconds / 1e6,
        cpu_seconds_per_gigabyte=cpu / (measured.json_bytes / 1e9) if measured.json_bytes else 0.0,
        cpu_us_per_request=cpu / accepted * 1e6 if accepted else 0.0,
        cpu_share=cpu / measured.seconds,
        p50_ms=measured.latency(0.5) * 1e3,
        p99_ms=measured.latency(0.99) * 1e3,
        resident_megabytes=after.resident_bytes / 1e6,
        refused=sum(measured.answers_by_status.values()) - accepted,
        load_share=measured.busy_share,
    )
    return found, measured


def measure(arguments: argparse.Namespace) -> Report:
    """Run the benchmark."""
    cores = servers.choose_cores()
    folder = Path(arguments.directory)
    with contextlib.ExitStack() as stack:
        servers.pin(cores.load)
        sync_seconds = measure_sync(folder)
        upstream = stack.enter_context(servers.sandbox_server(cores.load, 0)) if arguments.upstream == "sink" else None
        sizes = list(SIZES) if arguments.size == "all" else [arguments.size]
        return Report(
            arguments.durability,
            arguments.upstream,
            cores.server is not None,
            sync_seconds * 1e3,
            arguments.connections,
            arguments.seconds,
            {size: measure_size(size, arguments, cores.server, upstream, seed) for seed, size in enumerate(sizes)},
        )


def lines_of(report: Report) -> Iterator[str]:
    """Yield the report for people, the tables as Markdown."""
    yield (
        f"{report.connections} connections, durability {report.durability}, upstream {report.upstream}, "
        f"{'one core each for server and load' if report.is_pinned else 'server and load share the cores'}, "
        f"page write and sync {report.sync_ms:.2f} ms"
    )
    for name, size in report.sizes.items():
        yield ""
        yield f"{name}: {size.json_bytes / 1e3:.1f} KB of JSON, {size.wire_bytes / 1e3:.1f} KB on the wire"
        yield ""
        yield "| server | " + " | ".join(_COLUMNS) + " |"
        yield "|---" + "|---:" * len(_COLUMNS) + "|"
        for number, (noop, relay) in enumerate(zip(size.noop, size.relay, strict=True), 1):
            yield _row(f"no-op {number}", noop)
            yield _row(f"relay {number}", relay)
        yield ""
        yield (
            f"relay / no-op: {statistics.median(size.ratios):.1%} ({min(size.ratios):.1%} to {max(size.ratios):.1%}), "
            f"by CPU time {_by_cpu(size):.1%}"
        )
        yield (
            f"resident: {size.resident_start_megabytes:.0f} MB at the start, {size.resident_peak_megabytes:.0f} MB at "
            f"most, while the spool grew to {size.spool_megabytes:.0f} MB"
        )


def _by_cpu(size: SizeReport) -> float:
    """Return what the ratio would be if both servers had their core to themselves and never waited."""
    ours = statistics.median(found.cpu_us_per_request for found in size.relay)
    return statistics.median(found.cpu_us_per_request for found in size.noop) / ours if ours else 0.0


def _row(name: str, found: Round) -> str:
    values = (
        f"{found.requests_per_second:,.0f}",
        f"{found.json_megabytes_per_second:.0f}",
        f"{found.cpu_seconds_per_gigabyte:.2f}",
        f"{found.cpu_us_per_request:.0f}",
        f"{found.cpu_share:.0%}",
        f"{found.p50_ms:.1f}",
        f"{found.p99_ms:.1f}",
        f"{found.resident_megabytes:.0f}",
        f"{found.refused}",
        f"{found.load_share:.0%}",
    )
    return f"| {name} | " + " | ".join(values) + " |"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.intake", description="Measure how fast the relay says yes.")
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all", help="of the batches")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=5, help="of each size and server")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help="keep-alive connections")
    parser.add_argument("--durability", choices=["fsync", "os"], default="fsync", help="the relay's spool.durability")
    parser.add_argument("--upstream", choices=["down", "sink"], default="down", help="what the relay forwards to")
    parser.add_argument("--directory", default=".", help="for the spool; a real disk, or the syncs are none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    report = measure(arguments)
    show(report, lines_of, as_json=arguments.json)


if __name__ == "__main__":
    main()
