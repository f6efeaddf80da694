"""The forwarder: all lanes, what they share, and the bound on what they hold in memory.

Rules:
1. The schedules hold about `forward.max_windows` windows; beyond them a key has its share all the same, so the total
   is twice that at most. What is pending beyond stays on disk, and is read page by page, round after round, as room
   is made. So memory does not grow with the backlog, and no key waits for another's.
2. Stopping lets the deliveries in flight end, not the backlog. The caller bounds the wait.
3. A lane that has been idle for longer than any budget remembers is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count

import structlog
import trio

from relay.config import Config
from relay.errors import SpoolDamaged, SpoolUnavailable
from relay.forward.clocks import Clocks
from relay.forward.counts import ForwardCounts
from relay.forward.exchange import Client
from relay.forward.lane import Lane
from relay.forward.slots import Slots
from relay.forward.statistics import ForwardStatistics
from relay.protocol.cut import Parting
from relay.spool.spool import Spool
from relay.spool.values import Appended, NewBatch, PendingWindow, Shed

_PAGE_WINDOWS = 1_000
"""Windows read from disk at a time: 5 ms of the writer's at 30 segments each, in which no batch is acknowledged."""

_MAX_PAGES = 20
"""Of these read in a row that have nothing to take: 1% of the writer's time, and a million windows in ten minutes."""

_KEEP_SECONDS = 10.0
"""Interval of looking for idle lanes and for windows that wait on disk."""

log = structlog.get_logger()


