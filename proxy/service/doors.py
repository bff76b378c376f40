"""Listening sockets of a service: one for each worker on every port, bound before anything that could fail later.

Who accepts on them is not known here. The supervisor keeps every one of them open, so that what waits in the backlog of
a worker that died waits for the next one instead of being reset.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from proxy.config import Config, Door, DoorKind, SocketAddress
from proxy.config.keys import BY_PATH
from proxy.record import show_peer
from proxy.relays.udp_sockets import try_transparent

BACKLOG = 4096
PORTS_TRIED = 16
TAP_MODE = 0o660  # who writes there says which addresses names have: the group of the name server, and nobody else


class DoorTaken(Exception):
    """A door cannot be opened. `str()` names the setting, the address and why."""


@dataclass(frozen=True, slots=True)
class OpenDoor:
    """One port. `sockets` has one for each worker; the kernel spreads connections, and datagrams, over them.

    Where UDP is carried there is one for the first worker alone: what a budget counts must be in one place.
    """

    kind: DoorKind
    sockets: tuple[socket.socket, ...]
    target: str = ""  # whom datagrams are for that are forwarded

    @property
    def address(self) -> SocketAddress:
        host, port = self.sockets[0].getsockname()[:2]
        return host, port

    @property
    def shown(self) -> str:
        """Where it is, to people."""
        if self.sockets[0].family == socket.AF_UNIX:
            return str(self.sockets[0].getsockname())
        return show_peer(self.address)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


def open_doors(config: Config) -> tuple[OpenDoor, ...]:
    """Every door of `config`, listening. Raises DoorTaken; none is open then."""
    doors = config.doors(has_ipv6=has_ipv6())
    opened: list[OpenDoor] = []
    for door in doors:
        try:
            for sockets in _open(door, config.workers, takes_ipv4=_takes_ipv4(door, doors)):
                opened.append(OpenDoor(door.kind, sockets, door.target))
        except OSError as error:
            for other in opened:
                other.close()
            where = f"{BY_PATH[door.kind].flag} {show_peer(door.address)}"
            raise DoorTaken(f"{where}: {error.strerror or error}{_repair(door, error)}") from error
    if config.dnstap_listen:
        try:
            opened.append(OpenDoor(DoorKind.DNSTAP, open_tap(config.dnstap_listen, config.workers)))
        except OSError as error:
            for other in opened:
                other.close()
            flag = BY_PATH[DoorKind.DNSTAP].flag
            repair = "; make its directory first" if error.errno == errno.ENOENT else ""
            raise DoorTaken(f"{flag} {config.dnstap_listen}: {error.strerror or error}{repair}") from error
    return tuple(opened)


def open_tap(path: str, count: int = 1) -> tuple[socket.socket, ...]:
    """`count` descriptors of one listening unix socket, in place of one that nobody listens on. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        os.chmod(path, TAP_MODE)
        sock.listen(BACKLOG)  # not before its mode is right: until here nobody could connect
        return sock, *(sock.dup() for _ in range(count - 1))
    except OSError:
        sock.close()
        raise


def _is_stale(path: str) -> bool:
    """Whether a socket is there that was left behind: what is no socket is somebody's file."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _open(door: Door, count: int, *, takes_ipv4: bool) -> Iterator[tuple[socket.socket, ...]]:
    """The sockets of a door; of one for DNS those for TCP, then those for UDP on the same port. Raises OSError."""
    if not door.kind.is_stream:
        if door.kind is DoorKind.UDP:
            try_transparent()
        yield open_sockets(door.address, takes_ipv4=takes_ipv4, kind=socket.SOCK_DGRAM)
        return
    for tries_left in range(PORTS_TRIED, 0, -1):
        streams = open_sockets(door.address, count, takes_ipv4=takes_ipv4)
        if door.kind is not DoorKind.DNS:
            yield streams
            return
        address = (door.address[0], streams[0].getsockname()[1])
        try:
            datagrams = open_sockets(address, count, takes_ipv4=takes_ipv4, kind=socket.SOCK_DGRAM)
        except OSError:
            for sock in streams:
                sock.close()
            if door.address[1] or tries_left == 1:  # the port that was asked for; a free one may be taken for UDP alone
                raise
        else:
            yield from (streams, datagrams)
            return


def _repair(door: Door, error: OSError) -> str:
    if door.kind is DoorKind.UDP and isinstance(error, PermissionError):
        return "; answers leave from the address that was asked: give the gate CAP_NET_RAW and CAP_NET_BIND_SERVICE"
    if isinstance(error, PermissionError) and door.address[1] < 1024:
        return "; a port below 1024 needs CAP_NET_BIND_SERVICE"
    return ""


def open_sockets(
    address: SocketAddress,
    count: int = 1,
    *,
    takes_ipv4: bool = False,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> tuple[socket.socket, ...]:
    """`count` listening sockets on one address. Raises OSError, also where another program listens there.

    SO_REUSEPORT would share the port with any program of the same user that asks for it too: another gate, started by
    mistake, would silently take half of the connections. So the first socket is bound, and listens, without it.
    """
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            where = sockets[0].getsockname() if sockets else address
            sock = _bind(where, kind, shares=bool(sockets), takes_ipv4=takes_ipv4)
            sockets.append(sock)
            if kind == socket.SOCK_STREAM:
                sock.listen(BACKLOG)
            if count > 1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return tuple(sockets)


def _bind(address: tuple[str, int], kind: socket.SocketKind, *, shares: bool, takes_ipv4: bool) -> socket.socket:
    is_ipv4 = ip_address(address[0].partition("%")[0]).version == 4
    sock = socket.socket(socket.AF_INET if is_ipv4 else socket.AF_INET6, kind)
    try:
        if kind == socket.SOCK_STREAM:  # connections of before are in TIME_WAIT; for UDP it would let others in
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        if not is_ipv4:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not takes_ipv4)
        if shares:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _takes_ipv4(door: Door, doors: tuple[Door, ...]) -> bool:
    """[::] takes IPv4 too, as with every other server that is told so; not where 0.0.0.0 has a door of its own."""
    host, port = door.address
    return host == "::" and all(other.address != ("0.0.0.0", port) for other in doors)  # noqa: S104 - compared


def has_ipv6() -> bool:
    """Whether this host has it at all: the kernel may be without, or every interface."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True
