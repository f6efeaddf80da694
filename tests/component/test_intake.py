from __future__ import annotations

import gc
import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import zstandard
from trio.testing import MockClock, wait_all_tasks_blocked

from relay.config import Config, Keys
from relay.http.message import Request, Response
from relay.http.router import Match, Router
from relay.intake.intake import REPLAY_PATH, Intake
from relay.protocol.schema import MAX_SEQUENCE
from relay.spool.spool import Run, Spool
from relay.spool.values import Load
from tests.accounting import assert_accounted
from tests.component.batches import make_body, make_event, read_upstream
from tests.component.spooling import GatedRun, opened_spool, run_inline, wall_clock

KEY = {b"x-lucent-api-key": b"luc_pk_test"}
CORS = (b"access-control-allow-origin", b"*")


class Ingest:
    """The intake on a spool, asked as a listener asks."""

    def __init__(self, intake: Intake, spool: Spool) -> None:
        self.intake = intake
        self.spool = spool
        self.router = Router([intake.route()])

    async def ask(
        self, body: bytes, headers: dict[bytes, bytes] = KEY, *, query: bytes = b"", method: str = "POST"
    ) -> Response:
        """Answer a request."""
        request = Request(method, REPLAY_PATH, query, headers)
        match = self.router.match(request)
        if isinstance(match, Response):
            return match
        assert isinstance(match, Match)
        assert match.route.headers == (CORS,), "every answer can be read by a page"
        if method == "POST" and match.route.admit is not None and (refusal := match.route.admit(request)):
            return refusal
        request.body = body
        response = await match.handler(request)
        assert isinstance(response, Response)
        return response

    async def stored(self) -> list[bytes]:
        """Return every spooled event, by sealing what is pending."""
        events: list[bytes] = []
        for (window_id,) in self.spool._store._all("SELECT id FROM window"):
            while isinstance(load := await self.spool.seal(window_id, lambda _: None), Load):
                events += read_upstream(load.body).events
                await self.spool.settle(load.batch.batch_id)
        return events


@asynccontextmanager
async def ingesting(
    directory: Path, *, run: Run = run_inline, keys: Keys | None = None, max_keys: int = 100, **spool: Any
) -> AsyncIterator[Ingest]:
    """Run an intake; on exit check the account against its counters."""
    config = Config(keys=keys or Keys())
    async with opened_spool(directory, run=run, max_keys=max_keys, **spool) as opened:
        intake = Intake(config, opened, wall_clock, trio.current_time)
        yield Ingest(intake, opened)
        assert_accounted(await opened.account(), accepted=intake.statistics().events_accepted)


def error_of(response: Response) -> str:
    """Return an answer's message, which must have upstream's shape."""
    value = json.loads(response.body)
    assert set(value) <= {"error", "details"}
    assert isinstance(value["error"], str)
    return str(value["error"])


# -- keys


@pytest.mark.parametrize(
    ("headers", "query", "default", "status", "message"),
    [
        ({b"x-lucent-api-key": b"luc_pk_h"}, b"", "", 200, ""),
        ({b"x-lucent-api-key": b" luc_pk_h "}, b"", "", 200, ""),
        ({}, b"api_key=luc_pk_q", "", 200, ""),
        ({}, b"a=1&api_key=luc%5Fpk_q&b=2", "", 200, ""),
        ({}, b"", "luc_pk_d", 200, ""),
        ({}, b"other=1", "luc_pk_d", 200, ""),
        ({}, b"", "", 401, "Missing API key"),
        ({}, b"api_key=", "", 401, "Missing API key"),
        ({b"x-lucent-api-key": b""}, b"", "", 401, "Missing API key"),
        ({b"x-lucent-api-key": b"two words"}, b"", "", 401, "Invalid or revoked API key"),
        ({b"x-lucent-api-key": b"caf\xc3\xa9"}, b"", "", 401, "Invalid or revoked API key"),
        ({b"x-lucent-api-key": b"x" * 257}, b"", "", 401, "Invalid or revoked API key"),
        ({}, b"api_key=a%0d%0ab", "", 401, "Invalid or revoked API key"),
        ({}, b"&".join([b"a=1"] * 200), "", 401, "Invalid or revoked API key"),
    ],
)
async def test_key_is_found_or_refused(
    tmp_path: Path,
    autojump_clock: MockClock,
    headers: dict[bytes, bytes],
    query: bytes,
    default: str,
    status: int,
    message: str,
) -> None:
    """A key comes by header, by query for beacons, or by default; without a usable one it is upstream's 401."""
    async with ingesting(tmp_path, keys=Keys(default=default)) as it:
        response = await it.ask(make_body(), headers, query=query)
        assert response.status == status
        assert status == 200 or error_of(response) == message
        assert it.intake.statistics().refused_by_status == ({} if status == 200 else {status: 1})


