"""How much CPU time and memory 100,000 rules take to load, each in a process of its own so that its peak is its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

RULES = 100_000
GOAL_S, GOAL_MIB = 6.0, 250

KINDS = {
    "host": ["      - {{host: h{i}.example.com}}"],
    "mixed": [
        "      - {{host: h{i}.example.com, tls: inspect, allow: ['GET /search/{i}/**', 'POST /v1/*'], name: rule {i}}}",
        "      - {{host: '*.w{i}.example.com', ports: [80, 443]}}",
        "      - {{tcp: '10.{high}.{low}.0/24:443'}}",
        "      - {{tcp: {{host: db{i}.example.net, ports: 5432}}, owner: team, until: 2027-01-31}}",
        "      - {{dns: '*.d{i}.example.org'}}",
    ],
}

LOADER = """
import sys, time
from pathlib import Path
from proxy.policy_files import read_policy
start = time.process_time()
policy = read_policy(sys.argv[1:])
took = time.process_time() - start
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak_kib = int(status["VmHWM"].split()[0])  # of this program; ru_maxrss counts the process that forked us too
print(len(policy.workloads["app"].rules), took, peak_kib / 1024)
"""


def write_policy(directory: Path, kind: str) -> Path:
    templates = KINDS[kind]
    rules = (
        templates[i % len(templates)].format(i=i, high=i // 5 // 256 % 256, low=i // 5 % 256) for i in range(RULES)
    )
    path = directory / "large.yaml"
    path.write_text("version: 1\nworkloads:\n  app:\n    rules:\n" + "\n".join(rules) + "\n")
    return path


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_hundred_thousand_rules_load(benchmark: BenchmarkFixture, tmp_path: Path, kind: str) -> None:
    path = write_policy(tmp_path, kind)

    def load() -> tuple[int, float, float]:
        finished = subprocess.run([sys.executable, "-c", LOADER, str(path)], capture_output=True, text=True, check=True)
        rules, took_s, peak_mib = finished.stdout.split()
        return int(rules), float(took_s), float(peak_mib)

    rules, took_s, peak_mib = benchmark.pedantic(load, rounds=3)  # type: ignore[no-untyped-call]  # it has no types
    benchmark.extra_info |= {"load_s": took_s, "goal_s": GOAL_S, "peak_mib": peak_mib, "goal_mib": GOAL_MIB}
    print(f"\n{kind}: {RULES} rules in {took_s:.2f} CPU-s (goal {GOAL_S}), peak {peak_mib:.0f} MiB (goal {GOAL_MIB})")

    assert rules == RULES
    assert peak_mib <= GOAL_MIB
