from __future__ import annotations

import gzip
import json
import random
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import orjson
import pytest
import trio
import zstandard

from relay.http.message import HANG_UP, Request, Response
from relay.http.router import Match
from relay.protocol.fingerprint import fingerprint
from relay.sandbox.faults import fault_settings
from relay.sandbox.service import REPLAY_PATH, Sandbox, SandboxSettings
from relay.sandbox.store import envelope_digest, event_digest

if TYPE_CHECKING:
    from trio.testing import MockClock

KEY = "luc_pk_test"


def make_sandbox(faults: dict[str, Any] | None = None, **settings: Any) -> Sandbox:
    """Return a sandbox on trio's clock."""
    values = SandboxSettings(faults=fault_settings(faults or {}), **settings)
    return Sandbox(values, now=trio.current_time, random=random.Random(5))


def make_batch(sequence: int = 0, *, events: int = 2, **changes: Any) -> dict[str, Any]:
    """Return a valid batch."""
    return {
        "session": {"id": "s", "windowId": "w", "startedAt": 1, "lastActivityAt": 2, "url": "u"},
        "user": {"anonymousId": "a"},
        "page": {"url": "u"},
        "replay": {
            "events": [{"timestamp": number, "type": 3, "data": {}} for number in range(events)],
            "sequence": sequence,
        },
        **changes,
    }


async def ask(
    sandbox: Sandbox, method: str, target: str, body: bytes = b"", headers: dict[bytes, bytes] | None = None
) -> Response:
    """Send a request as the listener would, through the router."""
    path, _, query = target.partition("?")
    request = Request(method, path, query.encode(), headers or {}, body)
    match = sandbox.router().match(request)
    response = await match.handler(request) if isinstance(match, Match) else match
    assert isinstance(response, Response)
    return response


async def send(sandbox: Sandbox, batch: Any, key: str = KEY) -> Response:
    """Post a batch."""
    body = batch if isinstance(batch, bytes) else orjson.dumps(batch)
    return await ask(sandbox, "POST", REPLAY_PATH, body, {b"x-lucent-api-key": key.encode()})


def assert_adds_up(report: dict[str, Any]) -> None:
    """Assert the sums that the report promises at every moment."""
    responses, injected = report["responses"], report["injected"]
    assert report["requests"] == sum(responses.values()) + report["hung_up"]
    accepted = report["stored_batches"] + report["repeated_batches"] + report["conflicting_batches"]
    assert accepted == responses.get("200", 0) + injected["drop_after"]


async def test_a_batch_is_taken_and_remembered(autojump_clock: MockClock) -> None:
    """The answer is upstream's, and the session shows counts and digests of what came."""
    sandbox = make_sandbox()
    batch = make_batch(3, flush="final")
    body = orjson.dumps(batch)
    response = await send(sandbox, body)
    assert (response.status, response.body) == (200, b'{"ok":true}')
    events = [orjson.dumps(event) for event in batch["replay"]["events"]]
    assert sandbox.session("s") == {
        "id": "s",
        "windows": 1,
        "batches": 1,
        "events": 2,
        "bytes": len(body),
        "final": True,
        "stored": [
            {
                "sequence": 3,
                "window_id": "w",
                "flush": "final",
                "events": 2,
                "bytes": len(body),
                "order": 1,
                "at_seconds": 0.0,
                "envelope": envelope_digest(batch).hex(),
                "digests": [event_digest(event).hex() for event in events],
            }
        ],
    }
    assert_adds_up(sandbox.report())


async def test_recordings_are_stored_event_for_event() -> None:
    """Whole recorded sessions, gzipped, are held with the digests of their exact events."""
    sandbox = make_sandbox(requests_per_minute=0, max_bytes=16 * 1_048_576)
    folder = resources.files("relay") / "demo" / "recordings"
    expected: dict[str, list[str]] = {}
    for name in ("tiny-bounce", "todo-basic", "logs-console"):
        recording = (folder / f"{name}.jsonl.zst").read_bytes()
        lines = zstandard.ZstdDecompressor().stream_reader(recording).read().splitlines()
        for line in lines:
            batch = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            replay = msgspec.json.decode(batch["replay"], type=dict[str, msgspec.Raw])
            events = msgspec.json.decode(replay["events"], type=list[msgspec.Raw])
            digests = expected.setdefault(orjson.loads(line)["session"]["id"], [])
            digests += [event_digest(bytes(event)).hex() for event in events]
            headers = {b"x-lucent-api-key": KEY.encode(), b"content-encoding": b"gzip"}
            response = await ask(sandbox, "POST", REPLAY_PATH, gzip.compress(line, 1), headers)
            assert response.status == 200
    held = {}
    for session_id in expected:
        session = sandbox.session(session_id)
        assert session is not None
        held[session_id] = [digest for batch in session["stored"] for digest in batch["digests"]]
    assert held == expected
    report = sandbox.report()
    assert report["events"] == sum(map(len, expected.values()))
    assert report["decoded_bytes"] > report["wire_bytes"] > 0
    assert_adds_up(report)