class Forwarder:
    """Sends what the spool holds.

    Args:
        config: Sections batch, budget and forward.
        spool: Announces what is accepted; its `on_appended` is taken over.
        client: Sends requests to the ingest API.
        clocks: Time and chance.
    """

    def __init__(self, config: Config, spool: Spool, client: Client, clocks: Clocks) -> None:
        self._config = config
        self._spool = spool
        self._client = client
        self._clocks = clocks
        self._counts = ForwardCounts()
        self._slots = Slots(config.forward.max_in_flight, is_adaptive=config.budget.requests_per_minute == 0)
        self._lanes: dict[int, Lane] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._refused: set[str] = set()
        self._has_more = False
        self._skipped = False
        """Whether this round of reading has left windows on disk."""
        self._read_after = 0
        """Row of the window at which reading goes on."""
        self._has_taken = False
        """Whether the last page that was read had a window to take."""
        self._stopping = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read what an earlier run left, then deliver until `stop` and until what is in flight has ended.

        Started once the spool's content is known: from then on nothing that is accepted is missed.

        Cancellation: ends at once; what was in flight stays sealed and is sent again by the next run.
        """
        async with trio.open_nursery() as deliveries, trio.open_nursery() as lanes:
            self._start_lane = partial(self._add_lane, lanes, deliveries)
            self._spool.on_appended = self._note_appended
            self._spool.on_pending = self._note_added
            self._spool.on_shed = self._note_shed
            try:
                await self._restore()
                task_status.started()
                lanes.start_soon(self._keep_house)
                await self._stopping.wait()
                lanes.cancel_scope.cancel()
            finally:
                self._stopping.set()  # what is announced from here on is for the next run

    def stop(self) -> None:
        """Begin no further delivery."""
        self._stopping.set()

    def is_refused(self, key: str) -> bool:
        """Return whether upstream is known to refuse a key."""
        return key in self._refused

    def release_key(self, name: str) -> bool:
        """Try a held key at once, and let its clients in; returns whether there is one of that fingerprint."""
        lanes = [lane for lane in self._lanes.values() if lane.status().key == name and lane.status().state == "held"]
        for lane in lanes:
            lane.release_key()
        return bool(lanes)

    def statistics(self) -> ForwardStatistics:
        """Return counters and the state of the lanes."""
        counts = self._counts
        lanes = [lane.status() for lane in self._lanes.values()]
        return ForwardStatistics(
            attempts_by_verdict={verdict.value: count for verdict, count in counts.verdicts.items()},
            batches_by_reason=dict(counts.sealed_by_reason),
            wait_seconds=counts.wait_seconds.copy(),
            fullness_ratio=counts.fullness_ratio.copy(),
            delivery_seconds=counts.delivery_seconds.copy(),
            batches_delivered=counts.batches_delivered,
            events_delivered=counts.events_delivered,
            segments_delivered=counts.segments_delivered,
            batches_of_several_pages=counts.batches_of_several_pages,
            batches_recut=counts.batches_recut,
            batches_dead_lettered=counts.batches_dead_lettered,
            bytes_sent=counts.bytes_sent,
            sessions_set_aside=counts.sessions_set_aside,
            attempt_errors=counts.attempt_errors,
            in_flight=sum(lane.in_flight for lane in lanes),
            in_flight_limit=self._slots.limit,
            pending_windows=self._pending_windows(),
            has_more_on_disk=self._has_more,
            lanes=lanes,
        )

    def _pending_windows(self) -> int:
        return sum(lane.pending_windows for lane in self._lanes.values())

    async def _restore(self) -> None:
        """Take up what an earlier run left, as far as the disk has it still."""
        for read in (self._restore_attempts, self._restore_pauses, self._restore_batches, self._read_pending):
            try:
                await read()
            except SpoolDamaged as error:
                log.error("what an earlier run left cannot all be read", problem=str(error))  # noqa: TRY400

    async def _restore_attempts(self) -> None:
        for attempt in await self._spool.recent_attempts():
            (await self._lane(attempt.key_id)).restore_attempt(attempt.at)

    async def _restore_pauses(self) -> None:
        for paused in await self._spool.paused_keys():
            (await self._lane(paused.key_id)).restore_pause(paused.until)

    async def _restore_batches(self) -> None:
        for batch in await self._spool.sealed_batches():
            (await self._lane(batch.key_id)).restore(batch)

    async def _read_pending(self) -> None:
        """Take windows from the disk into the schedules (rule 1): a page, and more while there is much room.

        Pages of nothing but what lanes have no room for are passed over, so that those behind them do not wait.
        """
        for pages in count(1):
            await self._spool.read_pending(self._read_after, _PAGE_WINDOWS, self._note_pending)
            has_much_room = self._pending_windows() < self._config.forward.max_windows // 2
            if not self._read_after or not (has_much_room or (not self._has_taken and pages < _MAX_PAGES)):
                break

    def _note_pending(self, windows: list[PendingWindow]) -> None:
        self._has_taken = False
        if self._stopping.is_set():
            return
        for window in windows:
            lane = self._lanes.get(window.key_id) or self._start_lane(window.key_id, window.key)
            if lane.knows(window.window_id):
                continue
            if self._has_room(lane):
                lane.add(window)
                self._has_taken = True
            else:
                self._skipped = True
        if len(windows) == _PAGE_WINDOWS:
            self._read_after, self._has_more = windows[-1].window_id, True
        else:  # the end of the disk: what was skipped on the way is looked at in the next round
            self._read_after, self._has_more, self._skipped = 0, self._skipped, False

    async def _lane(self, key_id: int) -> Lane:
        lane = self._lanes.get(key_id)
        return lane or self._start_lane(key_id, await self._spool.key(key_id))

    def _note_appended(self, appended: Appended, batch: NewBatch) -> None:
        self._note_added(
            (
                PendingWindow(
                    appended.key_id,
                    appended.key,
                    appended.session_id,
                    appended.window_id,
                    batch.event_count,
                    sum(segment.events_bytes for segment in batch.segments),
                    sum(len(segment.deflated) for segment in batch.segments),
                    batch.accepted_at,
                    int(batch.is_final),
                    appended.likeness,
                    Parting.NOTHING,
                ),
            )
        )

    def _note_added(self, windows: Sequence[PendingWindow]) -> None:
        """Take what was added to windows, accepted or sent again by an operator, into the schedules (rule 1)."""
        if self._stopping.is_set():
            return
        for window in windows:
            lane = self._lanes.get(window.key_id) or self._start_lane(window.key_id, window.key)
            if lane.knows(window.window_id) or self._has_room(lane):
                lane.add(window)
            else:
                self._has_more = self._skipped = True

    def _note_shed(self, shed: Shed) -> None:
        lane = self._lanes.get(shed.key_id)
        if lane is not None:
            lane.forget(shed.session_id)

    def _has_room(self, lane: Lane) -> bool:
        """Return whether a lane may hold another window: while there is room for all, or up to its own share."""
        max_windows = self._config.forward.max_windows
        # Its own share first, which nearly all are within: the sum over a thousand lanes costs what a commit does.
        return lane.pending_windows < max_windows // len(self._lanes) or self._pending_windows() < max_windows

    def _add_lane(self, lanes: trio.Nursery, deliveries: trio.Nursery, key_id: int, key: str) -> Lane:
        lane = Lane(
            key_id, key, self._config, self._spool, self._client, self._clocks, self._counts, self._slots, self._refused
        )
        self._lanes[key_id] = lane
        self._scopes[key_id] = trio.CancelScope()
        lanes.start_soon(self._run_lane, lane, deliveries)
        return lane

    async def _run_lane(self, lane: Lane, deliveries: trio.Nursery) -> None:
        with self._scopes[lane.key_id]:
            await lane.run(deliveries)

    async def _keep_house(self) -> None:
        while True:
            await trio.sleep(_KEEP_SECONDS)
            if self._has_more:
                try:
                    await self._read_pending()
                except SpoolUnavailable as error:  # there is a next time
                    log.warning("pending windows cannot be read", problem=str(error))
            for key_id in [key_id for key_id, lane in self._lanes.items() if lane.is_idle]:
                self._scopes.pop(key_id).cancel()
                # Of a held key nothing may be left to probe it with, if that was damaged; no client would be let in.
                self._lanes.pop(key_id).release_key()
