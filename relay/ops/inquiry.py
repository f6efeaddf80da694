"""Asks a running relay how it is: the client side of the admin listener, for `lucent-relay status`.

Plain blocking HTTP of the standard library: one question, nothing concurrent, and proxies of the environment are
not consulted, as they would be by `urllib`.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any

import msgspec
import orjson

from relay.protocol.endpoint import parse_address

PATIENCE_SECONDS = 5.0
"""For connecting and for each read. A relay that takes longer to say how it is, is not well."""

MAX_ANSWER_BYTES = 16_777_216
"""Far above any status; ends the reading of something that is no relay."""

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - not listened on, but replaced
"""Addresses to listen on that are none to connect to, with the one that stands for them here."""


class Answer(msgspec.Struct, frozen=True):
    """What the relay said."""

    ready: bool
    """True where `/readyz` was answered 200: it accepts batches."""
    status: bytes
    """The JSON of `/status`, as it came."""


class Unreachable(msgspec.Struct, frozen=True):
    """There is no relay to ask."""

    reason: str
    """What was tried, and how it failed."""


def ask(address: str) -> Answer | Unreachable:
    """Ask the relay whose admin listener has an address.

    Args:
        address: `listen.admin` of its configuration.
    """
    host, port = parse_address(address)
    if port == 0:
        return Unreachable(
            "listen.admin has port 0, so only the relay's log knows it; give it by --set listen.admin=HOST:PORT"
        )
    connection = http.client.HTTPConnection(WILDCARDS.get(host, host), port, timeout=PATIENCE_SECONDS)
    try:
        ready, _ = _get(connection, "/readyz")
        code, status = _get(connection, "/status")
    except (OSError, http.client.HTTPException) as error:
        return Unreachable(f"no relay answers at http://{address}: {error}")
    finally:
        connection.close()
    if code != http.client.OK or not _is_object(status):
        return Unreachable(f"http://{address}/status answers {code}, but not with a relay's status")
    return Answer(ready == http.client.OK, status)


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read(MAX_ANSWER_BYTES)
    # Ends the response, so that the next request can be sent; reads nothing unless the answer was too long.
    response.close()
    return response.status, body


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def summarise(answer: Answer) -> str:
    """Return the answer for people: whether it is ready, then a line for each figure, names aligned."""
    lines = list(_flatten("", orjson.loads(answer.status)))
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(["ready" if answer.ready else "not ready", *(f"{name:<{width}}  {text}" for name, text in lines)])


def _flatten(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the figures within a JSON value, with dotted names."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if members is None:
        yield name, value if isinstance(value, str) else orjson.dumps(value).decode()
        return
    for key, member in members:
        yield from _flatten(f"{name}.{key}" if name else str(key), member)
