"""The rows that hold events: segments, their bodies, and the envelopes they share.

Steps of a group, like those of `Store`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import apsw

from relay.protocol.codings import SegmentDeflater, crc32, inflate_segment
from relay.protocol.cut import Cut, Likeness, Limits, Parting, cut_runs, take_part
from relay.protocol.node_json import split_events
from relay.protocol.replay import ClientBatch, Envelope
from relay.protocol.reuse import Known, rest_of
from relay.spool.rows import first_value
from relay.spool.values import NewBatch, NewSegment

_CACHE_ENTRIES = 5_000
"""Rows of envelopes remembered, about 500 bytes each; a miss costs an index look-up, 2 µs."""


def make_new_batch(
    batch: ClientBatch,
    limits: Limits,
    deflater: SegmentDeflater,
    keys: Sequence[str],
    accepted_at: float,
    known: Known | None = None,
) -> NewBatch:
    """Cut and compress a client batch for the spool, or of one that was compared what is new in it.

    Args:
        batch: As it was sent.
        limits: Of an upstream batch.
        deflater: Of the calling thread.
        keys: The upstream key of its session, and the rest of the pool.
        accepted_at: Wall clock.
        known: What of it was stored before.
    """
    new = rest_of(batch, known) if known else batch
    segments = tuple(
        NewSegment(run.index, run.event_count, len(run.events), crc32(run.events), deflater.deflate(run.events))
        for run in (cut_runs(new, limits) if new.event_count else ())
    )
    is_one_run = new is batch and len(segments) == 1
    return NewBatch(
        keys[0],
        batch.session_id,
        batch.window_id,
        batch.sequence,
        batch.is_final,
        batch.last_activity,
        batch.envelope,
        batch.envelope.digest,
        new.event_count,
        segments,
        accepted_at,
        batch.event_count,
        len(batch.events),
        segments[0].crc if is_one_run else crc32(batch.events),
        known,
        tuple(keys[1:]),
    )


def is_intact(deflated: Any, crc: Any) -> bool:
    """Return whether a body is what was stored."""
    return isinstance(deflated, bytes) and crc32(deflated) == crc


class Segments:
    """Segments, bodies and envelopes of one spool database.

    Args:
        connection: The store's.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._db = connection
        self._one = partial(first_value, connection)
        self._deflater = SegmentDeflater()
        self.reset()

    def reset(self) -> None:
        """Forget everything that a rolled-back transaction may have put into memory."""
        self._envelopes: OrderedDict[tuple[int, bytes], tuple[int, Likeness]] = OrderedDict()
        self._next_body = 0
        """Row of the next body; 0 where the disk has to be asked."""

    # -- envelopes

    def envelope(self, envelope_id: int) -> Envelope:
        """Return an envelope.

        Raises:
            LookupError: The disk does not have it.
        """
        row = self._db.execute("SELECT head, tail FROM envelope WHERE id = ?", (envelope_id,)).fetchone()
        if row is None:
            raise LookupError(f"envelope {envelope_id} is missing")
        return Envelope(*row)

    def likeness(self, envelope_id: int) -> Likeness:
        """Return what decides with which others the segments of an envelope may merge; no others, if it is missing."""
        row: Any = self._db.execute("SELECT digest, pageless FROM envelope WHERE id = ?", (envelope_id,)).fetchone()
        return Likeness(*row) if row else Likeness(b"", b"")

    def keep_envelope(self, window_id: int, digest: bytes, envelope: Envelope) -> tuple[int, Likeness]:
        """Return the row and the likeness of an envelope, made where the window has none like it."""
        identity = (window_id, digest)
        kept = self._envelopes.get(identity)
        if kept is not None:
            return kept
        likeness = Likeness(digest, envelope.pageless_digest)
        envelope_id = self._one("SELECT id FROM envelope WHERE window_id = ? AND digest = ?", identity)
        if envelope_id is None:
            self._db.execute(
                "INSERT INTO envelope VALUES (NULL, ?, ?, ?, ?, ?)",
                (*identity, likeness.pageless, envelope.head, envelope.tail),
            )
            envelope_id = self._db.last_insert_rowid()
        self._envelopes[identity] = kept = (envelope_id, likeness)
        if len(self._envelopes) > _CACHE_ENTRIES:
            self._envelopes.popitem(last=False)
        return kept

    def drop_envelope(self, window_id: int, envelope_id: int) -> None:
        """Remove an envelope, unless something of its window is still in it, or a batch is sent with it."""
        for table in ("segment", "dead_letter", "batch"):
            sql = f"SELECT 1 FROM {table} WHERE window_id = ? AND envelope_id = ? LIMIT 1"  # noqa: S608 - our tables
            if self._one(sql, (window_id, envelope_id)):
                return
        digest = self._one("DELETE FROM envelope WHERE id = ? RETURNING digest", (envelope_id,))
        self._envelopes.pop((window_id, digest), None)

    # -- segments

    def add_body(self, deflated: bytes) -> int:
        """Store a segment's bytes and return their row."""
        body_id: int = self._next_body or self._one("SELECT coalesce(max(id), 0) + 1 FROM body")
        self._next_body = body_id + 1
        self._db.execute("INSERT INTO body VALUES (?, ?, ?)", (body_id, crc32(deflated), deflated))
        return body_id

    def add(self, *columns: Any) -> None:
        """Store a segment; takes the table's columns in order."""
        self._db.execute("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", columns)

    def events(self, body_id: int, events_bytes: int) -> Sequence[bytes]:
        """Return the events of a segment.

        Raises:
            LookupError: The disk does not have them as they were stored.
        """
        row = self._db.execute("SELECT deflated, crc FROM body WHERE id = ?", (body_id,)).fetchone()
        if row is None or not is_intact(*row):
            raise LookupError(f"body {body_id} is missing, or not as it was stored")
        return split_events(inflate_segment(row[0], events_bytes))

    def split(self, window_id: int, address: int, events: Sequence[bytes], cut: Cut) -> bool:
        """Make two segments of one, the first of which a cut takes; returns whether it takes anything of it."""
        taken, deflated = take_part(events, cut, self._deflater.deflate)
        if taken:
            self.divide(window_id, address, events, taken, deflated)
        return bool(taken)

    def divide(
        self, window_id: int, address: int, events: Sequence[bytes], taken: int, deflated: bytes | None = None
    ) -> None:
        """Make two segments of one.

        Args:
            window_id: Of the segment.
            address: Of the segment; the first part keeps it.
            events: What `events` returned of it.
            taken: Events of the first part: at least 1, and not all. Blanks between events are not kept.
            deflated: The first part as a segment, where that is known.
        """
        (row,) = self._db.execute(
            "DELETE FROM segment WHERE window_id = ? AND address = ?"
            " RETURNING envelope_id, last_activity, is_final, accepted_at, batch_id, body_id",
            (window_id, address),
        )
        envelope_id, last_activity, is_final, accepted_at, batch_id, body_id = row
        self._db.execute("DELETE FROM body WHERE id = ?", (body_id,))
        for first, part in ((0, events[:taken]), (taken, events[taken:])):
            run = b",".join(part)
            ends = is_final if first else 0
            body = deflated if deflated and not first else self._deflater.deflate(run)
            shape = (window_id, address + first, len(part), len(run), len(body), crc32(run), envelope_id)
            self.add(*shape, last_activity, ends, accepted_at, batch_id, self.add_body(body))


def parting_within(connection: apsw.Connection, window_id: int) -> Parting:
    """Return what parts the unsealed segments of a window from one another."""
    row: Any = connection.execute(
        "SELECT count(DISTINCT envelope_id), count(DISTINCT coalesce(pageless, x'')) FROM segment"
        " LEFT JOIN envelope ON envelope.id = envelope_id WHERE segment.window_id = ? AND batch_id IS NULL",
        (window_id,),
    ).fetchone()
    envelopes, others = row
    if envelopes < 2:
        return Parting.NOTHING
    return Parting.ENVELOPE if others > 1 else Parting.PAGE
