"""The last line of every test that lets events in: the conservation account of law 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from relay.spool.values import Account

_GONE = ("delivered", "dead_lettered", "purged", "shed")
_SPOOLED = ("pending", "sealed")


def assert_accounted(account: Account | Mapping[str, Any], **expected: int) -> None:
    """Assert that every accepted event is accounted for, and whatever figures the test knows.

    Args:
        account: Of a spool, or the `account` of `/status`.
        expected: Figures by their names, such as `delivered=12, spooled=0`.
    """
    figures: Mapping[str, Any] = msgspec.structs.asdict(account) if isinstance(account, Account) else account
    assert {name: figures[name] for name in expected} == expected, figures
    assert min(figures[name] for name in (*_GONE, *_SPOOLED, "accepted")) >= 0, figures
    assert figures["accepted"] == sum(figures[name] for name in (*_GONE, *_SPOOLED)), figures
    assert figures["spooled"] == sum(figures[name] for name in _SPOOLED), figures
    assert figures["is_balanced"] is True
    assert (figures["spooled"] == 0) == (figures["segments"] == 0), figures
    assert figures["segments"] <= figures["spooled"], figures
    assert (figures["dead_letters"] == 0) == (figures["dead_lettered"] == 0) == (figures["dead_letter_bytes"] == 0), (
        figures
    )
