"""Doors for DNS: UDP and TCP on one port, shared among the gate's own workers, and with nobody else."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress

import pytest

from proxy.config import Config, DoorKind, SocketAddress
from proxy.service.doors import DoorTaken, OpenDoor, open_doors

LOOPBACK: SocketAddress = ("127.0.0.1", 0)
SENDERS = 64


def opened(stack: ExitStack, address: SocketAddress = LOOPBACK, workers: int = 2) -> tuple[OpenDoor, ...]:
    doors = open_doors(Config(policy=(), listen=(LOOPBACK,), dns_listen=(address,), workers=workers))
    for door in doors:
        stack.callback(door.close)
    return tuple(door for door in doors if door.kind is DoorKind.DNS)


def test_a_dns_door_is_udp_and_tcp_on_one_port() -> None:
    with ExitStack() as stack:
        tcp, udp = opened(stack)
        assert [door.sockets[0].type for door in (tcp, udp)] == [socket.SOCK_STREAM, socket.SOCK_DGRAM]
        assert tcp.address == udp.address
        assert (len(tcp.sockets), len(udp.sockets)) == (2, 2)


def test_datagrams_are_spread_over_the_workers_and_none_is_lost() -> None:
    with ExitStack() as stack:
        _, udp = opened(stack)
        for number in range(SENDERS):
            sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sender.sendto(bytes((number,)), udp.address)
        got = [received(sock) for sock in udp.sockets]
        assert all(got)
        assert sorted(b"".join(b"".join(part) for part in got)) == list(range(SENDERS))


def received(sock: socket.socket) -> list[bytes]:
    sock.setblocking(False)
    messages = []
    with suppress(BlockingIOError):
        while True:
            messages.append(sock.recv(16))
    return messages


SHARERS = {
    "one worker, REUSEPORT": (1, socket.SO_REUSEPORT),
    "one worker, REUSEADDR": (1, socket.SO_REUSEADDR),
    "two workers, REUSEADDR": (2, socket.SO_REUSEADDR),  # with both sides' Linux gives all datagrams to the last one
}


@pytest.mark.parametrize(("workers", "option"), SHARERS.values(), ids=SHARERS)
def test_another_program_gets_no_part_of_the_questions(workers: int, option: int) -> None:
    with ExitStack() as stack:
        _, udp = opened(stack, workers=workers)
        other = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        other.setsockopt(socket.SOL_SOCKET, option, True)
        with pytest.raises(OSError, match="in use"):
            other.bind(udp.address)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_that_is_taken_for_udp_alone_is_taken(workers: int) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
        other.bind(LOOPBACK)
        address = other.getsockname()
        with pytest.raises(DoorTaken, match=rf"--dns-listen 127\.0\.0\.1:{address[1]}: Address already in use"):
            opened(stack, address, workers)
        with socket.create_server(address):  # the half that could be had is free again
            pass
