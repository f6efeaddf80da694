"""Time and chance, as a lane has them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Clocks(msgspec.Struct, frozen=True):
    """Time and chance, which tests replace."""

    monotonic: Callable[[], float]
    """Seconds; for deadlines and intervals."""
    wall: Callable[[], float]
    """Seconds since the epoch; for what is compared across restarts."""
    uniform: Callable[[], float]
    """A random number in [0, 1), for jitter."""

    def from_wall(self, at: float) -> float:
        """Return a past wall-clock time on the monotonic clock; never in the future, whatever the wall clock did."""
        now = self.monotonic()
        return min(now, now - (self.wall() - at))
