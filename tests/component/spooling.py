"""A spool on a real disk and a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from relay.config import Spool as SpoolSettings
from relay.protocol.cut import Limits
from relay.spool.spool import Run, Spool, open_spool
from tests.component.batches import LIMITS

EPOCH = 1_700_000_000.0
"""The wall clock at trio's zero."""


def wall_clock() -> float:
    """Return a wall clock that runs with trio's, so that it jumps with a mock clock."""
    return EPOCH + trio.current_time()


async def run_inline(call: Callable[[], Any]) -> Any:
    """Run a blocking call at once, where the real one would start a thread: virtual time waits for no thread."""
    await trio.lowlevel.checkpoint()
    return call()


class GatedRun:
    """Runs calls inline, but only while the gate is open; the disk that takes its time."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.began = 0

    async def __call__(self, call: Callable[[], Any]) -> Any:
        """Wait for the gate, then run; like a thread, not to be cancelled in between."""
        await trio.lowlevel.checkpoint()
        self.began += 1
        with trio.CancelScope(shield=True):
            await self.gate.wait()
        return call()


@asynccontextmanager
async def opened_spool(
    directory: Path,
    *,
    run: Run = run_inline,
    now: Callable[[], float] = wall_clock,
    limits: Limits = LIMITS,
    max_keys: int = 100,
    vfs: str | None = None,
    **settings: Any,
) -> AsyncIterator[Spool]:
    """Open a spool that leaves syncing to the operating system, and has no reserve, unless told otherwise."""
    values = SpoolSettings(directory=str(directory), **{"durability": "os", "reserve_bytes": 0, **settings})
    async with open_spool(values, limits, max_keys, now=now, run=run, vfs=vfs) as spool:
        yield spool
