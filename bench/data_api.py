"""What reading through the relay costs and saves, beside reading directly, in the same run.

    python -m bench.data_api [--seconds S] [--rounds N] [--readers-seconds S] [--json]

Three ways to the same page take turns: directly from the origin; through the relay with every request going on to the
origin; and from what the relay keeps. Then one reader takes a large answer slowly while the relay's memory is watched,
and ten readers poll the page while the origin counts what it is asked.

README.md says what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench import servers
from bench.data_origin import LARGE_BYTES
from bench.load import Load, Recurring, Request
from bench.report import show

CONNECTIONS = 16
"""Readers at a time, for the rate."""

READERS = 10
"""That poll the page once a second."""

SLOW_BYTES_PER_SECOND = 20_000_000
"""Of the slow reader: a fiftieth of what loopback could, and the large answer takes five seconds."""

_WAYS = ("direct", "passed on", "kept")


class Round(msgspec.Struct, frozen=True):
    """One way, for a while."""

    requests_per_second: float
    """Over `CONNECTIONS` connections."""
    cpu_us_per_request: float
    """Of the relay; 0 where it has no part."""
    p50_ms: float
    """Of one reader alone."""
    p99_ms: float
    """Of one reader alone."""


class Report(msgspec.Struct, frozen=True):
    """What a run found."""

    page_bytes: int
    """Of the page."""
    rounds: dict[str, list[Round]]
    """By way."""
    slow_seconds: float
    """That the slow reader took."""
    resident_before_megabytes: float
    """The relay's, before the slow reader."""
    resident_peak_megabytes: float
    """The most while it read."""
    polls: int
    """Requests of the ten readers."""
    polls_upstream: int
    """What these cost upstream."""
    polls_seconds: float
    """How long they polled."""


def render(target: str, address: tuple[str, int], *lines: str) -> Request:
    """Return a request as bytes."""
    head = [f"GET {target} HTTP/1.1", "Host: {}:{}".format(*address), "Authorization: Bearer luc_api_bench", *lines]
    return Request("\r\n".join([*head, "\r\n"]).encode(), 0)


def measure_round(server: servers.Server, request: Request, seconds: float, relay: servers.Server | None) -> Round:
    """Put one way under one reader, and then under many."""
    with contextlib.closing(Load(server.address, 1)) as load:
        alone = load.run(Recurring([request]), seconds)
    before = relay.usage().cpu_seconds if relay else 0.0
    with contextlib.closing(Load(server.address, CONNECTIONS)) as load:
        many = load.run(Recurring([request]), seconds)
    cpu = relay.usage().cpu_seconds - before if relay else 0.0
    answered = many.answers_by_status.get(200, 0)
    assert answered == sum(many.answers_by_status.values()), many.answers_by_status
    return Round(answered / many.seconds, cpu / answered * 1e6, alone.latency(0.5) * 1e3, alone.latency(0.99) * 1e3)


def read_slowly(relay: servers.Server) -> tuple[float, float, float]:
    """Read the large answer; returns the seconds it took, and the relay's memory before and at most, in MB."""
    before = peak = relay.usage().resident_bytes
    began = time.perf_counter()
    received = 0
    with socket.create_connection(relay.address) as connection:
        connection.sendall(render("/api/v1/insights", relay.address, "Connection: close").wire)
        while data := connection.recv(65_536):
            received += len(data)
            peak = max(peak, relay.usage().resident_bytes)
            time.sleep(max(0.0, received / SLOW_BYTES_PER_SECOND - (time.perf_counter() - began)))
    assert received > LARGE_BYTES, received
    return time.perf_counter() - began, before / 1e6, peak / 1e6


def count_asked(origin: servers.Server) -> int:
    """Return how often the origin was asked for the page."""
    connection = http.client.HTTPConnection(*origin.address, timeout=10)
    connection.request("GET", "/count")
    asked: int = json.loads(connection.getresponse().read())["asked"]
    connection.close()
    return asked


