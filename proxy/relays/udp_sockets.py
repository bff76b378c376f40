"""The sockets of the UDP relay: where datagrams come in, for whom, and how answers get back. It reads no payload.

A datagram that TPROXY led here has its original destination beside it, and its answer leaves from a socket bound to
that destination. Where every address is ours (the sandbox), and at a port of the gate's own, the very socket answers.
"""

from __future__ import annotations

import socket
import struct
from collections import OrderedDict
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Protocol

from policies.hostnames import Hostname
from policies.model import Address
from proxy.original_dst import parse_address
from proxy.relays.datagrams import Ancillary, ask_for_destination, plain, read_destination

ANCILLARY_SIZE = socket.CMSG_SPACE(28)  # struct sockaddr_in6; what else may come is shorter
MAX_REPLY_SOCKETS = 1024  # a descriptor each; one that is missing is opened again

_IP_TRANSPARENT, _IP_RECVORIGDSTADDR, _IP_ORIGDSTADDR = 19, 20, 20  # linux/in.h
_IPV6_TRANSPARENT, _IPV6_RECVORIGDSTADDR, _IPV6_ORIGDSTADDR = 75, 74, 74  # linux/in6.h
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_DO = 10, 23, 2
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")
_NOBODYS = "192.0.2.1", 1  # RFC 5737; port 1 as a port that needs the capability

type SocketAddress = tuple[Any, ...]  # Any: as `socket` gives it, which differs by family
type Target = tuple[Hostname | Address, int]


class Reply(Protocol):
    """The way back to the client of one session."""

    def prepare(self) -> None:
        """Make sure of it before anything leaves. Raises OSError."""

    def send(self, datagram: memoryview) -> None:
        """Raises OSError; BlockingIOError where there is no room now."""


class Door(Protocol):
    """A socket where datagrams come in."""

    @property
    def sock(self) -> socket.socket: ...

    def close(self) -> None: ...

    def target(self, ancillary: Sequence[Ancillary]) -> Target | None:
        """Whom a datagram is for. None: the kernel does not say."""

    def reply(self, ancillary: Sequence[Ancillary], source: SocketAddress) -> Reply:
        """The way back to `source`."""


class TransparentDoor:
    """Takes what nft's TPROXY leads here. Raises OSError where the kernel does not allow it."""

    def __init__(self, sock: socket.socket) -> None:
        make_transparent(sock)
        self.sock = sock
        self._replies = ReplySockets()

    def close(self) -> None:
        self.sock.close()
        self._replies.close()

    def target(self, ancillary: Sequence[Ancillary]) -> tuple[Address, int] | None:
        for level, kind, content in ancillary:
            if (level, kind) == (socket.IPPROTO_IP, _IP_ORIGDSTADDR):
                port, packed = _SOCKADDR_IN.unpack_from(content)
                return IPv4Address(packed), port
            if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR):
                port, packed = _SOCKADDR_IN6.unpack_from(content)
                address = IPv6Address(packed)
                return address.ipv4_mapped or address, port
        return None

    def reply(self, ancillary: Sequence[Ancillary], source: SocketAddress) -> Reply:
        destination = self.target(ancillary)
        assert destination  # of a session, which has one
        host = plain(source[0])
        return _TransparentReply(self._replies, destination, (host, *source[1:]) if ":" in host else (host, source[1]))


class BoundDoor:
    """One port on which every address is ours, as in the sandbox; or of one `target`, wherever it was sent to."""

    def __init__(self, sock: socket.socket, target: Target | None = None) -> None:
        ask_for_destination(sock)
        self.sock = sock
        self._target = target
        self._port: int = sock.getsockname()[1]

    def close(self) -> None:
        self.sock.close()

    def target(self, ancillary: Sequence[Ancillary]) -> Target | None:
        if self._target is not None:
            return self._target
        address, _ = read_destination(ancillary)
        return None if address is None else (parse_address(address), self._port)

    def reply(self, ancillary: Sequence[Ancillary], source: SocketAddress) -> Reply:
        return _SameReply(self.sock, read_destination(ancillary)[1], source)


