"""What the listener says of itself."""

from __future__ import annotations

import msgspec


class ListenerStatistics(msgspec.Struct, frozen=True):
    """What a listener did and holds."""

    open_connections: int
    """Connections being served now; refused ones are not among them."""
    connections_total: int
    """Connections accepted and served."""
    refused_connections_total: int
    """Connections beyond `max_connections`: told 503, or closed at once where too many were being told."""
    accept_errors_total: int
    """Failed accepts for want of file descriptors or memory."""
    requests_total: int
    """Requests answered, refusals included."""
    buffered_bytes: int
    """Body bytes held now, received or being handled, over all connections."""
    overloads_total: int
    """Requests answered 503 for `max_buffered_bytes`."""
    bad_requests_total: int
    """Requests whose framing could not be trusted, or whose head was too large; answered 400, 431 or 501."""
    handler_errors_total: int
    """Exceptions of handlers; answered 500."""
    timeouts_total: dict[str, int]
    """Connections ended for being overdue, by `Phase` value: idle, header, body, write, linger."""
