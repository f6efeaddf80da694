"""The whole relay in one process, on loopback sockets, in front of a sandbox."""

from __future__ import annotations

import gc
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
import trio

from relay.app import Relay, serve
from relay.config import Batch as BatchSettings
from relay.config import Budget, Config, Listen, Shutdown, Upstream
from relay.config import DataApi as DataApiSettings
from relay.config import Spool as SpoolSettings
from relay.http.client import HttpClient, Reply
from relay.http.message import Request, Response
from relay.sandbox.faults import fault_settings
from relay.sandbox.server import serve_sandbox
from relay.sandbox.service import Sandbox, SandboxSettings
from relay.spool.spool import Run
from relay.telemetry import METRICS, PREFIX
from tests.accounting import assert_accounted
from tests.component.batches import KEY, make_body, make_event
from tests.component.spooling import run_inline
from tests.loopback import refusing_address

NOT_METRICS = {
    "account": {"spooled", "shed", "is_balanced"},  # sums of others
    "spool": {"refusal", "damage"},  # texts; the first has `is_refusing` for a metric
    "data_api": {"credentials_problem"},  # a text; it is a warning
    "forward": {"lanes", "has_more_on_disk"},  # lanes by properties; the other explains `pending_windows`
}
"""Fields of the statistics that are in `/status` only, with the reason."""

HANG_SECONDS = 60.0
"""For what takes milliseconds; only a hang exceeds it, on however busy a machine."""

PATIENT = 600.0
"""Seconds of the relay's patience with clients and origins that a test keeps silent; longer than any test takes."""


class GatedSandbox(Sandbox):
    """A sandbox that takes batches only while its gate is open: a delivery is under way for as long as a test wants."""

    def __init__(self, settings: SandboxSettings) -> None:
        super().__init__(settings, now=trio.current_time, random=random.Random(1))
        self.gate = trio.Event()
        self.gate.set()

    async def replay(self, request: Request) -> Response:
        """Answer once the gate is open."""
        await self.gate.wait()
        return await super().replay(request)


class Running:
    """A relay that serves, and the ways to it."""

    def __init__(self, relay: Relay, sandbox: GatedSandbox, shutdown: trio.Event) -> None:
        self.relay = relay
        self.sandbox = sandbox
        self.shutdown = shutdown
        self.ended = trio.Event()
        addresses: Any = relay.identity()["listening"]
        self.url, self.admin_url = addresses["relay"][0], addresses["admin"][0]

    async def get(self, path: str) -> Reply:
        """Ask the admin listener."""
        return await _ask(self.admin_url, "GET", path)

    async def post(self, body: bytes) -> int:
        """Send a client batch; returns the status."""
        reply = await _ask(self.url, "POST", "/api/sdk/replay", ((b"x-lucent-api-key", KEY.encode()),), body)
        return reply.status

    async def status(self) -> Any:
        """Return `/status`."""
        return orjson.loads((await self.get("/status")).body)

    async def wait_status(self, holds: Callable[[Any], object]) -> Any:
        """Return the first `/status` of which something holds."""
        with trio.fail_after(HANG_SECONDS):
            while not holds(status := await self.status()):  # noqa: ASYNC110 - it is told by nobody
                await trio.sleep(0.01)
        return status

    async def wait_delivered(self, events: int) -> None:
        """Return once upstream has so many events."""
        with trio.fail_after(HANG_SECONDS):
            while self.sandbox.report()["events"] < events:  # noqa: ASYNC110 - it is told by nobody
                await trio.sleep(0.01)


def make_filler() -> bytes:
    """Return a batch that fills a spool of 1 MiB for good: its one event does not compress to that."""
    return make_body("filler", events=[make_event(random.Random(1).randbytes(1_500_000).hex())])


async def _ask(
    url: str, method: str, path: str, headers: tuple[tuple[bytes, bytes], ...] = (), body: bytes = b""
) -> Reply:
    client = HttpClient(url, Upstream())
    try:
        return await client.request(method, path, headers, body)
    finally:
        await client.aclose()


