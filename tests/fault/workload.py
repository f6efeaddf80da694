"""The model of `tests.component.test_store_model` played by seed, on a disk that is recorded.

Each commit is kept with what the disk was asked for before it and before its answer, with all rows, and with what the
model knew then.
"""

from __future__ import annotations

import os
import pickle
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import apsw

from relay.protocol.cut import Limits
from relay.spool.store import Store
from relay.spool.transactions import Step
from relay.spool.values import Appended, NewBatch, Recut
from tests.component.batches import make_event
from tests.component.model import LIMITS, Known, Place
from tests.component.test_store_model import StoreMachine
from tests.fault.power import Operation, RecordingVFS

STEPS = 22
"""Actions of a workload; some 800 operations of the disk."""

CHECKPOINT_PAGES = 24
"""SQLite's 1 000 would let no log be checkpointed, and begun again, within so few steps."""

NOISE_BYTES = 80_000
"""Of a large event, which takes pages of its own, so that the file grows and shrinks."""

MEMORY = "/dev/shm"  # noqa: S108 - directories of their own are made in it
"""What is simulated needs no disk, and a thousand starts and stops a workload are several times as fast without."""

ACTIONS = {
    *("append", "append_beside_a_failing_step", "seal", "settle", "load", "refuse", "refuse_to_the_end"),
    *("resend", "purge", "prune", "restart", "drain"),
}

Durability = Literal["fsync", "os"]


@dataclass
class Commit:
    """A state of the spool: when its making began, and when it was answered for."""

    begun: int
    """Operations of the disk before it."""
    done: int
    """Operations of the disk before its answer."""
    content: tuple[Any, ...]
    """All rows."""
    memory: bytes = b""
    """What the model knew then."""


def read_content(db: apsw.Connection) -> tuple[Any, ...]:
    """Return all rows of a database."""
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
    return tuple((name, *db.execute(f"SELECT * FROM {name}")) for name in tables)  # noqa: S608 - its own


def memorise(machine: StoreMachine) -> bytes:
    """Return what the model knows: of a machine, the numbers and tables."""
    return pickle.dumps({name: value for name, value in vars(machine).items() if isinstance(value, (int, float, dict))})


def recall(machine: StoreMachine, memory: bytes) -> None:
    """Let a model know what `memorise` returned."""
    vars(machine).update(pickle.loads(memory))  # noqa: S301 - our own


