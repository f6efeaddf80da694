"""How a benchmark says what it measured: to people as Markdown, to programs as one JSON object."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

T = TypeVar("T")


def show(report: T, lines_of: Callable[[T], Iterable[str]], *, as_json: bool) -> None:
    """Print a report.

    Args:
        report: What was measured.
        lines_of: Says it to people.
        as_json: Whether a program reads it.
    """
    print(msgspec.json.encode(report).decode() if as_json else "\n".join(lines_of(report)))
