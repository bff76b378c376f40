"""iodine, client and server, through a gateway: how much of a tunnel gets out below a wildcard, and below none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.relays.dns_budget import NewNames
from proxy.wire.dns import MalformedQuery, parse_query
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import OUTGATE

SBIN = os.environ.get("PATH", "") + ":/usr/sbin"
IODINE, IODINED = (shutil.which(program, path=SBIN) for program in ("iodine", "iodined"))
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    pytest.mark.skipif(not (IODINE and IODINED), reason="iodine is not installed"),
    pytest.mark.skipif(not os.access("/dev/net/tun", os.W_OK), reason="there is no /dev/net/tun"),
    pytest.mark.skipif(any(shutil.which(program) is None for program in ("ip", "nft")), reason="a program is missing"),
]

WORK, GATE, OUT, SITE = "10.80.1.2", "10.80.1.1", "10.80.2.1", "10.80.2.2"
TUNNEL = "10.81.0.1"
DNS_PORT, HIDDEN_PORT = 15053, 5353
ZONE = "t.example"
MOST = {"A": NewNames().burst, "CNAME": 0, "NULL": 0, "TXT": 0, "SRV": 0}  # names that get out, by type of question


class Ear:
    """Port 53 of the site: keeps each name that is asked for, and has iodined answer."""

    def __init__(self, net: Namespaces) -> None:
        self.names: list[str] = []
        self._front = net.open_socket("site", socket.AF_INET, socket.SOCK_DGRAM)
        self._front.bind((SITE, 53))
        self._back = net.open_socket("site", socket.AF_INET, socket.SOCK_DGRAM)
        self._back.connect(("127.0.0.1", HIDDEN_PORT))
        self._asking: dict[bytes, tuple[str, int]] = {}  # by id of the question
        self._threads = [threading.Thread(target=self._forward), threading.Thread(target=self._bring_back)]
        for thread in self._threads:
            thread.start()

    def _forward(self) -> None:
        while True:
            question, asker = self._front.recvfrom(4096)
            if not question:  # to end it
                return
            try:
                self.names.append(parse_query(question).name)
            except MalformedQuery:
                self.names.append("?")
            self._asking[question[:2]] = asker
            self._back.send(question)

    def _bring_back(self) -> None:
        while True:
            try:
                answer = self._back.recv(65535)
            except ConnectionRefusedError:  # iodined is not there yet
                continue
            except OSError:  # shut down
                return
            if not answer:
                return
            if asker := self._asking.pop(answer[:2], None):
                self._front.sendto(answer, asker)

    def close(self) -> None:
        self._front.sendto(b"", self._front.getsockname())
        self._back.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
        self._front.close()
        self._back.close()


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Namespaces, Ear]]:
    """A workload, a gateway, and a site whose name server for t.example is iodined."""
    with machines("work", "gateway", "site") as net:
        net.link("gateway", "in", "work", "eth0")
        net.link("gateway", "out", "site", "wire")
        net.address("gateway", "in", f"{GATE}/24")
        net.address("gateway", "out", f"{OUT}/24")
        net.address("work", "eth0", f"{WORK}/24")
        net.address("site", "wire", f"{SITE}/24")
        net.default("work", GATE)
        net.default("gateway", SITE)
        net.default("site", OUT)
        net.forward("gateway")
        line = [str(IODINED), "-f", "-c", "-P", "secret", "-l", "127.0.0.1", "-p", str(HIDDEN_PORT), TUNNEL, ZONE]
        with subprocess.Popen(
            net.inside("site", line), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        ) as server:
            ear = Ear(net)
            try:
                yield net, ear
            finally:
                server.terminate()
                ear.close()


@contextmanager
def gateway(net: Namespaces, directory: Path, rule: str) -> Iterator[Placed]:
    (directory / "policy.yaml").write_text(
        f"version: 1\nworkloads:\n  app:\n    match: {{address: [{WORK}/32]}}\n    rules: [{{{rule}}}]\n"
    )
    devices = ["--workload-device", "in", "--upstream-device", "out", "--dns-port", str(DNS_PORT)]
    net.run("gateway", [str(OUTGATE), "firewall", "apply", "--mode", "gateway", *devices])
    command = [
        str(OUTGATE), "serve", "--dns-listen", f"[::]:{DNS_PORT}", "--admin", "none", "--nameserver", SITE,
        "-p", "policy.yaml", "--log", "decisions.jsonl",
    ]  # fmt: skip
    with Placed(directory, net.inside("gateway", command)) as placed:
        yield placed


def tunnel(net: Namespaces, resolver: str, *words: str, seconds: int = 6) -> str:
    """What iodine says that tries to get out by this resolver, for so long at most."""
    line = [str(IODINE), "-f", "-r", "-P", "secret", *words, resolver, ZONE]
    with subprocess.Popen(
        net.inside("work", line), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
    ) as process:
        try:
            return process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[1]


def test_iodine_is_connected_where_nobody_stands_between(network: tuple[Namespaces, Ear]) -> None:
    """Before the rules are there: so that the others fail for the right reason."""
    net, ear = network
    eventually(lambda: "Connection setup complete" in tunnel(net, SITE, "-T", "NULL"), "a tunnel")
    assert len(set(ear.names)) > 10


@pytest.mark.parametrize("qtype", MOST)
def test_a_tunnel_below_a_wildcard_is_never_connected_and_ends_with_the_budget(
    network: tuple[Namespaces, Ear], tmp_path: Path, qtype: str
) -> None:
    net, ear = network
    ear.names.clear()
    with gateway(net, tmp_path, f'dns: "*.{ZONE}"') as placed:
        said = tunnel(net, GATE, "-T", qtype)
        assert f"Using DNS type {qtype} queries" in said
        assert "Connection setup complete" not in said
        below = {name.removesuffix("." + ZONE) for name in ear.names}
        assert len(below) <= MOST[qtype]
        assert sum(map(len, below)) <= MOST[qtype] * NewNames().max_length
        eventually(lambda: placed.records(stage="dns"), "what it tried is recorded")


def test_without_a_wildcard_nothing_of_a_tunnel_gets_out(network: tuple[Namespaces, Ear], tmp_path: Path) -> None:
    net, ear = network
    ear.names.clear()
    with gateway(net, tmp_path, f"dns: www.{ZONE}") as placed:
        assert "Connection setup complete" not in tunnel(net, GATE)
        eventually(lambda: placed.records(stage="dns", verdict="deny"), "what it tried is recorded")
    assert ear.names == []
