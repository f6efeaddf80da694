"""What a huge spool costs: to open, to hold, to drain.

    python -m bench.backlog [--segments N] [--gigabytes G] [--size small|medium|large] [--session-batches N]
                            [--wait S] [--directory D] [--json]

A spool is filled as hours of outage fill it, and left. Then a relay opens it: while upstream is still down, and once
more with an upstream that takes everything at once. A client goes on sending all the while, whom none of it concerns.

README.md says what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from bench import servers
from bench.bodies import LIVE_SESSIONS, SESSION_BATCHES, SIZES, Sessions, cut_slices
from bench.report import show
from bench.steady import Seen, SteadyClient
from relay.config import Config
from relay.protocol.cut import Limits
from relay.spool.schema import DATABASE_NAME, open_database
from relay.spool.store import Store

KEY = "luc_pk_backlog"

_GROUP = 2_000
"""Batches of one transaction while the spool is filled."""

_OUTAGE_SECONDS = 7_200.0
"""From the oldest batch to the youngest."""

_AGE_SECONDS = 900.0
"""Of the youngest batch; so whatever is as old as that is backlog, and what is younger the client's."""

_INTERVAL_SECONDS = 0.05
"""Between the client's requests."""

_SAMPLE_SECONDS = 2.0
"""Between two looks at the relay, each with a scrape; a Prometheus comes every 15 s or more."""

_STALL_SECONDS = 60.0
"""Without any progress for so long, draining has failed."""


class Phase(msgspec.Struct, frozen=True):
    """A relay on the spool, for a while."""

    open_seconds: float
    """From the start of the process to listening; Python and imports included."""
    open_read_bytes: int
    """What it had read by then: Python's modules, and what it wanted to know of the spool."""
    open_resident_megabytes: float
    """When it listened."""
    peak_resident_megabytes: float
    """The most that it ever had."""
    scrape_p50_seconds: float
    """Time of a scrape of /metrics."""
    scrape_max_seconds: float
    client_p50_ms: float
    """Time until the steady client's batch was durable."""
    client_p99_ms: float
    client_max_ms: float
    client_failed: int
    """Its requests that were not answered 200."""


class Drain(msgspec.Struct, frozen=True):
    """How the backlog went."""

    seconds: float
    """Until nothing was left."""
    requests: int
    """Upstream batches."""
    segments_per_second: list[float]
    """In each tenth of the backlog."""
    cpu_us_per_segment: list[float]
    """Of the relay, in each tenth; unlike the rate, hardly touched by whatever else runs on the machine."""
    left_bytes: int
    """Of the spool's files, when the relay had stopped."""


class Report(msgspec.Struct, frozen=True):
    """What a run found."""

    segments: int
    windows: int
    spool_bytes: int
    """Of the database."""
    fill_seconds: float
    empty_open_seconds: float
    """What `open_seconds` is for an empty spool."""
    empty_open_read_bytes: int
    """What `open_read_bytes` is."""
    down: Phase
    """With upstream away."""
    up: Phase
    """With upstream back, until all was delivered."""
    drain: Drain


def fill(directory: Path, arguments: argparse.Namespace) -> int:
    """Fill a spool with batches of one segment each; returns how many, which `--gigabytes` of disk may end early."""
    segments, max_bytes = arguments.segments, int(arguments.gigabytes * 2**30)
    config = Config()
    directory.mkdir(mode=0o700)
    connection = open_database(directory / DATABASE_NAME, "os")
    store = Store(connection, Limits(config.batch.max_events, config.batch.max_bytes), config.keys.max_keys)
    sessions = Sessions(cut_slices(SIZES[arguments.size]), 1, arguments.session_batches)
    began = time.time() - _AGE_SECONDS - _OUTAGE_SECONDS
    done = 0
    while done < segments and store.used_bytes() < max_bytes:
        batches = [
            sessions.next_batch(KEY, began + _OUTAGE_SECONDS * number / segments)
            for number in range(done, min(done + _GROUP, segments))
        ]
        store.transact([partial(store.append, batch) for batch in batches])
        done += len(batches)
    store.close()
    return done


