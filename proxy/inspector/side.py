"""One socket of an inspected connection: reads while nobody holds it, writes, and ends in the way its peer needs."""

from __future__ import annotations

import asyncio
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

    __slots__ = ("_discarded", "_holds", "_is_over", "_lingers", "_outgoing", "_owner", "connection", "transport")

    transport: asyncio.Transport

    def __init__(self, owner: Owner, connection: Connection) -> None:
        self._owner = owner
        self.connection = connection
        self._holds = Hold(0)
        self._is_over = False
        self._lingers: asyncio.TimerHandle | None = None
        self._discarded = 0
        self._outgoing: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._owner.made(self)

    def data_received(self, data: bytes) -> None:
        if not self._is_over:
            self._owner.received(self, data)
            return
        self._discarded += len(data)
        if self._lingers and self._discarded > MAX_LINGER:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        return not self._is_over and self._owner.half_closed(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._lingers:
            self._lingers.cancel()
        self._owner.lost(self, error)

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
        elif unread:
            if self._holds:
                self.transport.resume_reading()
            if self.transport.can_write_eof():
                with suppress(OSError):  # it has gone meanwhile, and we hear of that next
                    self.transport.write_eof()
            loop = asyncio.get_running_loop()
            self._lingers = loop.call_later(LINGER_S, self.transport.abort)
        else:
            self.transport.close()
