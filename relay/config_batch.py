"""The options of the cut: the section `batch` of `config.py`, which is where everybody takes it from."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from relay.protocol.cut import Limits, Measure, Merge, make_limits


class Batch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
