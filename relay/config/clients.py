"""The sections of what clients may do: listeners, client batches, keys."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from relay.config.section import Section


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
                "is answered 503. Bounds memory. Changes that wait for the data API have a quarter of it at most."
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
    ] = {}  # noqa: RUF012 - msgspec gives each section an empty one of its own
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
