"""What a key may really spend, learned from upstream's answers, where no limit is given.

Published is 100 requests a minute; a better tier or a self-hosted ingest allows more, a trial or a key that others use
too allows less. Two things are evidence: a full window taken without a refusal says that the limit is no lower, and a
refusal says that it is no higher than what was taken in the window before it.

1. Lower: at a refusal, to what upstream took in the last window; by 5% at least, by three quarters at most, since a
   refusal may have other causes. A raise that is refused falls back to the limit before it, which was proven, rather
   than to a count that may be one short. Refusals of what had begun before that are of the same occasion: they only
   make the count exact. A refusal with nothing taken says nothing of a rate; waiting as it asks is all there is to do.
2. Raise: while something waits for a slot, and a full window at the present limit was taken. As long as nothing was
   ever refused, by half; after a refusal, by 5%, and twice that each time it goes well.
3. Remember: after a refusal nothing is tried for 5 windows; twice as long after each raise that was refused, up to an
   hour. So against a fixed limit the refusals become rare instead of the limit swinging.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Literal

from relay.protocol.budget import WINDOW_SECONDS, Budget

INITIAL_LIMIT = 100
"""Upstream's published limit."""

MAX_LIMIT = 6_000
"""A hundred a second, 60 times the published limit. What allows more needs no budget: that is `0`, unlimited."""

_PROOF_SHARE = 0.9
"""Of the limit, what a window must have taken to prove it: pacing and latency cost up to 3%, jitter some more."""

_RAISE_SHARE = 0.05
"""Of the limit, the first raise after a refusal: what it costs if refused is a handful of requests."""

_LOWER_SHARE = 0.95
"""Of the limit, what is left at most after a refusal, though the window took more: somebody else uses the key too."""

_FLOOR_SHARE = 0.25
"""Of the limit, what is left at least: one odd answer must not close a lane."""

_PATIENCE_WINDOWS = 5
"""Without a raise after a refusal: so even the first raises that fail cost less than a request in a hundred."""

_MAX_PATIENCE_WINDOWS = 60
"""An hour: so long may a limit that was raised go unnoticed, and a refused raise an hour is no burden to upstream."""

_MEMORY_SECONDS = 3_600.0
"""How long what was learned matters after it last changed; then a key that is not used may be forgotten."""


class LearnedLimit:
    """The limit of one upstream key.

    Args:
        limit: Requests a window to begin with.
    """

    def __init__(self, limit: int = INITIAL_LIMIT) -> None:
        self._limit = limit
        self._floor = 1
        """Of the present occasion of refusals."""
        self._taken: deque[float] = deque()
        """Beginnings of the requests that upstream took, in no strict order."""
        self._raise_by = limit // 2
        self._raise_at = -inf
        self._patience = _PATIENCE_WINDOWS
        self._is_raised = False
        """Whether the last change was a raise."""
        self._proven = 1
        """The limit before that."""
        self._lowered_at = -inf
        self._changed_at = -inf

    @property
    def limit(self) -> int:
        """Requests a window, at least 1."""
        return self._limit

    def is_worth_keeping(self, now: float) -> bool:
        """Return whether something was learned that is not old."""
        return now < self._changed_at + _MEMORY_SECONDS

    def note_taken(self, began_at: float) -> None:
        """Note that upstream took a request."""
        self._taken_since(began_at - WINDOW_SECONDS)  # what is older is forgotten here, so the number is bounded
        self._taken.append(began_at)

    def note_refused(self, began_at: float, now: float, in_flight: int) -> None:
        """Note that upstream answered 429, and lower the limit if that was due to it.

        Args:
            began_at: When the request began.
            now: When it was answered.
            in_flight: Other requests under way; upstream may have counted them.
        """
        taken = self._taken_since(now - WINDOW_SECONDS)
        if not taken:
            return
        evidence = taken + in_flight
        if began_at >= self._lowered_at:  # a new occasion
            self._floor = max(1, round(self._limit * _FLOOR_SHARE))
            if not self._is_raised:
                evidence = min(evidence, int(self._limit * _LOWER_SHARE))
            else:
                self._patience = min(2 * self._patience, _MAX_PATIENCE_WINDOWS)
                if evidence >= self._proven * _PROOF_SHARE:
                    self._floor = self._proven
                evidence = min(evidence, self._limit - 1)
            self._is_raised = False
            self._lowered_at = now
        self._change(min(self._limit, max(self._floor, evidence)), now)
        self._raise_by = max(1, round(self._limit * _RAISE_SHARE))
        self._raise_at = now + self._patience * WINDOW_SECONDS

    def note_waiting(self, now: float) -> None:
        """Note that something waits for a slot and for nothing else, and raise the limit if upstream may allow more."""
        if now < self._raise_at or self._limit >= MAX_LIMIT:
            return
        if self._taken_since(now - WINDOW_SECONDS) < self._limit * _PROOF_SHARE:
            return
        if self._is_raised:
            self._patience = _PATIENCE_WINDOWS
        self._proven = self._limit
        self._change(min(MAX_LIMIT, self._limit + self._raise_by), now)
        self._is_raised = True
        self._raise_by = min(2 * self._raise_by, self._limit // 2)
        self._raise_at = now + WINDOW_SECONDS

    def _change(self, limit: int, now: float) -> None:
        self._limit = limit
        self._changed_at = now

    def _taken_since(self, at: float) -> int:
        while self._taken and self._taken[0] <= at:
            self._taken.popleft()
        return len(self._taken)


class LearnedBudget(Budget):
    """A budget whose limit is learned.

    Args:
        margin_seconds: As of any budget.
    """

    def __init__(self, margin_seconds: float) -> None:
        self._learned = LearnedLimit()
        super().__init__(self._learned.limit, margin_seconds)

    def is_forgettable(self, now: float) -> bool:
        """Return whether nothing of it matters any more."""
        return super().is_forgettable(now) and not self._learned.is_worth_keeping(now)

    def note_waiting(self, now: float) -> None:
        """Note that something waits for a slot and for nothing else."""
        self._learned.note_waiting(now)
        self.resize(self._learned.limit)

    def note_taken(self, began_at: float) -> None:
        """Note that upstream took a request."""
        self._learned.note_taken(began_at)

    def note_refused(self, began_at: float, now: float) -> None:
        """Note that upstream answered 429 to a request that is still under way."""
        self._learned.note_refused(began_at, now, self.in_flight - 1)
        self.resize(self._learned.limit)


def make_budget(limit: int | Literal["auto"], margin_seconds: float) -> Budget:
    """Return the budget of an upstream key, as `budget.requests_per_minute` has it."""
    return LearnedBudget(margin_seconds) if limit == "auto" else Budget(limit, margin_seconds)
