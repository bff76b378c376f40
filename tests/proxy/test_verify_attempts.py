"""What a probe of `outgate verify` meets on real sockets, and what shows who it was."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.verify import packets
from proxy.verify.attempts import attempt, owner_of_other_end
from proxy.verify.model import Kind, Manner, Patience, Probe, Proof
from proxy.verify.place import Place, find_route
from proxy.verify.proof import Witness
from tests.proxy.nameserver import reply

DENIAL = b"HTTP/1.1 403 Forbidden\r\nOutgate-Decision: deny; reason=never_reached; id=0123456789abcdef\r\n\r\n"
GRANTED = b"HTTP/1.1 200 OK\r\n\r\n"
OPEN = Place(
    is_closed=False, has_ipv6=True, routers=(), node=None, nameserver=("127.0.0.1", 53), api=("10.96.0.1", 443),
    proxy=None, device6=0,
)  # fmt: skip


def patience(reach_s: float = 15.0) -> Patience:
    return Patience(reach_s, reach_s, time.monotonic() + 30)


@contextmanager
def serving(meet: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[int]:
    """Each connection is `meet`'s, and closed when that returns."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # the test is over
                return
            with sock:
                meet(sock)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def web(port: int, to: str = "127.0.0.1", kind: Kind = Kind.HTTP) -> Probe:
    return Probe(id="x", group="raw-ip", what="", kind=kind, to=to, port=port, say=(packets.http_get("x.example"),))


