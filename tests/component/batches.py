"""Client batches for tests, made the way the intake makes them, and upstream bodies read by other means than ours."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from relay.protocol.codings import SegmentDeflater
from relay.protocol.cut import Limits
from relay.protocol.replay import decode_batch
from relay.protocol.reuse import Known
from relay.sandbox.body import split_events
from relay.spool.segments import make_new_batch
from relay.spool.values import NewBatch

LIMITS = Limits(500, 1_048_576)
"""Upstream's own."""

KEY = "luc_pk_test"


def make_event(name: str, size: int = 0) -> bytes:
    """Return an event that no other test event equals, of `size` bytes where that is more than it needs."""
    text = f'{{"timestamp":1,"type":3,"data":{{"name":"{name}","fill":""}}}}'
    return text.replace('"fill":""', '"fill":"%s"' % ("x" * max(0, size - len(text)))).encode()


def make_body(
    session: str = "s",
    window: str = "w",
    sequence: int = 0,
    events: Sequence[bytes] | None = None,
    *,
    page: str = "https://shop.example/",
    user: str = "a",
    last_activity: float = 2,
    flush: str = "",
) -> bytes:
    """Return a client's body with events exactly as given; by default one that names its place."""
    batch: dict[str, Any] = {
        "session": {"id": session, "windowId": window, "startedAt": 1, "lastActivityAt": last_activity, "url": "u"},
        "user": {"anonymousId": user},
        "page": {"url": page},
        "replay": {"events": [], "sequence": sequence},
    }
    if flush:
        batch["flush"] = flush
    events = [make_event(f"{session}/{window}/{sequence}")] if events is None else events
    return json.dumps(batch).encode().replace(b'"events": []', b'"events":[%b]' % b",".join(events))


def make_batch(
    body: bytes, *, key: str = KEY, limits: Limits = LIMITS, accepted_at: float = 0.0, known: Known | None = None
) -> NewBatch:
    """Return a body as the spool takes it."""
    return make_new_batch(decode_batch(body, 262_144), limits, SegmentDeflater(), [key], accepted_at, known)


class UpstreamBatch(msgspec.Struct, frozen=True):
    """What an upstream body says."""

    session: str
    window: str
    sequence: int
    is_final: bool
    events: tuple[bytes, ...]
    """Byte for byte."""
    envelope: dict[str, Any]
    """All of it but events, sequence, flush and lastActivityAt."""
    last_activity: float
    size: int
    """Of the uncompressed JSON."""


def read_upstream(body: bytes) -> UpstreamBatch:
    """Read a gzip body by the standard library, and its events' bytes as the sandbox does."""
    text = gzip.decompress(body)
    value = json.loads(text)
    replay = value.pop("replay")
    del replay["events"]
    sequence = replay.pop("sequence")
    last_activity = value["session"].pop("lastActivityAt")
    flush = value.pop("flush", "normal")
    return UpstreamBatch(
        *(value["session"]["id"], value["session"]["windowId"], sequence, flush == "final"),
        *(tuple(split_events(text)), {**value, "replay": replay}, last_activity, len(text)),
    )
