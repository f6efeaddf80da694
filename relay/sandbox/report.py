"""What the sandbox saw, as numbers that add up.

Rules:
1. A request is counted when it is answered (or hung up on), so at every moment
   `requests` = sum of `responses` + `hung_up`.
2. A batch that passed every check and no fault stopped is exactly one of stored, repeated and conflicting.
3. Keys appear as fingerprints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from relay.sandbox.store import Outcome, StoredBatch

if TYPE_CHECKING:
    from relay.sandbox.faults import Fate


class Violations(msgspec.Struct):
    """Batches that upstream would refuse. Behind a relay all of these stay 0."""

    unreadable: int = 0
    """Coding unknown, damaged compression, not JSON, or far too large: 400, 413 or 415."""
    invalid: int = 0
    """Not a ReplayBatch by the published schema: 400."""
    over_max_events: int = 0
    """More events than `--max-events`: 413."""
    over_max_bytes: int = 0
    """More bytes than `--max-bytes`, in more than one event: 413. A batch over both limits counts above."""


class Injected(msgspec.Struct):
    """Faults that hit, by kind."""

    error: int = 0
    """Valid batches answered with an error and not stored."""
    drop_before: int = 0
    """Valid batches hung up on before storing."""
    drop_after: int = 0
    """Batches stored (or found repeated), then hung up on."""
    outage: int = 0
    """Requests that met an outage."""


class DataReport(msgspec.Struct):
    """What the data API saw."""

    reads: int = 0
    """GET and HEAD requests, whatever became of them."""
    writes: int = 0
    """PATCH requests likewise."""
    responses: dict[str, int] = msgspec.field(default_factory=dict)
    """How many of both were answered, by status."""
    hung_up: int = 0
    """Those whose connection was closed without an answer."""
    rate_limited: int = 0
    """Those answered 429 by a rate limit."""
    changed: int = 0
    """Changes made: PATCH requests that set another status."""


class KeyReport(msgspec.Struct):
    """One accepted key."""

    counted: int
    """Requests counted by the rate limit."""
    peak_requests_per_minute: int
    """Most of them within any one minute."""


class Report(msgspec.Struct):
    """What `GET /sandbox/report` answers. Counts begin with the start or the last reset."""

    requests: int = 0
    """`POST /api/sdk/replay` requests, whatever became of them."""
    responses: dict[str, int] = msgspec.field(default_factory=dict)
    """How many of them were answered, by status."""
    hung_up: int = 0
    """Those whose connection was closed without an answer."""
    rate_limited: int = 0
    """Those answered 429 by the rate limit."""
    refused_keys: int = 0
    """Those answered 401."""
    wire_bytes: int = 0
    """Request bodies as received."""
    decoded_bytes: int = 0
    """The same uncompressed, of the bodies that could be."""
    sessions: int = 0
    """Sessions with at least one stored batch."""
    events: int = 0
    """Events of stored batches."""
    stored_batches: int = 0
    """Batches stored."""
    final_batches: int = 0
    """Those among them with `flush: "final"`."""
    after_final_batches: int = 0
    """Those among them that came for a session after a final batch of it was stored."""
    repeated_batches: int = 0
    """Batches that were already stored and said the same."""
    conflicting_batches: int = 0
    """Batches whose number was taken by one that says something else: dropped. Behind a relay: 0."""
    violations: Violations = msgspec.field(default_factory=Violations)
    """Batches that upstream would refuse."""
    injected: Injected = msgspec.field(default_factory=Injected)
    """Faults that hit."""
    peak_requests_per_minute: int = 0
    """The largest of the keys' peaks."""
    keys: dict[str, KeyReport] = msgspec.field(default_factory=dict)
    """Accepted keys by fingerprint."""
    data_api: DataReport = msgspec.field(default_factory=DataReport)
    """What the data API saw."""
    elapsed_seconds: float = 0.0
    """Time since the sandbox started; outages are measured on it."""

    def count_answer(self, status: int, wire_bytes: int) -> None:
        """Count one request. Status 0 is a hang-up."""
        self.requests += 1
        self.wire_bytes += wire_bytes
        if status == 0:
            self.hung_up += 1
        else:
            self.responses[str(status)] = self.responses.get(str(status), 0) + 1

    def count_fault(self, fate: Fate) -> None:
        """Count a fault where the fate is one."""
        if fate.kind != "serve":
            setattr(self.injected, fate.kind, getattr(self.injected, fate.kind) + 1)

    def count_batch(self, outcome: Outcome, batch: StoredBatch, *, is_after_final: bool) -> None:
        """Count a batch that got as far as the store."""
        if outcome is Outcome.REPEATED:
            self.repeated_batches += 1
        elif outcome is Outcome.CONFLICTING:
            self.conflicting_batches += 1
        else:
            self.stored_batches += 1
            self.events += batch.event_count
            self.final_batches += batch.flush == "final"
            self.after_final_batches += is_after_final