async def test_a_lone_surrogate_is_as_good_as_any_text() -> None:
    """What JSON.stringify writes of a cut emoji is stored with its exact bytes, in ids too."""
    sandbox = make_sandbox()
    event = rb'{"timestamp":1,"type":3,"data":"\ud83d"}'
    body = orjson.dumps(make_batch()).replace(b'"id":"s"', rb'"id":"\ud83d"')
    start, end = body.index(b"[") + 1, body.index(b"]")
    assert (await send(sandbox, body[:start] + event + body[end:])).status == 200
    session = sandbox.session("\ufffd")
    assert session is not None
    assert session["stored"][0]["digests"] == [event_digest(event).hex()]
    assert (await ask(sandbox, "GET", "/sandbox/sessions")).status == 200


@pytest.mark.parametrize(
    ("query", "headers", "error"),
    [
        ("", {}, "Missing API key"),
        ("?api_key=", {b"x-lucent-api-key": b" "}, "Missing API key"),
        ("", {b"x-lucent-api-key": b"luc_api_x"}, "Invalid or revoked API key"),
        ("?api_key=luc_pk_x", {b"x-lucent-api-key": b"nonsense"}, "Invalid or revoked API key"),
        ("?api_key=luc_pk_bad", {}, "Invalid or revoked API key"),
        ("?a=1&api_key=luc_pk%5Fx", {}, None),
        ("?api_key=nonsense", {b"x-lucent-api-key": b"luc_pk_x"}, None),
    ],
)
async def test_keys_are_checked_first(query: str, headers: dict[bytes, bytes], error: str | None) -> None:
    """The key comes from the header or else the query, and without a good one nothing else is looked at."""
    sandbox = make_sandbox({"reject_keys": ["luc_pk_bad"]})
    response = await ask(sandbox, "POST", REPLAY_PATH + query, b"not JSON", headers)
    if error is None:
        assert response.status == 400
    else:
        assert (response.status, orjson.loads(response.body)) == (401, {"error": error})
    assert sandbox.report()["refused_keys"] == (error is not None)
    assert_adds_up(sandbox.report())


async def test_only_listed_keys_are_accepted_where_some_are_listed() -> None:
    """`--key` narrows what is accepted; the report names keys by fingerprint only."""
    sandbox = make_sandbox(keys=("special",))
    assert (await send(sandbox, make_batch(), "luc_pk_x")).status == 401
    assert (await send(sandbox, make_batch(), "special")).status == 200
    assert sandbox.report()["keys"] == {fingerprint("special"): {"counted": 1, "peak_requests_per_minute": 1}}


async def test_the_rate_limit_is_per_key_and_says_when_to_come_again(autojump_clock: MockClock) -> None:
    """The request over the limit is answered 429 with whole seconds, after which there is a free slot."""
    sandbox = make_sandbox(requests_per_minute=2)
    assert (await send(sandbox, b"nonsense")).status == 400
    await trio.sleep(10.5)
    assert (await send(sandbox, make_batch())).status == 200
    await trio.sleep(10)
    for _ in range(3):
        refused = await send(sandbox, make_batch(1))
        assert (refused.status, refused.body) == (429, b'{"error":"Rate limit exceeded"}')
        # 60 s less 20.5 s are 39.5 s, in whole seconds 40.
        assert (b"retry-after", b"40") in refused.headers
    assert (await send(sandbox, make_batch(1), "luc_pk_other")).status == 200
    await trio.sleep(40)
    assert (await send(sandbox, make_batch(2))).status == 200
    assert (await send(sandbox, make_batch(2))).status == 429
    report = sandbox.report()
    assert report["rate_limited"] == 4
    assert report["peak_requests_per_minute"] == 2
    assert report["keys"][fingerprint(KEY)]["counted"] == 3
    assert_adds_up(report)


