from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from relay import __version__
from relay.config import Upstream
from relay.errors import ConnectFailed, ExchangeFailed, ExchangeTimedOut
from relay.http.client import HttpClient, Reply
from relay.http.connect import Origin
from tests.component.fake_origin import (
    OK,
    FakeOrigin,
    FakePeer,
    Script,
    answering,
    answering_then_closing,
    silence,
)

OK_REPLY = Reply(200, {b"content-length": b"11"}, b'{"ok":true}')
BODY = b'{"events":[]}'


def client_of(origin: FakeOrigin, url: str = "https://ingest.example/base/", **settings: Any) -> HttpClient:
    """Return a client of a scripted origin."""
    return HttpClient(url, Upstream(**settings), connect=origin.connect)


async def post(client: HttpClient) -> Reply:
    """Send a batch."""
    return await client.request("POST", "/api/sdk/replay", [(b"x-lucent-api-key", b"luc_pk_1")], BODY)


# What an exchange looks like on the wire.


async def test_the_request_on_the_wire_is_exactly_this(nursery: trio.Nursery) -> None:
    """A request carries host, agent, accept headers and length, then the caller's headers, below the prefix."""
    seen = []

    async def record(peer: FakePeer) -> None:
        seen.append(await peer.read_request())
        await peer.send(OK)

    client = client_of(FakeOrigin(nursery, record))
    assert await post(client) == OK_REPLY
    assert seen == [
        b"POST /base/api/sdk/replay HTTP/1.1\r\n"
        b"host: ingest.example\r\n"
        b"user-agent: lucent-relay/" + __version__.encode() + b"\r\n"
        b"accept: */*\r\n"
        b"accept-encoding: identity\r\n"
        b"content-length: 13\r\n"
        b"x-lucent-api-key: luc_pk_1\r\n"
        b'\r\n{"events":[]}'
    ]


ANSWERS: dict[str, tuple[str, bytes, Reply, bool]] = {
    # name: method, answer on the wire, what the caller sees, whether the connection is kept
    "length": ("POST", OK, OK_REPLY, True),
    "no reason phrase": (
        "POST",
        b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n",
        Reply(200, {b"content-length": b"0"}, b""),
        True,
    ),
    "chunked, with extension and trailer": (
        "POST",
        b"HTTP/1.1 429 Slow Down\r\nTransfer-Encoding: chunked\r\nRetry-After: 7\r\n\r\n"
        b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nServer-Timing: x\r\n\r\n",
        Reply(429, {b"transfer-encoding": b"chunked", b"retry-after": b"7"}, b"abc0123456789"),
        True,
    ),
    "204 has no body": (
        "POST",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        Reply(204, {}, b""),
        True,
    ),
    "304 has no body whatever its length says": (
        "GET",
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 99\r\n\r\n",
        Reply(304, {b"content-length": b"99"}, b""),
        True,
    ),
    "HEAD has no body whatever its length says": (
        "HEAD",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n",
        Reply(200, {b"content-length": b"99"}, b""),
        True,
    ),
    "informational answers first": (
        "POST",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK,
        OK_REPLY,
        True,
    ),
    "repeated headers": (
        "GET",
        b"HTTP/1.1 200 OK\r\nVary: a\r\nX: 1\r\nvary: b\r\nVARY: c\r\ncontent-length: 0\r\n\r\n",
        Reply(200, {b"vary": b"a, b, c", b"x": b"1", b"content-length": b"0"}, b""),
        True,
    ),
    "an unasked content coding is left in place": (
        "GET",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\n\x0b\x00",
        Reply(200, {b"content-encoding": b"br", b"content-length": b"2"}, b"\x0b\x00"),
        True,
    ),
    "connection: close": (
        "POST",
        b"HTTP/1.1 500 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno",
        Reply(500, {b"connection": b"close", b"content-length": b"2"}, b"no"),
        False,
    ),
    "HTTP/1.0": (
        "POST",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        Reply(200, {b"content-length": b"2"}, b"ok"),
        False,
    ),
}


