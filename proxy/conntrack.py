"""Connections that the kernel tracks and lets past the gate: finds them by the gate's mark, and cuts them."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from itertools import batched

from proxy.netlink import Netfilter
from proxy.ruleset import MARK
from proxy.wire.conntrack import NEW, Connection, ask_marked, delete, read_connection
from proxy.wire.netlink import MalformedNetlink

_AT_ONCE = 64  # messages in one datagram


def marked(netfilter: Netfilter) -> list[Connection]:
    """Every connection with the gate's mark. Raises OSError."""
    [sequence] = netfilter.numbers()
    found = []
    for message in netfilter.ask(ask_marked(MARK, sequence), sequence):
        if message.type != NEW:
            continue
        try:
            connection = read_connection(message.body)
        except MalformedNetlink as error:
            raise OSError(errno.EBADMSG, f"connection tracking: {error}") from error
        if connection and connection.mark & MARK == MARK:  # older kernels give them all
            found.append(connection)
    return found


def cut(netfilter: Netfilter, connections: Iterable[Connection]) -> int:
    """Have the kernel forget them, and say how many it had; their next packet is judged as one of a new connection.
    Raises OSError."""
    count = 0
    for some in batched(connections, _AT_ONCE):
        numbers = netfilter.numbers(len(some))
        requests = [delete(one, number) for one, number in zip(some, numbers, strict=True)]
        for outcome in netfilter.tell(requests, numbers):
            if outcome not in (0, errno.ENOENT):
                raise OSError(outcome, "connection tracking: an entry cannot be deleted")
            count += not outcome
    return count
