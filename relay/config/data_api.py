"""The section of the data API's proxy."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from relay.config.section import Section


class DataApi(Section, frozen=True):
    """Lucent's data API through the relay."""

    token: Annotated[
        str,
        Meta(
            description=(
                "Lucent token that the relay holds for clients with one of `data_api.client_tokens`. Empty: it holds "
                "none. Best given by the environment, or as `data_api.token_file`."
            ),
            extra={"secret": True},
        ),
    ] = ""
    token_file: Annotated[
        str,
        Meta(description="File with that token in place of it; read again when it changes, so it can be rotated."),
    ] = ""
    client_tokens: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                "Tokens of the relay's own, 16 characters or more. A client that sends one as `Authorization: Bearer` "
                "is served with the relay's token."
            ),
            extra={"secret": True},
        ),
    ] = ()
    anonymous: Annotated[
        Literal["pass-through", "serve-with-the-relays-token"],
        Meta(
            description=(
                'Clients without `Authorization`: "pass-through" lets Lucent refuse them; '
                '"serve-with-the-relays-token" lets everybody who reaches the relay read and change what the token may.'
            )
        ),
    ] = "pass-through"
    forwarded: Annotated[
        Literal["none", "forwarded", "x-forwarded"],
        Meta(
            description=(
                "Whether Lucent is told who asked, by `Forwarded` (RFC 7239) or `X-Forwarded-*`. Lucent has no use for "
                "it, and it shows addresses of the inside. What clients send of these passes either way."
            )
        ),
    ] = "none"
    max_body_bytes: Annotated[
        int,
        Meta(
            ge=1_024,
            le=16_777_216,
            description="Body of a PATCH, which has 30 bytes. It is held whole, so that it can be sent again.",
        ),
    ] = 65_536
    max_in_flight: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000,
            description="Requests to the data API under way at once, apart from ingest's; a further one waits.",
        ),
    ] = 64
    window_bytes: Annotated[
        int,
        Meta(
            ge=65_536,
            le=67_108_864,
            description=(
                "How far an answer may be ahead of its slowest reader, so memory of each request under way; also the "
                "largest answer that is kept. A page of 200 issues has about 200 KB."
            ),
        ),
    ] = 1_048_576
    first_byte_seconds: Annotated[
        float,
        Meta(gt=0, le=600, description="Request sent to first byte of the answer; then 504. People wait for these."),
    ] = 30.0
    stall_seconds: Annotated[
        float, Meta(gt=0, le=600, description="How long an answer may pause; then it is cut, as it has begun.")
    ] = 30.0
    reads_per_minute: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description=(
                "Reads of a token by our own count, until Lucent says in `X-RateLimit-*` what is left; its published "
                "limit. 0 leaves the count to Lucent."
            ),
        ),
    ] = 300
    writes_per_minute: Annotated[
        int, Meta(ge=0, le=1_000_000, description="Changes of a token, likewise; its published limit.")
    ] = 60
    max_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Tokens whose budgets are known; the least recently used is forgotten. Bounds invented ones.",
        ),
    ] = 1_000
    cache_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=86_400,
            description=(
                "How long an answer is served again to the same token where Lucent does not say; 0 for never. At 15 "
                "any number of readers of a page cost four requests a minute."
            ),
        ),
    ] = 15.0
    cache_max_bytes: Annotated[
        int,
        Meta(
            ge=0, le=17_179_869_184, description="Memory of all kept answers; 32 MiB hold 150 full pages. 0 keeps none."
        ),
    ] = 33_554_432
    stale_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=604_800,
            description=(
                "How long after that an answer is still served while Lucent is down or the budget is spent; its `Age` "
                "and `Cache-Status` say so. 0: whoever reads old data should have asked for it."
            ),
        ),
    ] = 0.0
    validate: Annotated[
        Literal["upstream", "edge"],
        Meta(
            description=(
                "Who refuses what is certain to be refused (a limit out of range, a malformed id, an unknown status): "
                '"edge" saves the request, "upstream" leaves Lucent the judge.'
            )
        ),
    ] = "upstream"
