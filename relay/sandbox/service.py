"""The sandbox itself: the ingest endpoint as upstream serves it, and the routes that steer and question it.

The data API is played by `data_api`.

Rules:
1. Checks come in the order of a real server: outage, key, rate limit, latency, body, schema, limits, faults,
   store. A fault strikes only what upstream would have stored, so faults do not hide violations; and what is stored
   already is not refused for its content: no server takes a batch and then finds fault with it.
2. From the end of the latency to the answer nothing is awaited: of two equal requests one is the first.
3. The routes under `/sandbox/` suffer no faults and are not counted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs

import msgspec
import trio
from msgspec import Meta

from relay.clock import wall_clock
from relay.errors import InvalidBatch, RefusedBatch
from relay.http.message import HANG_UP, HeaderList, Request, Response, error_response, json_response
from relay.http.router import Route, Router
from relay.protocol.fingerprint import fingerprint
from relay.sandbox.body import MAX_DECODED_BYTES, decode_body, parse_json, split_events
from relay.sandbox.data_api import DataApi, DataSettings
from relay.sandbox.faults import Faults, FaultSettings, RandomSource, fault_settings
from relay.sandbox.injected import injected_error, outage_answer
from relay.sandbox.limiter import RequestWindow
from relay.sandbox.report import KeyReport, Report
from relay.sandbox.schema import BatchSchema, as_utf8, load_description
from relay.sandbox.store import Store, StoredBatch, envelope_digest, event_digest

if TYPE_CHECKING:
    from collections.abc import Callable

REPLAY_PATH = "/api/sdk/replay"
"""The one endpoint of the ingest API."""

KEY_PREFIX = "luc_pk_"
"""What ingest keys begin with, as published."""

MAX_CONTROL_BYTES = 65_536
"""Body of a control request; fault settings are a few lines."""

MAX_PAGE = 1_000
"""Sessions of one `GET /sandbox/sessions`; about 100 KB."""

OF_CONTENT = frozenset({400, 413, 422})
"""Errors that say that the batch itself is at fault, and so is not stored."""

CORS: HeaderList = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-headers", b"Content-Type, Content-Encoding, X-Lucent-Api-Key"),
    (b"access-control-allow-methods", b"POST, OPTIONS"),
)
"""As published: any page may send, without credentials."""


class SandboxSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the sandbox plays. The defaults are upstream's published limits, without faults."""

    keys: tuple[str, ...] = ()
    """Accepted keys; without any, every key that begins with `luc_pk_`."""
    requests_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = 100
    """Rate limit of each key; 0 is unlimited."""
    max_events: Annotated[int, Meta(ge=1)] = 500
    """Events of one batch."""
    max_bytes: Annotated[int, Meta(ge=1)] = 1_048_576
    """Uncompressed JSON of one batch that has more than one event."""
    data: DataSettings = DataSettings()
    """Of the data API."""
    faults: FaultSettings = FaultSettings()
    """In force from the start; `POST /sandbox/faults` replaces them."""


