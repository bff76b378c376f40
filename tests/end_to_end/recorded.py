"""An internet at the end of one wire, and every packet on that wire as facts: what it is, and where it goes.

What may be there is derived from a policy. Which packets those are in a test, the test says.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from policies.hostnames import Hostname
from policies.index import Policy
from policies.model import HostRule, NameRule, Stage, TransportRule
from proxy.wire import dns, ntp, quic
from proxy.wire.client_hello import MalformedHello, parse_hello
from tests.end_to_end.inside_origin import MARKER
from tests.end_to_end.namespaces import Namespaces
from tests.end_to_end.service import WAIT_S
from tests.end_to_end.world import CHECKOUT

_IPV4, _IPV6, _ARP, _ALL = 0x0800, 0x86DD, 0x0806, 0x0003  # linux/if_ether.h
_SOL_PACKET, _PACKET_STATISTICS, _SO_RCVBUFFORCE = 263, 6, 33
_SYN, _RST, _ACK = 2, 4, 16
_NEIGHBOURS = {133, 135, 136, 143}  # router and neighbour solicitations, advertisements, multicast listening
_ON_LINK = ("ff02:", "fe80:", "fd77:2:")
_UNREACHABLE = {4: (3, 3), 6: (1, 4)}  # ICMP's "port unreachable": nobody hears that answer any more

type Fact = tuple[str | int, ...]


@dataclass
class Stream:
    """One direction of a TCP connection, out."""

    address: str
    port: int
    pieces: dict[int, bytes] = field(default_factory=dict)  # by their place in it
    start: int = 0

    def said(self) -> bytes:
        """What was sent, as far as there is no gap."""
        whole = b""
        while len(whole) in self.pieces:
            whole += self.pieces[len(whole)]
        return whole

    def fact(self) -> Fact:
        return "tcp", self.address, self.port, _protocol(self.said())


def _protocol(said: bytes) -> str:
    if not said:
        return "nothing"
    if said[0] == 0x16:
        try:
            hello = parse_hello(said)
        except MalformedHello:
            return "malformed hello"
        return f"tls {hello.sni}" if hello else "part of a hello"
    if found := re.match(rb"[A-Z]+ \S+ HTTP/1\.1\r\n(?s:.*)\r\nHost: ([^\r]+)\r\n", said):
        return f"http {found[1].decode()}"
    return "opaque"


class Recorder:
    """Every packet that comes in by a device, whatever its protocol, from the first to the last."""

    def __init__(self, net: Namespaces, machine: str, device: str, near: Sequence[str]) -> None:
        """`near` are the addresses from which the gate, and nobody else, sends."""
        self._near = set(near)
        self._packets: list[tuple[int, bytes]] = []  # each with its ethertype
        self._marked = threading.Event()
        self._sock = net.open_socket(machine, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL))
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._sock.bind((device, _ALL))
        self._lost = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            packet, (_, kind, direction, *_) = self._sock.recvfrom(1 << 17)
            if direction == socket.PACKET_OUTGOING:
                continue
            if kind == _IPV4 and packet[16:20] == socket.inet_aton(MARKER[0]):
                self._marked.set()
                if packet[28:] == b"end":
                    return
            else:
                self._packets.append((kind, packet))

    def mark(self, net: Namespaces, machine: str, word: bytes = b"") -> int:
        """How many packets have come that were sent before this call."""
        self._marked.clear()
        with net.open_socket(machine, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(word, MARKER)
        assert self._marked.wait(WAIT_S), "no marker came"
        _, lost = struct.unpack("II", self._sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert not lost, f"{lost} packets were not seen"
        return len(self._packets)

    def close(self, net: Namespaces, machine: str) -> None:
        self.mark(net, machine, b"end")
        self._thread.join(WAIT_S)
        self._sock.close()

    # --- as facts

    def facts(self, first: int = 0, last: int | None = None) -> set[Fact]:
        """What these packets are. A connection that was begun before is known."""
        streams: dict[tuple[str, int, str, int], Stream] = {}
        found: set[Fact] = set()
        touched = []
        for place, (kind, packet) in enumerate(self._packets[:last]):
            is_new = place >= first
            if kind not in (_IPV4, _IPV6):
                if is_new and kind != _ARP:
                    found.add(("ethertype", kind))
                continue
            one = read(packet)
            if one.protocol == socket.IPPROTO_TCP and not one.odd:
                stream = _follow(streams, one)
                if is_new and stream is None:
                    found.add(("stray tcp", one.target, *struct.unpack_from("!H", one.body, 2)))
                elif is_new and stream:
                    touched.append(stream)
            elif is_new:
                found |= one.facts()
            if is_new and one.source not in self._near and not one.is_housekeeping:
                found.add(("source", one.source))
        return found | {stream.fact() for stream in touched}

    def datagrams_to(self, port: int, first: int = 0) -> list[bytes]:
        packets = (read(packet) for kind, packet in self._packets[first:] if kind in (_IPV4, _IPV6))
        return [one.body[8:] for one in packets if one.is_udp_to(port)]

    def tags(self, nonce: bytes, first: int = 0) -> dict[int, Fact]:
        """The numbers behind a nonce, as bytes or in hex, and where the first packet with each went."""
        pattern = re.compile(
            re.escape(nonce) + rb"([\s\S]{2})|" + re.escape(nonce.hex().encode()) + rb"([0-9a-f]{4})", re.IGNORECASE
        )
        found: dict[int, Fact] = {}
        for kind, packet in self._packets[first:]:
            for raw, text in pattern.findall(packet):
                where = read(packet) if kind in (_IPV4, _IPV6) else None
                number = int.from_bytes(raw) if raw else int(text, 16)
                found.setdefault(number, (where.protocol, where.target) if where else ("ethertype", kind))
        return found


def _follow(streams: dict[tuple[str, int, str, int], Stream], one: Packet) -> Stream | None:
    """The connection that a segment belongs to. None: it belongs to none that was opened from here."""
    source_port, port, sequence = struct.unpack_from("!HHI", one.body)
    flags, length = one.body[13], (one.body[12] >> 4) * 4
    ends = one.source, source_port, one.target, port
    said = one.body[length:]
    if flags & (_SYN | _ACK) == _SYN:
        known = streams.get(ends)
        if known is None or known.start != sequence + 1:
            streams[ends] = Stream(one.target, port, start=sequence + 1)
        if said:
            streams[ends].pieces[0] = b"\0in the first segment\0" + said
    elif ends not in streams:
        return None
    elif said:
        streams[ends].pieces.setdefault((sequence - streams[ends].start) % (1 << 32), said)
    return streams[ends]


@dataclass(frozen=True, slots=True)
class Packet:
    """An IP packet. `odd`: with options or extension headers, or a fragment."""

    version: int
    source: str
    target: str
    protocol: int
    body: bytes
    odd: bool

    @property
    def is_housekeeping(self) -> bool:
        """Of the link between the two machines: who is there, and who listens to which group."""
        if self.version != 6 or not (self.target.startswith(_ON_LINK) or self.source.startswith("fe80:")):
            return False
        return self.protocol == 0 or (self.protocol == 58 and self.body[0] in _NEIGHBOURS)

    def is_udp_to(self, port: int) -> bool:
        return self.protocol == socket.IPPROTO_UDP and self.body[2:4] == port.to_bytes(2)

    def facts(self) -> set[Fact]:
        if self.is_housekeeping:
            return set()
        if self.odd:
            return {("odd", self.protocol, self.target)}
        if self.protocol == socket.IPPROTO_UDP:
            return {("udp", self.target, *struct.unpack_from("!H", self.body, 2), self._datagram())}
        if self.protocol in (1, 58):
            if tuple(self.body[:2]) == _UNREACHABLE[self.version]:
                return {("unheard", self.target)}
            return {("icmp", self.target, self.body[0])}
        return {("protocol", self.protocol, self.target)}

    def _datagram(self) -> str:
        said = self.body[8:]
        match int.from_bytes(self.body[2:4]):
            case 53:
                return f"dns {_question(said)}"
            case 123:
                return "ntp" if len(said) == ntp.SIZE and said[:40] == ntp.build_query(0)[:40] else "ntp, not ours"
            case 443:
                try:
                    hello = quic.InitialReader().feed(said)
                except quic.MalformedInitial:
                    return "opaque"
                return f"quic {hello.sni}" if hello else "part of a hello"
        return "opaque"


def _question(message: bytes) -> str:
    """Name and type of a question that is to the bit as we ask it."""
    try:
        query = dns.parse_query(message)
    except dns.MalformedQuery:
        return "malformed"
    if message[2:] != dns.build_query(Hostname(query.name), query.type, 0)[2:]:
        return "not ours"
    return f"{query.name} {query.type_text}"


def read(packet: bytes) -> Packet:
    if packet[0] >> 4 == 4:
        length, fragment = (packet[0] & 15) * 4, int.from_bytes(packet[6:8]) & 0x3FFF
        source, target = (socket.inet_ntop(socket.AF_INET, packet[at : at + 4]) for at in (12, 16))
        whole = packet[: int.from_bytes(packet[2:4]) or None]
        return Packet(4, source, target, packet[9], whole[length:], odd=bool(fragment) or length > 20)
    source, target = (socket.inet_ntop(socket.AF_INET6, packet[at : at + 16]) for at in (8, 24))
    whole = packet[: 40 + int.from_bytes(packet[4:6])] if packet[4:6] != b"\0\0" else packet
    return Packet(6, source, target, packet[6], whole[40:], odd=packet[6] in (0, 43, 44, 51, 60, 135, 139, 140))


# --- what a policy allows


def allowed_by(
    policy: Policy, zone: Mapping[str, Sequence[str]], nameserver: str, workloads: Sequence[str]
) -> set[Fact]:
    """Each fact that may be on the wire, if every rule of these workloads is used; below a wildcard `*` is any name."""
    found: set[Fact] = set()
    for rule in (rule for name in workloads for rule in policy.workloads[name].rules):
        names = [_written(rule)] if isinstance(rule, HostRule | NameRule) else [rule.host] if rule.host else []
        found |= {("udp", nameserver, 53, f"dns {name} {kind}") for name in names for kind in ("A", "AAAA", "HTTPS")}
        addresses = [one for name in names for one in zone.get(name, ())]
        if isinstance(rule, TransportRule):
            addresses += [str(network.network_address) for network in rule.networks]
        for address in addresses:
            found |= {_carried(rule, str(ip_address(address)), port, names) for port in _ports(rule)}
    return found


def _written(rule: HostRule | NameRule) -> str:
    return f"*.{rule.pattern.host}" if rule.pattern.wildcard else rule.pattern.host


def _ports(rule: HostRule | NameRule | TransportRule) -> Iterator[int]:
    if isinstance(rule, NameRule):
        yield from [ntp.PORT] if rule.stage is Stage.NTP else []
    else:
        for ports in rule.ports:
            yield from range(ports.first, ports.last + 1)


def _carried(rule: HostRule | NameRule | TransportRule, address: str, port: int, names: Sequence[str]) -> Fact:
    if isinstance(rule, HostRule):
        return "tcp", address, port, f"tls {names[0]}"
    if isinstance(rule, NameRule):
        return "udp", address, port, "ntp"
    return rule.stage.value, address, port, f"quic {names[0]}" if rule.quic else "opaque"


# --- the machine


class Internet:
    """The servers of `inside_recorded` on the machine `internet`."""

    def __init__(self, net: Namespaces, directory: Path, zone: Mapping[str, Sequence[str]]) -> None:
        words = [sys.executable, "-m", "tests.end_to_end.inside_recorded", str(directory), json.dumps(zone)]
        self._process = subprocess.Popen(
            net.inside("internet", words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
        )
        assert self._line() == "ready\n"

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def requests(self) -> list[dict[str, Any]]:  # JSON of origin.Request
        """All that were read, from the first."""
        assert self._process.stdin
        self._process.stdin.write("look\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] = json.loads(self._line())
        return found

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()
        self._process.kill()
        self._process.wait(WAIT_S)


@contextmanager
def internet(net: Namespaces, directory: Path, zone: Mapping[str, Sequence[str]]) -> Iterator[Internet]:
    made = Internet(net, directory, zone)
    try:
        yield made
    finally:
        made.close()