def poll(relay: servers.Server, origin: servers.Server, seconds: float) -> tuple[int, int]:
    """Let ten readers poll the page; returns their requests and what these cost upstream."""
    before, polls = count_asked(origin), 0
    target = "/api/v1/issues?limit=25"
    began = time.perf_counter()
    connections = [http.client.HTTPConnection(*relay.address, timeout=10) for _ in range(READERS)]
    while time.perf_counter() - began < seconds:
        for connection in connections:
            connection.request("GET", target, headers={"Authorization": "Bearer luc_api_bench"})
            response = connection.getresponse()
            assert response.status == 200, response.status
            response.read()
            polls += 1
        time.sleep(max(0.0, polls / READERS - (time.perf_counter() - began)))
    for connection in connections:
        connection.close()
    return polls, count_asked(origin) - before


def measure(arguments: argparse.Namespace) -> Report:
    """Run the benchmark."""
    cores = servers.choose_cores()
    servers.pin(cores.load)
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(servers.data_origin(cores.load))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-"))
        relay = stack.enter_context(
            servers.relay_server(
                *(cores.server, Path(folder), "os", None),
                upstream__data_url="http://{}:{}".format(*origin.address),
                data_api__reads_per_minute=0,
            )
        )
        page = "/api/v1/issues"
        ways = {
            "direct": (origin, render(page, origin.address), None),
            "passed on": (relay, render(page, relay.address, "Cache-Control: no-store"), relay),
            "kept": (relay, render(page, relay.address), relay),
        }
        rounds: dict[str, list[Round]] = {way: [] for way in _WAYS}
        for number in range(arguments.rounds + 1):  # the first is to warm up
            for way, (server, request, counted) in ways.items():
                found = measure_round(server, request, arguments.seconds if number else 0.5, counted)
                if number:
                    rounds[way].append(found)
        slow = read_slowly(relay)
        polls = poll(relay, origin, arguments.readers_seconds)
        connection = http.client.HTTPConnection(*origin.address, timeout=10)
        connection.request("GET", page)
        size = len(connection.getresponse().read())
        connection.close()
        return Report(size, rounds, *slow, *polls, arguments.readers_seconds)


def lines_of(report: Report) -> Iterator[str]:
    """Yield the report for people, the table as Markdown."""

    def median(way: str, field: str) -> float:
        values: list[float] = [getattr(each, field) for each in report.rounds[way]]
        return statistics.median(values)

    yield f"a page of {report.page_bytes / 1e3:.1f} KB; medians of {len(report.rounds['direct'])} rounds"
    yield ""
    yield "| way | requests/s | of direct | relay CPU µs each | p50 ms | p99 ms | added p50 ms | added p99 ms |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for way in _WAYS:
        rate = median(way, "requests_per_second")
        p50, p99 = median(way, "p50_ms"), median(way, "p99_ms")
        yield (
            f"| {way} | {rate:,.0f} | {rate / median('direct', 'requests_per_second'):.1%} "
            f"| {median(way, 'cpu_us_per_request'):.0f} | {p50:.2f} | {p99:.2f} "
            f"| {p50 - median('direct', 'p50_ms'):.2f} | {p99 - median('direct', 'p99_ms'):.2f} |"
        )
    yield ""
    yield (
        f"a slow reader of {LARGE_BYTES / 1e6:.0f} MB, {report.slow_seconds:.1f} s: resident "
        f"{report.resident_before_megabytes:.1f} MB before, {report.resident_peak_megabytes:.1f} MB at most"
    )
    yield (
        f"{READERS} readers of one page for {report.polls_seconds:.0f} s: {report.polls} requests, "
        f"{report.polls_upstream} to upstream"
    )


def main() -> None:
    """Be the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.data_api", description="Measure reads through the relay.")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way, alone and with others, a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each way")
    parser.add_argument("--readers-seconds", type=float, default=60.0, help="that ten readers poll")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    report = measure(arguments)
    show(report, lines_of, as_json=arguments.json)


if __name__ == "__main__":
    main()
