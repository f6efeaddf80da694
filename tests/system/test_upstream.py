"""What upstream may do to a relay: be away, be somebody else, be in trouble, be strict."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import trio

from tests.system.daemon import Site, eventually, open_site
from tests.system.laws import assert_accounted
from tests.system.traffic import make_batch

pytestmark = pytest.mark.slow

SESSIONS = 30
"""Enough for each to be under way with others."""

STRICT_LIMIT = 20
"""Requests a minute of an upstream that allows fewer than the published 100."""

MAX_IN_FLIGHT = 8
"""`forward.max_in_flight_per_key`, by default."""

A_MINUTE = 120.0
"""Patience with what upstream's window of 60 s holds back, or its many pauses, and the relay sends at its pace then."""

BEYOND_LIMIT = STRICT_LIMIT + 4
"""Sessions whose batches do not fit into one minute."""


async def test_dead_at_start(site: Site) -> None:
    """A relay that starts before its upstream is ready, takes batches, and delivers once there is somebody."""
    with trio.socket.socket() as reserved:  # bound, not listening: connections are refused
        await reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        relay = await site.start_relay({"upstream": {"ingest_url": f"http://{address}"}})
        await site.post(*(make_batch(f"s{number}", 0) for number in range(SESSIONS)))
        status = await relay.until("a failure", lambda status: status["warnings"])
        assert status["ready"]
        assert "does not answer" in status["warnings"][0]
    await site.start_sandbox(listen=address)
    await assert_accounted(site)


async def close(_stream: trio.SocketStream) -> None:
    """Accept, and close."""


async def babble(stream: trio.SocketStream) -> None:
    """Speak another protocol."""
    await stream.send_all(b"220 mail.example ESMTP\r\n")


async def be_silent(stream: trio.SocketStream) -> None:
    """Take whatever comes and say nothing."""
    while await stream.receive_some():
        pass


async def be_a_parking_page(stream: trio.SocketStream) -> None:
    """Answer as a web server that knows nothing of the API."""
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")


async def be_a_portal(stream: trio.SocketStream) -> None:
    """Send whoever comes elsewhere."""
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


async def break_off(stream: trio.SocketStream) -> None:
    """Begin to say yes, and vanish."""
    await stream.receive_some()
    await stream.send_all(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{"ok":')


async def test_somebody_else_answers(site: Site) -> None:
    """Whoever answers in upstream's place, and whatever they say, gets nothing taken for delivered."""
    roles: list[Callable[[trio.SocketStream], Awaitable[None]]]
    roles = [close, babble, be_silent, be_a_parking_page, be_a_portal, break_off]
    role, seen = roles[0], 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal seen
        seen += 1
        async with stream:
            await role(stream)

    async def twice() -> bool:
        return seen >= 2

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), serve, 0)
        address = "127.0.0.1:{1}".format(*listeners[0].socket.getsockname())
        await site.start_relay({"upstream": {"ingest_url": f"http://{address}", "first_byte_seconds": 0.2}})
        await site.post(*(make_batch(f"s{number}", 0) for number in range(3)))
        for role in roles:
            seen = 0
            await eventually(f"two attempts at an upstream to {role.__name__}", twice)
        account = (await site.relay.status())["account"]
        assert (account["delivered"], account["spooled"]) == (0, site.sent.events)
        nursery.cancel_scope.cancel()
    await site.start_sandbox(listen=address)
    await assert_accounted(site)


async def test_trouble_of_every_kind(site: Site) -> None:
    """Half of all requests failing, by every status that can pass, delays batches and loses none."""
    statuses = [404, 405, 408, 410, 425, 429, 500, 502, 503, 504, 599]
    await site.start_sandbox("--seed", "3")
    await site.sandbox.fault(error_rate=0.4, error_status=statuses, drop_after_rate=0.1)
    await site.start_relay(
        {"forward": {"backoff_base_seconds": 0.01, "backoff_max_seconds": 0.02, "hold_seconds": 0.02}}
    )
    seen: set[int] = set()
    with trio.fail_after(A_MINUTE):
        for sequence in count():
            is_final = seen.issuperset(statuses)
            await site.post(*(make_batch(f"s{number}", sequence, is_final=is_final) for number in range(SESSIONS)))
            if is_final:
                break
            seen = {int(status) for status in (await site.sandbox.report())["responses"]}
    await assert_accounted(site, seconds=A_MINUTE)  # each 429 is a pause of a second, and there is one now and then


async def play_at_a_stricter_upstream(directory: Path) -> None:
    """Believe in 100 requests a minute where 20 are allowed."""
    async with open_site(directory) as site:
        await site.start_sandbox("--requests-per-minute", str(STRICT_LIMIT))
        await site.start_relay({"budget": {"requests_per_minute": 100}})
        await site.post(*(make_batch(f"s{number}", 0) for number in range(BEYOND_LIMIT)))
        status = await site.relay.until("a refusal", lambda status: status["forward"]["lanes"][0]["state"] == "limited")
        assert status["ready"]
        await assert_accounted(site, seconds=A_MINUTE)
        # Those that were under way at the first refusal; then the key waits until it may go on.
        assert 1 <= (await site.sandbox.report())["rate_limited"] <= MAX_IN_FLIGHT


async def play_within_the_limit(directory: Path) -> None:
    """Know the limit, and be killed twice while the minute passes."""
    async with open_site(directory) as site:
        await site.start_sandbox("--requests-per-minute", str(STRICT_LIMIT))
        await site.start_relay({"budget": {"requests_per_minute": STRICT_LIMIT, "margin_seconds": 2}})
        await site.post(*(make_batch(f"s{number}", 0) for number in range(BEYOND_LIMIT)))
        # The first half goes at once, the rest at its pace; what the relay forgot now, it would spend again.
        half = STRICT_LIMIT // 2
        await site.relay.until("half the budget to be spent", lambda it: it["forward"]["batches_delivered"] >= half)
        for sequence in (1, 2):
            site.relay.kill()
            await site.start_relay()
            await site.post(make_batch("s0", sequence))
        await assert_accounted(site, seconds=A_MINUTE)
        report = await site.sandbox.report()
        assert report["rate_limited"] == 0
        assert half < report["peak_requests_per_minute"] <= STRICT_LIMIT


async def test_limits(tmp_path: Path) -> None:
    """A limit that is known is kept, also over restarts; one that is stricter than known costs time, not events."""
    # Side by side, since both wait for the same minute.
    async with trio.open_nursery() as nursery:
        for play in (play_at_a_stricter_upstream, play_within_the_limit):
            directory = tmp_path / play.__name__
            directory.mkdir()
            nursery.start_soon(play, directory)
