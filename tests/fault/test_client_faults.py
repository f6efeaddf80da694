from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.config import Upstream
from relay.errors import ConnectFailed, ExchangeFailed, ExchangeTimedOut, ReplyInvalid, UpstreamError
from relay.http.client import HttpClient, Reply
from relay.http.client_connection import EARLY_ANSWER_SECONDS, MAX_INFORMATIONAL
from tests.component.fake_origin import (
    OK,
    FakeOrigin,
    FakePeer,
    Script,
    answering,
    answering_then_closing,
    silence,
)

if TYPE_CHECKING:
    from relay.http.connect import Origin

OK_REPLY = Reply(200, {b"content-length": b"11"}, b'{"ok":true}')
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n3;a=b\r\n...\r\n0\r\nx: y\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\n"
TOO_LARGE = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n\r\nbig"
TOO_LARGE_REPLY = Reply(413, {b"content-length": b"3"}, b"big")


def client_of(origin: FakeOrigin, **options: Any) -> HttpClient:
    """Return a client of a scripted origin."""
    return HttpClient("https://ingest.example", Upstream(**options), connect=origin.connect)


async def post(client: HttpClient, body: bytes = b"{}") -> Reply:
    """Send a batch."""
    return await client.request("POST", "/api/sdk/replay", [], body)


# Patience.


async def stuck(peer: FakePeer) -> None:
    """Never read."""
    await trio.sleep_forever()


async def drip(peer: FakePeer) -> None:
    """Answer for ever, a byte a second."""
    await peer.read_request()
    await peer.send(HEAD + b"\r\n")
    while True:
        await trio.sleep(1)
        await peer.send(b"x")


async def early_hints(peer: FakePeer) -> None:
    """Answer at once, but never finally."""
    await peer.read_request()
    await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    await silence(peer)


async def slow_reader(peer: FakePeer) -> None:
    """Take the request after 20 seconds, and never answer."""
    await trio.sleep(20)
    await silence(peer)


LIMITS = {"write_seconds": 30.0, "first_byte_seconds": 60.0, "response_seconds": 90.0}


@pytest.mark.parametrize(
    ("script", "options", "seconds", "message"),
    [
        (stuck, {}, 30, "write_seconds = 30 passed before the request was sent"),
        (silence, {}, 60, "first_byte_seconds = 60 passed before a byte of the answer"),
        (silence, {"response_seconds": 50.0}, 50, "response_seconds = 50 passed before a byte of the answer"),
        (slow_reader, {}, 80, "first_byte_seconds = 60 passed before a byte of the answer"),
        (drip, {}, 90, "response_seconds = 90 passed in the middle of the answer"),
        (early_hints, {}, 90, "response_seconds = 90 passed in the middle of the answer"),
    ],
)
async def test_each_timeout_ends_an_exchange_at_its_time(
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    script: Script,
    options: dict[str, float],
    seconds: float,
    message: str,
) -> None:
    """A timeout counts from where its option says, names the option, and closes the connection."""
    origin = FakeOrigin(nursery, script, lockstep=True)
    started_at = trio.current_time()
    with pytest.raises(ExchangeTimedOut) as caught:
        await post(client_of(origin, **LIMITS | options))
    assert trio.current_time() - started_at == pytest.approx(seconds)
    assert str(caught.value) == f"https://ingest.example: {message}"
    assert origin.open_connections == 0
    nursery.cancel_scope.cancel()


async def test_connecting_has_a_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """A connection that is not there in time counts as failed: nothing was sent."""

    async def connect(origin: Origin) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    client = HttpClient("http://ingest.example:8080", Upstream(connect_seconds=10), connect=connect)
    with pytest.raises(ConnectFailed, match=r"^http://ingest\.example:8080: .* connect_seconds = 10$"):
        await post(client)
    assert trio.current_time() == pytest.approx(10)
    assert client.statistics().connect_failures_total == 1


