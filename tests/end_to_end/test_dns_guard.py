"""`outgate serve` with `dnsListen`: real workers, real sockets, `dig`, and name servers that keep what is asked."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from proxy.service.doors import has_ipv6
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy.dns_gate import PUBLIC, PUBLIC6, Told, addresses, question, told
from tests.proxy.nameserver import Nameserver, serving, zone

NXDOMAIN = 3
POLICY = """
version: 1
workloads:
  app:
    match: {address: [127.0.0.1/32, "::1/128"]}
    rules:
      - host: api.example
      - host: "*.cdn.example"
      - dns: "*.cluster.local"
  other:
    match: {address: [127.0.0.2/32]}
    rules: [{host: other.example}]
"""
OUTSIDE = {"api.example": [PUBLIC, PUBLIC6], "other.example": [PUBLIC], "evil.example": [PUBLIC]}
INSIDE = {"web.default.svc.cluster.local": ["10.96.3.4"]}


class Servers:
    """Name servers on a loop in a thread of their own: the site's, and that of the cluster."""

    def __init__(self) -> None:
        self.outside: Nameserver
        self.inside: Nameserver
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    async def _serve(self) -> None:
        async with serving(zone(OUTSIDE)) as self.outside, serving(zone(INSIDE)) as self.inside:
            self._ready.set()
            await self._over.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(WAIT_S)
        self._loop.close()


@contextmanager
def servers() -> Iterator[Servers]:
    made = Servers()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def gate(directory: Path, names: Servers, *options: str, host: str = "127.0.0.1") -> Iterator[Placed]:
    """A gateway with two workers that answers DNS; its port is `port`."""
    (directory / "policy.yaml").write_text(POLICY)
    command = [
        str(OUTGATE), "serve", "--listen", "127.0.0.1:0", "--dns-listen", f"{host}:0", "--admin", "127.0.0.1:0",
        "-p", "policy.yaml", "--log", "decisions.jsonl", "--workers", "2", "--dns-search", "svc.cluster.local",
        "--nameserver", f"127.0.0.1:{names.outside.address[1]}",
        "--dns-forward", f"cluster.local=127.0.0.1:{names.inside.address[1]}", *options,
    ]  # fmt: skip
    with Placed(directory, command) as placed:
        placed.address = ("127.0.0.1", int(placed.hears(r"serving DNS on .*:(\d+)")[1]))
        placed.admin = ("127.0.0.1", int(placed.hears(r"answering .* on .*:(\d+)")[1]))
        yield placed


def over_udp(gate: Placed, message: bytes, client: str = "127.0.0.1", at: str = "127.0.0.1") -> bytes:
    with socket.socket(socket.AF_INET6 if ":" in at else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT_S)
        sock.bind((client, 0))
        sock.connect((at, gate.address[1]))
        sock.send(message)
        return sock.recv(4096)


def over_tcp(gate: Placed, message: bytes) -> bytes:
    with socket.create_connection(gate.address, WAIT_S) as sock, sock.makefile("rb") as stream:
        sock.sendall(len(message).to_bytes(2) + message)
        return stream.read(int.from_bytes(stream.read(2)))


def test_each_source_is_answered_as_its_own_workload(tmp_path: Path) -> None:
    with servers() as names, gate(tmp_path, names) as placed:
        for _ in range(8):  # a port of its own each time: the kernel spreads them over the workers
            assert told(over_udp(placed, question("api.example"))).addresses == addresses(PUBLIC)
            assert told(over_udp(placed, question("api.example"), "127.0.0.2")).rcode == NXDOMAIN
            assert told(over_tcp(placed, question("evil.example"))).rcode == NXDOMAIN
        assert told(over_udp(placed, question("other.example"), "127.0.0.2")).addresses == addresses(PUBLIC)
        assert told(over_udp(placed, question("api.example"), "127.0.0.9")) == Told(NXDOMAIN, ttl_s=5, error=18)
        assert {name for name, _ in names.outside.asked} == {"api.example", "other.example"}
        record = eventually(lambda: placed.records(reason="unknown_workload"), "a record of the unknown source")[0]
        assert (record["workload"], record["stage"], record["server.name"]) == ("unknown", "dns", "api.example")
        assert record["source.address"] == "127.0.0.9"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_one_door_takes_both_families(tmp_path: Path) -> None:
    with servers() as names, gate(tmp_path, names, host="[::]") as placed:
        assert told(over_udp(placed, question("api.example"))).addresses == addresses(PUBLIC)
        assert told(over_udp(placed, question("api.example"), "::1", "::1")).addresses == addresses(PUBLIC)
        assert told(over_udp(placed, question("other.example"), "127.0.0.2")).addresses == addresses(PUBLIC)
        records = eventually(lambda: found if len(found := placed.records(stage="dns")) == 3 else None, "the records")
        assert sorted(record["source.address"] for record in records) == ["127.0.0.1", "127.0.0.2", "::1"]


