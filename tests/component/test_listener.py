"""The listener over memory streams and virtual time."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from relay.config import Listen
from relay.http.connection import DRAIN_BYTES
from relay.http.listener import MAX_REFUSALS, HttpListener
from relay.http.message import HANG_UP, JSON, Request, Response, error_response
from relay.http.patience import LINGER_SECONDS
from relay.http.router import Route, Router
from tests.component.memory_listener import CORS, OK, MemoryListener, RawClient, Recorder, route_to, serving

HOST = b"Host: relay.test\r\n"
GET = b"GET /out HTTP/1.1\r\n" + HOST + b"\r\n"
POST = b"POST /in HTTP/1.1\r\n" + HOST
DATE = b"Thu, 01 Jan 1970 00:00:00 GMT"

SLACK_SECONDS = 2.0
"""What the reaper and a test's own steps may add to a deadline."""


def post(body: bytes, *lines: bytes) -> bytes:
    """Return a POST of the body with further header lines."""
    return POST + b"".join(line + b"\r\n" for line in lines) + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def test_a_request_is_answered_with_what_the_handler_says() -> None:
    """The handler sees method, path, headers and body; its answer gets a date, a length, the route's headers."""
    async with serving() as it:
        client = it.connect()
        assert await client.ask(post(b"abc")) == (
            200,
            {JSON[0]: JSON[1], b"content-length": b"11", b"date": DATE, CORS[0]: CORS[1]},
            OK.body,
        )
        request = it.recorder.requests[0]
        assert (request.method, request.path, request.body) == ("POST", "/in", b"abc")


async def test_a_connection_carries_many_requests() -> None:
    """HTTP/1.1 connections stay open; each answer belongs to its request."""
    async with serving() as it:
        client = it.connect()
        for number in range(5):
            assert (await client.ask(post(b"%d" % number)))[0] == 200
        assert [request.body for request in it.recorder.requests] == [b"0", b"1", b"2", b"3", b"4"]
        statistics = it.listener.statistics()
        assert (statistics.connections_total, statistics.requests_total) == (1, 5)


async def test_an_idle_connection_holds_nothing_of_its_last_request() -> None:
    """Between requests a connection keeps no body alive, so idle connections are cheap."""
    async with serving() as it:
        await it.connect().ask(post(b"abc"))
        await trio.testing.wait_all_tasks_blocked()
        request = it.recorder.requests.pop()
        nobody_elses = Request("", "", b"", {})
        assert sys.getrefcount(request) == sys.getrefcount(nobody_elses)


async def test_pipelined_requests_are_answered_in_order_and_one_at_a_time() -> None:
    """A handler is asked only when the answer before it is made, and finished answers do not wait for it."""

    async def echo(request: Request) -> Response:
        started.append(request.query)
        if request.query == b"2":
            await gate.wait()
        return Response(200, request.query)

    started: list[bytes] = []
    gate = trio.Event()
    async with serving(router=Router([Route("/out", {"GET": echo})])) as it:
        client = it.connect()
        await client.send(b"".join(b"GET /out?%d HTTP/1.1\r\n" % number + HOST + b"\r\n" for number in [1, 2, 3]))
        assert (await client.read())[2] == b"1"
        await trio.testing.wait_all_tasks_blocked()
        assert started == [b"1", b"2"]
        gate.set()
        assert [(await client.read())[2] for _ in range(2)] == [b"2", b"3"]


async def test_nothing_is_read_while_a_request_is_unanswered() -> None:
    """Backpressure: a client that sends ahead fills its own buffers, not ours."""
    recorder = Recorder()
    recorder.gate = trio.Event()
    async with serving(recorder=recorder) as it:
        client = it.connect(is_lockstep=True)
        await client.send(GET)
        with trio.testing.assert_checkpoints():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, GET)
                await trio.testing.wait_all_tasks_blocked()
                assert len(recorder.requests) == 1
                recorder.gate.set()
                assert [(await client.read())[0] for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    ("request_line", "response", "status", "length"),
    [
        (b"HEAD /out", Response(200, b"hello"), 200, b"5"),
        (b"GET /out", Response(204, b"dropped"), 204, None),
        (b"GET /out", Response(304, b"dropped"), 304, None),
        (b"HEAD /nowhere", OK, 404, b"21"),
    ],
)
async def test_answers_without_a_body(
    request_line: bytes, response: Response, status: int, length: bytes | None
) -> None:
    """HEAD keeps the length of what it leaves out; 204 and 304 have neither; the connection stays in step."""
    async with serving(recorder=Recorder(response)) as it:
        client = it.connect()
        for _ in range(2):
            await client.send(request_line + b" HTTP/1.1\r\n" + HOST + b"\r\n")
            got, headers, _ = await client.read(has_body=False)
            assert (got, headers.get(b"content-length")) == (status, length)


