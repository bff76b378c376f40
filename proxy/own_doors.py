"""Which addresses are the gate's own, so that it never dials itself. It asks the kernel's routes, and opens none."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address

from policies.model import Address
from proxy.original_dst import parse_address

# linux/netlink.h and linux/rtnetlink.h
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, prefix length, ..., type of the route, flags
_ATTRIBUTE = struct.Struct("=HH")
_GETROUTE, _NEWROUTE, _REQUEST = 26, 24, 1
_DESTINATION = 1
_LOCAL = 2
_MAX_REPLY = 4096
_PATIENCE_S = 1.0  # the kernel answers within the call; this is for one that does not


class OwnDoors:
    """The addresses and ports that a gate listens on. A wildcard stands for every address of this machine."""

    def __init__(self, doors: Iterable[tuple[str, int]], *, is_local: Callable[[Address], bool] | None = None) -> None:
        self._is_local = is_local or is_local_address
        self._bound: dict[int, set[Address]] = {}
        for host, port in doors:
            self._bound.setdefault(port, set()).add(parse_address(host))

    def holds(self, address: Address, port: int) -> bool:
        """Whether a connection to it would come back to this gate. Only for a port of ours is anything looked up."""
        bound = self._bound.get(port)
        if bound is None:
            return False
        address = _unmapped(address)
        if address in bound or address.is_unspecified:
            return True
        return any(door.is_unspecified for door in bound) and self._is_local(address)


def is_local_address(address: Address) -> bool:
    """Whether packets to it stay on this machine, as its routes say. True where the kernel does not tell."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    packed = address.packed
    route = _ROUTE.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    body = route + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _DESTINATION) + packed
    request = _HEADER.pack(_HEADER.size + len(body), _GETROUTE, _REQUEST, 1, 0) + body
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
            sock.settimeout(_PATIENCE_S)
            sock.sendto(request, (0, 0))
            reply = sock.recv(_MAX_REPLY)
    except OSError:
        return True
    if _HEADER.unpack_from(reply)[1] != _NEWROUTE:  # an error: there is no way there at all
        return False
    return bool(_ROUTE.unpack_from(reply, _HEADER.size)[7] == _LOCAL)


def _unmapped(address: Address) -> Address:
    """To the kernel `::ffff:a.b.c.d` is the IPv4 address."""
    mapped: IPv4Address | None = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
