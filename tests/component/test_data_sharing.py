"""One token's budget serving many readers: what is shared, kept, stale, spent, and dropped by a change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from tests.component.data_proxy import ISSUE, ISSUES, Proxying, answer, get, patch, proxying
from tests.component.fake_origin import FakePeer, silence

TAGGED = 'ETag: "a"'
FRESH = "Cache-Control: max-age=60"
CHUNKED = b"HTTP/1.1 200 OK\r\ncache-control: max-age=60\r\ntransfer-encoding: chunked\r\n\r\n"


def status_of(headers: dict[bytes, bytes]) -> bytes:
    """Return what the relay's cache says of an answer."""
    return headers[b"cache-status"].removeprefix(b"lucent-relay; ")


def numbered(*lines: str) -> Callable[[bytes], bytes]:
    """Return an origin's mind: every answer has another number, and some headers."""
    count = 0

    def respond(_: bytes) -> bytes:
        nonlocal count
        count += 1
        return answer(b"%d" % count, *lines)

    return respond


async def body_of(it: Proxying, request: bytes) -> bytes:
    """Return an answer's body."""
    return (await it.ask(request))[2]


# -- shared


@asynccontextmanager
async def overtaken_read() -> AsyncIterator[tuple[Proxying, Callable[[], Awaitable[bytes]]]]:
    """Give a proxy of which a read is on its way while later ones are answered "new", and what lets that one end."""
    is_read, may_answer = trio.Event(), trio.Event()

    async def slow(peer: FakePeer) -> None:
        await peer.read_request()
        is_read.set()
        await may_answer.wait()
        await peer.send(answer(b"old", FRESH))
        await peer.wait_closed()

    async def quick(peer: FakePeer) -> None:
        while await peer.read_request():
            await peer.send(answer(b"new", FRESH))

    async with proxying(None, slow, quick) as it:
        first = it.connect()
        await first.send(get())
        await is_read.wait()

        async def finish() -> bytes:
            may_answer.set()
            return (await first.read())[2]

        yield it, finish
        await first.aclose()


async def test_identical_reads_at_once_are_one_request(autojump_clock: trio.testing.MockClock) -> None:
    """Any number of clients that ask the same at the same time cost one request, and all get all of it."""
    async with proxying(numbered(), cache_seconds=0) as it:
        it.origin.gate = trio.Event()  # type: ignore[attr-defined]
        answers: list[tuple[bytes, bytes]] = []

        async def ask(*lines: str, **options: Any) -> None:
            _, headers, body = await it.ask(get(ISSUES, *lines, **options))
            answers.append((body, status_of(headers)))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, f"User-Agent: browser-{number}")
            await trio.sleep(1)
            assert len(it.asked) == 1
            it.origin.gate.set()  # type: ignore[attr-defined]
        assert {body for body, _ in answers} == {b"1"}
        assert sorted(status for _, status in answers) == sorted(
            [b"fwd=miss; fwd-status=200"] + [b"fwd=miss; fwd-status=200; collapsed"] * 9
        )
        assert it.data_api.statistics().cache_by_outcome["shared"] == 9


DIFFERENT = {
    "another token": (get(), get(by="luc_api_other")),
    "no token": (get(by=""), get(by="")),
    "another target": (get(), get(ISSUES + "?limit=1")),
    "another coding": (get(), get(ISSUES, "Accept-Encoding: gzip")),
    "another method": (get(), get(method="HEAD")),
    "a condition": (get(), get(ISSUES, 'If-None-Match: "x"')),
    "a range": (get(ISSUES, "Range: bytes=0-1"), get(ISSUES, "Range: bytes=0-1")),
    "no-store": (get(ISSUES, "Cache-Control: no-store"), get(ISSUES, "Cache-Control: no-store")),
    "a wish for fresh": (get(), get(ISSUES, "Cache-Control: no-cache")),
    "a change": (patch(), patch()),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT.keys())
