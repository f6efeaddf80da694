"""Header fields: which of them pass a proxy, and what lists, directives, tags and dates in them say (RFC 9110, 9111).

Rules:
1. Names are lower-case bytes. Fields keep their order and their repeats; a repeated field is read as one list.
2. What cannot be read is as if it were not there, but for what would make an answer live longer: that counts as 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from email.utils import mktime_tz, parsedate_tz
from typing import TypeAlias

Fields: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Header lines: names lower-case, and values."""

HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"proxy-authentication-info"),
    }
)
"""Fields of one connection (RFC 9110, 7.6.1 and 11.7); so are all that Connection names. `proxy-status` is not: like
`via` it tells of all proxies on the way (RFC 9209, 2)."""

MAX_TOKEN_BYTES = 8_192
"""Of a bearer token: an OAuth access token may be a signed one of a kilobyte or two, a header cannot be longer."""

MAX_DELTA_SECONDS = 2**31
"""A longer time in a header is taken for this (RFC 9111, 1.2.2)."""

_DIRECTIVE = re.compile(rb"""([^\s,;="]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*)))?""")
_ENTITY_TAG = re.compile(rb'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def is_token(token: bytes) -> bool:
    """Return whether something can be a bearer token: visible ASCII without blanks."""
    return bool(token) and len(token) <= MAX_TOKEN_BYTES and all(0x21 <= byte <= 0x7E for byte in token)


def find_field(fields: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return a field's value, its repeats joined by `, `; None without it."""
    values = [value for each, value in fields if each == name]
    return b", ".join(values) if values else None


def list_members(value: bytes | None) -> list[bytes]:
    """Return the members of a list of tokens, lower-case."""
    return [member for each in (value or b"").split(b",") if (member := each.strip().lower())]


def end_to_end(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Return the fields that are for the other end, not for the connection they came by."""
    fields = tuple(fields)
    named = HOP_BY_HOP.union(list_members(find_field(fields, b"connection")))
    return without(fields, named)


def parse_directives(value: bytes | None) -> Mapping[bytes, bytes]:
    """Return the directives of a Cache-Control field by lower-case name; the first counts (RFC 9111, 4.2.1)."""
    directives: dict[bytes, bytes] = {}
    for name, quoted, bare in _DIRECTIVE.findall(value or b""):
        directives.setdefault(name.lower(), quoted or bare)
    return directives


def parse_number(value: bytes | None) -> int | None:
    """Return a whole number; None where there is none. Of a very long one, what it begins with."""
    return int(value[:15]) if value is not None and value.isdigit() else None


def parse_seconds(value: bytes | None) -> int | None:
    """Return delta-seconds; None where there are none, or what is there is no number."""
    seconds = parse_number(value)
    return None if seconds is None else min(seconds, MAX_DELTA_SECONDS)


def parse_date(value: bytes | None) -> float | None:
    """Return an HTTP date as seconds since the epoch; None where it is none."""
    date = parsedate_tz(value.decode("latin-1")) if value else None
    if date is None:
        return None
    try:
        return mktime_tz(date)
    except (ValueError, OverflowError):
        return None


def is_not_modified(request: Iterable[tuple[bytes, bytes]], answer: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether the client has what a 200 would bring: its condition holds (RFC 9110, 13.1.2 and 13.1.3)."""
    request, answer = tuple(request), tuple(answer)
    tags = find_field(request, b"if-none-match")
    if tags is not None:
        own = _ENTITY_TAG.fullmatch(find_field(answer, b"etag") or b"")
        return tags.strip() == b"*" or (own is not None and own[1] in _ENTITY_TAG.findall(tags))
    since = parse_date(find_field(request, b"if-modified-since"))
    changed_at = parse_date(find_field(answer, b"last-modified"))
    return since is not None and changed_at is not None and changed_at <= since


def without(fields: Iterable[tuple[bytes, bytes]], names: frozenset[bytes]) -> Fields:
    """Return the fields but those of some names."""
    return tuple(each for each in fields if each[0] not in names)


def seconds_of(directives: Mapping[bytes, bytes], name: bytes, *, otherwise: float) -> float:
    """Return a directive's seconds, 0 where they cannot be read, `otherwise` without the directive."""
    if name not in directives:
        return otherwise
    seconds = parse_seconds(directives[name])
    return 0.0 if seconds is None else float(seconds)
