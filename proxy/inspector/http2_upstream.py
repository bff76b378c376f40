"""The origin's end for a client that speaks HTTP/2: frames as events of mitmproxy's streams, or HTTP/1.1. No I/O.

An origin that breaks a rule fails the stream it broke it on, or every stream that is under way with it.
"""

from __future__ import annotations

from collections.abc import Mapping

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

from addons.gate import STALE
from proxy.inspector import http1
from proxy.inspector.frames import MAX_STREAMS, Frames
from proxy.inspector.heads import (
    as_http1,
    read_response,
    read_trailers,
    write_fields,
    write_request,
)
from proxy.inspector.http1 import MAX_INFORMATIONAL
from proxy.inspector.http2_end import End, Exchange
from proxy.inspector.reading import MalformedHead
from proxy.inspector.streams import Informational, informational

MAX_CAUTIOUS = 10  # streams on an origin's connection before it has said how many it takes


class UpstreamSide(End):
    """The origin's end."""

    def __init__(self, context: Context, streams: Mapping[int, HttpStream]) -> None:
        super().__init__(context, context.server, streams, Frames(client_side=True))
        self._ours: dict[int, int] = {}  # the client's stream id to the one here
        self._theirs: dict[int, int] = {}
        self._owed: dict[int, int] = {}  # as `_theirs`, of streams that are over: bytes of them wait for a client
        self._has_settings = False

    @property
    def is_free(self) -> bool:
        allowed = min(self.frames.remote_settings.max_concurrent_streams, MAX_STREAMS)
        return (
            len(self.exchanges) < (allowed if self._has_settings else MAX_CAUTIOUS)
            and not self.is_leaving
            and self.conn.connected
        )

    @property
    def is_leaving(self) -> bool:
        last = self.frames.highest_outbound_stream_id
        return self.frames.is_leaving or self._is_over or last >= Frames.HIGHEST_ALLOWED_STREAM_ID

    @property
    def is_ahead(self) -> bool:
        return self.frames.has_more and not self._is_over

    def backlog(self, stream_id: int) -> int:
        return self.frames.backlog(self._ours.get(stream_id, 0))

    # --- what the origin says ---

    def read(self, event: h2.Event) -> CommandGenerator[None]:
        match event:
            case h2.RemoteSettingsChanged():
                self._has_settings = True
            case h2.ConnectionTerminated(last_stream_id=int(last)):
                for unseen in [theirs for ours, theirs in self._theirs.items() if ours > last]:
                    yield from self._break_off(unseen, STALE, ErrorCode.CANCEL)
            case h2.ResponseReceived() | h2.InformationalResponseReceived():
                yield from self._answer(event)
            case h2.DataReceived() | h2.TrailersReceived() | h2.StreamEnded():
                yield from self._continue(event)
            case h2.StreamReset() if (stream_id := self._theirs.get(event.stream_id)) is not None:
                if event.error_code == ErrorCodes.REFUSED_STREAM:
                    yield from self._break_off(stream_id, STALE, ErrorCode.CANCEL)
                    return
                exchange = self.exchanges[stream_id]
                if event.error_code == ErrorCodes.NO_ERROR and exchange.is_whole and not exchange.has_ended:
                    exchange.end()  # Node: its RST_STREAM overtakes its END_STREAM where the socket is full
                    yield ReceiveHttp(ResponseEndOfMessage(stream_id))
                yield from self._break_off(stream_id, "the origin reset the stream")

    def _answer(self, event: h2.ResponseReceived | h2.InformationalResponseReceived) -> CommandGenerator[None]:
        stream_id = self._theirs.get(event.stream_id)
        if stream_id is None:
            return
        exchange = self.exchanges[stream_id]
        ends = isinstance(event, h2.ResponseReceived) and event.stream_ended is not None
        try:
            response, length = read_response(event.headers or (), exchange.method, ends=ends)
            if isinstance(event, h2.InformationalResponseReceived):
                exchange.informational += 1
                if exchange.informational > MAX_INFORMATIONAL:
                    raise MalformedHead("it sends one informational response after another")
                if response.status_code != 100:
                    yield ReceiveHttp(Informational(stream_id, informational(response)))
                return
        except MalformedHead as fault:
            yield from self._break_off(stream_id, str(fault))
            return
        exchange.length, exchange.is_begun = length, True
        yield ReceiveHttp(ResponseHeaders(stream_id, response, ends))

    def _continue(self, event: h2.DataReceived | h2.TrailersReceived | h2.StreamEnded) -> CommandGenerator[None]:
        stream_id = self._theirs.get(event.stream_id)
        exchange = None if stream_id is None else self.exchanges[stream_id]
        try:
            if isinstance(event, h2.DataReceived):
                data = self.read_body(exchange, event)
                if stream_id is not None and data:
                    yield ReceiveHttp(ResponseData(stream_id, data))
            elif stream_id is None or exchange is None:
                pass
            elif isinstance(event, h2.TrailersReceived):
                yield ReceiveHttp(ResponseTrailers(stream_id, read_trailers(event.headers or ())))
            else:
                exchange.end()
                yield ReceiveHttp(ResponseEndOfMessage(stream_id))
        except MalformedHead as fault:
            assert stream_id is not None
            yield from self._break_off(stream_id, str(fault))

    def _break_off(
        self, stream_id: int, note: str, code: ErrorCode = ErrorCode.GENERIC_SERVER_ERROR
    ) -> CommandGenerator[None]:
        self._end_exchange(stream_id, ErrorCodes.PROTOCOL_ERROR)
        yield ReceiveHttp(ResponseProtocolError(stream_id, note, code))

    def fail(self, error: ProtocolError) -> CommandGenerator[None]:
        yield from self.hang_up(error.error_code)

    def end_all(self, note: str) -> CommandGenerator[None]:
        self._is_over = True
        for stream_id in tuple(self.exchanges):
            yield from self._break_off(stream_id, note)

    # --- what the origin is told ---

    def send(self, event: HttpEvent) -> CommandGenerator[None]:
        yield from ()
        if isinstance(event, RequestHeaders):
            ours = self.frames.get_next_available_stream_id()
            self._ours[event.stream_id], self._theirs[ours] = ours, event.stream_id
            self.exchanges[event.stream_id] = Exchange(event.request.data.method)
            self.frames.send_head(ours, write_request(event.request), ends=event.end_stream)
            return
        found = self._ours.get(event.stream_id)
        if found is None:
            return
        match event:
            case RequestData():
                self.frames.queue(found, event.data)
            case RequestTrailers():
                self.frames.end(found, write_fields(event.trailers.fields))
            case RequestEndOfMessage():
                self.frames.end(found)
            case RequestProtocolError():
                self._end_exchange(event.stream_id, ErrorCodes.CANCEL)

    def _end_exchange(self, stream_id: int, code: ErrorCodes) -> None:
        ours = self._ours.pop(stream_id)
        del self._theirs[ours], self.exchanges[stream_id]
        self._owed[ours] = stream_id
        self.frames.reset(ours, code)

    def forget(self) -> None:
        self.frames.ended.clear()
        for stream_id in [one for one in self.exchanges if one not in self._streams]:
            if not (self.exchanges[stream_id].has_ended and self.frames.is_ending(self._ours[stream_id])):
                self._end_exchange(stream_id, ErrorCodes.CANCEL)

    def check(self, now: float, idle_s: float) -> None:
        """What is left of a request whose response is over must still go out, but not for ever."""
        for stream_id in [one for one in self.exchanges if one not in self._streams]:
            if self.exchanges[stream_id].is_quiet(now, idle_s):
                self._end_exchange(stream_id, ErrorCodes.CANCEL)

    def take(self, client: Frames) -> None:
        """Acknowledge what the client has been sent."""
        for ours in self.frames.untaken:
            stream_id = self._theirs.get(ours) or self._owed.get(ours, 0)
            self.frames.take(ours, client.backlog(stream_id))
        for ours in self._owed.keys() - self.frames.untaken:
            del self._owed[ours]

    def take_moved(self) -> list[int]:
        moved = [self._theirs[ours] for ours in self.frames.moved if ours in self._theirs]
        self.frames.moved.clear()
        for stream_id in moved:
            self.exchanges[stream_id].has_moved = True
        return moved


class Http1Side(http1.UpstreamSide):
    """The end of an origin that speaks HTTP/1.1 alone."""

    def send(self, event: HttpEvent) -> CommandGenerator[None]:
        if isinstance(event, RequestHeaders):
            request = as_http1(event.request, has_body=not event.end_stream)
            event = RequestHeaders(event.stream_id, request, event.end_stream)
        if not isinstance(event, RequestTrailers):  # RFC 9110 6.5.1: they may be dropped
            yield from super().send(event)

    def check_response(self, response: http.Response) -> None:
        coding = response.headers.get("transfer-encoding", "chunked")
        if coding.lower() != "chunked":
            raise MalformedHead("HTTP/2 has no transfer codings")
