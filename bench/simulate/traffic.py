"""Traffic: long human sessions made of the recorded ones.

Recordings are short (4 to 180 s) and played by scripts, without a person's pauses. A session here is a chain of
visits, each one a recorded session with its time stretched, batched anew as an SDK would: every 10 s, at 500 events
or 1 MiB, and when the page changes. Between visits the person pauses.

Rules:
1. Sizes, envelopes and windows are the recorded ones, event by event. Nothing is invented but time, and that one
   visit follows another in the same tabs.
2. Everything follows from the seed.
3. A visit's batches are made once and shared by all sessions; a session is a list of references.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import accumulate

import msgspec

from relay.protocol.codings import SegmentDeflater, zstd_decompress
from relay.protocol.cut import Likeness
from relay.protocol.node_json import split_events
from relay.protocol.replay import Envelope, decode_batch

SDK_FLUSH_SECONDS = 10.0
"""Published interval of the SDK."""

SDK_MAX_EVENTS = 500
SDK_MAX_BYTES = 1_048_576
"""Published limits of one batch, which a custom integration keeps as well."""

SESSION_SECONDS = (600.0, 1_200.0)
"""Shortest and longest session. Visits are whole, so one may end up to a visit later."""

FINAL_SHARE = 0.7
"""Sessions that say goodbye. The others just fall silent: a closed lid, a killed tab."""

_META, _FULL_SNAPSHOT = 4, 2
"""rrweb's event types that begin a page; a visit that continues one is without them."""


class Kind(msgspec.Struct, frozen=True):
    """A kind of session."""

    name: str
    """As reports and plots call it."""
    recordings: tuple[str, ...]
    """Those that a visit may be."""
    stretch: float
    """A recorded second lasts this long."""
    pause_seconds: tuple[float, float]
    """Shortest and longest pause between visits."""
    is_reloaded: bool
    """Whether each visit may be another recording and loads its page. Else a session is one recording, played again
    and again, and only the first time with its snapshots."""


KINDS = (
    Kind("reading", ("docs-debref-ch09", "tiny-unsubscribe", "tiny-404"), 6.0, (30.0, 180.0), True),
    Kind(
        "browsing",
        ("docs-handbook-ja", "docs-postgres-nav", "multitab-docs-shop", "shop-login-checkout"),
        3.0,
        (10.0, 60.0),
        True,
    ),
    Kind(
        "app",
        ("todo-basic", "kanban-drag", "form-apply-masked", "chat-stream", "admin-users"),
        3.0,
        (10.0, 60.0),
        False,
    ),
    Kind("dashboard", ("grid-live-updates", "logs-console", "admin-dashboard-idle"), 1.0, (0.0, 0.0), False),
    Kind("mobile", ("mobile-shop-jpeg",), 2.0, (10.0, 60.0), True),
)

MIX = {"reading": 0.35, "browsing": 0.3, "app": 0.2, "dashboard": 0.05, "mobile": 0.1}
"""Shares of the mix; an assumption: most people read and browse."""


class SdkBatch(msgspec.Struct, frozen=True, gc=False):
    """One client batch of a visit."""

    due_seconds: float
    """When the SDK sends it, from the visit's beginning on."""
    window: int
    """Its tab, from 0 on."""
    envelope: Envelope
    """Shared by the batches of a page."""
    likeness: Likeness
    """Of the envelope."""
    events: tuple[bytes, ...]
    """Exact bytes."""
    offsets: tuple[int, ...]
    """Where each event begins in the comma-joined run; one more, for a next one."""
    has_snapshot: bool
    """Whether a full snapshot is among them."""
    whole_deflated_bytes: int
    """All of them as one segment."""

    @property
    def envelope_id(self) -> int:
        """Equal ids, equal envelopes."""
        return int.from_bytes(self.likeness.digest)

    def run_bytes(self, start: int, end: int) -> int:
        """Return the size of the run of events from `start` up to `end`."""
        return self.offsets[end] - self.offsets[start] - 1

    def deflated_bytes(self, start: int, end: int) -> int:
        """Return the size of that run as a segment."""
        if (start, end) == (0, len(self.events)):
            return self.whole_deflated_bytes
        return len(SegmentDeflater().deflate(b",".join(self.events[start:end])))


class Visit(msgspec.Struct, frozen=True):
    """A recording, stretched and batched anew."""

    batches: tuple[SdkBatch, ...]
    """In the order of sending; at least one."""
    seconds: float
    """From its beginning to its last batch."""


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A client batch that reaches the relay."""

    at: float
    session: int
    window: tuple[int, int]
    """Session and tab."""
    sequence: int
    """Within the session."""
    batch: SdkBatch
    is_final: bool
    """Whether it ends the session."""
    is_first_snapshot: bool
    """Whether it brings the session's first full snapshot."""


class _Event(msgspec.Struct, frozen=True, gc=False):
    at: float
    window: int
    likeness: Likeness
    envelope: Envelope
    body: bytes
    type: int