def forget(directory: Path) -> None:
    """Let the system forget what it holds of the files, so that they are read from the disk as after a reboot."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Observed:
    """A running relay as it is looked at again and again."""

    def __init__(self, server: servers.Server, open_seconds: float) -> None:
        self._server = server
        self.open_seconds = open_seconds
        self._opened = server.usage()
        self._scrapes: list[float] = []

    @property
    def open_read_bytes(self) -> int:
        """What it had read when it listened."""
        return self._opened.read_bytes

    def scrape(self) -> None:
        """Time a scrape."""
        began = time.perf_counter()
        self._get("/metrics")
        self._scrapes.append(time.perf_counter() - began)

    def status(self) -> dict[str, Any]:
        """Return what the relay says of itself."""
        value: dict[str, Any] = msgspec.json.decode(self._get("/status"))
        return value

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self._server.admin}{path}", timeout=60) as answer:
            body: bytes = answer.read()
        return body

    def phase(self, seen: Seen) -> Phase:
        """Return what was found."""
        scrapes = sorted(self._scrapes)
        return Phase(
            self.open_seconds,
            self.open_read_bytes,
            self._opened.resident_bytes / 1e6,
            self._server.usage().peak_resident_bytes / 1e6,
            scrapes[len(scrapes) // 2],
            scrapes[-1],
            seen.latency(0.5) * 1e3,
            seen.latency(0.99) * 1e3,
            seen.latency(1.0) * 1e3,
            seen.failed,
        )


@contextlib.contextmanager
def relay_on(directory: Path, core: int | None, upstream: str | None) -> Iterator[tuple[servers.Server, Observed]]:
    """Run a relay on a spool that nothing of is in memory."""
    if directory.is_dir():
        forget(directory)
    began = time.perf_counter()
    with servers.relay_server(core, directory, "fsync", upstream, 0, spool__max_bytes=1 << 40) as server:
        yield server, Observed(server, time.perf_counter() - began)


def wait_out(directory: Path, core: int | None, live: Sessions, seconds: float) -> Phase:
    """Watch a relay while upstream is down."""
    with relay_on(directory, core, None) as (server, observed):
        with SteadyClient(server.address, live.next_body, _INTERVAL_SECONDS) as client:
            ends_at = time.perf_counter() + seconds
            while time.perf_counter() < ends_at:
                time.sleep(_SAMPLE_SECONDS)
                observed.scrape()
        return observed.phase(client.take())


def drain(directory: Path, core: int | None, live: Sessions, segments: int) -> tuple[Phase, Drain]:
    """Watch a relay until the backlog is gone."""
    with servers.noop_server(servers.choose_cores().load) as sink:
        upstream = "http://{}:{}".format(*sink.address)
        with relay_on(directory, core, upstream) as (server, observed):
            with SteadyClient(server.address, live.next_body, _INTERVAL_SECONDS) as client:
                began = moved_at = time.perf_counter()
                progress = [(0.0, server.usage().cpu_seconds, 0)]
                while (status := observed.status())["account"]["lag_seconds"] >= _AGE_SECONDS:
                    now = time.perf_counter()
                    # What the client sends meanwhile lingers for its seconds, so the spool is never quite empty.
                    done = segments + status["intake"]["segments"] - status["account"]["segments"]
                    if done > progress[-1][2]:
                        moved_at = now
                    assert now - moved_at < _STALL_SECONDS, status
                    progress.append((now - began, server.usage().cpu_seconds, done))
                    time.sleep(_SAMPLE_SECONDS)
                    observed.scrape()
                progress.append((time.perf_counter() - began, server.usage().cpu_seconds, segments))
            found = observed.phase(client.take())
    left = sum(path.stat().st_size for path in directory.iterdir())
    return found, Drain(
        progress[-1][0],
        status["forward"]["batches_delivered"],
        [segments / 10 / seconds for seconds in _by_tenths([(at, done) for at, _, done in progress], segments)],
        [cpu / segments * 10 * 1e6 for cpu in _by_tenths([(cpu, done) for _, cpu, done in progress], segments)],
        left,
    )


def _by_tenths(progress: list[tuple[float, int]], segments: int) -> list[float]:
    """Return what each tenth of the segments took of what was counted, read off straight lines between the samples."""
    marks = []
    for tenth in range(11):
        wanted = segments * tenth / 10
        after = next(number for number, (_, done) in enumerate(progress) if done >= wanted)
        (t0, d0), (t1, d1) = progress[max(after - 1, 0)], progress[after]
        marks.append(t0 + (t1 - t0) * (wanted - d0) / (d1 - d0) if d1 > d0 else t1)
    return [later - earlier for earlier, later in pairwise(marks)]


def _windows(segments: int, session_batches: int) -> int:
    """Return how many windows the segments are of: as many sessions at a time as take turns, one generation on."""
    generations, rest = divmod(segments, LIVE_SESSIONS * session_batches)
    return generations * LIVE_SESSIONS + min(rest, LIVE_SESSIONS)


def measure(arguments: argparse.Namespace) -> Report:
    """Run the benchmark."""
    cores = servers.choose_cores()
    servers.pin(cores.load)
    with tempfile.TemporaryDirectory(prefix="relay-backlog-", dir=arguments.directory) as folder:
        directory = Path(folder) / "spool"
        began = time.perf_counter()
        segments = fill(directory, arguments)
        fill_seconds = time.perf_counter() - began
        spool_bytes = (directory / DATABASE_NAME).stat().st_size
        live = Sessions(cut_slices(SIZES[arguments.size]), seed=2)
        with relay_on(Path(folder) / "empty", cores.server, None) as (_, observed):
            empty = observed.open_seconds, observed.open_read_bytes
        down = wait_out(directory, cores.server, live, arguments.wait)
        up, drained = drain(directory, cores.server, live, segments)
        windows = _windows(segments, arguments.session_batches)
        return Report(segments, windows, spool_bytes, fill_seconds, *empty, down, up, drained)


def lines_of(report: Report) -> Iterator[str]:
    """Yield the report for people, the table as Markdown."""
    yield (
        f"{report.segments:,} segments in {report.windows:,} windows, {report.spool_bytes / 2**30:.2f} GiB, filled in "
        f"{report.fill_seconds:.0f} s; an empty spool opens in {report.empty_open_seconds:.2f} s"
    )
    yield ""
    yield "| upstream | open s | read MB | resident MB | at most | scrape s | max | client p50 ms | p99 | max | lost |"
    yield "|---" + "|---:" * 10 + "|"
    empty_bytes = report.empty_open_read_bytes
    for name, phase in (("away", report.down), ("back", report.up)):
        yield (
            f"| {name} | {phase.open_seconds:.2f} | {(phase.open_read_bytes - empty_bytes) / 1e6:.0f} | "
            f"{phase.open_resident_megabytes:.0f} | "
            f"{phase.peak_resident_megabytes:.0f} | {phase.scrape_p50_seconds:.2f} | {phase.scrape_max_seconds:.2f} | "
            f"{phase.client_p50_ms:.1f} | {phase.client_p99_ms:.1f} | {phase.client_max_ms:.0f} | "
            f"{phase.client_failed} |"
        )
    yield ""
    rates, costs = report.drain.segments_per_second, report.drain.cpu_us_per_segment
    yield f"drained in {report.drain.seconds:.0f} s by {report.drain.requests:,} requests, by tenths of the backlog:"
    yield f"segments a second: {' '.join(f'{rate:,.0f}' for rate in rates)}"
    yield f"CPU µs a segment: {' '.join(f'{cost:.0f}' for cost in costs)}; last by first {costs[-1] / costs[0]:.2f}"
    yield f"left on the disk: {report.drain.left_bytes / 2**20:.0f} MiB"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.backlog", description="Measure what a huge spool costs.")
    parser.add_argument("--segments", type=int, default=1_000_000, help="of the backlog")
    parser.add_argument("--gigabytes", type=float, default=1_000.0, help="GiB at which the backlog is large enough")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the batches")
    parser.add_argument("--session-batches", type=int, default=SESSION_BATCHES, help="segments of each session")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds of watching while upstream is away")
    parser.add_argument("--directory", default=".", help="for the spool; a real disk with room")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    report = measure(arguments)
    show(report, lines_of, as_json=arguments.json)


if __name__ == "__main__":
    main()
