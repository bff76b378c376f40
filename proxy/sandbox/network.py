"""A network of one loopback device on which every address is local, and the listeners that answer for all of them.

Linux calls it AnyIP: `ip route add local default dev lo`. A listener on the wildcard address then accepts connections
to any address, and getsockname() of the accepted socket is the original destination. There is no other device.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from proxy.sandbox import closed_ports, libc

type Kind = Literal["tcp", "udp"]

type Families = tuple[socket.AddressFamily, ...]

FAMILIES: Families = (socket.AF_INET, socket.AF_INET6)
ALWAYS_TCP = frozenset({53, 80, 443})
ALWAYS_UDP = frozenset({53})
MAX_LISTENERS = 8192  # two for each port (IPv4, IPv6); beyond that start-up and kernel memory stop being small
_BACKLOG = 1024

_SIOCSIFFLAGS = 0x8914
_IFF_UP_RUNNING = 0x1 | 0x40
_RTM_NEWROUTE = 24
_REQUEST_ACK_CREATE_EXCL = 0x1 | 0x4 | 0x400 | 0x200
_RT_TABLE_LOCAL = 255
_RTPROT_BOOT = 3
_RTN_LOCAL = 2
_SCOPE = {socket.AF_INET: 254, socket.AF_INET6: 0}  # RT_SCOPE_HOST; IPv6 routes have none
_RTA_OIF = 4
_IP_PKTINFO = 8
_IPV6_FREEBIND = 78  # without it an answer from an address that lo does not carry is EINVAL
_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23
_ETH_P_ALL = 3


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports that the policy names beside 53, 80 and 443, which are always listened on."""

    tcp: frozenset[int] = frozenset()
    udp: frozenset[int] = frozenset()


def build() -> Families:
    """Make every address local to this (new) namespace, and say for which families that was possible."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING))
    _add_local_default(socket.AF_INET)
    try:
        _add_local_default(socket.AF_INET6)
    except OSError as error:
        # A kernel without IPv6, or with it switched off: then there is no way out over it either.
        if error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.ENODEV):
            raise
        return FAMILIES[:1]
    return FAMILIES


def _add_local_default(family: socket.AddressFamily) -> None:
    route = struct.pack("8BI", family, 0, 0, 0, _RT_TABLE_LOCAL, _RTPROT_BOOT, _SCOPE[family], _RTN_LOCAL, 0)
    device = struct.pack("HHI", 8, _RTA_OIF, socket.if_nametoindex("lo"))
    length = 16 + len(route) + len(device)
    header = struct.pack("IHHII", length, _RTM_NEWROUTE, _REQUEST_ACK_CREATE_EXCL, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        netlink.send(header + route + device)
        (negative,) = struct.unpack_from("i", netlink.recv(4096), 16)  # struct nlmsgerr
    if negative:
        raise OSError(-negative, os.strerror(-negative), "route")


def listeners(ports: Ports, families: Families) -> Iterator[socket.socket]:
    """One socket for each kind, port and family, in the order of `plan`."""
    for kind, family, port in plan(ports, families):
        yield _listen(kind, family, port)


def plan(ports: Ports, families: Families) -> Iterator[tuple[Kind, socket.AddressFamily, int]]:
    wanted: tuple[tuple[Kind, frozenset[int]], ...] = (("tcp", ports.tcp | ALWAYS_TCP), ("udp", ports.udp | ALWAYS_UDP))
    for kind, numbers in wanted:
        for port in sorted(numbers):
            for family in families:
                yield kind, family, port


def _listen(kind: Kind, family: socket.AddressFamily, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    if kind == "udp":
        # No SO_REUSEADDR: with it the workload could bind the same port more narrowly and hide its datagrams.
        if family == socket.AF_INET:
            listener.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    listener.bind(("0.0.0.0" if family == socket.AF_INET else "::", port))  # noqa: S104 - nothing else is on this lo
    if kind == "tcp":
        listener.listen(_BACKLOG)
    return listener


def packets() -> socket.socket:
    """A packet socket on lo that hears only the kernel's "nobody listens here" (closed_ports reads it)."""
    heard = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    heard.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)  # else each packet on lo is seen twice
    libc.attach_filter(heard.fileno(), closed_ports.PROGRAM)
    heard.bind(("lo", _ETH_P_ALL))  # only now does it hear anything
    return heard
