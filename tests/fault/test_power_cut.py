"""The power goes before every single operation of the spool on its disk (laws 1, 2 and 5).

The model of `tests.component.test_store_model` is played by seed on a disk that is recorded. For a cut before each
operation an image of what the disk may hold then is drawn and opened by the real code. It has to be, row for row, the
spool as it was after some commit: which ones may be, `durability` says. Then what the model knew at that moment is held
against it, the cuts and the account among it, and the spool goes on from there until all is delivered.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from relay.errors import SpoolError
from relay.spool import schema
from relay.spool.spool import run_in_thread
from relay.spool.store import Store
from tests.accounting import assert_accounted
from tests.component.batches import make_batch, make_body
from tests.component.spooling import opened_spool
from tests.component.test_store_model import StoreMachine
from tests.fault.power import Disk, Fate, Operation, RecordingVFS
from tests.fault.workload import ACTIONS, Durability, Workload, read_content, recall

pytestmark = pytest.mark.slow

SEEDS = int(os.environ.get("LUCENT_RELAY_POWER_SEEDS", "1"))
"""Workloads of each durability; one takes some seconds."""

VACUUM_FLOOR_PAGES = 2
"""2 048 would let no file shrink within a workload."""

DRAINS = 0.1
"""Share of the cuts after which all is delivered; after the others the account and one more batch have to do."""

LOG_HEADER_BYTES = 32
"""SQLite writes them when it begins its log, and each time it begins it anew."""

FATES = (Fate.LOST, Fate.KEPT, Fate.TORN, Fate.MIXED, Fate.MIXED)


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Write what a cut left."""
    directory.mkdir()
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class Survivor(StoreMachine):
    """The model on what a cut left."""

    home = Workload.home


@contextmanager
def surviving(files: dict[str, bytes], chance: random.Random) -> Iterator[Survivor]:
    """Start on what a cut left, beside a shared memory of which anything may be left."""
    survivor = Survivor()
    try:
        write_files(survivor.directory, files)
        if chance.random() < 0.5:
            (survivor.directory / f"{schema.DATABASE_NAME}-shm").write_bytes(chance.randbytes(32_768))
        survivor.open()
        try:
            yield survivor
        finally:
            survivor.close()
    finally:
        survivor.root.cleanup()


def cuts(operations: Sequence[Operation], *, is_honest: bool = True) -> Iterator[tuple[int, Disk]]:
    """Yield the disk before each operation, and after the last, with the number of operations before."""
    disk = Disk(is_honest=is_honest)
    for number, (operation, arguments) in enumerate(operations):
        yield number, disk
        operation(disk, *arguments)
    yield len(operations), disk


def allowed(workload: Workload, at: int, keeps_answered: bool) -> range:
    """Return the commits one of which a cut may leave as the last.

    Args:
        workload: What was done.
        at: Operations before the cut.
        keeps_answered: Whether nothing may be missing that was answered for; else nothing of before the last stop.
    """
    begun = sum(commit.begun <= at for commit in workload.commits[1:])
    answered = sum(commit.done <= at for commit in workload.commits[1:])
    stopped = max(commit for operations, commit in workload.stops if operations <= at)
    return range(answered if keeps_answered else stopped, begun + 1)


def assert_survives(workload: Workload, disk: Disk, fate: Fate, chance: random.Random, expected: range) -> None:
    """Cut the power, start, and go on."""
    with surviving(disk.image(fate, chance), chance) as survivor:
        content = read_content(survivor.db)
        found = [number for number in expected if workload.commits[number].content == content]
        assert found, f"the disk holds none of the commits {expected}"
        recall(survivor, workload.commits[found[-1]].memory)
        survivor.finds_what_was_sealed()
        survivor.is_accounted()
        survivor.leaves_no_orphans()
        assert survivor.db.pragma("integrity_check") == "ok"
        survivor.append(drawn=[("luc_pk_a", "s1", "w1", 99, [60, 300], "/a", "a", "", 5)])
        if chance.random() < DRAINS:
            survivor.deliver_all()
        survivor.is_accounted()


def assert_survives_everywhere(
    workload: Workload, fates: Sequence[Fate], *, keeps_answered: bool, is_honest: bool = True
) -> None:
    """Cut the power before each operation, and after the last."""
    chance = random.Random(len(workload.operations))
    for at, disk in cuts(workload.operations, is_honest=is_honest):
        assert_survives(workload, disk, chance.choice(fates), chance, allowed(workload, at, keeps_answered))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Store._commit.__globals__, "_VACUUM_FLOOR_PAGES", VACUUM_FLOOR_PAGES)


PROMISES = pytest.mark.parametrize(
    ("durability", "fates", "keeps_answered"),
    [("fsync", FATES, True), ("os", FATES, False), ("os", [Fate.KEPT], True)],
    ids=["fsync", "os", "os, and only the relay dies"],
)


@PROMISES
@pytest.mark.parametrize("seed", range(SEEDS))
def test_cut_before_every_operation(
    seed: int, durability: Durability, fates: Sequence[Fate], keeps_answered: bool
) -> None:
    """Whatever a cut leaves is the spool as it was after one of the commits, whole, and it goes on from there.

    With "fsync" all that was answered for is in it. With "os" that holds where the relay dies but not the machine; else
    the last commits may be missing, never one before others, and nothing of what an orderly end left.
    """
    workload = Workload(seed, durability)
    workload.play()
    assert_survives_everywhere(workload, fates, keeps_answered=keeps_answered)


def test_workloads_do_everything() -> None:
    """Among ten workloads each action occurs, the log is begun anew, and the file gives back what it does not need."""
    actions: Counter[str] = Counter()
    logs = shrunk = 0
    for seed in range(10):
        workload = Workload(seed, "fsync")
        workload.play()
        actions += workload.actions
        logs += sum(
            operation is Disk.write and arguments[1] == 0 and len(arguments[2] or b"") == LOG_HEADER_BYTES
            for operation, arguments in workload.operations
        ) - len(workload.stops)
        shrunk += workload.vacuumed
    assert actions.keys() == ACTIONS
    assert min(actions.values()) > 1
    assert logs > 50
    assert shrunk > 2


@pytest.mark.parametrize("harm", ["the disk lies", "nothing is synced", "the log is not synced"])
def test_a_missing_sync_is_noticed(harm: str) -> None:
    """The cuts are such that what is not synced is lost, or spoils the database."""
    workload = Workload(0, "os" if harm == "the log is not synced" else "fsync")
    workload.has_syncs = harm != "nothing is synced"
    workload.play()
    with pytest.raises((AssertionError, SpoolError, apsw.CorruptError), match=r"disk|not a spool"):
        assert_survives_everywhere(workload, FATES, keeps_answered=True, is_honest=harm != "the disk lies")


async def test_first_batch_of_a_new_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 200 of an installation holds: directories, database and log are where they were made."""
    disk = RecordingVFS(tmp_path)
    batch = make_batch(make_body())
    settings: dict[str, Any] = {"run": run_in_thread, "now": lambda: 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        async with opened_spool(tmp_path / "var" / "spool", durability="fsync", vfs=disk.identity, **settings) as spool:
            await spool.append(batch)
            answered = len(disk.operations)
    chance = random.Random(0)
    for at, state in cuts(disk.operations):
        survivor = tmp_path / f"after-{at}"
        write_files(survivor, state.image(chance.choice(FATES), chance))
        async with opened_spool(survivor / "var" / "spool", **settings) as spool:
            assert (await spool.account()).accepted == 1 or at < answered
            await spool.append(batch)
            assert_accounted(await spool.account(), accepted=1, pending=1)