# Answers that break off, and answers that are none.


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("piece_bytes", [0, 1], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("answer", [OK, CHUNKED], ids=["length", "chunked"])
async def test_an_answer_cut_anywhere_is_a_failed_exchange(
    nursery: trio.Nursery,
    answer: bytes,
    piece_bytes: int,
    is_reset: bool,
) -> None:
    """No prefix of an answer passes for the whole."""
    for length in range(len(answer)):

        async def cut(peer: FakePeer, length: int = length) -> None:
            await peer.read_request()
            peer.wire.is_reset = is_reset
            await peer.send(answer[:length], piece_bytes=piece_bytes)

        origin = FakeOrigin(nursery, cut)
        progress = "in the middle of the answer" if length else "before a byte of the answer"
        with pytest.raises(ExchangeFailed, match=f"the connection ended {progress}$"):
            await post(client_of(origin))
        assert origin.open_connections == 0


INVALID: dict[str, bytes] = {
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n",
    "HTTP/2 settings": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 No\r\n\r\n",
    "a protocol switch": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    "a header without colon": HEAD + b"server\r\n\r\n",
    "a header with NUL": HEAD + b"x: a\0b\r\n\r\n",
    "a blank before the colon": HEAD + b"content-length : 2\r\n\r\nok",
    "a negative length": HEAD + b"content-length: -1\r\n\r\n",
    "a length beyond counting": HEAD + b"content-length: " + b"9" * 5_000 + b"\r\n\r\n",
    "two lengths": HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nok",
    "an unknown transfer coding": HEAD + b"transfer-encoding: gzip\r\n\r\n",
    "a chunk without size": HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
    "a chunk longer than it said": HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
    "a chunk extension without end": HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * 40_000,
    "trailers without end": HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 9_000,
    "a status line without end": b"HTTP/1.1 200 " + b"x" * 40_000,
    "headers without end": HEAD + b"x: y\r\n" * 9_000,
    "informational answers without end": b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INFORMATIONAL + 1) + OK,
    "a body over the limit": HEAD + b"content-length: 2000\r\n\r\n" + b"x" * 2_000,
    "chunks over the limit": HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1_025,
    "a body over the limit without length": HEAD + b"\r\n" + b"x" * 1_025,
}


