"""Whose batch is it: the client's key, from where the contract lets it be, and the upstream keys it stands for.

Rules:
1. A session stays with one upstream key. Which it is follows from its id and its pool alone, so that a restart or
   another relay decides alike; where the pool has changed, the spool knows better: it looks for the session under the
   pool's other keys first. So a session changes its key only if that has left the pool, and then what is spooled is
   delivered by the old one, if upstream still takes it.
2. Keys that are refused are answered as upstream would, so that an SDK behaves alike.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from relay.config import Keys
from relay.http.message import Request
from relay.protocol.rendezvous import rank

_KEY = re.compile(r"[!-~]{1,256}")
"""Printable ASCII, since it is sent on as a header's value; Lucent's keys have about 40 characters."""

_MAX_FIELDS = 100
"""Of a query, of which a beacon has one; more are nobody's we know."""


class KeyPolicy:
    """Which client keys are taken, and which upstream keys their sessions go to.

    Args:
        settings: The configuration's section.
    """

    def __init__(self, settings: Keys) -> None:
        self._default = settings.default
        self._pools = settings.pools
        self._accepted: frozenset[str] | None = None
        """None for any."""
        if settings.accept == "listed":
            self._accepted = frozenset((*settings.listed, *settings.pools, settings.default))

    def client_key(self, request: Request) -> str | None:
        """Return the key of a request's client: empty where there is none, None where it is not taken."""
        key = find_key(request, self._default)
        if key and self._accepted is not None and key not in self._accepted:
            return None
        return key

    def pool(self, client_key: str) -> tuple[str, ...]:
        """Return all upstream keys that a client key stands for."""
        return self._pools.get(client_key) or (client_key,)

    def upstream_keys(self, client_key: str, session_id: str) -> tuple[str, ...]:
        """Return the session's upstream key, then those under which it may be known already (rule 1)."""
        pool = self._pools.get(client_key)
        return rank(session_id, pool) if pool else (client_key,)


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
