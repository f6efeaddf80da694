"""The options: what an operator may set, the default of each option and the reason for it.

A section is a component, an option a noun with its unit. Each option is one field below: its type carries the bounds,
its description the reason for the default. A test holds `config/relay.toml` and the table in README.md against them.

Reading, checking and printing a configuration is `relay.settings`. msgspec holds bounds on decoding only: a section
built in code is taken at its word. The section of the data API is `relay.config_data_api`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from relay.config_batch import Batch as Batch
from relay.config_data_api import DataApi
from relay.config_spool import Spool as Spool


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, keyword-only, unknown options refused."""


class Listen(Section, frozen=True):
    """The two listeners and what one client may cost."""

    relay: Annotated[
        str, Meta(description="Address of ingest and data API, HTTP/1.1. Loopback: exposing it is a decision.")
    ] = "127.0.0.1:8787"
    admin: Annotated[str, Meta(description="Address of health, metrics and status. Never expose it to clients.")] = (
        "127.0.0.1:8788"
    )
    max_connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description=("Open client connections; a further one is answered 503 and closed. Each costs about 20 KiB."),
        ),
    ] = 10_000
    max_header_bytes: Annotated[
        int,
        Meta(ge=1_024, le=1_048_576, description="Request line and headers together; nginx allows 32 KiB too."),
    ] = 32_768
    max_headers: Annotated[
        int, Meta(ge=8, le=10_000, description="Header lines of one request; Apache and IIS allow 100 too.")
    ] = 100
    max_buffered_bytes: Annotated[
        int,
        Meta(
            ge=1_048_576,
            description=(
                "Request bodies being received, over all connections; beyond it whose body has taken most for longest "
                "is answered 503. Bounds memory."
            ),
        ),
    ] = 67_108_864
    header_seconds: Annotated[
        float,
        Meta(gt=0, le=3_600, description="Time for the first to the last byte of a request's headers; ends slowloris."),
    ] = 10.0
    body_grace_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=3_600,
            description=("A body may stall this long before its rate counts; mobile networks pause for seconds."),
        ),
    ] = 10.0
    min_body_rate_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description=(
                "Bytes a second a body must keep up on average after the grace; below it 408. 1 KiB/s is slower than "
                "EDGE."
            ),
        ),
    ] = 1_024
    idle_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=86_400,
            description="A keep-alive connection without a request is closed; above the 60 s of common load balancers.",
        ),
    ] = 75.0
    write_seconds: Annotated[
        float,
        Meta(gt=0, le=3_600, description="Time for a client to take a response; a reader that never reads is cut off."),
    ] = 30.0


class Intake(Section, frozen=True):
    """What one client batch may be."""

    max_body_bytes: Annotated[
        int,
        Meta(
            ge=65_536,
            le=1_073_741_824,
            description="One body on the wire. Native apps send tens of MB uncompressed.",
        ),
    ] = 33_554_432
    max_decoded_bytes: Annotated[
        int,
        Meta(
            ge=65_536,
            le=1_073_741_824,
            description=(
                "One body after decompression; ends decompression bombs. Single replay uploads of 67 MB have been seen."
            ),
        ),
    ] = 67_108_864
    max_envelope_bytes: Annotated[
        int,
        Meta(
            ge=4_096,
            le=524_288,
            description=(
                "Everything of a batch but its events. It travels with every upstream batch, so it must leave room "
                "there."
            ),
        ),
    ] = 262_144
    max_decodes: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description=(
                "Large bodies decoded at the same time, each in a thread. Bounds memory; more than the cores gains "
                "nothing."
            ),
        ),
    ] = 2
    thread_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description=(
                "Bodies larger than this on the wire are decoded in a thread, so that they delay nobody; so are those "
                "of more than 1 MiB of JSON, which takes 3 ms. Under load a body in a thread waits four times as long."
            ),
        ),
    ] = 262_144
    retry_after_seconds: Annotated[
        int,
        Meta(ge=1, le=3_600, description="`Retry-After` of a 503: when a refused client shall come again."),
    ] = 5


class Keys(Section, frozen=True):
    """Client keys, and the upstream keys that they stand for."""

    accept: Annotated[
        Literal["any", "listed"],
        Meta(
            description=(
                'Whose batches are taken: "any" leaves the judgement to upstream; "listed" takes `keys.listed`, the '
                "clients of `keys.pools` and `keys.default`, and answers others 401 as upstream would."
            )
        ),
    ] = "any"
    default: Annotated[
        str,
        Meta(
            description="Key of clients that send none. Empty: such clients are answered 401.",
            extra={"secret": True},
        ),
    ] = ""
    listed: Annotated[
        tuple[str, ...],
        Meta(
            description='Client keys that `keys.accept = "listed"` lets in, beside those with a pool and the default.',
            extra={"secret": True},
        ),
    ] = ()
    pools: Annotated[
        dict[str, tuple[str, ...]],
        Meta(
            description=(
                "Upstream keys of one organisation that share a client key's sessions, each with a budget of its own: "
                '`{ client_key = ["upstream_key", "upstream_key"] }`. A client key without a pool is its own.'
            ),
            extra={"secret": True},
        ),
    ] = {}
    max_keys: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description=(
                "Distinct keys kept at a time; a batch of a further key is answered 503. Bounds what invented keys can "
                "cost."
            ),
        ),
    ] = 1_000


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
                "Requests under way at once over all keys, each with a body of at most `batch.max_bytes`. Bounds "
                "memory and connections; without a budget upstream's latency bounds them further."
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


class Log(Section, frozen=True):
    """What is written to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(
            description=(
                "ERROR needs an operator, WARNING recovered by itself, INFO is lifecycle. Nothing is logged per event."
            ),
        ),
    ] = "info"
    format: Annotated[
        Literal["logfmt", "json"],
        Meta(description='"logfmt" reads well on a terminal, "json" suits collectors.'),
    ] = "logfmt"


class Shutdown(Section, frozen=True):
    """How the process ends."""

    deadline_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=3_600,
            description=(
                "From SIGTERM to exit at the latest, whatever hangs; below the 30 s after which orchestrators kill."
            ),
        ),
    ] = 20.0


class Config(Section, frozen=True):
    """All sections. Every option has a default, so an empty file is a valid configuration."""

    listen: Listen = Listen()
    intake: Intake = Intake()
    keys: Keys = Keys()
    upstream: Upstream = Upstream()
    batch: Batch = Batch()
    budget: Budget = Budget()
    forward: Forward = Forward()
    data_api: DataApi = DataApi()
    spool: Spool = Spool()
    log: Log = Log()
    shutdown: Shutdown = Shutdown()