class Sandbox:
    """A stand-in for upstream, without a socket: `router()` gives its handlers to a listener or a test."""

    def __init__(
        self,
        settings: SandboxSettings,
        *,
        now: Callable[[], float],
        random: RandomSource,
        wall: Callable[[], float] = wall_clock,
    ) -> None:
        self._settings = settings
        self._now = now
        self._started_at = now()
        self._faults = Faults(settings.faults, random)
        self._schema = BatchSchema(load_description())
        self._store = Store()
        self._report = Report()
        self._windows: dict[str, RequestWindow] = {}
        self._data = DataApi(settings.data, self._faults, now, wall, self._elapsed_seconds)

    def router(self) -> Router:
        """Return the routes of both APIs and of the control API."""
        return Router(
            [
                Route(
                    REPLAY_PATH,
                    {"POST": self.replay},
                    # One event may be as large as it likes, also where it does not compress.
                    max_body_bytes=MAX_DECODED_BYTES,
                    headers=CORS,
                ),
                *self._data.routes(),
                Route("/sandbox/report", {"GET": self._get_report}),
                Route("/sandbox/sessions", {"GET": self._get_sessions}),
                Route("/sandbox/session", {"GET": self._get_session}),
                Route("/sandbox/reset", {"POST": self._post_reset}),
                Route(
                    "/sandbox/faults",
                    {"GET": self._get_faults, "POST": self._post_faults},
                    max_body_bytes=MAX_CONTROL_BYTES,
                ),
            ]
        )

    def report(self) -> dict[str, Any]:
        """Return the numbers so far; the fields are those of `Report`."""
        report = msgspec.structs.replace(
            self._report,
            sessions=len(self._store.sessions),
            peak_requests_per_minute=max((window.peak for window in self._windows.values()), default=0),
            keys={fingerprint(key): KeyReport(window.counted, window.peak) for key, window in self._windows.items()},
            data_api=self._data.report,
            elapsed_seconds=round(self._elapsed_seconds(), 3),
        )
        value: dict[str, Any] = msgspec.to_builtins(report)
        return value

    def sessions(self, offset: int = 0, limit: int = MAX_PAGE) -> list[dict[str, Any]]:
        """Return a page of session summaries, oldest session first."""
        ids = list(self._store.sessions)[offset : offset + limit]
        return [self._store.sessions[session_id].summary() for session_id in ids]

    def session(self, session_id: str) -> dict[str, Any] | None:
        """Return a session with all its batches in sequence order; None where nothing of it is stored."""
        session = self._store.sessions.get(session_id)
        return None if session is None else session.listing()

    def set_faults(self, settings: FaultSettings) -> None:
        """Replace all fault settings. Batches whose fate is drawn keep it."""
        self._faults.settings = settings

    def reset(self) -> None:
        """Forget batches, changed issues, counts and rate-limit windows. Faults and elapsed time stay."""
        self._store = Store()
        self._report = Report()
        self._windows = {}
        self._data.reset()

    async def replay(self, request: Request) -> Response:
        """Answer `POST /api/sdk/replay`."""
        response = self._turn_away(request)
        if response is None:
            response = await self._take(request)
        self._report.count_answer(response.status, len(request.body))
        return response

    def _turn_away(self, request: Request) -> Response | None:
        """Return the answer where the request's headers are reason enough."""
        if self._faults.is_out(self._elapsed_seconds()):
            return self._outage()
        key = _api_key(request)
        if not key:
            self._report.refused_keys += 1
            return error_response(401, "Missing API key")
        if not self._accepts(key):
            self._report.refused_keys += 1
            return error_response(401, "Invalid or revoked API key")
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = RequestWindow(self._settings.requests_per_minute)
        wait_seconds = window.admit(self._now())
        if wait_seconds > 0:
            self._report.rate_limited += 1
            retry_after = str(math.ceil(wait_seconds)).encode()
            return error_response(429, "Rate limit exceeded", headers=((b"retry-after", retry_after),))
        return None

    async def _take(self, request: Request) -> Response:
        """Answer a batch that is within its rate."""
        fate = self._faults.fate()
        await trio.sleep(fate.latency_seconds)
        if self._faults.is_out(self._elapsed_seconds()):
            return self._outage()
        checked = self._check(request)
        if isinstance(checked, Response):
            return checked
        session_id, batch = checked
        if session_id in self._faults.settings.fail_sessions:
            fate = msgspec.structs.replace(fate, kind="error")
        if fate.kind == "error" and fate.status in OF_CONTENT and self._store.has(session_id, batch.sequence):
            fate = msgspec.structs.replace(fate, kind="serve")
        self._report.count_fault(fate)
        if fate.kind == "error":
            return injected_error(fate.status)
        if fate.kind == "drop_before":
            return HANG_UP
        is_after_final = self._store.is_final(session_id)
        outcome = self._store.add(session_id, batch)
        self._report.count_batch(outcome, batch, is_after_final=is_after_final)
        if fate.kind == "drop_after":
            return HANG_UP
        return json_response(200, {"ok": True})

    def _check(self, request: Request) -> tuple[str, StoredBatch] | Response:
        """Return the session id and what is to be stored, or the answer where the batch is refused."""
        violations = self._report.violations
        try:
            text = decode_body(request.body, request.header(b"content-encoding").decode("latin-1"))
            self._report.decoded_bytes += len(text)
            value = parse_json(text)
        except InvalidBatch as error:
            violations.unreadable += 1
            issue = {"code": "custom", "path": [], "message": str(error)}
            return error_response(400, "Invalid replay batch", [issue])
        except RefusedBatch as error:
            violations.unreadable += 1
            return error_response(error.status, str(error))
        issues = self._schema.issues(value)
        if issues:
            violations.invalid += 1
            return error_response(400, "Invalid replay batch", issues)
        count = len(value["replay"]["events"])
        if count > self._settings.max_events:
            violations.over_max_events += 1
            return error_response(413, f"Batch has {count} events, more than {self._settings.max_events}")
        if count > 1 and len(text) > self._settings.max_bytes:
            violations.over_max_bytes += 1
            return error_response(413, f"Batch has {len(text)} bytes, more than {self._settings.max_bytes}")
        batch = StoredBatch(
            # To upstream every number is a double: 3 and 3.0 are one sequence, 2**53 and 2**53 + 1 too.
            sequence=int(float(value["replay"]["sequence"])),
            window_id=as_utf8(value["session"]["windowId"]),
            flush=value.get("flush", "normal"),
            decoded_bytes=len(text),
            envelope=envelope_digest(value),
            digests=b"".join(event_digest(event) for event in split_events(text)),
            at_seconds=self._elapsed_seconds(),
        )
        return as_utf8(value["session"]["id"]), batch

    def _accepts(self, key: str) -> bool:
        if key in self._faults.settings.reject_keys:
            return False
        return key in self._settings.keys if self._settings.keys else key.startswith(KEY_PREFIX)

    def _elapsed_seconds(self) -> float:
        return self._now() - self._started_at

    def _outage(self) -> Response:
        self._report.injected.outage += 1
        return outage_answer(self._faults.settings)

    async def _get_report(self, _request: Request) -> Response:
        return json_response(200, self.report())

    async def _get_sessions(self, request: Request) -> Response:
        offset = _count(request, "offset", 0)
        limit = _count(request, "limit", 100)
        if offset is None or limit is None or limit > MAX_PAGE:
            return error_response(400, f"offset and limit must be integers >= 0, limit at most {MAX_PAGE}")
        page = self.sessions(offset, limit)
        return json_response(200, {"total": len(self._store.sessions), "sessions": page})

    async def _get_session(self, request: Request) -> Response:
        session = self.session(_parameter(request, "id"))
        return error_response(404, "No such session") if session is None else json_response(200, session)

    async def _post_reset(self, _request: Request) -> Response:
        self.reset()
        return json_response(200, {"ok": True})

    async def _get_faults(self, _request: Request) -> Response:
        return json_response(200, msgspec.to_builtins(self._faults.settings))

    async def _post_faults(self, request: Request) -> Response:
        try:
            self.set_faults(fault_settings(msgspec.json.decode(request.body, type=dict[str, Any])))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return error_response(400, str(error))
        return await self._get_faults(request)


def _api_key(request: Request) -> str:
    return request.header(b"x-lucent-api-key").decode("latin-1").strip() or _parameter(request, "api_key")


def _parameter(request: Request, name: str) -> str:
    """Return the first query parameter of a name; empty without one."""
    return parse_qs(request.query.decode("latin-1")).get(name, [""])[0]


def _count(request: Request, name: str, default: int) -> int | None:
    """Return a query parameter as a number; None where it is none."""
    text = _parameter(request, name)
    if not text:
        return default
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
