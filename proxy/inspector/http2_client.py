"""The workload's end of HTTP/2: frames and heads as events of mitmproxy's streams, and answers as frames. No I/O.

What harms a stream ends that stream, with an answer where it can still be given; what harms the connection ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from h2 import events as h2
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from mitmproxy import http
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import (
    HttpStream,
)
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    ErrorCode,
    HttpEvent,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    RequestTrailers,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
)

from addons.answers import Answer
from addons.gate import ANSWER, CANCELLED, MALFORMED_BODY, STALE
from policies.model import Reason
from proxy.inspector.frames import Frames
from proxy.inspector.heads import (
    read_request,
    read_trailers,
    write_fields,
    write_response,
)
from proxy.inspector.http2_end import End, Exchange
from proxy.inspector.reading import MalformedHead
from proxy.inspector.streams import Informational

_REPEATABLE = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})  # RFC 9110 9.2.2


class ClientSide(End):
    """The workload's end.

    refuse   judges what is no request head, gives the answer
    cut_off  records why the connection is ended
    """

    awaits_response = has_next = False  # a client cannot end its half of TLS and still be there

    def __init__(
        self,
        context: Context,
        streams: Mapping[int, HttpStream],
        refuse: Callable[[MalformedHead], Answer],
        cut_off: Callable[[str, Reason], None],
    ) -> None:
        super().__init__(context, context.client, streams, Frames(client_side=False))
        self._refuse = refuse
        self._cut_off = cut_off
        self._half: set[int] = set()  # answered whole while the client still sends
        self._is_cut_off = False

    @property
    def head_begun(self) -> int | None:
        """Which head has begun and not ended."""
        return self.frames.count if self.frames.has_part_of_head else None

    @property
    def is_ahead(self) -> bool:
        """More frames are here than were read in one turn."""
        return self.frames.has_more and not self._is_over

    @property
    def is_drained(self) -> bool:
        return not self._is_cut_off

    def backlog(self, stream_id: int) -> int:
        return self.frames.backlog(stream_id)

    # --- what the client says ---

    def read(self, event: h2.Event) -> CommandGenerator[None]:
        match event:
            case h2.RequestReceived():
                yield from self._begin(event)
            case h2.DataReceived() | h2.TrailersReceived() | h2.StreamEnded():
                yield from self._continue(event)
            case h2.StreamReset() if self.exchanges.pop(event.stream_id, None):
                yield ReceiveHttp(RequestProtocolError(event.stream_id, CANCELLED, ErrorCode.CANCEL))

    def _begin(self, event: h2.RequestReceived) -> CommandGenerator[None]:
        ends = event.stream_ended is not None
        exchange = self.exchanges[event.stream_id] = Exchange(b"", has_ended=ends)
        try:
            request, exchange.length = read_request(event.headers or (), ends=ends)
        except MalformedHead as fault:
            self._charge(exchange)
            self._answer(event.stream_id, self._refuse(fault))
            return
        exchange.method = request.data.method
        exchange.has_ended = False
        yield ReceiveHttp(RequestHeaders(event.stream_id, request, ends))

    def _continue(self, event: h2.DataReceived | h2.TrailersReceived | h2.StreamEnded) -> CommandGenerator[None]:
        stream_id = event.stream_id
        exchange = self.exchanges.get(stream_id)
        try:
            if isinstance(event, h2.DataReceived):
                if data := self.read_body(exchange, event):
                    yield ReceiveHttp(RequestData(stream_id, data))
            elif exchange is None or stream_id not in self._streams:
                if exchange:  # it was refused, and comes to its end nevertheless
                    exchange.has_ended = True
            elif isinstance(event, h2.TrailersReceived):
                yield ReceiveHttp(RequestTrailers(stream_id, read_trailers(event.headers or ())))
            else:
                exchange.end()
                yield ReceiveHttp(RequestEndOfMessage(stream_id))
        except MalformedHead as fault:
            yield from self._break_body(stream_id, fault)

    def _charge(self, exchange: Exchange | None) -> None:
        if exchange:
            exchange.is_faulty = True
        self.frames.charge_reset()

    def _break_body(self, stream_id: int, fault: MalformedHead) -> CommandGenerator[None]:
        """A body that is not what its head announced: the request is answered, if that is still possible."""
        self._charge(self.exchanges.get(stream_id))
        stream = self._streams.get(stream_id)
        message = f"{MALFORMED_BODY}: {fault}"
        yield ReceiveHttp(RequestProtocolError(stream_id, message, ErrorCode.GENERIC_CLIENT_ERROR))
        if stream_id in self.exchanges:
            self._end(stream_id, stream, ErrorCodes.PROTOCOL_ERROR)

    def fail(self, error: ProtocolError) -> CommandGenerator[None]:
        is_flood = error.error_code is ErrorCodes.ENHANCE_YOUR_CALM
        reason = Reason.HTTP2_FLOOD if is_flood else Reason.MALFORMED_REQUEST
        yield from self.cut(str(error), reason, error.error_code)

    def cut(self, note: str, reason: Reason, code: ErrorCodes) -> CommandGenerator[None]:
        """End the connection for something that it did, and say so in a record."""
        self._cut_off(note, reason)
        self._is_cut_off = True
        yield from self.hang_up(code)

    def end_all(self, note: str) -> CommandGenerator[None]:
        self._is_over = True
        while self.exchanges:
            stream_id, _ = self.exchanges.popitem()
            yield ReceiveHttp(RequestProtocolError(stream_id, CANCELLED, ErrorCode.CANCEL))

    # --- what the client is told ---

    def send(self, event: HttpEvent) -> CommandGenerator[None]:
        exchange = self.exchanges.get(event.stream_id)
        if exchange is None or not self.frames.can_send(event.stream_id):
            return
        yield from ()
        exchange.has_moved = True
        match event:
            case ResponseHeaders() | Informational():
                is_last = event.response.status_code >= 200
                exchange.is_begun = is_last
                ends = is_last and isinstance(event, ResponseHeaders) and event.end_stream
                self.frames.send_head(event.stream_id, write_response(event.response), ends=ends)
            case ResponseData():
                self.frames.queue(event.stream_id, event.data)
            case ResponseTrailers():
                self.frames.end(event.stream_id, write_fields(event.trailers.fields))
            case ResponseEndOfMessage():
                self.frames.end(event.stream_id)
            case ResponseProtocolError():
                is_untouched = event.message == STALE and (
                    event.code is ErrorCode.CANCEL or exchange.method in _REPEATABLE
                )
                code = ErrorCodes.REFUSED_STREAM if is_untouched else ErrorCodes.INTERNAL_ERROR
                self._end(event.stream_id, self._streams.get(event.stream_id), code)

    def _end(self, stream_id: int, stream: HttpStream | None, code: ErrorCodes) -> None:
        """After an error: the answer that the gate made of it, the rest of a response that is whole, or a reset."""
        exchange = self.exchanges[stream_id]
        flow = getattr(stream, "flow", None)
        if flow and flow.response and flow.metadata.get(ANSWER) and not exchange.is_begun:
            self._answer(stream_id, flow.response)
        elif stream is not None and exchange.is_begun and stream.server_state == stream.state_done:
            self.frames.end(stream_id)
        else:
            self.frames.reset(stream_id, code)
            del self.exchanges[stream_id]

    def _answer(self, stream_id: int, made: Answer | http.Response) -> None:
        response = (
            http.Response.make(made.status, made.body, http.Headers(made.headers)) if isinstance(made, Answer) else made
        )
        content = response.raw_content or b""
        self.exchanges[stream_id].is_begun = True
        self.frames.send_head(stream_id, write_response(response), ends=not content)
        self.frames.queue(stream_id, content)
        self.frames.end(stream_id)

    def take_moved(self) -> list[int]:
        moved = list(self.frames.moved)
        self.frames.moved.clear()
        return moved

    def forget(self) -> None:
        self._half |= self.frames.ended
        self.frames.ended.clear()
        for stream_id in tuple(self._half):
            exchange = self.exchanges.get(stream_id)
            if exchange is not None and not exchange.has_ended and stream_id in self._streams:
                continue  # the origin answered early, and still takes what the client sends
            self._half.discard(stream_id)
            if exchange is not None:
                if not exchange.is_faulty:
                    self.frames.credit()
                del self.exchanges[stream_id]
                self.frames.reset(stream_id, ErrorCodes.NO_ERROR)  # RFC 9113 8.1: no need to send the rest
