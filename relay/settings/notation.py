"""TOML notation of single values, read and written. Whole files are read by `tomllib`.

Rules:
1. Written values read back as themselves.
2. Nothing written breaks a line, whatever control characters a value holds.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

DELETE = "\x7f"
"""The one control character that JSON leaves bare and TOML does not."""

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
"""Keys that TOML takes without quotes."""


def write_value(value: Any) -> str:
    """Return a value in TOML notation, on one line. Integers are grouped: `1_048_576`."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:_}"
        case str():
            # JSON's escapes are TOML's too. Text beyond ASCII stays: JSON would escape it in halves.
            return json.dumps(value, ensure_ascii=False).replace(DELETE, "\\u007f")
        case list() | tuple():
            return f"[{', '.join(map(write_value, value))}]"
        case dict():
            return f"{{{', '.join(f'{_write_key(key)} = {write_value(member)}' for key, member in value.items())}}}"
        case _:  # floats, and the dates that no option takes
            return str(value)


def _write_key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else str(write_value(key))


def read_value(text: str) -> Any:
    """Return the value that `text` is in TOML notation: a number, a quoted string, an array.

    Raises:
        ValueError: It is not the notation of exactly one value.
    """
    # A text with a line break could otherwise bring statements of its own.
    if "\n" in text:
        raise ValueError("a value is one line")
    return tomllib.loads(f"value = {text}")["value"]
