"""By how much the relay's answers are wrong beside those of the chronyd that it asks itself, and what an answer costs.

Both are asked in turn over loopback, by one client that reads the kernel's stamps; the truth is the machine's clock,
which that chronyd gives. Each source asks a few times, as the relay's limit wants it.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from proxy.wire.ntp import build_query, posix_ns
from tests.end_to_end.chrony import needs_chronyd, server
from tests.proxy.ntp_servers import told
from tests.proxy.relaying import RelayProcess

ROUNDS, PER_SOURCE = 2000, 16
GOAL_P50_US, GOAL_MAX_US = 20.0, 500.0
POLICY = "version: 1\nworkloads: {app: {rules: [{ntp: time.example}]}}\n"
SO_TIMESTAMPNS = 35
STAMP = struct.Struct("@ll")
NS = 10**9


def sources() -> Iterator[socket.socket]:
    """Clients at addresses of their own, each for so many queries as are answered at once."""
    for number in range(ROUNDS // PER_SOURCE):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            sock.settimeout(5)
            sock.bind((f"127.0.1.{number + 1}", 0))
            for _ in range(PER_SOURCE):
                yield sock


def exchange(sock: socket.socket, port: int) -> tuple[float, float]:
    """Offset and delay of one exchange, in µs."""
    message = build_query(int.from_bytes(os.urandom(8)))
    sent = time.time_ns()
    sock.sendto(message, ("127.0.0.1", port))
    answer, ancillary, _, _ = sock.recvmsg(64, 64)
    [(_, _, stamp)] = ancillary
    seconds, ns = STAMP.unpack(stamp)
    received = seconds * NS + ns
    got = told(answer)
    assert got.leap == 0
    there, back = posix_ns(got.receive) - sent, received - posix_ns(got.transmit)
    return (there - back) / 2000, (there + back) / 1000


def cpu_us(pid: int) -> float:
    ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK") * 1e6


@needs_chronyd
def test_offset_and_delay(benchmark: BenchmarkFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, list[tuple[float, float]]] = {"chronyd": [], "outgate": []}
    host = "time.example=127.0.0.1"
    with (
        server(tmp_path / "chrony") as port,
        RelayProcess(tmp_path, "-w", "app", "--host", f"{host}:{port}", policy=POLICY) as relay,
    ):
        relay.hears("outgate: synchronised, policy")
        before = cpu_us(relay.process.pid)

        def run() -> None:
            for sock in sources():
                found["chronyd"].append(exchange(sock, port))
                found["outgate"].append(exchange(sock, relay.port))

        benchmark.pedantic(run)  # type: ignore[no-untyped-call]  # it has no types
        cost_us = (cpu_us(relay.process.pid) - before) / len(found["outgate"])
    shown = {way: figures(samples) for way, samples in found.items()}
    ratio = shown["outgate"]["p50"] / max(shown["chronyd"]["p50"], 0.1)
    benchmark.extra_info |= {**shown, "ratio": ratio, "cpu_us": cost_us, "goals_us": (GOAL_P50_US, GOAL_MAX_US)}
    with capsys.disabled():
        for way, numbers in shown.items():
            print(f"\n{way:>8}: " + ", ".join(f"{name} {value:.1f}" for name, value in numbers.items()) + " µs", end="")
        print(f"\n   ratio: {ratio:.1f} of the median error; {cost_us:.0f} CPU-µs an answer")
    assert shown["outgate"]["p50"] <= GOAL_P50_US


def figures(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Of the error, whichever way; and the usual delay."""
    errors = sorted(abs(offset) for offset, _ in samples)
    delays = sorted(delay for _, delay in samples)
    return {
        "p50": errors[len(errors) // 2],
        "p95": errors[len(errors) * 95 // 100],
        "p99": errors[len(errors) * 99 // 100],
        "max": errors[-1],
        "mean": sum(offset for offset, _ in samples) / len(samples),
        "delay p50": delays[len(delays) // 2],
    }
