"""mitmproxy's HTTP/1.1 layers, made strict: what is too lenient, unbounded or unanswered in them is replaced. No I/O.

They stay mitmproxy's layers (generators: events in, commands out). Replaced are the reading of heads, informational
responses (mitmproxy takes the first head for the last one), the answers, and what follows an Upgrade.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import h11
from mitmproxy import http
from mitmproxy.connection import Server
from mitmproxy.net.http.http1 import (
    assemble_response_head,
    expected_http_body_size,
)
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import (
    GetHttpConnection,
    GetHttpConnectionCompleted,
    HttpLayer,
    HTTPMode,
    HttpStream,
)
from mitmproxy.proxy.layers.http._base import HttpConnection, ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    HttpEvent,
    RequestHeaders,
    RequestProtocolError,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Connection, Http1Server, TBodyReader, make_body_reader

from addons.answers import Answer
from addons.gate import ANSWER, MALFORMED_BODY, STALE
from proxy.inspector.reading import MAX_AHEAD, Chunks, HeadBuffer, MalformedHead, read_request, read_response
from proxy.inspector.streams import (
    AbortConnection,
    ConnectionBroken,
    Hooks,
    Informational,
    Opening,
    Stream,
    informational,
)
from proxy.lane.http1 import Refused

MAX_INFORMATIONAL = 32  # responses before the response; an origin could send them for ever


class _Strict(Http1Connection):
    """What both ends share: the buffer, and how bodies are read."""

    buf: HeadBuffer
    body_reader: TBodyReader | Chunks  # type: ignore[assignment]  # theirs are h11's
    reads_requests: ClassVar[bool]

    def await_body(self, size: int | None) -> CommandGenerator[None]:
        self.body_reader = Chunks(in_request=self.reads_requests) if size is None else make_body_reader(size)
        self.state = self.read_body
        yield from self.read_body(events.DataReceived(self.conn, b""))

    def read_body(self, event: events.Event) -> CommandGenerator[None]:
        assert self.stream_id is not None
        fault, found, parts = None, None, []
        try:
            if isinstance(event, ConnectionBroken):
                raise h11.RemoteProtocolError("the connection was reset")
            while isinstance(found := self._read_part(event), h11.Data):
                parts.append(bytes(found.data))
        except h11.ProtocolError as error:
            fault = str(error)
        except Refused as refused:
            fault = refused.why
        if parts:  # as one: chunks of a byte each would keep every other connection waiting for seconds
            yield ReceiveHttp(self.ReceiveData(self.stream_id, b"".join(parts)))
        if fault is not None:
            yield from self.break_off(event, fault)
        elif found is not None:
            yield ReceiveHttp(self.ReceiveEndOfMessage(self.stream_id))
            yield from self.mark_done(request=self.reads_requests, response=not self.reads_requests)

    def _read_part(self, event: events.Event) -> h11.Data | h11.EndOfMessage | None:
        """Raises h11.ProtocolError, Refused."""
        return self.body_reader.read_eof() if is_closed(event) else self.body_reader(self.buf)

    @abstractmethod
    def break_off(self, event: events.Event, note: str) -> CommandGenerator[None]:
        """End a connection whose body ended early or cannot be read."""


class ClientSide(_Strict, Http1Server):
    """The workload's end. `refuse` judges what is no request head and gives the bytes of the answer."""

    reads_requests = True

    def __init__(
        self, context: Context, streams: Mapping[int, HttpStream], refuse: Callable[[MalformedHead], Answer]
    ) -> None:
        super().__init__(context)
        self.buf = HeadBuffer()
        self.has_next = False  # what came behind a request waits for a turn of its own
        self._is_ending = False
        self.is_leaving = False  # no request is read after the next response
        self._streams = streams
        self._refuse = refuse

    def mark_done(self, *, request: bool = False, response: bool = False) -> CommandGenerator[None]:
        """mitmproxy reads the next request inside the end of this one: 160 denials at once would end at Python's
        recursion limit, and nobody else has a turn until then."""
        self._is_ending = True
        yield from super().mark_done(request=request, response=response)
        self._is_ending = False

    @property
    def head_begun(self) -> int | None:
        """Which head has begun and not ended."""
        return self.stream_id if self.buf and not self.has_next and self.state == self.read_headers else None

    @property
    def awaits_response(self) -> bool:
        """The whole request is here and its response has not ended."""
        return self.request_done and not self.response_done

    @property
    def is_ahead(self) -> bool:
        """The client has sent more than a little of what is not its turn yet."""
        return len(self.buf) > MAX_AHEAD and (self.has_next or self.awaits_response or self._awaits_origin)

    @property
    def _awaits_origin(self) -> bool:
        """The origin is being dialled: what of a body were read now could only pile up in the stream."""
        stream = self._streams.get(self.stream_id)
        return stream is not None and stream._paused is not None

    @property
    def is_drained(self) -> bool:
        """Nothing is on its way that would be left unread by closing now."""
        return not self.buf and (self.request_done or self.state == self.read_headers)

    def read_headers(self, event: events.ConnectionEvent) -> CommandGenerator[None]:
        if is_closed(event):
            yield from super().read_headers(event)
            return
        self.has_next = self._is_ending
        if self.has_next:
            return
        try:
            head = self.buf.take_head()
            if head is None:
                return
            self.request = read_request(head)
            size = expected_http_body_size(self.request)
        except ValueError as error:
            yield from self.refuse(error if isinstance(error, MalformedHead) else MalformedHead(str(error)))
            return
        yield ReceiveHttp(RequestHeaders(self.stream_id, self.request, size == 0))
        yield from self.await_body(size)

    def read_body(self, event: events.Event) -> CommandGenerator[None]:
        if is_closed(event) or not self._awaits_origin:
            yield from super().read_body(event)

    def refuse(self, fault: MalformedHead) -> CommandGenerator[None]:
        self.state = self.done
        yield commands.SendData(self.conn, self._refuse(fault).to_bytes())
        yield commands.CloseConnection(self.conn)

    def break_off(self, event: events.Event, note: str) -> CommandGenerator[None]:
        stream = self._streams.get(self.stream_id)
        self.state = self.done
        if is_closed(event):
            yield commands.CloseConnection(self.conn)
            yield ReceiveHttp(RequestProtocolError(self.stream_id, note, ErrorCode.CLIENT_DISCONNECTED))
            return
        message = f"{MALFORMED_BODY}: {note}"
        yield ReceiveHttp(RequestProtocolError(self.stream_id, message, ErrorCode.GENERIC_CLIENT_ERROR))
        yield from self.end(stream)

    def send(self, event: HttpEvent) -> CommandGenerator[None]:
        if isinstance(event, ResponseProtocolError):
            yield from self.end(self._streams.get(event.stream_id))
        elif isinstance(event, ResponseHeaders) and event.response.status_code == 100:
            yield commands.SendData(self.conn, b"HTTP/1.1 100 Continue\r\n\r\n")  # not yet the response
        elif isinstance(event, Informational):
            if self.request and self.request.is_http11:  # RFC 9110 15.2: an HTTP/1.0 client knows none
                yield commands.SendData(self.conn, _assemble(event.response))
        else:
            if self.is_leaving and isinstance(event, ResponseHeaders) and event.response.status_code != 101:
                event.response.headers["connection"] = "close"
            yield from super().send(event)

    def end(self, stream: HttpStream | None) -> CommandGenerator[None]:
        """After an error: the answer that the gate made of it, or the rest of a response that is whole; then close."""
        if self.response is None:
            if stream and stream.flow.response and stream.flow.metadata.get(ANSWER):
                yield commands.SendData(self.conn, _assemble(stream.flow.response))
            yield commands.CloseConnection(self.conn)
        elif stream is None or stream.server_state == stream.state_done:
            if not self.response_done:  # an early response: the origin answered and closed before the body was here
                yield from super().send(ResponseEndOfMessage(self.stream_id))
            yield commands.CloseConnection(self.conn)
        else:
            yield AbortConnection(self.conn)


