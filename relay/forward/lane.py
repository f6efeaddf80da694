"""A lane: the pending work of one upstream key, and the budget it is done with.

Rules:
1. A lane sends when four parties agree: the schedule has something due, the budget has a slot, the breaker allows
   it, and no `Retry-After` holds the key. Each names a time; the lane sleeps until the latest of them.
2. Every attempt ends in one verdict, and every verdict in one call on the schedule. What was not settled stays
   sealed in the spool, so ending a lane at any await loses nothing.
3. Only a commit makes a delivery count. If the disk refuses it, the lane asks again; it does not send again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from math import inf
from typing import TypeVar

import structlog
import trio

from relay.config import Config
from relay.errors import SpoolDamaged, SpoolUnavailable
from relay.forward.clocks import Clocks
from relay.forward.counts import ForwardCounts
from relay.forward.exchange import Answer, Client, exchange
from relay.forward.slots import Slots
from relay.forward.statistics import LaneState, LaneStatus
from relay.protocol.backoff import Backoff
from relay.protocol.breaker import Breaker
from relay.protocol.failures import Failures
from relay.protocol.fingerprint import fingerprint
from relay.protocol.limit import make_budget
from relay.protocol.schedule import STUCK_SECONDS, Choice, Schedule
from relay.protocol.verdict import Verdict
from relay.spool.spool import Spool
from relay.spool.values import Load, PendingWindow, Quarantined, Recut, SealedBatch

T = TypeVar("T")

_DISK_RETRY_SECONDS = 1.0
"""Pause after the disk refused a step; as often as the spool itself looks whether it works again."""

_IN_TRANSIT_SECONDS = 5.0
"""How long after its beginning a send of an earlier run may have reached upstream; its end was not recorded."""

_CONFIRM_SECONDS = 10.0
"""Pause before the first probe of a refused key, at most. One refusal may be a hiccup of upstream's, and to answer
clients 401 is to lose what they send."""

_RECUTS: dict[Verdict, Recut] = {Verdict.POISON: "alone", Verdict.TOO_LARGE: "halves"}
"""How a batch is cut that upstream refuses as it is."""

_COUNTED = frozenset({Verdict.DELIVERED, Verdict.POISON, Verdict.TOO_LARGE})
"""Verdicts on what upstream has looked at, and so counted as one of the key's requests."""

_OF_KEY = frozenset({Verdict.LIMITED, Verdict.HOLD})
"""Verdicts on the key, whatever was sent."""

_SIGNS_OF_LOAD = {Verdict.DELIVERED: True, Verdict.RETRY: False, Verdict.OUTAGE: False}
"""Verdicts by whether upstream coped; a batch, key or rate that is refused says nothing of that."""

log = structlog.get_logger()