def test_cluster_names_go_to_the_clusters_server_and_no_others(tmp_path: Path) -> None:
    with servers() as names, gate(tmp_path, names) as placed:
        answer = told(over_udp(placed, question("web.default.svc.cluster.local")))
        assert answer.addresses == addresses("10.96.3.4")  # only looked up by a `dns:` rule: never dialled
        assert told(over_udp(placed, question("web.default.svc.cluster.local"), "127.0.0.2")).rcode == NXDOMAIN
        assert names.outside.asked == []
        assert {name for name, _ in names.inside.asked} == {"web.default.svc.cluster.local"}


def test_what_is_asked_is_counted(tmp_path: Path) -> None:
    with servers() as names, gate(tmp_path, names) as placed:
        over_udp(placed, question("evil.example"))
        over_udp(placed, question("other.example.svc.cluster.local"), "127.0.0.2")  # a search domain behind it
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"no question", placed.address)
        for series in (
            'outgate_decisions_total{reason="no_rule",stage="dns",verdict="deny"}',
            "outgate_dns_search_noise_total",
            "outgate_dns_malformed_total",
        ):
            eventually(lambda series=series: placed.metric(series) == 1, series)  # type: ignore[misc]  # bound at once


@pytest.mark.client
@pytest.mark.skipif(shutil.which("dig") is None, reason="dig is not installed")
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_dig_reads_every_answer(tmp_path: Path, transport: str) -> None:
    with servers() as names, gate(tmp_path, names) as placed:

        def dig(*words: str) -> str:
            line = ["dig", "@127.0.0.1", "-p", str(placed.address[1]), transport, "+tries=1", *words]
            return subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout

        assert PUBLIC in dig("API.example", "A")
        assert PUBLIC6 in dig("api.example", "AAAA")
        denied = dig("evil.example")
        assert "status: NXDOMAIN" in denied
        assert "(Blocked): (no_rule, decision " in denied
        assert "status: NOERROR" in dig("api.example", "TXT")


# --- port 53, led to the gate

WORK4, WORK6, GATE4, GATE6 = "10.78.1.2", "fd78:1::2", "10.78.1.1", "fd78:1::1"
OUT4, OUT6, SITE4, SITE6 = "10.78.2.1", "fd78:2::1", "10.78.2.2", "fd78:2::2"
RESOLVER4, RESOLVER6 = "203.0.113.53", "2001:db8:53::53"  # which the workload believes in; it is there, and listens
DNS_PORT = 15053


@pytest.fixture(scope="module")
def network() -> Iterator[Namespaces]:
    """A workload, a gateway with the rules of `outgate firewall`, and an outside with a resolver."""
    with machines("work", "gateway", "site") as net:
        net.link("gateway", "in", "work", "eth0")
        net.link("gateway", "out", "site", "wire")
        net.address("gateway", "in", f"{GATE4}/24", f"{GATE6}/64")
        net.address("gateway", "out", f"{OUT4}/24", f"{OUT6}/64")
        net.address("work", "eth0", f"{WORK4}/24", f"{WORK6}/64")
        net.address("site", "wire", f"{SITE4}/24", f"{SITE6}/64")
        net.address("site", "lo", f"{RESOLVER4}/32", f"{RESOLVER6}/128")
        net.default("work", GATE4, GATE6)
        net.default("gateway", SITE4, SITE6)
        net.default("site", OUT4, OUT6)
        net.forward("gateway")
        yield net


