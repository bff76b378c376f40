"""The sockets of the DNS relay: datagrams answered from the address that was asked; connections. It reads no DNS."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Sequence

from proxy.original_dst import parse_address
from proxy.record import Peer

ANCILLARY_SIZE = socket.CMSG_SPACE(20)  # struct in6_pktinfo

_IP_PKTINFO = 8  # ip(7); in `socket` only since Python 3.14
_PKTINFO = struct.Struct("=I4s4s")  # interface, local address, address in the header
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
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


def plain_peer(address: Sequence[object]) -> Peer:
    """Host and port of a socket's address."""
    host, port = address[:2]
    assert isinstance(host, str)
    assert isinstance(port, int)
    return plain(host), port


def send(sock: socket.socket, to: Peer, origin: list[Ancillary], message: bytes) -> None:
    """Send it, or lose it: no room, no way back. The client asks again, as after any lost datagram."""
    try:
        sock.sendmsg([message], origin, 0, to)
    except OSError:
        return


async def accept(listener: socket.socket) -> socket.socket:
    """The next connection. Raises OSError if the listener is broken; that there is no descriptor now passes."""
    while True:
        await asyncio.sleep(0)  # while connections wait, accepting never pauses by itself
        try:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        except ConnectionAbortedError:
            continue
        except OSError as error:
            if error.errno not in _FULL:
                raise
            await asyncio.sleep(0.1)  # no descriptor or memory now; waiting connections keep
        else:
            return sock