class Workload(StoreMachine):
    """Actions by seed, on a disk that is recorded."""

    home = MEMORY if os.access(MEMORY, os.W_OK) else None

    def __init__(self, seed: int, durability: Durability) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self.durability = durability
        self.disk = RecordingVFS(self.directory)  # which is durable; how it comes to be is another test's
        self.vfs = self.disk.identity
        self.commits: list[Commit] = []
        self.stops = [(0, 0)]
        """Of each orderly end, the operations before it was over, and the last commit before it."""
        self.actions: Counter[str] = Counter()
        self.vacuumed = 0
        """Commits that made the database smaller."""
        self.has_syncs = True

    @property
    def operations(self) -> list[Operation]:
        """What the disk was asked for."""
        return self.disk.operations

    def open(self, limits: Limits = LIMITS) -> None:
        """Open the database, with a log that is checkpointed early."""
        begun = len(self.operations)
        super().open(limits)
        self.db.pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
        if not self.has_syncs:
            self.db.pragma("synchronous", 0)
        self.store = RecordingStore(self, self.db)
        if not self.commits:
            self.note_commit(begun)

    def close(self) -> None:
        """Close the spool, which is an orderly end."""
        super().close()
        self.stops.append((len(self.operations), len(self.commits) - 1))

    def note_commit(self, begun: int) -> None:
        """Note a commit that is answered for from now on."""
        commit = Commit(begun, len(self.operations), read_content(self.db))
        if self.commits and commit.content == self.commits[-1].content:
            commit.memory = self.commits[-1].memory
        self.commits.append(commit)

    def memorise_commits(self) -> None:
        """Note what the model knows, for the commits that it has caught up with."""
        memory = memorise(self)
        for commit in self.commits:
            commit.memory = commit.memory or memory

    def make_text(self, name: str, size: int) -> bytes:
        """Return an event; the largest do not compress."""
        if size <= LIMITS.max_bytes:
            return super().make_text(name, size)
        return make_event(name + self.chance.randbytes(NOISE_BYTES // 2).hex())

    def settle_append(self, batch: NewBatch, known: list[Known], appended: Appended) -> None:
        """Learn what became of a batch; where it takes further commits, not before it is known what came of others."""
        if appended.outcome == "differs":
            self.memorise_commits()
        super().settle_append(batch, known, appended)

    def seal_place(self, place: Place, *, merges_pages: bool = False) -> bool:
        """Seal, as a part of another action too."""
        is_sealed = super().seal_place(place, merges_pages=merges_pages)
        self.memorise_commits()
        return is_sealed

    def settle_batch(self, batch_id: int) -> None:
        """Settle, as a part of another action too."""
        super().settle_batch(batch_id)
        self.memorise_commits()

    def refuse_batch(self, batch_id: int, cut: Recut, room: int) -> tuple[int, ...]:
        """Refuse, as a part of another action too."""
        parts = super().refuse_batch(batch_id, cut, room)
        self.memorise_commits()
        return parts

    # -- the workload

    def play(self) -> None:
        """Do all actions, and know after each what the model knows."""
        try:
            self.start()
            self.memorise_commits()
            for _ in range(STEPS):
                self.act()
                self.memorise_commits()
                self.is_accounted()
                self.leaves_no_orphans()
        finally:
            self.close()
            self.disk.unregister()
            self.root.cleanup()

    def act(self) -> None:
        """Do one thing of those that are possible."""
        full = [place for place, events in self.pending.items() if events]
        possible = {"append": 6, "append_beside_a_failing_step": 1, "prune": 1, "restart": 1, "drain": 2}
        possible |= {"seal": 6} if full else {}
        possible |= {"settle": 5, "load": 1, "refuse": 3, "refuse_to_the_end": 2} if self.sealed else {}
        possible |= {"resend": 2, "purge": 2} if self.dead else {}
        assert possible.keys() <= ACTIONS
        [action] = self.chance.choices(list(possible), list(possible.values()))
        self.actions[action] += 1
        if action == "append":
            self.append(drawn=[self.draw_batch() for _ in range(self.chance.randint(1, 3))])
        elif action == "append_beside_a_failing_step":
            self.append_beside_a_failing_step(drawn=self.draw_batch(), flipped=self.chance.random() < 0.5)
        elif action == "prune":
            self.prune(age=self.chance.randint(0, 40), max_marks=self.chance.choice((1_000, 5)))
        elif action == "drain":
            self.drain()
        elif action == "restart":
            self.close()
            self.open()
            self.finds_what_was_sealed()
        elif action == "seal":
            self.seal_place(self.chance.choice(full), merges_pages=self.names % 2 == 0)
        elif action == "resend":
            self.resend(ids=set(self.chance.sample(sorted(self.dead), 1)))
        elif action == "purge":
            self.purge(ids=set(self.chance.sample(sorted(self.dead), 1)))
        else:
            self.act_on_batch(action, self.chance.choice(sorted(self.sealed)))

    def act_on_batch(self, action: str, batch_id: int) -> None:
        """Do one thing to a sealed batch."""
        if action == "settle":
            self.settle_batch(batch_id)
        elif action == "load":
            [load] = self.store.transact([lambda: self.store.load(batch_id, self.tick())])
            assert load.body == self.sealed[batch_id].body
        elif action == "refuse":
            self.refuse_batch(batch_id, self.chance.choice(("alone", "halves")), self.chance.choice((1 << 20, 900)))
        else:
            left = [batch_id]
            while left:
                left += self.refuse_batch(left.pop(), "halves", 1 << 20)

    def draw_batch(self) -> tuple[Any, ...]:
        """Return what `StoreMachine.prepare` makes a client batch of."""
        choice = self.chance.choice
        sizes = self.chance.choices((60, 90, 300, LIMITS.max_bytes + 1), (6, 3, 3, 2), k=self.chance.randint(1, 12))
        place = (choice(("luc_pk_a", "luc_pk_b", "luc_pk_c")), choice(("s1", "s2")), choice(("w1", "w2")))
        return (
            *place,
            self.chance.randint(0, 9),
            sizes,
            choice(("/a", "/b")),
            "b" if self.names % 5 == 0 else "a",
            choice(("", "", "", "final")),
            self.names,
        )


class RecordingStore(Store):
    """A store that notes its commits."""

    def __init__(self, workload: Workload, connection: apsw.Connection) -> None:
        super().__init__(connection, LIMITS, max_keys=2)
        self._workload = workload

    def _commit(self, steps: Sequence[Step]) -> list[Any]:
        begun, used = len(self._workload.operations), self._db.pragma("page_count")
        results = super()._commit(steps)
        self._workload.note_commit(begun)
        self._workload.vacuumed += self._db.pragma("page_count") < used
        return results
