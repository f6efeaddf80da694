"""The section of the disk."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from relay.config.section import Section


class Spool(Section, frozen=True):
    """The disk."""

    directory: Annotated[
        str,
        Meta(
            min_length=1,
            description=(
                "Owned by one relay at a time; created with mode 0700. A relative path is relative to the working "
                "directory."
            ),
        ),
    ] = "spool"
    max_bytes: Annotated[
        int,
        Meta(
            ge=1_048_576,
            description=(
                "Bytes in use; at it new batches get 503 while draining goes on. 10 GiB hold hours of outage of a busy "
                "site."
            ),
        ),
    ] = 10_737_418_240
    min_free_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description=(
                "Free space of the file system below which new batches get 503, so that the relay never fills a disk "
                "others need."
            ),
        ),
    ] = 268_435_456
    overflow: Annotated[
        Literal["reject", "shed-sessions"],
        Meta(
            description=(
                'At these two caps: "reject" answers new batches 503; "shed-sessions" drops what is spooled of whole '
                "sessions, the oldest first, and so loses what was accepted."
            ),
        ),
    ] = "reject"
    reserve_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1_073_741_824,
            description=(
                "Allocated beside the database and given up on a full disk, so that it can be drained; until there is "
                "room for it twice, new batches get 503. 32 MiB are twice SQLite's log. 0: none."
            ),
        ),
    ] = 33_554_432
    dead_letter_max_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description=(
                "Of the bytes in use, what dead letters may take; beyond it the oldest are dropped, counted as shed. "
                "256 MiB hold days of a bad release."
            ),
        ),
    ] = 268_435_456
    durability: Annotated[
        Literal["fsync", "os"],
        Meta(
            description=(
                'When a batch counts as stored: "fsync" survives a power cut, "os" a crash of the relay but not of the '
                "machine."
            ),
        ),
    ] = "fsync"
    dedupe_seconds: Annotated[
        int,
        Meta(
            ge=60,
            le=31_536_000,
            description=(
                "How long a repeated client batch is recognised. Clients retry for minutes, a laptop lid closes for a "
                "day."
            ),
        ),
    ] = 86_400
    dedupe_max_marks: Annotated[
        int,
        Meta(
            ge=1_000,
            description=(
                "Client batches remembered for that; the oldest are forgotten first. About 70 bytes each on disk."
            ),
        ),
    ] = 2_000_000
