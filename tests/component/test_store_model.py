"""The store on a real database against a model that fits on a page, through any order of actions and crashes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.protocol.cut import Limits
from relay.protocol.reuse import Known as Reused
from relay.spool import schema
from relay.spool.account import read_account
from relay.spool.store import Store
from relay.spool.values import Appended, Load, NewBatch, Recut, Refused
from tests.accounting import assert_accounted
from tests.component.batches import make_batch, make_body, make_event, read_upstream
from tests.component.model import LIMITS, OTHER_LIMITS, Crash, Known, Mark, Place, Sent, assert_within
from tests.component.orphans import HOLDER, ORPHANS

SLACK_BYTES = 64
"""What numbers of the envelope (lastActivityAt, the address) may take more in another cut."""


class StoreMachine(RuleBasedStateMachine):
    """Actions on the store; the model is `pending`, `sealed`, `dead`, `marks` and the counts.

    The tests of power cuts play it too, by seed, on a disk that they record.
    """

    durability: Literal["fsync", "os"] = "os"
    vfs: str | None = None
    home: str | None = None  # where the system has temporary files

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.TemporaryDirectory(dir=self.home)
        self.generation = 0
        self.now = 1_000.0
        self.names = 0
        self.accepted = self.delivered = self.purged = self.shed = 0
        self.pending: dict[Place, dict[int, Known]] = {}
        self.sealed: dict[int, Sent] = {}
        self.dead: dict[int, Sent] = {}
        self.refusals: dict[tuple[str, str], int] = {}
        self.upstream: dict[tuple[str, str], set[int]] = {}
        self.marks: dict[tuple[str, str], list[Mark]] = {}
        self.shifts: dict[Place, int] = {}
        self.rows: dict[Place, tuple[int, int, int]] = {}
        self.rows_ever: dict[tuple[int, int], Place] = {}

    @initialize()
    def start(self) -> None:
        """Begin with an empty database."""
        (self.directory / schema.DATABASE_NAME).parent.mkdir()
        self.open(LIMITS)

    @property
    def directory(self) -> Path:
        """Where the database lies since the last crash."""
        return Path(self.root.name) / str(self.generation)

    def open(self, limits: Limits = LIMITS) -> None:
        """Open what the disk holds, as a start does."""
        self.limits = limits
        path = self.directory / schema.DATABASE_NAME
        self.db = schema.open_database(path, self.durability, self.vfs)
        self.db.execute(HOLDER)
        self.store = Store(self.db, limits, max_keys=2)
        self.reader = schema.open_reader(path, self.vfs)

    def close(self) -> None:
        """Close both connections."""
        self.reader.close()
        self.store.close()

    def tick(self) -> float:
        """Let a second pass."""
        self.now += 1.0
        return self.now

    # -- actions

    keys = st.sampled_from(["luc_pk_a", "luc_pk_b", "luc_pk_c"])
    sessions = st.sampled_from(["s1", "s2"])
    windows = st.sampled_from(["w1", "w2"])
    batches = st.tuples(
        *(keys, sessions, windows, st.integers(0, 9)),
        st.lists(st.sampled_from([60, 60, 90, 300, 1_600]), min_size=1, max_size=18),
        *(st.sampled_from(["/a", "/b", "/a/" + "longer" * 40]), st.sampled_from(["a", "a", "a", "b"])),
        *(st.sampled_from(["", "", "", "final"]), st.integers(1, 2_000)),
    )

    def make_text(self, name: str, size: int) -> bytes:
        """Return an event."""
        return make_event(name, size)

    def prepare(self, drawn: tuple[Any, ...]) -> tuple[NewBatch, list[Known]]:
        """Return a client batch whose events are like no others, and what the model would know of it."""
        key, session, window, sequence, sizes, page, user, flush, last_activity = drawn
        known: list[Known] = []
        for size in sizes:
            self.names += 1
            text = self.make_text(str(self.names), size)
            known.append(
                Known(
                    *(text, page, user, last_activity),
                    *(flush == "final", flush == "final" and len(known) == len(sizes) - 1),
                )
            )
        events = [event.text for event in known]
        shape: dict[str, Any] = {"page": page, "user": user, "flush": flush, "last_activity": last_activity}
        body = make_body(session, window, sequence, events, **shape)
        return make_batch(body, key=key, limits=LIMITS, accepted_at=self.tick()), known

    def learn(self, batch: NewBatch, known: list[Known], appended: Any) -> None:
        """Bring the model to where a committed append should have brought the store."""
        assert isinstance(appended, Appended), appended
        place = (batch.key, batch.session_id, batch.window_id)
        if batch.key not in {key for key, _, _ in self.rows} and len({key for key, _, _ in self.rows}) == 2:
            assert appended.outcome == "too_many_keys"
            return
        row = (appended.key_id, appended.session_id, appended.window_id)
        assert self.rows.setdefault(place, row) == row
        assert self.rows_ever.setdefault(row[1:], place) == place, "a row id was used again"
        marks = self.marks.setdefault(place[:2], [])
        block = batch.sequence + self.shifts.get(place, 0)
        if any(mark.block == block for mark in self.same(batch)):
            block = 1 + max(mark.block for mark in marks)  # the window's counter began anew
            self.shifts[place] = block - batch.sequence
        assert appended.outcome == "stored"
        first = max((mark.first + mark.count for mark in marks if mark.block == block), default=0)
        marks.append(Mark(batch.window_id, batch.sequence, block, first, len(known), batch.accepted_at))
        window = self.pending.setdefault(place, {})
        for index, event in enumerate(known):
            address = block * 16_384 + first + index
            assert address not in window
            window[address] = event
        self.accepted += len(known)

    def same(self, batch: NewBatch) -> list[Mark]:
        """Return the marks of a batch's session, window and sequence."""
        mine = self.marks.get((batch.key, batch.session_id), [])
        return [mark for mark in mine if (mark.window, mark.sequence) == (batch.window_id, batch.sequence)]

    def settle_append(self, batch: NewBatch, known: list[Known], appended: Any) -> None:
        """Learn what became of a batch; where others had its sequence before, it is compared with them first."""
        while appended.outcome == "differs":
            assert self.same(batch)
            batch = msgspec.structs.replace(batch, known=Reused(0, 0, appended.earlier[-1].mark_id))
            [appended] = self.store.transact([partial(self.store.append, batch)])
        self.learn(batch, known, appended)

    @rule(drawn=st.lists(batches, min_size=1, max_size=4))
    def append(self, drawn: list[tuple[Any, ...]]) -> None:
        """Several clients share a commit."""
        prepared = [self.prepare(each) for each in drawn]
        results = self.store.transact([lambda batch=batch: self.store.append(batch) for batch, _ in prepared])  # type: ignore[misc]
        answered = list(zip(prepared, results, strict=True))
        for (batch, known), appended in sorted(answered, key=lambda each: each[1].outcome == "differs"):
            self.settle_append(batch, known, appended)

    @rule(drawn=batches, flipped=st.booleans())
    def append_beside_a_failing_step(self, drawn: tuple[Any, ...], flipped: bool) -> None:
        """A step that raises after it wrote spoils itself only."""
        batch, known = self.prepare(drawn)
        spoiled, _ = self.prepare((*drawn[:3], drawn[3] + 50, *drawn[4:]))

        def fail() -> None:
            self.store.append(spoiled)
            raise RuntimeError("spoiled")

        steps: list[Callable[[], Any]] = [lambda: self.store.append(batch), fail]
        appended, failed = self.store.transact(steps[::-1])[::-1] if flipped else self.store.transact(steps)
        assert str(failed) == "spoiled"
        self.settle_append(batch, known, appended)

    @precondition(lambda self: any(self.pending.values()))
    @rule(data=st.data(), merges_pages=st.booleans())
    def seal(self, data: st.DataObject, merges_pages: bool) -> None:
        """Cut a window's next batch."""
        place = data.draw(st.sampled_from(sorted(place for place, events in self.pending.items() if events)))
        self.seal_place(place, merges_pages=merges_pages)

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """A retry sends the same bytes."""
        batch_id = data.draw(st.sampled_from(sorted(self.sealed)))
        [load] = self.store.transact([lambda: self.store.load(batch_id, self.tick())])
        assert load.body == self.sealed[batch_id].body

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """Upstream has taken a batch."""
        self.settle_batch(data.draw(st.sampled_from(sorted(self.sealed))))

    @precondition(lambda self: self.sealed)
    @rule(
        data=st.data(), cut=st.sampled_from(["alone", "alone", "halves"]), room=st.sampled_from([1 << 20, 1 << 20, 900])
    )
    def refuse(self, data: st.DataObject, cut: Recut, room: int) -> None:
        """Upstream refuses a batch as it is."""
        self.refuse_batch(data.draw(st.sampled_from(sorted(self.sealed))), cut, room)

    @precondition(lambda self: self.sealed)
    @rule(data=st.data(), cut=st.sampled_from(["alone", "halves"]))
    def refuse_to_the_end(self, data: st.DataObject, cut: Recut) -> None:
        """Upstream refuses a batch, and everything that it is cut into."""
        left = [data.draw(st.sampled_from(sorted(self.sealed)))]
        while left:
            left += self.refuse_batch(left.pop(), cut, 1 << 20)

    letters = st.sets(st.integers(1, 60))

    @precondition(lambda self: self.dead)
    @rule(ids=letters)
    def resend(self, ids: set[int]) -> None:
        """An operator sends dead letters again, and names some that are none."""
        [moved] = self.store.transact([lambda: self.store.dead_letters.resend(sorted(ids))])
        again = [self.dead.pop(letter_id) for letter_id in sorted(ids & set(self.dead))]
        for sent in again:
            self.pending.setdefault(sent.place, {}).update(zip(sent.addresses, sent.events, strict=True))
            self.upstream[sent.place[:2]].difference_update(sent.addresses)
            self.refusals[sent.place[:2]] = 0
        assert (moved.letters, moved.events) == (len(again), sum(len(sent.addresses) for sent in again))
        assert {(window.key, window.window_id) for window in moved.pending} == {
            (sent.place[0], self.rows[sent.place][2]) for sent in again
        }
        assert sum(window.events for window in moved.pending) == moved.events
        assert sum(window.finals for window in moved.pending) == sum(sent.events[-1].ends_session for sent in again)

    @precondition(lambda self: self.dead)
    @rule(ids=letters)
    def purge(self, ids: set[int]) -> None:
        """An operator drops dead letters."""
        [moved] = self.store.transact([lambda: self.store.dead_letters.purge(sorted(ids))])
        gone = [len(self.dead.pop(letter_id).addresses) for letter_id in ids & set(self.dead)]
        assert (moved.letters, moved.events) == (len(gone), sum(gone))
        self.purged += moved.events

    @rule(age=st.integers(0, 40), max_marks=st.sampled_from([1_000, 1_000, 5]))
    def prune(self, age: int, max_marks: int) -> None:
        """Old marks of sessions with nothing in the spool are forgotten, and then the sessions and keys."""
        before = self.now - age
        newest = self.db.execute("SELECT coalesce(max(id), 0) FROM mark").get
        beyond = {
            row[0] for row in self.db.execute("SELECT accepted_at FROM mark WHERE id <= ?", (newest - max_marks,))
        }
        busy = {place[:2] for place, events in self.pending.items() if events}
        busy |= {sent.place[:2] for sent in (*self.sealed.values(), *self.dead.values())}
        live = {session for session, marks in self.marks.items() for mark in marks if mark.at >= before}
        forgotten = 0
        for session, marks in self.marks.items():
            for mark in list(marks):
                is_old = mark.at in beyond or (mark.at < before and session not in live)
                if is_old and session not in busy:
                    marks.remove(mark)
                    forgotten += 1
                    begin = mark.block * 16_384 + mark.first
                    self.upstream.get(session, set()).difference_update(range(begin, begin + mark.count))
        remembered = {session for session, marks in self.marks.items() if marks}
        self.rows = {place: row for place, row in self.rows.items() if place[:2] in remembered | busy}
        self.shifts = {place: shift for place, shift in self.shifts.items() if place in self.rows}
        assert self.store.transact([lambda: self.store.retention.prune(before, max_marks)]) == [forgotten]

    @rule(limits=st.sampled_from([LIMITS, *OTHER_LIMITS]))
    def crash(self, limits: Limits) -> None:
        """The process dies between groups: what a copy of the files holds is what the next start finds.

        The options may be others from then on; what was cut stays as it was cut.
        """
        self.reopen_a_copy(limits)
        self.finds_what_was_sealed()

    def finds_what_was_sealed(self) -> None:
        """What a start reads of sealed batches is what the model knows, byte for byte."""
        left = [batch.batch_id for batch in self.store.leftovers.sealed_batches()]
        assert left == sorted(
            self.sealed, key=lambda each: (self.rows[self.sealed[each].place][1], self.sealed[each].addresses)
        )
        for batch_id, sent in self.sealed.items():
            [load] = self.store.transact([lambda batch_id=batch_id: self.store.load(batch_id, self.now)])  # type: ignore[misc]
            assert load.body == sent.body

    @rule(drawn=batches, with_commit=st.booleans())
    def crash_in_a_group(self, drawn: tuple[Any, ...], with_commit: bool) -> None:
        """The process dies within a group: nothing of it is stored."""
        batch, _ = self.prepare(drawn)
        sealable = [self.rows[place][2] for place, events in self.pending.items() if events]
        travelling = list(self.sealed)

        def die() -> None:
            raise Crash

        steps: list[Callable[[], Any]] = [lambda: self.store.append(batch)]
        steps += [lambda: self.store.seal(sealable[0], self.now)] if sealable else []
        steps += [lambda: self.store.settle(travelling[0])] if travelling else []
        steps += [lambda: self.store.refuse(travelling[-1], "alone", 400, "", self.now, 0)] if travelling[1:] else []
        steps += [lambda: self.store.dead_letters.resend(list(self.dead))]
        try:
            self.store.transact([*steps, die])
        except Crash:
            self.reopen_a_copy(self.limits)

    def reopen_a_copy(self, limits: Limits) -> None:
        """Continue on what the file system holds now."""
        old = self.directory
        self.generation += 1
        self.directory.mkdir()
        for suffix in ("", "-wal"):
            if (source := old / f"{schema.DATABASE_NAME}{suffix}").exists():
                shutil.copy(source, self.directory)
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        self.close_old(old)
        self.open(limits)

    def close_old(self, old: Path) -> None:
        """Let go of the crashed generation."""
        self.close()
        shutil.rmtree(old)

    # -- what sealing and settling mean

    def left_of(self, key: str, session: str) -> int:
        """Return the session's accepted events that are not upstream."""
        mine = [events for place, events in self.pending.items() if place[:2] == (key, session)]
        return sum(map(len, mine)) + sum(
            len(sent.addresses) for sent in self.sealed.values() if sent.place[:2] == (key, session)
        )

    def has_final_behind(self, place: Place, address: int) -> bool:
        """Return whether a pending final of the session has a higher address."""
        return any(
            event.ends_session and (other, self.rows[window][2]) > (address, self.rows[place][2])
            for window, events in self.pending.items()
            if window[:2] == place[:2]
            for other, event in events.items()
        )

    def seal_place(self, place: Place, *, merges_pages: bool = False) -> bool:
        """Seal, and hold the cut against the model."""
        window = self.pending[place]
        left = self.left_of(*place[:2])
        window_id = self.rows[place][2]
        [load] = self.store.transact([lambda: self.store.seal(window_id, self.tick(), merges_pages=merges_pages)])
        if isinstance(load, Exception):
            raise load
        if load is None:
            assert all(event.of_final for event in window.values()), "only a final waits"
            assert left > len(window), "and only for others"
            return False
        assert isinstance(load, Load)
        sent = read_upstream(load.body)
        waiting = [address for address in window if address < sent.sequence]
        assert all(window[address].of_final for address in waiting), "only a final is passed over"
        addresses = [address for address in sorted(window) if address >= sent.sequence][: len(sent.events)]
        events = [window.pop(address) for address in addresses]
        assert (sent.session, sent.window, sent.sequence) == (place[1], place[2], addresses[0])
        assert list(sent.events) == [event.text for event in events]
        assert {sent.envelope["user"]["anonymousId"]} == {event.user for event in events}
        assert sent.envelope["page"]["url"] == events[-1].page
        assert merges_pages or len({event.page for event in events}) == 1
        assert sent.last_activity == max(event.last_activity for event in events)
        assert_within(load.body, self.limits)
        assert not any(event.ends_session for event in events[:-1]), "something is merged behind a final"
        if sent.is_final:
            assert events[-1].ends_session
            assert left == len(events), "a final overtook the rest of its session"
        elif events[-1].ends_session:
            assert self.has_final_behind(place, addresses[-1]), (
                "a final lost its meaning, and no other ends the session"
            )
        behind = [address for address in window if address > addresses[-1]]
        if behind and not events[-1].ends_session:
            following = window[min(behind)]
            larger = sent.size + 1 + len(following.text) + len(following.page) - len(events[-1].page) + SLACK_BYTES
            assert (
                following.of_final
                or following.user != events[0].user
                or (following.page != events[0].page and not merges_pages)
                or len(events) == self.limits.max_events
                or larger > self.limits.max_bytes
                or len(load.body) + len(following.page) + len(following.text) + SLACK_BYTES > self.limits.max_gzip_bytes
            ), "a batch left room that the next event would have used"
        upstream = self.upstream.setdefault(place[:2], set())
        assert upstream.isdisjoint(addresses), "an address was given out twice"
        upstream.update(addresses)
        sealed = load.batch
        assert (sealed.event_count, sealed.is_final, sealed.sequence) == (len(events), sent.is_final, addresses[0])
        assert (load.next_oldest_at is None) == (not window)
        self.sealed[sealed.batch_id] = Sent(place, addresses, events, load.body, self.limits)
        return True

    def refuse_batch(self, batch_id: int, cut: Recut, room: int) -> tuple[int, ...]:
        """Refuse a batch, and hold what it is cut into against the model; returns that."""
        sent = self.sealed.pop(batch_id)
        session = sent.place[:2]
        segments = self.db.execute("SELECT count(*) FROM segment WHERE batch_id = ?", (batch_id,)).get
        if cut == "alone":
            self.refusals[session] = self.refusals.get(session, 0) + 1
        [refused] = self.store.transact([lambda: self.store.refuse(batch_id, cut, 400, "no", self.tick(), room)])
        assert isinstance(refused, Refused), refused
        if not refused.parts:
            gives_up = cut == "alone" and segments == 1 and self.refusals[session] > 10
            assert len(sent.addresses) == 1 or gives_up, "an event became a dead letter though others might be to blame"
            assert refused.dead_events == len(sent.addresses)
            self.dead[self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'dead_letter'").get] = sent
            kept = {letter_id for (letter_id,) in self.db.execute("SELECT id FROM dead_letter")}
            gone = sorted(set(self.dead) - kept)
            assert gone == sorted(self.dead)[: len(gone)], "others than the oldest were shed"
            assert refused.shed.letters == len(gone)
            self.shed += sum(len(self.dead.pop(letter_id).addresses) for letter_id in gone)
            assert (self.db.execute("SELECT sum(bytes) FROM dead_letter").get or 0) <= room
            return ()
        assert len(refused.parts) == (2 if segments == 1 or cut == "halves" else segments)
        addresses: list[int] = []
        for part_id in refused.parts:
            [load] = self.store.transact([lambda part_id=part_id: self.store.load(part_id, self.tick())])  # type: ignore[misc]
            part = read_upstream(load.body)
            first, end = len(addresses), len(addresses) + len(part.events)
            addresses += sent.addresses[first:end]
            events = sent.events[first:end]
            assert list(part.events) == [event.text for event in events]
            assert part.sequence == sent.addresses[first]
            assert part.envelope == {**read_upstream(sent.body).envelope, "page": {"url": events[-1].page}}
            assert_within(load.body, sent.limits)
            assert part.last_activity == max(event.last_activity for event in events)
            assert part.is_final == (read_upstream(sent.body).is_final and part_id == refused.parts[-1])
            self.sealed[part_id] = Sent(sent.place, sent.addresses[first:end], events, load.body, sent.limits)
        assert addresses == sent.addresses
        return refused.parts

    def settle_batch(self, batch_id: int) -> None:
        """Settle, in the store and in the model."""
        assert self.store.transact([lambda: self.store.settle(batch_id)]) == [None]
        sent = self.sealed.pop(batch_id)
        self.delivered += len(sent.addresses)
        self.refusals[sent.place[:2]] = 0

    # -- what always holds

    @invariant()
    def is_accounted(self) -> None:
        """The account is balanced, and is the model's."""
        if not self.generation and not hasattr(self, "store"):
            return
        assert_accounted(
            read_account(self.reader, self.now),
            accepted=self.accepted,
            delivered=self.delivered,
            dead_lettered=sum(len(sent.addresses) for sent in self.dead.values()),
            dead_letters=len(self.dead),
            purged=self.purged,
            shed=self.shed,
            pending=sum(map(len, self.pending.values())),
            sealed=sum(len(sent.addresses) for sent in self.sealed.values()),
        )

    @invariant()
    def leaves_no_orphans(self) -> None:
        """Every row is there for another, and every event is in one row."""
        if not hasattr(self, "store"):
            return
        for sql in ORPHANS:
            assert self.db.execute(sql).fetchall() == [], sql
        held = [
            (window_id, address)
            for window_id, first, events in self.db.execute("SELECT window_id, address, events FROM holder")
            for address in range(first, first + events)
        ]
        expected = {(self.rows[place][2], address) for place, events in self.pending.items() for address in events}
        batches = (*self.sealed.values(), *self.dead.values())
        expected |= {(self.rows[sent.place][2], address) for sent in batches for address in sent.addresses}
        assert len(held) == len(set(held))
        assert set(held) == expected

    def teardown(self) -> None:
        """Whatever happened, all of it can be delivered, dead letters too once they are sent again."""
        try:
            if hasattr(self, "store"):
                self.deliver_all()
                self.close()
        finally:
            self.root.cleanup()

    def deliver_all(self) -> None:
        """Drain, send the dead letters again, and drain."""
        self.drain()
        self.resend(set(self.dead))
        self.drain()
        assert self.delivered + self.purged + self.shed == self.accepted

    def drain(self) -> None:
        """Settle and seal until nothing moves, which is when nothing is left."""
        moved = True
        while moved:
            moved = False
            for batch_id in list(self.sealed):
                self.settle_batch(batch_id)
            for place in [place for place, events in self.pending.items() if events]:
                moved = self.seal_place(place, merges_pages=bool(self.generation % 2)) or moved
        assert not any(self.pending.values())
        self.is_accounted()


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase
