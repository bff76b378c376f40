"""`outgate serve` hears by dnstap what a real unbound answers to a real dig: a site that keeps its own name server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.firewalled import NEAR4, ORIGIN4, WORK4
from tests.end_to_end.opened import POLICY as OPENED_POLICY
from tests.end_to_end.opened import Opened, element, two_workloads
from tests.end_to_end.origin import BANNER
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.test_dns_unbound import answers, free_port
from tests.end_to_end.world import OUTGATE
from tests.proxy.kernel_rules import NEEDS_ROOT

UNBOUND = shutil.which("unbound", path=os.environ.get("PATH", "") + ":/usr/sbin")
pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(UNBOUND is None, reason="unbound is not installed"),
    pytest.mark.skipif(shutil.which("dig") is None, reason="dig is not installed"),
]

POLICY = """
version: 1
workloads:
  app:
    match: {address: [127.0.0.1/32]}
    rules:
      - tcp: git.example:22
"""
ZONE = f"""\
$ORIGIN example.
@ 300 IN SOA ns admin 1 3600 600 86400 30
@ 300 IN NS ns
ns 300 IN A 127.0.0.1
git 300 IN CNAME hub
hub 300 IN A {ORIGIN4}
evil 300 IN A {ORIGIN4}
"""


def configure(directory: Path, address: str, port: int) -> list[str]:
    """The command line of a server for `example.` that tells `tap.sock` what it answers."""
    (directory / "example.zone").write_text(ZONE)
    (directory / "unbound.conf").write_text(
        f"""
server:
    interface: {address}
    port: {port}
    access-control: 0.0.0.0/0 allow
    directory: "{directory}"
    chroot: ""
    username: ""
    pidfile: ""
    use-syslog: no
    logfile: "{directory}/unbound.log"
    do-daemonize: no
    module-config: "iterator"
remote-control:
    control-enable: no
auth-zone:
    name: example
    zonefile: "{directory}/example.zone"
    for-downstream: yes
    for-upstream: no
dnstap:
    dnstap-enable: yes
    dnstap-socket-path: "{directory}/tap.sock"
    dnstap-log-client-response-messages: yes
"""
    )
    assert UNBOUND
    return [UNBOUND, "-d", "-c", str(directory / "unbound.conf")]


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)


@contextmanager
def gate(directory: Path) -> Iterator[Placed]:
    (directory / "policy.yaml").write_text(POLICY)
    command = [
        str(OUTGATE), "serve", "--listen", "127.0.0.1:0", "--dnstap-listen", "tap.sock", "--admin", "127.0.0.1:0",
        "-p", "policy.yaml", "--log", "decisions.jsonl", "--nameserver", "127.0.0.1:9", "--workers", "2",
    ]  # fmt: skip
    with Placed(directory, command) as placed:
        placed.hears(r"serving dnstap on .*/tap\.sock")
        placed.admin = ("127.0.0.1", int(placed.hears(r"answering .* on .*:(\d+)")[1]))
        yield placed


def dig(port: int, *words: str) -> list[str]:
    return run(["dig", "@127.0.0.1", "-p", str(port), "+short", "+tries=1", "+timeout=15", *words])


def look_up(lab: Opened, name: str) -> str:
    """What a workload is told."""
    line = ["dig", f"@{NEAR4}", "+short", "+tries=1", "+timeout=15", name]
    return run(lab.net.inside("one", line))[-1]


def run(line: Sequence[str]) -> list[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def admitted(gate: Placed) -> float:
    return gate.metric('outgate_dnstap_answers_total{outcome="admitted"}')


def test_what_unbound_answers_is_judged_and_what_is_denied_recorded(tmp_path: Path) -> None:
    port = free_port()
    with gate(tmp_path) as placed, running(configure(tmp_path, "127.0.0.1", port)) as unbound:
        eventually(lambda: answers(port), "unbound answers")
        eventually(lambda: placed.metric("outgate_dnstap_senders") == 1, "unbound is connected")
        assert dig(port, "git.example") == ["hub.example.", ORIGIN4]
        assert dig(port, "git.example", "+tcp") == ["hub.example.", ORIGIN4]
        assert dig(port, "evil.example") == [ORIGIN4]
        eventually(lambda: admitted(placed) == 2, "both lookups are admitted")
        [record] = eventually(lambda: placed.records(), "the denied one is recorded")
        assert (record["verdict"], record["reason"], record["dns.observed"]) == ("deny", "no_rule", True)
        assert (record["server.name"], record["source.address"]) == ("evil.example", "127.0.0.1")
        assert (record["destination.address"], record["destination.port"]) == ("127.0.0.1", port)
        unbound.send_signal(signal.SIGTERM)  # it stops the stream and does not wait for FINISH
        unbound.wait(WAIT_S)
        eventually(lambda: placed.metric("outgate_dnstap_senders") == 0, "its stream is over")
        assert placed.metric('outgate_dnstap_streams_total{end="malformed"}') == 0


def test_unbound_tells_a_gate_that_was_started_after_it(tmp_path: Path) -> None:
    """It comes back by itself, and the socket of before is in nobody's way."""
    port = free_port()
    with running(configure(tmp_path, "127.0.0.1", port)):
        eventually(lambda: answers(port), "unbound answers")
        for _ in range(2):
            with gate(tmp_path) as placed:
                eventually(lambda placed=placed: placed.metric("outgate_dnstap_senders") == 1, "it is connected")  # type: ignore[misc]  # bound at once
                dig(port, "git.example")
                eventually(lambda placed=placed: admitted(placed) == 1, "its answer is heard")  # type: ignore[misc]


