"""Time servers on loopback that say what a test scripts, a relay before them, and a client to ask it."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from policies.addresses import Address
from policies.engine import decide, identify
from policies.hostnames import Hostname
from policies.load import load
from policies.tree import Source as PolicySource
from proxy.own_doors import OwnDoors
from proxy.record import Peer, Record
from proxy.relays.ntp.clock import read
from proxy.relays.ntp.estimate import Estimate
from proxy.relays.ntp.poller import Poller
from proxy.relays.ntp.records import PacketRecords
from proxy.relays.ntp.server import ClientLimits, NtpRelay
from proxy.relays.ntp.source import Pace, Source, SourceState
from proxy.resolver import NameNotFound
from proxy.wire.ntp import timestamp

PACKET = struct.Struct("!BBbbII4sQQQQ")
NS = 10**9
POLICY = """
version: 1
workloads:
  app:
    match: {address: [127.0.0.1/32, "::1/128"]}
    rules:
      - {name: clock, ntp: one.example}
      - ntp: two.example
      - ntp: three.example
  other:
    match: {address: [127.0.0.2/32]}
    rules:
      - host: other.example
  late:
    match: {address: [127.0.0.3/32]}
    rules:
      - {ntp: one.example, until: 2020-01-01}
  watched:
    match: {address: [127.0.0.4/32]}
    mode: audit
    rules: []
"""
# Quick in everything but patience: other tests load the machine.
PACE = Pace(min_exponent=-5, max_exponent=-5, burst=3, burst_gap_s=0.01, timeout_s=10)
RESTING = Pace(min_exponent=10, max_exponent=10, burst=3, burst_gap_s=0.01, timeout_s=10)  # after the burst
IMPATIENT = Pace(min_exponent=-5, max_exponent=-5, burst=3, burst_gap_s=0.01, timeout_s=0.1)

type Script = Callable[[bytes], Iterable[bytes]]


def answer(
    query: bytes,
    *,
    ahead_s: float = 0.0,
    head: int = 0x24,
    stratum: int = 2,
    delay: int = 0,
    dispersion: int = 0,
    reference_id: bytes = b"GPS\0",
    origin: bytes | None = None,
    times: tuple[int, int] | None = None,
) -> bytes:
    """What a server says whose clock is ahead by that, or wrong in the ways the arguments say."""
    now = timestamp(time.time_ns() + round(ahead_s * NS))
    receive, transmit = (now, now) if times is None else times
    cookie = int.from_bytes(query[40:48] if origin is None else origin)
    return PACKET.pack(head, stratum, 6, -20, delay, dispersion, reference_id, 0, cookie, receive, transmit)


def right(query: bytes) -> Iterable[bytes]:
    return [answer(query)]


def silent(query: bytes) -> Iterable[bytes]:
    return []


def ahead(seconds: float) -> Script:
    return lambda query: [answer(query, ahead_s=seconds)]


def kiss(code: bytes) -> Script:
    return lambda query: [answer(query, head=0xE4, stratum=0, reference_id=code)]


@dataclass
class TimeServer:
    """Listens on loopback, answers by its script, and keeps every packet it was sent."""

    script: Script
    address: Peer = ("", 0)
    received: list[bytes] = field(default_factory=list)
    sources: list[Peer] = field(default_factory=list)

    async def wait_for(self, count: int) -> None:
        """Until it was asked so often."""
        while len(self.received) < count:  # noqa: ASYNC110 - as `until`
            await asyncio.sleep(0.005)


class _Protocol(asyncio.DatagramProtocol):
    def __init__(self, server: TimeServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Peer) -> None:
        self._server.received.append(data)
        self._server.sources.append(addr)
        for message in self._server.script(data):
            self._transport.sendto(message, addr)


@asynccontextmanager
async def time_server(script: Script = right) -> AsyncIterator[TimeServer]:
    server = TimeServer(script)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Protocol(server), local_addr=("127.0.0.1", 0)
    )
    server.address = transport.get_extra_info("sockname")[:2]
    try:
        yield server
    finally:
        transport.close()


@asynccontextmanager
async def polling(
    addresses: Mapping[str, list[Peer]],
    pace: Pace = PACE,
    *,
    on_demand: bool = False,
    is_open: Callable[[Hostname], bool] = lambda name: True,
) -> AsyncIterator[Poller]:
    """A poller of names that have these addresses."""

    async def find(name: Hostname) -> list[Peer]:
        if not addresses.get(name):
            raise NameNotFound(name, exists=False, expires=0)
        return addresses[name]

    poller = Poller(pace, find=find, is_open=is_open, on_demand=on_demand)
    poller.follow({Hostname(name) for name in addresses})
    try:
        yield poller
    finally:
        await poller.close()


def states(poller: Poller) -> dict[str, SourceState]:
    """Of each name's first source."""
    found: dict[str, SourceState] = {}
    for standing in poller.standings():
        found.setdefault(standing.source.name, standing.state)
    return found


