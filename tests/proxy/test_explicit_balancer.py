"""Behind a balancer: the PROXY header says who the client is, from named balancers only, and from them always."""

from __future__ import annotations

import socket
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from proxy.limits import Limits
from tests.proxy.gates import at, eventually, origin, read_exactly
from tests.proxy.hellos import hello
from tests.proxy.proxying import BOB, authorization, connect, get, proxy
from tests.proxy.test_listener_limits import needs

BALANCER = "127.0.0.50"
CLIENT = ("192.0.2.7", 4321)  # of `bob`
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4321 3128\r\n"
V2 = (
    b"\r\n\r\n\x00\r\nQUIT\n\x21\x11"
    + struct.pack("!H", 12 + 6)
    + bytes([192, 0, 2, 7, 198, 51, 100, 1])
    + struct.pack("!HH", 4321, 3128)
    + b"\x04\x00\x03pad"
)
V6 = b"PROXY TCP6 2001:db8::7 2001:db8::1 4321 3128\r\n"
MAPPED = b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 4321 3128\r\n"
STRANGER = b"PROXY TCP4 203.0.113.9 198.51.100.1 4321 3128\r\n"


@pytest.mark.parametrize(
    ("header", "source"),
    [(V1, CLIENT), (V2, CLIENT), (V6, ("2001:db8::7", 4321)), (MAPPED, CLIENT)],
    ids=["version 1", "version 2", "IPv6", "IPv4 in IPv6"],
)
def test_client_is_who_the_header_says(header: bytes, source: tuple[str, int], tmp_path: Path) -> None:
    data = hello("b.example")
    with (
        origin() as upstream,
        proxy(tmp_path, balancers=[f"{BALANCER}/32"], names={"b.example": at(upstream.address)}) as it,
        it.client(BALANCER) as client,
    ):
        assert client.ask(header + connect("b.example:443")).status == 200
        client.send(data)
        assert read_exactly(client.sock, len(data)) == data
        client.sock.close()
        record = it.record()
        assert record["workload"] == "bob"
        assert (record["source.address"], record["source.port"]) == source


def test_header_that_comes_byte_by_byte_is_read(tmp_path: Path) -> None:
    with proxy(tmp_path, balancers=["127.0.0.0/8"]) as it:
        for header in (V1, V2):
            with it.client(BALANCER) as client:
                client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for byte in header + connect("x.example:443"):
                    client.send(bytes([byte]))
                assert client.answered().problem["workload"] == "bob"


def test_balancer_that_speaks_for_a_stranger_gets_what_the_stranger_gets(tmp_path: Path) -> None:
    with proxy(tmp_path, balancers=[f"{BOB}/32"]) as it:  # even where its own address is a workload's
        answered = it.ask(STRANGER + connect("b.example:443"), BOB)
        assert (answered.status, answered.problem["reason"]) == (403, "unknown_workload")
        assert it.record()["source.address"] == "203.0.113.9"


