from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import orjson
import pytest
import trio
from trio.testing import MockClock

from relay.http.message import HANG_UP, Response
from relay.sandbox.data_api import DataSettings
from relay.sandbox.faults import fault_settings
from relay.sandbox.schema import load_description, translate_nullable
from relay.sandbox.service import Sandbox, SandboxSettings
from tests.component.test_sandbox import ask

TOKEN = "luc_api_test"  # noqa: S105 - nobody's
NOW = 1_800_000_000.0
LISTS = {"issues": 200, "signals": 200, "insights": 100}
"""The lists and their largest pages, as published."""

COMPONENTS = {"schemas": translate_nullable(load_description()["components"]["schemas"])}


def make_sandbox(faults: dict[str, Any] | None = None, **data: Any) -> Sandbox:
    """Return a sandbox on trio's clock whose wall clock stands still."""
    settings = SandboxSettings(faults=fault_settings(faults or {}), data=DataSettings(**data))
    return Sandbox(settings, now=trio.current_time, random=random.Random(5), wall=lambda: NOW)


def bearing(token: str = TOKEN, **headers: str) -> dict[bytes, bytes]:
    """Return the headers of a request with a token."""
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return {b"authorization": f"Bearer {token}".encode(), **named}


async def get(sandbox: Sandbox, target: str, **headers: str) -> Response:
    """Read with the usual token."""
    return await ask(sandbox, "GET", f"/api/v1/{target}", headers=bearing(**headers))


async def patch(sandbox: Sandbox, issue_id: str, body: bytes, token: str = TOKEN) -> Response:
    """Change an issue."""
    return await ask(sandbox, "PATCH", f"/api/v1/issues/{issue_id}", body, bearing(token))


def value_of(response: Response, schema: str) -> dict[str, Any]:
    """Return a good answer's JSON, held against a published schema."""
    assert response.status == 200, response.body
    value: dict[str, Any] = orjson.loads(response.body)
    jsonschema_rs.validate(
        {"$ref": f"#/components/schemas/{schema}", "components": COMPONENTS}, value, validate_formats=True
    )
    return value


async def pages(sandbox: Sandbox, name: str, limit: int, query: str = "") -> list[list[dict[str, Any]]]:
    """Return all pages of a list."""
    found: list[list[dict[str, Any]]] = []
    cursor = ""
    while True:
        response = await get(sandbox, f"{name}?limit={limit}{cursor}{query}")
        value = value_of(response, f"List{name.title()}Response")
        found.append(value[name])
        if value["nextCursor"] is None:
            return found
        cursor = f"&cursor={value['nextCursor']}"


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("limit", [1, 7, None])
async def test_pages_make_up_the_list(name: str, limit: int | None) -> None:
    """Page after page, every record comes once, in the published order; every page but the last is full."""
    sandbox = make_sandbox(reads_per_minute=0)
    limit = limit or LISTS[name]
    found = await pages(sandbox, name, limit)
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
    records = [record for page in found for record in page]
    places = [(record["createdAt"], record["id"]) for record in records]
    assert places == sorted(places, reverse=True)
    assert len({record["id"] for record in records}) == len(records) > LISTS[name] // 3
    assert len({record["createdAt"] for record in records}) < len(records), "some share their moment"


async def test_records_follow_from_the_seed() -> None:
    """Two sandboxes of one seed answer alike, and those of two seeds do not."""
    bodies = [(await get(make_sandbox(seed=seed), "issues?limit=200")).body for seed in (3, 3, 4)]
    assert bodies[0] == bodies[1] != bodies[2]


async def test_issues_of_a_status() -> None:
    """A list of one status has all issues of that status and no other; the default page has 25."""
    sandbox = make_sandbox()
    every = [issue for page in await pages(sandbox, "issues", 200) for issue in page]
    for status in ("unresolved", "ticket_created", "transient", "resolved"):
        found = [issue for page in await pages(sandbox, "issues", 200, f"&status={status}") for issue in page]
        assert found == [issue for issue in every if issue["status"] == status] != []
    assert len(value_of(await get(sandbox, "issues"), "ListIssuesResponse")["issues"]) == 25
    assert len(value_of(await get(sandbox, "signals"), "ListSignalsResponse")["signals"]) == 50
    assert len(value_of(await get(sandbox, "insights"), "ListInsightsResponse")["insights"]) == 25


async def test_issue_is_changed() -> None:
    """A change shows in the issue and in lists, sets `updatedAt`, is idempotent, and is taken back by a reset."""
    sandbox = make_sandbox()
    [first, *_] = value_of(await get(sandbox, "issues?status=unresolved"), "ListIssuesResponse")["issues"]
    before = value_of(await get(sandbox, f"issues/{first['id']}"), "GetIssueResponse")["issue"]
    assert first.items() <= before.items()
    for _ in range(2):
        changed = value_of(await patch(sandbox, first["id"].upper(), b'{"status":"resolved"}'), "GetIssueResponse")
        assert changed["issue"] == {**before, "status": "resolved", "updatedAt": "2027-01-15T08:00:00.000Z"}
    [again, *_] = value_of(await get(sandbox, "issues?status=unresolved"), "ListIssuesResponse")["issues"]
    assert again["id"] != first["id"]
    assert sandbox.report()["data_api"]["changed"] == 1
    sandbox.reset()
    assert value_of(await get(sandbox, f"issues/{first['id']}"), "GetIssueResponse")["issue"] == before


