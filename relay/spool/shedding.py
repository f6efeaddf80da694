"""When sessions are shed: as soon as a commit leaves a cap near, one after the other, until there is room."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from relay.errors import SpoolDamaged, SpoolUnavailable
from relay.spool.values import Shed

_ROUND_SECONDS = 1.0
"""What a round has dropped is one line in the log, and the order in which sessions go is no older."""

_OLDEST_SESSIONS = 100
"""Looked up at a time, since that looks at every segment."""

log = structlog.get_logger()


class Shedding:
    """Drops the oldest sessions of a spool (`overflow.py`).

    Args:
        is_tight: Whether sessions have to go.
        find: Returns so many sessions, those that go first at the head.
        drop: Sheds a session; None where it has to stay.
    """

    def __init__(
        self,
        is_tight: Callable[[], bool],
        find: Callable[[int], Awaitable[list[int]]],
        drop: Callable[[int], Awaitable[Shed | None]],
    ) -> None:
        self._is_tight = is_tight
        self._find = find
        self._drop = drop
        self._tightened = trio.Event()
        self._damaged: set[int] = set()
        """Sessions that lie on damaged pages, so that they cannot be dropped either."""

    def note_commit(self) -> None:
        """Take notice of what a commit has done to the room."""
        if self._is_tight():
            self._tightened.set()

    async def run(self) -> None:
        """Shed whenever it is necessary, until cancelled."""
        while True:
            await self._tightened.wait()
            try:
                await self._run_round(trio.current_time() + _ROUND_SECONDS)
            except SpoolUnavailable:
                await trio.sleep(_ROUND_SECONDS)  # logged where the commit failed

    async def _run_round(self, ends_at: float) -> None:
        sessions = events = 0
        oldest: list[int] = []
        try:
            while trio.current_time() < ends_at:
                if not self._is_tight():
                    self._tightened = trio.Event()
                    with trio.move_on_at(ends_at):
                        await self._tightened.wait()
                    continue
                if not oldest:
                    found = await self._find(_OLDEST_SESSIONS + len(self._damaged))
                    oldest = [session_id for session_id in found if session_id not in self._damaged]
                if not oldest:  # whatever there is may be upstream already
                    await trio.sleep_until(ends_at)
                    return
                session_id = oldest.pop(0)
                try:
                    shed = await self._drop(session_id)
                except SpoolDamaged:
                    self._damaged.add(session_id)
                    continue
                if shed is not None:
                    sessions, events = sessions + 1, events + shed.events
        finally:
            if sessions:
                log.error("sessions shed, there is no room for them", sessions=sessions, events=events)
