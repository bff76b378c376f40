"""A DNS relay on loopback with a real policy before it and a scripted server behind it, and a client to ask it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address

from mitmproxy import dns as oracle

from policies.addresses import Address
from policies.engine import decide, identify
from policies.hostnames import Hostname
from policies.load import load
from policies.model import Attempt, Verdict
from policies.tree import Source
from proxy.hosts import HostsEntry
from proxy.lookups import Lookups
from proxy.record import Record
from proxy.relays.dns import DnsLimits, DnsRelay
from proxy.relays.dns_budget import Budget, NewNames
from proxy.resolver import Resolver
from proxy.wire.dns import A
from tests.proxy.nameserver import Nameserver, Received, Script, serving, wire, zone

POLICY = """
version: 1
guard:
  - host: "*.paste.example"
    deny: all
workloads:
  app:
    match: {address: [127.0.0.1/32, "::1/128"]}
    rules:
      - name: api
        host: api.example
      - host: "*.cdn.example"
      - host: inside.example
        private: true
      - host: closed.cdn.example
        deny: all
      - host: old.example
        until: 2020-01-01
      - ntp: time.example
      - tcp: git.example:22
      - host: deep.under.parent.example
  other:
    match: {address: [127.0.0.2/32]}
    rules:
      - host: other.example
  watched:
    match: {address: [127.0.0.3/32]}
    mode: audit
    rules: []
"""
TXT, SRV, SVCB, HTTPS, ANY = 16, 33, 64, 65, 255
IPV6_FREEBIND = 78  # linux/in6.h
PUBLIC, PUBLIC6 = "93.184.216.34", "2606:2800:220:1::1"


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Gate:
    """A relay on one loopback port, the upstream behind it, and what it recorded."""

    relay: DnsRelay
    upstream: Nameserver
    clock: Clock
    lookups: Lookups
    port: int = 0
    records: list[Record] = field(default_factory=list)

    def only_record(self) -> Record:
        (record,) = self.records
        return record


@asynccontextmanager
async def gate(
    script: Script,
    *,
    policy: str = POLICY,
    host: str = "127.0.0.1",
    port: int = 0,
    hosts: Mapping[str, str] | None = None,
    search: Iterable[str] = (),
    new_names: NewNames | None = None,
    forward: Mapping[str, Nameserver] | None = None,
    limits: DnsLimits | None = None,
    judge: Callable[[Attempt], Verdict] | None = None,
    timeout_s: float = 10,
) -> AsyncIterator[Gate]:
    loaded = load([Source("test.yaml", policy)], catalogue={}, tags={}, is_public_suffix=lambda name: "." not in name)
    clock, records = Clock(), list[Record]()
    lookups = Lookups(clock=clock)
    async with serving(script) as upstream:
        entries = {Hostname(name): HostsEntry((ip_address(text),)) for name, text in (hosts or {}).items()}
        zones = {Hostname(zone): [server.address] for zone, server in (forward or {}).items()}
        resolver = Resolver(entries, [upstream.address], forward=zones, clock=clock, timeout_s=timeout_s, attempts=1)
        relay = DnsRelay(
            judge or partial(decide, loaded),
            resolver,
            lookups,
            records.append,
            workload=partial(identify, loaded),
            standing=lambda: (loaded, None),
            budget=Budget(new_names or NewNames(), clock, is_ours=resolver.is_ours),
            search=[Hostname(domain) for domain in search],
            limits=limits,
            clock=clock,
        )
        udp, tcp = bind(host, port)
        with udp, tcp:
            tasks = [asyncio.create_task(relay.serve_udp(udp)), asyncio.create_task(relay.serve_tcp(tcp))]
            try:
                yield Gate(relay, upstream, clock, lookups, udp.getsockname()[1], records)
                assert not any(task.done() for task in tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await relay.close()
                await resolver.close()


def bind(host: str, port: int = 0) -> tuple[socket.socket, socket.socket]:
    """UDP, and TCP listening on the same port; with IPv6 as the sandbox binds it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        udp, tcp = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_STREAM)
        for sock in (udp, tcp):
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        udp.bind((host, port))
        try:
            tcp.bind((host, udp.getsockname()[1]))
        except OSError:  # free for UDP and taken for TCP
            udp.close()
            tcp.close()
            if port:
                raise
        else:
            tcp.listen()
            return udp, tcp


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


def question(name: str, qtype: int = A, *, opt: bytes | None = b"", query_id: int = 0x5A5A, qclass: int = 1) -> bytes:
    """A client's query; `opt` are the options inside its OPT record, None for a client without one."""
    extra = b"" if opt is None else struct.pack("!BHHIH", 0, 41, 1232, 0, len(opt)) + opt
    return (
        struct.pack("!6H", query_id, 0x0120, 1, 0, 0, 1 if extra else 0)
        + wire(name)
        + struct.pack("!HH", qtype, qclass)
        + extra
    )


async def ask(gate: Gate, message: bytes, *, client: str = "127.0.0.1", at: str = "127.0.0.1") -> bytes:
    """The reply over UDP. The socket is connected, so only a reply from the address that was asked is one."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ":" in at else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind((client, 0))
        sock.connect((at, gate.port))
        sock.send(message)
        return await loop.sock_recv(sock, 4096)


async def is_silent(gate: Gate, message: bytes) -> bool:
    """Whether nothing comes back, although the relay went on to answer the question after it."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", gate.port))
        sock.send(message)
        sock.send(question("unnamed.example", query_id=0x7777))
        return (await loop.sock_recv(sock, 4096)).startswith(b"\x77\x77")


@asynccontextmanager
async def over_tcp(gate: Gate) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass


async def read_tcp(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))


@dataclass(frozen=True)
class Told:
    """A reply as another codec reads it."""

    rcode: int
    addresses: tuple[Address, ...] = ()
    ttl_s: int | None = None  # of the addresses, or of the SOA
    error: int | None = None  # RFC 8914 code


NXDOMAIN, SERVFAIL = 3, 2
BLOCKED, PROHIBITED, NO_AUTHORITY, OTHER = 15, 18, 22, 0


def told(message: bytes) -> Told:
    answer = oracle.DNSMessage.unpack(message)
    found = tuple(ip_address(rr.data) for rr in answer.answers)
    assert all(rr.name == answer.questions[0].name for rr in answer.answers)
    error = None
    for opt in answer.additionals:
        error = int.from_bytes(opt.data[4:6]) if opt.data else None
    ttls = {rr.ttl for rr in (*answer.answers, *answer.authorities)}
    return Told(answer.response_code, found, ttls.pop() if ttls else None, error)


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


def silence(received: Received) -> Iterable[bytes]:
    return []


API = zone({"api.example": [PUBLIC, PUBLIC6]})
