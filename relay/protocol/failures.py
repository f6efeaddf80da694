"""Failures: which batches have failed, and which of them are stuck.

A batch that upstream stumbles over (a 500 for something in it, a timeout for its size) fails as every batch does in an
outage. What tells them apart is what became of others meanwhile: a batch that fails again although upstream took
others since its last failure is told as such, and after some of these it is stuck. It is not given up, since upstream
may be mended, but it is no evidence of an outage any more, and has to stand back (`schedule.py`, 9).
"""

from __future__ import annotations

_STUCK_FAILURES = 3
"""Failures with a success of others before each. Of the batches of an upstream that fails every tenth request at
random, one in ten thousand comes to that."""


class _Failing:
    __slots__ = ("failures", "others_taken", "taken")

    def __init__(self, taken: int) -> None:
        self.failures = 0
        self.others_taken = 0
        """Failures before which others were taken, since the failure before."""
        self.taken = taken
        """What upstream had taken at the last failure."""


class Failures:
    """The failing batches of one upstream key; those that were never refused take no room."""

    def __init__(self) -> None:
        self._batches: dict[int, _Failing] = {}
        self._taken = 0

    @property
    def stuck(self) -> int:
        """Batches that are stuck."""
        return sum(map(self._is_stuck, self._batches.values()))

    def is_stuck(self, batch_id: int) -> bool:
        """Return whether the batch has failed again and again while upstream took others."""
        failing = self._batches.get(batch_id)
        return failing is not None and self._is_stuck(failing)

    def note_taken(self) -> None:
        """Note that upstream took a batch, or refused one for what is in it: it is at work."""
        self._taken += 1

    def note_failure(self, batch_id: int, *, is_of_key: bool) -> int:
        """Note that an attempt failed, and return how many have in a row.

        Args:
            batch_id: The batch that was sent.
            is_of_key: Whether the answer was on the key or its rate; that says nothing of the batch.
        """
        failing = self._batches.get(batch_id)
        if failing is None:
            failing = self._batches[batch_id] = _Failing(self._taken)
        failing.failures += 1
        failing.others_taken += not is_of_key and failing.taken < self._taken
        failing.taken = self._taken
        return failing.failures

    def forget(self, batch_id: int) -> None:
        """Note that nothing of the batch is left to send."""
        self._batches.pop(batch_id, None)

    def _is_stuck(self, failing: _Failing) -> bool:
        return failing.others_taken >= _STUCK_FAILURES
