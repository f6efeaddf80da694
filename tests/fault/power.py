"""A disk that keeps what is written volatile until it is synced, and what it may hold when the power goes.

The spool runs on a `RecordingVFS`, SQLite's own with a notebook: every write, truncation, sync, creation and deletion
is noted in its order. When the power goes, what the process would have done next does not matter; so a cut before the
n-th operation leaves what the first n noted ones allow. `Disk` replays them, and `Disk.image` draws an outcome. So one
run of a workload is cut at every operation, each cut in any number of ways.

Rules of the disk:
1. A sync of a file makes its content durable, and nothing of other files.
2. Of what was written since, each write and truncation is kept or lost by itself, whatever came before or after it. A
   write may be torn: of each sector that it touches, its bytes are new, old, or neither. Bytes beside them are left
   alone, which SQLite relies on by default (powersafe overwrite), as every disk of this century allows.
3. A name's creation or deletion is durable once its directory is synced; until then each name is in any state that it
   had since, and a name below a directory that is not there is not there. SQLite syncs the directory with the first
   sync of a log or journal; other syncs of directories are the relay's own, by `os.fsync`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import apsw

SECTOR_BYTES = 512
"""What a disk writes whole, or not at all."""

DIRECTORY = 0
"""Stands where a file's number would."""


class Write(NamedTuple):
    """A write to a file, or where there is no data, its truncation."""

    at: int
    data: bytes | None


class Fate(Enum):
    """What becomes of what was not synced."""

    LOST = "lost"
    KEPT = "kept"
    TORN = "the last write of each file torn, the others kept"
    MIXED = "each write kept, lost or torn by chance"


@dataclass
class File:
    """A file's content, and what was written since its last sync."""

    durable: bytearray = field(default_factory=bytearray)
    waiting: list[Write] = field(default_factory=list)

    def sync(self) -> None:
        """Make everything durable."""
        for write in self.waiting:
            _apply(self.durable, write)
        self.waiting.clear()

    def image(self, fate: Fate, chance: random.Random) -> bytes:
        """Return what a cut may leave."""
        content = bytearray(self.durable)
        for write in self.waiting if fate is not Fate.LOST else ():
            draw = chance.random() if fate is Fate.MIXED else 0.0
            is_torn = draw > 0.8 or (fate is Fate.TORN and write is self.waiting[-1])
            if is_torn and write.data is not None:
                for piece in _torn(write.at, write.data, chance):
                    _apply(content, piece)
            elif draw < 0.5:
                _apply(content, write)
        return bytes(content)


def _apply(content: bytearray, write: Write) -> None:
    if write.data is None:
        del content[write.at :]
    else:
        content.extend(bytes(max(0, write.at - len(content))))
        content[write.at : write.at + len(write.data)] = write.data


