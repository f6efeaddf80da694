"""What goes into the spool and comes out of it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from relay.protocol.cut import Likeness, Parting
from relay.protocol.replay import Envelope
from relay.protocol.reuse import Earlier, Known

DAMAGED = 0
"""The status of a dead letter that upstream has not seen, since it is damaged on the disk (`quarantine.py`)."""

LAST_ID = 2**63 - 1
"""The greatest row id that there can be, in SQLite."""


class NewSegment(msgspec.Struct, frozen=True, gc=False):
    """One compressed run of a client batch."""

    index: int
    """Index of its first event in the client batch."""
    event_count: int
    """At least 1."""
    events_bytes: int
    """Uncompressed, with the commas between events."""
    crc: int
    """CRC-32 of the uncompressed run."""
    deflated: bytes
    """The run as a segment."""


class NewBatch(msgspec.Struct, frozen=True, gc=False):
    """A client batch, ready to be stored."""

    key: str
    """The upstream key of its session."""
    session_id: str
    """`session.id`."""
    window_id: str
    """`session.windowId`."""
    sequence: int
    """`replay.sequence`."""
    is_final: bool
    """Whether the batch ends its session; its last segment bears that."""
    last_activity: bytes
    """`session.lastActivityAt` as JSON text."""
    envelope: Envelope
    """Shared by its segments."""
    digest: bytes
    """The envelope's."""
    event_count: int
    """Sum over the segments."""
    segments: tuple[NewSegment, ...]
    """In order, without gaps; of a batch that was compared (`known`) only what is new, which may be nothing."""
    accepted_at: float
    """Wall clock, seconds."""
    sent_events: int
    """Events of the batch as it was sent."""
    sent_bytes: int
    """These, joined by commas, as they were sent."""
    sent_crc: int
    """CRC-32 of that."""
    known: Known | None = None
    """What of it was stored before; None as long as nobody has had to compare it."""
    other_keys: tuple[str, ...] = ()
    """The rest of the key's pool. A session that is known under one of them stays there."""


class Appended(msgspec.Struct, frozen=True, gc=False):
    """What became of a `NewBatch`."""

    outcome: Literal["stored", "repeated", "differs", "numbers_used_up", "too_many_keys"]
    """`repeated`: all of its events were accepted before. `differs`: its sequence was used for other content, with
    which it has to be compared. `numbers_used_up`: the session has used the highest sequence there is. Only what is
    `stored` is counted as accepted."""
    key_id: int = 0
    """Row of the upstream key."""
    session_id: int = 0
    """Row of the session."""
    window_id: int = 0
    """Row of the window."""
    key: str = ""
    """The key's secret: the batch's own, or that of its `other_keys` under which the session is known."""
    likeness: Likeness = Likeness(b"", b"")
    """Of its envelope; only where it was stored."""
    earlier: tuple[Earlier, ...] = ()
    """What a batch that `differs` has to be compared with."""
    final: PendingWindow | Literal["as before", "too late"] = "as before"
    """Of a repeated one that ends its session: whether the stored one does so now too (`Marks.end_with`)."""


class PendingWindow(msgspec.Struct, frozen=True, gc=False):
    """A window's unsealed segments, summed up."""

    key_id: int
    key: str
    """The secret."""
    session_id: int
    window_id: int
    events: int
    """Sum of its segments."""
    events_bytes: int
    """Uncompressed."""
    deflated_bytes: int
    """As they are sent."""
    oldest_at: float
    """Wall clock of the oldest segment's acceptance."""
    finals: int
    """Segments that end the session."""
    likeness: Likeness
    """Of the last of them."""
    parting: Parting
    """What parts them from one another; what stands before it will not grow."""


class SealedBatch(msgspec.Struct, frozen=True, gc=False):
    """A durable cut that upstream has not settled."""

    batch_id: int
    """Row of the batch."""
    key_id: int
    session_id: int
    window_id: int
    sequence: int
    """The address it bears upstream."""
    last_address: int
    """Of its last segment, as it was cut."""
    event_count: int
    """Events in it."""
    segment_count: int
    """Segments merged into it."""
    envelope_count: int
    """Envelopes of these; the batch bears the last one's."""
    events_bytes: int
    """Uncompressed, without the commas between segments."""
    deflated_bytes: int
    """As they are sent, without these commas."""
    finals: int
    """Final segments in it: 0 or 1."""
    is_final: bool
    """Whether it is sent with `flush: "final"`."""
    oldest_at: float
    """Wall clock of its oldest segment's acceptance."""


class Quarantined(msgspec.Struct, frozen=True, gc=False):
    """Damaged segments of a window that were set aside."""

    segments: int
    """How many."""
    event_count: int
    """In them."""
    events_bytes: int
    """Uncompressed."""
    deflated_bytes: int
    """As they would have been sent."""
    finals: int
    """Of them, those that end their session."""
    has_batch: bool
    """Whether the sealed batch that they were part of has other segments."""
    next_oldest_at: float | None
    """Wall clock of acceptance of what is still pending in the window; None where nothing is."""
    next_parting: Parting
    """What parts that from one another."""