# -- bodies that are taken


def _deflate_raw(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        (b"", bytes),
        (b"identity", bytes),
        (b"gzip", gzip.compress),
        (b"X-GZip", gzip.compress),
        (b"", gzip.compress),
        (b"gzip", bytes),
        (b"deflate", zlib.compress),
        (b"deflate", _deflate_raw),
        (b"zstd", zstandard.compress),
        (b"gzip", lambda body: gzip.compress(body[:50]) + gzip.compress(body[50:])),
    ],
)
async def test_codings_are_read(tmp_path: Path, autojump_clock: MockClock, coding: bytes, encode: Any) -> None:
    """Every coding a client or a proxy may leave behind is read, and the events keep their bytes."""
    events = [b'{"timestamp":1.50, "type":3,"data":{"b":1,"a":"\\u00e9"}}', make_event("2")]
    headers = {**KEY, **({b"content-encoding": coding} if coding else {})}
    async with ingesting(tmp_path) as it:
        assert (await it.ask(encode(make_body(events=events)), headers)).status == 200
        assert await it.stored() == events


async def test_beacon_is_taken(tmp_path: Path, autojump_clock: MockClock) -> None:
    """`navigator.sendBeacon` sends text/plain, uncompressed, with the key in the query."""
    async with ingesting(tmp_path) as it:
        response = await it.ask(make_body(), {b"content-type": b"text/plain;charset=UTF-8"}, query=b"api_key=luc_pk_b")
        assert (response.status, json.loads(response.body)) == (200, {"ok": True})


