"""Entries of connection tracking, to and from netlink (linux/netfilter/nfnetlink_conntrack.h). It asks no kernel."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from policies.addresses import Address
from proxy.wire.netlink import (
    ACK,
    DUMP,
    REQUEST,
    MalformedNetlink,
    attribute,
    attributes,
    nested,
    netfilter_body,
    netfilter_message,
)

NEW = 0x0100  # the type of an entry in a dump: subsystem 1, command 0
_SUBSYSTEM = 1
_GET, _DELETE = 1, 2
_TUPLE, _MARK, _ID, _ZONE, _MARK_MASK = 1, 8, 12, 18, 21
_IP, _PROTO = 1, 2
_IP_ATTRIBUTES = {2: (1, 2, 4), 10: (3, 4, 16)}  # AF_INET and AF_INET6: source, destination, length of an address
_PROTO_NUM, _PORT_FROM, _PORT_TO = 1, 2, 3
_FAMILIES = {4: 2, 6: 10}
_ALL_FAMILIES = 0


@dataclass(frozen=True, slots=True)
class Connection:
    """An entry as its first packet was: before any translation of addresses. `id` is the kernel's, while it lives."""

    source: Address
    source_port: int
    destination: Address
    port: int
    protocol: int
    mark: int
    id: int
    zone: int = 0


def ask_marked(mark: int, sequence: int) -> bytes:
    """A dump of the entries, of both families, that have every bit of `mark`."""
    wanted = attribute(_MARK, mark.to_bytes(4)) + attribute(_MARK_MASK, mark.to_bytes(4))
    return netfilter_message(_SUBSYSTEM, _GET, REQUEST | DUMP, sequence, _ALL_FAMILIES, wanted)


def delete(connection: Connection, sequence: int) -> bytes:
    """That very entry; one that took its place since has another id."""
    family = _FAMILIES[connection.source.version]
    source, destination, _ = _IP_ATTRIBUTES[family]
    addresses = attribute(source, connection.source.packed) + attribute(destination, connection.destination.packed)
    ports = attribute(_PORT_FROM, struct.pack("!H", connection.source_port))
    ports += attribute(_PORT_TO, struct.pack("!H", connection.port))
    proto = attribute(_PROTO_NUM, bytes([connection.protocol])) + ports
    entry = nested(_TUPLE, nested(_IP, addresses) + nested(_PROTO, proto)) + attribute(_ID, connection.id.to_bytes(4))
    if connection.zone:
        entry += attribute(_ZONE, connection.zone.to_bytes(2))
    return netfilter_message(_SUBSYSTEM, _DELETE, REQUEST | ACK, sequence, family, entry)


def read_connection(body: bytes) -> Connection | None:
    """The entry in a message of a dump; None for one without ports (ICMP, GRE). Raises MalformedNetlink."""
    family, rest = netfilter_body(body)
    found = attributes(rest)
    tuple_ = attributes(_required(found, _TUPLE))
    protocol = attributes(_required(tuple_, _PROTO))
    if family not in _IP_ATTRIBUTES or _PORT_TO not in protocol or _PORT_FROM not in protocol:
        return None
    source, destination, length = _IP_ATTRIBUTES[family]
    addresses = attributes(_required(tuple_, _IP))
    return Connection(
        source=_address(addresses, source, length),
        source_port=_number(protocol, _PORT_FROM, 2),
        destination=_address(addresses, destination, length),
        port=_number(protocol, _PORT_TO, 2),
        protocol=_number(protocol, _PROTO_NUM, 1),
        mark=_number(found, _MARK, 4) if _MARK in found else 0,
        id=_number(found, _ID, 4),
        zone=_number(found, _ZONE, 2) if _ZONE in found else 0,
    )


def _address(found: Mapping[int, bytes], kind: int, length: int) -> Address:
    packed = _sized(found, kind, length)
    return IPv4Address(packed) if length == 4 else IPv6Address(packed)


def _number(found: Mapping[int, bytes], kind: int, length: int) -> int:
    return int.from_bytes(_sized(found, kind, length))


def _sized(found: Mapping[int, bytes], kind: int, length: int) -> bytes:
    value = _required(found, kind)
    if len(value) != length:
        raise MalformedNetlink(f"attribute {kind} of {len(value)} bytes, not {length}")
    return value


def _required(found: Mapping[int, bytes], kind: int) -> bytes:
    if kind not in found:
        raise MalformedNetlink(f"attribute {kind} is missing")
    return found[kind]
