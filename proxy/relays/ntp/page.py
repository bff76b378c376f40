"""The metrics of an NTP relay as Prometheus and OpenMetrics read them, and as `outgate relay status` does.

Servers are named by their rules, which is few enough for a label. No client and no workload is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.registry import Collector

from proxy.log.decision_log import DecisionLog
from proxy.record import show_peer
from proxy.relays.ntp.clock import Reading, read
from proxy.relays.ntp.estimate import Estimate
from proxy.relays.ntp.poller import Poller, Standing
from proxy.relays.ntp.sample import NS, offset_at
from proxy.relays.ntp.server import Drop, NtpRelay
from proxy.relays.ntp.source import Failure, Source

type Labelled = tuple[tuple[str, ...], float]


def render(
    poller: Poller, relay: NtpRelay, log: DecisionLog | None, generation: str, *, openmetrics: bool = False
) -> bytes:
    """The page of all metrics."""
    registry = CollectorRegistry()  # of our own: the library's has metrics about itself
    registry.register(_Page(poller, relay, log, generation))
    if openmetrics:
        return openmetrics_text(registry)  # type: ignore[no-any-return, no-untyped-call]  # it has no types there
    return plain_text(registry)


class _Page(Collector):
    def __init__(self, poller: Poller, relay: NtpRelay, log: DecisionLog | None, generation: str) -> None:
        self._poller = poller
        self._relay = relay
        self._log = log
        self._generation = generation

    def collect(self) -> Iterator[Metric]:
        now = read()
        estimate = self._poller.estimate(now)
        yield from _of_the_estimate(estimate, now)
        yield from _of_sources(self._poller.standings(), estimate, now)
        yield _counter("outgate_ntp_clock_jumps", "Jumps of this machine's clock.", (), [((), self._poller.jumps)])
        yield from _of_clients(self._relay)
        if self._log:
            yield _one("outgate_log_failing", "1 while decision records cannot be written.", self._log.is_failing)
            lost = [((), float(self._log.lost_total))]
            yield _counter("outgate_log_records_lost", "Decision records that could not be written.", (), lost)
        text = "The policy in force, as `policy.generation` names it."
        yield InfoMetricFamily("outgate_policy_generation", text, {"generation": self._generation})


def _of_the_estimate(estimate: Estimate | None, now: Reading) -> Iterator[Metric]:
    is_synchronised = estimate is not None and not estimate.is_stale(now.own_ns)
    yield _one("outgate_ntp_synchronised", "1 while clients are given the time.", is_synchronised)
    if estimate is None:
        return
    behind_s = (estimate.posix_ns(now.own_ns) - now.machine_ns) / NS
    yield _one("outgate_ntp_offset_seconds", "By how much this machine's own clock is behind.", behind_s)
    yield _one("outgate_ntp_root_delay_seconds", "To the servers' own sources and back.", estimate.root_delay_s)
    dispersion_s = estimate.dispersion_s(now.own_ns)
    yield _one("outgate_ntp_root_dispersion_seconds", "What the estimate may be wrong by beside that.", dispersion_s)
    yield _one("outgate_ntp_stratum", "Ours, as clients are told.", estimate.stratum)
    yield _one("outgate_ntp_clock_rate", "Seconds a second by which our clock falls behind.", estimate.rate.value)


def _of_sources(standings: Iterable[Standing], estimate: Estimate | None, now: Reading) -> Iterator[Metric]:
    rows: list[tuple[tuple[str, str], Standing]] = []
    seats: Counter[str] = Counter()
    for standing in standings:
        server = standing.source.name
        seats[server] += 1
        rows.append(((server, str(seats[server])), standing))
    labels = ("server", "seat")

    state = GaugeMetricFamily(
        "outgate_ntp_source_state", "1 for the state that a source is in.", labels=(*labels, "address", "state")
    )
    for key, standing in rows:
        asked = standing.source.asked
        state.add_metric((*key, show_peer(asked) if asked else "", standing.state), 1)
    yield state
    known = [(key, standing.source, newest) for key, standing in rows if (newest := standing.source.history.newest)]
    if estimate is not None:
        offsets = [
            (key, (offset_at(newest, estimate.at_ns, estimate.rate) - estimate.offset_ns) / NS)
            for key, _, newest in known
        ]
        yield _gauge("outgate_ntp_source_offset_seconds", "Its newest sample less the estimate.", labels, offsets)
    for name, text, values in (
        ("delay_seconds", "To it and back, of its newest sample.", [(key, one.delay_s) for key, _, one in known]),
        ("root_delay_seconds", "As it says.", [(key, one.root_delay_s) for key, _, one in known]),
        ("root_dispersion_seconds", "As it says.", [(key, one.root_dispersion_s) for key, _, one in known]),
        ("stratum", "As it says.", [(key, float(one.stratum)) for key, _, one in known]),
        ("age_seconds", "Of its newest sample.", [(key, (now.own_ns - one.at_ns) / NS) for key, _, one in known]),
        ("reach", "Answers among its last eight polls.", [(k, float(one.source.reach.bit_count())) for k, one in rows]),
        ("poll_seconds", "Between two polls.", [(key, one.source.interval_s) for key, one in rows]),
        ("nts", "1 where it has to prove what it says.", [(key, float(bool(one.source.keys))) for key, one in rows]),
        ("nts_cookies", "Left to ask it by.", [(key, float(_cookies(one.source))) for key, one in rows]),
    ):
        yield _gauge(f"outgate_ntp_source_{name}", text, labels, values)
    polls = [(key, float(one.source.tally.polls)) for key, one in rows]
    yield _counter("outgate_ntp_polls", "Queries, and attempts at one that failed for want of keys.", labels, polls)
    failures = [
        ((*key, failure), float(one.source.tally.failures[failure])) for key, one in rows for failure in Failure
    ]
    yield _counter("outgate_ntp_poll_failures", "Queries that gave no time.", (*labels, "reason"), failures)


def _cookies(source: Source) -> int:
    return source.keys.cookies if source.keys else 0


def _of_clients(relay: NtpRelay) -> Iterator[Metric]:
    synchronised = relay.answered - relay.unsynchronised
    answers = [(("yes",), float(synchronised)), (("no",), float(relay.unsynchronised))]
    yield _counter("outgate_ntp_answers", "Answers to clients.", ("synchronised",), answers)
    drops = [((drop,), float(relay.drops[drop])) for drop in Drop]
    yield _counter("outgate_ntp_drops", "Packets that got no answer.", ("reason",), drops)
    yield _one("outgate_ntp_clients", "Sources that were answered, as far as they are remembered.", relay.clients)


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, float(value))


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Iterable[Labelled]) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def _counter(name: str, text: str, labels: tuple[str, ...], values: Iterable[Labelled]) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Iterable[Labelled]) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    return family
