"""A client batch: from body bytes to its identity, its envelope and its events' bytes.

Rules:
1. Events are never built, copied or re-written on the fast path; they are slices of the body.
2. The fast path says yes only where the published schema does; where it says no, the slow path decides, and is the
   only one that explains.
3. The envelope is everything of a batch but events, sequence, flush and lastActivityAt, byte for byte, in two
   pieces: what stands before the lastActivityAt of a body, and what stands between it and the sequence. Two batches
   may share an upstream batch when the pieces are equal, or, where `batch.merge` says so, when they are but for the
   page.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import msgspec
from msgspec import Raw

from relay.errors import InvalidBatch, TooLarge
from relay.protocol import node_json, schema

_PLAIN_BATCH = msgspec.json.Decoder(schema.PlainBatch)
_BATCH = msgspec.json.Decoder(schema.Batch)
_SESSION = msgspec.json.Decoder(schema.Session)
_USER = msgspec.json.Decoder(schema.User)
_PAGE = msgspec.json.Decoder(schema.Page)
_METADATA = msgspec.json.Decoder(schema.Metadata | None)
_EVENTS = msgspec.json.Decoder(list[schema.Event])

_BATCH_NAMES = frozenset(schema.Batch.__struct_fields__)
_REPLAY_NAMES = frozenset(schema.Replay.__struct_fields__)

_MAX_NUMBER_BYTES = 32
"""Longer numbers are written anew; a double needs at most 24 characters."""

_EVENTS_OPEN = b'"events":['

_STAND_IN = b'["\xef\xb7\x90"]'
"""Stands for the events while the rest of a body is decoded: a list with a noncharacter, which no text may contain."""

_SESSION_NAMES = {name: b'"%b":' % name.encode() for name in schema.Session.__struct_fields__}


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """What a batch says of its session, user, page and client."""

    head: bytes
    """`{"session":{…,"lastActivityAt":`"""
    tail: bytes
    """`},"user":…,"page":…,…,"replay":{…"sequence":`"""
    page_start: int = 0
    """Where the value of `page` begins in the tail."""
    page_end: int = 0
    """Where it ends; 0 where nobody has looked, as in an envelope that comes out of the spool."""

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the envelope: equal envelopes, equal digests."""
        return _digest(self.head, self.tail)

    @property
    def pageless_digest(self) -> bytes:
        """16 bytes that stand for the envelope without its page's value; for all of it where `page_end` is 0.

        Where the value stood follows from what stands before it, so equal digests mean that all else is equal.
        """
        return _digest(self.head, self.tail[: self.page_start] + self.tail[self.page_end :])


def _digest(head: bytes, rest: bytes) -> bytes:
    return blake2b(rest, digest_size=16, key=blake2b(head, digest_size=32).digest()).digest()


class ClientBatch(msgspec.Struct, gc=False):
    """One valid ReplayBatch."""

    session_id: str
    """`session.id`."""
    window_id: str
    """`session.windowId`."""
    sequence: int
    """`replay.sequence`, 0 to 2**39 - 1."""
    is_final: bool
    """Whether `flush` is `final`."""
    last_activity: bytes
    """`session.lastActivityAt` as JSON text, at most 32 bytes."""
    envelope: Envelope
    """All else but the events."""
    events: bytes | memoryview
    """The events' JSON, joined by commas, without brackets."""
    event_count: int
    """1 to 16 384."""


def decode_batch(body: bytes, max_envelope_bytes: int) -> ClientBatch:
    """Decode and validate a ReplayBatch as upstream would.

    Args:
        body: JSON, content codings removed. The result refers to it.
        max_envelope_bytes: Largest envelope, both pieces together.

    Raises:
        InvalidBatch: Not JSON, or not a batch by the published schema; `details` names the first places.
        TooLarge: More than 16 384 events, or a larger envelope.
    """
    batch = _decode_fast(body) or _decode_leniently(body)
    if batch.event_count > schema.MAX_BATCH_EVENTS:
        raise TooLarge(
            f"Batch holds {batch.event_count} events, more than {schema.MAX_BATCH_EVENTS}: "
            "send them as several batches, each with a higher sequence"
        )
    size = len(batch.envelope.head) + len(batch.envelope.tail)
    if size > max_envelope_bytes:
        raise TooLarge(
            f"session, user, page and metadata take {size} bytes, more than {max_envelope_bytes}: "
            "send less of them, they travel with every batch"
        )
    return batch


def _decode_fast(body: bytes) -> ClientBatch | None:
    """Decode a batch without surprises; None where the slow path has to look."""
    if not node_json.is_utf8(body):
        return None
    lifted = _lift_events(body)
    return (lifted and _decode_plain(*lifted)) or _decode_plain(body, None)


def _lift_events(body: bytes) -> tuple[bytes, memoryview] | None:
    """Return a body with a stand-in for its events, and the events; None where that cannot be tried.

    So each event is read once, not once to be skipped and once to be checked, which is a third to a half of all
    decoding. What is lifted is a guess, that of a body as SDKs write it: from the first `"events":[` to the last `]`.
    The guess is right if the rest decodes with the stand-in as `replay.events`, and what was lifted decodes as a
    list: then one JSON value took the place of another. A body that holds the stand-in already could make it seem
    right, so it is left alone.
    """
    start = body.find(_EVENTS_OPEN) + len(_EVENTS_OPEN) - 1
    end = body.rfind(b"]") + 1
    before, after = body[:start], body[end:]
    if not len(_EVENTS_OPEN) <= start < end or _STAND_IN in before or _STAND_IN in after:
        return None
    return b"".join((before, _STAND_IN, after)), memoryview(body)[start:end]


