"""What a model of the store knows of events, batches and marks."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

Place: TypeAlias = tuple[str, str, str]
"""Key, session, window."""


class Known(msgspec.Struct):
    """An accepted event, as the model knows it."""

    text: bytes
    page: str
    last_activity: int
    of_final: bool
    """Whether its client batch ends the session."""
    ends_session: bool
    """Whether it is the last event of that batch."""


class Sent(msgspec.Struct):
    """A sealed batch, as the model knows it."""

    place: Place
    addresses: list[int]
    events: list[Known]
    body: bytes


class Mark(msgspec.Struct):
    """A client batch that the store has to remember, as the model knows it."""

    window: str
    sequence: int
    block: int
    first: int
    count: int
    at: float


class Crash(BaseException):
    """Ends a group without the store being able to do anything about it."""
