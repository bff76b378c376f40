"""mitmproxy's HTTP/1.1 layers, made strict: what is too lenient, unbounded or unanswered in them is replaced. No I/O.

They stay mitmproxy's layers (generators: events in, commands out). Replaced are the reading of heads, informational
responses (mitmproxy takes the first head for the last one), the answers, and what follows an Upgrade.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
from mitmproxy.proxy.layers import tcp
from mitmproxy.proxy.layers.http import (
    DropStream,
    GetHttpConnection,
    GetHttpConnectionCompleted,
    HttpClient,
    HttpLayer,
    HTTPMode,
    HttpStream,
    RegisterHttpConnection,
    SendHttp,
)
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    HttpEvent,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._hooks import HttpResponseHook
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Connection, Http1Server, make_body_reader

from addons.gate import ANSWER, JUDGEMENT, MALFORMED_BODY, STALE
from proxy.inspector.reading import MAX_LINE, Chunks, HeadBuffer, MalformedHead, read_request, read_response

type Hooks = Mapping[str, Sequence[Callable[[http.HTTPFlow], None]]]


class Frame(Context):
    """A context whose copies share its server; mitmproxy makes a new one for each copy, and throws it away."""

    def fork(self) -> Frame:
        copy = Frame.__new__(Frame)
        copy.client, copy.options, copy.server, copy.layers = self.client, self.options, self.server, self.layers.copy()
        return copy


class ConnectionBroken(events.ConnectionClosed):
    """The peer is gone without having ended its side (a reset): a body that only the end delimits is not whole."""


class AbortConnection(commands.CloseConnection):
    """Close so that the peer notices that its response is not whole."""


class _Strict(Http1Connection):
    """What both ends share: the buffer, and a body whose lines are bounded."""

    buf: HeadBuffer
    reads_requests: ClassVar[bool]

    def await_body(self, size: int | None) -> CommandGenerator[None]:
        self.body_reader = Chunks() if size is None else make_body_reader(size)
        self.state = self.read_body
        yield from self.read_body(events.DataReceived(self.conn, b""))

    def read_body(self, event: events.Event) -> CommandGenerator[None]:
        assert self.stream_id is not None
        while True:
            try:
                if isinstance(event, ConnectionBroken):
                    raise h11.RemoteProtocolError("the connection was reset")
                found = self.body_reader.read_eof() if is_closed(event) else self.body_reader(self.buf)
                if found is None and len(self.buf) > MAX_LINE:
                    raise h11.RemoteProtocolError("a chunk's size line or the trailers have no end")
            except h11.ProtocolError as error:
                yield from self.break_off(event, str(error))
                return
            if found is None:
                return
            if isinstance(found, h11.Data):
                yield ReceiveHttp(self.ReceiveData(self.stream_id, bytes(found.data)))
                continue
            yield ReceiveHttp(self.ReceiveEndOfMessage(self.stream_id))
            yield from self.mark_done(request=self.reads_requests, response=not self.reads_requests)
            return

    @abstractmethod
    def break_off(self, event: events.Event, note: str) -> CommandGenerator[None]:
        """End a connection whose body ended early or cannot be read."""


class ClientSide(_Strict, Http1Server):
    """The workload's end. `refuse` judges what is no request head and gives the bytes of the answer."""

    reads_requests = True

    def __init__(
        self, context: Context, streams: Mapping[int, HttpStream], refuse: Callable[[MalformedHead], bytes]
    ) -> None:
        super().__init__(context)
        self.buf = HeadBuffer()
        self._streams = streams
        self._refuse = refuse

    @property
    def awaits_head(self) -> bool:
        return self.state == self.read_headers

    @property
    def awaits_response(self) -> bool:
        """The whole request is here and its response has not ended."""
        return self.request_done and not self.response_done

    @property
    def is_ahead(self) -> bool:
        """The client has sent more than a little of what is not its turn yet."""
        return len(self.buf) > MAX_LINE and (self.awaits_response or self._awaits_origin)

    @property
    def _awaits_origin(self) -> bool:
        """The origin is being dialled: what of a body were read now could only pile up in the stream."""
        stream = self._streams.get(self.stream_id)
        return stream is not None and stream._paused is not None

    @property
    def is_drained(self) -> bool:
        """Nothing is on its way that would be left unread by closing now."""
        return not self.buf and (self.request_done or self.awaits_head)

    def read_headers(self, event: events.ConnectionEvent) -> CommandGenerator[None]:
        if is_closed(event):
            yield from super().read_headers(event)
            return
        try:
            head = self.buf.take_head()
            if head is None:
                return
            self.request = read_request(head)
            if self.request.data.scheme not in (b"", b"https" if self.conn.tls else b"http"):
                raise MalformedHead("the scheme of the target is not the one of this connection")
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
        yield commands.SendData(self.conn, self._refuse(fault))
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
        else:
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
    """The origin's end. Informational responses stop here."""

    reads_requests = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.buf = HeadBuffer()
        self._has_served = False

    def mark_done(self, *, request: bool = False, response: bool = False) -> CommandGenerator[None]:
        yield from super().mark_done(request=request, response=response)
        self._has_served = self._has_served or self.request is None

    def read_headers(self, event: events.ConnectionEvent) -> CommandGenerator[None]:
        if is_closed(event) and self.request and self._has_served and not self.buf:
            yield from self.break_off(event, STALE)
            return
        if is_closed(event) or self.request is None:
            yield from super().read_headers(event)
            return
        try:
            while (head := self.buf.take_head()) is not None:
                self.response = read_response(head, self.request)
                if self.response.status_code >= 200 or self.response.status_code == 101:
                    break
            else:
                return
            size = expected_http_body_size(self.request, self.response)
        except ValueError as error:
            yield from self.break_off(event, str(error))
            return
        assert self.stream_id is not None
        yield ReceiveHttp(ResponseHeaders(self.stream_id, self.response, size == 0))
        yield from self.await_body(size)

    def break_off(self, event: events.Event, note: str) -> CommandGenerator[None]:
        assert self.stream_id is not None
        yield commands.CloseConnection(self.conn)
        yield ReceiveHttp(ResponseProtocolError(self.stream_id, note, ErrorCode.GENERIC_SERVER_ERROR))


