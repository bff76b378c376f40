"""The proxy's door under attack: heads that do not end, clients that stall, crowds; and the way out it never is."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from proxy.limits import Limits
from proxy.wire.client_hello import Alert, render_alert
from proxy.wire.proxy_head import MAX_HEAD
from tests.proxy.gates import at, eventually, origin, read_exactly
from tests.proxy.hellos import hello
from tests.proxy.proxying import ANN, BOB, UNMATCHED, Proxy, connect, get, proxy
from tests.proxy.test_listener import send_in
from tests.proxy.test_listener_limits import descriptors
from tests.proxy.test_stream import cpu_s

ASKED = connect("b.example:443")


def padded(size: int) -> bytes:
    """A head of so many bytes."""
    empty = connect("x.example:443", "Padding: ")
    return connect("x.example:443", "Padding: " + "x" * (size - len(empty)))


# --- heads ---


def test_head_as_long_as_the_limit_is_read_and_a_longer_one_is_431(tmp_path: Path) -> None:
    with proxy(tmp_path) as it:
        assert it.ask(padded(MAX_HEAD), BOB).problem["reason"] == "no_rule"
        for longer in (padded(MAX_HEAD + 1), b"GET http://b.example/" + b"x" * 100_000, padded(1 << 20)):
            with it.client(BOB) as client:
                try:
                    answered = client.ask(longer)
                except (ConnectionResetError, BrokenPipeError):
                    assert len(longer) > MAX_HEAD + (64 << 10)  # it was told, and did not stop
                else:
                    assert (answered.status, answered.problem["reason"]) == (431, "malformed_request")
        assert it.reasons() == ["no_rule"] + ["malformed_request"] * 3
        assert [record.get("http.response.status_code") for record in it.gate.records] == [403, 431, 431, 431]


@pytest.mark.parametrize("begun", [b"C", ASKED[:-1], padded(MAX_HEAD)[:-2]], ids=["a byte", "nearly all", "16 KiB"])
def test_head_that_does_not_end_is_408_at_the_deadline(begun: bytes, tmp_path: Path) -> None:
    with proxy(tmp_path, limits=Limits(hello_s=0.4)) as it, it.client(BOB) as client:
        client.send(begun)
        answered = client.answered()
        assert (answered.status, answered.problem["reason"]) == (408, "hello_timeout")
        assert client.is_closed()
        assert it.record()["http.response.status_code"] == 408


def test_dribbled_head_does_not_outlast_the_deadline(tmp_path: Path) -> None:
    """Every byte in time, the whole never: the deadline is for the head, not for its next byte."""
    with proxy(tmp_path, limits=Limits(hello_s=0.5, linger_s=0.2)) as it, it.client(BOB) as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        used = cpu_s()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_in(client.sock, padded(MAX_HEAD), 1, pause_s=0.002)
        assert it.reasons() == ["hello_timeout"]
        assert cpu_s() - used < 3


def test_silent_client_is_closed_without_a_word(tmp_path: Path) -> None:
    with proxy(tmp_path, limits=Limits(hello_s=0.3)) as it, it.client(BOB) as client:
        assert client.read_to_end() == b""
        assert it.record()["reason"] == "hello_timeout"


def test_half_a_head_costs_nothing_while_it_waits(tmp_path: Path) -> None:
    with proxy(tmp_path) as it, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(it.client(BOB)).send(ASKED[:20])
        eventually(lambda: it.gate.listener.open_connections == 20)
        time.sleep(0.2)
        used = cpu_s()
        time.sleep(0.5)
        assert cpu_s() - used < 0.25


@pytest.mark.parametrize("begun", [b"", ASKED[:20]], ids=["nothing", "half a head"])
def test_client_that_leaves_before_its_head_is_whole_is_recorded(begun: bytes, tmp_path: Path) -> None:
    with proxy(tmp_path) as it:
        with it.client(BOB) as client:
            client.send(begun)
        assert it.record()["reason"] == "client_gone"
        eventually(it.is_idle)


def test_client_that_ended_its_side_still_gets_its_answer(tmp_path: Path) -> None:
    with proxy(tmp_path) as it:
        for asked, reason in ((connect("x.example:443"), "no_rule"), (get("http://b.example/"), None)):
            with it.client(BOB) as client:
                client.send(asked)
                client.sock.shutdown(socket.SHUT_WR)
                if reason:
                    assert client.answered().problem["reason"] == reason
                else:
                    eventually(lambda: it.gate.handed, "the connection is handed over")


def test_bytes_behind_the_head_are_the_first_of_the_tunnel(tmp_path: Path) -> None:
    data = hello("b.example")
    with (
        origin() as upstream,
        proxy(tmp_path, names={"b.example": at(upstream.address)}) as it,
        it.client(BOB) as client,
    ):
        client.send(ASKED + data[:50])
        assert client.answered().status == 200
        client.send(data[50:])
        assert read_exactly(client.sock, len(data)) == data
        assert upstream.heard == [bytearray(data)]


def test_tls_to_the_proxy_itself_is_an_alert_and_a_record(tmp_path: Path) -> None:
    with proxy(tmp_path) as it, it.client(BOB) as client:
        client.send(hello("b.example"))
        assert client.read_to_end() == render_alert(Alert.ACCESS_DENIED)
        assert (it.record()["reason"], it.record()["stage"]) == ("wrong_protocol", "tls")


def test_body_on_connect_is_refused_and_never_becomes_a_tunnel(tmp_path: Path) -> None:
    with proxy(tmp_path) as it, it.client(BOB) as client:
        answered = client.ask(connect("b.example:443", "Content-Length: 4") + b"body")
        assert (answered.status, answered.problem["reason"]) == (400, "malformed_request")
        assert "CONNECT has no body" in answered.problem["detail"]
        assert client.is_closed()


def test_web_client_is_told_that_this_is_a_proxy(tmp_path: Path) -> None:
    with proxy(tmp_path) as it:
        answered = it.ask(b"GET / HTTP/1.1\r\nHost: b.example\r\n\r\n", BOB)
        assert "this is a proxy, no web server" in answered.problem["detail"]


# --- crowds ---


def test_client_that_stalls_delays_nobody(tmp_path: Path) -> None:
    with proxy(tmp_path) as it, ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(it.client(BOB)).send(b"CONNECT ")
        assert it.ask(connect("x.example:443"), BOB).status == 403


def test_heads_under_way_count_in_the_caps(tmp_path: Path) -> None:
    with proxy(tmp_path, limits=Limits(max_per_source=3, max_connections=5)) as it, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(it.client(BOB)).send(b"CONNECT ")
        eventually(lambda: it.gate.listener.open_connections == 3)
        assert_refused(it, BOB)
        assert it.record()["reason"] == "too_many_connections"
        for _ in range(2):
            stack.enter_context(it.client()).send(b"CONNECT ")
        eventually(lambda: it.gate.listener.open_connections == 5)
        assert_refused(it, ANN)
        assert it.reasons() == ["too_many_connections"] * 2


def assert_refused(it: Proxy, source: str) -> None:
    """A connection made now is reset, be it while it connects or right after."""
    with pytest.raises(ConnectionResetError), it.client(source) as client:
        client.read_to_end()


def test_client_that_moves_on_into_a_tunnel_needs_no_second_place(tmp_path: Path) -> None:
    with (
        origin() as upstream,
        proxy(
            tmp_path,
            names={"b.example": at(upstream.address)},
            limits=Limits(max_per_source=1, max_connections=1),
        ) as it,
        it.client(BOB) as client,
    ):
        assert client.ask(ASKED).status == 200
        client.send(hello("b.example"))
        assert read_exactly(client.sock, 5) == hello("b.example")[:5]
        assert it.gate.listener.open_connections == 1


def test_door_without_descriptors_resets_and_lives(tmp_path: Path) -> None:
    with proxy(tmp_path) as it, ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(4)]
        with descriptors(0):
            for client in clients:
                client.settimeout(20)
                with pytest.raises(ConnectionResetError):
                    _connect_and_read(client, it.address)
        eventually(lambda: it.reasons() == ["too_many_connections"] * 4)
        assert it.ask(connect("x.example:443"), BOB).status == 403


def _connect_and_read(client: socket.socket, address: tuple[str, int]) -> None:
    client.connect(address)
    client.recv(1)


def test_client_that_never_reads_its_answers_is_let_go(tmp_path: Path) -> None:
    with proxy(tmp_path, users={"ann": "secret"}) as it, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.settimeout(20)
        sock.connect(it.address)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_in(sock, connect("a.example:443") * 100_000, 4096)
        eventually(it.is_idle)


# --- never an open proxy ---

NOWHERE = {
    "a name": connect("a.example:443"),
    "loopback": connect("127.0.0.1:22"),
    "loopback, IPv6": connect("[::1]:22"),
    "loopback by name": connect("localhost:22"),
    "loopback in absolute form": get("http://127.0.0.1/"),
    "localhost in absolute form": get("http://localhost:9901/metrics"),
    "metadata": connect("169.254.169.254:80"),
    "metadata, mapped": connect("[::ffff:169.254.169.254]:80"),
    "metadata in absolute form": get("http://169.254.169.254/latest/meta-data/"),
    "private address": connect("10.0.0.1:443"),
    "unspecified": connect("0.0.0.0:443"),
    "the public": connect("203.0.113.9:443"),
    "absolute form": get("http://b.example/"),
    "upload": get("http://b.example/", "Content-Length: 5", method="PUT") + b"hello",
}


@pytest.mark.parametrize("asked", NOWHERE.values(), ids=NOWHERE)
@pytest.mark.parametrize("has_users", [False, True], ids=["no credentials file", "credentials file"])
def test_stranger_is_refused_whatever_it_asks_for(asked: bytes, has_users: bool, tmp_path: Path) -> None:
    with proxy(tmp_path, users={"ann": "secret"} if has_users else None) as it:
        answered = it.ask(asked)
        reason = "credentials" if has_users else "unknown_workload"
        assert (answered.status, answered.problem["reason"]) == (407 if has_users else 403, reason)
        assert it.reasons() == [reason]
        assert it.gate.names.asked == []
        assert it.gate.handed == []


def test_gate_is_no_way_to_its_own_ports_even_where_a_rule_names_them(tmp_path: Path) -> None:
    with origin() as admin, proxy(tmp_path) as it:
        for port in (it.address[1], it.gate.address[1], admin.address[1]):
            it.gate.records.clear()
            with it.client(BOB) as client:
                assert client.ask(connect(f"127.0.0.1:{port}")).status == 200  # and then judged as any connection to it
                try:
                    client.send(b"GET /metrics HTTP/1.1\r\nHost: b.example\r\n\r\n")
                except ConnectionError:
                    pass
                assert b"200" not in _read_what_comes(client.sock)
            eventually(lambda: it.reasons() == ["never_reached"])
        assert admin.heard == []


def _read_what_comes(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionResetError:
        return b""


def test_unmatched_address_is_not_the_workload_of_its_neighbour(tmp_path: Path) -> None:
    with proxy(tmp_path) as it:
        assert it.ask(connect("b.example:443"), BOB).status == 200
        for source in (ANN, "127.0.0.3", UNMATCHED):
            assert it.ask(connect("b.example:443"), source).status == 403
