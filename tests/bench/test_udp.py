"""How many datagrams the UDP relay carries in a second of one core: a client keeps some in flight, a server echoes.

Each datagram counts once for each direction in which it is carried: out, and back. The cost is the CPU time of the
relay's process alone, since client and server share the machine's cores with it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from math import inf
from multiprocessing import get_context
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from policies.hostnames import Hostname
from proxy.epoll import Epoll
from proxy.limits import Limits
from proxy.policy_in_force import PolicyInForce
from proxy.relays.udp import UdpRelay
from proxy.relays.udp_sockets import BoundDoor
from proxy.resolver import Resolution
from tests.proxy.gates import Names
from tests.proxy.udp_gate import policy_of

GOAL = 15_000  # datagrams a second of one core
CLIENTS, IN_FLIGHT, SIZE = 16, 4, 200
ROUNDS = 20_000


def carry(door: socket.socket, server: tuple[str, int], rules: str) -> None:
    """The relay, for ever."""

    async def serve() -> None:
        name = Hostname("echo.example")
        names = Names({"echo.example": Resolution((ip_address(server[0]),), inf, from_hosts=True, port=server[1])})
        relay = UdpRelay(
            Epoll(lambda error: None),
            PolicyInForce(policy_of(rules), "app"),
            names,
            lambda record: None,
            names_of=lambda workload, address: (name,),
            limits=Limits(),
            is_own=lambda address, port: False,
            crashed=lambda error: None,
        )
        relay.serve(BoundDoor(door))
        await asyncio.sleep(3600)

    asyncio.run(serve())


def echo(sock: socket.socket) -> None:
    while True:
        message, peer = sock.recvfrom(2048)
        sock.sendto(message, peer)


@contextmanager
def running(rules: str) -> Iterator[tuple[tuple[str, int], int]]:
    """A door, and the process that carries from it."""
    context = get_context("fork")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        for sock in (door, server):
            sock.bind(("127.0.0.1", 0))
        relay = context.Process(target=carry, args=(door, server.getsockname(), rules), daemon=True)
        origin = context.Process(target=echo, args=(server,), daemon=True)
        for process in (relay, origin):
            process.start()
        try:
            assert relay.pid
            yield door.getsockname(), relay.pid
        finally:
            for process in (relay, origin):
                process.kill()
                process.join(5)


def converse(address: tuple[str, int], rounds: int) -> int:
    """So many answers, with a few in flight for each client. Returns how many datagrams were carried."""
    clients = []
    for _ in range(CLIENTS):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.connect(address)
        client.settimeout(0.5)  # what the kernel had no room for on the way
        for _ in range(IN_FLIGHT):
            client.send(bytes(SIZE))
        clients.append(client)
    answered = lost = 0
    while answered < rounds:
        for client in clients:
            for _ in range(IN_FLIGHT):
                try:
                    client.recv(2048)
                except TimeoutError:
                    lost += 1
                else:
                    answered += 1
                client.send(bytes(SIZE))
    for client in clients:
        client.close()
    return 2 * answered + lost


def cpu_s(pid: int) -> float:
    ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("budget", ["", ", budget: 100GiB/h"], ids=["plain", "with a budget"])
def test_datagrams_a_second(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], budget: str) -> None:
    rules = f'[{{udp: {{host: echo.example, ports: "1-65535"{budget}}}}}]'
    with running(rules) as (address, pid):
        converse(address, 500)  # what a first session brings stays
        time.sleep(0.2)  # and what it left in flight is over
        before, began = cpu_s(pid), time.monotonic()
        carried: int = benchmark.pedantic(converse, (address, ROUNDS))  # type: ignore[no-untyped-call]  # it has no types
        used, took = cpu_s(pid) - before, time.monotonic() - began
    of_a_core = carried / used
    benchmark.extra_info |= {"datagrams_per_core_s": of_a_core, "datagrams_per_s": carried / took, "goal": GOAL}
    with capsys.disabled():
        print(
            f"\n   {of_a_core:,.0f} datagrams a second of one core; {carried / took:,.0f} a second beside its clients"
        )
    assert of_a_core >= GOAL