@pytest.mark.parametrize(
    ("head", "connection"),
    [
        (b"GET /out HTTP/1.0\r\n\r\n", b"close"),
        (b"GET /out HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"keep-alive"),
        (b"GET /out HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"close"),
        (b"GET /out HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b"close"),
    ],
)
async def test_who_closes(head: bytes, connection: bytes) -> None:
    """The answer says whether the connection stays open, and the listener does what it says."""
    async with serving() as it:
        client = it.connect()
        _, headers, _ = await client.ask(head)
        assert headers[b"connection"] == connection
        if connection == b"close":
            assert await client.read_to_end() == b""
        else:
            assert (await client.ask(GET))[0] == 200


@pytest.mark.parametrize(
    ("request_line", "status", "allow"),
    [
        (b"GET /nowhere", 404, None),
        (b"GET /in", 405, b"OPTIONS, POST"),
        (b"OPTIONS /out", 204, b"GET, HEAD, OPTIONS"),
        (b"OPTIONS *", 404, None),
    ],
)
async def test_what_no_handler_answers(request_line: bytes, status: int, allow: bytes | None) -> None:
    """Unknown paths and methods are answered by the router, and the connection goes on."""
    async with serving() as it:
        client = it.connect()
        got, headers, _ = await client.ask(request_line + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (got, headers.get(b"allow")) == (status, allow)
        assert (await client.ask(GET))[0] == 200


async def test_a_waiting_client_is_told_to_go_on() -> None:
    """`Expect: 100-continue` is answered once, when the body is wanted."""
    async with serving() as it:
        client = it.connect()
        await client.send(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert await client.read_head() == (100, {})
        assert (await client.ask(b"abc"))[0] == 200
        assert (await client.ask(post(b"abc", b"Expect: 100-continue")))[0] == 200


async def test_a_waiting_client_that_is_refused_is_not_told_to_go_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A refusal takes the place of `100 Continue`, and ends the connection."""
    async with serving() as it:
        client = it.connect()
        status, headers, _ = await client.ask(POST + b"Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
        assert (status, headers[b"connection"], headers[CORS[0]]) == (413, b"close", CORS[1])


async def test_a_refused_small_body_is_drained() -> None:
    """Refusing a body of a read's size costs no connection."""
    async with serving() as it:
        client = it.connect()
        assert (await client.ask(post(b"x" * DRAIN_BYTES)))[0] == 413
        assert (await client.ask(post(b"abc")))[0] == 200
        assert [request.body for request in it.recorder.requests] == [b"abc"]


async def test_a_refused_large_body_is_answered_at_once_and_lingers(autojump_clock: trio.testing.MockClock) -> None:
    """A client in the midst of a body that is refused can go on sending for a while, and read the answer."""
    async with serving() as it:
        client = it.connect()
        await client.send(POST + b"Content-Length: 1000000\r\n\r\n")
        status, headers, _ = await client.read()
        assert (status, headers[b"connection"]) == (413, b"close")
        for _ in range(10):
            await client.send(b"GET /out HTTP/1.1\r\nHost: smuggled\r\n\r\n")
        with trio.fail_after(LINGER_SECONDS + SLACK_SECONDS):
            assert await client.read_to_end() == b""
            await _until(lambda: it.listener.statistics().open_connections == 0)
        assert it.recorder.requests == []


async def test_admit_refuses_before_the_body_is_read() -> None:
    """What `admit` says is the answer, with the route's headers, and the handler is not asked."""
    route = Route(
        "/in",
        {"POST": Recorder()},
        admit=lambda request: None if request.header(b"key") else error_response(401, "Missing API key"),
        max_body_bytes=10,
        headers=(CORS,),
    )
    async with serving(router=Router([route])) as it:
        client = it.connect()
        status, headers, body = await client.ask(post(b"abc"))
        assert (status, headers[CORS[0]], body) == (401, CORS[1], b'{"error":"Missing API key"}')
        assert (await client.ask(post(b"abc", b"Key: k")))[0] == 200


async def test_hanging_up_is_an_end_without_an_answer() -> None:
    """`HANG_UP` closes the connection behind the answers before it."""

    async def handler(request: Request) -> Response:
        return HANG_UP if request.query else OK

    async with serving(router=Router([Route("/out", {"GET": handler})])) as it:
        client = it.connect()
        await client.send(GET + b"GET /out?x HTTP/1.1\r\n" + HOST + b"\r\n" + GET)
        assert (await client.read())[0] == 200
        assert await client.read_to_end() == b""


@pytest.mark.parametrize("failing", ["handler", "admit", "header"])
async def test_a_failing_handler_is_a_500_and_nothing_more(
    failing: str, autojump_clock: trio.testing.MockClock
) -> None:
    """An exception is counted, logged once with its traceback, and answered in upstream's shape."""

    async def handler(_: Request) -> Response:
        if failing == "handler":
            raise trio.BrokenResourceError("of the handler's own")
        return Response(200, headers=((b"x-name", b"a\r\nset-cookie: b"),))

    def admit(_: Request) -> Response | None:
        if failing == "admit":
            raise ValueError("admit failed")
        return None

    route = Route("/out", {"GET": handler}, admit=admit, headers=(CORS,))
    async with serving(router=Router([route])) as it:
        with capture_logs() as logs:
            client = it.connect()
            status, headers, body = await client.ask(GET)
        assert (status, body) == (500, b'{"error":"Internal error"}')
        assert headers[CORS[0]] == CORS[1]
        assert (b"set-cookie" in headers, [entry["event"] for entry in logs]) == (False, ["handler failed"])
        assert logs[0]["exc_info"]
        assert it.listener.statistics().handler_errors_total == 1
        assert (await it.connect().ask(GET))[0] == 500


# Deadlines.


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing announces it
        await trio.sleep(0.1)


async def seconds_to_end(client: RawClient) -> tuple[bytes, float]:
    """Return what the client still gets, and how long the listener takes to end the connection."""
    start = trio.current_time()
    rest = await client.read_to_end()
    return rest, trio.current_time() - start


@pytest.mark.parametrize("first", [b"", GET])
async def test_idle_connections_are_closed_without_a_word(first: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A connection without a request, the first or a further one, ends after `idle_seconds`."""
    async with serving(Listen(idle_seconds=20)) as it:
        client = it.connect()
        if first:
            await client.ask(first)
        rest, seconds = await seconds_to_end(client)
        assert rest == b""
        assert 20 <= seconds <= 20 + SLACK_SECONDS
        assert it.listener.statistics().timeouts_total["idle"] == 1


@pytest.mark.parametrize("start", [b"G", b"\r\n", b"GET /out", GET + b"GET /out"])
async def test_a_head_has_a_deadline_that_trickling_does_not_move(
    start: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    """A head that is not complete `header_seconds` after its first byte is 408, however it trickles."""
    head = b"GET /out HTTP/1.1\r\nX: " + b"x" * 1_000
    rest = head[len(start) % len(GET) :] if start.startswith(b"G") else head
    async with serving(Listen(header_seconds=10)) as it:
        client = it.connect()
        began = trio.current_time()
        await client.send(start)
        if start.startswith(GET):
            await client.read()

        async def trickle() -> None:
            for index in range(100):
                await trio.sleep(1)
                await client.send(rest[index : index + 1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            status, headers, _ = await client.read()
            assert (status, headers[b"connection"]) == (408, b"close")
            assert 10 <= trio.current_time() - began <= 10 + SLACK_SECONDS
            nursery.cancel_scope.cancel()
        assert it.listener.statistics().timeouts_total["header"] == 1


@pytest.mark.parametrize("framing", [b"Content-Length: 500\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1f4\r\n"])
async def test_a_stalled_body_is_a_408(framing: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A body that stalls for longer than the grace is 408 with the route's headers; its bytes are given back."""
    async with serving(Listen(body_grace_seconds=10)) as it:
        client = it.connect()
        began = trio.current_time()
        await client.send(POST + framing + b"x" * 100)
        await trio.testing.wait_all_tasks_blocked()
        assert it.listener.statistics().buffered_bytes == 100
        status, headers, _ = await client.read()
        assert (status, headers[CORS[0]]) == (408, CORS[1])
        assert 10 <= trio.current_time() - began <= 10 + SLACK_SECONDS
        assert await client.read_to_end() == b""
        assert it.listener.statistics().timeouts_total["body"] == 1


@pytest.mark.parametrize(("rate", "status"), [(110, 200), (50, 408)])
async def test_a_body_must_keep_up_a_rate(rate: int, status: int, autojump_clock: trio.testing.MockClock) -> None:
    """A trickle above `min_body_rate_bytes` may take its time; one below it is 408 once the grace is used up."""
    settings = Listen(body_grace_seconds=5, min_body_rate_bytes=100)
    recorder = Recorder()
    async with serving(settings, router=route_to(recorder, max_body_bytes=10_000)) as it:
        client = it.connect()
        await client.send(POST + b"Content-Length: %d\r\n\r\n" % (60 * rate))

        async def trickle() -> None:
            for _ in range(60):
                await trio.sleep(1)
                await client.send(b"x" * rate)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            assert (await client.read())[0] == status
            nursery.cancel_scope.cancel()


async def test_a_fast_start_buys_no_long_stall(autojump_clock: trio.testing.MockClock) -> None:
    """Bytes sent fast do not add up to a credit: a stall beyond the grace ends, whatever came before."""
    settings = Listen(body_grace_seconds=5, min_body_rate_bytes=1)
    async with serving(settings, router=route_to(Recorder(), max_body_bytes=100_000)) as it:
        client = it.connect()
        await client.send(POST + b"Content-Length: 100000\r\n\r\n")
        for _ in range(9):
            await client.send(b"x" * 10_000)
            await trio.sleep(0.1)
        began = trio.current_time()
        assert (await client.read())[0] == 408
        assert trio.current_time() - began <= 5 + SLACK_SECONDS


async def test_a_late_body_of_a_refused_request_gets_the_refusal(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Where a body is only drained, its timeout says what was refused, not that it was slow."""
    async with serving(Listen(body_grace_seconds=5)) as it:
        client = it.connect()
        await client.send(POST.replace(b"/in", b"/nowhere") + b"Content-Length: 10\r\n\r\nabc")
        assert (await client.read())[0] == 404


async def test_a_client_that_does_not_read_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """An answer that is not taken within `write_seconds` ends the connection."""
    async with serving(Listen(write_seconds=5)) as it:
        client = it.connect(is_lockstep=True)
        await client.send(GET)
        began = trio.current_time()
        await _until(lambda: it.listener.statistics().open_connections == 0)
        assert 5 <= trio.current_time() - began <= 5 + SLACK_SECONDS
        assert it.listener.statistics().timeouts_total["write"] == 1


async def test_a_handler_may_take_its_time(autojump_clock: trio.testing.MockClock) -> None:
    """No deadline of the client's runs while our own handler works."""

    async def slow(_: Request) -> Response:
        await trio.sleep(1_000)
        return OK

    async with serving(router=Router([Route("/out", {"GET": slow})])) as it:
        assert (await it.connect().ask(GET))[0] == 200


# Limits.


async def test_a_connection_too_many_is_told_so(autojump_clock: trio.testing.MockClock) -> None:
    """Beyond `max_connections` a connection gets 503 with Retry-After and ends; a freed place is used again."""
    async with serving(Listen(max_connections=2)) as it:
        first, second = it.connect(), it.connect()
        assert [(await client.ask(GET))[0] for client in (first, second)] == [200, 200]
        third = it.connect()
        status, headers, _ = await third.read()
        assert (status, headers[b"retry-after"], headers[b"connection"]) == (503, b"7", b"close")
        await third.aclose()
        await first.aclose()
        await _until(lambda: it.listener.statistics().open_connections == 1)
        assert (await it.connect().ask(GET))[0] == 200
        assert it.listener.statistics().refused_connections_total == 1


async def test_refusing_connections_is_bounded_too(autojump_clock: trio.testing.MockClock) -> None:
    """A flood costs `MAX_REFUSALS` short-lived connections; the others are closed at once."""
    async with serving(Listen(max_connections=1)) as it:
        kept = it.connect()
        await kept.ask(GET)
        flood = [it.connect() for _ in range(MAX_REFUSALS + 5)]
        answers = [await client.read_to_end() for client in flood]
        assert [answer[:12] for answer in answers] == [b"HTTP/1.1 503"] * MAX_REFUSALS + [b""] * 5
        assert (await kept.ask(GET))[0] == 200


# Accepting and stopping.


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_accepting_goes_on_when_the_system_is_out_of_something(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    """A want of descriptors or memory pauses accepting, is logged once in a while, and passes."""
    with capture_logs() as logs:
        async with serving() as it:
            it.memory.failures = [OSError(number, "none left") for _ in range(50)]
            it.connect()  # the accept under way
            assert (await it.connect().ask(GET))[0] == 200
            assert it.listener.statistics().accept_errors_total == 50
    assert [entry["event"] for entry in logs] == ["accept failed"]


async def test_another_failure_to_accept_is_not_hidden() -> None:
    """An error that waiting cannot cure ends the listener, with its cause."""
    memory = MemoryListener()
    memory.failures = [OSError(errno.EBADF, "not a socket")]
    with pytest.RaisesGroup(OSError, flatten_subgroups=True, allow_unwrapped=True):
        await HttpListener(route_to(Recorder()), Listen()).run([memory])


async def test_stopping_closes_idle_connections_and_finishes_requests_in_hand() -> None:
    """Idle connections end at once; a request being handled and one being sent are answered, then closed."""
    recorder = Recorder()
    recorder.gate = trio.Event()
    async with serving(recorder=recorder) as it:
        idle, fresh, handled, sending = it.connect(), it.connect(), it.connect(), it.connect()
        recorder.response = OK
        await idle.send(b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n")
        await idle.read()
        await handled.send(GET)
        await sending.send(post(b"abc")[:-1])
        await trio.testing.wait_all_tasks_blocked()
        it.listener.stop()
        assert await idle.read_to_end() == b""
        assert await fresh.read_to_end() == b""
        await trio.testing.wait_all_tasks_blocked()
        assert not it.stopped.is_set()
        recorder.gate.set()
        await sending.send(b"c")
        for client in (handled, sending):
            status, headers, _ = await client.read()
            assert (status, headers[b"connection"]) == (200, b"close")
            assert await client.read_to_end() == b""
        await it.stopped.wait()
        assert sum(it.listener.statistics().timeouts_total.values()) == 0


async def test_stopping_closes_its_address_before_it_hangs_up(autojump_clock: trio.testing.MockClock) -> None:
    """Who sees its idle connection end finds nobody to connect to, and goes elsewhere; until then it is served."""

    class Slow(MemoryListener):
        async def aclose(self) -> None:
            """Take a second to refuse further connections."""
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            await super().aclose()

    listener, memory = HttpListener(route_to(Recorder()), Listen(), wall_clock=lambda: 0.0), Slow()
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run, [memory])
        idle, late = memory.connect(), memory.connect()
        for client in (idle, late):
            assert (await client.ask(GET))[0] == 200
        listener.stop()
        status, headers, _ = await late.ask(GET)
        assert (status, headers[b"connection"], trio.current_time()) == (200, b"close", 0.0)
        assert await idle.read_to_end() == b""
        assert trio.current_time() == 1.0


async def test_a_listener_stopped_before_it_runs_returns() -> None:
    """`stop` holds for a `run` that comes after it."""
    listener = HttpListener(route_to(Recorder()), Listen())
    listener.stop()
    await listener.run([MemoryListener()])
