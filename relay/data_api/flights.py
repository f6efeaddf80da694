"""Upstream requests under way: who shares which, what each may cost, and what is kept of its answer.

Rules:
1. Identical concurrent reads of one token share a request. One that began before something was changed through the
   relay is neither joined after that nor kept.
2. A request is sent once more where its connection ended before a byte of an answer, and never after that. PATCH sets a
   value, so it may be sent twice as well.
3. A change that upstream may have made drops what it may have changed: the issue and all lists of issues, of every
   token, since nobody knows which tokens belong to one organisation.
4. A request takes one of `max_in_flight` slots until its last reader is done, so readers bound the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import structlog
import trio

from relay.config import DataApi
from relay.data_api.asking import Ask
from relay.data_api.flight import Busy, Flight, Head
from relay.data_api.store import AnswerStore
from relay.errors import ConnectFailed, ExchangeFailed, ExchangeTimedOut, Unanswered, UpstreamError
from relay.http.client import HttpClient, StreamedReply
from relay.protocol.caching import Kept, is_same_selection, keep, renewed_headers
from relay.protocol.data_requests import resource_of
from relay.protocol.fields import Fields, end_to_end, without

log = structlog.get_logger()

ISSUES_PATH = "/api/v1/issues"
"""What a PATCH changes is below it."""

_LENGTH = frozenset({b"content-length"})

_SAYS_NOTHING = frozenset({304, 408, 425, 429})
"""Statuses below 500 that do not tell what a resource is now."""


class Flights:
    """Sends what clients ask.

    Args:
        settings: The configuration's section.
        client: To the data API.
        store: What is kept.
        monotonic: Seconds.
        wall: Seconds since the epoch.
    """

    def __init__(
        self,
        settings: DataApi,
        client: HttpClient,
        store: AnswerStore,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._client = client
        self._store = store
        self._monotonic = monotonic
        self._wall = wall
        self._shared: dict[tuple[object, ...], tuple[Flight, Ask]] = {}
        self._under_way: dict[Flight, Ask] = {}
        self._slots = trio.CapacityLimiter(settings.max_in_flight)
        self._nursery: trio.Nursery | None = None
        self.sent_total = 0
        """Requests sent to upstream, those sent once more included."""
        self.failed_by_reason: Counter[str] = Counter(timeout=0, unreachable=0, busy=0)
        """Flights without a whole answer."""
        self.failures = 0
        """Of these the last in a row."""
        self.invalidated_total = 0
        """Changes that dropped what was kept."""

    @property
    def in_flight(self) -> int:
        """Flights under way, those whose readers are not done included."""
        return len(self._under_way)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry flights until `stop`."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def stop(self) -> None:
        """Cancel whatever is under way, and let `run` return."""
        assert self._nursery is not None  # noqa: S101 - it runs
        self._nursery.cancel_scope.cancel()

    def find(self, ask: Ask) -> Flight | None:
        """Return a flight that brings what is asked; None where there is none, or the client wants its own."""
        if ask.is_apart or ask.wish.is_fresh_wanted:
            return None
        flight, _ = self._shared.get(ask.key, (None, None))
        return flight if flight is not None and flight.is_open else None

    def is_for(self, flight: Flight, ask: Ask, head: Head) -> bool:
        """Return whether a flight that began for another client brings this one's answer, by its `vary`."""
        leader = self._under_way.get(flight)
        return leader is not None and is_same_selection(head.headers, leader.fields, ask.fields)

    def launch(self, ask: Ask, kept: Kept | None) -> Flight:
        """Begin a request.

        Args:
            ask: What is asked. Its budget has room.
            kept: What upstream is asked about, where the fields have its validators.
        """
        assert self._nursery is not None  # noqa: S101 - requests come while it runs
        flight = Flight(self._settings.window_bytes)
        self._under_way[flight] = ask
        if not ask.is_apart:
            self._shared[ask.key] = (flight, ask)
        self._nursery.start_soon(self._fly, flight, ask, kept, self._count(ask))
        return flight

    async def _fly(self, flight: Flight, ask: Ask, kept: Kept | None, begun_at: float) -> None:
        """Carry one flight to its end."""
        try:
            with flight.scope:
                await self._take_slot(ask, begun_at)
                try:
                    await self._fetch(flight, ask, kept, begun_at)
                finally:
                    self._slots.release()
        except UpstreamError as error:
            timed_out = isinstance(error, ExchangeTimedOut)
            self.failed_by_reason["busy" if isinstance(error, Busy) else "timeout" if timed_out else "unreachable"] += 1
            self.failures += 1
            log.warning("data API does not answer", path=ask.path, reason=str(error))
            flight.fail(error)
        except Exception:
            log.exception("request to the data API failed", path=ask.path)
            flight.fail(ExchangeFailed("the relay failed"))
        finally:
            self._unshare(flight, ask)
            del self._under_way[flight]

    async def _take_slot(self, ask: Ask, begun_at: float) -> None:
        """Wait for a slot. A request that gets none, by its readers' leaving too, has cost its budget nothing.

        Raises:
            Busy: There was none for too long.
        """
        patience = self._settings.first_byte_seconds
        has_slot = False
        try:
            with trio.move_on_after(patience):
                await self._slots.acquire()
                has_slot = True
        finally:
            if not has_slot:
                self._uncount(ask, begun_at)
        if not has_slot:
            raise Busy(f"{self._settings.max_in_flight} requests are under way for {patience:g} s")

    async def _fetch(self, flight: Flight, ask: Ask, kept: Kept | None, begun_at: float) -> None:
        is_settled = ask.method != "PATCH"
        try:
            for is_fresh in (False, True):
                sent_at = self._monotonic()
                self.sent_total += 1
                try:
                    async with self._client.stream(
                        *(ask.method, ask.target, ask.fields, ask.body),
                        stall_seconds=self._settings.stall_seconds,
                        is_fresh=is_fresh,
                    ) as reply:
                        # A refusal of the second attempt says nothing of the first, which upstream may have made.
                        if not is_settled and (is_fresh or not 400 <= reply.status < 500):
                            self._invalidate(ask.path)
                        is_settled = True
                        self._learn(ask, reply, begun_at)
                        await self._receive(flight, ask, kept, reply, sent_at)
                        break
                except ConnectFailed as error:
                    self._uncount(ask, begun_at)
                    if is_fresh:  # it promises that nothing was sent, which the first attempt makes untrue
                        raise ExchangeFailed(f"no answer to a first attempt; then {error}") from error
                    is_settled = True
                    raise
                except Unanswered:
                    if is_fresh or not self._may_repeat(ask):
                        raise
                    begun_at = self._count(ask)
            self._unshare(flight, ask)
            await flight.finish()
        finally:
            if not is_settled:  # whether upstream made the change, nobody knows
                self._invalidate(ask.path)

    def _count(self, ask: Ask) -> float:
        """Take a request from its token's budget; returns when that was."""
        now = self._monotonic()
        if ask.token is not None:
            ask.token.rate(ask.method).begin(now)
        return now

    def _uncount(self, ask: Ask, begun_at: float) -> None:
        """Give back what a request was counted that was never sent."""
        if ask.token is not None:
            ask.token.rate(ask.method).take_back(begun_at)

    def _may_repeat(self, ask: Ask) -> bool:
        """Return whether the budget has room for a request once more."""
        return ask.token is None or ask.token.rate(ask.method).spent(self._monotonic()) is None

    async def _receive(self, flight: Flight, ask: Ask, kept: Kept | None, reply: StreamedReply, sent_at: float) -> None:
        """Take an answer in, for the readers and for the store."""
        self.failures = 0
        headers = without(end_to_end(reply.headers), _LENGTH)
        may_keep = not ask.is_apart and ask.method == "GET"
        if reply.status == 304 and kept is not None:
            await reply.receive()  # its end, so that the connection can be used again
            headers = renewed_headers(kept, headers)
            answer = self._keep(ask, headers, kept.body, sent_at) if may_keep else None
            flight.is_stored = answer is not None and self._store_if_current(flight, ask, answer)
            if answer is None:
                self._forget_if_current(flight, ask)
            flight.begin(Head(200, headers, len(kept.body), 304))
            await flight.put(kept.body)
            return
        announced = reply.length or 0
        if may_keep and reply.status == 200 and announced <= self._settings.window_bytes and reply.is_delimited:
            start = self._keep(ask, headers, b"", sent_at)
            has_room = start is not None and self._store.has_room(ask.target, start, announced)
            flight.is_stored = has_room and flight.is_current  # or will be
        if may_keep and not flight.is_stored and reply.status < 500 and reply.status not in _SAYS_NOTHING:
            self._forget_if_current(flight, ask)
        flight.begin(Head(reply.status, headers, reply.length, reply.status))
        while piece := await reply.receive():
            await flight.put(piece)
        if flight.is_stored:
            body = flight.whole_body()
            answer = None if body is None else self._keep(ask, headers, body, sent_at)
            if answer is not None:
                self._store_if_current(flight, ask, answer)
            else:
                self._forget_if_current(flight, ask)

    def _keep(self, ask: Ask, headers: Fields, body: bytes, sent_at: float) -> Kept | None:
        seconds = self._settings.cache_seconds
        return keep(ask.fields, 200, headers, body, sent_at=sent_at, now=self._monotonic(), cache_seconds=seconds)

    def _store_if_current(self, flight: Flight, ask: Ask, answer: Kept) -> bool:
        return flight.is_current and self._store.put(ask.caller.partition, ask.target, ask.fields, answer)

    def _forget_if_current(self, flight: Flight, ask: Ask) -> None:
        """Forget what is kept: upstream says otherwise now, or that it may not be kept."""
        if flight.is_current:
            self._store.forget(ask.caller.partition, ask.target, ask.fields)

    def _learn(self, ask: Ask, reply: StreamedReply, begun_at: float) -> None:
        """Take what an answer says of its token."""
        if ask.token is None:
            return
        now, wall_now = self._monotonic(), self._wall()
        rate = ask.token.rate(ask.method)
        rate.learn(reply.status, reply.headers, begun_at=begun_at, now=now, wall_now=wall_now)
        ask.token.is_refused = reply.status == 401
        if reply.status in {401, 403}:
            self._forget(lambda partition, _: partition == ask.caller.partition)
        elif reply.status < 400:  # an error may be one of something before upstream, that looks at no token
            ask.token.is_taken = True

    def _unshare(self, flight: Flight, ask: Ask) -> None:
        if self._shared.get(ask.key, (None, None))[0] is flight:
            del self._shared[ask.key]

    def _invalidate(self, path: str) -> None:
        """Forget what a change of an issue may have changed."""
        changed = {resource_of(path), ISSUES_PATH}
        self.invalidated_total += 1
        self._forget(lambda _, target: resource_of(target.partition("?")[0]) in changed)

    def _forget(self, is_forgotten: Callable[[bytes, str], bool]) -> None:
        """Forget answers, kept or on their way, of which `is_forgotten` holds, given partition and target."""
        self._store.drop(is_forgotten)
        for flight, ask in self._under_way.items():
            if is_forgotten(ask.caller.partition, ask.target):
                flight.is_current = False
                self._unshare(flight, ask)
