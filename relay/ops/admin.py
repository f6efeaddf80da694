"""What the admin listener serves: life-signs, metrics, and the account.

`/livez` is 200 while the process can answer at all; it never depends on upstream. `/readyz` is 200 while batches are
accepted; an outage of upstream does not change that, since taking batches then is what the relay is for. Both of
them and `/status` give reasons in JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from relay.errors import SpoolUnavailable
from relay.http.message import Request, Response, error_response, json_response
from relay.http.router import Route
from relay.ops.exposition import CONTENT_TYPE, expose


class Observed(Protocol):
    """What the admin listener asks of the application."""

    async def statistics(self) -> Mapping[str, Any]:
        """Return the components' statistics by source, the conservation account among them."""

    def not_ready(self) -> Sequence[str]:
        """Return why no batches are accepted now; empty while they are."""

    def warnings(self, sources: Mapping[str, Any]) -> Sequence[str]:
        """Return what an operator should look at although batches are accepted, going by the statistics."""

    def identity(self) -> Mapping[str, Any]:
        """Return version, process id, start, state and addresses."""


class Admin:
    """The handlers.

    Args:
        observed: The application.
        buckets: Upper bounds of the acknowledgement histogram, seconds.
    """

    def __init__(self, observed: Observed, buckets: Sequence[float]) -> None:
        self._observed = observed
        self._buckets = buckets

    def routes(self) -> list[Route]:
        """Return the routes to serve."""
        handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/livez": self.live,
            "/readyz": self.ready,
            "/metrics": self.metrics,
            "/status": self.status,
        }
        return [Route(path, {"GET": handler}) for path, handler in handlers.items()]

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
        return Response(200, expose(sources, self._buckets), ((b"content-type", CONTENT_TYPE),))

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
            value |= {name: msgspec.to_builtins(statistics, str_keys=True) for name, statistics in sources.items()}
        return json_response(200, value)
