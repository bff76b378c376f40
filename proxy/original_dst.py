"""Where an accepted connection was going before it was led to the gate. It asks the kernel and decides nothing."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from policies.model import Address

type Destination = tuple[Address, int]
type OriginalDst = Callable[[socket.socket], Destination | None]

_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and IP6T_SO_ORIGINAL_DST in netfilter_ipv6/ip6_tables.h
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")


def redirected_dst(sock: socket.socket) -> Destination | None:
    """The destination of a connection that nft REDIRECT led here. None: it was made to the gate's own address.

    Without that check anyone who reaches the gate's port has an open proxy, and the gate could dial itself for ever.
    """
    try:
        found = _original_dst(sock)
    except OSError:  # connection tracking does not know it, so nothing redirected it
        return None
    return None if found == local_dst(sock) else found


def local_dst(sock: socket.socket) -> Destination:
    """The destination where packets arrive unchanged: the sandbox's any-address route, TPROXY."""
    host, port = sock.getsockname()[:2]
    return parse_address(host), port


def _original_dst(sock: socket.socket) -> Destination:
    """What connection tracking has. Raises OSError when it has nothing."""
    if sock.family == socket.AF_INET6 and "." not in sock.getsockname()[0]:
        port, packed = _SOCKADDR_IN6.unpack(sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, _SOCKADDR_IN6.size))
        return IPv6Address(packed), port
    port, packed = _SOCKADDR_IN.unpack(sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, _SOCKADDR_IN.size))
    return IPv4Address(packed), port


@lru_cache(maxsize=4096)
def parse_address(text: str) -> Address:
    """The address the kernel wrote as `text`, without a zone; IPv4 as IPv6 (`::ffff:a.b.c.d`, dual stack) is IPv4."""
    address = ip_address(text.partition("%")[0])
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
