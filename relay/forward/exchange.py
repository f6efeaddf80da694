"""One exchange with upstream's ingest endpoint: a body goes out, and a verdict comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from relay.errors import UpstreamError
from relay.http.client import Reply
from relay.protocol.fingerprint import fingerprint, redact
from relay.protocol.verdict import Verdict, classify, parse_retry_after

INGEST_TARGET = "/api/sdk/replay"
"""Upstream's one runtime endpoint."""

_LOGGED_BYTES = 300
"""Of an answer, in a log line."""

_KEPT_BYTES = 4_096
"""Of an answer, beside a dead letter: the issues of a handful of bad fields."""

_SHORTEST_SECRET = 8
"""Characters of a key. What is shorter keeps no secret, and may be part of many a word."""


class Client(Protocol):
    """What an exchange needs of the HTTP client."""

    async def request(self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Reply:
        """Send a request and return the answer, or raise `UpstreamError`."""


class Answer(msgspec.Struct, frozen=True):
    """What came of an exchange."""

    verdict: Verdict
    problem: str
    """What came back, or why nothing did, for the log."""
    status: int = 0
    """0 where nothing came back."""
    text: str = ""
    """The beginning of the body, without what looks like a key."""
    retry_after: bytes = b""

    def asked_pause(self, wall_now: float, max_seconds: float) -> float | None:
        """Return how many seconds upstream asks to wait, `max_seconds` at most; None where it does not say."""
        return parse_retry_after(self.retry_after, wall_now, max_seconds)


async def exchange(client: Client, key: str, body: bytes) -> Answer:
    """Send an upstream batch, once.

    Args:
        client: Of the ingest API.
        key: The upstream key.
        body: JSON, in gzip.
    """
    headers = (
        (b"X-Lucent-Api-Key", key.encode()),
        (b"Content-Type", b"application/json"),
        (b"Content-Encoding", b"gzip"),
    )
    try:
        reply = await client.request("POST", INGEST_TARGET, headers, body)
    except UpstreamError as error:
        return Answer(Verdict.RETRY, str(error))
    return Answer(
        classify(reply.status),
        f"{reply.status} {_readable(reply.body, key, _LOGGED_BYTES)}",
        reply.status,
        _readable(reply.body, key, _KEPT_BYTES),
        reply.headers.get(b"retry-after", b""),
    )


def _readable(answer: bytes, key: str, max_bytes: int) -> str:
    """Return the beginning of an answer for people, without the key: some answers repeat the request."""
    if len(key) >= _SHORTEST_SECRET:  # of whatever form: an ingest of one's own may have other keys
        answer = answer.replace(key.encode(), fingerprint(key).encode())
    return redact(answer[:max_bytes].decode("utf-8", "replace"))
