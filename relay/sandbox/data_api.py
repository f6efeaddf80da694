"""The data API as upstream serves it: `/api/v1/issues`, `/signals` and `/insights`, over made-up records.

Rules:
1. Checks come in the order of a real server: outage, token, rate limit, scope, latency, faults, request.
2. Reads and writes are limited apart, each token by itself.
3. Every answer to a read has a weak ETag, as common servers give it, and is 304 to whoever has it. Upstream promises
   none; `has_etags` takes it away.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
import uuid
from collections.abc import Callable
from typing import Annotated
from urllib.parse import parse_qs

import msgspec
import orjson
import trio
from msgspec import Meta

from relay.http.message import HANG_UP, JSON, HeaderList, Request, Response, error_response, json_response
from relay.http.router import Route
from relay.sandbox.faults import Faults
from relay.sandbox.injected import injected_error, outage_answer
from relay.sandbox.limiter import RequestWindow
from relay.sandbox.records import STATUSES, Record, Records, Status
from relay.sandbox.report import DataReport

TOKEN_PREFIXES = ("luc_api_", "luc_oat_", "luc_mcp_")
"""What tokens begin with, as published."""

READ_SCOPE, WRITE_SCOPE = "read:lucent", "write:issues"
"""As published."""

MAX_CHANGE_BYTES = 65_536
"""Body of a PATCH; a status is a few bytes."""

_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)
"""RFC 6750, 2.1; the scheme in any case (RFC 9110, 11.1)."""

_ENTITY_TAG = re.compile(rb'(?:W/)?"([^"]*)"')


class DataSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the data API plays. The defaults are upstream's published limits."""

    seed: int = 0
    """Of the records."""
    tokens: tuple[str, ...] = ()
    """Accepted tokens; without any, every token with a published prefix."""
    read_only_tokens: tuple[str, ...] = ()
    """Tokens without the scope `write:issues`; accepted beside the others."""
    reads_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = 300
    """Rate limit of each token's reads; 0 is unlimited."""
    writes_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = 60
    """Rate limit of each token's changes; 0 is unlimited."""
    has_rate_headers: bool = False
    """Whether every answer says what is left of the limit; published is that a 429 does."""
    has_etags: bool = True
    """Whether answers can be asked for again with `If-None-Match`."""


