"""A name that one worker told counts at every other: opaque TCP by name behind a gateway with three workers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy.dns_gate import PUBLIC, addresses, question, told

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    pytest.mark.skipif(any(shutil.which(program) is None for program in ("ip", "nft")), reason="a program is missing"),
]

WORK, GATE, OUT, SITE = "10.79.1.2", "10.79.1.1", "10.79.2.1", "10.79.2.2"
DNS_PORT = 15053
TRIES = 24  # each from a port of its own: the kernel spreads them over the workers
POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [{WORK}/32]}}
    rules: [{{tcp: "git.example:22"}}]
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Namespaces]:
    """A workload, a gateway with the rules of `outgate firewall`, and a site where somebody answers on port 22."""
    with machines("work", "gateway", "site") as net:
        net.link("gateway", "in", "work", "eth0")
        net.link("gateway", "out", "site", "wire")
        net.address("gateway", "in", f"{GATE}/24")
        net.address("gateway", "out", f"{OUT}/24")
        net.address("work", "eth0", f"{WORK}/24")
        net.address("site", "wire", f"{SITE}/24")
        net.address("site", "lo", f"{PUBLIC}/32")
        net.default("work", GATE)
        net.default("gateway", SITE)
        net.forward("gateway")
        devices = ["--workload-device", "in", "--upstream-device", "out", "--dns-port", str(DNS_PORT)]
        net.run("gateway", [str(OUTGATE), "firewall", "apply", "--mode", "gateway", *devices])
        with greeting(net):
            yield net


@contextmanager
def greeting(net: Namespaces) -> Iterator[None]:
    """A server of the site that speaks first, as SSH does."""
    with net.open_socket("site", socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((PUBLIC, 22))
        listener.listen(TRIES)

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:  # shut down: the test is over
                    return
                with sock:
                    sock.sendall(b"SSH-2.0-test\r\n")

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            serving.join(WAIT_S)


@contextmanager
def gateway(net: Namespaces, directory: Path) -> Iterator[Placed]:
    (directory / "policy.yaml").write_text(POLICY)
    command = [
        str(OUTGATE), "serve", "--dns-listen", f"[::]:{DNS_PORT}", "--admin", "none", "--nameserver", "127.0.0.1:9",
        "-p", "policy.yaml", "--log", "decisions.jsonl", "--workers", "3", "--host", f"git.example={PUBLIC}",
    ]  # fmt: skip
    with Placed(directory, net.inside("gateway", command)) as placed:
        yield placed


def look_up(net: Namespaces) -> None:
    with net.open_socket("work", socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT_S)
        sock.connect((GATE, 53))
        sock.send(question("git.example"))
        assert told(sock.recv(512)).addresses == addresses(PUBLIC)


def greeted(net: Namespaces) -> bool:
    """Whether a connection to the address is carried."""
    with net.open_socket("work", socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(WAIT_S)
        try:
            sock.connect((PUBLIC, 22))
            return sock.recv(64).startswith(b"SSH")
        except ConnectionResetError:
            return False


def test_what_one_worker_told_a_workload_counts_at_all_of_them(network: Namespaces, tmp_path: Path) -> None:
    with gateway(network, tmp_path) as placed:
        assert not greeted(network)  # nobody was told anything yet
        look_up(network)
        assert [greeted(network) for _ in range(TRIES)] == [True] * TRIES
        denied = eventually(lambda: placed.records(stage="tcp", verdict="deny"), "the record of the denial")
        assert [record["reason"] for record in denied] == ["no_rule"]


def test_workers_that_take_the_place_of_others_know_what_those_told(network: Namespaces, tmp_path: Path) -> None:
    with gateway(network, tmp_path) as placed:
        look_up(network)
        before = workers(placed)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(found := workers(placed)) == 3 and not set(found) & set(before), "three new workers")
        assert [greeted(network) for _ in range(TRIES)] == [True] * TRIES


def workers(placed: Placed) -> list[int]:
    return placed.workers()
