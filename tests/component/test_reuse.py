"""Clients that use a sequence again: what they sent arrives once, in its order, under numbers of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.protocol.cut import Limits
from relay.protocol.replay import decode_batch
from relay.protocol.reuse import Known, find_known
from relay.protocol.schema import MAX_SEQUENCE
from relay.spool import schema
from relay.spool.account import read_account
from relay.spool.marks import read_events
from relay.spool.store import Store
from relay.spool.values import Appended, Load, PendingWindow
from tests.accounting import assert_accounted
from tests.component.batches import LIMITS, make_batch, make_body, make_event, read_upstream

A, B, C, D, E = (make_event(name) for name in "abcde")


class Disk:
    """A spool's database, and what of it arrived upstream."""

    def __init__(self, directory: Path, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.open(directory)
        self.upstream: dict[int, tuple[str, tuple[bytes, ...], bool]] = {}
        """By number: window, events, whether it is final; of the one session that there is."""

    def open(self, directory: Path) -> None:
        """Open what lies in a directory."""
        self.directory = directory
        self.store = Store(schema.open_database(directory / schema.DATABASE_NAME, "os"), self.limits, max_keys=2)
        self.reader = schema.open_reader(directory / schema.DATABASE_NAME)

    def close(self) -> None:
        """Close both connections."""
        self.reader.close()
        self.store.close()

    def append(self, body: bytes, known: Known | None = None) -> Appended:
        """Offer a batch once."""
        batch = make_batch(body, known=known, limits=self.limits)
        [appended] = self.store.transact([lambda: self.store.append(batch)])
        assert isinstance(appended, Appended), appended
        return appended

    def offer(self, body: bytes) -> str:
        """Offer a batch as the intake does; returns what became of it."""
        appended = self.append(body)
        while appended.outcome == "differs":
            known = find_known(decode_batch(body, 262_144), appended.earlier, partial(read_events, self.reader))
            appended = self.append(body, known)
        return appended.outcome

    def deliver(self, batches: int = 1_000_000) -> None:
        """Let upstream take so many batches, or all there are."""
        for (window_id,) in self.store._all("SELECT id FROM window"):
            while batches:
                [load] = self.store.transact([lambda window_id=window_id: self.store.seal(window_id, 0.0)])  # type: ignore[misc]
                if load is None:
                    break
                assert isinstance(load, Load), load
                sent = read_upstream(load.body)
                assert sent.sequence not in self.upstream, "a number for two batches"
                self.upstream[sent.sequence] = (sent.window, sent.events, sent.is_final)
                assert self.store.transact([lambda load=load: self.store.settle(load.batch.batch_id)]) == [None]  # type: ignore[misc]
                batches -= 1

    def arrived(self, window: str = "w") -> list[bytes]:
        """Return a window's events in the order of their numbers, which is upstream's."""
        return [event for _, (name, events, _) in sorted(self.upstream.items()) if name == window for event in events]

    def account(self, **expected: int) -> None:
        """Hold the account against what is expected."""
        assert_accounted(read_account(self.reader, 0.0), **expected)


@contextmanager
def opened(directory: Path) -> Iterator[Disk]:
    """Open a spool; on exit everything is upstream, and accounted for."""
    disk = Disk(directory)
    try:
        yield disk
        disk.deliver()
        disk.account(spooled=0, delivered=sum(len(events) for _, events, _ in disk.upstream.values()))
    finally:
        disk.close()


# -- what a batch says beside its events


def test_retry_under_another_envelope_is_a_retry(tmp_path: Path) -> None:
    """The page may have changed, and the user been identified, before a client tries again."""
    with opened(tmp_path) as disk:
        assert disk.offer(make_body(events=[A, B])) == "stored"
        assert disk.offer(make_body(events=[A, B], page="https://shop.example/later", last_activity=9)) == "repeated"


def test_final_said_by_a_retry_counts_while_it_can(tmp_path: Path) -> None:
    """A page that closes sends what is unconfirmed again, as its last: the stored batch ends the session then."""
    with opened(tmp_path) as disk:
        disk.append(make_body(sequence=0, events=[A, B]))
        appended = disk.append(make_body(sequence=0, events=[A, B], flush="final"))
        assert appended.outcome == "repeated"
        assert isinstance(appended.final, PendingWindow)
        assert (appended.final.window_id, appended.final.finals, appended.final.events) == (appended.window_id, 1, 0)
        assert disk.append(make_body(sequence=0, events=[A, B], flush="final")).final == "as before"
        assert disk.append(make_body(sequence=0, events=[A, B])).final == "as before"
        disk.append(make_body(window="other", sequence=1, events=[C]))
        disk.deliver()
        disk.deliver()
        assert disk.upstream == {16_384: ("other", (C,), False), 0: ("w", (A, B), True)}
        assert list(disk.upstream)[-1] == 0, "a final goes last"


def test_final_said_too_late_is_told(tmp_path: Path) -> None:
    """Once a batch is on its way, it is never changed; that its final came too late is said, once."""
    with opened(tmp_path) as disk:
        disk.append(make_body(events=[A]))
        disk.deliver()
        assert disk.append(make_body(events=[A], flush="final")).final == "too late"
        assert disk.append(make_body(events=[A], flush="final")).final == "as before"


def test_batch_that_grew_may_be_the_last(tmp_path: Path) -> None:
    """A page that closes sends what is unconfirmed with what came since, and the session ends with that."""
    with opened(tmp_path) as disk:
        disk.offer(make_body(events=[A, B]))
        assert disk.offer(make_body(events=[A, B, C], flush="final")) == "stored"
        disk.deliver()
        assert disk.upstream == {0: ("w", (A, B, C), True)}


# -- what is recognised, and until when


def test_batch_that_shrank_holds_nothing_new(tmp_path: Path) -> None:
    """A client that sends the beginning of a batch again is told 200, while the rest is in the spool."""
    with opened(tmp_path) as disk:
        disk.offer(make_body(events=[A, B, C]))
        assert disk.offer(make_body(events=[A, B])) == "repeated"
        disk.deliver()
        assert disk.offer(make_body(events=[A, B])) == "stored", "delivered twice rather than lost"
        assert disk.offer(make_body(events=[A, B])) == "repeated"
        disk.deliver()
        assert disk.arrived() == [A, B, C, A, B]


def test_batch_written_anew_holds_nothing_new(tmp_path: Path) -> None:
    """The same events in other words are a retry, while the first are in the spool, cut or not."""
    respelled = [json.dumps(json.loads(event), indent=1).encode() for event in (A, B, C)]
    limits = Limits(2, 1_000_000)
    disk = Disk(tmp_path, limits)
    disk.offer(make_body(events=[A, B, C]))
    assert disk.offer(make_body(events=respelled)) == "repeated"
    assert disk.offer(make_body(events=[*respelled, D])) == "stored"
    disk.deliver()
    assert disk.arrived() == [A, B, C, D]
    disk.account(accepted=4, delivered=4)
    disk.close()


def test_event_that_changed_is_new(tmp_path: Path) -> None:
    """What follows the first difference is kept, in its place before the next sequence."""
    with opened(tmp_path) as disk:
        disk.offer(make_body(sequence=0, events=[A, B]))
        disk.offer(make_body(sequence=1, events=[D]))
        assert disk.offer(make_body(sequence=0, events=[A, C])) == "stored"
        disk.deliver()
        assert disk.arrived() == [A, B, C, D]


def test_only_the_latest_batches_are_compared(tmp_path: Path) -> None:
    """A client that never counts is served in order at a bounded cost, and its latest retries are recognised."""
    bodies = [make_body(sequence=7, events=[make_event(str(number))]) for number in range(60)]
    with opened(tmp_path) as disk:
        for body in bodies:
            assert disk.offer(body) == "stored"
            assert disk.offer(body) == "repeated"
        assert disk.offer(bodies[-16]) == "repeated"
        assert len(disk.append(make_body(sequence=7)).earlier) == 16
        disk.deliver()
        assert disk.arrived() == [make_event(str(number)) for number in range(60)]
        assert max(disk.upstream) < (7 + 60) * 16_384


# -- numbers


def test_reload_goes_behind_what_was_there(tmp_path: Path) -> None:
    """A counter that began anew is numbered behind the session, and its sequences keep their distances."""
    with opened(tmp_path) as disk:
        for sequence in range(3):
            disk.offer(make_body(sequence=sequence))
        disk.offer(make_body(window="other", sequence=8))
        disk.deliver()
        for sequence, event in enumerate((A, B, C, D, E)):
            assert disk.offer(make_body(sequence=sequence, events=[event])) == "stored"
        for sequence in range(3):
            assert disk.offer(make_body(sequence=sequence)) == "repeated", "a late retry from before the reload"
        disk.deliver()
        assert {number // 16_384: name for number, (name, _, _) in disk.upstream.items()} == {
            0: "w",
            8: "other",
            9: "w",
        }
        assert disk.arrived() == [*(make_event(f"s/w/{sequence}") for sequence in range(3)), A, B, C, D, E]


def test_block_that_is_full_is_left(tmp_path: Path) -> None:
    """A batch that grows beyond the addresses of its sequence goes on behind the session, and the window after it."""
    event = b'{"timestamp":1,"type":3,"data":%d}'
    many = [event % number for number in range(16_000)]
    with opened(tmp_path) as disk:
        disk.offer(make_body(sequence=0, events=many))
        disk.offer(make_body(window="other", sequence=0, events=[event % number for number in range(16_000, 16_300)]))
        assert disk.offer(make_body(sequence=0, events=[*many, *(event % n for n in range(100))])) == "stored"
        assert disk.offer(make_body(sequence=1, events=[A])) == "stored"
        disk.deliver()
        assert disk.arrived() == [*many, *(event % number for number in range(100)), A]


def test_numbers_end_where_they_are_unsafe(tmp_path: Path) -> None:
    """Behind the highest sequence there is nothing; until then every batch finds a number of its own."""
    with opened(tmp_path) as disk:
        assert disk.offer(make_body(sequence=MAX_SEQUENCE - 1, events=[A])) == "stored"
        disk.deliver()
        assert disk.offer(make_body(sequence=0, events=[B])) == "stored"
        assert disk.offer(make_body(sequence=0, events=[C])) == "stored"
        assert disk.offer(make_body(sequence=0, events=[D])) == "numbers_used_up"
        assert disk.offer(make_body(sequence=MAX_SEQUENCE, events=[D])) == "numbers_used_up"
        assert disk.offer(make_body(sequence=0, events=[C])) == "repeated"
        disk.deliver()
        assert {number // 16_384 for number in disk.upstream} == {0, MAX_SEQUENCE - 1}


# -- any client


class Page:
    """A tab as its client sees it."""

    def __init__(self) -> None:
        self.sequence = 0
        self.unconfirmed: list[bytes] = []
        """Events of the batch whose answer was lost."""
        self.accepted: list[bytes] = []
        """All that reached the relay, in order."""


class ClientsMachine(RuleBasedStateMachine):
    """Tabs of a session that lose answers, retry, grow their batches, reload and race, and a relay that crashes."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.generations = 0
        self.names = 0
        self.disk = Disk(self.next_directory(), Limits(7, 1_500))
        self.pages = {"w1": Page(), "w2": Page()}
        self.past: deque[bytes] = deque(maxlen=6)
        """Batches that reached the relay of late; younger than the oldest that it compares with."""

    def next_directory(self) -> Path:
        """Make a directory."""
        self.generations += 1
        directory = Path(self.root.name) / str(self.generations)
        directory.mkdir()
        return directory

    windows = st.sampled_from(["w1", "w2"])

    @rule(window=windows, sizes=st.lists(st.sampled_from([60, 60, 300, 1_600]), max_size=9), is_answered=st.booleans())
    def send(self, window: str, sizes: list[int], is_answered: bool) -> None:
        """Send the events since the last answer: new ones, a batch once more, or one that grew."""
        page = self.pages[window]
        new = [make_event(f"{self.names + index}", size) for index, size in enumerate(sizes)]
        self.names += len(new)
        events = [*page.unconfirmed, *new]
        if not events:
            return
        body = make_body("s", window, page.sequence, events)
        assert self.disk.offer(body) == ("stored" if new else "repeated")
        self.past.append(body)
        page.accepted += new
        page.unconfirmed = [] if is_answered else events
        page.sequence += is_answered

    @rule(window=windows)
    def reload(self, window: str) -> None:
        """Forget everything, and count from 0 again."""
        self.pages[window].sequence = 0
        self.pages[window].unconfirmed = []

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def arrive_late(self, data: st.DataObject) -> None:
        """A copy of an earlier batch was held up on its way."""
        assert self.disk.offer(data.draw(st.sampled_from(list(self.past)))) == "repeated"

    @rule(batches=st.integers(1, 3))
    def deliver(self, batches: int) -> None:
        """Upstream takes some."""
        self.disk.deliver(batches)

    @rule()
    def crash(self) -> None:
        """The relay dies, and starts with what the file system holds."""
        old = self.disk.directory
        new = self.next_directory()
        for suffix in ("", "-wal"):
            if (source := old / f"{schema.DATABASE_NAME}{suffix}").exists():
                shutil.copy(source, new)
        self.disk.close()
        self.disk.open(new)

    @invariant()
    def is_accounted(self) -> None:
        """Each event is accepted once."""
        self.disk.account(accepted=sum(len(page.accepted) for page in self.pages.values()))

    def teardown(self) -> None:
        """In the end upstream has every event once, each window's in the order of its client."""
        try:
            self.disk.deliver()
            for window, page in self.pages.items():
                assert self.disk.arrived(window) == page.accepted
            self.disk.account(spooled=0)
        finally:
            self.disk.close()
            self.root.cleanup()


ClientsMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestClients = ClientsMachine.TestCase