class UpstreamSide(_Strict, Http1Client):
    """The origin's end. `is_free`: a request may be sent on it."""

    reads_requests = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.buf = HeadBuffer()
        self._has_served = False
        self._informational = 0

    @property
    def is_free(self) -> bool:
        return self.stream_id is None and self.conn.connected

    def mark_done(self, *, request: bool = False, response: bool = False) -> CommandGenerator[None]:
        yield from super().mark_done(request=request, response=response)
        self._has_served = self._has_served or self.request is None
        self._informational = 0

    def read_headers(self, event: events.ConnectionEvent) -> CommandGenerator[None]:
        if is_closed(event) and self.request and self._has_served and not self.buf:
            yield from self.break_off(event, STALE)
            return
        if is_closed(event) or self.request is None:
            yield from super().read_headers(event)
            return
        assert self.stream_id is not None
        try:
            while (head := self.buf.take_head()) is not None:
                self.response = read_response(head, self.request)
                self.check_response(self.response)
                if self.response.status_code >= 200 or self.response.status_code == 101:
                    break
                self._informational += 1
                if self._informational > MAX_INFORMATIONAL:
                    raise MalformedHead("it sends one informational response after another")
                if self.response.status_code != 100:  # which the gate itself gave, if it was asked for
                    yield ReceiveHttp(Informational(self.stream_id, informational(self.response)))
            else:
                return
            size = expected_http_body_size(self.request, self.response)
        except ValueError as error:
            yield from self.break_off(event, str(error))
            return
        yield ReceiveHttp(ResponseHeaders(self.stream_id, self.response, size == 0))
        yield from self.await_body(size)

    def check_response(self, response: http.Response) -> None:
        """Raises MalformedHead for what the client's protocol cannot carry."""

    def break_off(self, event: events.Event, note: str) -> CommandGenerator[None]:
        assert self.stream_id is not None
        yield commands.CloseConnection(self.conn)
        yield ReceiveHttp(ResponseProtocolError(self.stream_id, note, ErrorCode.GENERIC_SERVER_ERROR))


