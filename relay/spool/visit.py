"""The spool for the command line: read beside a running relay, or changed where none runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import apsw

from relay.config import Spool as SpoolSettings
from relay.errors import SpoolUnavailable
from relay.protocol.cut import Limits
from relay.spool import schema
from relay.spool.dead_letters import LETTERS_A_STEP
from relay.spool.store import Store
from relay.spool.transactions import DAMAGE
from relay.spool.values import Moved


@contextmanager
def reading(directory: str) -> Iterator[apsw.Connection]:
    """Give a connection that only reads; it delays no relay.

    Raises:
        SpoolUnavailable: There is no spool, or it cannot be read.
        SpoolSchemaMismatch: Another version wrote it.
    """
    path = _find(directory)
    try:
        connection = schema.open_reader(path)
        try:
            schema.check_version(connection, path)
            yield connection
        finally:
            connection.close()
    except apsw.Error as error:
        hint = "; `lucent-relay spool salvage` saves what can be" if isinstance(error, DAMAGE) else ""
        raise SpoolUnavailable(f"spool database {path} cannot be read: {error}{hint}") from error


def move_dead_letters(settings: SpoolSettings, action: Literal["resend", "purge"], ids: Sequence[int] | None) -> Moved:
    """Make dead letters pending again, or drop them, in a spool that no relay has open.

    Args:
        settings: The configuration's section.
        action: What to do.
        ids: To which; None for all.

    Raises:
        SpoolLocked: A relay has it open.
        SpoolUnavailable: There is no spool, or the disk refuses.
        SpoolSchemaMismatch: Another version wrote it.
    """
    path = _find(settings.directory)
    lock = schema.lock_directory(path.parent)
    try:
        store = Store(schema.open_database(path, settings.durability), Limits(1, 1), max_keys=1)  # it accepts nothing
        try:
            every = store.dead_letters.ids() if ids is None else ids
            letters = events = 0
            for first in range(0, len(every), LETTERS_A_STEP):
                step = store.dead_letters.resend if action == "resend" else store.dead_letters.purge
                [moved] = store.transact([partial(step, every[first : first + LETTERS_A_STEP])])
                if isinstance(moved, Exception):
                    raise moved
                letters, events = letters + moved.letters, events + moved.events
            return Moved(letters, events)
        finally:
            store.close()
    finally:
        os.close(lock)


def _find(directory: str) -> Path:
    path = Path(directory) / schema.DATABASE_NAME
    if not path.is_file():
        raise SpoolUnavailable(f"there is no spool in {directory} (spool.directory)")
    return path