@pytest.mark.parametrize("piece_bytes", [0, 1], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("trailing", [b"", b"\r\nHTTP"], ids=["alone", "with trailing data"])
@pytest.mark.parametrize(("method", "answer", "expected", "kept"), ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_is_read_however_it_arrives(
    nursery: trio.Nursery,
    method: str,
    answer: bytes,
    expected: Reply,
    kept: bool,
    trailing: bytes,
    piece_bytes: int,
) -> None:
    """The same answer gives the same reply in one piece and in many; what follows it costs the connection."""
    origin = FakeOrigin(nursery, answering(answer + trailing, OK, piece_bytes=piece_bytes), answering(OK))
    client = client_of(origin)
    assert await client.request(method, "/", [], b"") == expected
    await trio.testing.wait_all_tasks_blocked()
    # Byte by byte, trailing data comes after the answer was taken: then the next request must notice.
    assert await post(client) == OK_REPLY
    assert len(origin.wires) == (1 if kept and not trailing else 2)
    await client.aclose()


@pytest.mark.parametrize("piece_bytes", [0, 1], ids=["whole", "byte by byte"])
async def test_a_body_may_end_with_the_connection(nursery: trio.Nursery, piece_bytes: int) -> None:
    """An answer without a length is as long as the connection lives."""
    answer = b"HTTP/1.1 502 Bad Gateway\r\nserver: x\r\n\r\n<html>"
    client = client_of(FakeOrigin(nursery, answering_then_closing(answer, piece_bytes=piece_bytes)))
    assert await post(client) == Reply(502, {b"server": b"x"}, b"<html>")
    assert client.statistics().idle_connections == 0


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("POST", "api", []),
        ("POST", "", []),
        ("POST", "/a b", []),
        ("POST", "/ä", []),
        ("POST", "/a\r\nx: y", []),
        ("PO ST", "/", []),
        ("CONNECT", "/", []),
        ("POST", "/", [(b"x-lucent-api-key", b"luc_pk_secret\r\nx: y")]),
        ("POST", "/", [(b"x:", b"luc_pk_secret")]),
        ("POST", "/", [(b"Host", b"elsewhere")]),
        ("POST", "/", [(b"content-length", b"1")]),
        ("POST", "/", [(b"Transfer-Encoding", b"chunked")]),
        ("POST", "/", [(b"upgrade", b"h2c")]),
    ],
)
async def test_what_is_not_http_is_never_sent(
    nursery: trio.Nursery, method: str, target: str, headers: list[tuple[bytes, bytes]]
) -> None:
    """A request that would be malformed or ambiguous is the caller's mistake, and the message keeps secrets."""
    origin = FakeOrigin(nursery)
    with pytest.raises(ValueError, match=r"^(a|the) ") as caught:
        await client_of(origin).request(method, target, headers, b"")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert origin.wires == []


# The pool.


async def test_a_connection_is_used_again(nursery: trio.Nursery) -> None:
    """Requests one after another share one connection."""
    origin = FakeOrigin(nursery, answering(OK))
    client = client_of(origin)
    for _ in range(3):
        assert await post(client) == OK_REPLY
    statistics = client.statistics()
    assert statistics.connections_opened_total == 1
    assert statistics.requests_total == 3
    assert statistics.reused_total == 2
    assert statistics.idle_connections == 1
    assert statistics.active_connections == 0
    await client.aclose()
    assert origin.open_connections == 0


def taking_turns(order: list[str], name: str, gates: dict[str, trio.Event]) -> Script:
    """Return a script that answers for ever, the first time when its gate opens, and writes down its name."""

    async def script(peer: FakePeer) -> None:
        while await peer.read_request():
            await gates[name].wait()
            order.append(name)
            await peer.send(OK)

    return script


async def test_the_most_recent_connection_is_used_first(nursery: trio.Nursery) -> None:
    """The pool is last in, first out."""
    order: list[str] = []
    gates = {name: trio.Event() for name in "abc"}
    origin = FakeOrigin(nursery, *(taking_turns(order, name, gates) for name in "abc"))
    client = client_of(origin)
    async with trio.open_nursery() as requests:
        for _ in range(3):
            requests.start_soon(post, client)
            await trio.testing.wait_all_tasks_blocked()
        for name in "bca":
            gates[name].set()
            await trio.testing.wait_all_tasks_blocked()
    assert client.statistics().idle_connections == 3
    await post(client)
    await post(client)
    assert order == ["b", "c", "a", "a", "a"]
    await client.aclose()


async def test_no_more_idle_connections_are_kept_than_allowed(nursery: trio.Nursery) -> None:
    """At the limit the connection that has been idle longest is closed."""
    order: list[str] = []
    gates = {name: trio.Event() for name in "abc"}
    origin = FakeOrigin(nursery, *(taking_turns(order, name, gates) for name in "abc"))
    client = client_of(origin, max_idle_connections=2)
    async with trio.open_nursery() as requests:
        for _ in range(3):
            requests.start_soon(post, client)
            await trio.testing.wait_all_tasks_blocked()
        for name in "bca":
            gates[name].set()
            await trio.testing.wait_all_tasks_blocked()
    assert client.statistics().idle_connections == 2
    assert [wire.is_closed for wire in origin.wires] == [False, True, False]
    await client.aclose()


