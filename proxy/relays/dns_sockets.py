"""The sockets of the DNS relay: datagrams sent, connections accepted. It reads no DNS."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence

from proxy.record import Peer
from proxy.relays.datagrams import Ancillary, plain

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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