def source_of(poller: Poller, name: str) -> Source:
    return next(standing.source for standing in poller.standings() if standing.source.name == name)


async def until(look: Callable[[], object]) -> None:
    """Until it is true; the test's own limit ends a wait that is in vain."""
    while not look():  # noqa: ASYNC110 - what is looked at is the product's, and tells nobody
        await asyncio.sleep(0.005)


async def synchronised(poller: Poller) -> Estimate:
    await until(lambda: poller.estimate(read()))
    found = poller.estimate(read())
    assert found is not None
    return found


def error_s(estimate: Estimate) -> float:
    """By how much the estimate is ahead of this machine's clock, which scripted servers go by."""
    now = read()
    return (estimate.posix_ns(now.own_ns) - now.machine_ns) / NS


# --- a relay, and its clients


@dataclass
class Serving:
    """A relay on one loopback port, and what it recorded."""

    relay: NtpRelay
    packets: PacketRecords
    port: int = 0
    records: list[Record] = field(default_factory=list)

    def only_record(self) -> Record:
        (record,) = self.records
        return record


@asynccontextmanager
async def serving(
    poller: Poller | None = None,
    *,
    host: str = "127.0.0.1",
    limits: ClientLimits | None = None,
    relayed: bool = False,
    policy: str = POLICY,
    is_own: Callable[[Address, int], bool] | None = None,
) -> AsyncIterator[Serving]:
    """Without a poller it does not know the time."""
    loaded = load([PolicySource("test.yaml", policy)], catalogue={}, tags={}, is_public_suffix=lambda name: False)
    records: list[Record] = []
    packets = PacketRecords(records.append)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.bind((host, 0))
        port = sock.getsockname()[1]
        relay = NtpRelay(
            partial(decide, loaded),
            packets,
            workload=partial(identify, loaded),
            estimate=poller.estimate if poller else lambda now: None,
            is_own=is_own or OwnDoors([(host, port)]).holds,
            refresh=poller.refresh if poller and relayed else None,
            limits=limits,
        )
        task = asyncio.create_task(relay.serve(sock))
        try:
            yield Serving(relay, packets, port, records)
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def query(head: int = 0x23, cookie: bytes | None = None) -> bytes:
    """A client's, with something in every field that a covert channel could use."""
    return bytes((head,)) + b"\x07\x0a\xfa" + b"SECRET" * 6 + (os.urandom(8) if cookie is None else cookie)


@asynccontextmanager
async def client(port: int, *, source: str = "127.0.0.1", at: str = "127.0.0.1") -> AsyncIterator[socket.socket]:
    """Connected, so only an answer from the address that was asked is one."""
    with socket.socket(socket.AF_INET6 if ":" in at else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind((source, 0))
        sock.connect((at, port))
        yield sock


async def ask(port: int, message: bytes | None = None, *, source: str = "127.0.0.1", at: str = "127.0.0.1") -> bytes:
    async with client(port, source=source, at=at) as sock:
        sock.send(query() if message is None else message)
        return await asyncio.get_running_loop().sock_recv(sock, 1024)


@dataclass(frozen=True)
class Told:
    """An answer as a client reads it."""

    leap: int
    version: int
    mode: int
    stratum: int
    reference_id: bytes
    cookie: bytes
    receive: int
    transmit: int


def told(message: bytes) -> Told:
    assert len(message) == 48
    head, stratum, _, _, _, _, reference_id, _, cookie, receive, transmit = PACKET.unpack(message)
    return Told(head >> 6, head >> 3 & 7, head & 7, stratum, reference_id, cookie.to_bytes(8), receive, transmit)