@pytest.mark.parametrize(
    ("body", "coding", "status", "error"),
    [
        (b"{", b"", 400, "Invalid replay batch"),
        (b"{}", b"gzip", 400, "Invalid replay batch"),
        (b"{}", b"br", 415, "Unsupported content encoding"),
    ],
)
async def test_unreadable_bodies_are_violations(body: bytes, coding: bytes, status: int, error: str) -> None:
    """Each kind of unreadable body is refused in upstream's shape and counted."""
    sandbox = make_sandbox()
    headers = {b"x-lucent-api-key": KEY.encode(), b"content-encoding": coding}
    response = await ask(sandbox, "POST", REPLAY_PATH, body, headers)
    assert (response.status, orjson.loads(response.body)["error"]) == (status, error)
    assert sandbox.report()["violations"]["unreadable"] == 1
    assert_adds_up(sandbox.report())


async def test_invalid_batches_are_violations() -> None:
    """A batch against the schema is refused with issues and counted."""
    sandbox = make_sandbox()
    response = await send(sandbox, make_batch(-1))
    assert response.status == 400
    assert orjson.loads(response.body) == {
        "error": "Invalid replay batch",
        "details": [
            {
                "code": "too_small",
                "path": ["replay", "sequence"],
                "message": "value is less than the minimum of 0",
            }
        ],
    }
    assert sandbox.report()["violations"]["invalid"] == 1


async def test_the_limits_hold_to_the_event_and_the_byte() -> None:
    """At a limit a batch is stored, one over it is refused; only a single event may be of any size."""
    size = len(orjson.dumps(make_batch(events=3)))
    sandbox = make_sandbox(max_events=3, max_bytes=size)
    assert (await send(sandbox, make_batch(0, events=3))).status == 200
    assert (await send(sandbox, make_batch(1, events=4))).status == 413
    assert (await send(sandbox, orjson.dumps(make_batch(2, events=3)) + b" ")).status == 413
    assert (await send(sandbox, orjson.dumps(make_batch(3, events=1)) + b" " * size)).status == 200
    report = sandbox.report()
    assert report["violations"] == {
        "unreadable": 0,
        "invalid": 0,
        "over_max_events": 1,
        "over_max_bytes": 1,
    }
    assert report["stored_batches"] == 2
    assert_adds_up(report)


async def test_a_batch_is_stored_once_under_any_key() -> None:
    """A repeat is answered 200 and counted; one with other events is dropped and counted as a conflict."""
    sandbox = make_sandbox()
    assert (await send(sandbox, make_batch())).status == 200
    assert (await send(sandbox, make_batch(), "luc_pk_other")).status == 200
    assert (await send(sandbox, make_batch(0.0))).status == 200  # type: ignore[arg-type]
    assert (await send(sandbox, make_batch(events=1))).status == 200
    report = sandbox.report()
    counts = [report[f"{kind}_batches"] for kind in ("stored", "repeated", "conflicting")]
    assert counts == [1, 2, 1]
    assert (report["sessions"], report["events"]) == (1, 2)
    assert_adds_up(report)


async def test_batches_after_a_final_are_stored_and_counted() -> None:
    """What comes for a session after its final is kept, and the report says that it came too late."""
    sandbox = make_sandbox()
    final = make_batch(4, flush="final")
    await send(sandbox, make_batch(0))
    await send(sandbox, final)
    await send(sandbox, final)
    assert sandbox.report()["after_final_batches"] == 0
    await send(sandbox, make_batch(2))
    report = sandbox.report()
    assert (report["after_final_batches"], report["final_batches"], report["stored_batches"]) == (1, 1, 3)


@pytest.mark.parametrize(
    ("faults", "status", "is_stored"),
    [
        ({"error_rate": 1}, 500, False),
        ({"error_rate": 1, "error_status": [429]}, 429, False),
        ({"drop_before_rate": 1}, 0, False),
        ({"drop_after_rate": 1}, 0, True),
    ],
)
async def test_each_fault_does_what_it_says(faults: dict[str, Any], status: int, is_stored: bool) -> None:
    """Errors and early drops store nothing, late drops do; each is counted as itself."""
    sandbox = make_sandbox(faults)
    response = await send(sandbox, make_batch())
    assert response.status == status
    assert response.close is (status == 0)
    assert (b"retry-after" in dict(response.headers)) == (status == 429)
    report = sandbox.report()
    assert report["stored_batches"] == is_stored
    assert sum(report["injected"].values()) == 1
    assert report["rate_limited"] == 0
    assert_adds_up(report)


