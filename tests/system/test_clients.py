"""What clients send, as they send it: every form the contract names, and company that would spoil it for others."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
import trio
import zstandard

from tests.system.daemon import Relay, Site
from tests.system.laws import assert_accounted
from tests.system.traffic import KEY, TARGET, make_batch, make_events
from tests.system.wire import Answer, Headers, ask, connect

pytestmark = pytest.mark.slow

WITH_KEY: Headers = (("X-Lucent-Api-Key", KEY),)

IDLE_CONNECTIONS = 300
"""A site's open tabs; well under the 1 024 descriptors that a process has by default."""


@dataclass(frozen=True)
class Form:
    """A way to send a batch."""

    name: str
    encode: Callable[[bytes], bytes] = bytes
    headers: Headers = WITH_KEY
    query: str = ""


def raw_deflate(data: bytes) -> bytes:
    """Compress as senders do who misread what `deflate` means."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def said(coding: str) -> Headers:
    """Return headers that say how a body is encoded."""
    return (*WITH_KEY, ("Content-Encoding", coding))


FORMS = (
    Form("plain"),
    Form("gzip", gzip.compress, said("gzip")),
    Form("gzip, not said", gzip.compress),
    Form("gzip, said and not done", bytes, said("gzip")),
    Form("gzip in two members", lambda body: gzip.compress(body[:99]) + gzip.compress(body[99:]), said("gzip")),
    Form("zstd", zstandard.compress, said("zstd")),
    Form("deflate", zlib.compress, said("deflate")),
    Form("deflate without zlib's header", raw_deflate, said("deflate")),
    Form("byte order mark", lambda body: b"\xef\xbb\xbf" + body),
    Form("beacon", bytes, (("Content-Type", "text/plain;charset=UTF-8"),), f"?api_key={KEY}"),
)


async def post(relay: Relay, body: bytes, headers: Headers = WITH_KEY, query: str = "") -> Answer:
    """Send a body on a connection of its own."""
    return await ask(f"{relay.url}{TARGET}{query}", "POST", headers, body)


async def test_every_form_is_taken(site: Site) -> None:
    """Plain, compressed in each way, compressed without saying so, said but not done, and as a beacon: all arrive."""
    await site.start_sandbox()
    relay = await site.start_relay()
    for form in FORMS:
        batch = make_batch(form.name, 0, 20)
        answer = await post(relay, form.encode(batch.body), form.headers, form.query)
        assert (answer.status, answer.json()) == (200, {"ok": True}), form.name
        assert answer.headers["access-control-allow-origin"] == "*"
        site.sent.add(batch)
    await assert_accounted(site)


async def test_text_cut_within_a_character(site: Site) -> None:
    """Lone surrogates, which browsers write and most parsers refuse, pass as they are, in events and beside them."""
    await site.start_sandbox()
    await site.start_relay()
    odd = rb'{"timestamp":1e3,"type":3.0,"data":{"text":"cut \ud83d","more":"\udc00\ud83d\ude00 \\ud83d"},"x":null}'
    batch = make_batch("s1", 0, [odd, *make_events("s1", 600), odd], page="https://shop.example/?q=\ud83d")
    await site.post(batch, make_batch("s2", 0, 5))
    await assert_accounted(site)


async def test_deep_page_is_taken(site: Site) -> None:
    """A snapshot of a page whose elements are nested as deep as browsers allow passes, beside text cut in two."""
    await site.start_sandbox()
    await site.start_relay()
    node = rb'{"type":3,"textContent":"cut \ud83d"}'
    for _ in range(512):
        node = b'{"type":2,"tagName":"div","childNodes":[%b]}' % node
    snapshot = b'{"timestamp":1,"type":2,"data":{"node":%b}}' % node
    await site.post(make_batch("s1", 0, [snapshot]), make_batch("s2", 0, [*make_events("s2", 499), snapshot, snapshot]))
    await assert_accounted(site)


async def test_giant_batch_is_cut(site: Site) -> None:
    """As many events as a batch may have, 30 MB together, arrive in batches within upstream's limits."""
    await site.start_sandbox()
    relay = await site.start_relay()
    batch = make_batch("s1", 7, make_events("s1", 16_384, 1_830))
    assert 29_000_000 < len(batch.body) < 33_554_432
    answer = await post(relay, batch.body)
    assert answer.status == 200
    site.sent.add(batch)
    await assert_accounted(site)
    stored = (await site.sandbox.session("s1"))["stored"]
    assert len(stored) == -(-16_384 // 500)


async def test_single_event_over_the_limit_travels_alone(site: Site) -> None:
    """An event that is larger than a batch may be reaches upstream alone, between its neighbours."""
    await site.start_sandbox()
    relay = await site.start_relay()
    events = [*make_events("a", 3), *make_events("large", 1, 5_000_000), *make_events("b", 3)]
    batch = make_batch("s1", 0, events)
    assert (await post(relay, batch.body)).status == 200
    site.sent.add(batch)
    await assert_accounted(site)
    assert [stored["events"] for stored in (await site.sandbox.session("s1"))["stored"]] == [3, 1, 3]


async def test_windows_share_sequences(site: Site) -> None:
    """Two tabs that number their batches alike do not collide upstream, which knows only session and number."""
    await site.start_sandbox()
    await site.start_relay()
    async with site.sdk() as sdk:
        for sequence in range(8):
            for window in ("w1", "w2", "w3"):
                await sdk.post(make_batch("s1", sequence, 40, window=window, is_final=(sequence, window) == (7, "w3")))
    await assert_accounted(site)


async def test_final_waits_for_other_tabs(site: Site) -> None:
    """A final is the last that upstream gets of a session, even if it fills a batch and what is elsewhere does not."""
    await site.start_sandbox("--latency", "0.1")
    await site.start_relay({"batch": {"linger_seconds": 3_600}})
    async with site.sdk() as sdk:
        await sdk.post(make_batch("s1", 0, 3, window="w1"))
        await sdk.post(make_batch("s1", 1, 1_200, window="w2"))
        await sdk.post(make_batch("s1", 2, 500, window="w3", is_final=True))
    await assert_accounted(site)
    assert (await site.sandbox.session("s1"))["final"]


async def test_refusals_say_why(site: Site) -> None:
    """What upstream would refuse is refused in its words, leaves nothing in the spool, and disturbs no other batch."""
    await site.start_sandbox()
    relay = await site.start_relay()
    good = make_batch("s1", 0).body
    missing = await post(relay, good, ())
    assert (missing.status, missing.json()) == (401, {"error": "Missing API key"})
    broken = await post(relay, b'{"session":')
    assert (broken.status, broken.json()["error"]) == (400, "Invalid replay batch")
    wrong = await post(relay, good.replace(b'"type"', b'"kind"'))
    assert (wrong.status, wrong.json()["details"][0]["path"]) == (400, ["replay", "events", 0, "type"])
    numerous = await post(relay, make_batch("s1", 0, 16_385).body)
    assert numerous.status == 413
    assert "16385 events, more than 16384" in numerous.json()["error"]
    unknown = await post(relay, good, (*WITH_KEY, ("Content-Encoding", "br")))
    assert unknown.status == 415
    bomb = await post(relay, gzip.compress(b" " * 100_000_000))
    assert bomb.status == 413
    for answer in (missing, broken, wrong, numerous, unknown, bomb):
        assert answer.headers["access-control-allow-origin"] == "*"
    await site.post(make_batch("s2", 0))
    await assert_accounted(site)


async def test_preflight_needs_no_key(site: Site) -> None:
    """A browser may ask whether it may send, and is told what the contract says."""
    relay = await site.start_relay()
    asked = (("Origin", "https://shop.example"), ("Access-Control-Request-Method", "POST"))
    answer = await ask(f"{relay.url}{TARGET}", "OPTIONS", asked)
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-headers"] == "Content-Type, Content-Encoding, X-Lucent-Api-Key"


async def test_stalled_clients_disturb_nobody(site: Site) -> None:
    """Hundreds of idle connections and some that stall within head or body cost the others nothing, and are ended."""
    await site.start_sandbox()
    relay = await site.start_relay({"listen": {"header_seconds": 2, "body_grace_seconds": 2, "idle_seconds": 3_600}})
    head = f"POST {TARGET} HTTP/1.1\r\nHost: relay\r\nX-Lucent-Api-Key: {KEY}\r\nContent-Length: 1000\r\n".encode()
    async with AsyncExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            await stack.enter_async_context(await connect(relay.url))
        stalled = [await stack.enter_async_context(await connect(relay.url)) for _ in range(20)]
        # Before any of them stalls, since those that do are ended soon.
        await relay.until(
            "all to be connected",
            lambda status: status["listener"]["open_connections"] == IDLE_CONNECTIONS + len(stalled),
        )
        for number, connection in enumerate(stalled):
            await connection.stream.send_all(head + (b"\r\n{" if number % 2 else b""))
        await site.post(*(make_batch(f"s{number}", 0, 100) for number in range(20)))
        for connection in stalled:
            with trio.fail_after(30):
                assert (await connection.stream.receive_some()).startswith(b"HTTP/1.1 408 ")
        status = await relay.until("bodies to be dropped", lambda status: not status["listener"]["buffered_bytes"])
        assert status["listener"]["open_connections"] >= IDLE_CONNECTIONS
    await assert_accounted(site)
