"""Every exception of the relay.

The tree:

    RelayError
    ├── ConfigError             the configuration cannot be used (exit 78)
    ├── SpoolError
    │   ├── SpoolLocked         another relay owns the directory
    │   ├── SpoolSchemaMismatch the directory was written by another version
    │   └── SpoolUnavailable    the disk refused a read or write; safe to retry later
    │       └── SpoolDamaged    what is needed lies on a damaged page; retrying does not help, the rest still works
    ├── RefusedBatch            a client sent something we answer with a 4xx
    │   ├── InvalidBatch        400
    │   ├── TooLarge            413
    │   └── UnsupportedCoding   415
    └── UpstreamError           no usable answer from upstream; always safe to retry
        ├── ConnectFailed       nothing was sent
        ├── ExchangeFailed      the connection died on the way; upstream may have stored the batch
        │   └── Unanswered      before a byte of an answer
        ├── ExchangeTimedOut    as above, by our patience
        └── ReplyInvalid        upstream did not speak HTTP, or said too much

Expected results are values (`Verdict`, `Appended`), not exceptions. Messages name the value and the limit.
"""

from __future__ import annotations

from typing import Any


class RelayError(Exception):
    """Base of everything the relay raises on purpose."""


class ConfigError(RelayError):
    """The configuration cannot be used.

    Attributes:
        problems: One line a problem, each naming the option, the value and the bound.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class SpoolError(RelayError):
    """The spool cannot do what was asked."""


class SpoolLocked(SpoolError):
    """Another process holds the lock of the spool directory. The operator's to resolve."""


class SpoolSchemaMismatch(SpoolError):
    """The database was written by a version of the relay with another schema. The message says what to do."""


class SpoolUnavailable(SpoolError):
    """The disk refused a read or a write (full, read-only, I/O error). Nothing was committed; retry later."""


class SpoolDamaged(SpoolUnavailable):
    """A page of the database is damaged. Nothing was committed; whatever needs that page fails every time."""


class RefusedBatch(RelayError):
    """A client's batch is refused; the message goes back to the client.

    Attributes:
        status: The HTTP status that says so.
        details: zod-like issues, `[{"code", "path", "message", …}]`; empty where there are none.
    """

    status = 400

    def __init__(self, message: str, details: list[dict[str, Any]] | None = None) -> None:
        self.details = details or []
        super().__init__(message)


class InvalidBatch(RefusedBatch):
    """The body is not a replay batch by the published schema. The client's fault; the same body fails again."""

    status = 400


class TooLarge(RefusedBatch):
    """The body, decoded or not, is over a configured limit. The message says how to send it."""

    status = 413


class UnsupportedCoding(RefusedBatch):
    """The Content-Encoding is none that the relay reads."""

    status = 415


class UpstreamError(RelayError):
    """An attempt ended without an answer that can be used. Safe to retry: upstream is idempotent by sequence."""


class ConnectFailed(UpstreamError):
    """No connection: DNS, refused, unreachable, TLS handshake or certificate. Nothing was sent."""


class ExchangeFailed(UpstreamError):
    """The connection broke after sending began. Upstream may have stored the batch."""


class Unanswered(ExchangeFailed):
    """The connection ended before a byte of an answer, as one does that upstream had closed for idleness."""


class ExchangeTimedOut(UpstreamError):
    """Upstream took longer than a configured timeout. It may have stored the batch."""


class ReplyInvalid(UpstreamError):
    """Upstream's answer was not HTTP, or longer than the configured bound."""
