"""A gate that opens ways past itself for two workloads, and what they ask and try. What must come of it, tests say."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path

from proxy.elements import Element
from proxy.nft import read_openings
from tests.end_to_end.firewalled import (
    NEAR4,
    NEAR6,
    ORIGIN4,
    ORIGIN6,
    WORK4,
    WORK6,
    Lab,
    family_of,
    far_side,
)
from tests.end_to_end.namespaces import machines
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy.dns_gate import Told, question, told

SECOND4, SECOND6 = "10.77.1.3", "fd77:1::3"
DNS_PORT = 15053
RULES = ["--mode", "gateway", "--workload-device", "br0", "--upstream-device", "out", "--dns-port", str(DNS_PORT)]
A, AAAA = 1, 28
POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [{WORK4}/32, "{WORK6}/128"]}}
    rules:
      - tcp: {{host: git.example, ports: [22, 2222]}}
      - udp: {{host: git.example, ports: [9000]}}
      - tcp: {{host: inside.example, ports: [22]}}
      - tcp: {{host: meta.example, ports: [80], private: true}}
  other:
    match: {{address: [{SECOND4}/32, "{SECOND6}/128"]}}
    rules: [{{dns: git.example}}]
"""
HOSTS = {
    "git.example": [ORIGIN4, f"[{ORIGIN6}]"],
    "inside.example": ["10.77.2.2"],
    "meta.example": ["169.254.169.254"],
}


class Opened(Lab):
    """`one` and `two` behind br0 of `gateway`, and an origin."""

    directory: Path

    def gate(self, *options: str, workers: int = 1) -> Placed:
        """With openings, and a log of its own. Enter it."""
        (self.directory / "decisions.jsonl").unlink(missing_ok=True)
        named = [word for name, found in HOSTS.items() for one in found for word in ("--host", f"{name}={one}")]
        command = [
            str(OUTGATE), "serve", "--openings", "true", "--dns-listen", f"[::]:{DNS_PORT}", "-p", "policy.yaml",
            "--log", "decisions.jsonl", "--nameserver", "127.0.0.1:9", "--workers", str(workers), *named, *options,
        ]  # fmt: skip
        return Placed(self.directory, self.net.inside("gateway", command))

    def policy(self, text: str) -> None:
        """Put it where the gate reads it: whole, or not at all."""
        beside = self.directory / "policy.new"
        beside.write_text(text)
        os.rename(beside, self.directory / "policy.yaml")

    def ask(self, name: str, machine: str = "one", kind: int = A, to: str = NEAR4) -> Told:
        """What a lookup gives that machine."""
        with self.net.open_socket(machine, family_of(to), socket.SOCK_DGRAM) as sock:
            sock.settimeout(WAIT_S)
            sock.connect((to, 53))
            sock.send(question(name, kind))
            return told(sock.recv(4096))

    def opened(self) -> set[tuple[str, str, str, int]]:
        """What the kernel has open."""
        nft = self.nft("gateway")
        try:
            return {row_of(one.element) for one in read_openings(nft)}
        finally:
            nft.close()

    def readiness(self, gate: Placed) -> tuple[int, list[str]]:
        """As the admin port has it, which only the gateway reaches."""
        gate.admin = ("127.0.0.1", 9901)
        status, because, _ = self.net.made_there("gateway", gate.ready)
        return status, because

    def ready(self, gate: Placed) -> None:
        eventually(lambda: self.readiness(gate)[0] == 200, "it is ready")

    def metric(self, gate: Placed, series: str) -> float:
        gate.admin = ("127.0.0.1", 9901)
        return self.net.made_there("gateway", lambda: gate.metric(series))

    def conntrack(self, *words: str) -> Sequence[str]:
        """What the program `conntrack` prints there."""
        line = self.net.inside("gateway", ["conntrack", *words])
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()


def row_of(one: Element) -> tuple[str, str, str, int]:
    return str(one.source), str(one.address), one.protocol, one.port


def element(source: str, address: str, protocol: str, port: int) -> tuple[str, str, str, int]:
    return str(ip_address(source)), str(ip_address(address)), protocol, port


@contextmanager
def two_workloads() -> Iterator[Opened]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-openings-")))
        net = stack.enter_context(machines("one", "two", "gateway", "origin"))
        net.ip("gateway", "link", "add", "br0", "type", "bridge")
        net.ip("gateway", "link", "set", "br0", "up")
        net.address("gateway", "br0", f"{NEAR4}/24", f"{NEAR6}/64")
        for machine, four, six in (("one", WORK4, WORK6), ("two", SECOND4, SECOND6)):
            net.link("gateway", machine, machine, "eth0")
            net.ip("gateway", "link", "set", machine, "master", "br0")
            net.address(machine, "eth0", f"{four}/24", f"{six}/64")
            net.default(machine, NEAR4, NEAR6)
        net.link("gateway", "out", "origin", "wire")
        far_side(net, "gateway", "out")
        lab = Opened(net, "gateway", directory, stack)
        lab.directory = directory
        lab.policy(POLICY)
        yield lab