class Http(HttpLayer):
    """All requests of one client connection, and the one upstream connection they share."""

    client_side: ClientSide

    def __init__(
        self,
        context: Context,
        hooks: Hooks,
        refuse: Callable[[MalformedHead], Answer],
        may_carry: Callable[[Server], bool],
    ) -> None:
        super().__init__(context, HTTPMode.transparent)
        self._hooks = hooks
        self._may_carry = may_carry
        self.client_side = ClientSide(context.fork(), self.streams, refuse)
        self.connections[context.client] = self.client_side

    def make_stream(self, stream_id: int) -> CommandGenerator[None]:
        stream = self.streams[stream_id] = Stream(self.context.fork(), stream_id, self._hooks)
        yield from self.event_to_child(stream, events.Start())

    def get_connection(self, event: GetHttpConnection, *, reuse: bool = True) -> CommandGenerator[None]:
        """TLS to the origin is the transport's work, so no TLS layer is built; a closed connection is forgotten."""
        for connection in self.upstreams():
            if connection.connected and connection.address == event.address and self._may_carry(connection):
                yield from self.give(event, connection)
                return
            # For another host (a proxied request), or to an address that is admitted no more.
            if connection.connected:  # of its end this layer is told later
                yield commands.CloseConnection(connection)
            else:
                del self.connections[connection]
        yield from self.dial(event, UpstreamSide)

    def upstreams(self) -> list[Server]:
        return [one for one in self.connections if isinstance(one, Server)]

    def give(self, event: GetHttpConnection, connection: Server) -> CommandGenerator[None]:
        """Send the request that asked for it on `connection`."""
        waiting = self.command_sources.pop(event)
        yield from self.event_to_child(waiting, GetHttpConnectionCompleted(event, (connection, None)))

    def dial(self, event: GetHttpConnection, speak: Callable[[Context], HttpConnection]) -> CommandGenerator[None]:
        context = self.context.fork()
        context.server = Server(address=event.address)
        opening = self.connections[context.server] = Opening(context, speak)
        self.waiting_for_establishment[context.server].append(event)
        yield from self.event_to_child(opening, events.Start())

    def adopt(self, connection: Server) -> CommandGenerator[None]:
        """Take a connection that is open already for the first request."""
        context = self.context.fork()
        context.server = connection
        side = self.connections[connection] = UpstreamSide(context)
        yield from self.event_to_child(side, events.Start())

    def refuse(self, fault: MalformedHead) -> CommandGenerator[None]:
        yield from self.client_side.refuse(fault)

    def leave(self) -> Iterator[commands.Command]:
        """Have the next response say that it is the last."""
        self.client_side.is_leaving = True
        yield from ()

    def abandon(self, reply: Answer | None) -> Iterator[commands.Command]:
        """After a fault of ours: what can still be said, and the end."""
        streams = [one for one in self.streams.values() if isinstance(one, Stream) and one.is_judged]
        if reply and self.client_side.response is None:
            yield commands.SendData(self.client_side.conn, reply.to_bytes())
        yield from self.client_side.end(streams[0] if streams else None)


def is_closed(event: events.Event) -> bool:
    return isinstance(event, events.ConnectionClosed)


def _assemble(response: http.Response) -> bytes:
    head: bytes = assemble_response_head(response)  # type: ignore[no-untyped-call]  # mitmproxy leaves it untyped
    return head + (response.raw_content or b"")
