"""An accepted socket that is peeked until what it says is whole, and that may be told last words. It judges nothing.

What is peeked stays in the kernel's queue for the next reader.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from math import inf

from policies.model import Reason
from proxy.epoll import IN, ONESHOT, RDHUP
from proxy.guest import Gate
from proxy.record import Peer
from proxy.relays.stream import reset

_FIRST_BYTES = IN | RDHUP | ONESHOT  # one event, then silence while the verdict is carried out
_REST_S = 0.25  # woken with less than asked for: look again after it
_DISCARD = 1 << 16


class Peeking(ABC):
    """Owns its socket until it is over: closed, or given on. What a subclass is told:

    _read   the bytes there are; `_await_more` waits for another one
    _leave  the client has gone, or its connection broke
    _late   the deadline has come
    _fail   a part of ours failed: close it, and record that
    """

    __slots__ = ("_gate", "_give_up", "_is_resting", "_left", "_most", "_wanted", "deadline", "fd", "is_over", "peer",
                 "sock")  # fmt: skip

    def __init__(self, gate: Gate, sock: socket.socket, peer: Peer, most: int) -> None:
        self._gate = gate
        self._most = most  # bytes to be peeked at once
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.is_over = False
        self.deadline = self._give_up = inf
        self._wanted = 1  # bytes the kernel is asked to wait for
        self._is_resting = False
        self._left = -1  # bytes it may still send for us to throw away; negative unless it was told last words

    @abstractmethod
    def _read(self, data: bytes, events: int) -> None: ...

    @abstractmethod
    def _leave(self) -> None: ...

    @abstractmethod
    def _late(self) -> None: ...

    @abstractmethod
    def _fail(self) -> None: ...

    # What the listener asks of a guest (`Guest`).

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def refuse(self, reason: Reason) -> None: ...

    @property
    def _is_silent(self) -> bool:
        """Nothing has been heard since it was last asked."""
        return self._wanted == 1

    @property
    def _is_told(self) -> bool:
        """It was told its last words."""
        return self._left >= 0

    def _listen(self, patience_s: float) -> None:
        """Begin to peek."""
        self._want(1)
        self._be_patient(patience_s)
        self._gate.epoll.put(self.fd, _FIRST_BYTES, self._peek, self.failed)

    def _be_patient(self, patience_s: float) -> None:
        self.deadline = self._give_up = self._gate.epoll.now + patience_s
        self._gate.epoll.watch(self)

    def _peek(self, events: int) -> None:
        try:
            data = self.sock.recv(self._most, socket.MSG_PEEK)
        except BlockingIOError:
            self._sleep(self._wanted, events)
            return
        except OSError:
            data = b""
        if data:
            self._read(data, events)
        else:
            self._leave()

    def _await_more(self, have: int, events: int, wanted: int = 0) -> None:
        """Sleep until there are `wanted` bytes, or more than the `have` that were seen; or the client has gone, or the
        deadline has come."""
        if 0 < have < self._wanted and not events & RDHUP:  # the kernel is short of memory for this queue
            self._is_resting = True
            self.deadline = min(self._gate.epoll.now + _REST_S, self._give_up)
            self._gate.epoll.watch(self)
        else:
            self._sleep(wanted or have + 1, events)

    def _sleep(self, wanted: int, events: int) -> None:
        if events & RDHUP:
            self._leave()
            return
        self._want(wanted)
        self._gate.epoll.change(self.fd, _FIRST_BYTES)

    def _want(self, size: int) -> None:
        if size != self._wanted:
            self._wanted = size  # level-triggered epoll would report the bytes we leave in the queue for ever
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def expired(self) -> None:
        epoll = self._gate.epoll
        if self._is_told:
            self._close(resetting=True)
        elif self._is_resting and epoll.now < self._give_up:
            self._is_resting = False
            self.deadline = self._give_up
            epoll.watch(self)
            epoll.change(self.fd, _FIRST_BYTES)
        else:
            self._late()

    # --- the end ---

    def abort(self) -> None:
        """Close it now, whatever it is doing; the gate is stopping."""
        if self._is_told:
            self._close(resetting=True)
        elif not self.is_over:
            self._fail()

    def failed(self, error: Exception) -> None:
        """A callback crashed: this connection is closed and recorded, no other is touched."""
        if not self.is_over:
            self._fail()

    def _give_on(self) -> None:
        """The socket is somebody else's from now on."""
        epoll = self._gate.epoll
        self._want(1)
        epoll.unwatch(self)
        epoll.remove(self.fd)
        self.is_over = True
        self._gate.over(self)

    def _part_with(self, reply: bytes) -> None:
        """Send the last words, then throw away what still comes: a reset could overtake them."""
        epoll, limits = self._gate.epoll, self._gate.limits
        try:
            self.sock.recv(self._most)  # bytes left in the queue would turn the close into a reset
            self.sock.send(reply, socket.MSG_MORE)  # one segment with the FIN
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(resetting=True)
            return
        self._want(1)
        self._left = limits.max_linger
        self.deadline = epoll.now + limits.linger_s
        epoll.watch(self)
        epoll.put(self.fd, IN, self._linger, self.failed)

    def _linger(self, _events: int) -> None:
        """Throw away what still comes until the client closes."""
        try:
            data = self.sock.recv(_DISCARD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._left -= len(data)
        if not data or self._left < 0:
            self._close(resetting=self._left < 0)

    def _close(self, *, resetting: bool) -> None:
        gate = self._gate
        self.is_over = True
        gate.epoll.unwatch(self)
        gate.epoll.forget(self.fd)
        if resetting:
            reset(self.sock)
        else:
            self.sock.close()
        gate.over(self)
