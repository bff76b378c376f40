"""Messages between two processes over a SOCK_SEQPACKET socket, each with at most one descriptor. It reads none.

Nothing here blocks: what the peer does not take is queued, and whoever queues looks at the length.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

MAX_MESSAGE = 128 * 1024  # below the smallest usual send buffer; a packet is sent whole or not at all
MAX_TURN = 64  # messages read before the loop gets its turn


class Carried(Protocol):
    """What goes along with a message: a socket or a file. The channel closes it once it is sent."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Channel:
    """One end. Runs on the current loop.

    received  one message, and the descriptor that came with it (its owner from then on) or None; None also where
              this process has no room for another descriptor
    closed    the other end is gone; nothing follows
    drained   the queue is empty again
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        received: Callable[[bytes, int | None], None],
        closed: Callable[[], None],
        drained: Callable[[], None] = lambda: None,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._received = received
        self._closed = closed
        self._drained = drained
        self._queue: deque[tuple[bytes, Carried | None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._read)

    @property
    def unsent(self) -> int:
        """Messages that the other end has not taken yet."""
        return len(self._queue)

    def send(self, message: bytes, carried: Carried | None = None) -> None:
        """Send `message`, and give away `carried` with it. Never blocks."""
        self._queue.append((message, carried))
        if len(self._queue) == 1:
            self._write()

    def close(self) -> list[tuple[bytes, Carried | None]]:
        """Stop. Gives back what was not sent."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        unsent = list(self._queue)
        self._queue.clear()
        return unsent

    def _write(self) -> None:
        while self._queue:
            message, carried = self._queue[0]
            try:
                if carried is not None:
                    socket.send_fds(self._sock, [message], [carried.fileno()])
                else:
                    self._sock.send(message)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._write_more)
                return
            except OSError:
                return  # the reader learns of the end
            self._queue.popleft()
            if carried is not None:
                carried.close()

    def _write_more(self) -> None:
        self._loop.remove_writer(self._sock.fileno())
        self._write()
        if not self._queue:
            self._drained()

    def _read(self) -> None:
        for _ in range(MAX_TURN):
            if self._sock.fileno() < 0:
                return
            try:
                message, descriptors, flags, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                message, descriptors, flags = b"", [], 0
            if not message or flags & socket.MSG_TRUNC:
                for descriptor in descriptors:
                    os.close(descriptor)
                self._loop.remove_reader(self._sock.fileno())
                self._closed()
                return
            self._received(message, descriptors[0] if descriptors else None)