class Lane:
    """One upstream key's pending work.

    Args:
        key_id: Row of the key in the spool.
        key: The key.
        config: Sections batch, budget and forward.
        slots: Bounds the requests under way over all lanes.
        refused: Keys that upstream refuses for certain; the lane's own is put in and taken out.
    """

    def __init__(
        self,
        key_id: int,
        key: str,
        config: Config,
        spool: Spool,
        client: Client,
        clocks: Clocks,
        counts: ForwardCounts,
        slots: Slots,
        refused: set[str],
    ) -> None:
        self.key_id = key_id
        self._key = key
        self._settings = config.forward
        self._spool = spool
        self._client = client
        self._clocks = clocks
        self._counts = counts
        self._slots = slots
        self._refused = refused
        self._log = log.bind(key=fingerprint(key))
        self._limits = config.batch.limits
        self._schedule = Schedule(
            self._limits, config.batch.linger_seconds, config.forward.live_share, config.batch.merge
        )
        self._budget = make_budget(config.budget.requests_per_minute, config.budget.margin_seconds)
        self._breaker = Breaker(config.forward.breaker_failures)
        self._backoff = Backoff(config.forward.backoff_base_seconds, config.forward.backoff_max_seconds)
        self._not_before = -inf
        self._is_held = False
        self._is_misdirected = False
        self._parts: dict[int, deque[int]] = {}
        """By session: batches that a refused one was cut into and that are not sent yet, in order."""
        self._failures = Failures()
        self._in_flight = 0
        self._stuck_in_flight = 0
        """Beside these: a stuck batch is sent alone, but holds up no other."""
        self._changed = trio.Event()

    # -- what is there to do

    def wake(self) -> None:
        """Look again: something may be due earlier than it was."""
        self._changed.set()

    def add(self, window: PendingWindow) -> None:
        """Note events pending in a window."""
        self._schedule.add(
            window.session_id,
            window.window_id,
            events=window.events,
            events_bytes=window.events_bytes,
            deflated_bytes=window.deflated_bytes,
            finals=window.finals,
            oldest_at=self._clocks.from_wall(window.oldest_at),
            likeness=window.likeness,
            inner=window.parting,
        )
        self.wake()

    def forget(self, session_id: int) -> None:
        """Note that what was pending of a session is gone."""
        self._schedule.forget(session_id)

    def knows(self, window_id: int) -> bool:
        """Return whether the schedule holds the window."""
        return self._schedule.has_window(window_id)

    def restore(self, batch: SealedBatch) -> None:
        """Note a batch that an earlier run sealed and did not settle; it is sent again at once.

        A session has several of them where a refused batch was cut; they are noted in order.
        """
        if batch.session_id in self._parts:
            self._parts[batch.session_id].append(batch.batch_id)
        else:
            self._parts[batch.session_id] = deque()
            self._schedule.retry_at(batch.session_id, batch.batch_id, -inf)
        self.wake()

    def restore_attempt(self, at: float) -> None:
        """Count a send of an earlier run, by the wall clock of its beginning."""
        ended_at = self._clocks.from_wall(at) + _IN_TRANSIT_SECONDS
        self._budget.restore(min(ended_at, self._clocks.monotonic()))

    def restore_pause(self, until: float) -> None:
        """Leave upstream alone as long as it asked an earlier run for, by the wall clock."""
        pause = min(until - self._clocks.wall(), self._settings.retry_after_max_seconds)
        self._not_before = self._clocks.monotonic() + pause

    @property
    def pending_windows(self) -> int:
        """Windows held in the schedule."""
        return len(self._schedule)

    @property
    def is_idle(self) -> bool:
        """Whether the lane has nothing to do and remembers nothing that matters."""
        is_at_rest = self._schedule.is_empty and not self._in_flight and not self._stuck_in_flight
        return is_at_rest and self._budget.is_forgettable(self._clocks.monotonic())

    def status(self) -> LaneStatus:
        """Return the lane's state."""
        now = self._clocks.monotonic()
        state: LaneState = "open"
        if self._is_held:
            state = "held"
        elif self._not_before > now:
            state = "limited"
        elif self._is_misdirected:
            state = "misdirected"
        elif self._breaker.is_open:
            state = "probing"
        return LaneStatus(
            fingerprint(self._key),
            state,
            len(self._schedule),
            self._in_flight + self._stuck_in_flight,
            self._budget.used(now),
            self._budget.limit,
            self._breaker.failures,
            self._failures.stuck,
        )

    def release_key(self) -> None:
        """Take the key for good until upstream says otherwise, and ask at once."""
        self._release_key()
        self._breaker.hurry(self._clocks.monotonic())
        self.wake()

    def _release_key(self) -> None:
        self._is_held = False
        self._refused.discard(self._key)

    # -- doing it

    async def run(self, deliveries: trio.Nursery) -> None:
        """Start deliveries in a nursery of the caller's as they fall due, until cancelled."""
        while True:
            self._changed = trio.Event()
            await self._wait_until_ready()
            await self._slots.acquire()
            now = self._clocks.monotonic()
            choice = None
            if self._ready_at(now) <= now:
                choice = self._schedule.choose(
                    now,
                    is_scarce=self._budget.is_scarce(now),
                    may_be_stuck=not self._stuck_in_flight,
                )
            if choice is None or not self._begin(choice, now):
                self._slots.release()
                continue
            self._budget.begin(now)
            deliveries.start_soon(self._deliver, choice)

    def _begin(self, choice: Choice, now: float) -> bool:
        if choice.reason != "stuck":
            self._in_flight += 1
            self._breaker.begin()
        elif self._slots.exchange_for_extra():
            self._stuck_in_flight = 1
        else:
            assert choice.batch_id is not None  # noqa: S101 - what is stuck was sealed
            self._schedule.retry_at(choice.session_id, choice.batch_id, now + STUCK_SECONDS, is_stuck=True)
            return False
        return True

    def _end(self, choice: Choice) -> None:
        if choice.reason == "stuck":
            self._stuck_in_flight = 0
            self._slots.release_extra()
        else:
            self._in_flight -= 1
            self._breaker.end()
            self._slots.release()
        self.wake()

    async def _wait_until_ready(self) -> None:
        while True:
            now = self._clocks.monotonic()
            if self._waits_for_slot(now):
                self._budget.note_waiting(now)
            at = self._ready_at(now)
            if at <= now:
                await trio.lowlevel.checkpoint()
                return
            with trio.move_on_after(at - now):
                await self._changed.wait()
            self._changed = trio.Event()

    def _ready_at(self, now: float) -> float:
        """Return when the next delivery may begin (rule 1)."""
        return max(self._ready_but_for_slot_at(now), self._budget.ready_at(now))

    def _ready_but_for_slot_at(self, now: float) -> float:
        if self._budget.limit and self._in_flight >= self._settings.max_in_flight_per_key:
            return inf
        due_at = self._schedule.ready_at(now, may_be_stuck=not self._stuck_in_flight)
        return max(due_at, self._breaker.ready_at(), self._not_before)

    def _waits_for_slot(self, now: float) -> bool:
        return self._budget.ready_at(now) > now >= self._ready_but_for_slot_at(now)

    async def _deliver(self, choice: Choice) -> None:
        """Make one attempt at one batch, and settle what comes of it."""
        load: Load | None = None
        answer: Answer | None = None
        try:
            load = await self._take(choice)
            if load is not None:
                was_held, began_at = self._is_held, self._clocks.monotonic()
                answer = await self._send(load, began_at)
                self._learn(answer.verdict, began_at)
                await self._conclude(load.batch, answer, was_held=was_held)
        except SpoolDamaged as error:
            # The session stays busy: what cannot be read, or settled, is kept as it is for `spool salvage`.
            self._log.error("a session is set aside", session=choice.session_id, problem=str(error))
            self._counts.sessions_set_aside += 1
        except Exception as error:  # noqa: BLE001 - one session's trouble must not end the lane
            self._log.exception("delivery failed by an error of the relay", session=choice.session_id)
            self._counts.attempt_errors += 1
            if load is not None and answer is None:
                self._retry(load.batch, Answer(Verdict.RETRY, f"{type(error).__name__} in the relay"), was_held=False)
            # Else the session stays busy: it is not known what of it is done, which only a restart reads from the disk.
        finally:
            if load is None:
                self._budget.abandon()
            else:
                self._budget.end(self._clocks.monotonic())
            self._end(choice)

    async def _take(self, choice: Choice) -> Load | None:
        """Seal what was chosen, or load what was sealed; None where there is nothing to send after all."""
        try:
            if choice.batch_id is not None:
                load = await self._spool.load(choice.batch_id)
                if load is None:
                    self._go_on(choice.session_id, choice.batch_id)
                return load
            assert choice.window_id is not None  # noqa: S101 - a Choice has one or the other
            announce = partial(self._note_sealed, choice, choice.window_id)
            sealed = await self._spool.seal(choice.window_id, announce, merges_pages=choice.merges_pages)
            if not isinstance(sealed, Quarantined):
                return sealed
            self._schedule.release(choice.session_id)
            return None
        except SpoolDamaged:
            raise
        except SpoolUnavailable:
            self._not_before = max(self._not_before, self._clocks.monotonic() + _DISK_RETRY_SECONDS)
            if choice.batch_id is not None:
                is_stuck = self._failures.is_stuck(choice.batch_id)
                self._schedule.retry_at(choice.session_id, choice.batch_id, self._not_before, is_stuck=is_stuck)
            else:
                self._schedule.release(choice.session_id)
            return None

    def _note_sealed(self, choice: Choice, window_id: int, load: Load | Quarantined | None) -> None:
        """Bring the schedule to where the spool is; called between what was accepted before the cut and after it."""
        if load is None:
            self._schedule.withhold(choice.session_id, window_id)
            return
        gone = load.batch if isinstance(load, Load) else load
        left_at = None if load.next_oldest_at is None else self._clocks.from_wall(load.next_oldest_at)
        self._schedule.seal(
            window_id,
            events=gone.event_count,
            events_bytes=gone.events_bytes,
            deflated_bytes=gone.deflated_bytes,
            finals=gone.finals,
            next_oldest_at=left_at,
            next_parting=load.next_parting,
        )
        if isinstance(load, Load):
            self._counts.note_sealed(
                choice.reason,
                waited_seconds=self._clocks.wall() - load.batch.oldest_at,
                fullness=self._limits.fullness(gone.event_count, gone.events_bytes, gone.deflated_bytes),
            )

    async def _send(self, load: Load, began_at: float) -> Answer:
        self._counts.bytes_sent += len(load.body)
        began_in = self._slots.begin()
        verdict = Verdict.RETRY
        try:
            answer = await exchange(self._client, self._key, load.body)
            verdict = answer.verdict
        finally:
            is_ok = None if self._failures.is_stuck(load.batch.batch_id) else _SIGNS_OF_LOAD.get(verdict)
            self._slots.end(began_in, self._clocks.monotonic() - began_at, is_ok=is_ok)
        self._counts.verdicts[verdict] += 1
        return answer

    async def _conclude(self, batch: SealedBatch, answer: Answer, *, was_held: bool) -> None:
        """Do what the verdict asks for."""
        if answer.verdict in _COUNTED:
            self._failures.note_taken()
            self._note_success()
        if answer.verdict in _RECUTS:
            await self._refuse(batch, _RECUTS[answer.verdict], answer)
        elif answer.verdict is Verdict.DELIVERED:
            delivered_at = self._clocks.wall()
            await self._record(lambda: self._spool.settle(batch.batch_id))
            self._counts.note_delivered(batch, delivered_at)
            self._go_on(batch.session_id, batch.batch_id)
        else:
            self._retry(batch, answer, was_held=was_held)
            if answer.verdict is Verdict.LIMITED:
                until = self._clocks.wall() + self._not_before - self._clocks.monotonic()
                with suppress(SpoolUnavailable):  # then a restart may ask too soon
                    await self._spool.pause_key(self.key_id, until)

    def _learn(self, verdict: Verdict, began_at: float) -> None:
        """Let the budget know what an answer says of the key's limit; that upstream is in trouble says nothing."""
        if verdict is Verdict.LIMITED:
            self._budget.note_refused(began_at, self._clocks.monotonic())
        elif verdict in _COUNTED:
            self._budget.note_taken(began_at)

    async def _refuse(self, batch: SealedBatch, cut: Recut, answer: Answer) -> None:
        """Go on with the parts of a batch that upstream refuses as it is, or without it."""
        refused = await self._record(lambda: self._spool.refuse(batch.batch_id, cut, answer.status, answer.text))
        if refused.parts:
            self._counts.batches_recut += 1
            self._log.warning("upstream refuses a batch, it is cut", parts=len(refused.parts), reply=answer.problem)
        else:
            self._counts.batches_dead_lettered += 1
            self._log.error(
                "upstream refuses events, they are dead letters", events=batch.event_count, reply=answer.problem
            )
        self._parts.setdefault(batch.session_id, deque()).extendleft(reversed(refused.parts))
        self._go_on(batch.session_id, batch.batch_id)

    def _go_on(self, session_id: int, batch_id: int) -> None:
        """Let the session of a settled batch go on: with the next part of a refused one, if there is any."""
        self._failures.forget(batch_id)
        parts = self._parts.get(session_id)
        if parts:
            self._schedule.queue_part(session_id, parts.popleft())
        else:
            self._parts.pop(session_id, None)
            self._schedule.release(session_id)

    def _retry(self, batch: SealedBatch, answer: Answer, *, was_held: bool) -> None:
        """Send the batch again, later."""
        now = self._clocks.monotonic()
        verdict, problem = answer.verdict, answer.problem
        failures = self._failures.note_failure(batch.batch_id, is_of_key=verdict in _OF_KEY)
        is_stuck = self._failures.is_stuck(batch.batch_id)
        delay = self._backoff.delay_seconds(failures, self._clocks.uniform)
        self._is_misdirected = verdict is Verdict.OUTAGE and not is_stuck
        if verdict is Verdict.LIMITED:
            self._note_success()
            asked = answer.asked_pause(self._clocks.wall(), self._settings.retry_after_max_seconds)
            # At least the backoff for the batch itself: `Retry-After: 0` must not become a tight loop.
            self._not_before = max(self._not_before, now + (delay if asked is None else asked))
            delay = max(delay, asked or 0.0)
            self._log.warning("upstream limits the key", seconds=round(self._not_before - now, 1))
        elif verdict is Verdict.HOLD:
            self._hold(now, problem, was_held=was_held)
            delay = 0.0  # the breaker says when the next probe goes
        elif is_stuck:
            self._log.error("upstream takes other batches and fails this one", reply=problem, session=batch.session_id)
        else:
            # In its own measure: one batch that fails for long must not make the lane wait for as long.
            self._breaker.fail(now, self._backoff.delay_seconds(self._breaker.failures + 1, self._clocks.uniform))
            if verdict is Verdict.OUTAGE:
                self._log.error("upstream is not the ingest API; check upstream.ingest_url", reply=problem)
            else:
                self._log.warning("attempt failed", problem=problem, failures=self._breaker.failures)
        self._schedule.retry_at(batch.session_id, batch.batch_id, now + delay, is_stuck=is_stuck)

    def _hold(self, now: float, problem: str, *, was_held: bool) -> None:
        """Hold the key. It is known to be bad once a probe that began after the first refusal is refused too."""
        self._is_held = True
        if was_held:
            self._refused.add(self._key)
        is_certain = self._key in self._refused
        pause = self._settings.hold_seconds if is_certain else min(self._settings.hold_seconds, _CONFIRM_SECONDS)
        self._breaker.trip(now, pause)
        self._log.error("upstream refuses the key, its batches wait", reply=problem, certain=is_certain, seconds=pause)

    def _note_success(self) -> None:
        if self._breaker.is_open:
            self._log.warning("upstream answers again", failures=self._breaker.failures)
        self._breaker.succeed()
        self._is_misdirected = False
        self._release_key()

    async def _record(self, step: Callable[[], Awaitable[T]]) -> T:
        """Make an outcome durable, however long the disk refuses (rule 3)."""
        while True:
            try:
                return await step()
            except SpoolDamaged:
                raise
            except SpoolUnavailable:
                await trio.sleep(_DISK_RETRY_SECONDS)
