"""`lucent-relay demo`: a sandbox, a relay and recorded sessions in one process, and a verdict.

Rules:
1. Everything between the parts is real: sockets on loopback, HTTP, gzip, a spool on disk, upstream's limits.
2. It leaves nothing behind: ports are free ones, the spool is a temporary directory.
3. It ends: with the verdict, at the first signal, or when its time is up, and then it says what is missing.
"""

from __future__ import annotations

import argparse
import math
import random  # noqa: TID251 - the composition of a command of its own; the sandbox plays no faults here
import signal
import sys
import tempfile
from collections.abc import AsyncIterator

import msgspec
import trio

from relay.app import Relay, serve
from relay.config import Config, Listen, Log, Spool, Upstream
from relay.demo.audit import Result, compare, holdings, judge, listings
from relay.demo.display import Display, Progress, open_display, print_result
from relay.demo.player import CONNECTIONS, Player
from relay.demo.readers import read_page
from relay.demo.session import load_recordings
from relay.exit_codes import ExitCode
from relay.http.client import HttpClient
from relay.ops.logs import configure_logging
from relay.sandbox.server import serve_sandbox
from relay.sandbox.service import Sandbox, SandboxSettings
from relay.spool.values import Account

FREE_PORT = "127.0.0.1:0"
"""Of relay, admin listener and sandbox."""

SESSIONS = 17
"""Each recording once. One more than a key bears without a relay, at the SDK's six requests a minute each."""

MAX_SESSIONS = 1_000
"""740 000 events, 100 MB of identities, and at 100 requests a minute most of an hour."""

SPEED = 10.0
"""Three minutes, the longest recording, in 18 seconds."""

TIMEOUT_SECONDS = 300.0
"""Enough for the recordings at life's pace, which take three minutes."""

LOOK_SECONDS = 0.1
"""Between two looks at how far it is; what the eye takes for motion."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lucent-relay demo`."""
    parser.add_argument(
        "--sessions",
        type=_count,
        metavar="N",
        default=SESSIONS,
        help="recorded sessions to play at once; beyond 17 they repeat, and a minute's budget may not do (%(default)s)",
    )
    parser.add_argument(
        "--speed", type=_positive, metavar="X", default=SPEED, help="times as fast as they were recorded (%(default)g)"
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        default=TIMEOUT_SECONDS,
        help="give up after this long, and say what is missing (%(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        An `ExitCode`: OK where everything arrived exactly once, NEGATIVE where it did not, INTERRUPTED after SIGINT
        or SIGTERM.
    """
    player = Player(load_recordings(), arguments.sessions, arguments.speed)
    with tempfile.TemporaryDirectory(prefix="lucent-relay-demo-") as directory, open_display(sys.stderr) as display:
        # After the display has begun, so that a warning goes above the bars and not through them.
        configure_logging(Log(level="warning"))
        result = trio.run(_perform_until_signal, player, directory, arguments.timeout, display)
    if result is None:
        return ExitCode.INTERRUPTED
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        print_result(result, arguments.speed, sys.stdout)
    return ExitCode.OK if result.exactly_once else ExitCode.NEGATIVE


def demo_config(upstream_url: str, directory: str) -> Config:
    """Return the relay's configuration: its defaults, but for addresses and the directory.

    Args:
        upstream_url: The sandbox's.
        directory: For the spool.
    """
    return Config(
        listen=Listen(relay=FREE_PORT, admin=FREE_PORT),
        upstream=Upstream(ingest_url=upstream_url, data_url=upstream_url),
        # A few MB for half a minute starve nobody, and a full disk is no reason for a poor first impression.
        spool=Spool(directory=directory, min_free_bytes=0, reserve_bytes=0),
    )


async def _perform_until_signal(player: Player, directory: str, timeout: float, display: Display) -> Result | None:
    """Perform; None where SIGINT or SIGTERM came first."""
    result = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
            result = await perform(player, directory, timeout, display)
            nursery.cancel_scope.cancel()
    return result


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def perform(player: Player, directory: str, timeout: float, display: Display) -> Result:
    """Play to a relay in front of a sandbox, wait for the last delivery, read a page of the data API, and add up.

    Args:
        player: Not yet run.
        directory: For the spool.
        timeout: Seconds from the first batch on, after which what has arrived is judged as it is.
        display: Shows progress.

    Cancellation: Everything is closed at once; the spool is in order, and of no more use.
    """
    settings = SandboxSettings()
    sandbox = Sandbox(settings, now=trio.current_time, random=random.Random(0))  # noqa: S311 - nothing is drawn
    async with trio.open_nursery() as upstream:
        upstream_url = await upstream.start(serve_sandbox, sandbox, FREE_PORT)
        shutdown = trio.Event()
        async with trio.open_nursery() as serving:
            relay: Relay = await serving.start(serve, demo_config(upstream_url, directory), shutdown)
            relay_url = relay.identity()["listening"]["relay"][0]
            client = HttpClient(relay_url, Upstream(max_idle_connections=CONNECTIONS))
            started_at = trio.current_time()
            with trio.move_on_after(timeout):
                async with trio.open_nursery() as playing:
                    playing.start_soon(player.run, client)
                    await _watch(relay, sandbox, player, settings.requests_per_minute, display)
            seconds = trio.current_time() - started_at
            reads = await read_page(client)
            await client.aclose()
            account: Account = (await relay.statistics())["account"]
            shutdown.set()
        upstream.cancel_scope.cancel()
    return judge(
        player.played(),
        compare(player.ledger, holdings(listings(sandbox))),
        sandbox.report(),
        account,
        requests_per_minute=settings.requests_per_minute,
        seconds=seconds,
        reads=reads,
    )


async def _watch(relay: Relay, sandbox: Sandbox, player: Player, budget: int, display: Display) -> None:
    """Show progress until everything is sent and the relay has nothing left to deliver."""
    started_at = trio.current_time()
    listening = relay.identity()["listening"]
    while True:
        statistics = await relay.statistics()
        account: Account = statistics["account"]
        played = player.played()
        report = sandbox.report()
        display.show(
            Progress(
                seconds=trio.current_time() - started_at,
                batches=played.batches,
                batches_sent=played.batches_accepted + played.batches_refused,
                events=player.events,
                events_accepted=played.events_accepted,
                events_delivered=report["events"],
                upstream_requests=report["requests"],
                budget=budget,
                budget_used=sum(statistics["forward"].budget_used_by_key.values()),
                relay_url=listening["relay"][0],
                admin_url=listening["admin"][0],
            )
        )
        # What upstream refused as sent stays in the spool for good; it is the verdict's, not worth a wait.
        if player.is_done and not account.pending + account.sealed:
            return
        await trio.sleep(LOOK_SECONDS)


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_SESSIONS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_SESSIONS}")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 < value < math.inf:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
