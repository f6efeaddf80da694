"""The rate limit of one key: an exact sliding window.

Rules:
1. A request at `now` is counted if fewer than the limit were counted in (now - 60 s, now].
2. A refused request is not counted: it costs the client nothing but the answer.
3. Memory is one number per request counted in the last minute.
"""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 60.0
"""The published limit is per minute."""


class RequestWindow:
    """Counts the requests of one key. Time must not run backwards."""

    def __init__(self, requests_per_minute: int) -> None:
        self.counted = 0
        """Requests counted since the beginning."""
        self.peak = 0
        """Most requests counted within any one minute."""
        self._limit = requests_per_minute
        self._counted_at: deque[float] = deque()

    @property
    def recent(self) -> int:
        """Requests counted in the minute before the last one."""
        return len(self._counted_at)

    def resets_in(self, now: float) -> float:
        """Return the seconds until the oldest of them counts no more; a minute where there is none."""
        return self._counted_at[0] + WINDOW_SECONDS - now if self._counted_at else WINDOW_SECONDS

    def admit(self, now: float) -> float:
        """Count a request.

        Returns:
            0.0 where the request was counted; else the seconds until one would be.
        """
        recent = self._counted_at
        while recent and recent[0] + WINDOW_SECONDS <= now:
            recent.popleft()
        if self._limit and len(recent) >= self._limit:
            return recent[0] + WINDOW_SECONDS - now
        recent.append(now)
        self.counted += 1
        self.peak = max(self.peak, len(recent))
        return 0.0