@pytest.mark.parametrize(
    "target",
    [
        *(f"{name}?limit={limit}" for name in LISTS for limit in ("0", "-1", "1.0", "", "x", "%2b1", "1&limit=2")),
        *(f"{name}?limit={most + 1}" for name, most in LISTS.items()),
        *(f"{name}?cursor={cursor}" for name in LISTS for cursor in ("", "x", "W10", "WyJhIl0", "a&cursor=b", "%ff")),
        *("issues?status=", "issues?status=open", "issues?status=resolved&status=resolved"),
        *("issues/1", f"issues/{uuid.uuid4().hex}", f"issues/{{{uuid.uuid4()}}}", "issues/urn:uuid:x"),
    ],
)
async def test_bad_parameters(target: str) -> None:
    """What the description does not allow is answered 400 in the API's shape."""
    response = await get(make_sandbox(), target)
    assert (response.status, list(json.loads(response.body))) == (400, ["error"])


@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b"{}", b'{"status":1}', b'{"status":"open"}', b'{"status":null}', b'{"status":"\xff"}']
)
async def test_bad_changes(body: bytes) -> None:
    """A change that names no status changes nothing."""
    sandbox = make_sandbox()
    [first, *_] = value_of(await get(sandbox, "issues"), "ListIssuesResponse")["issues"]
    assert (await patch(sandbox, first["id"], body)).status == 400
    assert sandbox.report()["data_api"]["changed"] == 0


async def test_no_such_issue() -> None:
    """An issue that is not there is answered 404, to readers and to those who would change it."""
    sandbox = make_sandbox()
    name = str(uuid.uuid4())
    for response in (await get(sandbox, f"issues/{name}"), await patch(sandbox, name, b'{"status":"resolved"}')):
        assert (response.status, json.loads(response.body)) == (404, {"error": "Issue not found"})


@pytest.mark.parametrize(
    ("authorization", "data", "status"),
    [
        (None, {}, 401),
        ("", {}, 401),
        ("Bearer", {}, 401),
        ("Basic luc_api_x", {}, 401),
        ("Bearer luc_pk_x", {}, 401),
        ("Bearer luc_api_x y", {}, 401),
        ("Bearer luc_api_x", {}, 200),
        ("bearer  luc_oat_x", {}, 200),
        ("Bearer luc_mcp_x", {}, 200),
        ("Bearer luc_api_x", {"tokens": ("luc_api_y",)}, 401),
        ("Bearer luc_api_y", {"tokens": ("luc_api_y",)}, 200),
        ("Bearer luc_api_r", {"read_only_tokens": ("luc_api_r",)}, 200),
    ],
)
async def test_tokens(authorization: str | None, data: dict[str, Any], status: int) -> None:
    """Tokens are taken by their prefix, or only those that are listed; others get a challenge with the scope."""
    headers = {} if authorization is None else {b"authorization": authorization.encode()}
    response = await ask(make_sandbox(**data), "GET", "/api/v1/signals", headers=headers)
    assert response.status == status
    challenge = dict(response.headers).get(b"www-authenticate")
    assert challenge == (b'Bearer scope="read:lucent"' if status == 401 else None)


async def test_scope_of_changes() -> None:
    """A token for reading may not change, and one that is unknown learns which scope a change needs."""
    sandbox = make_sandbox(tokens=("luc_api_w",), read_only_tokens=("luc_api_r",))
    [first, *_] = value_of(
        await ask(sandbox, "GET", "/api/v1/issues", headers=bearing("luc_api_r")), "ListIssuesResponse"
    )["issues"]
    tokens = ("luc_api_w", "luc_api_r", "luc_api_x")
    answers = [await patch(sandbox, first["id"], b'{"status":"transient"}', token) for token in tokens]
    assert [answer.status for answer in answers] == [200, 403, 401]
    assert dict(answers[-1].headers)[b"www-authenticate"] == b'Bearer scope="write:issues"'


