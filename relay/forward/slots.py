"""Slots: how many deliveries may be under way over all lanes.

Without an adaptive limit there are as many as memory allows. With one there are as many as upstream is good for, which
changes; then nobody who has a slot loses it, and whoever asks for one waits until there are fewer than that.

Slots are given in the order in which they were asked for, so that lanes get them in turn.

For what may hang, since it did so before, there are some more (`EXTRA_SHARE`): others must not wait for it.
"""

from __future__ import annotations

import trio

from relay.protocol.concurrency import ConcurrencyLimit

EXTRA_SHARE = 0.125
"""Of all slots, at least one: how many extra ones there are."""


class Slots:
    """The bound, and those who wait.

    Args:
        max_slots: There are never more; at least 1.
        is_adaptive: Whether upstream's latency may lower that.
    """

    def __init__(self, max_slots: int, *, is_adaptive: bool) -> None:
        self._max = max_slots
        self._adaptive = ConcurrencyLimit(max_slots) if is_adaptive else None
        self._taken = 0
        self._extra = max(1, int(max_slots * EXTRA_SHARE))
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def limit(self) -> int:
        """Slots there are now."""
        return self._adaptive.limit if self._adaptive else self._max

    async def acquire(self) -> None:
        """Take a slot, as soon as there is one.

        Cancellation: no slot is taken.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._waiting or self._taken >= self.limit:
            await self._waiting.park()  # whoever wakes us has taken it for us
        else:
            self._taken += 1
            await trio.lowlevel.cancel_shielded_checkpoint()

    def release(self) -> None:
        """Give a slot back."""
        self._taken -= 1
        self._give()

    def exchange_for_extra(self) -> bool:
        """Give a slot back and take an extra one; False where there is none, and nothing is changed."""
        if not self._extra:
            return False
        self._extra -= 1
        self.release()
        return True

    def release_extra(self) -> None:
        """Give an extra slot back."""
        self._extra += 1

    def begin(self) -> int:
        """Note that a request begins; returns what `end` wants to know."""
        return self._adaptive.begin() if self._adaptive else 0

    def end(self, began_in: int, latency_seconds: float, *, is_ok: bool | None) -> None:
        """Note that a request is over; as `ConcurrencyLimit.end`."""
        if self._adaptive:
            self._adaptive.end(began_in, latency_seconds, is_ok=is_ok)
            self._give()

    def _give(self) -> None:
        while self._waiting and self._taken < self.limit:
            self._taken += 1
            self._waiting.unpark()
