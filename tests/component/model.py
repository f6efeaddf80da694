"""What a model of the store knows of events, batches and marks."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from relay.protocol.cut import Limits
from tests.component.batches import read_upstream

LIMITS = Limits(max_events=7, max_bytes=1_500)
"""Small, so that a few events overflow a batch; an envelope takes about 250 bytes of it."""

OTHER_LIMITS = (Limits(5, 1_000), Limits(7, 8_000, 700), Limits(7, 1_100, 700))
"""Of other runs: lower ones, and such as measure the gzip body."""

Place: TypeAlias = tuple[str, str, str]
"""Key, session, window."""


class Known(msgspec.Struct):
    """An accepted event, as the model knows it."""

    text: bytes
    page: str
    user: str
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
    limits: Limits
    """Under which it was sealed."""


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


def assert_within(body: bytes, limits: Limits) -> None:
    """Assert that an upstream batch is within limits, or a single event."""
    sent = read_upstream(body)
    assert len(sent.events) <= limits.max_events
    is_small = sent.size <= limits.max_bytes and len(body) <= limits.max_gzip_bytes
    assert is_small or len(sent.events) == 1
