"""The clocks: the one place where wall-clock time is read.

Deadlines and intervals use the monotonic clock (`trio.current_time`, so tests can run on virtual time). The wall
clock is for what must be compared across restarts (`accepted_at`, the budget's recent sends) and for people.
"""

from __future__ import annotations

import time


def wall_clock() -> float:
    """Return seconds since the Unix epoch. May jump; never used for deadlines."""
    return time.time()  # noqa: TID251 - this is the one place