async def test_what_is_not_identical_is_not_shared(
    pair: tuple[bytes, bytes], autojump_clock: trio.testing.MockClock
) -> None:
    """Two requests that may have different answers, or may not share one, are two."""
    async with proxying(lambda _: answer(b"")) as it:
        it.origin.gate = trio.Event()  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            for request in pair:
                nursery.start_soon(it.ask, request)
                await trio.sleep(1)
            assert len(it.asked) == 2
            it.origin.gate.set()  # type: ignore[attr-defined]


async def test_vary_parts_what_was_shared(autojump_clock: trio.testing.MockClock) -> None:
    """A client that waited for another's answer asks itself where that turns out to depend on more than it shares."""
    async with proxying(numbered("Vary: User-Agent")) as it:
        it.origin.gate = trio.Event()  # type: ignore[attr-defined]
        bodies: dict[str, bytes] = {}

        async def ask(name: str, agent: str) -> None:
            bodies[name] = await body_of(it, get(ISSUES, f"User-Agent: {agent}"))

        async with trio.open_nursery() as nursery:
            for name, agent in (("first", "a"), ("like it", "a"), ("unlike it", "b")):
                nursery.start_soon(ask, name, agent)
                await trio.sleep(1)
            assert len(it.asked) == 1
            it.origin.gate.set()  # type: ignore[attr-defined]
        assert bodies == {"first": b"1", "like it": b"1", "unlike it": b"2"}


