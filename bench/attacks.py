"""What hostile clients do to a good one, and to the relay.

    python -m bench.attacks [--attack NAME] [--seconds S] [--json]

For each attack a relay of its own, with its defaults but for upstream, which is down, and a good client that posts
twenty batches a second. First nobody attacks; then the attack runs from a process of its own.

README.md says what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench import servers
from bench.attackers import ATTACKS
from bench.bodies import SIZES, Sessions, cut_slices
from bench.report import show
from bench.steady import Seen, SteadyClient

_INTERVAL_SECONDS = 0.05
"""Between the good client's requests."""

_SAMPLE_SECONDS = 0.2
"""Between two looks at the relay's descriptors."""

_SETTLE_SECONDS = 2.0
"""For an attack to build up, or a relay to warm up, before it is measured."""


class Found(msgspec.Struct, frozen=True):
    """What one attack did."""

    calm_p50_ms: float
    """The good client's times, due to durable, without an attack."""
    calm_p99_ms: float
    p50_ms: float
    """Under attack."""
    p99_ms: float
    max_ms: float
    requests: int
    """Of the good client, under attack."""
    failed: int
    """Those that were not answered 200."""
    peak_resident_megabytes: float
    """The most that the relay ever had."""
    peak_files: int
    """Its open file descriptors, likewise."""
    cpu_share: float
    """Of its core, under attack."""


@contextlib.contextmanager
def attacking(name: str, address: tuple[str, int]) -> Iterator[None]:
    """Run an attack."""
    words = [sys.executable, "-m", "bench.attackers", name, address[0], str(address[1])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"attacking\n"
            yield
            assert process.poll() is None, "the attack has ended by itself"
        finally:
            process.kill()


def measure(name: str, seconds: float, core: int | None, directory: str) -> Found:
    """Run one attack against a relay of its own."""
    bodies = Sessions(cut_slices(SIZES["medium"]), seed=1)
    with (
        tempfile.TemporaryDirectory(prefix="relay-attacks-", dir=directory) as folder,
        servers.relay_server(core, Path(folder), "fsync", None) as server,
        SteadyClient(server.address, bodies.next_body, _INTERVAL_SECONDS) as client,
    ):
        time.sleep(_SETTLE_SECONDS)
        client.take()
        time.sleep(seconds)
        calm = client.take()
        with attacking(name, server.address):
            time.sleep(_SETTLE_SECONDS)
            client.take()
            before, began = server.usage(), time.perf_counter()
            files = _watch(server, seconds)
            elapsed = time.perf_counter() - began
            stormy, after = client.take(), server.usage()
        return _found(
            calm, stormy, after.peak_resident_bytes, files, (after.cpu_seconds - before.cpu_seconds) / elapsed
        )


def _watch(server: servers.Server, seconds: float) -> int:
    """Return the most descriptors that the relay has in the next seconds."""
    files = 0
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        files = max(files, len(os.listdir(f"/proc/{server.pid}/fd")))  # noqa: PTH208 - names are enough
        time.sleep(_SAMPLE_SECONDS)
    return files


def _found(calm: Seen, stormy: Seen, peak_bytes: int, files: int, cpu_share: float) -> Found:
    return Found(
        calm.latency(0.5) * 1e3,
        calm.latency(0.99) * 1e3,
        stormy.latency(0.5) * 1e3,
        stormy.latency(0.99) * 1e3,
        stormy.latency(1.0) * 1e3,
        sum(stormy.answers_by_status.values()),
        stormy.failed,
        peak_bytes / 1e6,
        files,
        cpu_share,
    )


def lines_of(report: dict[str, Found]) -> Iterator[str]:
    """Yield the report for people, as Markdown."""
    yield "| attack | calm p50 ms | p99 | attacked p50 ms | p99 | max | failed | resident MB at most | files | CPU |"
    yield "|---" + "|---:" * 9 + "|"
    for name, found in report.items():
        yield (
            f"| {name} | {found.calm_p50_ms:.1f} | {found.calm_p99_ms:.1f} | {found.p50_ms:.1f} | {found.p99_ms:.1f} | "
            f"{found.max_ms:.0f} | {found.failed} of {found.requests} | {found.peak_resident_megabytes:.0f} | "
            f"{found.peak_files:,} | {found.cpu_share:.0%} |"
        )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description="Measure what hostile clients cost.")
    parser.add_argument("--attack", choices=[*ATTACKS, "all"], default="all", help="which")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each, and of the calm before it")
    parser.add_argument("--directory", default=".", help="for the spool; a real disk, or the syncs are none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    cores = servers.choose_cores()
    servers.pin(cores.load)
    names = list(ATTACKS) if arguments.attack == "all" else [arguments.attack]
    report = {name: measure(name, arguments.seconds, cores.server, arguments.directory) for name in names}
    show(report, lines_of, as_json=arguments.json)


if __name__ == "__main__":
    main()
