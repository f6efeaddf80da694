"""Where the relay refuses what upstream takes: the table of relay/README.md, each row with a body that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from relay.errors import InvalidBatch, RefusedBatch, TooLarge
from relay.protocol.schema import MAX_BATCH_EVENTS, MAX_SEQUENCE
from tests.unit.batches import changed, encode, spelled

MAX_ENVELOPE_BYTES = 262_144
"""The default of `intake.max_envelope_bytes`."""

_DEPTH = 1_000_000
"""Deeper than any Python's stack, whatever it counts as a level."""


class Refusal(NamedTuple):
    """One thing that the relay refuses and upstream does not."""

    what: str
    """As it stands in the manual."""
    refusal: type[RefusedBatch]
    """How it is refused."""
    because: str
    """As it stands in the manual."""
    body: Callable[[], bytes]
    """The least of its kind."""


EXCEPTIONS = [
    Refusal(
        "a `replay.sequence` above 2^39 - 1",
        InvalidBatch,
        "An event's address, 16 384 times as large, has to be a safe integer.",
        lambda: encode(changed("replay.sequence", MAX_SEQUENCE + 1)),
    ),
    Refusal(
        "values nested deeper than 10 000 levels",
        InvalidBatch,
        "The parser's stack has a bound. A page's elements are nested in tens of levels, seldom in hundreds.",
        lambda: spelled("replay.events.0.data", b"[" * _DEPTH + b"]" * _DEPTH),
    ),
    Refusal(
        "more than 16 384 events in a batch",
        TooLarge,
        "An address has 14 bits for an event's place in its batch.",
        lambda: encode(changed("replay.events", [{"timestamp": 1, "type": 3, "data": 0}] * (MAX_BATCH_EVENTS + 1))),
    ),
    Refusal(
        "`session`, `user`, `page` and `metadata` of more than `intake.max_envelope_bytes`",
        TooLarge,
        "They travel with every upstream batch and have to leave room for events.",
        lambda: encode(changed("user.properties", {"a": "a" * MAX_ENVELOPE_BYTES})),
    ),
]
