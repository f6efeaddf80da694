"""The composition root: constructs every component, and orders start and stop.

Start: spool (with what an earlier run left), admin listener, forwarder (reads what is to be sent), relay listener.

Stop: not ready; accept no more; finish the requests in hand; finish the deliveries in flight, not the backlog; close
the spool. All of it within `shutdown.deadline_seconds`: what is in the spool is safe, so waiting is a courtesy to
clients and upstream, and the deadline holds even where a library does not let go.
"""

from __future__ import annotations

import os
import random  # noqa: TID251 - the one generator, handed to whoever needs chance
import secrets
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import msgspec
import structlog
import trio

import relay
from relay.clock import wall_clock
from relay.config import Config, Upstream
from relay.data_api.credentials import read_token_file
from relay.data_api.proxy import DataApi
from relay.errors import ConfigError, SpoolDamaged, SpoolError
from relay.exit_codes import ExitCode
from relay.forward.clocks import Clocks
from relay.forward.exchange import Client
from relay.forward.forwarder import Forwarder
from relay.http.asgi import serve_asgi
from relay.http.client import HttpClient
from relay.http.listener import HttpListener, open_listeners
from relay.http.router import Router
from relay.intake.intake import Intake
from relay.ops.admin import Admin
from relay.ops.logs import configure_logging
from relay.ops.process import allow_open_files, process_statistics
from relay.spool.spool import Run, Spool, open_spool

_SOFT_SHARE = 0.8
"""Of the deadline: then whatever still waits is cancelled, which leaves time to close the spool in order."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks for the end."""

_LOG_SECONDS = 0.2
"""What the end waits for its own log lines; they take microseconds where anybody reads them."""

MANY_FAILURES = 5
"""Of the data API in a row that are worth a warning; as many as close a lane of ingest by default."""

log = structlog.get_logger()


class Addresses(msgspec.Struct, frozen=True):
    """Where a started relay listens."""

    relay: list[str]
    """Base URLs of ingest and data API."""
    admin: list[str]
    """Base URLs of the admin listener."""


