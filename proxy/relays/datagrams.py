"""Datagrams answered from the address that was asked, whichever of this machine's it was. It reads none of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from functools import lru_cache

from proxy.original_dst import parse_address

ANCILLARY_SIZE = socket.CMSG_SPACE(20)  # struct in6_pktinfo

_IP_PKTINFO = 8  # ip(7); in `socket` only since Python 3.14
_IPV6_PKTINFO, _IPV4, _IPV6 = int(socket.IPV6_PKTINFO), int(socket.IPPROTO_IP), int(socket.IPPROTO_IPV6)
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
        if kind == _IPV6_PKTINFO and level == _IPV6:
            return _read6(content)
        if kind == _IP_PKTINFO and level == _IPV4:
            return _read4(content)
    return None, []


@lru_cache(maxsize=1024)
def _read6(content: bytes) -> tuple[str, list[Ancillary]]:
    return plain(socket.inet_ntop(socket.AF_INET6, content[:16])), [(_IPV6, _IPV6_PKTINFO, content)]


@lru_cache(maxsize=1024)
def _read4(content: bytes) -> tuple[str, list[Ancillary]]:
    # The header's address: the kernel leaves its own idea empty for what arrived before IP_PKTINFO was set.
    _, _, asked_at = _PKTINFO.unpack(content)
    return socket.inet_ntoa(asked_at), [(_IPV4, _IP_PKTINFO, _PKTINFO.pack(0, asked_at, bytes(4)))]


def plain(host: str) -> str:
    """An address as the kernel wrote it; IPv4 as IPv6 is IPv4."""
    return str(parse_address(host)) if host.startswith(_MAPPED) else host