class DataApi:
    """The handlers.

    Args:
        settings: What is played.
        faults: Shared with the ingest API.
        now: Seconds, for rate limits.
        wall: Seconds since the epoch, for `X-RateLimit-Reset` and `updatedAt`.
        elapsed: Seconds since the sandbox began, for outages.
    """

    def __init__(
        self,
        settings: DataSettings,
        faults: Faults,
        now: Callable[[], float],
        wall: Callable[[], float],
        elapsed: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._faults = faults
        self._now = now
        self._wall = wall
        self._elapsed = elapsed
        self.reset()

    def reset(self) -> None:
        """Take back changes, counts and rate limits."""
        self._records = Records(self._settings.seed)
        self.report = DataReport()
        self._windows: dict[tuple[str, bool], RequestWindow] = {}

    def routes(self) -> list[Route]:
        """Return the routes to serve."""

        def reading(path: str, answer: Callable[[Request], Response]) -> Route:
            async def read(request: Request) -> Response:
                return await self._serve(request, answer)

            return Route(path, {"GET": read}, has_options=False)

        async def change(request: Request) -> Response:
            return await self._serve(request, self._change_issue, is_write=True)

        issue = reading("/api/v1/issues/*", self._get_issue)
        return [
            reading("/api/v1/issues", self._list_issues),
            reading("/api/v1/signals", lambda request: _page(request, "signals", self._records.signals, 50, 200)),
            reading("/api/v1/insights", lambda request: _page(request, "insights", self._records.insights, 25, 100)),
            msgspec.structs.replace(
                issue, handlers={**issue.handlers, "PATCH": change}, max_body_bytes=MAX_CHANGE_BYTES
            ),
        ]

    # -- what every request goes through (rule 1)

    async def _serve(
        self, request: Request, answer: Callable[[Request], Response], *, is_write: bool = False
    ) -> Response:
        if is_write:
            self.report.writes += 1
        else:
            self.report.reads += 1
        response = await self._answer(request, answer, is_write=is_write)
        if response.status:
            name = str(response.status)
            self.report.responses[name] = self.report.responses.get(name, 0) + 1
        else:
            self.report.hung_up += 1
        return response

    async def _answer(self, request: Request, answer: Callable[[Request], Response], *, is_write: bool) -> Response:
        if self._faults.is_out(self._elapsed()):
            return outage_answer(self._faults.settings)
        token = self._token(request)
        if token is None:
            return self._challenge(request, is_write=is_write)
        window = self._window(token, is_write=is_write)
        wait_seconds = window.admit(self._now())
        rate = self._rate_headers(window, wait_seconds, is_write=is_write)
        if wait_seconds:
            self.report.rate_limited += 1
            retry_after = (b"retry-after", b"%d" % math.ceil(wait_seconds))
            return error_response(429, "Rate limit exceeded", headers=(retry_after, *rate))
        if is_write and token in self._settings.read_only_tokens:
            return error_response(403, f"This token lacks the scope {WRITE_SCOPE}")
        fate = self._faults.fate()
        await trio.sleep(fate.latency_seconds)
        if self._faults.is_out(self._elapsed()):
            return outage_answer(self._faults.settings)
        if fate.kind == "drop_before":
            return HANG_UP
        if fate.kind == "error":
            return injected_error(fate.status)
        response = answer(request)
        if fate.kind == "drop_after":
            return HANG_UP
        if not is_write and self._settings.has_etags:
            response = _tagged(request, response)
        if self._settings.has_rate_headers:
            response.headers = (*response.headers, *rate)
        return response

    def _token(self, request: Request) -> str | None:
        """Return the request's token where it is accepted."""
        found = _BEARER.fullmatch(request.header(b"authorization").decode("latin-1").strip())
        if found is None or found[1] in self._faults.settings.reject_keys:
            return None
        token, settings = found[1], self._settings
        if settings.tokens or settings.read_only_tokens:
            return token if token in (*settings.tokens, *settings.read_only_tokens) else None
        return token if token.startswith(TOKEN_PREFIXES) else None

    def _challenge(self, request: Request, *, is_write: bool) -> Response:
        is_missing = not request.header(b"authorization")
        scope = WRITE_SCOPE if is_write else READ_SCOPE
        challenge = (b"www-authenticate", f'Bearer scope="{scope}"'.encode())
        return error_response(
            401, "Missing bearer token" if is_missing else "Invalid or revoked bearer token", headers=(challenge,)
        )

    def _window(self, token: str, *, is_write: bool) -> RequestWindow:
        window = self._windows.get((token, is_write))
        if window is None:
            settings = self._settings
            limit = settings.writes_per_minute if is_write else settings.reads_per_minute
            window = self._windows[token, is_write] = RequestWindow(limit)
        return window

    def _rate_headers(self, window: RequestWindow, wait_seconds: float, *, is_write: bool) -> HeaderList:
        settings = self._settings
        limit = settings.writes_per_minute if is_write else settings.reads_per_minute
        reset_at = math.ceil(self._wall() + (wait_seconds or window.resets_in(self._now())))
        return (
            (b"x-ratelimit-limit", b"%d" % limit),
            (b"x-ratelimit-remaining", b"%d" % max(0, limit - window.recent)),
            (b"x-ratelimit-reset", b"%d" % reset_at),
        )

    # -- the endpoints

    def _list_issues(self, request: Request) -> Response:
        status = _parameters(request).get("status", [None])
        if status not in ([None], *([one] for one in STATUSES)):
            return error_response(400, f"status must be one of {', '.join(STATUSES)}")
        return _page(request, "issues", self._records.issues(status[0]), 25, 200)

    def _get_issue(self, request: Request) -> Response:
        issue = self._issue(request)
        return issue if isinstance(issue, Response) else json_response(200, {"issue": issue})

    def _change_issue(self, request: Request) -> Response:
        issue = self._issue(request)
        if isinstance(issue, Response):
            return issue
        try:
            status = msgspec.json.decode(request.body, type=_Change).status
        except (msgspec.DecodeError, UnicodeDecodeError):
            return error_response(400, f'The body must be {{"status": …}} with one of {", ".join(STATUSES)}')
        self.report.changed += issue["status"] != status
        self._records.set_status(issue, status, self._wall())
        return json_response(200, {"issue": issue})

    def _issue(self, request: Request) -> Record | Response:
        """Return the issue that a path names, or the answer where there is none."""
        try:
            issue_id = _uuid(request.path.rpartition("/")[2])
        except ValueError:
            return error_response(400, "issueId must be a UUID")
        issue = self._records.issue(issue_id)
        return error_response(404, "Issue not found") if issue is None else issue


class _Change(msgspec.Struct):
    status: Status


_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
"""RFC 9562, 4: Python takes more for a UUID."""


def _uuid(text: str) -> uuid.UUID:
    if _UUID.fullmatch(text) is None:
        raise ValueError(text)
    return uuid.UUID(text)


def _parameters(request: Request) -> dict[str, list[str]]:
    return parse_qs(request.query.decode("latin-1"), keep_blank_values=True)


def _page(request: Request, name: str, records: list[Record], default: int, most: int) -> Response:
    """Answer with a page of records.

    Args:
        request: Its `limit` and `cursor` count.
        name: Of the answer's list.
        records: All, in the published order.
        default: Records of a page without `limit`.
        most: Largest `limit`.
    """
    parameters = _parameters(request)
    limit = _limit(parameters.get("limit", [str(default)]), most)
    if limit is None:
        return error_response(400, f"limit must be an integer from 1 to {most}")
    first = 0
    if "cursor" in parameters:
        after = _read_cursor(parameters["cursor"])
        if after is None:
            return error_response(400, "cursor must be the nextCursor of an earlier page")
        first = next((place for place, record in enumerate(records) if _place(record) < after), len(records))
    page = records[first : first + limit]
    has_more = first + limit < len(records)
    return json_response(200, {name: page, "nextCursor": _write_cursor(page[-1]) if has_more else None})


def _limit(texts: list[str], most: int) -> int | None:
    """Return a limit; None where it is given twice, or is none."""
    if len(texts) != 1 or re.fullmatch(r"[0-9]{1,9}", texts[0]) is None or not 1 <= int(texts[0]) <= most:
        return None
    return int(texts[0])


def _place(record: Record) -> tuple[str, str]:
    """Return where a record stands; greater ones come first."""
    return record["createdAt"], record["id"]


def _write_cursor(record: Record) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(_place(record))).decode().rstrip("=")


def _read_cursor(texts: list[str]) -> tuple[str, str] | None:
    try:
        (text,) = texts
        created_at, record_id = msgspec.json.decode(
            base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True), type=tuple[str, str]
        )
    except (ValueError, binascii.Error, msgspec.DecodeError):
        return None
    return created_at, record_id


def _tagged(request: Request, response: Response) -> Response:
    """Give an answer its ETag, or say that the client has it already."""
    if response.status != 200:
        return response
    opaque = hashlib.blake2b(response.body, digest_size=12).hexdigest().encode()
    tag: tuple[bytes, bytes] = (b"etag", b'W/"%b"' % opaque)
    asked = request.header(b"if-none-match")
    if asked.strip() == b"*" or opaque in _ENTITY_TAG.findall(asked):
        return Response(304, headers=(tag,))
    return Response(200, response.body, (JSON, tag))