class Relay:
    """One relay: its components, and what they say of themselves.

    Args:
        config: A checked configuration.
        spool: Open.
        client: For the ingest API.
        data_client: For the data API.
        clocks: Time and chance.
    """

    def __init__(
        self, config: Config, spool: Spool, client: HttpClient | Client, data_client: HttpClient, clocks: Clocks
    ) -> None:
        self._config = config
        self._spool = spool
        self._client = client
        self._state = "starting"
        self._started_at = clocks.wall()
        self._addresses = Addresses([], [])
        self._forwarder = Forwarder(config, spool, client, clocks)
        self._intake = Intake(config, spool, clocks.wall, clocks.monotonic, self._forwarder.is_refused)
        self._data_api = DataApi(
            config.data_api,
            data_client,
            monotonic=clocks.monotonic,
            wall=clocks.wall,
            salt=secrets.token_bytes(16),
            read_file=read_token_file,
        )
        self._listener = HttpListener(
            Router([self._intake.route(), *self._data_api.routes()]),
            config.listen,
            retry_after_seconds=config.intake.retry_after_seconds,
        )
        self._admin = Admin(self)

    # -- what the admin listener asks (`ops.admin.Observed`)

    async def statistics(self) -> Mapping[str, Any]:
        """Return the components' statistics by source."""
        try:
            account = {"account": await self._spool.account()}
        except SpoolDamaged:  # the others are all the more worth looking at
            account = {}
        return {
            **account,
            "spool": self._spool.statistics(),
            "intake": self._intake.statistics(),
            "forward": self._forwarder.statistics(),
            "data_api": self._data_api.statistics(),
            "listener": self._listener.statistics(),
            **({"client": self._client.statistics()} if isinstance(self._client, HttpClient) else {}),
            "process": process_statistics(self._started_at),
        }

    def not_ready(self) -> Sequence[str]:
        """Return why no batches are accepted now."""
        reasons = [] if self._state == "running" else [f"the relay is {self._state}"]
        reason = self._spool.refusal or self._spool.append_damage
        if reason:
            reasons.append(reason)
        return reasons

    def warnings(self, sources: Mapping[str, Any]) -> Sequence[str]:
        """Return what an operator should look at, going by the statistics."""
        account, forward, spool = sources.get("account"), sources["forward"], sources["spool"]
        warnings = []
        for lane in forward.lanes:
            if lane.state == "held":
                warnings.append(f"upstream refuses {lane.key}: its batches wait in the spool")
            elif lane.state == "misdirected":
                warnings.append(f"something that is not the ingest API answers {lane.key}: check upstream.ingest_url")
            elif lane.state == "probing":
                warnings.append(f"upstream does not answer {lane.key}: {lane.failures} failures in a row")
            if lane.stuck:
                warnings.append(f"upstream fails {lane.stuck} batches of {lane.key} and takes others; see the log")
        data = sources["data_api"]
        if data.failures >= MANY_FAILURES:
            warnings.append(f"the data API does not answer: {data.failures} failures in a row")
        if data.credentials_problem:
            warnings.append(data.credentials_problem)
        if self._config.data_api.anonymous == "serve-with-the-relays-token":
            warnings.append("the data API is open to everybody who reaches the relay: data_api.anonymous")
        if spool.damage:
            warnings.append(f"{spool.damage}: run lucent-relay spool verify")
        if forward.sessions_set_aside:
            warnings.append(f"{forward.sessions_set_aside} sessions are set aside, their part of the spool is damaged")
        if account is None:
            warnings.append("the account cannot be read, its part of the spool is damaged")
            return warnings
        refused = account.dead_lettered - account.damaged
        if refused:
            warnings.append(f"upstream refused {refused} events for good: lucent-relay spool dead-letters list")
        if account.damaged:
            warnings.append(f"{account.damaged} events are damaged on the disk: lucent-relay spool dead-letters list")
        if forward.attempt_errors:
            warnings.append(f"{forward.attempt_errors} deliveries failed by an error of the relay; see the log")
        if not account.is_balanced:
            warnings.append("the account does not add up: this is a defect of the relay, please report it")
        return warnings

    async def move_dead_letters(self, action: Literal["resend", "purge"], ids: Sequence[int] | None) -> tuple[int, int]:
        """Send dead letters again, or drop them; returns how many, and their events."""
        move = self._spool.resend_dead_letters if action == "resend" else self._spool.purge_dead_letters
        moved = await move(ids)
        log.warning("dead letters moved by an operator", action=action, letters=moved.letters, events=moved.events)
        return moved.letters, moved.events

    def release_key(self, name: str) -> bool:
        """Try a held key at once, by its fingerprint; returns whether there is one."""
        return self._forwarder.release_key(name)

    def identity(self) -> Mapping[str, Any]:
        """Return what this process is."""
        return {
            "version": relay.__version__,
            "process_id": os.getpid(),
            "state": self._state,
            "listening": msgspec.to_builtins(self._addresses),
            "upstream": self._config.upstream.ingest_url,
            "spool_directory": self._config.spool.directory,
        }

    # -- its life

    async def run(
        self, shutdown: trio.Event, *, task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `shutdown` is set, then stop in order.

        Raises:
            OSError: An address cannot be listened on.
        """
        listeners = await open_listeners(self._config.listen.relay)
        try:
            await self._run(listeners, shutdown, task_status)
        finally:
            for listener in listeners:  # where the start fails before anybody has taken charge of them
                listener.socket.close()

    async def _run(
        self, listeners: list[trio.SocketListener], shutdown: trio.Event, task_status: trio.TaskStatus[Addresses]
    ) -> None:
        end_admin = trio.Event()
        async with trio.open_nursery() as admin:
            admin_urls: list[str] = await admin.start(
                lambda *, task_status: serve_asgi(
                    Router(self._admin.routes()), self._config.listen.admin, shutdown=end_admin, task_status=task_status
                )
            )
            async with trio.open_nursery() as forwarding:
                await forwarding.start(self._forwarder.run)
                await forwarding.start(self._data_api.run)
                async with trio.open_nursery() as serving:
                    await serving.start(self._listener.run, listeners)
                    hosts = [listener.socket.getsockname() for listener in listeners]
                    self._addresses = Addresses([_url(*host[:2]) for host in hosts], admin_urls)
                    self._state = "running"
                    log.info("relay listening", urls=" ".join(self._addresses.relay))
                    log.info("admin listening", urls=" ".join(self._addresses.admin))
                    task_status.started(self._addresses)
                    await shutdown.wait()
                    self._state = "stopping"
                    log.info("stopping", in_flight=self._forwarder.statistics().in_flight)
                    deadline = trio.current_time() + self._config.shutdown.deadline_seconds * _SOFT_SHARE
                    for nursery in (serving, forwarding, admin):
                        nursery.cancel_scope.deadline = deadline
                    self._listener.stop()
                self._data_api.stop()
                self._forwarder.stop()
            end_admin.set()


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    config: Config,
    shutdown: trio.Event,
    *,
    client: Client | None = None,
    clocks: Clocks | None = None,
    run: Run | None = None,
    task_status: trio.TaskStatus[Relay] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Open the spool and run a relay until `shutdown` is set.

    Args:
        config: A checked configuration.
        shutdown: Ends it in order.
        client: Takes the place of the HTTP client to the ingest API.
        clocks: Take the place of the system's.
        run: Runs the spool's blocking calls; inline for tests on virtual time.
        task_status: Started with the relay once it serves.

    Raises:
        SpoolError: The spool cannot be opened.
        ConfigError: An option cannot be used after all, such as an unreadable `upstream.ca_file`.
        OSError: An address cannot be listened on.
    """
    clocks = clocks or Clocks(trio.current_time, wall_clock, random.Random().random)  # noqa: S311 - jitter
    upstream = client or HttpClient(config.upstream.ingest_url, config.upstream)
    data_client = HttpClient(config.upstream.data_url, data_upstream(config))
    try:
        async with open_spool(
            config.spool, config.batch.limits, config.keys.max_keys, now=clocks.wall, run=run
        ) as spool:
            started = Relay(config, spool, upstream, data_client, clocks)
            async with trio.open_nursery() as nursery:
                await nursery.start(started.run, shutdown)
                task_status.started(started)
    finally:
        await data_client.aclose()
        if isinstance(upstream, HttpClient):
            await upstream.aclose()


def data_upstream(config: Config) -> Upstream:
    """Return how the data API is connected to: as ingest is, but for the patience with its answers."""
    return msgspec.structs.replace(config.upstream, first_byte_seconds=config.data_api.first_byte_seconds)


def run_relay(config: Config) -> int:
    """Run the daemon until SIGTERM or SIGINT; a second signal ends it at once.

    Returns:
        The process's exit code (see `ExitCode`).
    """
    configure_logging(config.log)
    code = ExitCode.OK
    try:
        trio.run(_serve_until_signal, allow_open_files(config))
    except* ConfigError as group:
        code = _fail(ExitCode.CONFIGURATION, group)
    except* SpoolError as group:
        code = _fail(ExitCode.SPOOL, group)
    except* OSError as group:
        code = _fail(ExitCode.CANNOT_LISTEN, group)
    if code == ExitCode.OK:
        log.info("stopped")
    return code


async def _serve_until_signal(config: Config) -> None:
    shutdown = trio.Event()
    stop = partial(trio.lowlevel.current_trio_token().run_sync_soon, shutdown.set)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # here and in all threads to come: one alone waits for them
    threading.Thread(target=_watch_signals, args=(stop, config.shutdown.deadline_seconds), daemon=True).start()
    log.info("starting", version=relay.__version__, process_id=os.getpid(), spool=config.spool.directory)
    await serve(config, shutdown)


def _watch_signals(stop: Callable[[], None], deadline_seconds: float) -> None:
    """Ask for an orderly end at the first signal, and see that it comes.

    In a thread, since deadline and second signal must hold even where trio is kept from running anything: by a disk
    that takes its time to open or close the database, or by a log that nobody reads.
    """
    number = signal.sigwait(_SIGNALS)
    timer = threading.Timer(
        deadline_seconds, _end_at_once, ["stopped at the deadline; what was accepted is in the spool"]
    )
    timer.daemon = True
    timer.start()
    # Before the rest, so that the log has the cause before its effects.
    _try_to_log(log.info, "signal received", signal=signal.Signals(number).name, deadline_seconds=deadline_seconds)
    with suppress(trio.RunFinishedError):
        stop()
    signal.sigwait(_SIGNALS)
    _end_at_once("stopped by a second signal; what was accepted is in the spool")


def _end_at_once(event: str) -> None:
    _try_to_log(log.warning, event)
    os._exit(ExitCode.OK)


def _try_to_log(write: Callable[..., Any], event: str, **values: Any) -> None:
    """Log, but do not wait for long: the reader of a full pipe may be gone."""
    writer = threading.Thread(target=write, args=(event,), kwargs=values, daemon=True)
    writer.start()
    writer.join(_LOG_SECONDS)


def _fail(code: ExitCode, group: BaseExceptionGroup[Exception]) -> ExitCode:
    for error in _leaves(group):
        log.error("cannot run", problem=str(error))
    return code


def _leaves(group: BaseExceptionGroup[Exception]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