async def test_faults_do_not_hide_violations() -> None:
    """A batch that upstream would refuse is refused, whatever its fate would have been."""
    sandbox = make_sandbox({"error_rate": 1})
    assert (await send(sandbox, make_batch(-1))).status == 400
    assert sandbox.report()["injected"]["error"] == 0


@pytest.mark.parametrize("status", [400, 413, 422, 500])
async def test_what_is_stored_is_not_refused_for_its_content(status: int) -> None:
    """A repeat suffers errors of the server, but none that would say that the batch was never stored."""
    sandbox = make_sandbox({"drop_after_rate": 1})
    assert await send(sandbox, make_batch()) is HANG_UP
    sandbox.set_faults(fault_settings({"error_rate": 1, "error_status": [status]}))
    assert (await send(sandbox, make_batch())).status == (500 if status == 500 else 200)
    assert (await send(sandbox, make_batch(1))).status == status
    assert_adds_up(sandbox.report())


async def test_latency_passes_before_anything_is_stored(autojump_clock: MockClock) -> None:
    """The answer comes after the latency, and a reader who gives up sooner leaves nothing behind."""
    sandbox = make_sandbox({"latency_seconds": 3})
    with trio.move_on_after(2):
        await send(sandbox, make_batch())
    assert sandbox.report()["requests"] == 0
    before = trio.current_time()
    assert (await send(sandbox, make_batch())).status == 200
    assert trio.current_time() - before == 3
    report = sandbox.report()
    assert report["stored_batches"] == 1
    assert report["keys"][fingerprint(KEY)]["counted"] == 2
    assert_adds_up(report)


@pytest.mark.parametrize("status", [0, 503])
async def test_an_outage_lets_nothing_in(autojump_clock: MockClock, status: int) -> None:
    """From its start to its end every request is hung up on or refused, also one that came just before."""
    sandbox = make_sandbox({"outages": [[10, 20]], "outage_status": status, "latency_seconds": 2})
    await trio.sleep(9)
    assert (await send(sandbox, make_batch())).status == status
    assert (await ask(sandbox, "POST", REPLAY_PATH)).status == status
    await trio.sleep(9)
    assert (await send(sandbox, make_batch())).status == 200
    report = sandbox.report()
    assert (report["injected"]["outage"], report["stored_batches"]) == (2, 1)
    assert report["hung_up"] == (2 if status == 0 else 0)
    assert report["elapsed_seconds"] == 22
    assert_adds_up(report)


async def test_faults_can_be_changed_while_it_runs() -> None:
    """What is posted replaces all settings; `{}` heals; what is wrong changes nothing."""
    sandbox = make_sandbox({"latency_seconds": 0, "error_rate": 1})
    posted = await ask(sandbox, "POST", "/sandbox/faults", b'{"drop_before_rate":1}')
    assert posted.status == 200
    shown = await ask(sandbox, "GET", "/sandbox/faults")
    assert posted.body == shown.body
    assert orjson.loads(shown.body)["error_rate"] == 0
    assert await send(sandbox, make_batch()) is HANG_UP
    for wrong in (b'{"drop_rate":1}', b'{"error_rate":2}', b"[]", b"{", b'{"\xff":1}'):
        assert (await ask(sandbox, "POST", "/sandbox/faults", wrong)).status == 400
    assert await send(sandbox, make_batch()) is HANG_UP
    assert (await ask(sandbox, "POST", "/sandbox/faults", b"{}")).status == 200
    assert (await send(sandbox, make_batch())).status == 200


async def test_a_failing_session_fails_alone() -> None:
    """Its batches are answered with the error and not stored; others are none the worse."""
    sandbox = make_sandbox({"fail_sessions": ["bad"], "error_status": [503]})
    for session, status in (("bad", 503), ("good", 200), ("bad", 503)):
        batch = make_batch()
        batch["session"]["id"] = session
        assert (await send(sandbox, batch)).status == status
    assert (sandbox.session("bad"), sandbox.report()["injected"]["error"]) == (None, 2)
    assert_adds_up(sandbox.report())


