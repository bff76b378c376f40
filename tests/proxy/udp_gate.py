"""A UDP relay on loopback with a real policy, and servers behind it: what tests of datagrams share."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from math import inf

from policies.addresses import Address
from policies.hostnames import Hostname
from policies.index import Policy
from policies.load import load
from policies.tree import Source
from proxy.epoll import Epoll
from proxy.limits import Limits
from proxy.policy_in_force import PolicyInForce
from proxy.record import Record
from proxy.relays.udp import UdpRelay
from proxy.relays.udp_sockets import BoundDoor, Target
from proxy.resolver import Resolution
from tests.proxy.gates import Names

PATIENCE_S = 20.0
ECHO = Hostname("echo.example")


def policy_of(rules: str, *, mode: str = "enforce") -> Policy:
    """One workload `app`, of every source, with these rules; `-` begins each."""
    text = f"""
version: 1
workloads:
  app:
    match: {{address: [0.0.0.0/0, "::/0"]}}
    mode: {mode}
    rules: {rules}
"""
    return load([Source("test.yaml", text)], catalogue={}, tags={}, is_public_suffix=lambda name: "." not in name)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Server:
    """A UDP server whose answers are scripted: None says nothing."""

    sock: socket.socket
    answer: Callable[[bytes], bytes | None]
    received: list[tuple[bytes, tuple[str, int]]] = field(default_factory=list)

    @property
    def port(self) -> int:
        port: int = self.sock.getsockname()[1]
        return port

    def read(self) -> None:
        message, peer = self.sock.recvfrom(1 << 16)
        self.received.append((message, peer))
        if (reply := self.answer(message)) is not None:
            self.sock.sendto(reply, peer)


@dataclass
class Lab:
    """The relay, its doors' addresses, the server behind it, and what was recorded."""

    relay: UdpRelay
    epoll: Epoll
    server: Server
    names: Names
    in_force: PolicyInForce
    clock: Clock
    address_names: dict[str, tuple[Hostname, ...]]
    records: list[Record] = field(default_factory=list)
    crashes: list[Exception] = field(default_factory=list)

    def door(self, target: Target | None = None, host: str = "127.0.0.1") -> tuple[str, int]:
        """One more, and where it is."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, 0))
        self.relay.serve(BoundDoor(sock, target))
        address = sock.getsockname()
        return address[0], address[1]

    def use(self, rules: str) -> None:
        """Another policy is in force."""
        self.in_force.policy = replace(policy_of(rules), generation="g2")
        self.relay.judge_anew()

    async def record(self, **fields: object) -> Record:
        """The first with these fields."""
        return await happens(
            lambda: next((one for one in self.records if fields.items() <= one.items()), None), f"a record of {fields}"
        )


async def happens[T](look: Callable[[], T | None], what: str) -> T:
    """What `look` gives once it is true."""
    end = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < end, f"did not happen: {what}"
        await asyncio.sleep(0.005)
    return found


class Client:
    """A program that speaks UDP from one port."""

    def __init__(self, to: tuple[str, int], source: str = "", *, is_connected: bool = True) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind((source or to[0], 0))
        self._to = to
        if is_connected:
            self.sock.connect(to)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def port(self) -> int:
        port: int = self.sock.getsockname()[1]
        return port

    def send(self, datagram: bytes) -> None:
        self.sock.sendto(datagram, self._to) if not self._is_connected() else self.sock.send(datagram)

    def _is_connected(self) -> bool:
        try:
            self.sock.getpeername()
        except OSError:
            return False
        return True

    async def receive(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)

    async def ask(self, datagram: bytes) -> bytes:
        self.send(datagram)
        return await self.receive()

    def has_nothing(self) -> bool:
        """Whether nothing has come until now."""
        try:
            self.sock.recv(1)
        except BlockingIOError:
            return True
        return False


@asynccontextmanager
async def lab(
    rules: str,
    *,
    mode: str = "enforce",
    limits: Limits | None = None,
    answer: Callable[[bytes], bytes | None] = lambda message: message,
    resolved: Mapping[str, Resolution] | None = None,
    is_cached: bool = True,
    is_own: Callable[[Address, int], bool] = lambda address, port: False,
) -> AsyncIterator[Lab]:
    """`echo.example` is the server, which the operator's hosts name; loopback is looked up as that name."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        server = Server(sock, answer)
        loop.add_reader(sock, server.read)
        to_server = Resolution((ip_address("127.0.0.1"),), inf, from_hosts=True, port=server.port)
        names = Names({ECHO: to_server, **(resolved or {})}, is_cached=is_cached)
        crashes: list[Exception] = []
        records: list[Record] = []
        epoll = Epoll(crashes.append)
        in_force = PolicyInForce(replace(policy_of(rules, mode=mode), generation="g1"), None)
        clock = Clock()
        address_names: dict[str, tuple[Hostname, ...]] = {"127.0.0.1": (ECHO,), "::1": (ECHO,)}
        relay = UdpRelay(
            epoll,
            in_force,
            names,
            records.append,
            names_of=lambda workload, address: address_names.get(str(address), ()),
            limits=limits or Limits(),
            is_own=is_own,
            crashed=crashes.append,
            ticks=clock,
        )
        try:
            yield Lab(relay, epoll, server, names, in_force, clock, address_names, records, crashes)
            assert crashes == []
        finally:
            relay.close()
            epoll.close()
            loop.remove_reader(sock)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            await test()

    asyncio.run(limited())
