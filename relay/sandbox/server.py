"""Serves a sandbox: on an address for whoever has a nursery, or as a command.

Does not decide anything about batches; see `relay.sandbox.service`.
"""

from __future__ import annotations

import argparse
import random  # noqa: TID251 - the composition of a command of its own: one generator, seeded below
import signal
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from relay.config import Listen
from relay.errors import ConfigError
from relay.http.listener import HttpListener, open_listeners
from relay.sandbox.faults import FaultSettings
from relay.sandbox.service import Sandbox, SandboxSettings

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_ADDRESS = "127.0.0.1:8790"
"""Beside the relay's 8787 and 8788."""

MAX_BUFFERED_BYTES = 536_870_912
"""Bodies being received at once: four of the largest. Memory is cheap on the machines that test."""


async def serve_sandbox(
    sandbox: Sandbox, address: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled.

    Args:
        sandbox: What answers.
        address: `host:port`; port 0 picks a free one.
        task_status: Started with the base URL, such as `http://127.0.0.1:8790`.

    Cancellation:
        Connections are closed at once; a batch in hand is stored or not, as upstream's would be.
    """
    listeners = await open_listeners(address)
    # Names come out as numbers and port 0 as the port it became.
    host, port = listeners[0].socket.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    listener = HttpListener(sandbox.router(), Listen(max_buffered_bytes=MAX_BUFFERED_BYTES))
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run, listeners)
        task_status.started(url)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lucent-relay sandbox`."""
    settings, faults = SandboxSettings(), FaultSettings()
    # A list as default is an option that may be repeated.
    options: list[tuple[str, Callable[[str], Any], str, Any, str]] = [
        ("--listen", str, "HOST:PORT", DEFAULT_ADDRESS, "address; port 0 picks a free one"),
        ("--key", str, "KEY", [], "accept this key; without any, every key that begins with luc_pk_"),
        ("--requests-per-minute", int, "N", settings.requests_per_minute, "rate limit of each key; 0 lifts it"),
        ("--max-events", int, "N", settings.max_events, "events of one batch"),
        ("--max-bytes", int, "N", settings.max_bytes, "bytes of JSON of a batch with more than one event"),
        ("--token", str, "TOKEN", [], "accept this data API token; without any, all with a published prefix"),
        ("--read-only-token", str, "TOKEN", [], "accept this token for reads and answer its changes 403"),
        (
            "--reads-per-minute",
            int,
            "N",
            settings.data.reads_per_minute,
            "rate limit of each token's reads; 0 lifts it",
        ),
        ("--writes-per-minute", int, "N", settings.data.writes_per_minute, "the same of its changes"),
        ("--seed", int, "N", 0, "of faults and records: the same seed, the same of both"),
        ("--error-rate", float, "P", faults.error_rate, "share of batches answered with an error"),
        ("--error-status", int, "STATUS", [], "that error's status (without any, 500)"),
        ("--drop-before-rate", float, "P", faults.drop_before_rate, "share hung up on before storing"),
        ("--drop-after-rate", float, "P", faults.drop_after_rate, "share stored, then hung up on"),
        ("--latency", float, "SECONDS", faults.latency_seconds, "time from arrival to storing"),
        ("--latency-jitter", float, "SECONDS", faults.latency_jitter_seconds, "up to this is added"),
        ("--outage", _outage, "START:END", [], "in this span of seconds since the start hang up on all"),
        ("--outage-status", int, "STATUS", faults.outage_status, "answer outages with this; 0 hangs up"),
        ("--reject-key", str, "KEY", [], "answer this key 401"),
        ("--fail-session", str, "ID", [], "answer this session's batches with an error"),
    ]
    for flag, kind, metavar, default, text in options:
        is_repeatable = isinstance(default, list)
        parser.add_argument(
            flag,
            type=kind,
            metavar=metavar,
            default=default,
            action="append" if is_repeatable else "store",
            help=f"{text}; repeatable" if is_repeatable else f"{text} (%(default)s)",
        )
    for flag, text in (
        ("--rate-headers", "say what is left of the data API's limits in every answer, not only in a 429"),
        ("--no-etags", "give the data API's answers no ETag"),
    ):
        parser.add_argument(flag, action="store_true", help=text)


def settings_of(arguments: argparse.Namespace) -> SandboxSettings:
    """Return the settings that the command line asks for.

    Raises:
        ConfigError: A value is out of bounds.
    """
    faults = {
        "error_rate": arguments.error_rate,
        "error_status": arguments.error_status or FaultSettings().error_status,
        "drop_before_rate": arguments.drop_before_rate,
        "drop_after_rate": arguments.drop_after_rate,
        "latency_seconds": arguments.latency,
        "latency_jitter_seconds": arguments.latency_jitter,
        "outages": arguments.outage,
        "outage_status": arguments.outage_status,
        "reject_keys": arguments.reject_key,
        "fail_sessions": arguments.fail_session,
    }
    values = {
        "keys": arguments.key,
        "requests_per_minute": arguments.requests_per_minute,
        "max_events": arguments.max_events,
        "max_bytes": arguments.max_bytes,
        "faults": faults,
        "data": {
            "seed": arguments.seed,
            "tokens": arguments.token,
            "read_only_tokens": arguments.read_only_token,
            "reads_per_minute": arguments.reads_per_minute,
            "writes_per_minute": arguments.writes_per_minute,
            "has_rate_headers": arguments.rate_headers,
            "has_etags": not arguments.no_etags,
        },
    }
    try:
        return msgspec.convert(values, SandboxSettings)
    except msgspec.ValidationError as error:
        raise ConfigError([f"sandbox: {error}"]) from error


def run_sandbox(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status.

    The first line on standard output says `sandbox listening on URL`; on standard error stand hints for
    people and, at the end, a summary of the report.

    Raises:
        ConfigError: An option is out of bounds.
        OSError: The address cannot be had.
    """
    settings = settings_of(arguments)
    trio.run(_serve_until_signal, settings, arguments.listen, arguments.seed)
    return 0


async def _serve_until_signal(settings: SandboxSettings, address: str, seed: int) -> None:
    generator = random.Random(seed)  # noqa: S311 - faults are no secret, and must repeat
    sandbox = Sandbox(settings, now=trio.current_time, random=generator)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            url = await nursery.start(serve_sandbox, sandbox, address)
            sys.stdout.write(f"sandbox listening on {url}\n")
            sys.stdout.flush()
            sys.stderr.write(
                f"sandbox on {url}: send a relay here with --set upstream.ingest_url={url}"
                f" --set upstream.data_url={url}\n"
                f"report: {url}/sandbox/report\n"
            )
            async for _signal in signals:
                break
            nursery.cancel_scope.cancel()
    sys.stderr.write(summarize(sandbox.report()))


def summarize(report: dict[str, object]) -> str:
    """Return the report's counts as lines of text; details are left to the JSON."""
    counts = {name: value for name, value in report.items() if isinstance(value, int)}
    width = max(len(name) for name in counts)
    return "".join(f"{name:<{width}} {value:>12,}\n" for name, value in counts.items())


def _outage(text: str) -> tuple[float, float]:
    start, colon, end = text.partition(":")
    try:
        if colon:
            return float(start), float(end)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not START:END in seconds")
