"""One end of an exchange: a socket with TLS or without, on the gate's epoll. It moves bytes and knows no HTTP.

TLS is on the socket itself: an end without close_notify can be told from a clean one, and what a denied client still
sends is thrown away undecrypted.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from proxy.epoll import ERR, HUP, IN, OUT, RDHUP, Epoll
from proxy.lane.bounds import Share
from proxy.relays.stream import reset

RECORD = 16 * 1024  # RFC 8446 5.1: TLS gives no more at once
READS = 8  # at once, before others have their turn
HIGH, LOW = 256 * 1024, 64 * 1024  # bytes that wait to be sent: from HIGH on nothing is read for it, until LOW
LINGER_S = 2.0
MAX_LINGER = 1 << 20  # bytes of a client thrown away; what it sends beyond them fills its own buffers

_NOTHING: deque[bytes | memoryview] = deque(maxlen=0)  # an empty one of its own takes 760 bytes
_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Owner(Protocol):
    """What a side tells. After `ended` it tells nothing more but `drained`.

    opened    its TLS is there
    received  bytes, never none
    ended     the peer sends nothing more; the error says how that was not clean (a reset, no close_notify)
    drained   what waited to be sent has gone, but for a little
    failed    a callback crashed
    """

    def opened(self) -> None: ...
    def received(self, data: bytes) -> None: ...
    def ended(self, error: Exception | None) -> None: ...
    def drained(self) -> None: ...
    def failed(self, error: Exception) -> None: ...


class Side:
    """Owns its socket until `close`, `cut` or `part`. `share` is told how many bytes wait here."""

    __slots__ = ("_epoll", "_events", "_has_ended", "_is_deaf", "_is_held", "_out", "_owner", "_parting", "_read",
                 "_share", "_write", "fd", "is_open", "pending", "sent", "sock")  # fmt: skip

    def __init__(self, epoll: Epoll, sock: socket.socket, owner: Owner, share: Share) -> None:
        self._epoll = epoll
        self._owner = owner
        self._share = share
        self.sock = sock
        self.fd = sock.fileno()
        self._read: Callable[[int], bytes] = sock.recv
        self._write: Callable[[bytes | memoryview], int] = sock.send
        self._out = _NOTHING
        self._events = IN
        self._is_held = self._has_ended = False
        self._parting: Parting | None = None
        self._is_deaf = False  # nothing can be sent any more; that the peer is gone is told by reading
        self.is_open = True
        self.pending = 0  # bytes that wait to be sent
        self.sent = 0  # bytes that had waited and are sent

    # --- its beginning ---

    def begin(self) -> None:
        """Listen to the peer, as it is."""
        self._epoll.put(self.fd, IN, self._ready, self._owner.failed)

    def begin_tls(
        self, context: ssl.SSLContext, name: str | None = None, session: ssl.SSLSession | None = None
    ) -> None:
        """Begin with TLS: as the server, or as the client of `name`. `opened` or `ended` follows, maybe at once.

        Raises OSError, ValueError.
        """
        wrapped = context.wrap_socket(
            self.sock,
            server_side=name is None,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
            server_hostname=name,
            session=session,
        )
        self.sock = wrapped
        self._read, self._write = wrapped.read, wrapped.write
        self._epoll.put(self.fd, IN, self._shake_hands, self._owner.failed)
        self._shake_hands(IN)

    @property
    def tls(self) -> ssl.SSLSocket | None:
        return self.sock if isinstance(self.sock, ssl.SSLSocket) else None

    def _shake_hands(self, _events: int) -> None:
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._want(IN)
            return
        except ssl.SSLWantWriteError:
            self._want(OUT)
            return
        except (OSError, ValueError) as error:
            self._end(error)
            return
        self._epoll.put(self.fd, IN, self._ready, self._owner.failed)
        self._events = IN
        self._owner.opened()

    # --- reading ---

    def _ready(self, events: int) -> None:
        if events & OUT:
            self._flush()
        if events & ~OUT and self.is_open:
            if self._is_held:
                if events & (ERR | HUP):
                    self._end(ConnectionResetError("reset"))
                return
            self._receive()

    def _receive(self) -> None:
        owner = self._owner
        for _ in range(READS):
            try:
                data = self._read(RECORD)
            except _LATER:
                return
            except (OSError, ValueError) as error:
                self._end(error)
                return
            if not data:
                self._end(None)
                return
            owner.received(data)
            if len(data) < RECORD or self._is_held or not self.is_open:
                return

    def _end(self, error: Exception | None) -> None:
        if self._has_ended:  # it was half closed, and now it is gone
            error = error or ConnectionResetError("reset")
        self._has_ended = self._is_held = True
        self._want(self._events & ~IN)
        self._owner.ended(error)

    def hold(self) -> None:
        """Read nothing until `release`."""
        if not self._is_held:
            self._is_held = True
            self._want(self._events & ~IN)

    def release(self) -> None:
        if self._is_held and not self._has_ended and self.is_open:
            self._is_held = False
            self._want(self._events | IN)

    def _want(self, events: int) -> None:
        if events != self._events and self.is_open:
            self._events = events
            self._epoll.change(self.fd, events)

    @property
    def is_quiet(self) -> bool:
        """Nothing waits here, in either direction, and the peer has not gone. What the peer did send is lost."""
        if not self.is_open or self._has_ended or self._is_deaf or self.pending:
            return False
        try:
            self._read(1)
        except _LATER:
            return True
        except (OSError, ValueError):
            pass
        return False

    def count_for(self, share: Share) -> None:
        """What waits here from now on is held for `share`."""
        share.add(self.pending)
        self._share.add(-self.pending)
        self._share = share

    # --- writing ---

    @property
    def is_full(self) -> bool:
        """The peer takes less than it is sent; while memory is scarce, anything less."""
        return self.pending > HIGH or (self.pending > 0 and self._share.is_exceeded)

    def write(self, data: bytes) -> None:
        if self._out:
            self._queue(data)
            return
        if self._is_deaf or not self.is_open:
            return
        try:
            sent = self._write(data)
        except _LATER:
            sent = 0
        except (OSError, ValueError):
            self._is_deaf = True
            return
        if sent < len(data):
            self._queue(memoryview(data)[sent:] if sent else data)
            self._want(self._events | OUT)

    def _queue(self, data: bytes | memoryview) -> None:
        if self._out is _NOTHING:
            self._out = deque()
        self._out.append(data)
        self.pending += len(data)
        self._share.add(len(data))

    def _flush(self) -> None:
        out, before = self._out, self.pending
        try:
            while out:
                first = out[0]
                sent = self._write(first)
                self.pending -= sent
                if sent < len(first):
                    out[0] = memoryview(first)[sent:]
                else:
                    out.popleft()
        except _LATER:
            pass
        except (OSError, ValueError):
            self._is_deaf = True
            out.clear()
            self.pending = 0
        self.sent += before - self.pending
        self._share.add(self.pending - before)
        if not out:
            self._want(self._events & ~OUT)
        if self.pending <= LOW:
            self._owner.drained()

    # --- its end ---

    def end_writing(self) -> None:
        """Tell the peer that nothing more comes; it may go on sending."""
        self._say_goodbye()

    def part(self, over: Callable[[], None]) -> None:
        """Say goodbye, throw away what the peer still sends, close. `over` is called when that is done.

        A socket with unread bytes would be reset by its close, and the reset could overtake the last answer.
        """
        self._say_goodbye()
        self._parting = Parting(self._epoll, self.sock, over)

    def abandon(self) -> None:
        """Wait no longer for the peer to read its last words, if that is what is waited for."""
        if self._parting is not None:
            self._parting.expired()

    def close(self) -> None:
        """Close it. With TLS the peer sees that this is no end of a message."""
        if self.is_open:
            self._drop()
            self._epoll.forget(self.fd)
            self.sock.close()

    def cut(self) -> None:
        """Reset it: what was sent last is not to be taken for all."""
        if self.is_open:
            self._drop()
            self._epoll.forget(self.fd)
            reset(self.sock)

    def _drop(self) -> None:
        self.is_open = False
        self._out.clear()
        self._share.add(-self.pending)
        self.pending = 0

    def _say_goodbye(self) -> None:
        tls = self.tls
        with suppress(OSError, ValueError):  # the peer's own goodbye is not waited for (RFC 8446 6.1)
            if tls is not None:
                tls.unwrap()
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)


class Parting:
    """A socket that was told its last words, until its peer has read them."""

    __slots__ = ("_epoll", "_fd", "_left", "_over", "_sock", "deadline")

    def __init__(self, epoll: Epoll, sock: socket.socket, over: Callable[[], None]) -> None:
        self._epoll = epoll
        self._sock = sock
        self._fd = sock.fileno()
        self._over = over
        self._left = MAX_LINGER
        self.deadline = epoll.now + LINGER_S
        epoll.watch(self)
        epoll.put(self._fd, IN, self._discard, self.failed)

    def _discard(self, _events: int) -> None:
        try:
            data = os.read(self._fd, 4 * RECORD)  # raw, past TLS
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.expired()
            return
        self._left -= len(data)
        if self._left < 0:  # to close now would reset it; it may still read until the deadline, and is read to its FIN
            self._epoll.change(self._fd, RDHUP)

    def expired(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._epoll.unwatch(self)
        self._epoll.forget(self._fd)
        self._sock.close()
        self._over()

    def failed(self, _error: Exception) -> None:
        self.expired()