@pytest.mark.parametrize("piece_bytes", [0, 1], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("answer", INVALID.values(), ids=INVALID)
async def test_what_is_no_answer_is_called_so(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, answer: bytes, piece_bytes: int
) -> None:
    """Garbage and excess become ReplyInvalid at once, with a short message, and cost the connection."""
    origin = FakeOrigin(nursery, answering(answer, piece_bytes=piece_bytes))
    with pytest.raises(ReplyInvalid, match=r"^https://ingest\.example: ") as caught:
        await post(client_of(origin, max_response_bytes=1_024))
    assert len(str(caught.value)) < 300
    assert trio.current_time() == 0
    assert origin.open_connections == 0


async def test_an_answer_of_exactly_the_limit_is_taken(nursery: trio.Nursery) -> None:
    """max_response_bytes is the longest body that is allowed, and 1xx answers up to their limit are skipped."""
    informational = b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_INFORMATIONAL
    answer = informational + HEAD + b"content-length: 1024\r\n\r\n" + b"x" * 1_024
    client = client_of(FakeOrigin(nursery, answering(answer)), max_response_bytes=1_024)
    assert (await post(client)).body == b"x" * 1_024
    await client.aclose()


# Answers that come before the request is through.

BODY = b"x" * 1_000_000


async def test_an_early_answer_is_not_lost_with_the_connection(nursery: trio.Nursery) -> None:
    """A server that refuses a body unread, answers and closes, is heard."""

    async def refuse(peer: FakePeer) -> None:
        await peer.stream.receive_some(100)
        await peer.send(TOO_LARGE)

    origin = FakeOrigin(nursery, refuse, lockstep=True)
    client = client_of(origin)
    assert await post(client, BODY) == TOO_LARGE_REPLY
    assert origin.open_connections == 0
    assert client.statistics().idle_connections == 0


async def test_an_early_answer_ends_the_sending(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """A server that answers, keeps the connection and never reads the rest does not hold us."""

    async def refuse(peer: FakePeer) -> None:
        await peer.stream.receive_some(100)
        await peer.send(TOO_LARGE)
        await trio.sleep_forever()

    origin = FakeOrigin(nursery, refuse, lockstep=True)
    assert await post(client_of(origin), BODY) == TOO_LARGE_REPLY
    assert trio.current_time() == 0
    assert origin.open_connections == 0
    nursery.cancel_scope.cancel()


async def test_an_answer_after_the_sending_broke_is_still_read(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A server that stops reading first and answers a moment later is heard."""

    async def refuse(peer: FakePeer) -> None:
        await peer.stop_reading()
        await trio.sleep(EARLY_ANSWER_SECONDS - 1)
        await peer.send(TOO_LARGE)

    origin = FakeOrigin(nursery, refuse)
    assert await post(client_of(origin), BODY) == TOO_LARGE_REPLY
    assert origin.open_connections == 0


async def test_the_wait_for_an_early_answer_is_short(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A server that stops reading and says nothing has failed the exchange, not outwaited it."""

    async def stop(peer: FakePeer) -> None:
        await peer.stop_reading()
        await trio.sleep_forever()

    origin = FakeOrigin(nursery, stop)
    with pytest.raises(ExchangeFailed, match=r"before the request was sent$") as caught:
        await post(client_of(origin), BODY)
    assert isinstance(caught.value.__cause__, trio.BrokenResourceError)
    assert trio.current_time() == pytest.approx(EARLY_ANSWER_SECONDS)
    assert origin.open_connections == 0
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
async def test_a_connection_that_ends_under_the_request_is_a_failed_exchange(
    nursery: trio.Nursery,
    is_reset: bool,
) -> None:
    """Without an answer a broken pipe is what it is."""

    async def vanish(peer: FakePeer) -> None:
        await peer.stream.receive_some(100)
        peer.wire.is_reset = is_reset

    origin = FakeOrigin(nursery, vanish, lockstep=True)
    with pytest.raises(ExchangeFailed, match=r"before the request was sent$"):
        await post(client_of(origin), BODY)
    assert origin.open_connections == 0


# Anything.


async def _any_answer(answer: bytes, piece_bytes: int) -> None:
    """Check the one promise that holds for every answer: a reply or an UpstreamError, and nothing left open."""
    async with trio.open_nursery() as nursery:
        origin = FakeOrigin(nursery, answering_then_closing(answer, piece_bytes=piece_bytes))
        client = client_of(origin, max_response_bytes=1_024)
        with suppress(UpstreamError):
            reply = await post(client)
            assert 200 <= reply.status <= 999
            assert len(reply.body) <= 1_024
        await client.aclose()
        assert origin.open_connections == 0


LINES = st.sampled_from([*OK.splitlines(keepends=True), *CHUNKED.splitlines(keepends=True), b"\r\n", b"0", b"\n"])


@given(answer=st.lists(LINES | st.binary(max_size=8)).map(b"".join), piece_bytes=st.integers(0, 7))
@example(answer=HEAD + b"content-length: " + b"9" * 5_000 + b"\r\n\r\n", piece_bytes=0)
@settings(deadline=None, max_examples=150)
def test_no_answer_breaks_the_client(answer: bytes, piece_bytes: int) -> None:
    """Whatever a server says, the caller gets a reply or an UpstreamError, and the connection is accounted for."""
    trio.run(_any_answer, answer, piece_bytes, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", range(10))
async def test_over_a_terrible_network_every_reply_belongs_to_its_request(
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    seed: int,
) -> None:
    """With connections dying at random, callers who retry all get their own answer, and nothing leaks."""
    dice = random.Random(seed)

    async def unreliable(peer: FakePeer) -> None:
        while request := await peer.read_request():
            await trio.sleep(dice.choice([0, 0, 0, 1, 20, 70]))
            fate = dice.random()
            if fate < 0.1:
                return
            target = request.split(b" ")[1]
            answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(target), target)
            cut = dice.randrange(len(answer)) if fate < 0.2 else len(answer)
            await peer.send(answer[:cut], piece_bytes=dice.choice([0, 1, 10]))
            if fate < 0.3:
                peer.wire.is_reset = dice.random() < 0.5
                return
            await trio.sleep(dice.choice([0, 0, 3]))

    origin = FakeOrigin(nursery, *[unreliable] * 2_000)
    client = client_of(origin, max_idle_connections=3)

    async def caller(number: int) -> None:
        for turn in range(10):
            target = f"/{number}/{turn}"
            while True:
                try:
                    reply = await client.request("GET", target, [], b"")
                except UpstreamError:
                    continue
                break
            assert reply.body == target.encode()
            await trio.sleep(dice.choice([0, 1, 60]))

    async with trio.open_nursery() as callers:
        for number in range(8):
            callers.start_soon(caller, number)
    statistics = client.statistics()
    assert statistics.active_connections == 0
    assert statistics.idle_connections == origin.open_connections <= 3
    assert statistics.connections_opened_total == len(origin.wires)
    assert statistics.reused_total > 0
    await client.aclose()
    assert origin.open_connections == 0
