"""The data API through the relay: what passes, what is refused, what is cut, over memory streams and virtual time."""

from __future__ import annotations

import gzip
from typing import Any

import orjson
import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from relay.config import Listen
from relay.data_api.proxy import RETRY_AFTER_SECONDS
from relay.http.connect import Origin
from tests.component.data_proxy import ISSUE, ISSUES, Proxying, answer, get, patch, proxying
from tests.component.fake_origin import FakePeer, answering_then_closing, silence

TABLE_404 = (ISSUES + "/", ISSUES + "/a/b", "/api/v1", "/api/v1/signals/x", "/api/v2/issues", "/api/", "/api/v1/Issues")
STEPS = ("..", ".", "%2e%2e", "..%2F..%2Fadmin", "a%2Fb", "a%5Cb", "%252e%252e", "a%252Fb", "a%00b")


def error_of(body: bytes) -> Any:
    """Return the message of an error in the API's shape."""
    value = orjson.loads(body)
    assert list(value) == ["error"]
    return value["error"]


async def read_raw(it: Proxying, request: bytes) -> bytes:
    """Return an answer as it came, connection and all."""
    async with it.connect() as client:
        await client.send(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        return await client.read_to_end()


# -- routes


@pytest.mark.parametrize("target", [ISSUES, ISSUE, "/api/v1/signals?limit=3&cursor=a%2Fb", "/api/v1/insights"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_every_route_reads(target: str, method: str) -> None:
    """GET and HEAD reach upstream at the same target, below the base URL, and only their answer comes back."""
    bare = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    async with proxying(lambda request: bare if request.startswith(b"HEAD") else bare + b"{}") as it:
        status, headers, body = await it.ask(get(target, method=method), has_body=method == "GET")
        assert (status, headers[b"content-length"], body) == (200, b"2", b"{}" if method == "GET" else b"")
        assert it.asked[0].startswith(f"{method} /base{target} HTTP/1.1\r\nhost: data.example\r\n".encode())


@pytest.mark.parametrize("target", [*TABLE_404, *(f"{ISSUES}/{step}" for step in STEPS)])
async def test_nothing_else_is_there(target: str) -> None:
    """Any other path, and any that could become another once decoded, is 404 and goes nowhere."""
    async with proxying(lambda _: answer()) as it:
        status, _, body = await it.ask(get(target))
        assert (status, error_of(body), it.asked) == (404, "Not found", [])


@pytest.mark.parametrize(("target", "allow"), [(ISSUES, b"GET, HEAD"), (ISSUE, b"GET, HEAD, PATCH")])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_other_methods_are_not_allowed(target: str, allow: bytes, method: str) -> None:
    """What upstream has no method for is 405 with `Allow`, preflights too: no page may read it across origins."""
    async with proxying(lambda _: answer()) as it:
        status, headers, body = await it.ask(get(target, "Origin: https://page.example", method=method))
        assert (status, headers[b"allow"], error_of(body)) == (405, allow, "Method not allowed")
        assert not any(name.startswith(b"access-control") for name in headers)
        assert it.asked == []


# -- what passes


async def test_the_request_upstream_is_exactly_this() -> None:
    """End-to-end fields pass in their order; host and framing are upstream's connection's, `via` is added."""
    lines = (
        *("X-First: 1", "Accept: application/json", "Accept-Encoding: br", "X-First: 2", "User-Agent: dash/1"),
        *("Connection: keep-alive, X-Hop", "X-Hop: 1", "TE: trailers", "Proxy-Authorization: x", "Via: 1.0 edge"),
        *("X-Forwarded-For: 10.0.0.1", "Cookie: a=b"),
    )
    async with proxying(lambda _: answer()) as it:
        await it.ask(get(ISSUES + "?status=resolved", *lines))
        assert it.asked == [
            b"GET /base/api/v1/issues?status=resolved HTTP/1.1\r\n"
            b"host: data.example\r\n"
            b"x-first: 1, 2\r\n"
            b"accept: application/json\r\n"
            b"accept-encoding: br\r\n"
            b"user-agent: dash/1\r\n"
            b"x-forwarded-for: 10.0.0.1\r\n"
            b"cookie: a=b\r\n"
            b"authorization: Bearer luc_api_test\r\n"
            b"via: 1.0 edge, 1.1 lucent-relay\r\n\r\n"
        ]


async def test_a_change_reaches_upstream_with_its_body() -> None:
    """PATCH passes method, content type and body."""
    async with proxying(lambda _: answer(b'{"issue":{}}')) as it:
        status, _, body = await it.ask(patch())
        assert (status, body) == (200, b'{"issue":{}}')
        head, _, sent = it.asked[0].partition(b"\r\n\r\n")
        assert sent == b'{"status":"resolved"}'
        assert b"\r\ncontent-length: 21\r\n" in head
        assert b"\r\ncontent-type: application/json\r\n" in head


async def test_the_answer_to_the_client_is_exactly_this() -> None:
    """Status, order, repeats and bytes are upstream's; fields of its connection stay there."""
    upstream = (
        b"HTTP/1.1 429 Too Many\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nX-RateLimit-Limit: 300\r\n"
        b'WWW-Authenticate: Bearer scope="a"\r\nWWW-Authenticate: Basic\r\nRetry-After: 7\r\nConnection: X-Hop\r\n'
        b"X-Hop: 1\r\nKeep-Alive: timeout=5\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nVia: 1.1 cdn\r\n"
        b"Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n4\r\nabc\x00\r\n0\r\nX-Sum: 1\r\n\r\n"
    )
    async with proxying(lambda _: upstream) as it:
        assert await read_raw(it, get()) == (
            b"HTTP/1.1 429 Too Many Requests\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nx-ratelimit-limit: 300\r\n"
            b'www-authenticate: Bearer scope="a"\r\nwww-authenticate: Basic\r\nretry-after: 7\r\n'
            b"set-cookie: a\r\nset-cookie: b\r\nvia: 1.1 cdn\r\nvia: 1.1 lucent-relay\r\n"
            b"cache-status: lucent-relay; fwd=miss; fwd-status=429\r\nconnection: close\r\n"
            b"transfer-encoding: chunked\r\n\r\n4\r\nabc\x00\r\n0\r\n\r\n"
        )


@pytest.mark.parametrize("status", [201, 204, 301, 400, 401, 403, 404, 418, 500, 599])
async def test_every_status_passes(status: int) -> None:
    """Whatever upstream says, the client hears; nothing is followed and nothing replaced."""
    data = b"HTTP/1.1 %d X\r\nlocation: /x\r\n" % status
    data += b"\r\n" if status == 204 else b"content-length: 3\r\n\r\nabc"
    async with proxying(lambda _: data) as it:
        heard, headers, body = await it.ask(get())
        assert (heard, headers[b"location"], body) == (status, b"/x", b"" if status == 204 else b"abc")


FORWARDED = {
    "none": (("X-Forwarded-For: a", "Forwarded: for=b"), {b"x-forwarded-for": b"a", b"forwarded": b"for=b"}),
    "forwarded": (("Forwarded: for=b",), {b"forwarded": b'for=b, for=unknown;host="relay.test";proto=http'}),
    "x-forwarded": (
        ("X-Forwarded-For: a", "X-Forwarded-Proto: https"),
        {b"x-forwarded-for": b"a, unknown", b"x-forwarded-proto": b"https", b"x-forwarded-host": b"relay.test"},
    ),
}


@pytest.mark.parametrize("option", FORWARDED)
async def test_who_asked_is_told_by_option(option: str) -> None:
    """The relay adds itself behind earlier proxies, in the way that was chosen, and by default not at all."""
    lines, expected = FORWARDED[option]
    async with proxying(lambda _: answer(), forwarded=option) as it:
        await it.ask(get(ISSUES, *lines))
        sent = dict(line.split(b": ", 1) for line in it.asked[0].strip().split(b"\r\n")[1:])
        assert {name: value for name, value in sent.items() if b"forwarded" in name} == expected


# -- trouble


async def failing(
    script: Any, request: bytes, *, attempts: int = 1, **options: Any
) -> tuple[int, dict[bytes, bytes], Any]:
    """Return what a client hears where upstream plays a script."""
    with capture_logs():
        async with proxying(None, *[script] * attempts, **options) as it:
            status, headers, body = await it.ask(request)
            assert len(it.origin.wires) == attempts
    return status, headers, error_of(body)


async def garbled(peer: FakePeer) -> None:
    """Answer something that is not HTTP."""
    await peer.read_request()
    await peer.send(b"SSH-2.0-OpenSSH\r\n\r\n")


async def unheard(peer: FakePeer) -> None:
    """Take a request and close."""
    await peer.read_request()


async def breaking(peer: FakePeer) -> None:
    """Close amid the head of an answer."""
    await peer.read_request()
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-le")


async def test_a_silent_upstream_is_504(autojump_clock: trio.testing.MockClock) -> None:
    """Upstream's silence is 504 after `first_byte_seconds`, in the API's shape, with a time to come again."""
    began = trio.current_time()
    status, headers, message = await failing(silence, get(), first_byte_seconds=7)
    assert (status, message) == (504, "Lucent does not answer")
    assert headers[b"retry-after"] == b"%d" % RETRY_AFTER_SECONDS
    assert trio.current_time() - began == pytest.approx(7, abs=0.1)


@pytest.mark.parametrize(
    ("script", "attempts"), [(garbled, 1), (breaking, 1), (unheard, 2)], ids=["garbled", "broken amid", "unheard"]
)
async def test_a_broken_upstream_is_502(script: Any, attempts: int) -> None:
    """What is no answer is 502; a connection that died before a byte of one was tried once more, and no more."""
    status, headers, message = await failing(script, get(), attempts=attempts)
    assert (status, message) == (502, "Lucent cannot be reached")
    assert headers[b"retry-after"] == b"%d" % RETRY_AFTER_SECONDS


async def test_an_unreachable_upstream_is_502() -> None:
    """Where there is no connection there is no retry; the client is told at once."""
    with capture_logs():
        async with proxying(lambda _: answer()) as it:

            async def refuse(_: object) -> trio.abc.Stream:
                raise OSError("refused")

            it.data_api._client._connect = refuse
            status, _, body = await it.ask(get())
            assert (status, error_of(body)) == (502, "Lucent cannot be reached")


@pytest.mark.parametrize("request_", [get(), get(method="HEAD"), patch()], ids=["GET", "HEAD", "PATCH"])
async def test_idempotent_requests_are_sent_once_more(request_: bytes) -> None:
    """A connection that dies before an answer costs nothing the client could see, on a PATCH as well."""
    scripts = [unheard, answering_then_closing(answer(b""))]
    async with proxying(None, *scripts) as it:
        status, _, _ = await it.ask(request_)
        assert status == 200
        assert it.data_api.statistics().upstream_requests == 2


@pytest.mark.parametrize("is_reachable", [True, False], ids=["unanswered again", "unreachable then"])
async def test_a_change_of_unknown_fate_says_so(is_reachable: bool) -> None:
    """Whoever sent a change is told that it may have been made, also where the second attempt was not."""
    with capture_logs():
        async with proxying(None, unheard, unheard) as it:
            connect = it.data_api._client._connect

            async def once(origin: Origin) -> trio.abc.Stream:
                if it.origin.wires and not is_reachable:
                    raise OSError("refused")
                return await connect(origin)

            it.data_api._client._connect = once
            _, _, body = await it.ask(patch())
    assert error_of(body) == "Lucent cannot be reached; the change may have been made, and can be sent again"


async def test_a_change_that_was_never_sent_drops_nothing() -> None:
    """Where there is no connection nothing was changed: what is kept stays, and the client is not alarmed."""
    with capture_logs():
        async with proxying(lambda _: answer(b"one")) as it:
            connect = it.data_api._client._connect

            async def refuse(_: Origin) -> trio.abc.Stream:
                raise OSError("refused")

            await it.ask(get(ISSUE))
            await it.data_api._client.aclose()
            it.data_api._client._closed = False
            it.data_api._client._connect = refuse
            _, _, body = await it.ask(patch())
            assert error_of(body) == "Lucent cannot be reached"
            it.data_api._client._connect = connect
            await it.ask(get(ISSUE))
            assert len(it.asked) == 1


BROKEN = {
    "amid a length": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc",
    "amid chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "with broken chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nxyz\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
async def test_an_answer_that_breaks_off_is_cut(data: bytes) -> None:
    """After the first byte nothing is retried or patched up: the client's connection ends without the rest."""
    with capture_logs():
        async with proxying(None, answering_then_closing(data)) as it:
            async with it.connect() as client:
                await client.send(get())
                heard = await client.read_to_end()
            assert heard.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"abc" in heard
            assert not heard.endswith(b"0\r\n\r\n")
            assert it.data_api.statistics().cut == 1


async def test_an_answer_that_stalls_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    """An answer may take as long as it likes while it comes, and `stall_seconds` while it does not."""

    async def trickle(peer: FakePeer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
        for _ in range(20):
            await trio.sleep(4)
            await peer.send(b"x")
        await peer.wait_closed()

    with capture_logs():
        async with proxying(None, trickle, stall_seconds=5) as it:
            async with it.connect() as client:
                await client.send(get())
                assert (await client.read_to_end()).endswith(b"\r\n\r\n" + b"x" * 20)
            assert trio.current_time() < 20 * 4 + 5 + 2


HOSTILE = {
    "two lengths": b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    "a length that is none": b"content-length: +3\r\n\r\nabc",
    "another coding": b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a header without a name": b": x\r\ncontent-length: 3\r\n\r\nabc",
    "a header with a null": b"x: a\x00b\r\ncontent-length: 3\r\n\r\nabc",
    "a head without an end": b"x: " + b"a" * 20_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_framing_ends_at_the_relay(data: bytes) -> None:
    """Where an answer ends must not be a matter of opinion: such an answer is 502, and its connection closed."""
    with capture_logs():
        async with proxying(None, answering_then_closing(b"HTTP/1.1 200 OK\r\n" + data)) as it:
            status, _, body = await it.ask(get())
            assert (status, error_of(body)) == (502, "Lucent cannot be reached")
            assert it.origin.open_connections == 0


async def test_what_follows_an_answer_is_nobodys(autojump_clock: trio.testing.MockClock) -> None:
    """Bytes behind an answer, or a length beside chunks, do not become the next client's answer."""
    smuggled = answer(b'{"evil":1}')
    first = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n" + smuggled
    scripts = [answering_then_closing(first), answering_then_closing(answer(b"good"))]
    async with proxying(None, *scripts) as it:
        raw = await read_raw(it, get())
        assert b"\r\ntransfer-encoding: chunked\r\n" in raw
        assert raw.endswith(b"\r\n\r\n1\r\na\r\n0\r\n\r\n")
        assert b"content-length" not in raw
        await trio.sleep(20)
        assert (await it.ask(get("/api/v1/signals")))[2] == b"good"


# -- streams


async def test_a_large_answer_waits_for_its_reader(autojump_clock: trio.testing.MockClock) -> None:
    """Upstream is read at the client's pace, with no more than the window between the two."""
    piece, pieces = b"x" * 65_536, 40
    sent = 0

    async def pour(peer: FakePeer) -> None:
        nonlocal sent
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(piece) * pieces))
        for _ in range(pieces):
            await peer.send(piece)
            sent += 1

    async with proxying(None, pour, window_bytes=131_072, lockstep=True) as it:
        async with it.connect(is_lockstep=True) as client:
            await client.send(get())
            status, _ = await client.read_head()
            assert status == 200
            received = len(client._buffer)
            while received < len(piece) * pieces:
                await trio.sleep(3)
                # The window, one piece beyond it, one on its way to the client, one in the client's hands.
                assert sent * len(piece) <= received + 131_072 + 3 * len(piece)
                received += len(await client.stream.receive_some(65_536))
        assert sent == pieces


@pytest.mark.parametrize("begins", [False, True], ids=["before the answer", "amid the answer"])
async def test_a_client_that_leaves_cancels_upstreams_request(
    begins: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """When the last who waits is gone, upstream's connection is closed at once."""

    async def script(peer: FakePeer) -> None:
        await peer.read_request()
        if begins:
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc")
        await peer.wait_closed()

    async with proxying(None, script) as it:
        client = it.connect()
        await client.send(get())
        await trio.sleep(1)
        assert it.data_api.statistics().in_flight == it.origin.open_connections == 1
        await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert it.data_api.statistics().in_flight == it.origin.open_connections == 0


async def test_a_body_that_is_no_change_is_refused_unread() -> None:
    """A PATCH has a bounded body, other requests none."""
    async with proxying(lambda _: answer(), max_body_bytes=1_024) as it:
        assert (await it.ask(get(ISSUE, method="PATCH", body=b"x" * 1_025)))[0] == 413
        assert (await it.ask(get(ISSUES, body=b"x")))[0] == 413
        assert it.asked == []
        assert (await it.ask(get(ISSUE, method="PATCH", body=b"x" * 1_024)))[0] == 200


async def test_too_many_at_once_wait_their_turn(autojump_clock: trio.testing.MockClock) -> None:
    """Beyond `max_in_flight` a request waits; one that waits too long is 503 and was never sent."""
    with capture_logs():
        async with proxying(lambda _: answer(), max_in_flight=1, first_byte_seconds=5) as it:
            it.origin.gate = trio.Event()  # type: ignore[attr-defined]
            answers: list[int] = []

            async def ask(target: str) -> None:
                answers.append((await it.ask(get(target)))[0])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, ISSUES)
                await trio.sleep(4)
                nursery.start_soon(ask, "/api/v1/signals")
                await trio.sleep(0.5)
                it.origin.gate.set()  # type: ignore[attr-defined]
            assert answers == [200, 200]
            it.origin.gate = trio.Event()  # type: ignore[attr-defined]
            answers.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, ISSUE)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(ask, "/api/v1/insights")
            assert sorted(answers) == [503, 504]
            assert len(it.asked) == 3


async def test_the_listeners_limits_hold_here_too() -> None:
    """A head too large is refused before anybody asks upstream."""
    async with proxying(lambda _: answer(), listen=Listen(max_header_bytes=1_024)) as it:
        assert (await it.ask(get(ISSUES + "?cursor=" + "x" * 2_000)))[0] == 431
        assert it.asked == []


async def test_certain_refusals_are_the_edges_by_option() -> None:
    """With `validate = "edge"` what upstream is certain to refuse is refused in its shape without a request."""
    bad = [get(ISSUES + "?limit=201"), get(ISSUES + "/17"), patch(status="open"), get("/api/v1/insights?limit=0")]
    async with proxying(lambda _: answer(), validate="edge") as it:
        for request in bad:
            status, _, body = await it.ask(request)
            assert status == 400
            assert error_of(body).startswith("Invalid ")
        assert it.asked == []
        coded = get(ISSUE, "Content-Encoding: gzip", method="PATCH", body=gzip.compress(b'{"status":"resolved"}'))
        goods = (get(ISSUE), patch(), get(ISSUES + "?limit=200"), coded)
        assert [(await it.ask(good))[0] for good in goods] == [200] * 4
    async with proxying(lambda _: answer()) as it:
        for request in bad:
            assert (await it.ask(request))[0] == 200


@pytest.mark.parametrize("ticks", range(0, 60, 2))
async def test_a_client_may_leave_at_any_moment(ticks: int) -> None:
    """Wherever a request is when its client leaves, nothing stays behind and the next one is served."""
    async with proxying(lambda _: answer(), cache_seconds=0) as it:
        async with it.connect() as client:
            await client.send(get())
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert it.data_api.statistics().in_flight == 0
        assert (await it.ask(get()))[0] == 200