class ReplySockets:
    """Sockets bound to destinations that are not ours. The one that was used longest ago is closed first."""

    def __init__(self, most: int = MAX_REPLY_SOCKETS) -> None:
        self._most = most
        self._open: OrderedDict[tuple[Address, int], socket.socket] = OrderedDict()

    def get(self, destination: tuple[Address, int]) -> socket.socket:
        """One that sends from `destination`. Raises OSError."""
        found = self._open.get(destination)
        if found is not None:
            self._open.move_to_end(destination)
            return found
        sock = self._open[destination] = _open_transparent(destination)
        if len(self._open) > self._most:
            self._open.popitem(last=False)[1].close()
        return sock

    def close(self) -> None:
        for sock in self._open.values():
            sock.close()
        self._open.clear()


class _TransparentReply:
    __slots__ = ("_client", "_destination", "_sockets")

    def __init__(self, sockets: ReplySockets, destination: tuple[Address, int], client: SocketAddress) -> None:
        self._sockets = sockets
        self._destination = destination
        self._client = client

    def prepare(self) -> None:
        self._sockets.get(self._destination)

    def send(self, datagram: memoryview) -> None:
        self._sockets.get(self._destination).sendto(datagram, self._client)


class _SameReply:
    __slots__ = ("_client", "_origin", "_sock")

    def __init__(self, sock: socket.socket, origin: list[Ancillary], client: SocketAddress) -> None:
        self._sock = sock
        self._origin = origin
        self._client = client

    def prepare(self) -> None:
        pass  # the socket that it came to

    def send(self, datagram: memoryview) -> None:
        self._sock.sendmsg([datagram], self._origin, 0, self._client)


def parse_target(text: str) -> Target:
    """`NAME-or-ADDR:PORT`, as the configuration has it once it was read."""
    host, _, port = text.rpartition(":")
    try:
        return ip_address(host.strip("[]")), int(port)
    except ValueError:
        return Hostname(host), int(port)


def make_transparent(sock: socket.socket) -> None:
    """Have `sock` take datagrams for any address, and learn which. Raises PermissionError without CAP_NET_RAW."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    sock.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)  # of IPv6 too: it may take both


def try_transparent() -> None:
    """Raises PermissionError where answers could not be sent from the address and port that a workload asked."""
    _open_transparent((IPv4Address(_NOBODYS[0]), _NOBODYS[1])).close()


def _open_transparent(address: tuple[Address, int]) -> socket.socket:
    family, level, option = (
        (socket.AF_INET, socket.IPPROTO_IP, _IP_TRANSPARENT)
        if address[0].version == 4
        else (socket.AF_INET6, socket.IPPROTO_IPV6, _IPV6_TRANSPARENT)
    )
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(level, option, 1)
        sock.bind((str(address[0]), address[1]))
    except OSError:
        sock.close()
        raise
    return sock


def connect(address: Address, port: int, *, keeps_whole: bool) -> socket.socket:
    """A socket to which only that peer's datagrams come. Raises OSError.

    keeps_whole  what does not fit the path is not fragmented (QUIC: RFC 9000 14)
    """
    is_v4 = address.version == 4
    sock = socket.socket(socket.AF_INET if is_v4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if keeps_whole:
            level, option = (
                (socket.IPPROTO_IP, _IP_MTU_DISCOVER) if is_v4 else (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER)
            )
            sock.setsockopt(level, option, _PMTUDISC_DO)
        sock.connect((str(address), port))
        _empty(sock)
    except OSError:
        sock.close()
        raise
    return sock


def _empty(sock: socket.socket) -> None:
    """The kernel gives a socket its port before its peer: what came between is anybody's."""
    while True:
        try:
            sock.recv(1)
        except BlockingIOError:
            return
