"""The front door under attack and under load: slow hellos, too many connections, no descriptors; and real clients."""

from __future__ import annotations

import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from proxy.limits import Limits
from proxy.wire.client_hello import Alert, render_alert
from tests.builders import rules
from tests.proxy.gates import Gate, assert_refused, at, eventually, gate, origin, read_all, read_exactly
from tests.proxy.hellos import counted, hello, message, records, server_name
from tests.proxy.test_listener import send_in
from tests.proxy.test_stream import cpu_s

A = rules("- host: a.example")
NAME = "a.example"


def assert_reset(sock: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        read_all(sock)


# --- slow and broken hellos ---


@pytest.mark.parametrize("first", [b"", hello()[:100], b"\x16", b"GE"], ids=["nothing", "half a hello", "a byte", "GE"])
def test_client_that_does_not_finish_is_cut_at_the_deadline(first: bytes) -> None:
    with gate(A, limits=Limits(hello_s=0.3)) as it, it.connect() as client:
        client.sendall(first)
        assert_reset(client)
        record = it.record()
        assert record["reason"] == "hello_timeout"
        assert record["stage"] == ("tls" if first[:1] == b"\x16" else "tcp")
        eventually(lambda: it.listener.open_connections == 0)


def test_dribbled_hello_does_not_outlast_the_deadline() -> None:
    """Every byte in time, the whole never: the deadline is for the hello, not for its next byte."""
    data = hello()
    with gate(A, limits=Limits(hello_s=0.5)) as it, it.connect() as client:
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_in(client, data[:-1], 1, pause_s=0.02)
        assert time.monotonic() - started < 10
        assert it.record()["reason"] == "hello_timeout"


def test_partial_hello_does_not_spin() -> None:
    """Bytes left in the queue keep a level-triggered epoll awake, unless the kernel is told how many to wait for."""
    with gate(A) as it, ExitStack() as stack:
        clients = [stack.enter_context(it.connect()) for _ in range(20)]
        for client in clients:
            client.sendall(hello()[:60])
        time.sleep(0.2)
        used = cpu_s()
        time.sleep(0.5)
        assert cpu_s() - used < 0.25
        assert it.records == []


def test_hello_larger_than_the_socket_buffer_does_not_spin() -> None:
    """The kernel wakes us for less than asked when the buffer is full; what is missing can never come."""
    with gate(A, limits=Limits(hello_s=1.0)) as it, socket.create_server(("127.0.0.1", 0)) as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        address = small.getsockname()
        it.loop.call(lambda: it.listener.serve(small))
        with socket.create_connection(address, timeout=20) as client:
            used = cpu_s()
            client.sendall(records(message([server_name(b"a.example"), (21, bytes(9000))])))
            assert_reset(client)
            assert it.record()["reason"] == "hello_timeout"
            assert cpu_s() - used < 0.4


def test_hello_of_one_byte_records_in_one_byte_segments_costs_little() -> None:
    data = records(message([server_name(b"b.example"), (21, bytes(1500))]), *[1] * 2000)
    with gate(A) as it, it.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        used = cpu_s()
        for at_ in range(0, len(data), 3):
            client.sendall(data[at_ : at_ + 3])
        assert read_all(client) == render_alert(Alert.ACCESS_DENIED)
        assert cpu_s() - used < 3.0
        assert it.record()["server.name"] == "b.example"


@pytest.mark.parametrize("first", [b"", hello()[:100], b"GE"], ids=["nothing", "half a hello", "GE"])
def test_client_that_leaves_early_is_recorded(first: bytes) -> None:
    with gate(A) as it:
        with it.connect() as client:
            client.sendall(first)
        assert it.record()["reason"] == "client_gone"
        eventually(lambda: it.listener.open_connections == 0)


def test_hello_as_large_as_the_limit_passes_and_one_byte_more_does_not() -> None:
    exact = records(message([server_name(b"a.example"), (21, bytes(5000))]))
    with origin() as upstream:
        with gate(A, {NAME: at(upstream.address)}, limits=Limits(max_hello=len(exact))) as it, it.connect() as client:
            client.sendall(exact)
            assert read_exactly(client, len(exact)) == exact
        with gate(A, limits=Limits(max_hello=len(exact) - 1)) as it, it.connect() as client:
            client.sendall(exact)
            assert read_all(client) == render_alert(Alert.DECODE_ERROR)
            assert it.record()["reason"] == "hello_too_large"


def test_announced_hello_is_refused_before_it_is_sent() -> None:
    with gate(A) as it, it.connect() as client:
        client.sendall(b"\x16\x03\x01\x40\x00\x01\x00\x80\x00" + counted(1, b""))
        assert read_all(client) == render_alert(Alert.DECODE_ERROR)


# --- too many ---


def test_connections_over_the_cap_of_a_source_are_reset_and_recorded() -> None:
    with gate(A, limits=Limits(max_per_source=3)) as it, ExitStack() as stack:
        kept = [stack.enter_context(it.connect()) for _ in range(3)]
        eventually(lambda: it.listener.open_connections == 3)
        assert_refused(it)
        assert it.record()["reason"] == "too_many_connections"
        kept[0].close()
        eventually(lambda: it.listener.open_connections == 2)
        with it.connect() as again:  # there is room again
            again.sendall(hello("b.example"))
            assert read_all(again) == render_alert(Alert.ACCESS_DENIED)
        with socket.create_connection(
            it.address, source_address=("127.0.0.9", 0)
        ) as other:  # another source has its own
            other.sendall(hello("b.example"))
            assert read_all(other) == render_alert(Alert.ACCESS_DENIED)


def test_connections_over_the_cap_of_all_are_reset_whoever_they_come_from() -> None:
    with gate(A, limits=Limits(max_connections=3)) as it, ExitStack() as stack:
        for host in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
            stack.enter_context(socket.create_connection(it.address, source_address=(host, 0)))
        eventually(lambda: it.listener.open_connections == 3)
        assert_refused(it)
        assert it.reasons() == ["too_many_connections"]


@contextmanager
def descriptors(spare: int) -> Iterator[None]:
    """Only so many more descriptors than are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        lowest = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect_and_read(client: socket.socket, address: tuple[str, int]) -> None:
    client.connect(address)
    read_all(client)


def test_gate_without_descriptors_resets_and_lives() -> None:
    with origin() as upstream, gate(A, {NAME: at(upstream.address)}) as it, ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(8)]
        for client in clients:
            client.settimeout(20)
        with descriptors(0):
            for client in clients:
                with pytest.raises(ConnectionResetError):
                    connect_and_read(client, it.address)
        eventually(lambda: it.reasons() == ["too_many_connections"] * 8)
        it.records.clear()
        with it.connect() as client:
            client.sendall(hello())
            assert read_exactly(client, len(hello())) == hello()
        assert it.loop.crashes == []


def test_gate_without_a_descriptor_for_the_upstream_denies() -> None:
    with origin() as upstream, gate(A, {NAME: at(upstream.address)}) as it, it.connect() as client:
        eventually(lambda: it.listener.open_connections)
        with descriptors(0):
            client.sendall(hello())
            assert read_all(client) == render_alert(Alert.INTERNAL_ERROR)
        assert it.record()["reason"] == "gate_failed"


def raise_descriptor_limit(to: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < to:
        pytest.skip(f"needs {to} descriptors, the hard limit is {hard}")
    if soft < to:
        resource.setrlimit(resource.RLIMIT_NOFILE, (to, hard))


def open_flow(it: Gate) -> socket.socket:
    client = it.connect()
    client.sendall(hello())
    return client


def test_thousand_idle_flows_live_and_cost_nothing_meanwhile() -> None:
    raise_descriptor_limit(5000)
    size = len(hello())
    with origin() as upstream, gate(A, {NAME: at(upstream.address)}) as it, ExitStack() as stack:
        clients = [stack.enter_context(open_flow(it)) for _ in range(1000)]
        for client in clients:
            read_exactly(client, size)
        used = cpu_s()
        time.sleep(0.5)
        assert cpu_s() - used < 0.3
        for client in clients:
            client.sendall(b"still there?")
        for client in clients:
            assert read_exactly(client, 12) == b"still there?"
        assert it.listener.open_connections == 1000
        stack.close()
        eventually(lambda: it.listener.open_connections == 0)
        assert {record["verdict"] for record in it.records} == {"allow"}


def test_closing_the_listener_ends_every_connection() -> None:
    with origin() as upstream, gate(A, {NAME: at(upstream.address)}) as it:
        with it.connect() as carried, it.connect() as silent, it.connect() as waiting:
            carried.sendall(hello())
            read_exactly(carried, len(hello()))
            it.names.is_cached, it.names.is_silent = False, True
            waiting.sendall(hello())
            eventually(lambda: len(it.judged) == 2 and it.listener.open_connections == 3)
            it.loop.call(it.listener.close)
            for client in (carried, silent, waiting):
                assert_reset(client)
            assert it.listener.open_connections == 0
            assert sorted(map(str, it.reasons())) == ["gate_failed", "gate_failed", "rule"]
        with pytest.raises(ConnectionRefusedError):
            it.connect()


# --- real clients ---


def needs(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@pytest.mark.client
def test_curl_says_that_access_was_denied() -> None:
    curl = needs("curl")
    with gate(A) as it:
        to = f"b.example:443:127.0.0.1:{it.address[1]}"
        done = subprocess.run(
            [curl, "-sS", "--connect-to", to, "https://b.example/"], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 35  # CURLE_SSL_CONNECT_ERROR
        assert "access denied" in done.stderr
        assert it.record()["server.name"] == "b.example"


@pytest.mark.client
def test_openssl_reads_the_alert_for_a_name_that_does_not_exist() -> None:
    openssl = needs("openssl")
    with gate(A) as it:
        it.names.is_cached = False
        done = subprocess.run(
            [openssl, "s_client", "-connect", f"127.0.0.1:{it.address[1]}", "-servername", NAME],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert "SSL alert number 112" in done.stderr
        assert it.record()["reason"] == "name_not_found"


@pytest.mark.client
def test_curl_talks_to_the_origin_through_the_gate(tmp_path: Path) -> None:
    import ssl
    import threading

    import trustme

    curl = needs("curl")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(NAME).configure_cert(context)

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(65536)
            tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        with gate(A, {NAME: at(listener.getsockname())}) as it:
            to = f"a.example:443:127.0.0.1:{it.address[1]}"
            done = subprocess.run(
                [curl, "-sS", "--cacert", tmp_path / "ca.pem", "--connect-to", to, "https://a.example/"],
                capture_output=True, text=True, timeout=30,
            )  # fmt: skip
            assert (done.stdout, done.stderr) == ("hello", "")
            assert it.record()["verdict"] == "allow"
        thread.join(10)