def _decode_plain(body: bytes, lifted: memoryview | None) -> ClientBatch | None:
    """Decode a batch with its events in place or lifted; None where either part is not what it should be."""
    try:
        rest: dict[str, Raw] = {}
        replay_rest: dict[str, Raw] = {}
        try:
            top: schema.PlainBatch | schema.Batch = _PLAIN_BATCH.decode(body)
        except msgspec.ValidationError:
            top = _BATCH.decode(body)
            rest, replay_rest = _unknown_members(schema.members(body))
        events = memoryview(top.replay.events)
        if lifted is not None:
            if events != _STAND_IN:
                return None
            events = lifted
        session = _SESSION.decode(top.session)
        _USER.decode(top.user)
        _PAGE.decode(top.page)
        if top.metadata is not schema.ABSENT:
            _METADATA.decode(top.metadata)
            rest["metadata"] = top.metadata
        event_count = len(_EVENTS.decode(events))
    except (msgspec.DecodeError, RecursionError):
        return None
    if not event_count:
        return None
    head, last_activity = _session_head(schema.members(top.session))
    return ClientBatch(
        session.id,
        session.windowId,
        top.replay.sequence,
        top.flush == "final",
        last_activity,
        _envelope(head, top.user, top.page, _rest_of_tail(rest, replay_rest)),
        events[1:-1],
        event_count,
    )


def _decode_leniently(body: bytes) -> ClientBatch:
    """Decode what Node would decode, or say what is wrong with it."""
    shadow = node_json.protect(body)
    try:
        top_value = msgspec.json.decode(shadow, type=Raw)
        issues = schema.find_issues(top_value)
    except (msgspec.DecodeError, RecursionError) as error:
        issue = {"code": "custom", "path": [], "message": f"Body is not JSON that can be read: {error}"}
        raise InvalidBatch("Invalid replay batch", [issue]) from error
    if issues:
        raise InvalidBatch("Invalid replay batch", issues)
    top = schema.members(top_value)
    session = schema.members(top["session"])
    replay = schema.members(top["replay"])
    flush = top.get("flush")
    head, last_activity = _session_head(session)
    rest, replay_rest = _unknown_members(top)
    if "metadata" in top:
        rest["metadata"] = top["metadata"]
    pieces = (head, bytes(top["user"]), bytes(top["page"]), _rest_of_tail(rest, replay_rest))
    return ClientBatch(
        node_json.restore_text(schema.string(session["id"])),
        node_json.restore_text(schema.string(session["windowId"])),
        int(schema.number(replay["sequence"])),
        flush is not None and schema.string(flush) == "final",
        last_activity,
        _envelope(*map(node_json.restore, pieces)),
        node_json.restore(bytes(replay["events"])[1:-1]),
        len(schema.events(replay["events"])),
    )


def _name(name: str) -> bytes:
    return msgspec.json.encode(name) + b":"


def _session_head(session: Mapping[str, Raw]) -> tuple[bytes, bytes]:
    """Return the envelope's first piece, and lastActivityAt as JSON text."""
    pieces: list[bytes | Raw] = [b'{"session":{']
    last_activity = b""
    for name, value in session.items():
        if name == "lastActivityAt":
            last_activity = bytes(value)
        else:
            pieces += (_SESSION_NAMES.get(name) or _name(name), value, b",")
    pieces.append(b'"lastActivityAt":')
    if len(last_activity) > _MAX_NUMBER_BYTES:
        last_activity = msgspec.json.encode(float(last_activity))
    return b"".join(pieces), last_activity


def _unknown_members(batch: Mapping[str, Raw]) -> tuple[dict[str, Raw], dict[str, Raw]]:
    """Return the members that no schema knows, of a batch and of its `replay`."""
    rest = {name: value for name, value in batch.items() if name not in _BATCH_NAMES}
    replay = schema.members(batch["replay"])
    return rest, {name: value for name, value in replay.items() if name not in _REPLAY_NAMES}


def _envelope(head: bytes, user: bytes | Raw, page: bytes | Raw, rest: bytes) -> Envelope:
    """Return an envelope whose second piece goes on with `rest` behind the page."""
    tail = b"".join((b'},"user":', user, b',"page":', page, rest))
    page_end = len(tail) - len(rest)
    return Envelope(head, tail, page_end - len(page), page_end)


def _rest_of_tail(rest: Mapping[str, Raw], replay_rest: Mapping[str, Raw]) -> bytes:
    """Return what stands behind the page in the envelope's second piece."""
    pieces: list[bytes | Raw] = []
    for name, value in rest.items():
        pieces += (b",", _name(name), value)
    pieces.append(b',"replay":{')
    for name, value in replay_rest.items():
        pieces += (_name(name), value, b",")
    pieces.append(b'"sequence":')
    return b"".join(pieces)
