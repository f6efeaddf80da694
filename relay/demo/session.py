"""The recorded sessions, re-cut into the small batches that a chatty client would have sent.

Rules:
1. Re-cutting keeps every event, its bytes, its order, its window and its envelope. Batches get new sequences, by
   session in order, and only the last piece of a batch that was final is final.
2. Nothing of the relay's own parsing is used, so that what checks the relay does not share its mistakes.

Sending is `relay.demo.player`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

import msgspec

from relay.protocol.codings import zstd_decompress
from relay.sandbox.body import parse_json, split_events
from relay.sandbox.store import envelope_digest, event_digest

MAX_EVENTS = 20
"""Of one small batch: what a busy page records in a second. The recordings have 4 to 30 events a second."""

MAX_BYTES = 65_536
"""Of a small batch's events; a larger one, such as a snapshot, travels alone. The Fetch standard's limit of what a
page may send with `keepalive`."""


class SmallBatch(msgspec.Struct, frozen=True):
    """One client batch of the demo, in no session yet."""

    envelope: dict[str, Any]
    """The recorded batch without its events, sequence and flush."""
    events: tuple[bytes, ...]
    """Exact bytes, in order; at least one."""
    is_final: bool
    """Whether it ends its session."""
    due_seconds: float
    """When it was recorded whole, from the session's first event on; never falls within a session."""

    @property
    def window_id(self) -> str:
        """`session.windowId`."""
        window_id: str = self.envelope["session"]["windowId"]
        return window_id


class Recording(msgspec.Struct, frozen=True):
    """One recorded session, re-cut."""

    session_id: str
    """As recorded."""
    recorded_batches: int
    """Batches in which the SDK sent it, one every 10 s."""
    batches: tuple[SmallBatch, ...]
    """In order; the index is the sequence."""

    @property
    def event_count(self) -> int:
        """Events of all its batches."""
        return sum(len(batch.events) for batch in self.batches)


def load_recordings() -> list[Recording]:
    """Return the recordings that come with the package, by name."""
    folder = resources.files("relay") / "demo" / "recordings"
    entries = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".jsonl.zst")), key=lambda e: e.name)
    return [recut(zstd_decompress(entry.read_bytes()).splitlines()) for entry in entries]


def recut(lines: Iterable[bytes]) -> Recording:
    """Re-cut a recorded session.

    Args:
        lines: Its ReplayBatches as JSON, in order; at least one.
    """
    recorded = 0
    session_id = ""
    started_at: float | None = None
    latest_at = 0.0
    batches = []
    for line in lines:
        recorded += 1
        value = parse_json(line)
        events = split_events(line)
        timestamps = [event["timestamp"] for event in value["replay"]["events"]]
        session_id = value["session"]["id"]
        if started_at is None:
            started_at = latest_at = timestamps[0]
        envelope = _without_events(value)
        for start, end in _cuts([len(event) for event in events]):
            # Windows overlap in time; what a session sends next is never due before what it sent last.
            latest_at = max(latest_at, *timestamps[start:end])
            is_final = value.get("flush") == "final" and end == len(events)
            batches.append(SmallBatch(envelope, tuple(events[start:end]), is_final, (latest_at - started_at) / 1000))
    return Recording(session_id, recorded, tuple(batches))


def encode_batch(batch: SmallBatch, session_id: str, sequence: int) -> bytes:
    """Return a ReplayBatch as JSON, with the events' bytes as they are."""
    value = _in_session(batch.envelope, session_id)
    replay = {**value.pop("replay"), "sequence": sequence, "events": []}
    flush = "final" if batch.is_final else "normal"
    # ASCII, because a lone surrogate has an escape but no UTF-8.
    text = json.dumps({**value, "flush": flush, "replay": replay}, separators=(",", ":"), ensure_ascii=True)
    return b"%b%b]}}" % (text.removesuffix("]}}").encode("ascii"), b",".join(batch.events))


def event_identities(batch: SmallBatch, session_id: str) -> list[bytes]:
    """Return what each event is recognised by upstream: the digest of its envelope, then that of its bytes."""
    envelope = envelope_digest(_in_session(batch.envelope, session_id))
    return [envelope + event_digest(event) for event in batch.events]


def _cuts(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of events within the limits."""
    start = held_bytes = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == MAX_EVENTS or held_bytes + size > MAX_BYTES):
            yield start, index
            start, held_bytes = index, 0
        held_bytes += size
    yield start, len(sizes)


def _without_events(value: dict[str, Any]) -> dict[str, Any]:
    replay = {name: member for name, member in value["replay"].items() if name not in ("events", "sequence")}
    return {**{name: member for name, member in value.items() if name != "flush"}, "replay": replay}


def _in_session(envelope: dict[str, Any], session_id: str) -> dict[str, Any]:
    return {**envelope, "session": {**envelope["session"], "id": session_id}}
