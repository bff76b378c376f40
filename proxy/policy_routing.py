"""The route that delivers marked packets to this machine, whatever their destination: what TPROXY needs. By netlink."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable

from proxy.ruleset import GATE_TABLE, MARK

# linux/netlink.h, linux/rtnetlink.h, linux/fib_rules.h
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, prefix lengths, tos, table, protocol, scope, type, flags
_RULE = struct.Struct("=BBBBBBBBI")  # family, prefix lengths, tos, table, -, -, action, flags
_NEWROUTE, _DELROUTE, _GETROUTE, _NEWRULE, _DELRULE = 24, 25, 26, 32, 33
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_DST, _OIF, _TABLE, _MARK = 1, 4, 15, 16
_FRA_PRIORITY, _FRA_MARK, _FRA_TABLE, _FRA_MASK = 6, 10, 15, 16
_PRIORITY = GATE_TABLE  # before the main table; without one the kernel takes the same rule twice
_LOCAL, _BOOT, _TO_TABLE = 2, 3, 1
_SCOPE = {socket.AF_INET: 254, socket.AF_INET6: 0}  # RT_SCOPE_HOST; IPv6 routes have none
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # nobody's, RFC 5737 and RFC 3849
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES, errno.ENODEV)  # IPv6 switched off: nothing to lead
_ABSENT = (errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENODEV)
_MAX_REPLY = 4096
_PATIENCE_S = 5.0  # the kernel answers within the call


def add_routing() -> Callable[[], None]:
    """Have marked packets delivered here, and give what undoes what was added. Raises OSError, having added nothing."""
    undo: list[tuple[int, bytes]] = []

    def take_back() -> None:
        while undo:
            _ask(*undo.pop(), accepting=_ABSENT)

    try:
        for family in _SCOPE:
            for new, old, body in ((_NEWROUTE, _DELROUTE, _route(family)), (_NEWRULE, _DELRULE, _rule(family))):
                if _ask(new, body, _CREATE | _EXCL, accepting=(errno.EEXIST, *_NO_FAMILY)):
                    undo.append((old, body))
    except OSError:
        take_back()
        raise
    return take_back


def remove_routing() -> bool:
    """Take it away, if it is there, and say whether it was. Raises OSError."""
    found = [
        _ask(kind, body, accepting=_ABSENT)
        for family in _SCOPE
        for kind, body in ((_DELRULE, _rule(family)), (_DELROUTE, _route(family)))
    ]
    return any(found)


def is_routed() -> bool:
    """Whether a marked packet to an address of somebody else would be delivered here, in each family there is."""
    return all(map(_is_routed, _SCOPE))


def _is_routed(family: int) -> bool:
    packed = socket.inet_pton(family, _ELSEWHERE[socket.AddressFamily(family)])
    head = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
    body = head + _attribute(_DST, packed) + _attribute(_MARK, struct.pack("=I", MARK))
    try:
        reply = _exchange(_GETROUTE, body, _REQUEST)
    except OSError as error:
        return error.errno in _NO_FAMILY
    return bool(_ROUTE.unpack_from(reply, _HEADER.size)[7] == _LOCAL)


def _rule(family: int) -> bytes:
    head = _RULE.pack(family, 0, 0, 0, 0, 0, 0, _TO_TABLE, 0)
    words = ((_FRA_PRIORITY, _PRIORITY), (_FRA_MARK, MARK), (_FRA_MASK, MARK), (_FRA_TABLE, GATE_TABLE))
    return head + b"".join(_attribute(kind, struct.pack("=I", value)) for kind, value in words)


def _route(family: int) -> bytes:
    head = _ROUTE.pack(family, 0, 0, 0, 0, _BOOT, _SCOPE[socket.AddressFamily(family)], _LOCAL, 0)
    words = ((_TABLE, GATE_TABLE), (_OIF, socket.if_nametoindex("lo")))
    return head + b"".join(_attribute(kind, struct.pack("=I", value)) for kind, value in words)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value


def _ask(kind: int, body: bytes, flags: int = 0, *, accepting: tuple[int, ...]) -> bool:
    """Whether the kernel did it; False where it says one of `accepting`. Raises OSError for everything else."""
    try:
        _exchange(kind, body, _REQUEST | _ACK | flags)
    except OSError as error:
        if error.errno in accepting:
            return False
        raise
    return True


def _exchange(kind: int, body: bytes, flags: int) -> bytes:
    """The kernel's reply. Raises OSError for the error in it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(_PATIENCE_S)
        sock.sendto(_HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body, (0, 0))
        reply = sock.recv(_MAX_REPLY)
    if _HEADER.unpack_from(reply)[1] == 2:  # NLMSG_ERROR, also with the number 0
        (negative,) = struct.unpack_from("=i", reply, _HEADER.size)
        if negative:
            raise OSError(-negative, os.strerror(-negative), "netlink")
    return reply