async def test_what_faults_shows_can_be_posted_back() -> None:
    """The settings survive a round trip through the two routes."""
    faults = {"outages": [[1, 2.5]], "error_status": [500, 503], "reject_keys": ["luc_pk_x"]}
    sandbox = make_sandbox(faults)
    shown = await ask(sandbox, "GET", "/sandbox/faults")
    assert (await ask(sandbox, "POST", "/sandbox/faults", shown.body)).body == shown.body


async def test_sessions_are_listed_in_pages_and_found_by_id() -> None:
    """Paging covers every session once; ids may hold any character."""
    sandbox = make_sandbox()
    ids = ["plain", "with space & ampersand", "ünïcödé/+"]
    for session_id in ids:
        batch = make_batch()
        batch["session"]["id"] = session_id
        await send(sandbox, batch)
    listed: list[str] = []
    for offset in range(4):
        page = orjson.loads((await ask(sandbox, "GET", f"/sandbox/sessions?offset={offset}&limit=1")).body)
        assert page["total"] == 3
        listed += [session["id"] for session in page["sessions"]]
    assert listed == ids
    for session_id in ids:
        found = await ask(sandbox, "GET", f"/sandbox/session?id={quote(session_id, safe='')}")
        assert orjson.loads(found.body)["id"] == session_id
    assert (await ask(sandbox, "GET", "/sandbox/session?id=none")).status == 404
    assert (await ask(sandbox, "GET", "/sandbox/session")).status == 404
    for wrong in ("offset=-1", "limit=x", "limit=1001", "offset=99999999999999999999"):
        assert (await ask(sandbox, "GET", f"/sandbox/sessions?{wrong}")).status == 400


async def test_a_reset_forgets_batches_counts_and_windows() -> None:
    """After a reset the report is a new sandbox's, and the faults are as they were."""
    sandbox = make_sandbox({"error_status": [503]}, requests_per_minute=1)
    await send(sandbox, make_batch())
    assert (await ask(sandbox, "POST", "/sandbox/reset")).status == 200
    fresh = make_sandbox(requests_per_minute=1).report()
    assert {**sandbox.report(), "elapsed_seconds": 0} == {**fresh, "elapsed_seconds": 0}
    assert sandbox.sessions() == []
    assert (await send(sandbox, make_batch())).status == 200
    assert orjson.loads((await ask(sandbox, "GET", "/sandbox/faults")).body)["error_status"] == [503]


async def test_a_preflight_needs_no_key() -> None:
    """OPTIONS is answered with the published CORS headers, is not counted, and other methods are refused."""
    sandbox = make_sandbox()
    response = await ask(sandbox, "OPTIONS", REPLAY_PATH)
    headers = dict(response.headers)
    assert response.status == 204
    assert headers[b"access-control-allow-origin"] == b"*"
    assert headers[b"access-control-allow-headers"] == b"Content-Type, Content-Encoding, X-Lucent-Api-Key"
    assert (await ask(sandbox, "GET", REPLAY_PATH)).status == 405
    assert sandbox.report()["requests"] == 0


async def test_a_hostile_mix_adds_up(autojump_clock: MockClock) -> None:
    """Concurrent good, bad, repeated and limited requests under all faults leave a report that balances."""
    sandbox = make_sandbox(
        {
            "error_rate": 0.2,
            "drop_before_rate": 0.1,
            "drop_after_rate": 0.1,
            "latency_jitter_seconds": 5,
            "outages": [[20, 30]],
        },
        requests_per_minute=80,
    )
    chooser = random.Random(11)

    async def client(number: int) -> None:
        for _ in range(30):
            await trio.sleep(chooser.random() * 4)
            body = chooser.choice([b"{", b"{}", make_batch(chooser.randrange(40)), make_batch(number)])
            await send(sandbox, body, chooser.choice([KEY, "luc_pk_other", "nonsense"]))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(client, number)
    report = sandbox.report()
    assert report["requests"] == 600
    assert report["rate_limited"] == report["responses"]["429"] > 0
    assert report["refused_keys"] == report["responses"]["401"] > 0
    assert sum(report["violations"].values()) == report["responses"]["400"] > 0
    assert report["injected"]["error"] == report["responses"]["500"] > 0
    assert report["peak_requests_per_minute"] == 80
    assert all(report["injected"].values())
    assert report["stored_batches"] == sum(session["batches"] for session in sandbox.sessions())
    assert report["events"] == sum(session["events"] for session in sandbox.sessions())
    assert json.loads(json.dumps(report)) == report
    assert_adds_up(report)
