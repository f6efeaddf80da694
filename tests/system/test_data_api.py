"""The installed relay between real clients and an origin of the data API, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from tests.system.daemon import Relay, Site, eventually
from tests.system.laws import assert_accounted
from tests.system.traffic import make_batch
from tests.system.wire import ask

pytestmark = pytest.mark.slow

LARGE_BYTES = 100_000_000
"""Of an answer that a slow reader takes."""

GROWTH_BYTES = 8_000_000
"""What the relay may grow by for it: the window, buffers, and a garbage collector's mood."""

TOKEN, HELD, GIVEN = "luc_api_of_a_client", "luc_api_of_the_relay", "given-out-by-the-operator"


class Origin:
    """A data API that answers what it is told to, byte for byte."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[bytes] = []
        self.sent_bytes = 0
        self.closed = 0

    async def talk(self, stream: trio.SocketStream) -> None:
        """Play one connection."""
        request = b""
        try:
            while data := await stream.receive_some():
                request += data
                if b"\r\n\r\n" in request:
                    self.requests.append(request)
                    await self._answer(stream, request)
                    request = b""
        except trio.BrokenResourceError:
            pass
        finally:
            self.closed += 1

    async def _answer(self, stream: trio.SocketStream, request: bytes) -> None:
        target = request.split()[1]
        if target.startswith(b"/api/v1/insights"):
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % LARGE_BYTES)
            piece = b"x" * 65_536
            while self.sent_bytes < LARGE_BYTES:
                await stream.send_all(piece[: LARGE_BYTES - self.sent_bytes])
                self.sent_bytes = min(self.sent_bytes + len(piece), LARGE_BYTES)
        elif target.startswith(b"/api/v1/signals"):
            await stream.receive_some()  # which returns when the relay hangs up
        else:
            await stream.send_all(
                b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\nx-ratelimit-remaining: 7\r\n\r\n{"issues":[]}'
            )


@asynccontextmanager
async def origin_before(site: Site, **options: object) -> AsyncIterator[tuple[Origin, Relay]]:
    """Start a sandbox, an origin, and a relay before both."""
    origin = Origin()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, origin.talk, 0, host="127.0.0.1"))
        origin.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        await site.start_sandbox()
        relay = await site.start_relay({"upstream": {"data_url": origin.url}, "data_api": options})
        yield origin, relay
        nursery.cancel_scope.cancel()


def request(target: str, token: str = TOKEN) -> bytes:
    """Return a read, as bytes."""
    head = f"GET {target} HTTP/1.1\r\nHost: relay\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
    return head.encode()


async def resident(relay: Relay) -> int:
    """Return the relay's memory."""
    size: int = (await relay.status())["process"]["resident_bytes"]
    return size


async def test_a_large_answer_passes_in_little_memory(site: Site) -> None:
    """100 MB to a slow reader hold upstream back, not memory up, and batches are taken and delivered meanwhile."""
    async with origin_before(site) as (origin, relay):
        await ask(f"{relay.url}/api/v1/issues", headers=[("Authorization", f"Bearer {TOKEN}")])
        await site.post(make_batch("before", 0))
        before = peak = await resident(relay)
        async with await trio.open_tcp_stream(*relay.address) as stream:
            await stream.send_all(request("/api/v1/insights"))
            received = 0
            while received < 10_000_000:  # slowly, so that every buffer on the way fills
                received += len(await stream.receive_some(65_536))
                await trio.sleep(0.002)
                # The kernel's buffers are tens of megabytes at the most; what the relay holds is in its memory.
                assert origin.sent_bytes < LARGE_BYTES, "upstream is not held back"
            for sequence in range(1, 6):
                await site.post(make_batch("meanwhile", sequence))
                peak = max(peak, await resident(relay))
            while data := await stream.receive_some(1_048_576):
                received += len(data)
            peak = max(peak, await resident(relay))
        assert received > LARGE_BYTES
        assert peak < before + GROWTH_BYTES
        await assert_accounted(site)


async def test_a_client_that_leaves_ends_the_request(site: Site) -> None:
    """When a client hangs up, upstream's connection is closed, whether an answer had begun or not."""
    async with origin_before(site) as (origin, relay):
        for target in ("/api/v1/signals", "/api/v1/insights"):
            closed = origin.closed
            async with await trio.open_tcp_stream(*relay.address) as stream:
                await stream.send_all(request(target))
                if target.endswith("insights"):
                    await stream.receive_some()
                else:
                    await relay.until("the request", lambda status: status["data_api"]["in_flight"] == 1)

            async def is_closed(closed: int = closed) -> bool:
                return origin.closed > closed

            await eventually("upstream's connection to be closed", is_closed)
            await relay.until("nothing under way", lambda status: status["data_api"]["in_flight"] == 0)
        await assert_accounted(site)


async def test_tokens_of_the_data_api_stay_inside(site: Site) -> None:
    """No token is in a log, a metric or the status: a client's, the relay's own, or those it gives out."""
    (site.directory / "token").write_text(HELD)
    options = {"token_file": "token", "client_tokens": [GIVEN]}
    async with origin_before(site, **options) as (origin, relay):
        for token in (TOKEN, GIVEN):
            assert (
                await ask(f"{relay.url}/api/v1/issues", headers=[("Authorization", f"Bearer {token}")])
            ).status == 200
        assert [HELD.encode() in each for each in origin.requests] == [False, True]
        (site.directory / "token").unlink()
        await trio.sleep(1.1)  # what was read of it is old now
        headers = [("Authorization", f"Bearer {GIVEN}"), ("Cache-Control", "no-store")]
        assert (await ask(f"{relay.url}/api/v1/issues", headers=headers)).status == 200
        status = await relay.until("the warning", lambda status: status["warnings"])
        assert status["warnings"] == ["data_api.token_file cannot be read: No such file or directory"]
        assert len(status["data_api"]["reads_left_by_key"]) == 2
        said = [(await ask(f"{relay.admin}{path}")).body.decode() for path in ("/status", "/metrics")]
        await assert_accounted(site)
        await relay.stop()
        for text in (relay.log, relay.output, *said):
            assert not any(token in text for token in (TOKEN, HELD, GIVEN))


async def test_the_end_finishes_an_answer_in_hand(site: Site) -> None:
    """SIGTERM amid an answer lets it pass to its end, and then the relay ends by 0."""
    async with origin_before(site) as (_, relay):
        async with await trio.open_tcp_stream(*relay.address) as stream:
            await stream.send_all(request("/api/v1/insights"))
            received = len(await stream.receive_some())
            await assert_accounted(site)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay.stop)
                while data := await stream.receive_some(1_048_576):
                    received += len(data)
        assert received > LARGE_BYTES
