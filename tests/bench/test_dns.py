"""What a worker answers from memory beside unbound with one thread, asked by dnsperf in turn over loopback.

unbound judges nobody and records nothing; each answer of ours has its decision record in a file.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.end_to_end.placed import Placed
from tests.end_to_end.service import eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy.dns_gate import question
from tests.proxy.nameserver import unused_port

pytestmark = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("dnsperf", "unbound")), reason="dnsperf or unbound is missing"
)

NAMES = [f"n{number}.example" for number in range(8)]
ADDRESS = "192.0.2.7"
SECONDS, CLIENTS, AT_ONCE = 3, 4, 50
GOAL_PER_S, GOAL_P50_MS = 15_000, 0.2


@contextmanager
def outgate(directory: Path) -> Iterator[int]:
    rules = ", ".join(f"{{dns: {name}}}" for name in NAMES)
    match = "match: {address: [127.0.0.1/32]}"
    (directory / "policy.yaml").write_text(f"version: 1\nworkloads: {{app: {{{match}, rules: [{rules}]}}}}")
    command = [
        str(OUTGATE), "serve", "--listen", "127.0.0.1:0", "--dns-listen", "127.0.0.1:0", "--admin", "none",
        "-p", "policy.yaml", "--log", "decisions.jsonl", "--dns-per-source", "1000000", "--nameserver", "127.0.0.1:9",
        *(word for name in NAMES for word in ("--host", f"{name}={ADDRESS}")),
    ]  # fmt: skip
    with Placed(directory, command) as placed:
        yield int(placed.hears(r"serving DNS on .*:(\d+)")[1])


@contextmanager
def unbound(directory: Path) -> Iterator[int]:
    port = unused_port()
    data = "".join(f'  local-data: "{name}. A {ADDRESS}"\n' for name in NAMES)
    (directory / "unbound.conf").write_text(
        f'server:\n  interface: 127.0.0.1\n  port: {port}\n  do-daemonize: no\n  username: ""\n  chroot: ""\n'
        f'  directory: "{directory}"\n  pidfile: ""\n  use-syslog: no\n  num-threads: 1\n{data}'
        "remote-control:\n  control-enable: no\n"
    )
    with subprocess.Popen(
        ["unbound", "-c", str(directory / "unbound.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            eventually(lambda: answers(port), "unbound answers")
            yield port
        finally:
            process.kill()


def answers(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        sock.connect(("127.0.0.1", port))
        try:
            sock.send(question(NAMES[0]))
            return bool(sock.recv(512))
        except OSError:  # not yet
            return False


def asked(directory: Path, port: int, at_once: int, clients: int = CLIENTS) -> tuple[float, float]:
    """Questions a second, and their mean latency in ms; none may be lost."""
    (directory / "questions").write_text("".join(f"{name} A\n" for name in NAMES))
    words = ["-s", "127.0.0.1", "-p", str(port), "-d", str(directory / "questions"), "-l", str(SECONDS)]
    line = ["dnsperf", *words, "-c", str(clients), "-q", str(at_once)]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert re.search(r"Queries lost:\s+0 ", said), said
    assert re.search(r"Response codes:\s+NOERROR \d+ \(100\.00%\)", said), said
    per_s = re.search(r"Queries per second:\s+([\d.]+)", said)
    latency = re.search(r"Average Latency \(s\):\s+([\d.]+)", said)
    assert per_s
    assert latency
    return float(per_s[1]), float(latency[1]) * 1000


def test_answers_from_memory(benchmark: BenchmarkFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, tuple[float, float]] = {}
    for name in ("outgate", "unbound"):
        (tmp_path / name).mkdir()
    with outgate(tmp_path / "outgate") as ours, unbound(tmp_path / "unbound") as theirs:

        def run() -> None:
            for name, port in (("unbound", theirs), ("outgate", ours)):
                per_s, _ = asked(tmp_path, port, AT_ONCE)
                _, alone_ms = asked(tmp_path, port, 2, 1)
                found[name] = per_s, alone_ms

        benchmark.pedantic(run)  # type: ignore[no-untyped-call]  # it has no types
    (per_s, alone_ms), (their_per_s, their_alone_ms) = found["outgate"], found["unbound"]
    benchmark.extra_info.update(per_s=per_s, alone_ms=alone_ms, ratio=per_s / their_per_s)
    with capsys.disabled():
        print(
            f"\nDNS from memory: {per_s:,.0f} answers/s, each recorded (goal {GOAL_PER_S:,}); {alone_ms:.3f} ms alone "
            f"(goal {GOAL_P50_MS}); unbound {their_per_s:,.0f}/s, {their_alone_ms:.3f} ms; "
            f"ratio {per_s / their_per_s:.2f}"
        )