class Load(msgspec.Struct, frozen=True, gc=False):
    """A sealed batch with its body."""

    batch: SealedBatch
    """What it is."""
    body: bytes
    """Its gzip body; the same bytes at every call."""
    next_oldest_at: float | None = None
    """Wall clock of acceptance of what the cut left in the window; None where it left nothing, or on a retry."""
    next_parting: Parting = Parting.NOTHING
    """What parts the first run of that from the rest."""


Recut: TypeAlias = Literal["alone", "halves"]
"""How a refused batch is cut into smaller ones: one bad event is looked for, or a size that upstream takes."""


class Moved(msgspec.Struct, frozen=True):
    """What became of dead letters."""

    letters: int = 0
    """Dead letters dropped, or made pending again."""
    events: int = 0
    """Events in them."""
    pending: tuple[PendingWindow, ...] = ()
    """What of them is pending again."""


class Refused(msgspec.Struct, frozen=True):
    """What became of a batch that upstream refused."""

    parts: tuple[int, ...]
    """The batches that it was cut into, in the order of sending; none where it is a dead letter now."""
    dead_events: int = 0
    """Events of the dead letter."""
    shed: Moved = Moved()
    """Older dead letters that had to make room."""


class DeadLetter(msgspec.Struct, frozen=True):
    """What there is to say of a dead letter."""

    id: int
    """By which an operator names it."""
    key: str
    """Fingerprint of the client's key."""
    session: str
    """`session.id`."""
    window: str
    """`session.windowId`."""
    sequence: int
    """The address it bore upstream."""
    is_final: bool
    """Whether it ends its session."""
    events: int
    """At least 1."""
    bytes: int
    """On disk, about."""
    status: int
    """Upstream's; `DAMAGED` where the disk is why."""
    answer: str
    """The beginning of what upstream said, or what is damaged."""
    accepted_at: float
    """Wall clock of its acceptance."""
    died_at: float
    """Wall clock of upstream's last refusal, or of finding the damage."""

    @property
    def is_damaged(self) -> bool:
        """Whether it is damaged on the disk, rather than refused."""
        return self.status == DAMAGED


class Recent(msgspec.Struct, frozen=True, gc=False):
    """A send that a restart must still count against a key's budget."""

    key_id: int
    at: float
    """Wall clock when it began."""


class Paused(msgspec.Struct, frozen=True, gc=False):
    """A key of which upstream has asked not to hear for a while."""

    key_id: int
    until: float
    """Wall clock."""


class Account(msgspec.Struct, frozen=True):
    """The conservation account, in events, of one instant: accepted is the sum of all others."""

    accepted: int
    """Answered 200, ever, in this spool."""
    delivered: int
    """Taken by upstream."""
    dead_lettered: int
    """Kept aside for good, as counted on the disk: refused by upstream, or damaged."""
    damaged: int
    """Of these, what is damaged on the disk and could not be sent."""
    purged: int
    """Removed by an operator."""
    shed: int
    """Dropped for want of room."""
    shed_by_reason: dict[str, int]
    """The same by what they were dropped as: `dead_letters` beyond `spool.dead_letter_max_bytes`, or `sessions` by
    `spool.overflow`."""
    pending: int
    """Spooled, in no sealed batch."""
    sealed: int
    """Spooled, in a sealed batch on its way."""
    segments: int
    """Segments of all spooled events."""
    dead_letters: int
    """Dead letters that hold the `dead_lettered` events."""
    dead_letter_bytes: int
    """What they take of the disk, about."""
    lag_seconds: float
    """Age of the oldest spooled event; 0 where nothing is spooled."""
    spooled: int
    """`pending` and `sealed` together, as counted on the disk."""
    is_balanced: bool
    """Whether law 2 holds: accepted = delivered + spooled + dead_lettered + purged + shed."""


class Shed(msgspec.Struct, frozen=True, gc=False):
    """A session that was dropped for want of room."""

    key_id: int
    session_id: int
    events: int
    """What was spooled of it."""


class SpoolStatistics(msgspec.Struct, frozen=True):
    """Counters since the start, and the state of the disk at the last commit."""

    commits: int
    """Groups committed."""
    steps: int
    """Steps in them."""
    failed_commits: int
    """Groups that the disk refused."""
    used_bytes: int
    """Pages in use."""
    free_bytes: int
    """Left on the file system."""
    marks_forgotten: int
    """Client batches no longer recognised, by age or number."""
    segments_quarantined: int
    """Damaged segments set aside."""
    damage: str
    """What SQLite said when it last met a damaged page; empty where it has not."""
    refusal: str
    """Why new batches are refused now; empty while they are not."""

    @property
    def is_refusing(self) -> bool:
        """Whether new batches are refused."""
        return bool(self.refusal)
