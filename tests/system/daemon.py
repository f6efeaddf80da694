"""The installed command as an operator runs it: processes, their logs, and what they say of themselves.

Rules:
1. Every process is started by a `Site`, and ended by it, by its id.
2. Whatever is waited for is a condition with a deadline. A deadline is never what a test is about, so it is far
   longer than what it bounds takes.
3. A relay that was stopped or killed has written nothing but log lines, and none of them with a traceback.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

import trio

from tests.system.traffic import Batch, Sdk, Sent, make_batch, make_events
from tests.system.wire import Answer, Connection, Lost, ask, connect

COMMAND = Path(sys.executable).with_name("lucent-relay")
"""As the package's installation made it, beside the interpreter."""

DEADLINE_SECONDS = 30.0
"""For anything that takes a second at most; a busy machine may take ten times as long."""

POLL_SECONDS = 0.01
"""Between two looks at a condition."""

SHOWN_LINES = 60
"""Of each process's output when a test fails."""

Files: TypeAlias = tuple[int, int | None]
"""Open files that a process may have, and that it may allow itself; None for as many as we."""

T = TypeVar("T")


async def eventually(what: str, look: Callable[[], Awaitable[T | None]], seconds: float = DEADLINE_SECONDS) -> T:
    """Return what `look` returns once it is something.

    Raises:
        AssertionError: It is not, in time. The message says what was waited for.
    """
    with trio.move_on_after(seconds):
        while True:
            found = await look()
            if found:
                return found
            await trio.sleep(POLL_SECONDS)
    raise AssertionError(f"waited {seconds} s in vain: {what}")


def _limit_files(soft: int, hard: int | None) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, allowed if hard is None else hard))


