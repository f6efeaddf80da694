from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import orjson
import pytest
import trio

from relay.errors import ConfigError
from relay.sandbox.faults import FaultSettings, fault_settings
from relay.sandbox.server import add_arguments, serve_sandbox, settings_of
from relay.sandbox.service import Sandbox, SandboxSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BATCH = orjson.dumps(
    {
        "session": {"id": "s", "windowId": "w", "startedAt": 1, "lastActivityAt": 2, "url": "u"},
        "user": {"anonymousId": "a"},
        "page": {"url": "u"},
        "replay": {"events": [{"timestamp": 1, "type": 3, "data": {}}], "sequence": 0},
    }
)

COMMAND = """
import argparse, sys
from relay.sandbox.server import add_arguments, run_sandbox
parser = argparse.ArgumentParser()
add_arguments(parser)
sys.exit(run_sandbox(parser.parse_args()))
"""


def parse(*arguments: str) -> argparse.Namespace:
    """Parse a command line."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def post(batch: bytes) -> bytes:
    """Return a whole HTTP request that posts a batch."""
    head = "POST /api/sdk/replay HTTP/1.1\r\nHost: x\r\nX-Lucent-Api-Key: luc_pk_x\r\nContent-Length: {}\r\n\r\n"
    return head.format(len(batch)).encode() + batch


@pytest.fixture
async def served(nursery: trio.Nursery) -> AsyncIterator[tuple[Sandbox, int]]:
    """A sandbox on loopback, and its port."""
    sandbox = Sandbox(SandboxSettings(), now=trio.current_time, random=random.Random(0))
    url = await nursery.start(serve_sandbox, sandbox, "127.0.0.1:0")
    yield sandbox, int(url.removeprefix("http://127.0.0.1:"))
    nursery.cancel_scope.cancel()


async def test_it_answers_over_loopback(served: tuple[Sandbox, int]) -> None:
    """Batches and control requests get their answers on one real connection, CORS headers included."""
    _, port = served
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    with trio.fail_after(60):
        await stream.send_all(post(BATCH))
        answer = b""
        while not answer.endswith(b'{"ok":true}'):
            answer += await stream.receive_some()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"access-control-allow-origin: *\r\n" in answer
        await stream.send_all(b"GET /sandbox/session?id=s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join([part async for part in stream])
    session = orjson.loads(answer.partition(b"\r\n\r\n")[2])
    assert (session["events"], session["bytes"]) == (1, len(BATCH))
    await stream.aclose()


async def test_a_dropped_batch_gets_no_byte_of_an_answer(served: tuple[Sandbox, int]) -> None:
    """Drop after stores the batch and closes the connection in silence."""
    sandbox, port = served
    sandbox.set_faults(fault_settings({"drop_after_rate": 1}))
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    with trio.fail_after(60):
        await stream.send_all(post(BATCH))
        assert await stream.receive_some() == b""
    assert sandbox.report()["stored_batches"] == 1
    await stream.aclose()


def test_without_options_the_published_limits_hold() -> None:
    """The command line's defaults are the settings' defaults."""
    assert settings_of(parse()) == SandboxSettings()


def test_every_option_reaches_its_setting() -> None:
    """Each option sets one field, repeated options add up."""
    arguments = parse(
        *("--key", "luc_pk_a", "--key", "luc_pk_b", "--requests-per-minute", "7", "--max-events", "8"),
        *("--max-bytes", "9", "--error-rate", "0.1", "--error-status", "500", "--error-status", "503"),
        *("--drop-before-rate", "0.2", "--drop-after-rate", "0.3", "--latency", "1", "--latency-jitter", "2"),
        *("--outage", "5:6", "--outage", "7.5:8", "--outage-status", "503", "--reject-key", "luc_pk_c"),
        *("--fail-session", "s1"),
    )
    assert settings_of(arguments) == SandboxSettings(
        keys=("luc_pk_a", "luc_pk_b"),
        requests_per_minute=7,
        max_events=8,
        max_bytes=9,
        faults=FaultSettings(
            error_rate=0.1,
            error_status=(500, 503),
            drop_before_rate=0.2,
            drop_after_rate=0.3,
            latency_seconds=1.0,
            latency_jitter_seconds=2.0,
            outages=((5.0, 6.0), (7.5, 8.0)),
            outage_status=503,
            reject_keys=("luc_pk_c",),
            fail_sessions=("s1",),
        ),
    )


@pytest.mark.parametrize("arguments", [("--error-rate", "2"), ("--requests-per-minute", "-1"), ("--outage", "3:2")])
def test_options_out_of_bounds_are_a_configuration_error(arguments: tuple[str, ...]) -> None:
    """What cannot be played ends the command before it listens."""
    with pytest.raises(ConfigError, match="sandbox: "):
        settings_of(parse(*arguments))


@pytest.mark.parametrize("span", ["3", "a:b", ":", "1:"])
def test_an_outage_is_a_span(span: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An outage that is no START:END is refused by the parser, which says what it should be."""
    with pytest.raises(SystemExit):
        parse("--outage", span)
    assert "START:END" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(ending: signal.Signals) -> None:
    """It says where it listens, serves, and ends with 0 and a summary."""
    command = [sys.executable, "-c", COMMAND, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("sandbox listening on http://127.0.0.1:")
            url = line.removeprefix("sandbox listening on ").strip()
            with urllib.request.urlopen(f"{url}/sandbox/report", timeout=60) as answer:  # noqa: S310 - our own
                assert orjson.loads(answer.read())["requests"] == 0
            process.send_signal(ending)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert f"--set upstream.ingest_url={url}" in errors
    assert "stored_batches" in errors
    assert "Traceback" not in errors
