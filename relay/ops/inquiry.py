"""Asks a running relay how it is, or for something: the client side of the admin listener, for the command line.

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

ORDER_SECONDS = 300.0
"""For moving all dead letters, some 250 000 at most by default, on a slow disk."""

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
    connection = _connect(address)
    if isinstance(connection, Unreachable):
        return connection
    try:
        ready, _ = _get(connection, "/readyz")
        code, status = _get(connection, "/status")
    except (OSError, http.client.HTTPException) as error:
        return _no_answer(address, error)
    finally:
        connection.close()
    if code != http.client.OK or not _is_object(status):
        return Unreachable(f"http://{address}/status answers {code}, but not with a relay's status")
    return Answer(ready == http.client.OK, status)


class Outcome(msgspec.Struct, frozen=True):
    """What the relay did."""

    status: int
    """200 where it did it."""
    value: dict[str, Any]
    """Its answer; `error` says why not."""


def order(address: str, path: str, what: dict[str, Any]) -> Outcome | Unreachable:
    """Ask the relay whose admin listener has an address to do something.

    Args:
        address: `listen.admin` of its configuration.
        path: What to do.
        what: To what.
    """
    connection = _connect(address, ORDER_SECONDS)
    if isinstance(connection, Unreachable):
        return connection
    try:
        connection.request("POST", path, orjson.dumps(what), {"content-type": "application/json"})
        response = connection.getresponse()
        body = response.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        return _no_answer(address, error)
    finally:
        connection.close()
    if not _is_object(body):
        return Unreachable(f"http://{address}{path} answers {response.status}, but not as a relay does")
    return Outcome(response.status, orjson.loads(body))


def _connect(address: str, seconds: float = PATIENCE_SECONDS) -> http.client.HTTPConnection | Unreachable:
    host, port = parse_address(address)
    if port == 0:
        return Unreachable(
            "listen.admin has port 0, so only the relay's log knows it; give it by --set listen.admin=HOST:PORT"
        )
    return http.client.HTTPConnection(WILDCARDS.get(host, host), port, timeout=seconds)


def _no_answer(address: str, error: OSError | http.client.HTTPException) -> Unreachable:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return Unreachable(f"no relay answers at http://{address}: {reason} (name the relay's configuration by --config)")


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
        shown = round(value, 4) if isinstance(value, float) else value  # what follows is noise to people
        yield name, shown if isinstance(shown, str) else orjson.dumps(shown).decode()
        return
    for key, member in members:
        yield from _flatten(f"{name}.{key}" if name else str(key), member)
