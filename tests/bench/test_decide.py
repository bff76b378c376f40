"""What a verdict costs, with ten rules and with a hundred thousand, and what it costs to build them.

Run with `pytest tests/bench --benchmark-only -s`. The naive scan is what a reader would write first.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from timeit import timeit

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from policies.engine import decide
from policies.hostnames import Hostname, Pattern
from policies.index import Policy, build
from policies.model import Attempt, Entry, HostRule, Place, Reason, Rule, Stage, Tls, Workload
from policies.paths import parse_path_pattern

FEW, MANY = 10, 100_000
ZONES = 997
NOW = 1_800_000_000.0


def host_rules(count: int) -> tuple[HostRule, ...]:
    """Distinct patterns in many zones; every tenth is a wildcard."""
    return tuple(
        HostRule(
            place=Place("p.yaml", line),
            label=f"app/rules[{line}]",
            pattern=Pattern(Hostname(f"h{line}.zone{line % ZONES}.example"), wildcard=line % 10 == 0),
        )
        for line in range(count)
    )


def policy(rules: tuple[HostRule, ...]) -> Policy:
    return build({"app": Workload("app", Place("p.yaml", 1), rules)})


@pytest.fixture(scope="module", params=[FEW, MANY])
def sized(request: pytest.FixtureRequest) -> Policy:
    return policy(host_rules(request.param))


def attempt(stage: Stage, host: str, **more: str) -> Attempt:
    return Attempt(stage, "app", Hostname(host), 443, time=NOW, **more)  # type: ignore[arg-type]  # all of them texts


def last_host(of: Policy) -> str:
    line = len(of.workloads["app"].rules) - 1
    return f"h{line}.zone{line % ZONES}.example"


def test_tls(benchmark: BenchmarkFixture, sized: Policy) -> None:
    assert benchmark(decide, sized, attempt(Stage.TLS, last_host(sized))).reason is Reason.RULE


def test_tls_below_a_wildcard(benchmark: BenchmarkFixture, sized: Policy) -> None:
    assert benchmark(decide, sized, attempt(Stage.TLS, "a.b.h0.zone0.example")).reason is Reason.RULE


def test_dns_denial(benchmark: BenchmarkFixture, sized: Policy) -> None:
    assert benchmark(decide, sized, attempt(Stage.DNS, "c2VjcmV0.x.attacker.test")).reason is Reason.NO_RULE


def test_http_with_ten_allow_entries(benchmark: BenchmarkFixture) -> None:
    allow = tuple(
        Entry(frozenset({"GET"}), parse_path_pattern(f"/api/v{i}/items/**"), f"GET /api/v{i}/items/**")
        for i in range(10)
    )
    rule = HostRule(
        place=Place("p.yaml", 1),
        label="app/rules[0]",
        pattern=Pattern(Hostname("a.example"), wildcard=False),
        tls=Tls.INSPECT,
        allow=allow,
    )
    request = attempt(Stage.HTTP, "a.example", method="GET", target="/api/v9/items/17?fields=name")
    assert benchmark(decide, policy((rule,)), request).reason is Reason.RULE


def scan(rules: tuple[HostRule, ...], name: Hostname) -> Rule | None:
    """The most specific rule for a name, looked for among all of them."""
    found = [rule for rule in rules if rule.pattern.matches(name)]
    return max(found, key=lambda rule: (not rule.pattern.wildcard, len(rule.pattern.host)), default=None)


@pytest.mark.benchmark(group="against a scan")
def test_index_against_a_scan(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    rules = host_rules(MANY)
    of = policy(rules)
    tried = attempt(Stage.TLS, last_host(of))
    assert tried.host is not None
    assert decide(of, tried).rule is scan(rules, tried.host)
    benchmark(decide, of, tried)
    indexed_s = timeit(lambda: decide(of, tried), number=2000) / 2000
    scanned_s = timeit(lambda: scan(rules, tried.host), number=3) / 3  # type: ignore[arg-type]  # asserted above
    with capsys.disabled():
        print(f"\ndecide {indexed_s * 1e6:.1f} µs, scan {scanned_s * 1e6:.0f} µs: {scanned_s / indexed_s:.0f} times")


BUILD = """
import gc, sys, time
from tests.bench.test_decide import host_rules, policy

def resident_mb():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 1e6

before = resident_mb()
rules = host_rules(int(sys.argv[1]))
made = resident_mb()
started = time.perf_counter()
of = policy(rules)
print(f"build {time.perf_counter() - started:.2f} s, index {resident_mb() - made:.0f} MB, rules {made - before:.0f} MB")
"""


def test_build_of_a_hundred_thousand_rules(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured in a process of its own, so that nothing else is in its memory."""

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", BUILD, str(MANY)],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
        )
        return done.stdout.strip()

    said = benchmark.pedantic(run, rounds=1)  # type: ignore[no-untyped-call]  # the plugin types no more than a call
    with capsys.disabled():
        print(f"\n{said}")
