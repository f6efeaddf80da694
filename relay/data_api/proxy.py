"""The data API's routes: each request answered from what is kept, from a request under way, or by a new one.

Rules:
1. Status, body and end-to-end headers are upstream's. The relay adds `via` and `cache-status`, and `age` to what is
   kept. What it says itself is said in upstream's shape.
2. Before an answer has begun trouble is 502, 503 or 504, or a stale answer where that is allowed. After its first byte
   the connection to the client ends: nothing may look whole that is not.
3. A request that upstream would refuse for the token's budget is not sent: it is answered 429 here.
4. Ingest is not touched: connections, slots and budgets are the data API's own.

What is shared and kept is `relay.data_api.flights`; by which rules, `relay.protocol.caching` and `relay.protocol.rate`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec
import trio

from relay.config import DataApi as Settings
from relay.data_api.asking import VIA, Ask, make_ask
from relay.data_api.credentials import Credentials, ReadFile
from relay.data_api.flight import Busy, Flight, Head
from relay.data_api.flights import ISSUES_PATH, Flights
from relay.data_api.statistics import DataApiStatistics
from relay.data_api.store import AnswerStore
from relay.data_api.tokens import Tokens
from relay.errors import ConnectFailed, ExchangeTimedOut, UpstreamError
from relay.http.client import HttpClient
from relay.http.message import HeaderList, Request, Response, Streamed, Writer, error_response
from relay.http.router import Route
from relay.protocol.caching import Kept, cache_status, is_usable, is_usable_stale
from relay.protocol.data_requests import find_fault, is_one_segment
from relay.protocol.fields import is_not_modified, without

RETRY_AFTER_SECONDS: Final = 5
"""`Retry-After` of 502, 503 and 504: short for a person who waits, long for a loop that does not."""

STALE_STATUSES: Final = frozenset({429, 500, 502, 503, 504})
"""Answers in place of which a stale one may be served: upstream cannot say at present (RFC 5861, 4)."""

_RETRY_AFTER: Final = (b"retry-after", b"%d" % RETRY_AFTER_SECONDS)
_TARGET = re.compile(r"[!-~]+")
_BODY_FIELDS = frozenset({b"content-length", b"content-type", b"content-encoding"})


class DataApi:
    """The proxy.

    Args:
        settings: The configuration's section.
        client: To the data API.
        monotonic: Seconds.
        wall: Seconds since the epoch.
        salt: 16 random bytes, under which tokens are hashed.
        read_file: Reads the token file.
    """

    def __init__(
        self,
        settings: Settings,
        client: HttpClient,
        *,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        salt: bytes,
        read_file: ReadFile,
    ) -> None:
        self._settings = settings
        self._client = client
        self._monotonic = monotonic
        self._wall = wall
        self._store = AnswerStore(settings.cache_max_bytes)
        self._tokens = Tokens(settings)
        self._credentials = Credentials(settings, salt, monotonic, read_file)
        self._flights = Flights(settings, client, self._store, monotonic, wall)
        self._requests_by_route: Counter[str] = Counter(dict.fromkeys(("issues", "issue", "signals", "insights"), 0))
        self._answers_by_class: Counter[str] = Counter(dict.fromkeys(("2xx", "3xx", "4xx", "5xx"), 0))
        self._cache_by_outcome: Counter[str] = Counter(
            dict.fromkeys(("hit", "stale", "revalidated", "shared", "miss", "passed"), 0)
        )
        self._limited_total = 0
        self._cut_total = 0

    def routes(self) -> list[Route]:
        """Return the routes to serve."""
        get = {name: partial(self._handle, name) for name in ("issues", "issue", "signals", "insights")}
        size = self._settings.max_body_bytes
        return [
            Route(ISSUES_PATH, {"GET": get["issues"]}, has_options=False),
            Route(f"{ISSUES_PATH}/*", {"GET": get["issue"], "PATCH": get["issue"]}, None, size, has_options=False),
            Route("/api/v1/signals", {"GET": get["signals"]}, has_options=False),
            Route("/api/v1/insights", {"GET": get["insights"]}, has_options=False),
        ]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry requests until cancelled; only meanwhile are any answered."""
        await self._flights.run(task_status=task_status)

    def stop(self) -> None:
        """Let `run` return; whatever is under way is cancelled."""
        self._flights.stop()

    def statistics(self) -> DataApiStatistics:
        """Return what was done, and how the tokens stand."""
        now, client = self._monotonic(), self._client.statistics()
        taken = [token for token in self._tokens if token.is_taken]
        reads = {token.name: token.reads.remaining(now) for token in taken}
        writes = {token.name: token.writes.remaining(now) for token in taken}
        return DataApiStatistics(
            requests_by_route=dict(self._requests_by_route),
            answers_by_class=dict(self._answers_by_class),
            cache_by_outcome=dict(self._cache_by_outcome),
            cache_bytes=self._store.used_bytes,
            cache_targets=len(self._store),
            cache_evicted=self._store.evicted_total,
            cache_invalidated=self._flights.invalidated_total,
            upstream_requests=self._flights.sent_total,
            upstream_failures=dict(self._flights.failed_by_reason),
            failures=self._flights.failures,
            in_flight=self._flights.in_flight,
            limited=self._limited_total,
            cut=self._cut_total,
            connections_open=client.active_connections + client.idle_connections,
            connections=client.connections_opened_total,
            reads_left_by_key={name: left for name, left in reads.items() if left is not None},
            writes_left_by_key={name: left for name, left in writes.items() if left is not None},
            refused_keys=sum(token.is_refused for token in self._tokens),
            credentials_problem=self._find_problem(),
        )

    def _find_problem(self) -> str:
        """Return what is wrong with the relay's token; empty where nothing is known to be."""
        if self._credentials.problem:
            return f"data_api.token_file {self._credentials.problem}"
        own = self._tokens.get(self._credentials.own_partition)
        if own is not None and own.is_refused:
            return f"Lucent refuses the relay's token for the data API, {own.name}"
        return ""

    async def _handle(self, route: str, request: Request) -> Streamed:
        return Streamed(partial(self._answer, route, request))

    async def _answer(self, route: str, request: Request, writer: Writer) -> None:
        self._requests_by_route[route] += 1
        ask = await self._understand(route, request)
        if isinstance(ask, Response):
            await self._say_response(writer, ask)
        else:
            await self._serve(ask, writer)

    async def _understand(self, route: str, request: Request) -> Ask | Response:
        """Return what is asked and by whom; a Response where it is refused here."""
        if route == "issue" and not is_one_segment(request.path.rpartition("/")[2]):
            return error_response(404, "Not found")
        caller = await self._credentials.identify(request.header(b"authorization"))
        if caller is None:
            return error_response(503, "The relay has no token for the data API at present", headers=(_RETRY_AFTER,))
        token = self._tokens.find(caller.partition, caller.name) if caller.partition else None
        ask = make_ask(request, caller, token, self._settings.forwarded)
        if _TARGET.fullmatch(ask.target) is None:
            return error_response(400, "Malformed request target")
        if self._settings.validate == "edge":
            body = None if request.header(b"content-encoding") else ask.body
            fault = find_fault(ask.method, ask.path, request.query, body)
            if fault is not None:
                return error_response(400, fault)
        return ask

    async def _serve(self, ask: Ask, writer: Writer) -> None:
        """Answer from what is kept, or go and ask."""
        now = self._monotonic()
        kept = None if ask.is_apart else self._store.find(ask.caller.partition, ask.target, ask.fields)
        if kept is not None and is_usable(kept, ask.wish, now):
            self._cache_by_outcome["hit"] += 1
            await self._serve_kept(ask, writer, kept, cache_status(fresh_seconds=kept.fresh_seconds(now)))
        elif ask.wish.is_only_if_kept:
            await self._say(writer, 504, "Nothing is kept that answers this", (cache_status(detail="only-if-cached"),))
        else:
            await self._go(ask, kept, writer)

    async def _go(self, ask: Ask, kept: Kept | None, writer: Writer) -> None:
        """Answer from a request under way, or by a new one."""
        now = self._monotonic()
        plan = _Plan(ask, ask, kept, _why_forwarded(ask, kept, now))
        if kept is not None and ask.method == "GET" and kept.validators():
            plan.asked = ask.checking(kept)
        flight = self._flights.find(plan.asked)
        if flight is not None and await self._pass_on(plan, flight, writer, is_shared=True):
            return
        spent = ask.token.rate(ask.method).spent(now) if ask.token is not None else None
        if spent is None:
            await self._pass_on(plan, self._flights.launch(plan.asked, plan.checked), writer, is_shared=False)
        elif self._may_be_stale(plan):
            await self._serve_stale(plan, writer, "budget-spent")
        else:
            self._limited_total += 1
            await self._say(writer, 429, "Rate limit exceeded", spent.fields(self._wall()))

    async def _pass_on(self, plan: _Plan, flight: Flight, writer: Writer, *, is_shared: bool) -> bool:
        """Read a flight for a client; False where it turns out to be for others only."""
        with flight.join() as reader:
            try:
                head: Head | UpstreamError = await reader.head()
            except UpstreamError as error:
                head = error
            if isinstance(head, Head):
                if is_shared and not self._flights.is_for(flight, plan.asked, head):
                    return False
                if head.status not in STALE_STATUSES or not self._may_be_stale(plan):
                    self._start_passing(plan, flight, head, writer, is_shared=is_shared)
                    try:
                        while piece := await reader.receive():
                            await writer.send(piece)
                    except UpstreamError:
                        self._cut_total += 1
                        writer.cut()
                    return True
        if not self._may_be_stale(plan):
            assert isinstance(head, UpstreamError)  # noqa: S101 - other heads are passed on above
            await self._say_failure(plan, head, writer)
        else:
            status = head.status if isinstance(head, Head) else 0
            await self._serve_stale(plan, writer, "upstream-down", fwd=plan.why, fwd_status=status)
        return True

    def _start_passing(self, plan: _Plan, flight: Flight, head: Head, writer: Writer, *, is_shared: bool) -> None:
        is_renewed = head.asked_status != head.status
        self._cache_by_outcome[
            "shared" if is_shared else "revalidated" if is_renewed else "passed" if plan.ask.is_apart else "miss"
        ] += 1
        status = cache_status(
            fwd=plan.why, fwd_status=head.asked_status, is_stored=flight.is_stored, is_collapsed=is_shared
        )
        headers = (*head.headers, VIA, status)
        # Where upstream was asked by the cache's validators, the client's own condition is still to be answered.
        is_checked = plan.asked is not plan.ask
        if is_checked and head.status == 200 and is_not_modified(plan.ask.fields, head.headers):
            self._start(writer, 304, without(headers, _BODY_FIELDS), None)
        else:
            self._start(writer, head.status, headers, head.length)

    async def _serve_kept(self, ask: Ask, writer: Writer, kept: Kept, status: tuple[bytes, bytes]) -> None:
        headers = (*kept.headers, (b"age", b"%d" % kept.age(self._monotonic())), VIA, status)
        if is_not_modified(ask.fields, kept.headers):
            self._start(writer, 304, without(headers, _BODY_FIELDS), None)
        else:
            self._start(writer, 200, headers, len(kept.body))
            await writer.send(kept.body)

    def _may_be_stale(self, plan: _Plan) -> bool:
        return plan.kept is not None and is_usable_stale(
            plan.kept, plan.ask.wish, self._monotonic(), self._settings.stale_seconds
        )

    async def _serve_stale(
        self, plan: _Plan, writer: Writer, detail: str, *, fwd: str = "", fwd_status: int = 0
    ) -> None:
        assert plan.kept is not None  # noqa: S101 - `_may_be_stale` has said so
        self._cache_by_outcome["stale"] += 1
        seconds = plan.kept.fresh_seconds(self._monotonic())
        status = cache_status(fwd=fwd, fwd_status=fwd_status, fresh_seconds=seconds, detail=detail)
        await self._serve_kept(plan.ask, writer, plan.kept, status)

    # -- what the relay says itself

    async def _say_failure(self, plan: _Plan, error: UpstreamError, writer: Writer) -> None:
        if isinstance(error, Busy):
            status, message = 503, "The relay is busy, try again later"
        elif isinstance(error, ExchangeTimedOut):
            status, message = 504, "Lucent does not answer"
        else:
            status, message = 502, "Lucent cannot be reached"
        if plan.ask.method == "PATCH" and not isinstance(error, Busy | ConnectFailed):
            message += "; the change may have been made, and can be sent again"
        why = "" if isinstance(error, Busy) else plan.why
        failure = cache_status(fwd=why, detail=type(error).__name__.lower())
        await self._say(writer, status, message, (_RETRY_AFTER, failure))

    async def _say(self, writer: Writer, status: int, message: str, headers: HeaderList = ()) -> None:
        await self._say_response(writer, error_response(status, message, headers=headers))

    async def _say_response(self, writer: Writer, response: Response) -> None:
        self._start(writer, response.status, response.headers, len(response.body))
        await writer.send(response.body)

    def _start(self, writer: Writer, status: int, headers: HeaderList, length: int | None) -> None:
        self._answers_by_class[f"{status // 100}xx"] += 1
        writer.start(status, headers, length)


class _Plan(msgspec.Struct):
    """How a request is to be answered by upstream."""

    ask: Ask
    """What the client asks."""
    asked: Ask
    """What upstream is asked: the same, or whether what is kept still holds."""
    kept: Kept | None
    """What is kept and may not be served as it is."""
    why: str
    """Why upstream is asked, as RFC 9211 calls it."""

    @property
    def checked(self) -> Kept | None:
        """What upstream is asked about."""
        return None if self.asked is self.ask else self.kept


def _why_forwarded(ask: Ask, kept: Kept | None, now: float) -> str:
    """Return why a request is not answered by the cache (RFC 9211, 2.2)."""
    if ask.method == "PATCH":
        return "method"
    if ask.is_apart:
        return "bypass"
    if kept is None:
        return "miss"
    return "stale" if kept.fresh_seconds(now) <= 0 or kept.is_checked_always else "request"
