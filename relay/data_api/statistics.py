"""What the data API's proxy says of itself."""

from __future__ import annotations

import msgspec


class DataApiStatistics(msgspec.Struct, frozen=True):
    """Counters since the start of the process, and how things stand."""

    requests_by_route: dict[str, int]
    """Requests of clients: issues, issue, signals, insights."""
    answers_by_class: dict[str, int]
    """Answers to them, by class of status."""
    cache_by_outcome: dict[str, int]
    """Answers from what is kept (hit, stale), from another's request (shared), from upstream (revalidated, miss), and
    those that pass by the cache (passed)."""
    cache_bytes: int
    """What kept answers cost now."""
    cache_targets: int
    """Pages and issues that they answer, each token's counted."""
    cache_evicted: int
    """Targets whose answers had to go for others."""
    cache_invalidated: int
    """Changes that dropped what was kept."""
    upstream_requests: int
    """Requests sent to upstream, those sent once more included."""
    upstream_failures: dict[str, int]
    """Requests without a whole answer: timeout, unreachable, busy (never sent)."""
    failures: int
    """Of these the last in a row."""
    in_flight: int
    """Requests to upstream under way, or read still by a client."""
    limited: int
    """Requests answered 429 here, for a spent budget."""
    cut: int
    """Answers that broke off after they had begun."""
    connections_open: int
    """Connections to upstream."""
    connections: int
    """Connections made."""
    reads_left_by_key: dict[str, int]
    """Reads that a token may begin now, by its fingerprint."""
    writes_left_by_key: dict[str, int]
    """Changes likewise."""
    refused_keys: int
    """Tokens that upstream answered 401 last."""
    credentials_problem: str
    """What is wrong with the relay's own token; empty where nothing is known to be."""
