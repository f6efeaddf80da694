from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest

COMMAND = [str(Path(sysconfig.get_path("scripts")) / "lucent-relay"), "demo"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(COMMAND[0]).exists(), reason=f"{COMMAND[0]} is not installed"),
]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment with a directory of its own for temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return {**os.environ, "TMPDIR": str(temporary)}


def test_every_recorded_event_arrives_exactly_once(tmp_path: Path, environment: dict[str, str]) -> None:
    """From an empty directory the whole demo adds up within one minute's budget, and leaves nothing behind."""
    directory = tmp_path / "empty"
    directory.mkdir()
    ended = subprocess.run(
        [*COMMAND, "--json"], capture_output=True, cwd=directory, env=environment, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr.decode()
    result = json.loads(ended.stdout)
    assert (result["exactly_once"], result["problems"]) == (True, [])
    assert (result["sessions"], result["recorded_batches"]) == (17, 124)
    assert result["events_accepted"] == result["events_delivered"] == 12_564
    for fault in ("lost", "duplicated", "foreign", "misordered"):
        assert result[f"events_{fault}"] == 0
    assert result["client_requests"] >= 835
    assert result["upstream_requests"] <= 100
    assert result["rate_limited"] == 0
    assert result["budget_minutes_direct"] == result["client_requests"] / 100
    assert result["budget_minutes_relay"] == result["upstream_requests"] / 100
    assert b"Traceback" not in ended.stderr
    assert list(directory.iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number: signal.Signals, tmp_path: Path, environment: dict[str, str]) -> None:
    """In the middle of the play a signal ends it at once with 130, without a result and without a trace on disk."""
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment
    ) as process:
        try:
            assert process.stderr is not None
            assert b"client batches" in process.stderr.readline()
            process.send_signal(number)
            printed, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, printed) == (130, b"")
    assert b"Traceback" not in errors
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_interrupt_restores_the_terminal(tmp_path: Path, environment: dict[str, str]) -> None:
    """Ctrl-C while the bars move shows the cursor again and ends with 130."""
    terminal, end = os.openpty()
    process = subprocess.Popen(
        COMMAND,
        stdout=subprocess.PIPE,
        stderr=end,
        cwd=tmp_path,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(end)
    shown = b""
    try:
        while b"the sessions play" not in shown:
            shown += os.read(terminal, 65_536)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                shown += os.read(terminal, 65_536)
            except OSError:  # the other end is closed: Linux says EIO
                break
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert (process.returncode, printed) == (130, b"")
    assert b"\x1b[?25l" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def test_time_that_is_up_is_a_no(tmp_path: Path, environment: dict[str, str]) -> None:
    """A demo that cannot end in time ends all the same, with 1, and says what is missing."""
    ended = subprocess.run(
        [*COMMAND, "--timeout", "1"], capture_output=True, cwd=tmp_path, env=environment, timeout=100, check=False
    )
    assert ended.returncode == 1
    assert b"It does not add up:" in ended.stdout
    assert b"client batches were not accepted in time" in ended.stdout
    assert b"Traceback" not in ended.stderr
