"""What leaves cost: to sign, to read into a context, to show for the first time; and ten thousand of them in memory.

CPU, of every process that has a part in it: clocks on the wall depend on who else is at work.
"""

from __future__ import annotations

import gc
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pki.authority import Authority, certificates_pem, create_authority, issue_leaf
from pki.leaves import Leaves, server_context
from tests.proxy.swapping import Serving, of_app

COUNT = 300
ROUNDS = 3
NAMES = 10_000
MAX_MEMORY = 100e6
WILDCARD = "{host: '*.new.test', tls: inspect}"
FILL = f"""
import os
from datetime import UTC, datetime
from pki.authority import create_authority
from pki.leaves import HTTP_1, HTTP_2, Leaves

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

leaves = Leaves(create_authority(datetime.now(UTC)).issuers, lambda: datetime.now(UTC))
leaves.context("first.example")
before = resident()
for number in range({NAMES}):
    leaves.context(f"host-number-{{number}}.some-zone.example", HTTP_2 if number % 2 else HTTP_1)
print(len(leaves), resident() - before)
"""


def now() -> datetime:
    return datetime.now(UTC)


def cost_ms(do: Callable[[int], object]) -> float:
    """CPU of one, the least of some rounds."""
    do(0)
    found = []
    for _ in range(ROUNDS):
        gc.collect()
        started = time.process_time()
        for number in range(COUNT):
            do(number)
        found.append((time.process_time() - started) / COUNT * 1000)
    return min(found)


def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A handshake in memory."""
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(inward, outward, server_hostname=host)
    far = server.wrap_bio(outward, inward, server_side=True)
    for step in (near.do_handshake, far.do_handshake, near.do_handshake, far.do_handshake):
        try:
            step()
        except ssl.SSLWantReadError:
            pass


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=certificates_pem(*authority.trusted).decode())


def shown(capsys: pytest.CaptureFixture[str], benchmark: BenchmarkFixture, found: dict[str, float], unit: str) -> None:
    benchmark.extra_info.update({name: round(value, 3) for name, value in found.items()})
    with capsys.disabled():
        print("\n" + "\n".join(f"{name}: {value:.3f}{unit}" for name, value in found.items()))


def test_what_a_leaf_costs(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    authority = create_authority(now())
    client, leaves = trusting(authority), Leaves(authority.issuers, now)
    leaf = issue_leaf(authority.issuer, "a.example", now())
    others = iter(range(1_000_000))
    found: dict[str, float] = {}

    def measure() -> None:
        found["sign a leaf"] = cost_ms(lambda number: issue_leaf(authority.issuer, f"h{number}.example", now()))
        found["read a leaf into a context"] = cost_ms(lambda _: server_context(leaf))
        found["a context for a new name"] = cost_ms(lambda _: leaves.context(f"n{next(others)}.example"))
        found["a context that is cached"] = cost_ms(lambda _: leaves.context("a.example"))
        found["a handshake, client and server"] = cost_ms(
            lambda _: shake(leaves.context("a.example"), client, "a.example")
        )

    benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]  # theirs
    shown(capsys, benchmark, found, " ms")


def test_the_first_handshake_for_a_name_beside_one_for_a_known_name(
    benchmark: BenchmarkFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a whole gate: it peeks, judges and hands over; the client is in this process, as the gate is."""
    found: dict[str, float] = {}
    with Serving(tmp_path, of_app(WILDCARD)) as it:
        client = ssl.create_default_context(cafile=str(it._roots))

        def connect(host: str) -> None:
            with it.dial() as sock, client.wrap_socket(sock, server_hostname=host):
                pass

        connect("first.new.test")
        pids = (os.getpid(), it.inspector)

        def each(hosts: Sequence[str]) -> list[float]:
            """CPU of this process and of the inspector for one handshake."""
            before = [cpu_ns(pid) for pid in pids]
            for host in hosts:
                connect(host)
            return [(cpu_ns(pid) - start) / len(hosts) / 1e6 for pid, start in zip(pids, before, strict=True)]

        def measure() -> None:
            best: dict[str, list[float]] = {}
            for turn in range(ROUNDS):
                hosts = [f"h{turn}-{number}.new.test" for number in range(COUNT)]
                for name in ("new", "known"):
                    best[name] = min(best.get(name, [9e9]), each(hosts), key=sum)
            for name, (rest, inspector) in best.items():
                found[f"{name}: client and gate, ms"], found[f"{name}: inspector, ms"] = rest, inspector
            found["ratio, all of it"] = sum(best["new"]) / sum(best["known"])

        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]  # theirs
    shown(capsys, benchmark, found, "")


def cpu_ns(pid: int) -> int:
    tasks = Path("/proc", str(pid), "task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def test_ten_thousand_names_in_memory(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, float] = {}

    def measure() -> None:
        done = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, check=True)
        count, grown = map(int, done.stdout.split())
        assert count == NAMES + 1
        found[f"{NAMES} names, MB"] = grown / 1e6

    benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]  # theirs
    shown(capsys, benchmark, found, "")
    assert found[f"{NAMES} names, MB"] * 1e6 <= MAX_MEMORY