@asynccontextmanager
async def running(
    directory: Path,
    *,
    faults: dict[str, Any] | None = None,
    run: Run | None = None,
    linger_seconds: float = 0.02,
    deadline_seconds: float = 5.0,
    data_url: str = "",
    max_bytes: int = 1 << 30,
) -> AsyncIterator[Running]:
    """Run sandbox and relay; on exit the relay is stopped, unless the test did."""
    settings = SandboxSettings(requests_per_minute=0, faults=fault_settings(faults or {}))
    sandbox = GatedSandbox(settings)
    async with trio.open_nursery() as nursery:
        ingest_url = await nursery.start(serve_sandbox, sandbox, "127.0.0.1:0")
        config = Config(
            listen=Listen(relay="127.0.0.1:0", admin="127.0.0.1:0", body_grace_seconds=PATIENT),
            upstream=Upstream(
                ingest_url=ingest_url,
                data_url=data_url or ingest_url,
                first_byte_seconds=PATIENT,
                response_seconds=PATIENT,
            ),
            data_api=DataApiSettings(first_byte_seconds=PATIENT),
            batch=BatchSettings(linger_seconds=linger_seconds),
            budget=Budget(requests_per_minute=0),
            spool=SpoolSettings(directory=str(directory), durability="os", max_bytes=max_bytes),
            shutdown=Shutdown(deadline_seconds=deadline_seconds),
        )
        shutdown = trio.Event()
        ended = trio.Event()

        async def serve_relay(*, task_status: trio.TaskStatus[Relay]) -> None:
            await serve(config, shutdown, run=run, task_status=task_status)
            ended.set()

        it = Running(await nursery.start(serve_relay), sandbox, shutdown)
        it.ended = ended
        yield it
        shutdown.set()
        await ended.wait()
        nursery.cancel_scope.cancel()


# -- what it says of itself


async def test_events_go_through(tmp_path: Path) -> None:
    """What clients send is upstream, once, and the status adds up."""
    async with running(tmp_path) as it:
        assert (await it.get("/livez")).status == 200
        assert orjson.loads((await it.get("/readyz")).body) == {"ready": True, "reasons": []}
        for sequence in range(3):
            events = [make_event(f"{sequence}-{number}") for number in range(400)]
            assert await it.post(make_body(sequence=sequence, events=events)) == 200
        await it.wait_delivered(1_200)
        status = await it.wait_status(lambda status: status["account"]["delivered"] == 1_200)
        assert_accounted(status["account"], accepted=1_200, delivered=1_200, spooled=0)
        assert (status["ready"], status["reasons"], status["warnings"]) == (True, [], [])
        assert status["listening"] == {"relay": [it.url], "admin": [it.admin_url]}
        assert status["state"] == "running"
        assert set(status["forward"]["wait_seconds"]) == {"count", "mean", "p50", "p95"}
        assert status["forward"]["delivery_seconds"]["count"] == status["forward"]["batches_delivered"]
        assert it.sandbox.report()["conflicting_batches"] == 0


async def test_every_metric_is_exposed(tmp_path: Path) -> None:
    """Every declared metric has its family in `/metrics`, and nothing else has one."""
    async with running(tmp_path) as it:
        await it.post(make_body(flush="final"))
        await it.post(b"{}")
        await it.wait_status(lambda status: status["forward"]["batches_delivered"])
        bearer = ((b"authorization", b"Bearer luc_api_test"),)
        await _ask(it.url, "GET", "/api/v1/issues", bearer)
        reply = await it.get("/metrics")
        assert reply.headers[b"content-type"] == b"text/plain; version=0.0.4; charset=utf-8"
        lines = reply.body.decode().splitlines()
        kinds = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ")}
        assert kinds == {PREFIX + metric.name: metric.kind for metric in METRICS}
        samples = {line.split("{")[0].split()[0] for line in lines if not line.startswith("#")}
        for metric in METRICS:
            assert PREFIX + metric.name + ("_count" if metric.kind == "histogram" else "") in samples
        assert PREFIX + 'batches_refused_total{status="400"} 1.0' in lines
        assert PREFIX + 'batch_fullness_ratio_bucket{le="0.1"} 1.0' in lines
        assert KEY not in reply.body.decode()
        assert "luc_api_test" not in reply.body.decode()


async def test_every_figure_is_a_metric_or_an_exception(tmp_path: Path) -> None:
    """Each field of the statistics is declared in `telemetry`, or listed here with the reason; no entry is stale."""
    async with running(tmp_path) as it:
        sources = await it.relay.statistics()
        assert set(sources) == {metric.source for metric in METRICS}
        for name, statistics in sources.items():
            declared = {metric.field for metric in METRICS if metric.source == name}
            fields = set(msgspec.structs.asdict(statistics))
            assert fields - declared == NOT_METRICS.get(name, set()), name
            assert all(hasattr(statistics, field) for field in declared), name


