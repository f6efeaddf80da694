"""The conservation account, as the disk has it."""

from __future__ import annotations

from typing import Any

import apsw

from relay.spool.values import Account

_SHED = {"shed_dead_letters": "dead_letters", "shed_sessions": "sessions"}
"""Counters of shed events, with the name of what they were shed as."""


def read_account(reader: apsw.Connection, now: float) -> Account:
    """Return the account of one instant.

    Args:
        reader: A connection in no transaction.
        now: Wall clock.
    """

    def rows_of(sql: str) -> list[tuple[Any, ...]]:
        return reader.execute(sql).fetchall()

    with reader:  # one transaction, so one instant
        counters = dict(rows_of("SELECT name, value FROM counter"))
        [(spooled, segments, oldest_at)] = rows_of(
            "SELECT coalesce(sum(events), 0), count(*), min(accepted_at) FROM segment"
        )
        [(sealed,)] = rows_of("SELECT coalesce(sum(events), 0) FROM batch")
        [(dead, damaged, letters, letter_bytes)] = rows_of(
            "SELECT coalesce(sum(events), 0), coalesce(sum(events) FILTER (WHERE status = 0), 0), count(*),"
            " coalesce(sum(bytes), 0) FROM dead_letter"
        )
    shed = {reason: counters[name] for name, reason in _SHED.items()}
    gone = counters["delivered"] + counters["purged"] + sum(shed.values())
    return Account(
        accepted=counters["accepted"],
        delivered=counters["delivered"],
        dead_lettered=dead,
        damaged=damaged,
        purged=counters["purged"],
        shed=sum(shed.values()),
        shed_by_reason=shed,
        pending=spooled - sealed,
        sealed=sealed,
        segments=segments,
        dead_letters=letters,
        dead_letter_bytes=letter_bytes,
        lag_seconds=0.0 if oldest_at is None else max(0.0, now - oldest_at),
        spooled=spooled,
        is_balanced=counters["accepted"] == gone + dead + spooled,
    )
