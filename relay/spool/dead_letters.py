"""Dead letters: what upstream refuses even alone, kept aside with upstream's answer until an operator decides.

Rules:
1. A dead letter is one segment. It left the segments in the step that made it a dead letter, so it delays nothing of
   its session, the final included.
2. It keeps everything: bytes, address, envelope, times. Sent again it is pending as it was before its cut; its address
   is still its own, since upstream stored nothing under it and the marks of its session stay.
3. They have a bound of their own. Beyond it the oldest are shed, and counted.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import apsw

from relay.protocol.codings import inflate_segment
from relay.protocol.cut import body_prefix, body_suffix, parting
from relay.protocol.fingerprint import fingerprint
from relay.protocol.replay import Envelope
from relay.spool.rows import first_value
from relay.spool.segments import Segments
from relay.spool.values import DAMAGED, DeadLetter, Moved, PendingWindow

LETTERS_A_STEP = 500
"""Dead letters moved by one commit, at some 20 µs each."""

_ROW_BYTES = 256
"""What a dead letter takes beside its body, its envelope and upstream's answer: two rows and two index entries."""

_WITHOUT_BATCH = (
    "window_id, address, events, events_bytes, deflated_bytes, crc, envelope_id, last_activity, is_final, accepted_at"
)
"""The columns that a segment and a dead letter share, but for the body."""


class DeadLetters:
    """The dead letters of one spool database. Its methods are steps of a group, like those of `Store`.

    Args:
        connection: The store's.
        segments: Where they come from, and go to.
        count: Adds events to a counter of the account.
    """

    def __init__(self, connection: apsw.Connection, segments: Segments, count: Callable[[str, int], None]) -> None:
        self._db = connection
        self._one = partial(first_value, connection)
        self._segments = segments
        self._count = count
        self.reset()

    def reset(self) -> None:
        """Forget everything that a rolled-back transaction may have put into memory."""
        self._bytes: int | None = None
        """What they take; None where the disk has to be asked."""

    def bury(self, window_id: int, address: int, status: int, answer: str, now: float) -> None:
        """Make a dead letter of a segment.

        Args:
            window_id: Of the segment.
            address: Of the segment.
            status: Upstream's.
            answer: The beginning of what upstream said.
            now: Wall clock.
        """
        self._bury((window_id, address), "body_id", self._held_bytes((window_id, address)), status, answer, now)

    def bury_damaged(self, window_id: int, address: int, reason: str, now: float, *, has_bytes: bool) -> None:
        """Make a dead letter of a segment that is damaged; without a body where the disk gives no bytes."""
        size = self._held_bytes((window_id, address)) if has_bytes else 0
        body = "body_id" if has_bytes else "0"
        self._bury((window_id, address), body, size, DAMAGED, f"damaged on the disk: {reason}", now)

    def _bury(self, place: tuple[int, int], body: str, size: int, status: int, answer: str, now: float) -> None:
        size += _ROW_BYTES + len(answer.encode())
        self._bytes = self._used_bytes() + size
        self._db.execute(
            f"INSERT INTO dead_letter SELECT NULL, {_WITHOUT_BATCH}, {body}, ?, ?, ?, ?"  # noqa: S608 - our columns
            " FROM segment WHERE window_id = ? AND address = ?",
            (size, status, answer, now, *place),
        )
        self._db.execute("DELETE FROM segment WHERE window_id = ? AND address = ?", place)

    def _held_bytes(self, place: tuple[int, int]) -> int:
        """Return what a segment's body and envelope take; where they are missing, nothing."""
        size: int = self._one(
            "SELECT coalesce(length(deflated), 0) + coalesce(length(head) + length(tail), 0) FROM segment"
            " LEFT JOIN body ON body.id = body_id LEFT JOIN envelope ON envelope.id = envelope_id"
            " WHERE segment.window_id = ? AND address = ?",
            place,
        )
        return size

    def _used_bytes(self) -> int:
        if self._bytes is None:
            self._bytes = int(self._one("SELECT coalesce(sum(bytes), 0) FROM dead_letter"))
        return self._bytes

    def shed(self, max_bytes: float) -> Moved:
        """Drop the oldest until the rest takes at most `max_bytes` (rule 3)."""
        letters = events = 0
        while self._used_bytes() > max_bytes:
            events += self._drop(self._one("SELECT min(id) FROM dead_letter"))
            letters += 1
        if events:
            self._count("shed_dead_letters", events)
        return Moved(letters, events)

    def purge(self, ids: Sequence[int]) -> Moved:
        """Drop dead letters that an operator does not want; those that are none any more are passed over."""
        dropped = [self._drop(letter_id) for letter_id in ids]
        events = sum(dropped)
        self._count("purged", events)
        return Moved(sum(map(bool, dropped)), events)

    def _drop(self, letter_id: int) -> int:
        """Remove a dead letter with its body; returns its events, 0 where there is none."""
        row = self._db.execute(
            "DELETE FROM dead_letter WHERE id = ? RETURNING window_id, envelope_id, body_id, events, bytes",
            (letter_id,),
        ).fetchone()
        if row is None:
            return 0
        window_id, envelope_id, body_id, events, size = row
        if body_id:
            self._db.execute("DELETE FROM body WHERE id = ?", (body_id,))
        self._segments.drop_envelope(window_id, envelope_id)
        self._bytes = None if self._bytes is None else self._bytes - size
        return int(events)

    def ids(self) -> list[int]:
        """Return the ids of all, the oldest first."""
        return letter_ids(self._db)

    def resend(self, ids: Sequence[int]) -> Moved:
        """Make dead letters pending again (rule 2); those that are none any more, or are damaged, are passed over."""
        windows: dict[int, list[tuple[Any, ...]]] = {}
        for letter_id in ids:
            row = self._db.execute(
                f"DELETE FROM dead_letter WHERE id = ? AND status != ? RETURNING {_WITHOUT_BATCH}, body_id, bytes",  # noqa: S608
                (letter_id, DAMAGED),
            ).fetchone()
            if row is None:
                continue
            *columns, body_id, size = row
            self._segments.add(*columns, None, body_id)
            self._bytes = None if self._bytes is None else self._bytes - size
            windows.setdefault(columns[0], []).append(row)
        pending = tuple(self._pending(window_id, rows) for window_id, rows in windows.items())
        return Moved(sum(map(len, windows.values())), sum(window.events for window in pending), pending)

    def _pending(self, window_id: int, rows: list[tuple[Any, ...]]) -> PendingWindow:
        """Sum up what was made pending in a window; its session's isolation begins anew."""
        (row,) = self._db.execute(
            "SELECT key_id, secret, session_id FROM window JOIN session ON session.id = session_id"
            " JOIN key ON key.id = key_id WHERE window.id = ?",
            (window_id,),
        )
        key_id, key, session_id = row
        self._db.execute("UPDATE session SET refusals = 0 WHERE id = ?", (session_id,))
        likenesses = [self._segments.likeness(envelope_id) for envelope_id in sorted({row[6] for row in rows})]
        last = likenesses[-1]
        events, events_bytes, deflated_bytes, finals = (sum(row[column] for row in rows) for column in (2, 3, 4, 8))
        sizes = (events, events_bytes, deflated_bytes)
        shape = (*sizes, min(row[9] for row in rows), finals, last, max(parting(last, one) for one in likenesses))
        return PendingWindow(key_id, key, session_id, window_id, *shape)


