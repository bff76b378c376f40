"""Every metric there is: name, kind, meaning, labels and the values they may take. It counts and renders nothing.

A label takes values from a closed list alone: one that a workload could choose (a host, a path, a source) would let it
fill the memory of the gate and of whoever scrapes it. What stands in no list is counted as `other`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product

from policies.model import Action, Reason, Stage
from proxy import identity
from proxy.service.status import ReloadOutcome, WorkerState

OTHER = "other"
_SEPARATOR = "|"  # in no name and no label value
_FEW = 16  # series of one metric that are shown as 0 before anything happened, so that `increase()` sees the first


class Kind(StrEnum):
    COUNTER = "counter"  # only grows
    GAUGE = "gauge"
    HISTOGRAM = "histogram"  # of seconds
    INFO = "info"  # always 1; the labels are the content


class Lookup(StrEnum):
    """How a lookup ended."""

    KNOWN = "known"  # in the operator's hosts or remembered: nobody was asked
    ANSWERED = "answered"
    STALE = "stale"  # no server answered, and what was known before serves on
    NOT_FOUND = "not_found"
    FAILED = "failed"


class Part(StrEnum):
    """A process of a gate."""

    SUPERVISOR = "supervisor"
    WORKER = "worker"
    INSPECTOR = "inspector"
    WATCH = "watch"  # of a cluster
    OPENER = "opener"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `labels` maps each label to its values; of an INFO they are free, and only the newest are shown."""

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()  # upper bounds in seconds; one without a bound follows

    def known(self, values: Sequence[object]) -> tuple[str, ...]:
        """The same values, `other` for each that the table does not have. Raises ValueError for too few or many."""
        if len(values) != len(self.labels):
            raise ValueError(f"{self.name} has {len(self.labels)} labels, not {len(values)}")
        return tuple(
            str(value) if value in allowed else OTHER
            for value, allowed in zip(values, self.labels.values(), strict=True)
        )

    def series(self, *values: str) -> str:
        """The name under which one combination of label values is counted. Raises ValueError as `known` does."""
        return _SEPARATOR.join((self.name, *self.known(values)))

    def first_series(self) -> Iterator[str]:
        """Those that are shown before anything was counted."""
        values = tuple(product(*self.labels.values()))
        if self.kind is not Kind.INFO and len(values) <= _FEW and (self.labels or self.kind is not Kind.GAUGE):
            yield from (self.series(*combination) for combination in values)


def metric_of(series: str) -> tuple[Metric, tuple[str, ...]]:
    """The metric and the label values of a series. Raises KeyError for a name that is not in the table."""
    name, *values = series.split(_SEPARATOR)
    return METRICS[name], tuple(values)


def _texts(values: Iterable[StrEnum]) -> tuple[str, ...]:
    return tuple(value.value for value in values)


