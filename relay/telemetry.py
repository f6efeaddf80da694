"""Every metric of the relay, declared once.

A metric is a field of a component's `statistics()`: `source` names the component, `field` the field. What is a
mapping there becomes one sample an entry, with the key as `label`; a `Histogram` becomes its buckets. The exposition
and the table in the operations manual are made from these declarations; a test holds both against the running relay.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Literal

import msgspec

PREFIX = "lucent_relay_"
"""Of every name."""


class Metric(msgspec.Struct, frozen=True):
    """One metric."""

    name: str
    """Without the prefix; the unit before `_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    """As Prometheus has it."""
    help: str
    """One sentence."""
    source: Literal["account", "spool", "intake", "forward", "data_api", "listener", "client", "process"]
    """The component."""
    field: str
    """Of its statistics."""
    label: str = ""
    """What the keys of a mapping are."""


class Summary(msgspec.Struct, frozen=True):
    """What people read of a histogram."""

    count: int
    """Observations."""
    mean: float
    """Exact; 0 where there are none."""
    p50: float
    """As near as the buckets tell."""
    p95: float
    """As near as the buckets tell; the highest bound stands for whatever is above it."""


class Histogram:
    """Observations since the start of the process, by size.

    Args:
        bounds: Upper bounds of the buckets, ascending; one more is unbounded.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        """Upper bounds of all buckets but the last."""
        self.counts = [0] * (len(bounds) + 1)
        """Observations a bucket."""
        self.sum = 0.0
        """Of all observations."""

    def observe(self, value: float) -> None:
        """Count a value, which is not negative."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """Return the observations so far, to which nothing is added."""
        copied = Histogram(self.bounds)
        copied.counts, copied.sum = list(self.counts), self.sum
        return copied

    def quantile(self, share: float) -> float:
        """Return the value that a share of the observations does not exceed; they count as spread over their bucket.

        Args:
            share: 0 to 1.

        Returns:
            The highest bound for what is above it; 0 where there are no observations.
        """
        rank = share * sum(self.counts)
        lower = 0.0
        for upper, count in zip(self.bounds, self.counts, strict=False):
            if count and count >= rank:
                return lower + (upper - lower) * rank / count
            rank -= count
            lower = upper
        return lower if self.counts[-1] else 0.0

    def cumulative(self) -> list[tuple[str, int]]:
        """Return for each bound how many observations do not exceed it, as Prometheus wants them."""
        return list(zip((*map(str, self.bounds), "+Inf"), accumulate(self.counts), strict=True))

    def summary(self) -> Summary:
        """Return what people read."""
        count = sum(self.counts)
        return Summary(count, self.sum / count if count else 0.0, self.quantile(0.5), self.quantile(0.95))


METRICS = (
    # The conservation account: accepted = delivered + pending + sealed + dead_lettered + purged + shed.
    Metric("events_accepted_total", "counter", "Events answered 200, ever, in this spool.", "account", "accepted"),
    Metric("events_delivered_total", "counter", "Events that upstream has taken.", "account", "delivered"),
    Metric("events_purged_total", "counter", "Events removed by an operator.", "account", "purged"),
    Metric("events_shed_total", "counter", "Events dropped for want of room.", "account", "shed_by_reason", "reason"),
    Metric("spool_pending_events", "gauge", "Spooled events in no sealed batch.", "account", "pending"),
    Metric("spool_sealed_events", "gauge", "Spooled events in a sealed batch on its way.", "account", "sealed"),
    Metric("dead_letter_events", "gauge", "Events kept aside for good.", "account", "dead_lettered"),
    Metric("damaged_events", "gauge", "Of these, damaged on the disk.", "account", "damaged"),
    Metric("dead_letters", "gauge", "Dead letters that hold them.", "account", "dead_letters"),
    Metric("dead_letter_bytes", "gauge", "What these take of the disk.", "account", "dead_letter_bytes"),
    Metric("spool_segments", "gauge", "Segments in the spool.", "account", "segments"),
    Metric("spool_lag_seconds", "gauge", "Age of the oldest spooled event.", "account", "lag_seconds"),
    # The disk.
    Metric("spool_used_bytes", "gauge", "Bytes of the database in use.", "spool", "used_bytes"),
    Metric("spool_free_bytes", "gauge", "Bytes left on the file system.", "spool", "free_bytes"),
    Metric("spool_commits_total", "counter", "Group commits.", "spool", "commits"),
    Metric("spool_steps_total", "counter", "Steps that shared them.", "spool", "steps"),
    Metric("spool_failed_commits_total", "counter", "Group commits that the disk refused.", "spool", "failed_commits"),
    Metric(
        "spool_marks_forgotten_total", "counter", "Client batches no longer remembered.", "spool", "marks_forgotten"
    ),
    Metric("segments_quarantined_total", "counter", "Damaged segments set aside.", "spool", "segments_quarantined"),
    Metric("spool_refusing", "gauge", "1 while new batches are refused for the disk's sake.", "spool", "is_refusing"),
    # Intake.
    Metric("batches_accepted_total", "counter", "Client batches stored.", "intake", "batches_accepted"),
    Metric("batches_repeated_total", "counter", "Client batches recognised as stored.", "intake", "batches_repeated"),
    Metric(
        "batches_reused_total", "counter", "Stored, with the sequence of another.", "intake", "batches_reused", "kind"
    ),
    Metric("finals_late_total", "counter", "Finals said first by a repeat, and too late.", "intake", "finals_late"),
    Metric("batches_refused_total", "counter", "Client batches refused.", "intake", "refused_by_status", "status"),
    Metric("intake_events_total", "counter", "Events accepted by this process.", "intake", "events_accepted"),
    Metric("intake_wire_bytes_total", "counter", "Accepted bodies as received.", "intake", "wire_bytes"),
    Metric("intake_decoded_bytes_total", "counter", "Accepted bodies as JSON.", "intake", "decoded_bytes"),
    Metric("intake_segments_total", "counter", "Runs that accepted batches were cut into.", "intake", "segments"),
    Metric("intake_segment_bytes_total", "counter", "These runs, compressed.", "intake", "segment_bytes"),
    Metric("ack_seconds", "histogram", "Complete body to durable batch.", "intake", "ack_seconds"),
    # Forwarding.
    Metric("attempts_total", "counter", "Requests to upstream.", "forward", "attempts_by_verdict", "verdict"),
    Metric("batches_sealed_total", "counter", "Upstream batches cut.", "forward", "batches_by_reason", "reason"),
    Metric(
        "batch_wait_seconds", "histogram", "Acceptance of a batch's oldest event to its cut.", "forward", "wait_seconds"
    ),
    Metric(
        "batch_fullness_ratio", "histogram", "A cut batch's share of the nearer limit.", "forward", "fullness_ratio"
    ),
    Metric("batches_delivered_total", "counter", "Upstream batches delivered.", "forward", "batches_delivered"),
    Metric("batches_merged_pages_total", "counter", "Those of several pages.", "forward", "batches_of_several_pages"),
    Metric(
        "delivery_seconds",
        "histogram",
        "Acceptance of a batch's oldest event to upstream's yes.",
        "forward",
        "delivery_seconds",
    ),
    Metric("forward_events_total", "counter", "Events delivered by this process.", "forward", "events_delivered"),
    Metric("forward_segments_total", "counter", "Segments merged into them.", "forward", "segments_delivered"),
    Metric("batches_recut_total", "counter", "Refused batches cut into smaller ones.", "forward", "batches_recut"),
    Metric("batches_dead_total", "counter", "Batches made dead letters.", "forward", "batches_dead_lettered"),
    Metric("forward_bytes_total", "counter", "Bodies sent to upstream, retries included.", "forward", "bytes_sent"),
    Metric("sessions_set_aside_total", "counter", "Sessions whose pages are damaged.", "forward", "sessions_set_aside"),
    Metric("attempt_errors_total", "counter", "Deliveries that failed by our own error.", "forward", "attempt_errors"),
    Metric("forward_in_flight", "gauge", "Requests to upstream under way.", "forward", "in_flight"),
    Metric("forward_in_flight_limit", "gauge", "How many there may be.", "forward", "in_flight_limit"),
    Metric("forward_pending_windows", "gauge", "Windows to be sent, in memory.", "forward", "pending_windows"),
    Metric("budget_used", "gauge", "Occupied slots of a key's budget.", "forward", "budget_used_by_key", "key"),
    Metric("budget_limit", "gauge", "Slots a minute, 0 for no limit.", "forward", "budget_limit_by_key", "key"),
    Metric("lane_failures", "gauge", "Failed attempts of a key in a row.", "forward", "failures_by_key", "key"),
    Metric("lane_stuck", "gauge", "Batches that fail while others are taken.", "forward", "stuck_by_key", "key"),
    # The data API's proxy.
    Metric("data_requests_total", "counter", "Data API requests.", "data_api", "requests_by_route", "route"),
    Metric("data_answers_total", "counter", "Answers to them.", "data_api", "answers_by_class", "class"),
    Metric("data_cache_total", "counter", "Where answers came from.", "data_api", "cache_by_outcome", "outcome"),
    Metric("data_cache_bytes", "gauge", "Memory of kept answers.", "data_api", "cache_bytes"),
    Metric("data_cache_targets", "gauge", "What they answer.", "data_api", "cache_targets"),
    Metric("data_cache_evicted_total", "counter", "Targets dropped for others.", "data_api", "cache_evicted"),
    Metric("data_cache_invalidated_total", "counter", "Changes that dropped some.", "data_api", "cache_invalidated"),
    Metric("data_upstream_requests_total", "counter", "Requests to the data API.", "data_api", "upstream_requests"),
    Metric(
        *("data_upstream_failures_total", "counter", "Those without a whole answer."),
        *("data_api", "upstream_failures", "reason"),
    ),
    Metric("data_failures", "gauge", "Of these the last in a row.", "data_api", "failures"),
    Metric("data_in_flight", "gauge", "Those under way.", "data_api", "in_flight"),
    Metric("data_limited_total", "counter", "Requests answered 429 by the relay.", "data_api", "limited"),
    Metric("data_cut_total", "counter", "Answers that broke off.", "data_api", "cut"),
    Metric("data_connections_open", "gauge", "Connections to the data API.", "data_api", "connections_open"),
    Metric("data_connections_total", "counter", "Connections made.", "data_api", "connections"),
    Metric("data_reads_left", "gauge", "Reads that a token has left.", "data_api", "reads_left_by_key", "key"),
    Metric("data_writes_left", "gauge", "Changes that it has left.", "data_api", "writes_left_by_key", "key"),
    Metric("data_refused_keys", "gauge", "Tokens that upstream refuses.", "data_api", "refused_keys"),
    # Client connections.
    Metric("connections_open", "gauge", "Client connections.", "listener", "open_connections"),
    Metric("connections_total", "counter", "Client connections accepted.", "listener", "connections_total"),
    Metric("connections_refused_total", "counter", "Those too many.", "listener", "refused_connections_total"),
    Metric("accept_errors_total", "counter", "Failed accepts.", "listener", "accept_errors_total"),
    Metric("requests_total", "counter", "Requests answered.", "listener", "requests_total"),
    Metric("request_bytes_buffered", "gauge", "Body bytes held.", "listener", "buffered_bytes"),
    Metric("requests_overloaded_total", "counter", "Bodies too many at once.", "listener", "overloads_total"),
    Metric("requests_bad_total", "counter", "Requests that were not HTTP.", "listener", "bad_requests_total"),
    Metric("handler_errors_total", "counter", "Requests failed by our own error.", "listener", "handler_errors_total"),
    Metric("client_timeouts_total", "counter", "Clients too slow.", "listener", "timeouts_total", "phase"),
    # Connections to upstream.
    Metric("upstream_connections_idle", "gauge", "Pooled connections.", "client", "idle_connections"),
    Metric("upstream_connections_active", "gauge", "Connections in use.", "client", "active_connections"),
    Metric("upstream_connections_total", "counter", "Connections made.", "client", "connections_opened_total"),
    Metric("upstream_connect_failures_total", "counter", "Failed ones.", "client", "connect_failures_total"),
    Metric("upstream_requests_total", "counter", "Requests asked of the client.", "client", "requests_total"),
    Metric("upstream_reused_total", "counter", "Requests on a pooled connection.", "client", "reused_total"),
    Metric("upstream_stale_total", "counter", "Pooled connections found closed.", "client", "stale_total"),
    Metric("upstream_resent_total", "counter", "Requests sent anew for that.", "client", "resent_total"),
    # The process.
    Metric("resident_bytes", "gauge", "Memory of the process.", "process", "resident_bytes"),
    Metric("open_files", "gauge", "File descriptors of the process.", "process", "open_files"),
    Metric("start_time_seconds", "gauge", "Wall clock of the start.", "process", "started_at"),
)
"""All of them; names begin with `PREFIX`."""
