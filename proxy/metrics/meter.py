"""Counts what a process does: its decision records, and what its parts say took how long. It renders nothing.

Counting is on the data path: numbers in dictionaries, no lock and no text. Durations are summed as whole microseconds,
so that a sum is the same in whatever order it is made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping

from policies.model import Action, Reason
from proxy.metrics.table import METRICS, Kind, Lookup, metric_of
from proxy.record import Record, Sink

type Number = int | float
type Snapshot = dict[str, Number | list[int]]  # by series; of a histogram: the sum in microseconds, then each bucket
type Stats = Callable[[], Mapping[str, Number]]

_DIAL = "outgate_upstream_connect_duration_seconds"
_MOST = 2**60  # what JSON carries, with room for sums
_LONGEST_S = 1e9  # a clock that was set must not break the sum


class Counts:
    """The counters and histograms of one process.

    stats  asked at each snapshot for gauges, and for counters that other parts keep themselves; by series
    """

    def __init__(self, stats: Stats = dict) -> None:
        self._stats = stats
        self._tallies: dict[str, _Tally] = {}
        self._histograms: dict[str, _Histogram] = {}
        self._lookups = self._tally("outgate_lookups_total")
        self._lookup_time = self.histogram("outgate_lookup_duration_seconds")
        self._connect_time, self._failure_time = (self.histogram(_DIAL, result) for result in ("connected", "failed"))

    def count(self, name: str, *labels: str) -> None:
        """Add one to a counter. Raises KeyError, ValueError for what is not in the table."""
        self._tally(name).add(labels)

    def histogram(self, name: str, *labels: str) -> _Histogram:
        """The histogram, whose `add` takes seconds. Raises KeyError, ValueError for what is not in the table."""
        metric = METRICS[name]
        return self._histograms.setdefault(metric.series(*labels), _Histogram(metric.buckets))

    def looked_up(self, how: Lookup, seconds: float) -> None:
        """A name was resolved, or was not."""
        self._lookups.add((how.value,))
        if how is not Lookup.KNOWN:
            self._lookup_time.add(seconds)

    def dialled(self, seconds: float, failure: Reason | None) -> None:
        """An upstream was connected, or was not."""
        (self._failure_time if failure else self._connect_time).add(seconds)

    def snapshot(self) -> Snapshot:
        """What was counted until now, and the gauges. JSON can carry it."""
        taken: Snapshot = {**self._stats()}
        for tally in self._tallies.values():
            taken.update(tally.numbers())
        taken.update((series, histogram.numbers.copy()) for series, histogram in self._histograms.items())
        return taken

    def _tally(self, name: str) -> _Tally:
        return self._tallies.setdefault(name, _Tally(name))


class Meter(Counts):
    """A sink that passes each decision record on and counts it.

    inner  what the inspector of this process counts
    """

    def __init__(self, sink: Sink, stats: Stats = dict, *, inner: Totals | None = None) -> None:
        super().__init__(stats)
        self._sink = sink
        self._inner = inner or Totals()
        self._decisions = self._tally("outgate_decisions_total")
        self._audit_denials = self._tally("outgate_audit_denials_total")
        self._flows = self._tally("outgate_flows_total")
        self._sent = self._received = 0
        self._requests, self._connections = (
            {action.value: self.histogram(name, action) for action in Action}
            for name in ("outgate_request_duration_seconds", "outgate_connection_duration_seconds")
        )

    def __call__(self, record: Record) -> None:
        self._sink(record)
        get = record.get
        stage, verdict, reason = get("stage"), get("verdict"), get("reason")
        if verdict is None:  # a line about the log itself
            return
        self._decisions.add((stage, verdict, reason))
        if get("would_be") == "deny":
            self._audit_denials.add((stage, reason))
        duration_ms, sent, received = get("duration_ms"), get("bytes.sent"), get("bytes.received")
        if isinstance(duration_ms, float):
            durations = self._requests if stage == "http" else self._connections
            durations["allow" if verdict == "allow" else "deny"].add(duration_ms / 1000)
        if isinstance(sent, int) and isinstance(received, int):
            self._sent += sent
            self._received += received
            if stage != "http":
                self._flows.add((get("flow.end", "closed"),))

    def snapshot(self) -> Snapshot:
        own = super().snapshot()
        own["outgate_bytes_total|sent"], own["outgate_bytes_total|received"] = self._sent, self._received
        return merge((own, self._inner.sum()))


class Totals:
    """What several processes counted, also those that are gone: a sum that never goes back."""

    def __init__(self) -> None:
        self._latest: dict[Hashable, Snapshot] = {}
        self._retired: Snapshot = {}

    def see(self, process: Hashable, snapshot: Snapshot) -> None:
        """The newest snapshot of a process that runs. What the table does not have is left out: it may be mad."""
        self._latest[process] = {series: value for series, value in snapshot.items() if _is_known(series, value)}

    def retire(self, process: Hashable) -> None:
        """It has ended: what it counted stays, its gauges go."""
        last = self._latest.pop(process, {})
        counted = {series: value for series, value in last.items() if metric_of(series)[0].kind is not Kind.GAUGE}
        self._retired = merge((self._retired, counted))

    def sum(self) -> Snapshot:
        return merge((self._retired, *self._latest.values()))


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of each series, gauges too. Raises ValueError where one is a histogram here and a number there."""
    merged: Snapshot = {}
    for snapshot in snapshots:
        for series, value in snapshot.items():
            before = merged.get(series)
            if before is None:
                merged[series] = value
            elif isinstance(before, list) and isinstance(value, list):
                merged[series] = [a + b for a, b in zip(before, value, strict=True)]
            elif not isinstance(before, list) and not isinstance(value, list):
                merged[series] = before + value
            else:
                raise ValueError(f"{series} is a histogram and a number")
    return merged


def _is_known(series: str, value: object) -> bool:
    try:
        metric, labels = metric_of(series)
        if metric.kind is Kind.INFO or metric.series(*labels) != series:
            return False
    except (KeyError, ValueError):
        return False
    if metric.kind is not Kind.HISTOGRAM:
        return _is_number(value)
    return isinstance(value, list) and len(value) == len(metric.buckets) + 2 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < _MOST


class _Tally:
    """A counter by label values. Any are counted, those of the table by name; so nobody makes it grow."""

    __slots__ = ("_counts", "_metric")

    def __init__(self, name: str) -> None:
        self._metric = METRICS[name]
        self._counts: dict[tuple[object, ...], int] = {}

    def add(self, values: tuple[object, ...]) -> None:
        try:
            self._counts[values] += 1
        except (KeyError, TypeError):  # TypeError: a list, from a process that has gone mad
            known = self._metric.known(values)
            self._counts[known] = self._counts.get(known, 0) + 1

    def numbers(self) -> dict[str, int]:
        return {self._metric.series(*map(str, values)): count for values, count in self._counts.items()}


class _Histogram:
    """Durations by bucket: the sum in microseconds, then the count of each bucket, the last without a bound."""

    __slots__ = ("_bounds", "numbers")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.numbers = [0] * (len(bounds) + 2)

    def add(self, seconds: float) -> None:
        if not 0.0 <= seconds <= _LONGEST_S:  # the clock was set while it lasted
            seconds = 0.0
        self.numbers[0] += int(seconds * 1e6)
        self.numbers[1 + bisect_left(self._bounds, seconds)] += 1