@pytest.fixture(scope="module")
def lab() -> Iterator[Opened]:
    with two_workloads() as made:
        yield made


@contextmanager
def observed(lab: Opened) -> Iterator[Placed]:
    """The site's name server on the gateway, which workloads may ask past the gate."""
    lab.policy(OPENED_POLICY)
    lab.apply(
        "gateway", "--mode", "gateway", "--workload-device", "br0", "--upstream-device", "out", "--resolver", NEAR4
    )
    command = [
        str(OUTGATE), "serve", "--openings", "true", "--dnstap-listen", "tap.sock", "-p", "policy.yaml",
        "--log", "decisions.jsonl", "--nameserver", "127.0.0.1:9", "--workers", "2",
    ]  # fmt: skip
    inside = lab.net.inside
    with (
        Placed(lab.directory, inside("gateway", command)) as placed,
        running(inside("gateway", configure(lab.directory, NEAR4, 53))),
    ):
        lab.ready(placed)
        eventually(lambda: lab.metric(placed, "outgate_dnstap_senders") == 1, "unbound is connected")
        lab.origin.look()
        yield placed


class TestPastTheGate:
    pytestmark = NEEDS_ROOT

    def test_who_connects_before_the_server_told_is_refused_and_later_passes_the_gate(self, lab: Opened) -> None:
        """It prints how long after the answer: the server keeps what it tells for a second."""
        with observed(lab) as placed:
            assert look_up(lab, "git.example") == ORIGIN4
            started = time.perf_counter()
            with pytest.raises(OSError, match="reset"), lab.connect("one", ORIGIN4, 22) as sock:  # at once
                sock.recv(100)
            assert lab.origin.look().packets == []
            wanted = {element(WORK4, ORIGIN4, *one) for one in (("tcp", 22), ("tcp", 2222), ("udp", 9000))}
            eventually(lambda: lab.opened() == wanted, "it is open")
            print(f"open {time.perf_counter() - started:.2f} s after the answer")
            with lab.connect("one", ORIGIN4, 22) as sock:
                assert sock.recv(100) == BANNER
            assert lab.origin.look().packets == [f"tcp {ORIGIN4}:22"]
            [record] = placed.records(stage="tcp")  # the later one passed the gate
            assert (record["verdict"], record["reason"]) == ("deny", "no_rule")

    def test_a_denied_name_opens_nothing(self, lab: Opened) -> None:
        with observed(lab) as placed:
            assert look_up(lab, "evil.example") == ORIGIN4
            [record] = eventually(lambda: placed.records(stage="dns"), "its record")
            assert (record["reason"], record["dns.observed"]) == ("no_rule", True)
            assert lab.opened() == set()
