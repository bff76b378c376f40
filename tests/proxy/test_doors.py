"""Listening sockets of a service: shared among its own workers, and with nobody else."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import pytest

from proxy.config import Config, SocketAddress
from proxy.service import doors
from proxy.service.doors import DoorTaken, OpenDoor, open_doors, open_sockets
from tests.end_to_end.world import CHECKOUT
from tests.sandbox_user import as_user

LOOPBACK: SocketAddress = ("127.0.0.1", 0)
CONNECTIONS = 200


@contextmanager
def listening(
    address: SocketAddress, count: int = 1, *, takes_ipv4: bool = False
) -> Iterator[tuple[socket.socket, ...]]:
    sockets = open_sockets(address, count, takes_ipv4=takes_ipv4)
    with ExitStack() as stack:
        for sock in sockets:
            stack.enter_context(sock)
        yield sockets


@contextmanager
def connected(address: SocketAddress, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address, 15)) for _ in range(count)]


def waiting(sock: socket.socket) -> int:
    """How many connections can be accepted."""
    sock.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while True:
            sock.accept()[0].close()
            count += 1
    return count


def test_every_worker_gets_connections_and_none_is_lost() -> None:
    with listening(LOOPBACK, 3) as sockets, connected(sockets[0].getsockname(), CONNECTIONS):
        counts = [waiting(sock) for sock in sockets]

    assert sum(counts) == CONNECTIONS
    assert all(counts)


def test_all_sockets_of_a_door_have_one_port() -> None:
    with listening(LOOPBACK, 2) as sockets:
        assert sockets[0].getsockname() == sockets[1].getsockname()
        assert sockets[0].getsockname()[1] != 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("theirs", [1, 2])
def test_the_port_of_another_gate_is_taken(count: int, theirs: int) -> None:
    with listening(LOOPBACK, theirs) as sockets, pytest.raises(OSError, match="in use"):
        open_sockets(sockets[0].getsockname(), count)


@pytest.mark.parametrize("count", [1, 2])
def test_the_port_of_a_program_that_would_share_it_is_taken(count: int) -> None:
    """With SO_REUSEPORT on both sides the kernel would give each of the two its part of the connections."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
        other.bind(LOOPBACK)
        other.listen()
        with pytest.raises(OSError, match="in use"):
            open_sockets(other.getsockname(), count)


def test_connections_of_before_do_not_hold_the_port() -> None:
    """The side that closes first keeps the pair in TIME_WAIT for a minute."""
    with listening(LOOPBACK) as (sock,):
        address = sock.getsockname()
        with socket.create_connection(address, 15) as client:
            accepted, _ = sock.accept()
            accepted.close()
            assert client.recv(1) == b""
    with listening(address, 2) as sockets:
        assert len(sockets) == 2


def test_a_backlog_outlives_one_of_two_who_hold_the_socket() -> None:
    """The supervisor's descriptor keeps what waits for a worker that dies."""
    with listening(LOOPBACK, 2) as sockets, ExitStack() as stack:
        workers = [stack.enter_context(sock.dup()) for sock in sockets]
        with connected(sockets[0].getsockname(), 20) as clients:
            for worker in workers:
                worker.close()
            for client in clients:
                client.sendall(b"still here")
            assert sum(waiting(sock) for sock in sockets) == 20


# Where a service listens, and how many of the connections of both families each door gets.
FAMILIES: dict[str, tuple[list[str], list[int]]] = {
    "[::] takes both": (["::"], [2]),
    "each its own": (["::", "0.0.0.0"], [1, 1]),
    "in the other order": (["0.0.0.0", "::"], [1, 1]),
}


@pytest.mark.skipif(not doors.has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("case", FAMILIES)
def test_ipv4_has_one_door(case: str) -> None:
    hosts, expected = FAMILIES[case]
    with socket.create_server(LOOPBACK) as free:
        port = free.getsockname()[1]
    opened = open_doors(Config(policy=(), listen=tuple((host, port) for host in hosts)))
    try:
        with connected(("127.0.0.1", port), 1), connected(("::1", port), 1):
            assert [waiting(door.sockets[0]) for door in opened] == expected
    finally:
        close(opened)


def test_the_doors_of_a_configuration_say_what_arrives() -> None:
    opened = open_doors(Config(policy=(), listen=(LOOPBACK,), proxy_listen=(LOOPBACK,), workers=2))
    try:
        assert [(door.kind, len(door.sockets), door.address[0]) for door in opened] == [
            ("listen", 2, "127.0.0.1"),
            ("proxyListen", 2, "127.0.0.1"),
        ]
    finally:
        close(opened)


def test_one_door_that_is_taken_leaves_none_open() -> None:
    with listening(LOOPBACK) as (other,):
        with socket.create_server(LOOPBACK) as free:
            address = free.getsockname()
        taken = other.getsockname()
        with pytest.raises(DoorTaken, match=rf"--proxy-listen 127\.0\.0\.1:{taken[1]}: Address already in use"):
            open_doors(Config(policy=(), listen=(address,), proxy_listen=(taken,), workers=2))
        with listening(address, 2):
            pass


@pytest.mark.kernel
@pytest.mark.skipif("os.geteuid() != 0", reason="a network namespace needs root")
def test_a_port_that_needs_a_capability_says_which() -> None:
    """As an ordinary user, in a network namespace where ports below 1024 are not everybody's."""
    program = (
        "from proxy.config import Config; from proxy.service.doors import open_doors;"
        "open_doors(Config(policy=(), listen=(('127.0.0.1', 0),), dns_listen=(('127.0.0.1', 53),)))"
    )
    unprivileged = ["unshare", "--net", *as_user([sys.executable, "-c", program])]
    done = subprocess.run(unprivileged, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)

    assert done.stderr.rstrip().endswith(
        "--dns-listen 127.0.0.1:53: Permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE"
    )


def close(opened: Sequence[OpenDoor]) -> None:
    for door in opened:
        door.close()
