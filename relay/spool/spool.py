"""The spool as trio sees it: group commit, capacity, and the account.

Rules:
1. One writer: steps run in order of submission, in groups that share a commit. The next group gathers while one is
   being committed, so the slower the disk, the larger the groups.
2. A step's waiter resumes only after its commit (law 1). Cancelling the waiter does not cancel the step.
3. What was accepted (`on_appended`) and what steps ask to have announced is announced in order of commit, before any
   waiter resumes. So who counts along never counts twice, or not at all, what is accepted while a step is under way.
4. What only reads (`account`, `read_stored`) has a connection of its own, one reading at a time, and never delays the
   writer.
5. Being cancelled from outside does not stop the writer before `close` has: what was submitted is committed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import apsw
import structlog
import trio

from relay.config import Spool as SpoolSettings
from relay.errors import SpoolDamaged, SpoolUnavailable
from relay.protocol.cut import Limits
from relay.protocol.reuse import Stored
from relay.spool import schema
from relay.spool.account import read_account
from relay.spool.capacity import Capacity, open_database
from relay.spool.dead_letters import LETTERS_A_STEP, letter_ids
from relay.spool.forgetting import ATTEMPT_SECONDS, Forgetting
from relay.spool.marks import read_events
from relay.spool.overflow import oldest_sessions
from relay.spool.quarantine import Unreadable
from relay.spool.reserve import Reserve
from relay.spool.shedding import Shedding
from relay.spool.store import Store
from relay.spool.threads import Run as Run
from relay.spool.threads import run_in_thread as run_in_thread
from relay.spool.transactions import Step, read
from relay.spool.values import (
    Account,
    Appended,
    Load,
    Moved,
    NewBatch,
    Paused,
    PendingWindow,
    Quarantined,
    Recent,
    Recut,
    Refused,
    SealedBatch,
    Shed,
    SpoolStatistics,
)

T = TypeVar("T")

_MAX_GROUP_STEPS = 256
"""Steps of one commit: at 25 µs each a commit's own cost is long shared, and nobody waits for much longer."""

_MAX_GROUP_BYTES = 8_388_608
"""Segment bytes of one commit, so that a few huge batches do not make small ones wait for all of them."""

_PRUNE_SECONDS = 1.0
"""Interval of housekeeping."""

_CLOSE_SECONDS = 10.0
"""Time for the last commits; a disk that takes longer is not waited for, since nobody was answered for them."""

log = structlog.get_logger()


class _Group:
    """Steps that share a commit."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.announce: list[Callable[[Any], None] | None] = []
        """What is to be told a step's result, if it has one."""
        self.size = 0
        self.results: list[Any] = []
        self.taken = trio.Event()
        self.committed = trio.Event()


