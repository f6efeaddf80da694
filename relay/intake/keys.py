"""Whose batch is it: the client's key, from where the contract lets it be."""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from relay.http.message import Request

_KEY = re.compile(r"[!-~]{1,256}")
"""Printable ASCII, since it is sent on as a header's value; Lucent's keys have about 40 characters."""

_MAX_FIELDS = 100
"""Of a query, of which a beacon has one; more are nobody's we know."""


def find_key(request: Request, default: str) -> str | None:
    """Return the key of a request.

    Args:
        request: The key is looked for in `X-Lucent-Api-Key`, then, for `navigator.sendBeacon`, in `?api_key=`.
        default: For clients that send none; empty for none.

    Returns:
        The key; empty where there is none; None where what was sent can be no key.
    """
    value = request.headers.get(b"x-lucent-api-key")
    if value is not None:
        key = value.decode("latin-1").strip()
    elif request.query:
        try:
            key = parse_qs(request.query.decode("latin-1"), max_num_fields=_MAX_FIELDS).get("api_key", [""])[0]
        except ValueError:  # more fields than that
            return None
    else:
        key = ""
    key = key or default
    if key and _KEY.fullmatch(key) is None:
        return None
    return key