async def test_the_first_client_may_leave(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever asked first is not needed: the others get their answer, and only the last one's leaving cancels it."""
    async with proxying(numbered()) as it:
        it.origin.gate = trio.Event()  # type: ignore[attr-defined]
        first, second = it.connect(), it.connect()
        await first.send(get())
        await trio.sleep(1)
        await second.send(get())
        await trio.sleep(1)
        await first.aclose()
        await trio.sleep(1)
        assert it.data_api.statistics().in_flight == 1
        it.origin.gate.set()  # type: ignore[attr-defined]
        assert (await second.read())[2] == b"1"
        await second.aclose()
        assert len(it.asked) == 1


async def test_readers_of_one_answer_read_at_their_own_pace(autojump_clock: trio.testing.MockClock) -> None:
    """Within the window a slow reader holds nobody up; a late one gets the answer from its first byte."""

    async def script(peer: FakePeer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nabcd")
        await trio.sleep(10)
        await peer.send(b"efgh")
        await peer.wait_closed()

    async with proxying(None, script) as it:
        slow = it.connect(is_lockstep=True)
        await slow.send(get())
        await trio.sleep(5)
        late = it.connect()
        await late.send(get())
        assert (await late.read())[2] == b"abcdefgh"
        assert trio.current_time() == pytest.approx(10, abs=0.1)
        assert (await slow.read())[2] == b"abcdefgh"
        await late.aclose()
        await slow.aclose()


# -- kept


async def test_ten_readers_of_a_page_for_a_minute(autojump_clock: trio.testing.MockClock) -> None:
    """Ten readers that ask for a page every second for a minute cost upstream four requests, with its defaults."""
    async with proxying(numbered()) as it:

        async def read(phase: float) -> None:
            await trio.sleep(phase)
            async with it.connect() as client:
                for _ in range(60):
                    assert (await client.ask(get()))[0] == 200
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(read, number / 10)
        assert len(it.asked) == 4
        assert sum(it.data_api.statistics().cache_by_outcome.values()) == 600


async def test_a_kept_answer_says_so(autojump_clock: trio.testing.MockClock) -> None:
    """A kept answer has upstream's headers and bytes, its age, and where it came from; a HEAD is served from it."""
    async with proxying(numbered(TAGGED, FRESH, "X-A: 1", "X-RateLimit-Remaining: 5")) as it:
        _, first, _ = await it.ask(get())
        assert status_of(first) == b"fwd=miss; fwd-status=200; stored"
        await trio.sleep(20)
        status, headers, body = await it.ask(get())
        assert (status, body, headers[b"age"], headers[b"x-a"]) == (200, b"1", b"20", b"1")
        assert (status_of(headers), headers[b"via"]) == (b"hit; ttl=40", b"1.1 lucent-relay")
        assert b"x-ratelimit-remaining" not in headers
        status, headers, body = await it.ask(get(method="HEAD"), has_body=False)
        assert (status, headers[b"content-length"], headers[b"age"], body) == (200, b"1", b"20", b"")
        assert len(it.asked) == 1


async def test_a_stale_answer_is_asked_about(autojump_clock: trio.testing.MockClock) -> None:
    """When it is no longer fresh, upstream is asked by its tag, and a 304 makes it fresh again: a whole 200 here."""

    def respond(request: bytes) -> bytes:
        if b'if-none-match: "a"' in request:
            return b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\nx-new: 1\r\n\r\n'
        return answer(b"one", TAGGED, "X-Old: 1")

    async with proxying(respond) as it:
        await it.ask(get())
        await trio.sleep(20)
        status, headers, body = await it.ask(get())
        assert (status, body, headers[b"x-new"], headers[b"x-old"]) == (200, b"one", b"1", b"1")
        assert status_of(headers) == b"fwd=stale; fwd-status=304; stored"
        await trio.sleep(10)
        assert status_of((await it.ask(get()))[1]) == b"hit; ttl=5"
        assert (len(it.asked), len(it.origin.wires)) == (2, 1)
        assert it.data_api.statistics().cache_by_outcome == {
            **dict.fromkeys(("stale", "shared", "passed"), 0),
            **dict.fromkeys(("hit", "revalidated", "miss"), 1),
        }


async def test_a_clients_condition_is_answered_by_what_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    """A client that has it already gets a 304 without a body: from the cache, and when upstream was asked for it."""

    def respond(request: bytes) -> bytes:
        if b"if-none-match" in request:
            return b"HTTP/1.1 304 Not Modified\r\n\r\n"
        return answer(b"one", TAGGED)

    async with proxying(respond) as it:
        await it.ask(get())
        for condition, expected in (('"a"', 304), ('"b"', 200), ('W/"a", "b"', 304)):
            status, headers, body = await it.ask(get(ISSUES, f"If-None-Match: {condition}"), has_body=expected == 200)
            assert (status, body) == (expected, b"one" if expected == 200 else b"")
            assert headers[b"etag"] == b'"a"'
        assert len(it.asked) == 1
        await trio.sleep(20)
        status, headers, _ = await it.ask(get(ISSUES, 'If-None-Match: "a"'), has_body=False)
        assert (status, status_of(headers)) == (304, b"fwd=stale; fwd-status=304; stored")
        assert b"content-type" not in headers
        assert len(it.asked) == 2


async def test_a_condition_passes_where_nothing_is_kept() -> None:
    """Without anything kept a client's condition is upstream's to judge, and its 304 passes."""
    async with proxying(lambda _: b'HTTP/1.1 304 Not Modified\r\netag: "z"\r\n\r\n') as it:
        status, headers, _ = await it.ask(get(ISSUES, 'If-None-Match: "z"'), has_body=False)
        assert (status, headers[b"etag"]) == (304, b'"z"')
        assert b'if-none-match: "z"' in it.asked[0]


WISHES = {
    "no-cache": ("Cache-Control: no-cache", b"fwd=request; fwd-status=200; stored"),
    "pragma": ("Pragma: no-cache", b"fwd=request; fwd-status=200; stored"),
    "max-age=0": ("Cache-Control: max-age=0", b"fwd=request; fwd-status=200; stored"),
    "no-store": ("Cache-Control: no-store", b"fwd=bypass; fwd-status=200"),
}


@pytest.mark.parametrize(("line", "expected"), WISHES.values(), ids=WISHES.keys())
async def test_a_client_can_have_it_from_upstream(
    line: str, expected: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    """A request's own Cache-Control turns the cache off for it."""
    async with proxying(numbered(FRESH)) as it:
        await it.ask(get())
        await trio.sleep(1)
        _, headers, body = await it.ask(get(ISSUES, line))
        assert (body, status_of(headers)) == (b"2", expected)
        assert await body_of(it, get()) == (b"1" if line.endswith("no-store") else b"2")


async def test_only_if_cached_never_asks() -> None:
    """A client that wants it only from the cache gets it, or a 504."""
    async with proxying(numbered(FRESH)) as it:
        line = "Cache-Control: only-if-cached"
        status, headers, _ = await it.ask(get(ISSUES, line))
        assert (status, status_of(headers)) == (504, b"detail=only-if-cached")
        await it.ask(get())
        assert (await it.ask(get(ISSUES, line)))[0] == 200
        assert len(it.asked) == 1


async def test_tokens_have_nothing_in_common() -> None:
    """What is kept for one token is never served to another, nor to nobody."""
    async with proxying(numbered(FRESH)) as it:
        assert await body_of(it, get()) == b"1"
        assert await body_of(it, get(by="luc_api_other")) == b"2"
        assert await body_of(it, get(by="")) == b"3"
        assert await body_of(it, get(by="")) == b"4"
        assert await body_of(it, get()) == b"1"


async def test_a_refused_token_loses_what_was_kept(autojump_clock: trio.testing.MockClock) -> None:
    """Once upstream answers 401 or 403, nothing kept for that token is served again."""
    answers = [
        answer(b"one", FRESH),
        answer(b"no", status="401 Unauthorized"),
        answer(b"no", status="401 Unauthorized"),
    ]
    async with proxying(lambda _: answers.pop(0)) as it:
        await it.ask(get())
        assert (await it.ask(get("/api/v1/signals")))[0] == 401
        assert (await it.ask(get()))[0] == 401


async def test_an_answer_on_its_way_when_its_token_is_refused_is_not_kept(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What upstream said before it refused the token reaches who waited for it, and nobody after that."""
    is_asked, may_answer = trio.Event(), trio.Event()

    async def slow(peer: FakePeer) -> None:
        await peer.read_request()
        is_asked.set()
        await may_answer.wait()
        await peer.send(answer(b"one", FRESH))
        await refuse(peer)

    async def refuse(peer: FakePeer) -> None:
        while await peer.read_request():
            await peer.send(answer(b"no", status="401 Unauthorized"))

    async with proxying(None, slow, refuse) as it:
        first = it.connect()
        await first.send(get())
        await is_asked.wait()
        assert (await it.ask(get(ISSUE)))[0] == 401
        assert (await it.ask(get()))[0] == 401
        may_answer.set()
        assert (await first.read())[2] == b"one"
        assert (await it.ask(get()))[0] == 401
        await first.aclose()


async def test_the_cache_is_bounded() -> None:
    """Kept answers never take more than `cache_max_bytes`: the least recently used go, one too large is not kept."""
    limit = 400_000
    async with proxying(lambda _: answer(b"x" * 40_000, FRESH), cache_max_bytes=limit) as it:
        for number in range(20):
            await it.ask(get(f"{ISSUES}?cursor={number}"))
            await it.ask(get(f"{ISSUES}?cursor=0"))
            assert it.data_api.statistics().cache_bytes <= limit
        assert len(it.asked) == 20
        assert it.data_api.statistics().cache_evicted == 11
        await it.ask(get(f"{ISSUES}?cursor=1"))
        assert len(it.asked) == 21
    async with proxying(lambda _: answer(b"x" * 120_000, FRESH), cache_max_bytes=limit) as it:
        for _ in range(2):
            await it.ask(get())
        assert (len(it.asked), it.data_api.statistics().cache_bytes) == (2, 0)


@pytest.mark.parametrize("size", [0, 1_000])
async def test_what_there_is_no_room_for_is_not_said_to_be_kept(size: int) -> None:
    """`stored` in `Cache-Status` is for what is kept, or will be: not without a cache, nor for what is too large."""
    async with proxying(lambda _: answer(b"x" * 1_000, FRESH), cache_max_bytes=size * 8) as it:
        for _ in range(2):
            assert status_of((await it.ask(get()))[1]) == b"fwd=miss; fwd-status=200"
        assert it.data_api.statistics().cache_bytes == 0


async def test_an_answer_that_broke_off_is_not_kept() -> None:
    """Only whole answers are kept: neither a cut one, nor one whose end only the connection told."""
    for data in (
        b"HTTP/1.1 200 OK\r\ncache-control: max-age=60\r\ncontent-length: 100\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ncache-control: max-age=60\r\n\r\nabc",
    ):

        async def script(peer: FakePeer, data: bytes = data) -> None:
            await peer.read_request()
            await peer.send(data)

        with capture_logs():
            async with proxying(None, script) as it:
                async with it.connect() as client:
                    await client.send(get().replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                    assert b"abc" in await client.read_to_end()
                assert it.data_api.statistics().cache_bytes == 0


@pytest.mark.parametrize(
    ("newer", "is_outdated"),
    [
        (answer(b"two", "Cache-Control: no-store"), True),
        (answer(b"gone", status="404 Not Found"), True),
        (answer(b"x" * 70_000, FRESH), True),
        (CHUNKED + b"%x\r\n%b\r\n" % (70_000, b"x" * 70_000) + b"0\r\n\r\n", True),
        (CHUNKED + b"%x\r\n%b\r\n" % (30_000, b"x" * 30_000) + b"0\r\n\r\n", True),
        (answer(b"down", status="503 Service Unavailable"), False),
        (answer(b"slow", "Retry-After: 0", status="429 Too Many Requests"), False),
    ],
    ids=["not to be kept", "gone", "too large", "longer than its window", "over its share", "trouble", "limited"],
)
async def test_what_upstream_has_said_otherwise_is_not_served_again(newer: bytes, is_outdated: bool) -> None:
    """Where a newer answer cannot be kept the older one goes too: nobody reads backwards, not in an outage either."""
    answers = [answer(b"one", FRESH), newer, answer(b"three")]
    async with proxying(lambda _: answers.pop(0), window_bytes=65_536, cache_max_bytes=120_000) as it:
        await it.ask(get())
        async with it.connect() as client:
            await client.send(get(ISSUES, "Cache-Control: no-cache", "Connection: close"))
            await client.read_to_end()
        assert await body_of(it, get()) == (b"three" if is_outdated else b"one")


async def test_a_kept_answer_that_may_not_be_kept_any_more_is_not(autojump_clock: trio.testing.MockClock) -> None:
    """A 304 that forbids to keep an answer is obeyed: it is passed on once more, and does not stand in for trouble."""
    answers = [
        answer(b"one", TAGGED),
        b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\ncache-control: no-store\r\n\r\n',
        answer(b"down", status="503 Service Unavailable"),
    ]
    async with proxying(lambda _: answers.pop(0), stale_seconds=600) as it:
        await it.ask(get())
        await trio.sleep(20)
        assert await body_of(it, get()) == b"one"
        assert (await it.ask(get()))[0] == 503
        assert it.data_api.statistics().cache_bytes == 0


async def test_an_older_answer_does_not_take_a_newer_ones_place(autojump_clock: trio.testing.MockClock) -> None:
    """Of two answers on their way at once, the one that was asked for last is kept, whichever comes first."""
    async with overtaken_read() as (it, finish):
        await trio.sleep(1)
        assert await body_of(it, get(ISSUES, "Cache-Control: no-cache")) == b"new"
        assert await finish() == b"old"
        assert await body_of(it, get()) == b"new"


# -- changed


async def test_a_change_drops_what_it_changed() -> None:
    """After a PATCH the issue and every list of issues are asked for anew, for all tokens; the rest stays kept."""
    async with proxying(numbered(FRESH)) as it:
        other = ISSUES + "/00000000-0000-4000-8000-000000000000"
        targets = (ISSUE, ISSUES, ISSUES + "?limit=5", other, "/api/v1/signals", "/api/v1/insights")
        for target in targets:
            await it.ask(get(target))
        await it.ask(get(by="luc_api_other"))
        asked = len(it.asked)
        await it.ask(patch())
        for target in targets:
            await it.ask(get(target))
        await it.ask(get(by="luc_api_other"))
        anew = [request.split()[1].decode().removeprefix("/base") for request in it.asked[asked + 1 :]]
        assert anew == [ISSUE, ISSUES, ISSUES + "?limit=5", ISSUES]


@pytest.mark.parametrize("spell", [str.upper, lambda name: name.replace("-", "%2D"), lambda name: f"%38{name[1:]}"])
async def test_a_change_drops_an_issue_by_any_spelling_of_its_id(spell: Callable[[str], str]) -> None:
    """Whatever case and escapes its id is written in, an issue that was changed is read anew."""
    parent, _, name = ISSUE.rpartition("/")
    other = f"{parent}/{spell(name)}"
    async with proxying(numbered(FRESH)) as it:
        assert [await body_of(it, get(target)) for target in (ISSUE, other)] == [b"1", b"2"]
        await it.ask(patch(other))
        assert [await body_of(it, get(target)) for target in (ISSUE, other)] == [b"4", b"5"]


async def test_a_refused_change_drops_nothing() -> None:
    """A 4xx changed nothing."""

    def respond(request: bytes) -> bytes:
        return answer(b"no", status="403 Forbidden") if request.startswith(b"PATCH") else answer(b"", FRESH)

    async with proxying(respond) as it:
        await it.ask(get(by="luc_api_reader"))
        await it.ask(patch())
        await it.ask(get(by="luc_api_reader"))
        assert len(it.asked) == 2


async def test_a_change_of_unknown_fate_drops_it_too() -> None:
    """Where nobody knows whether upstream made the change, it is taken for made."""

    def respond(request: bytes) -> bytes | None:
        return None if request.startswith(b"PATCH") else answer(b"", FRESH)

    with capture_logs():
        async with proxying(respond) as it:
            await it.ask(get(ISSUE))
            assert (await it.ask(patch()))[0] == 502
            await it.ask(get(ISSUE))
            assert [request.split()[0] for request in it.asked] == [b"GET", b"PATCH", b"PATCH", b"GET"]


async def test_a_refused_second_attempt_says_nothing_of_the_first() -> None:
    """Where a change was sent twice and refused the second time, the first may have been made."""
    unanswered = [True, False]

    def respond(request: bytes) -> bytes | None:
        if not request.startswith(b"PATCH"):
            return answer(b"", FRESH)
        return None if unanswered.pop(0) else answer(b"no", "Retry-After: 1", status="429 Too Many Requests")

    async with proxying(respond) as it:
        await it.ask(get(ISSUE))
        assert (await it.ask(patch()))[0] == 429
        await it.ask(get(ISSUE))
        assert [request.split()[0] for request in it.asked] == [b"GET", b"PATCH", b"PATCH", b"GET"]


async def test_a_read_that_began_before_a_change_does_not_outlive_it(autojump_clock: trio.testing.MockClock) -> None:
    """A read under way when a change is made is neither kept nor joined afterwards: what was written is read."""
    async with overtaken_read() as (it, finish):
        await it.ask(patch())
        assert await body_of(it, get()) == b"new"
        assert await finish() == b"old"
        assert await body_of(it, get()) == b"new"


# -- stale


async def test_trouble_upstream_is_bridged_by_option(autojump_clock: trio.testing.MockClock) -> None:
    """For `stale_seconds` after it was fresh a kept answer stands in for 5xx and silence, and says how old it is."""
    answers = [answer(b"one")]

    def respond(_: bytes) -> bytes | None:
        return answers.pop(0) if answers else answer(b"down", status="503 Service Unavailable")

    with capture_logs():
        async with proxying(respond, cache_seconds=10, stale_seconds=100) as it:
            await it.ask(get())
            await trio.sleep(30)
            status, headers, body = await it.ask(get())
            assert (status, body, headers[b"age"]) == (200, b"one", b"30")
            assert status_of(headers) == b"fwd=stale; fwd-status=503; ttl=-20; detail=upstream-down"
            assert b"warning" not in headers
            await trio.sleep(81)
            assert (await it.ask(get()))[0] == 503


async def test_silence_is_bridged_too(autojump_clock: trio.testing.MockClock) -> None:
    """A stale answer comes in place of 504 and 502; without the option trouble is said as it is."""

    async def once(peer: FakePeer) -> None:
        await peer.read_request()
        await peer.send(answer(b"one"))

    for option, expected in ((100, 200), (0, 504)):
        with capture_logs():
            async with proxying(None, once, silence, cache_seconds=10, stale_seconds=option) as it:
                await it.ask(get())
                await trio.sleep(30)
                status, headers, _ = await it.ask(get())
                assert status == expected
                if status == 200:
                    assert status_of(headers) == b"fwd=stale; ttl=-50; detail=upstream-down"


# -- spent


def limited(left: int, reset: float) -> tuple[str, str, str]:
    """Return what upstream says of a window."""
    return "X-RateLimit-Limit: 300", f"X-RateLimit-Remaining: {left}", f"X-RateLimit-Reset: {reset:.0f}"


async def test_a_spent_budget_is_said_without_a_request(autojump_clock: trio.testing.MockClock) -> None:
    """Once upstream says that nothing is left, requests are 429 here until the reset, with upstream's figures."""
    async with proxying(lambda _: answer(b"", *limited(0, it.wall_now + 42)), cache_seconds=0) as it:
        await it.ask(get())
        await trio.sleep(2)
        it.wall_now += 2
        status, headers, body = await it.ask(get())
        assert (status, body) == (429, b'{"error":"Rate limit exceeded"}')
        assert {name: value for name, value in headers.items() if name.startswith((b"retry", b"x-rate"))} == {
            b"retry-after": b"40",
            b"x-ratelimit-limit": b"300",
            b"x-ratelimit-remaining": b"0",
            b"x-ratelimit-reset": b"%d" % (it.wall_now + 40),
        }
        assert (await it.ask(patch()))[0] == 200, "changes have a budget of their own"
        assert (await it.ask(get(by="luc_api_other")))[0] == 200, "as has each token"
        assert len(it.asked) == 3
        assert it.data_api.statistics().limited == 1
        await trio.sleep(40)
        assert (await it.ask(get()))[0] == 200


async def test_our_own_count_holds_where_upstream_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """300 reads and 60 changes a minute are sent, and not one more."""
    async with proxying(lambda _: answer(b""), cache_seconds=0) as it:
        async with it.connect() as client:
            for request, limit in ((get(), 300), (patch(), 60)):
                statuses = [(await client.ask(request))[0] for _ in range(limit + 5)]
                assert statuses == [200] * limit + [429] * 5
        assert len(it.asked) == 360
        assert list(it.data_api.statistics().reads_left_by_key.values()) == [0]
        await trio.sleep(61)
        assert (await it.ask(get()))[0] == 200


async def test_what_was_never_sent_costs_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """Requests without a connection or a slot, and those whose client left before, take nothing from the budget."""
    settings: dict[str, Any] = {"reads_per_minute": 3, "writes_per_minute": 2, "max_in_flight": 1}

    def respond(request: bytes) -> bytes | None:
        return None if request.startswith(b"PATCH") else answer(b"")

    async def refuse(_: object) -> trio.abc.Stream:
        raise OSError("refused")

    with capture_logs():
        async with proxying(respond, cache_seconds=0, **settings) as it:
            connect = it.data_api._client._connect
            it.data_api._client._connect = refuse
            for _ in range(10):
                assert (await it.ask(get()))[0] == 502
            it.data_api._client._connect = connect
            it.origin.gate = trio.Event()  # type: ignore[attr-defined]
            async with it.connect() as slow, it.connect() as waiting, it.connect() as leaving:
                await slow.send(get())
                await trio.testing.wait_all_tasks_blocked()
                await waiting.send(get(ISSUE))
                await leaving.send(get("/api/v1/signals"))
                await trio.sleep(1)
                await leaving.aclose()
                await trio.sleep(1)
                it.origin.gate.set()  # type: ignore[attr-defined]
                assert ((await slow.read())[0], (await waiting.read())[0]) == (200, 200)
            assert list(it.data_api.statistics().reads_left_by_key.values()) == [1]
            assert (await it.ask(patch()))[0] == 502  # which was sent, twice
            assert list(it.data_api.statistics().writes_left_by_key.values()) == [0]


async def test_what_waits_for_a_slot_is_taken_off_what_is_left(autojump_clock: trio.testing.MockClock) -> None:
    """What upstream says is left is for those who wait already, in their order, before it is for anybody new."""
    answers = [answer(b""), answer(b"", "X-RateLimit-Remaining: 1", "X-RateLimit-Reset: 1800000060"), answer(b"")]

    async with proxying(lambda _: answers.pop(0), max_in_flight=1) as it:
        it.origin.gate = trio.Event()  # type: ignore[attr-defined]
        statuses: list[int] = []

        async def ask(target: str) -> None:
            statuses.append((await it.ask(get(target)))[0])

        async with trio.open_nursery() as nursery:
            for target in (ISSUES, ISSUE, "/api/v1/signals"):
                nursery.start_soon(ask, target)
                await trio.sleep(1)
            it.origin.gate.set()  # type: ignore[attr-defined]
        assert statuses == [200, 200, 200]
        assert (await it.ask(get("/api/v1/insights")))[0] == 429


async def test_a_refusal_of_upstream_is_believed(autojump_clock: trio.testing.MockClock) -> None:
    """A 429 passes as it is, and until its `Retry-After` it is the last."""
    async with proxying(lambda _: answer(b"slow", "Retry-After: 9", status="429 Too Many Requests")) as it:
        assert (await it.ask(get()))[2] == b"slow"
        status, headers, _ = await it.ask(get())
        assert (status, headers[b"retry-after"], len(it.asked)) == (429, b"9", 1)
        await trio.sleep(9)
        assert (await it.ask(get()))[2] == b"slow"


async def test_a_spent_budget_is_bridged_by_option(autojump_clock: trio.testing.MockClock) -> None:
    """With `stale_seconds` readers of a kept answer do not notice a spent budget but by its age."""
    respond = numbered(*limited(0, 1_800_000_060))
    async with proxying(respond, cache_seconds=10, stale_seconds=100) as it:
        await it.ask(get())
        await trio.sleep(20)
        _, headers, body = await it.ask(get())
        assert (body, status_of(headers)) == (b"1", b"hit; ttl=-10; detail=budget-spent")
        assert (await it.ask(get("/api/v1/signals")))[0] == 429


async def test_anonymous_requests_have_no_budget() -> None:
    """Without a token there is nothing to count: upstream says what it thinks of each."""
    refusal = answer(b'{"error":"no"}', 'WWW-Authenticate: Bearer scope="read:lucent"', status="401 Unauthorized")
    async with proxying(lambda _: refusal, reads_per_minute=1) as it:
        for _ in range(3):
            status, headers, _ = await it.ask(get(by=""))
            assert (status, headers[b"www-authenticate"]) == (401, b'Bearer scope="read:lucent"')