async def test_the_pool_can_be_turned_off(nursery: trio.Nursery) -> None:
    """With room for no idle connection each request has one of its own."""
    origin = FakeOrigin(nursery, answering(OK), answering(OK))
    client = client_of(origin, max_idle_connections=0)
    for _ in range(2):
        assert await post(client) == OK_REPLY
        assert origin.open_connections == 0
    assert len(origin.wires) == 2


@pytest.mark.parametrize(("pause_seconds", "connections"), [(44.9, 1), (45.1, 2)])
async def test_a_connection_idle_for_too_long_is_closed(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, pause_seconds: float, connections: int
) -> None:
    """A connection is used again within idle_seconds, and not after."""
    origin = FakeOrigin(nursery, answering(OK), answering(OK))
    client = client_of(origin, idle_seconds=45)
    await post(client)
    await trio.sleep(pause_seconds)
    await post(client)
    assert len(origin.wires) == connections
    assert origin.open_connections == 1
    assert client.statistics().stale_total == 0
    await client.aclose()


async def test_closing_lets_requests_under_way_finish(nursery: trio.Nursery) -> None:
    """After aclose a request under way gets its answer, its connection is not pooled, and no further one starts."""
    gate = trio.Event()
    origin = FakeOrigin(nursery, answering(OK), taking_turns([], "b", {"b": gate}))
    client = client_of(origin)
    replies = []
    async with trio.open_nursery() as requests:

        async def one() -> None:
            replies.append(await post(client))

        requests.start_soon(one)
        requests.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
        assert (origin.open_connections, client.statistics().active_connections) == (1, 1)
        gate.set()
    assert replies == [OK_REPLY, OK_REPLY]
    assert origin.open_connections == 0
    with pytest.raises(trio.ClosedResourceError):
        await post(client)


# Connections that the server has closed.


def failing_the_second(end: Script) -> Script:
    """Return a script that answers one request, reads another, and then plays `end`."""

    async def script(peer: FakePeer) -> None:
        await peer.read_request()
        await peer.send(OK)
        if await peer.read_request():
            await end(peer)

    return script


async def close(peer: FakePeer) -> None:
    """Close at once."""


async def reset(peer: FakePeer) -> None:
    """Break the connection."""
    peer.wire.is_reset = True


async def half_answer(peer: FakePeer) -> None:
    """Answer in part and close."""
    await peer.send(OK[:-1])


async def test_a_connection_closed_while_idle_is_found_before_it_is_used(nursery: trio.Nursery) -> None:
    """A server's idle timer costs nobody anything: the request goes to a fresh connection at once."""
    origin = FakeOrigin(nursery, answering_then_closing(OK), answering(OK))
    client = client_of(origin)
    await post(client)
    await trio.testing.wait_all_tasks_blocked()
    assert await post(client) == OK_REPLY
    statistics = client.statistics()
    assert (statistics.stale_total, statistics.resent_total, statistics.reused_total) == (1, 0, 0)
    assert origin.open_connections == 1
    await client.aclose()


async def test_what_a_server_says_unasked_is_never_taken_for_an_answer(nursery: trio.Nursery) -> None:
    """Bytes on an idle connection (a late 408, say) belong to no request: the connection is closed."""

    async def blurt(peer: FakePeer) -> None:
        await peer.read_request()
        await peer.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await peer.wait_closed()

    origin = FakeOrigin(nursery, blurt, answering(OK))
    client = client_of(origin)
    await post(client)
    await trio.testing.wait_all_tasks_blocked()
    assert await post(client) == OK_REPLY
    assert client.statistics().stale_total == 1
    await client.aclose()


@pytest.mark.parametrize("end", [close, reset])
async def test_a_request_lost_with_a_stale_connection_is_sent_again(nursery: trio.Nursery, end: Script) -> None:
    """A re-used connection that ends without a byte of an answer costs one resend on a fresh connection."""
    origin = FakeOrigin(nursery, failing_the_second(end), answering(OK))
    client = client_of(origin)
    await post(client)
    assert await post(client) == OK_REPLY
    statistics = client.statistics()
    assert (statistics.stale_total, statistics.resent_total, statistics.requests_total) == (1, 1, 2)
    assert origin.open_connections == 1
    await client.aclose()


async def test_a_request_is_sent_twice_at_most(nursery: trio.Nursery) -> None:
    """What happens to the resend is reported, not retried, even where more connections are pooled."""
    gates = {name: trio.Event() for name in "ab"}
    dying = failing_the_second(close)
    origin = FakeOrigin(nursery, taking_turns([], "a", gates), dying, answering_then_closing(b""))
    client = client_of(origin)
    async with trio.open_nursery() as requests:
        requests.start_soon(post, client)
        await trio.testing.wait_all_tasks_blocked()
        await post(client)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ExchangeFailed, match="before a byte of the answer"):
            await post(client)
        gates["a"].set()
    assert len(origin.wires) == 3
    assert client.statistics().resent_total == 1
    await client.aclose()


