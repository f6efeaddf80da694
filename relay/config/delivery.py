"""The sections of what goes to the ingest API: where, in which batches, how many, how."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from relay.config.section import Section
from relay.protocol.cut import Limits, Measure, Merge, make_limits


class Upstream(Section, frozen=True):
    """Where batches go, and how long we wait."""

    ingest_url: Annotated[
        str, Meta(description="Base URL of the ingest API; batches go to /api/sdk/replay below it.")
    ] = "https://batch-jobs-lucent.onrender.com"
    data_url: Annotated[str, Meta(description="Base URL of the data API.")] = "https://app.lucenthq.com"
    ca_file: Annotated[
        str,
        Meta(
            description=(
                "PEM file of further trusted authorities, for a self-hosted ingest. Empty: the system's trust store "
                "alone."
            ),
        ),
    ] = ""
    connect_seconds: Annotated[
        float, Meta(gt=0, le=600, description="DNS, TCP and TLS together. Three TCP retransmissions fit.")
    ] = 10.0
    write_seconds: Annotated[
        float, Meta(gt=0, le=600, description="Time to send one request; 1 MiB at 280 kbit/s.")
    ] = 30.0
    first_byte_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=600,
            description=(
                "Request sent to first byte of the answer. Upstream stores before it answers, and a sleeping instance "
                "takes up to a minute to wake."
            ),
        ),
    ] = 60.0
    response_seconds: Annotated[
        float, Meta(gt=0, le=600, description="Request sent to the end of the answer; ends endless bodies.")
    ] = 90.0
    max_response_bytes: Annotated[
        int,
        Meta(
            ge=1_024,
            le=67_108_864,
            description='Answer body of the ingest API; it says `{"ok":true}` or names an error.',
        ),
    ] = 65_536
    idle_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=3_600,
            description=("Pooled connections unused for longer are closed; below the 60 s of common load balancers."),
        ),
    ] = 45.0
    max_idle_connections: Annotated[int, Meta(ge=0, le=1_000, description="Unused connections kept for re-use.")] = 16


class Batch(Section, frozen=True):
    """The cut: what one upstream batch may be."""

    max_events: Annotated[
        int, Meta(ge=1, le=16_384, description="Events of an upstream batch; upstream's published limit.")
    ] = 500
    max_bytes: Annotated[
        int,
        Meta(
            ge=65_536,
            le=67_108_864,
            description=("A whole upstream batch, as `batch.measure` has it; upstream's published limit."),
        ),
    ] = 1_048_576
    measure: Annotated[
        Measure,
        Meta(
            description=(
                'What `batch.max_bytes` is about: "json", the uncompressed body, the strict reading of the published '
                'limit; "compressed", the gzip body, which saves requests if upstream means that and costs a refusal a '
                "full batch if not. The JSON may then be 16 times as large."
            ),
        ),
    ] = "json"
    merge: Annotated[
        Merge,
        Meta(
            description=(
                'Whether a changed `page` starts a new upstream batch: "strict" says always, so that every event keeps '
                'the page it came with; "page" says no, the batch bears the last one; "page-when-scarce" says no while '
                "half of a key's requests or more are spent."
            ),
        ),
    ] = "strict"
    linger_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=3_600,
            description=(
                "How long a window waits to fill before it is sent. Half of the SDK's flush interval: adds little "
                "delay and gathers the batches of a page that flushes often."
            ),
        ),
    ] = 5.0

    @property
    def limits(self) -> Limits:
        """What one upstream batch may be."""
        return make_limits(self.max_events, self.max_bytes, self.measure)


class Budget(Section, frozen=True):
    """Requests a key may spend."""

    requests_per_minute: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)] | Literal["auto"],
        Meta(
            description=(
                'Per upstream key, first sends and retries together; upstream\'s published limit. "auto" begins there '
                "and learns the true limit from upstream's answers, at the cost of a refused request now and then. 0 "
                "is unlimited; then upstream's latency bounds the requests under way."
            ),
        ),
    ] = 100
    margin_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=30,
            description=(
                "Added to the minute, for clocks that run unlike upstream's. Time on the network is counted apart."
            ),
        ),
    ] = 0.25


class Forward(Section, frozen=True):
    """How batches are sent."""

    max_in_flight: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000,
            description=(
                "Requests under way at once over all keys, each with a body of at most `batch.max_bytes`; for batches "
                "that are stuck there is an eighth more. Bounds memory and connections; without a budget upstream's "
                "latency bounds them further."
            ),
        ),
    ] = 64
    max_in_flight_per_key: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000,
            description=(
                "Requests under way at once of a key with a budget, each of another session; 100 a minute at 4 s each."
            ),
        ),
    ] = 8
    max_windows: Annotated[
        int,
        Meta(
            ge=100,
            le=10_000_000,
            description=(
                "Windows with pending events that are held in memory, about 1.6 KiB each; more wait on disk for their "
                "turn. A key needs hours for as many."
            ),
        ),
    ] = 15_000
    live_share: Annotated[
        float,
        Meta(
            gt=0,
            lt=1,
            description="Share of requests for what is under 10 minutes old, while backlog waits too: neither starves.",
        ),
    ] = 0.5
    backoff_base_seconds: Annotated[
        float,
        Meta(gt=0, le=600, description="Ceiling of the first retry's random delay; doubles with each further one."),
    ] = 1.0
    backoff_max_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=3_600,
            description="Ceiling of any retry's delay. After an outage every lane is back within a minute.",
        ),
    ] = 60.0
    retry_after_max_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=86_400,
            description="A longer `Retry-After` is clamped to this; the limit's window is a minute, the rest is slack.",
        ),
    ] = 300.0
    breaker_failures: Annotated[
        int, Meta(ge=1, le=1_000, description="Failures in a row after which a key sends single probes only.")
    ] = 5
    hold_seconds: Annotated[
        float,
        Meta(gt=0, le=86_400, description="Pause between probes of a key that upstream refuses with 401 or 403."),
    ] = 300.0
