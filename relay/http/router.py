"""Which handler answers a path, and what is said where none does.

Paths are matched exactly, or but for their last segment; a relay has few of them and their limits differ, so each is
a `Route` of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from relay.http.message import Admit, Handler, HeaderList, Request, Response, error_response


class Route(msgspec.Struct, frozen=True):
    """One path and what may be done there."""

    path: str
    """Exact path, as it stands in the request line; with `*` for its last segment, any that is not empty."""
    handlers: Mapping[str, Handler]
    """By method. HEAD falls back to GET."""
    admit: Admit | None = None
    """Refuses on headers alone, before the body is read; not asked for OPTIONS."""
    max_body_bytes: int = 0
    """Largest body on the wire; 0 where no body is expected (any body is then refused with 413)."""
    headers: HeaderList = ()
    """Added to every response of this route, the engine's own (408, 413, 503 …) included."""
    has_options: bool = True
    """Whether OPTIONS without a handler is answered 204 with `allow`, rather than 405 like any other method."""

    @property
    def allow(self) -> bytes:
        """The `allow` header's value."""
        methods = {*self.handlers}
        if self.has_options:
            methods.add("OPTIONS")
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods)).encode()


class Match(msgspec.Struct, frozen=True):
    """A request's handler, together with the limits of its route."""

    handler: Handler
    """To be called once the body is there."""
    route: Route
    """Limits, `admit` and headers."""


class Router:
    """Resolves requests to routes."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = {route.path: route for route in routes}
        self._matches = {
            (method, route.path): Match(handler, route)
            for route in self._routes.values()
            for method, handler in route.handlers.items()
        }

    def match(self, request: Request) -> Match | Response:
        """Return the handler for a request, or the answer where there is none (404, 405, plain OPTIONS)."""
        found = self._matches.get((request.method, request.path))
        if found is not None:
            return found
        route = self._routes.get(request.path)
        if route is None:
            parent, _, segment = request.path.rpartition("/")
            route = self._routes.get(f"{parent}/*") if segment else None
        if route is None:
            return error_response(404, "Not found")
        handler = route.handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is not None:
            return Match(handler, route)
        if request.method == "OPTIONS" and route.has_options:
            return Response(204, headers=((b"allow", route.allow), *route.headers))
        return error_response(405, "Method not allowed", headers=((b"allow", route.allow), *route.headers))
