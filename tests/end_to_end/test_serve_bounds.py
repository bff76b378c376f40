"""What the operator bounds, a whole service keeps to: each limit reaches the worker and the inspector, and is said."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme

from proxy.wire.client_hello import Alert, render_alert
from tests.end_to_end.service import WAIT_S, Address, Service, ask_for, eventually
from tests.end_to_end.world import OUTGATE
from tests.proxy import gates, inspecting
from tests.proxy.hellos import hello

POLICY = """
version: 1
workloads:
  app:
    rules:
      - tcp: "echo.test:7"
      - host: "*.carried.test"
      - {host: api.test, tls: inspect}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The options that every gate here has: an authority, and where the names lead."""
    directory = tmp_path_factory.mktemp("places")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.test").configure_cert(context)
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", str(directory / "pki")], check=True, capture_output=True)
    upstream = inspecting.Origin(context, lambda _head, _sock: inspecting.response())
    with gates.origin() as echo:
        yield [
            "--pki", str(directory / "pki"), "--upstream-ca", str(directory / "origin.pem"),
            "--host", f"echo.test=127.0.0.1:{echo.address[1]}", "--host", f"api.test=127.0.0.1:{upstream.port}",
        ]  # fmt: skip
    upstream.close()


def trust_nobody() -> ssl.SSLContext:
    """Whose certificate it is has no bearing here."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def browse(service: Service) -> ssl.SSLSocket:
    """A connection that the inspector has."""
    return trust_nobody().wrap_socket(service.tunnel("api.test:443"), server_hostname="api.test")


def is_refused(address: Address, source: str = "127.0.0.1") -> bool:
    """Whether a connection is reset before it is answered."""
    try:
        with socket.create_connection(address, WAIT_S, source_address=(source, 0)) as sock:
            return ask_for(sock, "echo.test:7") != 200
    except ConnectionResetError:
        return True


# --- how many ---------------------------------------------------------------------------------------------------------


def test_connections_are_bounded_in_all(tmp_path: Path, places: list[str]) -> None:
    with Service(tmp_path, POLICY, "--max-connections", "3", "--max-per-source", "3", *places) as it:
        with ExitStack() as stack:
            for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
                sock = socket.create_connection(it.address, WAIT_S, source_address=(source, 0))
                stack.enter_context(sock)
                assert ask_for(sock, "echo.test:7") == 200
            assert is_refused(it.address)
        eventually(lambda: not is_refused(it.address), "there is room again")
        eventually(lambda: it.records(reason="too_many_connections"), "it is recorded")


def test_connections_are_bounded_for_each_source(tmp_path: Path, places: list[str]) -> None:
    with Service(tmp_path, POLICY, "--max-connections", "8", *places) as it:  # half of them, unless said otherwise
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(it.tunnel("echo.test:7"))
            assert is_refused(it.address)
            assert not is_refused(it.address, "127.0.0.9")
        eventually(lambda: not is_refused(it.address), "there is room again")
        eventually(lambda: it.records(reason="too_many_connections"), "it is recorded")


def test_inspected_connections_are_bounded_too(tmp_path: Path, places: list[str]) -> None:
    with Service(tmp_path, POLICY, "--max-connections", "6", "--max-per-source", "2", *places) as it:
        with browse(it) as first, browse(it) as second:
            with pytest.raises(ConnectionResetError):
                browse(it)
            for sock in (first, second):
                sock.sendall(inspecting.get("/", host="api.test"))
                assert inspecting.read_reply(sock)[0].status == 200
        eventually(lambda: it.records(reason="too_many_connections"), "it is recorded")
        eventually(lambda: it.metric("outgate_connections_inspected") == 0, "both are over")
        browse(it).close()


# --- how long, how large ----------------------------------------------------------------------------------------------


def half_a_hello(it: Service) -> socket.socket:
    sock = it.tunnel("a.carried.test:443")
    sock.sendall(hello("a.carried.test")[:50])
    return sock


def half_a_head(it: Service) -> socket.socket:
    sock = it.connect()
    sock.sendall(b"CONNECT a.carried.test:443 HTTP/1.1\r\n")
    return sock


def half_a_handshake(it: Service) -> socket.socket:
    """The hello goes through, and nothing follows it: the inspector waits."""
    sock = it.tunnel("api.test:443")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        trust_nobody().wrap_bio(incoming, outgoing, server_hostname="api.test").do_handshake()
    sock.sendall(outgoing.read())
    return sock


def half_a_request(it: Service) -> socket.socket:
    sock = browse(it)
    sock.sendall(b"GET / HTTP/1.1\r\nHost: api")
    return sock


def silence(it: Service) -> socket.socket:
    return it.tunnel("echo.test:7")


def large_hello(it: Service) -> socket.socket:
    sock = it.tunnel("a.carried.test:443")
    sock.sendall(hello("a.carried.test", (21, bytes(1024))))
    return sock


# The limit, who does what it bounds, how the connection ends (None: in any way), and what the record says.
ENDS: dict[str, tuple[list[str], Callable[[Service], socket.socket], bytes | None, dict[str, object]]] = {
    "half a hello": (["--hello-s", "0.5"], half_a_hello, None, {"reason": "hello_timeout", "stage": "tls"}),
    "half a CONNECT": (["--hello-s", "0.5"], half_a_head, b"HTTP/1.1 408 ", {"reason": "hello_timeout"}),
    "half a handshake": (["--hello-s", "0.5"], half_a_handshake, None, {"reason": "hello_timeout", "stage": "tls"}),
    "half a request": (["--head-s", "0.5"], half_a_request, b"HTTP/1.1 408 ", {"reason": "hello_timeout"}),
    "silence": (["--idle-s", "1"], silence, None, {"flow.end": "idle", "verdict": "allow"}),
    "a hello too large": (
        ["--max-hello", "1024"], large_hello, render_alert(Alert.DECODE_ERROR), {"reason": "hello_too_large"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_a_client_is_cut_at_the_bound(tmp_path: Path, places: list[str], case: str) -> None:
    options, begin, says, fields = ENDS[case]
    with Service(tmp_path, POLICY, *options, *places) as it, begin(it) as sock:
        assert read_to_the_end(sock).startswith(says or b"")
        eventually(lambda: it.records(**fields), f"a record with {fields}")
        assert it.status("denied.test:443") == 403  # and nobody else is


def read_to_the_end(sock: socket.socket) -> bytes:
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def test_an_inspected_connection_that_rests_is_closed_without_a_record(tmp_path: Path, places: list[str]) -> None:
    with Service(tmp_path, POLICY, "--idle-s", "1", *places) as it, browse(it) as sock:
        assert sock.recv(1) == b""
        eventually(lambda: it.metric("outgate_connections_inspected") == 0, "it is over")
        assert it.records() == []
