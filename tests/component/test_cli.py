from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest

from relay import __version__
from relay.cli import main
from relay.config import Config
from relay.errors import SpoolLocked
from relay.exit_codes import ExitCode
from tests.loopback import refusing_address


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the variables of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("LUCENT_RELAY_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Config], int]], None]:
    """Put a function in the place of the daemon."""

    def install(run_relay: Callable[[Config], int]) -> None:
        module = types.ModuleType("relay.app")
        module.run_relay = run_relay  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "relay.app", module)

    return install


def raises(error: BaseException) -> Callable[[Config], int]:
    """Return a daemon that ends with an exception."""

    def run_relay(config: Config) -> int:
        raise error

    return run_relay


# --- the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["run", "--help"], 0),
        ([], 2),
        (["walk"], 2),
        (["run", "--conf", "x"], 2),
        (["run", "--set"], 2),
        (["status", "extra"], 2),
    ],
)
def test_usage_ends_at_once(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Help goes to standard output with 0, a mistake on the command line to standard error with 2."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert bool(printed.out) == (status == 0)
    assert bool(printed.err) == (status == 2)


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version names the installed version."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lucent-relay {__version__}\n"


# --- configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "check-config", "print-config", "status"])
def test_unusable_configuration_is_78(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that reads the configuration lists its problems, one a line, and ends with 78."""
    status = main([command, "--config", "absent.toml", "--set", "batch.max_events=0", "--set", "x.y=1"])
    assert status == 78
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "absent.toml: cannot be read: No such file or directory",
        "batch.max_events = 0 (--set): must be >= 1",
        "x.y (--set): unknown option",
    ]


def test_check_config_says_valid_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that can be used is called valid; what is seldom meant follows."""
    assert main(["check-config", "--set", "spool.durability=os", "--set", "listen.relay=[::]:8787"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "configuration is valid"
    assert [line.split(" = ")[0] for line in lines[1:]] == ["warning: listen.relay", "warning: spool.durability"]


def test_print_config_shows_values_and_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """print-config merges all sources, says where each value came from, and hides the key."""
    path = tmp_path / "relay.toml"
    path.write_text("[budget]\nrequests_per_minute = 50\n")
    monkeypatch.setenv("LUCENT_RELAY_KEYS__DEFAULT", "luc_pk_secret")
    assert main(["print-config", "--config", str(path), "--set", "log.level=debug"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"requests_per_minute = 50  # file {path}" in lines
    assert 'default = "********"  # environment LUCENT_RELAY_KEYS__DEFAULT' in lines
    assert 'level = "debug"    # --set' in lines
    assert "max_events = 500       # default" in lines


# --- the daemon ----------------------------------------------------------------------------------------------


def test_run_passes_the_configuration(app: Callable[..., None]) -> None:
    """The daemon gets the checked configuration, and its status is the command's."""
    seen: list[Config] = []

    def run_relay(config: Config) -> int:
        seen.append(config)
        return ExitCode.CANNOT_LISTEN

    app(run_relay)
    assert main(["run", "--set", "batch.max_events=7"]) == 71
    assert [config.batch.max_events for config in seen] == [7]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SpoolLocked("spool is locked by process 7"), ExitCode.SPOOL, "spool is locked by process 7"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, ""),
        (BaseExceptionGroup("nursery", [KeyboardInterrupt()]), ExitCode.INTERRUPTED, ""),
        (BaseExceptionGroup("nursery", [KeyboardInterrupt(), OSError("x")]), ExitCode.INTERNAL, "OSError: x"),
        (BrokenPipeError("not standard output"), ExitCode.INTERNAL, "BrokenPipeError: not standard output"),
        (ZeroDivisionError("luc_pk_secret"), ExitCode.INTERNAL, "ZeroDivisionError: key-"),
    ],
)
def test_failures_have_statuses(
    error: BaseException,
    status: ExitCode,
    said: str,
    app: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What ends the daemon decides the status; a mistake of ours is 70 with a traceback, and without keys."""
    app(raises(error))
    assert main(["run"]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert "luc_pk_secret" not in printed.err


# --- status --------------------------------------------------------------------------------------------------


@contextmanager
def admin(replies: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    """Serve canned replies by path on loopback, and yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, body = replies[self.path]
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


STATUS = {"version": "1.2.3", "spool": {"pending_events": 42, "lag_seconds": 1.50000001}, "lanes": [{"key": "key-a"}]}


@pytest.mark.parametrize(("readiness", "status", "word"), [(200, 0, "ready"), (503, 1, "not ready")])
def test_status_is_readiness(readiness: int, status: int, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary lists every figure of /status; the exit status is what /readyz says."""
    with admin({"/readyz": (readiness, b"{}"), "/status": (200, orjson.dumps(STATUS))}) as address:
        assert main(["status", "--set", f"listen.admin={address}"]) == status
    assert capsys.readouterr().out.splitlines() == [
        word,
        "version               1.2.3",
        "spool.pending_events  42",
        "spool.lag_seconds     1.5",
        "lanes.0.key           key-a",
    ]


def test_status_json_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints /status as it came; an address to listen on everywhere is asked on loopback."""
    with admin({"/readyz": (200, b""), "/status": (200, orjson.dumps(STATUS))}) as address:
        everywhere = address.replace("127.0.0.1", "0.0.0.0")  # noqa: S104 - asked, not bound
        assert main(["status", "--json", "--set", f"listen.admin={everywhere}"]) == 0
    assert orjson.loads(capsys.readouterr().out) == STATUS


@pytest.mark.parametrize("reply", [(404, b"{}"), (200, b"<html>"), (200, b"[]")])
def test_status_of_something_else_is_1(reply: tuple[int, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is no relay is said to be none."""
    with admin({"/readyz": (200, b""), "/status": reply}) as address:
        assert main(["status", "--set", f"listen.admin={address}"]) == 1
    assert f"http://{address}/status answers {reply[0]}, but not with a relay's status" in capsys.readouterr().err


def test_status_without_a_relay_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody there, or nobody who could be found, is 1 with the reason."""
    with refusing_address() as address:
        assert main(["status", "--set", f"listen.admin={address}"]) == 1
    said = capsys.readouterr().err
    assert f"no relay answers at http://{address}: Connection refused (" in said
    assert "--config" in said
    assert main(["status", "--set", "listen.admin=127.0.0.1:0"]) == 1
    assert "--set listen.admin=HOST:PORT" in capsys.readouterr().err