async def test_secrets_stay_inside(tmp_path: Path) -> None:
    """Neither `/status` nor `/metrics` has a key in it (law 11)."""
    async with running(tmp_path, faults={"reject_keys": [KEY]}) as it:
        await it.post(make_body(flush="final"))
        # The account is of a moment earlier than the lanes' state, and then the batch may not have been sealed yet.
        status = await it.wait_status(lambda status: status["warnings"] and status["account"]["sealed"])
        assert status["warnings"][0].startswith("upstream refuses key-")
        assert KEY not in orjson.dumps(status).decode()
        assert (await it.get("/readyz")).status == 200, "an outage of upstream is no reason not to accept"
        assert_accounted(status["account"], accepted=1, sealed=1)


@pytest.mark.slow
async def test_a_stuck_batch_is_told(tmp_path: Path) -> None:
    """A session that upstream stumbles over is a warning and a figure, everybody else's replays arrive."""
    async with running(tmp_path, faults={"fail_sessions": ["bad"]}, deadline_seconds=0.5) as it:
        assert await it.post(make_body("bad", flush="final")) == 200
        good = 0
        with trio.fail_after(120):
            while not (status := await it.status())["forward"]["lanes"][0]["stuck"]:
                assert await it.post(make_body(f"good{good}", flush="final")) == 200
                good += 1
                await it.wait_delivered(good)
        assert [warning.partition(" of key-")[0] for warning in status["warnings"]] == ["upstream fails 1 batches"]
        assert b"\nlucent_relay_lane_stuck{" in (await it.get("/metrics")).body
        status = await it.wait_status(lambda status: status["account"]["delivered"] == good)
        assert_accounted(status["account"], accepted=good + 1, delivered=good, sealed=1)


async def test_full_spool_is_not_ready(tmp_path: Path) -> None:
    """While the spool refuses, `/readyz` is 503 with the reason, clients get 503, and `/livez` is 200."""
    async with running(tmp_path, faults={"latency_seconds": 60}, max_bytes=1 << 20, deadline_seconds=0.5) as it:
        assert await it.post(make_filler()) == 200
        ready = await it.get("/readyz")
        assert ready.status == 503
        (reason,) = orjson.loads(ready.body)["reasons"]
        assert reason.startswith("spool is full: ")
        assert await it.post(make_body()) == 503
        assert (await it.get("/livez")).status == 200


async def test_a_stalled_data_api_is_nothing_to_ingest(tmp_path: Path) -> None:
    """While every slot of the data API hangs, batches are taken, delivered and counted as ever."""
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    data_url = f"http://127.0.0.1:{silent[0].socket.getsockname()[1]}"
    bearer = ((b"authorization", b"Bearer luc_api_x"),)
    async with silent[0], running(tmp_path, data_url=data_url) as it, trio.open_nursery() as nursery:
        for number in range(100):  # more than its slots
            nursery.start_soon(_ask, it.url, "GET", f"/api/v1/issues?cursor={number}", bearer)
        await it.wait_status(lambda status: status["data_api"]["in_flight"] == 100)
        for sequence in range(20):
            assert await it.post(make_body(sequence=sequence)) == 200
        await it.wait_delivered(20)
        # The account has the last delivery from its commit on, the lane only once it has heard of that.
        status = await it.wait_status(
            lambda status: status["account"]["delivered"] == 20 and not status["forward"]["in_flight"]
        )
        assert_accounted(status["account"], accepted=20, delivered=20)
        assert status["data_api"]["in_flight"] == 100
        nursery.cancel_scope.cancel()


async def test_an_ingest_in_trouble_is_nothing_to_the_data_api(tmp_path: Path) -> None:
    """While batches are refused for the disk's sake, and none of those taken can be delivered, reads are answered."""
    bearer = ((b"authorization", b"Bearer luc_api_x"),)
    data_api = Sandbox(SandboxSettings(), now=trio.current_time, random=random.Random(1))
    async with trio.open_nursery() as nursery:
        data_url = await nursery.start(serve_sandbox, data_api, "127.0.0.1:0")
        faults = {"latency_seconds": 60}
        async with running(tmp_path, faults=faults, data_url=data_url, max_bytes=1 << 20, deadline_seconds=0.5) as it:
            for number in range(9):
                assert await it.post(make_body(f"s{number}")) == 200
            assert await it.post(make_filler()) == 200
            await it.wait_status(lambda status: status["forward"]["in_flight"])
            assert await it.post(make_body("late")) == 503
            for limit in range(1, 21):
                assert (await _ask(it.url, "GET", f"/api/v1/issues?limit={limit}", bearer)).status == 200
            status = await it.status()
            assert_accounted(status["account"], accepted=10, delivered=0)
            assert status["forward"]["in_flight"] > 0
        nursery.cancel_scope.cancel()


