"""What both ends of HTTP/2 have in common: a connection of frames, and what is known of each exchange on it. No I/O."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from h2 import events as h2
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from mitmproxy.connection import Connection
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import (
    HttpStream,
)
from mitmproxy.proxy.layers.http._base import HttpConnection
from mitmproxy.proxy.layers.http._events import (
    HttpEvent,
)

from proxy.inspector.frames import Frames
from proxy.inspector.http1 import is_closed
from proxy.inspector.reading import MalformedHead


@dataclass(slots=True)
class Exchange:
    """What one side of the inspector knows of one request and its response.

    length     what the body that is received must have; None: it was not said
    has_ended  the peer has ended its half
    is_begun   a final response head has been sent (to the client) or received (from the origin)
    is_faulty  the peer broke a rule of its own stream
    """

    method: bytes
    length: int | None = None
    received: int = 0
    has_ended: bool = False
    is_begun: bool = False
    informational: int = 0
    is_faulty: bool = False
    has_moved: bool = True
    quiet_since: float = 0.0

    def is_quiet(self, now: float, idle_s: float) -> bool:
        """Nothing has moved for so long. Asked again and again, each time for what was before."""
        if self.has_moved:
            self.has_moved, self.quiet_since = False, now
        return now - self.quiet_since > idle_s

    @property
    def is_whole(self) -> bool:
        """Every byte that was announced has come."""
        return self.is_begun and self.length is not None and self.received == self.length

    def count(self, data: bytes) -> None:
        self.received += len(data)
        if self.length is not None and self.received > self.length:
            raise MalformedHead("the body is longer than was announced")

    def end(self) -> None:
        self.has_ended = True
        if self.length is not None and self.received != self.length:
            raise MalformedHead("the body is shorter than was announced")


class End(HttpConnection):
    """What both sides share. `exchanges` go by the client's stream ids on either side."""

    def __init__(self, context: Context, conn: Connection, streams: Mapping[int, HttpStream], frames: Frames) -> None:
        super().__init__(context, conn)
        self.frames = frames
        self.exchanges: dict[int, Exchange] = {}
        self._streams = streams
        self._is_over = False

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, HttpEvent):
            if not self._is_over:
                yield from self.send(event)
        elif isinstance(event, events.DataReceived):
            yield from self._receive(event.data)
        elif isinstance(event, events.Start):
            self.frames.open()
        elif is_closed(event):
            yield from self.end_all("the connection was closed")

    def _receive(self, data: bytes) -> CommandGenerator[None]:
        if self._is_over:
            return
        try:
            for event in self.frames.receive(data):
                yield from self.read(event)
        except ProtocolError as error:
            yield from self.fail(error)

    def hang_up(self, code: ErrorCodes) -> CommandGenerator[None]:
        """GOAWAY, and the end of the connection."""
        if not self._is_over:
            self.frames.leave(code)
            yield commands.SendData(self.conn, self.frames.data_to_send())
            yield commands.CloseConnection(self.conn)

    def flush(self) -> CommandGenerator[None]:
        """Send what was said since the last time; a connection that is left is closed with its last stream."""
        if self._is_over:
            return
        if data := self.frames.data_to_send():
            yield commands.SendData(self.conn, data)
        if self.frames.is_leaving and not self.exchanges:
            yield commands.CloseConnection(self.conn)

    def read_body(self, exchange: Exchange | None, event: h2.DataReceived) -> bytes:
        """What is to be passed on of a DATA frame. Raises MalformedHead."""
        assert event.data is not None
        if exchange is None:
            self.frames.take(event.stream_id)
            return b""
        exchange.has_moved = True
        exchange.count(event.data)
        return event.data

    @abstractmethod
    def send(self, event: HttpEvent) -> CommandGenerator[None]:
        """Write what a stream says."""

    @abstractmethod
    def read(self, event: h2.Event) -> CommandGenerator[None]:
        """Tell a stream what the peer says."""

    @abstractmethod
    def fail(self, error: ProtocolError) -> CommandGenerator[None]:
        """End a connection on which something was said that ends it."""

    @abstractmethod
    def end_all(self, note: str) -> CommandGenerator[None]:
        """The connection is gone: so is every stream."""

    @abstractmethod
    def backlog(self, stream_id: int) -> int:
        """Bytes that wait for the peer's window."""

    @abstractmethod
    def take_moved(self) -> list[int]:
        """Streams of whose body something went out since this was asked."""

    @abstractmethod
    def forget(self) -> None:
        """Forget streams that are over on both sides."""
