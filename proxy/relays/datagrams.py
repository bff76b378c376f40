"""Datagrams answered from the address that was asked, whichever of this machine's it was. It reads none of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from proxy.original_dst import parse_address

ANCILLARY_SIZE = socket.CMSG_SPACE(20)  # struct in6_pktinfo

_IP_PKTINFO = 8  # ip(7); in `socket` only since Python 3.14
_PKTINFO = struct.Struct("=I4s4s")  # interface, local address, address in the header
_MAPPED = "::ffff:"  # IPv4 on a socket that takes both

type Ancillary = tuple[int, int, bytes]


def ask_for_destination(sock: socket.socket) -> None:
    """Have the kernel say with each datagram which address it was sent to."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def read_destination(ancillary: Sequence[Ancillary]) -> tuple[str | None, list[Ancillary]]:
    """The address that was asked, and what sends a reply from it: a stub drops an answer from any other."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return plain(socket.inet_ntop(socket.AF_INET6, content[:16])), [(level, kind, content)]
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            # The header's address: the kernel leaves its own idea empty for what arrived before IP_PKTINFO was set.
            _, _, asked_at = _PKTINFO.unpack(content)
            return socket.inet_ntoa(asked_at), [(level, kind, _PKTINFO.pack(0, asked_at, bytes(4)))]
    return None, []


def plain(host: str) -> str:
    """An address as the kernel wrote it; IPv4 as IPv6 is IPv4."""
    return str(parse_address(host)) if host.startswith(_MAPPED) else host
