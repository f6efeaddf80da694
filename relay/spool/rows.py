"""Reading single values."""

from __future__ import annotations

from typing import Any

import apsw


def first_value(connection: apsw.Connection, sql: str, bindings: tuple[Any, ...] = ()) -> Any:
    """Return the first column of the first row; None where there is no row."""
    row = connection.execute(sql, bindings).fetchone()
    return None if row is None else row[0]
