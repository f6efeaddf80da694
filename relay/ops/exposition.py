"""The metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from relay.telemetry import METRICS, PREFIX, Metric

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
"""The text format that every scraper reads."""


class _Collector:
    def __init__(self, sources: Mapping[str, Any]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            if metric.source in self._sources:  # all but the account, where a damaged disk does not give it
                yield _family(metric, self._sources[metric.source])


def _family(metric: Metric, statistics: Any) -> Family:
    name = PREFIX + metric.name
    value = getattr(statistics, metric.field)
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, metric.help)
        histogram.add_metric([], value.cumulative(), sum_value=value.sum)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, metric.help, labels=[metric.label] if metric.label else [])
    for label, sample in value.items() if metric.label else [("", value)]:
        family.add_metric([str(label)] if metric.label else [], sample)
    return family


def expose(sources: Mapping[str, Any]) -> bytes:
    """Return the exposition.

    Args:
        sources: The components' statistics, by the names that `telemetry.Metric.source` uses.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(sources))
    return generate_latest(registry)