_STAGE, _REASON, _VERDICT = _texts(Stage), _texts(Reason), _texts(Action)
_FLOW_ENDS = ("closed", "reset", "idle", "crashed")  # relays.stream.End, which a test compares
_LOST = ("budget", "waiting", "full", "truncated")  # relays.udp_sessions.Lost, which a test compares
_TAPPED = ("admitted", "denied", "empty", "unknown_workload")  # relays.dnstap.Observed, which a test compares
_TAP_ENDS = ("finished", "closed", "malformed", "slow", "refused")  # relays.dnstap.TapEnd, which a test compares
_OPENED = ("opened", "failed", "late")
_ANSWERS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FLOWS_S = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
_SETUPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def _counter(name: str, help: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(name, Kind.COUNTER, help, labels)


def _gauge(name: str, help: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(name, Kind.GAUGE, help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], **labels: tuple[str, ...]) -> Metric:
    return Metric(name, Kind.HISTOGRAM, help, labels, buckets)


def _info(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.INFO, help, dict.fromkeys(labels, ()))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # what was decided
        _counter("outgate_decisions_total", "Decision records.", stage=_STAGE, verdict=_VERDICT, reason=_REASON),
        _counter(
            "outgate_audit_denials_total",
            "Attempts that audit mode let pass and enforcement would have denied.",
            stage=_STAGE,
            reason=_REASON,
        ),
        # what was carried
        _counter("outgate_connections_accepted_total", "Connections accepted from workloads."),
        _gauge("outgate_connections_open", "Connections being peeked, carried, or told that they are denied."),
        _gauge(
            "outgate_connections_inspected", "Connections under inspection, in the lane and in mitmproxy's process."
        ),
        _gauge("outgate_lane_waiting_bytes", "Bytes that wait in the lane: for slow readers, for the rest of a head."),
        _gauge("outgate_upstreams_pooled", "Connections to origins that wait for another client (`upstreamPool`)."),
        _counter("outgate_flows_total", "Flows relayed without inspection, by how they ended.", end=_FLOW_ENDS),
        _counter(
            "outgate_bytes_total",
            "Bytes of finished flows and request bodies, as the workload sees them.",
            direction=("sent", "received"),
        ),
        _histogram(
            "outgate_connection_duration_seconds",
            "How long a flow lasted, from its acceptance to its end.",
            _FLOWS_S,
            verdict=_VERDICT,
        ),
        _histogram(
            "outgate_request_duration_seconds",
            "How long an inspected request took, from its head to the end of its answer.",
            _ANSWERS_S,
            verdict=_VERDICT,
        ),
        # names and upstreams
        _counter(
            "outgate_lookups_total", "Names resolved for flows and DNS questions, by outcome.", outcome=_texts(Lookup)
        ),
        _histogram("outgate_lookup_duration_seconds", "How long nameservers took to answer or to fail.", _SETUPS_S),
        _gauge("outgate_names_remembered", "Names whose addresses, or whose absence, the resolver remembers."),
        _counter("outgate_dns_malformed_total", "DNS messages of workloads that were no question, and got no answer."),
        _counter(
            "outgate_dns_dropped_total", "DNS questions of sources that asked more often than limits.dnsPerSource."
        ),
        _counter(
            "outgate_dns_search_noise_total",
            "Allowed names asked for with a search domain behind them, answered here and not recorded.",
        ),
        _counter(
            "outgate_dnstap_answers_total",
            "Answers of the site's name servers to their clients, heard by dnstap.",
            outcome=_TAPPED,
        ),
        _gauge("outgate_dnstap_senders", "Name servers that are connected to dnstapListen."),
        _counter("outgate_dnstap_streams_total", "Streams of dnstap that are over, by how they ended.", end=_TAP_ENDS),
        _gauge("outgate_udp_sessions", "UDP sessions that are carried, or wait until it is known where they go."),
        _counter(
            "outgate_udp_datagrams_total",
            "Datagrams carried, as the workload sees them.",
            direction=("sent", "received"),
        ),
        _counter("outgate_udp_lost_total", "Datagrams of admitted UDP sessions that went no further.", why=_LOST),
        _histogram(
            "outgate_upstream_connect_duration_seconds",
            "How long it took to connect upstreams, or to fail.",
            _SETUPS_S,
            result=("connected", "failed"),
        ),
        _gauge("outgate_leaves_remembered", "Names that were inspected and whose leaf certificates are kept."),
        # past the gate
        _counter("outgate_openings_total", "Lookups that were to open a way past the gate.", outcome=_OPENED),
        _histogram("outgate_opening_duration_seconds", "How long answers waited for the kernel to open it.", _SETUPS_S),
        _gauge("outgate_openings_open", "Sources, addresses, protocols and ports that are open past the gate."),
        _counter("outgate_openings_cut_total", "Connections past the gate that were cut: no opening stands for them."),
        _counter("outgate_opener_restarts_total", "Openers started in place of one that had ended by itself."),
        # the decision log
        _counter("outgate_log_records_written_total", "Decision records written."),
        _counter("outgate_log_records_lost_total", "Decision records that could not be written."),
        _counter("outgate_log_write_failures_total", "Writes to the decision log that failed."),
        _gauge("outgate_log_failing", "Workers whose decision log cannot be written now."),
        # the supervisor
        _gauge("outgate_workers", "Workers by state.", state=_texts(WorkerState)),
        _counter("outgate_worker_restarts_total", "Workers started in place of one that had ended by itself."),
        _counter("outgate_reloads_total", "Reloads of the policy, by what came of them.", result=_texts(ReloadOutcome)),
        _gauge("outgate_policy_loaded_timestamp_seconds", "When the policy in force was loaded, POSIX time."),
        _gauge("outgate_issuing_expiry_timestamp_seconds", "When the issuing CA in force expires, POSIX time."),
        _info("outgate_policy_generation_info", "The policy in force, as `policy.generation` names it.", "generation"),
        _info("outgate_build_info", "The versions that run.", "version", "python", "openssl"),
        # the cluster
        _gauge(
            "outgate_identity_pods",
            "Pods that have an address: of their own, their node's, or one that may be another's by now.",
            kind=_texts(identity.Kind),
        ),
        _gauge("outgate_identity_addresses_in_doubt", "Addresses of which nobody says which pod has them."),
        _gauge("outgate_identity_lag_seconds", "How long ago the cluster's API last said what it knows."),
        # processes
        _gauge(
            "process_resident_memory_bytes", "Resident memory; what workers share counts for each.", part=_texts(Part)
        ),
        _counter(
            "process_cpu_seconds_total", "User and system time, also of processes that are gone.", part=_texts(Part)
        ),
        _gauge("process_open_fds", "Open file descriptors.", part=_texts(Part)),
        _gauge("process_max_fds", "How many there may be, summed over the processes.", part=_texts(Part)),
    )
}