class Process:
    """One started command, with its output in two files.

    Args:
        name: Of the files.
        words: Its arguments.
        directory: Where it runs, and the files are.
        environment: Its own.
        files: Its limit of open files.
        log: Takes its standard error in the file's place.
    """

    def __init__(
        self,
        name: str,
        words: list[str],
        directory: Path,
        environment: Mapping[str, str],
        files: Files | None = None,
        log: int | None = None,
    ) -> None:
        self.name = name
        self._output, self._log = directory / f"{name}.out", directory / f"{name}.log"
        with self._output.open("wb") as output, self._log.open("wb") as errors:
            self._popen = subprocess.Popen(
                [str(COMMAND), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors if log is None else log,
                cwd=directory,
                env=environment,
                umask=0,  # so that the modes of files are the command's own choice
                preexec_fn=None if files is None else partial(_limit_files, *files),
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    @property
    def output(self) -> str:
        """What it wrote to standard output."""
        return self._output.read_text()

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until the kernel has."""
        self._popen.kill()
        self._popen.wait()

    async def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Return its exit status once it has ended by itself."""

        async def status() -> tuple[int] | None:
            return None if self._popen.poll() is None else (self._popen.returncode,)

        return (await eventually(f"{self.name} to end", status, seconds))[0]

    def show(self) -> None:
        """Write the end of its output where pytest shows it if the test fails."""
        for stream, text in (("out", self.output), ("log", self.log)):
            for line in text.splitlines()[-SHOWN_LINES:]:
                sys.stdout.write(f"{self.name}.{stream}: {line[:2_000]}\n")


P = TypeVar("P", bound=Process)


class Sandbox(Process):
    """`lucent-relay sandbox`."""

    url = ""

    async def started(self) -> None:
        """Wait until it listens."""
        self.url = (await eventually("the sandbox to listen", self._first_line)).rpartition(" ")[2]

    async def _first_line(self) -> str:
        assert self.is_running, self.log
        return self.output.partition("\n")[0] if "\n" in self.output else ""

    async def report(self) -> dict[str, Any]:
        """Return what it counted."""
        return await _json(f"{self.url}/sandbox/report")

    async def session(self, name: str) -> dict[str, Any]:
        """Return what it holds of a session."""
        return await _json(f"{self.url}/sandbox/session?id={quote(name)}")

    async def sessions(self) -> list[dict[str, Any]]:
        """Return what it holds, a summary a session."""
        found: list[dict[str, Any]] = []
        while True:
            page = await _json(f"{self.url}/sandbox/sessions?offset={len(found)}&limit=1000")
            found += page["sessions"]
            if len(found) >= page["total"]:
                return found

    async def fault(self, **settings: Any) -> None:
        """Replace its faults; none given heals it."""
        answer = await ask(f"{self.url}/sandbox/faults", "POST", body=json.dumps(settings).encode())
        assert answer.status == 200, answer.body

    async def go_down(self) -> None:
        """Hang up on everything until `fault` says otherwise."""
        await self.fault(outages=[[0, 1_000_000_000]])


class Relay(Process):
    """`lucent-relay run`, logging JSON."""

    url = ""
    """Of the ingest API; known once started."""
    admin = ""
    _connection: Connection | None = None
    """To the admin listener. Kept: there are hundreds of questions a second, and few connections for operators."""

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield its log lines; the last may be half written."""
        for line in self.log.splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    @property
    def start_seconds(self) -> float:
        """How long its start took, from its first line to its last address; none where the clock was set back."""
        at = {line["event"]: datetime.fromisoformat(line["timestamp"]) for line in self.lines()}
        return max(0.0, (at["admin listening"] - at["starting"]).total_seconds())

    async def keep_log(self, stream: trio.abc.ReceiveStream) -> None:
        """Write to the log's file what the relay logs elsewhere."""
        async for data in stream:
            with self._log.open("ab") as file:
                file.write(data)

    async def logged(self, event: str) -> dict[str, Any]:
        """Return the first log line of an event, once there is one."""

        async def find() -> dict[str, Any] | None:
            found = next((line for line in self.lines() if line["event"] == event), None)
            assert found or self.is_running, f"ended without logging {event!r}"
            return found

        return await eventually(f"{self.name} to log {event!r}", find)

    async def started(self) -> None:
        """Wait until it listens."""
        self.url = (await self.logged("relay listening"))["urls"]
        self.admin = (await self.logged("admin listening"))["urls"]

    @property
    def address(self) -> tuple[str, int]:
        """Where its ingest API listens."""
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    async def status(self) -> dict[str, Any]:
        """Return what it says of itself."""
        try:
            return await self._ask_status()
        except Lost:  # it was idle for too long
            return await self._ask_status()

    async def _ask_status(self) -> dict[str, Any]:
        if self._connection is None or self._connection.is_over:
            await self.hang_up()
            self._connection = await connect(self.admin)
        try:
            return _object(await self._connection.request("GET", "/status"))
        except BaseException:  # lost, or cancelled before the answer
            await self.hang_up()
            raise

    async def hang_up(self) -> None:
        """Close the connection that `status` keeps."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await trio.aclose_forcefully(connection.stream)

    async def until(
        self, what: str, holds: Callable[[dict[str, Any]], Any], seconds: float = DEADLINE_SECONDS
    ) -> dict[str, Any]:
        """Return the first status of which something holds."""

        async def look() -> dict[str, Any] | None:
            status = await self.status()
            return status if holds(status) else None

        return await eventually(what, look, seconds)

    async def drained(self, seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """Return the status once nothing is spooled."""
        return await self.until("the spool to be empty", lambda status: not status["account"]["spooled"], seconds)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and wait until it has, in order."""
        self.signal(number)
        assert await self.wait() == 0

    def assert_unharmed(self) -> None:
        """Hold its log against rule 3."""
        assert [line for line in self.lines() if "exception" in line] == []


async def _json(url: str) -> dict[str, Any]:
    return _object(await ask(url))


def _object(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer
    value: dict[str, Any] = answer.json()
    return value


class Site:
    """A directory with a sandbox, a relay, and the relays before it.

    Args:
        directory: Of configuration, spool and logs; also where the commands run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sent = Sent()
        self._processes: list[Process] = []
        self._settings: dict[str, dict[str, Any]] = {}
        self._environment = {name: text for name, text in os.environ.items() if not name.startswith("LUCENT_RELAY_")}

    # -- processes

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox that was started last."""
        return next(process for process in reversed(self._processes) if isinstance(process, Sandbox))

    @property
    def relay(self) -> Relay:
        """The relay that was started last."""
        return next(process for process in reversed(self._processes) if isinstance(process, Relay))

    def sdk(self) -> Sdk:
        """Return a client of whichever relay runs."""
        return Sdk(lambda: self.relay.url, self.sent)

    async def play_session(self, name: str, chance: Random, is_over: trio.Event, pause_seconds: float = 0) -> None:
        """Be a client of one session: batch after batch in two windows, and a final once it is over.

        Args:
            name: Of the session.
            chance: Of its batches' sizes and pauses.
            is_over: Ends it.
            pause_seconds: Between two batches at the most.
        """
        async with self.sdk() as sdk:
            for sequence in count():
                is_final = is_over.is_set()
                size = chance.choice((80, 80, 400, 2_000))
                events = make_events(f"{name}/{sequence}", chance.choice((1, 5, 40, 300)), size)
                await sdk.post(make_batch(name, sequence, events, window=f"w{sequence % 2}", is_final=is_final))
                if is_final:
                    return
                with trio.move_on_after(chance.uniform(0, pause_seconds)):
                    await is_over.wait()

    async def post(self, *batches: Batch) -> None:
        """Send batches as one client each, at the same time, until all are taken."""

        async def post(batch: Batch) -> None:
            async with self.sdk() as sdk:
                await sdk.post(batch)

        async with trio.open_nursery() as clients:
            for batch in batches:
                clients.start_soon(post, batch)

    async def start_sandbox(self, *options: str, listen: str = "127.0.0.1:0") -> Sandbox:
        """Start an upstream, unlimited unless told otherwise."""
        limit = () if "--requests-per-minute" in options else ("--requests-per-minute", "0")
        sandbox = self._start(Sandbox, "sandbox", ["sandbox", "--listen", listen, *limit, *options])
        await sandbox.started()
        return sandbox

    def spawn_relay(
        self,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        files: Files | None = None,
        log: int | None = None,
    ) -> Relay:
        """Begin to start a relay, with the settings of the one before and those given.

        By default it is quick: it lingers for a blink, spends without a budget, and is back soon after failures.
        """
        if not self._settings:
            self._settings = {
                "listen": {"relay": "127.0.0.1:0", "admin": "127.0.0.1:0"},
                "upstream": {"ingest_url": self.sandbox.url} if self._processes else {},
                "batch": {"linger_seconds": 0.05},
                "budget": {"requests_per_minute": 0},
                "forward": {"backoff_base_seconds": 0.05, "backoff_max_seconds": 0.5},
            }
        for section, options in (settings or {}).items():
            self._settings.setdefault(section, {}).update(options)
        (self.directory / "relay.toml").write_text(_toml(self._settings))
        return self._start(Relay, "relay", ["run", "--config", "relay.toml", "--set", "log.format=json"], files, log)

    async def start_relay(
        self, settings: Mapping[str, Mapping[str, Any]] | None = None, files: Files | None = None
    ) -> Relay:
        """Start a relay as `spawn_relay` does, and wait until it listens."""
        relay = self.spawn_relay(settings, files)
        await relay.started()
        return relay

    async def run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command that ends by itself."""
        with trio.fail_after(DEADLINE_SECONDS):
            return await trio.run_process(
                [str(COMMAND), *words],
                capture_stdout=True,
                capture_stderr=True,
                cwd=self.directory,
                env=self._environment,
                check=False,
            )

    async def dead_letters(self, *words: str) -> tuple[int, str]:
        """Run an action of `spool dead-letters` for the relay that runs; returns exit status and all output."""
        admin = self.relay.admin.removeprefix("http://")
        source = ("--config", "relay.toml", "--set", f"listen.admin={admin}")
        ended = await self.run("spool", "dead-letters", *words, *source)
        return ended.returncode, (ended.stdout + ended.stderr).decode()

    def _start(
        self, kind: type[P], name: str, words: list[str], files: Files | None = None, log: int | None = None
    ) -> P:
        number = sum(isinstance(process, kind) for process in self._processes) + 1
        process = kind(f"{name}-{number}", words, self.directory, self._environment, files, log)
        self._processes.append(process)
        return process

    async def aclose(self, *, is_shown: bool = True) -> None:
        """End what still runs (rule 1), show the end of all output, and hold relays to rule 3."""
        for process in reversed(self._processes):
            if process.is_running:
                process.kill()
        if is_shown:
            for process in self._processes:
                process.show()
        relays = [process for process in self._processes if isinstance(process, Relay)]
        for relay in relays:
            await relay.hang_up()
        for relay in relays:
            relay.assert_unharmed()


def _toml(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Return sections of numbers and strings; JSON's notation of both is TOML's."""
    lines = []
    for section, options in settings.items():
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in options.items())]
    return "\n".join(lines)


@asynccontextmanager
async def open_site(directory: Path) -> AsyncIterator[Site]:
    """Give a site, and end everything in it."""
    site = Site(directory)
    try:
        yield site
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + DEADLINE_SECONDS):
            await site.aclose()
