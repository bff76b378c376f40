"""What a connection through the gate costs beside a direct one, measured in the same run."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.bench.load import processes
from tests.builders import rules
from tests.proxy.gates import at, eventually, gate
from tests.proxy.hellos import hello

CONNECTIONS = 400
IN_FLIGHT = 16
ROUNDS = 5
POLICY = rules("- host: a.example")


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", ["a.example", "b.example"], ids=["passthrough", "denial"])
def test_connection_through_the_gate(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = hello(name)
    with processes(len(data)) as (origin, load), gate(POLICY, {"a.example": at(origin)}) as it:

        def converse(address: tuple[str, int]) -> Callable[[], int]:
            return lambda: load(address, data, CONNECTIONS, IN_FLIGHT)

        direct_s = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            assert converse(origin)() == CONNECTIONS
            direct_s.append(time.perf_counter() - started)
        used = cpu_s()
        done = benchmark.pedantic(converse(it.address), rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]  # theirs
        assert benchmark.stats is not None
        assert done == (CONNECTIONS if name == "a.example" else 0)
        cpu_ms = (cpu_s() - used) * 1000 / (CONNECTIONS * (ROUNDS + 1))
        eventually(lambda: len(it.records) == CONNECTIONS * (ROUNDS + 1), "a record for each connection")
        ratio = min(direct_s) / benchmark.stats.stats.min
        benchmark.extra_info["ratio to direct"] = round(ratio, 3)
        benchmark.extra_info["gate CPU ms per connection"] = round(cpu_ms, 3)
        with capsys.disabled():
            print(f"\n{name}: {ratio:.2f} of the direct connections a second, {cpu_ms:.3f} ms of gate CPU each")
