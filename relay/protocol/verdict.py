"""What upstream's answer to a batch means.

One table, so that no status can fall between two rules: a status that is not named belongs to its class's row.
"""

from __future__ import annotations

from email.utils import mktime_tz, parsedate_tz
from enum import Enum


class Verdict(Enum):
    """What becomes of a batch after an attempt."""

    DELIVERED = "delivered"
    """Upstream has it."""
    RETRY = "retry"
    """No answer, or one that says try again: the same batch is sent again after a backoff."""
    LIMITED = "limited"
    """The key's limit is spent: as RETRY, and nothing of that key before Retry-After."""
    POISON = "poison"
    """Upstream calls the batch invalid; nothing of it was stored."""
    TOO_LARGE = "too_large"
    """Upstream calls the batch too large; nothing of it was stored."""
    HOLD = "hold"
    """Upstream refuses the key; its batches wait."""
    OUTAGE = "outage"
    """Something that is not the ingest API answered: as RETRY, and said loudly."""


STATUS_VERDICTS = {
    400: Verdict.POISON,
    401: Verdict.HOLD,
    403: Verdict.HOLD,
    408: Verdict.RETRY,
    413: Verdict.TOO_LARGE,
    422: Verdict.POISON,
    425: Verdict.RETRY,
    429: Verdict.LIMITED,
}
"""Statuses that differ from their class."""

CLASS_VERDICTS = {2: Verdict.DELIVERED, 3: Verdict.OUTAGE, 4: Verdict.OUTAGE, 5: Verdict.RETRY}
"""By the first digit. 1xx never ends an exchange, and is an outage if it seems to."""


def classify(status: int) -> Verdict:
    """Return the verdict on a batch that was answered with `status`."""
    return STATUS_VERDICTS.get(status) or CLASS_VERDICTS.get(status // 100, Verdict.OUTAGE)


def parse_retry_after(value: bytes, wall_now: float, max_seconds: float) -> float | None:
    """Return how many seconds a `Retry-After` header asks to wait (RFC 9110, 10.2.3).

    Args:
        value: Seconds, or an HTTP date.
        wall_now: Wall clock, to make a date relative.
        max_seconds: A longer wait is clamped to this.

    Returns:
        0 to `max_seconds`; None where the header is absent or cannot be read.
    """
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text)
    else:
        date = parsedate_tz(text)
        if date is None:
            return None
        try:
            seconds = mktime_tz(date) - wall_now
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), max_seconds)