@contextmanager
def led(net: Namespaces, directory: Path) -> Iterator[Placed]:
    """A gate on the gateway with port 53 led to it."""
    (directory / "policy.yaml").write_text(
        POLICY.replace("127.0.0.1/32", f"{WORK4}/32").replace("::1/128", f"{WORK6}/128")
    )
    devices = ["--mode", "gateway", "--workload-device", "in", "--upstream-device", "out"]
    net.run("gateway", [str(OUTGATE), "firewall", "apply", *devices, "--dns-port", str(DNS_PORT)])
    command = [
        str(OUTGATE), "serve", "--dns-listen", f"[::]:{DNS_PORT}", "--admin", "none", "--nameserver", "127.0.0.1:9",
        "-p", "policy.yaml", "--log", "decisions.jsonl", "--host", f"api.example={PUBLIC}", "--host",
        f"api.example={PUBLIC6}", "--dns-search", "svc.cluster.local",
    ]  # fmt: skip
    with Placed(directory, net.inside("gateway", command)) as placed:
        yield placed


@pytest.mark.kernel
@pytest.mark.client
@pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root")
@pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("dig", "nft", "ip")), reason="a program is missing"
)
def test_whatever_resolver_is_asked_the_gate_answers(network: Namespaces, tmp_path: Path) -> None:
    """dig takes an answer from nobody but the address that it asked."""
    with ExitStack() as stack:
        listening = []
        for family, address in ((socket.AF_INET, RESOLVER4), (socket.AF_INET6, RESOLVER6)):
            sock = stack.enter_context(network.open_socket("site", family, socket.SOCK_DGRAM))
            sock.bind((address, 53))
            sock.settimeout(WAIT_S)
            listening.append(sock)

        def dig(resolver: str, *words: str) -> str:
            line = ["dig", f"@{resolver}", "+tries=1", "+timeout=10", *words]
            return subprocess.run(
                network.inside("work", line), capture_output=True, text=True, timeout=60, check=False
            ).stdout

        for sock, resolver in zip(listening, (RESOLVER4, RESOLVER6), strict=True):  # without rules it is reached
            assert "timed out" in dig(resolver, "+timeout=1", "open.example")
            assert b"open" in sock.recv(512)
            sock.setblocking(False)
        placed = stack.enter_context(led(network, tmp_path))
        for resolver in (RESOLVER4, RESOLVER6, GATE4):
            for transport in ("+notcp", "+tcp"):
                assert dig(resolver, transport, "+short", "api.example").split() == [PUBLIC]
                assert dig(resolver, transport, "+short", "api.example", "AAAA").split() == [PUBLIC6]
                assert "status: NXDOMAIN" in dig(resolver, transport, "c2VjcmV0.evil.example")
        for sock in listening:
            with pytest.raises(BlockingIOError):
                sock.recv(512)
        sources = {record["source.address"] for record in placed.records(workload="app")}
        assert sources == {WORK4, WORK6}


# --- the gate's own port


def test_no_rule_leads_a_connection_to_the_gates_own_dns_door(tmp_path: Path) -> None:
    """Else a name of the operator's, or a wide rule, would make the gate ask itself, as another source."""
    policy = "version: 1\nworkloads:\n  app:\n    rules: [{tcp: 'door.example:1-65535'}]"
    (tmp_path / "policy.yaml").write_text(policy)
    command = [
        str(OUTGATE), "serve", "--listen", "127.0.0.1:0", "--proxy-listen", "127.0.0.1:0", "--dns-listen", "0.0.0.0:0",
        "--admin", "none", "-w", "app", "-p", "policy.yaml", "--log", "decisions.jsonl", "--host",
        "door.example=127.0.0.1",
    ]  # fmt: skip
    with Placed(tmp_path, command) as placed:
        placed.address = ("127.0.0.1", int(placed.hears(r"serving proxy clients on .*:(\d+)")[1]))
        port = int(placed.hears(r"serving DNS on .*:(\d+)")[1])
        with placed.tunnel(f"door.example:{port}") as sock:
            message = question("evil.example")
            sock.sendall(len(message).to_bytes(2) + message)
            with suppress(ConnectionResetError):
                assert sock.recv(512) == b""
        record = eventually(lambda: placed.records(verdict="deny"), "its record")[0]
        assert record["reason"] == "never_reached"


@pytest.mark.parametrize("option", ["--nameserver", "--dns-forward"])
def test_a_gate_that_would_ask_itself_does_not_start(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "policy.yaml").write_text(POLICY)
    server = f"127.0.0.2:{port}" if option == "--nameserver" else f"corp.example=127.0.0.2:{port}"
    command = [
        str(OUTGATE), "serve", "--listen", "127.0.0.1:0", "--dns-listen", f"0.0.0.0:{port}", "--admin", "none",
        "-p", "policy.yaml", option, server,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert f"name server 127.0.0.2:{port} is --dns-listen of this gate itself" in done.stderr
