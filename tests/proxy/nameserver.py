"""A DNS server on loopback that says what a test scripts, and keeps every message it was sent."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Literal

from policies.hostnames import Hostname
from proxy.wire.dns import AAAA, CNAME, OPT, SOA, A, Query, encode_name, parse_query

type Transport = Literal["udp", "tcp"]


@dataclass(frozen=True)
class Received:
    """One message as it came."""

    message: bytes
    transport: Transport
    source_port: int

    @property
    def query(self) -> Query:
        return parse_query(self.message)


type Converse = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
type Script = Callable[[Received], Iterable[bytes]]  # the messages to send back, in order


@dataclass
class Nameserver:
    """Listens on one port with UDP and TCP while `serving` is open."""

    script: Script
    received: list[Received] = field(default_factory=list)
    address: tuple[str, int] = ("", 0)
    converse: Converse | None = None  # what a TCP connection gets instead of the script
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def keep(self, received: Received) -> None:
        self.received.append(received)
        self._arrived.set()

    async def wait_for(self, count: int) -> None:
        """Until so many messages have arrived."""
        while len(self.received) < count:
            self._arrived.clear()
            await self._arrived.wait()

    @property
    def asked(self) -> list[tuple[str, str]]:
        """The questions over UDP: name and type."""
        return [(r.query.name, r.query.type_text) for r in self.received if r.transport == "udp"]


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: Nameserver) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        received = Received(data, "udp", addr[1])
        self._server.keep(received)
        for message in self._server.script(received):
            self._transport.sendto(message, addr)


@asynccontextmanager
async def serving(script: Script, host: str = "127.0.0.1") -> AsyncIterator[Nameserver]:
    server = Nameserver(script)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if server.converse is not None:
            return await server.converse(reader, writer)
        length = int.from_bytes(await reader.readexactly(2))
        received = Received(await reader.readexactly(length), "tcp", writer.get_extra_info("peername")[1])
        server.keep(received)
        for message in server.script(received):
            writer.write(len(message).to_bytes(2) + message)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    tcp, transport = await _bind(host, converse, server)
    try:
        yield server
    finally:
        transport.close()
        tcp.close()
        await tcp.wait_closed()


async def _bind(
    host: str,
    converse: Converse,
    server: Nameserver,
) -> tuple[asyncio.Server, asyncio.DatagramTransport]:
    """TCP and UDP on one port; a port that is free for TCP may be taken for UDP."""
    while True:
        tcp = await asyncio.start_server(converse, host, 0)
        server.address = tcp.sockets[0].getsockname()[:2]
        try:
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Udp(server), local_addr=server.address
            )
        except OSError:
            tcp.close()
            await tcp.wait_closed()
        else:
            return tcp, transport


def wire(name: str) -> bytes:
    return encode_name(Hostname(name)) if name else b"\0"


def record(owner: str | bytes, rtype: int, ttl_s: int, content: bytes) -> bytes:
    """A resource record; `owner` as bytes is taken as it stands (a pointer)."""
    return (
        (wire(owner) if isinstance(owner, str) else owner)
        + struct.pack("!HHIH", rtype, 1, ttl_s, len(content))
        + content
    )


def address(owner: str | bytes, text: str, ttl_s: int = 60) -> bytes:
    parsed = ip_address(text)
    return record(owner, A if parsed.version == 4 else AAAA, ttl_s, parsed.packed)


def alias(owner: str | bytes, target: str | bytes, ttl_s: int = 60) -> bytes:
    return record(owner, CNAME, ttl_s, wire(target) if isinstance(target, str) else target)


def soa(owner: str, ttl_s: int, minimum_s: int) -> bytes:
    return record(
        owner, SOA, ttl_s, wire("ns.example") + wire("admin.example") + struct.pack("!5I", 1, 2, 3, 4, minimum_s)
    )


def reply(
    message: bytes,
    answers: Iterable[bytes] = (),
    *,
    rcode: int = 0,
    authority: Iterable[bytes] = (),
    flags: int = 0x8180,
    query_id: int | None = None,
    question: bytes | None = None,
) -> bytes:
    """An answer to `message` as a server would write it, or wrong in the ways the arguments say."""
    query = parse_query(message)
    answers, authority = list(answers), list(authority)
    header = struct.pack(
        "!6H", query.id if query_id is None else query_id, flags | rcode, 1, len(answers), len(authority), 1
    )
    opt = struct.pack("!BHHIH", 0, OPT, 4096, 0, 0)
    return b"".join([header, query.question if question is None else question, *answers, *authority, opt])


def zone(names: dict[str, list[str]], ttl_s: int = 60) -> Script:
    """A script that knows these names and their addresses; every other name is NXDOMAIN."""

    def script(received: Received) -> Iterable[bytes]:
        query = received.query
        if query.name not in names:
            return [reply(received.message, rcode=3, authority=[soa("", 900, 900)])]
        version = {A: 4, AAAA: 6}.get(query.type)
        found = [address(query.name, text, ttl_s) for text in names[query.name] if ip_address(text).version == version]
        return [reply(received.message, found, authority=[] if found else [soa(query.name, 900, 30)])]

    return script


def unused_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