def _torn(at: int, data: bytes, chance: random.Random) -> Iterable[Write]:
    """Yield the sectors of a write that reach the disk; what is not yielded stays as it was."""
    start = at
    while start < at + len(data):
        end = min(at + len(data), (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        outcome = chance.choice(("new", "new", "old", "garbage"))
        if outcome == "new":
            yield Write(start, data[start - at : end - at])
        elif outcome == "garbage":
            yield Write(start, chance.randbytes(end - start) if chance.random() < 0.5 else bytes(end - start))
        start = end


class Disk:
    """The state that a beginning of the notebook leads to.

    Args:
        is_honest: Whether a sync does anything; some disks lie.
    """

    def __init__(self, *, is_honest: bool = True) -> None:
        self._is_honest = is_honest
        self._files: dict[int, File] = {}
        self._names: dict[str, list[int | None]] = {}
        """The states of each name since its directory was synced, the durable one first; None is absence."""

    def write(self, number: int, at: int, data: bytes | None) -> None:
        """Write to a file, or truncate it."""
        self._files[number].waiting.append(Write(at, data))

    def sync(self, number: int) -> None:
        """Sync a file."""
        if self._is_honest:
            self._files[number].sync()

    def name(self, name: str, number: int | None) -> None:
        """Let a name mean a file, which may be new, a directory, or nothing."""
        self._names.setdefault(name, [None]).append(number)
        if number:
            self._files.setdefault(number, File())

    def sync_directory(self, directory: str) -> None:
        """Sync a directory."""
        for name, states in self._names.items() if self._is_honest else ():
            if str(PurePosixPath(name).parent) == directory:
                del states[:-1]

    def image(self, fate: Fate, chance: random.Random) -> dict[str, bytes]:
        """Return the files that a cut now may leave, by name."""
        there = {name: _state(states, fate, chance) for name, states in self._names.items()}
        return {
            name: self._files[number].image(fate, chance)
            for name, number in there.items()
            if number and all(there[str(parent)] == DIRECTORY for parent in list(PurePosixPath(name).parents)[:-1])
        }


def _state(states: list[int | None], fate: Fate, chance: random.Random) -> int | None:
    if fate is Fate.LOST:
        return states[0]
    return chance.choice(states) if fate is Fate.MIXED else states[-1]


Operation = tuple[Callable[..., None], tuple[Any, ...]]
"""A method of `Disk`, and its arguments."""

_NUMBERS = count(1)
"""Of every recording in the process, since SQLite knows them by name."""

_NOTED = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL


class RecordingVFS(apsw.VFS):
    """SQLite's own VFS with a notebook. The shared memory of a log is volatile by nature, and not noted.

    Args:
        root: A directory that is durable, above all that is written.
    """

    def __init__(self, root: Path) -> None:
        self.identity = f"recording-{next(_NUMBERS)}"
        """By which SQLite finds it."""
        self.operations: list[Operation] = []
        self._root = root
        self._numbers: dict[str, int] = {}
        self._next = count(1)
        super().__init__(self.identity, "")

    def note(self, operation: Callable[..., None], *arguments: Any) -> None:
        """Note an operation."""
        self.operations.append((operation, arguments))

    def name_of(self, path: str | Path) -> str:
        """Return a path as `Disk` has it: below the root."""
        return Path(path).relative_to(self._root).as_posix()

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - SQLite's
        """Open a file, and note its creation."""
        if name is None or not flags[0] & _NOTED:
            return super().xOpen(name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        opened = _RecordingFile(self, name, path, flags)
        opened.number = self._note_name(Path(path))
        return opened

    def _note_name(self, path: Path) -> int:
        """Note that a name is there, and those of the directories above it, where they are new."""
        if path == self._root:
            return DIRECTORY
        name = self.name_of(path)
        if name not in self._numbers:
            self._note_name(path.parent)
            self._numbers[name] = DIRECTORY if path.is_dir() else next(self._next)
            self.note(Disk.name, name, self._numbers[name])
        return self._numbers[name]

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802 - SQLite's
        """Delete a file, and note it."""
        super().xDelete(filename, syncdir)
        known = self.name_of(filename)
        del self._numbers[known]
        self.note(Disk.name, known, None)
        if syncdir:
            self.note_directory_sync(Path(filename).parent)

    def note_directory_sync(self, directory: Path) -> None:
        """Note that a directory was synced, with whatever has come to be in it."""
        for path in directory.iterdir():
            if not path.name.endswith("-shm"):
                self._note_name(path)
        self.note(Disk.sync_directory, self.name_of(directory))

    def fsync(self, descriptor: int) -> None:
        """Stand in for `os.fsync`, which the relay uses on directories."""
        self.note_directory_sync(Path(f"/proc/self/fd/{descriptor}").readlink())


class _RecordingFile(apsw.VFSFile):
    def __init__(self, vfs: RecordingVFS, name: str | apsw.URIFilename, path: str, flags: list[int]) -> None:
        self.number = DIRECTORY
        self._vfs = vfs
        self._path = path
        creates = flags[0] & apsw.SQLITE_OPEN_CREATE
        self._syncs_directory = bool(creates and flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL))
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - SQLite's
        self._vfs.note(Disk.write, self.number, offset, bytes(data))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802 - SQLite's
        self._vfs.note(Disk.write, self.number, newsize, None)
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's
        """Note it; nothing here is meant to outlive the machine."""
        self._vfs.note(Disk.sync, self.number)
        if self._syncs_directory:
            self._syncs_directory = False
            self._vfs.note_directory_sync(Path(self._path).parent)