@cache
def _recorded(name: str) -> tuple[_Event, ...]:
    """Return the events of a recording, in order of their batches."""
    source = resources.files("relay") / "demo" / "recordings" / f"{name}.jsonl.zst"
    windows: dict[str, int] = {}
    found = []
    for line in zstd_decompress(source.read_bytes()).splitlines():
        batch = decode_batch(line, SDK_MAX_BYTES)
        likeness = Likeness(batch.envelope.digest, batch.envelope.pageless_digest)
        window = windows.setdefault(batch.window_id, len(windows))
        for body in split_events(bytes(batch.events)):
            event = msgspec.json.decode(body)
            found.append(_Event(event["timestamp"] / 1000, window, likeness, batch.envelope, body, event["type"]))
    return tuple(found)


@cache
def visit(name: str, stretch: float, *, is_continued: bool) -> Visit:
    """Return a recording as a visit.

    Args:
        name: Of the recording.
        stretch: A recorded second lasts this long.
        is_continued: Whether the page is there already, so that its snapshots are left out.
    """
    events = [event for event in _recorded(name) if not is_continued or event.type not in (_META, _FULL_SNAPSHOT)]
    started_at = min(event.at for event in events)
    batches: list[SdkBatch] = []
    for window in dict.fromkeys(event.window for event in events):
        held: list[_Event] = []
        held_bytes = 0
        tick = SDK_FLUSH_SECONDS
        for event in (event for event in events if event.window == window):
            at = (event.at - started_at) * stretch
            if held and at >= tick:
                batches.append(_batch(tick, held))
                held, held_bytes = [], 0
            elif (held and event.likeness != held[-1].likeness) or _is_full(held, held_bytes, event):
                batches.append(_batch(at, held))
                held, held_bytes = [], 0
            while tick <= at:
                tick += SDK_FLUSH_SECONDS
            held.append(event)
            held_bytes += len(event.body) + 1
        batches.append(_batch(tick, held))
    batches.sort(key=lambda batch: batch.due_seconds)
    return Visit(tuple(batches), batches[-1].due_seconds)


def _is_full(held: Sequence[_Event], held_bytes: int, event: _Event) -> bool:
    return bool(held) and (len(held) == SDK_MAX_EVENTS or held_bytes + len(event.body) > SDK_MAX_BYTES)


def _batch(due_seconds: float, held: Sequence[_Event]) -> SdkBatch:
    first = held[0]
    events = tuple(event.body for event in held)
    offsets = tuple(accumulate((len(event) + 1 for event in events), initial=0))
    has_snapshot = any(event.type == _FULL_SNAPSHOT for event in held)
    size = len(SegmentDeflater().deflate(b",".join(events)))
    return SdkBatch(due_seconds, first.window, first.envelope, first.likeness, events, offsets, has_snapshot, size)


def arrivals(kind: str, sessions: int, seconds: float, seed: int) -> list[Arrival]:
    """Return all client batches of a number of concurrent sessions, in order of time.

    Args:
        kind: Name of a kind, or `mix`.
        sessions: Concurrent ones: where one ends, the next begins. The first begin in the midst of their lives.
        seconds: Length of the trace.
        seed: Of all chance.
    """
    found: list[Arrival] = []
    number = 0
    for place in range(sessions):
        chance = random.Random(f"{seed}/{kind}/{place}")
        at = -chance.uniform(0, SESSION_SECONDS[1])
        while at < seconds:
            number += 1
            at = _add_session(found, number, _kind(kind, chance), at, seconds, chance)
    found.sort(key=lambda arrival: (arrival.at, arrival.session, arrival.sequence))
    return found


def _kind(name: str, chance: random.Random) -> Kind:
    if name == "mix":
        (name,) = chance.choices(list(MIX), list(MIX.values()))
    return next(kind for kind in KINDS if kind.name == name)


def _add_session(
    found: list[Arrival], number: int, kind: Kind, started_at: float, until: float, chance: random.Random
) -> float:
    """Add one session's batches from time 0 to `until`; returns when the session ends."""
    batches = list(_play(kind, chance))
    says_goodbye = chance.random() < FINAL_SHARE
    has_snapshot = False
    for sequence, (offset, batch) in enumerate(batches):
        is_first_snapshot = batch.has_snapshot and not has_snapshot
        has_snapshot |= batch.has_snapshot
        if 0 <= started_at + offset < until:
            is_final = says_goodbye and sequence == len(batches) - 1
            window = (number, batch.window)
            found.append(Arrival(started_at + offset, number, window, sequence, batch, is_final, is_first_snapshot))
    return started_at + batches[-1][0]


def _play(kind: Kind, chance: random.Random) -> Iterator[tuple[float, SdkBatch]]:
    """Yield a session's batches, each with its time from the session's beginning on."""
    length = chance.uniform(*SESSION_SECONDS)
    name = chance.choice(kind.recordings)
    at = 0.0
    while at < length:
        is_continued = at > 0 and not kind.is_reloaded
        if kind.is_reloaded:
            name = chance.choice(kind.recordings)
        played = visit(name, kind.stretch, is_continued=is_continued)
        for batch in played.batches:
            yield at + batch.due_seconds, batch
        at += played.seconds + chance.uniform(*kind.pause_seconds)
