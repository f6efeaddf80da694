"""Looks for damage: what SQLite says of its pages, whether rows agree with one another, and every byte of events.

Reads only, beside a running relay too, as of one instant for each statement. What cannot be read is a finding like
others: the looking goes on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import apsw
import msgspec

from relay.protocol.codings import crc32, inflate_segment
from relay.protocol.node_json import split_events
from relay.spool.account import read_account
from relay.spool.segments import is_intact

_MAX_MESSAGES = 20
"""Of SQLite's check, and of damaged segments; the rest is counted."""

_ROWS_AT_A_TIME = 200
"""Segments read by one statement: a few MiB, and no statement holds on to the log for long."""

_HOLDER = (
    "CREATE TEMP VIEW holder AS SELECT window_id, envelope_id, body_id FROM segment"
    " UNION ALL SELECT window_id, envelope_id, body_id FROM dead_letter WHERE status <> 0"
)

_RULES = {
    "segments without their bytes": "SELECT 1 FROM holder WHERE body_id NOT IN (SELECT id FROM body)",
    "segments that share their bytes": "SELECT 1 FROM holder GROUP BY body_id HAVING count(*) > 1",
    "segments without their envelope": "SELECT 1 FROM holder WHERE envelope_id NOT IN (SELECT id FROM envelope)",
    "batches without their envelope": "SELECT 1 FROM batch WHERE envelope_id NOT IN (SELECT id FROM envelope)",
    "segments without their window": "SELECT 1 FROM holder WHERE window_id NOT IN (SELECT id FROM window)",
    "windows without their session": "SELECT 1 FROM window WHERE session_id NOT IN (SELECT id FROM session)",
    "sessions without their key": "SELECT 1 FROM session WHERE key_id NOT IN (SELECT id FROM key)",
    "sessions without a mark": "SELECT 1 FROM session WHERE id NOT IN (SELECT session_id FROM mark)",
    "segments of a batch that is not there": (
        "SELECT 1 FROM segment WHERE batch_id IS NOT NULL AND batch_id NOT IN (SELECT id FROM batch)"
    ),
    "batches that have not the events of their segments": (
        "SELECT 1 FROM batch LEFT JOIN (SELECT batch_id, sum(events) total FROM segment GROUP BY batch_id) found"
        " ON batch_id = batch.id WHERE total IS NOT events"
    ),
    "bytes that belong to nothing": (
        "SELECT 1 FROM body WHERE id NOT IN (SELECT body_id FROM segment UNION ALL SELECT body_id FROM dead_letter)"
    ),
}
"""What no spool has, by what it is; each a query that finds it, on a connection with `_HOLDER`."""

_SEGMENTS = (
    "SELECT window_id, address, events, events_bytes, segment.crc, body.crc, deflated FROM segment"
    " JOIN body ON body.id = body_id WHERE (window_id, address) > (?, ?) ORDER BY window_id, address LIMIT ?"
)

_LETTERS = (
    "SELECT dead_letter.id, 0, events, events_bytes, dead_letter.crc, body.crc, deflated FROM dead_letter"
    " JOIN body ON body.id = body_id WHERE (dead_letter.id, 0) > (?, ?) AND status <> 0"
    " ORDER BY dead_letter.id LIMIT ?"
)


class Verification(msgspec.Struct, frozen=True):
    """What there is in a spool, and what is wrong with it."""

    segments: int
    """Of which every byte was looked at, dead letters included."""
    events: int
    """In them."""
    findings: tuple[str, ...]
    """One line each; none where nothing is wrong."""


def verify(reader: apsw.Connection, now: float) -> Verification:
    """Look at a whole spool.

    Args:
        reader: A connection that only reads.
        now: Wall clock.
    """
    findings: list[str] = []

    def attempt(what: str, look: Callable[[], Iterator[str]]) -> None:
        try:
            findings.extend(look())
        except apsw.Error as error:
            findings.append(f"{what} cannot be read: {error}")

    attempt("the database", lambda: _check_pages(reader))
    attempt("the account", lambda: _check_account(reader, now))
    reader.execute(_HOLDER)
    for what, sql in _RULES.items():
        attempt(what, lambda what=what, sql=sql: _check_rule(reader, what, sql))  # type: ignore[misc]
    reader.execute("DROP VIEW holder")
    bodies = _Bodies(reader)
    attempt("segments", lambda: bodies.check("segment of window", _SEGMENTS))
    attempt("dead letters", lambda: bodies.check("dead letter", _LETTERS))
    return Verification(bodies.segments, bodies.events, tuple(findings))


def _check_pages(reader: apsw.Connection) -> Iterator[str]:
    for (message,) in reader.execute(f"PRAGMA integrity_check({_MAX_MESSAGES})"):
        if message != "ok":
            yield f"SQLite: {' '.join(str(message).split())}"


def _check_account(reader: apsw.Connection, now: float) -> Iterator[str]:
    account = read_account(reader, now)
    if not account.is_balanced:
        yield (
            f"the account does not add up: accepted {account.accepted}, delivered {account.delivered}, spooled"
            f" {account.spooled}, dead-lettered {account.dead_lettered}, purged {account.purged}, shed {account.shed}"
        )
    if account.damaged:
        yield f"{account.damaged} events were found damaged before: lucent-relay spool dead-letters list"


def _check_rule(reader: apsw.Connection, what: str, sql: str) -> Iterator[str]:
    count = reader.execute(f"SELECT count(*) FROM ({sql})").get  # noqa: S608 - our own queries
    if count:
        yield f"{count} {what}"


class _Bodies:
    """Goes through the bytes of all events."""

    def __init__(self, reader: apsw.Connection) -> None:
        self._reader = reader
        self.segments = self.events = 0

    def _read(self, sql: str, after: tuple[int, int]) -> Any:
        return self._reader.execute(sql, (*after, _ROWS_AT_A_TIME)).fetchall()

    def check(self, what: str, sql: str) -> Iterator[str]:
        after = (0, -1)
        damaged = 0
        rows: Any
        while rows := self._read(sql, after):
            for row in rows:
                first, second, events = row[:3]
                after = (first, second)
                self.segments += 1
                self.events += events
                problem = _problem_of(*row[2:])
                damaged += bool(problem)
                if problem and damaged <= _MAX_MESSAGES:
                    yield f"{what} {first}{f' at {second}' if second else ''}: {problem}"
        if damaged > _MAX_MESSAGES:
            yield f"{damaged} damaged in all"


def _problem_of(events: int, events_bytes: int, crc: int, body_crc: Any, deflated: Any) -> str:
    """Say what is wrong with a segment; empty where nothing is."""
    if not is_intact(deflated, body_crc):
        return "its bytes do not have the checksum that they were stored with"
    try:
        run = inflate_segment(deflated, events_bytes)
    except ValueError as error:
        return str(error)
    if crc32(run) != crc:
        return "its events do not have the checksum that they were stored with"
    found = len(split_events(run))
    return "" if found == events else f"it has {found} events, not {events}"
