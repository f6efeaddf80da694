"""One request to upstream, and everybody who waits for its answer.

Rules:
1. Readers read at their own pace, from the first byte on. Up to `window_bytes` the answer is ahead of the slowest of
   them; further it does not go, and so neither does upstream: back-pressure.
2. Who joins late gets all of it, as long as none of it has been let go. After that nobody can join.
3. A flight nobody reads any more is cancelled, wherever it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import trio

from relay.errors import UpstreamError
from relay.protocol.fields import Fields


class Head(msgspec.Struct, frozen=True):
    """How an answer begins."""

    status: int
    """HTTP status code."""
    headers: Fields
    """End-to-end, without framing."""
    length: int | None
    """Of the body as upstream announced it; None where its end decides."""
    asked_status: int
    """What upstream answered: 304 where a kept answer was found to hold still, otherwise the same."""


class Busy(UpstreamError):
    """Too many requests are under way; this one was not sent."""


class Flight:
    """An answer on its way.

    Args:
        window_bytes: How far it may be ahead of its slowest reader.

    Attributes:
        scope: Of the task that fetches it.
        is_stored: It is kept, or will be once it is whole.
        is_current: Since it began nothing was changed through the relay that it might show as it was, and its token was
            not refused.
    """

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._pieces: deque[bytes] = deque()
        self._first = 0  # number of the first piece that is held
        self._held_bytes = 0
        self._head: Head | None = None
        self._failure: UpstreamError | None = None
        self._is_whole = False
        self._readers: set[FlightReader] = set()
        self._news = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self.scope = trio.CancelScope()
        self.is_stored = False
        self.is_current = True

    # -- for readers

    @property
    def is_open(self) -> bool:
        """Whether another reader would get all of it."""
        return self._first == 0 and self._failure is None and not self.scope.cancel_called

    @contextmanager
    def join(self) -> Iterator[FlightReader]:
        """Read it, while the block lasts."""
        reader = FlightReader(self)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            self._room.unpark_all()
            if not self._readers:
                self.scope.cancel()

    async def head(self) -> Head:
        """Return how the answer begins, once it does.

        Raises:
            UpstreamError: It does not.
        """
        while self._head is None:
            if self._failure is not None:
                raise self._failure
            await self._news.park()
        return self._head

    async def piece(self, number: int) -> bytes:
        """Return a piece of the body, empty behind the last.

        Raises:
            UpstreamError: The answer broke off.
        """
        while number >= self._first + len(self._pieces):
            if self._is_whole:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._news.park()
        piece = self._pieces[number - self._first]
        self._room.unpark_all()
        return piece

    # -- for the task that fetches it

    def begin(self, head: Head) -> None:
        """Say how the answer begins."""
        self._head = head
        self._news.unpark_all()

    async def put(self, piece: bytes) -> None:
        """Take a piece; returns when there is room for the next."""
        self._pieces.append(piece)
        self._held_bytes += len(piece)
        self._news.unpark_all()
        while self._held_bytes > self._window_bytes:
            passed = min((reader.number for reader in self._readers), default=self._first)
            while self._first < passed and self._held_bytes > self._window_bytes:
                self._held_bytes -= len(self._pieces.popleft())
                self._first += 1
            if self._held_bytes > self._window_bytes:
                await self._room.park()

    def whole_body(self) -> bytes | None:
        """Return the body that has come so far; None where some of it was let go."""
        return b"".join(self._pieces) if self._first == 0 else None

    async def finish(self) -> None:
        """Say that the answer is complete, and wait until everybody has read it."""
        self._is_whole = True
        self._news.unpark_all()
        while self._readers:
            await self._room.park()

    def fail(self, failure: UpstreamError) -> None:
        """Say that there is no answer, or no more of it."""
        self._failure = failure
        self._news.unpark_all()


class FlightReader:
    """One reader of a flight.

    Attributes:
        number: Of the piece it reads next; those before it are done with.
    """

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self.number = 0

    async def head(self) -> Head:
        """As `Flight.head`."""
        return await self._flight.head()

    async def receive(self) -> bytes:
        """Return the next piece of the body, empty at its end.

        Raises:
            UpstreamError: The answer broke off.
        """
        piece = await self._flight.piece(self.number)
        self.number += bool(piece)
        return piece
