"""What workers count is summed exactly, never goes back, and reads as Prometheus and OpenMetrics say it must."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import reduce
from ipaddress import ip_address
from math import inf, nan
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from policies.hostnames import Hostname
from policies.model import Action, Attempt, Reason, Stage, Verdict
from proxy.hosts import HostsEntry
from proxy.metrics.meter import Counts, Meter, Snapshot, Totals, merge
from proxy.metrics.page import render
from proxy.metrics.table import METRICS, OTHER, Kind, Lookup, Part, metric_of
from proxy.record import Record, record_of
from proxy.relays.stream import End
from proxy.resolver import NameNotFound, Resolver, ResolverFailed
from proxy.service.processes import Processes, read_usage
from tests.builders import rules
from tests.proxy.gates import PATIENCE_S, at, eventually, gate, origin
from tests.proxy.nameserver import Script, reply, serving, soa, zone

NAME = Hostname("api.example")
ROOT = Path(__file__).resolve().parent.parent.parent
INFO = {
    "outgate_build_info": {"version": "1.2.3", "python": "3.13.1", "openssl": "3.5.0"},
    "outgate_policy_generation_info": {"generation": "0123456789ab"},
}
FAMILY_KINDS = {Kind.COUNTER: "counter", Kind.GAUGE: "gauge", Kind.HISTOGRAM: "histogram", Kind.INFO: "gauge"}


def meter(records: list[Record] | None = None, stats: Mapping[str, float] | None = None) -> Meter:
    kept: list[Record] = [] if records is None else records
    return Meter(kept.append, lambda: stats or {})


def denial(stage: Stage = Stage.TLS, reason: Reason = Reason.NO_RULE) -> Record:
    attempt = Attempt(stage, "weather", port=443)
    return record_of(attempt, Verdict(Action.DENY, reason, stage), id="1", source=("203.0.113.7", 4711))


def flow(stage: Stage = Stage.TLS, *, duration_s: float = 0.0, **extra: object) -> Record:
    attempt = Attempt(stage, "weather", port=443)
    verdict = Verdict(Action.ALLOW, Reason.RULE, stage)
    record = record_of(
        attempt, verdict, id="1", started=time.time(), bytes_sent=10, bytes_received=300, extra=dict(extra)
    )
    return {**record, "duration_ms": duration_s * 1000}


def samples(families: Iterable[Metric]) -> dict[str, float]:
    """`name{label="value",…}` to value, labels in alphabetical order."""
    found = {}
    for family in families:
        for sample in family.samples:
            labels = ",".join(f'{label}="{value}"' for label, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def plain(merged: Snapshot) -> dict[str, float]:
    return samples(parse_plain(render(merged, INFO).decode()))


def openmetrics(merged: Snapshot) -> dict[str, float]:
    text = render(merged, INFO, openmetrics=True).decode()
    assert text.endswith("# EOF\n")
    return samples(parse_openmetrics(text))  # type: ignore[no-untyped-call]  # the library has no types there


# --- counting ---


def test_every_record_is_passed_on_and_counted() -> None:
    records: list[Record] = []
    it = meter(records)
    for record in (denial(), denial(), denial(Stage.DNS, Reason.ANCESTOR), flow(duration_s=2.0)):
        it(record)

    shown = plain(it.snapshot())

    assert len(records) == 4
    assert shown['outgate_decisions_total{reason="no_rule",stage="tls",verdict="deny"}'] == 2
    assert shown['outgate_decisions_total{reason="ancestor",stage="dns",verdict="deny"}'] == 1
    assert shown['outgate_decisions_total{reason="rule",stage="tls",verdict="allow"}'] == 1
    assert shown['outgate_bytes_total{direction="sent"}'] == 10
    assert shown['outgate_bytes_total{direction="received"}'] == 300
    assert shown['outgate_flows_total{end="closed"}'] == 1
    assert shown['outgate_connection_duration_seconds_sum{verdict="allow"}'] == 2.0
    assert shown['outgate_connection_duration_seconds_bucket{le="1.0",verdict="allow"}'] == 0
    assert shown['outgate_connection_duration_seconds_bucket{le="5.0",verdict="allow"}'] == 1


def test_what_audit_mode_let_pass_is_counted_as_allowed_and_as_a_denial_of_audit() -> None:
    it = meter()
    would_be = Verdict(Action.DENY, Reason.NO_RULE, Stage.TLS)
    verdict = Verdict(Action.ALLOW, Reason.NO_RULE, Stage.TLS, would_be=would_be)
    it(record_of(Attempt(Stage.TLS, "weather"), verdict, id="1"))

    shown = plain(it.snapshot())

    assert shown['outgate_decisions_total{reason="no_rule",stage="tls",verdict="allow"}'] == 1
    assert shown['outgate_audit_denials_total{reason="no_rule",stage="tls"}'] == 1


def test_requests_and_connections_have_durations_of_their_own() -> None:
    it = meter()
    it(flow(Stage.HTTP, duration_s=0.02))
    it(flow(Stage.TCP, duration_s=70.0, **{"flow.end": End.RESET.value}))

    shown = plain(it.snapshot())

    assert shown['outgate_request_duration_seconds_count{verdict="allow"}'] == 1
    assert shown['outgate_request_duration_seconds_bucket{le="0.025",verdict="allow"}'] == 1
    assert shown['outgate_connection_duration_seconds_count{verdict="allow"}'] == 1
    assert shown['outgate_connection_duration_seconds_bucket{le="60.0",verdict="allow"}'] == 0
    assert shown['outgate_flows_total{end="reset"}'] == 1
    assert sum(value for series, value in shown.items() if series.startswith("outgate_flows_total")) == 1


def test_duration_on_a_bound_counts_below_it() -> None:
    it = meter()
    it(flow(duration_s=0.5))
    assert plain(it.snapshot())['outgate_connection_duration_seconds_bucket{le="0.5",verdict="allow"}'] == 1


@pytest.mark.parametrize("duration_s", [-3600.0, nan, inf, 1e300], ids=["back", "nan", "inf", "beyond"])
def test_clock_that_is_set_breaks_no_sum(duration_s: float) -> None:
    it = meter()
    it(flow(duration_s=duration_s))
    it(flow(duration_s=2.0))
    shown = plain(it.snapshot())
    assert shown['outgate_connection_duration_seconds_sum{verdict="allow"}'] == 2.0
    assert shown['outgate_connection_duration_seconds_count{verdict="allow"}'] == 2


def test_line_about_the_log_is_no_decision() -> None:
    records: list[Record] = []
    it = meter(records)
    it({"event": "records_lost", "count": 7})
    assert len(records) == 1
    assert not any(series.startswith("outgate_decisions_total") for series in it.snapshot())


def test_parts_tell_of_lookups_and_dials() -> None:
    it = meter()
    it.looked_up(Lookup.KNOWN, 0.0)
    it.looked_up(Lookup.ANSWERED, 0.03)
    it.dialled(0.2, None)
    it.dialled(10.0, Reason.UPSTREAM_TIMEOUT)

    shown = plain(it.snapshot())

    assert shown['outgate_lookups_total{outcome="known"}'] == 1
    assert shown["outgate_lookup_duration_seconds_count"] == 1
    assert shown['outgate_upstream_connect_duration_seconds_sum{result="connected"}'] == 0.2
    assert shown['outgate_upstream_connect_duration_seconds_count{result="failed"}'] == 1


def test_gauges_are_asked_for_when_a_snapshot_is_taken() -> None:
    stats = {"outgate_connections_open": 3.0}
    it = meter(stats=stats)
    stats["outgate_connections_open"] = 4.0
    assert it.snapshot()["outgate_connections_open"] == 4.0


def test_inspector_counts_into_its_worker() -> None:
    inspector, inner = Counts(lambda: {"outgate_leaves_remembered": 9}), Totals()
    it = Meter(lambda record: None, inner=inner)
    it.looked_up(Lookup.ANSWERED, 0.1)
    inspector.looked_up(Lookup.ANSWERED, 0.1)
    inner.see(4711, inspector.snapshot())

    assert it.snapshot()["outgate_lookups_total|answered"] == 2
    inner.retire(4711)
    assert it.snapshot()["outgate_lookups_total|answered"] == 2
    assert "outgate_leaves_remembered" not in it.snapshot()


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (zone({NAME: ["192.0.2.1"]}), Lookup.ANSWERED),
        (lambda received: [reply(received.message, rcode=3, authority=[soa("example", 900, 30)])], Lookup.NOT_FOUND),
        (lambda received: [reply(received.message, rcode=2)], Lookup.FAILED),
    ],
    ids=lambda value: value.value if isinstance(value, Lookup) else "",
)
def test_resolver_tells_once_how_each_lookup_ended(script: Script, outcome: Lookup) -> None:
    told: list[Lookup] = []
    counts = Counts()

    def tell(how: Lookup, seconds: float) -> None:
        told.append(how)
        counts.looked_up(how, seconds)

    async def resolve(resolver: Resolver) -> None:
        with suppress(NameNotFound, ResolverFailed):
            await resolver.resolve(NAME)

    async def test() -> None:
        async with serving(script) as server, asyncio.timeout(PATIENCE_S):
            resolver = Resolver({}, [server.address], timeout_s=10, attempts=1, told=tell)
            await asyncio.gather(*(resolve(resolver) for _ in range(3)))  # who wait for the same answer
            assert told == [outcome]
            await resolve(resolver)
            assert told == [outcome, outcome if outcome is Lookup.FAILED else Lookup.KNOWN]
            assert resolver.remembered == (outcome is not Lookup.FAILED)

    asyncio.run(test())
    times = counts.snapshot()["outgate_lookup_duration_seconds"]
    assert isinstance(times, list)
    assert sum(times[1:]) == len([how for how in told if how is not Lookup.KNOWN])


def test_name_of_the_operator_is_known() -> None:
    told: list[Lookup] = []
    hosts = {NAME: HostsEntry((ip_address("192.0.2.1"),), None)}
    resolver = Resolver(hosts, [], told=lambda how, seconds: told.append(how))
    assert resolver.cached(NAME)
    assert told == [Lookup.KNOWN]


def test_listener_counts_what_it_accepts() -> None:
    with origin() as upstream, gate(rules("- tcp: a.example:22"), {"a.example": at(upstream.address)}, port=22,
                                    told=["a.example"]) as it:  # fmt: skip
        for number in (1, 2):
            with it.connect() as client:
                client.sendall(b"x")
                client.recv(1)
            eventually(lambda: len(it.records) == number)  # noqa: B023 - called before the next turn
        assert it.listener.accepted == 2


# --- closedness: cardinality is an attack ---


@pytest.mark.parametrize(
    "hostile",
    [
        {"reason": "a.attacker.example"},
        {"stage": "x" * 9000},
        {"verdict": "allow|rule"},
        {"reason": ["a", "list"]},
        {"reason": None},
        {"stage": "tls\n# EOF"},
    ],
    ids=["reason", "long", "separator", "list", "none", "line"],
)
def test_label_that_is_in_no_list_is_other(hostile: dict[str, object]) -> None:
    it = meter()
    it({**denial(), **hostile})

    decisions = [metric_of(series) for series in it.snapshot() if series.startswith("outgate_decisions_total")]

    assert [values.count(OTHER) for _, values in decisions] == [1]


def test_many_made_up_labels_take_one_place() -> None:
    it = meter()
    before = len(it.snapshot())
    for number in range(1000):
        it({"stage": "tls", "verdict": "deny", "reason": f"r{number}", "flow.end": f"e{number}", "bytes.sent": 1,
            "bytes.received": 1})  # fmt: skip
    assert len(it.snapshot()) == before + 2


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ("outgate_made_up_total", 1),
        ("outgate_lookups_total|a.attacker.example", 1),
        ("outgate_lookups_total", 1),
        ("outgate_lookups_total|known|known", 1),
        ("outgate_lookups_total|known", -1),
        ("outgate_lookups_total|known", nan),
        ("outgate_lookups_total|known", inf),
        ("outgate_lookups_total|known", 2**60),
        ("outgate_lookups_total|known", "1"),
        ("outgate_lookups_total|known", [1, 2]),
        ("outgate_lookup_duration_seconds", 1),
        ("outgate_lookup_duration_seconds", [1, 2]),
        ("outgate_lookup_duration_seconds", ["1"] * 15),
        ("outgate_build_info|1|2|3", 1),
        ("", 1),
    ],
)
def test_process_that_has_gone_mad_adds_nothing(series: str, value: object) -> None:
    totals = Totals()
    mad: dict[str, object] = {series: value, "outgate_lookups_total|failed": 2}
    totals.see(1, mad)  # type: ignore[arg-type]  # what JSON may hold
    totals.retire(1)
    assert totals.sum() == {"outgate_lookups_total|failed": 2}
    render(totals.sum(), INFO)


def test_every_label_value_is_declared() -> None:
    for metric in METRICS.values():
        for label, values in metric.labels.items():
            assert re.fullmatch("[a-z]+", label)
            assert all(re.fullmatch("[a-z0-9_]+", value) for value in values)
            assert bool(values) is (metric.kind is not Kind.INFO)
            assert OTHER not in values


def test_ends_of_flows_are_those_of_the_relay() -> None:
    assert METRICS["outgate_flows_total"].labels["end"] == tuple(end.value for end in End)


@pytest.mark.parametrize("name", ["outgate_made_up_total", "outgate_decisions"])
def test_metric_that_is_not_in_the_table_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        Counts().count(name)
    with pytest.raises(KeyError):
        render({name: 1}, INFO)


def test_wrong_number_of_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 1 labels, not 2"):
        Counts().count("outgate_reloads_total", "loaded", "twice")


# --- sums ---


def snapshots() -> st.SearchStrategy[Snapshot]:
    """What processes may have counted: some series of the table, with any numbers."""
    by_series: dict[str, st.SearchStrategy[int | list[int]]] = {}
    numbers = st.integers(0, 2**50)
    for metric in METRICS.values():
        for series in metric.first_series():
            size = len(metric.buckets) + 2
            lists = st.lists(numbers, min_size=size, max_size=size)
            by_series[series] = lists if metric.kind is Kind.HISTOGRAM else numbers
    by_series["outgate_decisions_total|tls|deny|no_rule"] = numbers
    by_series["outgate_connections_open"] = numbers
    return st.fixed_dictionaries({}, optional=by_series)


@given(snapshots(), snapshots(), snapshots())
def test_merge_is_commutative_and_associative(a: Snapshot, b: Snapshot, c: Snapshot) -> None:
    assert merge((a, b)) == merge((b, a))
    assert merge((merge((a, b)), c)) == merge((a, merge((b, c)))) == merge((c, a, b))
    assert merge((a, {})) == a


@given(st.lists(snapshots(), min_size=1, max_size=3))
def test_page_of_a_sum_is_the_sum_of_the_pages(taken: list[Snapshot]) -> None:
    def total(sums: dict[str, float], page: dict[str, float]) -> dict[str, float]:
        return {series: value + page.get(series, 0.0) for series, value in sums.items()}

    pages = [plain(snapshot) for snapshot in taken]
    merged = plain(merge(taken))
    everything: dict[str, float] = dict.fromkeys(merged, 0.0)
    expected = reduce(total, pages, everything)
    for series, value in merged.items():
        if not series.startswith(("outgate_build_info", "outgate_policy_generation_info")):
            assert value == pytest.approx(expected[series], rel=1e-9), series


def test_merging_changes_no_snapshot() -> None:
    a: Snapshot = {"outgate_lookup_duration_seconds": [0] * 15}
    merge((a, {"outgate_lookup_duration_seconds": [1] * 15}))
    assert a == {"outgate_lookup_duration_seconds": [0] * 15}


def test_sums_do_not_go_back_when_a_worker_dies_and_its_number_returns() -> None:
    totals = Totals()
    totals.see(7, {"outgate_worker_restarts_total": 5, "outgate_connections_open": 3})
    totals.see(8, {"outgate_worker_restarts_total": 2, "outgate_connections_open": 1})
    totals.retire(7)
    assert totals.sum() == {"outgate_worker_restarts_total": 7, "outgate_connections_open": 1}
    totals.see(7, {"outgate_worker_restarts_total": 1, "outgate_connections_open": 2})
    totals.retire(99)
    assert totals.sum() == {"outgate_worker_restarts_total": 8, "outgate_connections_open": 3}


def test_snapshot_survives_json_and_fits_one_message() -> None:
    it = meter()
    for stage in Stage:
        for reason in Reason:
            for verdict in Action:
                it({"stage": stage.value, "verdict": verdict.value, "reason": reason.value, "would_be": "deny"})
    taken = it.snapshot()
    text = json.dumps(taken)
    assert json.loads(text) == taken
    assert len(text) < 64 * 1024


# --- the page ---


def full() -> Snapshot:
    it = meter(stats={"outgate_connections_open": 2})
    it(denial())
    it(flow(duration_s=1.0))
    return it.snapshot()


def test_both_formats_say_the_same() -> None:
    merged = full()
    assert openmetrics(merged) == plain(merged)


def test_families_have_the_kinds_of_the_table() -> None:
    families = {family.name: family for family in parse_plain(render(full(), INFO).decode())}
    for metric in METRICS.values():
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (FAMILY_KINDS[metric.kind], metric.help)
    assert len(families) == len(METRICS)


def test_counters_with_few_series_are_there_before_anything_happened() -> None:
    shown = plain({})
    assert shown['outgate_reloads_total{result="refused"}'] == 0
    assert shown["outgate_log_records_lost_total"] == 0
    assert shown['outgate_workers{state="ready"}'] == 0
    assert shown['outgate_request_duration_seconds_bucket{le="+Inf",verdict="deny"}'] == 0
    assert "outgate_connections_open" not in shown  # a gauge that nobody sets is not 0


def test_versions_and_generation_are_labels() -> None:
    shown = plain({})
    assert shown['outgate_build_info{openssl="3.5.0",python="3.13.1",version="1.2.3"}'] == 1
    assert shown['outgate_policy_generation_info{generation="0123456789ab"}'] == 1


def test_info_with_other_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="outgate_build_info has the labels version, python, openssl"):
        render({}, {**INFO, "outgate_build_info": {"host": "a.example"}})


def test_histogram_where_a_number_must_stand_is_an_error() -> None:
    with pytest.raises(ValueError, match="is a histogram and a number"):
        merge(({"outgate_lookup_duration_seconds": 1}, {"outgate_lookup_duration_seconds": [1] * 15}))
    with pytest.raises(ValueError, match="is a number, not a histogram"):
        render({"outgate_connections_open": [1, 2]}, INFO)


# --- processes ---


def test_processes_are_told_apart_by_part_and_time_stays_when_they_are_gone() -> None:
    # A worker that starts an inspector, which burns processor time until it is told to end.
    burn = "import os\nwhile os.times().user < 0.05: pass\nprint(flush=True)\ninput()"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-Sc', {burn!r}])"
    worker = subprocess.Popen([sys.executable, "-Sc", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin
    assert worker.stdout
    processes = Processes()
    idle = [subprocess.Popen([sys.executable, "-Sc", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    with worker, idle[0], idle[1]:
        worker.stdout.readline()
        seen = processes.look([worker.pid], {Part.WATCH: idle[0].pid, Part.OPENER: idle[1].pid})
        worker.stdin.write(b"\n")
        for other in idle:
            other.kill()
    gone = processes.look([worker.pid])

    assert number(seen, "process_cpu_seconds_total|inspector") >= 0.05
    for part in Part:
        assert number(seen, f"process_resident_memory_bytes|{part}") > 1_000_000
        assert 0 < number(seen, f"process_open_fds|{part}") <= number(seen, f"process_max_fds|{part}")
    assert gone["process_cpu_seconds_total|inspector"] == seen["process_cpu_seconds_total|inspector"]
    assert "process_open_fds|inspector" not in gone
    assert number(gone, "process_open_fds|supervisor") > 0
    render(gone, INFO)


def number(snapshot: Snapshot, series: str) -> float:
    value = snapshot[series]
    assert not isinstance(value, list)
    return value


def test_descriptors_are_counted() -> None:
    before = read_usage(os.getpid())
    with open(os.devnull) as _:
        during = read_usage(os.getpid())
    assert before
    assert during
    assert during.open_fds == before.open_fds + 1
    assert during.memory_bytes > 1_000_000


def test_process_that_is_gone_uses_nothing() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert read_usage(ended.pid) is None
    assert "process_open_fds|worker" not in Processes().look([ended.pid])


# --- cost ---


def test_workers_load_no_prometheus_client_and_no_web_server() -> None:
    heavy = "{'prometheus_client', 'aiohttp'}"
    code = f"import sys, proxy.metrics.meter, proxy.service.status; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# --- docs/metrics.md ---

PAGE = (ROOT / "docs" / "metrics.md").read_text()


def test_page_explains_every_metric_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\| (.+) \|$", PAGE, re.MULTILINE)
    explained = [(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows]
    assert explained == [(metric.name, metric.kind.value, tuple(metric.labels)) for metric in METRICS.values()]


def test_page_lists_every_label_value_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", PAGE.partition("| label |")[2].partition("## ")[0], re.MULTILINE)
    listed = {label: set(re.findall(r"`(\w+)`", values)) for label, values in rows}
    declared: dict[str, set[str]] = {}
    for metric in METRICS.values():
        if metric.kind is not Kind.INFO:
            for label, values in metric.labels.items():
                declared.setdefault(label, set()).update(values)
    assert listed.pop("reason") == set()  # docs/decision-record.md lists them, which tests/test_docs.py holds
    del declared["reason"]
    assert listed == declared


def test_alerts_are_about_metrics_and_label_values_that_there_are() -> None:
    rules = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])["groups"][0]["rules"]
    assert 5 <= len(rules) <= 9
    for rule in rules:
        named = re.findall(r"\b((?:outgate|process)_\w+)(?:{([^}]*)})?", rule["expr"])
        assert named, rule
        for name, selectors in named:
            metric = METRICS[re.sub("_(bucket|count|sum)$", "", name)]
            for label, values in re.findall(r'(\w+)(?:!=|=~?)"([^"]*)"', selectors):
                assert set(values.split("|")) <= set(metric.labels[label]), rule


def test_every_metric_is_counted_somewhere_and_no_other_is() -> None:
    elsewhere = ROOT / "proxy" / "relays" / "ntp"  # a process of its own, with a page of its own
    sources = [path for path in (ROOT / "proxy").rglob("*.py") if elsewhere not in path.parents]
    named = {name for path in sources for name in re.findall(r'"((?:outgate|process)_[a-z_]+)["|]', path.read_text())}
    assert named == METRICS.keys()