async def test_lone_surrogates_are_taken(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Text cut amid an emoji, as JSON.stringify writes it, is kept as it came."""
    event = rb'{"timestamp":1,"type":3,"data":"cut \ud83d"}'
    async with ingesting(tmp_path) as it:
        assert (await it.ask(make_body(events=[event]))).status == 200
        assert await it.stored() == [event]


async def test_repeated_batch_is_stored_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A client that saw no answer sends again, and is told 200 both times, over a restart too."""
    for _ in range(2):
        async with opened_spool(tmp_path) as spool:
            it = Ingest(Intake(Config(), spool, wall_clock, trio.current_time), spool)
            for _ in range(2):
                assert (await it.ask(make_body())).status == 200
            assert_accounted(await spool.account(), accepted=1)


async def test_windows_may_use_the_same_sequence(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Two tabs that count alike do not collide."""
    async with ingesting(tmp_path) as it:
        for window in "ab":
            assert (await it.ask(make_body(window=window, sequence=7))).status == 200
        assert sorted(await it.stored()) == [make_event("s/a/7"), make_event("s/b/7")]


async def test_reused_sequences_are_counted(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A client is told 200 for each batch, and the account has every event once."""
    a, b, c, d, e = map(make_event, "abcde")
    async with ingesting(tmp_path) as it:
        for events in ([a, b], [a, b], [a, b, c], [d], [d, e], [a, b]):
            assert (await it.ask(make_body(events=events))).status == 200
        counted = it.intake.statistics()
        assert (counted.batches_accepted, counted.batches_repeated, counted.events_accepted) == (4, 2, 5)
        assert counted.batches_reused == {"grown": 2, "other": 1}
        assert await it.stored() == [a, b, c, d, e]
        assert counted.finals_late == 0
        assert (await it.ask(make_body(events=[d, e], flush="final"))).status == 200
        assert it.intake.statistics().finals_late == 1


async def test_batches_that_race_for_a_sequence_are_compared(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Of batches that reuse a sequence at the same time each is compared with those that were stored before it."""
    a, b, c, d = map(make_event, "abcd")
    async with ingesting(tmp_path) as it:
        async with trio.open_nursery() as nursery:
            for events in ([a], [a, b], [a, b], [a, b, c], [d], [d]):
                nursery.start_soon(it.ask, make_body(events=events))
        assert sorted(await it.stored()) == [a, b, c, d]


async def test_session_without_numbers_is_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Where a session has no number left behind its highest, the client is told what would help, and it does."""
    async with ingesting(tmp_path) as it:
        assert (await it.ask(make_body(sequence=MAX_SEQUENCE))).status == 200
        response = await it.ask(make_body(sequence=MAX_SEQUENCE, events=[make_event("other")]))
        assert response.status == 413
        assert error_of(response).startswith(f"Sequence {MAX_SEQUENCE} has no room")
        assert (await it.ask(make_body(sequence=0, events=[make_event("other")]))).status == 200


async def test_largest_batch_is_cut(tmp_path: Path, autojump_clock: MockClock) -> None:
    """16 384 events of one request are stored and sent 500 at a time."""
    events = [make_event(str(number)) for number in range(16_384)]
    async with ingesting(tmp_path) as it:
        assert (await it.ask(gzip.compress(make_body(events=events)))).status == 200
        assert it.intake.statistics().segments == 33
        assert await it.stored() == events


async def test_body_that_inflates_large_is_decoded_in_a_thread(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small body that turns out large does not keep everybody waiting."""
    threads: list[Any] = []
    run_sync = trio.to_thread.run_sync

    async def count(call: Any, *arguments: Any, **options: Any) -> Any:
        threads.append(call)
        return await run_sync(call, *arguments, **options)

    monkeypatch.setattr(trio.to_thread, "run_sync", count)
    autojump_clock.autojump_threshold = float("inf")
    body = gzip.compress(make_body(sequence=1, events=[make_event("large", 3_000_000)]))
    assert len(body) < 65_536
    async with opened_spool(tmp_path, now=lambda: 0.0) as spool:
        it = Ingest(Intake(Config(), spool, lambda: 0.0, trio.current_time), spool)
        assert (await it.ask(make_body())).status == 200
        assert threads == []
        assert (await it.ask(body, KEY)).status == 200
        assert len(threads) == 1
        assert_accounted(await spool.account(), accepted=2)


# -- bodies that are refused


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 400, "Invalid replay batch"),
        (b"not json", {}, 400, "Invalid replay batch"),
        (b"[]", {}, 400, "Invalid replay batch"),
        (make_body(events=[]), {}, 400, "Invalid replay batch"),
        (make_body().replace(b'"timestamp":1', b'"timestamp":"1"'), {}, 400, "Invalid replay batch"),
        (make_body(sequence=-1), {}, 400, "Invalid replay batch"),
        (make_body(session=""), {}, 400, "Invalid replay batch"),
        (make_body(flush="last"), {}, 400, "Invalid replay batch"),
        (gzip.compress(make_body())[:-9], {}, 400, "Body is not valid compressed data"),
        (make_body(), {b"content-encoding": b"br"}, 415, "Unsupported Content-Encoding 'br'"),
        (make_body(), {b"content-encoding": b"gzip, gzip"}, 415, "Unsupported Content-Encoding"),
        (make_body(events=[b'{"timestamp":1,"type":1,"data":0}'] * 16_385), {}, 413, "Batch holds"),
        (make_body(page="x" * 300_000), {}, 413, "session, user, page and metadata take"),
        (gzip.compress(b" " * 70_000_000), {}, 413, "Body exceeds 67108864 bytes once decoded"),
    ],
)
async def test_bad_body_costs_its_sender_only(
    tmp_path: Path, body: bytes, headers: dict[bytes, bytes], status: int, message: str
) -> None:
    """A body that upstream would refuse is refused in upstream's shape, and leaves no trace (law 10)."""
    async with opened_spool(tmp_path, now=lambda: 0.0) as spool:
        it = Ingest(Intake(Config(), spool, lambda: 0.0, trio.current_time), spool)
        response = await it.ask(body, {**KEY, **headers})
        assert response.status == status
        assert error_of(response).startswith(message)
        assert (await it.ask(make_body(session="neighbour"))).status == 200
        assert_accounted(await spool.account(), accepted=1)
        assert it.intake.statistics().refused_by_status == {status: 1}


async def test_issues_name_the_place(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A 400 says as zod does which members are wrong."""
    body = make_body().replace(b'"type":3', b'"type":"three"').replace(b'"anonymousId": "a"', b'"anonymousId": ""')
    async with ingesting(tmp_path) as it:
        details = json.loads((await it.ask(body)).body)["details"]
        assert {tuple(issue["path"]) for issue in details} == {
            ("user", "anonymousId"),
            ("replay", "events", 0, "type"),
        }
        assert all({"code", "path", "message"} <= set(issue) for issue in details)


# -- no room


async def test_keys_too_many_are_told_to_come_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Beyond `keys.max_keys` a further key gets 503 with Retry-After; known keys go on."""
    async with ingesting(tmp_path, max_keys=1) as it:
        assert (await it.ask(make_body())).status == 200
        response = await it.ask(make_body(), {b"x-lucent-api-key": b"luc_pk_other"})
        assert (response.status, dict(response.headers)[b"retry-after"]) == (503, b"5")
        assert (await it.ask(make_body(sequence=1))).status == 200


async def test_spool_without_room_is_refused_on_headers(tmp_path: Path, autojump_clock: MockClock) -> None:
    """While the spool refuses, so does `admit`, before a body is read; a missing key is still a 401."""
    async with ingesting(tmp_path, min_free_bytes=1 << 64) as it:
        refusal = it.intake.admit(Request("POST", REPLAY_PATH, b"", KEY))
        assert refusal is not None
        assert (refusal.status, dict(refusal.headers)[b"retry-after"]) == (503, b"5")
        assert "spool.min_free_bytes" in error_of(refusal)
        assert (await it.ask(make_body(), {})).status == 401


async def test_disk_that_refuses_a_commit_is_503(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A batch that the disk refuses at the last moment is not answered 200."""
    async with ingesting(tmp_path) as it:
        db = it.spool._store._db
        db.pragma("max_page_count", int(db.pragma("page_count")))
        noise = "".join(chr(0x4E00 + number * 7_919 % 20_000) for number in range(20_000))
        response = await it.ask(make_body(events=[f'{{"timestamp":1,"type":3,"data":"{noise}"}}'.encode()]))
        assert response.status == 503
        assert b"retry-after" in dict(response.headers)


async def test_no_yes_before_the_commit(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A 200 waits for the commit, however long the disk takes (law 1)."""
    run = GatedRun()
    async with ingesting(tmp_path, run=run) as it, trio.open_nursery() as nursery:
        answers: list[Response] = []

        async def ask() -> None:
            answers.append(await it.ask(make_body()))

        nursery.start_soon(ask)
        await trio.sleep(3_600)
        assert answers == []
        run.gate.set()
        await wait_all_tasks_blocked()
        assert [answer.status for answer in answers] == [200]
        statistics = it.intake.statistics()
        assert (statistics.ack_seconds.counts[-1], statistics.ack_seconds.sum) == (1, 3_600)


# -- browsers


async def test_preflight_needs_no_key(tmp_path: Path, autojump_clock: MockClock) -> None:
    """OPTIONS names the contract's methods and headers, and the private network only where it is asked for."""
    async with ingesting(tmp_path) as it:
        plain = await it.ask(b"", {}, method="OPTIONS")
        private = await it.ask(b"", {b"access-control-request-private-network": b"true"}, method="OPTIONS")
        assert plain.status == private.status == 204
        headers = dict(plain.headers)
        assert headers[b"access-control-allow-headers"] == b"Content-Type, Content-Encoding, X-Lucent-Api-Key"
        assert b"POST" in headers[b"access-control-allow-methods"]
        assert set(private.headers) - set(plain.headers) == {(b"access-control-allow-private-network", b"true")}


async def test_counters_add_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Bytes and events of accepted batches are counted once; repeats and refusals are counted apart."""
    body = make_body(events=[make_event(str(number)) for number in range(5)])
    wire = gzip.compress(body)
    async with ingesting(tmp_path) as it:
        for sent in (wire, wire, b"{}"):
            await it.ask(sent)
        counted = msgspec.structs.asdict(it.intake.statistics())
        expected = {"batches_accepted": 1, "batches_repeated": 1, "events_accepted": 5, "segments": 1}
        expected |= {"wire_bytes": len(wire), "decoded_bytes": len(body), "refused_by_status": {400: 1}}  # type: ignore[dict-item]
        assert {name: counted[name] for name in expected} == expected
        assert counted["ack_seconds"].summary().count == 2


async def test_refused_bodies_leave_memory_at_once(tmp_path: Path) -> None:
    """What a body that was refused in a thread took is given back at once, not with the next collection of garbage."""
    bombs = [gzip.compress(bytes(100_000_000)), gzip.compress(b'{"session": "%b"}' % bytes(20_000_000))]
    async with ingesting(tmp_path) as ingest:
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for bomb in bombs:
                assert (await ingest.ask(bomb)).status in (400, 413)
                assert tracemalloc.get_traced_memory()[0] < 1_000_000
        finally:
            tracemalloc.stop()
            gc.enable()
