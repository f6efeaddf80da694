"""What the admin listener serves: life-signs, metrics, and the account.

`/livez` is 200 while the process can answer at all; it never depends on upstream. `/readyz` is 200 while batches are
accepted; an outage of upstream does not change that, since taking batches then is what the relay is for. Both of
them and `/status` give reasons in JSON.

What an operator may ask for is a POST with a JSON object, declared as such: a web page that somebody looks at beside
the relay cannot send that without being asked first (CORS), and it is never told yes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from relay.errors import SpoolUnavailable
from relay.http.message import Request, Response, error_response, json_response
from relay.http.router import Route
from relay.ops.exposition import CONTENT_TYPE, expose
from relay.spool.values import LAST_ID
from relay.telemetry import Histogram

MAX_ORDER_BYTES = 1_048_576
"""A hundred thousand ids of dead letters."""


class _Letters(msgspec.Struct, forbid_unknown_fields=True):
    """Which dead letters: those of these ids, or all."""

    ids: list[Annotated[int, Meta(ge=0, le=LAST_ID)]] | None


class _Key(msgspec.Struct, forbid_unknown_fields=True):
    """Which key."""

    key: str


class Observed(Protocol):
    """What the admin listener asks of the application."""

    async def statistics(self) -> Mapping[str, Any]:
        """Return the components' statistics by source, the conservation account among them."""

    def not_ready(self) -> Sequence[str]:
        """Return why no batches are accepted now; empty while they are."""

    def warnings(self, sources: Mapping[str, Any]) -> Sequence[str]:
        """Return what an operator should look at although batches are accepted, going by the statistics."""

    async def move_dead_letters(self, action: Literal["resend", "purge"], ids: Sequence[int] | None) -> tuple[int, int]:
        """Send dead letters again, or drop them, all of them without `ids`; returns how many, and their events."""

    def release_key(self, name: str) -> bool:
        """Try a held key at once, by its fingerprint; returns whether there is one."""

    def identity(self) -> Mapping[str, Any]:
        """Return version, process id, start, state and addresses."""


def admit_order(request: Request) -> Response | None:
    """Refuse what a web page could send unasked."""
    if request.header(b"content-type").partition(b";")[0].strip().lower() == b"application/json":
        return None
    return error_response(415, "Declare the body as application/json")


def _summarise(histogram: Histogram) -> Any:
    """Return what `/status` has of the one thing in statistics that is no plain value."""
    return msgspec.to_builtins(histogram.summary())


class Admin:
    """The handlers.

    Args:
        observed: The application.
    """

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def routes(self) -> list[Route]:
        """Return the routes to serve."""
        handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/livez": self.live,
            "/readyz": self.ready,
            "/metrics": self.metrics,
            "/status": self.status,
        }
        orders: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/dead-letters/resend": partial(self.move, "resend"),
            "/dead-letters/purge": partial(self.move, "purge"),
            "/keys/release": self.release,
        }
        return [
            *(Route(path, {"GET": handler}) for path, handler in handlers.items()),
            *(
                Route(path, {"POST": handler}, admit=admit_order, max_body_bytes=MAX_ORDER_BYTES)
                for path, handler in orders.items()
            ),
        ]

    async def move(self, action: Literal["resend", "purge"], request: Request) -> Response:
        """Send dead letters again, or drop them."""
        try:
            order = msgspec.json.decode(request.body, type=_Letters)
        except msgspec.DecodeError as error:
            return error_response(400, f'Say {{"ids": [1, 2]}}, or {{"ids": null}} for all: {error}')
        try:
            letters, events = await self._observed.move_dead_letters(action, order.ids)
        except SpoolUnavailable as error:
            return error_response(503, str(error))
        return json_response(200, {"letters": letters, "events": events})

    async def release(self, request: Request) -> Response:
        """Try a held key at once, and let its clients in."""
        try:
            order = msgspec.json.decode(request.body, type=_Key)
        except msgspec.DecodeError as error:
            return error_response(400, f'Say {{"key": "key-…"}}: {error}')
        if not self._observed.release_key(order.key):
            return error_response(404, f"No key {order.key} is held. Held keys have names like key-1a2b3c4d in /status")
        return json_response(200, {"released": order.key})

    async def live(self, _request: Request) -> Response:
        """Answer that the process is alive."""
        return json_response(200, {"live": True})

    async def ready(self, _request: Request) -> Response:
        """Answer whether batches are accepted."""
        reasons = list(self._observed.not_ready())
        return json_response(503 if reasons else 200, {"ready": not reasons, "reasons": reasons})

    async def metrics(self, _request: Request) -> Response:
        """Answer a scrape."""
        try:
            sources = await self._observed.statistics()
        except SpoolUnavailable as error:
            return error_response(503, str(error))
        return Response(200, expose(sources), ((b"content-type", CONTENT_TYPE),))

    async def status(self, _request: Request) -> Response:
        """Answer with everything an operator asks first."""
        reasons = list(self._observed.not_ready())
        value: dict[str, Any] = {**self._observed.identity(), "ready": not reasons, "reasons": reasons}
        try:
            sources = await self._observed.statistics()
        except SpoolUnavailable as error:
            value["warnings"] = [str(error)]
        else:
            value["warnings"] = list(self._observed.warnings(sources))
            value |= {
                name: msgspec.to_builtins(statistics, str_keys=True, enc_hook=_summarise)
                for name, statistics in sources.items()
            }
        return json_response(200, value)