# -- reading, on a connection of the reader's own


def letter_ids(reader: apsw.Connection) -> list[int]:
    """Return the ids of all dead letters, the oldest first."""
    return [letter_id for (letter_id,) in reader.execute("SELECT id FROM dead_letter ORDER BY id")]


def read_letter(reader: apsw.Connection, letter_id: int) -> DeadLetter | None:
    """Return what there is to say of a dead letter; None where there is none of that id."""
    row = reader.execute(
        "SELECT dead_letter.id, secret, session.name, window.name, address, is_final, events, bytes, status, answer,"
        " accepted_at, died_at FROM dead_letter JOIN window ON window.id = window_id"
        " JOIN session ON session.id = session_id JOIN key ON key.id = key_id WHERE dead_letter.id = ?",
        (letter_id,),
    ).fetchone()
    if row is None:
        return None
    number, secret, session, window, address, is_final, *rest = row
    return DeadLetter(number, fingerprint(secret), session, window, address, bool(is_final), *rest)


def read_content(reader: apsw.Connection, letter: DeadLetter) -> bytes | None:
    """Return what a dead letter holds, as JSON; None where it has gone.

    It is the upstream batch that was refused; of a damaged one a text, which is what the disk gives of its deflated
    events, in base64.
    """
    row = reader.execute(
        "SELECT head, tail, last_activity, address, is_final, events_bytes, deflated FROM dead_letter"
        " LEFT JOIN envelope ON envelope.id = envelope_id LEFT JOIN body ON body.id = body_id"
        " WHERE dead_letter.id = ?",
        (letter.id,),
    ).fetchone()
    if row is None:
        return None
    head, tail, last_activity, address, is_final, events_bytes, deflated = row
    if letter.is_damaged:
        return b'"%b"' % b64encode(deflated if isinstance(deflated, bytes) else b"")
    run = inflate_segment(deflated, events_bytes)
    return body_prefix(Envelope(head, tail), last_activity, address) + run + body_suffix(is_final=bool(is_final))


def read_letters(reader: apsw.Connection) -> Iterator[DeadLetter]:
    """Yield all dead letters, the oldest first; those that go meanwhile are passed over."""
    for letter_id in letter_ids(reader):
        letter = read_letter(reader, letter_id)
        if letter is not None:
            yield letter