@pytest.mark.parametrize(
    "header",
    [b"PROXY UNKNOWN\r\n", b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"],
    ids=["version 1 UNKNOWN", "version 2 LOCAL"],
)
def test_connection_of_the_balancer_itself_is_its_own(header: bytes, tmp_path: Path) -> None:
    with proxy(tmp_path, balancers=[f"{BOB}/32"]) as it:
        assert it.ask(header + connect("a.example:443"), BOB).problem["workload"] == "bob"
        assert it.record()["source.address"] == BOB


@pytest.mark.parametrize(
    "sent",
    [
        connect("b.example:443"),
        get("http://b.example/"),
        hello("b.example"),
        b"PROXY TCP4 192.0.2.7\r\n" + connect("b.example:443"),
        V2[:12] + b"\x31" + V2[13:] + connect("b.example:443"),
        b"PROXY " + b"x" * 200,
    ],
    ids=["CONNECT", "absolute form", "TLS", "half a line", "version 3", "endless"],
)
def test_balancer_without_its_header_is_refused(sent: bytes, tmp_path: Path) -> None:
    with proxy(tmp_path, balancers=[f"{BOB}/32"]) as it:
        answered = it.ask(sent, BOB)
        assert (answered.status, answered.problem["reason"]) == (400, "malformed_request")
        assert "which this balancer must send" in answered.problem["detail"]
        assert it.record()["source.address"] == BOB


@pytest.mark.parametrize("header", [V1, V2], ids=["version 1", "version 2"])
def test_nobody_else_can_say_who_it_is(header: bytes, tmp_path: Path) -> None:
    with proxy(tmp_path, balancers=[f"{BALANCER}/32"]) as it:
        for source in (BOB, "127.0.0.51"):
            answered = it.ask(header + connect("b.example:443"), source)
            assert (answered.status, answered.problem["reason"]) == (400, "malformed_request")
        assert [record["source.address"] for record in it.gate.records] == [BOB, "127.0.0.51"]


def test_second_header_is_no_head(tmp_path: Path) -> None:
    """A client behind the balancer sends one of its own: the balancer's comes first and counts."""
    with proxy(tmp_path, balancers=[f"{BALANCER}/32"]) as it:
        assert it.ask(STRANGER + V1 + connect("b.example:443"), BALANCER).status == 400
        assert it.record()["source.address"] == "203.0.113.9"


def test_caps_count_the_client_and_not_the_balancer(tmp_path: Path) -> None:
    with proxy(tmp_path, balancers=[f"{BALANCER}/32"], limits=Limits(max_per_source=2)) as it, ExitStack() as stack:
        for number in range(4):
            client = stack.enter_context(it.client(BALANCER))
            client.send(f"PROXY TCP4 192.0.2.{number % 2} 198.51.100.1 1 2\r\nCONNECT ".encode())
            eventually(lambda: it.gate.listener.open_connections == number + 1)  # noqa: B023 - asked at once
        with it.client(BALANCER) as third_of_one:
            third_of_one.send(b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2\r\n")
            assert third_of_one.is_closed()
        assert (it.record()["reason"], it.record()["source.address"]) == ("too_many_connections", "192.0.2.1")
        assert it.ask(b"PROXY TCP4 192.0.2.3 198.51.100.1 1 2\r\n" + connect("x.example:443"), BALANCER).status == 403


def test_header_that_does_not_come_is_408(tmp_path: Path) -> None:
    with (
        proxy(tmp_path, balancers=[f"{BALANCER}/32"], limits=Limits(hello_s=0.3)) as it,
        it.client(BALANCER) as client,
    ):
        client.send(V2[:20])
        assert client.answered().status == 408
        assert it.record()["reason"] == "hello_timeout"


def test_credentials_count_behind_a_balancer_too(tmp_path: Path) -> None:
    with proxy(tmp_path, users={"ann": "secret"}, balancers=[f"{BALANCER}/32"]) as it, it.client(BALANCER) as client:
        assert client.ask(STRANGER + connect("x.example:443")).status == 407
        assert client.ask(connect("x.example:443", authorization("ann", "secret"))).problem["workload"] == "ann"
        assert {record["source.address"] for record in it.gate.records} == {"203.0.113.9"}


@pytest.mark.client
@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"])
def test_haproxy_passes_its_clients_on(version: str, tmp_path: Path) -> None:
    program = needs("haproxy")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with proxy(tmp_path, balancers=[f"{BALANCER}/32"]) as it:
        (tmp_path / "haproxy.cfg").write_text(
            f"""
global
    maxconn 16
defaults
    mode tcp
    timeout connect 10s
    timeout client 10s
    timeout server 10s
listen gate
    bind 127.0.0.1:{port}
    unique-id-format %ci
    server gate {it.address[0]}:{it.address[1]} source {BALANCER} {version}
"""
        )
        with subprocess.Popen([program, "-db", "-f", str(tmp_path / "haproxy.cfg")], cwd=tmp_path) as balancer:
            try:
                for source, status in ((BOB, 200), ("127.0.0.66", 403)):
                    assert _ask_through(port, source, connect("b.example:443")).startswith(
                        f"HTTP/1.1 {status} ".encode()
                    )
            finally:
                balancer.terminate()
        eventually(lambda: "unknown_workload" in it.reasons())
        assert {record["source.address"] for record in it.gate.records} <= {BOB, "127.0.0.66"}


def _ask_through(port: int, source: str, asked: bytes) -> bytes:
    sock: socket.socket | None = None

    def connects() -> bool:
        nonlocal sock
        try:
            sock = socket.create_connection(("127.0.0.1", port), 20, source_address=(source, 0))
        except ConnectionRefusedError:
            return False
        return True

    eventually(connects, "haproxy listens")
    assert sock is not None
    with sock:
        sock.sendall(asked)
        return sock.recv(4096)