class Opening(HttpClient):
    """Waits for the upstream connection, then speaks HTTP/1.1 on it."""

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        fault: str | None = yield commands.OpenConnection(self.context.server)
        if not fault:
            self.child_layer = UpstreamSide(self.context)
            self._handle_event = self.child_layer.handle_event  # type: ignore[method-assign]  # as mitmproxy does
            yield from self.child_layer.handle_event(event)
        yield RegisterHttpConnection(self.context.server, fault)


class Stream(HttpStream):
    """One request and its response. An answer that the gate set at the headers goes out at once."""

    def __init__(self, context: Context, stream_id: int, hooks: Hooks) -> None:
        super().__init__(context, stream_id)
        self._hooks = hooks

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        """Calls hooks where mitmproxy would suspend the stream for each and come back to it through every layer."""
        made = super()._handle_event(event)
        reply = None
        while True:
            try:
                command = made.send(reply)
            except StopIteration:
                return
            if isinstance(command, commands.StartHook):
                self.call(command.name)
                reply = None
            else:
                reply = yield command

    @property
    def is_judged(self) -> bool:
        return hasattr(self, "flow") and JUDGEMENT in self.flow.metadata

    def call(self, name: str) -> None:
        for hook in self._hooks.get(name, ()):
            hook(self.flow)

    def check_invalid(self, request: bool) -> CommandGenerator[bool]:
        """Both heads were read strictly before they came here; the rest is the judge's."""
        yield from ()
        return False

    def check_killed(self, emit_error_hook: bool) -> CommandGenerator[bool]:
        flow = self.flow
        if flow.response is None or flow.error or self.client_state != self.state_wait_for_request_headers:
            return (yield from super().check_killed(emit_error_hook))
        content = flow.response.raw_content or b""
        client = self.context.client
        yield HttpResponseHook(flow)
        yield SendHttp(ResponseHeaders(self.stream_id, flow.response, not content), client)
        if content:
            yield SendHttp(ResponseData(self.stream_id, content), client)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), client)
        if flow.response.headers.get("connection") == "close":
            yield commands.CloseConnection(client)  # the body, if any, is not read
        self.client_state = self.server_state = self.state_errored
        flow.live = False
        yield DropStream(self.stream_id)
        return True

    def flow_done(self) -> CommandGenerator[None]:
        """After an Upgrade bytes are carried as they come: mitmproxy would collect whole websocket messages."""
        assert self.flow.response
        if self.flow.response.status_code != 101:
            yield from super().flow_done()
            return
        self.flow.live = False
        self.child_layer = tcp.TCPLayer(self.context, ignore=True)
        self._handle_event = self.passthrough  # type: ignore[method-assign]  # as mitmproxy does
        yield from self.child_layer.handle_event(events.Start())
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)


class Http(HttpLayer):
    """All requests of one client connection, and the one upstream connection they share."""

    def __init__(self, context: Context, hooks: Hooks, refuse: Callable[[MalformedHead], bytes]) -> None:
        super().__init__(context, HTTPMode.transparent)
        self._hooks = hooks
        self.client_side = ClientSide(context.fork(), self.streams, refuse)
        self.connections[context.client] = self.client_side

    def make_stream(self, stream_id: int) -> CommandGenerator[None]:
        stream = self.streams[stream_id] = Stream(self.context.fork(), stream_id, self._hooks)
        yield from self.event_to_child(stream, events.Start())

    def get_connection(self, event: GetHttpConnection, *, reuse: bool = True) -> CommandGenerator[None]:
        """TLS to the origin is the transport's work, so no TLS layer is built; a closed connection is forgotten."""
        for connection in [one for one in self.connections if isinstance(one, Server)]:
            if connection.connected:
                waiting = self.command_sources.pop(event)
                yield from self.event_to_child(waiting, GetHttpConnectionCompleted(event, (connection, None)))
                return
            del self.connections[connection]
        context = self.context.fork()
        context.server = Server(address=event.address)
        opening = self.connections[context.server] = Opening(context)
        self.waiting_for_establishment[context.server].append(event)
        yield from self.event_to_child(opening, events.Start())


def is_closed(event: events.Event) -> bool:
    return isinstance(event, events.ConnectionClosed)


def _assemble(response: http.Response) -> bytes:
    head: bytes = assemble_response_head(response)  # type: ignore[no-untyped-call]  # mitmproxy leaves it untyped
    return head + (response.raw_content or b"")
