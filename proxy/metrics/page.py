"""What was counted, in the words that Prometheus and OpenMetrics read. It counts nothing and runs in the supervisor.

Workers load nothing of this: they count with `meter`, and what they counted comes here as snapshots, merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proxy.metrics import table as metric_table
from proxy.metrics.meter import Snapshot
from proxy.metrics.table import METRICS, Kind, metric_of

type Info = Mapping[str, Mapping[str, str]]  # by metric of the kind INFO: its labels


def render(merged: Snapshot, info: Info, *, openmetrics: bool = False) -> bytes:
    """The page of all metrics. Raises KeyError, ValueError for what is not in the table."""
    registry = CollectorRegistry()  # of our own: the library's has metrics about itself
    registry.register(_Page(merged, info))
    if openmetrics:
        return openmetrics_text(registry)  # type: ignore[no-any-return, no-untyped-call]  # the library has no types there
    return plain_text(registry)


class _Page(Collector):
    """Every metric of the table, in its order."""

    def __init__(self, merged: Snapshot, info: Info) -> None:
        self._info = info
        self._values: dict[str, Snapshot] = {
            name: dict.fromkeys(metric.first_series(), 0) for name, metric in METRICS.items()
        }
        for series, value in merged.items():
            self._values[metric_of(series)[0].name][series] = value

    def collect(self) -> Iterator[Metric]:
        for name, metric in METRICS.items():
            values = self._values[name]
            if metric.kind is Kind.INFO:
                yield _info(metric, self._info[name])
            elif metric.kind is Kind.HISTOGRAM:
                yield _histogram(metric, values)
            else:
                yield _numbers(metric, values)


def _info(metric: metric_table.Metric, labels: Mapping[str, str]) -> Metric:
    if labels.keys() != metric.labels.keys():
        raise ValueError(f"{metric.name} has the labels {', '.join(metric.labels)}, not {', '.join(labels)}")
    return InfoMetricFamily(metric.name.removesuffix("_info"), metric.help, dict(labels))


def _numbers(metric: metric_table.Metric, values: Snapshot) -> Metric:
    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=tuple(metric.labels))
    for series, value in values.items():
        if isinstance(value, list):
            raise ValueError(f"{series} is a number, not a histogram")
        family.add_metric(metric_of(series)[1], value)
    return family


def _histogram(metric: metric_table.Metric, values: Snapshot) -> Metric:
    family = HistogramMetricFamily(metric.name, metric.help, labels=tuple(metric.labels))
    bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
    for series, value in values.items():
        microseconds, *counts = value if isinstance(value, list) else [0] * (len(bounds) + 1)
        buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
        family.add_metric(metric_of(series)[1], buckets, microseconds / 1e6)
    return family
