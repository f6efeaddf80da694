"""What the forwarder counts, over all lanes and since the start of the process.

Plain numbers: only trio's thread touches them.
"""

from __future__ import annotations

from relay.protocol.schedule import Reason
from relay.protocol.verdict import Verdict
from relay.spool.values import SealedBatch
from relay.telemetry import Histogram

_WAIT_SECONDS = (0.1, 0.3, 1.0, 3.0, 6.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_000.0, 3_600.0, 14_400.0)
"""Upper bounds. What lingers as long as by default stands within a bucket, and so does what is sent for its age; then
the hours of an outage."""

_FULLNESS_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Upper bounds. A batch that the cut filled to the brim is above 0.9."""


class ForwardCounts:
    """The counters."""

    def __init__(self) -> None:
        self.verdicts = dict.fromkeys(Verdict, 0)
        """Attempts by what became of them."""
        self.sealed_by_reason: dict[str, int] = {}
        """Batches sealed, by why they were due."""
        self.wait_seconds = Histogram(_WAIT_SECONDS)
        """These batches, by the time from their oldest event's acceptance."""
        self.fullness_ratio = Histogram(_FULLNESS_SHARES)
        """These batches, by their share of the nearer limit."""
        self.delivery_seconds = Histogram(_WAIT_SECONDS)
        """Delivered batches, by the time from their oldest event's acceptance to upstream's answer."""
        self.batches_delivered = 0
        self.events_delivered = 0
        self.segments_delivered = 0
        self.batches_of_several_pages = 0
        self.batches_recut = 0
        self.batches_dead_lettered = 0
        self.bytes_sent = 0
        """Gzip bodies, retries included."""
        self.sessions_set_aside = 0
        """Sessions left alone until a restart, since what they need of the disk is damaged."""
        self.attempt_errors = 0
        """Attempts that ended in an error of ours."""

    def note_sealed(self, reason: Reason, *, waited_seconds: float, fullness: float) -> None:
        """Count a batch that was cut from what was pending.

        Args:
            reason: Why it was due.
            waited_seconds: Since its oldest event was accepted, by a wall clock that may have been set back.
            fullness: Its share of the nearer limit.
        """
        self.sealed_by_reason[reason] = self.sealed_by_reason.get(reason, 0) + 1
        self.wait_seconds.observe(max(0.0, waited_seconds))
        self.fullness_ratio.observe(fullness)

    def note_delivered(self, batch: SealedBatch, at: float) -> None:
        """Count a batch that upstream took, at a time by the wall clock."""
        self.batches_delivered += 1
        self.events_delivered += batch.event_count
        self.segments_delivered += batch.segment_count
        self.batches_of_several_pages += batch.envelope_count > 1
        self.delivery_seconds.observe(max(0.0, at - batch.oldest_at))
