"""What `/status` and `/metrics` say of the forwarder."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from relay.telemetry import Histogram

LaneState: TypeAlias = Literal["open", "probing", "held", "limited", "misdirected"]


class LaneStatus(msgspec.Struct, frozen=True):
    """A lane for `/status`."""

    key: str
    """Fingerprint of the upstream key."""
    state: LaneState
    """`open`: sends freely. `probing`: after failures, one at a time. `held`: upstream refuses the key. `limited`:
    upstream asked us to wait. `misdirected`: something that is not the ingest API answers."""
    pending_windows: int
    """Windows with events that are in no sealed batch."""
    in_flight: int
    """Requests under way."""
    budget_used: int
    """Slots of the window that are occupied."""
    budget_limit: int
    """Slots of a window; 0 is unlimited."""
    failures: int
    """Attempts in a row without a usable answer."""
    stuck: int
    """Batches that upstream fails again and again while it takes others."""


class ForwardStatistics(msgspec.Struct, frozen=True):
    """Counters since the start of the process, and the state of now."""

    attempts_by_verdict: dict[str, int]
    """Requests sent to upstream, by what became of them."""
    batches_by_reason: dict[str, int]
    """Batches sealed, by why they were due."""
    wait_seconds: Histogram
    """These batches, by how long the oldest event had waited since its acceptance."""
    fullness_ratio: Histogram
    """These batches, by how full they were: the share of the nearer limit."""
    delivery_seconds: Histogram
    """Delivered batches, by the time from the oldest event's acceptance to upstream's answer."""
    batches_delivered: int
    """Upstream batches that upstream took."""
    events_delivered: int
    """Events in them."""
    segments_delivered: int
    """Segments merged into them."""
    batches_of_several_pages: int
    """Upstream batches delivered whose events are of several pages, where `batch.merge` allows that."""
    batches_recut: int
    """Batches that upstream refused and that were cut into smaller ones."""
    batches_dead_lettered: int
    """Batches that upstream refused and that became dead letters."""
    bytes_sent: int
    """Gzip bodies, retries included."""
    sessions_set_aside: int
    """Sessions left alone until a restart, since what they need of the disk is damaged."""
    attempt_errors: int
    """Attempts that ended in an error of ours."""
    in_flight: int
    """Requests under way."""
    in_flight_limit: int
    """How many there may be; without a budget, by what upstream is good for."""
    pending_windows: int
    """Windows with pending events that are held in memory."""
    has_more_on_disk: bool
    """Whether further windows wait on disk for their turn."""
    lanes: list[LaneStatus]
    """One a key."""

    @property
    def budget_used_by_key(self) -> dict[str, int]:
        """Occupied slots by the key's fingerprint."""
        return {lane.key: lane.budget_used for lane in self.lanes}

    @property
    def budget_limit_by_key(self) -> dict[str, int]:
        """Slots by the key's fingerprint; 0 is unlimited."""
        return {lane.key: lane.budget_limit for lane in self.lanes}

    @property
    def failures_by_key(self) -> dict[str, int]:
        """Attempts in a row without a usable answer, by the key's fingerprint."""
        return {lane.key: lane.failures for lane in self.lanes}

    @property
    def stuck_by_key(self) -> dict[str, int]:
        """Batches that upstream fails again and again while it takes others, by the key's fingerprint."""
        return {lane.key: lane.stuck for lane in self.lanes}