async def test_a_fresh_connection_that_fails_is_not_tried_again(nursery: trio.Nursery) -> None:
    """A request that dies with its first connection is the caller's to retry: it may have been counted."""
    origin = FakeOrigin(nursery, answering_then_closing(b""))
    with pytest.raises(ExchangeFailed, match=r"^https://ingest\.example: the connection ended before a byte"):
        await post(client_of(origin))
    assert origin.open_connections == 0


async def test_nothing_is_sent_again_once_an_answer_began(nursery: trio.Nursery) -> None:
    """A server that began to answer has read the request, so a re-used connection's failure is reported."""
    origin = FakeOrigin(nursery, failing_the_second(half_answer))
    client = client_of(origin)
    await post(client)
    with pytest.raises(ExchangeFailed, match="in the middle of the answer"):
        await post(client)
    assert client.statistics().resent_total == 0


async def test_nothing_is_sent_again_after_a_timeout(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A server that is silent may be at work, so a re-used connection's timeout is reported."""
    origin = FakeOrigin(nursery, failing_the_second(silence))
    client = client_of(origin)
    await post(client)
    with pytest.raises(ExchangeTimedOut):
        await post(client)
    assert client.statistics().resent_total == 0
    assert origin.open_connections == 0


async def test_a_resend_that_cannot_connect_does_not_claim_that_nothing_was_sent(
    nursery: trio.Nursery,
) -> None:
    """ConnectFailed means that nothing was sent; after a stale connection that would be untrue."""
    origin = FakeOrigin(nursery, failing_the_second(close))

    async def connect_once(to: Origin) -> trio.abc.Stream:
        if origin.wires:
            raise ConnectionRefusedError(111, "Connection refused")
        return await origin.connect(to)

    client = HttpClient("http://[::1]:8080", Upstream(), connect=connect_once)
    await post(client)
    with pytest.raises(
        ExchangeFailed, match=r"ended before .*; then http://\[::1\]:8080: Connection refused"
    ) as caught:
        await post(client)
    assert isinstance(caught.value.__cause__, ConnectFailed)
    statistics = client.statistics()
    assert (statistics.connect_failures_total, statistics.stale_total, statistics.resent_total) == (1, 1, 0)


# Cancellation.

SITUATIONS: dict[str, Callable[[], tuple[Script, ...]]] = {
    "fresh": lambda: (),
    "re-used": lambda: (answering(OK),),
    "closed while idle": lambda: (answering_then_closing(OK),),
    "closed on use": lambda: (failing_the_second(close),),
    "answered byte by byte": lambda: (answering(OK, piece_bytes=1),),
}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
async def test_cancelled_at_any_checkpoint_the_client_stays_whole(
    nursery: trio.Nursery, situation: Callable[[], tuple[Script, ...]]
) -> None:
    """Wherever a request is cancelled, its connection is closed or pooled, never both, and the client works on."""
    for checkpoints in range(500):
        warm = situation()
        origin = FakeOrigin(nursery, *warm, *[answering(OK)] * 3)
        client = client_of(origin)
        if warm:
            await post(client)
            await trio.testing.wait_all_tasks_blocked()
        reply = None
        async with trio.open_nursery() as cancelling:

            async def one(client: HttpClient = client) -> None:
                nonlocal reply
                reply = await post(client)

            cancelling.start_soon(one)
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            cancelling.cancel_scope.cancel()
        statistics = client.statistics()
        assert statistics.active_connections == 0
        assert statistics.idle_connections == origin.open_connections
        assert await post(client) == OK_REPLY
        await client.aclose()
        assert origin.open_connections == 0
        if reply is not None:
            assert reply == OK_REPLY
            assert checkpoints > 5
            return
    pytest.fail("the request never finished")


async def test_cancelled_while_closing_the_client_can_be_closed_again(nursery: trio.Nursery) -> None:
    """A cancelled aclose leaves what it did not close in the pool, for the next."""
    gates = {name: trio.Event() for name in "abc"}
    origin = FakeOrigin(nursery, *(taking_turns([], name, gates) for name in "abc"))
    client = client_of(origin)
    async with trio.open_nursery() as requests:
        for _ in range(3):
            requests.start_soon(post, client)
        await trio.testing.wait_all_tasks_blocked()
        for gate in gates.values():
            gate.set()
    with trio.CancelScope() as scope:
        scope.cancel()
        await client.aclose()
    assert client.statistics().idle_connections == origin.open_connections
    await client.aclose()
    assert origin.open_connections == 0