class Spool:
    """The disk. Use `open_spool`.

    Concurrency: trio's thread only.
    """

    def __init__(
        self,
        store: Store,
        reader: apsw.Connection,
        settings: SpoolSettings,
        run: Run,
        now: Callable[[], float],
        reserve: Reserve,
    ) -> None:
        self._store = store
        self._reader = reader
        self._settings = settings
        self._run = run
        self._now = now
        self._groups = deque([_Group()])
        """In order: the one that is being committed, if any, and the one that gathers steps."""
        self._work = trio.Event()
        self._reading = trio.Lock()
        self._writing = trio.Lock()
        self._closing = False
        self._capacity = Capacity(store, settings, reserve)
        self._shedding = Shedding(lambda: self._capacity.is_tight, self._oldest_sessions, self._shed)
        self._damage = ""
        self._segments_quarantined = 0
        self._commits = self._steps = self._failed_commits = 0
        self._forgetting = Forgetting(store.retention, settings, now, self._step)
        self.append_damage = ""
        """What kept the last batch from being stored where that was damage; no reason to refuse others."""
        self.on_appended: Callable[[Appended, NewBatch], None] = lambda _appended, _batch: None
        """Called for every stored batch, in order of commit."""
        self.on_pending: Callable[[Sequence[PendingWindow]], None] = lambda _windows: None
        """Called for what is pending again, in order of commit."""
        self.on_shed: Callable[[Shed], None] = lambda _shed: None
        """Called for every session that is dropped for want of room, in order of commit."""

    # -- what may come in

    @property
    def refusal(self) -> str:
        """Why new batches are refused now, for people; empty while they are accepted."""
        return self._capacity.refusal

    async def append(self, batch: NewBatch) -> Appended:
        """Store a client batch.

        Returns:
            What became of it. Where it `differs`, it is to be compared (`read_stored`), and appended with what is
            `known` of it; that may be answered `differs` again, where the sequence was used once more meanwhile.

        Durability: on return with `stored` or `repeated`, the batch is on disk as `spool.durability` says.

        Raises:
            SpoolDamaged: It would go where the database is damaged; others may still be stored.
            SpoolUnavailable: The disk refused it, or has no room. Nothing is stored, or at least not for long, where
                the directory was removed meanwhile; the client may come again.

        Cancellation: the batch may be stored all the same.
        """
        try:
            appended: Appended | None = await self._submit(
                partial(self._append, batch),
                sum(len(segment.deflated) for segment in batch.segments),
                partial(self._announce_appended, batch),
            )
        except SpoolDamaged as error:
            self.append_damage = str(error)
            raise
        self.append_damage = ""
        if appended is None or self._capacity.disk.is_gone:
            raise SpoolUnavailable(self.refusal)
        return appended

    def _append(self, batch: NewBatch) -> Appended | None:
        """Store a batch; None where there is room only for draining (runs in the writer's thread)."""
        return self._store.append(batch) if self._capacity.has_reserve else None

    def _announce_appended(self, batch: NewBatch, appended: Appended | None) -> None:
        if appended is None:
            return
        if appended.outcome == "stored":
            self.on_appended(appended, batch)
        elif isinstance(appended.final, PendingWindow):
            self.on_pending((appended.final,))

    async def read_stored(self, work: Callable[[Stored], T]) -> T:
        """Run `work` in the reader's thread, with what reads the events of stored batches; one such at a time.

        It is not the writer's, so however much there is to compare, no commit waits for it.
        """
        return await self._read(lambda: work(partial(read_events, self._reader)))

    # -- what goes out

    async def seal(
        self, window_id: int, announce: Callable[[Load | Quarantined | None], None], *, merges_pages: bool = False
    ) -> Load | Quarantined | None:
        """Cut the window's next upstream batch durably and return it; None where nothing may be sent now.

        Where damage was met, that was set aside and there may be more to seal. `announce` hears the same in order of
        commit (rule 3). With `merges_pages` a changed page does not end the batch.
        """
        try:
            return await self._step(
                lambda: self._store.seal(window_id, self._now(), merges_pages=merges_pages), announce
            )
        except Unreadable as found:
            return await self._set_aside(found, announce)

    async def load(self, batch_id: int) -> Load | None:
        """Return a sealed batch for another attempt, without what of it is damaged; None where all of it is."""
        while True:
            try:
                return await self._step(lambda: self._store.load(batch_id, self._now()))
            except Unreadable as found:
                if not (await self._set_aside(found)).has_batch:
                    return None

    async def _set_aside(self, found: Unreadable, announce: Callable[[Quarantined], None] | None = None) -> Quarantined:
        """Make dead letters of damaged segments, and say so."""
        quarantined = await self._step(lambda: self._store.quarantine.take(found, self._now()), announce)
        self._segments_quarantined += quarantined.segments
        log.error(
            "damaged segments set aside",
            segments=quarantined.segments,
            events=quarantined.event_count,
            reason=found.reason,
        )
        max_bytes = self._settings.dead_letter_max_bytes
        with suppress(SpoolUnavailable):  # it is done by now, and the next letter makes room for this one too
            self._tell_shed(await self._step(lambda: self._store.dead_letters.shed(max_bytes)))
        return quarantined

    async def settle(self, batch_id: int) -> None:
        """Record that upstream has a batch, and free its space."""
        try:
            await self._step(lambda: self._store.settle(batch_id))
        except SpoolDamaged:
            await self._step(lambda: self._store.settle(batch_id, keeps_bodies=True))

    async def refuse(self, batch_id: int, cut: Recut, status: int, answer: str) -> Refused:
        """Cut a batch that upstream refuses into smaller ones, or make a dead letter of it: `Store.refuse`."""
        refuse: Callable[[float], Refused] = partial(self._store.refuse, batch_id, cut, status, answer, self._now())
        try:
            refused = await self._step(partial(refuse, self._settings.dead_letter_max_bytes))
        except SpoolDamaged:  # perhaps of the oldest dead letter, which then cannot make room
            refused = await self._step(partial(refuse, inf))
        self._tell_shed(refused.shed)
        return refused

    def _tell_shed(self, shed: Moved) -> None:
        if shed.letters:
            log.error(
                "dead letters dropped, there is no room for them",
                events=shed.events,
                max_bytes=self._settings.dead_letter_max_bytes,
            )

    async def resend_dead_letters(self, ids: Sequence[int] | None) -> Moved:
        """Make dead letters pending again, all of them without `ids`."""
        return await self._move(ids, self._store.dead_letters.resend)

    async def purge_dead_letters(self, ids: Sequence[int] | None) -> Moved:
        """Drop dead letters, all of them without `ids`."""
        return await self._move(ids, self._store.dead_letters.purge)

    async def _move(self, ids: Sequence[int] | None, step: Callable[[Sequence[int]], Moved]) -> Moved:
        """Run a step over dead letters, so many a commit that no client waits for long."""
        every = await self._read(lambda: letter_ids(self._reader)) if ids is None else ids
        letters = events = 0
        for first in range(0, len(every), LETTERS_A_STEP):
            some = every[first : first + LETTERS_A_STEP]
            moved = await self._step(partial(step, some), self._announce_pending)
            letters, events = letters + moved.letters, events + moved.events
        return Moved(letters, events)

    def _announce_pending(self, moved: Moved) -> None:
        if moved.pending:
            self.on_pending(moved.pending)

    async def key(self, key_id: int) -> str:
        """Return a key's secret."""
        return await self._step(lambda: self._store.key(key_id))

    async def read_pending(self, after: int, max_windows: int, announce: Callable[[list[PendingWindow]], None]) -> None:
        """Tell `announce`, in order of commit (rule 3), windows with unsealed segments, as `Leftovers` has them."""
        await self._step(lambda: self._store.leftovers.pending_windows(after, max_windows), announce)

    async def sealed_batches(self) -> list[SealedBatch]:
        """Return what was sealed and not settled."""
        return await self._step(self._store.leftovers.sealed_batches)

    async def recent_attempts(self) -> list[Recent]:
        """Return the sends that still count against a budget."""
        return await self._step(lambda: self._store.retention.recent_attempts(self._now() - ATTEMPT_SECONDS))

    async def pause_key(self, key_id: int, until: float) -> None:
        """Remember, for a restart, that upstream wants nothing of a key before `until` (wall clock)."""
        await self._step(lambda: self._store.retention.pause_key(key_id, until))

    async def paused_keys(self) -> list[Paused]:
        """Return the keys of which upstream wants nothing yet."""
        return await self._step(lambda: self._store.retention.paused_keys(self._now()))

    # -- the account

    async def account(self) -> Account:
        """Return the conservation account of one instant, read from the disk."""
        return await self._read(lambda: read_account(self._reader, self._now()))

    async def _read(self, call: Callable[[], T]) -> T:
        async with self._reading:
            try:
                result: T = await self._run(partial(read, call))
            except SpoolDamaged as error:
                self._note_damage(error)
                raise
        return result

    def statistics(self) -> SpoolStatistics:
        """Return counters and the state of the disk."""
        return SpoolStatistics(
            commits=self._commits,
            steps=self._steps,
            failed_commits=self._failed_commits,
            used_bytes=self._capacity.disk.used_bytes,
            free_bytes=self._capacity.disk.free_bytes,
            marks_forgotten=self._forgetting.marks_forgotten,
            segments_quarantined=self._segments_quarantined,
            damage=self._damage,
            refusal=self.refusal,
        )

    # -- group commit

    async def _step(self, step: Callable[[], T], announce: Callable[[T], None] | None = None) -> T:
        result: T = await self._submit(step, 0, announce)
        return result

    async def _submit(self, step: Step, size: int, announce: Callable[[Any], None] | None) -> Any:
        if self._closing:
            raise SpoolUnavailable("the spool is closed")
        group = self._groups[-1]
        while len(group.steps) >= _MAX_GROUP_STEPS or (group.steps and group.size + size > _MAX_GROUP_BYTES):
            await group.taken.wait()
            group = self._groups[-1]
        position = len(group.steps)
        group.steps.append(step)
        group.announce.append(announce)
        group.size += size
        self._work.set()
        await group.committed.wait()
        result = group.results[position]
        if isinstance(result, Exception):
            raise result
        return result

    async def commit_groups(self) -> None:
        """Commit group after group, until cancelled; `close` commits the rest."""
        while True:
            await self._work.wait()
            await self._commit_next()

    async def _commit_next(self) -> None:
        """Commit the first group. Cancelled before it is run, it stays the first."""
        async with self._writing:
            group = self._groups[0]
            if len(self._groups) == 1:
                self._groups.append(_Group())
                self._work = trio.Event()
                group.taken.set()
            try:
                group.results, disk = await self._run(partial(self._capacity.commit, group.steps))
            except SpoolUnavailable as error:
                group.results = [error] * len(group.steps)
                self._failed_commits += 1
                self._capacity.note_failure(str(error))
            else:
                self._commits += 1
                self._steps += len(group.steps)
                self._capacity.note_commit(disk)
                self._shedding.note_commit()
            self._groups.popleft()
            shrink_damage, self._store.shrink_damage = self._store.shrink_damage, None
            for result in (*group.results, shrink_damage):
                if isinstance(result, SpoolDamaged):
                    self._note_damage(result)
            for announce, result in zip(group.announce, group.results, strict=True):
                if announce is not None and not isinstance(result, Exception):
                    announce(result)
            group.committed.set()

    def _note_damage(self, error: SpoolDamaged) -> None:
        """Say it once; what comes of it is said where the step was asked for."""
        if not self._damage:
            log.error("spool is damaged: run lucent-relay spool verify", problem=str(error))
        self._damage = str(error)

    async def keep_house(self) -> None:
        """Forget old marks and attempts, and notice when a disk works again, until cancelled."""
        chores = (self._try_disk, self._forgetting.forget_attempts, self._forgetting.forget_marks)
        while True:
            await trio.sleep(_PRUNE_SECONDS)
            for chore in chores:
                try:
                    await chore()
                except SpoolDamaged:
                    continue  # said once (`_note_damage`); the others may need no damaged page
                except SpoolUnavailable:
                    break  # logged where the commit failed

    async def _try_disk(self) -> None:
        if self._capacity.failure:
            await self._step(self._store.try_disk)

    async def shed_sessions(self) -> None:
        """Drop whole sessions whenever there is no room and the operator wants that, until cancelled."""
        await self._shedding.run()

    async def _oldest_sessions(self, count: int) -> list[int]:
        return await self._read(partial(oldest_sessions, self._reader, count))

    async def _shed(self, session_id: int) -> Shed | None:
        return await self._step(partial(self._store.overflow.shed, session_id), self._announce_shed)

    def _announce_shed(self, shed: Shed | None) -> None:
        if shed is not None:
            self.on_shed(shed)

    async def close(self) -> None:
        """Commit what was submitted, as far as `_CLOSE_SECONDS` allow; whoever still waits is told that it was not."""
        self._closing = True
        with trio.move_on_after(_CLOSE_SECONDS, shield=True):
            while self._groups[0].steps:
                await self._commit_next()
        for group in self._groups:
            group.results = [SpoolUnavailable("the spool is closed")] * len(group.steps)
            group.committed.set()