async def test_data_api_is_reached(tmp_path: Path) -> None:
    """The relay listener serves the data API, and says so in `/status`; where nobody is, it is 502."""
    with refusing_address() as nobody:
        async with running(tmp_path, data_url=f"http://{nobody}") as it:
            reply = await _ask(it.url, "GET", "/api/v1/issues")
            assert (reply.status, orjson.loads(reply.body)) == (502, {"error": "Lucent cannot be reached"})
            assert (await _ask(it.url, "GET", "/api/v1/nothing")).status == 404
            status = await it.status()
            assert status["data_api"]["answers_by_class"]["5xx"] == 1
            assert status["warnings"] == []
            for _ in range(4):
                await _ask(it.url, "GET", "/api/v1/issues")
            assert (await it.status())["warnings"] == ["the data API does not answer: 5 failures in a row"]
            assert_accounted(status["account"], accepted=0)


# -- its end


async def test_end_finishes_requests_and_deliveries_in_hand(tmp_path: Path) -> None:
    """At the end a request on its way is answered, a delivery in flight is recorded, and the backlog stays."""
    async with running(tmp_path, linger_seconds=600, deadline_seconds=HANG_SECONDS) as it:
        it.sandbox.gate = trio.Event()
        assert await it.post(make_body("in-flight", flush="final")) == 200  # due at once; the other lingers
        await it.wait_status(lambda status: status["forward"]["in_flight"])
        body = make_body("in-hand")
        stream = await trio.open_tcp_stream("127.0.0.1", int(it.url.rpartition(":")[2]))
        head = f"POST /api/sdk/replay?api_key={KEY} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        await stream.send_all(head.encode() + body[:10])
        await it.wait_status(lambda status: status["listener"]["buffered_bytes"])
        it.shutdown.set()
        ready = await it.get("/readyz")
        assert (ready.status, orjson.loads(ready.body)["reasons"]) == (503, ["the relay is stopping"])
        await stream.send_all(body[10:])
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        await stream.aclose()
        it.sandbox.gate.set()
        await it.ended.wait()
        assert it.sandbox.report()["events"] == 1
    async with running(tmp_path) as it:
        await it.wait_delivered(1)
        status = await it.wait_status(lambda status: status["account"]["delivered"] == 2)
        assert_accounted(status["account"], accepted=2, delivered=2)


async def test_end_has_a_deadline(tmp_path: Path) -> None:
    """A client that never finishes its body and an upstream that never answers do not keep the relay."""
    async with running(tmp_path, deadline_seconds=0.5) as it:
        it.sandbox.gate = trio.Event()
        assert await it.post(make_body(flush="final")) == 200
        stream = await trio.open_tcp_stream("127.0.0.1", int(it.url.rpartition(":")[2]))
        await stream.send_all(
            b"POST /api/sdk/replay?api_key=luc_pk_x HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
        )
        await it.wait_status(lambda status: status["forward"]["in_flight"])
        it.shutdown.set()
        with trio.fail_after(HANG_SECONDS):
            await it.ended.wait()
        await stream.aclose()
    async with running(tmp_path) as it:
        await it.wait_delivered(1)


async def test_address_in_use_ends_the_start(tmp_path: Path) -> None:
    """Where an address is taken, the relay says which, and leaves nothing behind."""
    taken = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = f"127.0.0.1:{taken[0].socket.getsockname()[1]}"
    for listen in (Listen(relay=address, admin="127.0.0.1:0"), Listen(relay="127.0.0.1:0", admin=address)):
        config = Config(listen=listen, spool=SpoolSettings(directory=str(tmp_path), durability="os"))
        with pytest.RaisesGroup(pytest.RaisesExc(OSError, match=address), flatten_subgroups=True):
            await serve(config, trio.Event(), run=run_inline)
        gc.collect()  # a socket that was left open warns, and warnings are errors
    await taken[0].aclose()