def answers(data: bytes) -> Callable[[socket.socket], None]:
    def meet(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(data)

    return meet


def resets(sock: socket.socket) -> None:
    sock.recv(10)  # with the rest unread, closing it resets


MEETINGS = {
    "an answer": (answers(GRANTED), Manner.ANSWERED, GRANTED),
    "half an answer": (answers(b"HTTP/1.1 2"), Manner.ANSWERED, b"HTTP/1.1 2"),
    "closed": (answers(b""), Manner.CLOSED, b""),
    "reset": (resets, Manner.CLOSED, b""),
}


@pytest.mark.parametrize("name", list(MEETINGS))
def test_what_a_connection_meets(name: str) -> None:
    meet, manner, data = MEETINGS[name]
    with serving(meet) as port:
        heard = attempt(web(port), patience())

    assert (heard.manner, heard.data) == (manner, data)
    assert heard.uid in (os.geteuid(), None)


def test_who_accepts_and_says_nothing_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard = attempt(web(listener.getsockname()[1]), patience(0.2))

    assert heard.manner is Manner.SILENT


def test_a_port_that_nobody_listens_on_rejects() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    datagram = Probe(id="x", group="udp", what="", kind=Kind.UDP, to="127.0.0.1", port=port, say=(b"x",))

    assert attempt(web(port), patience()).manner is Manner.REJECTED
    assert attempt(datagram, patience()).manner is Manner.REJECTED


def test_a_probe_that_comes_too_late_has_failed() -> None:
    assert attempt(web(1), Patience(1, 1, time.monotonic())).manner is Manner.FAILED


def test_sockets_with_a_path(tmp_path: Path) -> None:
    def at(path: Path) -> Probe:
        return Probe(id="x", group="socket", what="", kind=Kind.UNIX, to=str(path))

    with socket.socket(socket.AF_UNIX) as service, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        service.bind(str(tmp_path / "one"))
        service.listen()
        other.bind(str(tmp_path / "two"))
        assert attempt(at(tmp_path / "one"), patience()).manner is Manner.ANSWERED
        assert attempt(at(tmp_path / "two"), patience()).manner is Manner.ANSWERED
    assert attempt(at(tmp_path / "one"), patience()).manner is Manner.REFUSED
    assert attempt(at(tmp_path / "none"), patience()).manner is Manner.ABSENT
    assert attempt(at(tmp_path / "one" / "below"), patience()).manner is Manner.ABSENT


def test_lookups_are_judged_by_the_one_that_was_answered() -> None:
    """A tunnel needs no more than one name that passes."""
    queries = tuple(packets.dns_query(f"{i}.x.example", 1, i) for i in range(3))
    denial = b"\0\0no_rule, decision 0123456789abcdef"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        probe = Probe(
            id="x", group="dns", what="", kind=Kind.DNS, to="127.0.0.1", port=server.getsockname()[1], say=queries
        )  # fmt: skip

        def serve() -> None:
            for i in range(3):
                message, peer = server.recvfrom(4096)
                server.sendto(
                    message[:2] + b"\x81\x83\0\1" + (b"\0\1" if i == 1 else b"\0\0") + bytes(4) + denial, peer
                )
                server.sendto(b"another id" + bytes(20), peer)

        thread = threading.Thread(target=serve)
        thread.start()
        heard = attempt(probe, patience())
        thread.join()

    assert heard.note == "3 of 3 answered"
    assert packets.read_denial(heard.data) is None


@pytest.mark.parametrize(
    ("rcode", "manner"), [(0, Manner.ANSWERED), (2, Manner.REFUSED), (3, Manner.ANSWERED), (5, Manner.REFUSED)]
)
def test_a_resolver_of_this_machine_that_finds_nobody_to_ask_refuses(rcode: int, manner: Manner) -> None:
    """As Docker's does behind a gateway. An absence it must have from somebody."""
    query = packets.dns_query("x.example", 1, 7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        probe = Probe(
            id="x", group="dns", what="", kind=Kind.DNS, to="127.0.0.1", port=server.getsockname()[1], say=(query,)
        )  # fmt: skip

        def serve() -> None:
            message, peer = server.recvfrom(4096)
            server.sendto(reply(message, rcode=rcode), peer)

        thread = threading.Thread(target=serve)
        thread.start()
        heard = attempt(probe, patience())
        thread.join()

    assert heard.manner is manner


# --- through a proxy


def through(port: int, target: str = "10.0.0.1:80") -> Probe:
    say = packets.http_connect(target), packets.http_get("10.0.0.1")
    return Probe(
        id="x", group="proxy", what="", kind=Kind.CONNECT, to="127.0.0.1", port=port, name=target, say=say
    )  # fmt: skip


def proxy(judge: Callable[[bytes], bytes | None]) -> Callable[[socket.socket], None]:
    """`judge` gives what comes back through the tunnel for its head; None: there is no tunnel."""

    def meet(sock: socket.socket) -> None:
        found = judge(sock.recv(4096))
        if found is None:
            sock.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return
        sock.sendall(GRANTED)
        sock.recv(4096)
        sock.sendall(found)

    return meet


def only_private(found: bytes) -> Callable[[bytes], bytes | None]:
    return lambda head: found if b"10.0.0.1" in head else None


PROXIES: dict[str, tuple[Callable[[bytes], bytes | None], Manner, Proof | None]] = {
    "one that grants nothing": (lambda head: None, Manner.REFUSED, None),
    "one that carries": (lambda head: GRANTED, Manner.ANSWERED, None),
    "a gate, which judges in the tunnel": (lambda head: DENIAL, Manner.ANSWERED, Proof.CONTROL),
    "a gate that closes": (lambda head: b"", Manner.CLOSED, Proof.CONTROL),
    "one that carries to somebody who speaks as a gate": (only_private(DENIAL), Manner.ANSWERED, None),
    "one that carries to somebody who closes": (only_private(b""), Manner.CLOSED, None),
}


@pytest.mark.parametrize("name", list(PROXIES))
def test_a_tunnel_is_the_proxys_own_refusal_only_where_nobody_can_be_meant(name: str) -> None:
    judge, manner, proof = PROXIES[name]
    with serving(proxy(judge)) as port:
        heard = attempt(through(port), patience())

    assert (heard.manner, heard.proof) == (manner, proof)


# --- who it was


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_has_the_other_end_of_a_connection_to_this_machine(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as sock,
    ):
        assert owner_of_other_end(sock) == os.geteuid()


def test_a_listener_of_both_families_is_found_too() -> None:
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener,
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as sock,
    ):
        assert owner_of_other_end(sock) == os.geteuid()


def test_a_connection_that_is_over_is_no_other_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with sock, accepted:
            accepted.close()  # first, so that it is what stays in TIME_WAIT
            assert sock.recv(1) == b""
            sock.close()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", 0))
            assert owner_of_other_end(again) is None


def test_nothing_shows_that_a_neighbour_is_a_gate() -> None:
    with serving(answers(DENIAL)) as port:
        heard = replace(attempt(web(port), patience()), uid=None)
        proof = Witness(OPEN).prove(web(port), heard, patience())

    assert heard.manner is Manner.ANSWERED
    assert proof is None
    assert Witness(OPEN).is_neighbour(web(port))


def test_on_a_closed_network_whoever_answers_is_inside() -> None:
    place = replace(OPEN, is_closed=True)
    heard = replace(attempt(web(1), patience()), uid=None)

    assert Witness(place).prove(web(1), heard, patience()) is Proof.NAMESPACE
    assert Witness(place, has_no_key=True).prove(web(1), heard, patience()) is Proof.NAMESPACE


def test_who_has_not_the_gates_key_is_believed_nothing() -> None:
    with serving(answers(DENIAL)) as port:
        heard = attempt(web(port), patience())

    assert Witness(OPEN, has_no_key=True).prove(web(port), replace(heard, uid=0), patience()) is None


def test_the_surroundings_come_from_the_kernel() -> None:
    local = find_route("127.0.0.1")

    assert local is not None
    assert local.gateway is None
    assert find_route("localhost") is not None
