"""When the spool forgets what it no longer holds: the rounds of `Retention`'s steps, and what clock they go by.

Rules:
1. Each step is a commit's, and others' steps share that; so however much is to be forgotten, nobody waits for long.
2. Nothing is forgotten for its age while the wall clock cannot tell that. With its marks a session that still sends
   would lose its numbers: they would be given out once more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any

import trio

from relay.config import Spool as SpoolSettings
from relay.spool.retention import Retention

ATTEMPT_SECONDS = 120.0
"""Attempts are remembered for two of upstream's windows."""

_PRUNE_STEPS = 20
"""Steps of forgetting in a round, which is one a second: 10 000 marks, as many as full load makes in that time."""

_LEAP_SECONDS = 60.0
"""By more than this a wall clock does not run ahead, but was put forward: at the first word of a time server, or after
the machine has slept. What was accepted before then looks older than it is."""


class Forgetting:
    """The rounds.

    Concurrency: trio's thread.

    Args:
        retention: Whose steps they are.
        settings: How long, and how many.
        now: The wall clock.
        step: Has a step committed, and returns its result.
    """

    def __init__(
        self,
        retention: Retention,
        settings: SpoolSettings,
        now: Callable[[], float],
        step: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._retention = retention
        self._settings = settings
        self._now = now
        self._step = step
        self._clock_lead = inf
        """Of the wall clock before the monotonic one, when it was last looked at."""
        self._no_age_before = -inf
        """Until then (monotonic) nothing is forgotten for its age."""
        self.marks_forgotten = 0
        """Since the start."""

    async def forget_attempts(self) -> None:
        """Forget the sends that no budget counts any more."""
        await self._step(partial(self._retention.forget_attempts, self._now() - ATTEMPT_SECONDS))

    async def forget_marks(self) -> None:
        """Forget what client batches are too old, or too many, to be recognised."""
        before = self._oldest_to_keep()
        for _ in range(_PRUNE_STEPS):
            self.marks_forgotten += await self._step(
                partial(self._retention.prune, before, self._settings.dedupe_max_marks)
            )
            if not self._retention.is_behind:
                break

    def _oldest_to_keep(self) -> float:
        """Return from when on (wall clock) what was accepted is remembered; -inf while that cannot be told (rule 2)."""
        now, wall, keeps_seconds = trio.current_time(), self._now(), self._settings.dedupe_seconds
        lead = wall - now
        if lead > self._clock_lead + _LEAP_SECONDS:
            self._no_age_before = now + keeps_seconds
        self._clock_lead = lead
        return -inf if now < self._no_age_before else wall - keeps_seconds
