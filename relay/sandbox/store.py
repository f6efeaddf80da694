"""What the sandbox holds: every stored batch as counts and digests, never its content.

Rules:
1. A batch is stored once per `(session.id, sequence)`. All keys belong to one organisation.
2. A repeat changes nothing. If it says something else than what is stored, that is a conflict: upstream is
   assumed to drop it silently, so whatever it said is lost.
3. Memory is 8 bytes an event and some hundred bytes a batch.
"""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DIGEST_BYTES = 8
"""Of an event's digest: among a million events a false match has a chance of 3 in 10**8."""


def event_digest(event: bytes) -> bytes:
    """Return the digest of an event's exact bytes."""
    return hashlib.blake2b(event, digest_size=DIGEST_BYTES).digest()


def envelope_digest(batch: Mapping[str, Any]) -> bytes:
    """Return the digest of everything in a batch but events, sequence, flush and lastActivityAt.

    Members may come in any order and with any white space; unknown members count.
    """
    envelope = {
        **{name: value for name, value in batch.items() if name != "flush"},
        "session": _without(batch["session"], "lastActivityAt"),
        "replay": _without(batch["replay"], "events", "sequence"),
    }
    # ASCII, because a lone surrogate has an escape but no UTF-8.
    canonical = json.dumps(envelope, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=DIGEST_BYTES).digest()


def _without(value: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: member for name, member in value.items() if name not in names}


class StoredBatch(msgspec.Struct, frozen=True):
    """One batch as it is remembered."""

    sequence: int
    """`replay.sequence`."""
    window_id: str
    """`session.windowId`."""
    flush: str
    """`normal` or `final`."""
    decoded_bytes: int
    """Length of the body, uncompressed."""
    envelope: bytes
    """`envelope_digest` of the batch."""
    digests: bytes
    """`event_digest` of each event, in order, concatenated."""
    at_seconds: float = 0.0
    """When it was stored, since the sandbox's start."""

    @property
    def event_count(self) -> int:
        """Events in the batch."""
        return len(self.digests) // DIGEST_BYTES

    def event_digests(self) -> Iterator[bytes]:
        """Yield each event's digest, in order."""
        for start in range(0, len(self.digests), DIGEST_BYTES):
            yield self.digests[start : start + DIGEST_BYTES]

    def says_the_same(self, other: StoredBatch) -> bool:
        """Tell whether nothing is lost if only one of the two is kept."""
        return (self.window_id, self.flush, self.envelope, self.digests) == (
            other.window_id,
            other.flush,
            other.envelope,
            other.digests,
        )


class Outcome(Enum):
    """What became of an accepted batch. All three are answered 200."""

    STORED = "stored"
    """New."""
    REPEATED = "repeated"
    """Already there, saying the same."""
    CONFLICTING = "conflicting"
    """Its number was taken by a batch that says something else; dropped."""


class Session(msgspec.Struct):
    """The batches of one session."""

    id: str
    """`session.id`."""
    batches: dict[int, tuple[int, StoredBatch]] = msgspec.field(default_factory=dict)
    """By sequence: the arrival number (1 is the sandbox's first stored batch) and the batch."""
    is_final: bool = False
    """A final batch was stored."""
    event_count: int = 0
    """Events of all its batches."""

    def summary(self) -> dict[str, Any]:
        """Return what `GET /sandbox/sessions` says of it."""
        return {
            "id": self.id,
            "windows": len({batch.window_id for _, batch in self.batches.values()}),
            "batches": len(self.batches),
            "events": self.event_count,
            "bytes": sum(batch.decoded_bytes for _, batch in self.batches.values()),
            "final": self.is_final,
        }

    def listing(self) -> dict[str, Any]:
        """Return the summary with all batches in sequence order under `stored`, digests in hexadecimal."""
        return {
            **self.summary(),
            "stored": [
                {
                    "sequence": batch.sequence,
                    "window_id": batch.window_id,
                    "flush": batch.flush,
                    "events": batch.event_count,
                    "bytes": batch.decoded_bytes,
                    "order": order,
                    "at_seconds": round(batch.at_seconds, 3),
                    "envelope": batch.envelope.hex(),
                    "digests": [digest.hex() for digest in batch.event_digests()],
                }
                for _, (order, batch) in sorted(self.batches.items())
            ],
        }


class Store:
    """All sessions."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        """By id, oldest first."""
        self._stored = 0

    def is_final(self, session_id: str) -> bool:
        """Tell whether a final batch of the session was stored."""
        session = self.sessions.get(session_id)
        return session is not None and session.is_final

    def has(self, session_id: str, sequence: int) -> bool:
        """Tell whether a batch of that number is stored."""
        session = self.sessions.get(session_id)
        return session is not None and sequence in session.batches

    def add(self, session_id: str, batch: StoredBatch) -> Outcome:
        """Store a batch unless its number is taken."""
        session = self.sessions.setdefault(session_id, Session(session_id))
        known = session.batches.get(batch.sequence)
        if known is not None:
            return Outcome.REPEATED if known[1].says_the_same(batch) else Outcome.CONFLICTING
        self._stored += 1
        session.batches[batch.sequence] = (self._stored, batch)
        session.event_count += batch.event_count
        session.is_final = session.is_final or batch.flush == "final"
        return Outcome.STORED