async def test_rate_limits(autojump_clock: MockClock) -> None:
    """Reads and changes are limited apart and for each token; a 429 says when to come again, and then it works."""
    sandbox = make_sandbox(reads_per_minute=3, writes_per_minute=1)
    issue_id = value_of(await get(sandbox, "issues"), "ListIssuesResponse")["issues"][0]["id"]
    await trio.sleep(10)
    assert [(await get(sandbox, "signals")).status for _ in range(3)] == [200, 200, 429]
    change = b'{"status":"resolved"}'
    assert [(await patch(sandbox, issue_id, change)).status for _ in range(2)] == [200, 429]
    assert (await patch(sandbox, issue_id, change, "luc_api_other")).status == 200
    refused = dict((await get(sandbox, "signals")).headers)
    assert {name: refused[name] for name in refused if name.startswith((b"x-ratelimit", b"retry"))} == {
        b"retry-after": b"50",
        b"x-ratelimit-limit": b"3",
        b"x-ratelimit-remaining": b"0",
        b"x-ratelimit-reset": b"%d" % (NOW + 50),
    }
    await trio.sleep(50)
    assert (await get(sandbox, "signals")).status == 200
    report = sandbox.report()["data_api"]
    assert (report["reads"], report["writes"], report["rate_limited"]) == (6, 3, 3)
    assert report["responses"] == {"200": 6, "429": 3}


async def test_rate_headers_on_request() -> None:
    """Where it is asked for, every answer says what is left."""
    sandbox = make_sandbox(has_rate_headers=True)
    assert [dict((await get(sandbox, "signals")).headers)[b"x-ratelimit-remaining"] for _ in range(2)] == [
        b"299",
        b"298",
    ]
    assert b"x-ratelimit-remaining" not in dict((await get(make_sandbox(), "signals")).headers)


async def test_entity_tags() -> None:
    """An unchanged answer is 304 to whoever has it, a changed one is sent; without tags nothing is."""
    sandbox = make_sandbox()
    first = await get(sandbox, "issues?limit=1")
    tag = dict(first.headers)[b"etag"].decode()
    assert [
        (await get(sandbox, "issues?limit=1", if_none_match=asked)).status
        for asked in (tag, f'"other", {tag.removeprefix("W/")}', "*", '"other"')
    ] == [304, 304, 304, 200]
    [issue] = json.loads(first.body)["issues"]
    status = "resolved" if issue["status"] != "resolved" else "transient"
    await patch(sandbox, issue["id"], json.dumps({"status": status}).encode())
    assert (await get(sandbox, "issues?limit=1", if_none_match=tag)).status == 200
    assert b"etag" not in dict((await get(make_sandbox(has_etags=False), "signals")).headers)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"outages": [[0, 100]]}, lambda response: response is HANG_UP),
        ({"outages": [[0, 100]], "outage_status": 503}, lambda response: response.status == 503),
        ({"error_rate": 1, "error_status": [502]}, lambda response: response.status == 502),
        ({"drop_before_rate": 1}, lambda response: response is HANG_UP),
        ({"drop_after_rate": 1}, lambda response: response is HANG_UP),
        ({"reject_keys": [TOKEN]}, lambda response: response.status == 401),
        ({"latency_seconds": 3}, lambda response: response.status == 200 and trio.current_time() == 3),
    ],
)
async def test_faults(autojump_clock: MockClock, faults: dict[str, Any], expected: Callable[[Response], bool]) -> None:
    """The faults that strike batches strike the data API too, and are counted apart."""
    sandbox = make_sandbox(faults)
    assert expected(await get(sandbox, "insights"))
    report = sandbox.report()
    assert report["requests"] == 0
    assert (
        report["data_api"]["reads"]
        == 1
        == sum(report["data_api"]["responses"].values()) + report["data_api"]["hung_up"]
    )


async def test_lost_answer_of_a_change() -> None:
    """A change whose answer is lost is made; one that is lost before is not."""
    sandbox = make_sandbox()
    [first, *_] = value_of(await get(sandbox, "issues?status=unresolved"), "ListIssuesResponse")["issues"]
    for faults, changed in (({"drop_before_rate": 1.0}, 0), ({"drop_after_rate": 1.0}, 1)):
        sandbox.set_faults(fault_settings(faults))
        assert await patch(sandbox, first["id"], b'{"status":"resolved"}') is HANG_UP
        assert sandbox.report()["data_api"]["changed"] == changed


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("POST", "/api/v1/issues", 405, b"GET, HEAD"),
        ("DELETE", f"/api/v1/issues/{uuid.uuid4()}", 405, b"GET, HEAD, PATCH"),
        ("PATCH", "/api/v1/signals", 405, b"GET, HEAD"),
        ("OPTIONS", "/api/v1/insights", 405, b"GET, HEAD"),
        ("GET", "/api/v1/", 404, None),
        ("GET", "/api/v1/issues/", 404, None),
        ("GET", "/api/v1/issues/a/b", 404, None),
        ("GET", "/api/v2/issues", 404, None),
    ],
)
async def test_elsewhere(method: str, path: str, status: int, allow: bytes | None) -> None:
    """Other paths are not there, and other methods are not allowed."""
    response = await ask(make_sandbox(), method, path, headers=bearing())
    assert (response.status, dict(response.headers).get(b"allow")) == (status, allow)
