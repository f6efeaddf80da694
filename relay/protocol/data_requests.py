"""The data API's requests: what is certain to be refused, by the published description.

Rules:
1. Only certain refusals count: what the description leaves open, or names no bound for, is upstream's to judge.
2. A repeated parameter is left to upstream, as is a parameter that nobody has described.
"""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qsl, unquote

MAX_LIMITS = {"/api/v1/issues": 200, "/api/v1/signals": 200, "/api/v1/insights": 100}
"""Largest `limit` of each list."""

STATUSES = ("unresolved", "ticket_created", "transient", "resolved")
"""What an issue's status may be."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_DECIMAL = re.compile(r"[+-]?\d{1,20}")


def is_one_segment(segment: str) -> bool:
    """Return whether a path's last segment stays one however upstream decodes it: no slash, no step up, no control."""
    text = unquote(unquote(segment))  # some decode twice
    return text.strip(".") != "" and not re.search(r"[/\\\x00-\x1f\x7f]", text)


def resource_of(path: str) -> str:
    """Return what two spellings of one resource's path have in common: an id is a UUID, in any case (RFC 9562, 4)."""
    return unquote(unquote(path)).lower()


def find_fault(method: str, path: str, query: bytes, body: bytes | None) -> str | None:
    """Return why upstream is certain to refuse a request; None where it may take it.

    Args:
        method: GET, HEAD or PATCH.
        path: Without the query.
        query: Undecoded.
        body: Of a PATCH; None where a content coding hides what it says.
    """
    if path in MAX_LIMITS:
        return _query_fault(query.decode("latin-1"), MAX_LIMITS[path], has_status=path == "/api/v1/issues")
    if _UUID.fullmatch(unquote(path.rpartition("/")[2])) is None:
        return "Invalid issue id: it must be a UUID"
    return _body_fault(body) if method == "PATCH" and body is not None else None


def _query_fault(query: str, max_limit: int, *, has_status: bool) -> str | None:
    fields = parse_qsl(query, keep_blank_values=True)
    limits = [value for name, value in fields if name == "limit"]
    if len(limits) == 1 and _DECIMAL.fullmatch(limits[0]) and not 1 <= int(limits[0]) <= max_limit:
        return f"Invalid limit: it must be 1 to {max_limit}"
    statuses = [value for name, value in fields if name == "status"]
    if has_status and len(statuses) == 1 and statuses[0] not in STATUSES:
        return f"Invalid status: it must be one of {', '.join(STATUSES)}"
    return None


def _body_fault(body: bytes) -> str | None:
    # As leniently as JavaScript may read it: broken characters are replaced, and every number is a double.
    try:
        value = json.loads(body.decode(json.detect_encoding(body), "replace"), parse_int=float)
    except RecursionError:
        return None
    except ValueError:
        return "Invalid request body: it must be JSON"
    if not isinstance(value, dict) or value.get("status") not in STATUSES:
        return f"Invalid request body: status must be one of {', '.join(STATUSES)}"
    return None
