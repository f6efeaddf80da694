"""Exponential backoff with full jitter: after the n-th failure, any moment within base * 2**(n-1), capped.

Full jitter (uniform from zero) spreads the clients that an outage has synchronised better than any narrower band
does, at no cost in mean delay.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

_MAX_EXPONENT = 32
"""2**32 times any base is beyond any cap; keeps the power small."""


class Backoff(msgspec.Struct, frozen=True):
    """A policy; holds no state."""

    base_seconds: float
    """Ceiling of the first delay."""
    max_seconds: float
    """Ceiling of all delays."""

    def delay_seconds(self, failures: int, uniform: Callable[[], float]) -> float:
        """Return the delay after `failures` failures in a row (at least 1); `uniform` gives a number in [0, 1)."""
        ceiling = min(self.max_seconds, self.base_seconds * 2.0 ** min(failures - 1, _MAX_EXPONENT))
        return ceiling * uniform()