@asynccontextmanager
async def open_spool(
    settings: SpoolSettings,
    limits: Limits,
    max_keys: int,
    *,
    now: Callable[[], float],
    run: Run | None = None,
    vfs: str | None = None,
) -> AsyncIterator[Spool]:
    """Open the spool, with everything that an earlier run left in it.

    Args:
        settings: Directory, caps, durability.
        limits: Of an upstream batch.
        max_keys: Distinct keys kept at a time.
        now: The wall clock.
        run: Runs blocking calls; threads of the spool's own by default, inline for tests on virtual time.
        vfs: A SQLite VFS, for tests of failing disks.

    Raises:
        SpoolLocked: Another relay has the directory.
        SpoolSchemaMismatch: Another version wrote it.
        SpoolUnavailable: It cannot be read or written.
    """
    directory = Path(settings.directory)
    lock = schema.lock_directory(directory)
    try:
        path = directory / schema.DATABASE_NAME
        reserve = Reserve(directory, settings.reserve_bytes)
        connection = open_database(path, settings, vfs, reserve)
        store = Store(connection, limits, max_keys)
        try:
            reader = schema.open_reader(path, vfs)
            try:
                async with trio.open_nursery() as nursery:
                    spool = Spool(store, reader, settings, run or run_in_thread, now, reserve)
                    nursery.start_soon(spool.commit_groups)
                    nursery.start_soon(spool.keep_house)
                    nursery.start_soon(spool.shed_sessions)
                    try:
                        yield spool
                    finally:
                        await spool.close()
                        nursery.cancel_scope.cancel()
            finally:
                reader.close()
        finally:
            store.close()
    finally:
        os.close(lock)
