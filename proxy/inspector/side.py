"""One socket of an inspected connection: reads while nobody holds it, writes, and ends in the way its peer needs.

TLS is asyncio's; what it keeps to itself (how the peer ended, when the last word has gone) is found out here.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from enum import IntFlag
from typing import Protocol, cast

from mitmproxy.connection import Connection

WRITE_BUFFER = 256 * 1024  # bytes waiting for a slow reader before the other side is no longer read
LINGER_S = 2.0  # how long a client that still sends may take to read its answer
MAX_LINGER = 1 << 20  # bytes of it that are read and thrown away meanwhile


class Hold(IntFlag):
    """Why a side is not read for now."""

    SLOW_READER = 1  # the other side's
    SENDS_AHEAD = 2  # a body before its origin is there, or a request before its turn
    RECORDS = 4  # the gate is behind with them
    NOT_ADOPTED = 8  # an origin that speaks first, before there is a layer to listen


class Owner(Protocol):
    """Who is told what happens on a side."""

    def made(self, side: Side) -> None: ...
    def received(self, side: Side, data: bytes) -> None: ...
    def half_closed(self, side: Side) -> bool: ...
    def lost(self, side: Side, error: Exception | None) -> None: ...
    def hold_others(self, slow: Side) -> None: ...
    def release_others(self, slow: Side) -> None: ...


class Side(asyncio.Protocol):
    """One socket. Holds add up: it is read again when the last is released."""

    __slots__ = ("_broken", "_holds", "_is_over", "_outgoing", "_owner", "_records", "_waiting", "connection",
                 "transport")  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, owner: Owner, connection: Connection) -> None:
        self._owner = owner
        self.connection = connection
        self._holds = Hold(0)
        self._is_over = False
        self._broken: Exception | None = None  # the peer's end was none that TLS knows
        self._records: asyncio.Transport | None = None  # what carries our TLS, where the peer is a client
        self._outgoing: list[bytes] = []
        self._waiting = b""  # what was decrypted already when we were told to hold

    async def accept_tls(self, sock: socket.socket, context: ssl.SSLContext, handshake_s: float) -> None:
        """Begin as the server of TLS. Raises ssl.SSLError, OSError."""
        loop = asyncio.get_running_loop()
        records, opening = await loop.connect_accepted_socket(_Opening, sock)
        transport = await loop.start_tls(
            records,
            opening,
            context,
            server_side=True,
            ssl_handshake_timeout=handshake_s,
            ssl_shutdown_timeout=LINGER_S,
        )
        if transport is None:
            raise ConnectionResetError("it ended with its handshake")
        self._records = records
        opening.hand_over(transport, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._owner.made(self)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        if self._holds:
            self._waiting += data
        else:
            self._owner.received(self, data)

    def _read_on(self) -> None:
        waiting, self._waiting = self._waiting, b""
        if waiting:
            self.data_received(waiting)

    def eof_received(self) -> bool:
        if _is_cut(self.transport):
            self._broken = ConnectionResetError("no close_notify")
        return not self._is_over and self._owner.half_closed(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.lost(self, error or self._broken)

    def pause_writing(self) -> None:
        self._owner.hold_others(self)

    def resume_writing(self) -> None:
        self._owner.release_others(self)

    def hold(self, cause: Hold) -> None:
        if not self._holds and not self._is_over:
            self.transport.pause_reading()
        self._holds |= cause

    def release(self, cause: Hold) -> None:
        if not self._holds:
            return
        if not self._holds & ~cause and not self._is_over:
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._read_on)
            self.transport.resume_reading()
        self._holds &= ~cause

    def write(self, data: bytes) -> None:
        """Send `data` with the next flush: a head and its body then share a record and a segment."""
        self._outgoing.append(data)

    def flush(self) -> None:
        if self._outgoing:
            outgoing, self._outgoing = self._outgoing, []
            self.transport.write(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing))

    def close(self, *, abort: bool = False, unread: bool = False) -> None:
        """End it. `unread`: the client still sends what nobody will read, and a reset could overtake its answer."""
        self.flush()
        self._is_over = True
        if abort:
            self.transport.abort()
        elif self._records or unread:
            self._part()
        else:
            self.transport.close()

    def _part(self) -> None:
        """Goodbye, at once and whole; a client that sends on is heard out for a while, past TLS."""
        if self.transport.is_closing():
            return
        if self._holds:
            self.transport.resume_reading()
        if self._records:
            self.transport.close()  # its close_notify is on its way, or waits for room
        Parting(self._records or self.transport, self.transport)


class Parting(asyncio.Protocol):
    """A connection whose last word is said: that word goes out, then the FIN; what still comes is thrown away.

    asyncio's TLS would take what comes behind its close_notify for an error, and reset the connection.
    """

    def __init__(self, carrier: asyncio.Transport, transport: asyncio.Transport) -> None:
        self._carrier = carrier
        self._transport = transport
        self._former = cast(asyncio.Protocol, carrier.get_protocol())
        self._left = MAX_LINGER
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, carrier.abort)
        carrier.set_protocol(self)
        carrier.resume_reading()
        self._say_last()

    def _say_last(self) -> None:
        if self._transport is self._carrier or not self._transport.get_write_buffer_size():
            with suppress(OSError):  # it has gone meanwhile, and we hear of that next
                self._carrier.write_eof()

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:  # what it sends now fills its own buffers, and it may still read
            self._carrier.pause_reading()

    def pause_writing(self) -> None:
        self._former.pause_writing()

    def resume_writing(self) -> None:
        self._former.resume_writing()
        self._say_last()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._former.connection_lost(error)


class _Opening(asyncio.Protocol):
    """A client while its TLS begins: nothing is read before that, and what came with the handshake's end is kept."""

    def __init__(self) -> None:
        self._received = b""
        self._has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).pause_reading()

    def data_received(self, data: bytes) -> None:
        self._received += data

    def eof_received(self) -> None:
        self._has_ended = True

    def hand_over(self, transport: asyncio.Transport, side: Side) -> None:
        transport.set_protocol(side)
        side.connection_made(transport)
        if self._received:
            side.data_received(self._received)
        if self._has_ended:
            side.eof_received()


def _is_cut(transport: asyncio.Transport) -> bool:
    """Whether the bytes of a TLS connection end without close_notify, as whoever cuts it short makes them end (RFC 8446
    6.1). asyncio tells both ends alike; only behind a close_notify does TLS itself know of an end."""
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    if tls is None:
        return False
    try:
        return tls.read(1) != b""
    except ssl.SSLZeroReturnError:
        return False
    except ssl.SSLError:
        return True
